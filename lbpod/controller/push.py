"""The controller's calls to the agents: one effect of the Planner in, one event about it out, never an exception.

Decided here: which failures count as refusals (4xx: the agent has understood and says no) and which as silence (all
else), how long a call may take, and that a snapshot is encoded once for all nodes. A question that costs an agent
nothing has to be answered soon, for by it the lost are found. A call to hand over is held for HANDOVER_HOLD_NS by an
agent that has not finished, which fits into the time that calls have. Mutual TLS: the connection is made only to the
very node that is meant (``server_name``), whatever its address is. Connections are kept alive.

*Nobody that lives waits for the timeouts of those that do not* (a zone without power is hundreds of nodes at once). So
calls to LBs have places of their own; a place is held for CALL_PLACE_NS at most, for nobody knows yet of a node that
has just died that it will not answer; and nodes without an LB that are known not to (the dark) queue up among
themselves, for places that they hold until they answer or time out. Tried before: one set of places for all, held until
the call ends. A hundred dark nodes filled it, with four hundred the LBs were taken for lost.

A call may wait for longer than CALL_LOST_NS in that queue; then the Planner gives it up, and makes another one later.
That takes the place of the older one in the queue, and no event tells of the older one: what waits is one call for each
node, and each has its turn.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import aiohttp

from lbpod.certs import server_name
from lbpod.core import wire
from lbpod.core.errors import RemoteError
from lbpod.core.limits import (
    BODY_BYTES_MAX,
    CALL_PLACE_NS,
    CALLS_MAX,
    CONTROL_TIMEOUT_NS,
    DARK_CALLS_MAX,
    NODES_MAX,
    PEER_TIMEOUT_NS,
    SENTENCE_BYTES_MAX,
)
from lbpod.core.messages import AskStatus, ControlCall, LbAnswered, LbFailed, LbStatus, Push
from lbpod.core.model import Snapshot

_SECOND_NS: Final = 1_000_000_000


class _Lane:
    """Calls of one kind. So many hold a place, for so long at most; the others wait, in the order in which their nodes
    came. Invariant: one call waits for each node in ``_waiting``, the newest."""

    def __init__(self, places_max: int, place_ns: int) -> None:
        self._places = asyncio.Semaphore(places_max)
        self._place_ns = place_ns
        self._waiting: dict[str, AskStatus | Push] = {}

    def overtake(self, effect: AskStatus | Push) -> bool:
        """True where an older call to this node waits: when its turn comes, this one is carried out."""
        waits = effect.node in self._waiting
        self._waiting[effect.node] = effect
        return waits

    @asynccontextmanager
    async def turn(self, node: str) -> AsyncIterator[AskStatus | Push]:
        """Wait for a place; what is to be carried out there, now."""
        try:
            await self._places.acquire()
        finally:
            effect = self._waiting.pop(node)
        is_held = True

        def leave() -> None:
            nonlocal is_held
            if is_held:
                is_held = False
                self._places.release()

        timer = asyncio.get_running_loop().call_later(self._place_ns / _SECOND_NS, leave)
        try:
            yield effect
        finally:
            timer.cancel()
            leave()


class PushClient:
    """Calls agents. Make it inside the event loop; close it there."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self._lbs = _Lane(CALLS_MAX, CALL_PLACE_NS)
        self._others = _Lane(CALLS_MAX, CALL_PLACE_NS)
        self._dark = _Lane(DARK_CALLS_MAX, CONTROL_TIMEOUT_NS)
        self._dark_nodes: dict[str, None] = {}  # NODES_MAX at most, the newest last
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls, limit=0, limit_per_host=2),
            timeout=aiohttp.ClientTimeout(
                total=CONTROL_TIMEOUT_NS / _SECOND_NS, sock_connect=PEER_TIMEOUT_NS / _SECOND_NS
            ),
            headers={"Content-Type": wire.CONTENT_TYPE, "Accept": wire.CONTENT_TYPE},
        )
        self._soon = aiohttp.ClientTimeout(total=PEER_TIMEOUT_NS / _SECOND_NS)
        self._encoded: tuple[ControlCall, bytes] | None = None

    async def close(self) -> None:
        """Ends all connections."""
        await self._session.close()

    async def call(self, effect: AskStatus | Push) -> LbAnswered | LbFailed | None:
        """Carry out one call. None: an older one to this node still waits for its turn, and this one takes over that;
        the event about it is what the older one returns."""
        lane = self._lane_of(effect)
        if lane.overtake(effect):
            return None
        async with lane.turn(effect.node) as newest:
            loop = asyncio.get_running_loop()
            began_s = loop.time()
            event = await self._event_of(newest)
            self._note_dark(event, loop.time() - began_s)
            return event

    def _lane_of(self, effect: AskStatus | Push) -> _Lane:
        if effect.lb:
            return self._lbs
        return self._dark if effect.node in self._dark_nodes else self._others

    def _note_dark(self, event: LbAnswered | LbFailed, took_s: float) -> None:
        """Whose agent is away, but whose node says so at once, costs nobody any time. Nodes that are gone for good are
        never called again, so nobody takes their names out."""
        self._dark_nodes.pop(event.node, None)
        if isinstance(event, LbFailed) and not event.refused and took_s * _SECOND_NS > CALL_PLACE_NS:
            self._dark_nodes[event.node] = None
            if len(self._dark_nodes) > NODES_MAX:
                del self._dark_nodes[next(iter(self._dark_nodes))]

    async def _event_of(self, effect: AskStatus | Push) -> LbAnswered | LbFailed:
        generation = effect.generation if isinstance(effect, Push) else 0
        try:
            return LbAnswered(effect.node, generation, await self._status(effect))
        except RemoteError as error:
            return LbFailed(effect.node, generation, True, error.sentence)
        except TimeoutError:
            return LbFailed(effect.node, generation, False, f"no answer from {effect.control} in time")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            said = str(error) or type(error).__name__
            return LbFailed(effect.node, generation, False, said[:SENTENCE_BYTES_MAX])

    async def _status(self, effect: AskStatus | Push) -> LbStatus:
        """Raises RemoteError where the agent refuses or answers nonsense, aiohttp's errors where it does not answer."""
        timeout = self._session.timeout
        if isinstance(effect, Push):
            method, path = wire.ROUTES[type(effect.body)]
            data = self._bytes_of(effect.body)
        else:
            method, path, data = "GET", wire.PATH_STATE, None
            timeout = self._soon if not effect.with_snapshot else timeout
            path += f"?{wire.QUERY_SNAPSHOT}=1" if effect.with_snapshot else ""
        async with self._session.request(
            method,
            f"https://{effect.control}{path}",
            data=data,
            timeout=timeout,
            server_hostname=server_name(effect.node),
            allow_redirects=False,
        ) as response:
            if response.status == 200:
                return wire.decode(LbStatus, await _body(response, BODY_BYTES_MAX))
            sentence = (await _body(response, SENTENCE_BYTES_MAX)).decode(errors="replace").strip()
            if 400 <= response.status < 500:
                raise RemoteError(sentence or f"status {response.status}", response.status)
            raise aiohttp.ClientError(f"status {response.status}: {sentence}")

    def _bytes_of(self, body: ControlCall) -> bytes:
        """A snapshot is encoded once, not once per node."""
        if not isinstance(body, Snapshot):
            return wire.encode(body)
        if self._encoded is None or self._encoded[0] is not body:
            self._encoded = (body, wire.encode(body))
        return self._encoded[1]


async def _body(response: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    parts, length_bytes = [], 0
    async for part in response.content.iter_any():
        length_bytes += len(part)
        if length_bytes > bytes_max:
            raise RemoteError(f"the answer has more than {bytes_max} bytes", 413)
        parts.append(part)
    return b"".join(parts)
