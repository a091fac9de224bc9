"""The C program as a function: a world goes in, frames go through, what became of the maps comes out.

Built on the datapath's own loader and port, so that the comparison sees the maps as the agent does; only ``nat`` and
the whole arrays are written past the port, for no agent ever has to. One load serves thousands of worlds: what one
world leaves behind is taken out before the next.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lbpod.core import layout, limits
from lbpod.core.maps import Lease, Maps, Nat, Pending, Record
from lbpod.datapath import libbpf, loader
from lbpod.datapath.kernel import KernelDatapath
from lbpod.datapath.loader import FastPath, LoadSettings
from lbpod.datapath.mapped import MappedArray
from lbpod.datapath.pins import PinFolder
from lbpod.datapath.port import ArrayName, FlowMap, NatMap
from tests.bpf import trial
from tests.bpf.datapaths import whole_nat
from tests.bpf.world import RECORDS_SMALL_COUNT, VIP_IDS_MAX, World

LRU_COUNT: Final = 16_384
"""Room in the LRU maps: far more than a world uses, so that nothing is evicted behind the test's back."""
SIZES: Final = dict.fromkeys(("cache", "embryonic", "pending", "nat", "unassured"), LRU_COUNT) | {
    "records": RECORDS_SMALL_COUNT
}

State = dict[str, dict[bytes, Any]]
"""Hash map name -> key bytes -> value."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One frame through a program: its return value and the frame as it leaves."""

    action: int
    frame: bytes


class Kernel:
    """One loaded fast path, attached to nothing."""

    def __init__(self, fast_path: FastPath) -> None:
        self._fast_path = fast_path
        self.port = KernelDatapath(fast_path)
        self._xdp, self._tc = fast_path.program("hf_xdp").fd, fast_path.program("hf_tc").fd
        self._whole = {
            name: MappedArray(name, fast_path.map(name).fd, dtype, fast_path.map(name).info.max_entries)
            for name, dtype in _WHOLE.items()
        }
        for vip in range(1, VIP_IDS_MAX + 1):
            self.port.vip_create(vip)
        self.port.write(ArrayName.VIPS, np.zeros(0, np.uint32), np.zeros(0, layout.VIP))  # publishes them
        self._per_vip = {
            (outer, vip): self._map_inner(outer, vip)
            for outer in ("slots", "other_seen")
            for vip in range(1, VIP_IDS_MAX + 1)
        }
        self._before = np.zeros((0, 2), np.uint64)

    def _map_inner(self, outer: str, vip: int) -> MappedArray:
        fd = libbpf.pinned(self._fast_path.pins.vip_path(outer, vip))
        assert fd is not None, f"{outer} of VIP {vip} is pinned"
        try:
            return MappedArray(f"{outer} {vip}", fd, np.dtype(np.uint64), limits.SLOT_COUNT)
        finally:
            os.close(fd)

    def close(self) -> None:
        for array in [*self._whole.values(), *self._per_vip.values()]:
            array.close()
        self.port.close()

    # --- In ---
    def load_world(self, world: World) -> None:
        """Make the kernel's maps equal to the world's."""
        maps = world.maps
        for name in _WHOLE:
            self._whole[name].values[:] = getattr(maps, name)
        for name, ids in (
            ("backends", [0, *world.backend_ids]),
            ("nodes", world.node_ids),
            ("members", world.member_ids),
        ):
            self._refill(ArrayName(name), ids, getattr(maps, name))
        self._load_slots(maps)
        self._load_flows(maps)
        self.port.members_door(list(maps.member_by_addr), list(maps.member_by_addr.values()))
        self._before = self.port.counters()

    def _refill(self, name: ArrayName, ids: list[int], rows: npt.NDArray[Any]) -> None:
        there: npt.NDArray[Any] = self.port.read(name)
        used = np.flatnonzero(there["flags"]).astype(np.uint32)
        self.port.write(name, used, np.zeros(len(used), rows.dtype))
        self.port.write(name, np.array(ids, np.uint32), rows[ids])

    def _load_slots(self, maps: Maps) -> None:
        for vip in maps.slots:
            self._per_vip["slots", vip].words[:, 0] = maps.slots[vip]
            self._per_vip["other_seen", vip].words[:, 0] = maps.other_seen[vip]

    def _load_flows(self, maps: Maps) -> None:
        for name in FlowMap:
            self.port.flows_delete(name, self.port.flows_dump(name)[0])
            rows = getattr(maps, name.value).rows
            keys = np.frombuffer(b"".join(rows), layout.FLOW)
            values = np.array(list(rows.values()), _VALUES[name])
            assert len(rows) == self.port.flows_put(name, keys, values), f"{name.value} has room for the world"
        for which in NatMap:
            fd = self._fast_path.map(which.value).fd
            for key in whole_nat(self.port, which)[0]:
                libbpf.map_delete(fd, which.value, key.tobytes())
            for key_bytes, value in getattr(maps, which.value).rows.items():
                libbpf.map_update(fd, which.value, key_bytes, nat_bytes(value))

    # --- Through ---
    def xdp(self, frame: bytes, room_bytes: int) -> Ran:
        """Through hf_xdp, as if it came in by the loopback device, with so much room in front of it."""
        return Ran(*trial.run_xdp(self._xdp, frame, room_bytes))

    def tc(self, frame: bytes, goes_back: bool) -> Ran:
        """Through hf_tc; goes_back: it has come in by the interface that it leaves by."""
        ran = libbpf.prog_test_run(self._tc, frame, goes_back=goes_back)
        return Ran(ran.retval, ran.data)

    # --- Out ---
    def counters(self) -> npt.NDArray[np.uint64]:
        """What was counted since the world was loaded."""
        return self.port.counters() - self._before

    def flows(self) -> State:
        """Every hash map."""
        found: State = {}
        for name in FlowMap:
            keys, values = self.port.flows_dump(name)
            made = _MADE[name]
            found[name.value] = {key.tobytes(): made(*value) for key, value in zip(keys, values.tolist(), strict=True)}
        for which in NatMap:
            keys, values = whole_nat(self.port, which)
            found[which.value] = {key.tobytes(): _nat_of(value) for key, value in zip(keys, values, strict=True)}
        return found

    def door(self) -> list[bytes]:
        """Addresses (16 bytes) that the tunnel's door knows, ascending."""
        keys = np.zeros(limits.MEMBERS_MAX, np.dtype([("addr", "u1", (16,))]))
        values = np.zeros(limits.MEMBERS_MAX, np.uint32)
        batch, _ = libbpf.map_lookup_batch(self._fast_path.map("member_by_addr").fd, None, keys, values)
        return sorted(key.tobytes() for key in keys[: batch.count])

    def other_seen(self, vip: int) -> npt.NDArray[np.uint64]:
        words: npt.NDArray[np.uint64] = self._per_vip["other_seen", vip].words[:, 0]
        return words

    def unrecorded_ns(self) -> npt.NDArray[np.uint64]:
        rows: npt.NDArray[Any] = self.port.read(ArrayName.VIP_STATS)
        return np.asarray(rows["unrecorded_ns"])


