"""What a run came to: whose fault each broken connection is, and all figures of the JSON file. No I/O, no clock.

The checking client has judged each failure by what it knows (``lbpod.lab.check_rules``). Here is added what only the
harness knows: whether two LBs were lost at once. The records of tracking slots lie on two replicas; where both are
lost before a handover could finish, they are gone, and the flows that needed them break. That excuses a connection
only if it was older than the second loss, and broke within the time in which each flow must have needed its record
once more. Of the baselines it excuses nothing: they have no records on two replicas.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from lbpod.lab.chaos.ledger import Join, Kind, Ledger, Loss, Sample
from lbpod.lab.chaos.options import Options
from lbpod.lab.limits import MS_NS, SECOND_NS

HANDOVER_NS: Final = 10 * SECOND_NS
"""From a loss: so long the ring is given to settle without the LB, where nobody saw that it had."""
HOLDFAST: Final = "holdfast"
"""What runs call it (lbpod.lab.cluster.TITLES); all others are baselines."""
_US_NS: Final = 1_000


@dataclass(frozen=True)
class Window:
    """Two replicas were lost at once: at ``from_ns`` the second one, and until ``to_ns`` flows may find out."""

    from_ns: int
    to_ns: int

    def excuses(self, failure: dict[str, Any]) -> bool:
        """failure: a line of the checking client."""
        opened_ns = failure["at_ns"] - failure["age_ns"]
        return bool(opened_ns <= self.from_ns <= failure["at_ns"] <= self.to_ns)


def double_windows(losses: Sequence[Loss], options: Options) -> list[Window]:
    """Where a second LB was lost before the ring had settled without the first."""
    needed_ns = (options.idle_seconds * SECOND_NS) + options.interval_ms * MS_NS + options.timeout_ns
    windows = []
    for first, second in itertools.pairwise(losses):
        over_ns = first.at_ns + HANDOVER_NS if first.over_ns is None else first.over_ns
        if second.at_ns < over_ns:
            windows.append(Window(second.at_ns, second.at_ns + needed_ns))
    return windows


@dataclass
class Figures:
    """One run. Names are those of the JSON file, which people compare: do not rename."""

    run: str
    seed: int
    minutes: float
    """Of changes, as played."""
    miscounted: str = ""
    """A sentence where the figures do not account for every connection: then they prove nothing."""
    connections: int = 0
    """Opened by the checking client, long and short (wrk's are not counted). Invariant: connections == short_done +
    short_open_at_stop + long_open_at_stop + all broken ones, of whatever verdict - failed_unopened."""
    short_done: int = 0
    """Short ones that were answered."""
    short_open_at_stop: int = 0
    """Of those in flight, the ones that were open."""
    long_open_at_stop: int = 0
    """Long-lived ones, those included that nobody had answered yet."""
    long_lived: int = 0
    """Long-lived ones open at the end."""
    unanswered_at_stop: int = 0
    """Of these, how many had waited for an answer for 2 s (CHECK_UNANSWERED_NS) when the client was stopped."""
    short_in_flight_at_stop: int = 0
    """Short ones that were neither answered nor failed then."""
    failed_unopened: int = 0
    """Failures, of any of the kinds below, of connections that could not be opened: not among ``connections``."""
    requests: int = 0
    ports_hurried: int = 0
    """Ports that the checking client may have used again before they had rested (check_ports)."""
    broken: int = 0
    """Broken although their backend lived, and not excused by the loss of two replicas at once."""
    broken_backend_gone: int = 0
    broken_unattributed: int = 0
    """Broken before any backend had answered, and possibly sent to one that had just died: nobody can tell."""
    broken_two_replicas_lost: int = 0
    two_replica_windows: int = 0
    """How often two LBs were lost at once, so that connections might be excused. Baselines: never excused, 0."""
    two_replica_window_seconds: float = 0.0
    """The lengths of these windows, added up; what two of them share counts twice."""
    broken_reasons: dict[str, int] = field(default_factory=dict)
    """How those failed whose backend lived (lbpod.lab.check_rules.Reason)."""
    unattributed_reasons: dict[str, int] = field(default_factory=dict)
    backend_gone_reasons: dict[str, int] = field(default_factory=dict)
    broken_details: list[dict[str, object]] = field(default_factory=list)
    """When and how each of them broke, excused ones included: seconds since the start (when it was noticed, when it
    failed, when it was last asked, when its backend went, if that went later), age in seconds, who served it, how many
    answers it had got, its local port. As many as the checking client tells."""
    backend_changes: int = 0
    lb_losses: int = 0
    lb_losses_by_kind: dict[str, int] = field(default_factory=dict)
    lb_joins: int = 0
    """LBs that came, new or again, and took traffic."""
    lb_leaves: int = 0
    """LBs that were told to end."""
    lb_leaves_overdue: int = 0
    """Those that had to be killed."""
    agent_kills: int = 0
    agent_ends: int = 0
    """Agents and controllers that ended although nobody killed them."""
    controller_kills: int = 0
    ecmp_reshuffles: int = 0
    link_cuts: int = 0
    """How often two LBs did not reach each other for a while, though all others reached both."""
    path_changes: int = 0
    """Paths that the router took out or put in, beside the reshuffles."""
    postponed: int = 0
    """Losses and leaves that were left out because an LB was still missing."""
    failover_ms: dict[str, float] = field(default_factory=dict)
    """Of probes: from the loss of an LB to the answer of the last request that it held up (check_holdups); the router's
    reaction (``router_ms``) is in it."""
    failover_without_controller_ms: dict[str, float] = field(default_factory=dict)
    """The same, of losses while the controller was dead."""
    failover_ordinary_ms: dict[str, float] = field(default_factory=dict)
    """The same of all other long-lived connections: TCP's doubling pauses are in it."""
    join_ms: dict[str, float] = field(default_factory=dict)
    """New LBs: from the agent's first answer to its /readyz 200."""
    join_from_start_ms: dict[str, float] = field(default_factory=dict)
    """New LBs: from the start of the agent's process to its /readyz 200."""
    rejoin_ms: dict[str, float] = field(default_factory=dict)
    """LBs that had been cut off: from the first packet that comes through to /readyz 200."""
    agent_back_ms: dict[str, float] = field(default_factory=dict)
    """Agents that were killed: from there to /readyz 200, the supervisor's pause and the harness's look included."""
    leave_ms: dict[str, float] = field(default_factory=dict)
    """From SIGTERM to the end of the process."""
    ring_changes: int = 0
    ring_change_ms: dict[str, float] = field(default_factory=dict)
    """From its beginning to its end, as the controller's log says; those that one controller saw whole."""
    handover_ms: dict[str, float] = field(default_factory=dict)
    """Of that, the handover of records."""
    latency_us: dict[str, float] = field(default_factory=dict)
    """Medians over the seconds: quiet and in chaos, of each second's p50 and p99."""
    relayed_packets: int = 0
    resolved_flows: int = 0
    tracking_slots_peak: int = 0
    """Most slots tracking at one LB at one time."""
    wrk: dict[str, int] = field(default_factory=dict)
    machine: dict[str, float] = field(default_factory=dict)
    """Processors, and load average when the run ended: a machine with more to do than it can makes packets late, and
    what follows from that is not what a run is about."""
    options: dict[str, object] = field(default_factory=dict)
    events: list[tuple[float, str, str]] = field(default_factory=list)
    """What happened: seconds since the start, kind, details."""

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def spread(values_ns: Iterable[int]) -> dict[str, float]:
    """count, p50, p99 and max in milliseconds; without values only the count."""
    ordered = sorted(values_ns)
    if not ordered:
        return {"count": 0}

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] / MS_NS, 1)

    return {"count": len(ordered), "p50": at(0.5), "p99": at(0.99), "max": at(1.0)}


