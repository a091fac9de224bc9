"""What outlives an agent: pins are taken over with all that is in them, or refused in one sentence and left alone.

Crashes are played by stopping between two steps: the pins then are what a killed agent would have left.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lbpod.core import layout
from lbpod.core.limits import SLOT_COUNT
from lbpod.core.verdicts import Verdict
from lbpod.datapath import libbpf, loader
from lbpod.datapath.attach import forget_old_maps
from lbpod.datapath.kernel import KernelDatapath
from lbpod.datapath.libbpf import F_MMAPABLE, KernelError, MapType
from lbpod.datapath.loader import FastPath, LoadSettings, load
from lbpod.datapath.misses import Miss
from lbpod.datapath.pins import PinFolder, is_bpffs
from lbpod.datapath.port import ArrayName, DatapathError, FlowMap
from tests.bpf.datapaths import SIZES, another_build, bpffs, built, flows, need_kernel, settings

FRAME = bytes(12) + b"\x86\xdd" + bytes(50)
"""IPv6: none of our business."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    need_kernel()
    with bpffs(tmp_path / "bpffs") as mounted:
        yield mounted


def vip_row(vip: int) -> npt.NDArray[np.void]:
    row = np.zeros(1, layout.VIP)
    row["id"], row["used"] = vip, 1
    return row


def seen_by_programs(fast_path: FastPath, outer: str, vip: int) -> bool:
    """True where the programs would find an inner array."""
    return libbpf.map_lookup(fast_path.map(outer).fd, outer, vip.to_bytes(4, "little"), 4) is not None


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_next_agent_finds_what_the_last_one_wrote(folder: Path) -> None:
    words = np.arange(SLOT_COUNT, dtype=np.uint64)
    with closing(KernelDatapath(load(settings(folder)))) as first:
        first.vip_create(4_000)
        first.vip_create(7)
        first.write_slots(7, words.astype(np.uint32), words)
        first.write(ArrayName.VIPS, np.zeros(1, np.uint32), vip_row(7))
        first.write(ArrayName.OWN, np.array([5], np.uint32), np.array([77], np.uint32))
        first.flows_put(FlowMap.RECORDS, flows(3), np.ones(3, layout.RECORD))
    fast_path = load(settings(folder))
    assert all(each.taken_over for each in fast_path.maps.values())
    with closing(KernelDatapath(fast_path)) as second:
        assert [7, 4_000] == list(second.vip_ids())
        assert np.array_equal(words, second.read_slots(7))
        assert 77 == second.read(ArrayName.OWN)[5]
        assert (second.records_lookup(flows(3))["backend"] == 1).all()
        assert all(seen_by_programs(fast_path, outer, vip) for outer in ("slots", "other_seen") for vip in (7, 4_000))


def test_new_programs_count_where_the_old_ones_did(folder: Path) -> None:
    for round_number in (1, 2):
        fast_path = load(settings(folder))
        assert len(FRAME) == len(fast_path.test_run("hf_xdp", FRAME).data)
        with closing(KernelDatapath(fast_path)) as datapath:
            assert [round_number, round_number * len(FRAME)] == list(datapath.counters()[Verdict.PASS_OTHER])


def test_a_vip_becomes_visible_with_the_index_and_at_once_where_the_index_has_it(folder: Path) -> None:
    fast_path = load(settings(folder))
    with closing(KernelDatapath(fast_path)) as datapath:
        datapath.vip_create(5)
        assert not seen_by_programs(fast_path, "slots", 5)
        datapath.write(
            ArrayName.VIPS, np.array([0, 1], np.uint32), np.concatenate([vip_row(5), vip_row(6)]).astype(layout.VIP)
        )
        assert seen_by_programs(fast_path, "slots", 5)
        assert seen_by_programs(fast_path, "other_seen", 5)
        datapath.vip_create(6)
        assert seen_by_programs(fast_path, "slots", 6)
        datapath.vip_delete(6)
        assert not seen_by_programs(fast_path, "slots", 6)


def test_a_kernel_that_cannot_publish_in_batches_gets_one_vip_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast_path = load(settings(folder))
    with closing(KernelDatapath(fast_path)) as datapath:
        for vip in (5, 6):
            datapath.vip_create(vip)
        assert frozenset() == datapath.misses
        monkeypatch.setattr(libbpf, "map_update_batch", lambda *_: libbpf.Batch(0, 524))
        datapath.write(ArrayName.VIPS, np.array([0], np.uint32), vip_row(5))
        assert all(seen_by_programs(fast_path, outer, vip) for outer in ("slots", "other_seen") for vip in (5, 6))
        assert {Miss.MAP_OF_MAPS_BATCH} == datapath.misses


