"""What may become of the slots of one VIP at one LB: steady, tracking, and every step between the two.

**Theory of operation** (DESIGN: section 3). A slot is one word ``current | flags | round | base << 32``. It has two
phases::

              prepare: it will differ                         finish: agreed, nothing newer
    STEADY ───────────────────────────► TRACKING ─────────────────────────────────────────► STEADY
    current                             current, base          commit: current := table
                                                               rebase: base := current

- *Steady*: every live flow of the slot belongs to ``current``. Nothing else is known, and nothing else is needed.
- *Tracking*: a live flow belongs to the backend of its record where it has one, else to ``base``. New ones get
  ``current``.

Each time a slot begins to track, its *round* is another one, and what was recorded or leased in an earlier one is void
at once (records go with the next list of all, ``forget``): whoever has a flow in the slot then has it at ``base``.
Without it, a five-tuple that was used again while the slot was steady met the record of the flow before.

The promise that all of this serves: **an LB is steady on a slot, having committed generation e, only if every live
flow of the slot belongs to current(e)**. So whoever learns that one LB is steady at e may be steady at e, too.

``possible`` answers what makes an early settle safe: *which backends may live flows of this slot have, besides
current?* It is base, and each ``current`` that the slot has had (or that an LB ahead of us may have committed) since
it was last steady: at most EARLIER_MAX of them are remembered, then ``unknown`` says that it may be any backend of
the VIP.

This file decides words, and nothing about time, messages or who owns a slot: that is the Keeper's. All is NumPy over
whole tables; each method returns the slots whose words it changed. Tried and dropped: a third phase for "prepared";
``touched`` says the same and the fast path need not know.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from lbpod.core.layout import (
    RECORD_MISSING,
    SLOT_AGREED,
    SLOT_BASE_SHIFT,
    SLOT_CURRENT_MASK,
    SLOT_ROUND_MASK,
    SLOT_ROUND_ONE,
    SLOT_SETTLING,
    SLOT_TRACKING,
)
from lbpod.core.limits import EARLIER_MAX, SLOT_COUNT

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

_CURRENT: Final = np.uint64(SLOT_CURRENT_MASK)
_TRACKING: Final = np.uint64(SLOT_TRACKING)
_SETTLING: Final = np.uint64(SLOT_SETTLING)
_AGREED: Final = np.uint64(SLOT_AGREED)
_HANDED_FLAGS: Final = np.uint64(SLOT_TRACKING | SLOT_SETTLING)
"""Those that a replica hands over. What it has agreed to it alone has."""
_FLAGS: Final = np.uint64(SLOT_TRACKING | SLOT_SETTLING | SLOT_AGREED)
_ROUND: Final = np.uint64(SLOT_ROUND_MASK)
_ROUND_ONE: Final = np.uint64(SLOT_ROUND_ONE)
_NO_FLAGS: Final = np.uint64(0)
_SHIFT: Final = np.uint64(SLOT_BASE_SHIFT)
_BYTE_PLACES: Final = 256

assert SLOT_COUNT <= 1 << 16, "16 bits name every word that a VIP can have"


def current_of(words: U64) -> U32:
    """Backend of new flows; 0: none."""
    return (words & _CURRENT).astype(np.uint32)


def base_of(words: U64) -> U32:
    """Backend of a tracking slot's unrecorded flows; 0: none."""
    return (words >> _SHIFT & _CURRENT).astype(np.uint32)


def is_tracking(words: U64) -> Bools:
    """True where the slot has changed recently."""
    return np.asarray((words & _TRACKING) != 0, dtype=np.bool_)


def is_settling(words: U64) -> Bools:
    """True where an answer to a settle is outstanding."""
    return np.asarray((words & _SETTLING) != 0, dtype=np.bool_)


def is_agreed(words: U64) -> Bools:
    """True where this LB, as backup, has agreed to settle since the last change and has not heard that it is done."""
    return np.asarray((words & _AGREED) != 0, dtype=np.bool_)


