"""The lookup table of a VIP: which backend each of the 65,536 slots has, as a pure function of the backend set.

**What it is.** Rendezvous hashing with weights (each slot scores every backend and takes the best), with a load bound:
a backend keeps the ``ceil((1 + slack) * fair share)`` slots that score it highest and turns the rest away to their next
choice (deferred acceptance: Gale and Shapley 1962; the bound: "Consistent Hashing with Bounded Loads", Mirrokni, Thorup
and Zadimoghaddam 2018). Few slots move when a backend comes or goes, and no backend gets more than its bound.

**Why the order of things cannot matter.** Slots and backends judge a pair by *one* number, its key (lower is better):
a slot prefers the backend with the lower key, a backend the slot with the lower key. Preferences that come from one
strict order of all pairs have exactly one stable matching: the one that a greedy walk over all pairs, best first, would
make (the reference in the tests does just that). Any procedure that ends stable ends there. So the builder is free
to propose in whole rounds, to skip what is sure to be refused, and to keep what it likes from one build to the next.

**The key.** A pair has a 32-bit cost (``hashing.pair_costs``), uniform. With u = cost / 2^32, ``-ln(1 - u) / weight``
is an exponential race, which a backend wins with probability weight / sum of weights: the classic form of weighted
rendezvous (Schindelhauer and Schomaker 2005; Thaler and Ravishankar 1998 for equal weights). Here it is integer
arithmetic: ``key = L(cost) // weight`` with L a table of 65,537 logarithms in units of 2^-42, made with integers at
import, and straight lines between them. L grows by more than the largest weight per unit, so a division never makes two
costs of one backend equal; pairs of equal key in one slot go to the lower (address, port).

**What is kept.** ``Builder`` keeps each slot's nearest pairs (at most ``TABLE_CANDIDATES_MAX``, 8 bytes each) and up to
which key that list is complete: 65,536 * (16 * 8 + 8) bytes = 8.5 MiB per VIP, whatever the number of backends. A
backend more or less then costs one column of hashes and a matching. A builder may be thrown away at any
time, and one that has fewer backends than ``TABLE_INCREMENTAL_MIN`` keeps nothing, as building anew is quick.

**Few backends**, TABLE_FEW_MAX at most, need no lists: the keys of each lie in a row, and a slot that is turned away
takes the smallest of what is left. ``Columns`` keeps the rows that were used last, for all VIPs together, as a key
depends on backend and seed alone; one that is not known costs 1.3 ms. Beside it a builder keeps which backend each slot
liked best (a byte each): one backend more is compared with that alone, and where one has gone only its slots are asked
again. With 20 backends that is 1 ms, and 2 from the rows alone (7 before, with all pairs in one array; lists: 45).

**The digest** is over who the backends are and the place of each slot's in their order: 128 KiB to hash, and not the
1.2 MB of each slot's address and port, which took three times as long as the rest of a table of few. That was what a
digest meant once (``digest_before``): who takes a table accepts both, so that a newer LB follows an older controller;
an older LB says in one sentence that it has another digest than a newer controller.

Tried and dropped: integer weights as that many virtual backends (a weight of 1,000 costs 1,000 columns); a 64-bit cost
(twice the memory traffic, to break ties that are rare and decided by the address anyway); repairing the old matching
along vacancy chains (bounds change with the number of backends, so a change may touch all backends at once; matching
anew takes a few milliseconds).

Left to others: which backends are eligible (draining ones are not), ids, epochs, and what becomes of slots that change.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lbpod.core.hashing import ADDRESS_BYTES, SLOT_WORDS, U8, U32, identity_words, pair_costs
from lbpod.core.limits import (
    BACKEND_IDS_MAX,
    BACKENDS_MAX,
    SLOT_COUNT,
    TABLE_CANDIDATES_MAX,
    TABLE_COLUMNS_MAX,
    TABLE_FEW_MAX,
    TABLE_INCREMENTAL_MIN,
    WEIGHT_MAX,
)

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

DIGEST_BYTES: Final = 16
IDENTITY_BYTES: Final = ADDRESS_BYTES + 2
_DOMAIN: Final = b"hf-table"

LOG_FRACTION_BITS: Final = 42
"""Unit of L: 2^-42. 32 bits for the cost, 10 more so that a division by WEIGHT_MAX still tells costs apart."""
KEY_BITS: Final = 47
"""L ends at 32 ln 2 = 22.2, below 2^5: keys are below 2^47."""
RANK_BITS: Final = 16
"""A *rank* is a backend's position in (address, port) order. A *pair* is ``key << 16 | rank``: below 2^63."""