def test_a_vip_that_was_half_made_is_cleared_away(folder: Path) -> None:
    with closing(KernelDatapath(load(settings(folder)))) as datapath:
        datapath.vip_create(8)
    pins = PinFolder(folder / "holdfast")
    pins.vip_unpin("slots", 8)
    fd = libbpf.map_create(MapType.ARRAY, "half", 4, 8, SLOT_COUNT, F_MMAPABLE)
    libbpf.pin(fd, pins.vip_path("slots", 9))
    pins.close()
    fast_path = load(settings(folder))
    with closing(KernelDatapath(fast_path)) as datapath:
        assert [] == list(datapath.vip_ids())
        assert not seen_by_programs(fast_path, "other_seen", 8)
        assert [] == fast_path.pins.vip_ids("slots") + fast_path.pins.vip_ids("other_seen")


def test_programs_that_were_verified_are_taken_over_and_those_of_another_build_are_not(
    folder: Path, tmp_path: Path
) -> None:
    def ids(wanted: LoadSettings) -> dict[str, int]:
        with closing(load(wanted)) as fast_path:
            assert FRAME == fast_path.test_run("hf_xdp", FRAME).data, "they run"
            return {name: each.id for name, each in fast_path.programs.items()}

    first = ids(settings(folder))
    assert first == ids(settings(folder)), "nothing has changed"
    other = ids(settings(folder, another_build(tmp_path, 1)))
    assert set() == set(first.values()) & set(other.values()), "another object"
    assert first == ids(settings(folder)), "and back, while those are still pinned"
    (gone,) = (folder / "holdfast" / "programs").glob(f"hf_tc_*_{first['hf_tc']}")
    gone.unlink()
    assert first != ids(settings(folder)) != other, "one is gone: all are made anew, on the same maps"


def test_programs_on_other_maps_than_the_pinned_ones_are_not_taken_over(folder: Path) -> None:
    with closing(load(settings(folder))) as fast_path:
        first = {each.id for each in fast_path.programs.values()}
        old = fast_path.map("records").info
    path = folder / "holdfast" / "maps" / "records"
    path.unlink()
    libbpf.pin(
        libbpf.map_create(MapType.HASH, "records", old.key_size, old.value_size, old.max_entries, old.flags), str(path)
    )
    with closing(load(settings(folder))) as fast_path:
        assert all(each.taken_over for each in fast_path.maps.values())
        assert not first & {each.id for each in fast_path.programs.values()}
        maps = {each.info.id for each in fast_path.maps.values()}
        assert all(libbpf.program_map_ids(each.fd) <= maps for each in fast_path.programs.values())


def test_maps_of_another_layout_are_refused_and_left_alone(folder: Path) -> None:
    fast_path = load(settings(folder))
    row = np.zeros(1, layout.CONFIG)
    row["version"] = layout.LAYOUT_VERSION + 1
    libbpf.map_update(fast_path.map("config").fd, "config", bytes(4), row.tobytes())
    fast_path.close()
    before = everything(folder)
    with pytest.raises(DatapathError, match=f"have layout {layout.LAYOUT_VERSION + 1}.*go on forwarding untouched"):
        load(settings(folder))
    assert before == everything(folder)
    PinFolder(folder / "holdfast").close()


def test_maps_without_a_version_are_refused(folder: Path) -> None:
    load(settings(folder)).close()
    (folder / "holdfast" / "maps" / "config").unlink()
    with pytest.raises(DatapathError, match="have layout unknown"):
        load(settings(folder))


def test_an_agent_that_died_while_pinning_is_no_obstacle(folder: Path) -> None:
    load(settings(folder)).close()
    for name in ("slots", "records", "counters"):
        (folder / "holdfast" / "maps" / name).unlink()
    fast_path = load(settings(folder))
    assert {"slots", "records", "counters"} == {name for name, each in fast_path.maps.items() if not each.taken_over}
    KernelDatapath(fast_path).close()


def test_a_map_of_another_shape_is_refused(folder: Path) -> None:
    load(settings(folder)).close()
    path = folder / "holdfast" / "maps" / "records"
    path.unlink()
    libbpf.pin(libbpf.map_create(MapType.HASH, "records", 8, 16, 5_000, 1), str(path))
    with pytest.raises(DatapathError, match=r"pinned map records in .* has another shape"):
        load(settings(folder))


def test_a_pinned_map_keeps_its_size_but_counters_grow_with_the_verdicts(folder: Path) -> None:
    load(replace(settings(folder), sizes={**SIZES, "counters": 5})).close()
    fast_path = load(replace(settings(folder), sizes={"nat": 999}))
    assert (SIZES["records"], True) == (fast_path.map("records").info.max_entries, fast_path.map("records").taken_over)
    assert (SIZES["nat"], True) == (fast_path.map("nat").info.max_entries, fast_path.map("nat").taken_over)
    assert (len(Verdict), False) == (fast_path.map("counters").info.max_entries, fast_path.map("counters").taken_over)
    fast_path.close()
    fast_path = load(settings(folder))
    assert fast_path.map("counters").taken_over
    fast_path.close()


