"""Route netlink, synchronous: one question, its answer; and a socket that tells what changes.

Why not pyroute2: since 0.9 its calls run an event loop of their own and refuse to inside a running one, which is where
the agent lives; and whoever imports one of its message classes imports all of it, a tenth of a second of a processor in
each start of an agent. We need four fixed headers and a dozen attributes, so those are packed and read here. What this
file leaves to others: what the messages mean (``neighbours``, the agent's ``uplink``).

The sockets belong to the network namespace of the thread that makes them.
"""

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Final, Self

from lbpod.core.limits import NETLINK_DATAGRAMS_MAX, NETLINK_RETRIES_MAX, NETLINK_TIMEOUT_NS
from lbpod.datapath.port import DatapathError

RTM_NEWLINK: Final = 16
RTM_DELLINK: Final = 17
RTM_GETLINK: Final = 18
RTM_NEWADDR: Final = 20
RTM_GETADDR: Final = 22
RTM_NEWROUTE: Final = 24
RTM_DELROUTE: Final = 25
RTM_GETROUTE: Final = 26
RTM_NEWNEIGH: Final = 28
RTM_DELNEIGH: Final = 29
RTM_GETNEIGH: Final = 30
RTM_NEWTFILTER: Final = 44
RTM_GETTFILTER: Final = 46

NLM_F_REPLACE: Final = 0x100
NLM_F_CREATE: Final = 0x400
_NLM_F_REQUEST: Final = 0x1
_NLM_F_ACK: Final = 0x4
_NLM_F_DUMP: Final = 0x300
_NLM_F_DUMP_INTR: Final = 0x10
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3

GROUP_LINK: Final = 0x1
GROUP_NEIGHBOUR: Final = 0x4
GROUP_IPV4_ADDRESS: Final = 0x10
GROUP_IPV4_ROUTE: Final = 0x40

_RECEIVE_BYTES: Final = 1 << 17
_HEADER: Final = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence, port."""

IFLA_ADDRESS: Final = 1
IFLA_IFNAME: Final = 3
IFLA_MTU: Final = 4
IFA_ADDRESS: Final = 1
IFA_LOCAL: Final = 2
RTA_DST: Final = 1
RTA_OIF: Final = 4
RTA_GATEWAY: Final = 5
RTA_METRICS: Final = 8
RTAX_MTU: Final = 2
NDA_DST: Final = 1
NDA_LLADDR: Final = 2
NDA_FLAGS_EXT: Final = 15
_NLA_TYPE_MASK: Final = 0x3FFF

_ATTRIBUTE: Final = struct.Struct("=HH")
"""struct rtattr: length, type."""
_IPV4_BYTES: Final = 4


def _attributes(data: bytes) -> dict[int, bytes]:
    """Type -> value. Of a type that is there twice the last one."""
    found: dict[int, bytes] = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _NLA_TYPE_MASK] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found


class Message:
    """A fixed header, by the names of its fields, and attributes behind it."""

    HEADER: struct.Struct
    FIELDS: tuple[str, ...]

    def __init__(self, **fields: int) -> None:
        self.fields: Final = {name: fields.pop(name, 0) for name in self.FIELDS}
        assert not fields, f"{type(self).__name__} has no fields {', '.join(sorted(fields))}"
        self.attributes: Final[dict[int, bytes]] = {}

    def __getitem__(self, field: str) -> int:
        return self.fields[field]

    @classmethod
    def decoded(cls, data: bytes) -> Self:
        """What stands behind the netlink header. Raises struct.error where it is too short."""
        message = cls(**dict(zip(cls.FIELDS, cls.HEADER.unpack_from(data), strict=True)))
        message.attributes.update(_attributes(data[cls.HEADER.size :]))
        return message

    def encoded(self) -> bytes:
        """The same for the kernel."""
        parts = [self.HEADER.pack(*self.fields.values())]
        for kind, value in self.attributes.items():
            parts += [_ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind), value, bytes(-len(value) % 4)]
        return b"".join(parts)

    def raw(self, kind: int) -> bytes:
        """An attribute's bytes, none where it is not there."""
        return self.attributes.get(kind, b"")

    def number(self, kind: int) -> int | None:
        """An attribute that is a number; None where it is not there."""
        value = self.attributes.get(kind)
        return None if value is None else int.from_bytes(value, sys.byteorder)

    def address(self, kind: int) -> str | None:
        """An attribute that is an IPv4 address; None where it is not there, or is of another family."""
        value = self.raw(kind)
        return socket.inet_ntoa(value) if len(value) == _IPV4_BYTES else None

    def nested(self, kind: int) -> dict[int, bytes]:
        """An attribute that holds attributes."""
        return _attributes(self.raw(kind))

    def put_number(self, kind: int, value: int) -> None:
        """Sets an attribute that is a number of 32 bits."""
        self.attributes[kind] = value.to_bytes(4, sys.byteorder)

    def put_address(self, kind: int, address: str) -> None:
        """Sets an attribute that is an IPv4 address."""
        self.attributes[kind] = socket.inet_aton(address)