def figures(
    name: str, options: Options, ledger: Ledger, clients: dict[str, Any], failures: Sequence[dict[str, Any]]
) -> Figures:
    """What the run called ``name`` came to. clients: the checking client's last line; failures: its lines, the
    first of each verdict. Broken ones that it has not told stay broken."""
    windows = double_windows(ledger.losses, options) if name == HOLDFAST else []
    broken = [one for one in failures if one["verdict"] == "broken"]
    excused_count = sum(any(window.excuses(one) for window in windows) for one in broken)
    counts = ledger.counts
    result = Figures(
        run=name,
        seed=options.seed,
        minutes=round((ledger.calm_ns - ledger.chaos_ns) / (60 * SECOND_NS), 2),
        miscounted=miscounted(clients),
        connections=clients["connections"],
        long_lived=clients["long_lived"],
        short_done=clients["short_done"],
        short_open_at_stop=clients["short_open"],
        long_open_at_stop=clients["long_open"],
        unanswered_at_stop=clients["unanswered"],
        short_in_flight_at_stop=clients["short_in_flight"],
        failed_unopened=clients["failed_unopened"],
        requests=clients["requests"],
        ports_hurried=clients["ports_hurried"],
        broken=clients["broken"] - excused_count,
        broken_backend_gone=clients["broken_backend_gone"],
        broken_unattributed=clients["broken_unattributed"],
        broken_two_replicas_lost=excused_count,
        two_replica_windows=len(windows),
        two_replica_window_seconds=round(sum(one.to_ns - one.from_ns for one in windows) / SECOND_NS, 1),
        broken_reasons=dict(clients["by_reason"].get("broken", {})),
        unattributed_reasons=dict(clients["by_reason"].get("broken_unattributed", {})),
        backend_gone_reasons=dict(clients["by_reason"].get("broken_backend_gone", {})),
        broken_details=[_details(one, ledger) for one in broken],
        backend_changes=counts[Kind.CHANGE],
        lb_losses=len(ledger.losses),
        lb_losses_by_kind=dict(sorted(Counter(str(loss.how) for loss in ledger.losses).items())),
        lb_joins=sum(join.ready_ns is not None for join in ledger.joins),
        lb_leaves=len(ledger.leaves),
        agent_kills=counts[Kind.AGENT_KILL],
        agent_ends=counts[Kind.AGENT_END] + counts[Kind.CONTROLLER_END],
        controller_kills=counts[Kind.CONTROLLER_KILL],
        ecmp_reshuffles=counts[Kind.RESHUFFLE],
        link_cuts=len(ledger.link_cuts),
        path_changes=counts[Kind.OUT] + counts[Kind.BACK],
        postponed=counts[Kind.POSTPONED],
        relayed_packets=sum(sample.relayed for sample in ledger.samples),
        resolved_flows=sum(sample.resolved for sample in ledger.samples),
        tracking_slots_peak=max((slots for one in ledger.samples for slots in one.tracking.values()), default=0),
        options=asdict(options),
        events=[(round(ledger.since_start(one.at_ns), 2), str(one.kind), one.what) for one in ledger.events],
    )
    _add_times(result, ledger)
    result.latency_us = latency(ledger)
    return result