LOGS_COUNT: Final = 1 << 16
"""Logarithms that are known exactly, but for the last one."""

KEY_END: Final = 1 << KEY_BITS
"""Above every key: a list that is complete up to here holds every backend."""
_NO_PAIR: Final = np.uint64(2**64 - 1)
_RANK_MASK: Final = np.uint64((1 << RANK_BITS) - 1)
_RANK_SHIFT: Final = np.uint64(RANK_BITS)
_KEY_SHIFT: Final = np.uint64(KEY_BITS)
_SLOTS: Final = np.arange(SLOT_COUNT)

_GATHER_KEPT_COUNT: Final = 24
"""Pairs per slot that a search for lists to keep aims at: more than a list holds, so that few lists come out short."""
_GATHER_ONCE_COUNT: Final = 8
"""The same for lists that are used once: most slots take their first or second choice."""
_LIST_COUNT_MIN: Final = 8
"""A list that has become shorter than this is filled anew: matching seldom asks for more."""
_CHUNK_PAIRS: Final = 131_072
"""Pairs scored at once: 512 KiB an array, so that all passes over it stay in the processor's second cache."""
_RENUMBER_ROWS: Final = 2_048
"""Lists renumbered at once, for the same reason."""

assert 1 << (LOG_FRACTION_BITS - 32) > WEIGHT_MAX, "L must grow by more than a weight per unit of cost"
assert 1 << RANK_BITS >= BACKENDS_MAX, "a rank has 16 bits"
assert TABLE_FEW_MAX <= TABLE_COLUMNS_MAX, "the keys of few backends are all known while their table is made"
assert TABLE_FEW_MAX <= 1 << 8, "the rank of one of few backends is kept in a byte"
assert _LIST_COUNT_MIN < TABLE_CANDIDATES_MAX < _GATHER_KEPT_COUNT, (
    "lists are cut from more, and filled before they are empty"
)


@dataclass(frozen=True, slots=True)
class Slack:
    """How much more than its fair share a backend may get: numerator / denominator, exactly."""

    numerator: int
    denominator: int


SLACK_DEFAULT: Final = Slack(1, 20)
"""0.05: at 1,000 backends the fullest has 1.05 of its fair share, and one that leaves moves 1.5 times its own slots."""


@dataclass(frozen=True, slots=True)
class TableBackend:
    """An eligible backend. Identity: (address, port); weight 0 gets no slots; the id is only what the table says."""

    id: int
    """1 <= id < BACKEND_IDS_MAX (0 is 'no backend')."""
    address: bytes
    """16 bytes."""
    port: int
    weight: int = 1
    """0 <= weight <= WEIGHT_MAX."""

    @property
    def identity(self) -> bytes:
        """18 bytes that order, score and digest go by: the address, and the port in network order."""
        return self.address + self.port.to_bytes(2, "big")


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A finished table. Two tables are the same if their digests are."""

    current: U32
    """(SLOT_COUNT,) uint32, read-only: the backend's id of each slot. 0 everywhere iff no backend has a weight."""
    digest: bytes
    """blake2b, 16 bytes, over the identities in their order and each slot's place in it. Ids are not in it."""


def build(backends: Sequence[TableBackend], seed: int, slack: Slack = SLACK_DEFAULT) -> Table:
    """Build the table of a backend set. The order of ``backends`` does not matter. ``seed``: the cluster's, 32 bits."""
    return Builder(seed, slack).update(backends)


