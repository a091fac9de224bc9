"""The show: the loop that plays the script, looks, counts and draws; three runs, one table, one exit status.

Why one loop: the order of what happened is then the order of the lines. It shares its event loop with the fleet of LBs
(``lbpod.lab.chaos.fleet``), which waits for moments of its own: the router's reaction to a loss, an agent's /readyz.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from lbpod.lab.chaos.fleet import Fleet, Standing
from lbpod.lab.chaos.ledger import Kind, Ledger
from lbpod.lab.chaos.schedule import Act as Chaos, How, Step as ChaosStep
from lbpod.lab.cluster import PREFIX, TITLES, VIP, VIP_PORT, bpf_object
from lbpod.lab.demo.stage import Stage, on_stage
from lbpod.lab.demo.tally import Figures, LbSums, take_clients
from lbpod.lab.demo.timeline import SECOND_NS, Act, script
from lbpod.lab.demo.view import Screen, comparison, live
from lbpod.lab.errors import LabError
from lbpod.lab.topology import Lab
from lbpod.lab.workload import CheckerRun

LB_COUNT: Final = 3
HOST_COUNT: Final = 4
BACKEND_COUNT: Final = 6
LOOK_EVERY_NS: Final = 500_000_000
STEP_NS: Final = 50_000_000
REST_NS_MAX: Final = 6 * SECOND_NS
"""How long the cluster gets to come to rest (no slot tracking) once the clients have left."""
JOIN_NS_MAX: Final = 20 * SECOND_NS
"""How long a run goes on for an LB that has not got into its place when the script has ended."""
ROUTER_MS: Final = 300
"""How long the router sends into a destroyed LB, as with BFD."""
TIMEOUT_MS: Final = 10_000
"""A request without an answer for so long has broken its connection: where a packet is lost, TCP's pauses double."""
JOINS: Final = 1
"""Of each run."""
LINES: Final = frozenset({Kind.LOSS, Kind.OUT, Kind.JOIN, Kind.BACK})
"""What the audience is told of the LBs."""

RUNS: Final = tuple(TITLES)
"""Runs of the show, as named in the JSON file."""

EXIT_FINE: Final = 0
EXIT_BROKEN: Final = 1


@dataclass(frozen=True)
class Options:
    """What can be chosen about the show."""

    seconds: int = 32
    """Length of each run."""
    long_count: int = 300
    """Long-lived connections."""
    short_rate: int = 100
    """Short connections opened a second."""
    seed: int = 1
    """Of the router's reshuffles, and which LB is lost: the same in all runs."""
    json_file: Path | None = None
    runs: Sequence[str] = RUNS
    log_dir: Path | None = None
    """Where the programs' logs stay; None: removed with the lab."""


