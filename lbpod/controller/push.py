"""The controller's calls to the agents: one effect of the Planner in, exactly one event about it out, never an
exception.

Decided here: which failures count as refusals (4xx: the agent has understood and says no) and which as silence (all
else), how long a call may take, and that a snapshot is encoded once for all nodes. A question that costs an agent
nothing has to be answered soon, for by it the lost are found. A call to hand over is held for HANDOVER_HOLD_NS by an
agent that has not finished, which fits into the time that calls have. Mutual TLS: the connection is made only to the
very node that is meant (``server_name``), whatever its address is. Connections are kept alive.
"""

import asyncio
import ssl
from typing import Final

import aiohttp

from lbpod.certs import server_name
from lbpod.core import wire
from lbpod.core.errors import RemoteError
from lbpod.core.limits import BODY_BYTES_MAX, CALLS_MAX, CONTROL_TIMEOUT_NS, PEER_TIMEOUT_NS, SENTENCE_BYTES_MAX
from lbpod.core.messages import AskStatus, ControlCall, LbAnswered, LbFailed, LbStatus, Push
from lbpod.core.model import Snapshot

_SECOND_NS: Final = 1_000_000_000


class PushClient:
    """Calls agents. Make it inside the event loop; close it there."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self._places = asyncio.Semaphore(CALLS_MAX)
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

    async def call(self, effect: AskStatus | Push) -> LbAnswered | LbFailed:
        """Carry out one call."""
        generation = effect.generation if isinstance(effect, Push) else 0
        try:
            async with self._places:
                status = await self._status(effect)
            return LbAnswered(effect.node, generation, status)
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
