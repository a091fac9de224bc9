"""Ring changes and handovers, read off the controller's own log: exact moments, where asking once a second is blunt.

The controller logs a line at each change of its phase, with the time of day. A span counts only where one controller
saw its beginning and its end; what a killed one had begun, its successor ends, and nobody has timed that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Final

from lbpod.core.messages import Phase

RING_PHASES: Final = frozenset(
    {
        Phase.RING_PREPARING.value,
        Phase.HANDING_OVER.value,
        Phase.SWITCHING.value,
        Phase.RING_ENDING.value,
    }
)
HANDOVER: Final = frozenset({Phase.HANDING_OVER.value})

Span = tuple[int, int]


def phases(log: str) -> Iterator[tuple[int, str]]:
    """Time of day in nanoseconds, and the phase that began then. Lines that are no such thing are passed over."""
    for line in log.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict) and said.get("event") == "phase":
            at = datetime.fromisoformat(str(said["timestamp"]))
            yield round(at.timestamp() * 1_000_000) * 1_000, str(said["phase"])


def spans(log: str, wanted: frozenset[str], offset_ns: int) -> Iterator[Span]:
    """When the controller was in one of these phases without a break. offset_ns: time of day less monotonic clock."""
    began_ns: int | None = None
    for at_ns, phase in phases(log):
        if phase in wanted and began_ns is None:
            began_ns = at_ns
        elif phase not in wanted and began_ns is not None:
            yield began_ns - offset_ns, at_ns - offset_ns
            began_ns = None


def all_spans(logs: Iterable[str], wanted: frozenset[str], offset_ns: int) -> list[Span]:
    """Of all controllers of a run, one after the other."""
    return [span for log in logs for span in spans(log, wanted, offset_ns)]
