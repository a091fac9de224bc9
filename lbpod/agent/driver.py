"""The only loop: what happens becomes events, one at a time into the Keeper, and its effects are carried out in order.

One task owns the Keeper and the datapath, so neither needs a lock. Everybody else (server, peers, neighbours) leaves
events in a queue. The drain pauses longer while it finds nothing (a second where no slot tracks: there is nothing to
find, and an empty look takes as long as all else that a tick does), and does not take flows out while as many questions
are under way as may be: the map keeps them, deduplicated, better than any queue could.

A step that may build tables or has many VIPs to change (``Brain.is_quick`` says no: up to a second for a thousand
backends) runs in a thread, with the loop waiting for it: events wait, but /healthz, TLS and timers go on. The Keeper
and the datapath still have one user at any time. (All of prepare and commit did once: where processors are busy, a
thread waits for its turn twice, and most changes are of one VIP.)

Beats overtake whatever waits, on their way in and out, and while the Keeper thinks in its thread they are answered with
what it would have said before: peers want to know whether this agent runs, not how much it has to do. So is the
controller, where it asks for no snapshot: the tables of a hundred new VIPs take ten seconds, and whoever is silent for
so long is lost. And where one step writes the slots of many VIPs, or makes their maps, it stops between two of them now
and then (``_breathe``), so that beats are answered and answers are read: who hears nobody for some seconds fences
itself, writes all slots of all VIPs, and hears nobody meanwhile.

A slice of the translated flows, or of the records, takes some ten milliseconds, and there may be sixty of them: what
is found of the first goes to the end of the queue, and what is asked for next of the second (it is looked at at once:
what is dropped because of it must not have changed meanwhile). Either ends the turn, so that nobody waits for more than
one. (A thread was dropped: the datapath would have had two users.)

Where an effect on the datapath fails, the rest of its list is not carried out: EffectsFailed is the next event. Where
remembering fails (a full disk), what was remembered before is forgotten and the change goes on: a restart without a
memory is safe (the controller pushes everything again), one with an old memory is not.

What has failed is a reason to be sent no traffic until the same thing succeeds, and nothing else clears it. (With one
flag for all, a single timeout of netlink took an idle LB out of the router until the next effect, up to half a minute,
and next hops that failed for good were forgotten with any slot written.) So it has to be tried again soon: effects are
by the Keeper, the drain by its clock, next hops after RETRY_NS, and then less and less often, for where the kernel does
not answer each try holds up the loop. Remembering is no such reason: a full disk harms no packet, and the next try may
be hours away.

Left to others: every decision (the Keeper), every write (``datapath.apply``), sockets (``server``, ``peers``).
"""

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Final, Protocol, get_args

import msgspec
import structlog

from lbpod.agent.clock import now_ns
from lbpod.agent.peers import Peers
from lbpod.agent.remembered import Memory
from lbpod.core.limits import (
    BATCH_MAX,
    BREATH_ROUNDS,
    CASCADE_MAX,
    DRAIN_PAUSE_NS_MAX,
    DRAIN_PAUSE_NS_MIN,
    DRAIN_REST_NS,
    DRAIN_WORTH,
    EVENTS_PER_TURN_MAX,
    MARGIN_NS,
    NEIGHBOUR_REFRESH_NS,
    NEXT_HOP_GRACE_NS,
    OUTSTANDING_MAX,
    QUEUE_MAX,
    RETRY_NS,
    TICK_NS,
    TRACE_LINES_MAX,
    TURN_NS,
)
from lbpod.core.messages import (
    Answered,
    Ask,
    BeatAnswer,
    BeatCall,
    Called,
    CommitCall,
    Configure,
    ControlCall,
    CreateVip,
    DatapathEffect,
    DeleteVip,
    DumpRecords,
    EffectsFailed,
    KeeperEffect,
    KeeperEvent,
    LbStatus,
    LookNat,
    LookRecords,
    NatLooked,
    PeerCall,
    PendingDrained,
    PrepareCall,
    PutCache,
    Refuse,
    Remember,
    Reply,
    Restored,
    Tell,
    Tick,
    Trace,
    Woke,
    WriteSlots,
)
from lbpod.core.model import Node
from lbpod.core.watch import Beliefs
from lbpod.datapath.apply import Applier
from lbpod.datapath.port import Datapath, DatapathError

