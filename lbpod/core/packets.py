"""Packets as bytes: taken apart, put together, rewritten. Pure functions, the slow and obvious half of the fast path.

Why apart from ``oracle.py``: there it is decided what a packet gets, here only how that looks on the wire, so that a
wrong byte and a wrong decision are never the same mistake. Written from RFC 791 (IPv4), 768 (UDP), 9293 (TCP), 792
(ICMP), 8926 (Geneve) and 1624 (incremental checksums), and from ``lbpod/bpf/README.md`` for the options; never from the
C program.

Words: *frame* starts with its Ethernet header; *ip* starts with its IPv4 header and ends with the frame (padding behind
the total length included). Addresses are 4 bytes here: they are what lies in the packet. Ports and lengths are host
integers.

Left to others: which addresses and ports mean something (``oracle.py``), and IPv6, which is a parser and a header more.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from lbpod.core.hashing import MAPPED_PREFIX
from lbpod.core.limits import GENEVE_PORT, REPLICAS_MAX

ETHERNET_BYTES: Final = 14
IPV4_BYTES: Final = 20
UDP_BYTES: Final = 8
TCP_BYTES: Final = 20
ICMP_BYTES: Final = 8
QUOTED_L4_BYTES: Final = 8
"""What an ICMP error quotes at least behind the quoted IP header: the ports, and four bytes more."""

ETHERTYPE_IPV4: Final = 0x0800
ETHERTYPES_VLAN: Final = (0x8100, 0x88A8)
DONT_FRAGMENT: Final = 0x4000
MORE_FRAGMENTS: Final = 0x2000
FRAGMENT_OFFSET: Final = 0x1FFF
TTL: Final = 64

TCP_FIN: Final = 0x01
TCP_SYN: Final = 0x02
TCP_RST: Final = 0x04
TCP_ACK: Final = 0x10

ICMP_ECHO_REPLY: Final = 0
ICMP_UNREACHABLE: Final = 3
ICMP_FRAGMENTATION_NEEDED: Final = 4
ICMP_ECHO_REQUEST: Final = 8
ICMP_TIME_EXCEEDED: Final = 11
ICMP_PARAMETER_PROBLEM: Final = 12
ICMP_ERRORS: Final = (ICMP_UNREACHABLE, ICMP_TIME_EXCEEDED, ICMP_PARAMETER_PROBLEM)

GENEVE_BYTES: Final = 8
GENEVE_OPTION_HEADER_BYTES: Final = 4
GENEVE_OPTION_CLASS: Final = 0xFF48
GENEVE_CRITICAL: Final = 0x40
GENEVE_CONTROL: Final = 0x80
SOURCE_PORT_FIRST: Final = 49_152
SOURCE_PORT_MASK: Final = 0x3FFF

CHAIN_FULL: Final = 1
CHAIN_OVERRULES: Final = 2
"""Flags of a chain."""

QUIC_INITIAL_PAYLOAD_BYTES: Final = 7
"""First byte, version (4), and two bytes more: shorter payloads are nobody's Initial."""


class OptionType(IntEnum):
    """Type of the one Geneve option (the high bit says critical)."""

    FORWARD = 0x81
    RELAY = 0x82
    CHAIN = 0x83


@dataclass(frozen=True, slots=True)
class Forward:
    """A mux has decided: deliver to this pod. address: 16 bytes, IPv4-mapped."""

    address: bytes
    port: int

    def pack(self) -> bytes:
        return _option(OptionType.FORWARD, struct.pack("!16sHH", self.address, self.port, 0))


@dataclass(frozen=True, slots=True)
class Relay:
    """A mux could not decide. hops: 1 at the first relay. origin: the member that had the packet from the router."""

    epoch: int
    hops: int
    origin: int

    def pack(self) -> bytes:
        return _option(OptionType.RELAY, struct.pack("!IBBH", self.epoch, self.hops, 0, self.origin))


