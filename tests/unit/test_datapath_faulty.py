"""Faults by seed: the stated share, the same places for the same seed, half-done work that can simply be repeated."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, strategies as st

from lbpod.core import layout
from lbpod.core.limits import SLOT_COUNT
from lbpod.datapath.faulty import FaultyDatapath
from lbpod.datapath.memory import MemoryDatapath
from lbpod.datapath.port import ArrayName, Datapath, DatapathError, FlowMap, NatMap

INDICES = np.arange(16, dtype=np.uint32)
KEYS = np.zeros(16, layout.FLOW)
KEYS["port_be"] = INDICES
OPERATIONS: tuple[Callable[[Datapath], object], ...] = (
    lambda each: each.write(ArrayName.OWN, INDICES, INDICES + 1),
    lambda each: each.read(ArrayName.OWN),
    lambda each: each.vip_create(2),
    lambda each: each.vip_delete(2),
    lambda each: each.write_slots(1, INDICES, INDICES.astype(np.uint64) + 1),
    lambda each: each.read_slots(1),
    lambda each: each.read_other_seen(1),
    lambda each: each.flows_put(FlowMap.RECORDS, KEYS, np.ones(16, layout.RECORD)),
    lambda each: each.flows_delete(FlowMap.RECORDS, KEYS),
    lambda each: each.flows_dump(FlowMap.RECORDS),
    lambda each: each.flows_slice(FlowMap.RECORDS, None),
    lambda each: each.records_drop(KEYS, np.ones(16, layout.RECORD)),
    lambda each: each.records_lookup(KEYS),
    lambda each: each.pending_drain(5),
    lambda each: each.nat_slice(NatMap.NAT, None),
    lambda each: each.nat_delete(NatMap.UNASSURED, np.zeros(16, layout.NAT_KEY), np.zeros(16, np.uint64)),
    lambda each: each.members_door([bytes(16)], [1]),
)


def story(seed: int, share: float, calls: list[int]) -> list[str]:
    """What each call of a sequence comes to."""
    behind = MemoryDatapath()
    behind.vip_create(1)
    faulty = FaultyDatapath(behind, seed, share, share)
    told = []
    for call in calls:
        try:
            answer = OPERATIONS[call](faulty)
            told.append(f"{answer}" if isinstance(answer, int) else "done")
        except DatapathError as error:
            told.append(str(error))
    return told


@given(seed=st.integers(0, 1 << 32), calls=st.lists(st.integers(0, len(OPERATIONS) - 1), max_size=40))
def test_the_same_seed_and_the_same_calls_fail_in_the_same_places(seed: int, calls: list[int]) -> None:
    assert story(seed, 0.3, calls) == story(seed, 0.3, calls)


def test_no_share_no_fault_full_share_nothing_but_faults() -> None:
    calls = list(range(len(OPERATIONS)))
    assert ["fault" not in said for said in story(1, 0.0, calls)] == [True] * len(calls)
    # A put may also say by its count how far it came.
    assert all("fault" in said or said.isdecimal() for said in story(1, 1.0, calls))


def test_a_tenth_is_about_a_tenth() -> None:
    faulty = FaultyDatapath(MemoryDatapath(), 5, 0.0, 0.1)
    failed = 0
    for _ in range(5_000):
        try:
            faulty.records_lookup(KEYS)
        except DatapathError:
            failed += 1
    assert 400 < failed < 600
    assert failed == faulty.fault_count


@given(seed=st.integers(0, 1 << 32))
def test_a_failed_write_leaves_a_prefix_and_repeating_it_completes_it(seed: int) -> None:
    behind = MemoryDatapath()
    behind.vip_create(1)
    faulty = FaultyDatapath(behind, seed, 1.0, 0.0)
    words = np.arange(1, SLOT_COUNT + 1, dtype=np.uint64)
    slots = np.arange(SLOT_COUNT, dtype=np.uint32)
    with pytest.raises(DatapathError):
        faulty.write_slots(1, slots, words)
    written = behind.read_slots(1)
    arrived = int(np.count_nonzero(written))
    assert arrived < SLOT_COUNT
    assert np.array_equal(words[:arrived], written[:arrived])
    faulty.write_share = 0.0
    faulty.write_slots(1, slots, words)
    assert np.array_equal(words, behind.read_slots(1))


@given(seed=st.integers(0, 1 << 32))
def test_a_refused_put_says_the_truth_about_the_first_flows(seed: int) -> None:
    behind = MemoryDatapath()
    faulty = FaultyDatapath(behind, seed, 1.0, 0.0)
    try:
        said = faulty.flows_put(FlowMap.RECORDS, KEYS, np.ones(16, layout.RECORD))
    except DatapathError:
        return
    keys, _ = behind.flows_dump(FlowMap.RECORDS)
    assert [key.tobytes() for key in KEYS[:said]] == [key.tobytes() for key in keys]