_DATAPATH_EFFECTS: Final = get_args(DatapathEffect)
_LOG: Final = structlog.get_logger()


class Brain(Protocol):
    """What the driver needs of ``core.keeper.Keeper``."""

    def step(self, event: KeeperEvent, now_ns: int) -> Sequence[KeeperEffect]:
        """One event in, effects out, in their order. What an Ask, Tell or Reply says has been written when its turn
        comes, and the rest of the list not."""

    def beat(self) -> BeatAnswer | None:
        """What a beat would be answered now."""

    def status(self, with_snapshot: bool = False) -> LbStatus:
        """Where this LB stands."""

    def beliefs(self) -> Beliefs:
        """Who is believed to be down."""

    def pause_ns(self, now_ns: int) -> int:
        """How long until the next Tick, after one: TICK_NS, or BEAT_NS at rest."""

    def is_quick(self, body: ControlCall | PeerCall) -> bool:
        """Whether this call takes milliseconds."""


class Doing(Enum):
    """What has to work, and is tried again by itself where it fails."""

    EFFECTS = "effects"
    """Of the Keeper, any of them: those that must not stay undone it writes again, and its status says so till then."""
    DRAIN = "drain"
    NEXT_HOPS = "next hops"
    """Made good by a refresh of all: an event that is taken well proves nothing about one that was lost."""


class Observer(Protocol):
    """Who looks on. It may neither wait nor touch what it sees."""

    def seen(self, event: KeeperEvent, effects: Sequence[KeeperEffect]) -> None:
        """An event, and what the Keeper wanted done about it; it has been done, or has failed (or comes later: the next
        slice of a list)."""


@dataclass(frozen=True)
class TraceLine:
    """One line of /v1/trace."""

    at: datetime
    trace: Trace


