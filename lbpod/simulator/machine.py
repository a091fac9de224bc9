"""One machine: its maps, the fast path that works on them, and the agent, which may die without either.

The Keeper and the ``Applier`` are the real ones; the fast path is the oracle. Only what the asyncio shell does around
them (``lbpod/agent/driver.py``) is written anew, without asyncio: an event goes in, effects are carried out in order,
the first that fails ends the list and comes back as EffectsFailed. The clock is the machine's own.

Three things can happen to a machine: its agent is killed (maps and fast path go on), its agent stands still (what
comes meanwhile waits), or all of it is gone, to come back empty.
"""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final

import numpy as np

from lbpod.core import missed, oracle, oracle_reply
from lbpod.core.errors import RemoteError
from lbpod.core.keeper import Keeper
from lbpod.core.limits import (
    BATCH_MAX,
    BEAT_DOWN_NS,
    CASCADE_MAX,
    LEAVE_NS_MAX,
    MARGIN_NS,
    PEER_TIMEOUT_NS,
    QUESTION_AGE_NS_MAX,
    RETRY_NS,
)
from lbpod.core.maps import FlowTable, Maps, Record
from lbpod.core.messages import (
    Answered,
    Ask,
    AskFailed,
    BeatCall,
    Called,
    Configure,
    ControllerSeen,
    DumpRecords,
    EffectsFailed,
    ForgetCall,
    KeeperEffect,
    KeeperEvent,
    LbStatus,
    LeaveWanted,
    LookNat,
    LookSeen,
    MissedCall,
    PendingDrained,
    PutCache,
    Refuse,
    Remember,
    Reply,
    Restored,
    RingStep,
    SettleAnswer,
    SettleCall,
    SettleStep,
    Tell,
    Tick,
    Trace,
    Woke,
    WriteSlots,
)
from lbpod.core.oracle import Outcome
from lbpod.core.snapshot import Tables
from lbpod.datapath.apply import Applier, Found, found_in
from lbpod.datapath.faulty import FaultyDatapath
from lbpod.datapath.memory import MemoryDatapath, MemoryHops
from lbpod.datapath.port import DatapathError
from lbpod.datapath.rows import Uplink
from lbpod.simulator.network import CONTROLLER, Answer, Call, Network, over_the_wire
from lbpod.simulator.odds import Odds
from lbpod.simulator.timeline import MS_NS, SECOND_NS, Action, Clock, Timeline
from lbpod.simulator.transcript import Transcript

IFINDEX: Final = 1
UNDERLAY_MTU: Final = 1_600
CHECK_EVERY: Final = 8
"""Steps that change slots from one check of all of a Keeper's invariants to the next."""

DRAIN_NS: Final = 20 * MS_NS
"""How soon an agent looks at flows that the fast path has noted."""

CALM_TICK_NS: Final = SECOND_NS // 2
"""How often agents tick once nothing happens any more."""

START_TRIES_MAX: Final = 100
WITHDRAW_NS: Final = 500 * MS_NS
"""How long an agent that ends waits for the router to notice, before it asks to leave the ring."""

LEAVE_LOOK_NS: Final = 100 * MS_NS


@dataclass(frozen=True)
class Stage:
    """What all machines share."""

    timeline: Timeline
    network: Network
    odds: Odds
    transcript: Transcript
    tables: Tables
    watch: "Watch"


class Records(FlowTable[Record]):
    """A map that does not evict, and remembers whom it had no room for."""

    def __init__(self, count_max: int) -> None:
        super().__init__(count_max, evicts=False)
        self.refused: set[bytes] = set()

    def put(self, key: bytes, value: Record) -> bool:
        done = super().put(key, value)
        if not done:
            self.refused.add(key)
        return done


