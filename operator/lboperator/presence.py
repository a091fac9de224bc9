"""Which nodes have an agent: those of the agents' EndpointSlices, and for a while those that were in them.

Why for a while: a DaemonSet's pod is replaced within seconds, and the agent that comes back goes on as if nothing had
been. Without the pause, each restart would take a node out of the World and put it back, two changes of the ring for
nothing. Whether an agent is *alive* is not asked here: readiness would be a circle (an agent is ready once it is in the
ring), and the Planner asks every node itself, more often than kubelet does.
"""

from collections.abc import Iterable

from lboperator.nouns import Slice
from lbpod.core.limits import AGENT_GRACE_NS


class Presence:
    """Invariant: every node in ``_seen`` was in a slice no longer than AGENT_GRACE_NS ago, as of the last ``see``."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def see(self, slices: Iterable[Slice], now_ns: int) -> frozenset[str]:
        """Names of the nodes that count."""
        for one in slices:
            for endpoint in one.endpoints:
                if endpoint.node:
                    self._seen[endpoint.node] = now_ns
        self._seen = {name: at_ns for name, at_ns in self._seen.items() if now_ns - at_ns < AGENT_GRACE_NS}
        return frozenset(self._seen)
