"""The plots of one run: what happened, and what clients and LBs felt of it, on one time axis, as one SVG.

matplotlib draws it, off screen and without a window system. The SVG is meant to stand inside an HTML page: no prolog,
no document type, no metadata, nothing that points out of the file; letters stay letters, so a page can be searched.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lbpod.lab.chaos.ledger import Kind, Ledger
from lbpod.lab.chaos.schedule import How
from lbpod.lab.chaos.verdict import latency
from lbpod.lab.limits import MS_NS, SECOND_NS

WIDTH_INCHES: Final = 13.0
HEIGHTS: Final = (2.3, 1.5, 1.5, 1.5, 1.5, 1.8, 1.8)
RED, GREEN, BLUE, ORANGE, GREY, PURPLE = "#c0392b", "#27864a", "#2563a8", "#d9822b", "#8a8f98", "#7d4fa6"
LOSS_COLOURS: Final = {How.DESTROYED: RED, How.CUT_OFF: PURPLE, How.BLIP: ORANGE}
STYLE: Final = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def svg(ledger: Ledger, marks: Sequence[dict[str, Any]]) -> str:
    """The element ``<svg>``. marks: what the checking client reckoned for each loss."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, sum(HEIGHTS) + 1), layout="constrained")
        axes: list[Axes] = list(figure.subplots(len(HEIGHTS), 1, sharex=True, height_ratios=HEIGHTS))
        parts: list[Callable[[Axes, Ledger], None]] = [_events, _connections, _broken, _tracking, _relays]
        for axis, draw in zip(axes, parts, strict=False):
            draw(axis, ledger)
        _times(axes[5], ledger, marks)
        _latency(axes[6], ledger)
        for axis in axes[1:]:
            _mark_losses(axis, ledger)
        axes[-1].set_xlabel("seconds since the clients started")
        axes[-1].set_xlim(0, ledger.since_start(ledger.end_ns))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _seconds(ledger: Ledger) -> list[float]:
    return [ledger.since_start(one.at_ns) for one in ledger.samples]


def _of(ledger: Ledger, *kinds: Kind) -> list[float]:
    return [ledger.since_start(event.at_ns) for event in ledger.events if event.kind in kinds]


def _events(axis: Axes, ledger: Ledger) -> None:
    """One lane for each kind of event; what lasts is a bar."""
    lanes = {
        "ECMP reshuffles": (_of(ledger, Kind.RESHUFFLE), GREY),
        "paths out, in": (_of(ledger, Kind.OUT, Kind.BACK), GREY),
        "backend changes": (_of(ledger, Kind.CHANGE), BLUE),
        "agents killed": (_of(ledger, Kind.AGENT_KILL), ORANGE),
    }
    names = [*lanes, "controller away", "links cut", "LB leaves", "LB lost until back", "LB joins"]
    for place, (times, colour) in enumerate(lanes.values()):
        axis.eventplot(times, lineoffsets=place, linelengths=0.7, linewidths=0.8, colors=colour)
    _bars(axis, names.index("controller away"), _away(ledger), ORANGE)
    end = ledger.since_start(ledger.end_ns)
    parted = [(one.at_ns, one.over_ns) for one in ledger.link_cuts]
    _bars(axis, names.index("links cut"), [_span(ledger, *one, end) for one in parted], PURPLE)
    left = [(one.at_ns, one.ended_ns) for one in ledger.leaves]
    _bars(axis, names.index("LB leaves"), [_span(ledger, *one, end) for one in left], BLUE)
    for loss in ledger.losses:
        span = _span(ledger, loss.at_ns, loss.over_ns, end)
        _bars(axis, names.index("LB lost until back"), [span], LOSS_COLOURS[loss.how])
    joins = [(one.started_ns, one.ready_ns) for one in ledger.joins]
    _bars(axis, names.index("LB joins"), [_span(ledger, *one, end) for one in joins], GREEN)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    keys = [Line2D([], [], color=colour, linewidth=4, label=str(how)) for how, colour in LOSS_COLOURS.items()]
    axis.legend(handles=keys, loc="upper left", ncols=3, bbox_to_anchor=(0, 1.16))


def _span(ledger: Ledger, from_ns: int, to_ns: int | None, end: float) -> tuple[float, float]:
    """Start and length in seconds; what has no end lasts to the end."""
    start = ledger.since_start(from_ns)
    return start, (end if to_ns is None else ledger.since_start(to_ns)) - start


def _away(ledger: Ledger) -> list[tuple[float, float]]:
    """When the controller was dead."""
    spans: list[tuple[float, float]] = []
    gone: float | None = None
    for event in ledger.events:
        at = ledger.since_start(event.at_ns)
        if event.kind in (Kind.CONTROLLER_KILL, Kind.CONTROLLER_END):
            gone = at if gone is None else gone
        elif event.kind is Kind.CONTROLLER_BACK and gone is not None:
            spans.append((gone, at - gone))
            gone = None
    return spans


