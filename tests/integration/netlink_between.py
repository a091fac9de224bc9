"""A kernel that does not answer, or has no room: what stands between a watcher's questions and the real one.

The neighbour table belongs to the whole machine, so a test that filled it would take it from everybody; and no question
can be made to hang. So the watcher's own socket leads here meanwhile: questions go on to the kernel and its answers
come back, byte for byte, but for those that are to be lost or refused. A refusal is what Linux says where the table is
full: NLMSG_ERROR with ENOBUFS.
"""

import errno
import os
import select
import socket
import struct
import threading
from collections import Counter
from types import TracebackType
from typing import Final, Self

from lbpod.datapath import netlink
from lbpod.datapath.neighbours import Neighbours
from lbpod.datapath.netlink import NeighbourMessage

_HEADER: Final = struct.Struct("=IHHII")
_NLMSG_ERROR: Final = 2
_DATAGRAM_BYTES: Final = 1 << 17
_PATIENCE_SECONDS: Final = 0.3
"""For one answer, while this stands between: the kernel itself takes far less."""


class Between:
    """Use it in `with`. Lets everything pass that it is not told to hold up."""

    def __init__(self, watcher: Neighbours) -> None:
        self.silent: int | None = None
        """Questions of this type are lost."""
        self.no_room_for: frozenset[str] = frozenset()
        """Addresses of neighbours that are refused."""
        self.asked: Final[Counter[int]] = Counter()
        """Questions, by type."""
        self._socket: Final = watcher._netlink._socket
        self._patience = self._socket.gettimeout()
        self._kernel: Final = socket.socket(fileno=os.dup(self._socket.fileno()))
        near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.dup2(near.fileno(), self._socket.fileno(), inheritable=False)
        near.close()
        self._thread: Final = threading.Thread(target=self._pass, daemon=True)

    def __enter__(self) -> Self:
        self._socket.settimeout(_PATIENCE_SECONDS)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.dup2(self._kernel.fileno(), self._socket.fileno(), inheritable=False)  # which ends the thread: see there
        self._socket.settimeout(self._patience)
        self._thread.join(10)
        self._kernel.close()
        self._far.close()

    def _pass(self) -> None:
        while True:
            ready, _, _ = select.select([self._far, self._kernel], [], [])
            if self._kernel in ready:
                self._far.send(self._kernel.recv(_DATAGRAM_BYTES))
            if self._far in ready:
                question = self._far.recv(_DATAGRAM_BYTES)
                if not question:
                    return  # nobody holds the other end any more
                self._take(question)

    def _take(self, question: bytes) -> None:
        _, kind, _, sequence, _ = _HEADER.unpack_from(question)
        self.asked[kind] += 1
        if kind == self.silent:
            return
        if kind == netlink.RTM_NEWNEIGH:
            neighbour = NeighbourMessage.decoded(question[_HEADER.size :])
            if neighbour.address(netlink.NDA_DST) in self.no_room_for:
                said = struct.pack("=i", -errno.ENOBUFS) + question[: _HEADER.size]
                self._far.send(_HEADER.pack(_HEADER.size + len(said), _NLMSG_ERROR, 0, sequence, 0) + said)
                return
        self._kernel.send(question)
