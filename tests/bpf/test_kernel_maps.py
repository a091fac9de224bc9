"""The port's promises, kept by every maker: the same tests on maps in memory and on the kernel's.

What only the kernel's maker promises (pins, versions, crashes half way) is in ``test_pins.py``.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from lbpod.core import layout
from lbpod.core.limits import BATCH_MAX, INNER_MAPPED_MAX, LOOKUP_BATCH_MAX, SLOT_COUNT, VIPS_MAX
from lbpod.core.verdicts import Verdict
from lbpod.datapath import kernel
from lbpod.datapath.layout import MAPS
from lbpod.datapath.port import ArrayName, DatapathError, FlowMap, NatMap
from tests.bpf.datapaths import SIZES, Made, bpffs, flows, in_kernel, in_memory, nat_keys, need_kernel, whole_nat

Maker = Callable[[Path], AbstractContextManager[Made]]
ONE_MADE = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""One datapath serves all examples of a property: they begin by reading what is there."""


@pytest.fixture(params=[in_memory, in_kernel], ids=["memory", "kernel"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Made]:
    maker: Maker = request.param
    if maker is in_memory:
        with maker(tmp_path) as each:
            yield each
        return
    need_kernel()
    with bpffs(tmp_path / "bpffs") as folder, maker(folder) as each:
        yield each


def records(backends: npt.NDArray[np.int64] | int, count: int = 1) -> npt.NDArray[np.void]:
    rows = np.zeros(count if isinstance(backends, int) else len(backends), layout.RECORD)
    rows["backend"], rows["seen_ns"] = backends, 5
    return rows


def by_key(dumped: tuple[npt.NDArray[np.void], npt.NDArray[np.void]]) -> dict[bytes, bytes]:
    keys, values = dumped
    found = {key.tobytes(): value.tobytes() for key, value in zip(keys, values, strict=True)}
    assert len(keys) == len(found), "a dump names every key once"
    return found


# --- Arrays -----------------------------------------------------------------------------------------------------------


@ONE_MADE
@given(data=st.data(), name=st.sampled_from([name for name in ArrayName if name is not ArrayName.CONFIG]))
def test_what_is_written_to_an_array_is_read_and_nothing_else_changes(
    made: Made, data: st.DataObject, name: ArrayName
) -> None:
    dtype = MAPS[name.value][1]
    expected = made.datapath.read(name)
    indices = np.array(data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=8, unique=True)), np.uint32)
    blob = data.draw(st.binary(min_size=len(indices) * dtype.itemsize, max_size=len(indices) * dtype.itemsize))
    rows = np.frombuffer(blob, dtype)
    made.datapath.write(name, indices, rows)
    expected[indices] = rows
    assert expected.tobytes() == made.datapath.read(name).tobytes()


def test_config_carries_the_layout_version_whatever_is_written(made: Made) -> None:
    row = np.zeros(1, layout.CONFIG)
    row["vni"] = 77
    made.datapath.write(ArrayName.CONFIG, np.zeros(1, np.uint32), row)
    read = made.datapath.read(ArrayName.CONFIG)
    row["version"] = layout.LAYOUT_VERSION
    assert row.tobytes() == read.tobytes()


def test_what_is_read_is_a_copy(made: Made) -> None:
    made.datapath.vip_create(3)
    made.datapath.read(ArrayName.OWN)[:] = 9
    made.datapath.read_slots(3)[:] = 9
    made.datapath.read_other_seen(3)[:] = 9
    assert not made.datapath.read(ArrayName.OWN).any()
    assert not made.datapath.read_slots(3).any()
    assert not made.datapath.read_other_seen(3).any()


def test_a_row_past_the_end_is_refused_and_nothing_is_written(made: Made) -> None:
    with pytest.raises(DatapathError):
        made.datapath.write(ArrayName.OWN, np.array([0, SLOT_COUNT], np.uint32), np.ones(2, np.uint32))
    assert not made.datapath.read(ArrayName.OWN).any()


# --- VIPs -------------------------------------------------------------------------------------------------------------


