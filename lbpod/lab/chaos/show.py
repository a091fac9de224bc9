"""What `holdfast chaos` does: the runs one after the other, then the files, the table and the exit status."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from lbpod.lab.chaos.options import Options
from lbpod.lab.chaos.run import Played, Run
from lbpod.lab.chaos.table import comparison
from lbpod.lab.chaos.verdict import Figures, add_failover, figures
from lbpod.lab.cluster import TITLES
from lbpod.lab.limits import SECOND_NS

EXIT_FINE: Final = 0
EXIT_BROKEN: Final = 1
SAY_EVERY_NS: Final = 5 * SECOND_NS
RUNS: Final = tuple(TITLES)


@dataclass(frozen=True)
class Files:
    """Where things are written. log_dir: where the programs' logs stay, a folder for each run; None: nowhere."""

    json: Path | None
    html: Path | None
    log_dir: Path | None


def show(runs: Sequence[str], options: Options, files: Files, command: str, console: Console) -> int:
    """Plays these runs; returns the exit status, which is that of the first. Raises LabError in one sentence."""
    told: list[tuple[Figures, Played]] = []
    for name in runs:
        console.print(f"[bold]{TITLES[name]}[/bold]")
        told.append(_play(name, options, files, console))
        _write(told, files, command)
    all_figures = [one for one, _ in told]
    console.print(comparison(all_figures))
    for file in (files.json, files.html):
        if file is not None:
            console.print(f"written: {file}", highlight=False)
    for one in all_figures:
        if one.miscounted:
            console.print(f"[bold red]{TITLES[one.run]}: {one.miscounted}[/bold red]", highlight=False)
    return EXIT_BROKEN if all_figures[0].broken or all_figures[0].miscounted else EXIT_FINE


def _play(name: str, options: Options, files: Files, console: Console) -> tuple[Figures, Played]:
    began_ns = time.monotonic_ns()
    last_ns = began_ns - SAY_EVERY_NS

    def say(sentence: str, *, often: bool = False) -> None:
        nonlocal last_ns
        now_ns = time.monotonic_ns()
        if not often or now_ns - last_ns >= SAY_EVERY_NS:
            last_ns = now_ns
            console.print(f"  {(now_ns - began_ns) / SECOND_NS:6.1f} s  {sentence}", highlight=False)

    log_dir = None if files.log_dir is None else files.log_dir / name
    played = Run(name, options, say).play(log_dir)
    result = figures(name, options, played.ledger, played.clients, played.failures)
    result.wrk = played.wrk
    result.machine = {"processors": os.cpu_count() or 0, "load": round(os.getloadavg()[0], 1)}
    result.lb_leaves_overdue = played.overdue_count
    add_failover(result, played.ledger, played.marks)
    return result, played


def _write(told: Sequence[tuple[Figures, Played]], files: Files, command: str) -> None:
    """After each run: a long one that fails later has not been for nothing."""
    if files.json is not None:
        document = told[0][0].as_json()
        document["others"] = {one.run: one.as_json() for one, _ in told[1:]}
        files.json.write_text(json.dumps(document, indent=2) + "\n")
    if files.html is not None:
        from lbpod.lab.chaos.report import page  # wants matplotlib, which not everybody has

        files.html.write_text(page(told, command))
