"""From tracking back to steady: the three steps between owner and backup, and how others learn of it.

**The three steps** (DESIGN: section 3), each safe if the next never comes:

1. *The owner finds slots quiet and asks the backup.* Before it looks at its stamps it flags them SETTLING: from then
   on the fast path drops a first packet that finds no room, instead of sending it to base. So nothing can go to base
   unrecorded between the look and the answer. If the answer never comes (but for a question that surely was not taken:
   too old, or never sent), the flag stays: the backup may have agreed, and then its base is the newer one. So while the
   flag stands the backup decides about what the owner has no record of (``lbpod/bpf/replica.h``). How that ends, see
   ``owed``.
2. *The backup flags them, too, looks at its own clock and stamps* (it may have served the slot while the owner seemed
   down, or have committed later), sets ``base := current``, takes its flag off, **keeps tracking**, and agrees. It must
   not turn steady: the owner may have records that it has not, and would be bypassed. Its own records of other backends
   are void in the same moment, and agreeing twice is agreeing once (both: ``layout.SLOT_AGREED``).
3. *The owner sets its base to the agreed backend in any case*, because the backup has. If nothing newer was prepared
   or committed in between it turns steady, drops its records and tells everyone. Whoever hears it turns steady only
   if it has committed exactly that generation and has prepared nothing newer: then its ``current`` is the one that
   was agreed on.

**Neither settles with a replica that it takes for down**, or has since it looked (``watch.trusts``): alone, its fast
path begins flows at base, also in the milliseconds between its look and its word.

An LB that missed the telling asks by itself now and then (LOOK): an owner that is steady at the same generation
proves that it may be, too (see the promise in ``transition``). So does a backup, to an owner that has lost its maps.

**When is a slot quiet?** One of three is enough, at the owner *and* at the backup, each by its own clock:

- *window*: idle + lease + margin has passed since this LB committed the last change of the slot, since the slot's
  replicas changed, and since this replica last sent anything elsewhere than to ``current``;
- *nobody is possible*: no backend but ``current`` can have live flows (base was dead and the slot steady before), and
  the margin has passed since the commit;
- *hosts*: the host agents of all backends that are possible have seen no live flow, and nothing has gone elsewhere
  since. They must have looked later than the margin after **every** replica's commit, for until then that replica
  sent new flows to what was its ``current``. The owner knows when it asked them; the backup cannot, so it waits
  EARLY_AFTER_NS after its own commit, which is longer than any such answer is old when it arrives.

Flows that belong to ``current`` are no obstacle in any of them.

**UDP and ClientIP** settle in two rounds. Unknown flows go to base, so a slot whose base is not ``current`` is first
*rebased* (the same steps): by the window, once every live flow must have a record (no flow went unrecorded since); or
by the hosts. Then unknown flows go to ``current``, time counts anew, and the slot settles like any other when the
recorded exceptions have ended.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lbpod.core import forget, owed, watch
from lbpod.core.flows import groups, ids_from, over, slots_bytes, slots_from
from lbpod.core.keeper_state import (
    Answer,
    Effects,
    Phase,
    Question,
    Round,
    State,
    VipState,
)
from lbpod.core.limits import (
    BACKEND_IDS_MAX,
    EARLY_AFTER_NS,
    EARLY_ASK_NS,
    EARLY_FRESH_NS,
    EARLY_NODES_MAX,
    MARGIN_NS,
    MEMBER_NONE,
    RETRY_NS,
    SETTLE_PAUSE_NS_MAX,
    SETTLE_VIPS_MAX,
    STEADY_ASK_NS,
)
from lbpod.core.messages import (
    Ask,
    LookSeen,
    QuietAnswer,
    QuietCall,
    Refuse,
    Reply,
    SeenRead,
    SettleAnswer,
    SettleCall,
    SettleKind,
    SettleStep,
    Tell,
    Trace,
)
from lbpod.core.transition import Track, base_of, current_of, is_agreed, is_settling, is_tracking

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

BUSY = 503
_NO_SLOTS = np.zeros(0, dtype=np.uint32)
_NONE_AGREED = SettleAnswer(slots=b"", bases=b"")


# --- What a replica can say of its slots ------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _View:
    """Some tracking slots of a VIP as this replica sees them at one moment; all arrays are (n,), but for `possible`."""

    slots: U32
    current: U32
    base: U32
    possible: U32
    """(n, 1 + EARLIER_MAX): see Slots.possible."""
    unknown: Bools
    changed_at_ns: U64
    """The later of the last change and the last change of replicas."""
    to_rebase: Bools
    """UDP or ClientIP, and base is not current: the next step is a rebase."""

    @property
    def nobody(self) -> Bools:
        """No backend but current can have live flows."""
        nobody: Bools = ~self.unknown & (self.possible == 0).all(axis=1)
        return nobody

    def by_margin(self, now_ns: int) -> Bools:
        return self.nobody & over(self.changed_at_ns, MARGIN_NS, now_ns)

    def by_window(self, window_ns: int, other_seen: U64, unrecorded_ns: int, now_ns: int) -> Bools:
        """A rebase waits until every live flow has a record; a settle until none has another backend than current."""
        last = np.where(self.to_rebase, np.uint64(unrecorded_ns), other_seen[self.slots])
        return over(self.changed_at_ns, window_ns, now_ns) & over(last, window_ns, now_ns)

    def unseen(self, wait_ns: int, other_seen: U64, unrecorded_ns: int, now_ns: int) -> Bools:
        """Nothing has gone elsewhere, nor unrecorded, for so long."""
        quiet = over(other_seen[self.slots], wait_ns, now_ns)
        return quiet & (~self.to_rebase | over(np.full(len(quiet), unrecorded_ns, np.uint64), wait_ns, now_ns))

    def within(self, backends: U32, of_vip: U32) -> Bools:
        """Every backend that is possible is among these. of_vip: all that are alive."""
        is_listed = np.zeros(BACKEND_IDS_MAX, dtype=np.bool_)
        is_listed[backends] = True
        listed = (self.possible == 0) | is_listed[self.possible]
        absent = of_vip[~is_listed[of_vip]]
        any_listed = np.full(len(self.slots), not len(absent))
        if len(absent) == 1:
            any_listed = self.current == absent[0]
        within: Bools = listed.all(axis=1) & (~self.unknown | any_listed)
        return within


def _view(state: State, vs: VipState, slots: U32) -> _View:
    track = vs.slots.track or Track()
    words = vs.slots.at(slots)
    current, base = current_of(words), base_of(words)
    changed, of_vip = track.changed_at_ns[slots], _of_vip(state, vs)
    # Any backend but current: nobody, where the VIP has no other.
    others = np.full(len(slots), len(of_vip) > 1) if len(of_vip) != 1 else current != of_vip[0]
    if state.replicas_changed_ns is not None:
        changed = np.maximum(changed, state.replicas_changed_ns[slots])
    return _View(
        slots=slots,
        current=current,
        base=base,
        possible=vs.slots.possible(slots, state.alive),
        unknown=track.unknown[slots] & others,
        changed_at_ns=changed,
        to_rebase=np.full(len(slots), state.is_unannounced(vs)) & (base != current) & state.alive[base],
    )


def _of_vip(state: State, vs: VipState) -> U32:
    return np.flatnonzero(state.vip_of == vs.id).astype(np.uint32)


# --- Step 1: the owner ------------------------------------------------------------------------------------------------
def tick(state: State, now_ns: int) -> Effects:
    """Begin what is due, VIP by VIP: attempts to settle own slots, and questions about those that others own.

    Of SETTLE_VIPS_MAX at most, in turn: where all slots of many VIPs track, the rest waits for the next ticks. But for
    what backups owe: others wait for that (``missed``), and it is asked about once a second.
    """
    if not state.is_calm or state.own is None:
        return []
    tracking = [vs for _, vs in sorted(state.vips.items()) if vs.slots.track is not None]
    due = sorted((vs for vs in tracking if _is_due(vs, now_ns)), key=lambda vs: vs.turn_ns)[:SETTLE_VIPS_MAX]
    for vs in due:
        vs.turn_ns = now_ns
    effects: Effects = []
    for vs in tracking:
        if vs.round is None and not vs.owing and state.has_room():
            effects += owed.ask(state, vs, now_ns)
        if vs.turn_ns != now_ns:
            continue
        if vs.round is None and not vs.owing and now_ns >= vs.scan_at_ns and state.has_room():
            effects += _begin(state, vs, now_ns)
        if now_ns >= vs.look_at_ns:
            effects += _look(state, vs, now_ns)
    return effects


def _is_due(vs: VipState, now_ns: int) -> bool:
    is_free = vs.round is None and not vs.owing
    return (is_free and now_ns >= vs.scan_at_ns) or now_ns >= vs.look_at_ns


def _own_slots(state: State, vs: VipState) -> U32:
    """Tracking slots that this LB owns and whose backup (if there is one) is not believed to be down, nor owes an
    answer."""
    fit = vs.slots.tracking & (state.owner == state.member) & ~is_settling(vs.slots.words)
    fit &= (state.backup == MEMBER_NONE) | state.is_up(state.backup)
    fit[vs.lifted] = False
    return np.flatnonzero(fit).astype(np.uint32)


def _begin(state: State, vs: VipState, now_ns: int) -> Effects:
    view = _view(state, vs, _own_slots(state, vs))
    if not len(view.slots):
        vs.scan_at_ns = now_ns + RETRY_NS
        return []
    # RETRY_NS more than the backup wants, so that it need not refuse because it committed a little later.
    askable = ~view.nobody & over(view.changed_at_ns, EARLY_AFTER_NS + RETRY_NS, now_ns)
    round_ = Round(state.generation, Phase.HOSTS, now_ns, _NO_SLOTS, np.zeros(0, np.bool_), _NO_SLOTS)
    if askable.any() and now_ns >= vs.early_at_ns:
        vs.round = round_
        effects = _ask_hosts(state, vs, view.slots[askable], now_ns)
        if round_.waiting:
            return effects
        _pace_hosts(vs, now_ns)
        vs.round = None
    ready = view.by_margin(now_ns) | over(view.changed_at_ns, state.window_ns(vs), now_ns)
    if ready.any():
        vs.round = round_
        return _flag_and_look(state, vs, now_ns)
    wait_ns = np.where(view.nobody, MARGIN_NS, EARLY_AFTER_NS + RETRY_NS).astype(np.uint64)
    due = view.changed_at_ns + wait_ns
    due = due[due >= np.uint64(now_ns)]
    next_ns = [int(due.min()) + 1] if len(due) else []
    next_ns += [vs.early_at_ns] if askable.any() else []
    vs.scan_at_ns = max(min(next_ns, default=now_ns + RETRY_NS), now_ns + 1)
    return []


def _ask_hosts(state: State, vs: VipState, slots: U32, now_ns: int) -> Effects:
    """Ask the nodes of all possible backends about all these slots: each slot about every backend but its current."""
    round_ = vs.round
    vip = state.find_vip(vs.id)
    assert round_ is not None and vip is not None, "a round is about a VIP that is served"
    view = _view(state, vs, slots)
    wanted = np.unique(view.possible)
    if view.unknown.any() or vs.early_all:
        wanted, vs.early_all = np.union1d(wanted, _of_vip(state, vs)), False
    node_of = {one.id: one.node for one in vip.backends}
    wanted = np.array([one for one in wanted.tolist() if one in node_of], dtype=np.uint32)
    nodes = np.array([node_of[one] for one in wanted.tolist()], dtype=np.uint32)
    asked = np.roll(np.unique(nodes), -vs.early_turn)[:EARLY_NODES_MAX]
    vs.early_turn = (vs.early_turn + len(asked)) % max(len(np.unique(nodes)), 1)
    wanted, nodes = wanted[np.isin(nodes, asked)], nodes[np.isin(nodes, asked)]
    kept = view.within(wanted, _of_vip(state, vs))
    round_.early_slots, round_.early_quiet = slots[kept], np.ones(int(kept.sum()), dtype=np.bool_)
    round_.early_backends = wanted
    effects: Effects = []
    for node, places in groups(nodes) if kept.any() else ():
        for positions, backends in _host_questions(view.current[kept], wanted[places]):
            if not state.has_room(node):
                round_.early_quiet[positions] = False
                continue
            token = state.open(_HostAsked(vs, round_, positions, backends), now_ns, node)
            call = QuietCall(vs.id, slots_bytes(round_.early_slots[positions]), backends.astype("<u4").tobytes())
            effects.append(Ask(token, node, call))
            round_.waiting += 1
    return effects


def _host_questions(current: U32, backends: U32) -> list[tuple[npt.NDArray[np.intp], U32]]:
    """Which slots (places in `current`) to ask one node about which of its backends.

    All together but for those whose own current is on this node: its flows are no obstacle, so it is left out for them.
    """
    own = np.isin(current, backends)
    questions = [(np.flatnonzero(~own), backends)]
    for mine, places in groups(current[own]):
        questions.append((np.flatnonzero(own)[places], backends[backends != mine]))
    return [(places, asked) for places, asked in questions if len(places) and len(asked)]


@dataclass(frozen=True, slots=True, eq=False)
class _HostAsked(Question):
    """A host agent was asked about some of the round's early slots, and some of its backends."""

    vs: VipState
    round: Round
    positions: npt.NDArray[np.intp]
    backends: U32

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        if isinstance(answer, QuietAnswer) and answer.can_tell and len(answer.quiet) == len(self.positions):
            quiet = np.frombuffer(answer.quiet, dtype=np.uint8) == 1
            self.round.early_quiet[self.positions] &= quiet
            return self._done(state, now_ns)
        return self.failed(state, "it cannot tell", now_ns)

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        # Nobody vouches for its backends; slots that cannot have them need nobody to.
        self.round.early_backends = np.setdiff1d(self.round.early_backends, self.backends)
        return self._done(state, now_ns)

    def _done(self, state: State, now_ns: int) -> Effects:
        round_ = self.round
        round_.waiting -= 1
        if round_.void or round_.waiting or state.vips.get(self.vs.id) is not self.vs:
            return []
        view = _view(state, self.vs, round_.early_slots)
        round_.early_quiet &= view.within(round_.early_backends, _of_vip(state, self.vs))
        _pace_hosts(self.vs, now_ns)
        return _flag_and_look(state, self.vs, now_ns)


