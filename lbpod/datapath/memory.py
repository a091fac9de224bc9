"""The port on maps in memory: a fast path without a kernel, for scenarios, the simulator and unit tests.

What this file decides: how batches of the port become changes of ``lbpod.core.maps.Maps``, and what is refused, with
the same behaviour as the kernel's maker: writes out of range and VIPs that do not exist raise DatapathError, a hash map
that refuses ends a batch where it refused, deleting what is not there is no error. Packets are then decided on the same
``maps`` by ``lbpod.core.oracle``.

What it leaves to others: faults by seed (``faulty``), and the rules (``oracle``). The per-row loops here are for
thousands of flows in a test; nothing of this runs in production.
"""

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, TypeVar, assert_never

import numpy as np
import numpy.typing as npt

from lbpod.core import layout, limits
from lbpod.core.maps import FlowTable, Lease, Maps, Nat, Pending, Record
from lbpod.datapath.port import U32, U64, ArrayName, DatapathError, FlowMap, NatMap, Rows

_VALUE_DTYPES: Final = {
    FlowMap.CACHE: layout.LEASE,
    FlowMap.RECORDS: layout.RECORD,
    FlowMap.EMBRYONIC: layout.RECORD,
    FlowMap.PENDING: layout.PENDING,
}
_KEY_BYTES: Final = layout.FLOW.itemsize

NAT_FULL_NUMERATOR: Final = 7
NAT_FULL_DENOMINATOR: Final = 8
"""`nat` counts as nearly full from 7/8 on: the kernel's LRU begins to evict before its last free entry is gone."""

V = TypeVar("V")


class MemoryHops:
    """Implements ``apply.NextHops`` where no cable is: all next hops are known at once, and stay as they are."""

    def __init__(self, ifindex: int = 0) -> None:
        self.nodes: Mapping[int, bytes] = {}
        self.known = True
        """False: none is."""
        self._ifindex = ifindex

    def set_nodes(self, nodes: Mapping[int, bytes]) -> Sequence[int]:
        self.nodes = nodes
        return sorted(nodes)

    def rows(self, ids: Collection[int]) -> tuple[U32, Rows]:
        found = np.zeros(len(ids), layout.NODE)
        for row, number in zip(found, sorted(ids), strict=True):
            row["addr"] = np.frombuffer(self.nodes[number], np.uint8)
            row["ifindex"] = self._ifindex
            row["flags"] = layout.NODE_REACHABLE if self.known else 0
        return np.array(sorted(ids), np.uint32), found

    def handle_events(self) -> Sequence[int]:
        return []

    def is_due(self) -> bool:
        return False

    def resolve_all(self) -> Sequence[int]:
        return []

    def fileno(self) -> int:
        return -1