def miscounted(clients: dict[str, Any]) -> str:
    """Each connection that was opened has been answered, is open, or has failed: a sentence where that is not so, empty
    where it is. clients: as in ``figures``."""
    failed = sum(clients[verdict] for verdict in ("broken", "broken_backend_gone", "broken_unattributed"))
    failed_open = failed - clients["failed_unopened"]
    connections, done = clients["connections"], clients["short_done"]
    short_open, long_open = clients["short_open"], clients["long_open"]
    if connections == done + short_open + long_open + failed_open:
        return ""
    return (
        f"the checking client lost count: {connections} connections opened, but {done} short ones answered, "
        f"{short_open} short and {long_open} long-lived ones open at the stop, and {failed_open} failed "
        f"({failed} less {clients['failed_unopened']} that were never open)"
    )


def _details(failure: dict[str, Any], ledger: Ledger) -> dict[str, object]:
    """failure: a line of the checking client."""
    kept = {name: failure[name] for name in ("reason", "backend", "answers", "local_port", "detail")}
    gone_ns = failure["gone_ns"]
    return {
        "at_seconds": round(ledger.since_start(failure["at_ns"]), 3),
        "age_seconds": round(failure["age_ns"] / SECOND_NS, 3),
        "failed_seconds": round(ledger.since_start(failure["failed_ns"]), 3),
        "asked_seconds": round(ledger.since_start(failure["asked_ns"]), 3),
        "gone_seconds": None if gone_ns is None else round(ledger.since_start(gone_ns), 3),
        **kept,
    }