def _pace_hosts(vs: VipState, now_ns: int) -> None:
    """When to ask host agents about this VIP again: soon where they have seen slots quiet, else later and later."""
    assert vs.round is not None, "host agents are asked in a round"
    quiet = bool(vs.round.early_quiet.any())
    vs.early_pause_ns = EARLY_ASK_NS if quiet else min(2 * vs.early_pause_ns, SETTLE_PAUSE_NS_MAX)
    vs.early_at_ns = now_ns + vs.early_pause_ns


def _flag_and_look(state: State, vs: VipState, now_ns: int) -> Effects:
    """Flag what may be quiet, then look at the stamps: in this order, so that nothing slips through between the two."""
    round_ = vs.round
    assert round_ is not None, "a look belongs to a round"
    if not state.is_calm or round_.epoch != state.generation or vs.slots.track is None:
        return _end(vs, now_ns)
    view = _view(state, vs, _own_slots(state, vs))
    chosen = view.by_margin(now_ns) | over(view.changed_at_ns, state.window_ns(vs), now_ns)
    chosen |= np.isin(view.slots, round_.early_slots[round_.early_quiet])
    if not chosen.any():
        return _end(vs, now_ns)
    slots = view.slots[chosen]
    round_.phase, round_.waiting, round_.looked_ns = Phase.LOOKING, 1, now_ns
    effects = state.write(vs, vs.slots.flag(slots))
    return [*effects, LookSeen(state.open(_OwnSeen(vs, round_, slots), now_ns), vs.id)]