def means_something(words: U64, records: npt.NDArray[np.void]) -> Bools:
    """(n,): which records (layout.RECORD) say anything in slots of these words: those of the slot's round; where it has
    been agreed that all live flows belong to current, those of current."""
    found = is_of_round(round_of(words), records)
    found &= ~is_agreed(words) | (records["backend"] == current_of(words))
    return found


def is_of_round(rounds: U32, records: npt.NDArray[np.void]) -> Bools:
    """(n,): which records (layout.RECORD) there are, and are of these rounds (or of those of these records)."""
    found: Bools = (records["round"] ^ rounds) & np.uint32(SLOT_ROUND_MASK) == 0
    found &= records["round"] != RECORD_MISSING
    return found


def round_of(words: U64) -> U32:
    """In which round of tracking the slot is, or was last: as records and leases have it (SLOT_ROUND_MASK)."""
    return (words & _ROUND).astype(np.uint32)


def _begun(words: U64) -> U64:
    """The round of these slots once they track: the next one, of those that are steady. Counted modulo 64: a slot is
    steady again after MARGIN_NS at the soonest, so no lease lives for so many rounds, and no record is kept so long."""
    return np.where(is_tracking(words), words, words + _ROUND_ONE) & _ROUND


def make_words(current: U32, base: U32, flags: U64 | np.uint64 = _NO_FLAGS) -> U64:
    """Put words together. flags: SLOT_TRACKING, SLOT_SETTLING, and the round."""
    return current.astype(np.uint64) | flags | base.astype(np.uint64) << _SHIFT


def _no_stamps() -> U64:
    return np.zeros(SLOT_COUNT, dtype=np.uint64)


def _no_slots() -> U32:
    return np.zeros(0, dtype=np.uint32)


def _nowhere() -> Bools:
    return np.zeros(SLOT_COUNT, dtype=np.bool_)


@dataclass(slots=True)
class Track:
    """What is known of a VIP's tracking slots, (SLOT_COUNT,) each. Entries of steady slots are 0 (but for
    changed_at_ns)."""

    changed_at_ns: U64 = field(default_factory=_no_stamps)
    """When the last change that touched the slot was committed here (while it is only prepared: prepared)."""
    touched: Bools = field(default_factory=_nowhere)
    """The change that is prepared, or one that it superseded, touches the slot. Invariant: touched => tracking."""
    unknown: Bools = field(default_factory=_nowhere)
    """Live flows may have any backend of the VIP."""
    orphaned: Bools = field(default_factory=_nowhere)
    """Base has died since the slot began to track: a flow of before the change that nobody has recorded is dead, too,
    though the next change makes it look like one of the base that came after it. What a restart forgets of it, and a
    handover leaves out, costs a lease that nobody should have."""
    earlier: U32 | None = None
    """(SLOT_COUNT, EARLIER_MAX) backends that live flows may have besides base and current; None: no slot has one."""

    def forget_dead(self, slots: npt.NDArray[np.integer], alive: Bools) -> None:
        """Of the backends of before, those that are dead have no live flows in these slots."""
        if self.earlier is not None:
            rows = self.earlier[slots]
            rows[~alive[rows]] = 0
            self.earlier[slots] = rows


@dataclass(frozen=True, slots=True)
class _Folded:
    """The words of a VIP whose slots are all steady: what words there are, and which of them each slot has."""

    words: U64
    places: npt.NDArray[np.unsignedinteger]
    """(SLOT_COUNT,) of uint8 (256 words at most: of a backend and a round each) or uint16: places in ``words``."""


