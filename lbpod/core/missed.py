"""What a member has missed while it was silent: the records that the other replica of its slots has made alone.

A first packet is recorded by every replica on its way to the backend, and what promotes its record travels the same
way. Where one of them has just been cut off, and nobody knows yet, that is lost with the chain. So a flow may be open,
with ``current``, and one replica alone knows, or has seen what was said since. As long as the other one is silent, that
is all that is needed. When it is back, it is asked again like any replica, looks for the flow at base, and breaks it.
(What begins after a replica is known to be silent goes to base, and needs no record. So does what begins again: a SYN
that meets the record of one before, whose chain may have been lost, counts as a new one; ``lbpod/bpf/README.md``.)

So whoever hears a member again that it had believed to be down sends it what was recorded, or seen, in the slots that
the two share since it last heard it (PUT /v1/flows/missed); an agent that has just started, and knows nothing of
anybody's silence, sends everybody what was seen in the last LOST_NS: who was silent for longer is out of the ring.
During a ring change, too, with what two LBs share in either ring: it lasts for as long as the controller is dead. A
call that fails is made again. Where the receiver has another record of the flow, the one that was seen last counts:
the other is of an earlier connection with this five-tuple, or of a SYN that got no farther. But for one that began
alone, and has been answered: that one counts (``_began_alone``). (Ages travel, not times: every machine has its own
clock.)

**Until then the member does not serve.** An LB that has heard nobody for a while, and hears somebody again, says of
itself that it is not serving, in its beats (so the others go on using the other replicas) and on /readyz, until each of
the others has said in answer to a beat of after its return that nothing is owed to it. An agent that is away just then
says nothing: the LB waits for it, for LOST_NS at most. (Before, what it had missed reached it some tenths of a second
late, and where the agent of the other replica was killed in those, seconds late: half of the connections that still
broke.) Who had been silent for a while when the LB heard the last of the others has most likely died before, and is
waited for as long as an answer takes: one LB destroyed and the agent of another killed is all that it takes to hear
nobody, and the one that is left refused to serve for LOST_NS then. An LB that only some of the others could not hear
goes on serving: agents restart all the time, and nobody would be left.

**What a lost answer to a settle has left open is asked first** (``owed``), for OWED_HOLD_NS at most. What begins after
the list, and before the member is used again, is in no list, and need not be, for it goes to base; but a backup that
has agreed, and could not say so, has another base than the owner.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lbpod.core import forget
from lbpod.core.flows import flows_from, groups, ids_from
from lbpod.core.keeper_state import Answer, Effects, Question, State
from lbpod.core.layout import RECORD
from lbpod.core.limits import BATCH_MAX, BEAT_DOWN_NS, LOST_NS, MARGIN_NS, OWED_HOLD_NS, RETRY_NS
from lbpod.core.listing import Listing
from lbpod.core.messages import (
    Ask,
    DumpRecords,
    MissedAnswer,
    MissedCall,
    PutRecords,
    RecordsDumped,
    RecordsPut,
    Refuse,
    Reply,
    Trace,
)
from lbpod.core.ownership import backups, owners
from lbpod.core.transition import base_of, current_of, is_settling, is_tracking, means_something, round_of

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

BUSY = 503
_MS_NS = 1_000_000
_AGE_MAX = 0xFFFF_FFFF


# --- As the one who was there -----------------------------------------------------------------------------------------
def silent(state: State, member: int, heard_ns: int) -> None:
    """This member was last heard then, and is believed to be down from now on."""
    state.watch.missed[member] = min(heard_ns, state.watch.missed.get(member, heard_ns))


def started(state: State, members: set[int], now_ns: int) -> None:
    """This agent has just begun to listen: any of these may have been silent."""
    for member in members:
        silent(state, member, now_ns - LOST_NS)


def owes(state: State, member: int) -> bool:
    """It has yet to be sent something."""
    return member in state.watch.missed or member in state.watch.telling


def tick(state: State, now_ns: int) -> Effects:
    """Look for what is to be sent to those who can be heard again."""
    watch = state.watch
    _catch_up(state, now_ns)
    watch.returning = {member: at_ns for member, at_ns in watch.returning.items() if at_ns + BEAT_DOWN_NS > now_ns}
    here = {member for member in watch.missed if member not in state.down or member in watch.returning}
    here -= _held(state, here & watch.returning.keys(), now_ns)
    members = here - watch.telling.keys()  # one list at a time: what has failed of it comes with the next
    due = members and now_ns >= state.watch.missed_at_ns and state.has_room() and state.own is not None
    if not due:
        return []
    watch.missed_at_ns = now_ns + RETRY_NS
    since_ns = {member: watch.missed.pop(member) for member in sorted(members)}
    watch.telling.update(since_ns.keys())
    return [DumpRecords(state.open(_Dumped(since_ns), now_ns))]


def _held(state: State, members: set[int], now_ns: int) -> set[int]:
    """Those that this LB does not list yet: it can ask them first what is base of slots that it owns (``owed``)."""
    held_ns = state.watch.held_ns
    unknown = {member for member in members if state.is_calm and _is_base_unknown(state, member)}
    for member in held_ns.keys() - unknown:
        del held_ns[member]
    return {member for member in unknown if held_ns.setdefault(member, now_ns) + OWED_HOLD_NS > now_ns}


def _is_base_unknown(state: State, backup: int) -> bool:
    """An answer to a settle was lost between the two."""
    if state.own is None:
        return False
    shared = (state.owner == state.member) & (state.backup == backup)
    tracking = [vs for vs in state.vips.values() if vs.slots.track is not None]
    return any((is_settling(vs.slots.words) & shared).any() or shared[vs.lifted].any() for vs in tracking)


@dataclass(frozen=True, slots=True, eq=False)
class _Dumped(Listing):
    """All records. since_ns: by member, what was seen since then it may have missed."""

    since_ns: dict[int, int]

    def some(self, state: State, listed: RecordsDumped, now_ns: int) -> Effects:
        effects: Effects = []
        for member, since_ns in self.since_ns.items():
            places = _shared(state, member, since_ns, listed)
            effects += _send(state, member, since_ns, listed, places, now_ns)
        return effects

    def ended(self, state: State, now_ns: int) -> Effects:
        for member in self.since_ns:
            _told(state, member)
        return []

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        for member, since_ns in self.since_ns.items():
            silent(state, member, since_ns)
            _told(state, member)
        return []


def _told(state: State, member: int) -> None:
    """A question or a call on the way to this member's being told is over."""
    state.watch.telling -= Counter([member])


