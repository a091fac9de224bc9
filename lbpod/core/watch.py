"""Which LBs are believed to be down, and when this one no longer trusts itself: failover without the controller.

Decided here: whom an LB asks whether it is there (*beats*), what it believes from the answers, what it makes of others'
beliefs, and when it fences itself. The fast path reads a belief as one bit of the members array: while an owner is
believed to be down, what would be relayed to it goes to the backup (DESIGN: section 2). **A wrong belief is harmless**,
so all of this is as quick and as simple as it can be, and nothing here is ever agreed upon with anybody.

**Whom.** All others of the ring, where they are WATCH_MAX or fewer. In a larger ring: the next one by member id (so
nobody goes unwatched) and those with which this LB shares most slots, which it asks and tells most. During a ring
change the members of both rings are watched by both: a joiner watches before it serves, a leaver until it is out.

**One of two asks, at rest.** Of two that watch each other the one with the lower member id asks, and the other hears it
by that: half as many beats, which are most of what an agent does where nothing happens. That holds while no slot tracks
at either, and all is well. Else both ask, for a belief that is wrong should not last: where a question is overdue (it
counts as asked when that was due, so a loss shows no later) or has no answer, where either finds anybody silent, and
where it wants to know more than that somebody is there: in doubt, or cut off before. And now and then (BEATS_BOTH_ASK),
so that there is a connection when it is needed, and not a handshake to make at each LB at once.

**Belief.** A member is heard when it answers that it serves, or when it calls. It is down once it has not been heard
for BEAT_DOWN_NS although it was asked, or due to ask, two beats ago or earlier; one word from it and it is up. Time in
which this LB itself did not run (it was stopped, or its clock has jumped) is not counted as the others' silence.

*An agent that is away is no LB that is down*: its fast path decides, records and passes on chains as before. Where
the machine itself refuses the connection to it, it counts as heard for AWAY_NS. (Believed to be down, it would
be left out of chains; flows would begin that its replica alone knows, and be lost with that one.) That is all that a
refused connection says: who is believed to be down already stays so.

*Who is heard and does not hear* is down, too: a cable may be cut in one direction, or a filter sit in between. It
calls, and says that it has found this LB silent. A chain from here would be lost, so what begins here would be known
here alone, while the other begins the same flows alone. So both take each other for down until one has had an answer
from the other, for which both ways are needed. Nobody says so to others before it has found the same.

*What was asked long ago says nothing about now.* When a cable is plugged in again, the kernel first delivers what it
has kept: beats of a second ago, of an LB that did not know then that it was cut off. They are answered, and bring
nobody up. Nor do answers that are as late, and were kept likewise; but what is asked once such a one has come is
answered by an LB that can be reached, however long that takes on a machine without time.

*Doubted first, given up later.* A wrong belief about one member is harmless, because the backup knows what the owner
knows. To believe both replicas of a slot down is not, if an LB that has nobody to relay to decides alone. Whoever finds
several silent at the same time is more likely to be short of something itself; and two agents may be down whose fast
paths are not. So a member that is silent is only *doubted*: where one replica of a slot is up, that one is used; where
none is, packets go to a doubted one all the same. If it is really gone, they are lost and sent again, and nothing is
broken. Silent for LOST_NS, after which the controller takes it out anyway, it is *given up*: an LB never stops
forwarding, so what nobody else can decide it decides itself then.

*An agent that restarts* takes over whom its maps say to be down: the fast path has gone on without them. And of those
that it watches and has not heard yet it believes at once what another LB has found (unless that one was cut off just
now). It says so to others once it has found the same. Whoever is there is up with its first answer. Whom the agent
before it had given up it doubts until its own LOST_NS is over, but says so to the controller (``given_up_before``), who
would wait for ever where agents die one after the other.

**What others say.** Beats carry the members that each side has found silent *itself*. A member that this LB watches
anyway is none of the others' business. Any other one becomes a suspect: it is asked at once and with the next beats,
and is down by the same rule, but for its having been heard long ago. So a rumour is checked before it is believed and
before it is passed on; one that is wrong dies where it meets an answer. Suspects, and members that are believed down
and not watched anyway, take turns where there are more than WATCH_MAX of them.

**Fence.** An LB that has heard neither the controller nor a peer for FENCE_NS may have been left out: others may have
formed a ring without it and changed the backends. The same holds for one that hears of a generation newer than it has
prepared while the controller has not spoken to it for as long. It tracks all of its slots then, so that the owners
decide about its packets, and settles none; it never stops forwarding. Silence is measured before what breaks it is
noted, so an LB that wakes up after a minute is fenced by the first word that it hears. The fence falls with the next
tick after it was in touch, and the slots settle as those of an LB that has lost its maps do: by asking replicas that
are steady (``settle``, LOOK). An LB that is alone in its ring is never fenced: nobody could know better.

What a fence cannot help: slots that this LB takes itself to own. It decides those from what it knows. So from its
start, and from the moment that it is fenced or hears no other LB, it is in *doubt*, until a peer has told which
generation is in force (the controller, where no peer is there) and that one is in force here. As long as others are
known to be ahead, no VIP traffic should come (``behind``, /readyz). One that hears nobody may be the only one left, and
takes it. And one that was cut off says, when it is heard again, that it does not serve yet: it has missed what others
recorded meanwhile (``missed``).

Tried and dropped: believing a refused connection at once, as a sign that the LB is down; counting beats as the
questions to a node that they are (a node that is down has as many of those open as it may have, so nobody would have
found it to be down).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from lbpod.core import missed, sweep
from lbpod.core.keeper_state import Answer, Effects, Question, State
from lbpod.core.keeper_watch import Watch
from lbpod.core.limits import (
    ALONE_NS,
    AWAY_NS,
    BEAT_DOWN_NS,
    BEAT_NS,
    BEATS_BOTH_ASK,
    BEATS_MAX,
    BEATS_OPEN_MAX,
    FENCE_NS,
    LOST_NS,
    MARGIN_NS,
    MEMBER_NONE,
    MEMBERS_MAX,
    OWED_NS,
    SLOT_COUNT,
    SYN_RETRY_NS,
    TICK_NS,
    WATCH_MAX,
)
from lbpod.core.messages import (
    Ask,
    BeatAnswer,
    BeatCall,
    ControlCall,
    MemberSeen,
    PeerCall,
    Refuse,
    Reply,
    RingStep,
    Trace,
    Woke,
)

NOT_NOW: Final = 503


@dataclass(frozen=True, slots=True)
class Beliefs:
    """What people may want to know about all this. Members ascend."""

    others: tuple[int, ...] = ()
    """Of the ring (of both, during a ring change), without this one."""
    watched: tuple[int, ...] = ()
    """Those that are always asked."""
    down: tuple[int, ...] = ()
    given_up: tuple[int, ...] = ()
    """Some of those that are down."""
    fenced_why: str = ""
    """One sentence, or empty where this LB is not fenced."""
    fenced_count: int = 0
    in_doubt: bool = False
    """This LB may have been left out, and nobody has told it better yet."""
    is_catching_up: bool = False
    """It was cut off, and others have not told it yet what it has missed (``missed``)."""
    behind: int = 0
    """The generation that is in force elsewhere, where it is in doubt and knows of one newer than its own; else 0."""


def beliefs(state: State) -> Beliefs:
    """As of now."""
    watch, others = state.watch, _others(state)
    in_doubt = bool(watch.doubt_ns and others)
    return Beliefs(
        others=tuple(sorted(others)),
        watched=_watched(state, others),
        down=tuple(sorted(state.down & others)),
        given_up=tuple(sorted(state.given_up & others)),
        fenced_why=watch.fenced_why,
        fenced_count=watch.fenced_count,
        in_doubt=in_doubt,
        is_catching_up=missed.is_catching_up(state),
        behind=watch.ahead if in_doubt and watch.ahead > state.generation else 0,
    )


# --- Events -----------------------------------------------------------------------------------------------------------
def tick(state: State, now_ns: int) -> Effects:
    """Send the beats that are due, believe what has become clear, fence."""
    watch, others = state.watch, _others(state)
    _forget(state, others)
    effects = _fence(state, now_ns)
    _skip_gap(watch, now_ns)
    always = _watched(state, others)
    for member in watch.spoke_ns.keys() - set(always):
        del watch.spoke_ns[member]
    at_rest, due = _is_at_rest(state), _overdue(watch, now_ns)
    if now_ns + TICK_NS // 2 >= watch.beat_at_ns:
        watch.beat_at_ns = now_ns + BEAT_NS
        for member in always:
            watch.heard_ns.setdefault(member, now_ns)
        watch.beats += 1
        asking = watch.spoke_ns.keys() if at_rest and watch.beats % BEATS_BOTH_ASK else set()
        due = [member for member in always if member not in asking] + _by_turns(state, always)
    for member in due:
        effects += _ask(state, member, now_ns, ask_back=not at_rest)
    watch.hearsay -= silent_for(state, 2 * BEAT_NS, now_ns)
    silent = _silent(state, now_ns)
    effects += _believe(state, silent, now_ns, up=False)
    hears_nobody = bool(others & state.down) and others <= state.down | watch.agentless_ns.keys()
    if silent and hears_nobody:
        watch.doubt_ns = watch.doubt_ns or now_ns
    if hears_nobody and _is_alone(watch, now_ns):
        missed.alone(state, others)
    _end_doubt(state, others, now_ns)
    return [*effects, *_give_up(state, now_ns)]


def _is_alone(watch: Watch, now_ns: int) -> bool:
    """Not even the controller is heard. (Where it is, the others have died, or restart.)"""
    return watch.peer_ns + BEAT_DOWN_NS <= now_ns and watch.controller_ns + ALONE_NS <= now_ns


def _silent(state: State, now_ns: int) -> list[int]:
    """Who is down from now on."""
    watch = state.watch
    return sorted(
        member
        for member, asked_ns in watch.asked_ns.items()
        if member not in state.down
        and asked_ns + 2 * BEAT_NS <= now_ns
        and _there_ns(watch, member) + BEAT_DOWN_NS <= now_ns
    )


def _there_ns(watch: Watch, member: int) -> int:
    """Until when its fast path is known to run: it was heard, or its machine has refused to connect to its agent."""
    heard_ns = watch.heard_ns.get(member, 0)
    return max(heard_ns, min(watch.agentless_ns.get(member, 0), heard_ns + AWAY_NS))


def silent_for(state: State, period_ns: int, now_ns: int) -> set[int]:
    """Who is down, and has not answered for at least so long."""
    asked_ns = state.watch.asked_ns
    return {member for member in state.down if asked_ns.get(member, now_ns) + period_ns <= now_ns}


def trusts(state: State, member: int, since_ns: int) -> bool:
    """This LB takes it for up, and has at every moment since then: so its fast path has begun no flow for want of it
    (unless it knew no way to it: a link that went down, and came up)."""
    turned_ns = state.watch.turned_ns.get(member, -1)
    return member not in state.down and turned_ns < since_ns and not state.unwritten.configure


def agreed_to_be_gone(state: State, now_ns: int) -> set[int]:
    """Who has been silent for OWED_NS, and that not to this LB alone: all that it hears say so too, and one does."""
    heard = _others(state) - state.down
    said = [state.watch.said_down.get(member, frozenset()) for member in sorted(heard)]
    return {gone for gone in silent_for(state, OWED_NS, now_ns) if said and all(gone in each for each in said)}


def who_hear(state: State, member: int) -> list[int]:
    """Others that this LB hears, and that have not found this one silent when they last spoke."""
    heard = sorted(_others(state) - state.down - {member})
    said = state.watch.said_down
    return [one for one in heard if one in said and member not in said[one]]


def _give_up(state: State, now_ns: int) -> Effects:
    """Those that have been silent for so long that what is sent to them is lost for good."""
    lost = silent_for(state, LOST_NS, now_ns) - state.given_up
    if not lost:
        return []
    state.given_up |= lost
    return [state.configure(), *(Trace("given up", detail=f"member {member}") for member in sorted(lost))]


def asked(state: State, request: int, call: BeatCall, now_ns: int, *, late: bool) -> Effects:
    """A beat: answer, and learn from the question. late: who asked may be down since."""
    if state.member == MEMBER_NONE:
        return [Refuse(request, NOT_NOW, f"{state.node_name} is no load balancer that it knows of")]
    is_mute = _is_mute(state, call) and not late
    effects = _heard(state, call, not is_mute, now_ns, late=late)
    if is_mute:
        effects += _speaks_in_vain(state, call.member, now_ns)
    if not late and not call.returning and call.member < state.member:
        effects += _take_turns(state, call, now_ns)
    return [Reply(request, answer(state, owes=missed.owes(state, call.member))), *effects]


def _is_mute(state: State, call: BeatCall) -> bool:
    """Who asks does not hear this LB."""
    return state.member in call.down


def _speaks_in_vain(state: State, member: int, now_ns: int) -> Effects:
    """This member hears nothing of this LB: nor would it get a chain. Down, until it answers."""
    if member in state.down or member not in _others(state):
        return []
    state.watch.hearsay.add(member)
    return [*_believe(state, [member], now_ns, up=False), *_ask(state, member, now_ns)]


def answer(state: State, *, owes: bool) -> BeatAnswer:
    """To a beat, as things are."""
    return BeatAnswer(
        member=state.member,
        generation=state.generation,
        ring_epoch=_ring_epoch(state),
        serving=state.is_serving,
        down=_found_down(state),
        returning=missed.is_returning(state),
        owes=owes,
    )


def called(state: State, body: ControlCall | PeerCall, now_ns: int) -> Effects:
    """Somebody calls: is it the controller?"""
    return controller_heard(state, now_ns) if isinstance(body, ControlCall) else []


def controller_heard(state: State, now_ns: int) -> Effects:
    """The controller is there."""
    effects = _fence(state, now_ns)
    watch = state.watch
    watch.controller_ns = now_ns
    watch.told_ns = now_ns if watch.told_ns <= watch.doubt_ns else watch.told_ns
    return effects


def member_seen(state: State, event: MemberSeen, now_ns: int) -> Effects:
    """The shell knows better, until beats say otherwise."""
    if event.member in {state.member, MEMBER_NONE} or event.up == (event.member not in state.down):
        return []
    if event.up:
        _note_heard(state.watch, event.member, now_ns)
    return _believe(state, [event.member], now_ns, up=event.up)


def woke(state: State, event: Woke, now_ns: int) -> Effects:
    """Time in which this agent did not run may be none at all: its clock may have leapt. It silences no flow.

    All quiet times count anew, of slots and of records; and as host agent, this node takes the time off from what
    translated flows seem to have been silent.
    """
    state.replicas_changed_ns = np.full(SLOT_COUNT, now_ns, dtype=np.uint64)
    state.host.slept_ns, state.host.woke_ns = sweep.slept_ns(state, now_ns) + event.slept_ns, now_ns
    return [Trace("woke", detail="it did not run for long, or its clock has leapt: quiet times count anew")]


# --- Whom -------------------------------------------------------------------------------------------------------------
def _others(state: State) -> set[int]:
    """Who is in the ring (in either, during a ring change) with this LB; nobody, where it is in none."""
    members: set[int] = set()
    for plan in state.plans():
        members.update(plan.snapshot.ring.members)
        if plan is state.prepared or state.ring_step is RingStep.SWITCHED:
            members.update(plan.snapshot.ring.before)
    if state.member not in members:
        return set()
    members.discard(state.member)
    return members


def _watched(state: State, others: set[int]) -> tuple[int, ...]:
    """Those that are always asked."""
    watch = state.watch
    if len(others) <= WATCH_MAX:
        return tuple(sorted(others))
    if watch.chosen is not None and watch.chosen[0] is state.owner and watch.chosen[1] == others:
        return watch.chosen[2]
    follower = min((member for member in others if member > state.member), default=min(others))
    shared = np.zeros(MEMBERS_MAX, dtype=np.int64)
    for mine, theirs in ((state.owner, state.backup), (state.backup, state.owner)):
        partners = theirs[mine == state.member]
        shared += np.bincount(partners[partners != MEMBER_NONE], minlength=MEMBERS_MAX)
    rest = sorted(others - {follower}, key=lambda member: (-int(shared[member]), member))
    watch.chosen = (state.owner, frozenset(others), tuple(sorted([follower, *rest[: WATCH_MAX - 1]])))
    return watch.chosen[2]


def _by_turns(state: State, always: tuple[int, ...]) -> list[int]:
    """Those that are asked because of what is said or believed of them: WATCH_MAX at a time."""
    watch = state.watch
    others = sorted((watch.suspects | state.down) - set(always))
    if len(others) <= WATCH_MAX:
        return others
    watch.turn %= len(others)
    chosen = (others[watch.turn :] + others[: watch.turn])[:WATCH_MAX]
    watch.turn += WATCH_MAX
    return chosen


def _forget(state: State, others: set[int]) -> None:
    """Drop what is known of LBs that are no members any more."""
    watch = state.watch
    state.down &= others
    state.given_up &= others
    watch.given_up_before &= others
    watch.suspects &= others
    watch.met &= others
    watch.hearsay &= others
    watch.owed_by &= others
    watch.said_down = {member: down for member, down in watch.said_down.items() if member in others}
    for known in (watch.heard_ns, watch.asked_ns, watch.agentless_ns, watch.turned_ns, watch.missed, watch.late_ns):
        for member in known.keys() - others:
            del known[member]


# --- Beats ------------------------------------------------------------------------------------------------------------
def _is_at_rest(state: State) -> bool:
    """A belief that is wrong would matter to no flow here, and nothing is to be found out."""
    watch = state.watch
    if state.down or watch.suspects or watch.doubt_ns or watch.owed_by:
        return False
    return all(vs.slots.track is None for vs in state.vips.values())


def pause_ns(state: State, now_ns: int) -> int:
    """How long until the next tick: TICK_NS; where nothing is under way and all have been heard just now, until beats
    are due again. A silence is not noticed later by that: from the beat on that one owes, ticks come as ever."""
    watch = state.watch
    calm = state.is_calm and not state.unwritten and _is_at_rest(state)
    if not calm or any(at_ns + BEAT_NS + TICK_NS <= now_ns for at_ns in watch.heard_ns.values()):
        return TICK_NS
    return min(max(watch.beat_at_ns - now_ns, TICK_NS), BEAT_NS)


def _take_turns(state: State, call: BeatCall, now_ns: int) -> Effects:
    """One with a lower id asks, and for both, where it says so."""
    spoke_ns = state.watch.spoke_ns
    if not call.ask_back:
        spoke_ns[call.member] = now_ns
        return []
    return _ask(state, call.member, now_ns) if spoke_ns.pop(call.member, 0) else []


def _overdue(watch: Watch, now_ns: int) -> list[int]:
    """Who has asked until now, and should have again. From then on counts how long it has been silent, as if it had
    been asked itself."""
    found = sorted(member for member, at_ns in watch.spoke_ns.items() if at_ns + BEAT_NS + TICK_NS // 2 <= now_ns)
    for member in found:
        due_ns = watch.spoke_ns.pop(member) + BEAT_NS
        watch.asked_ns.setdefault(member, due_ns)
    return found


def _ask(state: State, member: int, now_ns: int, *, ask_back: bool = True) -> Effects:
    """ask_back: it should ask, too. So it should where it was asked before, and was not heard since."""
    watch, node = state.watch, state.node_of_member.get(member, 0)
    count = watch.open.get(member, 0)
    if not node or count >= BEATS_OPEN_MAX or sum(watch.open.values()) >= BEATS_MAX:
        return []
    watch.asked_ns.setdefault(member, now_ns)
    watch.open[member] = count + 1
    # Of no node: a node that is down has no room for one question more.
    is_returning = missed.is_returning(state)
    ask_back |= watch.asked_ns[member] < now_ns
    call = BeatCall(state.member, state.generation, _ring_epoch(state), _found_down(state), is_returning, ask_back)
    return [Ask(state.open(_Beat(member, now_ns), now_ns), node, call)]


def _found_down(state: State) -> tuple[int, ...]:
    """What this LB says: whom it has found silent itself."""
    return tuple(sorted(state.down - state.watch.hearsay))


def _ring_epoch(state: State) -> int:
    return state.newest.snapshot.ring.epoch if state.newest is not None else 0


@dataclass(frozen=True, slots=True, eq=False)
class _Beat(Question):
    """A member was asked whether it is there."""

    member: int
    asked_ns: int

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        self._close(state.watch)
        if not isinstance(answer, BeatAnswer) or answer.member != self.member:
            return []
        watch = state.watch
        watch.answered_ns = max(watch.answered_ns, self.asked_ns)
        missed.said(state, self.member, self.asked_ns, answer.owes, now_ns)
        return _heard(state, answer, answer.serving, now_ns, late=self._is_late(state, now_ns))

    def _is_late(self, state: State, now_ns: int) -> bool:
        """It may have been given before the member was cut off."""
        late_ns = state.watch.late_ns
        if self.member not in state.down or now_ns - self.asked_ns <= BEAT_DOWN_NS:
            return False
        return self.asked_ns < late_ns.setdefault(self.member, now_ns)

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        # Time tells: one lost beat says nothing.
        self._close(state.watch)
        return []

    def _close(self, watch: Watch) -> None:
        watch.open[self.member] -= 1
        if not watch.open[self.member]:
            del watch.open[self.member]


def agentless(state: State, question: Question, now_ns: int) -> None:
    """The machine that was asked this is there, its agent is not."""
    if isinstance(question, _Beat) and question.member in state.watch.heard_ns:
        state.watch.agentless_ns[question.member] = now_ns


def _heard(state: State, said: BeatCall | BeatAnswer, is_up: bool, now_ns: int, *, late: bool = False) -> Effects:
    """Another LB has spoken. late: a while ago; so it can be heard, and what it knew then is of no interest."""
    watch, others = state.watch, _others(state)
    if said.member not in others:
        return []
    effects = _fence(state, now_ns)
    watch.peer_ns, watch.ahead = now_ns, max(watch.ahead, said.generation)
    missed.heard_again(state, said.member, now_ns)
    if late:
        return effects
    watch.said_down[said.member] = frozenset(said.down)
    watch.returning.pop(said.member, None)
    if said.returning:
        watch.returning[said.member] = now_ns
        effects += _doubt_again(state, said.member, now_ns)
        # What it had asked before it knew that it was cut off may have come first.
        effects += _believe(state, [said.member] if said.member not in state.down else [], now_ns, up=False)
    elif is_up:
        _note_heard(watch, said.member, now_ns)
        effects += _believe(state, [said.member] if said.member in state.down else [], now_ns, up=True)
    news = set(said.down) & others - state.down - watch.suspects
    watched = set(_watched(state, others)) if news else set()
    adopted = news & watched - watch.met if not said.returning else set()
    watch.hearsay |= adopted
    effects += _believe(state, sorted(adopted), now_ns, up=False)
    for member in sorted(news - watched)[:WATCH_MAX]:
        if watch.heard_ns.get(member, 0) + BEAT_DOWN_NS <= now_ns:
            watch.suspects.add(member)
            effects += _ask(state, member, now_ns)
    return effects


def _doubt_again(state: State, member: int, now_ns: int) -> Effects:
    """It does not serve, but is there, so it is not given up: where nobody else can decide, it may be sent to."""
    if member in state.down:
        state.watch.asked_ns[member] = now_ns
    state.watch.given_up_before.discard(member)
    if member not in state.given_up:
        return []
    state.given_up.discard(member)
    return [state.configure()]


def _note_heard(watch: Watch, member: int, now_ns: int) -> None:
    watch.heard_ns[member] = now_ns
    watch.late_ns.pop(member, None)
    watch.agentless_ns.pop(member, None)
    watch.met.add(member)
    watch.hearsay.discard(member)
    watch.asked_ns.pop(member, None)
    watch.suspects.discard(member)


def _believe(state: State, members: list[int], now_ns: int, *, up: bool) -> Effects:
    """These have gone down, or come up: into the fast path with it."""
    if not members:
        return []
    state.watch.turned_ns.update(dict.fromkeys(members, now_ns))
    if up:
        state.down -= set(members)
        state.given_up -= set(members)
        state.watch.given_up_before -= set(members)
    else:
        state.down |= set(members)
        for member in members:
            missed.silent(state, member, state.watch.heard_ns.get(member, 0))
    what = "believed up" if up else "believed down"
    return [state.configure(), *(Trace(what, detail=f"member {member}") for member in members)]


def _skip_gap(watch: Watch, now_ns: int) -> None:
    """Time in which this LB did not run is nobody's silence; and no stamp is ahead of a clock that was set back."""
    gap_ns = max(now_ns - watch.ticked_ns - BEAT_NS, 0) if watch.ticked_ns else 0
    if gap_ns or now_ns < watch.ticked_ns:
        for stamps in (watch.heard_ns, watch.asked_ns, watch.spoke_ns, watch.agentless_ns):
            for member in stamps:
                stamps[member] = min(stamps[member] + gap_ns, now_ns)
        watch.beat_at_ns = min(watch.beat_at_ns, now_ns)
    watch.ticked_ns = now_ns