@dataclass(frozen=True, slots=True)
class Chain:
    """A replica has recorded: record, too, and pass it on. Invariant: len(visited) + len(left) <= REPLICAS_MAX.

    overrules: a replica on the way knew better, so whatever is recorded where the chain comes from gives way.
    """

    backend: int
    epoch: int
    full: bool
    visited: tuple[int, ...]
    left: tuple[int, ...]
    overrules: bool = False

    def pack(self) -> bytes:
        members = (*self.visited, *self.left)
        assert len(members) <= REPLICAS_MAX, "a chain has room for all replicas of a slot and no more"
        padded = (*members, *(0 for _ in range(REPLICAS_MAX - len(members))))
        flags = self.full * CHAIN_FULL | self.overrules * CHAIN_OVERRULES
        counts = (len(self.visited), len(self.left), flags, 0)
        return _option(OptionType.CHAIN, struct.pack("!II4B6H", self.backend, self.epoch, *counts, *padded))


Option = Forward | Relay | Chain


@dataclass(frozen=True, slots=True)
class Tunnel:
    """A tunnel packet, opened. inner: the IPv4 packet with whatever follows it inside the outer UDP payload and behind.

    room_bytes: how much of ``inner`` lies within the outer UDP payload: an inner packet must not need more.
    """

    vni: int
    option: Option
    inner: bytes
    room_bytes: int
    overhead_bytes: int


