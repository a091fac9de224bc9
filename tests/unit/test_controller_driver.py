"""The controller's loop around the Planner: of what waits in its queue, what something newer replaces is not done, and
no World is said to be in force before all that it wants is."""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from lbpod.controller.driver import Driver
from lbpod.controller.metrics import Metrics
from lbpod.core.limits import CHANGE_GATHER_NS, PORTION_COST_MAX, PORTION_VIP_COST
from lbpod.core.messages import (
    AskStatus,
    CommitCall,
    HandoverCall,
    LbAnswered,
    LbFailed,
    Persist,
    Persisted,
    PersistFailed,
    PlannerStatus,
    Push,
    WorldSeen,
)
from lbpod.core.model import NextIds, World, parse_address
from tests.planner_scene import CLUSTER, SECOND_NS, Scene, world

WORLDS_COUNT = 50
MANY = PORTION_COST_MAX // PORTION_VIP_COST
"""VIPs of one backend each that do not change in one generation."""


class Written:
    """A store that takes everything, but what it is told to refuse: generation -> what it has instead."""

    def __init__(self) -> None:
        self.conflicts: dict[int, int] = {}

    async def persist(self, effect: Persist) -> Persisted | PersistFailed:
        highest = self.conflicts.pop(effect.generation, 0)
        if highest:
            return PersistFailed(effect.generation, highest, "conflict", NextIds(9, 9, 9, 9))
        return Persisted(effect.generation)


class Stage:
    """A driver whose calls are answered by the nodes of a Scene; one call can be held up. Whenever a World is said to
    be in force, it is compared with what the LBs have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scene = Scene()
        self.store = Written()
        self.held = asyncio.Event()
        self.go_on = asyncio.Event()
        self.hold: tuple[str, type] | None = None
        self.said = [0]
        self.wrong: list[str] = []
        self.wanted: dict[int, World] = {}
        monkeypatch.setattr("lbpod.controller.driver.PushClient", lambda _: self)
        self.driver = Driver(CLUSTER, ssl.create_default_context(), self.store, Metrics(), self)
        self.running = asyncio.create_task(self.driver.run())

    async def call(self, effect: AskStatus | Push) -> LbAnswered | LbFailed:
        await asyncio.sleep(0)
        if isinstance(effect, Push) and (effect.node, type(effect.body)) == self.hold:
            self.hold = None
            self.held.set()
            await self.go_on.wait()
        answer = self.scene._answer(effect, self.scene.log)
        assert isinstance(answer, LbAnswered | LbFailed)
        return answer

    async def close(self) -> None:
        """There is nothing to close."""

    def see(self, wanted: World) -> int:
        number = self.driver.see(wanted)
        self.wanted[number] = wanted
        return number

    def reported(self, status: PlannerStatus) -> None:
        """lbpod.controller.driver.Listener."""
        number = self.driver.in_force
        if number in self.said:
            return
        self.said.append(number)
        for name in status.ring:
            there = {one.name: len(one.backends) for one in self.scene.in_force[name].vips}
            if there != {one.name: len(one.backends) for one in self.wanted[number].vips}:
                self.wrong.append(f"World {number} is not what {name} has while {status.phase.value}")

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not what():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def until_in_force(self, number: int) -> None:
        await self.until(lambda: self.driver.in_force >= number)

    async def meanwhile(self, wanted: World) -> int:
        """A World that is wanted, and gathered, before the call that is held up is answered."""
        number = self.see(wanted)
        await asyncio.sleep(0.05 + CHANGE_GATHER_NS / SECOND_NS)
        return number

    async def end(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        assert [] == self.wrong


def with_many(wanted: World) -> World:
    """And many others beside its VIP."""
    (one,) = wanted.vips
    address = [parse_address(f"203.0.{number >> 8}.{number & 255}") for number in range(MANY)]
    more = [msgspec.structs.replace(one, name=f"a/c{n}/http", address=each) for n, each in enumerate(address)]
    return World(wanted.nodes, (one, *more))


async def test_of_the_worlds_that_wait_only_the_newest_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(CLUSTER, ssl.create_default_context(), Written(), Metrics())
    steps: list[WorldSeen] = []
    newest = asyncio.Event()
    loop = asyncio.get_running_loop()
    step = driver._planner.step

    def counted(event: Any, now_ns: int) -> Any:
        effects = step(event, now_ns)
        if isinstance(event, WorldSeen):
            steps.append(event)
            if event.world is last:
                loop.call_soon_threadsafe(newest.set)
        return effects

    monkeypatch.setattr(driver._planner, "step", counted)
    worlds = [world(number, lbs=0) for number in range(1, WORLDS_COUNT + 1)]
    last = worlds[-1]
    assert WORLDS_COUNT == [driver.see(one) for one in worlds][-1]
    running = asyncio.create_task(driver.run())
    await asyncio.wait_for(newest.wait(), 20)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert [worlds[0], last] == [one.world for one in steps], "the first begins, and then the newest"


# --- When a World is in force -----------------------------------------------------------------------------------------
async def test_a_world_is_not_in_force_while_its_generation_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the one and begins the next in one step, for the next was gathered before the last answer came."""
    stage = Stage(monkeypatch)
    await stage.until_in_force(stage.see(world(1)))
    stage.hold = "lb2", CommitCall
    second = stage.see(world(1, 2))
    await stage.held.wait()
    await stage.meanwhile(world(1, 2, 3))
    stage.scene.refusing = {"lb2": "stage"}
    stage.go_on.set()
    await stage.until(lambda: stage.driver.status.generation == 3)
    assert second == stage.driver.in_force
    stage.scene.refusing = {}
    await stage.until_in_force(stage.see(world(1, 2, 3, 4)))
    await stage.end()


