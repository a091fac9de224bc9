"""A controller's calls while hundreds of nodes are away: nobody that lives waits for them.

Agents and certificates are real. A node that is away is a port of the loopback whose queue of connections is full: the
kernel drops each SYN there, and what calls it waits for an answer that never comes, as with a node without power.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from lbpod.agent.agent import Agent
from lbpod.certs import client_context, files_in
from lbpod.controller.driver import Driver
from lbpod.controller.metrics import Metrics
from lbpod.controller.push import PushClient
from lbpod.core.limits import CALLS_MAX, DARK_CALLS_MAX, PEER_TIMEOUT_NS
from lbpod.core.messages import AskStatus, LbAnswered, LbFailed, Persist, Persisted, Phase, PrepareCall, Push
from lbpod.core.model import World, WorldNode, parse_address
from lbpod.datapath.memory import MemoryDatapath
from lbpod.minting import mint
from tests.agents import CLUSTER, make_parts, running, world

LBS = ("n1", "n2")
HOST = "n3"
DARK_COUNT = 300
SECOND_NS = 1_000_000_000
ALL_DARK_S = DARK_COUNT / CALLS_MAX * PEER_TIMEOUT_NS / SECOND_NS
"""By then all that are away have timed out, so many at a time. Whoever waits for them waits for longer."""
Call = asyncio.Task[LbAnswered | LbFailed | None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calls")
    mint(folder / "tls", (*LBS, HOST))
    return folder


@pytest.fixture
async def agents(folder: Path) -> AsyncIterator[dict[str, Agent]]:
    """Two LBs and a node without one."""
    async with AsyncExitStack() as stack:
        agents = {}
        for number, name in enumerate((*LBS, HOST), start=1):
            for file in (folder / name).glob("*"):
                file.unlink()
            parts = make_parts(name, folder, MemoryDatapath(), address=parse_address(f"10.0.0.{number}"))
            agents[name] = await stack.enter_async_context(running(parts))
        yield agents


@pytest.fixture
async def client(folder: Path) -> AsyncIterator[PushClient]:
    client = PushClient(client_context(files_in(folder / "tls", "controller")))
    yield client
    await client.close()


@pytest.fixture
def dark_port() -> Iterator[int]:
    """A port on all addresses of the loopback where no connection is ever made."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(4):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.connect(("127.0.0.1", port))
        with pytest.raises(TimeoutError):
            socket.create_connection(("127.9.0.1", port), timeout=0.2)
        yield port


def dark(number: int, port: int) -> AskStatus:
    """A question to one of those that are away; each has an address of its own."""
    return AskStatus(f"dark{number}", f"127.9.{number >> 8}.{number & 255}:{port}", with_snapshot=False)


def begin_dark(client: PushClient, port: int) -> list[Call]:
    """Calls to all that are away, side by side."""
    return [asyncio.create_task(client.call(dark(number, port))) for number in range(DARK_COUNT)]


async def ended_before(client: PushClient, agents: dict[str, Agent], node: str, calls: list[Call]) -> int:
    """How many of the calls had ended when this node answered."""
    control = f"127.0.0.1:{agents[node].control_port}"
    assert isinstance(await client.call(AskStatus(node, control, False, lb=node in LBS)), LbAnswered)
    return sum(call.done() for call in calls)


async def test_nobody_that_lives_waits_for_those_that_do_not(
    agents: dict[str, Agent], client: PushClient, dark_port: int
) -> None:
    calls = begin_dark(client, dark_port)
    await asyncio.sleep(0)
    ended = await asyncio.gather(*(ended_before(client, agents, node, calls) for node in ("n1", HOST)))
    assert ended[0] < DARK_COUNT / 2, "an LB has a place of its own"
    # Which of the nodes without an LB have died is not known yet.
    assert ended[1] < DARK_COUNT / 2, "they have given up their places before their time was over"
    assert {LbFailed} == {type(event) for event in await asyncio.gather(*calls)}

    calls = begin_dark(client, dark_port)
    await asyncio.sleep(0)
    try:
        assert await ended_before(client, agents, HOST, calls) < DARK_COUNT / 2, "they are known now"
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def test_of_the_calls_to_a_node_that_waits_in_line_the_newest_is_made_at_the_turn_of_the_oldest(
    client: PushClient, dark_port: int
) -> None:
    """The Planner has given up the older one meanwhile: calls that nobody waits for do not pile up."""
    asked = [dark(number, dark_port) for number in range(DARK_CALLS_MAX + 2)]
    await asyncio.gather(*map(client.call, asked))
    calls = [asyncio.create_task(client.call(one)) for one in asked]
    await asyncio.sleep(0)
    last = asked[-1]
    newer = Push(last.node, last.control, 7, PrepareCall(7, bytes(16)))
    assert await client.call(newer) is None
    assert not any(call.done() for call in calls), "it has not waited"
    events = await asyncio.gather(*calls)
    assert [0] * (len(asked) - 1) + [7] == [event.generation for event in events if isinstance(event, LbFailed)]


class Written:
    """A store that takes everything."""

    async def persist(self, effect: Persist) -> Persisted:
        return Persisted(effect.generation)


def world_with_dark(agents: dict[str, Agent], backends: int, port: int) -> World:
    """Two LBs and a node without one that live, and all those that do not."""
    wanted = world(agents, backends)
    nodes = [msgspec.structs.replace(node, lb=node.name in LBS) for node in wanted.nodes]
    for number in range(DARK_COUNT):
        one = dark(number, port)
        address = parse_address(f"10.9.{number >> 8}.{number & 255}")
        nodes.append(WorldNode(one.node, address, one.control, lb=False))
    return msgspec.structs.replace(wanted, nodes=tuple(nodes))


async def until_in_force(driver: Driver, number: int) -> float:
    """How many seconds it takes until this World is in force."""
    began = time.monotonic()
    async with asyncio.timeout(60):
        while driver.in_force < number:
            assert () == driver.status.lost
            await asyncio.sleep(0.02)
    return time.monotonic() - began


async def test_a_change_is_in_force_at_once_while_hundreds_of_nodes_are_away(
    folder: Path, agents: dict[str, Agent], dark_port: int
) -> None:
    tls = client_context(files_in(folder / "tls", "controller"))
    driver = Driver(CLUSTER, tls, Written(), Metrics())
    running_driver = asyncio.create_task(driver.run())
    try:
        await until_in_force(driver, driver.see(world_with_dark(agents, 2, dark_port)))
        await asyncio.sleep(2 * PEER_TIMEOUT_NS / SECOND_NS)
        assert DARK_COUNT == len(driver.status.lagging)
        for backends in (3, 4):
            seconds = await until_in_force(driver, driver.see(world_with_dark(agents, backends, dark_port)))
            assert seconds < ALL_DARK_S, "neither the LBs nor the host have waited for anybody"
            assert (Phase.IDLE, 2) == (driver.status.phase, driver.status.lbs_at_generation)
    finally:
        running_driver.cancel()
        await asyncio.gather(running_driver, return_exceptions=True)
