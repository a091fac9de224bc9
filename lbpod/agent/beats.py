"""Beats between agents: one message there and one back on a WebSocket that stays open, both halves.

Why no request of its own for each, as all other calls have: there are five a second to each of up to WATCH_MAX others,
all the time, and as a request one takes more than four times as much processor time, nearly all of it in building and
reading headers. A WebSocket begins as a request, so certificates, roles and refusals are those of every other call.

One beat at a time on each *line*, BEAT_CONNECTIONS_MAX lines to a node: a line may be stuck, and a second beat then
does not wait behind the first. A beat that gets no answer in time takes its line with it. A line that turns out to have
been closed meanwhile (its agent was restarted) says nothing about now: the beat is sent again, on a new one.

What is on a line: the question, behind what the clock of the side that is asked shows by now (``age``; 0: not known);
the answer, behind the clock of that side and a status as HTTP has it. Whoever asks nothing for BEAT_LINE_NS is gone.

Left to others: whom to ask and what (the Keeper), how many may be under way (``peers``), what is done in between
(``driver``).
"""

import asyncio
import struct
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import aiohttp
from aiohttp import web

from lbpod.agent.age import Clocks
from lbpod.agent.clock import now_ns
from lbpod.certs import server_name
from lbpod.core import wire
from lbpod.core.errors import RemoteError
from lbpod.core.limits import BEAT_BYTES_MAX, BEAT_CONNECTIONS_MAX, BEAT_LINE_NS, PEER_TIMEOUT_NS
from lbpod.core.model import Node

_NS: Final = 1e-9
_ASKED: Final = struct.Struct(">Q")
_ANSWERED: Final = struct.Struct(">QH")
_CLOSES: Final = aiohttp.ClientWSTimeout(ws_close=0)
"""Nobody waits for a farewell: a line is closed because nobody answers."""

Line = aiohttp.ClientWebSocketResponse
Place = tuple[str, str]
"""A node's name, and where its agent listens."""
Answer = tuple[int, bytes]
"""A status as HTTP has it, and a body or one sentence."""
Asked = Callable[[int | None, bytes], Awaitable[Answer]]
"""What this side's clock showed when it was asked (None: the other side does not know), and the body."""


def _place(node: Node) -> Place:
    return node.name, node.control


class BeatLines:
    """The lines of one agent to others. Invariant: a line is idle, or one beat is on it."""

    def __init__(self, clocks: Clocks) -> None:
        self._clocks = clocks
        self._idle: dict[Place, list[Line]] = {}
        """To all nodes that there are."""
        self._left: list[Line] = []
        """To nodes that are gone, or elsewhere now."""
        self._places: dict[Place, asyncio.Semaphore] = {}

    def keep(self, nodes: Iterable[Node]) -> None:
        """There are these nodes; lines to others are closed with the next beat."""
        before, self._idle = self._idle, {}
        for node in nodes:
            place = _place(node)
            self._idle[place] = before.pop(place, [])
        self._left += [line for lines in before.values() for line in lines]
        self._places = {place: gate for place, gate in self._places.items() if place in self._idle}

    async def ask(self, session: aiohttp.ClientSession, node: Node, body: bytes) -> Answer:
        """One beat. Raises TimeoutError, OSError, aiohttp.ClientError."""
        place = _place(node)
        gate = self._places.setdefault(place, asyncio.Semaphore(BEAT_CONNECTIONS_MAX))
        async with asyncio.timeout(PEER_TIMEOUT_NS * _NS), gate:
            while self._left:
                await self._left.pop().close()
            while True:
                idle = self._idle.get(place)
                is_new = not idle
                line = idle.pop() if idle else await self._open(session, node)
                answer = await self._exchange(line, node, body)
                if answer is not None:
                    return answer
                if is_new:
                    raise aiohttp.ServerDisconnectedError("it has closed the connection")

    async def _open(self, session: aiohttp.ClientSession, node: Node) -> Line:
        return await session.ws_connect(
            f"https://{node.control}{wire.PATH_BEATS}",
            server_hostname=server_name(node.name),
            timeout=_CLOSES,
            max_msg_size=BEAT_BYTES_MAX,
            compress=0,
        )

    async def _exchange(self, line: Line, node: Node, body: bytes) -> Answer | None:
        """None: the line has been closed by the other side. Only one that has just answered is idle again."""
        answer = b""
        try:
            await line.send_bytes(_ASKED.pack(self._clocks.there_ns(node.name, now_ns()) or 0) + body)
            message = await line.receive()
            answer = message.data if message.type is aiohttp.WSMsgType.BINARY else b""
        except ConnectionError:
            pass
        finally:
            if len(answer) < _ANSWERED.size:
                await line.close()
        if len(answer) < _ANSWERED.size:
            return None
        clock_ns, status = _ANSWERED.unpack_from(answer)
        self._clocks.heard(node.name, clock_ns, now_ns())
        self._idle.get(_place(node), self._left).append(line)
        return status, answer[_ANSWERED.size :]

    async def close(self) -> None:
        """When no beat is under way any more."""
        self.keep(())
        while self._left:
            await self._left.pop().close()


class BeatServer:
    """The other side of all lines to this agent."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._lines: set[web.WebSocketResponse] = set()

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """One line, until either side closes it. Raises RemoteError (400) where the request wants none."""
        line = web.WebSocketResponse(
            compress=False, max_msg_size=BEAT_BYTES_MAX, receive_timeout=BEAT_LINE_NS * _NS, timeout=0
        )
        if not line.can_prepare(request):
            raise RemoteError(f"{wire.PATH_BEATS} is a WebSocket; ask for one (RFC 6455)")
        try:
            await line.prepare(request)
        except ConnectionError:  # it has hung up before anybody here had time for it
            return web.Response()
        self._lines.add(line)
        try:
            await self._answer_all(line)
        except (ConnectionError, TimeoutError):
            pass  # it is gone, or has nothing to say
        finally:
            self._lines.discard(line)
            await line.close(drain=False)
        return line

    async def _answer_all(self, line: web.WebSocketResponse) -> None:
        async for message in line:
            if message.type is not aiohttp.WSMsgType.BINARY or len(message.data) < _ASKED.size:
                return
            (clock_ns,) = _ASKED.unpack_from(message.data)
            status, body = await self._asked(clock_ns or None, message.data[_ASKED.size :])
            await line.send_bytes(_ANSWERED.pack(now_ns(), status) + body)

    async def close(self, _: web.Application) -> None:
        """The agent ends: aiohttp would wait for each line."""
        for line in tuple(self._lines):
            await line.close(code=aiohttp.WSCloseCode.GOING_AWAY, drain=False)
