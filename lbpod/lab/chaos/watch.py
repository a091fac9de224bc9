"""Looking on: once a second what the clients, the LBs and the controller say of themselves, into one sample.

Only what anybody could read from outside: the checking client's lines, /metrics and /v1/state of the agents, /v1/state
of the controller. Whoever does not answer (many are dead at any time here) is left out of the sample, and what it had
counted before is kept.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from lbpod.lab.chaos.fleet import Fleet
from lbpod.lab.chaos.ledger import Ledger, Sample
from lbpod.lab.chaos.pool import Pool
from lbpod.lab.chaos.ringlog import RING_PHASES
from lbpod.lab.cluster import CONTROLLER_PORT, Cluster
from lbpod.lab.counters import RELAYED, RESOLVED, TRACKING, Growth
from lbpod.lab.errors import LabError
from lbpod.lab.limits import SECOND_NS
from lbpod.lab.workload import CheckerRun


class Watch:
    """In the event loop's thread; asks in others."""

    def __init__(
        self,
        cluster: Cluster,
        fleet: Fleet,
        ledger: Ledger,
        checker: CheckerRun,
        pool: Pool,
    ) -> None:
        self._cluster = cluster
        self._fleet = fleet
        self._ledger = ledger
        self._checker = checker
        self._pool = pool
        self._relayed = Growth()
        self._resolved = Growth()

    async def run(self, told: Callable[[Sample], None]) -> None:
        """A sample a second, until cancelled; a late second is not made up for."""
        due_ns = time.monotonic_ns()
        while True:
            due_ns = max(due_ns + SECOND_NS, time.monotonic_ns())
            await asyncio.sleep((due_ns - time.monotonic_ns()) / SECOND_NS)
            sample = await self._sample()
            if sample is not None:
                self._ledger.samples.append(sample)
                told(sample)

    async def _sample(self) -> Sample | None:
        """None before the clients have said anything."""
        lbs = [lb.node for lb in self._fleet.lbs]
        answers = await asyncio.gather(*(asyncio.to_thread(self._cluster.metrics, node) for node in lbs))
        state = await asyncio.to_thread(self._controller_state)
        if state is not None and state.get("ring") and state.get("phase") not in RING_PHASES:
            self._note_settled(frozenset(state["ring"]))
        said = {node.name: answer for node, answer in zip(lbs, answers, strict=True) if answer is not None}
        if self._pool.is_waiting and (tables := await self._fleet.tables()) is not None:
            await self._pool.seen(tables)
        clients = self._checker.poll()
        if clients is None:
            return None
        if not self._checker.program.alive:
            raise LabError(f"the checking client has ended: {self._checker.program.log_text().strip()[-500:]}")
        return Sample(
            at_ns=time.monotonic_ns(),
            connections=clients["connections"],
            long_lived=clients["long_lived"],
            broken=clients["broken"],
            gone=clients["broken_backend_gone"],
            unattributed=clients["broken_unattributed"],
            p50_ns=clients["latency_ns"]["p50"],
            p99_ns=clients["latency_ns"]["p99"],
            tracking={name: int(said[name].get(TRACKING, 0)) for name in sorted(said)},
            relayed=self._relayed.add({name: values.get(RELAYED, 0) for name, values in said.items()}),
            resolved=self._resolved.add({name: values.get(RESOLVED, 0) for name, values in said.items()}),
            paths=sum(lb.path for lb in self._fleet.lbs),
            controller_up=state is not None,
            ring_count=len(state.get("ring", ())) if state is not None else 0,
        )

    def _note_settled(self, ring: frozenset[str]) -> None:
        """The ring is at rest: losses of LBs that are not in it are over."""
        for loss in self._ledger.losses:
            if loss.over_ns is None and loss.node not in ring:
                loss.over_ns = time.monotonic_ns()

    def _controller_state(self) -> dict[str, Any] | None:
        try:
            status, text = self._cluster.get(self._cluster.lab.router, CONTROLLER_PORT, "/v1/state")
        except (OSError, LabError):
            return None
        state = json.loads(text) if status == 200 else None
        return state if isinstance(state, dict) else None
