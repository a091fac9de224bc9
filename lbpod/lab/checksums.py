"""Are the checksums of a captured packet right? Plain Python over bytes, for tests and for people.

Written the slow, obvious way (RFC 1071, one 16-bit word after the other in one big sum), so that it can be believed
when it disagrees with the C program. Looks into Geneve: the packet inside is checked, too.
"""

from __future__ import annotations

import struct
from enum import StrEnum
from typing import Final

ETH_HEADER_BYTES: Final = 14
_ETHERTYPE_IPV4: Final = 0x0800
_VLAN_TAGS: Final = (0x8100, 0x88A8)
GENEVE_PORT: Final = 6081


class Fault(StrEnum):
    """What is wrong with a packet."""

    TRUNCATED = "truncated"
    """Shorter than its own headers say."""
    IPV4_HEADER = "ipv4 header checksum"
    TCP = "tcp checksum"
    UDP = "udp checksum"
    ICMP = "icmp checksum"


def inet_checksum(data: bytes) -> int:
    """The Internet checksum of ``data`` (RFC 1071), 0 ... 0xffff; 0 for data that contains a right checksum."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def frame_payload(frame: bytes) -> tuple[int, bytes]:
    """Ethertype and what follows the Ethernet header and its VLAN tags; ``(0, b"")`` for a stump."""
    offset = ETH_HEADER_BYTES - 2
    while len(frame) >= offset + 2:
        kind = int.from_bytes(frame[offset : offset + 2])
        if kind not in _VLAN_TAGS:
            return kind, frame[offset + 2 :]
        offset += 4
    return 0, b""


def frame_faults(frame: bytes) -> list[Fault]:
    """Faults of an Ethernet frame; [] if all is right or it is not IPv4."""
    kind, payload = frame_payload(frame)
    return ipv4_faults(payload) if kind == _ETHERTYPE_IPV4 else []


def ipv4_faults(packet: bytes) -> list[Fault]:
    """Faults of an IPv4 packet and of what it carries (padding after the packet is no fault)."""
    if len(packet) < 20:
        return [Fault.TRUNCATED]
    header_bytes = (packet[0] & 15) * 4
    total_bytes = int.from_bytes(packet[2:4])
    if header_bytes < 20 or total_bytes < header_bytes or len(packet) < total_bytes:
        return [Fault.TRUNCATED]
    faults = [Fault.IPV4_HEADER] if inet_checksum(packet[:header_bytes]) else []
    if int.from_bytes(packet[6:8]) & 0x3FFF:
        return faults  # a fragment: the checksum covers what is not here
    payload = packet[header_bytes:total_bytes]
    pseudo = packet[12:20] + struct.pack("!BBH", 0, packet[9], len(payload))
    match packet[9]:
        case 6:
            return faults + _plain_faults(payload, pseudo, 20, Fault.TCP)
        case 17:
            return faults + _udp_faults(payload, pseudo)
        case 1:
            return faults + _plain_faults(payload, b"", 8, Fault.ICMP)
        case _:
            return faults


def _plain_faults(payload: bytes, pseudo: bytes, header_bytes: int, fault: Fault) -> list[Fault]:
    if len(payload) < header_bytes:
        return [Fault.TRUNCATED]
    return [fault] if inet_checksum(pseudo + payload) else []


def _udp_faults(payload: bytes, pseudo: bytes) -> list[Fault]:
    if len(payload) < 8 or int.from_bytes(payload[4:6]) != len(payload):
        return [Fault.TRUNCATED]
    faults = [Fault.UDP] if payload[6:8] != b"\0\0" and inet_checksum(pseudo + payload) else []  # 0: none was made
    if int.from_bytes(payload[2:4]) != GENEVE_PORT:
        return faults
    inner = geneve_inner(payload[8:])
    return faults + (ipv4_faults(inner) if inner is not None else [Fault.TRUNCATED])


def geneve_inner(geneve: bytes) -> bytes | None:
    """The IPv4 packet inside what follows the UDP header of a Geneve packet (RFC 8926); ``None`` if there is none.

    It may lie there bare or in an Ethernet frame.
    """
    if len(geneve) < 8:
        return None
    inner = geneve[8 + (geneve[0] & 0x3F) * 4 :]
    match int.from_bytes(geneve[2:4]):
        case 0x0800:
            return inner
        case 0x6558:
            kind, payload = frame_payload(inner)
            return payload if kind == _ETHERTYPE_IPV4 else None
        case _:
            return None
