"""The figures in words: one row for each, runs side by side, for the report and for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from lbpod.lab.chaos.verdict import Figures
from lbpod.lab.cluster import TITLES


def rows(runs: Sequence[Figures]) -> Iterator[tuple[str, list[str]]]:
    """What the figures are called in the table of the report and on the terminal, and their values, run by run."""

    def times(values: dict[str, float]) -> str:
        if not values.get("count"):
            return "-"
        return f"{values['p50']:,.0f} / {values['p99']:,.0f} / {values['max']:,.0f} ({values['count']:,.0f})"

    yield "connections", [f"{one.connections:,}" for one in runs]
    yield "long-lived, open at the end", [f"{one.long_lived:,}" for one in runs]
    yield "BROKEN, though the backend lived", [f"{one.broken:,}" for one in runs]
    yield "broken, backend gone", [f"{one.broken_backend_gone:,}" for one in runs]
    yield "broken, nobody can tell", [f"{one.broken_unattributed:,}" for one in runs]
    yield "  how these failed", [_reasons(one.unattributed_reasons) for one in runs]
    yield "broken, two replicas lost at once", [f"{one.broken_two_replicas_lost:,}" for one in runs]
    yield "  windows (seconds) in which that is an excuse", [_windows(one) for one in runs]
    yield "unanswered for 2 s at the stop", [f"{one.unanswered_at_stop:,}" for one in runs]
    yield "backend changes", [f"{one.backend_changes:,}" for one in runs]
    yield "LBs lost / joined / left", [f"{one.lb_losses} / {one.lb_joins} / {one.lb_leaves}" for one in runs]
    yield "agents, controllers killed", [f"{one.agent_kills} / {one.controller_kills}" for one in runs]
    yield "ECMP reshuffles", [f"{one.ecmp_reshuffles:,}" for one in runs]
    yield "links between two LBs cut", [f"{one.link_cuts:,}" for one in runs]
    yield "programs that ended by themselves", [f"{one.agent_ends:,}" for one in runs]
    yield "failover, ms: p50 / p99 / max (count)", [times(one.failover_ms) for one in runs]
    yield "  while the controller was dead", [times(one.failover_without_controller_ms) for one in runs]
    yield "  with TCP's doubling pauses", [times(one.failover_ordinary_ms) for one in runs]
    yield "join, from the agent's first answer, ms", [times(one.join_ms) for one in runs]
    yield "join, from the start of the process, ms", [times(one.join_from_start_ms) for one in runs]
    yield "back after being cut off, ms", [times(one.rejoin_ms) for one in runs]
    yield "killed agent ready again, ms", [times(one.agent_back_ms) for one in runs]
    yield "leave, ms", [times(one.leave_ms) for one in runs]
    yield "handover, ms", [times(one.handover_ms) for one in runs]
    yield "ring change, ms", [times(one.ring_change_ms) for one in runs]
    yield "latency added to p50 / p99, us", [_added(one.latency_us) for one in runs]
    yield "packets relayed", [f"{one.relayed_packets:,}" for one in runs]
    yield "flows resolved", [f"{one.resolved_flows:,}" for one in runs]
    yield "tracking slots, most", [f"{one.tracking_slots_peak:,}" for one in runs]


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items())) or "-"


def _windows(one: Figures) -> str:
    return f"{one.two_replica_windows:,} ({one.two_replica_window_seconds:,.0f})"


def _added(values: dict[str, float]) -> str:
    return f"{values.get('added_p50', 0):,.0f} / {values.get('added_p99', 0):,.0f}"


def comparison(runs: Sequence[Figures]) -> Table:
    """For the terminal."""
    table = Table(title=f"{runs[0].minutes:g} minutes of chaos", title_style="bold")
    table.add_column("")
    for one in runs:
        table.add_column(TITLES[one.run], justify="right")
    for name, values in rows(runs):
        if not any(value.strip("-") for value in values):
            continue
        shown = values
        if name.startswith("BROKEN"):
            shown = [f"[{'green' if value == '0' else 'red'}]{value}[/]" for value in values]
        table.add_row(name, *shown)
    return table