def test_a_vip_comes_with_zeroes_and_goes_with_its_slots(made: Made) -> None:
    datapath = made.datapath
    for vip in (9, 3, 9):
        datapath.vip_create(vip)
    assert [3, 9] == list(datapath.vip_ids())
    datapath.write_slots(9, np.array([5], np.uint32), np.array([1 << 40], np.uint64))
    datapath.vip_create(9)
    assert 1 << 40 == datapath.read_slots(9)[5], "creating a VIP that exists leaves it as it is"
    for vip in (9, 9, 100):
        datapath.vip_delete(vip)
    assert [3] == list(datapath.vip_ids())
    datapath.vip_create(9)
    assert not datapath.read_slots(9).any()
    assert not datapath.read_other_seen(9).any()


def test_slots_of_a_vip_that_does_not_exist_are_refused(made: Made) -> None:
    one, word = np.zeros(1, np.uint32), np.zeros(1, np.uint64)
    for refused in (
        lambda: made.datapath.write_slots(5, one, word),
        lambda: made.datapath.read_slots(5),
        lambda: made.datapath.read_other_seen(5),
        lambda: made.datapath.vip_create(0),
        lambda: made.datapath.vip_create(VIPS_MAX),
    ):
        with pytest.raises(DatapathError):
            refused()
    assert [] == list(made.datapath.vip_ids())


def test_a_whole_table_is_written_and_read(made: Made) -> None:
    made.datapath.vip_create(1)
    made.datapath.vip_create(2)
    order = np.random.default_rng(1).permutation(SLOT_COUNT).astype(np.uint32)
    words = np.random.default_rng(2).integers(0, 1 << 63, SLOT_COUNT, np.uint64)
    made.datapath.write_slots(1, order, words[order])
    assert np.array_equal(words, made.datapath.read_slots(1))
    assert not made.datapath.read_slots(2).any(), "the other VIP's slots are its own"
    with pytest.raises(DatapathError):
        made.datapath.write_slots(1, np.array([SLOT_COUNT], np.uint32), np.zeros(1, np.uint64))


def test_more_vips_are_served_than_are_mapped_at_one_time(made: Made) -> None:
    vips, slot = range(1, INNER_MAPPED_MAX + 3), np.array([9], np.uint32)
    for vip in vips:
        made.datapath.vip_create(vip)
    for turn in (1, 2):
        for vip in vips:
            made.datapath.write_slots(vip, slot, np.array([vip << turn], np.uint64))
        assert [vip << turn for vip in vips] == [int(made.datapath.read_slots(vip)[9]) for vip in vips]
    assert INNER_MAPPED_MAX + len(OF_THAT_SIZE) >= _mapped_count() < 2 * len(vips)


OF_THAT_SIZE = (ArrayName.OWN, ArrayName.NEXT, ArrayName.PREV)


def _mapped_count() -> int:
    """BPF arrays as large as those of a VIP that this process has mapped."""
    rows = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "bpf-map" in line]
    sizes = [int(end, 16) - int(begin, 16) for begin, _, end in (row.partition("-") for row in rows)]
    return sizes.count(SLOT_COUNT * 8)


# --- Flows ------------------------------------------------------------------------------------------------------------


@ONE_MADE
@given(data=st.data())
def test_flow_maps_are_dictionaries(made: Made, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([FlowMap.CACHE, FlowMap.RECORDS, FlowMap.EMBRYONIC, FlowMap.PENDING]))
    value = MAPS[name.value][1]
    model = by_key(made.datapath.flows_dump(name))
    for _ in range(data.draw(st.integers(1, 4))):
        keys = flows(64)[data.draw(st.lists(st.integers(0, 63), max_size=70))]
        if data.draw(st.booleans()):
            size = len(keys) * value.itemsize
            values = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), value)
            assert len(keys) == made.datapath.flows_put(name, keys, values)
            model |= {key.tobytes(): row.tobytes() for key, row in zip(keys, values, strict=True)}
        else:
            made.datapath.flows_delete(name, keys)
            for key in keys:
                model.pop(key.tobytes(), None)
        assert model == by_key(made.datapath.flows_dump(name))


def test_a_full_map_stores_the_first_flows_and_says_how_many(made: Made) -> None:
    room, more = SIZES["records"], SIZES["records"] + 300
    assert room > BATCH_MAX, "the refusal comes in the middle of the second batch"
    assert room == made.datapath.flows_put(FlowMap.RECORDS, flows(more), records(np.arange(more)))
    stored = by_key(made.datapath.flows_dump(FlowMap.RECORDS))
    assert {key.tobytes() for key in flows(room)} == set(stored)
    assert 10 == made.datapath.flows_put(FlowMap.RECORDS, flows(10), records(3, 10)), "replacing needs no room"
    made.datapath.flows_delete(FlowMap.RECORDS, flows(more))
    assert {} == by_key(made.datapath.flows_dump(FlowMap.RECORDS))


