"""Frames by hand: put on a wire as they are, and read off it again.

Why raw: what is odd here no kernel would send. A `Wire` puts frames on the router's end of a node's link, so that the
node's XDP program is the first to see them, whatever they claim to be.
"""

import ipaddress
import socket
import struct
from types import TracebackType
from typing import Final, Self

from lbpod.core import packets
from lbpod.core.packets import Option, Tunnel
from lbpod.lab import Capture, Node, Router
from lbpod.lab.checksums import frame_payload, inet_checksum
from tests.integration.traffic import ICMP, TCP, UDP, VNI

SYN: Final = 0x02
ACK: Final = 0x10
FIN: Final = 0x01
GENEVE_PORT: Final = 6081


def raw(text: str) -> bytes:
    """4 bytes of an IPv4 address."""
    return ipaddress.IPv4Address(text).packed


def ipv4(
    source: str,
    target: str,
    protocol: int,
    payload: bytes,
    *,
    options: bytes = b"",
    total: int | None = None,
    fragment: int = 0x4000,
    words: int | None = None,
) -> bytes:
    """A packet whose header checksum is right whatever else is wrong. fragment: flags and offset."""
    header_words = 5 + len(options) // 4 if words is None else words
    length = 20 + len(options) + len(payload) if total is None else total
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x40 | header_words, 0, length, 1, fragment, 64, protocol, 0, raw(source), raw(target)
    )
    sum_be = struct.pack("!H", inet_checksum(head + options))
    return head[:10] + sum_be + head[12:] + options + payload


def tcp(
    source: str, sport: int, target: str, dport: int, flags: int = ACK, data: bytes = b"", *, words: int = 5
) -> bytes:
    """A TCP segment with its checksum. words: the data offset that it claims."""
    head = struct.pack("!HHIIBBHHH", sport, dport, 1, 1, words << 4, flags, 1000, 0, 0)
    pseudo = raw(source) + raw(target) + struct.pack("!BBH", 0, TCP, len(head) + len(data))
    return head[:16] + struct.pack("!H", inet_checksum(pseudo + head + data)) + head[18:] + data


def udp(source: str, sport: int, target: str, dport: int, data: bytes = b"") -> bytes:
    """A UDP datagram with its checksum."""
    head = struct.pack("!HHHH", sport, dport, 8 + len(data), 0)
    pseudo = raw(source) + raw(target) + struct.pack("!BBH", 0, UDP, len(head) + len(data))
    return head[:6] + struct.pack("!H", inet_checksum(pseudo + head + data) or 0xFFFF) + data


def icmp(kind: int, code: int, rest: int, data: bytes) -> bytes:
    """An ICMP message with its checksum."""
    head = struct.pack("!BBHI", kind, code, 0, rest)
    return head[:2] + struct.pack("!H", inet_checksum(head + data)) + head[4:] + data


def tunnel(source: str, target: str, option: Option, inner: bytes, *, vni: int = VNI) -> bytes:
    """An outer IPv4 packet as an LB would send it."""
    return packets.tunnel_headers(raw(source), raw(target), 0x1234, vni, option, len(inner)) + inner


class Wire:
    """The router's end of a node's link, to write to."""

    def __init__(self, router: Router, node: Node) -> None:
        self._head = _mac(node.mac()) + _mac(router.mac(node.router_interface))
        with router.in_netns():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self._socket.bind((node.router_interface, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def send(self, payload: bytes, *, ethertype: int = 0x0800) -> None:
        """One frame to the node."""
        self._socket.send(self._head + ethertype.to_bytes(2) + payload)


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def is_ip(frame: bytes) -> bool:
    return frame_payload(frame)[0] == 0x0800


def ip_of(frame: bytes) -> bytes:
    """The IPv4 packet in a frame, without Ethernet padding."""
    packet = frame_payload(frame)[1]
    return packet[: int.from_bytes(packet[2:4])]


def is_tunnel(frame: bytes) -> bool:
    """UDP to the tunnel's port."""
    packet = frame_payload(frame)[1]
    return is_ip(frame) and packet[9:10] == bytes([UDP]) and packet[22:24] == GENEVE_PORT.to_bytes(2)


def opened(frame: bytes) -> Tunnel:
    """A tunnel frame, read by the rules of `lbpod.core.packets`."""
    found = packets.parse_tunnel(ip_of(frame))
    assert found is not None, f"no tunnel packet: {frame.hex()}"
    return found


def is_icmp(frame: bytes) -> bool:
    return is_ip(frame) and frame_payload(frame)[1][9:10] == bytes([ICMP])


def sent(capture: Capture) -> list[bytes]:
    """IPv4 packets that the captured host sent on this interface: what checksums are judged by."""
    return [ip_of(frame.data) for frame in list(capture.frames) if frame.outgoing and is_ip(frame.data)]
