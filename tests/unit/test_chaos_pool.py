"""What the pool of backends tells the checking client, and when, and how long a run waits for what is silent: words
recorded by a stand-in, no lab."""

import asyncio
import random
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lbpod.lab.chaos import pool as pool_module, run as run_module
from lbpod.lab.chaos.ledger import Ledger
from lbpod.lab.chaos.options import Options
from lbpod.lab.chaos.pool import Pool
from lbpod.lab.chaos.run import Run
from lbpod.lab.cluster import Cluster
from lbpod.lab.in_force import InForce
from lbpod.lab.limits import CHECK_GRACE_NS, MS_NS, SECOND_NS
from lbpod.lab.workload import CheckerRun

OPTIONS = Options(backends=4, interval_ms=3_000, timeout_ms=4_000, removals_per_minute=60)


class Stand:
    """Cluster and checking client in one; both write down what they are told, in one order."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.served: list[Any] = []
        self.outgoing: list[Any] = []
        self.lab = SimpleNamespace(remove_pod=lambda pod, silent: self.said.append(f"removed {pod}"))
        self._edition = 0

    def __getattr__(self, word: str) -> Any:
        """Every word of the checking client."""
        return lambda name: self.said.append(f"{word} {name}")

    def new_backend(self) -> Any:
        name = f"pod{len(self.served)}"
        pod = SimpleNamespace(address="10.78.1.1")
        return SimpleNamespace(name=name, pod=pod, port=80)

    def write_config(self) -> int:
        self._edition += 1
        self.said.append("config")
        return self._edition

    def let_go(self, everybody: list[InForce]) -> list[Any]:
        return []

    def take_out(self, served: Any) -> None:
        self.served.remove(served)
        self.said.append(f"config without {served.backend.name}")

    def pool(self) -> Pool:
        both = cast(Any, self)
        return Pool(cast(Cluster, both), OPTIONS, Ledger(0), random.Random(1), cast(CheckerRun, both))


def _changed(stand: Stand, pool: Pool, count: int) -> None:
    async def change() -> None:
        for _ in range(count):
            await pool.change()

    asyncio.run(change())


def test_a_new_backend_is_said_to_be_alive_before_it_can_serve() -> None:
    stand = Stand()
    _changed(stand, stand.pool(), 2)
    assert ["alive pod0", "config", "alive pod1", "config"] == stand.said, "an earlier pod may have had its name"


def test_a_lost_backend_haunts_once_it_has_been_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "HEALTH_CHECK_NS", 0)
    stand = Stand()
    pool = stand.pool()
    _changed(stand, pool, 1)
    stand.said.clear()
    asyncio.run(pool.crash())
    words = [sentence.split()[0] for sentence in stand.said]
    assert ["gone", "removed", "haunts", "config"] == words, "what begins between gone and haunts may yet be answered"


def test_a_drained_backend_is_taken_out_once_a_silent_break_at_it_has_been_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_ns = time.monotonic_ns()
    monkeypatch.setattr(pool_module, "time", SimpleNamespace(monotonic_ns=lambda: now_ns))
    stand = Stand()
    pool = stand.pool()
    _changed(stand, pool, 4)
    now_ns += SECOND_NS
    _changed(stand, pool, 1)  # the oldest is doomed
    asyncio.run(pool.seen([InForce(True, edition=99)]))
    shows_ns = (3_000 + 4_000) * MS_NS + CHECK_GRACE_NS
    now_ns += shows_ns
    _changed(stand, pool, 2)
    assert [] == [sentence for sentence in stand.said if sentence.startswith("leaves")]
    now_ns += 2 * SECOND_NS - CHECK_GRACE_NS
    _changed(stand, pool, 2)  # one comes in its stead, and it goes
    assert ["leaves pod0", "config without pod0", "config"] == stand.said[-3:]


def test_a_silent_break_shows_within_interval_and_timeout_and_some_slack() -> None:
    assert (3 + 4 + 2) * SECOND_NS == OPTIONS.silence_shows_ns


def test_the_run_goes_on_after_the_last_change_until_a_silent_break_has_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(run_module, "asyncio", SimpleNamespace(sleep=sleep))
    options = replace(OPTIONS, minutes=0.000_001, probes=0, long_count=1)
    ledger = Ledger(0, samples=[cast(Any, SimpleNamespace(long_lived=1))])
    settled = SimpleNamespace(settled=True, controller_up=lambda: True)
    actors = SimpleNamespace(ledger=ledger, fleet=settled, programs=settled)
    run = Run("holdfast", options, lambda sentence, *, often=False: None)
    run._steps = ()
    asyncio.run(run._script(cast(Any, actors), cast(Any, None)))
    assert slept[-1] * SECOND_NS >= options.interval_ms * MS_NS + options.timeout_ns + 2 * SECOND_NS
