"""One run: a lab, a cluster, clients; quiet, chaos, calm; and everybody who acts in it, side by side in one event loop.

Why an event loop in the harness: a dozen things wait for moments of their own (a router for 300 ms, a supervisor for
a second, a doomed backend for its last LB), and each is a few lines that sleep. What blocks (a server that starts, a
question to an agent that hangs) goes to threads; nothing else does, so that no two hands change the cluster at once.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from lbpod.lab.chaos.fleet import Fleet
from lbpod.lab.chaos.ledger import Kind, Ledger, Sample
from lbpod.lab.chaos.options import Options
from lbpod.lab.chaos.pool import Pool
from lbpod.lab.chaos.programs import Programs
from lbpod.lab.chaos.ringlog import HANDOVER, RING_PHASES, all_spans
from lbpod.lab.chaos.schedule import Act, Step, schedule
from lbpod.lab.chaos.verdict import CALM, CHAOS, QUIET
from lbpod.lab.chaos.watch import Watch
from lbpod.lab.chaos.wrk import WrkRun
from lbpod.lab.cluster import PREFIX, VIP, VIP_PORT, Cluster, ClusterOptions, bpf_object
from lbpod.lab.errors import LabError
from lbpod.lab.limits import NODES_MAX, SECOND_NS
from lbpod.lab.topology import Lab
from lbpod.lab.workload import CheckerRun

THREADS_MAX: Final = 24
"""For questions that may hang; more than there are agents."""
RAMP_NS_MAX: Final = 90 * SECOND_NS
CALM_NS_MAX: Final = 40 * SECOND_NS
"""How long LBs that are on their way get to be in place after the changes."""
FAILURES_TOLD: Final = 20_000
"""Of each verdict, one by one. What is broken and not told has no excuse (verdict.figures)."""
MAP_SIZES: Final = "records=262144,nat=262144,cache=262144"
TIME_WAIT_SECONDS: Final = 60
PORTS_TO_SPARE: Final = 30_000
"""Of the 55,000 that a client has: so many may be in TIME_WAIT."""
PORTS_AGAIN: Final = {"ipv4/tcp_tw_reuse": 1}
"""More short connections a minute than that: those in TIME_WAIT are used again. The protocol does not promise anything
for a five-tuple that is used again before the minute is over (docs/distances.md)."""


@dataclass(frozen=True)
class Played:
    """What a run leaves."""

    ledger: Ledger
    clients: dict[str, Any]
    failures: list[dict[str, Any]]
    marks: list[dict[str, Any]]
    wrk: dict[str, int]
    overdue_count: int


class Say(Protocol):
    """Tells people what goes on. ``often``: one of many, that may be left out."""

    def __call__(self, sentence: str, *, often: bool = False) -> None: ...


class _Over(Exception):  # noqa: N818 - not an error: the way out of the task group
    """The run has ended."""


class Run:
    """One run in a lab of its own."""

    def __init__(self, name: str, options: Options, say: Say) -> None:
        self._name = name
        self._options = options
        self._say = say
        self._steps = schedule(options)
        self._rng = random.Random(f"play {options.seed}")

    def play(self, log_dir: Path | None) -> Played:
        """From the first namespace to the last. Raises LabError."""
        options = self._options
        node_count = options.lbs + options.hosts
        with Lab(clients=2, nodes=node_count, log_dir=log_dir) as lab:
            lab.router.believe_dead_links()
            if options.short_rate * TIME_WAIT_SECONDS > PORTS_TO_SPARE:
                for client in lab.clients:
                    client.set_switches(PORTS_AGAIN)
            cluster = Cluster(lab, options.lbs, ClusterOptions(options.idle_seconds, MAP_SIZES, on_term="leave"))
            joins_count = sum(step.act is Act.JOIN for step in self._steps)
            cluster.mint([f"node{number + 1}" for number in range(min(NODES_MAX, node_count + joins_count))])
            for _ in range(options.backends):
                cluster.add_backend()
            cluster.write_config()
            self._say(f"starting {node_count} agents and the controller ...")
            cluster.start(bpf_object(self._name))
            cluster.wait_ready()
            lab.router.set_ecmp(PREFIX, [*cluster.lbs])
            try:
                return asyncio.run(self._play(cluster))
            finally:
                _kill_all(cluster)

    async def _play(self, cluster: Cluster) -> Played:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS_MAX, "ask"))
        ledger = Ledger(time.monotonic_ns())
        checker = self._start_clients(cluster)
        wrk = WrkRun.start(cluster.lab, cluster.lab.clients[1], f"{VIP}:{VIP_PORT}", self._options.wrk_connections)
        fleet = Fleet(cluster, self._options.router_ms, ledger, self._rng, checker.mark)
        programs = Programs(cluster, fleet, self._options, ledger, self._rng)
        pool = Pool(cluster, self._options, ledger, self._rng, checker)
        watch = Watch(cluster, fleet, ledger, checker, pool)
        actors = _Actors(cluster, ledger, checker, fleet, programs, pool)
        with suppress(asyncio.CancelledError):
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(watch.run(self._tell))
                    group.create_task(programs.supervise())
                    group.create_task(programs.time_returns())
                    fleet.watch()
                    await self._script(actors, group)
                    raise _Over
            except* _Over:
                pass
        fleet.stop()
        clients = checker.stop()
        ledger.end_ns = time.monotonic_ns()
        offset_ns = time.time_ns() - time.monotonic_ns()
        logs = [controller.log_text() for controller in cluster.controllers]
        ledger.ring_changes = all_spans(logs, RING_PHASES, offset_ns)
        ledger.handovers = all_spans(logs, HANDOVER, offset_ns)
        return Played(ledger, clients, checker.failures, checker.marks, wrk.stop(), fleet.overdue_count)

    def _start_clients(self, cluster: Cluster) -> CheckerRun:
        options = self._options
        return CheckerRun.start(
            cluster.lab,
            f"{VIP}:{VIP_PORT}",
            long_count=options.long_count,
            short_rate=options.short_rate,
            interval_ms=options.interval_ms,
            timeout_ms=options.timeout_ms,
            probes=options.probes,
            probe_interval_ms=options.probe_ms,
            failures_told=FAILURES_TOLD,
        )

    # --------------------------------------------------------------------------------------------------- the script

    async def _script(self, actors: _Actors, group: asyncio.TaskGroup) -> None:
        """Ramp, quiet, chaos, calm."""
        options, ledger = self._options, actors.ledger
        await self._ramp(actors)
        ledger.happened(time.monotonic_ns(), Kind.PHASE, QUIET)
        self._say(f"{options.quiet_seconds} s of quiet ...")
        await asyncio.sleep(options.quiet_seconds)
        ledger.chaos_ns = time.monotonic_ns()
        ledger.happened(ledger.chaos_ns, Kind.PHASE, CHAOS)
        self._say(f"{options.minutes:g} minutes of chaos ...")
        for step in self._steps:
            await _sleep_until(ledger.chaos_ns + step.at_ns)
            self._step(actors, step, group)
        await _sleep_until(ledger.chaos_ns + options.length_ns)
        ledger.calm_ns = time.monotonic_ns()
        ledger.happened(ledger.calm_ns, Kind.PHASE, CALM)
        self._say("calm ...")
        deadline_ns = ledger.calm_ns + CALM_NS_MAX
        while not (actors.fleet.settled and actors.programs.controller_up()) and time.monotonic_ns() < deadline_ns:
            if not actors.fleet.settled:
                await actors.fleet.join()
            await asyncio.sleep(1)
        await asyncio.sleep(options.silence_shows_ns / SECOND_NS)  # every connection is asked, and has time to answer

    async def _ramp(self, actors: _Actors) -> None:
        """Until all long-lived connections are open."""
        wanted = self._options.long_count + self._options.probes
        deadline_ns = time.monotonic_ns() + RAMP_NS_MAX
        self._say(f"opening {wanted:,} connections ...")
        while not actors.ledger.samples or actors.ledger.samples[-1].long_lived < wanted:
            if time.monotonic_ns() > deadline_ns:
                seen = actors.ledger.samples[-1].long_lived if actors.ledger.samples else 0
                raise LabError(f"only {seen:,} of {wanted:,} connections could be opened; this machine is too slow")
            await asyncio.sleep(0.2)

    def _step(self, actors: _Actors, step: Step, group: asyncio.TaskGroup) -> None:
        match step.act:
            case Act.CHANGE:
                group.create_task(actors.pool.change())
            case Act.CRASH:
                group.create_task(actors.pool.crash())
            case Act.LOSS:
                group.create_task(actors.fleet.lose(step, controller_up=actors.programs.controller_up))
            case Act.JOIN:
                group.create_task(actors.fleet.join())
            case Act.LEAVE:
                actors.fleet.leave()
            case Act.AGENT_KILL:
                actors.programs.kill_agent()
            case Act.CONTROLLER_KILL:
                actors.programs.kill_controller(step.away_ns)
            case Act.RESHUFFLE:
                moved = actors.cluster.lab.router.reshuffle(PREFIX, self._rng, weight_max=self._rng.choice([None, 4]))
                actors.ledger.happened(time.monotonic_ns(), Kind.RESHUFFLE, f"{moved:.0%} of all flows move")
            case Act.LINK_CUT:
                actors.fleet.part(step)

    def _tell(self, sample: Sample) -> None:
        tracking = max(sample.tracking.values(), default=0)
        self._say(
            f"{sample.connections:,} connections, {sample.long_lived:,} long-lived open, {sample.broken} broken, "
            f"{sample.gone:,} backend gone, {tracking:,} slots track, {sample.relayed:,} relayed, {sample.paths} paths"
            f", p99 {sample.p99_ns / 1e6:.0f} ms",
            often=True,
        )


@dataclass(frozen=True)
class _Actors:
    cluster: Cluster
    ledger: Ledger
    checker: CheckerRun
    fleet: Fleet
    programs: Programs
    pool: Pool


async def _sleep_until(at_ns: int) -> None:
    await asyncio.sleep(max(0, at_ns - time.monotonic_ns()) / SECOND_NS)


def _kill_all(cluster: Cluster) -> None:
    """Nobody leaves in order at the end: the lab goes with all that is in it."""
    for program in [*cluster.agents.values(), *([cluster.controller] if cluster.controller is not None else [])]:
        program.signal(signal.SIGKILL)