_WHOLE: Final[dict[str, np.dtype[Any]]] = {
    "vips": layout.VIP,
    "config": layout.CONFIG,
    "vip_stats": layout.VIP_STAT,
    "own": np.dtype("<u4"),
    "next": np.dtype("<u4"),
    "prev": np.dtype("<u4"),
}
_VALUES: Final = {
    FlowMap.CACHE: layout.LEASE,
    FlowMap.RECORDS: layout.RECORD,
    FlowMap.EMBRYONIC: layout.RECORD,
    FlowMap.PENDING: layout.PENDING,
}
_MADE: Final[dict[FlowMap, Any]] = {
    FlowMap.CACHE: Lease,
    FlowMap.RECORDS: Record,
    FlowMap.EMBRYONIC: Record,
    FlowMap.PENDING: Pending,
}


def nat_bytes(value: Nat) -> bytes:
    row = np.zeros((), layout.NAT)
    row["vip"], row["vip_port_be"] = np.frombuffer(value.vip, np.uint8), value.vip_port
    row["flags"], row["seen_ns"] = value.flags, value.seen_ns
    return row.tobytes()


def _nat_of(row: Any) -> Nat:
    return Nat(row["vip"].tobytes(), int(row["vip_port_be"]), int(row["flags"]), int(row["seen_ns"]))


@contextmanager
def loaded(pin_folder: Path, object_file: Path = loader.PACKAGED_OBJECT) -> Iterator[Kernel]:
    """Load the compiled programs with small maps under ``pin_folder`` (in bpffs), and leave no trace afterwards."""
    fast_path = loader.load(LoadSettings(pin_folder=pin_folder, object_file=object_file, sizes=SIZES))
    kernel = Kernel(fast_path)
    try:
        yield kernel
    finally:
        kernel.close()
        pins = PinFolder(pin_folder)
        pins.remove()
        pins.close()
