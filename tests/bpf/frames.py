"""Frames for the oracle and the C program: built by hand, or drawn at random for a world, well-formed or not.

A frame is built well first and then, now and then, spoilt in one place: that reaches deep into the rules, where noise
would be thrown out at the first look. Noise comes too, rarely. Builders compute true checksums, so that a test can
ask whether they are still true afterwards.
"""

import random
import struct
from collections.abc import Callable
from typing import Final

from lbpod.core import layout, limits
from lbpod.core.maps import Vip, mapped
from lbpod.core.packets import Chain, Forward, Option, Relay, checksum, checksum_update
from tests.bpf.world import Flow, World

TCP: Final = layout.PROTOCOL_TCP
UDP: Final = layout.PROTOCOL_UDP
ICMP: Final = layout.PROTOCOL_ICMP
MACS: Final = b"\x02\x00\x00\x00\x00\x01" + b"\x02\x00\x00\x00\x00\x02"
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
DF, MF = 0x4000, 0x2000
QUIC_INITIAL: Final = b"\xc3\x00\x00\x00\x01\x08" + b"\x11" * 16


# --- Built ------------------------------------------------------------------------------------------------------------
def frame(ip: bytes, ethertype: int = 0x0800) -> bytes:
    return MACS + struct.pack("!H", ethertype) + ip


def ipv4(
    src: bytes, dst: bytes, proto: int, payload: bytes, fragment: int = DF, ttl: int = 61, options: bytes = b""
) -> bytes:
    first = 0x45 + len(options) // 4
    total = 20 + len(options) + len(payload)
    bare = struct.pack("!BBHHHBBH4s4s", first, 0x10, total, 0x1234, fragment, ttl, proto, 0, src, dst) + options
    return bare[:10] + struct.pack("!H", checksum(bare)) + bare[12:] + payload


def _pseudo(src: bytes, dst: bytes, proto: int, length: int) -> bytes:
    return src + dst + struct.pack("!HH", proto, length)


def tcp(
    src: bytes, dst: bytes, sport: int, dport: int, flags: int, payload: bytes = b"", options: bytes = b""
) -> bytes:
    """A TCP segment for these addresses. options: a multiple of 4 bytes."""
    words = 5 + len(options) // 4
    bare = struct.pack("!HHIIBBHHH", sport, dport, 1_000, 2_000, words << 4, flags, 64_000, 0, 0) + options + payload
    total = checksum(_pseudo(src, dst, TCP, len(bare)) + bare)
    return bare[:16] + struct.pack("!H", total) + bare[18:]


def udp(src: bytes, dst: bytes, sport: int, dport: int, payload: bytes = b"", with_checksum: bool = True) -> bytes:
    length = 8 + len(payload)
    bare = struct.pack("!HHHH", sport, dport, length, 0) + payload
    total = checksum(_pseudo(src, dst, UDP, length) + bare) if with_checksum else 0
    return bare[:6] + struct.pack("!H", total or (0xFFFF if with_checksum else 0)) + bare[8:]


def icmp(kind: int, code: int, rest: bytes, payload: bytes) -> bytes:
    bare = struct.pack("!BBH", kind, code, 0) + rest + payload
    return bare[:2] + struct.pack("!H", checksum(bare)) + bare[4:]


def tcp_to(flow: Flow, flags: int, payload: bytes = b"", fragment: int = DF) -> bytes:
    """IPv4 packet of a flow, from the client to the VIP."""
    vip = flow.vip.address[12:]
    return ipv4(flow.client, vip, TCP, tcp(flow.client, vip, flow.port, flow.vip.port, flags, payload), fragment)


def udp_to(flow: Flow, payload: bytes = b"", with_checksum: bool = True, fragment: int = DF) -> bytes:
    vip = flow.vip.address[12:]
    l4 = udp(flow.client, vip, flow.port, flow.vip.port, payload, with_checksum)
    return ipv4(flow.client, vip, UDP, l4, fragment)