@dataclass(frozen=True, slots=True, eq=False)
class _OwnSeen(Question):
    """The owner's stamps of the slots that it has flagged."""

    vs: VipState
    round: Round
    slots: U32

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        if not isinstance(answer, SeenRead):
            return self.failed(state, "the stamps could not be read", now_ns)
        self.round.waiting -= 1
        if self.round.void or state.vips.get(self.vs.id) is not self.vs:
            return []
        slots = self.slots[is_tracking(self.vs.slots.at(self.slots))]
        if not state.is_calm or self.round.epoch != state.generation:
            return [*state.write(self.vs, self.vs.slots.unflag(self.slots)), *_end(self.vs, now_ns)]
        return _ask_backups(state, self.vs, slots, answer, now_ns)

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        self.round.waiting -= 1
        if self.round.void or state.vips.get(self.vs.id) is not self.vs:
            return []
        return [*state.write(self.vs, self.vs.slots.unflag(self.slots)), *_end(self.vs, now_ns)]


def _ask_backups(state: State, vs: VipState, slots: U32, seen: SeenRead, now_ns: int) -> Effects:
    """Ask each backup about the slots that are quiet here; the others lose their flag."""
    round_ = vs.round
    assert round_ is not None, "backups are asked in a round"
    round_.phase = Phase.ASKING
    view = _view(state, vs, slots)
    surely = view.by_margin(now_ns)
    surely |= view.by_window(state.window_ns(vs), seen.other_seen, seen.unrecorded_ns, now_ns)
    early = ~surely & np.isin(slots, round_.early_slots[round_.early_quiet])
    early &= view.within(round_.early_backends, _of_vip(state, vs))
    if now_ns > round_.asked_at_ns + EARLY_FRESH_NS:
        early[:] = False
    early &= view.unseen(MARGIN_NS, seen.other_seen, seen.unrecorded_ns, round_.asked_at_ns)
    effects = state.write(vs, vs.slots.unflag(slots[~surely & ~early]))
    for is_early, some in ((False, surely), (True, early)):
        backends = round_.early_backends if is_early else _NO_SLOTS
        for kind, fit in ((SettleKind.SETTLE, ~view.to_rebase), (SettleKind.REBASE, view.to_rebase)):
            for backup, places in groups(state.backup[slots[some & fit]]):
                asked = slots[some & fit][places]
                effects += _ask_backup(state, vs, backup, kind, asked, backends, now_ns)
    return [*effects, *(_end(vs, now_ns) if not round_.waiting else [])]