class Builder:
    """Builds the tables of one VIP one after the other, each equal to ``build`` of its backends, bit for bit.

    Invariant of the lists (``check_invariants``): row s of ``_pairs`` holds exactly the pairs of slot s whose key is
    below ``_complete[s]``, ascending, then ``_NO_PAIR``. ``_complete`` is KEY_END where that is all pairs there are.
    """

    def __init__(self, seed: int, slack: Slack = SLACK_DEFAULT, columns: "Columns | None" = None) -> None:
        """columns: of the same seed, shared with other builders."""
        assert 0 <= seed < 1 << 32, "the seed has 32 bits"
        assert slack.numerator >= 0 and slack.denominator > 0, "slack is a fraction that is not negative"
        assert columns is None or columns.seed == seed, "scores of another seed are of no use"
        self._seed = seed
        self._slack = slack
        self._columns = columns or Columns(seed)
        self._field = _Field((), seed)
        self._pairs: U64 | None = None
        self._complete: U64 = np.zeros(0, dtype=np.uint64)
        self._best: U8 | None = None
        """(SLOT_COUNT,) rank of the nearest backend by the field, where there are few; None: there are not."""

    @property
    def kept_bytes(self) -> int:
        """Memory kept from one build to the next, but for a few dozen bytes per backend."""
        best_bytes = 0 if self._best is None else self._best.nbytes
        return best_bytes + (0 if self._pairs is None else self._pairs.nbytes + self._complete.nbytes)

    @property
    def short_lists_count(self) -> int:
        """Slots whose list is shorter than it should be and not complete: each may cost a search of its own."""
        return 0 if self._pairs is None else len(_short(self._pairs, self._complete))

    def update(self, backends: Sequence[TableBackend]) -> Table:
        """Build the table of ``backends``, using what is known from the last one."""
        _check(backends)
        eligible = sorted((b for b in backends if b.weight > 0), key=lambda b: b.identity)
        if not eligible:
            self._field, self._pairs, self._best = _Field((), self._seed), None, None
            nobody = np.zeros(SLOT_COUNT, dtype=np.uint32)
            return Table(_frozen(nobody), _digest([], nobody))
        ranks = self._match_few(eligible) if len(eligible) <= TABLE_FEW_MAX else self._match_many(eligible)
        ids = np.array([b.id for b in eligible], dtype=np.uint32)
        return Table(_frozen(ids[ranks]), _digest([b.identity for b in eligible], ranks))

    def check_invariants(self) -> None:
        """Compare the lists with what all scores say. Slow; for tests."""
        if self._pairs is None:
            return
        everything = np.arange(SLOT_COUNT, dtype=np.int64)
        for chunk in _chunks(everything, self._field.count):
            all_pairs = self._field.all_pairs(chunk)
            known = (all_pairs >> _RANK_SHIFT) < self._complete[chunk, None]
            expected = np.sort(np.where(known, all_pairs, _NO_PAIR), axis=1)
            width = min(expected.shape[1], TABLE_CANDIDATES_MAX)
            assert (expected[:, width:] == _NO_PAIR).all(), (
                "a list is said to be complete, but cannot hold so many pairs"
            )
            assert (expected[:, :width] == self._pairs[chunk, :width]).all(), "a list differs from the scores"
            assert (self._pairs[chunk, width:] == _NO_PAIR).all(), "a list holds more pairs than there are"

    def _match_few(self, eligible: Sequence[TableBackend]) -> I64:
        old, new = self._field, _field_of(eligible, self._seed)
        rows = self._columns.rows(new)
        held = self._nearest(old, new, rows)
        self._field, self._pairs, self._best = new, None, _ranks(held).astype(np.uint8)
        return _match_all(held, rows, _bounds(new.weights, self._slack))

    def _nearest(self, old: "_Field", new: "_Field", rows: "_Rows") -> U64:
        """Each slot's best pair: from the last ones where not much has changed."""
        gone = sorted(set(old.entries) - set(new.entries))
        come = sorted(set(new.entries) - set(old.entries))
        if self._best is None or len(gone) == old.count or (len(gone) + len(come)) * 4 > new.count:
            return rows.best(range(new.count))
        ranks = np.array([new.rank(entry) or 0 for entry in old.entries], dtype=np.int64)[self._best]
        held = rows.pairs_at(ranks)
        if gone:
            is_gone = np.array([entry in gone for entry in old.entries])
            lost = np.flatnonzero(is_gone[self._best])
            held[lost] = rows.of(lost).min(axis=0)
        places = [rank for rank in map(new.rank, come) if rank is not None]
        return np.minimum(held, rows.best(places)) if places else held

    def _match_many(self, eligible: Sequence[TableBackend]) -> I64:
        self._best = None
        pairs, complete = self._lists(eligible)
        return _match(self._field, pairs, complete, _bounds(self._field.weights, self._slack))

    def _lists(self, eligible: Sequence[TableBackend]) -> tuple[U64, U64]:
        """Bring field and lists to ``eligible`` (sorted, not empty); the lists are kept only where that pays."""
        old, new = self._field, _field_of(eligible, self._seed)
        self._field = new
        gone = sorted(set(old.entries) - set(new.entries))
        come = sorted(set(new.entries) - set(old.entries))
        pairs, complete = self._pairs, self._complete
        keep = new.count >= TABLE_INCREMENTAL_MIN
        if pairs is None or not keep or (len(gone) + len(come)) * 8 > new.count:
            gather_count = _GATHER_KEPT_COUNT if keep else _GATHER_ONCE_COUNT
            pairs, complete = new.nearest(np.arange(SLOT_COUNT, dtype=np.int64), gather_count)
        else:
            for entry in gone:
                _take_out(pairs, complete, old.column(entry))
            if gone or come:
                _renumber(pairs, old, new)
            for entry in come:
                _put_in(pairs, complete, new.column(entry))
            short = _short(pairs, complete)
            if len(short):
                pairs[short], complete[short] = new.nearest(short, _GATHER_KEPT_COUNT)
        self._pairs, self._complete = (pairs, complete) if keep else (None, np.zeros(0, dtype=np.uint64))
        return pairs, complete


