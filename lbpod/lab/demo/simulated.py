"""The same show without a packet: the script played to the simulator, for machines without root or BPF.

What is real in it: Holdfast's decisions, all of them (Planner, Keepers, and the oracle that the compiled fast path is
compared with). What is a model: packets, hosts, time, and the two baselines (``lbpod.simulator.baselines``). So it
shows what rules do to connections, and says nothing about how fast anything is.
"""

from __future__ import annotations

import random
from typing import Final

from rich.console import Console

from lbpod.lab.cluster import TITLES
from lbpod.lab.demo.show import BACKEND_COUNT, Options, conclude
from lbpod.lab.demo.tally import Figures
from lbpod.lab.demo.timeline import SECOND_NS, Act, script
from lbpod.lab.demo.view import Screen, live
from lbpod.lab.errors import LabError
from lbpod.simulator.baselines import BASELINES, BaselineStage
from lbpod.simulator.promises import Violation
from lbpod.simulator.stage import OurStage, Stage
from lbpod.simulator.wishes import Pod

LOOK_EVERY_NS: Final = SECOND_NS // 2
JOIN_NS_MAX: Final = 20 * SECOND_NS
REST_NS_MAX: Final = 30 * SECOND_NS
"""How long the cluster gets to come to rest (no slot tracking) once the clients have left. Nobody waits for it."""


class Run:
    """One run. All times are those of the simulation."""

    def __init__(self, stage: Stage, options: Options, screen: Screen) -> None:
        self._stage, self._options, self._screen = stage, options, screen
        self._figures = screen.figures
        self._figures.simulated = True
        self._rng = random.Random(f"LBs {options.seed}")
        self._drained: list[Pod] = []
        self._start_ns = 0

    def play(self) -> None:
        """From the first connection to the last look. Raises LabError, Violation."""
        stage = self._stage
        stage.start()
        self._start_ns = stage.timeline.now_ns
        for step in script(self._options.seconds, BACKEND_COUNT):
            self._pass_until(self._start_ns + step.at_ns)
            self._step(step.act)
        self._pass_until(self._start_ns + self._options.seconds * SECOND_NS)
        if not stage.timeline.run_until(lambda: stage.joined, JOIN_NS_MAX):
            raise LabError(f"the new load balancer is not ready {JOIN_NS_MAX // SECOND_NS} s after all was over")
        self._look()
        self._figures.seconds = round((stage.timeline.now_ns - self._start_ns) / SECOND_NS, 1)
        self._tell("the clients leave")
        self._rest()

    def _rest(self) -> None:
        """Until no slot tracks any more. Who is still connected then has not been broken."""
        figures, stage = self._figures, self._stage
        stage.audience.leave()
        stage.timeline.run_until(lambda: stage.tracking == 0, REST_NS_MAX)
        figures.tracking_slots_end = stage.tracking

    def _pass_until(self, at_ns: int) -> None:
        """Time passes, with a look now and then."""
        timeline = self._stage.timeline
        while timeline.now_ns < at_ns:
            next_ns = timeline.now_ns - (timeline.now_ns - self._start_ns) % LOOK_EVERY_NS + LOOK_EVERY_NS
            timeline.run(min(at_ns, next_ns))
            if timeline.now_ns == next_ns:
                self._look()

    def _step(self, act: Act) -> None:
        figures, stage = self._figures, self._stage
        match act:
            case Act.RESHUFFLE:
                stage.reshuffle()
                figures.ecmp_reshuffles += 1
                what = "all flows arrive at another LB"
            case Act.LOSS:
                what = stage.lose(self._rng)
                figures.lb_losses += 1
            case Act.JOIN:
                what = stage.join()
                figures.lb_joins += 1
            case _:
                what = self._change(act)
                figures.backend_changes += 1
        self._tell(f"{act.value}: {what}")

    def _tell(self, what: str) -> None:
        self._screen.happened(what, (self._stage.timeline.now_ns - self._start_ns) / SECOND_NS)

    def _change(self, act: Act) -> str:
        """Of the backends."""
        stage = self._stage
        match act:
            case Act.SCALE_UP:
                return f"+ {_names(stage.add(2))}"
            case Act.SCALE_DOWN:
                self._drained = stage.drain(2)
                return f"{_names(self._drained)} drain"
            case Act.END_DRAIN:
                stage.remove(self._drained)
                return f"- {_names(self._drained)}"
            case _:
                old, new = stage.replace()
                return f"{old.name} -> {new.name}"

    def _look(self) -> None:
        figures, stage = self._figures, self._stage
        audience = stage.audience
        figures.connections, figures.long_lived = audience.connections, audience.long_lived
        figures.broken, figures.broken_backend_gone = audience.broken, audience.gone
        relayed = stage.relayed - figures.relayed_packets
        figures.relayed_packets, figures.resolved_flows = stage.relayed, stage.resolved
        figures.tracking_slots_end = stage.tracking
        figures.tracking_slots_peak = max(figures.tracking_slots_peak, stage.tracking)
        self._screen.looked((stage.timeline.now_ns - self._start_ns) / SECOND_NS, stage.tracking, relayed)


def _names(pods: list[Pod]) -> str:
    return " and ".join(pod.name for pod in pods)


def make_stage(name: str, options: Options) -> Stage:
    """The cluster of the run of that name."""
    sizes = (options.seed, BACKEND_COUNT, options.long_count, options.short_rate)
    return OurStage(*sizes) if name == "holdfast" else BaselineStage(BASELINES[name], *sizes)


def show(options: Options, console: Console) -> int:
    """Plays all runs; returns the exit status."""
    results: dict[str, Figures] = {}
    for name in options.runs:
        console.print(f"[bold]{TITLES[name]}[/bold], simulated")
        figures = results[name] = Figures()
        screen = Screen(console, f"{TITLES[name]}, simulated", options.seconds, figures)
        with live(screen):
            try:
                Run(make_stage(name, options), options, screen).play()
            except Violation as found:  # one of its own checkers has seen what no client has yet
                figures.broken += 1
                console.print(f"  a promise is broken: {found}")
        console.print(f"  {figures.connections:,} connections, {figures.broken:,} broken")
    return conclude(
        results, options, console, f"Simulated: the same {options.seconds} seconds, three ways of balancing"
    )
