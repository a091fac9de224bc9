"""What one run came to, and the figures on the way there.

Decides only how figures add up. Those of the clients come from the checker, those of the LBs from their own /metrics,
so the table shows what anybody could have read from outside.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field


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

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class LbFigures:
    """One LB at one moment, as its /metrics says."""

    tracking_slots: int
    relayed_packets: int
    resolved_flows: int
    generation: int


def gather(figures: Figures, lbs: Iterable[LbFigures], before: Iterable[LbFigures]) -> None:
    """Adds what all LBs say to the figures of the run; `before`: what they said when the run began."""
    now, then = list(lbs), list(before)
    assert len(now) == len(then), "the same LBs before and after"
    figures.relayed_packets = sum(one.relayed_packets for one in now) - sum(one.relayed_packets for one in then)
    figures.resolved_flows = sum(one.resolved_flows for one in now) - sum(one.resolved_flows for one in then)
    figures.tracking_slots_end = max((one.tracking_slots for one in now), default=0)
    figures.tracking_slots_peak = max(figures.tracking_slots_peak, figures.tracking_slots_end)


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