def test_many_flows_survive_the_seams_between_batches(made: Made) -> None:
    count = BATCH_MAX + 1
    assert count == made.datapath.flows_put(FlowMap.RECORDS, flows(count), records(np.arange(count)))
    found = made.datapath.records_lookup(flows(count))
    assert np.array_equal(np.arange(count), found["backend"])
    # Every other key is missing: a batched delete stumbles on each of them.
    made.datapath.flows_delete(FlowMap.RECORDS, flows(count)[::2])
    made.datapath.flows_delete(FlowMap.RECORDS, flows(count)[:100])
    left = {key.tobytes() for key in flows(count)[101::2]}
    assert left == set(by_key(made.datapath.flows_dump(FlowMap.RECORDS)))


def test_a_look_up_asks_records_first_then_the_embryonic_ones(made: Made) -> None:
    count = LOOKUP_BATCH_MAX + 3
    made.datapath.flows_put(FlowMap.RECORDS, flows(2), records(1, 2))
    made.datapath.flows_put(FlowMap.EMBRYONIC, flows(2, first=1), records(2, 2))
    found = made.datapath.records_lookup(flows(count))
    assert [1, 1, 2] == list(found["backend"][:3])
    assert [0, 0, layout.RECORD_EMBRYONIC] == list(found["round"][:3])
    assert (found["round"][3:] == layout.RECORD_MISSING).all()
    assert 0 == len(made.datapath.records_lookup(flows(0)))


def test_an_empty_batch_is_no_work(made: Made) -> None:
    for name in FlowMap:
        assert 0 == made.datapath.flows_put(name, flows(0), np.zeros(0, MAPS[name.value][1]))
        made.datapath.flows_delete(name, flows(0))
        keys, values = made.datapath.flows_dump(name)
        assert (0, layout.FLOW, 0, MAPS[name.value][1]) == (len(keys), keys.dtype, len(values), values.dtype)
    made.datapath.write(ArrayName.OWN, np.zeros(0, np.uint32), np.zeros(0, np.uint32))


def test_draining_takes_every_flow_once_and_no_more_than_asked_for(made: Made) -> None:
    values = np.zeros(1_000, layout.PENDING)
    values["slot"] = np.arange(1_000)
    made.datapath.flows_put(FlowMap.PENDING, flows(1_000), values)
    taken: dict[bytes, bytes] = {}
    for asked in (1, 7, 300, 600, 92, 50):
        part = by_key(made.datapath.pending_drain(asked))
        assert min(asked, 1_000 - len(taken)) == len(part)
        assert not taken.keys() & part.keys()
        taken |= part
    assert {key.tobytes(): value.tobytes() for key, value in zip(flows(1_000), values, strict=True)} == taken
    assert {} == by_key(made.datapath.flows_dump(FlowMap.PENDING))


# --- Host agent, door, counters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NatMap)
def test_nat_is_read_whole_and_a_full_one_has_more_entries_than_its_room(made: Made, name: NatMap) -> None:
    count = SIZES[name.value] // 2
    made.nat_put(name, count, 1)
    keys, values = whole_nat(made.datapath, name)
    assert (count, layout.NAT_KEY, layout.NAT) == (len(keys), keys.dtype, values.dtype)
    assert {key.tobytes() for key in nat_keys(count)} == {key.tobytes() for key in keys}
    assert (values["seen_ns"] == 1).all()
    assert count < made.datapath.nat_room(name) < SIZES[name.value]
    made.nat_put(name, 2 * SIZES[name.value], 1)
    assert len(whole_nat(made.datapath, name)[0]) >= made.datapath.nat_room(name)


@pytest.mark.parametrize("name", NatMap)
def test_a_nat_entry_goes_only_if_it_has_not_been_seen_since(made: Made, name: NatMap) -> None:
    """And out of no other map than the one that is meant."""
    count = LOOKUP_BATCH_MAX + 3
    keys = nat_keys(count + 5)
    for each in NatMap:
        made.nat_put(each, count, 7)
    stamps = np.full(len(keys), 7, np.uint64)
    stamps[::3] = 6
    expected = {key.tobytes() for key in keys[:count:3]}
    # The last five are not there at all.
    assert count - len(expected) == made.datapath.nat_delete(name, keys, stamps)
    assert expected == {key.tobytes() for key in whole_nat(made.datapath, name)[0]}
    assert [count] == [len(whole_nat(made.datapath, each)[0]) for each in NatMap if each is not name]
    assert 0 == made.datapath.nat_delete(name, keys, stamps)
    assert 0 == made.datapath.nat_delete(name, nat_keys(0), np.zeros(0, np.uint64))


