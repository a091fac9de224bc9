"""The clever table against the dumb one: same backends, same slots, whatever the order and whatever came before.

The dumb one is deferred acceptance as the textbook tells it: one slot at a time, each with its whole list of backends
in order of key, each backend with a heap of the slots it keeps. It needs a second or so where the real one needs
milliseconds, so it sees few examples, picked to be mean: no slack at all, weights far apart, more backends than a list
holds. Whether the builder's memory matters is then asked of many more, with the builder compared to itself built anew.
"""

import heapq
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from lbpod.core import table as table_module
from lbpod.core.hashing import MAPPED_PREFIX, SLOT_WORDS, identity_words, pair_costs
from lbpod.core.limits import SLOT_COUNT, TABLE_CANDIDATES_MAX, TABLE_FEW_MAX, TABLE_INCREMENTAL_MIN, WEIGHT_MAX
from lbpod.core.table import Builder, Columns, Slack, TableBackend, build, log_of

weights = st.one_of(st.just(1), st.integers(0, 3), st.integers(0, WEIGHT_MAX))
slacks = st.builds(Slack, st.integers(0, 20), st.sampled_from((20, 100)))
seeds = st.integers(0, 2**32 - 1)


def backend(n: int, weight: int = 1) -> TableBackend:
    """Number ``n``: two ports on each address, ids in another order than the addresses."""
    address = MAPPED_PREFIX + (0x0A000000 + n // 2).to_bytes(4, "big")
    return TableBackend(100_000 - n, address, 8000 + n % 2, weight)


def dumb(backends: list[TableBackend], seed: int, slack: Slack, random: Random) -> list[int]:
    """Deferred acceptance, one slot after the other, in an order that ``random`` chooses. Returns ids."""
    eligible = sorted((b for b in backends if b.weight), key=lambda b: (b.address, b.port))
    if not eligible:
        return [0] * SLOT_COUNT
    words = np.array([identity_words(b.address + b.port.to_bytes(2, "big"), seed, b"hf-table") for b in eligible])
    logs = log_of(pair_costs(SLOT_WORDS, words.astype(np.uint32)))
    keys = logs // np.array([b.weight for b in eligible], dtype=np.uint64)
    preferences = np.argsort(keys, axis=1, kind="stable").tolist()
    key = keys.tolist()
    total = sum(b.weight for b in eligible)
    share = [SLOT_COUNT * b.weight * (slack.denominator + slack.numerator) for b in eligible]
    bounds = [-(-part // (total * slack.denominator)) for part in share]
    kept: list[list[tuple[int, int]]] = [[] for _ in eligible]  # heaps of (-key, -slot): the worst slot on top
    asked = [0] * SLOT_COUNT
    seekers = list(range(SLOT_COUNT))
    random.shuffle(seekers)
    while seekers:
        slot = seekers.pop()
        choice = preferences[slot][asked[slot]]
        asked[slot] += 1
        heapq.heappush(kept[choice], (-key[slot][choice], -slot))
        if len(kept[choice]) > bounds[choice]:
            seekers.append(-heapq.heappop(kept[choice])[1])
    result = [0] * SLOT_COUNT
    for b, heap in zip(eligible, kept, strict=True):
        for _, slot in heap:
            result[-slot] = b.id
    return result


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(weights, max_size=10), seeds, slacks, seeds)
@example([WEIGHT_MAX, 1, 1, 1, WEIGHT_MAX - 1], 1, Slack(0, 1), 1)
@example([1] * 30, 2, Slack(0, 1), 2)  # few, and slots that go deep
@example([1] * 40, 2, Slack(0, 1), 2)  # more than a list holds, and slots that go deep: pages are turned
@example([1, 2, 3, 4] * 20, 3, Slack(1, 20), 3)  # lists that are kept
def test_the_table_is_deferred_acceptance(all_weights: list[int], seed: int, slack: Slack, order: int) -> None:
    random = Random(order)
    backends = [backend(n, weight) for n, weight in enumerate(all_weights)]
    expected = dumb(backends, seed, slack, random)
    random.shuffle(backends)
    assert expected == build(backends, seed, slack).current.tolist()


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 200), weights), max_size=30), seeds, st.randoms(use_true_random=False))
def test_order_does_not_matter(chosen: list[tuple[int, int]], seed: int, random: Random) -> None:
    backends = [backend(n, weight) for n, weight in dict(chosen).items()]
    expected = build(backends, seed)
    random.shuffle(backends)
    table = build(backends, seed)
    assert (expected.current == table.current).all()
    assert expected.digest == table.digest