class Driver:
    """Runs one Keeper on one datapath until `stop`.

    Invariants: len(_queue) <= QUEUE_MAX + beats + what peers may have under way + lists of records; a request is in
    `_requests` until answered.
    """

    def __init__(self, brain: Brain, datapath: Datapath, applier: Applier, memory: Memory) -> None:
        self._brain = brain
        self._datapath = datapath
        self._applier = applier
        self._memory = memory
        self._peers: Peers | None = None
        self._observers: list[Observer] = []
        self._queue: deque[KeeperEvent | DumpRecords | asyncio.Future[LbStatus]] = deque()
        self._waiting: asyncio.Event = asyncio.Event()
        self._requests: dict[int, asyncio.Future[Reply | Refuse]] = {}
        self._until_ns: dict[int, int] = {}
        self._numbers = itertools.count(1)
        self._nodes: dict[int, Node] = {}
        self._stopping = False
        self._thinking = False
        """The Keeper is in its thread, or what came of that is being carried out: none of it has been answered yet."""
        self._interim_beat: BeatAnswer | None = None
        """What beats are answered meanwhile: of before the step that is in a thread, or of after the one at hand. None:
        they wait for the Keeper."""
        self._broken: BaseException | None = None
        self._drain_pause_ns = DRAIN_PAUSE_NS_MIN
        self._resolve_ns = 0
        """When all next hops are asked for again."""
        self._hops_pause_ns = RETRY_NS
        """The next failure of next hops brings that forward to so long from then."""
        self._failing: dict[Doing, str] = {}
        """What has failed and not succeeded since, and why."""
        self.trace: Final[deque[TraceLine]] = deque(maxlen=TRACE_LINES_MAX)
        self.status: LbStatus = brain.status()
        """As of the last tick or change."""
        self.beliefs: Beliefs = brain.beliefs()
        """As of then, too."""
        self.events: Final[Counter[str]] = Counter()
        self.effects: Final[Counter[str]] = Counter()
        self.failures: Final[Counter[str]] = Counter()
        """Effects that failed, by kind."""
        self.traced: Final[Counter[str]] = Counter()
        """Trace lines, by what happened."""
        self.drained_flows = 0
        """Flows taken out of `pending`, to be asked about."""
        self.resolved_flows = 0
        """Flows for which a peer's answer went into the cache."""
        self.looked_up_flows = 0
        """Flows whose records were looked up, mostly because a peer asked."""
        self.beats_answered = 0
        """Beats of other LBs."""
        self.leaving = False
        """No VIP traffic should come any more: it is on its way out."""
        self.farewell_until_ns = 0
        """If it ends before, all that it has put on this node goes with it: Holdfast is being removed."""
        self.drains = 0

    # --- From outside, all from the loop's thread -----------------------------------------------------------------

    def connect(self, peers: Peers) -> None:
        """Gives the driver somebody to ask. Before `run`."""
        self._peers = peers

    def observe(self, observer: Observer) -> None:
        """Shows it every event from now on. Before `run`."""
        self._observers.append(observer)

    def post(self, event: KeeperEvent) -> None:
        """Leaves an event. For those that are bounded by what is under way; calls come by `call`. Beats overtake."""
        is_beat = isinstance(event, Called | Answered) and isinstance(event.body, BeatCall | BeatAnswer)
        (self._queue.appendleft if is_beat else self._queue.append)(event)
        self._waiting.set()

    async def call(self, body: ControlCall | PeerCall, until_ns: int | None = None) -> Reply | Refuse:
        """Hands a call to the Keeper and waits for its answer; 503 at once where too much waits already, 408 where the
        Keeper would hear of it later than `until_ns` (a beat it does hear of, as one that is late). While the Keeper
        thinks in a thread, or in the middle of many VIPs, a beat is answered at once."""
        number = next(self._numbers)
        if isinstance(body, BeatCall) and self._interim_beat is not None:
            self.beats_answered += 1
            return Reply(number, self._interim_beat)
        if (len(self._queue) >= QUEUE_MAX and not isinstance(body, BeatCall)) or self._stopping:
            return Refuse(number, 503, "this agent has more to do than it can; try again later")
        answer: asyncio.Future[Reply | Refuse] = asyncio.get_running_loop().create_future()
        self._requests[number] = answer
        if until_ns is not None:
            self._until_ns[number] = until_ns
        self.post(Called(number, body))
        try:
            return await answer
        finally:
            self._requests.pop(number, None)
            self._until_ns.pop(number, None)

    async def look(self, *, with_snapshot: bool = True) -> LbStatus:
        """The status between two events; with_snapshot: and the newest snapshot. Without it, while the Keeper thinks in
        a thread: what it was before."""
        if self._stopping or (self._thinking and not with_snapshot):
            return self.status
        answer: asyncio.Future[LbStatus] = asyncio.get_running_loop().create_future()
        self._queue.append(answer)
        self._waiting.set()
        return await answer

    def take_hop_events(self) -> None:
        """The neighbours have news. Written at once: nobody else uses the datapath between two steps."""
        self._write_hops(self._applier.take_hop_events)

    def listed_address(self) -> bytes | None:
        """This node's address (16 bytes) as the newest snapshot in force has it."""
        return next((node.address for node in self._nodes.values() if node.name == self.status.node), None)

    def stop(self) -> None:
        """Ends `run` after the event at hand. Programs and maps stay as they are."""
        self._stopping = True
        self._waiting.set()

    def fail(self, error: BaseException) -> None:
        """Something of ours has failed outside the loop as it may not: ends `run`, which raises it."""
        self._broken = self._broken or error
        self.stop()

    def member_name(self, member: int) -> str:
        """The node's name, or the number where it is not known."""
        return next((node.name for node in self._nodes.values() if node.member == member), f"member {member}")

    @property
    def is_farewell(self) -> bool:
        """It has been told a short while ago that Holdfast is being removed."""
        return now_ns() < self.farewell_until_ns

    @property
    def swept_flows(self) -> int:
        """Translated flows deleted because they were over."""
        return self._applier.swept_flows

    @property
    def failure(self) -> str:
        """Why that fails which has to work; empty where nothing does, or all of it has succeeded since."""
        return "; ".join(self._failing[doing] for doing in Doing if doing in self._failing)

    @property
    def queue_count(self) -> int:
        """Events that wait."""
        return len(self._queue)

    # --- The loop -------------------------------------------------------------------------------------------------

    async def run(self, restored: Restored | None) -> None:
        """Runs until `stop`. restored: what an earlier agent left, None: nothing. Raises what `fail` was told."""
        try:
            await self._loop(restored)
        finally:
            self._stopping = True
            self._give_up()
        if self._broken is not None:
            raise self._broken

    async def _loop(self, restored: Restored | None) -> None:
        self._resolve_ns = now_ns() + NEIGHBOUR_REFRESH_NS
        if restored is not None:
            await self._feed_slowly(restored)
        self._look()
        next_tick_ns = next_drain_ns = now_ns()
        next_doubt_ns = next_tick_ns + NEXT_HOP_GRACE_NS
        ran_ns = now_ns()
        while not self._stopping:
            waited = await self._wait(min(next_tick_ns, next_drain_ns) - now_ns())
            ran_ns = await self._note_sleep(ran_ns)
            await self._turn()
            ran_ns = await self._note_sleep(ran_ns)
            if now_ns() >= next_tick_ns:
                await self._feed(Tick())
                self._look()
                self._write_hops(self._applier.take_due_hops)
                next_tick_ns = now_ns() + self._brain.pause_ns(now_ns())
            if now_ns() >= self._resolve_ns:
                self._refresh_hops()
            if now_ns() >= next_doubt_ns:
                self._write_hops(self._applier.stop_believing)
                next_doubt_ns = now_ns() + NEIGHBOUR_REFRESH_NS
            if now_ns() >= next_drain_ns:
                pause_ns = await self._drain()
                rests = pause_ns == DRAIN_PAUSE_NS_MAX and not self.status.tracking_slots
                next_drain_ns = now_ns() + (DRAIN_REST_NS if rests else pause_ns)
            elif self.status.tracking_slots:  # since the last look, perhaps
                next_tick_ns = min(next_tick_ns, now_ns() + TICK_NS)
                next_drain_ns = min(next_drain_ns, next_tick_ns)
            if not waited:
                await asyncio.sleep(0)

    async def _note_sleep(self, since_ns: int) -> int:
        """Says so where nothing has happened by the clock for long, before anything is decided by it; the time now."""
        slept_ns = now_ns() - since_ns
        if slept_ns > MARGIN_NS:
            await self._feed(Woke(slept_ns))
        return now_ns()

    async def _turn(self) -> None:
        """Some events, before clock and sockets are looked at again."""
        until_ns = now_ns() + TURN_NS
        for _ in range(EVENTS_PER_TURN_MAX):
            if not self._queue or self._stopping or now_ns() > until_ns:
                return
            item = self._queue.popleft()
            await self._take(item)
            if isinstance(item, NatLooked | DumpRecords):
                return

    async def _wait(self, pause_ns: int) -> bool:
        """Until something is in the queue, or the pause is over; False: at once, and nobody else has had a turn."""
        if self._queue or pause_ns <= 0:
            return False
        self._waiting.clear()
        timer = asyncio.get_running_loop().call_later(pause_ns * 1e-9, self._waiting.set)
        await self._waiting.wait()
        timer.cancel()
        return True

    async def _take(self, item: KeeperEvent | DumpRecords | asyncio.Future[LbStatus]) -> None:
        if isinstance(item, asyncio.Future):
            if not item.done():
                item.set_result(self._brain.status(with_snapshot=True))
        elif isinstance(item, DumpRecords):
            await self._cascade(await self._carry_out([item], at_once=True))
        elif isinstance(item, Called) and isinstance(item.body, BeatCall):
            await self._feed(msgspec.structs.replace(item, late=self._is_late(item.request)))
        elif isinstance(item, Called) and self._is_late(item.request):
            self._act(Refuse(item.request, 408, "this question is too old to be acted upon; ask again"))
        elif isinstance(item, Called) and not self._brain.is_quick(item.body):
            await self._feed_slowly(item)
        else:
            await self._feed(item)
            if isinstance(item, Called) and isinstance(item.body, PrepareCall | CommitCall):
                self._look()

    def _is_late(self, request: int) -> bool:
        until_ns = self._until_ns.get(request)
        return until_ns is not None and until_ns < now_ns()

    def _give_up(self) -> None:
        for number, answer in sorted(self._requests.items()):
            if not answer.done():
                answer.set_result(Refuse(number, 503, "this agent is stopping; try again later"))
        for item in self._queue:
            if isinstance(item, asyncio.Future) and not item.done():
                item.set_result(self.status)

    # --- Events and effects ---------------------------------------------------------------------------------------

    async def _feed(self, event: KeeperEvent) -> None:
        """One event, and all that follows from it at once."""
        self.events[type(event).__name__] += 1
        await self._cascade(await self._follow(event, self._brain.step(event, now_ns())))

    async def _feed_slowly(self, event: KeeperEvent) -> None:
        """The same, with the first step in a thread."""
        self.events[type(event).__name__] += 1
        self._look()  # what is said meanwhile is not older than what has been answered
        self._interim_beat = self._brain.beat()
        self._thinking = True
        try:
            following = await self._follow(event, await asyncio.to_thread(self._brain.step, event, now_ns()))
        finally:
            self._thinking, self._interim_beat = False, None
        await self._cascade(following)
        self._look()

    def _look(self) -> None:
        self.status, self.beliefs = self._brain.status(), self._brain.beliefs()

    async def _cascade(self, following: list[KeeperEvent]) -> None:
        todo = deque(following)
        for _ in range(CASCADE_MAX):
            if not todo:
                return
            event = todo.popleft()
            self.events[type(event).__name__] += 1
            todo.extend(await self._follow(event, self._brain.step(event, now_ns())))
        raise AssertionError(f"{CASCADE_MAX} events followed one from the other: the Keeper asks in circles")

    async def _follow(self, event: KeeperEvent, effects: Sequence[KeeperEffect]) -> list[KeeperEvent]:
        """Carries out what the Keeper wants about an event, before anybody looks on; the events that come of it."""
        following = await self._carry_out(effects)
        for observer in self._observers:
            observer.seen(event, effects)
        return following

    async def _carry_out(self, effects: Sequence[KeeperEffect], *, at_once: bool = False) -> list[KeeperEvent]:
        """Carries out the effects; the events that come of it at once. at_once: the next slice of a list, too."""
        following: list[KeeperEvent] = []
        breath_ns = now_ns() + TURN_NS
        for place, effect in enumerate(effects):
            # Not after a look: the Keeper takes what it finds for what is there now.
            may_wait = isinstance(effect, CreateVip | DeleteVip | WriteSlots) and not following
            if may_wait and now_ns() > breath_ns:
                await self._breathe()
                breath_ns = now_ns() + TURN_NS
            if isinstance(effect, DumpRecords) and effect.cursor is not None and not at_once:
                self._queue.append(effect)
                continue
            self.effects[type(effect).__name__] += 1
            try:
                event = self._perform(effect)
            except (DatapathError, OSError) as error:
                self._note_failure(type(effect).__name__, str(error))
                self._failing[Doing.EFFECTS] = str(error)
                return [*following, EffectsFailed(effect, tuple(effects[place + 1 :]), str(error))]
            if isinstance(effect, LookNat) and event is not None:
                self.post(event)
            elif event is not None:
                following.append(event)
        return following

    async def _breathe(self) -> None:
        """In the middle of many VIPs, lets sockets and timers have their turn. Who has fenced itself says so."""
        if not self._thinking:
            self._interim_beat, self.beliefs = self._brain.beat(), self._brain.beliefs()
        for _ in range(BREATH_ROUNDS):
            await asyncio.sleep(0)
        if not self._thinking:
            self._interim_beat = None

    def _perform(self, effect: KeeperEffect) -> KeeperEvent | None:
        """Carries out one effect. Raises DatapathError, OSError."""
        if not isinstance(effect, _DATAPATH_EFFECTS):
            self._act(effect)
            return None
        event = self._applier.apply(effect)
        self._failing.pop(Doing.EFFECTS, None)
        match effect:
            case Configure():
                self._learn_nodes(effect)
            case PutCache():
                self.resolved_flows += len(effect.flows)
            case LookRecords():
                self.looked_up_flows += len(effect.flows)
        return event

    def _act(self, effect: KeeperEffect) -> None:
        """Effects that touch no map. Raises OSError."""
        match effect:
            case Ask():
                assert self._peers is not None, "a driver runs with peers"
                self._peers.ask(effect.token, effect.node, effect.body)
            case Tell():
                assert self._peers is not None, "a driver runs with peers"
                self._peers.tell(effect.node, effect.body)
            case Reply() | Refuse():
                self.beats_answered += isinstance(effect, Reply) and isinstance(effect.body, BeatAnswer)
                answer = self._requests.get(effect.request)
                if answer is not None and not answer.done():
                    answer.set_result(effect)
            case Remember():
                self._remember(effect)
            case Trace():
                self.traced[effect.what] += 1
                self.trace.append(TraceLine(datetime.now(UTC), effect))
                said = {"vip": effect.vip, "slots": effect.slots, "detail": effect.detail}
                _LOG.info(effect.what, **{name: value for name, value in said.items() if value})
            case _:
                raise AssertionError(f"{type(effect).__name__} is no effect without maps")

    def _remember(self, effect: Remember) -> None:
        """Where the disk refuses, nothing at all must be remembered: an old memory would be believed. Raises
        OSError."""
        try:
            self._memory.keep(effect)
        except OSError as error:
            self._note_failure("Remember", f"cannot remember the snapshots: {error}")
            self._memory.forget()

    def _learn_nodes(self, effect: Configure) -> None:
        both = (effect.committed, effect.prepared)
        self._nodes = {node.id: node for snapshot in both if snapshot is not None for node in snapshot.nodes}
        if self._peers is not None:
            self._peers.know(self._nodes)

    def _note_failure(self, kind: str, reason: str) -> None:
        self.failures[kind] += 1
        _LOG.warning("effect failed", effect=kind, reason=reason)

    # --- By the clock ---------------------------------------------------------------------------------------------

    async def _drain(self) -> int:
        """Takes a batch out of `pending`; the pause until the next look, in ns."""
        if self._peers is not None and self._peers.under_way_count >= OUTSTANDING_MAX:
            return DRAIN_PAUSE_NS_MIN
        try:
            flows, values = self._datapath.pending_drain(BATCH_MAX)
        except DatapathError as error:
            self._note_failure("pending_drain", str(error))
            self._failing[Doing.DRAIN] = str(error)
            return RETRY_NS
        self._failing.pop(Doing.DRAIN, None)
        self.drains += 1
        is_few = len(flows) < DRAIN_WORTH
        self._drain_pause_ns = min(self._drain_pause_ns * 2, DRAIN_PAUSE_NS_MAX) if is_few else DRAIN_PAUSE_NS_MIN
        if len(flows):
            self.drained_flows += len(flows)
            await self._feed(PendingDrained(flows, values))
        return 0 if len(flows) == BATCH_MAX else self._drain_pause_ns

    def _refresh_hops(self) -> None:
        """Makes good whatever has failed of them."""
        self._resolve_ns = now_ns() + NEIGHBOUR_REFRESH_NS
        if self._write_hops(self._applier.resolve_hops):
            self._hops_pause_ns = RETRY_NS
            self._failing.pop(Doing.NEXT_HOPS, None)

    def _write_hops(self, how: Callable[[], None]) -> bool:
        """A failure brings the next refresh forward, which writes it again: the mirror knows that it is not in the
        map."""
        try:
            how()
        except DatapathError as error:
            self._note_failure("nodes", str(error))
            self._failing[Doing.NEXT_HOPS] = str(error)
            self._resolve_ns = min(self._resolve_ns, now_ns() + self._hops_pause_ns)
            self._hops_pause_ns = min(2 * self._hops_pause_ns, NEIGHBOUR_REFRESH_NS)
            return False
        return True
