"""The table in examples: what it says, what its digest covers, how exact its weights are, what it refuses.

The pinned digests are a promise to the other LBs of a cluster in the middle of an upgrade: a build of Holdfast that
computes another table from the same backends cannot commit together with the old ones. If one of them has to change,
the change is one of protocol.
"""

import hashlib
import math

import numpy as np
import pytest

from lbpod.core import table as table_module
from lbpod.core.hashing import MAPPED_PREFIX
from lbpod.core.limits import BACKEND_IDS_MAX, BACKENDS_MAX, SLOT_COUNT, TABLE_INCREMENTAL_MIN, WEIGHT_MAX
from lbpod.core.table import LOG_FRACTION_BITS, Builder, Slack, TableBackend, build, digest_before, log_of, table_digest

UNBOUNDED = Slack(1_000_000, 1)


def backend(n: int, weight: int = 1, id: int | None = None) -> TableBackend:
    return TableBackend(id or n + 1, MAPPED_PREFIX + (0x0A000000 + n).to_bytes(4, "big"), 8080, weight)


def some(count: int) -> list[TableBackend]:
    return [backend(n) for n in range(count)]


@pytest.mark.parametrize("backends", [[], [backend(0, weight=0)], [backend(n, weight=0) for n in range(100)]])
def test_no_weight_at_all_is_an_empty_table(backends: list[TableBackend]) -> None:
    table = build(backends, 1)
    assert (SLOT_COUNT,) == table.current.shape
    assert not table.current.any()
    assert build([], 2).digest == table.digest


def test_all_backends_may_go_and_come_back() -> None:
    builder = Builder(1)
    for count in (100, 0, 100, 1, 0, 0, 2):
        assert build(some(count), 1).digest == builder.update(some(count)).digest


def test_a_single_backend_has_every_slot() -> None:
    assert (build([backend(5, id=9)], 1).current == 9).all()


def test_weight_zero_is_as_good_as_absent() -> None:
    assert build(some(5), 1).digest == build([*some(5), backend(5, weight=0)], 1).digest


def test_ids_are_in_the_table_but_not_in_the_digest() -> None:
    plain, renamed = build(some(5), 1), build([backend(n, id=100 + n) for n in range(5)], 1)
    assert plain.digest == renamed.digest
    assert (plain.current + 99 == renamed.current).all()


@pytest.mark.parametrize(
    "backends", [[], some(1), [backend(n, weight=n % 3, id=500 - n) for n in range(7)], some(TABLE_INCREMENTAL_MIN + 9)]
)
def test_a_table_that_was_written_down_has_the_digest_that_it_was_built_with(backends: list[TableBackend]) -> None:
    built = build(backends, 1)
    assert built.digest == table_digest(built.current, list(reversed(backends)))
    for stranger in (1, 77, 40_000, 2**32 - 1, 0):
        other = built.current.copy()
        other[11] = stranger if stranger != other[11] else 2
        assert built.digest != table_digest(other, backends)


def test_the_digest_of_an_earlier_release_is_over_the_endpoint_of_every_slot() -> None:
    backends = [backend(n, weight=n % 3, id=500 - n) for n in range(7)]
    table = build(backends, 1).current
    identity = {one.id: one.identity for one in backends}
    every = b"".join(identity[number] for number in table.tolist())
    assert hashlib.blake2b(every, digest_size=16).digest() == digest_before(table, backends)
    nothing = hashlib.blake2b(bytes(18 * SLOT_COUNT), digest_size=16).digest()
    assert nothing == digest_before(np.zeros(SLOT_COUNT, np.uint32), [])


def test_a_new_id_alone_reaches_a_table_that_is_built_from_kept_lists() -> None:
    builder = Builder(1)
    builder.update(some(100))
    current = builder.update([*some(99), backend(99, id=7_000)]).current
    assert 7_000 in current
    assert 100 not in current


def test_equal_weights_are_equal_whatever_they_are() -> None:
    assert build(some(30), 1).digest == build([backend(n, weight=WEIGHT_MAX) for n in range(30)], 1).digest


