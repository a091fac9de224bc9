"""Owners must be the same for everyone who knows the ring, and stay who they are while others come and go.

The clever version works on whole columns; the dumb one here sorts the members of one slot by their score.
"""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lbpod.core import hashing
from lbpod.core.limits import MEMBER_NONE, MEMBERS_MAX, REPLICAS_MAX, SLOT_COUNT
from lbpod.core.ownership import Member, backups, owners, ownership, replicas

SEED = 0x1234
FEW_SLOTS = [0, 1, 77, 12_345, SLOT_COUNT - 1]

addresses = st.integers(0, 2**20 - 1).map(lambda n: hashing.MAPPED_PREFIX + (0x0A000000 + n).to_bytes(4, "big"))
rings = st.lists(
    st.tuples(st.integers(0, MEMBERS_MAX - 1), addresses),
    max_size=12,
    unique_by=(lambda pair: pair[0], lambda pair: pair[1]),
).map(lambda pairs: [Member(id, address) for id, address in pairs])


def ring_of(count: int) -> list[Member]:
    return [Member(n, hashing.MAPPED_PREFIX + bytes((10, 0, n // 256, n % 256))) for n in range(count)]


def dumb(members: list[Member], slot: int, seed: int) -> tuple[int, int]:
    """Owner and backup of one slot, by sorting."""

    def cost(member: Member) -> tuple[int, bytes]:
        words = np.array([hashing.identity_words(member.address, seed, b"hf-ring")], dtype=np.uint32)
        return int(hashing.pair_costs(hashing.SLOT_WORDS[slot : slot + 1], words)[0, 0]), member.address

    ids = [member.id for member in sorted(members, key=cost)] + [MEMBER_NONE, MEMBER_NONE]
    return ids[0], ids[1]


@settings(max_examples=40)
@given(rings, st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_best_and_second_best_in_any_order(members: list[Member], seed: int, random: Random) -> None:
    own = ownership(members, seed)
    for slot in FEW_SLOTS:
        assert dumb(members, slot, seed) == (owners(own)[slot], backups(own)[slot])
    shuffled = list(members)
    random.shuffle(shuffled)
    assert (own == ownership(shuffled, seed)).all()


@settings(max_examples=40)
@given(rings.filter(bool), st.data())
def test_a_member_that_leaves_moves_only_its_own_slots(members: list[Member], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(members))
    before = ownership(members, SEED)
    after = ownership([member for member in members if member != gone], SEED)
    owned, backed = owners(before) == gone.id, backups(before) == gone.id
    assert (before[~owned & ~backed] == after[~owned & ~backed]).all(), "a slot moved that had nothing to do with it"
    assert (owners(before)[backed] == owners(after)[backed]).all(), "an owner changed because its backup left"
    assert (backups(before)[owned] == owners(after)[owned]).all(), "the backup must become the owner"
    assert gone.id not in owners(after)
    assert gone.id not in backups(after)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_small_rings_say_none(count: int) -> None:
    own = ownership(ring_of(count), SEED)
    assert (SLOT_COUNT,) == own.shape
    assert (count == 0) == bool((owners(own) == MEMBER_NONE).all())
    assert (count < 2) == bool((backups(own) == MEMBER_NONE).all())
    assert count == 0 or (owners(own) != MEMBER_NONE).all()
    assert count < 2 or (backups(own) != owners(own)).all()


def test_slots_are_shared_out_about_evenly() -> None:
    own = ownership(ring_of(10), SEED)
    for who in (owners(own), backups(own)):
        counts = np.bincount(who, minlength=10)
        assert 10 == len(counts)
        assert np.abs(counts - SLOT_COUNT / 10).max() < 5 * (SLOT_COUNT * 0.1 * 0.9) ** 0.5


def test_the_id_is_only_a_name() -> None:
    """A node that comes back under another id gets the slots that it had."""
    before = ownership(ring_of(5), SEED)
    after = ownership([*ring_of(4), Member(900, ring_of(5)[4].address)], SEED)
    expected = np.where(owners(before) == 4, 900, owners(before))
    assert (expected == owners(after)).all()


def test_the_seed_changes_the_owners() -> None:
    assert (ownership(ring_of(5), 1) != ownership(ring_of(5), 2)).mean() > 0.5


def test_the_result_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        ownership(ring_of(3), SEED)[0] = 1


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([Member(1, bytes(16)), Member(1, b"x" * 16)], "share an id"),
        ([Member(1, bytes(16)), Member(2, bytes(16))], "share an address"),
        ([Member(MEMBERS_MAX, bytes(16))], "ids are below"),
        ([Member(1, bytes(4))], "16 bytes"),
    ],
)
def test_a_ring_that_makes_no_sense_is_our_mistake(members: list[Member], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        ownership(members, SEED)


ids = st.sampled_from((0, 1, 2, 3, MEMBER_NONE))
columns = st.lists(st.tuples(ids, ids), min_size=8, max_size=8)


def pack(pairs: list[tuple[int, int]]) -> hashing.U32:
    return np.array([owner | backup << 16 for owner, backup in pairs], dtype=np.uint32)


@given(columns, st.none() | columns, st.none() | columns)
def test_replicas_are_each_named_once_in_order(
    own: list[tuple[int, int]], next_: list[tuple[int, int]] | None, prev: list[tuple[int, int]] | None
) -> None:
    listed = replicas(pack(own), None if next_ is None else pack(next_), None if prev is None else pack(prev))
    assert (len(own), REPLICAS_MAX) == listed.shape
    for slot, row in enumerate(listed.tolist()):
        named = [member for array in (own, next_, prev) if array is not None for member in array[slot]]
        expected = list(dict.fromkeys(member for member in named if member != MEMBER_NONE))
        assert expected + [MEMBER_NONE] * (REPLICAS_MAX - len(expected)) == row


def test_replicas_of_a_whole_ring_change() -> None:
    old, new = ownership(ring_of(4), SEED), ownership(ring_of(5), SEED)
    during = replicas(old, new)
    assert (owners(old) == during[:, 0]).all()
    assert (during[:, 4:] == MEMBER_NONE).all()
    assert ((owners(new)[:, None] == during).sum(axis=1) == 1).all()
