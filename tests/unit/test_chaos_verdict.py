"""Whose fault a broken connection is, and what the files say: from records made by hand."""

import io
import json
import re
from typing import Any

import pytest
from rich.console import Console

from lbpod.lab.chaos.ledger import Join, Kind, Leave, Ledger, Loss, Sample
from lbpod.lab.chaos.options import Options
from lbpod.lab.chaos.report import page
from lbpod.lab.chaos.ringlog import HANDOVER, RING_PHASES, spans
from lbpod.lab.chaos.run import Played
from lbpod.lab.chaos.schedule import How
from lbpod.lab.chaos.table import comparison
from lbpod.lab.chaos.verdict import CHAOS, QUIET, Figures, Window, add_failover, double_windows, figures, spread
from lbpod.lab.chaos.wrk import read_wrk
from lbpod.lab.counters import Growth
from lbpod.lab.limits import MS_NS, SECOND_NS

OPTIONS = Options()
START_NS = 1_000 * SECOND_NS
NEEDED_NS = (30 + 5 + 10) * SECOND_NS
"""Idle timeout, interval and timeout of the options."""


def _loss(number: int, at_seconds: float, over_seconds: float | None) -> Loss:
    over_ns = None if over_seconds is None else START_NS + round(over_seconds * SECOND_NS)
    return Loss(number, START_NS + round(at_seconds * SECOND_NS), How.DESTROYED, f"node{number}", True, over_ns)


def _failure(at_seconds: float, age_seconds: float, verdict: str = "broken") -> dict[str, Any]:
    at_ns = START_NS + round(at_seconds * SECOND_NS)
    return {
        "kind": "failure",
        "at_ns": at_ns,
        "age_ns": round(age_seconds * SECOND_NS),
        "asked_ns": at_ns - 20 * MS_NS,
        "failed_ns": at_ns - 10 * MS_NS,
        "gone_ns": at_ns + SECOND_NS,
        "verdict": verdict,
        "reason": "reset",
        "backend": "pod1-1",
        "local_port": 4_711,
        "answers": 3,
        "detail": "<reset>",
    }


# -------------------------------------------------------------------------------------------------- two at once


def test_losses_one_after_the_other_excuse_nothing() -> None:
    assert [] == double_windows([_loss(1, 0, 8), _loss(2, 20, None)], OPTIONS)
    assert [] == double_windows([_loss(1, 0, None), _loss(2, 10, None)], OPTIONS), "by then it has settled"


def test_a_second_loss_before_the_ring_has_settled_opens_a_window() -> None:
    second_ns = START_NS + 5 * SECOND_NS
    assert [Window(second_ns, second_ns + NEEDED_NS)] == double_windows([_loss(1, 0, 8), _loss(2, 5, None)], OPTIONS)
    assert [Window(second_ns, second_ns + NEEDED_NS)] == double_windows([_loss(1, 0, None), _loss(2, 5, 6)], OPTIONS)


@pytest.mark.parametrize(
    ("at", "age", "excused"),
    [
        (6.0, 2.0, True),
        (4.9, 2.0, False),  # broke before
        (6.0, 0.5, False),  # was opened after
        (49.9, 60.0, True),
        (50.1, 60.0, False),  # by then it had needed its record, and had it
    ],
)
def test_a_window_excuses_what_was_open_before_and_broke_soon(at: float, age: float, excused: bool) -> None:
    (window,) = double_windows([_loss(1, 0, 8), _loss(2, 5, None)], OPTIONS)
    assert excused is window.excuses(_failure(at, age))


# ------------------------------------------------------------------------------------------------------ figures


