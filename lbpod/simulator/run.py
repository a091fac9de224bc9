"""One seed from its beginning to its end: trouble while everything changes, then calm, then everything is as wanted.

Whatever raises on the way (a promise that is broken, an assertion of the core or of the simulator) is what the seed has
found. The same seed finds the same again.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from lbpod.simulator.cluster import Cluster
from lbpod.simulator.machine import Machine
from lbpod.simulator.promises import Violation
from lbpod.simulator.timeline import MS_NS, SECOND_NS
from lbpod.simulator.trouble import Trouble
from lbpod.simulator.wishes import Listed

CHANGES_MIN: Final = 50
"""Things that happen to backends and LBs while there is trouble."""

GENERATIONS_MIN: Final = 12
"""Changes that come into force: what happens at about one time comes into force together."""

AT_ONCE: Final = (1, 1, 2, 3)
"""So many things change at one time, each as likely as another. What follows soon after is in the same burst."""

TROUBLE_NS_MAX: Final = 600 * SECOND_NS
TROUBLE_ENOUGH_NS: Final = 30 * SECOND_NS
"""When so much time has passed, fewer will do: somebody else is always down."""

START_NS_MAX: Final = 120 * SECOND_NS
CONVERGE_NS_MAX: Final = 60 * SECOND_NS
STEADY_NS_MAX: Final = 120 * SECOND_NS


@dataclass(slots=True)
class Result:
    """What became of a seed. found: one sentence where something is wrong, else empty."""

    seed: int
    found: str = ""
    detail: str = ""
    """Where it was raised."""
    counts: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)


class Run:
    """One seed."""

    def __init__(self, seed: int, keeps: bool) -> None:
        self.cluster = Cluster(seed, keeps)
        self._trouble = Trouble(self.cluster)
        self._dice = self.cluster.dice("changes")
        self._changing = True
        self._end_ns = 0
        self._burst = self._burst_at = 0
        """Changes wanted since a change came into force, and which one that was."""

    def play(self) -> None:
        """All of it. Raises what it finds."""
        cluster = self.cluster
        cluster.start()
        self._reach("the first generation is in force", START_NS_MAX, lambda: cluster.controller.changes > 0)
        cluster.clients.start()
        self._trouble.start()
        self._change()
        self._end_ns = cluster.timeline.now_ns + TROUBLE_ENOUGH_NS
        self._reach("everything changes and goes on", TROUBLE_NS_MAX, self._has_seen_enough)
        cluster.transcript.say("everybody", "calm from here on")
        self._changing = False
        self._trouble.end()
        self._reach("all that is wanted is in force everywhere", CONVERGE_NS_MAX, self._is_converged)
        cluster.clients.calm()
        self._reach("no slot is tracking any more", STEADY_NS_MAX, self._is_steady)
        for machine in self._listed():  # who is not may never have been told how the change that took it out ended
            machine.keeper.check_invariants()

    def _has_seen_enough(self) -> bool:
        generations = self.cluster.controller.changes
        late = generations > 1 and self.cluster.timeline.now_ns > self._end_ns
        return self.changes >= CHANGES_MIN and (late or generations >= GENERATIONS_MIN)

    @property
    def changes(self) -> int:
        """What has happened to backends and LBs."""
        return self.cluster.wishes.changes + self._trouble.losses

    def _change(self) -> None:
        if not self._changing:
            return
        odds, controller = self.cluster.odds, self.cluster.controller
        if controller.changes != self._burst_at or controller.is_idle:
            self._burst_at, self._burst = controller.changes, 0
        if self._burst < odds.burst_max or self.cluster.timeline.now_ns > self._end_ns:
            self._burst += 1
            for _ in range(self._dice.choice(AT_ONCE)):
                self.cluster.wishes.change()
            controller.see()
        pause_ns = int(self._dice.expovariate(1 / odds.change_pause_ns))
        if self._dice.random() < odds.rest_chance:
            pause_ns += self._dice.randrange(12 * SECOND_NS)
        self.cluster.timeline.later(max(pause_ns, 10 * MS_NS), self._change)

    def _reach(self, what: str, within_ns: int, is_so: Callable[[], bool]) -> None:
        if not self.cluster.timeline.run_until(is_so, within_ns):
            raise Violation(f"within {within_ns // SECOND_NS} s it does not come about that {what}")

    def _is_converged(self) -> bool:
        controller = self.cluster.controller
        if not controller.is_idle or controller.status is None:
            return False
        wanted = sorted(name for name, how in self.cluster.wishes.listed.items() if how is Listed.LB)
        states = [machine.keeper.status() for machine in self._listed()]
        at_generation = all(state.committed == controller.status.generation and not state.problem for state in states)
        return at_generation and list(controller.status.ring) == wanted

    def _listed(self) -> list[Machine]:
        """Those that the controller is to look after."""
        listed = self.cluster.wishes.listed
        return [machine for name, machine in self.cluster.machines.items() if listed.get(name) is not Listed.NOT]

    def _is_steady(self) -> bool:
        return not any(machine.keeper.status().tracking_slots for machine in self._listed())


def run(seed: int, keeps: bool = False) -> Result:
    """Play a seed. keeps: with its transcript."""
    result = Result(seed)
    played = Run(seed, keeps)
    try:
        played.play()
    except Exception as found:  # noqa: BLE001  (whatever a seed raises is what it has found)
        result.found = f"{type(found).__name__}: {found}"
        result.detail = traceback.format_exc()
        played.cluster.transcript.say("FOUND", result.found)
        for line in found.story if isinstance(found, Violation) else []:
            played.cluster.transcript.say("", line)
    cluster = played.cluster
    result.counts.update(
        changes=played.changes,
        generations=cluster.controller.changes,
        flows=cluster.clients.opened,
        packets=cluster.promises.delivered,
        seconds=cluster.timeline.now_ns // SECOND_NS,
        **cluster.promises.excused,
    )
    result.lines = cluster.transcript.lines
    return result
