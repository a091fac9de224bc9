"""The controller's machine: the Planner, the one file that it keeps, and what it may lose of both.

It is killed at any effect of a step, comes back with its file or without, and is called by nobody: what it hears are
answers. Its world comes from ``wishes``. Left to the Planner: everything that is decided.
"""

from collections.abc import Callable
from random import Random
from typing import Any

from lbpod.core.limits import CONTROL_TIMEOUT_NS
from lbpod.core.messages import (
    AskStatus,
    LbAnswered,
    LbFailed,
    Persist,
    Persisted,
    PersistFailed,
    Phase,
    PlannerEffect,
    PlannerEvent,
    PlannerStatus,
    Push,
    Report,
    Tick,
    WorldSeen,
)
from lbpod.core.model import Cluster, NextIds, Snapshot, World
from lbpod.core.planner import Planner
from lbpod.simulator.machine import CALM_TICK_NS, Stage
from lbpod.simulator.network import CONTROLLER, Call
from lbpod.simulator.timeline import MS_NS, SECOND_NS, Clock


class Controller:
    """One controller. `is_up` False: nobody is at work, and the cluster stays as it is."""

    def __init__(self, of: Cluster, stage: Stage, dice: Random, world: Callable[[], World]) -> None:
        self._of, self._stage, self._dice, self._world = of, stage, dice, world
        self.is_up = False
        self._life = 0
        self._dies_soon = False
        self._is_calm = False
        self.written: tuple[int, NextIds] = (0, NextIds())
        self.on_push: Callable[[Snapshot], None] = lambda snapshot: None
        """Told of each snapshot that is written down."""
        self.status: PlannerStatus | None = None
        self.changes = 0
        """Changes that have come into force, over all lives."""
        self.on_death: Callable[[], None] = lambda: None

    def start(self) -> None:
        """With what is in the file."""
        assert not self.is_up, "a controller starts once"
        self.is_up, self.status = True, None
        self._life += 1
        odds = self._stage.odds
        drift = self._dice.randint(-odds.drift_ppm, odds.drift_ppm)
        self._clock = Clock(self._stage.timeline, drift, self._dice.randrange(100 * SECOND_NS))
        self._planner = Planner(self._of)
        self._planner._maker._tables = self._stage.tables
        self._stage.transcript.say(CONTROLLER, "starts")
        self._feed(WorldSeen(self._world()))
        self._tick(self._life)

    def kill(self, loses_file: bool) -> None:
        """At some effect of one of the next steps."""
        self._dies_soon = True
        if loses_file:
            self.written = (0, NextIds())
            self._stage.transcript.say(CONTROLLER, "its file is lost")

    def calm(self) -> None:
        """Nothing happens to it any more."""
        self._is_calm, self._dies_soon = True, False
        if not self.is_up:
            self.start()

    def see(self) -> None:
        """What is wanted has changed."""
        if self.is_up:
            self._feed(WorldSeen(self._world()))

    @property
    def is_idle(self) -> bool:
        """All that is wanted is in force."""
        return self.is_up and self.status is not None and self.status.phase is Phase.IDLE and self._gathers_nothing

    @property
    def _gathers_nothing(self) -> bool:
        return self._planner.gather_end_ns is None

    # --- Events and effects -------------------------------------------------------------------------------------------
    def _tick(self, life: int) -> None:
        if life != self._life or not self.is_up:
            return
        self._feed(Tick())
        if self.is_up:
            end_ns = self._planner.gather_end_ns
            tick_ns = CALM_TICK_NS if self._is_calm else self._stage.odds.tick_ns
            wait_ns = tick_ns if end_ns is None else max(end_ns - self._clock.now_ns(), MS_NS)
            self._stage.timeline.later(min(tick_ns, wait_ns), lambda: self._tick(life))

    def _feed(self, event: PlannerEvent) -> None:
        todo = [event]
        while todo and self.is_up:
            effects = self._planner.step(todo.pop(0), self._clock.now_ns())
            if self._dies_soon:
                effects = effects[: self._dice.randrange(len(effects) + 1)]
            judgement = self._planner._roster.judgement
            if judgement.revived:
                self._stage.watch.revives(judgement.lost)
            for effect in effects:
                answer = self._carry_out(effect)
                todo += [answer] if answer is not None else []
            if self._dies_soon:
                self._die()

    def _die(self) -> None:
        self._dies_soon = self.is_up = False
        self._stage.transcript.say(CONTROLLER, "is killed")
        self.on_death()

    def _carry_out(self, effect: PlannerEffect) -> PlannerEvent | None:
        match effect:
            case Persist():
                return self._persist(effect)
            case AskStatus() | Push():
                self._call(effect)
            case Report(status):
                self._report(status)
        return None

    def _persist(self, effect: Persist) -> PlannerEvent:
        """The file: compare and swap."""
        generation, next_ids = self.written
        if not self._is_calm and self._dice.random() < self._stage.odds.disk_faults:
            return PersistFailed(effect.generation, 0, "no space left on device")
        if generation > effect.after:
            return PersistFailed(effect.generation, generation, "the file holds more", next_ids)
        self.written = (effect.generation, effect.snapshot.next_ids)
        self.on_push(effect.snapshot)
        return Persisted(effect.generation)

    def _call(self, effect: AskStatus | Push) -> None:
        life, name = self._life, effect.node
        generation, body = (effect.generation, effect.body) if isinstance(effect, Push) else (0, None)
        with_snapshot = isinstance(effect, AskStatus) and effect.with_snapshot

        def feed(event: PlannerEvent) -> None:
            if life == self._life and self.is_up:
                self._feed(event)

        def answered(status: Any) -> None:
            self._stage.watch.reached(name)
            feed(LbAnswered(name, generation, status))

        def failed(refused: bool, reason: str) -> None:
            if refused:
                self._stage.watch.reached(name)
            feed(LbFailed(name, generation, refused, reason))

        receiver = effect.control.partition(":")[0]
        self._stage.network.send(
            Call(CONTROLLER, receiver, body, CONTROL_TIMEOUT_NS, answered, failed, with_snapshot=with_snapshot)
        )

    def _report(self, status: PlannerStatus) -> None:
        before = self.status
        self.status = status
        done = status.changes + status.ring_changes
        self.changes += max(done - (before.changes + before.ring_changes if before is not None else 0), 0)
        said = [f"{status.phase.value}, generation {status.generation}"]
        if before is None or (status.ring, status.lost) != (before.ring, before.lost):
            said += [f"ring {' '.join(status.ring)}", *(["lost " + " ".join(status.lost)] if status.lost else [])]
        if len(said) > 1 or before is None or (status.phase, status.problem) != (before.phase, before.problem):
            self._stage.transcript.say(CONTROLLER, "; ".join([*said, *([status.problem] if status.problem else [])]))