def test_what_stays_is_seen_exactly_once_while_others_go(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two slices everything that the first one had is deleted; nothing of the rest is passed over."""
    monkeypatch.setattr(kernel, "DUMP_CHUNK", 512)
    name = NatMap.NAT
    made.nat_put(name, SIZES["nat"] // 2, 1)
    keys, values, cursor = made.datapath.nat_slice(name, None)
    assert cursor is not None, "one slice is no test"
    seen = [key.tobytes() for key in keys]
    while cursor is not None:
        made.datapath.nat_delete(name, keys, values["seen_ns"].astype(np.uint64))
        keys, values, cursor = made.datapath.nat_slice(name, cursor)
        seen += [key.tobytes() for key in keys]
    assert sorted(key.tobytes() for key in nat_keys(SIZES["nat"] // 2)) == sorted(seen)


def test_a_record_goes_only_if_it_still_says_what_it_said(made: Made) -> None:
    count = LOOKUP_BATCH_MAX + 30
    keys, values = flows(count), records(np.arange(count) + 1)
    half = count // 2
    made.datapath.flows_put(FlowMap.RECORDS, keys[:half], values[:half])
    made.datapath.flows_put(FlowMap.EMBRYONIC, keys[half:], values[half:])
    now = values.copy()
    now["backend"][::4] += 7
    now["round"][1::4] = 1 << 26
    now["seen_ns"][2::4] += 1
    made.datapath.flows_put(FlowMap.RECORDS, keys[:half], now[:half])
    made.datapath.flows_put(FlowMap.EMBRYONIC, keys[half:], now[half:])
    made.datapath.records_drop(keys, values)
    left = [key for name in (FlowMap.RECORDS, FlowMap.EMBRYONIC) for key in by_key(made.datapath.flows_dump(name))]
    assert sorted(key.tobytes() for at, key in enumerate(keys) if at % 4 != 3) == sorted(left)
    made.datapath.records_drop(flows(count, first=count), values)
    made.datapath.records_drop(keys, now)
    assert not any(len(made.datapath.flows_dump(name)[0]) for name in (FlowMap.RECORDS, FlowMap.EMBRYONIC))


def test_a_record_that_stays_is_seen_exactly_once_while_others_go(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "DUMP_CHUNK", 512)
    count = SIZES["records"] // 2
    made.datapath.flows_put(FlowMap.RECORDS, flows(count), records(7, count))
    keys, _, cursor = made.datapath.flows_slice(FlowMap.RECORDS, None)
    assert cursor is not None, "one slice is no test"
    seen = [key.tobytes() for key in keys]
    while cursor is not None:
        made.datapath.flows_delete(FlowMap.RECORDS, keys)
        keys, _, cursor = made.datapath.flows_slice(FlowMap.RECORDS, cursor)
        seen += [key.tobytes() for key in keys]
    assert sorted(key.tobytes() for key in flows(count)) == sorted(seen)


@ONE_MADE
@given(ids=st.dictionaries(st.integers(0, 40), st.integers(0, 1023), max_size=40))
def test_the_door_admits_exactly_the_members(made: Made, ids: dict[int, int]) -> None:
    wanted = {bytes(15) + bytes([last]): member for last, member in ids.items()}
    made.datapath.members_door(list(wanted), list(wanted.values()))
    assert wanted == made.door()


def test_a_full_door_can_change_all_its_members(made: Made) -> None:
    for base in (0, 500):
        wanted = {bytes(12) + (base + number).to_bytes(4, "big"): number for number in range(1_024)}
        made.datapath.members_door(list(wanted), list(wanted.values()))
        assert wanted == made.door()


def test_counters_have_a_row_for_every_verdict(made: Made) -> None:
    counters = made.datapath.counters()
    assert ((len(Verdict), 2), np.dtype(np.uint64)) == (counters.shape, counters.dtype)
    assert not counters.any()
