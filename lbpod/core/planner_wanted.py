"""What is wanted: the World, without the backends that have drained for long enough.

A draining backend goes when its VIP's drain time is over, counted from when it was first seen draining. A Planner that
restarts counts anew: later is the safe side.
"""

import msgspec

from lbpod.core.model import BackendState, World, WorldBackend, WorldVip


class Wanted:
    """Invariant: ``world`` is None iff nothing was seen yet."""

    def __init__(self) -> None:
        self.world: World | None = None
        self._seen: World | None = None
        self._drains: dict[tuple[bytes, int, int, bytes, int], int] = {}  # since when: backend of a VIP
        self._drain_end_ns: int | None = None

    def see(self, world: World, now_ns: int) -> bool:
        """A new World. True if something else is wanted now."""
        if world == self._seen:
            return False
        self._seen = world
        return self._drain(world, now_ns)

    def tick(self, now_ns: int) -> bool:
        """Time has passed. True if something else is wanted now."""
        if self._drain_end_ns is None or now_ns < self._drain_end_ns:
            return False
        assert self._seen is not None, "there is nothing to drain before a World was seen"
        return self._drain(self._seen, now_ns)

    def _drain(self, seen: World, now_ns: int) -> bool:
        drains: dict[tuple[bytes, int, int, bytes, int], int] = {}
        ends = []
        vips: list[WorldVip] = []
        for vip in seen.vips:
            kept: list[WorldBackend] = []
            for one in vip.backends:
                if one.state is BackendState.DRAINING:
                    key = (vip.address, vip.port, int(vip.protocol), one.address, one.port)
                    drains[key] = self._drains.get(key, now_ns)
                    end_ns = drains[key] + vip.drain_ns
                    if end_ns <= now_ns:
                        continue
                    ends.append(end_ns)
                kept.append(one)
            vips.append(vip if len(kept) == len(vip.backends) else msgspec.structs.replace(vip, backends=tuple(kept)))
        self._drains = drains
        self._drain_end_ns = min(ends, default=None)
        wanted = World(seen.nodes, tuple(vips))
        has_changed = wanted != self.world
        self.world = wanted
        return has_changed
