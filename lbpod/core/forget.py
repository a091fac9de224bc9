"""When records go: by agreement of owner and backup, with the slot that has settled, or with the backend that has died.

A record is the only thing that says where a flow belongs that is not at base. Losing one at the owner alone breaks
the flow at once; losing one at the backup alone breaks it when the owner is next believed to be down. So (DESIGN:
section 3):

- **by agreement**: the owner's clock starts it, for records of tracking slots of which it has seen nothing for the
  window (``flows``: longer than idle, because a lease may have kept the flow's packets away). It asks the backup in
  batches; the backup looks, deletes its own where it has seen nothing either, and agrees; the owner looks once more,
  and deletes what is still silent. **A backup never starts it.** A ring of one forgets alone;
- **with the slot**: when a slot turns steady, all its flows belong to ``current``, and its records mean nothing any
  more. They must not mean something again: a client may open a new flow with an old five-tuple while the slot is steady
  (nobody records that), and when the slot tracks the next time, the old record would move it, or two replicas would
  disagree about it. A record's round sees to that at once; but rounds come round (``layout.SLOT_ROUND_MASK``), the room
  is needed, and a backup that has agreed is still in the old round (what does not name ``current`` is void there, too:
  ``layout.SLOT_AGREED``). So what was seen last before the slot settled is dropped whenever it is found. Every replica
  does so by itself, at three moments: when it turns the slot steady; as backup already when it agrees (the word that it
  is steady may never come; those that name ``current`` stay, for its base may yet be set to that of an owner that has
  not heard of it); and when a steady slot begins to track (what came through a chain in between, from an LB that
  tracked already, or still, names what is ``base`` now: it goes, but for UDP and ClientIP, whose base may move later);
- **with the ring**: nothing is forgotten while a ring change is under way, for all of it is being handed over. What an
  LB is no replica of any more (or has come to by a chain that was under way) goes with the next list, and before the
  next ring change begins (``ring.stage``);
- **with the backend**: records of dead backends are void for the fast path already. They go before the id may mean
  another backend (``change.let_ids_rest``), but not at once: they say of a flow's last packets that they are its last,
  and nobody gets a lease for them (``resolve``), which the next connection with this five-tuple would meet.

All of them work on a list of all records, made every FORGET_SCAN_NS while there can be any, and PURGE_NS after a
settle.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lbpod.core.flows import flows_from, groups, over
from lbpod.core.keeper_state import Answer, Effects, Question, State
from lbpod.core.layout import RECORD_MISSING
from lbpod.core.limits import BATCH_MAX, ENDED_NS, FORGET_SCAN_NS, MEMBER_NONE, PURGE_NS, SLOT_COUNT
from lbpod.core.listing import Listing
from lbpod.core.messages import (
    Ask,
    DropRecords,
    DumpRecords,
    ForgetAnswer,
    ForgetCall,
    LookRecords,
    RecordsDumped,
    RecordsLooked,
    Refuse,
    Reply,
    RingStep,
)
from lbpod.core.transition import is_tracking, means_something

U32 = npt.NDArray[np.uint32]
Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.void]

BUSY = 503


def note_settled(state: State, vip: int, slots: U32, now_ns: int, kept: U32 | None = None) -> None:
    """Until now no live flow of these slots of a VIP had another backend than ``current``: their records go with the
    next list. (Not those of this very tick of the clock: a commit may come within it.)

    kept: (n,) backends whose records stay. As long as the slot tracks, its base may be set to another replica's.
    """
    if len(slots):
        state.purge.setdefault(vip, np.zeros(SLOT_COUNT, dtype=np.uint64))[slots] = now_ns - 1
        state.purge_kept.setdefault(vip, np.zeros(SLOT_COUNT, dtype=np.uint32))[slots] = 0 if kept is None else kept


def left_over(state: State, vips: U32, slots: U32, records: Rows) -> Bools:
    """(n,): which records were seen last before their slot settled, and say nothing any more."""
    found = np.zeros(len(vips), dtype=np.bool_)
    seen, backends = records["seen_ns"].astype(np.uint64), records["backend"]
    for vip, settled in sorted(state.purge.items()):
        ours = np.flatnonzero(vips == vip)
        at, kept = settled[slots[ours]], state.purge_kept[vip][slots[ours]]
        found[ours] = (at != 0) & (seen[ours] <= at) & ((kept == 0) | (kept != backends[ours]))
    return found


def tick(state: State, now_ns: int) -> Effects:
    """Ask for a list of all records where one is due."""
    if state.dumps.is_open or not state.has_room():
        return []
    unrested = bool(state.resting) and state.died_at_ns + ENDED_NS >= state.dumps.done_ns
    forget = now_ns >= state.dumps.forget_at_ns and (not state.records_quiet or unrested)
    purge = now_ns >= state.dumps.at_ns and bool(state.purge)
    if not forget and not purge:
        return []
    if forget:
        state.dumps.forget_at_ns = now_ns + FORGET_SCAN_NS
    state.dumps.is_open, state.dumps.seen_any = True, False
    return [DumpRecords(state.open(_Dumped(now_ns, forget), now_ns))]


def drop_failed(state: State) -> None:
    """A DropRecords was not carried out: what it stood for is still to be done."""
    for vip, settled in state.purging.items():
        state.purge[vip] = np.maximum(settled, state.purge.get(vip, settled))
    state.purging = {}
    state.dumps.done_ns = 0
    state.foreign_due = True


def let_go(state: State) -> None:
    """What the last DropRecords stood for is done: had it failed, that would have been said before anything else."""
    state.purging = {}
    state.purge_kept = {vip: kept for vip, kept in state.purge_kept.items() if vip in state.purge}


# --- A list of all records --------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Dumped(Listing):
    """All records, for everything that waits for a list."""

    asked_at_ns: int
    forget: bool

    def some(self, state: State, listed: RecordsDumped, now_ns: int) -> Effects:
        flows, records = listed.flows, listed.records
        state.dumps.seen_any |= bool(len(flows))
        vips = flows["vip"]
        slots, old = _slots_and_old(state, flows, records, now_ns)
        words, held = state.words(vips, slots)
        tracking = is_tracking(words)
        drop = ~held | ((state.vip_of[backend_ids(state, records)] != vips) & ~_just_died(state, records, now_ns))
        drop |= left_over(state, vips, slots, records) | (~tracking & old) | ~means_something(words, records)
        if state.ring_step is RingStep.NONE:
            drop |= foreign(state, flows)
        effects: Effects = [DropRecords(flows[drop], records[drop])] if drop.any() else []
        if self.forget and state.ring_step is RingStep.NONE:
            silent = np.flatnonzero(~drop & tracking & old & (state.owner[slots] == state.member))
            effects += _ask(state, flows[silent], slots[silent], now_ns)
        return effects

    def ended(self, state: State, now_ns: int) -> Effects:
        state.dumps.is_open, state.dumps.at_ns = False, now_ns + PURGE_NS
        state.dumps.done_ns = self.asked_at_ns
        state.records_quiet = not state.dumps.seen_any and not any(vs.slots.track for vs in state.vips.values())
        self._take_from_purge(state)
        return []

    def _take_from_purge(self, state: State) -> None:
        """What had settled when the list was asked for is done with it."""
        state.purging = {}
        for vip, settled in sorted(state.purge.items()):
            done = settled <= np.uint64(self.asked_at_ns)
            state.purging[vip] = np.where(done, settled, np.uint64(0))
            settled[done] = 0
            if not settled.any():
                del state.purge[vip]

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        state.dumps.is_open, state.dumps.at_ns = False, now_ns + PURGE_NS
        return []


def foreign(state: State, flows: Rows) -> Bools:
    """Which of these flows are of slots of which this LB is no replica: an earlier ring has left them."""
    known = state.facts.has(flows["vip"])
    found = ~known
    found[known] = ~state.is_replica(state.facts.slots(flows[known]))
    return found


def _just_died(state: State, records: Rows, now_ns: int) -> Bools:
    """(n,): records of backends that have died less than ENDED_NS ago."""
    lately = [number for number, (_, died_at_ns) in state.resting.items() if died_at_ns + ENDED_NS >= now_ns]
    found: Bools = np.isin(records["backend"], lately)
    return found


def backend_ids(state: State, records: Rows) -> U32:
    """Backend ids of records; 0 for what is no id."""
    backends = records["backend"]
    return np.asarray(np.where(backends < len(state.vip_of), backends, 0), dtype=np.uint32)


def _slots_and_old(state: State, flows: Rows, records: Rows, now_ns: int) -> tuple[U32, Bools]:
    """Slot of each flow (0 where its VIP is unknown), and which were seen no later than the window ago (or are not
    there)."""
    known = state.facts.has(flows["vip"])
    slots = np.zeros(len(flows), dtype=np.uint32)
    slots[known] = state.facts.slots(flows[known])
    window = state.facts.window_ns[np.where(known, flows["vip"], 0)]
    seen = records["seen_ns"].astype(np.uint64)
    if state.replicas_changed_ns is not None:  # whoever was a replica before may have seen what we have not
        seen = np.maximum(seen, state.replicas_changed_ns[slots])
    old = over(seen, window, now_ns)
    return slots, known & (old | (records["round"] == RECORD_MISSING))


# --- As owner ---------------------------------------------------------------------------------------------------------
def _ask(state: State, flows: Rows, slots: U32, now_ns: int) -> Effects:
    """Ask the backups of these silent flows. What finds no room now is found again by the next scan."""
    effects: Effects = []
    for backup, places in groups(state.backup[slots]):
        node = state.node_of_member.get(backup, 0)
        if backup in state.down or (backup != MEMBER_NONE and not node):
            continue
        for first in range(0, len(places), BATCH_MAX):
            batch = flows[places[first : first + BATCH_MAX]]
            if not state.has_room(node):
                break
            if backup == MEMBER_NONE:
                effects.append(LookRecords(state.open(_LookedAgain(batch), now_ns), batch))
            else:
                call = ForgetCall(state.member, batch.tobytes())
                effects.append(Ask(state.open(_Asked(batch), now_ns, node), node, call))
    return effects


@dataclass(frozen=True, slots=True, eq=False)
class _Asked(Question):
    """The backup was asked whether it has seen anything of these flows."""

    flows: Rows

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        if not isinstance(answer, ForgetAnswer) or len(answer.agreed) != len(self.flows):
            return []
        agreed = self.flows[np.frombuffer(answer.agreed, dtype=np.uint8) == 1]
        if not len(agreed):
            return []
        return [LookRecords(state.open(_LookedAgain(agreed), now_ns), agreed)]

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        return []


@dataclass(frozen=True, slots=True, eq=False)
class _LookedAgain(Question):
    """The backup has agreed (or there is none). What the owner has seen meanwhile stays."""

    flows: Rows

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        if not isinstance(answer, RecordsLooked) or len(answer.records) != len(self.flows):
            return []
        if state.ring_step is not RingStep.NONE:  # they are being handed over
            return []
        slots, old = _slots_and_old(state, self.flows, answer.records, now_ns)
        old &= (answer.records["round"] != RECORD_MISSING) & (state.owner[slots] == state.member)
        return [DropRecords(self.flows[old], answer.records[old])] if old.any() else []

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        return []


# --- As backup --------------------------------------------------------------------------------------------------------
def asked(state: State, request: int, call: ForgetCall, now_ns: int) -> Effects:
    """POST /v1/flows/forget: look first."""
    if not state.has_room():
        return [Refuse(request, BUSY, f"{state.node_name} has too many questions open; ask again later")]
    flows = flows_from(call.flows)
    return [LookRecords(state.open(_Looked(request, call.member, flows), now_ns), flows)]


@dataclass(frozen=True, slots=True, eq=False)
class _Looked(Question):
    """The owner waits for what this backup has seen of these flows."""

    request: int
    owner: int
    flows: Rows

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        if not isinstance(answer, RecordsLooked) or len(answer.records) != len(self.flows):
            return self.failed(state, "the records could not be read", now_ns)
        if state.ring_step is not RingStep.NONE:
            return self.failed(state, "the ring is changing", now_ns)
        slots, old = _slots_and_old(state, self.flows, answer.records, now_ns)
        agreed = old & (state.backup[slots] == state.member) & (state.owner[slots] == self.owner)
        there = agreed & (answer.records["round"] != RECORD_MISSING)
        effects: Effects = [DropRecords(self.flows[there], answer.records[there])] if there.any() else []
        return [*effects, Reply(self.request, ForgetAnswer(agreed.astype(np.uint8).tobytes()))]

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        return [Refuse(self.request, BUSY, f"{state.node_name} cannot tell: {reason}")]