def _bars(axis: Axes, place: int, spans: Sequence[tuple[float, float]], colour: str) -> None:
    axis.broken_barh(list(spans), (place - 0.35, 0.7), facecolors=colour, alpha=0.8)


def _connections(axis: Axes, ledger: Ledger) -> None:
    times = _seconds(ledger)
    axis.plot(times, [one.connections for one in ledger.samples], color=BLUE, label="opened so far")
    other = axis.twinx()
    other.plot(times, [one.long_lived for one in ledger.samples], color=GREEN, label="long-lived, open now")
    other.set_ylim(bottom=0)
    other.grid(visible=False)
    axis.set_ylabel("connections")
    axis.set_ylim(bottom=0)
    axis.legend(handles=[*axis.lines, *other.lines], loc="upper left")


def _broken(axis: Axes, ledger: Ledger) -> None:
    times = _seconds(ledger)
    axis.step(times, [one.broken for one in ledger.samples], where="post", color=RED, linewidth=2, label="BROKEN")
    axis.step(times, [one.unattributed for one in ledger.samples], where="post", color=ORANGE, label="nobody can tell")
    axis.step(times, [one.gone for one in ledger.samples], where="post", color=GREY, label="backend gone")
    axis.set_ylabel("broken so far")
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper left", ncols=3)


def _tracking(axis: Axes, ledger: Ledger) -> None:
    most = [max(one.tracking.values(), default=0) for one in ledger.samples]
    axis.fill_between(_seconds(ledger), most, color=ORANGE, alpha=0.3, linewidth=0)
    axis.plot(_seconds(ledger), most, color=ORANGE, label="slots tracking, the most at one LB")
    axis.set_ylim(0, 66_000)
    axis.legend(loc="upper left")


def _relays(axis: Axes, ledger: Ledger) -> None:
    times = _seconds(ledger)
    axis.plot(times, [one.relayed for one in ledger.samples], color=BLUE, label="packets relayed a second")
    axis.plot(times, [one.resolved for one in ledger.samples], color=GREEN, label="flows resolved a second")
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper left", ncols=2)


def _times(axis: Axes, ledger: Ledger, marks: Sequence[dict[str, Any]]) -> None:
    """How long each thing took, at the moment when it began."""
    for mark in marks:
        held = mark["groups"]["probe"]["held_ns"]
        if held:
            at = ledger.since_start(mark["at_ns"])
            axis.plot([at, at], [held[0] / SECOND_NS, held[-1] / SECOND_NS], color=RED, linewidth=1, alpha=0.6)
            axis.plot([at], [held[len(held) // 2] / SECOND_NS], "o", color=RED, markersize=4)
    joins = [(one.started_ns, one.ready_ns) for one in ledger.joins if one.ready_ns is not None]
    left = [(one.at_ns, one.ended_ns) for one in ledger.leaves if one.ended_ns is not None]
    for spans, colour, shape in ((joins, GREEN, "^"), (left, BLUE, "v"), (ledger.handovers, PURPLE, "s")):
        for from_ns, to_ns in spans:
            axis.plot([ledger.since_start(from_ns)], [(to_ns - from_ns) / SECOND_NS], shape, color=colour, markersize=5)
    kinds = (
        ("o", RED, "failover (median, range)"),
        ("^", GREEN, "join"),
        ("v", BLUE, "leave"),
        ("s", PURPLE, "handover"),
    )
    keys = [Line2D([], [], marker=shape, color=colour, linestyle="", label=name) for shape, colour, name in kinds]
    axis.legend(handles=keys, loc="upper left", ncols=4)
    axis.set_yscale("log")
    axis.set_ylabel("seconds")


def _latency(axis: Axes, ledger: Ledger) -> None:
    """Per second, less what it was in the quiet time."""
    quiet = latency(ledger)
    for what, name, colour in (("p50_ns", "quiet_p50", GREEN), ("p99_ns", "quiet_p99", PURPLE)):
        added = [max(0.0, getattr(one, what) / MS_NS - quiet[name] / 1_000) for one in ledger.samples]
        label = f"added to {name[-3:]} (quiet: {quiet[name] / 1_000:.1f} ms)"
        axis.plot(_seconds(ledger), added, color=colour, label=label)
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("added latency, ms")
    axis.legend(loc="upper left", ncols=2)


def _mark_losses(axis: Axes, ledger: Ledger) -> None:
    """A line through every plot at each loss, and where chaos begins and ends."""
    for loss in ledger.losses:
        axis.axvline(ledger.since_start(loss.at_ns), color=LOSS_COLOURS[loss.how], linewidth=0.8, alpha=0.6)
    for at_ns in (ledger.chaos_ns, ledger.calm_ns):
        axis.axvline(ledger.since_start(at_ns), color="black", linewidth=0.8, linestyle=":")
