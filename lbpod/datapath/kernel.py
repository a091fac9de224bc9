"""KernelDatapath: the port (``port.Datapath``) on the kernel's maps.

What this file decides: how each operation of the port becomes as few system calls as possible, and none at all for
arrays; what a partial or refused batch means; in which order the words of a row change. What it leaves to others: where
the maps come from (``loader``), their pins (``pins``), and every decision about what to write (the Keeper).

Rows are written word by word. The word that holds a row's validity (used, ALIVE, REACHABLE, PRESENT) is written last
where the row becomes valid and first where it becomes invalid, so that the fast path never takes half a row for good;
a valid row that changes in place may be seen half changed for some nanoseconds (a next hop's MAC, at worst: one frame
to the old one). BPF has no batch look-up by key, so records are looked up by a program that walks a mapped array:
one system call for 1,024 keys.
"""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lbpod.core.layout import (
    BACKEND_ALIVE,
    CONFIG,
    FLOW,
    LAYOUT_VERSION,
    LEASE,
    MEMBER_PRESENT,
    NAT,
    NAT_KEY,
    NODE_REACHABLE,
    PENDING,
    RECORD,
    RECORD_MISSING,
)
from lbpod.core.limits import (
    BATCH_MAX,
    DUMP_CHUNK,
    KERNEL_BUSY_RETRIES_MAX,
    LOOKUP_BATCH_MAX,
    NAT_FULL_RESERVE,
    PUBLISH_BATCH_MAX,
    SLOT_COUNT,
    VIPS_MAX,
)
from lbpod.core.verdicts import Verdict
from lbpod.datapath import layout, libbpf, misses
from lbpod.datapath.inner import InnerArrays
from lbpod.datapath.libbpf import F_MMAPABLE, KernelError, MapType
from lbpod.datapath.loader import FastPath
from lbpod.datapath.mapped import MappedArray
from lbpod.datapath.port import U32, U64, ArrayName, DatapathError, FlowMap, NatMap, Rows

_VALUES: Final = {FlowMap.CACHE: LEASE, FlowMap.RECORDS: RECORD, FlowMap.EMBRYONIC: RECORD, FlowMap.PENDING: PENDING}

_BUSY: Final = frozenset({errno.EBUSY, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EDEADLK})
"""The bucket's lock was held elsewhere: try again (newer kernels would rather refuse than wait)."""

_NO_ROOM: Final = frozenset({errno.E2BIG, errno.ENOMEM, errno.ENOSPC})

_VALID: Final[dict[ArrayName, tuple[int, Callable[[npt.NDArray[Any]], npt.NDArray[np.bool_]]]]] = {
    ArrayName.VIPS: (3, lambda rows: rows["used"] != 0),
    ArrayName.BACKENDS: (2, lambda rows: (rows["flags"] & BACKEND_ALIVE) != 0),
    ArrayName.NODES: (4, lambda rows: (rows["flags"] & NODE_REACHABLE) != 0),
    ArrayName.MEMBERS: (2, lambda rows: (rows["flags"] & MEMBER_PRESENT) != 0),
}
"""For arrays whose rows may be invalid: the word (of 8 bytes) that says so, and how."""

_DOOR_KEY: Final = np.dtype([("addr", "u1", (16,))])


