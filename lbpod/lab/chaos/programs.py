"""Agents and the controller: killed without a word, and started again as a supervisor would.

Killed here is only what is not being lost or told to leave by ``fleet``. A program that ends although nobody killed
it is written down with the end of its log: it is a finding, and not what a run is about.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from typing import Final

from lbpod.lab.chaos.fleet import Fleet
from lbpod.lab.chaos.ledger import Kind, Ledger
from lbpod.lab.chaos.options import Options
from lbpod.lab.cluster import Cluster
from lbpod.lab.limits import MS_NS, SECOND_NS
from lbpod.lab.program import Program
from lbpod.lab.topology import Node

LOOK_NS: Final = 100 * MS_NS
LOG_TAIL_CHARS: Final = 2_000


class Programs:
    """In the event loop's thread."""

    def __init__(self, cluster: Cluster, fleet: Fleet, options: Options, ledger: Ledger, rng: random.Random) -> None:
        self._cluster = cluster
        self._fleet = fleet
        self._options = options
        self._ledger = ledger
        self._rng = rng
        self._killed: set[Program] = set()
        self._back_ns: dict[str, int] = {}  # node name -> when its agent is started again
        self._dead_ns: dict[str, int] = {}  # node name -> since when its agent is not ready
        self._controller_back_ns = 0

    def controller_up(self) -> bool:
        return self._cluster.controller is not None and self._cluster.controller.alive

    def kill_agent(self) -> None:
        """kill -9 for one agent of those that run, LB or not."""
        running = [node for node in self._nodes() if self._cluster.agents[node.name].alive]
        if not running:
            return
        node = self._rng.choice(running)
        program = self._cluster.agents[node.name]
        self._killed.add(program)
        program.signal(signal.SIGKILL)
        self._ledger.happened(time.monotonic_ns(), Kind.AGENT_KILL, node.name)

    def kill_controller(self, away_ns: int) -> None:
        """kill -9 for the controller; it stays away for so long."""
        controller = self._cluster.controller
        if controller is None or not controller.alive:
            return
        self._killed.add(controller)
        controller.signal(signal.SIGKILL)
        now_ns = time.monotonic_ns()
        self._controller_back_ns = now_ns + away_ns
        self._ledger.happened(now_ns, Kind.CONTROLLER_KILL, f"back in {away_ns / SECOND_NS:.1f} s")

    async def supervise(self) -> None:
        """Starts again what has ended, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_NS / SECOND_NS)
            now_ns = time.monotonic_ns()
            for node in self._nodes():
                self._look_at_agent(node, now_ns)
            self._look_at_controller(now_ns)

    def _nodes(self) -> list[Node]:
        """Nodes whose agents nobody has told to end."""
        all_nodes = [*self._cluster.lbs, *self._cluster.hosts]
        return [node for node in all_nodes if not self._fleet.is_expected_dead(node)]

    def _look_at_agent(self, node: Node, now_ns: int) -> None:
        program = self._cluster.agents[node.name]
        if program.alive:
            return
        if node.name not in self._back_ns:
            self._back_ns[node.name] = now_ns + self._options.supervisor_ms * MS_NS
            self._dead_ns.setdefault(node.name, now_ns)
            self._note_end(program, now_ns, Kind.AGENT_END, node.name)
        if now_ns >= self._back_ns[node.name]:
            del self._back_ns[node.name]
            self._cluster.start_agent_again(node)

    async def time_returns(self) -> None:
        """Notes when those that were started again are ready, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_NS / SECOND_NS)
            waiting = [node for node in self._nodes() if node.name in self._dead_ns]
            answers = await asyncio.gather(*(asyncio.to_thread(self._cluster.ready, node) for node in waiting))
            for node, ready in zip(waiting, answers, strict=True):
                if ready and self._cluster.agents[node.name].alive:
                    self._ledger.agents_back_ns.append(time.monotonic_ns() - self._dead_ns.pop(node.name))

    def _look_at_controller(self, now_ns: int) -> None:
        controller = self._cluster.controller
        assert controller is not None, "it has been started"
        if controller.alive:
            return
        if controller not in self._killed and now_ns > self._controller_back_ns:
            self._controller_back_ns = now_ns + self._options.supervisor_ms * MS_NS
        self._note_end(controller, now_ns, Kind.CONTROLLER_END, "controller")
        if now_ns >= self._controller_back_ns:
            self._cluster.start_controller()
            self._ledger.happened(now_ns, Kind.CONTROLLER_BACK, "started again")

    def _note_end(self, program: Program, now_ns: int, kind: Kind, where: str) -> None:
        """Once for each program that was not killed."""
        if program not in self._killed:
            self._killed.add(program)
            tail = program.log_text().strip()[-LOG_TAIL_CHARS:]
            self._ledger.happened(now_ns, kind, f"{where}, status {program.process.returncode}: {tail}")