class Columns:
    """Keys of the backends that were scored last, at most TABLE_COLUMNS_MAX: a cache for tables of few backends."""

    def __init__(self, seed: int) -> None:
        self.seed: Final = seed
        self._keys: U64 | None = None
        """(TABLE_COLUMNS_MAX, SLOT_COUNT) keys, as pairs of rank 0. A row that was never used takes no memory."""
        self._rows: OrderedDict[tuple[bytes, int], int] = OrderedDict()
        """(identity, weight) -> its row; the one used last at the end."""

    @property
    def count(self) -> int:
        """Backends whose keys are known."""
        return len(self._rows)

    def clear(self) -> None:
        """Lets all of them go."""
        self._keys = None
        self._rows.clear()

    def rows(self, field: "_Field") -> "_Rows":
        """Keys of a field of this seed. To be used before the next call."""
        if self._keys is None:
            self._keys = np.empty((TABLE_COLUMNS_MAX, SLOT_COUNT), dtype=np.uint64)
        missing = [entry for entry in field.entries if entry not in self._rows]
        for entry in field.entries:
            if entry in self._rows:
                self._rows.move_to_end(entry)
        for entry in missing:
            row = len(self._rows)
            if row == TABLE_COLUMNS_MAX:
                _, row = self._rows.popitem(last=False)
            np.bitwise_and(field.column(entry), ~_RANK_MASK, out=self._keys[row])
            self._rows[entry] = row
        return _Rows(self._keys, np.array([self._rows[entry] for entry in field.entries], dtype=np.int64))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Pairs of a field of few backends, as they lie in ``Columns``."""

    keys: U64
    rows: I64
    """(count,) row of each rank."""

    def best(self, ranks: Iterable[int]) -> U64:
        """(SLOT_COUNT,): the smallest pair with one of these."""
        held = np.full(SLOT_COUNT, _NO_PAIR, dtype=np.uint64)
        pairs = np.empty_like(held)
        for rank in ranks:
            np.bitwise_or(self.keys[self.rows[rank]], np.uint64(rank), out=pairs)
            np.minimum(held, pairs, out=held)
        return held

    def of(self, slots: I64) -> U64:
        """(count, n): all pairs of some slots."""
        # Row by row: indexing with two arrays at once takes three times as long.
        return np.array([self.keys[row].take(slots) | np.uint64(rank) for rank, row in enumerate(self.rows.tolist())])

    def pairs_at(self, ranks: I64) -> U64:
        """(SLOT_COUNT,): each slot's pair with the backend of this rank."""
        pairs: U64 = self.keys.reshape(-1).take((self.rows * SLOT_COUNT)[ranks] + _SLOTS)
        pairs |= ranks.astype(np.uint64)
        return pairs


