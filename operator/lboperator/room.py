"""How many VirtualServices there is room for. Pure.

``core.snapshot.check_world`` says whether all of them fit. Where they do not, this says which: each is tried with those
before it, and one that does not fit is left out *alone*. (Once everything after the first one that did not fit was left
out, too: one VirtualService with nine ports on one place of the index took all younger ones with it, whoever's.)
"""

from collections import Counter
from collections.abc import Sequence

from lbpod.core.layout import vip_index
from lbpod.core.limits import BACKENDS_MAX, VIP_CHAIN_MAX, VIPS_MAX
from lbpod.core.model import WorldVip
from lbpod.core.snapshot import endpoint, index_entries


class Room:
    """What is left. Invariant: all that was taken fits together."""

    def __init__(self) -> None:
        self._entries: set[tuple[bytes, int, int]] = set()
        self._places: Counter[int] = Counter()
        self._vips = self._backends = 0

    def take(self, vips: Sequence[WorldVip]) -> str:
        """Room for all VIPs of one VirtualService, or for none: then one sentence says why."""
        if self._vips + len(vips) > VIPS_MAX - 1:
            return f"all VirtualServices together may have {VIPS_MAX - 1} ports, and those before it have {self._vips}"
        backends = sum(len(vip.backends) for vip in vips)
        if self._backends + backends > BACKENDS_MAX:
            sentence = f"all VirtualServices together may have {BACKENDS_MAX} endpoints, once for each port"
            return f"{sentence}, and those before it have {self._backends}"
        entries = index_entries(vips)
        if sum(port > 0 for _, port, _ in entries) < len(vips):
            return "one of its ports is there twice"
        fresh = Counter(vip_index(*entry) for entry in entries - self._entries)
        for vip in vips:
            place = vip_index(vip.address, vip.port, int(vip.protocol))
            if self._places[place] + fresh[place] > VIP_CHAIN_MAX:
                return f"too many VIPs fall on the place of {endpoint(vip)} in the index; change this port"
        if any(self._places[place] + count > VIP_CHAIN_MAX for place, count in fresh.items()):
            return "too many VIPs fall on the place of its address in the index; use another address"
        self._entries |= entries
        self._places += fresh
        self._vips += len(vips)
        self._backends += backends
        return ""
