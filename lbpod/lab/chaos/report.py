"""The report: one HTML file that needs nothing else, for somebody who was not there.

First the verdict and the command that repeats the run, then all figures (runs side by side), then the plots of each
run, and last what one needs in order to find out: every broken connection, every program that ended by itself, all
events.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, Final

from lbpod.lab.chaos.ledger import Kind, Ledger
from lbpod.lab.chaos.plots import svg
from lbpod.lab.chaos.run import Played
from lbpod.lab.chaos.table import rows
from lbpod.lab.chaos.verdict import Figures
from lbpod.lab.cluster import TITLES

BROKEN_SHOWN_MAX: Final = 200
EVENTS_SHOWN_MAX: Final = 20_000

_PAGE: Final = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem }}
body {{ color: #1c2126; background: #fff }}
h1 {{ font-size: 1.5rem }} h2 {{ margin-top: 2.5rem }}
.verdict {{ padding: .8rem 1rem; border-radius: .4rem; color: #fff; font-weight: 600 }}
.good {{ background: #27864a }} .bad {{ background: #c0392b }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .8rem; border-bottom: 1px solid #d8dce1; text-align: right; vertical-align: top }}
th:first-child, td:first-child {{ text-align: left }}
tr.broken td {{ font-weight: 700 }}
svg {{ width: 100%; height: auto }}
pre {{ background: #f4f5f7; padding: .6rem; overflow-x: auto; white-space: pre-wrap; font-size: 12px }}
code {{ background: #f4f5f7; padding: .1rem .3rem }}
</style></head><body>
{body}
</body></html>
"""


def page(runs: Sequence[tuple[Figures, Played]], command: str) -> str:
    """The whole file. command: what repeats the run."""
    first = runs[0][0]
    title = f"Holdfast, {first.minutes:g} minutes of chaos"
    parts = [
        f"<h1>{_text(title)}</h1>",
        _verdict(first),
        f"<p>Again: <code>{_text(command)}</code></p>",
        _table([figures for figures, _ in runs]),
    ]
    for figures, played in runs:
        parts.append(f"<h2>{_text(TITLES[figures.run])}</h2>")
        parts.append(svg(played.ledger, played.marks))
        parts.extend(_details(played))
    return _PAGE.format(title=_text(title), body="\n".join(parts))


def _text(value: object) -> str:
    return html.escape(str(value))


def _verdict(first: Figures) -> str:
    name = TITLES[first.run]
    good = first.broken == 0 and not first.miscounted
    told = f"{first.broken:,} of {first.connections:,} connections broke although their backend lived"
    told = f"{told}; {first.miscounted}" if first.miscounted else told
    apart = (
        f"Counted apart: {first.broken_backend_gone:,} whose backend had gone, {first.broken_unattributed:,} of which "
        f"nobody can tell, and {first.broken_two_replicas_lost:,} excused in {first.two_replica_windows:,} windows "
        f"({first.two_replica_window_seconds:,.0f} s) after two replicas were lost at once. At the stop "
        f"{first.unanswered_at_stop:,} had waited for an answer for 2 s."
    )
    verdict = f'<p class="verdict {"good" if good else "bad"}">{_text(name)}: {_text(told)}.</p>'
    return f"{verdict}\n<p>{_text(apart)}</p>"


def _table(runs: Sequence[Figures]) -> str:
    head = "".join(f"<th>{_text(TITLES[one.run])}</th>" for one in runs)
    lines = [f"<table><tr><th></th>{head}</tr>"]
    for name, values in rows(runs):
        cells = "".join(f"<td>{_text(value)}</td>" for value in values)
        kind = ' class="broken"' if name.startswith("BROKEN") else ""
        lines.append(f"<tr{kind}><td>{_text(name)}</td>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _details(played: Played) -> list[str]:
    broken = [one for one in played.failures if one["verdict"] != "broken_backend_gone"]
    ends = [one for one in played.ledger.events if one.kind in (Kind.AGENT_END, Kind.CONTROLLER_END)]
    parts = []
    if broken:
        lines = [_broken_line(played.ledger, one) for one in broken[:BROKEN_SHOWN_MAX]]
        more = f" (the first {BROKEN_SHOWN_MAX})" if len(broken) > BROKEN_SHOWN_MAX else ""
        parts.append(
            _fold(f"{len(broken):,} connections broke whose backend was not known to have gone before{more}", lines)
        )
    if ends:
        lines = [f"{played.ledger.since_start(one.at_ns):9.3f} s  {one.kind}: {one.what}" for one in ends]
        parts.append(_fold(f"{len(ends)} programs ended by themselves", lines))
    events = played.ledger.events
    lines = [f"{played.ledger.since_start(one.at_ns):9.3f} s  {one.kind}: {one.what}" for one in events]
    parts.append(_fold(f"{len(events):,} events", lines[:EVENTS_SHOWN_MAX]))
    return parts


def _broken_line(ledger: Ledger, failure: dict[str, Any]) -> str:
    return (
        f"{ledger.since_start(failure['at_ns']):9.3f} s  {failure['verdict']}, {failure['reason']}, "
        f"backend {failure['backend']}, port {failure['local_port']}, open for {failure['age_ns'] / 1e9:.3f} s, "
        f"{failure['answers']} answers: {failure['detail']}"
    )


def _fold(summary: str, lines: Sequence[str]) -> str:
    return f"<details><summary>{_text(summary)}</summary><pre>{_text(chr(10).join(lines))}</pre></details>"