def _ask_backup(
    state: State, vs: VipState, backup: int, kind: SettleKind, slots: U32, backends: U32, now_ns: int
) -> Effects:
    round_ = vs.round
    assert round_ is not None, "backups are asked in a round"
    if backup == MEMBER_NONE:  # a ring of one: there is nobody who may know more
        return _conclude(state, vs, round_, kind, slots, current_of(vs.slots.at(slots)), True, now_ns)
    node = state.node_of_member.get(backup, 0)
    if not node or not state.has_room(node) or not watch.trusts(state, backup, round_.looked_ns):
        return state.write(vs, vs.slots.unflag(slots))
    token = state.open(_BackupAsked(vs, round_, backup, kind, slots, bool(len(backends))), now_ns, node)
    round_.waiting += 1
    call = SettleCall(
        member=state.member,
        step=SettleStep.ASK,
        kind=kind,
        vip=vs.id,
        epoch=round_.epoch,
        slots=slots_bytes(slots),
        early_backends=backends.astype("<u4").tobytes(),
    )
    return [Ask(token, node, call)]


# --- Step 2: the backup -----------------------------------------------------------------------------------------------
def called(state: State, request: int, call: SettleCall, now_ns: int) -> Effects:
    """POST /v1/slots/settle, all three steps of it. What cannot be agreed to is left out of the answer."""
    vs = state.vips.get(call.vip)
    if vs is None or not state.is_calm or call.epoch != state.generation:
        # Not the same change on both sides: current may not be what the caller thinks.
        return [Reply(request, _NONE_AGREED)]
    slots = slots_from(call.slots)
    if call.step is SettleStep.LOOK:
        steady = slots[~is_tracking(vs.slots.at(slots))]
        return [Reply(request, _agreed(steady, current_of(vs.slots.at(steady))))]
    slots = slots[state.owner[slots] == call.member]
    if call.step is SettleStep.OWED:
        return owed.called(state, vs, request, call, slots, now_ns)
    if call.step is SettleStep.TELL:
        effects = _finish(state, vs, slots, now_ns)
        return [*effects, Reply(request, _agreed(slots, current_of(vs.slots.at(slots))))]
    if not state.has_room():
        return [Refuse(request, BUSY, f"{state.node_name} has too many questions open; ask again later")]
    slots = slots[state.backup[slots] == state.member]
    # Flagged before the look, as at the owner: until its word is written a first packet with the five-tuple of a flow
    # that is over must not begin here where that one was.
    effects = state.write(vs, vs.slots.flag(slots))
    return [*effects, LookSeen(state.open(_BackupSeen(vs, request, call, slots, now_ns), now_ns), vs.id)]


