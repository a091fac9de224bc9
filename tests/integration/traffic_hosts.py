"""Servers and sockets inside the hosts of a lab, in this very process: small, and they tell what they saw.

nginx and the lab's UDP echo are for load; these are for questions like "whose address does the server see?" and "which
server has this connection, after everything changed?". Sockets are made inside a host and stay there, so that the test
may use them from where it is.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Final, Self

from lbpod.lab.host import Host

TIMEOUT_S: Final = 5.0
"""No answer of a lab takes so long; what waits longer has failed."""

SO_NO_CHECK: Final = 11
IP_MTU_DISCOVER: Final = 10
IP_PMTUDISC_DO: Final = 2


class TcpServer:
    """Greets every connection with its name, then sends back what it gets; remembers the peers' addresses."""

    def __init__(self, host: Host, port: int, name: str | None = None) -> None:
        self.name: Final = name or host.name
        self.port: Final = port
        self.peers: list[tuple[str, int]] = []
        with host.in_netns():
            self._listener = socket.create_server(("0.0.0.0", port), backlog=128)
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, name=f"tcp-{self.name}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def say(self, data: bytes) -> None:
        """To whoever is connected, unasked."""
        for connection in self._open:
            connection.sendall(data)

    def _accept(self) -> None:
        while True:
            try:
                connection, peer = self._listener.accept()
            except OSError:
                return
            self.peers.append(peer)
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError):
            connection.sendall(f"{self.name}\n".encode())
            while data := connection.recv(65_536):
                connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)


class TcpFlow:
    """A client's connection to a TcpServer; `server` is the name in the greeting."""

    def __init__(self, host: Host, target: str, port: int, *, source_port: int = 0) -> None:
        with host.in_netns():
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.socket.settimeout(TIMEOUT_S)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind(("", source_port))
            self.socket.connect((target, port))
            self.local_port: int = self.socket.getsockname()[1]
            self.server = self._line()
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def _line(self) -> str:
        found = b""
        while not found.endswith(b"\n"):
            byte = self.socket.recv(1)
            if not byte:
                raise ConnectionError(f"the server ended the connection after {found!r}")
            found += byte
        return found.decode().strip()

    def echo(self, data: bytes) -> bytes:
        """Sends and reads back as much, at the same time, so that no window fills up."""
        sending = threading.Thread(target=self.socket.sendall, args=(data,), daemon=True)
        sending.start()
        found = bytearray()
        while len(found) < len(data):
            part = self.socket.recv(65_536)
            if not part:
                raise ConnectionError(f"the server ended the connection after {len(found)} bytes")
            found += part
        sending.join(TIMEOUT_S)
        return bytes(found)


class UdpServer:
    """Answers every datagram with its name and the datagram; remembers the peers' addresses."""

    def __init__(self, host: Host, port: int, name: str | None = None, *, checksums: bool = True) -> None:
        self.name: Final = name or host.name
        self.port: Final = port
        self.peers: list[tuple[str, int]] = []
        with host.in_netns():
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, int(not checksums))
        self._socket.bind(("0.0.0.0", port))
        self._thread = threading.Thread(target=self._serve, name=f"udp-{self.name}", daemon=True)
        self._ending = threading.Event()

    def __enter__(self) -> Self:
        self._socket.settimeout(0.05)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while not self._ending.is_set():
            try:
                data, peer = self._socket.recvfrom(65_536)
            except OSError:  # nothing came, or an ICMP error for an earlier answer
                continue
            self.peers.append(peer)
            with suppress(OSError):
                self._socket.sendto(self.name.encode() + b" " + data, peer)


@contextmanager
def udp_socket(host: Host, *, port: int = 0, checksums: bool = True) -> Iterator[socket.socket]:
    """A datagram socket inside a host."""
    with host.in_netns():
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with made:
        made.settimeout(TIMEOUT_S)
        made.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, int(not checksums))
        made.bind(("", port))
        yield made


def ask(sender: socket.socket, target: str, port: int, data: bytes) -> tuple[bytes, tuple[str, int]]:
    """One datagram there, one back: its content and where it came from."""
    sender.sendto(data, (target, port))
    answer, source = sender.recvfrom(65_536)
    return answer, source


def fetch(host: Host, target: str, port: int, path: str) -> bytes:
    """The body of one HTTP answer."""
    with host.in_netns():
        connection = socket.create_connection((target, port), timeout=TIMEOUT_S)
    with connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while data := connection.recv(65_536):
            answer += data
    return answer.partition(b"\r\n\r\n")[2]