def test_address_port_weight_and_seed_all_count() -> None:
    base = build(some(4), 1).digest
    other_port = TableBackend(1, backend(0).address, 8081)
    others = [
        build([*some(3), backend(77)], 1).digest,
        build([other_port, *some(4)[1:]], 1).digest,
        build([backend(0, weight=2), *some(4)[1:]], 1).digest,
        build(some(4), 2).digest,
        build(some(3), 1).digest,
    ]
    assert 6 == len({base, *others})


def test_slack_counts_where_it_binds() -> None:
    assert build(some(100), 1, Slack(1, 20)).digest != build(some(100), 1, Slack(1, 10)).digest
    assert build(some(2), 1, Slack(1, 2)).digest == build(some(2), 1, UNBOUNDED).digest


def test_without_slack_everybody_gets_the_fair_share() -> None:
    assert [SLOT_COUNT // 64] * 64 == np.bincount(build(some(64), 1, Slack(0, 1)).current)[1:].tolist()


def test_the_table_cannot_be_written() -> None:
    for backends in (some(3), []):
        with pytest.raises(ValueError, match="read-only"):
            build(backends, 1).current[0] = 1


@pytest.mark.parametrize(
    ("count", "weighted", "seed", "before", "digest"),
    [
        (3, False, 0, "14fc51a3ea51df81bb88004def543889", "26551e2b14f50e38870d97f54ec665d6"),
        (10, True, 0x9747B28C, "4dd1e41e312fc1e78f4519855795c2b7", "d17e4caf8e1da3ead0c939cf57992cf7"),
        (100, False, 1, "f4fb48464e0b0ca808ec04954b699691", "46f45756e388a523611d07f7acfc38a6"),
        (1000, True, 0xFFFFFFFF, "ce47bd1eb19344090182bc911bef3848", "1c60091d7cc094009f45e264174e44e7"),
    ],
)
def test_digests_are_for_ever(count: int, weighted: bool, seed: int, before: str, digest: str) -> None:
    backends = [backend(n, 1 + n * 7 % 10 if weighted else 1) for n in range(count)]
    built = build(backends, seed)
    assert digest == built.digest.hex()
    assert before == (digest_before(built.current, backends) or b"").hex()


def test_few_backends_keep_nothing_and_many_keep_a_fixed_amount() -> None:
    builder = Builder(1)
    kept = []
    for count in (TABLE_INCREMENTAL_MIN - 1, TABLE_INCREMENTAL_MIN, 500, TABLE_INCREMENTAL_MIN - 1):
        builder.update(some(count))
        kept.append(builder.kept_bytes)
    assert [0, 8_912_896, 8_912_896, 0] == kept


def test_slots_that_go_beyond_their_list_leave_it_as_it_is() -> None:
    """Without slack, some slots are turned away by all 16 backends of their list."""
    builder = Builder(1, Slack(0, 1))
    builder.update(some(100))
    builder.check_invariants()


def test_more_backends_than_lists_are_built_for() -> None:
    """5,000 backends, 13 slots each: every slot has one, nobody more than ceil(1.05 * 13.1) = 14."""
    counts = np.bincount(build(some(5_000), 1).current, minlength=5_001)
    assert 0 == counts[0]
    assert 14 == counts.max()


# --- Weights ----------------------------------------------------------------------------------------------------------
def test_the_logarithm_is_exact_enough() -> None:
    """Relative error: below 2^-16 up to 0.99, where nearly all winners are; below 0.6 up to the very last cost."""
    rng = np.random.default_rng(1)
    costs = np.unique(
        np.concatenate((rng.integers(0, 2**32, 100_000), np.arange(2_000), 2**32 - 1 - np.arange(70_000)))
    )
    ours = log_of(costs.astype(np.uint32)) / 2.0**LOG_FRACTION_BITS
    exact = -np.log1p(-costs / 2.0**32)
    error = np.abs(ours - exact) / np.maximum(exact, 2.0**-32)
    assert 2.0**-16 > error[costs < 0.99 * 2**32].max()
    assert 0.6 > error[costs >= 0.99 * 2**32].max()
    assert table_module.KEY_END > int(log_of(np.array([2**32 - 1], dtype=np.uint32))[0])


def test_the_logarithm_grows_by_more_than_any_weight() -> None:
    """So no two costs of one backend have the same key. The slope only grows, so the first steps are the smallest."""
    assert WEIGHT_MAX < np.diff(log_of(np.arange(300_000, dtype=np.uint32)).astype(np.int64)).min()
    for start in range(65_535, 2**32 - 70_000, 50_000_003):
        window = log_of(np.arange(start, start + 4_000, dtype=np.uint32)).astype(np.int64)
        assert WEIGHT_MAX < np.diff(window).min()


def test_the_breakpoints_are_the_logarithms() -> None:
    for i in (1, 2, 255, 32_768, 65_000, 65_534, 65_535):
        ours = int(log_of(np.array([i << 16], dtype=np.uint32))[0])
        assert abs(ours - -math.log1p(-i / 65_536) * 2**LOG_FRACTION_BITS) < 2 + 2.0 ** (LOG_FRACTION_BITS - 45)


@pytest.mark.parametrize("weights", [[1, 2, 3, 4], [1, 1000], [500, 501, 502], list(range(1, 41)), [1000] + [7] * 60])
def test_slots_go_by_weight(weights: list[int]) -> None:
    """Without a bound a backend's slots are binomial: within 5 standard deviations of its share, over 8 seeds."""
    counts = np.zeros(len(weights))
    backends = [backend(n, weight) for n, weight in enumerate(weights)]
    for seed in range(8):
        counts += np.bincount(build(backends, seed, UNBOUNDED).current, minlength=len(weights) + 1)[1:]
    share = np.array(weights) / sum(weights)
    deviation = np.sqrt(8 * SLOT_COUNT * share * (1 - share))
    assert 5 > (np.abs(counts - 8 * SLOT_COUNT * share) / deviation).max()


def test_with_the_bound_weights_hold_on_both_sides() -> None:
    """At most 5 % over the share (and the rounding up); what the bound takes from some does not starve others."""
    weights = [1 + n % 10 for n in range(200)]
    counts = np.bincount(build([backend(n, w) for n, w in enumerate(weights)], 1).current, minlength=201)[1:]
    share = SLOT_COUNT * np.array(weights) / sum(weights)
    assert (np.ceil(1.05 * share) >= counts).all()
    assert 0.85 < np.array([counts[n::10].sum() / share[n::10].sum() for n in range(10)]).min()


def test_without_a_bound_only_the_slots_of_the_one_that_goes_move() -> None:
    backends = [backend(n, 1 + n % 5) for n in range(80)]
    builder = Builder(3, UNBOUNDED)
    before = builder.update(backends).current
    after = builder.update(backends[:40] + backends[41:]).current
    assert ((before != after) == (before == 41)).all()


# --- Mistakes of ours -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("backends", "sentence"),
    [
        ([backend(1, id=1), backend(1, id=2)], "share address and port"),
        ([TableBackend(1, bytes(4), 80)], "16 bytes"),
        ([backend(1, weight=WEIGHT_MAX + 1)], "weight 1001 is out of range"),
        ([backend(1, weight=-1)], "weight -1 is out of range"),
        ([TableBackend(0, bytes(16), 80)], "id 0 is out of range"),
        ([TableBackend(BACKEND_IDS_MAX, bytes(16), 80)], "is out of range"),
        ([backend(0)] * (BACKENDS_MAX + 1), "at most 65536"),
    ],
)
def test_backends_that_make_no_sense(backends: list[TableBackend], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        build(backends, 1)


@pytest.mark.parametrize(
    ("seed", "slack", "sentence"),
    [
        (-1, Slack(1, 20), "32 bits"),
        (2**32, Slack(1, 20), "32 bits"),
        (1, Slack(-1, 20), "slack"),
        (1, Slack(1, 0), "slack"),
    ],
)
def test_settings_that_make_no_sense(seed: int, slack: Slack, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        Builder(seed, slack)
