"""The demo's script and its sums: what no lab is needed for."""

import io
from collections import deque

import pytest
from rich.console import Console

from lbpod.lab.counters import RELAYED, RESOLVED, TRACKING
from lbpod.lab.demo.tally import Figures, LbSums, take_clients
from lbpod.lab.demo.timeline import SECOND_NS, Act, script
from lbpod.lab.demo.view import Screen, comparison, spark


@pytest.mark.parametrize("seconds", [16, 32, 60])
@pytest.mark.parametrize("backends", [3, 6, 12])
def test_script_replaces_every_backend_twice_while_the_router_reshuffles(seconds: int, backends: int) -> None:
    steps = script(seconds, backends)
    acts = [step.act for step in steps]
    assert sorted(steps) == list(steps)
    assert 2 * backends == acts.count(Act.REPLACE)
    assert 1 == acts.count(Act.SCALE_UP) == acts.count(Act.SCALE_DOWN) == acts.count(Act.END_DRAIN)
    reshuffled = [step.at_ns for step in steps if step.act is Act.RESHUFFLE]
    replaced = [step.at_ns for step in steps if step.act is Act.REPLACE]
    for part in (replaced[:backends], replaced[backends:]):
        assert any(part[0] < at_ns < part[-1] for at_ns in reshuffled), "flows move in the middle of the changes"
    assert all(seconds * SECOND_NS // 18 <= step.at_ns <= seconds * SECOND_NS * 15 // 16 for step in steps)


def test_drain_begins_before_it_ends() -> None:
    order = [step.act for step in script(32, 6)]
    assert order.index(Act.SCALE_UP) < order.index(Act.SCALE_DOWN) < order.index(Act.END_DRAIN)


@pytest.mark.parametrize("seconds", [16, 32, 60])
def test_an_lb_is_lost_and_another_joins_while_backends_are_replaced(seconds: int) -> None:
    steps = script(seconds, 6)
    (loss,) = [step.at_ns for step in steps if step.act is Act.LOSS]
    (join,) = [step.at_ns for step in steps if step.act is Act.JOIN]
    replaced = [step.at_ns for step in steps if step.act is Act.REPLACE]
    assert replaced[6] < loss < replaced[7] < join < replaced[-2]
    assert loss > max(step.at_ns for step in steps if step.act is Act.END_DRAIN), "first the backends alone"


def _says(relayed: int, resolved: int, tracking: int) -> dict[str, float]:
    return {RELAYED: relayed, RESOLVED: resolved, TRACKING: tracking}


def test_figures_of_the_lbs_count_from_the_start_of_the_run_and_outlive_those_that_die() -> None:
    figures = Figures()
    sums = LbSums({"a": _says(10, 1, 0), "b": _says(20, 2, 0)})
    assert 10 == sums.gather(figures, {"a": _says(15, 4, 700), "b": _says(25, 4, 900)})
    assert 4 == sums.gather(figures, {"a": _says(16, 4, 0), "c": _says(3, 5, 5)})
    assert (14, 10) == (figures.relayed_packets, figures.resolved_flows)
    assert (900, 5) == (figures.tracking_slots_peak, figures.tracking_slots_end)


def test_broken_connections_keep_their_reasons() -> None:
    figures = Figures()
    take_clients(
        figures,
        {
            "connections": 7,
            "broken": 3,
            "broken_backend_gone": 1,
            "latency_ns": {"p50": 2_500, "p99": 9_000_000},
            "by_reason": {"broken": {"reset": 2, "other_backend": 1}, "broken_backend_gone": {"closed": 1}},
        },
    )
    assert (7, 3, 1) == (figures.connections, figures.broken, figures.broken_backend_gone)
    assert {"reset": 2, "other_backend": 1} == figures.reasons
    assert (2, 9_000) == (figures.latency_p50_us, figures.latency_p99_us)


def test_comparison_shows_all_runs_side_by_side() -> None:
    out = io.StringIO()
    runs = {"holdfast": Figures(), "hash_only": Figures(broken=12), "local_table": Figures()}
    Console(width=140, file=out).print(comparison(runs, "three ways of balancing"))
    text = out.getvalue()
    assert "Holdfast" in text
    assert "consistent hashing alone" in text
    assert "12" in text


def test_without_a_terminal_the_screen_prints_lines() -> None:
    out = io.StringIO()
    screen = Screen(Console(width=120, file=out), "Holdfast", 16, Figures(connections=5))
    screen.looked(4.0, 17, 3)
    screen.happened("scale up: + pod1-3", 4.2)
    text = out.getvalue()
    assert "17 slots tracking" in text
    assert "4.2 s  scale up: + pod1-3" in text
    assert "▁█" == spark(deque([0, 17]))
