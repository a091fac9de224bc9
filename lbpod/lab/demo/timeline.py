"""What happens when: the script of one run, as data.

Why data: all three runs get the very same script, and a test can read it. Times are nanoseconds since the checking
client was started. What a step does to which backend is decided when it is played (``stage``), by rules that know no
chance, and which LB is lost by the seed, so the runs differ in nothing but the program that forwards.

Two parts: first the backends change and the router reshuffles its paths; then a load balancer is destroyed and another
one joins while all backends are replaced once more. The second part is what users of hashes and flow tables feel most:
whoever takes over the flows of the lost one knows nothing of them, and the one that joins has an empty table.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

SECOND_NS: Final = 1_000_000_000
SECONDS_MIN: Final = 16
SECONDS_MAX: Final = 3_600
RESHUFFLE_EVERY_NS: Final = 1_500_000_000
_FIRST_PART: Final = (15, 32)
"""Share of a run without changes of the LBs. The second part is longer: a lost LB is taken out of the ring only ten
seconds later, and what joins then joins with it."""


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
    LOSS = "LB destroyed"
    """Its machine burns: cut off for ever, and its node removed."""
    JOIN = "LB joins"
    """A new machine under a new name."""


@dataclass(frozen=True, order=True)
class Step:
    """at_ns: since the start of the run; index: tells steps of the same moment apart."""

    at_ns: int
    index: int
    act: Act


def script(seconds: int, backends: int) -> tuple[Step, ...]:
    """The steps of a run of so many seconds with so many backends at first, in order of time.

    Invariants: in each part, every backend that was there at its beginning or was added by SCALE_UP, and is not
    draining, is replaced once; nothing happens in the first eighth of the run's first part (flows are opened), and in
    the last eighth of either (what is under way comes to rest). The LB is lost, and the other one joins, while backends
    are being replaced.
    """
    assert SECONDS_MIN <= seconds <= SECONDS_MAX, f"a run takes {SECONDS_MIN} to {SECONDS_MAX} s"
    assert backends >= 3, "two of the backends are drained, and one has to stay"
    length_ns = seconds * SECOND_NS
    part_ns = length_ns * _FIRST_PART[0] // _FIRST_PART[1]
    acts = [*_backends_change(0, part_ns, backends), *_load_balancers_change(part_ns, length_ns, backends)]
    return tuple(sorted(Step(at_ns, index, act) for index, (at_ns, act) in enumerate(acts)))


def _backends_change(from_ns: int, to_ns: int, backends: int) -> list[tuple[int, Act]]:
    length_ns = to_ns - from_ns
    first_ns, last_ns = from_ns + length_ns * 5 // 16, from_ns + length_ns * 14 // 16
    return [
        (from_ns + length_ns * 2 // 16, Act.SCALE_UP),
        (from_ns + length_ns * 4 // 16, Act.SCALE_DOWN),
        (from_ns + length_ns * 12 // 16, Act.END_DRAIN),
        *_replacements(first_ns, last_ns, backends),
        *_reshuffles(from_ns + length_ns // 8, last_ns),
    ]


def _load_balancers_change(from_ns: int, to_ns: int, backends: int) -> list[tuple[int, Act]]:
    length_ns = to_ns - from_ns
    first_ns, last_ns = from_ns + length_ns * 1 // 16, from_ns + length_ns * 14 // 16
    return [
        (from_ns + length_ns * 2 // 16, Act.LOSS),
        (from_ns + length_ns * 7 // 16, Act.JOIN),
        *_replacements(first_ns, last_ns, backends),
        *_reshuffles(first_ns, last_ns),
    ]


def _replacements(first_ns: int, last_ns: int, backends: int) -> list[tuple[int, Act]]:
    return [(first_ns + (last_ns - first_ns) * one // backends, Act.REPLACE) for one in range(backends)]


def _reshuffles(first_ns: int, last_ns: int) -> list[tuple[int, Act]]:
    half_ns = RESHUFFLE_EVERY_NS // 2
    return [(at_ns, Act.RESHUFFLE) for at_ns in range(first_ns + half_ns, last_ns, RESHUFFLE_EVERY_NS)]
