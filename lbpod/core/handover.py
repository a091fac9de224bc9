"""The handover of a ring change: slot states and records go to those who will be replicas, page by page.

**Who sends what** (DESIGN: section 4). Of every slot whose owner or backup will be another, the *first live replica*
(the owner, or the backup where the owner is lost) sends

- the slot's word (tracking or steady, base, SETTLING) to every other replica to come, *also to one that is a replica
  already*: owner and backup may differ in base while an answer to a settle is outstanding, and after this they do
  not. That answer, should it still come, says nothing more (``settle.void_rounds``);
- its records, full and embryonic, to those that are no replica yet; to all others, too, where it will be none itself:
  what it began while it heard no other nobody else has (``oracle``, FIRST_ALONE). A join costs nothing more for it; who
  leaves sends twice as much.

Where both are lost, the lowest live member sends words alone: flows of tracking slots fall back to base.

What is sent does not move meanwhile: nothing settles or is forgotten during a ring change, and what is recorded anew
reaches the receivers by the chain, for all have prepared. So a list of records that is taken once is enough, and pages
may come twice and in any order. It is sent while it is read, a slice at a time: what is waited for is the receiver.

**Rounds.** Where a member is lost, who is first live changes, so all of it is done again (a round), with the members
that are lost named by the controller: everybody must agree about who is first. HANDED says: all that I had to send in
this round has arrived.

**Bounds.** HANDOVER_RECORDS_MAX records a page, HANDOVER_VIPS_MAX steady VIPs (with 400 in one the receiver took longer
over it than the sender waits: it came again and again, and nobody ever joined), HANDOVER_PAGES_MAX pages on their way
to one receiver, and no more is listed where as many wait to be sent. A page that fails is sent again with the next tick
or answer, for as long as the round lasts: a receiver that never answers is the controller's to give up. (An embryonic
record that is not listed yet may be evicted meanwhile, as anywhere.)

**A receiver without room** says how many it took. What found none is kept among the embryonic records, where it may be
evicted, and is counted: waiting would not help, since nothing is forgotten meanwhile.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lbpod.core import change, forget, owed, settle
from lbpod.core.flows import flows_from, slots_bytes, slots_from
from lbpod.core.keeper_state import Answer, Effects, Handover, Question, State
from lbpod.core.layout import RECORD
from lbpod.core.limits import (
    HANDOVER_HOLD_NS,
    HANDOVER_PAGES_MAX,
    HANDOVER_RECORDS_MAX,
    HANDOVER_VIPS_MAX,
    MEMBER_NONE,
    SLOT_COUNT,
)
from lbpod.core.listing import Listing
from lbpod.core.messages import (
    Ask,
    DumpRecords,
    HandoverCall,
    PutRecords,
    RecordsDumped,
    RecordsPut,
    Refuse,
    Reply,
    RingStep,
    StateAnswer,
    StateCall,
    Trace,
)
from lbpod.core.ownership import backups, owners
from lbpod.core.transition import is_tracking, means_something, round_of

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.void]

BUSY = 503


# --- The controller's call --------------------------------------------------------------------------------------------
def wanted(state: State, request: int, call: HandoverCall, now_ns: int) -> Effects:
    """POST /v1/ring/handover: answered when all has arrived, or after HANDOVER_HOLD_NS with how far this LB is."""
    plan, where = state.prepared, state.node_name
    if state.ring_step is RingStep.SWITCHED and state.generation == call.generation:
        return [Reply(request, state.status())]  # a call that was late
    if plan is None or plan.generation != call.generation or plan.digest != call.digest or not plan.changes_ring:
        sentence = f"{where} has not prepared a ring change of generation {call.generation} with these contents"
        return [Refuse(request, change.CONFLICT, sentence)]
    running = state.handover
    newest = max(state.ring_round, running.round if running is not None else 0)
    if call.round < newest:
        sentence = f"round {call.round} of the handover is over on {where}, which is in round {newest}"
        return [Refuse(request, change.CONFLICT, sentence)]
    if state.ring_step is RingStep.HANDED and call.round == state.ring_round:
        return [Reply(request, state.status())]
    if running is not None and running.round == call.round:
        running.waiting.append((request, now_ns))
        return []
    return _begin(state, request, call, now_ns)


def _begin(state: State, request: int, call: HandoverCall, now_ns: int) -> Effects:
    replies: list[tuple[int, int]] = []
    if state.handover is not None:
        replies, state.handover.waiting = [(waiting, now_ns) for waiting, _ in state.handover.waiting], []
    handover = Handover(call.generation, call.round, frozenset(call.lost), waiting=[*replies, (request, now_ns)])
    state.handover, state.ring_step, state.ring_round = handover, RingStep.PREPARED, 0
    settle.void_rounds(state, now_ns)
    shares = _shares(state, handover.lost)
    if not shares:
        return _finished(state, handover)
    handover.words = {member: _words(state, share) for member, share in shares.items()}
    if not any(share.fresh.any() for share in shares.values()):
        return _send(state, handover, now_ns)
    handover.looking = True
    return [DumpRecords(state.open(_Listed(handover, shares), now_ns))]


# --- Shares -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, eq=False)
class _Share:
    """What one receiver gets from this LB."""

    covered: U32
    """Slots, ascending, whose words it gets."""
    fresh: Bools
    """(SLOT_COUNT,): slots of whose flows it has no records, or may lack some."""


def senders(state: State, lost: frozenset[int]) -> tuple[U16, Bools]:
    """Member that hands each slot over, and whether it has its records; MEMBER_NONE where nobody has to."""
    assert state.own is not None and state.next is not None and state.prepared is not None, "a ring change is prepared"
    moved = state.own != state.next
    gone = np.array(sorted(lost), dtype=np.uint16)
    first = np.full(SLOT_COUNT, MEMBER_NONE, dtype=np.uint16)
    for members in (state.backup, state.owner):
        fits = (members != MEMBER_NONE) & ~np.isin(members, gone)
        first[fits] = members[fits]
    knows = first != MEMBER_NONE
    alive = [member for member in state.prepared.snapshot.ring.before if member not in lost]
    first[~knows] = min(alive, default=MEMBER_NONE)
    first[~moved] = MEMBER_NONE
    return first, knows


def _shares(state: State, lost: frozenset[int]) -> dict[int, _Share]:
    """Receiver -> its share of what this LB has to hand over."""
    if state.own is None or state.next is None:
        return {}
    first, knows = senders(state, lost)
    mine = first == state.member
    stays = (owners(state.next) == state.member) | (backups(state.next) == state.member)
    shares: dict[int, _Share] = {}
    for member in np.union1d(owners(state.next[mine]), backups(state.next[mine])).tolist():
        if member in {state.member, MEMBER_NONE} or member in lost:
            continue
        gets = mine & ((owners(state.next) == member) | (backups(state.next) == member))
        fresh = gets & knows & (~stays | (state.owner != member) & (state.backup != member))
        shares[member] = _Share(np.flatnonzero(gets).astype(np.uint32), fresh)
    return shares


def _words(state: State, share: _Share) -> Iterator[StateCall]:
    """Pages with the words of the slots of a share."""
    page = _page(state, share)
    steady: list[int] = []
    for vip_id, vs in sorted(state.vips.items()):
        tracking = share.covered[is_tracking(vs.slots.at(share.covered))]
        if not len(tracking):
            steady.append(vip_id)
            continue
        words = vs.slots.at(tracking).astype("<u8").tobytes()
        yield page(vip=vip_id, tracking=slots_bytes(tracking), words=words)
    for first in range(0, max(len(steady), 1), HANDOVER_VIPS_MAX):
        yield page(steady_vips=np.array(steady[first : first + HANDOVER_VIPS_MAX], dtype="<u4").tobytes())


def _records(state: State, share: _Share, listed: RecordsDumped, slots: U32) -> Iterator[StateCall]:
    """Pages with the records of the slots of a share. slots: of each flow, SLOT_COUNT where its VIP is unknown."""
    page = _page(state, share)
    places = np.flatnonzero(np.append(share.fresh, False)[slots])
    for first in range(0, len(places), HANDOVER_RECORDS_MAX):
        some = places[first : first + HANDOVER_RECORDS_MAX]
        flows, records = listed.flows[some].tobytes(), listed.records[some].tobytes()
        yield page(flows=flows, records=records, full_count=int((some < listed.full_count).sum()))


class _page:  # noqa: N801  (a function that knows its share)
    """Makes pages of one share."""

    def __init__(self, state: State, share: _Share) -> None:
        assert state.prepared is not None and state.handover is not None, "pages belong to a handover"
        self._head = (state.member, state.prepared.generation, state.handover.round, slots_bytes(share.covered))

    def __call__(
        self,
        vip: int = 0,
        tracking: bytes = b"",
        words: bytes = b"",
        steady_vips: bytes = b"",
        flows: bytes = b"",
        records: bytes = b"",
        full_count: int = 0,
    ) -> StateCall:
        return StateCall(*self._head, vip, tracking, words, steady_vips, flows, records, full_count)


@dataclass(frozen=True, slots=True, eq=False)
class _Listed(Listing):
    """All records of this LB."""

    handover: Handover
    shares: dict[int, _Share]

    def some(self, state: State, listed: RecordsDumped, now_ns: int) -> Effects:
        if state.handover is not self.handover:
            return []
        self.handover.looking = False
        known = state.facts.has(listed.flows["vip"])
        slots = np.full(len(listed.flows), SLOT_COUNT, dtype=np.uint32)
        slots[known] = state.facts.slots(listed.flows[known])
        slots[known & ~_means_something(state, listed, slots, known)] = SLOT_COUNT
        for member, share in self.shares.items():
            pages = list(_records(state, share, listed, slots))
            if pages:
                self.handover.records.setdefault(member, deque()).extend(pages)
        return _send(state, self.handover, now_ns)

    def more(self, state: State, cursor: tuple[bool, int], now_ns: int) -> Effects:
        self.handover.rest, self.handover.cursor = self, cursor
        return []

    def ended(self, state: State, now_ns: int) -> Effects:
        return []  # all is on its way, or done

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        if state.handover is self.handover and self.handover.cursor is not None:
            self.handover.rest, self.handover.looking = self, False  # with the next tick
            return []
        if state.handover is self.handover:
            state.handover = None  # the controller calls again
        return [Refuse(request, BUSY, f"{state.node_name}: {reason}") for request, _ in self.handover.waiting]


def _means_something(state: State, listed: RecordsDumped, slots: U32, known: Bools) -> Bools:
    """Which records are of slots that track, and were not only left over by a settle."""
    means = known.copy()
    places = np.flatnonzero(known)
    vips = listed.flows["vip"][places]
    words, _ = state.words(vips, slots[places])
    left = forget.left_over(state, vips, slots[places], listed.records[places])
    left |= ~means_something(words, listed.records[places])
    means[places] = (
        is_tracking(words) & ~left & (state.vip_of[forget.backend_ids(state, listed.records[places])] == vips)
    )
    return means


# --- Sending ----------------------------------------------------------------------------------------------------------
def _send(state: State, handover: Handover, now_ns: int) -> Effects:
    """As many pages as may be under way, and the next slice of the list where few wait; the end, where all have
    arrived."""
    effects: Effects = []
    again, handover.again = handover.again, []
    for member, page in again:
        effects += _send_page(state, handover, member, page, now_ns)
    for member in sorted(handover.words.keys() | handover.records.keys()):
        while handover.under_way.get(member, 0) < HANDOVER_PAGES_MAX and _node(state, member):
            following = _next_page(handover, member)
            if following is None:
                break
            effects += _send_page(state, handover, member, following, now_ns)
    is_short = all(len(pages) < HANDOVER_PAGES_MAX for pages in handover.records.values())
    if handover.rest is not None and is_short and state.has_room():
        listing, handover.rest, handover.looking = handover.rest, None, True
        return [*effects, DumpRecords(state.open(listing, now_ns), handover.cursor)]
    is_listed = not handover.looking and handover.rest is None
    if is_listed and not handover.words and not handover.records and not handover.again and not handover.under_way:
        return [*effects, *_finished(state, handover)]
    return effects


def _next_page(handover: Handover, member: int) -> StateCall | None:
    """Words first; None: nothing waits to be sent to this receiver."""
    if member in handover.words:
        page = next(handover.words[member], None)
        if page is not None:
            return page
        del handover.words[member]
    if member not in handover.records:
        return None
    following = handover.records[member].popleft()
    if not handover.records[member]:
        del handover.records[member]
    return following


def _node(state: State, member: int) -> int:
    """Node of a receiver that may be asked now; 0: not now."""
    node = state.node_of_member.get(member, 0)
    return node if node and state.has_room(node) else 0


def _send_page(state: State, handover: Handover, member: int, page: StateCall, now_ns: int) -> Effects:
    node = _node(state, member)
    if not node or handover.under_way.get(member, 0) >= HANDOVER_PAGES_MAX:
        handover.again.append((member, page))
        return []
    handover.under_way[member] = handover.under_way.get(member, 0) + 1
    return [Ask(state.open(_Sent(handover, member, page), now_ns, node), node, page)]


@dataclass(frozen=True, slots=True, eq=False)
class _Sent(Question):
    """One page is on its way."""

    handover: Handover
    member: int
    page: StateCall

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        if not isinstance(answer, StateAnswer):
            return self.failed(state, "the answer is not one to a page", now_ns)
        self._arrived()
        count = len(self.page.records) // RECORD.itemsize
        self.handover.sent_count += count
        effects: Effects = []
        if answer.taken < count:
            detail = f"{count - answer.taken} of {count} at member {self.member}"
            effects.append(Trace("handed over records found no room", detail=detail))
        return [*effects, *(_send(state, self.handover, now_ns) if state.handover is self.handover else [])]

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        self._arrived()
        self.handover.again.append((self.member, self.page))  # sent with the next tick
        return []

    def _arrived(self) -> None:
        left = self.handover.under_way.pop(self.member) - 1
        if left:
            self.handover.under_way[self.member] = left


def tick(state: State, now_ns: int) -> Effects:
    """Send again what has failed, and answer those who have waited for long enough."""
    handover = state.handover
    if handover is None:
        return []
    effects = _send(state, handover, now_ns)
    if state.handover is not handover:
        return effects
    late = [request for request, asked_ns in handover.waiting if asked_ns + HANDOVER_HOLD_NS <= now_ns]
    handover.waiting = [one for one in handover.waiting if one[0] not in late]
    return [*effects, *(Reply(request, state.status()) for request in late)]


def _finished(state: State, handover: Handover) -> Effects:
    state.handover, state.ring_step, state.ring_round = None, RingStep.HANDED, handover.round
    detail = f"generation {handover.generation}, round {handover.round}, {handover.sent_count} records"
    return [
        Trace("handed over", detail=detail),
        *(Reply(request, state.status()) for request, _ in handover.waiting),
    ]


# --- Receiving --------------------------------------------------------------------------------------------------------
def received(state: State, request: int, page: StateCall, now_ns: int) -> Effects:
    """PUT /v1/slots/state: one page of what another replica has."""
    where, count = state.node_name, len(page.records) // RECORD.itemsize
    if state.ring_step is RingStep.SWITCHED and state.generation == page.generation:
        return [Reply(request, StateAnswer(count))]  # late, and no news
    plan = state.prepared
    if plan is None or plan.generation != page.generation or not plan.changes_ring or state.next is None:
        sentence = f"{where} has not prepared the ring change of generation {page.generation}"
        return [Refuse(request, change.CONFLICT, sentence)]
    covered = slots_from(page.covered)
    ours = (owners(state.next[covered]) == state.member) | (backups(state.next[covered]) == state.member)
    if page.member not in plan.snapshot.ring.before or page.member == state.member or not ours.all():
        sentence = f"{where} gets a page from member {page.member} about slots that it will not have; nothing is taken"
        return [Refuse(request, change.CONFLICT, sentence)]
    steady = np.frombuffer(page.steady_vips, dtype="<u4").tolist()
    unknown = [vip for vip in ([page.vip] if page.vip else []) + steady if vip not in state.vips]
    if unknown:
        return [Refuse(request, change.CONFLICT, f"{where} does not serve VIP {unknown[0]}")]
    effects: Effects = []
    nothing = np.zeros(0, dtype=np.uint32)
    for vip in steady:
        vs = state.vips[vip]
        changed = vs.slots.take_page(covered, nothing, np.zeros(0, np.uint64), state.alive, now_ns)
        effects += state.write(vs, changed)
    if page.vip:
        vs = state.vips[page.vip]
        tracking = np.frombuffer(page.tracking, dtype="<u2").astype(np.uint32)
        words = np.frombuffer(page.words, dtype="<u8").astype(np.uint64)
        owed.wait(vs, now_ns)
        effects += state.write(vs, vs.slots.take_page(covered, tracking, words, state.alive, now_ns))
    if not count:
        return [*effects, Reply(request, StateAnswer(0))]
    return [*effects, *_take_records(state, request, page, covered, now_ns)]


def _take_records(state: State, request: int, page: StateCall, covered: U32, now_ns: int) -> Effects:
    flows = flows_from(page.flows)
    records = np.frombuffer(page.records, dtype=RECORD).copy()
    known = state.facts.has(flows["vip"])
    slots = np.full(len(flows), SLOT_COUNT, dtype=np.uint32)
    slots[known] = state.facts.slots(flows[known])
    is_covered = np.zeros(SLOT_COUNT + 1, dtype=np.bool_)
    is_covered[covered] = True
    fits = is_covered[slots] & (state.vip_of[forget.backend_ids(state, records)] == flows["vip"])
    if not state.has_room():
        return [Refuse(request, BUSY, f"{state.node_name} has too many questions open; ask again later")]
    # Another machine's clock: seen now is later than it was, which is the safe side.
    records["seen_ns"] = now_ns
    records["round"][fits] = round_of(state.words(flows["vip"][fits], slots[fits])[0])
    full = int(fits[: page.full_count].sum())
    left_out = int((~fits).sum())
    token = state.open(_Put(request, left_out), now_ns)
    return [PutRecords(token, flows[fits], records[fits], full)]


@dataclass(frozen=True, slots=True, eq=False)
class _Put(Question):
    """Records of a page are being written; the sender waits."""

    request: int
    left_out: int
    """Those that mean nothing here: nothing is lost with them."""

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        if not isinstance(answer, RecordsPut):
            return self.failed(state, "the records could not be written", now_ns)
        state.records_quiet = False
        return [Reply(self.request, StateAnswer(answer.taken + self.left_out))]

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        return [Refuse(self.request, BUSY, f"{state.node_name}: {reason}")]
