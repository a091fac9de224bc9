"""What can be chosen about a chaos run, with the bounds that keep one sensible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lbpod.lab.limits import MS_NS, SECOND_NS

LBS_MIN: Final = 3
"""One may be lost while another leaves, and somebody has to be left."""
SLACK_NS: Final = 2 * SECOND_NS
"""For a client that is late, and for its grace before it judges (lbpod.lab.limits.CHECK_GRACE_NS)."""
MINUTES_MAX: Final = 24 * 60


@dataclass(frozen=True)
class Options:
    """One run. Every rate of 0 means: never."""

    minutes: float = 10
    """Of changes; ramp, quiet time and calm end come on top."""
    lbs: int = 4
    hosts: int = 3
    backends: int = 12
    long_count: int = 5_000
    interval_ms: int = 5_000
    """Between two requests of a long-lived connection."""
    probes: int = 30
    """More long-lived connections, that ask every ``probe_ms`` and resend evenly: failover is measured with them."""
    probe_ms: int = 100
    short_rate: int = 200
    """Short connections opened a second."""
    wrk_connections: int = 4
    """Of wrk, each fetching 1 MiB every two seconds."""
    timeout_ms: int = 10_000
    """A request without an answer for so long has broken its connection."""
    quiet_seconds: int = 10
    """Before the changes: what latency is without them."""
    idle_seconds: int = 30
    """The VIP's idle timeout."""
    changes_per_minute: float = 80
    removals_per_minute: float = 4
    """Changes that take a drained backend away, with the connections that it still has."""
    crashes_per_minute: float = 1
    """Changes that begin with a backend's sudden death."""
    loss_seconds: float = 20
    """From one lost LB to the next; between them, another joins."""
    leave_seconds: float = 60
    """From one LB that leaves in order (SIGTERM) to the next; another joins in its place."""
    double_every: int = 0
    """Every so many losses take two LBs at once: what no two replicas survive."""
    agent_kill_seconds: float = 7
    controller_kill_seconds: float = 30
    reshuffle_seconds: float = 1.5
    link_cut_seconds: float = 0
    """From one cut of the link between two LBs to the next; those that would meet a loss are left out. Never by
    default: see docs/chaos.md."""
    router_ms: int = 300
    """How long the router sends into a lost LB, as with BFD."""
    supervisor_ms: int = 1_000
    """How long a killed agent stays away."""
    seed: int = 1

    def __post_init__(self) -> None:
        assert 0 < self.minutes <= MINUTES_MAX, f"a run takes up to {MINUTES_MAX} minutes"
        assert self.lbs >= LBS_MIN, f"{LBS_MIN} LBs at least"
        assert self.backends >= 4, "two may drain and one die, and one has to stay"
        assert self.idle_seconds * 1_000 >= 2 * self.interval_ms, "a connection that waits must not count as over"

    @property
    def length_ns(self) -> int:
        """Of the part with changes."""
        return round(self.minutes * 60 * SECOND_NS)

    @property
    def silence_shows_ns(self) -> int:
        """So long after a backend fell silent all its long-lived connections have broken, and the client knows."""
        return self.interval_ms * MS_NS + self.timeout_ns + SLACK_NS

    @property
    def timeout_ns(self) -> int:
        return self.timeout_ms * MS_NS
