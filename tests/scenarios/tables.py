"""Tables that all runs of all scenarios share: each is built once, by the real builder, and then remembered.

A table is a pure function of seed, VIP and backends, and building them is half of what a scenario costs; that every
node builds the same one is the unit tests' and the properties' promise, not this folder's. ``Tables`` calls itself a
cache that may be thrown away at any time; this one is merely never thrown away.
"""

from collections.abc import Sequence
from functools import cache

from lbpod.core.model import Backend
from lbpod.core.snapshot import Tables, VipKey, eligible
from lbpod.core.table import Table


class SharedTables(Tables):
    """Remembers every table that it has made."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._made: dict[tuple[object, ...], Table] = {}

    def table(self, key: VipKey, backends: Sequence[Backend]) -> Table:
        """As Tables."""
        wanted = key, tuple((one.id, one.address, one.port, one.weight) for one in eligible(backends))
        if wanted not in self._made:
            self._made[wanted] = super().table(key, backends)
        return self._made[wanted]


@cache
def shared_tables(seed: int) -> SharedTables:
    """Those of a cluster's seed."""
    return SharedTables(seed)