def _shared(state: State, member: int, since_ns: int, listed: RecordsDumped) -> npt.NDArray[np.intp]:
    """Which of these records were seen since, mean something, and are of slots that this LB shares with the member."""
    vips = listed.flows["vip"]
    meant = state.facts.has(vips) & (listed.records["seen_ns"].astype(np.uint64) >= np.uint64(max(since_ns, 0)))
    meant &= state.vip_of[forget.backend_ids(state, listed.records)] == vips
    places = np.flatnonzero(meant)
    slots = state.facts.slots(listed.flows[places])
    words, _ = state.words(vips[places], slots)
    ours = _is_shared(state, member, slots) & is_tracking(words) & means_something(words, listed.records[places])
    found: npt.NDArray[np.intp] = places[ours]
    return found


def _is_shared(state: State, member: int, slots: U32) -> Bools:
    """(n,): this LB and the member are replicas of the slot, during a ring change in either ring."""
    both = []
    for each in (state.member, member):
        has = np.zeros(len(slots), dtype=np.bool_)
        for ring in (state.own, state.next, state.prev):
            if ring is not None:
                has |= (owners(ring[slots]) == each) | (backups(ring[slots]) == each)
        both.append(has)
    return both[0] & both[1]


def _send(
    state: State, member: int, since_ns: int, listed: RecordsDumped, places: npt.NDArray[np.intp], now_ns: int
) -> Effects:
    """In batches, as far as there is room; what finds none is looked for again."""
    effects: Effects = []
    node = state.node_of_member.get(member, 0)
    if not node:
        return []
    ages_ms = (now_ns - np.minimum(listed.records["seen_ns"].astype(np.int64), now_ns)) // _MS_NS
    for first in range(0, len(places), BATCH_MAX):
        if not state.has_room(node):
            silent(state, member, since_ns)
            break
        batch = places[first : first + BATCH_MAX]
        call = MissedCall(
            member=state.member,
            flows=listed.flows[batch].tobytes(),
            backends=listed.records["backend"][batch].astype("<u4").tobytes(),
            ages_ms=np.minimum(ages_ms[batch], _AGE_MAX).astype("<u4").tobytes(),
            full_count=int(np.count_nonzero(batch < listed.full_count)),
        )
        state.watch.telling[member] += 1
        effects.append(Ask(state.open(_Sent(member, since_ns), now_ns, node), node, call))
    return [*effects, *([Trace("sent what was missed", detail=f"member {member}")] if effects else [])]


@dataclass(frozen=True, slots=True, eq=False)
class _Sent(Question):
    """A batch is on its way."""

    member: int
    since_ns: int

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        _told(state, self.member)
        return []

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        silent(state, self.member, self.since_ns)
        _told(state, self.member)
        return []


