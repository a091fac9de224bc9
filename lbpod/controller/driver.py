"""The only loop of a controller: Worlds, answers and time to the Planner, its effects to the disk and the network.

Decided here: nothing about the cluster (the Planner does that), only how its effects are carried out: in their order,
one event at a time; ``Persist`` before anything after it; calls side by side, each answered by exactly one event (but
one that the Planner has given up while it waited for its turn by none).

Left to its owner: where Worlds come from (``see``), where a generation is written down (``Store``), what is said of it
(``Listener``). Before the first World nothing at all happens: half a World would take backends away.
"""

import asyncio
import ssl
import time
from collections import deque
from typing import Final, Protocol, assert_never

import structlog

from lbpod.controller.metrics import Metrics
from lbpod.controller.push import PushClient
from lbpod.core.limits import TICK_NS
from lbpod.core.messages import (
    AskStatus,
    LbAnswered,
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
from lbpod.core.model import Cluster, World
from lbpod.core.planner import Planner

STATUS_NOTHING: Final = PlannerStatus(Phase.STARTING, 0, 0, 0, (), "", 0, ())
_STEPS: Final = frozenset({Phase.PERSISTING, Phase.STAGING, Phase.PREPARING, Phase.COMMITTING})
_SECOND_NS: Final = 1_000_000_000

_LOG: Final = structlog.get_logger()


class Store(Protocol):
    """Where generations are written down."""

    async def persist(self, effect: Persist) -> Persisted | PersistFailed:
        """Compare-and-swap; never raises for what the world does."""


class Listener(Protocol):
    """Whoever wants to know how it goes."""

    def reported(self, status: PlannerStatus) -> None:
        """The Planner's status has changed, or a World has come into force."""


class Driver:
    """One Planner and its loop. Make it anywhere; ``run`` it in an event loop, and cancel that to end it: calls under
    way are given up, which is safe at any moment."""

    def __init__(
        self, cluster: Cluster, tls: ssl.SSLContext, store: Store, metrics: Metrics, listener: Listener | None = None
    ) -> None:
        self.status: PlannerStatus = STATUS_NOTHING
        self.converged = False
        """All that was wanted has been in force at least once since the start, but for what cannot be served."""
        self.in_force = 0
        """Number of the newest World (as ``see`` counts them) of which nothing is left to do."""
        self.tracking: dict[str, dict[int, int]] = {}
        """Member of the ring -> VIP id -> slots that track, as it has last said."""
        self._tls = tls
        self._store = store
        self._metrics = metrics
        self.listener = listener
        self._planner = Planner(cluster)
        # Bounded by its writers: one event per node's call, one per World that differs, one per persist.
        self._events: asyncio.Queue[PlannerEvent] = asyncio.Queue()
        self._calls: set[asyncio.Task[None]] = set()
        self._begun = asyncio.Event()
        self._given, self._fed, self._taken = 0, 0, 0  # Worlds: seen, handed to the Planner, made a generation of
        # Generation -> newest World that is in force with it; 0: none, or not all of it. That which is in flight, and
        # that which is being written down: a Planner may have ended the one and begun the other in one step.
        self._made: dict[int, int] = {}
        metrics.report(self.status)

    def see(self, world: World) -> int:
        """This is what is observed from now on. Returns its number."""
        self._events.put_nowait(WorldSeen(world))
        self._begun.set()
        self._given += 1
        return self._given

    async def run(self) -> None:
        """Everything, until it is cancelled."""
        client = PushClient(self._tls)
        try:
            await self._begun.wait()
            await self._loop(client)
        finally:
            for call in tuple(self._calls):
                call.cancel()
            await asyncio.gather(*self._calls, return_exceptions=True)
            await client.close()

    async def _loop(self, client: PushClient) -> None:
        next_tick_ns = time.monotonic_ns()
        await self._feed(client, self._events.get_nowait())
        while True:
            now_ns = time.monotonic_ns()
            wake_ns = min(next_tick_ns, self._planner.gather_end_ns or next_tick_ns)
            if wake_ns <= now_ns:
                await self._feed(client, Tick())
                # Counted from its end: where a tick took longer than the pause, no answer had a turn any more.
                next_tick_ns = time.monotonic_ns() + TICK_NS
                continue
            try:
                async with asyncio.timeout((wake_ns - now_ns) / _SECOND_NS):
                    event = await self._events.get()
            except TimeoutError:
                continue
            if isinstance(event, WorldSeen) and self._given - self._fed > 1:
                self._fed += 1  # a newer World waits behind it; a step for each would fall behind a hundred a second
                continue
            await self._feed(client, event)

    async def _feed(self, client: PushClient, event: PlannerEvent) -> None:
        """One event, and those that its effects bring about at once."""
        events: deque[PlannerEvent] = deque([event])
        while events:
            self._fed += isinstance(events[0], WorldSeen)
            event = events.popleft()
            if self._is_quick(event):
                effects = self._planner.step(event, time.monotonic_ns())
            else:
                # In a thread: a change that touches many VIPs builds tables for seconds, and /healthz must go on.
                effects = await asyncio.to_thread(self._planner.step, event, time.monotonic_ns())
            for effect in effects:
                answer = await self._carry_out(client, effect)
                if answer is not None:
                    events.append(answer)
        if self.status.phase is Phase.IDLE and self._planner.gather_end_ns is None:
            self.converged |= self.status.generation > 0 and not self.status.waiting
            if self._planner.is_complete:
                self._settle(self._fed)

    def _is_quick(self, event: PlannerEvent) -> bool:
        """No new generation can come of it: it takes a change that is under way one step further, and no other World
        waits behind that. A thread would be woken for each answer of each LB."""
        is_step = self.status.phase in _STEPS and isinstance(event, LbAnswered | Persisted)
        return is_step and self._taken == self._fed

    def _settle(self, world: int) -> None:
        """Nothing is left to do of this World."""
        if world > self.in_force:
            self.in_force = world
            self.converged |= self.status.generation > 0
            if self.listener is not None:
                self.listener.reported(self.status)

    def _note(self, generation: int) -> None:
        """A generation was made of the World that the Planner has now, or is written down at another try."""
        if generation not in self._made:
            self._taken = self._fed
            in_flight = self._made.get(self.status.generation, 0)
            # A change of the ring takes no World into force, nor does one of several that it takes.
            made_of = self._fed if self._planner.is_complete else 0
            self._made = {self.status.generation: in_flight, generation: made_of}

    async def _carry_out(self, client: PushClient, effect: PlannerEffect) -> PlannerEvent | None:
        match effect:
            case Persist(generation):
                self._note(generation)
                return await self._store.persist(effect)
            case AskStatus() | Push():
                task = asyncio.create_task(self._call(client, effect))
                self._calls.add(task)
                task.add_done_callback(self._calls.discard)
            case Report(status):
                self._report(status)
            case _:
                assert_never(effect)
        return None

    async def _call(self, client: PushClient, effect: AskStatus | Push) -> None:
        event = await client.call(effect)
        if event is None:  # an older call to this node, which waits, has taken this one over
            return
        self._metrics.called(effect, event)
        if isinstance(event, LbAnswered):
            self.tracking[event.node] = dict(event.status.tracking)
        else:
            self.tracking.pop(event.node, None)
        await self._events.put(event)

    def _report(self, status: PlannerStatus) -> None:
        before = self.status
        self.status = status
        self.tracking = {name: said for name, said in self.tracking.items() if name in status.ring}
        self._metrics.report(status)
        if status.changes > before.changes:
            self._settle(self._made.get(status.generation, 0))
        if status.problem and status.problem != before.problem:
            _LOG.warning("problem", sentence=status.problem)
        if status.phase is not before.phase:
            _LOG.info(
                "phase",
                phase=status.phase.value,
                generation=status.generation,
                lbs=status.lbs,
                lbs_at_generation=status.lbs_at_generation,
                lagging=status.lagging,
            )
        if self.listener is not None:
            self.listener.reported(status)
