"""The flows of the checking client: one way to live (open, ask, check, again), two ways to talk (HTTP, UDP).

``open_http`` and ``open_udp`` give a :class:`Line`; everything else (who answered before, what to do when it breaks) is
the same for both, so it exists once. What a failure *means* is decided in ``check_rules``.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, cast

from lbpod.lab.check_holdups import Holdups, Marks
from lbpod.lab.check_ports import Ports
from lbpod.lab.check_rules import (
    Failure,
    FlowError,
    Histogram,
    Incomplete,
    Judge,
    Reason,
    Tally,
    read_echo,
    read_http_answer,
)
from lbpod.lab.limits import (
    CHECK_PORT_TRIES_MAX,
    CHECK_REOPEN_MAX_NS,
    CHECK_REOPEN_NS,
    CHECK_SHORT_IN_FLIGHT_MAX,
    CHECK_UDP_GIVEN_UP_MAX,
    CHECK_UDP_LOSSES_MAX,
    MS_NS,
    SECOND_NS,
)


class Line(Protocol):
    """An open flow to the target."""

    local_port: int
    asked_ns: int
    """When it was asked last; 0: never."""
    failed_ns: int
    """When the other side ended it or sent what is wrong; 0: it has not."""

    def retransmit_evenly(self) -> None:
        """From now on wait for each retransmission as long as for the first, instead of twice as long every time."""

    async def ask(self, token: str) -> str:
        """Send ``token``, check the answer byte by byte, return the backend's name, or raise ``FlowError``."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Group:
    """Long-lived flows that live alike."""

    name: str
    count: int
    interval_ns: int
    """Between two requests of one flow."""
    evenly: bool
    """Even retransmissions: what the flow feels of an outage is then its length, not that of TCP's doubling pauses."""
    holdups: Holdups = field(default_factory=Holdups)


@dataclass
class World:
    """What all flows of one checker share."""

    host: str
    port: int
    timeout_ns: int
    nonce: str
    """Makes tokens unique among checkers."""
    open_line: Callable[[World], Awaitable[Line]]
    losses_max: int
    """Unanswered requests in a row that make a flow broken."""
    judge: Judge
    marks: Marks
    ports: Ports
    tally: Tally = field(default_factory=Tally)
    latency: Histogram = field(default_factory=Histogram)
    """Of the current second."""
    latency_all: Histogram = field(default_factory=Histogram)

    async def open(self) -> Line:
        try:
            async with asyncio.timeout(self.timeout_ns / SECOND_NS):
                line = await self.open_line(self)
        except TimeoutError as error:
            raise FlowError(Reason.CONNECT_TIMEOUT, "no connection in time") from error
        except OSError as error:
            raise FlowError(_reason(error), str(error)) from error
        self.tally.connections += 1
        return line

    async def ask(self, line: Line, token: str) -> str:
        start_ns = time.monotonic_ns()
        try:
            async with asyncio.timeout(self.timeout_ns / SECOND_NS):
                backend = await line.ask(token)
        except TimeoutError as error:
            raise FlowError(Reason.TIMEOUT, f"no answer to {token} in time") from error
        duration_ns = time.monotonic_ns() - start_ns
        self.latency.add(duration_ns)
        self.latency_all.add(duration_ns)
        self.tally.requests += 1
        return backend

    def failed(self, error: FlowError, opened_ns: int, backend: str | None, line: Line | None, answers: int) -> None:
        now_ns = time.monotonic_ns()
        self.judge.failed(
            Failure(
                at_ns=now_ns,
                opened_ns=opened_ns,
                asked_ns=(line.asked_ns if line is not None else 0) or opened_ns,
                failed_ns=(line.failed_ns if line is not None else 0) or now_ns,
                connected=line is not None,
                reason=error.reason,
                backend=backend,
                local_port=line.local_port if line is not None else 0,
                answers=answers,
                detail=error.detail,
            )
        )


def _reason(error: BaseException | None) -> Reason:
    match error:
        case None:
            return Reason.CLOSED
        case ConnectionRefusedError():
            return Reason.REFUSED
        case ConnectionError():
            return Reason.RESET
        case TimeoutError():
            return Reason.TIMEOUT
        case _:
            return Reason.NETWORK


# ------------------------------------------------------------------------------------------------------------ lines