# --- As the one who was silent ----------------------------------------------------------------------------------------
def alone(state: State, others: set[int]) -> None:
    """This LB hears nobody: whatever the others record from now on, it misses."""
    watch = state.watch
    heard_ns = {member: watch.heard_ns.get(member, 0) for member in others}
    last_ns = max(heard_ns.values(), default=0)
    watch.owed_by, watch.back_ns = set(others), 0
    watch.long_silent = {member for member, at_ns in heard_ns.items() if at_ns + BEAT_DOWN_NS < last_ns}


def heard_again(state: State, member: int, now_ns: int) -> None:
    """One of the others speaks."""
    watch = state.watch
    watch.long_silent.discard(member)
    if watch.owed_by and not watch.back_ns:
        watch.back_ns = now_ns


def said(state: State, member: int, asked_ns: int, is_owed: bool, now_ns: int) -> None:
    """Its answer to a beat of then. What was asked before this LB was back says nothing."""
    watch = state.watch
    if watch.back_ns and asked_ns >= watch.back_ns and not is_owed:
        watch.owed_by.discard(member)
        _catch_up(state, now_ns)


def is_returning(state: State) -> bool:
    """What it says to others: whoever hears it at all is heard by it again."""
    return bool(state.watch.owed_by)


def is_catching_up(state: State) -> bool:
    """It is back, and may not know yet what others have recorded: it does not serve."""
    return bool(state.watch.back_ns)


def _catch_up(state: State, now_ns: int) -> None:
    """Is that over?"""
    watch = state.watch
    if watch.back_ns and watch.back_ns + BEAT_DOWN_NS <= now_ns:
        watch.owed_by -= watch.long_silent
    if watch.back_ns and (not watch.owed_by or watch.back_ns + LOST_NS <= now_ns):
        watch.owed_by, watch.back_ns = set(), 0


def received(state: State, request: int, call: MissedCall, now_ns: int) -> Effects:
    """PUT /v1/flows/missed: record what is of slots that track here and that this LB shares with the caller."""
    if not state.has_room() or state.own is None:
        return [Refuse(request, BUSY, f"{state.node_name} has too many questions open; ask again later")]
    flows, backends = flows_from(call.flows), ids_from(call.backends)
    known = state.facts.has(flows["vip"])
    slots = np.zeros(len(flows), dtype=np.uint32)
    slots[known] = state.facts.slots(flows[known])
    words, held = state.words(flows["vip"], slots)
    fits = known & held & is_tracking(words) & (state.vip_of[backends] == flows["vip"])
    fits &= _is_shared(state, call.member, slots)
    if not fits.any():
        return [Reply(request, MissedAnswer(0))]
    records = np.zeros(int(fits.sum()), dtype=RECORD)
    # What is kept counts as seen now, which is the safe side.
    records["backend"], records["round"], records["seen_ns"] = backends[fits], round_of(words[fits]), now_ns
    ages_ns = ids_from(call.ages_ms)[fits].astype(np.uint64) * np.uint64(_MS_NS)
    seen_ns = np.uint64(now_ns) - np.minimum(ages_ns, np.uint64(now_ns))
    full = int(fits[: call.full_count].sum())
    alone = _began_alone(words[fits], backends[fits]) & ~state.facts.unannounced[flows["vip"][fits]]
    alone[full:] = False
    seen_ns[alone] = now_ns + MARGIN_NS + 1  # later than anything that is here
    effects = _disagree(state, flows["vip"][fits], slots[fits], backends[fits])
    token = state.open(_Put(request), now_ns)
    return [*effects, PutRecords(token, flows[fits], records, full, seen_ns)]


def _began_alone(words: U64, backends: U32) -> Bools:
    """(n,): which full records are of base, where that is not current. Such a flow began at a replica that knew that it
    was alone: its SYN went straight to base, and the client has answered. What this LB has of it at current is of a SYN
    that was lost with its chain, though a packet of the flow may have met that here since, and have promoted it."""
    alone: Bools = (backends == base_of(words)) & (base_of(words) != current_of(words))
    return alone


def _disagree(state: State, vips: U32, slots: U32, backends: U32) -> Effects:
    """An owner that has not heard that this LB agreed, nor anything of it since, has begun flows at its own base: they
    are live, though this LB has said that all live flows belong to current."""
    words, _ = state.words(vips, slots)
    elsewhere = backends != current_of(words)
    effects: Effects = []
    for vip_id, places in groups(vips[elsewhere]):
        vs = state.vips[vip_id]
        effects += state.write(vs, vs.slots.disagree(np.unique(slots[elsewhere][places])))
    return effects


@dataclass(frozen=True, slots=True, eq=False)
class _Put(Question):
    """They are being written; the caller waits."""

    request: int

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        if not isinstance(answer, RecordsPut):
            return self.failed(state, "the records could not be written", now_ns)
        state.records_quiet = False
        return [Reply(self.request, MissedAnswer(answer.taken))]

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        return [Refuse(self.request, BUSY, f"{state.node_name}: {reason}")]
