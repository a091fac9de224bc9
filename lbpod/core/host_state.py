"""What a node remembers as host agent: the list of its live flows, how full its maps were, the sweep at hand.

Apart from the rest of the Keeper's state because nothing else of it is concerned: a host agent answers for pods,
whoever the LBs are. Decided elsewhere: what a list is good for (``quiet``), what goes (``sweep``).
"""

from dataclasses import dataclass, field

from lbpod.core.flows import Facts, LiveFlows
from lbpod.core.messages import QuietCall


@dataclass(slots=True)
class NatCount:
    """Entries of one map of translated flows, as one look through it meets them."""

    count: int = 0
    """Looked at so far, live or not."""
    dropped: int = 0
    """Those that were over, and went (a sweep)."""
    room: int = 0
    """From so many on the map may begin to evict."""


def nat_counts() -> dict[bool, NatCount]:
    """Of `unassured` (False) and `nat` (True): NatLooked.assured."""
    return {False: NatCount(), True: NatCount()}


@dataclass(slots=True)
class NatList:
    """Translated flows that are live, as host agents are asked about them: made slice by slice."""

    asked_at_ns: int
    """No entry was looked at before."""
    facts: Facts
    """VIPs and slots are as these say. Invariant of HostState.nat: of use only while they are the State's."""
    parts: list[LiveFlows] = field(default_factory=list)
    counts: dict[bool, NatCount] = field(default_factory=nat_counts)


@dataclass(slots=True)
class Sweep:
    """One look through all translated flows for those that are over, a slice each tick."""

    cursor: tuple[bool, int | None] | None = None
    waiting: bool = False
    """A slice has been asked for."""
    counts: dict[bool, NatCount] = field(default_factory=nat_counts)


@dataclass(slots=True)
class HostState:
    """What this node remembers as host agent (``quiet``, ``sweep``)."""

    nat: NatList | None = None
    """The last list that was made whole, where it is fresh."""
    nat_looking: bool = False
    """A list is being made."""
    nat_waiting: list[tuple[int, QuietCall, int]] = field(default_factory=list)
    """Requests that wait for a list, and since when. Invariant: not empty only while one is being made."""
    nat_full_ns: int = 0
    """When a map of translated flows last may have evicted; 0: never."""
    slept_ns: int = 0
    """For how long this agent seems not to have run before it last woke: in one go, or in several close together."""
    woke_ns: int = 0
    """When it last woke."""
    sweep: Sweep | None = None
    sweep_at_ns: int = 0
    """When the next sweep begins; 0: no tick has come yet."""
    swept: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    """Entries of either map that the last sweep wanted dropped: there may have been so many more at one time than were
    seen."""