def _joined(dtype: np.dtype[Any], parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The parts in one array, byte for byte. (np.concatenate would turn fields in network order into native ones.)"""
    whole = np.zeros(sum(len(part) for part in parts), dtype)
    at = 0
    for part in parts:
        whole[at : at + len(part)] = part
        at += len(part)
    return whole


class KernelDatapath:
    """One node's maps in the kernel. Not thread-safe: one task owns it.

    Invariants: a VIP is in `_vips` exactly if its two inner arrays are pinned; it is in the outer maps, too, unless it
    is in `_unpublished`; no used row of `vips` leads to one of those.
    """

    def __init__(self, fast_path: FastPath) -> None:
        self._fast_path = fast_path
        self._fds = {name: each.fd for name, each in fast_path.maps.items()}
        if missing := sorted(set(layout.MAPS) - set(self._fds)):
            raise DatapathError(f"the loaded programs lack the maps {', '.join(missing)}")
        self._arrays = {name: self._map_array(name.value) for name in ArrayName}
        self._lookup_keys = self._map_array("lookup_keys")
        self._lookup_values = self._map_array("lookup_values")
        self._lookup_fd = fast_path.program("hf_lookup").fd
        self._drop_fd = fast_path.program("hf_drop").fd
        self._stale_keys = self._map_array("stale_keys")
        self._stale_stamps = self._map_array("stale_stamps")
        self._forget_fd = fast_path.program("hf_forget").fd
        self._pending_cursor: int | None = None
        self._pending_left: tuple[Rows, Rows] | None = None
        self._vips: set[int] = set()
        self._inner = InnerArrays(fast_path.pins)
        self._unpublished: list[int] = []
        self.misses: frozenset[misses.Miss] = frozenset()
        self._vips_restore()

    def close(self) -> None:
        """Unmaps everything and closes the descriptors. The kernel goes on with what is there."""
        desks = (self._lookup_keys, self._lookup_values, self._stale_keys, self._stale_stamps)
        for each in [*self._arrays.values(), *desks]:
            each.close()
        self._inner.close()
        self._fast_path.close()

    def _map_array(self, name: str) -> MappedArray:
        return MappedArray(name, self._fds[name], layout.MAPS[name][1], self._fast_path.map(name).info.max_entries)

    # --- Arrays ---------------------------------------------------------------------------------------------------

    def write(self, name: ArrayName, indices: U32, rows: npt.NDArray[np.generic]) -> None:
        """Writes rows at the given indices: see the module's text for the order. config.version is always ours."""
        array = self._arrays[name]
        expected = layout.MAPS[name.value][1]
        assert rows.dtype == expected, f"rows of {name.value} have the dtype {expected}"
        assert len(indices) == len(rows), f"as many rows as indices for {name.value}"
        array.check(indices)
        if name is ArrayName.VIPS:
            self._publish()
        new = np.zeros((len(rows), array.words.shape[1]), np.uint64)
        new.view(np.uint8)[:, : expected.itemsize] = (
            np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), expected.itemsize)
        )
        if name is ArrayName.CONFIG:
            new.view(CONFIG)["version"] = LAYOUT_VERSION
        if name not in _VALID:
            for column in range(new.shape[1]):
                array.words[indices, column] = new[:, column]
            return
        gate, is_valid = _VALID[name]
        closing = ~is_valid(rows)
        array.words[indices[closing], gate] = new[closing, gate]
        for column in range(new.shape[1]):
            if column != gate:
                array.words[indices, column] = new[:, column]
        array.words[indices, gate] = new[:, gate]

    def read(self, name: ArrayName) -> npt.NDArray[np.generic]:
        """A copy of the whole array."""
        return self._arrays[name].values.copy()

    # --- VIPs -----------------------------------------------------------------------------------------------------

    def vip_create(self, vip: int) -> None:
        """Makes and pins the two inner arrays (all zero). A VIP that exists is left as it is.

        The programs see them at once where a row of `vips` leads there already, otherwise with the next write to
        `vips`: publishing costs two waits for all CPUs (some 16 ms here), however many VIPs are published together.
        """
        if not 0 < vip < VIPS_MAX:
            raise DatapathError(f"VIP id {vip} is out of range: 1..{VIPS_MAX - 1}")
        if vip in self._vips:
            return
        pins = self._fast_path.pins
        try:
            for outer in layout.PER_VIP:
                fd = libbpf.map_create(MapType.ARRAY, f"{outer}_{vip}", 4, 8, SLOT_COUNT, F_MMAPABLE)
                try:
                    pins.vip_unpin(outer, vip)
                    libbpf.pin(fd, pins.vip_path(outer, vip))
                finally:
                    os.close(fd)
        except DatapathError:
            for outer in layout.PER_VIP:
                pins.vip_unpin(outer, vip)
            raise
        self._vips.add(vip)
        self._unpublished.append(vip)
        rows = self._arrays[ArrayName.VIPS].values
        if bool(np.any((rows["id"] == vip) & (rows["used"] != 0))):
            self._publish()

    def _is_published(self, vip: int) -> bool:
        """Do the programs see these very arrays?"""
        pins, seen = self._fast_path.pins, True
        for outer in layout.PER_VIP:
            fd = libbpf.pinned(pins.vip_path(outer, vip))
            if fd is None:
                raise DatapathError(f"the pin {pins.vip_path(outer, vip)} has gone")
            try:
                published = libbpf.map_lookup(self._fds[outer], outer, vip.to_bytes(4, "little"), 4)
                seen &= published == libbpf.map_info(fd).id.to_bytes(4, "little")
            finally:
                os.close(fd)
        return seen

    def _vips_restore(self) -> None:
        """Takes over the VIPs whose two arrays are pinned; what was left half made or half deleted is removed."""
        pins = self._fast_path.pins
        pinned = {outer: set(pins.vip_ids(outer)) for outer in layout.PER_VIP}
        for vip in sorted(set.union(*pinned.values())):
            if all(vip in ids for ids in pinned.values()):
                self._vips.add(vip)
                if not self._is_published(vip):
                    self._unpublished.append(vip)
            else:
                self._vip_unpublish(vip)
        self._publish()

    def _publish(self) -> None:
        """Has the programs see the VIPs made since the last time. other_seen first: it is read after slots."""
        if not self._unpublished:
            return
        keys = np.array(self._unpublished, np.uint32)
        for outer in ("other_seen", "slots"):
            fds: list[int] = []
            try:
                for start in range(0, len(keys), PUBLISH_BATCH_MAX):
                    part = keys[start : start + PUBLISH_BATCH_MAX]
                    for vip in part:
                        fd = libbpf.pinned(self._fast_path.pins.vip_path(outer, int(vip)))
                        assert fd is not None, "a VIP that is to be published is pinned"
                        fds.append(fd)
                    if miss := misses.publish(self._fds[outer], outer, part.tolist(), fds):
                        self.misses |= {miss}
                    while fds:
                        os.close(fds.pop())
            finally:
                for fd in fds:
                    os.close(fd)
        self._unpublished.clear()

    def _vip_unpublish(self, vip: int) -> None:
        for outer in layout.PER_VIP:
            libbpf.map_delete(self._fds[outer], outer, vip.to_bytes(4, "little"))
            self._fast_path.pins.vip_unpin(outer, vip)

    def vip_delete(self, vip: int) -> None:
        """Takes the arrays out of the programs' sight, then out of the world. One that does not exist is no error."""
        if vip not in self._vips:
            return
        self._vip_unpublish(vip)
        self._unpublished = [other for other in self._unpublished if other != vip]
        self._inner.forget(vip)
        self._vips.remove(vip)

    def vip_ids(self) -> Sequence[int]:
        """VIPs that exist, ascending."""
        return sorted(self._vips)

    def _of_vip(self, outer: str, vip: int) -> MappedArray:
        if vip not in self._vips:
            raise DatapathError(f"VIP {vip} does not exist in the kernel's maps")
        return self._inner.get(outer, vip)

    def write_slots(self, vip: int, slots: U32, words: U64) -> None:
        """Writes slot words in place; each changes atomically."""
        array = self._of_vip("slots", vip)
        assert len(slots) == len(words), "as many words as slots"
        array.check(slots)
        array.words[slots, 0] = words

    def read_slots(self, vip: int) -> U64:
        """A copy of all words of a VIP."""
        return self._of_vip("slots", vip).words[:, 0].copy()

    def read_other_seen(self, vip: int, slots: U32 | None = None) -> U64:
        """A copy of all stamps of a VIP, or of those of some slots."""
        array = self._of_vip("other_seen", vip)
        if slots is None:
            return array.words[:, 0].copy()
        array.check(slots)
        found: U64 = array.words[slots, 0]
        return found

    # --- Hash maps ------------------------------------------------------------------------------------------------

    def flows_put(self, name: FlowMap, keys: Rows, values: Rows) -> int:
        """Inserts or replaces in order; stops where the map is full and returns how many found room."""
        assert keys.dtype == FLOW, "flows are keys of dtype FLOW"
        assert values.dtype == _VALUES[name], f"values of {name.value} have the dtype {_VALUES[name]}"
        return self._put(name.value, keys, values)

    def _put(self, name: str, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> int:
        keys, values = np.ascontiguousarray(keys), np.ascontiguousarray(values)
        done, busy = 0, 0
        while done < len(keys):
            part = slice(done, done + BATCH_MAX)
            batch = libbpf.map_update_batch(self._fds[name], keys[part], values[part])
            done += batch.count
            if batch.errno in _NO_ROOM:
                return done
            busy = self._patience(name, batch, busy)
        return done

    def _patience(self, name: str, batch: libbpf.Batch, busy: int) -> int:
        """How often in a row a batch was refused as busy; raises where that is too often, or for any other refusal."""
        if batch.errno == 0 or (batch.errno in _BUSY and batch.count):
            return 0
        if batch.errno in _BUSY and busy < KERNEL_BUSY_RETRIES_MAX:
            return busy + 1
        error = OSError(batch.errno, os.strerror(batch.errno))
        raise KernelError(batch.errno, f"the map {name} refused a batch: {error.strerror}") from error

    def flows_delete(self, name: FlowMap, keys: Rows) -> None:
        """Deletes; a missing key is no error."""
        assert keys.dtype == FLOW, "flows are keys of dtype FLOW"
        if name in {FlowMap.RECORDS, FlowMap.EMBRYONIC}:
            whatever = np.zeros(len(keys), RECORD)
            whatever["round"] = RECORD_MISSING
            self._drop(keys, whatever, name)
        else:
            self._delete(name.value, keys)

    def records_drop(self, keys: Rows, values: Rows) -> None:
        """By the program hf_drop, which compares each with the map before it deletes it."""
        assert keys.dtype == FLOW and values.dtype == RECORD, "records have keys of dtype FLOW, values of RECORD"
        assert len(keys) == len(values), "as many values as keys"
        self._drop(keys, values, FlowMap.RECORDS, FlowMap.EMBRYONIC)

    def _drop(self, keys: Rows, values: Rows, *names: FlowMap) -> None:
        """By the program hf_drop: a record is in one of two maps, and a batch would end at each key that is missing."""
        start = 0
        for part in self._desks(keys):
            self._lookup_values.values[: len(part)] = values[start : start + len(part)]
            start += len(part)
            for name in names:
                context = np.array([len(part), name is FlowMap.RECORDS], np.uint32)
                if libbpf.syscall_run(self._drop_fd, context) != 0:
                    raise DatapathError("the program that drops records could not read its desk (lookup_keys)")

    def _desks(self, keys: Rows) -> Iterator[Rows]:
        """The keys a desk at a time, each laid on it."""
        step = min(LOOKUP_BATCH_MAX, self._lookup_keys.count)
        for start in range(0, len(keys), step):
            part = keys[start : start + step]
            self._lookup_keys.values[: len(part)] = part
            yield part

    def _delete(self, name: str, keys: npt.NDArray[Any]) -> None:
        keys = np.ascontiguousarray(keys)
        done, busy = 0, 0
        while done < len(keys):
            batch = libbpf.map_delete_batch(self._fds[name], keys[done : done + BATCH_MAX])
            done += batch.count
            if batch.errno == errno.ENOENT:
                done += 1
                busy = 0
            else:
                busy = self._patience(name, batch, busy)

    def flows_dump(self, name: FlowMap) -> tuple[Rows, Rows]:
        """All keys and values, each that was there all the time exactly once."""
        return self._dump(name.value, FLOW, _VALUES[name])

    def flows_slice(self, name: FlowMap, cursor: int | None) -> tuple[Rows, Rows, int | None]:
        """Keys and values of some buckets, which the cursor counts."""
        return self._slice(name.value, FLOW, _VALUES[name], cursor)

    def _dump(self, name: str, key: np.dtype[Any], value: np.dtype[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        parts = list(self._walk(name, key, value))
        return _joined(key, [part[0] for part in parts]), _joined(value, [part[1] for part in parts])

    def _walk(
        self, name: str, key: np.dtype[Any], value: np.dtype[Any]
    ) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """The map's entries, some thousands at a time (copies)."""
        cursor: int | None = None
        while True:
            keys, values, cursor = self._slice(name, key, value, cursor)
            if len(keys):
                yield keys, values
            if cursor is None:
                return

    def _slice(
        self, name: str, key: np.dtype[Any], value: np.dtype[Any], cursor: int | None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any], int | None]:
        """Whole buckets from where `cursor` points, and the next cursor; None: that was all."""
        size = min(DUMP_CHUNK, max(self._fast_path.map(name).info.max_entries, LOOKUP_BATCH_MAX))
        busy = 0
        while True:
            keys, values = np.zeros(size, key), np.zeros(size, value)
            batch, after = libbpf.map_lookup_batch(self._fds[name], cursor, keys, values)
            if batch.errno in (0, errno.ENOENT):
                return keys[: batch.count], values[: batch.count], None if batch.errno else after
            if batch.errno == errno.ENOSPC:
                size *= 2
            else:
                busy = self._patience(name, batch, busy)

    def records_lookup(self, keys: Rows) -> Rows:
        """RECORD for each key, from records or else from embryonic, by the program hf_lookup."""
        assert keys.dtype == FLOW, "flows are keys of dtype FLOW"
        found = np.zeros(len(keys), RECORD)
        context = np.zeros(1, np.uint32)
        start = 0
        for part in self._desks(keys):
            context[0] = len(part)
            if libbpf.syscall_run(self._lookup_fd, context) != 0:
                raise DatapathError("the look-up program could not read its desk (lookup_keys, lookup_values)")
            found[start : start + len(part)] = self._lookup_values.values[: len(part)]
            start += len(part)
        return found

    def pending_drain(self, count_max: int) -> tuple[Rows, Rows]:
        """Takes up to count_max flows out of `pending`, going on where the last drain stopped, so that none starves."""
        parts: list[tuple[Rows, Rows]] = []
        if self._pending_left is not None:
            parts.append(self._pending_left)
            self._pending_left = None
        have = sum(len(part[0]) for part in parts)
        started_inside, busy, size = self._pending_cursor is not None, 0, max(count_max, BATCH_MAX)
        while have < count_max:
            keys, values = np.zeros(size, FLOW), np.zeros(size, PENDING)
            batch, after = libbpf.map_lookup_batch(
                self._fds["pending"], self._pending_cursor, keys, values, delete=True
            )
            if batch.errno == errno.ENOSPC:
                size *= 2
                continue
            if batch.errno not in (0, errno.ENOENT):
                busy = self._patience("pending", batch, busy)
                continue
            parts.append((keys[: batch.count], values[: batch.count]))
            have += batch.count
            at_end = batch.errno == errno.ENOENT
            self._pending_cursor = None if at_end else after
            if at_end and not started_inside:
                break
            started_inside = started_inside and not at_end
        all_keys = _joined(FLOW, [part[0] for part in parts])
        all_values = _joined(PENDING, [part[1] for part in parts])
        if have > count_max:
            self._pending_left = all_keys[count_max:], all_values[count_max:]
        return all_keys[:count_max], all_values[:count_max]

    # --- The host agent, the door, the counters -------------------------------------------------------------------

    def nat_slice(self, name: NatMap, cursor: int | None) -> tuple[Rows, Rows, int | None]:
        """NAT_KEY keys and NAT values of some buckets. The cursor counts buckets: whatever comes and goes between two
        slices, what stays is in its bucket."""
        return self._slice(name.value, NAT_KEY, NAT, cursor)

    def nat_delete(self, name: NatMap, keys: Rows, seen_ns: U64) -> int:
        """Deletes entries that have not been seen since, by the program hf_forget; how many."""
        assert keys.dtype == NAT_KEY, "translated flows are keys of dtype NAT_KEY"
        assert len(keys) == len(seen_ns), "as many stamps as keys"
        deleted, step = 0, min(LOOKUP_BATCH_MAX, self._stale_keys.count, self._stale_stamps.count)
        context = np.zeros(3, np.uint32)
        for start in range(0, len(keys), step):
            part = keys[start : start + step]
            self._stale_keys.values[: len(part)] = part
            self._stale_stamps.values[: len(part)] = seen_ns[start : start + step]
            context[:] = len(part), 0, name is NatMap.NAT
            if libbpf.syscall_run(self._forget_fd, context) != 0:
                raise DatapathError("the program that deletes translated flows could not read its desk")
            deleted += int(context[1])
        return deleted

    def nat_room(self, name: NatMap) -> int:
        """Entries from which an LRU map of this size may have evicted: see limits.NAT_FULL_RESERVE."""
        size = self._fast_path.map(name.value).info.max_entries
        return max(1, min(size * 7 // 8, size - NAT_FULL_RESERVE * libbpf.possible_cpus()))

    def members_door(self, addresses: Sequence[bytes], ids: Sequence[int]) -> None:
        """Sets member_by_addr to exactly these: the new ones first, so that no member is ever shut out."""
        assert len(addresses) == len(ids), "as many addresses as ids"
        assert all(len(address) == 16 for address in addresses), "addresses have 16 bytes"
        keys = np.frombuffer(b"".join(addresses), _DOOR_KEY)
        there, _ = self._dump("member_by_addr", _DOOR_KEY, layout.U32)
        wanted = set(addresses)
        gone = [row.tobytes() for row in there if row.tobytes() not in wanted]
        # Where the map is too full for new and old ones at once, the old ones have to go first.
        if len(gone) + len(wanted) > self._fast_path.map("member_by_addr").info.max_entries:
            self._delete("member_by_addr", np.frombuffer(b"".join(gone), _DOOR_KEY))
            gone = []
        if self._put("member_by_addr", keys, np.array(ids, layout.U32)) < len(keys):
            raise DatapathError(f"the map member_by_addr has no room for {len(keys)} members")
        self._delete("member_by_addr", np.frombuffer(b"".join(gone), _DOOR_KEY))

    def counters(self) -> U64:
        """uint64[len(Verdict), 2]: packets and bytes, summed over the CPUs."""
        count = self._fast_path.map("counters").info.max_entries
        keys = np.zeros(count, np.uint32)
        values = np.zeros((count, libbpf.possible_cpus(), 2), np.uint64)
        batch, _ = libbpf.map_lookup_batch(self._fds["counters"], None, keys, values)
        if batch.errno not in (0, errno.ENOENT):
            raise KernelError(batch.errno, f"cannot read the counters: {os.strerror(batch.errno)}")
        summed = np.zeros((len(Verdict), 2), np.uint64)
        known = keys[: batch.count] < len(Verdict)
        summed[keys[: batch.count][known]] = values[: batch.count][known].sum(axis=1)
        return summed
