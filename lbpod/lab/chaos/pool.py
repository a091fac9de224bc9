"""The backends: one change after the other, most of them edits of the config, some of them births and deaths.

A change is, in this order of precedence: a new backend where one is missing, the removal of one that is doomed and
drained, the doom of the next one, and else a random edit (drain, serve again, another weight). So the config changes
as often as it is told to, and yet most connections live for minutes: what breaks because its backend is gone proves
nothing.

A doomed backend is taken out of the config only once every LB that may send new flows forwards by a config in which it
drains (``lbpod.lab.in_force``), and so much time has passed since that whatever broke at it for another reason, though
silently, has been judged before its end could be the excuse; and its pod goes only once they all forward by one
without it. The checking client is told so, and then excuses no connection that never got an answer. (One that drains
may still get new flows: while a replica of a slot is believed down, the other one sends them to base, where every LB
would look for them. That can last until a lost LB is out of the ring.)

A crash is different: a backend dies with its pod, silently, and the config says so half a second later. Until every LB
that may send new flows forwards by that config, they may be sent to the dead backend, which nobody but the control
plane can help; those that never got an answer are counted apart.

Tried and dropped: counting generations. Changes of the ring make generations, too, with the old backends in them, so a
dead backend was taken for forgotten while new connections still went to it, and 40 of 3,997 were held against living
ones.

Names of pods come again in a run of hours, so the checking client hears of each new backend that it lives.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from lbpod.lab.chaos.ledger import Kind, Ledger
from lbpod.lab.chaos.options import Options
from lbpod.lab.cluster import Cluster, Served
from lbpod.lab.in_force import InForce, is_out
from lbpod.lab.limits import MS_NS, SECOND_NS
from lbpod.lab.topology import Pod
from lbpod.lab.workload import CheckerRun

HEALTH_CHECK_NS: Final = 500 * MS_NS
"""How long after a backend's death somebody takes it out of the config."""
WEIGHT_MAX: Final = 3


@dataclass(frozen=True)
class Ghost:
    """A backend that has died. edition: of the first config without it."""

    served: Served
    edition: int


@dataclass(eq=False)
class Doomed:
    """A backend that drains for good. edition: of the first config that says so; None: it has yet to be written."""

    served: Served
    edition: int | None = None
    clear_ns: int | None = None
    """When it may be taken out: long enough after the moment since when no LB can have sent it a new flow."""


class Pool:
    """In the event loop's thread; changes one at a time."""

    def __init__(
        self, cluster: Cluster, options: Options, ledger: Ledger, rng: random.Random, checker: CheckerRun
    ) -> None:
        self._cluster = cluster
        self._options = options
        self._ledger = ledger
        self._rng = rng
        self._checker = checker
        self._doomed: list[Doomed] = []
        self._ghosts: list[Ghost] = []
        self._next_doom_ns = time.monotonic_ns() + self._doom_period_ns // 2
        self._busy = asyncio.Lock()

    @property
    def _doom_period_ns(self) -> int:
        rate = self._options.removals_per_minute
        return round(60 * SECOND_NS / rate) if rate > 0 else 1 << 62

    @property
    def is_waiting(self) -> bool:
        """True where it matters what the LBs forward by."""
        return bool(self._ghosts or self._cluster.outgoing) or any(doomed.clear_ns is None for doomed in self._doomed)

    async def seen(self, everybody: Iterable[InForce]) -> None:
        """What every LB that may send new flows forwards by."""
        all_of_them = list(everybody)
        if not all_of_them:
            return
        for doomed in self._doomed:
            if doomed.clear_ns is None and doomed.edition is not None:
                if is_out(doomed.served.place, doomed.edition, all_of_them):
                    doomed.clear_ns = time.monotonic_ns() + self._options.silence_shows_ns
        for ghost in [one for one in self._ghosts if is_out(one.served.place, one.edition, all_of_them)]:
            self._ghosts.remove(ghost)
            self._checker.forgotten(ghost.served.backend.name)
        for backend in self._cluster.let_go(all_of_them):
            self._checker.left(backend.name)
            await asyncio.to_thread(self._cluster.lab.remove_pod, backend.pod)

    async def change(self) -> None:
        """One change."""
        async with self._busy:
            what = await self._next_change()
            edition = self._cluster.write_config()
            for doomed in self._doomed:
                doomed.edition = doomed.edition or edition
            self._ledger.happened(time.monotonic_ns(), Kind.CHANGE, what)

    async def crash(self) -> None:
        """A backend dies; half a second later the config knows."""
        async with self._busy:
            victim = self._rng.choice(self._serving() or self._cluster.served)
            self._checker.gone(victim.backend.name)
            await asyncio.to_thread(self._remove_silently, victim.backend.pod)
            self._checker.haunts(victim.backend.name)
            await asyncio.sleep(HEALTH_CHECK_NS / SECOND_NS)
            self._cluster.served.remove(victim)
            self._forget(victim)
            self._ghosts.append(Ghost(victim, self._cluster.write_config()))
            self._ledger.happened(time.monotonic_ns(), Kind.CHANGE, f"{victim.backend.name} has died")

    async def _next_change(self) -> str:
        now_ns = time.monotonic_ns()
        if len(self._cluster.served) - len(self._doomed) < self._options.backends:
            return f"+ {(await self._add()).backend.name}"
        for doomed in self._doomed:
            if doomed.clear_ns is not None and now_ns >= doomed.clear_ns:
                self._remove(doomed.served)
                return f"- {doomed.served.backend.name}"
        if now_ns >= self._next_doom_ns and len(self._serving()) > self._serving_min:
            self._next_doom_ns = now_ns + self._doom_period_ns
            oldest = next(one for one in self._cluster.served if not self._is_doomed(one))
            oldest.draining = True
            self._doomed.append(Doomed(oldest))
            return f"{oldest.backend.name} drains for good"
        return self._edit()

    @property
    def _serving_min(self) -> int:
        return max(2, self._options.backends // 2)

    def _edit(self) -> str:
        """A random edit; each changes something."""
        draining = [one for one in self._cluster.served if one.draining and not self._is_doomed(one)]
        serving = self._serving()
        draw = self._rng.random()
        if draw < 0.35 and len(serving) > self._serving_min:
            one = self._rng.choice(serving)
            one.draining = True
            return f"{one.backend.name} drains"
        if draw < 0.7 and draining:
            one = self._rng.choice(draining)
            one.draining = False
            return f"{one.backend.name} serves again"
        one = self._rng.choice(serving)
        one.weight = self._rng.choice([weight for weight in range(1, WEIGHT_MAX + 1) if weight != one.weight])
        return f"{one.backend.name} weighs {one.weight}"

    def _serving(self) -> list[Served]:
        return [one for one in self._cluster.served if not one.draining]

    def _is_doomed(self, served: Served) -> bool:
        return any(one.served is served for one in self._doomed)

    async def _add(self) -> Served:
        served = Served(await asyncio.to_thread(self._cluster.new_backend))
        self._checker.alive(served.backend.name)
        self._cluster.served.append(served)
        return served

    def _remove(self, served: Served) -> None:
        """Out of the config; the pod follows."""
        self._checker.leaves(served.backend.name)
        self._cluster.take_out(served)
        self._forget(served)

    def _remove_silently(self, pod: Pod) -> None:
        self._cluster.lab.remove_pod(pod, silent=True)

    def _forget(self, served: Served) -> None:
        self._doomed = [one for one in self._doomed if one.served is not served]
