"""What happened, kept in order: events, losses, joins, one sample a second. No I/O, no clock, no judgement.

All times are nanoseconds of the monotonic clock; ``start_ns`` is when the checking client was started, and what goes
into files counts from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from lbpod.lab.chaos.schedule import How


class Kind(StrEnum):
    """Of an event."""

    CHANGE = "backend change"
    LOSS = "LB lost"
    OUT = "path taken out"
    BACK = "path put in"
    JOIN = "LB joins"
    RETURN = "LB is reachable again"
    LEAVE = "LB leaves"
    LEFT = "LB has left"
    AGENT_KILL = "agent killed"
    AGENT_END = "agent ended by itself"
    CONTROLLER_KILL = "controller killed"
    CONTROLLER_BACK = "controller back"
    CONTROLLER_END = "controller ended by itself"
    RESHUFFLE = "ECMP reshuffle"
    LINK_CUT = "link cut"
    LINK_BACK = "link whole again"
    PHASE = "phase of the run"
    POSTPONED = "postponed"


@dataclass(frozen=True)
class Event:
    at_ns: int
    kind: Kind
    what: str


@dataclass
class Loss:
    """An LB that was lost."""

    number: int
    at_ns: int
    how: How
    node: str
    controller_up: bool
    over_ns: int | None = None
    """When the ring had settled without it, or it was back; None: not yet."""


@dataclass
class LinkCut:
    """Two LBs that did not reach each other."""

    at_ns: int
    sender: str
    receiver: str
    one_way: bool
    """Only what ``sender`` sent was lost."""
    over_ns: int | None = None
    """When it was whole again; None: it was not."""

    def __str__(self) -> str:
        return f"{self.sender} {'->' if self.one_way else '<->'} {self.receiver}"


@dataclass
class Join:
    """An LB that came. ``again``: it had been cut off, and its agent never stopped."""

    node: str
    again: bool
    started_ns: int
    answered_ns: int | None = None
    ready_ns: int | None = None


@dataclass
class Leave:
    """An LB that was told to end."""

    node: str
    at_ns: int
    ended_ns: int | None = None
    status: int | None = None


@dataclass(frozen=True)
class Sample:
    """What one second looked like."""

    at_ns: int
    connections: int
    long_lived: int
    broken: int
    gone: int
    unattributed: int
    p50_ns: int
    p99_ns: int
    tracking: Mapping[str, int]
    """Slots tracking, by LB that answered."""
    relayed: int
    """Packets relayed since the last sample, by all."""
    resolved: int
    """Flows resolved since the last sample."""
    paths: int
    """LBs that the router sends to."""
    controller_up: bool
    ring_count: int
    """Members of the ring, as the controller says; 0: nobody answers."""


@dataclass
class Ledger:
    """Everything about one run."""

    start_ns: int
    chaos_ns: int = 0
    """When the changes began."""
    calm_ns: int = 0
    """When they ended."""
    end_ns: int = 0
    events: list[Event] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    joins: list[Join] = field(default_factory=list)
    leaves: list[Leave] = field(default_factory=list)
    link_cuts: list[LinkCut] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    agents_back_ns: list[int] = field(default_factory=list)
    """For each agent that was killed and is ready again: how long that took."""
    ring_changes: list[tuple[int, int]] = field(default_factory=list)
    """From, to: the controller was about the ring."""
    handovers: list[tuple[int, int]] = field(default_factory=list)
    """From, to: of these, records were on their way."""
    counts: Counter[Kind] = field(default_factory=Counter)

    def happened(self, at_ns: int, kind: Kind, what: str) -> None:
        self.events.append(Event(at_ns, kind, what))
        self.counts[kind] += 1

    def since_start(self, at_ns: int) -> float:
        """Seconds."""
        return (at_ns - self.start_ns) / 1e9
