"""Makers of datapaths for the tests: maps in memory, and the kernel's in a BPF file system of the test's own.

Nothing here touches /sys/fs/bpf: every test run mounts a private bpffs under its temporary folder, so that runs do not
meet each other or an installed agent, and unmounting it frees all that was pinned.
"""

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest

from lbpod.core import layout
from lbpod.core.maps import FlowTable, Maps, Nat
from lbpod.datapath import loader
from lbpod.datapath.kernel import KernelDatapath
from lbpod.datapath.loader import FastPath, LoadSettings
from lbpod.datapath.memory import MemoryDatapath
from lbpod.datapath.port import Datapath, NatMap

SIZES: Final[Mapping[str, int]] = {
    "records": 5_000,
    "cache": 8_192,
    "embryonic": 4_096,
    "pending": 8_192,
    "nat": 4_096,
    "unassured": 4_096,
}
"""Small maps: quick to make, quick to fill."""


def need_kernel() -> None:
    """Skips, for a stated reason only, where a test cannot load programs."""
    if os.geteuid() != 0:
        pytest.skip("missing feature: root (loading BPF programs)")
    if not Path("/proc/sys/kernel/unprivileged_bpf_disabled").exists():
        pytest.skip("missing feature: bpf")


def built(name: str) -> Path:
    """An object that `make objects` makes from a source beside this file."""
    path = Path(__file__).with_name(f"{name}.bpf.o")
    assert path.exists(), f"{path} is missing: run `make objects`"
    return path


def another_build(folder: Path, number: int) -> Path:
    """The packaged programs in an object that is not the same, byte for byte: what an upgrade brings."""
    path = folder / f"build{number}.bpf.o"
    path.write_bytes(loader.PACKAGED_OBJECT.read_bytes() + number.to_bytes(4, "little"))
    return path


@contextmanager
def bpffs(folder: Path) -> Iterator[Path]:
    """A BPF file system of one's own; unmounted, and so emptied, in the end."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(folder)], check=True, timeout=10)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=10)


def settings(folder: Path, object_file: Path | None = None) -> LoadSettings:
    """Where and what to load; small maps."""
    return LoadSettings(folder / "holdfast", object_file or loader.PACKAGED_OBJECT, SIZES)


@dataclass
class Made:
    """A datapath under test, and what only its maker knows."""

    datapath: Datapath
    nat_put: Callable[[NatMap, int, int], None]
    """Puts so many entries (nat_keys) with this seen_ns into one of those maps, as the fast path would."""
    door: Callable[[], dict[bytes, int]]
    """What is in member_by_addr."""
    fast_path: FastPath | None = field(default=None)


def flows(count: int, first: int = 0) -> npt.NDArray[np.void]:
    """FLOW rows that differ in the client's address."""
    rows = np.zeros(count, layout.FLOW)
    rows["addr"][:, 12:16] = np.arange(first, first + count, dtype=">u4").view(np.uint8).reshape(count, 4)
    rows["port_be"], rows["vip"] = 4_242, 7
    return rows


def whole_nat(datapath: Datapath, name: NatMap) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
    """All of a map of translated flows: NAT_KEY and NAT rows."""
    parts, cursor = [], None
    while True:
        *part, cursor = datapath.nat_slice(name, cursor)
        parts.append(part)
        if cursor is None:
            keys, values = zip(*parts, strict=True)
            # With the dtype said: concatenate alone would turn fields in network order into native ones.
            return (
                np.concatenate(keys, dtype=layout.NAT_KEY, casting="no"),
                np.concatenate(values, dtype=layout.NAT, casting="no"),
            )


def nat_keys(count: int) -> npt.NDArray[np.void]:
    """NAT_KEY rows that differ in the client's address."""
    rows = np.zeros(count, layout.NAT_KEY)
    rows["client"][:, 12:16] = np.arange(count, dtype=">u4").view(np.uint8).reshape(count, 4)
    return rows


@contextmanager
def in_memory(_folder: Path) -> Iterator[Made]:
    """MemoryDatapath with maps of the same sizes."""
    maps = Maps()
    for name, size in SIZES.items():
        table = getattr(maps, name)
        assert isinstance(table, FlowTable), f"{name} is a table of the model"
        table.count_max = size
    made = MemoryDatapath(maps, slice_max=512)

    def nat_put(name: NatMap, count: int, seen_ns: int) -> None:
        for key in nat_keys(count):
            made._nat_map(name).put(key.tobytes(), Nat(bytes(16), 80, 0, seen_ns))

    yield Made(made, nat_put, lambda: dict(maps.member_by_addr))


@contextmanager
def in_kernel(folder: Path) -> Iterator[Made]:
    """KernelDatapath on freshly pinned maps."""
    fast_path = loader.load(settings(folder))
    made = KernelDatapath(fast_path)

    def nat_put(name: NatMap, count: int, seen_ns: int) -> None:
        values = np.zeros(count, layout.NAT)
        values["seen_ns"] = seen_ns
        assert count == made._put(name.value, nat_keys(count), values), "an LRU map takes everything"

    def door() -> dict[bytes, int]:
        keys, values = made._dump("member_by_addr", np.dtype([("addr", "u1", (16,))]), np.dtype("<u4"))
        return {key.tobytes(): int(value) for key, value in zip(keys, values, strict=True)}

    try:
        yield Made(made, nat_put, door, fast_path)
    finally:
        fast_path.pins.remove()
        made.close()
