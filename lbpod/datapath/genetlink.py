"""One question to generic netlink: can this interface's driver run XDP natively?

Why: trying it by attaching something resets the link on some drivers, which a probe must not do. Kernels from 6.3 on
tell (family "netdev", Documentation/netlink/specs/netdev.yaml); on older ones the answer is "unknown", and attaching
will tell. pyroute2 does not know the family, and the messages are a dozen bytes, so they are packed by hand.
"""

import socket
import struct
from collections.abc import Iterator
from typing import Final

from lbpod.core.limits import NETLINK_TIMEOUT_NS

_NETLINK_GENERIC: Final = 16
_NLM_F_REQUEST: Final = 1
_NLMSG_ERROR: Final = 2
_ID_CTRL: Final = 16
_CTRL_CMD_GETFAMILY: Final = 3
_CTRL_ATTR_FAMILY_ID: Final = 1
_CTRL_ATTR_FAMILY_NAME: Final = 2
_NETDEV_CMD_DEV_GET: Final = 1
_NETDEV_A_DEV_IFINDEX: Final = 1
_NETDEV_A_DEV_XDP_FEATURES: Final = 3
_XDP_BASIC: Final = 1
_HEADERS_BYTES: Final = 20
"""struct nlmsghdr and struct genlmsghdr."""


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("<HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(message: bytes) -> Iterator[tuple[int, bytes]]:
    at = _HEADERS_BYTES
    while at + 4 <= len(message):
        length, kind = struct.unpack_from("<HH", message, at)
        if length < 4:
            return
        yield kind & 0x3FFF, message[at + 4 : at + length]
        at += (length + 3) & ~3


def _ask(sock: socket.socket, family: int, command: int, attribute: bytes) -> dict[int, bytes]:
    """Attributes of the one message that answers; empty where the kernel says no."""
    size = _HEADERS_BYTES + len(attribute)
    sock.send(struct.pack("<IHHIIBBH", size, family, _NLM_F_REQUEST, 1, 0, command, 1, 0) + attribute)
    answer = sock.recv(1 << 16)
    _, kind = struct.unpack_from("<IH", answer)
    return {} if kind == _NLMSG_ERROR else dict(_attributes(answer))


def has_native_xdp(ifindex: int) -> bool | None:
    """True or False as the driver says; None where this kernel cannot be asked."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC) as sock:
            sock.settimeout(NETLINK_TIMEOUT_NS / 1e9)
            sock.bind((0, 0))
            name = _attribute(_CTRL_ATTR_FAMILY_NAME, b"netdev\0")
            family = _ask(sock, _ID_CTRL, _CTRL_CMD_GETFAMILY, name).get(_CTRL_ATTR_FAMILY_ID)
            if family is None:
                return None
            index = _attribute(_NETDEV_A_DEV_IFINDEX, struct.pack("<I", ifindex))
            found = _ask(sock, int.from_bytes(family[:2], "little"), _NETDEV_CMD_DEV_GET, index)
    except OSError:
        return None
    features = found.get(_NETDEV_A_DEV_XDP_FEATURES)
    return None if features is None else bool(int.from_bytes(features[:8], "little") & _XDP_BASIC)