class Slots:
    """The words of one VIP as they are in the fast path, or will be once it takes writes again.

    Folded they take an eighth (a quarter) of the memory. That is for VIPs at rest: whoever asks for ``words`` has them
    whole from then on, until the next ``fold``.
    """

    def __init__(self, words: U64 | None = None) -> None:
        self._words: U64 | None = np.zeros(SLOT_COUNT, dtype=np.uint64) if words is None else words.copy()
        self._folded: _Folded | None = None
        """Invariant: exactly one of the two is None."""
        self.track: Track | None = None
        """Invariant: None iff no slot is tracking."""

    @property
    def words(self) -> U64:
        """(SLOT_COUNT,), to be written in place. Invariant: a steady slot has base == current and no flag."""
        if self._words is None:
            assert self._folded is not None, "words are whole or folded"
            self._words, self._folded = self._folded.words[self._folded.places], None
        return self._words

    def at(self, slots: U32) -> U64:
        """Words of some slots (a copy), however they are kept."""
        folded = self._folded
        found: U64 = self.words[slots] if folded is None else folded.words[folded.places[slots]]
        return found

    @property
    def is_foldable(self) -> bool:
        """All slots are steady, and their words are whole."""
        return self.track is None and self._words is not None

    def fold(self) -> None:
        """Keep the words of steady slots in little memory."""
        assert self.is_foldable, "only what is steady and whole is folded"
        assert not (self.words & _FLAGS).any(), "a steady slot has no flag"
        words, places = np.unique(self.words, return_inverse=True)
        narrow: type[np.unsignedinteger] = np.uint8 if len(words) <= _BYTE_PLACES else np.uint16
        self._folded, self._words = _Folded(words, places.astype(narrow)), None

    @property
    def kept_bytes(self) -> int:
        """Memory that the words take."""
        folded = self._folded
        return self.words.nbytes if folded is None else folded.words.nbytes + folded.places.nbytes

    @property
    def tracking(self) -> Bools:
        """(SLOT_COUNT,): which slots are tracking."""
        return is_tracking(self.words)

    @property
    def agreed(self) -> U32:
        """Slots that this LB, as backup, has agreed to settle."""
        return np.zeros(0, np.uint32) if self.track is None else np.flatnonzero(is_agreed(self.words)).astype(np.uint32)

    @property
    def tracking_count(self) -> int:
        """How many."""
        return 0 if self.track is None else int(np.count_nonzero(self.tracking))

    # --- Begin --------------------------------------------------------------------------------------------------------
    def adopt(self, table: U32, prepared: bool, now_ns: int) -> U32:
        """An LB without state in a living cluster: it tracks all slots, because it can know nothing of any."""
        track = self._tracked()
        self.words[:] = make_words(table, table, _begun(self.words) | _TRACKING)
        track.changed_at_ns[:] = now_ns
        track.touched[:] = prepared
        track.unknown[:] = True
        return np.arange(SLOT_COUNT, dtype=np.uint32)

    def restore(self, table: U32, other: U32 | None, alive: Bools, prepared: bool, now_ns: int) -> U32:
        """After a restart on the words found. table: committed; other: prepared where it differs.

        What a crash in the middle of a commit leaves (``current`` of either table in a tracking slot) stays as it is
        and the commit is repeated. A steady slot that has neither (no such word was ever written) is tracked with
        what was found as base. Times and ``earlier`` are lost: the quiet time counts anew, and any backend is
        possible. What was agreed stays so: the owner may be steady on it, and records of before are there still.
        """
        before = self.words.copy()
        current, base, tracking = current_of(before), base_of(before), self.tracking
        right = current == table
        if other is not None:
            right |= (tracking | (table == 0)) & (current == other)
        base = np.where(tracking, base, current)
        tracking |= ~right & (current != 0)
        current = np.where(right, current, table)
        base = np.where(tracking & alive[base], base, current)
        agreed = np.where(right & (base == current), before & _AGREED, np.uint64(0))
        flags = np.where(tracking, before & _SETTLING | agreed | _TRACKING | _begun(before), before & _ROUND)
        self.words[:] = make_words(current, base, flags)
        if tracking.any():
            track = self._tracked()
            track.changed_at_ns[tracking] = now_ns
            track.unknown[tracking] = True
            track.touched[tracking] = prepared
        return self._changed(before)

    # --- A change of the backends -------------------------------------------------------------------------------------
    def prepare(self, table: U32, begun: U32 | None, alive: Bools, now_ns: int) -> U32:
        """Track every slot that will differ. ``current`` stays as it is.

        begun: the table of a prepared change that this one supersedes. Its controller is gone, and some LB may have
        been told to commit: flows may have its backends already, so they are possible. Where this LB has no
        ``current`` (the VIP is new, or had no backend), there can be no other flows than those.

        A slot without a backend (``current`` 0) is not tracked: nobody can have a flow in it.
        """
        words = self.words
        current = current_of(words)
        held = current if begun is None else np.where(current == 0, begun, current)
        touched = (held != table) & (held != 0)
        # Of thousands of slots few differ: all else is done for these alone.
        slots = np.flatnonzero(touched | self.tracking)
        if not len(slots):
            return _no_slots()
        before, current, held, touched = words[slots], current[slots], held[slots], touched[slots]
        base = np.where(touched & ~is_tracking(before), held, base_of(before))
        # A base may be dead before its commit: that of a change which was superseded twice.
        base = np.where(alive[base], base, current)
        words[slots] = make_words(current, base, before & _FLAGS | _TRACKING | _begun(before))
        track = self._tracked()
        self.disagree(slots[touched].astype(np.uint32))
        track.touched[slots] |= touched
        track.changed_at_ns[slots[touched]] = now_ns
        if begun is not None:
            was = begun[slots]
            self._remember(slots[was != current], was[was != current], alive)
        return self._changed_of(slots, before)

    def commit(self, table: U32 | None, alive: Bools, now_ns: int) -> U32:
        """``current := table`` (None: it stays), and a base that is gone is given up: its flows are dead.

        alive: (BACKEND_IDS_MAX,), by the committed snapshot alone.
        """
        if table is None and self.track is None:
            return _no_slots()
        words = self.words
        slots = np.flatnonzero(self.tracking if table is None else self.tracking | (current_of(words) != table))
        before = words[slots]
        old, base, tracking = current_of(before), base_of(before), is_tracking(before)
        new = old if table is None else table[slots]
        moved = tracking & (new != old)
        track = self.track
        if track is not None:
            lost = moved & (old != base)
            self._remember(slots[lost], old[lost], alive)
            touched = track.touched[slots] | moved
            track.changed_at_ns[slots[touched]] = now_ns
            self.disagree(slots[touched].astype(np.uint32))
            track.touched[:] = False
            track.orphaned[slots] |= tracking & ~alive[base]
            track.forget_dead(slots, alive)
        base = np.where(tracking & alive[base], base, new)
        words[slots] = make_words(new, base, words[slots] & (_FLAGS | _ROUND))
        return self._changed_of(slots, before)

    def leave(self, alive: Bools) -> U32:
        """The change that is prepared here will not come; nobody has committed it. What tracks goes on tracking."""
        if self.track is None:
            return _no_slots()
        slots = np.flatnonzero(self.tracking).astype(np.uint32)
        words = self.words[slots]
        self.track.touched[:] = False
        self.track.forget_dead(slots, alive)
        current, base = current_of(words), base_of(words)
        base = np.where(alive[base], base, current)
        return self._write(slots, make_words(current, base, words & (_FLAGS | _ROUND)))

    def take_page(self, covered: U32, tracking: U32, words: U64, alive: Bools, now_ns: int) -> U32:
        """What another replica has handed over: of ``covered`` these slots are tracking there, with these words, the
        others steady. A slot that is steady here stays so: that is as true as it is there.

        Whose flows there may be besides base's is not handed over: any backend's.
        """
        before = self.words.copy()
        is_steady = np.ones(SLOT_COUNT, dtype=np.bool_)
        is_steady[tracking] = False
        self.finish(covered[is_steady[covered]])
        mine = is_tracking(self.words[tracking]) & (current_of(self.words[tracking]) == current_of(words))
        slots, words = tracking[mine], words[mine]
        if len(slots):
            track = self._tracked()
            base, current = base_of(words), current_of(words)
            base = np.where(alive[base], base, current)
            mine = self.words[slots] & _ROUND
            self.words[slots] = make_words(current, base, words & _HANDED_FLAGS | _TRACKING | mine)
            track.changed_at_ns[slots] = now_ns
            track.unknown[slots] = True
        return self._changed(before)

    def track_all(self, now_ns: int) -> U32:
        """Track what is steady: this LB has been out of touch, and others may have gone on without it. Each keeps its
        backend as base, and its live flows may have any other one."""
        before = self.words.copy()
        fresh = ~self.tracking & (current_of(before) != 0)
        if fresh.any():
            track = self._tracked()
            self.words[fresh] = before[fresh] & ~_ROUND | _begun(before[fresh]) | _TRACKING
            track.changed_at_ns[fresh] = now_ns
            track.unknown[fresh] = True
        return self._changed(before)

    def count_anew(self, now_ns: int) -> None:
        """Count the quiet time of all tracking slots from now: what was written may have come late."""
        if self.track is not None:
            self.track.changed_at_ns[self.tracking] = now_ns

    # --- Settle -------------------------------------------------------------------------------------------------------
    def flag(self, slots: U32) -> U32:
        """SETTLING on tracking slots: from here on, what the owner cannot record is dropped."""
        return self._write(slots, self.words[slots] | np.where(is_tracking(self.words[slots]), _SETTLING, np.uint64(0)))

    def unflag(self, slots: U32) -> U32:
        """SETTLING off."""
        return self._write(slots, self.words[slots] & ~_SETTLING)

    def agree(self, slots: U32) -> U32:
        """As backup: ``base := current``, and go on tracking. Records of other backends mean nothing from this moment:
        a five-tuple that is used again must not begin where the owner, steady a moment later, does not look."""
        words = self.words[slots]
        agreed = make_words(current_of(words), current_of(words), words & (_FLAGS | _ROUND) | _AGREED)
        return self._write(slots, np.where(is_tracking(words), agreed, words))

    def disagree(self, slots: U32) -> U32:
        """What this LB has agreed to of these is overtaken: by a change, or by a flow that the owner has begun
        elsewhere because it has not heard the answer."""
        ended = slots[is_agreed(self.words[slots])]
        self.doubt(ended)
        return self._write(ended, self.words[ended] & ~_AGREED)

    def take_over(self, slots: U32, bases: U32, alive: Bools) -> U32:
        """As owner: ``base`` is what the backup has made it (``current`` where that backend has died since)."""
        return self._set_base(slots, np.where(alive[bases], bases, current_of(self.words[slots])))

    def doubt(self, slots: U32) -> None:
        """A settle of these has been overtaken by a change. Records of earlier bases may still lie about: none is of a
        live flow, but a five-tuple that is used again goes where its record says, until it has been dropped."""
        if self.track is not None:
            self.track.unknown[slots[is_tracking(self.words[slots])]] = True

    def rebase(self, slots: U32, bases: U32, alive: Bools, now_ns: int) -> U32:
        """As either: every live flow is recorded, so base may move; the old one stays possible, time counts anew."""
        if self.track is None:
            return _no_slots()
        kept = is_tracking(self.words[slots])
        slots, bases = slots[kept], bases[kept]
        self._remember(slots.astype(np.intp), base_of(self.words[slots]), alive)
        self.track.changed_at_ns[slots] = now_ns
        return self.take_over(slots, bases, alive)

    def finish(self, slots: U32) -> U32:
        """Steady: the slot's live flows all belong to ``current``."""
        slots = slots[is_tracking(self.words[slots])]
        if self.track is not None:
            for array in (self.track.touched, self.track.unknown, self.track.orphaned):
                array[slots] = False
            if self.track.earlier is not None:
                self.track.earlier[slots] = 0
        current = current_of(self.words[slots])
        changed = self._write(slots, make_words(current, current, self.words[slots] & _ROUND))
        if not self.tracking.any():
            self.track = None
        return changed

    def possible(self, slots: U32, alive: Bools) -> U32:
        """Backends that live flows of these tracking slots may have besides current: (n, 1 + EARLIER_MAX), 0: none.

        Where ``unknown`` is set, it may be any other one, too.
        """
        words = self.words[slots]
        rows = np.zeros((len(slots), 1 + EARLIER_MAX), dtype=np.uint32)
        rows[:, 0] = base_of(words)
        if self.track is not None and self.track.earlier is not None:
            rows[:, 1:] = self.track.earlier[slots]
        rows[~alive[rows] | (rows == current_of(words)[:, None])] = 0
        return rows

    # --- Tools --------------------------------------------------------------------------------------------------------
    def _tracked(self) -> Track:
        if self.track is None:
            self.track = Track()
        return self.track

    def _remember(self, slots: npt.NDArray[np.intp], backends: U32, alive: Bools) -> None:
        """These slots' backends (n,), 0: none, become possible; dead ones make room, and what finds none makes the slot
        unknown."""
        slots, new = slots[backends != 0], backends[backends != 0]
        if not len(slots):
            return
        track = self._tracked()
        if track.earlier is None:
            track.earlier = np.zeros((SLOT_COUNT, EARLIER_MAX), dtype=np.uint32)
        rows = track.earlier[slots]
        rows[~alive[rows]] = 0
        missing = ~(rows == new[:, None]).any(axis=1)
        free = rows == 0
        put = np.flatnonzero(missing & free.any(axis=1))
        rows[put, free[put].argmax(axis=1)] = new[put]
        track.earlier[slots] = rows
        track.unknown[slots[missing & ~free.any(axis=1)]] = True

    def _set_base(self, slots: U32, bases: U32) -> U32:
        words = self.words[slots]
        moved = make_words(current_of(words), bases, words & (_HANDED_FLAGS | _ROUND))
        return self._write(slots, np.where(is_tracking(words), moved, words))

    def _write(self, slots: U32, words: U64) -> U32:
        changed: U32 = slots[self.words[slots] != words]
        self.words[slots] = words
        return changed

    def _changed(self, before: U64) -> U32:
        return np.flatnonzero(before != self.words).astype(np.uint32)

    def _changed_of(self, slots: npt.NDArray[np.intp], before: U64) -> U32:
        """Of these slots, which had these words before."""
        changed: U32 = slots[before != self.words[slots]].astype(np.uint32)
        return changed

    def check_invariants(self, alive: Bools) -> None:
        """Raise AssertionError where one does not hold. Cheap enough to be called after every step of a test."""
        current, base, tracking = current_of(self.words), base_of(self.words), self.tracking
        assert (base == current)[~tracking].all(), "a steady slot has base == current"
        assert not is_settling(self.words)[~tracking].any(), "only a tracking slot can be settling"
        agreed = is_agreed(self.words)
        assert (tracking & (base == current))[agreed].all(), "what is agreed is that current has all flows"
        assert (alive[current] | (current == 0)).all(), "new flows never get a dead backend"
        assert (alive[base] | (base == current) | (base == 0)).all(), "a dead base is given up"
        assert (self.track is not None) == bool(tracking.any()), "tracks are kept exactly while a slot is tracking"
        if self.track is not None:
            for name in ("touched", "unknown", "orphaned"):
                assert not getattr(self.track, name)[~tracking].any(), f"a steady slot is not {name}"
            if self.track.earlier is not None:
                assert not self.track.earlier[~tracking].any(), "a steady slot has no earlier backends"
