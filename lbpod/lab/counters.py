"""Counters of the LBs, and how they add up while LBs die, restart from 0 and come new.

Shared by the demo and the chaos run; both show what anybody could have read from /metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

RELAYED: Final = 'holdfast_packets_total{verdict="relayed"}'
RESOLVED: Final = "holdfast_resolved_flows_total"
TRACKING: Final = "holdfast_tracking_slots"


class Growth:
    """How much a counter that many keep has grown, whoever of them dies, restarts from 0 or comes new."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def add(self, values: Mapping[str, float]) -> int:
        grown = 0.0
        for name in sorted(values):
            before = self._last.get(name, 0.0)
            grown += values[name] - before if values[name] >= before else values[name]
            self._last[name] = values[name]
        return int(grown)