def _sample(at_seconds: float, p50_ms: int, tracking: int = 0, relayed: int = 0) -> Sample:
    return Sample(
        at_ns=START_NS + round(at_seconds * SECOND_NS),
        connections=round(at_seconds * 100),
        long_lived=50,
        broken=0,
        gone=1,
        unattributed=0,
        p50_ns=p50_ms * MS_NS,
        p99_ns=10 * p50_ms * MS_NS,
        tracking={"node1": tracking, "node2": tracking // 2},
        relayed=relayed,
        resolved=1,
        paths=4,
        controller_up=True,
        ring_count=4,
    )


def _ledger() -> Ledger:
    """2 s of quiet, 10 s of chaos: two losses at once, a join, a leave."""
    ledger = Ledger(START_NS, START_NS + 3 * SECOND_NS, START_NS + 13 * SECOND_NS, START_NS + 15 * SECOND_NS)
    ledger.happened(START_NS + SECOND_NS, Kind.PHASE, QUIET)
    ledger.happened(ledger.chaos_ns, Kind.PHASE, CHAOS)
    ledger.samples = [_sample(0.5, 90), _sample(2, 1), _sample(3, 1), _sample(5, 4, 600, 70), _sample(9, 4, 500, 30)]
    ledger.losses = [_loss(1, 5, None), _loss(2, 6, None)]
    ledger.losses[1].controller_up = False
    ledger.happened(ledger.losses[0].at_ns, Kind.LOSS, "node1 destroyed")
    ledger.happened(START_NS + 7 * SECOND_NS, Kind.CHANGE, "pod1 drains")
    ledger.happened(START_NS + 7 * SECOND_NS, Kind.AGENT_END, "node3, status 70: a <broken> invariant")
    ledger.happened(START_NS + 8 * SECOND_NS, Kind.CONTROLLER_KILL, "")
    ledger.happened(START_NS + 9 * SECOND_NS, Kind.CONTROLLER_BACK, "")
    ledger.joins = [
        Join("node9", False, START_NS + 7 * SECOND_NS, START_NS + 8 * SECOND_NS, START_NS + 10 * SECOND_NS),
        Join("node4", True, START_NS + 7 * SECOND_NS, START_NS + 7 * SECOND_NS, START_NS + 8 * SECOND_NS),
        Join("node8", False, START_NS + 9 * SECOND_NS),
    ]
    ledger.leaves = [Leave("node5", START_NS + 9 * SECOND_NS, START_NS + 12 * SECOND_NS, 0)]
    ledger.handovers = [(START_NS + 8 * SECOND_NS, START_NS + 8 * SECOND_NS + 40 * MS_NS)]
    return ledger


CLIENTS: dict[str, Any] = {
    "connections": 900,
    "long_lived": 50,
    "long_open": 51,
    "short_done": 840,
    "short_open": 4,
    "short_in_flight": 6,
    "failed_unopened": 1,
    "unanswered": 7,
    "requests": 4_000,
    "ports_hurried": 0,
    "broken": 3,
    "broken_backend_gone": 1,
    "broken_unattributed": 2,
    "by_reason": {
        "broken": {"reset": 3},
        "broken_backend_gone": {"timeout": 1},
        "broken_unattributed": {"connect_timeout": 1, "reset": 1},
    },
}
"""900 were opened: 840 + 4 + 51, and of the 6 that failed one was not."""
FAILURES = [_failure(7, 3), _failure(7, 0.1), _failure(8, 0.2), _failure(7, 3, "broken_backend_gone")]
MARKS: list[dict[str, Any]] = [
    {
        "mark": number,
        "at_ns": START_NS + at * SECOND_NS,
        "groups": {
            "probe": {"flows": 30, "held_ns": [200 * MS_NS, held * MS_NS], "unanswered": 0},
            "long": {"flows": 50, "held_ns": [2 * held * MS_NS], "unanswered": 1},
        },
    }
    for number, at, held in ((1, 5, 400), (2, 6, 600))
]


def _figures() -> Figures:
    result = figures("holdfast", OPTIONS, _ledger(), CLIENTS, FAILURES)
    add_failover(result, _ledger(), MARKS)
    return result


def test_figures_add_up() -> None:
    found = _figures()
    assert (2, 1, 1, 2) == (
        found.broken,
        found.broken_two_replicas_lost,
        found.broken_backend_gone,
        found.broken_unattributed,
    ), "one of three was older than the second loss"
    assert (2, 2, 1, 1, 1) == (
        found.lb_losses,
        found.lb_joins,
        found.lb_leaves,
        found.backend_changes,
        found.agent_ends,
    )
    assert {"count": 4, "p50": 400.0, "p99": 600.0, "max": 600.0, "unanswered": 0} == found.failover_ms
    assert {"count": 2, "p50": 600.0, "p99": 600.0, "max": 600.0} == found.failover_without_controller_ms
    assert 1_200.0 == found.failover_ordinary_ms["max"]
    assert (2_000.0, 3_000.0) == (found.join_ms["max"], found.join_from_start_ms["max"])
    assert (1, 1_000.0) == (found.rejoin_ms["count"], found.rejoin_ms["max"])
    assert (3_000.0, 40.0) == (found.leave_ms["max"], found.handover_ms["max"])
    assert {"added_p50": 3_000, "added_p99": 30_000}.items() <= found.latency_us.items(), "the ramp is not quiet"
    assert (100, 600) == (found.relayed_packets, found.tracking_slots_peak)


def test_figures_say_how_all_of_them_failed_and_who_waits_in_vain() -> None:
    found = _figures()
    assert {"reset": 3} == found.broken_reasons
    assert {"connect_timeout": 1, "reset": 1} == found.unattributed_reasons
    assert {"timeout": 1} == found.backend_gone_reasons
    assert (7, 6, 1) == (found.unanswered_at_stop, found.short_in_flight_at_stop, found.failed_unopened)
    all_broken = found.broken + found.broken_two_replicas_lost + found.broken_backend_gone + found.broken_unattributed
    still_open = found.short_open_at_stop + found.long_open_at_stop
    assert found.connections == found.short_done + still_open + all_broken - found.failed_unopened
    first = found.broken_details[0]
    assert (7.0, 6.99, 6.98, 8.0) == tuple(first[f"{name}_seconds"] for name in ("at", "failed", "asked", "gone"))


def test_windows_are_told_and_excuse_nothing_of_a_baseline() -> None:
    found = _figures()
    assert (1, 45.0) == (found.two_replica_windows, found.two_replica_window_seconds)
    for name in ("hash_only", "local_table"):
        other = figures(name, OPTIONS, _ledger(), CLIENTS, FAILURES[:1])
        assert (3, 0, 0, 0.0) == (
            other.broken,
            other.broken_two_replicas_lost,
            other.two_replica_windows,
            other.two_replica_window_seconds,
        ), "it has no records on two replicas"


def test_what_is_broken_and_was_not_told_stays_broken() -> None:
    told = _figures()
    assert told.broken_two_replicas_lost > 0
    untold = figures("holdfast", OPTIONS, _ledger(), CLIENTS, [])
    assert (3, 0) == (untold.broken, untold.broken_two_replicas_lost)


@pytest.mark.parametrize("name", ["connections", "short_done", "long_open", "broken_unattributed", "failed_unopened"])
def test_a_connection_that_nobody_can_account_for_is_told(name: str) -> None:
    assert "" == _figures().miscounted
    found = figures("holdfast", OPTIONS, _ledger(), {**CLIENTS, name: CLIENTS[name] + 1}, FAILURES)
    assert "connections opened, but" in found.miscounted


def test_the_json_has_what_was_promised() -> None:
    document = json.loads(json.dumps(_figures().as_json()))
    promised = {
        *("connections", "long_lived", "broken", "broken_backend_gone", "broken_two_replicas_lost", "backend_changes"),
        *("unanswered_at_stop", "two_replica_windows", "two_replica_window_seconds"),
        *("unattributed_reasons", "backend_gone_reasons"),
        *("lb_losses", "lb_joins", "agent_kills", "controller_kills", "ecmp_reshuffles", "minutes"),
    }
    assert promised <= document.keys()
    for name in ("failover_ms", "join_ms"):
        assert {"p50", "p99", "max"} <= document[name].keys()


def test_spread_of_nothing_says_so() -> None:
    assert {"count": 0} == spread([])
    assert {"count": 3, "p50": 2.0, "p99": 3.0, "max": 3.0} == spread([3 * MS_NS, MS_NS, 2 * MS_NS])


def test_a_counter_grows_through_restarts_and_deaths() -> None:
    growth = Growth()
    assert 15 == growth.add({"a": 10, "b": 5})
    assert 2 == growth.add({"a": 12})  # b does not answer
    assert 4 == growth.add({"a": 1, "b": 8})  # a has begun anew, b was only silent


# -------------------------------------------------------------------------------------------- what others have said


def test_ring_changes_are_read_off_the_controllers_log() -> None:
    def line(at: str, phase: str) -> str:
        return json.dumps({"event": "phase", "phase": phase, "timestamp": f"2026-01-01T00:00:{at}Z"})

    log = "\n".join(
        [
            line("01.000000", "committing"),
            "Traceback (most recent call last):",
            json.dumps({"event": "config"}),
            line("02.000000", "ring preparing"),
            line("02.100000", "handing over"),
            line("02.350000", "switching"),
            line("02.400000", "ring ending"),
            line("02.500000", "idle"),
            line("03.000000", "ring preparing"),  # killed in the middle of it
        ]
    )
    base_ns = 1_767_225_600 * SECOND_NS
    assert [(2_000 * MS_NS, 2_500 * MS_NS)] == list(spans(log, RING_PHASES, base_ns))
    assert [(2_100 * MS_NS, 2_350 * MS_NS)] == list(spans(log, HANDOVER, base_ns))


def test_the_last_words_of_wrk_are_read() -> None:
    calm = "  1 threads and 4 connections\n  120 requests in 1.00m, 120.50MB read\nRequests/sec: 2.0\n"
    assert {"requests": 120, "connect_errors": 0, "read_errors": 0, "write_errors": 0, "timeout_errors": 0} == read_wrk(
        calm
    )
    wild = calm + "  Socket errors: connect 1, read 2, write 3, timeout 4\n"
    assert {"requests": 120, "connect_errors": 1, "read_errors": 2, "write_errors": 3, "timeout_errors": 4} == read_wrk(
        wild
    )


# ----------------------------------------------------------------------------------------------------- the report


def _page() -> str:
    played = Played(_ledger(), CLIENTS, FAILURES, MARKS, {}, 0)
    return page([(_figures(), played)], "holdfast chaos --minutes 10")


def test_the_report_needs_no_other_file() -> None:
    text = _page()
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)", text)
    assert not re.search(r"@import|url\((?!#)|<script|<link|<!ENTITY|DOCTYPE svg", text)
    assert 1 == text.count("<svg")


def test_the_report_says_what_happened_and_how_to_repeat_it() -> None:
    text = _page()
    assert "2 of 900 connections broke although their backend lived" in text
    assert "2 of which nobody can tell, and 1 excused in 1 windows (45 s)" in text
    assert "1 connect_timeout, 1 reset" in text
    assert "7 had waited for an answer for 2 s" in text
    assert "holdfast chaos --minutes 10" in text
    assert "node3, status 70: a &lt;broken&gt; invariant" in text
    assert "port 4711" in text
    for words in ("slots tracking", "packets relayed", "failover", "added to p99", "BROKEN", "long-lived, open now"):
        assert words in text


def test_runs_stand_side_by_side() -> None:
    other = _figures()
    other.run, other.broken = "hash_only", 4_321
    out = io.StringIO()
    Console(width=120, file=out).print(comparison([_figures(), other]))
    assert "Holdfast" in out.getvalue()
    assert "4,321" in out.getvalue()