class HttpLine(asyncio.Protocol):
    """One keep-alive HTTP/1.1 connection."""

    def __init__(self, host: str, give_back: Callable[[], None]) -> None:
        self.local_port = 0
        self.asked_ns = 0
        self.failed_ns = 0
        self._host = host
        self._give_back = give_back
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._token = ""
        self._answer: asyncio.Future[str] | None = None
        self._failure: FlowError | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.local_port = transport.get_extra_info("sockname")[1]

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            if self._answer is None:
                raise FlowError(Reason.WRONG_BYTES, f"nobody asked for {data[:80]!r}")
            name = read_http_answer(self._received, self._token)
        except FlowError as error:
            self._fail(error)
            return
        if not isinstance(name, Incomplete):
            self._received = b""
            answer = self._answer
            self._answer = None
            if not answer.done():
                answer.set_result(name)

    def connection_lost(self, exc: Exception | None) -> None:
        self._give_back()
        self._fail(FlowError(_reason(exc), str(exc or "the other side closed")))

    def retransmit_evenly(self) -> None:
        assert self._transport is not None
        self._transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, TCP_THIN_LINEAR_TIMEOUTS, 1)

    def _fail(self, error: FlowError) -> None:
        if self._failure is None:
            self._failure, self.failed_ns = error, time.monotonic_ns()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(self._failure)
        self._answer = None

    async def ask(self, token: str) -> str:
        if self._failure is not None:
            raise self._failure
        assert self._transport is not None
        assert self._answer is None, "one request at a time"
        self._token = token
        self.asked_ns = time.monotonic_ns()
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._answer = answer
        self._transport.write(f"GET /echo?t={token} HTTP/1.1\r\nHost: {self._host}\r\n\r\n".encode())
        return await answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def open_http(world: World) -> Line:
    """From a port that has rested. Raises OSError."""
    for tries_left in reversed(range(CHECK_PORT_TRIES_MAX)):
        port = world.ports.take(time.monotonic_ns()) if tries_left else world.ports.kernels()
        try:
            return await _open_http_from(world, port)
        except OSError as error:
            if not tries_left or error.errno not in {errno.EADDRINUSE, errno.EADDRNOTAVAIL}:
                raise
    raise AssertionError("the last try returns or raises")


async def _open_http_from(world: World, port: int) -> Line:
    loop = asyncio.get_running_loop()
    taken = [port]

    def give_back() -> None:
        """Once: a connection that is given up while it is made is both closed and an error."""
        if taken:
            world.ports.give_back(taken.pop(), time.monotonic_ns())

    sock: socket.socket | None = None
    try:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        if port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("", port))
        await loop.sock_connect(sock, (world.host, world.port))
        _, line = await loop.create_connection(lambda: HttpLine(world.host, give_back), sock=sock)
    except BaseException:
        if sock is not None:
            sock.close()
        give_back()
        raise
    return line


class UdpLine(asyncio.DatagramProtocol):
    """One UDP flow. Answers to requests given up before are ignored."""

    def __init__(self) -> None:
        self.local_port = 0
        self.asked_ns = 0
        self.failed_ns = 0
        self._transport: asyncio.DatagramTransport | None = None
        self._sent = b""
        self._given_up: deque[bytes] = deque(maxlen=CHECK_UDP_GIVEN_UP_MAX)
        self._answer: asyncio.Future[str] | None = None
        self._failure: FlowError | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # 3.11's own class does not inherit from it
        self.local_port = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, addr: object) -> None:
        if self._answer is None or self._answer.done() or data.partition(b" ")[2] in self._given_up:
            return
        try:
            self._answer.set_result(read_echo(data, self._sent))
        except FlowError as error:
            self._answer.set_exception(error)

    def error_received(self, exc: Exception) -> None:
        self._failure, self.failed_ns = FlowError(_reason(exc), str(exc)), time.monotonic_ns()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(self._failure)

    def retransmit_evenly(self) -> None:
        """UDP retransmits nothing."""

    async def ask(self, token: str) -> str:
        if self._failure is not None:
            raise self._failure
        assert self._transport is not None
        self._sent = token.encode()
        self.asked_ns = time.monotonic_ns()
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.sendto(self._sent)
        try:
            return await self._answer
        except asyncio.CancelledError:
            self._given_up.append(self._sent)
            raise

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def open_udp(world: World) -> Line:
    loop = asyncio.get_running_loop()
    _, line = await loop.create_datagram_endpoint(UdpLine, remote_addr=(world.host, world.port))
    return line