def _agreed(slots: U32, bases: U32) -> SettleAnswer:
    return SettleAnswer(slots=slots_bytes(slots), bases=bases.astype("<u4").tobytes())


@dataclass(frozen=True, slots=True, eq=False)
class _BackupSeen(Question):
    """The backup's stamps; the owner waits for its word."""

    vs: VipState
    request: int
    call: SettleCall
    slots: U32
    called_ns: int

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        if not isinstance(answer, SeenRead):
            return self.failed(state, "the stamps could not be read", now_ns)
        vs, call = self.vs, self.call
        if state.vips.get(vs.id) is not vs or not state.is_calm or call.epoch != state.generation:
            return [*self._unflag(state), Reply(self.request, _NONE_AGREED)]
        words = vs.slots.at(self.slots)
        steady = ~is_tracking(words)
        # Where the flag is gone (a call that came twice) this look says nothing.
        tracking = self.slots[is_settling(words)]
        agreed = tracking[self._may_settle(state, tracking, answer, now_ns)]
        if call.kind is SettleKind.SETTLE:
            changed = vs.slots.agree(agreed)
            # No live flow has another backend: records that say so are of flows that are over.
            forget.note_settled(state, vs.id, agreed, now_ns, current_of(vs.slots.at(agreed)))
        else:
            apart = agreed[base_of(vs.slots.at(agreed)) != current_of(vs.slots.at(agreed))]
            changed = vs.slots.rebase(apart, current_of(vs.slots.at(apart)), state.alive, now_ns)
        # A slot that is steady here has settled before: its owner may be, too.
        agreed = np.union1d(agreed, self.slots[steady]).astype(np.uint32)
        changed = np.union1d(changed, vs.slots.unflag(self._mine(state))).astype(np.uint32)
        effects = state.write(vs, changed)
        return [*effects, Reply(self.request, _agreed(agreed, current_of(vs.slots.at(agreed))))]

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        return [*self._unflag(state), Refuse(self.request, BUSY, f"{state.node_name} cannot tell: {reason}")]

    def _mine(self, state: State) -> U32:
        """Whose flag is this look's. What this LB owns by now may have another's, and is asked about (``owed``)."""
        mine: U32 = self.slots[state.owner[self.slots] != state.member]
        return mine

    def _unflag(self, state: State) -> Effects:
        if state.vips.get(self.vs.id) is not self.vs:
            return []
        return state.write(self.vs, self.vs.slots.unflag(self._mine(state)))

    def _may_settle(self, state: State, slots: U32, seen: SeenRead, now_ns: int) -> Bools:
        """Which of these tracking slots the backup finds quiet, too."""
        vs, call = self.vs, self.call
        if not len(slots) or vs.slots.track is None:
            return np.zeros(len(slots), dtype=np.bool_)
        view = _view(state, vs, slots)
        early = ids_from(call.early_backends)
        quiet = view.by_margin(now_ns)
        quiet |= view.by_window(state.window_ns(vs), seen.other_seen, seen.unrecorded_ns, now_ns)
        if len(early):
            # Counted to when it was asked, not to now: it may have slept in between.
            by_hosts = view.within(early, _of_vip(state, vs)) & over(view.changed_at_ns, EARLY_AFTER_NS, self.called_ns)
            quiet |= by_hosts & view.unseen(EARLY_AFTER_NS, seen.other_seen, seen.unrecorded_ns, self.called_ns)
        # Where it takes the owner to be down, it begins flows alone, at base: also after this look.
        trusted = watch.trusts(state, call.member, self.called_ns)
        if call.kind is SettleKind.REBASE:
            return np.where(view.to_rebase, quiet & trusted, view.base == view.current)
        # A backup of UDP that has missed the rebase may agree by the window alone: all it sent to base is over, too.
        silent = over(view.changed_at_ns, state.window_ns(vs), now_ns)
        silent &= over(seen.other_seen[slots], state.window_ns(vs), now_ns)
        agreed: Bools = is_agreed(vs.slots.at(slots)) | (np.where(view.to_rebase, silent, quiet) & trusted)
        return agreed