class _Field:
    """All backends that may get slots, in order of identity, and how every slot scores them."""

    def __init__(self, entries: tuple[tuple[bytes, int], ...], seed: int) -> None:
        self.entries = entries
        """(identity, weight), ascending."""
        self.count = len(entries)
        self.weights: U64 = np.array([weight for _, weight in entries], dtype=np.uint64)
        self._ranks = {entry: rank for rank, entry in enumerate(entries)}
        words = [identity_words(identity, seed, _DOMAIN) for identity, _ in entries]
        self._words: U32 = np.array(words, dtype=np.uint32).reshape(-1, 2)

    def rank(self, entry: tuple[bytes, int]) -> int | None:
        """Position of an entry, or None."""
        return self._ranks.get(entry)

    def column(self, entry: tuple[bytes, int]) -> U64:
        """Pairs of one backend with all slots: (SLOT_COUNT,) uint64."""
        rank = self._ranks[entry]
        costs = pair_costs(SLOT_WORDS, self._words[rank : rank + 1])[:, 0]
        return _pairs_of(costs, self.weights[rank], np.uint64(rank))

    def all_pairs(self, slots: I64) -> U64:
        """Pairs of some slots with all backends: (n, count) uint64, in order of rank."""
        costs = pair_costs(SLOT_WORDS[slots], self._words)
        return _pairs_of(costs, self.weights[None, :], np.arange(self.count, dtype=np.uint64)[None, :])

    def nearest(self, slots: I64, gather_count: int) -> tuple[U64, U64]:
        """Make lists for some slots: (n, TABLE_CANDIDATES_MAX) pairs, (n,) keys up to which they are complete.

        Only costs below a limit (one per backend, from its weight) are looked at closer: about ``gather_count`` a slot.
        """
        end = self._gather_end(gather_count)
        # Costs with a key below the end are below this: the first of the 65,537 logarithms that is too large says so.
        past = np.searchsorted(_LOGS, end * self.weights, side="left").astype(np.uint64) << np.uint64(16)
        last = (np.minimum(past, np.uint64(1 << 32)) - np.uint64(1)).astype(np.uint32)
        pairs = np.full((len(slots), TABLE_CANDIDATES_MAX), _NO_PAIR, dtype=np.uint64)
        complete = np.full(len(slots), end, dtype=np.uint64)
        done = 0
        for chunk in _chunks(slots, self.count):
            costs = pair_costs(SLOT_WORDS[chunk], self._words)
            row, rank = np.divmod(np.flatnonzero(costs <= last), self.count)
            found = _pairs_of(costs[row, rank], self.weights[rank], rank.astype(np.uint64))
            here = slice(done, done + len(chunk))
            _fill(pairs[here], complete[here], row, found)
            done += len(chunk)
        return pairs, complete

    def _gather_end(self, gather_count: int) -> np.uint64:
        """Key below which a slot has about ``gather_count`` pairs (or KEY_END). It changes no table, only the time."""
        if self.count <= gather_count:
            return np.uint64(KEY_END)
        weights, counts = np.unique(self.weights, return_counts=True)
        low, high = 1, KEY_END  # invariant: below `low` there are too few
        while high - low > low >> 6:
            middle = (low + high) // 2
            reach = np.minimum(np.searchsorted(_LOGS, np.uint64(middle) * weights), LOGS_COUNT)
            if int((reach * counts).sum()) < gather_count * LOGS_COUNT:
                low = middle
            else:
                high = middle
        return np.uint64(high)


def _field_of(eligible: Sequence[TableBackend], seed: int) -> _Field:
    return _Field(tuple((b.identity, b.weight) for b in eligible), seed)


def _make_logs() -> U64:
    """L at every 65,536th cost: -ln(1 - i / 65,536) in units of 2^-42, (65,537,) uint64; the last one is ln 2^32.

    Integers only, so that every machine has the same: ln((k + 1) / k) = 2 artanh(1 / (2k + 1)) by its series in units
    of 2^-58, summed up from k = 65,535 down. Rounding loses less than 2^-40 in all; the tests compare with math.log.
    """
    odd = 2 * np.arange(LOGS_COUNT - 1, 0, -1, dtype=np.int64) + 1
    power = (1 << 59) // odd
    steps = power.copy()
    left = steps  # those whose series goes on: the last ones, as power grows from each to the next
    for n in range(3, 64, 2):
        power = power // odd // odd
        left += power // n
        over = len(power) - np.count_nonzero(power)
        power, odd, left = power[over:], odd[over:], left[over:]
    logs = np.zeros(LOGS_COUNT + 1, dtype=np.int64)
    logs[1:LOGS_COUNT] = np.cumsum(steps)
    logs[LOGS_COUNT] = 2 * logs[LOGS_COUNT - 1]
    return (logs >> (58 - LOG_FRACTION_BITS)).astype(np.uint64)


