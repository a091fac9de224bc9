"""Calls to other agents: keep-alive connections, bounded in number and in time.

Decided here: how a call fails (each failure is one sentence in an AskFailed, never an exception that travels), how
many may be under way, and that a beat waits for no other call. Beats have connections and a bound of their own: behind
a page of a handover, or behind OUTSTANDING_MAX questions to a node that is down, they would tell how much there is to
do instead of who is there.

Tried and dropped: giving a beat up when the Keeper has made up its mind (BEAT_DOWN_NS), each on a connection to itself.
Giving up closes the connection, and the next beat begins with a TLS handshake: where all agents shared two busy cores,
they made 80 of those a second, which took longer than a beat may, and nobody heard anybody any more.

Left to others: whom to ask and what, and what follows from silence (the Keeper). The certificate of the answering side
has to carry the name of the node that was meant: TLS checks that, before a byte of a call is sent.
"""

import asyncio
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from lbpod.agent.age import HEADER_CLOCK, Clocks, read_clock
from lbpod.agent.beats import BeatLines
from lbpod.agent.broken import raise_what_failed
from lbpod.agent.clock import now_ns
from lbpod.certs import server_name
from lbpod.core import wire
from lbpod.core.errors import RemoteError
from lbpod.core.limits import (
    BEATS_OPEN_MAX,
    BODY_BYTES_MAX,
    OUTSTANDING_MAX,
    PEER_CONNECTIONS_MAX,
    PEER_TIMEOUT_NS,
    SENTENCE_BYTES_MAX,
)
from lbpod.core.messages import Answered, AskFailed, BeatCall, KeeperEvent, PeerAnswer, PeerCall
from lbpod.core.model import Node

_NS: Final = 1e-9


async def _bounded(content: aiohttp.StreamReader, name: str) -> bytes:
    parts, length_bytes = [], 0
    async for part in content.iter_any():
        length_bytes += len(part)
        if length_bytes > BODY_BYTES_MAX:
            raise RemoteError(f"the answer of {name} is larger than any body may be", 413)
        parts.append(part)
    return b"".join(parts)


class UnansweredError(Exception):
    """Nobody answered as asked. str(): one sentence."""

    def __init__(self, sentence: str, *, untaken: bool = False, agentless: bool = False) -> None:
        """untaken: it is certain that nobody has acted on the call. agentless: the node has refused the connection."""
        super().__init__(sentence)
        self.untaken, self.agentless = untaken, agentless