# --- Step 3: the owner again ------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, eq=False)
class _BackupAsked(Question):
    """A backup was asked about these slots, all flagged."""

    vs: VipState
    round: Round
    backup: int
    kind: SettleKind
    slots: U32
    early: bool

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        if not isinstance(answer, SettleAnswer) or 2 * len(answer.slots) != len(answer.bases):
            return self.failed(state, "the answer is not one to a settle", now_ns)
        self.round.waiting -= 1
        if self.round.void or state.vips.get(self.vs.id) is not self.vs:
            return []
        named = np.frombuffer(answer.slots, dtype="<u2").astype(np.uint32)
        bases, asked = ids_from(answer.bases), np.isin(named, self.slots)
        refused = np.setdiff1d(self.slots, named)
        effects = state.write(self.vs, self.vs.slots.unflag(refused))
        # Since its restart the backup may know less than this LB does of whose flows there can be.
        self.vs.early_all |= self.early and len(refused) > 0
        trusted = watch.trusts(state, self.backup, self.round.looked_ns)
        effects += _conclude(state, self.vs, self.round, self.kind, named[asked], bases[asked], trusted, now_ns)
        return [*effects, *(_end(self.vs, now_ns) if not self.round.waiting else [])]

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        # The backup may have agreed all the same: the slots stay flagged until it has told.
        owed.wait(self.vs, now_ns)
        return self._over(state, _NO_SLOTS, now_ns)

    def untaken(self, state: State, reason: str, now_ns: int) -> Effects:
        return self._over(state, self.slots, now_ns)

    def _over(self, state: State, unflagged: U32, now_ns: int) -> Effects:
        self.round.waiting -= 1
        if self.round.void or state.vips.get(self.vs.id) is not self.vs:
            return []
        effects = state.write(self.vs, self.vs.slots.unflag(unflagged))
        return [*effects, *(_end(self.vs, now_ns) if not self.round.waiting else [])]


