"""Calls to other agents: one keep-alive session, bounded in number and in time, and a belief about who answers.

Decided here: how a call fails (each failure is one sentence in an AskFailed, never an exception that travels), how
many may be under way, and when a member is believed to be down: after SILENT_CALLS_MAX calls in a row that found
nobody. A member believed to be down is asked for its state every PEER_PROBE_NS until it answers. A refusal (4xx, 503)
is an answer: who refuses is up. A wrong belief is harmless (DESIGN, section 2), so this stays as simple as it is.

Left to others: whom to ask and what (the Keeper). The certificate of the answering side has to carry the name of the
node that was meant: TLS checks that, before a byte of a call is sent.
"""

import asyncio
import ssl
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

import aiohttp

from lbpod.agent.age import HEADER_CLOCK, Clocks
from lbpod.agent.broken import raise_what_failed
from lbpod.agent.clock import now_ns
from lbpod.certs import server_name
from lbpod.core import wire
from lbpod.core.errors import RemoteError
from lbpod.core.limits import (
    BODY_BYTES_MAX,
    MEMBER_NONE,
    OUTSTANDING_MAX,
    PEER_CONNECTIONS_MAX,
    PEER_PROBE_NS,
    PEER_TIMEOUT_NS,
    SENTENCE_BYTES_MAX,
    SILENT_CALLS_MAX,
)
from lbpod.core.messages import Answered, AskFailed, KeeperEvent, MemberSeen, PeerAnswer, PeerCall
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


class UnreachableError(Exception):
    """Nobody answered, or somebody else did. str(): one sentence."""


