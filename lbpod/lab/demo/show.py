"""The show: the loop that plays the script, looks, counts and draws; three runs, one table, one exit status.

Why one loop at ten looks a second and no threads of its own: the order of what happened is then the order of the lines.
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from lbpod.lab.cluster import PREFIX, TITLES, VIP, VIP_PORT, bpf_object
from lbpod.lab.demo.stage import Stage, on_stage
from lbpod.lab.demo.tally import Figures, LbFigures, gather, take_clients
from lbpod.lab.demo.timeline import SECOND_NS, Act, script
from lbpod.lab.demo.view import Screen, comparison, live
from lbpod.lab.topology import Lab
from lbpod.lab.workload import CheckerRun

LB_COUNT: Final = 3
HOST_COUNT: Final = 4
BACKEND_COUNT: Final = 6
LOOK_EVERY_NS: Final = 500_000_000
STEP_NS: Final = 50_000_000
REST_NS_MAX: Final = 6 * SECOND_NS
"""How long the cluster gets to come to rest (no slot tracking) once the clients have left."""

RUNS: Final = tuple(TITLES)
"""Runs of the show, as named in the JSON file."""

EXIT_FINE: Final = 0
EXIT_BROKEN: Final = 1


@dataclass(frozen=True)
class Options:
    """What can be chosen about the show."""

    seconds: int = 16
    """Length of each run."""
    long_count: int = 300
    """Long-lived connections."""
    short_rate: int = 100
    """Short connections opened a second."""
    seed: int = 1
    """Of the router's reshuffles: the same in all runs."""
    json_file: Path | None = None
    runs: Sequence[str] = RUNS
    log_dir: Path | None = None
    """Where the programs' logs stay; None: removed with the lab."""


class Run:
    """One run on a stage that is ready."""

    def __init__(self, stage: Stage, options: Options, screen: Screen) -> None:
        self._stage = stage
        self._options = options
        self._screen = screen
        self._figures = screen.figures
        self._rng = random.Random(options.seed)
        self._last_relayed = 0

    def play(self) -> None:
        """From the first connection to the last look."""
        before = self._stage.look()
        checker = CheckerRun.start(
            self._stage.lab,
            f"{VIP}:{VIP_PORT}",
            long_count=self._options.long_count,
            short_rate=self._options.short_rate,
        )
        self._stage.checker = checker
        start_ns = time.monotonic_ns()
        steps = list(script(self._options.seconds, BACKEND_COUNT))
        next_look_ns = start_ns + LOOK_EVERY_NS
        end_ns = start_ns + self._options.seconds * SECOND_NS
        while (now_ns := time.monotonic_ns()) < end_ns:
            while steps and start_ns + steps[0].at_ns <= now_ns:
                self._step(steps.pop(0).act)
            if now_ns >= next_look_ns:
                next_look_ns = now_ns + LOOK_EVERY_NS
                self._look(checker, before, start_ns)
            time.sleep(STEP_NS / SECOND_NS)
        self._look(checker, before, start_ns)
        take_clients(self._figures, checker.stop())
        self._figures.seconds = round((time.monotonic_ns() - start_ns) / SECOND_NS, 1)
        self._screen.happened("the clients leave")
        rest_ns = time.monotonic_ns() + REST_NS_MAX
        while self._look(checker, before, start_ns) and time.monotonic_ns() < rest_ns:
            time.sleep(LOOK_EVERY_NS / SECOND_NS)

    def _step(self, act: Act) -> None:
        if act is Act.RESHUFFLE:
            moved = self._stage.lab.router.reshuffle(PREFIX, self._rng)
            self._figures.ecmp_reshuffles += 1
            self._screen.happened(f"{act.value}: {moved:.0%} of all flows arrive at another LB")
        else:
            what = self._stage.play(act)
            self._figures.backend_changes += 1
            self._screen.happened(f"{act.value}: {what}")

    def _look(self, checker: CheckerRun, before: list[LbFigures], start_ns: int) -> bool:
        """Takes the newest figures; True while slots are tracking."""
        newest = checker.poll()
        if newest is not None:
            take_clients(self._figures, newest)
        gather(self._figures, self._stage.look(), before)
        relayed = self._figures.relayed_packets - self._last_relayed
        self._last_relayed = self._figures.relayed_packets
        elapsed = (time.monotonic_ns() - start_ns) / SECOND_NS
        self._screen.looked(elapsed, self._figures.tracking_slots_end, relayed)
        return self._figures.tracking_slots_end > 0


def show(options: Options, console: Console) -> int:
    """Plays all runs; returns the exit status. Raises LabError, SetupError in one sentence where it cannot."""
    results: dict[str, Figures] = {}
    with console.status("building the lab: a client, an ECMP router, 3 LBs, 4 backend nodes ...") as status:
        tell: Callable[[str], None] = status.update if console.is_terminal else console.print
        with (
            Lab(nodes=LB_COUNT + HOST_COUNT, log_dir=options.log_dir) as lab,
            on_stage(lab, LB_COUNT, BACKEND_COUNT) as stage,
        ):
            lab.router.set_ecmp(PREFIX, [*stage.lbs])
            for name in options.runs:
                tell(f"{TITLES[name]}: starting agents and controller ...")
                figures = Figures()
                stage.reset(BACKEND_COUNT)
                stage.start(bpf_object(name))
                stage.wait_ready()
                status.stop()
                screen = Screen(console, TITLES[name], options.seconds, figures)
                console.print(f"[bold]{TITLES[name]}[/bold]")
                with live(screen):
                    Run(stage, options, screen).play()
                console.print(f"  {figures.connections:,} connections, {figures.broken:,} broken")
                stage.stop()
                results[name] = figures
                status.start()
    console.print(comparison(results, options.seconds))
    if options.json_file is not None:
        document = {name: figures.as_json() for name, figures in results.items()}
        options.json_file.write_text(json.dumps(document, indent=2) + "\n")
    return EXIT_BROKEN if "holdfast" in results and results["holdfast"].broken else EXIT_FINE
