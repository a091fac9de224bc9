"""The arrays of the VIPs, mapped into this process as long as somebody has just used them.

Why not all of them for good: each is half a mebibyte that counts as the agent's memory, two for each VIP, while nearly
all VIPs are at rest and their arrays untouched for hours. Mapping one again takes some tens of microseconds, by its
pin: a process without CAP_SYS_ADMIN cannot open a map by its id, and two descriptors for each VIP would exhaust the
usual limit of 1,024.

Left to others: which VIPs there are and what is pinned when (``kernel``), and what is written (the Keeper).
"""

import os
from collections import OrderedDict

from lbpod.core.limits import INNER_MAPPED_MAX, SLOT_COUNT
from lbpod.datapath import layout, libbpf
from lbpod.datapath.mapped import MappedArray
from lbpod.datapath.pins import PinFolder
from lbpod.datapath.port import DatapathError


class InnerArrays:
    """Those that were used last, at most INNER_MAPPED_MAX. Not thread-safe."""

    def __init__(self, pins: PinFolder) -> None:
        self._pins = pins
        self._mapped: OrderedDict[tuple[str, int], MappedArray] = OrderedDict()
        """(name of the outer map, VIP id) -> array; the one used last at the end."""

    def get(self, outer: str, vip: int) -> MappedArray:
        """One that is pinned; it is to be used before the next call."""
        key = outer, vip
        if key not in self._mapped:
            while len(self._mapped) >= INNER_MAPPED_MAX:
                self._mapped.popitem(last=False)[1].close()
            self._mapped[key] = self._map(outer, vip)
        self._mapped.move_to_end(key)
        return self._mapped[key]

    def _map(self, outer: str, vip: int) -> MappedArray:
        path = self._pins.vip_path(outer, vip)
        fd = libbpf.pinned(path)
        if fd is None:
            raise DatapathError(f"the pin {path} has gone")
        try:
            return MappedArray(f"{outer} of VIP {vip}", fd, layout.U64, SLOT_COUNT)
        finally:
            os.close(fd)

    def forget(self, vip: int) -> None:
        """Unmaps those of a VIP, which is about to go."""
        for key in [key for key in self._mapped if key[1] == vip]:
            self._mapped.pop(key).close()

    def close(self) -> None:
        """Unmaps all."""
        while self._mapped:
            self._mapped.popitem()[1].close()
