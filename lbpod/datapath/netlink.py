"""Route netlink, synchronous: one question, its answer; and a socket that tells what changes.

Why not pyroute2's IPRoute: since 0.9 its calls run an event loop of their own and refuse to inside a running one,
which is where the agent lives. Its message classes have no such wish, so they write and read the messages here, and
what is left to do is a socket: send, receive until the kernel says it is done, and give up within a bound. What this
file leaves to others: what the messages mean (``neighbours``).

The sockets belong to the network namespace of the thread that makes them.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any, Final

from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from lbpod.core.limits import NETLINK_DATAGRAMS_MAX, NETLINK_RETRIES_MAX, NETLINK_TIMEOUT_NS
from lbpod.datapath.port import DatapathError

RTM_NEWLINK: Final = 16
RTM_DELLINK: Final = 17
RTM_GETLINK: Final = 18
RTM_NEWROUTE: Final = 24
RTM_DELROUTE: Final = 25
RTM_GETROUTE: Final = 26
RTM_NEWNEIGH: Final = 28
RTM_DELNEIGH: Final = 29
RTM_GETNEIGH: Final = 30

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
_HEADER: Final = struct.Struct("<IHHII")
"""struct nlmsghdr: length, type, flags, sequence, port."""

Message = Any
"""One of pyroute2's message classes, decoded: fields by name, attributes through get_attr(name)."""

_CLASSES: Final = {
    RTM_NEWLINK: ifinfmsg,
    RTM_DELLINK: ifinfmsg,
    RTM_NEWROUTE: rtmsg,
    RTM_DELROUTE: rtmsg,
    RTM_NEWNEIGH: ndmsg,
    RTM_DELNEIGH: ndmsg,
}


def neighbour_message(**fields: int) -> Message:
    """An empty ndmsg with these fields."""
    message = ndmsg()
    for name, value in fields.items():
        message[name] = value
    return message


def route_message(**fields: int) -> Message:
    """An empty rtmsg with these fields."""
    message = rtmsg()
    for name, value in fields.items():
        message[name] = value
    return message


def link_message() -> Message:
    """An empty ifinfmsg."""
    return ifinfmsg()


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
    decoded = _CLASSES[kind](message)
    decoded.decode()
    return decoded


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
        header = message["header"]
        header["type"], header["flags"] = kind, _NLM_F_REQUEST | flags
        header["sequence_number"], header["pid"] = self._sequence, 0
        message.reset()
        message.encode()
        self._socket.send(message.data)

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
                        (error,) = struct.unpack_from("<i", data, _HEADER.size)
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
