"""The port: all that the shell may do to a fast path, whichever maker stands behind it.

Why a port: the same Keeper runs on the kernel's maps, on maps in memory (where ``lbpod.core.oracle`` is the fast path)
and on maps that fail by seed. So scenarios and simulation exercise the very code that runs in production.

Arrays (slots, backends, ...) are written in place: aligned words, so that the fast path never sees half of one. Hash
maps are written and read in batches. Every call that cannot do its work raises ``DatapathError`` with one sentence;
nothing is ever half-reported: what was written before the failure is simply written again (writes are idempotent).
"""

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.void]
"""A structured array with one of the dtypes of ``lbpod.core.layout``."""


class DatapathError(Exception):
    """The kernel (or a fault) refused an operation on a map. The text says which map and why."""


class ArrayName(Enum):
    """Arrays of plain rows: name of the map, index = the id of the thing."""

    VIPS = "vips"
    BACKENDS = "backends"
    NODES = "nodes"
    MEMBERS = "members"
    OWN = "own"
    NEXT = "next"
    PREV = "prev"
    VIP_STATS = "vip_stats"
    CONFIG = "config"


class FlowMap(Enum):
    """Hash maps by flow (key: layout.FLOW; values: LEASE, RECORD, RECORD, PENDING)."""

    CACHE = "cache"
    RECORDS = "records"
    EMBRYONIC = "embryonic"
    PENDING = "pending"


class NatMap(Enum):
    """The host agent's maps of translated flows (key: layout.NAT_KEY; values: NAT)."""

    UNASSURED = "unassured"
    NAT = "nat"


class Datapath(Protocol):
    """One node's maps. Not thread-safe: one task owns it."""

    def write(self, name: ArrayName, indices: U32, rows: npt.NDArray[np.generic]) -> None:
        """Writes rows (dtype of that array; uint32 for own, next, prev) at the given indices."""

    def read(self, name: ArrayName) -> npt.NDArray[np.generic]:
        """A copy of the whole array."""

    def vip_create(self, vip: int) -> None:
        """Makes slots and other_seen of a VIP (all zero). A VIP that exists is left as it is."""

    def vip_delete(self, vip: int) -> None:
        """Removes them. A VIP that does not exist is no error."""

    def vip_ids(self) -> Sequence[int]:
        """VIPs that exist, ascending (after a restart: those whose pinned maps were found)."""

    def write_slots(self, vip: int, slots: U32, words: U64) -> None:
        """Writes slot words (see layout.SLOT_*); each word changes atomically."""

    def read_slots(self, vip: int) -> U64:
        """A copy of all SLOT_COUNT words of a VIP."""

    def read_other_seen(self, vip: int, slots: U32 | None = None) -> U64:
        """A copy of all SLOT_COUNT stamps (ns of the coarse monotonic clock; 0: never), or of those of some slots."""

    def flows_put(self, name: FlowMap, keys: Rows, values: Rows) -> int:
        """Inserts or replaces; returns how many found room (the first so many of keys)."""

    def flows_delete(self, name: FlowMap, keys: Rows) -> None:
        """Deletes; a missing key is no error."""

    def flows_dump(self, name: FlowMap) -> tuple[Rows, Rows]:
        """All keys and values, in no particular order."""

    def flows_slice(self, name: FlowMap, cursor: int | None) -> tuple[Rows, Rows, int | None]:
        """Some thousands of them, and where to go on (None: that was all). As ``nat_slice``."""

    def records_drop(self, keys: Rows, values: Rows) -> None:
        """Deletes from records and embryonic what still is as it was looked at: RECORD for each key. What has been seen
        or recorded anew since then stays; each is compared and deleted in one step."""

    def records_lookup(self, keys: Rows) -> Rows:
        """RECORD for each key, from records or else from embryonic; round = layout.RECORD_MISSING: there is none, with
        layout.RECORD_EMBRYONIC: it is of the latter."""

    def pending_drain(self, count_max: int) -> tuple[Rows, Rows]:
        """Takes up to count_max pending flows out of the map: (FLOW keys, PENDING values)."""

    def nat_slice(self, name: NatMap, cursor: int | None) -> tuple[Rows, Rows, int | None]:
        """Some thousands of a map's NAT_KEY keys and NAT values, and where to go on (None: that was all).

        cursor: None to begin, else what the slice before gave. Whoever goes on to the end has seen each entry that was
        there all the time exactly once, whatever came and went meanwhile.
        """

    def nat_delete(self, name: NatMap, keys: Rows, seen_ns: U64) -> int:
        """Deletes NAT_KEY keys whose entry still has this seen_ns, as one step for each; how many. The others stay."""

    def nat_room(self, name: NatMap) -> int:
        """Entries from which the map may begin to evict: it is nearly full."""

    def members_door(self, addresses: Sequence[bytes], ids: Sequence[int]) -> None:
        """Sets member_by_addr to exactly these outer source addresses (16 bytes each)."""

    def counters(self) -> U64:
        """uint64[len(Verdict), 2]: packets and bytes, summed over the CPUs."""
