"""What tests of the agent share: a small cluster's snapshot, next hops that are known at once, agents on maps in memory
with real certificates, and clients to call them."""

import asyncio
import ssl
import typing
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import aiohttp
import numpy as np
import numpy.typing as npt

from lbpod.agent.agent import Agent, Parts
from lbpod.agent.driver import Brain
from lbpod.agent.remembered import Memory
from lbpod.agent.settings import Endpoint
from lbpod.agent.view import Facts
from lbpod.certs import Credentials, client_context, files_in
from lbpod.core import wire
from lbpod.core.hashing import flow_hashes
from lbpod.core.keeper import Keeper
from lbpod.core.layout import FLOW, PENDING
from lbpod.core.messages import CommitCall, LbStatus, PrepareCall
from lbpod.core.model import (
    Affinity,
    Backend,
    Cluster,
    Node,
    Protocol,
    Ring,
    Snapshot,
    Vip,
    World,
    WorldBackend,
    WorldNode,
    WorldVip,
    format_address,
    parse_address,
)
from lbpod.core.ownership import Member, ownership
from lbpod.core.snapshot import Tables, digest_of, next_snapshot
from lbpod.datapath.memory import MemoryHops
from lbpod.datapath.port import Datapath
from lbpod.datapath.rows import Uplink

UPLINK = Uplink("eth0", 3, bytes.fromhex("020000000001"), 1600, parse_address("10.0.0.1"))
VIP_ADDRESS = parse_address("203.0.113.10")
Rows = npt.NDArray[Any]


def snapshot(
    generation: int, *, backends: int = 2, ring: tuple[int, ...] = (0, 1), before: tuple[int, ...] = ()
) -> Snapshot:
    nodes = tuple(
        Node(number, f"n{number}", parse_address(f"10.0.0.{number}"), f"10.0.0.{number}:9900", number - 1)
        for number in (1, 2)
    )
    vip = Vip(
        5,
        "shop/web/http",
        VIP_ADDRESS,
        80,
        Protocol.TCP,
        Affinity.NONE,
        10**12,
        10**12,
        1,
        generation,
        bytes(16),
        tuple(Backend(10 + each, parse_address(f"10.1.0.{each + 1}"), 8080, 1 + each % 2) for each in range(backends)),
    )
    return Snapshot(Cluster(77, 0xDEADBEEF), generation, Ring(1, ring, before), nodes, (vip,))


def flows(count: int) -> Rows:
    rows = np.zeros(count, FLOW)
    rows["port_be"] = np.arange(1, count + 1)
    rows["vip"] = 5
    return rows


def make_parts(
    node: str, folder: Path, datapath: Datapath, *, address: bytes = UPLINK.address, brain: Brain | None = None
) -> Parts:
    """Parts of an agent on maps in memory, listening on ports that are free. folder/tls: made by `minting.mint`."""
    loopback = Endpoint("127.0.0.1", 0)
    return Parts(
        brain=Keeper(node) if brain is None else brain,
        datapath=datapath,
        hops=MemoryHops(),
        uplink=replace(UPLINK, address=address),
        memory=Memory(folder / node),
        credentials=Credentials(files_in(folder / "tls", node)),
        listen=loopback,
        metrics_listen=loopback,
        facts=Facts("0", "eth0", format_address(address)),
        node=node,
    )


@asynccontextmanager
async def running(parts: Parts) -> AsyncIterator[Agent]:
    """An agent that runs, until the block ends."""
    agent = Agent(parts)
    task = asyncio.create_task(agent.run())
    started = asyncio.create_task(agent.started.wait())
    await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    started.cancel()
    if task.done():
        task.result()
    try:
        yield agent
    finally:
        agent.stop()
        await asyncio.wait_for(task, 10)


class Reachable(typing.Protocol):
    """What a client needs to know of an agent."""

    @property
    def control_port(self) -> int:
        """Where it listens on the loopback."""