# --- Fence ------------------------------------------------------------------------------------------------------------
def _fence(state: State, now_ns: int) -> Effects:
    """Fence this LB or end it, by what has been heard until now."""
    watch = state.watch
    if not watch.ticked_ns:
        # It has just begun to listen.
        watch.peer_ns = watch.controller_ns = watch.doubt_ns = now_ns
        missed.started(state, _others(state), now_ns)
        if _others(state) and _others(state) <= state.down:
            missed.alone(state, _others(state))  # the agent before this one heard nobody
    why = _why_fenced(state, now_ns)
    why = why if why and state.own is not None and _others(state) else ""
    was_fenced = bool(watch.fenced_why)
    watch.fenced_why = why
    if bool(why) == was_fenced:
        return []
    if not why:
        for vs in state.vips.values():
            vs.look_at_ns = now_ns + MARGIN_NS
        return [Trace("fence ended")]
    watch.doubt_ns = watch.doubt_ns or now_ns
    watch.fenced_count += 1
    state.records_quiet = False
    effects: Effects = []
    count = 0
    for _, vs in sorted(state.vips.items()):
        slots = vs.slots.track_all(now_ns)
        count += len(slots)
        effects += state.write(vs, slots)
    return [*effects, Trace("fenced", slots=count, detail=why)]


def _why_fenced(state: State, now_ns: int) -> str:
    watch, newest = state.watch, state.newest
    if watch.controller_ns + FENCE_NS > now_ns:
        return ""
    if watch.peer_ns + FENCE_NS <= now_ns:
        return "neither the controller nor another LB has been heard for long, so all slots track"
    generation = newest.generation if newest is not None else 0
    if watch.ahead > generation:
        return f"generation {watch.ahead} is in force elsewhere and the controller is silent, so all slots track"
    return ""


def _end_doubt(state: State, others: set[int], now_ns: int) -> None:
    """Somebody who was asked since the doubt began has told what is in force, and it is in force here. (What a peer
    says unasked may have been on its way all the time.) The controller's word alone is enough where peers have had the
    time to speak, and none has."""
    watch = state.watch
    told = watch.answered_ns > watch.doubt_ns
    told |= others <= state.down and watch.doubt_ns < watch.told_ns <= now_ns - SYN_RETRY_NS - 2 * BEAT_NS
    if told and watch.ahead <= state.generation:
        watch.doubt_ns = 0