def _option(kind: OptionType, data: bytes) -> bytes:
    return struct.pack("!HBB", GENEVE_OPTION_CLASS, kind, len(data) // 4) + data


def _u16(data: bytes | bytearray, offset: int) -> int:
    return data[offset] << 8 | data[offset + 1]


# --- Reading ----------------------------------------------------------------------------------------------------------
def ethertype(frame: bytes) -> int:
    return _u16(frame, 12)


def is_ipv4(ip: bytes) -> bool:
    """Whether there is a whole fixed IPv4 header."""
    return len(ip) >= IPV4_BYTES and ip[0] >> 4 == 4


def header_words(ip: bytes) -> int:
    return ip[0] & 0x0F


def total_bytes(ip: bytes) -> int:
    return _u16(ip, 2)


def fragment_offset(ip: bytes) -> int:
    return _u16(ip, 6) & FRAGMENT_OFFSET


def is_fragment(ip: bytes) -> bool:
    return bool(_u16(ip, 6) & (FRAGMENT_OFFSET | MORE_FRAGMENTS))


def dont_fragment(ip: bytes) -> bool:
    return bool(_u16(ip, 6) & DONT_FRAGMENT)


def protocol(ip: bytes) -> int:
    return ip[9]


def source(ip: bytes) -> bytes:
    return ip[12:16]


def destination(ip: bytes) -> bytes:
    return ip[16:20]


def ports(l4: bytes) -> tuple[int, int]:
    """Source and destination port of a TCP or UDP header."""
    return _u16(l4, 0), _u16(l4, 2)


def is_quic_initial(payload: bytes) -> bool:
    """RFC 9000, 17.2.2: long header, fixed bit, type 0, version 1. payload: of UDP."""
    return (
        len(payload) >= QUIC_INITIAL_PAYLOAD_BYTES and payload[0] & 0xF0 == 0xC0 and payload[1:5] == b"\x00\x00\x00\x01"
    )


def quoted_packet(ip: bytes) -> bytes | None:
    """The packet that an ICMP error quotes, or None where it is no error or quotes too little to be recognised.

    ip: a checked ICMP packet without IP options; the quoted packet must be a first piece of IPv4 with 8 bytes of L4.
    """
    icmp = ip[IPV4_BYTES : total_bytes(ip)]
    quoted = icmp[ICMP_BYTES:]
    if len(icmp) < ICMP_BYTES or icmp[0] not in ICMP_ERRORS or not is_ipv4(quoted):
        return None
    if header_words(quoted) < 5 or fragment_offset(quoted) != 0:
        return None
    if len(quoted) < header_words(quoted) * 4 + QUOTED_L4_BYTES:
        return None
    return quoted


def overlay(ip: bytes) -> tuple[int, int] | None:
    """Say whose a Geneve packet is: its protocol type and VNI, wherever the frame ends; None where it ends before them.

    ip: as for ``parse_tunnel``. Lengths are not looked at: what is another's need not be sound by our lights.
    """
    head = ip[IPV4_BYTES + UDP_BYTES :]
    return (_u16(head, 2), int.from_bytes(head[4:7], "big")) if len(head) >= GENEVE_BYTES else None


def parse_tunnel(ip: bytes) -> Tunnel | None:
    """Open a Geneve packet (outer IPv4 without options, whole UDP header there); None where its form is not ours."""
    total = total_bytes(ip)
    if total > len(ip) or total < IPV4_BYTES + UDP_BYTES or _u16(ip, 24) != total - IPV4_BYTES:
        return None
    geneve = ip[IPV4_BYTES + UDP_BYTES : total]
    if len(geneve) < GENEVE_BYTES:
        return None
    options_bytes = (geneve[0] & 0x3F) * 4
    if geneve[0] >> 6 != 0 or geneve[1] & GENEVE_CONTROL or _u16(geneve, 2) != ETHERTYPE_IPV4:
        return None
    if options_bytes < GENEVE_OPTION_HEADER_BYTES or len(geneve) < GENEVE_BYTES + options_bytes:
        return None
    option = _parse_option(geneve[GENEVE_BYTES : GENEVE_BYTES + options_bytes])
    if option is None:
        return None
    overhead = IPV4_BYTES + UDP_BYTES + GENEVE_BYTES + options_bytes
    vni = int.from_bytes(geneve[4:7], "big")
    return Tunnel(vni, option, ip[overhead:], total - overhead, overhead)


def _parse_option(data: bytes) -> Option | None:
    """Read the option that fills ``data`` exactly; None where it is another one, or of another length."""
    cls, kind, length = struct.unpack_from("!HBB", data)
    body = data[GENEVE_OPTION_HEADER_BYTES:]
    if cls != GENEVE_OPTION_CLASS or (length & 0x1F) * 4 != len(body):
        return None
    if kind == OptionType.FORWARD and len(body) == 20:
        address, port, _ = struct.unpack("!16sHH", body)
        return Forward(address, port) if address.startswith(MAPPED_PREFIX) else None
    if kind == OptionType.RELAY and len(body) == 8:
        epoch, hops, _, origin = struct.unpack("!IBBH", body)
        return Relay(epoch, hops, origin)
    if kind == OptionType.CHAIN and len(body) == 24:
        backend, epoch, visited, left, flags, _, *members = struct.unpack("!II4B6H", body)
        if visited + left > REPLICAS_MAX:
            return None
        there = tuple(members[:visited]), tuple(members[visited : visited + left])
        return Chain(backend, epoch, bool(flags & CHAIN_FULL), *there, overrules=bool(flags & CHAIN_OVERRULES))
    return None


# --- Writing ----------------------------------------------------------------------------------------------------------
def checksum(data: bytes) -> int:
    """Internet checksum (RFC 1071) of ``data``, whose own checksum field is zero."""
    if len(data) % 2:
        data += b"\x00"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    return ~_fold(total) & 0xFFFF


def _fold(total: int) -> int:
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def checksum_update(old: int, before: bytes, after: bytes) -> int:
    """RFC 1624, equation 3: new = ~(~old + ~m + m'). before, after: of equal, even length."""
    assert len(before) == len(after) and len(before) % 2 == 0, "a checksum is made of 16-bit words"
    words = f"!{len(before) // 2}H"
    gone = sum(~word & 0xFFFF for word in struct.unpack(words, before))
    return ~_fold((~old & 0xFFFF) + gone + sum(struct.unpack(words, after))) & 0xFFFF


def ethernet(dst: bytes, src: bytes) -> bytes:
    return dst + src + struct.pack("!H", ETHERTYPE_IPV4)


def ipv4_header(src: bytes, dst: bytes, proto: int, payload_bytes: int) -> bytes:
    """Header of our own packets: no options, TTL 64, DF, identification and TOS 0."""
    total = IPV4_BYTES + payload_bytes
    bare = struct.pack("!BBHHHBBH4s4s", 0x45, 0, total, 0, DONT_FRAGMENT, TTL, proto, 0, src, dst)
    return bare[:10] + struct.pack("!H", checksum(bare)) + bare[12:]


def node_checksum(src: bytes, dst: bytes) -> int:
    """Give ``node.csum``: the sum of the outer IPv4 header's 16-bit words but for the total length, as read in memory
    (little end first), folded to 16 bits. src: this node's address, dst: the other node's; 4 bytes each."""
    header = ipv4_header(src, dst, 17, 0)
    words = struct.unpack("<10H", header)
    return _fold(sum(words) - words[1] - words[5])


def tunnel_headers(src: bytes, dst: bytes, flow_hash: int, vni: int, option: Option, inner_bytes: int) -> bytes:
    """Everything between Ethernet and the inner packet. inner_bytes: the inner IPv4 total length."""
    packed = option.pack()
    udp_bytes = UDP_BYTES + GENEVE_BYTES + len(packed) + inner_bytes
    sport = SOURCE_PORT_FIRST + (flow_hash & SOURCE_PORT_MASK)
    udp = struct.pack("!HHHH", sport, GENEVE_PORT, udp_bytes, 0)
    geneve = struct.pack("!BBHI", len(packed) // 4, GENEVE_CRITICAL, ETHERTYPE_IPV4, vni << 8)
    return ipv4_header(src, dst, 17, udp_bytes) + udp + geneve + packed


def option_overhead_bytes(option: Option) -> int:
    """Bytes that a tunnel with this option adds in front of the inner packet, from the outer IPv4 header on."""
    return IPV4_BYTES + UDP_BYTES + GENEVE_BYTES + len(option.pack())


def echo_reply(frame: bytes) -> bytes:
    """Turn an echo request into its answer in place: addresses and MACs swapped, type 0, TTL 64."""
    ip = bytearray(frame[ETHERNET_BYTES:])
    ip[12:16], ip[16:20] = ip[16:20], ip[12:16]
    _replace(ip, 8, bytes([TTL, ip[9]]), _IP_SUM)
    _replace(ip, IPV4_BYTES, bytes([ICMP_ECHO_REPLY, ip[IPV4_BYTES + 1]]), _Sum(IPV4_BYTES + 2))
    return frame[6:12] + frame[0:6] + frame[12:14] + bytes(ip)


TOO_BIG_GROWTH_BYTES: Final = IPV4_BYTES + ICMP_BYTES
"""What ``too_big_reply`` puts in front of the packet that it quotes."""


def too_big_reply(frame: bytes, mtu: int) -> bytes:
    """RFC 1191: "fragmentation needed" to the sender of ``frame``, from the address that it was sent to."""
    ip = frame[ETHERNET_BYTES:]
    bare = struct.pack("!BBHHH", ICMP_UNREACHABLE, ICMP_FRAGMENTATION_NEEDED, 0, 0, mtu)
    quote = ip[: IPV4_BYTES + QUOTED_L4_BYTES]
    icmp = bare[:2] + struct.pack("!H", checksum(bare + quote)) + bare[4:] + quote
    return frame[6:12] + frame[0:6] + frame[12:14] + ipv4_header(destination(ip), source(ip), 1, len(icmp)) + icmp


@dataclass(frozen=True, slots=True)
class _Sum:
    """Where a checksum lies. zero_is_none: 0 says that there is none (UDP), so 0 stays and never comes to be."""

    at: int
    zero_is_none: bool = False


_IP_SUM: Final = _Sum(10)


def _l4_sum(proto: int) -> _Sum:
    return _Sum(IPV4_BYTES + 6, zero_is_none=True) if proto == 17 else _Sum(IPV4_BYTES + 16)


def _replace(packet: bytearray, at: int, after: bytes, *sums: _Sum) -> None:
    """Overwrite bytes and update the checksums that cover them."""
    before = bytes(packet[at : at + len(after)])
    packet[at : at + len(after)] = after
    for place in sums:
        old = _u16(packet, place.at)
        if place.zero_is_none and old == 0:
            continue
        new = checksum_update(old, before, after)
        packet[place.at : place.at + 2] = struct.pack("!H", 0xFFFF if place.zero_is_none and new == 0 else new)


def rewrite_destination(ip: bytes, address: bytes, port: int) -> bytes:
    """Destination NAT of a TCP or UDP packet without IP options."""
    packet, l4_sum = bytearray(ip), _l4_sum(protocol(ip))
    _replace(packet, 16, address, _IP_SUM, l4_sum)
    _replace(packet, IPV4_BYTES + 2, struct.pack("!H", port), l4_sum)
    return bytes(packet)


def rewrite_source(ip: bytes, address: bytes, port: int) -> bytes:
    """Source NAT of a TCP or UDP packet without IP options."""
    packet, l4_sum = bytearray(ip), _l4_sum(protocol(ip))
    _replace(packet, 12, address, _IP_SUM, l4_sum)
    _replace(packet, IPV4_BYTES, struct.pack("!H", port), l4_sum)
    return bytes(packet)


def rewrite_quoted(ip: bytes, address: bytes, port: int) -> bytes:
    """The same for an ICMP error: its destination and, in what it quotes, the source become address and port.

    The quoted IP header's checksum is updated, the quoted L4 one is not; the ICMP checksum covers all three changes.
    """
    packet, icmp_sum = bytearray(ip), _Sum(IPV4_BYTES + 2)
    quoted_at = IPV4_BYTES + ICMP_BYTES
    l4_at = quoted_at + header_words(ip[quoted_at:]) * 4
    _replace(packet, 16, address, _IP_SUM)
    quoted_sum = checksum_update(_u16(ip, quoted_at + 10), ip[quoted_at + 12 : quoted_at + 16], address)
    _replace(packet, quoted_at + 12, address, icmp_sum)
    _replace(packet, quoted_at + 10, struct.pack("!H", quoted_sum), icmp_sum)
    _replace(packet, l4_at, struct.pack("!H", port), icmp_sum)
    return bytes(packet)


def clamp_mss(ip: bytes, mss_max: int) -> bytes:
    """Lower the MSS option of a TCP packet without IP options to ``mss_max``; a smaller or missing one stays, and so
    does everything where the data offset leaves the packet."""
    end = IPV4_BYTES + (ip[IPV4_BYTES + 12] >> 4) * 4
    if end > len(ip):
        return ip
    at = IPV4_BYTES + TCP_BYTES
    while at < end:
        kind = ip[at]
        if kind == 1:
            at += 1
            continue
        if kind == 0 or at + 2 > end or ip[at + 1] < 2 or at + ip[at + 1] > end:
            return ip
        if kind == 2 and ip[at + 1] == 4:
            return _lower_mss(ip, at + 2, mss_max)
        at += ip[at + 1]
    return ip


def _lower_mss(ip: bytes, at: int, mss_max: int) -> bytes:
    if _u16(ip, at) <= mss_max:
        return ip
    packet = bytearray(ip)
    even = at - at % 2
    widened = bytes(packet[even:at]) + struct.pack("!H", mss_max) + bytes(packet[at + 2 : even + 2 * (1 + at % 2)])
    _replace(packet, even, widened, _l4_sum(6))
    return bytes(packet)
