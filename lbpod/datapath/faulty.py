"""A datapath that fails on purpose, by seed: the port in front of another maker, with dice.

What this file decides: that a stated share of operations raises DatapathError instead of being done, or is done half
(a batch of which only a part arrives, which is what a kernel may do to one), and that the same seed and the same
sequence of calls fail in the same places, so that any run can be repeated by one number. What it leaves to others: what
to do about it (the Keeper), and whose maps are behind it.

Each operation throws the dice once, whatever it is given; a fault comes before the operation (nothing was done) or, for
what writes many things, in the middle (a prefix was done). Deletes and creations are all or nothing.
"""

import random
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from lbpod.datapath.port import U32, U64, ArrayName, Datapath, DatapathError, FlowMap, NatMap, Rows


class FaultyDatapath:
    """Implements the port; hands everything that does not fail to `behind`."""

    def __init__(self, behind: Datapath, seed: int, write_share: float = 0.1, read_share: float = 0.1) -> None:
        """Shares: 0.0 (never) to 1.0 (always) of the operations that write, and of those that read."""
        assert 0.0 <= write_share <= 1.0, "a share lies between 0 and 1"
        assert 0.0 <= read_share <= 1.0, "a share lies between 0 and 1"
        self.behind: Final = behind
        self.write_share = write_share
        """May be changed at any time: scenarios switch faults off to let things settle."""
        self.read_share = read_share
        self.fault_count = 0
        self._dice: Final = random.Random(seed)

    def _reads(self, what: str) -> None:
        """Throws the dice for an operation that only looks."""
        if self._dice.random() < self.read_share:
            self._fail(what, "reading")

    def _writes(self, what: str, count: int = 0) -> int | None:
        """Throws the dice for an operation that writes `count` things: None (it works), or how many arrive."""
        if self._dice.random() >= self.write_share:
            return None
        return self._dice.randint(0, max(count - 1, 0))

    def _fail(self, what: str, doing: str) -> None:
        self.fault_count += 1
        raise DatapathError(f"fault {self.fault_count} by seed: {doing} {what}")

    def write(self, name: ArrayName, indices: U32, rows: npt.NDArray[np.generic]) -> None:
        """May write only the first rows."""
        arrived = self._writes(name.value, len(indices))
        if arrived is not None:
            self.behind.write(name, indices[:arrived], rows[:arrived])
            self._fail(name.value, "writing")
        self.behind.write(name, indices, rows)

    def read(self, name: ArrayName) -> npt.NDArray[np.generic]:
        """May fail."""
        self._reads(name.value)
        return self.behind.read(name)

    def vip_create(self, vip: int) -> None:
        """May fail; nothing is made then."""
        if self._writes("vip") is not None:
            self._fail(f"VIP {vip}", "creating")
        self.behind.vip_create(vip)

    def vip_delete(self, vip: int) -> None:
        """May fail; nothing is deleted then."""
        if self._writes("vip") is not None:
            self._fail(f"VIP {vip}", "deleting")
        self.behind.vip_delete(vip)

    def vip_ids(self) -> Sequence[int]:
        """Never fails: the agent keeps this list itself."""
        return self.behind.vip_ids()

    def write_slots(self, vip: int, slots: U32, words: U64) -> None:
        """May write only the first words."""
        arrived = self._writes("slots", len(slots))
        if arrived is not None:
            self.behind.write_slots(vip, slots[:arrived], words[:arrived])
            self._fail(f"the slots of VIP {vip}", "writing")
        self.behind.write_slots(vip, slots, words)

    def read_slots(self, vip: int) -> U64:
        """May fail."""
        self._reads(f"the slots of VIP {vip}")
        return self.behind.read_slots(vip)

    def read_other_seen(self, vip: int, slots: U32 | None = None) -> U64:
        """May fail."""
        self._reads(f"the stamps of VIP {vip}")
        return self.behind.read_other_seen(vip, slots)

    def flows_put(self, name: FlowMap, keys: Rows, values: Rows) -> int:
        """May put only the first flows, and say so by an error or by the count, as a full map does."""
        arrived = self._writes(name.value, len(keys))
        if arrived is None:
            return self.behind.flows_put(name, keys, values)
        done = self.behind.flows_put(name, keys[:arrived], values[:arrived])
        if self._dice.random() < 0.5:
            self._fail(name.value, "writing")
        self.fault_count += 1
        return done

    def flows_delete(self, name: FlowMap, keys: Rows) -> None:
        """May delete only the first flows."""
        arrived = self._writes(name.value, len(keys))
        if arrived is not None:
            self.behind.flows_delete(name, keys[:arrived])
            self._fail(name.value, "deleting from")
        self.behind.flows_delete(name, keys)

    def flows_dump(self, name: FlowMap) -> tuple[Rows, Rows]:
        """May fail."""
        self._reads(name.value)
        return self.behind.flows_dump(name)

    def flows_slice(self, name: FlowMap, cursor: int | None) -> tuple[Rows, Rows, int | None]:
        """May fail."""
        self._reads(name.value)
        return self.behind.flows_slice(name, cursor)

    def records_drop(self, keys: Rows, values: Rows) -> None:
        """May drop only the first ones, and fail; twice, as each map is another system call."""
        for name in (FlowMap.RECORDS, FlowMap.EMBRYONIC):
            arrived = self._writes(name.value, len(keys))
            if arrived is not None:
                self.behind.records_drop(keys[:arrived], values[:arrived])
                self._fail(name.value, "deleting from")
        self.behind.records_drop(keys, values)

    def records_lookup(self, keys: Rows) -> Rows:
        """May fail."""
        self._reads("records")
        return self.behind.records_lookup(keys)

    def pending_drain(self, count_max: int) -> tuple[Rows, Rows]:
        """May fail; the flows stay where they are then."""
        self._reads("pending")
        return self.behind.pending_drain(count_max)

    def nat_slice(self, name: NatMap, cursor: int | None) -> tuple[Rows, Rows, int | None]:
        """May fail."""
        self._reads(name.value)
        return self.behind.nat_slice(name, cursor)

    def nat_delete(self, name: NatMap, keys: Rows, seen_ns: U64) -> int:
        """May delete only the first ones."""
        arrived = self._writes(name.value, len(keys))
        if arrived is not None:
            self.behind.nat_delete(name, keys[:arrived], seen_ns[:arrived])
            self._fail(name.value, "deleting from")
        return self.behind.nat_delete(name, keys, seen_ns)

    def nat_room(self, name: NatMap) -> int:
        """Never fails: it is the size of a map."""
        return self.behind.nat_room(name)

    def members_door(self, addresses: Sequence[bytes], ids: Sequence[int]) -> None:
        """May fail; the door stays as it was then."""
        if self._writes("member_by_addr") is not None:
            self._fail("member_by_addr", "writing")
        self.behind.members_door(addresses, ids)

    def counters(self) -> U64:
        """Never fails: nothing depends on it but what people look at."""
        return self.behind.counters()