@settings(max_examples=40)
@given(st.lists(weights, min_size=1, max_size=60), seeds, slacks)
def test_no_backend_has_more_than_its_bound(all_weights: list[int], seed: int, slack: Slack) -> None:
    """And no slot is without one, as long as any backend has a weight."""
    backends = [backend(n, weight) for n, weight in enumerate(all_weights)]
    current = build(backends, seed, slack).current
    total = sum(all_weights)
    counts = np.bincount(current, minlength=100_001)
    assert (0 if total else SLOT_COUNT) == counts[0]
    for b in backends if total else ():
        allowed = SLOT_COUNT * b.weight * (slack.denominator + slack.numerator)
        assert -(-allowed // (total * slack.denominator)) >= counts[b.id]


# One step of a history: which backends come or change their weight (by number), and which go (by position).
steps = st.tuples(
    st.lists(st.tuples(st.integers(0, 300), weights), max_size=6),
    st.lists(st.integers(0, 299), max_size=6),
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(TABLE_INCREMENTAL_MIN - 3, 160),
    st.booleans(),
    st.lists(steps, min_size=1, max_size=8),
    seeds,
    st.sampled_from((Slack(1, 20), Slack(1, 10), Slack(0, 1))),
)
def test_history_does_not_matter(
    count: int, weighted: bool, history: list[tuple[list[tuple[int, int]], list[int]]], seed: int, slack: Slack
) -> None:
    """What a builder keeps from earlier tables shows in its time only."""
    present = {n: backend(n, 1 + n % 7 if weighted else 1) for n in range(count)}
    builder = Builder(seed, slack)
    builder.update(list(present.values()))
    for come, go in history:
        for position in go:
            present.pop(sorted(present)[position % len(present)], None)
        present.update({n: backend(n, weight) for n, weight in come})
        table, anew = builder.update(list(present.values())), build(list(present.values()), seed, slack)
        assert anew.digest == table.digest
        assert (anew.current == table.current).all()
    builder.check_invariants()


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 60), weights), max_size=TABLE_FEW_MAX + 8), min_size=1, max_size=8),
    seeds,
    slacks,
)
def test_tables_of_few_backends_are_those_that_lists_would_make(
    vips: list[list[tuple[int, int]]], seed: int, slack: Slack
) -> None:
    """Also where several VIPs share what is known of their backends, and more of them come than are kept."""
    shared = Columns(seed)
    for chosen in vips:
        backends = [backend(n, weight) for n, weight in dict(chosen).items()]
        table = Builder(seed, slack, shared).update(backends)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(table_module, "TABLE_FEW_MAX", 0)
            by_lists = build(backends, seed, slack)
        assert by_lists.digest == table.digest
        assert (by_lists.current == table.current).all()


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.integers(0, 40), weights, min_size=6, max_size=TABLE_FEW_MAX - 2),
    st.lists(st.lists(st.tuples(st.integers(0, 40), weights), max_size=3), min_size=2, max_size=10),
    seeds,
    slacks,
)
def test_few_backends_that_come_and_go_make_the_tables_that_they_make_anew(
    first: dict[int, int], steps: list[list[tuple[int, int]]], seed: int, slack: Slack
) -> None:
    """A builder that knows the last table, beside another VIP that takes rows of what they share."""
    shared = Columns(seed)
    builder, other, present = Builder(seed, slack, shared), Builder(seed, slack, shared), dict(first)
    builder.update([backend(n, weight) for n, weight in present.items()])
    for step in steps:
        for number, weight in step:
            if present.pop(number, None) is None and len(present) < TABLE_FEW_MAX:
                present[number] = weight
        other.update([backend(50 + number, 1) for number in dict(step)])
        backends = [backend(n, weight) for n, weight in present.items()]
        table, anew = builder.update(backends), build(backends, seed, slack)
        assert anew.digest == table.digest
        assert (anew.current == table.current).all()


def test_a_long_history_fills_its_lists_again() -> None:
    """Two thirds of 240 backends go one by one, so that most lists would run dry; then others come."""
    builder = Builder(7)
    present = [backend(n) for n in range(240)]
    builder.update(present)
    random = Random(7)
    for step in range(160):
        present.pop(random.randrange(len(present)))
        table = builder.update(present)
        if step % 40 == 39:
            builder.check_invariants()
            assert build(present, 7).digest == table.digest
            assert 0.001 > builder.short_lists_count / SLOT_COUNT
    for n in range(300, 340):
        present.append(backend(n, 1 + n % 3))
        table = builder.update(present)
    builder.check_invariants()
    assert build(present, 7).digest == table.digest
    assert 0.001 > builder.short_lists_count / SLOT_COUNT
    assert builder.kept_bytes == SLOT_COUNT * (TABLE_CANDIDATES_MAX + 1) * 8
