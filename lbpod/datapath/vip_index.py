"""Where each VIP lies in the index that the fast path reads, and in which order it may be written.

The first VIPS_MAX places of ``vips`` are addressed by ``layout.vip_index``; what collides there hangs on a chain
through those behind them. The fast path reads while we write, so a change becomes *steps*, each of which leaves every
chain whole:

0. places that left a chain with the *previous* change are cleared and free again (no packet is still on its way through
   them; clearing them at once could cut a reader off in the middle of a chain);
1. new chained entries are written where nothing leads to yet;
2. everything that is in a chain is written: links to the new ones, links around those that left, changed entries. An
   entry keeps its place as long as it lives, and a head that is not used any more stays as a link.

Each address of a VIP has an entry (address, port 0, ICMP, id 0) besides, which says "this address is a VIP". Left to
others: whether a set of VIPs fits (the core refuses chains that are too long; for every set that it lets pass there are
places enough, see limits.VIP_INDEX_COUNT), and the writing itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lbpod.core.layout import PROTOCOL_ICMP, VIP, VIP_CLIENT_IP, vip_index
from lbpod.core.limits import VIP_CHAIN_MAX, VIP_INDEX_COUNT, VIPS_MAX
from lbpod.core.model import Affinity, Vip
from lbpod.datapath.port import U32, DatapathError

VipRows = npt.NDArray[Any]
"""(n,) of layout.VIP."""

Key = tuple[bytes, int, int]
"""Address (16 bytes), port, protocol."""


@dataclass(frozen=True)
class Entry:
    """What the index says about one key."""

    key: Key
    id: int
    flags: int


def entries_of(vips: Sequence[Vip]) -> tuple[Entry, ...]:
    """All entries that these VIPs need, sorted by key."""
    entries = {(address, 0, PROTOCOL_ICMP): Entry((address, 0, PROTOCOL_ICMP), 0, 0) for address in _addresses(vips)}
    for vip in vips:
        key = (vip.address, vip.port, int(vip.protocol))
        entries[key] = Entry(key, vip.id, VIP_CLIENT_IP if vip.affinity is Affinity.CLIENT_IP else 0)
    return tuple(entries[key] for key in sorted(entries))


def _addresses(vips: Sequence[Vip]) -> list[bytes]:
    return sorted({vip.address for vip in vips})


class VipIndex:
    """The index as it is in the map, and how it becomes another one.

    Invariants: `_chains[b]` are the places of bucket b, head first, `_chains[b][0] == b`, the rest from
    VIPS_MAX on; every place from VIPS_MAX on is in exactly one of: a chain, `_free`, `_resting`; len(chain) <=
    VIP_CHAIN_MAX.
    """

    def __init__(self, rows: VipRows) -> None:
        """rows: the whole map as found (all zero, or what an earlier agent wrote)."""
        assert rows.dtype == VIP and len(rows) == VIP_INDEX_COUNT, "the index is one row of layout.VIP for each place"
        self._rows = rows.copy()
        self._chains: dict[int, list[int]] = {}
        self._places: dict[Key, int] = {}
        heads = np.flatnonzero((self._rows["used"][:VIPS_MAX] != 0) | (self._rows["next"][:VIPS_MAX] != 0))
        for head in heads.tolist():
            self._chains[head] = list(self._walk(head))
        linked = {place for chain in self._chains.values() for place in chain}
        for place in sorted(linked):
            if self._rows["used"][place]:
                self._places[_key_of(self._rows[place])] = place
        apart = np.arange(VIP_INDEX_COUNT - 1, VIPS_MAX - 1, -1)
        apart = apart[~np.isin(apart, sorted(linked))]
        used = self._rows["used"][apart] != 0
        self._resting: list[int] = apart[used].tolist()
        self._free: list[int] = apart[~used].tolist()

    def _walk(self, head: int) -> Iterator[int]:
        place = head
        for _ in range(VIP_CHAIN_MAX):
            yield place
            place = int(self._rows["next"][place])
            if not VIPS_MAX <= place < VIP_INDEX_COUNT:
                return

    def change(self, entries: Sequence[Entry]) -> list[tuple[U32, VipRows]]:
        """Steps (places, rows) to be written one after the other, after which the map holds exactly these entries.

        The index takes them for written: where they are not, or where DatapathError says that they do not fit, it is
        to be made anew from the map.
        """
        old = self._rows.copy()
        cleared = sorted(self._resting)
        self._rows[cleared] = old[cleared] = np.zeros(len(cleared), VIP)
        self._free.extend(reversed(cleared))
        self._resting = []
        steps = [self._step(cleared)]
        wanted = {entry.key for entry in entries}
        for key in sorted(self._places.keys() - wanted):
            self._remove(key)
        added = sorted(place for place in map(self._put, entries) if place >= VIPS_MAX and not old["used"][place])
        steps.append(self._step(added))
        differs = (self._rows.view(np.uint64).reshape(-1, 4) != old.view(np.uint64).reshape(-1, 4)).any(axis=1)
        differs[added] = False
        steps.append(self._step(np.flatnonzero(differs).tolist()))
        return [step for step in steps if len(step[0])]

    def _step(self, places: list[int]) -> tuple[U32, VipRows]:
        return np.array(places, np.uint32), self._rows[places].copy()

    def _remove(self, key: Key) -> None:
        """Takes an entry out of its chain; a chained place rests with its content, for readers inside."""
        place = self._places.pop(key)
        head = vip_index(*key)
        chain = self._chains[head]
        at = chain.index(place)
        if at > 0:
            self._rows["next"][chain[at - 1]] = self._rows["next"][place]
            chain.remove(place)
            self._resting.append(place)
        else:
            link = int(self._rows["next"][place])
            self._rows[place] = np.zeros((), VIP)
            self._rows["next"][place] = link
        if len(chain) == 1 and not self._rows["used"][head]:
            del self._chains[head]

    def _put(self, entry: Entry) -> int:
        """Writes an entry to its place, and finds one where it has none."""
        place = self._places.get(entry.key)
        if place is None:
            place = self._find(entry)
            self._places[entry.key] = place
        row = np.zeros((), VIP)
        row["addr"] = np.frombuffer(entry.key[0], np.uint8)
        row["port_be"], row["protocol"] = entry.key[1], entry.key[2]
        row["flags"], row["id"], row["used"] = entry.flags, entry.id, 1
        row["next"] = self._rows["next"][place]
        self._rows[place] = row
        return place

    def _find(self, entry: Entry) -> int:
        head = vip_index(*entry.key)
        chain = self._chains.setdefault(head, [head])
        if not self._rows["used"][head]:
            return head
        if len(chain) >= VIP_CHAIN_MAX:
            raise DatapathError(f"more than {VIP_CHAIN_MAX} VIPs fall on place {head} of the VIP index: change a port")
        assert self._free, "the VIP index has a place for every VIP of two snapshots, and for those that rest"
        place = self._free.pop()
        self._rows["next"][chain[-1]] = place
        chain.append(place)
        return place

    @property
    def used_count(self) -> int:
        """Entries in use."""
        return len(self._places)


def _key_of(row: npt.NDArray[Any]) -> Key:
    return row["addr"].tobytes(), int(row["port_be"]), int(row["protocol"])