async def test_that_others_wait_for_the_next_generation_keeps_no_world_from_being_in_force(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(monkeypatch)
    await stage.until_in_force(stage.see(world(1)))
    stage.hold = "lb2", CommitCall
    second = stage.see(world(1, 2))
    await stage.held.wait()
    third = await stage.meanwhile(with_many(world(1, 2)))
    stage.go_on.set()
    await stage.until_in_force(third)
    assert [0, 1, second, third] == stage.said
    await stage.end()


async def test_what_takes_a_ring_change_back_takes_no_world_into_force(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    await stage.until_in_force(stage.see(world(1)))
    stage.hold, stage.scene.refusing = ("lb3", HandoverCall), {"lb3": "hand"}
    stage.see(world(1, lbs=3))
    await stage.held.wait()
    third = await stage.meanwhile(world(1, 2, lbs=3))
    stage.go_on.set()
    await stage.until_in_force(third)
    assert 0 == stage.driver.status.ring_changes
    await stage.end()


async def test_a_world_that_is_refused_is_not_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    first = stage.see(world(1))
    await stage.until_in_force(first)
    (vip,) = world(1, 2).vips
    stage.see(World(world(1).nodes, (msgspec.structs.replace(vip, idle_ns=0),)))
    await stage.until(lambda: "idle time" in stage.driver.status.problem)
    await stage.meanwhile(World(world(1).nodes, (msgspec.structs.replace(vip, idle_ns=0, drain_ns=0),)))
    assert first == stage.driver.in_force
    await stage.until_in_force(stage.see(world(1, 2, 3)))
    await stage.end()


async def test_a_generation_that_another_controller_was_quicker_to_write_is_made_anew_of_the_newest_world(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(monkeypatch)
    await stage.until_in_force(stage.see(world(1)))
    stage.store.conflicts = {2: 4}
    await stage.until_in_force(stage.see(with_many(world(1, 2))))
    assert stage.driver.status.generation > 4
    await stage.end()


async def test_a_new_controller_has_converged_once_its_first_world_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    await stage.until_in_force(stage.see(world(1)))
    await stage.end()
    scene = stage.scene
    stage = Stage(monkeypatch)
    stage.scene = scene
    scene.refusing = {"lb1": "stage"}
    stage.see(world(1, 2))
    await stage.until(lambda: stage.driver.status.generation == 2)
    early = stage.driver.converged
    assert not early
    scene.refusing = {}
    await stage.until_in_force(stage.see(world(1, 2, 3)))
    assert stage.driver.converged
    await stage.end()
