"""What happens when: the script of one run, as data.

Why data: all three runs get the very same script, and a test can read it. Times are nanoseconds since the checking
client was started. What a step does to which backend is decided when it is played (``stage``), by rules that know no
chance, so the runs differ in nothing but the program that forwards.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

SECOND_NS: Final = 1_000_000_000
SECONDS_MIN: Final = 8
SECONDS_MAX: Final = 3_600
RESHUFFLE_EVERY_NS: Final = 1_500_000_000


class Act(Enum):
    """One thing that happens."""

    SCALE_UP = "scale up"
    """Two more backends."""
    SCALE_DOWN = "scale down, draining"
    """Two backends get no new flows and keep the old ones."""
    END_DRAIN = "drain ends"
    """Those two are removed with whatever they still serve."""
    REPLACE = "rolling replacement"
    """One new backend; the oldest that is not draining begins to drain."""
    RESHUFFLE = "ECMP reshuffle"
    """The router sends most established flows to other LBs."""


@dataclass(frozen=True, order=True)
class Step:
    """at_ns: since the start of the run; index: tells steps of the same moment apart."""

    at_ns: int
    index: int
    act: Act


def script(seconds: int, backends: int) -> tuple[Step, ...]:
    """The steps of a run of so many seconds with so many backends at first, in order of time.

    Invariants: every backend that was there at first or was added by SCALE_UP, and is not draining, is replaced once;
    nothing happens in the first eighth (flows are opened) and in the last (what is under way comes to rest).
    """
    assert SECONDS_MIN <= seconds <= SECONDS_MAX, f"a run takes {SECONDS_MIN} to {SECONDS_MAX} s"
    assert backends >= 3, "two of the backends are drained, and one has to stay"
    length_ns = seconds * SECOND_NS
    acts: list[tuple[int, Act]] = [
        (length_ns * 2 // 16, Act.SCALE_UP),
        (length_ns * 4 // 16, Act.SCALE_DOWN),
        (length_ns * 12 // 16, Act.END_DRAIN),
    ]
    first_ns, last_ns = length_ns * 5 // 16, length_ns * 14 // 16
    acts += [(first_ns + (last_ns - first_ns) * one // backends, Act.REPLACE) for one in range(backends)]
    acts += [
        (at_ns, Act.RESHUFFLE) for at_ns in range(length_ns // 8 + RESHUFFLE_EVERY_NS // 2, last_ns, RESHUFFLE_EVERY_NS)
    ]
    return tuple(sorted(Step(at_ns, index, act) for index, (at_ns, act) in enumerate(acts)))