def quoted_from(flow: Flow, l4_bytes: int = 8, options: bytes = b"", fragment: int = DF) -> bytes:
    """Start of a packet of a flow from the VIP to the client, as an ICMP error quotes it."""
    vip = flow.vip
    if vip.protocol == TCP:
        l4 = tcp(vip.address[12:], flow.client, vip.port, flow.port, ACK, b"x" * 64)
    else:
        l4 = udp(vip.address[12:], flow.client, vip.port, flow.port, b"x" * 64)
    packet = ipv4(vip.address[12:], flow.client, vip.protocol, l4, fragment, options=options)
    return packet[: 20 + len(options) + l4_bytes]


def icmp_error_to(flow: Flow, quoted: bytes, kind: int = 3, code: int = 4, fragment: int = 0) -> bytes:
    """IPv4 packet of a router on the way to the client, to the VIP."""
    message = icmp(kind, code, b"\x00\x00\x05\x78", quoted)
    return ipv4(b"\xc6\x12\x00\x01", flow.vip.address[12:], ICMP, message, fragment)


def geneve(option: bytes, vni: int, inner: bytes, flags: int = 0x40, protocol: int = 0x0800, version: int = 0) -> bytes:
    """Geneve header, option and inner packet."""
    return struct.pack("!BBHI", version << 6 | len(option) // 4, flags, protocol, vni << 8) + option + inner


def tunnel(src: bytes, dst: bytes, payload: bytes, sport: int = 50_000, fragment: int = DF) -> bytes:
    """Outer IPv4 packet around a Geneve payload."""
    header = struct.pack("!HHHH", sport, limits.GENEVE_PORT, 8 + len(payload), 0)
    return ipv4(src, dst, UDP, header + payload, fragment)


# --- Drawn ------------------------------------------------------------------------------------------------------------
class Draw:
    """Frames of one world, one after the other, from one number."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.dice = random.Random(seed)
        self.here = world.maps.settings().node_addr[12:]

    def chance(self, probability: float) -> bool:
        return self.dice.random() < probability

    def incoming(self) -> bytes:
        """A frame for hf_xdp."""
        if self.chance(0.01):
            return self.dice.randbytes(self.dice.randrange(14, 200))
        drawn = self._tunnelled() if self.chance(0.45) else frame(self._packet())
        if self.chance(0.02):
            drawn = drawn[:12] + struct.pack("!H", self.dice.choice([0x8100, 0x88A8])) + b"\x00\x05" + drawn[12:]
        if self.chance(0.01):
            drawn = drawn[:12] + struct.pack("!H", self.dice.choice([0x0806, 0x86DD])) + drawn[14:]
        if self.chance(0.1):
            drawn += self.dice.randbytes(self.dice.randrange(1, 24))
        return self._spoil(drawn) if self.chance(0.12) else drawn

    def outgoing(self) -> bytes:
        """A frame for hf_tc: mostly what a pod answers."""
        drawn = frame(self._reply())
        if self.chance(0.02):
            drawn = drawn[:12] + struct.pack("!H", self.dice.choice([0x0806, 0x86DD, 0x8100])) + drawn[14:]
        if self.chance(0.05):
            drawn += self.dice.randbytes(self.dice.randrange(1, 24))
        return self._spoilt_somewhat(drawn)

    def forwarded(self) -> bytes:
        """A frame for hf_tc that the node forwards: to a VIP's address, mostly to another port, or to anybody."""
        flow, protocol = self._flow(), self.dice.choice([TCP, UDP, 132])
        target = flow.vip.address[12:] if self.chance(0.7) else self.dice.randbytes(4)
        return self._spoilt_somewhat(frame(ipv4(flow.client, target, protocol, self.dice.randbytes(24))))

    def _spoilt_somewhat(self, drawn: bytes) -> bytes:
        """Now and then. BPF_PROG_TEST_RUN wants whole IP headers, and gets them."""
        drawn = self._spoil(drawn) if self.chance(0.15) else drawn
        shortest = 54 if drawn[12:14] == b"\x86\xdd" else 34
        return drawn + bytes(max(shortest - len(drawn), 0))

    def _spoil(self, drawn: bytes) -> bytes:
        spoilt = bytearray(drawn)
        kind = self.dice.randrange(4)
        if kind == 0:
            return drawn[: self.dice.randrange(14, len(drawn) + 1)]
        at = self.dice.randrange(12, min(len(spoilt) - 1, 150))
        if kind == 1:
            spoilt[at] ^= 1 << self.dice.randrange(8)
        elif kind == 2:
            spoilt[at] = self.dice.choice([0, 1, 0x7F, 0x80, 0xFF, self.dice.randrange(256)])
        else:
            spoilt[at : at + 2] = struct.pack("!H", self.dice.choice([0, 1, 0xFFFF, self.dice.randrange(65_536)]))
        return bytes(spoilt)

    # --- Packets from the router, and inside tunnels ---
    def _flow(self) -> Flow:
        if self.chance(0.75):
            return self.dice.choice(self.world.flows)
        return Flow(b"\xc0\x00\x02" + self.dice.randbytes(1), self.dice.randrange(65_536), self._vip())

    def _vip(self) -> Vip:
        vip = self.dice.choice(self.world.vips)
        if self.chance(0.03):
            return vip._replace(port=self.dice.randrange(65_536))
        if self.chance(0.03):
            return vip._replace(address=mapped(self.dice.choice([self.here, self.dice.randbytes(4)])))
        return vip

    def _payload(self) -> bytes:
        length = self.dice.choice([0, 0, 1, 6, 7, 20, 41, 100, 1_000, 1_372, 1_400, 1_440])
        return self.dice.randbytes(min(length, 8)) + bytes(max(length - 8, 0))

    def _fragment(self) -> int:
        if self.chance(0.06):
            return self.dice.choice([MF, MF | DF, 1, 0x1FFF, MF | 185, 0x8000])
        return DF if self.chance(0.8) else 0

    def _packet(self) -> bytes:
        packet = self._sound_packet()
        if self.chance(0.015):
            return bytes([self.dice.choice([0x44, 0x43, 0x40, 0x46, 0x55, 0x65, 0x05])]) + packet[1:]
        if self.chance(0.02) and len(packet) > 32:  # TCP's data offset, where it is TCP
            return packet[:32] + bytes([self.dice.choice([0x00, 0x40, 0x60, 0x70, 0xF0])]) + packet[33:]
        return packet

    def _sound_packet(self) -> bytes:
        kind, flow = self.dice.random(), self._flow()
        if kind < 0.14:
            return self._icmp(flow)
        if kind < 0.17:
            vip = flow.vip.address[12:]
            return ipv4(flow.client, vip, self.dice.choice([2, 47, 50, 132, 255]), self._payload(), self._fragment())
        if kind < 0.20:
            vip = flow.vip.address[12:]
            words = self.dice.randrange(1, 11)
            return ipv4(
                flow.client, vip, flow.vip.protocol, self._payload(), self._fragment(), options=bytes(words * 4)
            )
        if flow.vip.protocol == UDP:
            payload = QUIC_INITIAL[: self.dice.randrange(5, 23)] if self.chance(0.3) else self._payload()
            return udp_to(flow, payload, self.chance(0.8), self._fragment())
        flags = self.dice.choice(
            [SYN, SYN, ACK, ACK, ACK, ACK | FIN, RST, RST | ACK, SYN | ACK, SYN | FIN, SYN | RST, 0]
        )
        return tcp_to(flow, flags | self.dice.choice([0, 0, 0x08, 0xC0]), self._payload(), self._fragment())

    def _icmp(self, flow: Flow) -> bytes:
        vip, kind = flow.vip.address[12:], self.dice.random()
        if kind < 0.2:
            message = icmp(8, self.dice.choice([0, 0, 0, 3]), self.dice.randbytes(4), self._payload())
            return ipv4(flow.client, vip, ICMP, message, self._fragment(), ttl=self.dice.choice([1, 63, 64, 255]))
        if kind < 0.3:
            message = icmp(self.dice.randrange(256), 0, self.dice.randbytes(4), self._payload())
            return ipv4(flow.client, vip, ICMP, message[: self.dice.randrange(len(message) + 1)], self._fragment())
        options = bytes(4 * self.dice.randrange(1, 11)) if self.chance(0.15) else b""
        quoted = quoted_from(flow, self.dice.choice([8, 8, 8, 20, 7, 4, 40, 64]), options, self._fragment())
        kind, code = self.dice.choice([3, 3, 11, 12, 3, 5]), self.dice.choice([0, 1, 3, 4])
        return icmp_error_to(flow, quoted, kind, code, self.dice.choice([0, DF, self._fragment()]))

    # --- Tunnels ---
    def _option(self) -> Option:
        kind, world = self.dice.random(), self.world
        if kind < 0.3:
            pod, port = self.dice.choice(world.pods())
            return Forward(mapped(pod), port)
        if kind < 0.62:
            return Relay(self.dice.getrandbits(32), self.dice.choice([0, 1, 1, 2, 3, 4, 255]), self.dice.choice([0, 3]))
        room = self.dice.randrange(limits.REPLICAS_MAX + 1)
        members = [self.dice.choice(self._members()) for _ in range(room)]
        cut = self.dice.randrange(room + 1)
        backend = self.dice.choice(world.backend_ids if self.chance(0.95) else [0, limits.BACKEND_IDS_MAX, 1 << 31])
        epoch, full = self.dice.getrandbits(32), self.chance(0.5)
        overrules = random.Random(epoch).random() < 0.3  # other dice, so that frames stay what they were but for this
        return Chain(backend, epoch, full, tuple(members[:cut]), tuple(members[cut:]), overrules=overrules)

    def _members(self) -> list[int]:
        strange = [limits.MEMBER_NONE, limits.MEMBERS_MAX, 5]
        return [*self.world.member_ids, *self.world.member_ids, self.dice.choice(strange)]

    def _tunnelled(self) -> bytes:
        option = self._option()
        inner = self._packet()
        if isinstance(option, Forward) and self.chance(0.03):
            inner = self._sum_that_vanishes(inner, option)
        src = self.dice.choice(self.world.peers) if self.chance(0.97) else self.dice.randbytes(4)
        vni = self.world.maps.settings().vni
        if self.chance(0.04):
            vni = vni ^ 1 << self.dice.randrange(24)
        packed = option.pack()
        if self.chance(0.1):
            return frame(tunnel(src, self.here, self.dice.choice(_BREAKAGES)(self.dice, packed, vni, inner)))
        fragment = DF if self.chance(0.98) else self.dice.choice([0, MF, 1, 0x8000])
        return frame(tunnel(src, self.here, geneve(packed, vni, inner), self.dice.randrange(65_536), fragment))

    def _sum_that_vanishes(self, inner: bytes, option: Forward) -> bytes:
        """Give a UDP packet the checksum that the rewriting turns into 0."""
        if inner[9] != UDP or len(inner) < 28 or inner[0] != 0x45:
            return inner
        before, after = inner[16:20] + inner[22:24], option.address[12:] + struct.pack("!H", option.port)
        return inner[:26] + struct.pack("!H", checksum_update(0, after, before)) + inner[28:]

    # --- What pods send ---
    def _reply(self) -> bytes:
        flow = self._flow()
        vip = flow.vip
        pod, port = self.dice.choice(self.world.pods())
        known = [*self.world.maps.nat.rows, *self.world.maps.unassured.rows]
        if known and self.chance(0.8):
            key = self.dice.choice(known)
            pod, port = key[28:32], int.from_bytes(key[34:36], "big")
            flow = Flow(key[12:16], int.from_bytes(key[32:34], "big"), vip._replace(protocol=key[36]))
        if self.chance(0.05):
            return ipv4(pod, flow.client, self.dice.choice([1, 2, 47]), self._payload(), self._fragment())
        options = bytes(4) if self.chance(0.03) else b""
        if flow.vip.protocol == UDP:
            l4 = udp(pod, flow.client, port, flow.port, self._payload(), self.chance(0.8))
            return ipv4(pod, flow.client, UDP, l4, self._fragment(), options=options)
        flags = self.dice.choice([SYN | ACK, SYN | ACK, SYN, ACK, ACK | FIN, RST, RST | ACK | FIN])
        l4 = tcp(pod, flow.client, port, flow.port, flags, self._payload(), self._tcp_options())
        return ipv4(pod, flow.client, TCP, l4, self._fragment(), options=options)

    def _tcp_options(self) -> bytes:
        known = [b"\x01", b"\x04\x02", b"\x03\x03\x07", b"\x08\x0a" + bytes(8), b"\x00", b"\x02\x03\x05", b"\x05\x01"]
        options = b""
        for _ in range(self.dice.randrange(6)):
            mss = b"\x02\x04" + struct.pack("!H", self.dice.choice([1_460, 1_400, 536, 0, 65_535, 8_960]))
            options += mss if self.chance(0.4) else self.dice.choice(known)
        options = options[:40]
        return options + bytes([self.dice.choice([0, 1])] * (-len(options) % 4))


_Breakage = Callable[[random.Random, bytes, int, bytes], bytes]


def _break_option(dice: random.Random, option: bytes, vni: int, inner: bytes) -> bytes:
    """Another class, type or length in the option's header, or another number of option bytes."""
    broken = bytearray(option)
    at = dice.randrange(4)
    broken[at] = dice.choice([0, broken[at] ^ 1, broken[at] | 0xE0, dice.randrange(256)])
    if dice.random() < 0.5:
        broken = bytearray(option) + bytes(4 * dice.randrange(1, 5))
    return geneve(bytes(broken), vni, inner)


def _break_header(dice: random.Random, option: bytes, vni: int, inner: bytes) -> bytes:
    which = dice.randrange(4)
    if which == 0:
        return geneve(option, vni, inner, version=dice.randrange(1, 4))
    if which == 1:
        return geneve(option, vni, inner, flags=dice.choice([0x80, 0xC0, 0x00, 0x3F]))
    if which == 2:
        return geneve(option, vni, inner, protocol=dice.choice([0x6558, 0x86DD, 0]))
    broken = bytearray(geneve(option, vni, inner))
    broken[0] = dice.randrange(64)
    return bytes(broken)


def _break_pod(dice: random.Random, option: bytes, vni: int, inner: bytes) -> bytes:
    broken = bytearray(option)
    broken[4 + dice.randrange(len(option) - 4)] ^= 1 << dice.randrange(8)
    return geneve(bytes(broken), vni, inner)


def _break_short(dice: random.Random, option: bytes, vni: int, inner: bytes) -> bytes:
    whole = geneve(option, vni, inner)
    return whole[: dice.randrange(min(len(whole), 90) + 1)]


def _break_counts(dice: random.Random, option: bytes, vni: int, inner: bytes) -> bytes:
    """Visited and left of a chain (of another option: whatever lies there)."""
    broken = bytearray(option)
    broken[min(12 + dice.randrange(2), len(broken) - 1)] = dice.choice([0, 1, 3, 6, 7, 255])
    return geneve(bytes(broken), vni, inner)


_BREAKAGES: Final[tuple[_Breakage, ...]] = (_break_option, _break_header, _break_pod, _break_short, _break_counts)