class Peers:
    """The client side of one agent. `close` gives up what is under way.

    Invariants: len(_under_way[node]) <= OUTSTANDING_MAX; a member is in `_probes` exactly while it is believed down.
    """

    def __init__(self, tls: ssl.SSLContext, on_event: Callable[[KeeperEvent], None]) -> None:
        self._tls = tls
        self._on_event = on_event
        self._session: aiohttp.ClientSession | None = None
        self._under_way: dict[str, set[asyncio.Task[None]]] = {}
        self._nodes: Mapping[int, Node] = {}
        self._silent: Counter[str] = Counter()
        self._probes: dict[int, asyncio.Task[None]] = {}
        self._clocks = Clocks()
        self.asked: Counter[str] = Counter()
        """Questions and tellings, by kind of body."""
        self.failed: Counter[str] = Counter()
        """Those that were not answered with 200, by kind of body."""

    def know(self, nodes: Mapping[int, Node]) -> None:
        """The nodes that may be called from now on, by id."""
        self._nodes = nodes

    def ask(self, token: int, number: int, body: PeerCall) -> None:
        """Calls a node's agent; Answered or AskFailed follows as an event."""
        node = self._nodes.get(number)
        if node is None:
            self._on_event(AskFailed(token, f"node {number} is not in the newest snapshot"))
        elif not self._start(node, self._answer(token, node, body)):
            self._on_event(AskFailed(token, f"{OUTSTANDING_MAX} calls to {node.name} are under way"))

    def tell(self, number: int, body: PeerCall) -> None:
        """Calls a node's agent and forgets about it."""
        node = self._nodes.get(number)
        if node is not None and not self._start(node, self._answer(None, node, body)):
            self.failed[type(body).__name__] += 1

    @property
    def under_way_count(self) -> int:
        """Calls that are under way, over all peers."""
        return sum(len(tasks) for tasks in self._under_way.values())

    async def close(self) -> None:
        """Cancels everything and closes the connections."""
        tasks = [task for tasks in self._under_way.values() for task in sorted(tasks, key=id)]
        tasks += list(self._probes.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    # --- One call -------------------------------------------------------------------------------------------------

    def _start(self, node: Node, work: Coroutine[Any, Any, None]) -> bool:
        tasks = self._under_way.setdefault(node.name, set())
        if len(tasks) >= OUTSTANDING_MAX:
            work.close()
            return False
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(lambda done: self._finished(node.name, done))
        return True

    def _finished(self, name: str, task: asyncio.Task[None]) -> None:
        tasks = self._under_way[name]
        tasks.discard(task)
        if not tasks:
            del self._under_way[name]
        raise_what_failed(task)

    async def _answer(self, token: int | None, node: Node, body: PeerCall) -> None:
        kind = type(body).__name__
        self.asked[kind] += 1
        event: KeeperEvent
        try:
            answer = await self._call(node, body)
            event = Answered(0 if token is None else token, answer)
            self._heard(node)
        except UnreachableError as error:
            event = AskFailed(0 if token is None else token, str(error))
            self._not_heard(node)
        except RemoteError as error:
            event = AskFailed(0 if token is None else token, error.sentence)
            self._heard(node)
        if isinstance(event, AskFailed):
            self.failed[kind] += 1
        if token is not None:
            self._on_event(event)

    async def _call(self, node: Node, body: PeerCall) -> PeerAnswer:
        method, path = wire.ROUTES[type(body)]
        status, data = await self._exchange(node, method, path, wire.encode(body))
        if status != 200:
            sentence = data[:SENTENCE_BYTES_MAX].decode(errors="replace").strip()
            raise RemoteError(f"{node.name} answered {status}: {sentence}", status if 400 <= status < 500 else 409)
        answer = wire.decode(wire.ANSWERS[type(body)], data)
        assert isinstance(answer, PeerAnswer), "the answer to a peer's call is a peer's answer"
        return answer

    async def _exchange(self, node: Node, method: str, path: str, data: bytes) -> tuple[int, bytes]:
        try:
            async with self._opened().request(
                method,
                f"https://{node.control}{path}",
                data=data,
                headers={"Content-Type": wire.CONTENT_TYPE, **self._clocks.headers(node.name, now_ns())},
                server_hostname=server_name(node.name),
                allow_redirects=False,
            ) as response:
                self._clocks.heard(node.name, response.headers.get(HEADER_CLOCK), now_ns())
                return response.status, await _bounded(response.content, node.name)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UnreachableError(f"{node.name} ({node.control}) cannot be reached: {error}") from error
        except TimeoutError as error:
            raise UnreachableError(f"{node.name} ({node.control}) does not answer") from error

    def _opened(self) -> aiohttp.ClientSession:
        """The session: made at the first call, for it needs a running loop."""
        if self._session is None:
            connector = aiohttp.TCPConnector(ssl=self._tls, limit=0, limit_per_host=PEER_CONNECTIONS_MAX)
            timeout = aiohttp.ClientTimeout(total=PEER_TIMEOUT_NS * _NS)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        return self._session

    # --- Who is up ------------------------------------------------------------------------------------------------

    def _heard(self, node: Node) -> None:
        self._silent.pop(node.name, None)
        probe = self._probes.pop(node.member, None)
        if probe is not None:
            if probe is not asyncio.current_task():
                probe.cancel()
            self._on_event(MemberSeen(node.member, up=True))

    def _not_heard(self, node: Node) -> None:
        self._silent[node.name] += 1
        if self._silent[node.name] < SILENT_CALLS_MAX or node.member == MEMBER_NONE or node.member in self._probes:
            return
        probe = self._probes[node.member] = asyncio.create_task(self._probe(node.id, node.member))
        probe.add_done_callback(raise_what_failed)
        self._on_event(MemberSeen(node.member, up=False))

    async def _probe(self, number: int, member: int) -> None:
        """Asks until somebody answers, whatever the answer, or until the node is no such member any more."""
        while True:
            await asyncio.sleep(PEER_PROBE_NS * _NS)
            node = self._nodes.get(number)
            if node is None or node.member != member:
                del self._probes[member]
                return
            try:
                await self._exchange(node, "GET", wire.PATH_STATE, b"")
            except UnreachableError:
                continue
            except RemoteError:
                pass
            self._heard(node)
            return