class Run:
    """One run on a stage that is ready."""

    def __init__(self, stage: Stage, options: Options, screen: Screen, *, rests: bool) -> None:
        """rests: it is looked at until no slot tracks any more (what means nothing to the baselines)."""
        self._stage, self._rests = stage, rests
        self._options = options
        self._screen = screen
        self._figures = screen.figures
        self._rng = random.Random(options.seed)
        self._ledger = Ledger(time.monotonic_ns())
        self._told = 0
        """Events of the ledger that the audience has been told."""
        self._start_ns = 0

    def play(self) -> None:
        """From the first connection to the last look. Raises LabError."""
        asyncio.run(self._play())

    async def _play(self) -> None:
        stage = self._stage
        sums = LbSums(stage.look(stage.lbs))
        checker = CheckerRun.start(
            stage.lab,
            f"{VIP}:{VIP_PORT}",
            long_count=self._options.long_count,
            short_rate=self._options.short_rate,
            timeout_ms=TIMEOUT_MS,
        )
        stage.checker = checker
        fleet = Fleet(stage, ROUTER_MS, self._ledger, random.Random(f"LBs {self._options.seed}"), lambda *_: None)
        fleet.watch()
        self._start_ns = time.monotonic_ns()
        looks = asyncio.create_task(self._look_on(checker, fleet, sums))
        try:
            await self._script(fleet, looks)
            looks.cancel()
            take_clients(self._figures, checker.stop())
            self._figures.seconds = round((time.monotonic_ns() - self._start_ns) / SECOND_NS, 1)
            self._tell("the clients leave")
            await self._rest(checker, fleet, sums)
        finally:
            fleet.stop()

    async def _script(self, fleet: Fleet, looks: asyncio.Task[None]) -> None:
        """All steps, and then until every LB is in its place."""
        end_ns = self._start_ns + self._options.seconds * SECOND_NS
        async with asyncio.TaskGroup() as group:
            for step in script(self._options.seconds, BACKEND_COUNT):
                await self._sleep_until(self._start_ns + step.at_ns, looks)
                self._step(step.act, fleet, group)
        await self._sleep_until(end_ns, looks)
        while not fleet.settled:
            if time.monotonic_ns() > end_ns + JOIN_NS_MAX:
                raise LabError(f"the new load balancer is not ready {JOIN_NS_MAX // SECOND_NS} s after all was over")
            await fleet.join()
            await self._sleep_until(time.monotonic_ns() + LOOK_EVERY_NS, looks)

    async def _sleep_until(self, at_ns: int, looks: asyncio.Task[None]) -> None:
        """Ends at once with what went wrong in the looks."""
        await asyncio.wait({looks}, timeout=max(0, at_ns - time.monotonic_ns()) / SECOND_NS)
        if looks.done():
            await looks

    def _step(self, act: Act, fleet: Fleet, group: asyncio.TaskGroup) -> None:
        figures = self._figures
        match act:
            case Act.RESHUFFLE:
                moved = self._stage.lab.router.reshuffle(PREFIX, self._rng)
                figures.ecmp_reshuffles += 1
                self._tell(f"{act.value}: {moved:.0%} of all flows arrive at another LB")
            case Act.LOSS:
                loss = ChaosStep(0, 0, Chaos.LOSS, How.DESTROYED)
                group.create_task(fleet.lose(loss, controller_up=lambda: True))
            case Act.JOIN:
                group.create_task(fleet.join())
            case _:
                what = self._stage.play(act)
                figures.backend_changes += 1
                self._tell(f"{act.value}: {what}")

    async def _rest(self, checker: CheckerRun, fleet: Fleet, sums: LbSums) -> None:
        """Until no slot tracks any more, or for as long as the audience may be asked to wait."""
        end_ns = time.monotonic_ns() + REST_NS_MAX
        while await self._look(checker, fleet, sums):
            if not self._rests or time.monotonic_ns() > end_ns:
                return
            await asyncio.sleep(LOOK_EVERY_NS / SECOND_NS)

    # --- What the audience sees ---------------------------------------------------------------------------------------
    async def _look_on(self, checker: CheckerRun, fleet: Fleet, sums: LbSums) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_NS / SECOND_NS)
            await self._look(checker, fleet, sums)

    async def _look(self, checker: CheckerRun, fleet: Fleet, sums: LbSums) -> bool:
        """Takes the newest figures; True while slots are tracking."""
        figures = self._figures
        lbs = [lb for lb in fleet.lbs if lb.standing is not Standing.LOST]
        for lb in lbs:
            if not (agent := self._stage.agents[lb.node.name]).alive:
                raise LabError(f"the agent of {lb.node.name} has ended: {agent.log_text().strip()[-800:]}")
        said = await asyncio.to_thread(self._stage.look, [lb.node for lb in lbs])
        if self._stage.outgoing and (tables := await fleet.tables()) is not None:
            for backend in self._stage.let_go(tables):
                checker.left(backend.name)
                await asyncio.to_thread(self._stage.lab.remove_pod, backend.pod)
        newest = checker.poll()
        if newest is not None:
            take_clients(figures, newest)
        relayed = sums.gather(figures, said)
        figures.lb_losses = len(self._ledger.losses)
        figures.lb_joins = sum(join.ready_ns is not None for join in self._ledger.joins)
        self._tell_of_lbs()
        self._screen.looked((time.monotonic_ns() - self._start_ns) / SECOND_NS, figures.tracking_slots_end, relayed)
        return figures.tracking_slots_end > 0

    def _tell(self, what: str, at_ns: int | None = None) -> None:
        at_ns = time.monotonic_ns() if at_ns is None else at_ns
        self._screen.happened(what, (at_ns - self._start_ns) / SECOND_NS)

    def _tell_of_lbs(self) -> None:
        for event in self._ledger.events[self._told :]:
            if event.kind in LINES:
                self._tell(f"{event.kind}: {event.what}", event.at_ns)
        self._told = len(self._ledger.events)


def show(options: Options, console: Console) -> int:
    """Plays all runs; returns the exit status. Raises LabError, SetupError in one sentence where it cannot."""
    results: dict[str, Figures] = {}
    with console.status("building the lab: a client, an ECMP router, 3 LBs, 4 backend nodes ...") as status:
        tell: Callable[[str], None] = status.update if console.is_terminal else console.print
        with (
            Lab(nodes=LB_COUNT + HOST_COUNT, log_dir=options.log_dir) as lab,
            on_stage(lab, LB_COUNT, BACKEND_COUNT, JOINS * len(options.runs)) as stage,
        ):
            lab.router.believe_dead_links()
            for name in options.runs:
                tell(f"{TITLES[name]}: starting agents and controller ...")
                figures = Figures()
                stage.reset(BACKEND_COUNT)
                lab.router.set_ecmp(PREFIX, [*stage.lbs])
                stage.start(bpf_object(name))
                stage.wait_ready()
                status.stop()
                screen = Screen(console, TITLES[name], options.seconds, figures)
                console.print(f"[bold]{TITLES[name]}[/bold]")
                with live(screen):
                    Run(stage, options, screen, rests=name == "holdfast").play()
                console.print(f"  {figures.connections:,} connections, {figures.broken:,} broken")
                stage.stop()
                results[name] = figures
                status.start()
    return conclude(results, options, console, f"The same {options.seconds} seconds, three ways of balancing")


def conclude(results: dict[str, Figures], options: Options, console: Console, title: str) -> int:
    """The table and the file; returns the exit status."""
    console.print(comparison(results, title))
    if options.json_file is not None:
        document = {name: figures.as_json() for name, figures in results.items()}
        options.json_file.write_text(json.dumps(document, indent=2) + "\n")
    return EXIT_BROKEN if "holdfast" in results and results["holdfast"].broken else EXIT_FINE