_LOGS: Final = _make_logs()


def log_of(costs: U32) -> U64:
    """L of some costs: -ln(1 - cost / 2^32) in units of 2^-42, any shape; strictly increasing.

    Off by less than 2^-16 of itself up to cost / 2^32 = 0.99; by up to 0.6 of itself in the last 65,536 costs, which a
    pair has once in 65,536 times.
    """
    index = costs >> np.uint32(16)
    below = _LOGS[index]
    rise = _LOGS[index + np.uint32(1)] - below
    logs: U64 = below + ((rise * (costs & np.uint32(0xFFFF))) >> np.uint64(16))
    return logs


def _pairs_of(costs: U32, weights: U64 | np.uint64, ranks: U64 | np.uint64) -> U64:
    return ((log_of(costs) // weights) << _RANK_SHIFT) | ranks


def _chunks(slots: I64, backends_count: int) -> list[I64]:
    """Split slots so that one chunk has about _CHUNK_PAIRS pairs."""
    size = max(1, _CHUNK_PAIRS // backends_count)
    return [slots[start : start + size] for start in range(0, len(slots), size)]


def _fill(pairs: U64, complete: U64, row: I64, found: U64) -> None:
    """Write the pairs found (rows ascending) into empty lists, best first, and cut what is not surely complete."""
    counts = np.bincount(row, minlength=len(pairs))
    width = max(int(counts.max(initial=0)), TABLE_CANDIDATES_MAX + 1)
    wide = np.full((len(pairs), width), _NO_PAIR, dtype=np.uint64)
    wide[row, np.arange(len(row)) - (np.cumsum(counts) - counts)[row]] = found
    wide.sort(axis=1)
    _cut(wide, complete)
    pairs[:] = wide[:, :TABLE_CANDIDATES_MAX]


def _cut(wide: U64, complete: U64) -> None:
    """Make sorted rows of more than TABLE_CANDIDATES_MAX pairs obey the invariant of the lists, in place.

    The first pair that has no room ends what the list can claim; a pair with the same key goes with it, because the
    list says 'all below this key'.
    """
    np.minimum(complete, wide[:, TABLE_CANDIDATES_MAX] >> _RANK_SHIFT, out=complete)
    wide[(wide >> _RANK_SHIFT) >= complete[:, None]] = _NO_PAIR


def _take_out(pairs: U64, complete: U64, column: U64) -> None:
    """Remove a backend, given by its pairs with all slots, from the lists that know it."""
    rows = np.flatnonzero((column >> _RANK_SHIFT) < complete)
    part = pairs[rows]
    part[part == column[rows, None]] = _NO_PAIR
    part.sort(axis=1)
    pairs[rows] = part


def _put_in(pairs: U64, complete: U64, column: U64) -> None:
    """Add a backend to the lists that it is near enough for."""
    rows = np.flatnonzero((column >> _RANK_SHIFT) < complete)
    wide = np.hstack((pairs[rows], column[rows, None]))
    wide.sort(axis=1)
    part = complete[rows]
    _cut(wide, part)
    pairs[rows], complete[rows] = wide[:, :TABLE_CANDIDATES_MAX], part


def _short(pairs: U64, complete: U64) -> I64:
    """Find the lists that hold fewer than _LIST_COUNT_MIN pairs although there are more."""
    return np.flatnonzero((pairs[:, _LIST_COUNT_MIN - 1] == _NO_PAIR) & (complete < np.uint64(KEY_END)))


def _renumber(pairs: U64, old: _Field, new: _Field) -> None:
    """Give the pairs in the lists the ranks of the new field. Order stays: ranks of those who stay keep theirs."""
    ranks = np.full(1 << RANK_BITS, (1 << RANK_BITS) - 1, dtype=np.uint64)
    for rank, entry in enumerate(old.entries):
        ranks[rank] = new.rank(entry) or 0  # those gone are in no list any more
    for start in range(0, len(pairs), _RENUMBER_ROWS):
        part = pairs[start : start + _RENUMBER_ROWS]
        empty = part == _NO_PAIR
        part[:] = (part & ~_RANK_MASK) | ranks[part & _RANK_MASK]
        part[empty] = _NO_PAIR


def _bounds(weights: U64, slack: Slack) -> I64:
    """Most slots that each backend may have: ceil((1 + slack) * SLOT_COUNT * weight / sum of weights), never 0."""
    total = int(weights.sum()) * slack.denominator
    share = (slack.denominator + slack.numerator) * SLOT_COUNT
    return np.array([-(-share * weight // total) for weight in weights.tolist()], dtype=np.int64)


def _match(field: _Field, pairs: U64, complete: U64, bounds: I64) -> I64:
    """Match slots and backends: (SLOT_COUNT,) ranks. ``pairs``, ``complete``: lists for ``field``, left as they are.

    Rounds of deferred acceptance. In each, every slot without a backend proposes to the next one that may still take it
    (one that has turned away a better slot will not), and every backend over its bound turns away its worst. A slot
    that has come to the end of its list gets the next page of it.
    """
    walk = _Walk(field, pairs, complete)
    worst = np.full(
        field.count, KEY_END, dtype=np.uint64
    )  # key of the worst slot that a full backend keeps: only falls
    held = pairs[:, 0].copy()  # at first nobody is turned away
    seekers = np.flatnonzero(held == _NO_PAIR)
    for _ in range(SLOT_COUNT * field.count):
        held[seekers] = walk.next(seekers, worst)
        ranks = _ranks(held)
        over = np.bincount(ranks, minlength=field.count) > bounds
        if not over.any():
            return ranks
        crowd = np.flatnonzero(over[ranks])
        seekers = _turn_away(crowd, held[crowd], bounds, worst)
    raise AssertionError("every round turns a slot away for good, so there cannot be more rounds than pairs")


def _match_all(best: U64, rows: _Rows, bounds: I64) -> I64:
    """The same on all pairs: a slot that is turned away proposes to the best of those behind. best: (SLOT_COUNT,)."""
    count = len(rows.rows)
    worst = np.full(count, KEY_END, dtype=np.uint64)
    held, ranks = best, _ranks(best)
    for _ in range(SLOT_COUNT * count):
        over = np.bincount(ranks, minlength=count) > bounds
        if not over.any():
            return ranks
        crowd = np.flatnonzero(over[ranks])
        seekers = _turn_away(crowd, held[crowd], bounds, worst)
        left = rows.of(seekers)
        left[((left >> _RANK_SHIFT) > worst[:, None]) | (left <= held[seekers])] = _NO_PAIR
        held[seekers] = left.min(axis=0)
        assert (held[seekers] != _NO_PAIR).all(), "the bounds have room for every slot, so some backend takes it"
        ranks[seekers] = _ranks(held[seekers])
    raise AssertionError("every round turns a slot away for good, so there cannot be more rounds than pairs")


def _ranks(pairs: U64) -> I64:
    return (pairs & _RANK_MASK).astype(np.int64)


def _turn_away(crowd: I64, held: U64, bounds: I64, worst: U64) -> I64:
    """Choose those of ``crowd`` (all slots of backends over their bound) that have to go, and lower ``worst``."""
    # Keys differ within a backend (see hashing.pair_costs), so this order has no ties.
    order = np.argsort(((held & _RANK_MASK) << _KEY_SHIFT) | (held >> _RANK_SHIFT))
    held = held[order]
    ranks = _ranks(held)
    first = np.flatnonzero(np.diff(ranks, prepend=-1))
    place = np.arange(len(ranks)) - np.repeat(first, np.diff(first, append=len(ranks)))
    last_kept = first + bounds[ranks[first]] - 1
    worst[ranks[first]] = held[last_kept] >> _RANK_SHIFT
    return crowd[order[place >= bounds[ranks]]]


class _Walk:
    """Where each slot stands in its list of backends while a table is matched."""

    def __init__(self, field: _Field, pairs: U64, complete: U64) -> None:
        self._field = field
        self._pairs = pairs
        self._owned = False
        self._at = np.ones(SLOT_COUNT, dtype=np.int64)
        """Column of the first pair that the slot has not looked at; it starts with the one in column 0."""
        self._unseen = complete << _RANK_SHIFT
        """Smallest pair that may be beyond the slot's row."""

    def next(self, slots: I64, worst: U64) -> U64:
        """Give each slot's next pair that its backend may accept, and move behind it."""
        result = np.full(len(slots), _NO_PAIR, dtype=np.uint64)
        if not len(slots):
            return result
        left = np.arange(len(slots), dtype=np.int64)
        columns = np.arange(TABLE_CANDIDATES_MAX, dtype=np.int64)
        for _ in range(self._field.count + 1):
            rows = slots[left]
            part = self._pairs[rows]
            there = (part != _NO_PAIR) & (columns >= self._at[rows, None])
            keys = np.where(there, part >> _RANK_SHIFT, np.uint64(KEY_END))
            open_ = there & (keys <= worst[np.where(there, part & _RANK_MASK, np.uint64(0)).astype(np.int64)])
            column = open_.argmax(axis=1)
            found = open_[np.arange(len(rows)), column]
            result[left[found]] = part[found, column[found]]
            self._at[rows[found]] = column[found] + 1
            left = left[~found]
            if not len(left):
                return result
            self._turn_page(slots[left])
        raise AssertionError("the bounds have room for every slot, so some backend takes it")

    def _turn_page(self, slots: I64) -> None:
        """Replace the rows of some slots by their next pairs. Scores every backend: for the few that get so far."""
        if not self._owned:
            self._pairs, self._owned = self._pairs.copy(), True
        for chunk in _chunks(slots, self._field.count):
            beyond = self._field.all_pairs(chunk)
            beyond[beyond < self._unseen[chunk, None]] = _NO_PAIR
            width = min(TABLE_CANDIDATES_MAX, self._field.count)
            page = np.sort(np.partition(beyond, width - 1, axis=1)[:, :width], axis=1)
            assert (page[:, 0] != _NO_PAIR).all(), "a slot was turned away by every backend"
            self._pairs[chunk] = _NO_PAIR
            self._pairs[chunk, :width] = page
            self._unseen[chunk] = page.max(axis=1, initial=0, where=page != _NO_PAIR) + np.uint64(1)
        self._at[slots] = 0


def _check(backends: Sequence[TableBackend]) -> None:
    assert len(backends) <= BACKENDS_MAX, f"a table has at most {BACKENDS_MAX} backends"
    for backend in backends:
        assert 0 < backend.id < BACKEND_IDS_MAX, f"backend id {backend.id} is out of range"
        assert len(backend.address) == ADDRESS_BYTES, "a backend's address is 16 bytes"
        assert 0 <= backend.weight <= WEIGHT_MAX, f"weight {backend.weight} is out of range"
    assert len({backend.identity for backend in backends}) == len(backends), "two backends share address and port"


def _frozen(array: U32) -> U32:
    array.setflags(write=False)
    return array


def table_digest(table: U32, backends: Sequence[TableBackend]) -> bytes | None:
    """The digest of a table that somebody has written down (ids, 0: none), if it has these backends and no others.

    The same as that of a table which was built: an agent that has restarted knows by it that its slots are right, for a
    hundredth of what building costs where backends are many.
    """
    known = sorted((one for one in backends if one.weight > 0), key=lambda one: one.identity)
    if not known:
        return None if table.any() else _digest([], table)
    ids = np.array([one.id for one in known], dtype=np.uint32)
    order = np.argsort(ids)
    places = np.minimum(np.searchsorted(ids[order], table), len(known) - 1)
    ranks = order[places]
    if (ids[ranks] != table).any():
        return None
    return _digest([one.identity for one in known], ranks)


def digest_before(table: U32, backends: Sequence[TableBackend]) -> bytes | None:
    """What ``table_digest`` was once: over each slot's 16-byte address and port (18 zero bytes: none)."""
    known = sorted(backends, key=lambda one: one.id)
    ids = np.array([0, *(one.id for one in known)], dtype=np.uint32)
    places = np.minimum(np.searchsorted(ids, table), len(known))
    if (ids[places] != table).any():
        return None
    identities = np.frombuffer(
        b"".join((bytes(IDENTITY_BYTES), *(one.identity for one in known))), f"V{IDENTITY_BYTES}"
    )
    return hashlib.blake2b(identities[places].data, digest_size=DIGEST_BYTES).digest()


def _digest(identities: Sequence[bytes], ranks: npt.NDArray[np.integer[Any]]) -> bytes:
    """identities: ascending; ranks: each slot's place among them (0 where there are none)."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES, person=_DOMAIN)
    digest.update(len(identities).to_bytes(4, "little"))
    digest.update(b"".join(identities))
    digest.update(ranks.astype("<u2").data)
    return digest.digest()
