"""The controller's loop around the Planner: of what waits in its queue, what something newer replaces is not done."""

import asyncio
import ssl
from typing import Any

import pytest

from lbpod.controller.driver import Driver
from lbpod.controller.metrics import Metrics
from lbpod.core.messages import Persist, Persisted, WorldSeen
from tests.planner_scene import CLUSTER, world

WORLDS_COUNT = 50


class Written:
    """A store that takes everything."""

    async def persist(self, effect: Persist) -> Persisted:
        return Persisted(effect.generation)


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
