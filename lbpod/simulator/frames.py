"""The packets of clients and pods as bytes: as short as they can be, and right in every checksum.

Each is made once and kept, for a flow says the same few things all the time.
"""

import struct
from enum import Enum
from functools import lru_cache
from typing import Final

from lbpod.core.packets import ETHERNET_BYTES, checksum, ethernet, ipv4_header

_MACS: Final = (b"\x02\x00\x00\x00\x00\x01", b"\x02\x00\x00\x00\x00\x02")
_PAYLOAD: Final = b"hello"

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10


class Word(Enum):
    """What a packet says; the value: TCP flags, none for UDP."""

    SYN = SYN
    ACK = ACK
    FIN = FIN | ACK
    RST = RST
    SYN_ACK = SYN | ACK
    DATA = 0


@lru_cache(maxsize=4_096)
def frame(source: bytes, source_port: int, destination: bytes, destination_port: int, word: Word) -> bytes:
    """Addresses: 4 bytes."""
    if word is Word.DATA:
        protocol, place = 17, 6
        l4 = struct.pack("!HHHH", source_port, destination_port, 8 + len(_PAYLOAD), 0) + _PAYLOAD
    else:
        protocol, place = 6, 16
        l4 = struct.pack("!HHIIBBHHH", source_port, destination_port, 1, 1, 5 << 4, word.value, 64_000, 0, 0)
    total = checksum(source + destination + struct.pack("!HH", protocol, len(l4)) + l4) or 0xFFFF
    l4 = l4[:place] + struct.pack("!H", total) + l4[place + 2 :]
    return ethernet(*_MACS) + ipv4_header(source, destination, protocol, len(l4)) + l4


def destination(sent: bytes) -> bytes:
    """Whom a frame is addressed to (4 bytes)."""
    return sent[ETHERNET_BYTES + 16 : ETHERNET_BYTES + 20]