class Watch:
    """Who looks at what machines do: the promises override these."""

    def lost(self, machine: "Machine") -> None:
        """What a machine knew of flows is about to be lost: all of it is gone, or its agent has lost its memory."""

    def acknowledged(self, machine: "Machine", status: LbStatus) -> None:
        """A machine has answered a call of a controller."""

    def wrote(self, machine: "Machine", effect: WriteSlots) -> None:
        """A machine's Keeper wants slots written."""

    def reached(self, name: str) -> None:
        """A controller has an answer of this machine, or a refusal."""

    def revives(self, lost: frozenset[str]) -> None:
        """A controller has nobody left, without these, and gives what is in force to those that know nothing."""


class Machine:
    """A node. `up` and `agent_up` say what of it there is."""

    def __init__(self, name: str, address: bytes, stage: Stage, dice: Random) -> None:
        self.name: Final = name
        self.address: Final = address
        self._stage, self._dice = stage, dice
        self.up = True
        self.agent_up = False
        self.is_ready = False
        """Its agent says so (/readyz), or said so when it was asked last."""
        self.life = 0
        """Grows with each start of the agent: what an earlier one has asked is answered to nobody."""
        self.resolved_flows = 0
        """Flows for which a peer's answer went into the cache."""
        self._numbers = itertools.count(1)
        self._writes_count = 0
        self._stalled_ns = 0
        self._is_calm = False
        self._boot(SECOND_NS)

    # --- Life and death -----------------------------------------------------------------------------------------------
    def _boot(self, shown_ns: int) -> None:
        """Empty maps, and a clock that begins anew."""
        odds = self._stage.odds
        drift = self._dice.randint(-odds.drift_ppm, odds.drift_ppm)
        self.clock = Clock(self._stage.timeline, drift, shown_ns)
        self.records = Records(odds.records_max)
        self.maps = Maps(
            records=self.records,
            cache=FlowTable(odds.cache_max, evicts=True),
            pending=FlowTable(odds.pending_max, evicts=True),
        )
        memory, seed = MemoryDatapath(self.maps, odds.slice_max), self._dice.getrandbits(32)
        self.datapath = FaultyDatapath(memory, seed, odds.write_faults, odds.read_faults)
        self._remembered = self.in_force = Remember(None, None)

    def start_agent(self) -> None:
        """On what is there: nothing, or what an earlier one has left."""
        assert self.up and not self.agent_up, "an agent starts once, on a machine that runs"
        self._begin_life()
        self.agent_up = True
        if self._remembered.committed is None and self.maps.slots:
            self._stage.watch.lost(self)
        if self._remembered.committed is not None or self._remembered.prepared is not None or self.maps.slots:
            found = self._found()
            kept = self._remembered
            self.feed(Restored(kept.committed, kept.prepared, found.slots, kept.ring_done, found.down, found.given_up))
        self._stage.timeline.later(self._dice.randrange(self._stage.odds.tick_ns), self._ticker())

    def _begin_life(self) -> None:
        self.life += 1
        self.keeper = Keeper(self.name)
        self.in_force = self._remembered
        """What the Keeper wanted remembered last."""
        # One builder for everybody: all must come to the same tables, and that they do is the unit tests' business.
        self.keeper._state.tables = self._stage.tables
        uplink = Uplink("uplink", IFINDEX, bytes(6), UNDERLAY_MTU, self.address)
        self.applier = Applier(self.datapath, self.name, uplink, MemoryHops(IFINDEX))
        self._requests: dict[int, Answer] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._names: dict[int, str] = {}
        self._ahead_ns: dict[str, int] = {}
        """How far the clocks of others are ahead of ours (lbpod/agent/age.py)."""
        self._is_draining = self._is_leaving = False
        self._unchecked = True
        """Slots were written since it was last looked whether they are what was acknowledged."""
        self._ran_ns = 0
        """When the last event came, by its own clock."""

    def _found(self) -> Found:
        """What its predecessor has left. An agent that cannot read its maps ends, and is started again."""
        for _ in range(START_TRIES_MAX):
            try:
                return found_in(self.datapath)
            except DatapathError:
                continue
        raise AssertionError("an agent can read its maps at some time")

    def kill_agent(self) -> None:
        """The fast path goes on."""
        self.agent_up = False
        self._begin_life()

    def stall_agent(self, duration_ns: int) -> None:
        """It stands still: what comes meanwhile waits."""
        self._stalled_ns = self._stage.timeline.now_ns + duration_ns
        life = self.life
        self._stage.timeline.later(duration_ns, lambda: self._go_on(life))

    def _go_on(self, life: int) -> None:
        while life == self.life and self._inbox and not self._is_stalled:
            self._inbox.popleft()()

    @property
    def _is_stalled(self) -> bool:
        return self._stalled_ns > self._stage.timeline.now_ns

    def leave(self, on_end: Action) -> None:
        """SIGTERM: no more VIP traffic, please; out of the ring; and only then the agent ends."""
        self._is_leaving, self.is_ready = True, False
        self._later(WITHDRAW_NS, lambda: self.feed(LeaveWanted()))
        self._later(WITHDRAW_NS + LEAVE_LOOK_NS, lambda: self._has_left(LEAVE_NS_MAX, on_end))

    def _has_left(self, left_ns: int, on_end: Action) -> None:
        status = self.keeper.status()
        if left_ns > 0 and (status.serving or status.ring_step is not RingStep.NONE):
            self._later(LEAVE_LOOK_NS, lambda: self._has_left(left_ns - LEAVE_LOOK_NS, on_end))
            return
        self.kill_agent()
        on_end()

    def crash(self) -> None:
        """All of it is gone."""
        self.up = self.agent_up = self.is_ready = False
        self._begin_life()

    def boot(self) -> None:
        """It comes back, empty."""
        self.up = True
        self._boot(self._dice.randrange(10 * SECOND_NS))
        self.start_agent()

    def calm(self) -> None:
        """Nothing fails any more."""
        self.datapath.write_share = self.datapath.read_share = 0.0
        self._is_calm, self._stalled_ns = True, 0
        self._go_on(self.life)

    # --- The fast path ------------------------------------------------------------------------------------------------
    def packet(self, frame: bytes) -> Outcome:
        """A frame comes in."""
        outcome = oracle.xdp(self.maps, frame, IFINDEX, self.clock.now_ns())
        if self.maps.pending.rows and self.agent_up and not self._is_draining:
            self._is_draining = True
            self._later(DRAIN_NS, self._drain)
        return outcome

    def reply(self, frame: bytes) -> Outcome:
        """A frame of a pod on this machine goes out."""
        return oracle_reply.tc(self.maps, frame, self.clock.now_ns())

    def other_members(self) -> list[int]:
        """Of the ring, as it knows it."""
        newest = self.in_force.prepared or self.in_force.committed
        return [one for one in newest.ring.members if one != self.keeper._state.member] if newest is not None else []

    # --- What reaches the agent ---------------------------------------------------------------------------------------
    def _later(self, delay_ns: int, action: Callable[[], None]) -> None:
        """Do something after a time, if the agent still lives then, and once it does not stand still."""
        life = self.life
        self._stage.timeline.later(delay_ns, lambda: self._now(life, action))

    def _now(self, life: int, action: Callable[[], None]) -> None:
        if life != self.life:
            return
        if self._is_stalled or self._inbox:
            self._inbox.append(action)
        else:
            action()

    def hear(self, call: Call, answer: Answer) -> None:
        """Somebody calls."""
        if not self.agent_up:
            # A machine that boots refuses, too, before its fast path is there.
            if self.up or (self._dice.random() < self._stage.odds.boot_refusals and not self._is_calm):
                self._stage.network.no_agent(call)
            return
        self._now(self.life, lambda: self._hear(call, answer))

    def _hear(self, call: Call, answer: Answer) -> None:
        if call.body is None:
            if call.sender == CONTROLLER:
                self.feed(ControllerSeen())
            status = self.keeper.status(call.with_snapshot)
            self._stage.watch.acknowledged(self, status)
            answer(Reply(0, status))
            return
        try:
            body, number = over_the_wire(call.body), next(self._numbers)
        except RemoteError as error:
            answer(Refuse(0, error.status, error.sentence))
            return
        if self._is_too_old(call, body):
            self._give(call, answer, Refuse(0, 408, "this question is too old to be acted upon; ask again"))
            return
        self._requests[number] = lambda effect: self._give(call, answer, effect)
        is_beat, then_ns = isinstance(body, BeatCall), call.clock_ns
        late = is_beat and then_ns is not None and then_ns + BEAT_DOWN_NS < self.clock.now_ns()
        self.feed(Called(number, body, call.with_snapshot, late))

    def _give(self, call: Call, answer: Answer, effect: Reply | Refuse) -> None:
        call.shown_ns = self.clock.now_ns()
        answer(effect)

    def _is_too_old(self, call: Call, body: Any) -> bool:
        """As lbpod/agent/server.py judges it."""
        acted_upon = isinstance(body, ForgetCall | MissedCall)
        acted_upon |= isinstance(body, SettleCall) and body.step is SettleStep.ASK
        if not acted_upon:
            return False
        if call.clock_ns is None:
            return True
        return not -QUESTION_AGE_NS_MAX <= self.clock.now_ns() - call.clock_ns <= QUESTION_AGE_NS_MAX

    def _drain(self) -> None:
        self._is_draining = False
        try:
            flows, values = self.datapath.pending_drain(BATCH_MAX)
        except DatapathError:
            self._is_draining = True
            self._later(RETRY_NS, self._drain)
            return
        if len(flows):
            self.feed(PendingDrained(flows, values))

    def _ticker(self) -> Callable[[], None]:
        life = self.life

        def tick() -> None:
            if life != self.life:
                return
            if not self._is_stalled:
                self.feed(Tick())
                self.is_ready = self._says_ready()
            self._stage.timeline.later(CALM_TICK_NS if self._is_calm else self._stage.odds.tick_ns, tick)

        return tick

    def _says_ready(self) -> bool:
        """It is in the ring that is in force here, and is to stay."""
        state = self.keeper._state
        is_to_stay = not state.leaving and not self._is_leaving
        return state.is_serving and is_to_stay and not missed.is_catching_up(state)

    # --- Events and effects -------------------------------------------------------------------------------------------
    def feed(self, event: KeeperEvent) -> None:
        """One event, and all that follows from it at once."""
        now_ns = self.clock.now_ns()
        slept_ns, self._ran_ns = now_ns - (self._ran_ns or now_ns), now_ns
        # As lbpod/agent/driver.py notices it.
        todo = [Woke(slept_ns), event] if slept_ns > MARGIN_NS else [event]
        for place in range(CASCADE_MAX):
            if place == len(todo):
                return
            effects = self.keeper.step(todo[place], now_ns)
            if effects:
                todo += self._carry_out(effects)
        raise AssertionError(f"{CASCADE_MAX} events followed one from the other: the Keeper asks in circles")

    def _think(self, seen: KeeperEvent) -> None:
        """About the stamps that it has read: for a while it does nothing else, and its fast path goes on."""
        life, pause_ns = self.life, self._stage.odds.look_pause_ns
        self._stalled_ns = max(self._stalled_ns, self._stage.timeline.now_ns + pause_ns)

        def done() -> None:
            if life == self.life:
                self.feed(seen)
                self._go_on(life)

        self._stage.timeline.later(pause_ns, done)

    def _list_more(self, effect: DumpRecords) -> None:
        """The next slice of a list, after whatever has come between."""
        for event in self._carry_out([effect], at_once=True):
            self.feed(event)

    def _carry_out(self, effects: Sequence[KeeperEffect], *, at_once: bool = False) -> list[KeeperEvent]:
        following: list[KeeperEvent] = []
        for place, effect in enumerate(effects):
            if isinstance(effect, DumpRecords) and effect.cursor is not None and not at_once:
                pause_ns = MS_NS if self._is_calm else self._stage.odds.slice_pause_ns
                self._later(pause_ns, lambda effect=effect: self._list_more(effect))  # type: ignore[misc]
                continue
            try:
                event = self._perform(effect)
            except DatapathError as error:
                return [*following, EffectsFailed(effect, tuple(effects[place + 1 :]), str(error))]
            if isinstance(effect, LookNat) and event is not None:
                self._later(0, lambda event=event: self.feed(event))  # type: ignore[misc]
            elif (
                isinstance(effect, LookSeen)
                and event is not None
                and self._stage.odds.look_pause_ns
                and not self._is_calm
            ):
                self._think(event)
            elif event is not None:
                following.append(event)
        return following

    def _perform(self, effect: KeeperEffect) -> KeeperEvent | None:
        match effect:
            case Ask() | Tell():
                self._say(effect)
            case Reply() | Refuse():
                self._answer(effect)
            case Remember():
                # Where the disk refuses, nothing at all is remembered (lbpod/agent/driver.py).
                self.in_force = effect
                fails = not self._is_calm and self._dice.random() < self._stage.odds.disk_faults
                self._remembered = Remember(None, None) if fails else effect
            case Trace():
                self._stage.transcript.say(self.name, _line(effect))
            case WriteSlots():
                self._stage.watch.wrote(self, effect)
                self.applier.apply(effect)
                self._writes_count, self._unchecked = self._writes_count + 1, True
            case _:
                event = self.applier.apply(effect)
                if isinstance(effect, PutCache):
                    self.resolved_flows += len(effect.flows)
                if isinstance(effect, Configure):
                    both = (effect.committed, effect.prepared)
                    self._names = {node.id: node.name for one in both if one is not None for node in one.nodes}
                return event
        return None

    def _answer(self, effect: Reply | Refuse) -> None:
        body = effect.body if isinstance(effect, Reply) else None
        if isinstance(body, SettleAnswer) or (isinstance(body, LbStatus) and not body.problem):
            self._check_written()
        if isinstance(effect, Reply) and isinstance(effect.body, LbStatus):
            self._stage.watch.acknowledged(self, effect.body)
        if self._writes_count >= CHECK_EVERY:
            self._writes_count = 0
            self.keeper.check_invariants()
        self._requests.pop(effect.request)(effect)

    def _check_written(self) -> None:
        """What is acknowledged is in the maps."""
        if not self._unchecked:
            return
        self._unchecked = False
        for number, vs in self.keeper._state.vips.items():
            assert np.array_equal(vs.slots.words, self.maps.slots[number]), "what is acknowledged has been written"

    def _say(self, effect: Ask | Tell) -> None:
        life, network = self.life, self._stage.network
        receiver = self._names.get(effect.node)
        if receiver is None:
            if isinstance(effect, Ask):
                self._later(0, lambda: self.feed(AskFailed(effect.token, "that node is not known yet", True)))
            return

        def answered(body: Any) -> None:
            self._ahead_ns[receiver] = call.shown_ns - self.clock.now_ns()
            if isinstance(effect, Ask):
                self._now(life, lambda: self.feed(Answered(effect.token, body)))

        def failed(is_refused: bool, reason: str) -> None:
            if call.is_refused and call.shown_ns:
                self._ahead_ns[receiver] = call.shown_ns - self.clock.now_ns()
            if isinstance(effect, Ask):
                untaken = (is_refused or call.is_agentless) and not call.is_repeated
                self._now(life, lambda: self.feed(AskFailed(effect.token, reason, untaken, call.is_agentless)))

        ahead_ns = self._ahead_ns.get(receiver)
        clock_ns = None if ahead_ns is None else self.clock.now_ns() + ahead_ns
        timeout_ns = BEAT_DOWN_NS if isinstance(effect.body, BeatCall) else PEER_TIMEOUT_NS
        call = Call(self.name, receiver, effect.body, timeout_ns, answered, failed, clock_ns=clock_ns)
        network.send(call)


def _line(trace: Trace) -> str:
    said = [trace.what]
    said += [f"VIP {trace.vip}"] if trace.vip else []
    said += [f"{trace.slots} slots"] if trace.slots else []
    return ", ".join([*said, trace.detail] if trace.detail else said)