class Caller:
    """A client with one of the certificates of folder/tls, or with none."""

    def __init__(self, folder: Path, name: str | None) -> None:
        self._tls = ssl.create_default_context(cafile=str(folder / "tls" / "ca.crt"))
        if name is not None:
            self._tls = client_context(files_in(folder / "tls", name))
        self._tls.check_hostname = False
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=10)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self._tls), timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def call(
        self,
        method: str,
        agent: Reachable,
        path: str,
        data: bytes = b"",
        accept: str = "*/*",
        host: str = "127.0.0.1",
    ) -> tuple[int, bytes]:
        """Status and body."""
        assert self._session is not None, "use it in `async with`"
        url = f"https://{host}:{agent.control_port}{path}"
        async with self._session.request(method, url, data=data, headers={"Accept": accept}) as response:
            return response.status, await response.read()

    async def certificate(self, agent: Reachable) -> Mapping[str, Any]:
        """What the agent shows in a handshake of its own."""
        _, writer = await asyncio.open_connection("127.0.0.1", agent.control_port, ssl=self._tls)
        try:
            found = writer.get_extra_info("peercert")
            assert isinstance(found, dict), "an agent has a certificate"
            return found
        finally:
            writer.close()
            await writer.wait_closed()

    async def say(self, agent: Reachable, body: wire.Body) -> tuple[int, bytes]:
        """A call by the type of its body."""
        method, path = wire.ROUTES[type(body)]
        return await self.call(method, agent, path, wire.encode(body))

    async def state(self, agent: Reachable, host: str = "127.0.0.1") -> LbStatus:
        """GET /v1/state, with the snapshot."""
        status, data = await self.call("GET", agent, wire.PATH_STATE + "?snapshot=1", host=host)
        assert 200 == status, data
        return wire.decode(LbStatus, data)


CLUSTER = Cluster(4711, 0x1234_5678)
NODE_NAMES = ("n1", "n2", "n3")


def world(agents: Mapping[str, Agent], backend_count: int) -> World:
    """Three LBs (those that do not run are nobody's), one VIP with so many backends."""
    nodes = tuple(
        WorldNode(
            name,
            parse_address(f"10.0.0.{number}"),
            f"127.0.0.1:{agents[name].control_port if name in agents else 1}",
            lb=True,
        )
        for number, name in enumerate(NODE_NAMES, start=1)
    )
    backends = tuple(
        WorldBackend(parse_address(f"10.1.{number >> 8}.{number & 255}"), 8080, NODE_NAMES[number % 3])
        for number in range(1, backend_count + 1)
    )
    vip = WorldVip("shop/web/http", VIP_ADDRESS, 80, Protocol.TCP, Affinity.NONE, 3600 * 10**9, 3600 * 10**9, backends)
    return World(nodes, (vip,))


def follow(wanted: World, previous: Snapshot | None) -> Snapshot:
    """The snapshot after `previous` in which this is so."""
    generation = 1 if previous is None else previous.generation + 1
    made, _ = next_snapshot(wanted, previous, CLUSTER, generation, Tables(CLUSTER.seed))
    assert made is not None, "the world has to change"
    return made


FENCE_NEVER_NS = 10**15
"""For tests in which an agent that is starved of CPU, or the only one of its ring that runs, must not fence itself."""


async def roll_out(controller: Caller, agents: Sequence[Reachable], snapshot: Snapshot) -> None:
    """Stage, prepare, commit, each at all agents before the next."""
    digest = digest_of(snapshot)
    for body in (
        snapshot,
        PrepareCall(snapshot.generation, digest),
        CommitCall(snapshot.generation, digest),
    ):
        for agent in agents:
            status, data = await controller.say(agent, body)
            assert 200 == status, data


def relayed_flows(count: int, asker: int, owner: int, seed: int = 1) -> tuple[Rows, Rows]:
    """Flows (FLOW, PENDING) of VIP 1 in tracking-agnostic slots that `owner` owns and `asker` is no replica of.

    asker, owner: member ids 0..2 of `world`.
    """
    own = ownership([Member(number, parse_address(f"10.0.0.{number + 1}")) for number in range(3)], CLUSTER.seed)
    rng = np.random.default_rng(seed)
    parts: list[tuple[Rows, Rows]] = []
    found = 0
    while found < count:
        keys = np.zeros(8 * count, FLOW)
        keys["addr"][:, 10:12] = 255
        keys["addr"][:, 12:] = rng.integers(0, 256, (len(keys), 4), np.uint8)
        keys["port_be"] = rng.integers(1024, 65_536, len(keys))
        keys["vip"] = 1
        hashes = flow_hashes(keys["addr"], keys["port_be"].astype(np.uint16), VIP_ADDRESS, 80, 6, False, CLUSTER.seed)
        values = np.zeros(len(keys), PENDING)
        values["slot"] = hashes >> 16
        wanted = (own[values["slot"]] & 0xFFFF == owner) & (own[values["slot"]] >> 16 != asker)
        parts.append((keys[wanted], values[wanted]))
        found += int(wanted.sum())
    keys = np.concatenate([part[0] for part in parts], dtype=FLOW, casting="no")[:count]
    return keys, np.concatenate([part[1] for part in parts], dtype=PENDING, casting="no")[:count]