def _conclude(
    state: State, vs: VipState, round_: Round, kind: SettleKind, slots: U32, bases: U32, trusted: bool, now_ns: int
) -> Effects:
    """The backup has made these its bases: so does the owner, in any case; and turns steady where nothing came
    between. (trusted: at no time since its look may it have begun flows alone, at the base that it had.)"""
    tracking = is_tracking(vs.slots.at(slots))
    slots, bases = slots[tracking], bases[tracking]
    if not len(slots):
        return []
    before = vs.slots.at(slots)
    if kind is SettleKind.REBASE:
        vs.slots.rebase(slots, bases, state.alive, now_ns)
    else:
        vs.slots.take_over(slots, bases, state.alive)
    vs.slots.unflag(slots)
    words = vs.slots.at(slots)
    if kind is SettleKind.REBASE or not trusted or not state.is_calm or round_.epoch != state.generation:
        round_.settled += len(slots)
        if kind is SettleKind.SETTLE:
            vs.slots.doubt(slots)
        return state.write(vs, slots[before != words])
    same = base_of(words) == current_of(words)
    vs.slots.doubt(slots[~same])
    effects = state.write(vs, slots[(before != words) & ~same])
    settled = slots[same]
    round_.settled += len(settled)
    effects += _finish(state, vs, settled, now_ns)
    call = SettleCall(state.member, SettleStep.TELL, kind, vs.id, round_.epoch, slots_bytes(settled))
    others = [member for member in sorted(state.node_of_member) if member != state.member]
    ring = state.committed.snapshot.ring.members if state.committed is not None and len(settled) else ()
    return [*effects, *(Tell(state.node_of_member[member], call) for member in others if member in ring)]