class LinkMessage(Message):
    """struct ifinfomsg."""

    HEADER = struct.Struct("=BxHiII")
    FIELDS = ("family", "device", "index", "flags", "change")


class AddressMessage(Message):
    """struct ifaddrmsg."""

    HEADER = struct.Struct("=BBBBI")
    FIELDS = ("family", "prefix", "flags", "scope", "index")


class RouteMessage(Message):
    """struct rtmsg."""

    HEADER = struct.Struct("=BBBBBBBBI")
    FIELDS = ("family", "dst_len", "src_len", "tos", "table", "protocol", "scope", "type", "flags")


class NeighbourMessage(Message):
    """struct ndmsg."""

    HEADER = struct.Struct("=BxxxiHBB")
    FIELDS = ("family", "ifindex", "state", "flags", "type")


class FilterMessage(Message):
    """struct tcmsg, of a filter."""

    HEADER = struct.Struct("=BxxxiIII")
    FIELDS = ("family", "ifindex", "handle", "parent", "info")


_CLASSES: Final[dict[int, type[Message]]] = {
    RTM_NEWLINK: LinkMessage,
    RTM_DELLINK: LinkMessage,
    RTM_NEWADDR: AddressMessage,
    RTM_NEWROUTE: RouteMessage,
    RTM_DELROUTE: RouteMessage,
    RTM_NEWNEIGH: NeighbourMessage,
    RTM_DELNEIGH: NeighbourMessage,
    RTM_NEWTFILTER: FilterMessage,
}


def _split(datagram: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, flags, sequence number and bytes of each message of a datagram."""
    at = 0
    while at + _HEADER.size <= len(datagram):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(datagram, at)
        if length < _HEADER.size:
            return
        yield kind, flags, sequence, datagram[at : at + length]
        at += (length + 3) & ~3


def _decoded(kind: int, message: bytes) -> Message:
    return _CLASSES[kind].decoded(message[_HEADER.size :])


class Netlink:
    """Questions and answers. One at a time."""

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
            self._socket.bind((0, 0))
        except OSError as error:
            raise DatapathError(f"cannot open a netlink socket: {error.strerror}") from error
        self._socket.settimeout(NETLINK_TIMEOUT_NS / 1e9)
        self._sequence = 0

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def get(self, kind: int, message: Message) -> Message:
        """Asks for one thing. Raises OSError with the kernel's errno where it says no."""
        self._send(kind, message, 0)
        found, _ = self._receive(one=True)
        return found[0]

    def dump(self, kind: int, message: Message) -> list[Message]:
        """Asks for a whole table, again where it changed meanwhile."""
        for _ in range(NETLINK_RETRIES_MAX):
            self._send(kind, message, _NLM_F_DUMP)
            found, torn = self._receive(one=False)
            if not torn:
                return found
        raise DatapathError("netlink: a table changed each time it was being read")

    def do(self, kind: int, message: Message, flags: int = 0) -> None:
        """Has the kernel do something. Raises OSError with its errno where it says no."""
        self._send(kind, message, _NLM_F_ACK | flags)
        self._receive(one=False)

    def _send(self, kind: int, message: Message, flags: int) -> None:
        self._sequence += 1
        body = message.encoded()
        header = _HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | flags, self._sequence, 0)
        self._socket.send(header + body)

    def _receive(self, *, one: bool) -> tuple[list[Message], bool]:
        """The answer to the last request: up to its end (or its first message), and whether a change tore it."""
        found: list[Message] = []
        torn = False
        try:
            while True:
                for kind, flags, sequence, data in _split(self._socket.recv(_RECEIVE_BYTES)):
                    if sequence != self._sequence:
                        continue  # the late answer to a question that was given up
                    torn |= bool(flags & _NLM_F_DUMP_INTR)
                    if kind == _NLMSG_ERROR:
                        (error,) = struct.unpack_from("=i", data, _HEADER.size)
                        if error:
                            raise OSError(-error, os.strerror(-error))
                        return found, torn
                    if kind == _NLMSG_DONE:
                        return found, torn
                    found.append(_decoded(kind, data))
                    if one:
                        return found, torn
        except TimeoutError as error:
            raise DatapathError("netlink: the kernel does not answer") from error


class Events:
    """A non-blocking socket of changes."""

    def __init__(self, groups: int) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
            self._socket.bind((0, groups))
        except OSError as error:
            raise DatapathError(f"cannot open a netlink socket: {error.strerror}") from error
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """For select, poll or an event loop: readable when something has changed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def drain(self) -> tuple[list[tuple[int, Message]], bool]:
        """(type, message) of what has changed, up to a bound, and whether some changes were lost."""
        found: list[tuple[int, Message]] = []
        for _ in range(NETLINK_DATAGRAMS_MAX):
            try:
                datagram = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    return found, True
                raise DatapathError(f"cannot read netlink events: {error.strerror}") from error
            for kind, _, _, data in _split(datagram):
                if kind in _CLASSES:
                    found.append((kind, _decoded(kind, data)))
        return found, False