@dataclass(slots=True)
class _Lane:
    """Calls of one kind: their bounds, their connections, and those that are under way."""

    calls_max: int
    """To one node."""
    connections_max: int
    """For requests. Beats see to theirs themselves (``beats``)."""
    timeout_ns: int
    session: aiohttp.ClientSession | None = None
    under_way: dict[str, set[asyncio.Task[None]]] = field(default_factory=dict)
    """Node -> its calls. Invariant: 1..calls_max."""

    def opened(self, tls: ssl.SSLContext) -> aiohttp.ClientSession:
        """The session: made at the first call, for it needs a running loop."""
        if self.session is None:
            connector = aiohttp.TCPConnector(ssl=tls, limit=0, limit_per_host=self.connections_max)
            timeout = aiohttp.ClientTimeout(total=self.timeout_ns * _NS)
            self.session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        return self.session

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> bool:
        """Begins a call; False where too many are under way."""
        tasks = self.under_way.setdefault(name, set())
        if len(tasks) >= self.calls_max:
            work.close()
            return False
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(lambda done: self._finished(name, done))
        return True

    def _finished(self, name: str, task: asyncio.Task[None]) -> None:
        tasks = self.under_way[name]
        tasks.discard(task)
        if not tasks:
            del self.under_way[name]
        raise_what_failed(task)

    @property
    def count(self) -> int:
        """Calls that are under way, over all nodes."""
        return sum(len(tasks) for tasks in self.under_way.values())

    async def close(self) -> None:
        """Cancels everything and closes the connections."""
        tasks = [task for tasks in self.under_way.values() for task in sorted(tasks, key=id)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.session is not None:
            await self.session.close()
            self.session = None


class Peers:
    """The client side of one agent. `close` gives up what is under way."""

    def __init__(self, tls: ssl.SSLContext, on_event: Callable[[KeeperEvent], None]) -> None:
        self._tls = tls
        self._on_event = on_event
        self._calls = _Lane(OUTSTANDING_MAX, PEER_CONNECTIONS_MAX, PEER_TIMEOUT_NS)
        self._beats = _Lane(BEATS_OPEN_MAX, 0, PEER_TIMEOUT_NS)
        self._nodes: Mapping[int, Node] = {}
        self._clocks = Clocks()
        self._lines = BeatLines(self._clocks)
        self.asked: Counter[str] = Counter()
        """Questions and tellings, by kind of body."""
        self.failed: Counter[str] = Counter()
        """Those that were not answered with 200, by kind of body."""

    def know(self, nodes: Mapping[int, Node]) -> None:
        """The nodes that may be called from now on, by id."""
        self._nodes = nodes
        self._lines.keep(nodes.values())

    def ask(self, token: int, number: int, body: PeerCall) -> None:
        """Calls a node's agent; Answered or AskFailed follows as an event."""
        node, lane = self._nodes.get(number), self._lane(body)
        if node is None:
            self._on_event(AskFailed(token, f"node {number} is not in the newest snapshot", untaken=True))
        elif not lane.start(node.name, self._answer(token, node, body)):
            self._on_event(AskFailed(token, f"{lane.calls_max} calls to {node.name} are under way", untaken=True))

    def tell(self, number: int, body: PeerCall) -> None:
        """Calls a node's agent and forgets about it."""
        node = self._nodes.get(number)
        if node is not None and not self._lane(body).start(node.name, self._answer(None, node, body)):
            self.failed[type(body).__name__] += 1

    @property
    def under_way_count(self) -> int:
        """Calls that are under way, over all peers, without beats."""
        return self._calls.count

    async def close(self) -> None:
        """Cancels everything and closes the connections."""
        await self._calls.close()
        await self._beats.close()
        await self._lines.close()

    # --- One call -------------------------------------------------------------------------------------------------

    def _lane(self, body: PeerCall) -> _Lane:
        return self._beats if isinstance(body, BeatCall) else self._calls

    async def _answer(self, token: int | None, node: Node, body: PeerCall) -> None:
        kind = type(body).__name__
        self.asked[kind] += 1
        event: KeeperEvent
        try:
            answer = await self._call(node, body)
            event = Answered(0 if token is None else token, answer)
        except UnansweredError as error:
            event = AskFailed(0 if token is None else token, str(error), error.untaken, error.agentless)
        except RemoteError as error:
            event = AskFailed(0 if token is None else token, error.sentence)
        if isinstance(event, AskFailed):
            self.failed[kind] += 1
        if token is not None:
            self._on_event(event)

    async def _call(self, node: Node, body: PeerCall) -> PeerAnswer:
        session = self._lane(body).opened(self._tls)
        is_beat = isinstance(body, BeatCall)
        asking = self._lines.ask(session, node, wire.encode(body)) if is_beat else self._request(session, node, body)
        status, data = await self._answered(node, asking)
        if status != 200:
            sentence = data[:SENTENCE_BYTES_MAX].decode(errors="replace").strip()
            raise UnansweredError(f"{node.name} answered {status}: {sentence}", untaken=400 <= status < 500)
        answer = wire.decode(wire.ANSWERS[type(body)], data)
        assert isinstance(answer, PeerAnswer), "the answer to a peer's call is a peer's answer"
        return answer

    async def _request(self, session: aiohttp.ClientSession, node: Node, body: PeerCall) -> tuple[int, bytes]:
        method, path = wire.ROUTES[type(body)]
        async with session.request(
            method,
            f"https://{node.control}{path}",
            data=wire.encode(body),
            headers={"Content-Type": wire.CONTENT_TYPE, **self._clocks.headers(node.name, now_ns())},
            server_hostname=server_name(node.name),
            allow_redirects=False,
        ) as response:
            self._clocks.heard(node.name, read_clock(response.headers.get(HEADER_CLOCK)), now_ns())
            return response.status, await _bounded(response.content, node.name)

    @staticmethod
    async def _answered(node: Node, asking: Awaitable[tuple[int, bytes]]) -> tuple[int, bytes]:
        """Status and body. Raises UnansweredError where there are none."""
        try:
            return await asking
        except aiohttp.WSServerHandshakeError as error:
            return error.status, error.message.encode()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            sentence = f"{node.name} ({node.control}) cannot be reached: {error}"
            if not isinstance(error, aiohttp.ClientConnectorError):
                raise UnansweredError(sentence) from error
            agentless = isinstance(error.os_error, ConnectionRefusedError)
            raise UnansweredError(sentence, untaken=True, agentless=agentless) from error
        except TimeoutError as error:
            raise UnansweredError(f"{node.name} ({node.control}) does not answer") from error
