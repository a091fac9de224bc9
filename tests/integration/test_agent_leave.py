"""SIGTERM hands an LB's slots over before its agent ends: two agents on the loopback, the test is the controller."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from structlog.testing import capture_logs

from lbpod.agent.agent import Agent
from lbpod.agent.leave import Left
from lbpod.agent.settings import Endpoint
from lbpod.core import wire
from lbpod.core.messages import (
    ControlCall,
    HandoverCall,
    LbStatus,
    RingDoneCall,
    RingPrepareCall,
    RingStep,
    RingSwitchCall,
)
from lbpod.core.model import Snapshot, World, parse_address
from lbpod.core.snapshot import digest_of, ring_snapshot
from lbpod.datapath.memory import MemoryDatapath
from lbpod.minting import mint
from tests.agents import FENCE_NEVER_NS, Caller, follow, make_parts, roll_out, running, world

WITHDRAW_NS = 500_000_000
Logs = list[MutableMapping[str, Any]]


@dataclass
class Two:
    """n1 and n2, who are a ring; both leave on SIGTERM."""

    one: Agent
    two: Agent
    maps_one: MemoryDatapath
    controller: Caller
    world: World
    snapshot: Snapshot

    async def change_ring(self, *names: str) -> None:
        """A whole ring change, as the controller makes it."""
        last = self.snapshot
        self.snapshot = ring_snapshot(last, last, self.world, names, last.generation + 1, last.next_ids)
        what = self.snapshot.generation, digest_of(self.snapshot)
        await self.to_both(self.snapshot)
        await self.to_both(RingPrepareCall(*what))
        async with asyncio.timeout(20):
            while {RingStep.HANDED} != {each.ring_step for each in await self.to_both(HandoverCall(*what, 1))}:
                pass
        await self.to_both(RingSwitchCall(*what))
        await self.to_both(RingDoneCall(*what))

    async def to_both(self, body: ControlCall) -> list[LbStatus]:
        statuses = []
        for agent in (self.one, self.two):
            status, data = await self.controller.say(agent, body)
            assert 200 == status, data
            statuses.append(wire.decode(LbStatus, data))
        return statuses


@pytest.fixture
def logs() -> Iterator[Logs]:
    with capture_logs() as lines:
        yield lines


@pytest.fixture
async def two(tmp_path: Path, logs: Logs, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Two]:
    monkeypatch.setattr("lbpod.core.watch.FENCE_NS", FENCE_NEVER_NS)
    mint(tmp_path / "tls", ["n1", "n2"])
    maps = MemoryDatapath()
    parts = [
        make_parts("n1", tmp_path, maps, address=parse_address("10.0.0.1")),
        make_parts("n2", tmp_path, MemoryDatapath(), address=parse_address("10.0.0.2")),
    ]
    async with (
        running(replace(parts[0], withdraw_ns=WITHDRAW_NS)) as one,
        running(replace(parts[1], withdraw_ns=WITHDRAW_NS)) as second,
        Caller(tmp_path, "controller") as controller,
    ):
        listed = world({"n1": one, "n2": second}, 3)
        host = msgspec.structs.replace(listed.nodes[2], lb=False)
        wanted = World((*listed.nodes[:2], host), listed.vips)
        snapshot = follow(wanted, None)
        await roll_out(controller, [one, second], snapshot)
        await until(lambda: one.driver.status.serving and second.driver.status.serving)
        yield Two(one, second, maps, controller, wanted, snapshot)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110  (nobody tells)
            await asyncio.sleep(0.01)


async def readyz(agent: Agent) -> tuple[int, str]:
    """(0, "") where it does not listen any more."""
    url = f"http://127.0.0.1:{agent.metrics_port}/readyz"
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status, await response.text()
    except aiohttp.ClientConnectorError:
        return 0, ""


async def gone(agent: Agent) -> None:
    async with asyncio.timeout(20):
        while (await readyz(agent))[0]:  # noqa: ASYNC110  (nobody tells)
            await asyncio.sleep(0.01)


def how(logs: Logs) -> list[str]:
    return [line["how"] for line in logs if line["event"] == "left"]


async def test_an_lb_withdraws_then_asks_then_hands_over_then_ends(two: Two, logs: Logs) -> None:
    assert (200, "ok\n") == await readyz(two.one)
    two.one.terminate()
    await until(lambda: two.one.driver.leaving)
    status, sentence = await readyz(two.one)
    assert (503, True) == (status, "leaving" in sentence)
    assert not (await two.controller.state(two.one)).leaving, "it serves until it has been withdrawn"
    await until(lambda: two.one.driver.status.leaving)
    state = await two.controller.state(two.one)
    assert (True, True, []) == (state.leaving, state.serving, how(logs))
    await two.change_ring("n2")
    await gone(two.one)
    assert [Left.OUT.value] == how(logs)
    assert [] == two.maps_one.vip_ids(), "who is in no ring serves nothing"
    assert (200, "ok\n") == await readyz(two.two)


async def test_a_second_sigterm_ends_at_once_and_leaves_forwarding_in_place(two: Two, logs: Logs) -> None:
    two.one.terminate()
    await until(lambda: two.one.driver.status.leaving)
    two.one.terminate()
    await gone(two.one)
    assert [] == how(logs)
    assert [1] == two.maps_one.vip_ids()


async def test_a_controller_that_does_not_come_is_waited_for_so_long_and_no_longer(
    two: Two, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lbpod.agent.leave.LEAVE_NS_MAX", 500_000_000)
    two.one.terminate()
    await gone(two.one)
    assert [Left.NOT_HEARD.value] == how(logs)
    assert [1] == two.maps_one.vip_ids()


async def test_a_sigterm_while_it_restores_makes_it_leave_all_the_same(two: Two, logs: Logs, tmp_path: Path) -> None:
    """A restart's new agent is told to end before it knows that it is in a ring."""
    port = two.one.control_port
    two.one.stop()
    await gone(two.one)
    parts = make_parts("n1", tmp_path, two.maps_one, address=parse_address("10.0.0.1"))
    parts = replace(parts, listen=Endpoint("127.0.0.1", port), withdraw_ns=WITHDRAW_NS)
    two.one = Agent(parts)
    running_again = asyncio.create_task(two.one.run())
    two.one.terminate()
    await two.one.started.wait()
    assert (503, True) == ((await readyz(two.one))[0], two.one.driver.status.serving)
    await until(lambda: two.one.driver.status.leaving)
    assert [] == how(logs)
    await two.change_ring("n2")
    await asyncio.wait_for(running_again, 20)
    assert [Left.OUT.value] == how(logs)
    assert [] == two.maps_one.vip_ids(), "its slots have been handed over"


async def test_a_restore_is_waited_for_so_long_and_no_longer(
    two: Two, logs: Logs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lbpod.agent.leave.LEAVE_NS_MAX", 0)
    two.one.stop()
    await gone(two.one)
    again = Agent(replace(make_parts("n1", tmp_path, two.maps_one), withdraw_ns=WITHDRAW_NS))
    running_again = asyncio.create_task(again.run())
    again.terminate()
    await asyncio.wait_for(running_again, 20)
    assert [Left.NOT_RESTORED.value] == how(logs)
    assert [1] == two.maps_one.vip_ids()


async def test_who_is_alone_ends_at_once(two: Two, logs: Logs) -> None:
    """First one leaves the other alone, then that has nobody to hand over to."""
    await two.change_ring("n2")
    await until(lambda: () == two.two.driver.beliefs.others and not two.one.driver.status.serving)  # as of a tick, both
    assert 503 == (await readyz(two.one))[0], "it is an LB, and in no ring"
    for agent in (two.one, two.two):
        agent.terminate()
        await gone(agent)
    assert [Left.ALONE.value] * 2 == how(logs)