def test_an_array_of_another_size_is_another_layout(folder: Path) -> None:
    """Its indices have a meaning, and a part of it would be somebody else's: both ways, and before anything changes."""
    load(settings(folder)).close()
    before = everything(folder)
    with pytest.raises(DatapathError, match=r"map nodes in .* has 4096 entries and the programs need 8192.*untouched"):
        load(settings(folder, built("resized")))
    assert before == everything(folder)
    fast_path = load(replace(settings(folder, built("resized")), pin_folder=folder / "larger"))
    fast_path.close()
    with pytest.raises(DatapathError, match=r"map nodes in .* has 8192 entries and the programs need 4096"):
        load(replace(settings(folder), pin_folder=folder / "larger"))


def test_an_upgrade_and_a_downgrade_keep_every_map_that_both_know(folder: Path) -> None:
    """The newer programs have one verdict and one map more."""
    with closing(KernelDatapath(load(settings(folder)))) as older:
        older.vip_create(7)
        older.flows_put(FlowMap.RECORDS, flows(3), np.ones(3, layout.RECORD))
    fast_path = load(settings(folder, built("newer")))
    assert {"counters", "newer_packets"} == {name for name, each in fast_path.maps.items() if not each.taken_over}
    assert len(Verdict) + 1 == fast_path.map("counters").info.max_entries
    assert () == forget_old_maps(fast_path)
    fast_path.test_run("hf_xdp", FRAME, repeat=5)
    with closing(KernelDatapath(fast_path)) as newer:
        assert 5 == newer.counters()[Verdict.PASS_OTHER][0], "a verdict that this package does not know is nobody's"
        assert (newer.records_lookup(flows(3))["backend"] == 1).all()
        newer.flows_put(FlowMap.RECORDS, flows(1, first=9), np.ones(1, layout.RECORD))
    fast_path = load(settings(folder))
    assert {"counters"} == {name for name, each in fast_path.maps.items() if not each.taken_over}
    assert ("newer_packets",) == forget_old_maps(fast_path)
    with closing(KernelDatapath(fast_path)) as older:
        assert [7] == list(older.vip_ids())
        assert (older.records_lookup(flows(1, first=9))["backend"] == 1).all()
    fast_path = load(settings(folder, built("newer")))
    assert not fast_path.map("newer_packets").taken_over, "nobody has kept it current"
    fast_path.close()


@pytest.mark.parametrize("name", ["foreign", "other_layout"])
def test_an_object_without_all_our_maps_is_refused_where_all_are_asked_for(folder: Path, name: str) -> None:
    load(settings(folder)).close()
    before = everything(folder)
    with pytest.raises(DatapathError, match=rf"{name}.bpf.o was built from other headers than this package's"):
        load(replace(settings(folder, built(name)), complete=True))
    assert before == everything(folder)
    load(replace(settings(folder, built("newer")), complete=True)).close()


def test_two_agents_never_share_a_folder(folder: Path) -> None:
    fast_path = load(settings(folder))
    with pytest.raises(DatapathError, match="another process is using the maps"):
        load(settings(folder))
    fast_path.close()
    load(settings(folder)).close()


def test_pins_can_be_removed_without_a_trace(folder: Path) -> None:
    before = everything(folder)
    with closing(KernelDatapath(load(settings(folder)))) as datapath:
        datapath.vip_create(3)
        assert before != everything(folder)
        PinFolder.remove(datapath._fast_path.pins)
    assert before == everything(folder)
    assert not (folder / "holdfast").exists()


def test_a_refusal_of_the_verifier_is_one_error_with_its_last_words(folder: Path) -> None:
    with pytest.raises(KernelError, match=r"loading .*refused.bpf.o: .*invalid access to packet") as caught:
        load(LoadSettings(folder / "holdfast", built("refused")))
    assert 13 == caught.value.errno
    assert isinstance(caught.value.__cause__, OSError)
    assert set() == {name for name in everything(folder) if name.startswith("holdfast")}


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (LoadSettings(Path("/nowhere"), Path("/nowhere/lb.bpf.o")), r"cannot read /nowhere/lb.bpf.o .*make objects"),
        (LoadSettings(Path("/tmp/holdfast-nowhere")), r"is not in a BPF file system: mount -t bpf"),
        (LoadSettings(sizes={"nosuch": 1}), r"has no map 'nosuch'"),
        (LoadSettings(object_file=Path(__file__)), r"not a little-endian 64-bit ELF object"),
    ],
    ids=["object", "bpffs", "map", "elf"],
)
def test_what_cannot_be_loaded_is_said_in_one_sentence(folder: Path, bad: LoadSettings, sentence: str) -> None:
    if bad.pin_folder == loader.PIN_FOLDER:
        bad = replace(bad, pin_folder=folder / "holdfast")
    if bad.object_file == LoadSettings().object_file:
        bad = replace(bad, object_file=loader.PACKAGED_OBJECT)
    with pytest.raises(DatapathError, match=sentence):
        load(bad)


def test_a_file_system_is_known_by_its_kind(folder: Path, tmp_path: Path) -> None:
    assert is_bpffs(folder)
    assert is_bpffs(folder / "not" / "there")
    assert not is_bpffs(tmp_path)
