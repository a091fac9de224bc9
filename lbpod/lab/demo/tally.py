"""What one run came to, and the figures on the way there.

Decides only how figures add up. Those of the clients come from the checker, those of the LBs from their own /metrics,
so the table shows what anybody could have read from outside.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from lbpod.lab.counters import RELAYED, RESOLVED, TRACKING, Growth

Said = Mapping[str, Mapping[str, float]]
"""Node name -> what the LB's /metrics says, of the LBs that answer."""


@dataclass
class Figures:
    """One run. Names are those of the JSON file, which people compare: do not rename."""

    connections: int = 0
    """Opened by clients, long and short."""
    long_lived: int = 0
    """Long-lived ones that were open at the end (asked for: see the options)."""
    broken: int = 0
    """Broken although their backend lived."""
    broken_backend_gone: int = 0
    """Broken because their backend was removed."""
    broken_unattributed: int = 0
    """Broken before any backend had answered, just when one was removed: nobody can tell."""
    backend_changes: int = 0
    ecmp_reshuffles: int = 0
    lb_losses: int = 0
    """LBs that were destroyed."""
    lb_joins: int = 0
    """LBs that came new and took traffic."""
    relayed_packets: int = 0
    resolved_flows: int = 0
    """Flows that LBs asked their owners about, and got an answer."""
    tracking_slots_peak: int = 0
    """Most slots tracking at one LB at one time."""
    tracking_slots_end: int = 0
    seconds: float = 0.0
    requests: int = 0
    latency_p50_us: int = 0
    latency_p99_us: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """How the broken ones failed (lbpod.lab.check_rules.Reason)."""
    simulated: bool = False
    """Not with packets: in the simulator."""

    def as_json(self) -> dict[str, object]:
        return asdict(self)


class LbSums:
    """What the LBs of one run have counted since it began, those that died included."""

    def __init__(self, before: Said) -> None:
        """before: what they say when the run begins."""
        self._relayed, self._resolved = Growth(), Growth()
        self._grown(before)

    def _grown(self, said: Said) -> tuple[int, int]:
        relayed = self._relayed.add({name: values.get(RELAYED, 0) for name, values in said.items()})
        resolved = self._resolved.add({name: values.get(RESOLVED, 0) for name, values in said.items()})
        return relayed, resolved

    def gather(self, figures: Figures, said: Said) -> int:
        """Adds what the LBs say now to the figures of the run. Returns the packets relayed since the last time."""
        relayed, resolved = self._grown(said)
        figures.relayed_packets += relayed
        figures.resolved_flows += resolved
        figures.tracking_slots_end = max((int(values.get(TRACKING, 0)) for values in said.values()), default=0)
        figures.tracking_slots_peak = max(figures.tracking_slots_peak, figures.tracking_slots_end)
        return relayed


def take_clients(figures: Figures, counters: dict[str, object]) -> None:
    """Takes over the newest counters of the checking client (see lbpod.lab.check_rules.Tally)."""

    def number(name: str) -> int:
        value = counters.get(name, 0)
        assert isinstance(value, int), f"{name} is a counter"
        return value

    figures.connections = number("connections")
    figures.long_lived = number("long_lived")
    figures.broken = number("broken")
    figures.broken_backend_gone = number("broken_backend_gone")
    figures.broken_unattributed = number("broken_unattributed")
    figures.requests = number("requests")
    latency = counters.get("latency_ns")
    if isinstance(latency, dict):
        figures.latency_p50_us = int(latency.get("p50", 0)) // 1_000
        figures.latency_p99_us = int(latency.get("p99", 0)) // 1_000
    by_reason = counters.get("by_reason")
    broken = by_reason.get("broken", {}) if isinstance(by_reason, dict) else {}
    figures.reasons = {str(name): int(count) for name, count in sorted(broken.items())}