def add_failover(result: Figures, ledger: Ledger, marks: Sequence[dict[str, Any]]) -> None:
    """What the checking client reckoned for each loss."""
    without_controller = {loss.number for loss in ledger.losses if not loss.controller_up}
    probes = [(mark["mark"], mark["groups"]["probe"]) for mark in marks]
    held_ns = [ns for _, group in probes for ns in group["held_ns"]]
    result.failover_ms = spread(held_ns)
    result.failover_ms["unanswered"] = sum(group["unanswered"] for _, group in probes)
    result.failover_without_controller_ms = spread(
        ns for number, group in probes for ns in group["held_ns"] if number in without_controller
    )
    result.failover_ordinary_ms = spread(ns for mark in marks for ns in mark["groups"]["long"]["held_ns"])


def _add_times(result: Figures, ledger: Ledger) -> None:
    def joined(wanted: Iterable[Join], *, from_start: bool) -> Iterable[int]:
        for join in wanted:
            from_ns = join.started_ns if from_start else join.answered_ns
            if join.ready_ns is not None and from_ns is not None:
                yield join.ready_ns - from_ns

    new = [join for join in ledger.joins if not join.again]
    again = [join for join in ledger.joins if join.again]
    result.join_ms = spread(joined(new, from_start=False))
    result.join_from_start_ms = spread(joined(new, from_start=True))
    result.rejoin_ms = spread(joined(again, from_start=True))
    result.agent_back_ms = spread(ledger.agents_back_ns)
    result.leave_ms = spread(one.ended_ns - one.at_ns for one in ledger.leaves if one.ended_ns is not None)
    result.ring_changes = len(ledger.ring_changes)
    result.handover_ms = spread(to_ns - from_ns for from_ns, to_ns in ledger.handovers)
    result.ring_change_ms = spread(to_ns - from_ns for from_ns, to_ns in ledger.ring_changes)


def latency(ledger: Ledger) -> dict[str, float]:
    """In microseconds: the median second's p50 and p99, quiet and in chaos, and what chaos adds."""

    def median(samples: Sequence[Sample], what: str) -> float:
        ordered = sorted(getattr(sample, what) for sample in samples)
        return round(ordered[len(ordered) // 2] / _US_NS) if ordered else 0.0

    quiet, chaos = (
        quiet_samples(ledger),
        [one for one in ledger.samples if ledger.chaos_ns <= one.at_ns < ledger.calm_ns],
    )
    found = {
        "quiet_p50": median(quiet, "p50_ns"),
        "quiet_p99": median(quiet, "p99_ns"),
        "chaos_p50": median(chaos, "p50_ns"),
        "chaos_p99": median(chaos, "p99_ns"),
    }
    found["added_p50"] = found["chaos_p50"] - found["quiet_p50"]
    found["added_p99"] = found["chaos_p99"] - found["quiet_p99"]
    return found


def quiet_samples(ledger: Ledger) -> list[Sample]:
    """Those between the ramp and the first change."""
    ramp = next((event for event in ledger.events if event.kind is Kind.PHASE and event.what == QUIET), None)
    return [] if ramp is None else [one for one in ledger.samples if ramp.at_ns < one.at_ns <= ledger.chaos_ns]


QUIET: Final = "quiet"
CHAOS: Final = "chaos"
CALM: Final = "calm"
"""Phases of a run, as events name them."""