def void_rounds(state: State, now_ns: int) -> None:
    """The bases of all replicas are about to be made equal: what was agreed before says nothing more.

    Slots that were flagged stay so, as after an answer that never came.
    """
    for vs in state.vips.values():
        owed.wait(vs, now_ns)
        if vs.round is not None:
            vs.round.void, vs.round = True, None


def _finish(state: State, vs: VipState, slots: U32, now_ns: int) -> Effects:
    """These slots are steady. Their records here are dropped with the next list of all records."""
    slots = slots[is_tracking(vs.slots.at(slots))]
    if not len(slots):
        return []
    forget.note_settled(state, vs.id, slots[state.is_replica(slots)], now_ns)
    effects = state.write(vs, vs.slots.finish(slots))
    return [*effects, Trace("settled", vip=vs.id, slots=len(slots))]


def _end(vs: VipState, now_ns: int) -> Effects:
    """The round is over; the next one begins soon where this one got anywhere, else later and later."""
    assert vs.round is not None and not vs.round.waiting, "a round ends when nobody owes it an answer"
    vs.scan_pause_ns = RETRY_NS if vs.round.settled else min(2 * vs.scan_pause_ns, SETTLE_PAUSE_NS_MAX)
    vs.scan_at_ns = now_ns + vs.scan_pause_ns
    vs.round = None
    return []


# --- What a lost telling leaves behind --------------------------------------------------------------------------------
def _look(state: State, vs: VipState, now_ns: int) -> Effects:
    """Ask the owners of slots that are tracking here (the backup, where this LB owns them and has lost its maps)."""
    vs.look_at_ns = now_ns + STEADY_ASK_NS
    track = vs.slots.track
    assert track is not None, "only tracking slots are asked about"
    own = state.owner == state.member
    wanted = vs.slots.tracking & (~own | track.unknown) & over(track.changed_at_ns, MARGIN_NS, now_ns)
    slots = np.flatnonzero(wanted).astype(np.uint32)
    members = np.where(own[slots], state.backup[slots], state.owner[slots])
    members[~state.is_up(members)] = MEMBER_NONE
    effects: Effects = []
    for member, places in groups(members):
        node = state.node_of_member.get(member, 0)
        if member == MEMBER_NONE or member == state.member or not node or not state.has_room(node):
            continue
        asked = slots[places]
        token = state.open(_SteadyAsked(vs, state.generation, asked), now_ns, node)
        call = SettleCall(state.member, SettleStep.LOOK, SettleKind.SETTLE, vs.id, state.generation, slots_bytes(asked))
        effects.append(Ask(token, node, call))
    return effects


@dataclass(frozen=True, slots=True, eq=False)
class _SteadyAsked(Question):
    """Another replica was asked which of these slots are steady there."""

    vs: VipState
    epoch: int
    slots: U32

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        fresh = state.is_calm and state.generation == self.epoch and state.vips.get(self.vs.id) is self.vs
        if not isinstance(answer, SettleAnswer) or not fresh:
            return []
        steady = slots_from(answer.slots)
        return _finish(state, self.vs, steady[np.isin(steady, self.slots)], now_ns)

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        return []