TCP_THIN_LINEAR_TIMEOUTS = 16
"""From <linux/tcp.h>; Python's socket module does not name it."""

LOSSES_MAX_HTTP = 1
LOSSES_MAX_UDP = CHECK_UDP_LOSSES_MAX

# ------------------------------------------------------------------------------------------------------------ flows


async def long_flow(world: World, group: Group, number: int, start_after_ns: int) -> None:
    """A flow that lives until it is cancelled: opened again whenever it breaks."""
    await asyncio.sleep(start_after_ns / SECOND_NS)
    pause_ns = CHECK_REOPEN_NS
    generation = 0
    while True:
        generation += 1
        answers = await _one_life(world, group, number, f"{world.nonce}-{group.name}{number}-{generation}")
        pause_ns = CHECK_REOPEN_NS if answers else min(2 * pause_ns, CHECK_REOPEN_MAX_NS)
        await asyncio.sleep(pause_ns / SECOND_NS)


async def _one_life(world: World, group: Group, number: int, name: str) -> int:
    """From opening to breaking; returns how many right answers it got."""
    line: Line | None = None
    backend: str | None = None
    answers = losses = 0
    tally = world.tally
    opened_ns = time.monotonic_ns()
    try:
        line = await world.open()
        tally.long_open += 1
        if group.evenly:
            line.retransmit_evenly()
        due_ns = time.monotonic_ns()
        while True:
            group.holdups.sent(number, time.monotonic_ns())
            try:
                answered_by = await world.ask(line, f"{name}-{answers + losses}")
                losses = 0
            except FlowError as error:
                losses += 1
                if error.reason is not Reason.TIMEOUT or losses >= world.losses_max:
                    raise
                tally.lost += 1
                continue
            group.holdups.answered(number, time.monotonic_ns())
            if backend is None:
                backend = answered_by
                tally.long_lived += 1
                tally.backends[backend] += 1
            if answered_by != backend:
                raise FlowError(Reason.OTHER_BACKEND, f"{backend} has served it, now {answered_by} answers")
            answers += 1
            due_ns = max(due_ns + group.interval_ns, time.monotonic_ns())
            await asyncio.sleep((due_ns - time.monotonic_ns()) / SECOND_NS)
    except FlowError as error:
        world.failed(error, opened_ns, backend, line, answers)
        return answers
    finally:
        group.holdups.over(number)
        if line is not None:
            tally.long_open -= 1
            line.close()
        if backend is not None:
            tally.long_lived -= 1
            tally.backends[backend] -= 1


async def short_flow(world: World, number: int) -> None:
    """One connection, one request. Whoever starts it has counted it as in flight."""
    line: Line | None = None
    opened_ns = time.monotonic_ns()
    try:
        line = await world.open()
        world.tally.short_open += 1
        for attempt in range(world.losses_max):
            try:
                await world.ask(line, f"{world.nonce}-s{number}-{attempt}")
                break
            except FlowError as error:
                if error.reason is not Reason.TIMEOUT or attempt + 1 == world.losses_max:
                    raise
                world.tally.lost += 1
        world.tally.short_done += 1
    except FlowError as error:
        world.failed(error, opened_ns, None, line, 0)
    finally:
        world.tally.short_in_flight -= 1
        if line is not None:
            world.tally.short_open -= 1
            line.close()


async def short_stream(world: World, rate: int, group: asyncio.TaskGroup) -> None:
    """Starts ``rate`` short flows a second, evenly, until it is cancelled."""
    start_ns = time.monotonic_ns()
    number = 0
    while True:
        due = (time.monotonic_ns() - start_ns) * rate // SECOND_NS
        while number < due:
            if world.tally.short_in_flight >= CHECK_SHORT_IN_FLIGHT_MAX:
                world.tally.short_skipped += 1
            else:
                world.tally.short_in_flight += 1
                group.create_task(short_flow(world, number))
            number += 1
        await asyncio.sleep(10 * MS_NS / SECOND_NS)