class MemoryDatapath:
    """Implements ``port.Datapath`` on ``maps``, which oracle and tests may read and write at any time."""

    def __init__(self, maps: Maps | None = None, slice_max: int = limits.DUMP_CHUNK) -> None:
        self.maps: Final = Maps() if maps is None else maps
        self._slice_max = slice_max

    def _array(self, name: ArrayName) -> npt.NDArray[np.generic]:
        array: npt.NDArray[np.generic] = getattr(self.maps, name.value)
        return array

    def _table(self, name: FlowMap) -> FlowTable[Lease] | FlowTable[Record] | FlowTable[Pending]:
        match name:
            case FlowMap.CACHE:
                return self.maps.cache
            case FlowMap.RECORDS:
                return self.maps.records
            case FlowMap.EMBRYONIC:
                return self.maps.embryonic
            case FlowMap.PENDING:
                return self.maps.pending
        assert_never(name)

    # --- Arrays ---
    def write(self, name: ArrayName, indices: U32, rows: npt.NDArray[np.generic]) -> None:
        array = self._array(name)
        _check(name.value, rows, array.dtype, len(indices))
        _check_range(name.value, indices, len(array))
        array[indices] = rows
        if name is ArrayName.CONFIG:
            self.maps.config["version"] = layout.LAYOUT_VERSION

    def read(self, name: ArrayName) -> npt.NDArray[np.generic]:
        return self._array(name).copy()

    # --- VIPs ---
    def vip_create(self, vip: int) -> None:
        if not 0 < vip < limits.VIPS_MAX:
            raise DatapathError(f"cannot create VIP {vip}: ids are 1..{limits.VIPS_MAX - 1}")
        if vip not in self.maps.slots:
            self.maps.other_seen[vip] = np.zeros(limits.SLOT_COUNT, dtype=np.uint64)
            self.maps.slots[vip] = np.zeros(limits.SLOT_COUNT, dtype=np.uint64)

    def vip_delete(self, vip: int) -> None:
        self.maps.slots.pop(vip, None)
        self.maps.other_seen.pop(vip, None)

    def vip_ids(self) -> Sequence[int]:
        return sorted(self.maps.slots)

    def _of_vip(self, arrays: dict[int, U64], vip: int) -> U64:
        if vip not in arrays:
            raise DatapathError(f"VIP {vip} has no slots: create it first")
        return arrays[vip]

    def write_slots(self, vip: int, slots: U32, words: U64) -> None:
        array = self._of_vip(self.maps.slots, vip)
        _check(f"slots of VIP {vip}", words, array.dtype, len(slots))
        _check_range(f"slots of VIP {vip}", slots, len(array))
        array[slots] = words

    def read_slots(self, vip: int) -> U64:
        return self._of_vip(self.maps.slots, vip).copy()

    def read_other_seen(self, vip: int, slots: U32 | None = None) -> U64:
        stamps = self._of_vip(self.maps.other_seen, vip)
        return stamps.copy() if slots is None else stamps[slots]

    # --- Flows ---
    def flows_put(self, name: FlowMap, keys: Rows, values: Rows) -> int:
        _check(name.value, values, _VALUE_DTYPES[name], len(keys))
        rows = values.tolist()
        match name:
            case FlowMap.CACHE:
                return _put(self.maps.cache, keys, [Lease(*row) for row in rows])
            case FlowMap.RECORDS:
                return _put(self.maps.records, keys, [Record(*row) for row in rows])
            case FlowMap.EMBRYONIC:
                return _put(self.maps.embryonic, keys, [Record(*row) for row in rows])
            case FlowMap.PENDING:
                return _put(self.maps.pending, keys, [Pending(*row) for row in rows])
        assert_never(name)

    def flows_delete(self, name: FlowMap, keys: Rows) -> None:
        table = self._table(name)
        for key in _split(keys):
            table.delete(key)

    def flows_dump(self, name: FlowMap) -> tuple[Rows, Rows]:
        return self._rows(name, list(self._table(name).rows))

    def flows_slice(self, name: FlowMap, cursor: int | None) -> tuple[Rows, Rows, int | None]:
        """In the order of the keys, where they are too many for one slice; the cursor is the last one as a number."""
        rows = self._table(name).rows
        if cursor is None and len(rows) <= self._slice_max:
            return *self._rows(name, list(rows)), None
        taken, after = _next_keys(rows, cursor, self._slice_max)
        return *self._rows(name, taken), after

    def _rows(self, name: FlowMap, keys: Sequence[bytes]) -> tuple[Rows, Rows]:
        rows = self._table(name).rows
        return _join(keys), np.array([rows[key] for key in keys], dtype=_VALUE_DTYPES[name])

    def records_drop(self, keys: Rows, values: Rows) -> None:
        _check("records", values, layout.RECORD, len(keys))
        for key, row in zip(_split(keys), values.tolist(), strict=True):
            for table in (self.maps.records, self.maps.embryonic):
                if table.rows.get(key) == Record(*row):
                    table.delete(key)

    def records_lookup(self, keys: Rows) -> Rows:
        return np.array(self.maps.lookup(_split(keys)), dtype=layout.RECORD)

    def pending_drain(self, count_max: int) -> tuple[Rows, Rows]:
        rows = self.maps.pending.rows
        taken = list(rows)[: max(count_max, 0)]
        values = [rows.pop(key) for key in taken]
        return _join(taken), np.array(values, dtype=layout.PENDING)

    # --- Host agent ---
    def nat_slice(self, name: NatMap, cursor: int | None) -> tuple[Rows, Rows, int | None]:
        """In the order of the keys; the cursor is the last one as a number."""
        rows = self._nat_map(name).rows
        taken, after = _next_keys(rows, cursor, self._slice_max)
        values = np.zeros(len(taken), dtype=layout.NAT)
        for at, key in enumerate(taken):
            values[at] = _nat_row(rows[key])
        return np.frombuffer(b"".join(taken), dtype=layout.NAT_KEY).copy(), values, after

    def nat_delete(self, name: NatMap, keys: Rows, seen_ns: U64) -> int:
        _check(name.value, keys, layout.NAT_KEY, len(seen_ns))
        table = self._nat_map(name)
        before = len(table)
        for key, stamp in zip(keys, seen_ns.tolist(), strict=True):
            entry = table.rows.get(key.tobytes())
            if entry is not None and entry.seen_ns == stamp:
                table.delete(key.tobytes())
        return before - len(table)

    def nat_room(self, name: NatMap) -> int:
        return max(1, self._nat_map(name).count_max * NAT_FULL_NUMERATOR // NAT_FULL_DENOMINATOR)

    def _nat_map(self, name: NatMap) -> FlowTable[Nat]:
        return self.maps.nat if name is NatMap.NAT else self.maps.unassured

    # --- The rest ---
    def members_door(self, addresses: Sequence[bytes], ids: Sequence[int]) -> None:
        if len(set(addresses)) > limits.MEMBERS_MAX:
            raise DatapathError(f"the map member_by_addr has no room for {len(addresses)} members")
        self.maps.member_by_addr.clear()
        self.maps.member_by_addr.update(zip(addresses, ids, strict=True))

    def counters(self) -> U64:
        return self.maps.counters.copy()


def _check(what: str, rows: npt.NDArray[np.generic], dtype: np.dtype[Any], count: int) -> None:
    assert rows.dtype == dtype, f"rows of {what} have the dtype {dtype}"
    assert len(rows) == count, f"as many rows as indices or keys for {what}"


def _check_range(what: str, indices: U32, count: int) -> None:
    if len(indices) and int(indices.max()) >= count:
        raise DatapathError(f"cannot write {what} at {int(indices.max())}: it has {count} entries")


def _put(table: FlowTable[V], keys: Rows, values: Sequence[V]) -> int:
    """Put in order until the table refuses; how many found room."""
    for count, (key, value) in enumerate(zip(_split(keys), values, strict=True)):
        if not table.put(key, value):
            return count
    return len(values)


def _split(keys: Rows) -> list[bytes]:
    """FLOW rows as the bytes that they are in the kernel."""
    data = keys.tobytes()
    return [data[at : at + _KEY_BYTES] for at in range(0, len(data), _KEY_BYTES)]


def _join(keys: Sequence[bytes]) -> Rows:
    return np.frombuffer(b"".join(keys), dtype=layout.FLOW).copy()


def _next_keys(rows: Collection[bytes], cursor: int | None, count_max: int) -> tuple[list[bytes], int | None]:
    """The first keys behind the one that the cursor is as a number, and the cursor for what is left (None: nothing)."""
    found = sorted(rows)
    if cursor is not None:
        found = found[bisect_right(found, cursor.to_bytes(len(found[0]), "big")) :] if found else []
    taken = found[:count_max]
    return taken, int.from_bytes(taken[-1], "big") if len(found) > len(taken) else None


def _nat_row(entry: Nat) -> Rows:
    row = np.zeros((), dtype=layout.NAT)
    row["vip"] = np.frombuffer(entry.vip, dtype=np.uint8)
    row["vip_port_be"] = entry.vip_port
    row["flags"] = entry.flags
    row["seen_ns"] = entry.seen_ns
    return row
