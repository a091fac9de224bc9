"""`python -m tests.bench`: every bench in turn, the figures beside their targets, as tables, JSON and a report.

Ratios are quoted from one run on one machine, which is named with its kernel and its compiler; a figure without a
machine is a rumour. Nothing here fails for being slow: a bench measures, a test judges. A bench that this machine
cannot run (no root, no BPF) is named with the reason and left out.

    python -m tests.bench [--quick] [--json FILE] [--report FILE] [--only NAMES]

NAMES: fastpath,resolve,commit,handover,settle,start,table, or some of them.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rich.console import Console
from rich.table import Table

from tests.bench import (
    bench_commit,
    bench_handover,
    bench_resolve,
    bench_settle,
    bench_start,
    bench_table,
    fastpath,
    reports,
)
from tests.bench.reports import Figures, Goal


@dataclass(frozen=True)
class Bench:
    """One bench: how it is run whole and quickly, and what it measures."""

    name: str
    what: str
    run: Callable[[], Figures]
    quick: Callable[[], Figures]


BENCHES: Final = (
    Bench("fastpath", "what a packet costs", fastpath.run, lambda: fastpath.run(rounds=3)),
    Bench("resolve", "flows that one agent asks another about", bench_resolve.run, lambda: bench_resolve.run(3)),
    Bench("commit", "a changed table into the maps", bench_commit.run, lambda: bench_commit.run(50, 3)),
    Bench(
        "handover",
        "records that one agent hands over to another that joins",
        lambda: bench_handover.run(1_000_000),
        lambda: bench_handover.run(200_000, 1),
    ),
    Bench(
        "settle",
        "how long slots track after a change, under short flows",
        bench_settle.run,
        lambda: bench_settle.run(2),
    ),
    Bench("start", "an agent that was killed is ready again", bench_start.run, lambda: bench_start.run(3)),
    Bench("table", "the lookup table", bench_table.run, lambda: bench_table.run((10, 100))),
)


# --- Goals ------------------------------------------------------------------------------------------------------------
def goals(figures: Mapping[str, Figures]) -> list[Goal]:
    """Every target beside its figure."""
    found = _packet_goals(figures["fastpath"]["ns_above_null"], figures["fastpath"]) if "fastpath" in figures else []
    if "resolve" in figures:
        rate = figures["resolve"]["resolve_flows_per_s"]
        found.append(Goal("agent pair, flows resolved a second", f"{rate:,}", ">= 200,000", rate >= 200_000))
    if "commit" in figures:
        took_us = figures["commit"]["commit_us"]
        found.append(Goal("commit of 65,536 slots, us", f"{took_us:,}", "< 1,000", took_us < 1_000))
    if "handover" in figures:
        rate, join = figures["handover"]["handover_records_per_s"], figures["handover"]["join_s"]
        count = figures["handover"]["handover"]["records"]
        found.append(Goal("agent pair, records handed over a second", f"{rate:,}", ">= 300,000", rate >= 300_000))
        found.append(Goal(f"an LB joins with {count:,} records in its slots, s", f"{join:,}", "< 3", join < 3))
    if "settle" in figures:
        took = figures["settle"]["tracking_s"]
        found.append(Goal("a slot tracks after a change, short flows, median s", f"{took:,}", "< 5", took < 5))
    if "table" in figures and "1000" in figures["table"]["build_ms"]:
        build, change = (figures["table"][key]["1000"] for key in ("build_ms", "change_ms"))
        found.append(Goal("table of 1,000 backends, ms", f"{build:,}", "<= 1,000", build <= 1_000))
        found.append(Goal("one backend more or less of 1,000, ms", f"{change:,}", "<= 50", change <= 50))
    return found


def _packet_goals(ns: Mapping[str, float], whole: Figures) -> list[Goal]:
    steady, fixed = ns["steady_1"], ns["fixed_encap"]

    def at_most(what: str, figure: float, bound: float, unit: str) -> Goal:
        return Goal(what, f"{figure:.{2 if unit == 'x' else 1}f} {unit}", f"<= {bound:g} {unit}", figure <= bound)

    found = [
        at_most("steady path, above an empty program", steady, 45, "ns"),
        at_most("steady path / parse and fixed encapsulation", steady / fixed, 1.7, "x"),
        at_most("steady, 10,000,000 flows / 1 flow", ns["steady_10m"] / steady, 1.1, "x"),
        at_most("SYN flood / steady", ns["syn_flood"] / steady, 1.1, "x"),
        at_most("  with as many flows", ns["syn_flood"] / ns["steady_10m"], 1.1, "x"),
        at_most("1 % of the slots tracking / steady", ns["one_percent_tracking"] / steady, 1.1, "x"),
        at_most("  with as many flows", ns["one_percent_tracking"] / ns["steady_131k"], 1.1, "x"),
        at_most("the node's other traffic", ns["other_traffic"], 10, "ns"),
        at_most("tracking, cache hit", ns["tracking_hit"], 120, "ns"),
    ]
    held = whole["bytes_per_steady_flow"]
    if held is not None:
        found.append(Goal("memory per established flow, steady", f"{held:g} bytes", "0 bytes", held == 0))
    flood = whole["syn_flood_maps"]
    if flood:
        grew = [name for name, count in flood["entries_after"].items() if count != flood["entries_before"][name]]
        found.append(Goal(f"maps that grew by {flood['flows']:,} SYNs", ", ".join(grew) or "none", "none", not grew))
    return found


# --- What is named and written ---------------------------------------------------------------------------------------
def as_json(figures: Mapping[str, Figures], named: Figures) -> Figures:
    """The keys that people compare (do not rename), and beside them whatever else was measured."""
    written: Figures = {"machine": named}
    for name, found in figures.items():
        written |= {"table": found} if name == "table" else {k: v for k, v in found.items() if k != "machine"}
    if "ns_above_null" in written:
        written["per_steady_1"] = {
            name: round(took / written["ns_above_null"]["steady_1"], 2)
            for name, took in written["ns_above_null"].items()
        }
    return written


def show(figures: Mapping[str, Figures], named: Figures, console: Console) -> None:
    """Tables for people."""
    if "fastpath" in figures:
        fastpath.show(figures["fastpath"], console)
    if "table" in figures:
        bench_table.show(figures["table"], console)
    table = Table(title="Targets")
    for column in ("figure", "measured", "target", ""):
        table.add_column(column, justify="right" if column == "measured" else "left")
    for goal in goals(figures):
        table.add_row(goal.what, goal.figure, goal.target, goal.verdict)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in named.items()), highlight=False)


def report(figures: Mapping[str, Figures], named: Figures, command: str) -> str:
    """The same as Markdown."""
    lines = [*reports.head("What it costs", command, named), *reports.table_of(goals(figures))]
    if "fastpath" in figures:
        lines += ["", "## One packet", "", "| path | ns above an empty program | / steady_1 |", "| --- | ---: | ---: |"]
        ns = figures["fastpath"]["ns_above_null"]
        lines += [f"| {name} | {took:.1f} | {took / ns['steady_1']:.2f} |" for name, took in ns.items()]
        per_vip = sum(figures["fastpath"]["bytes_per_vip"].values())
        held = figures["fastpath"]["bytes_per_steady_flow"]
        lines += ["", f"A VIP takes {per_vip:,} bytes, a flow in steady state {held:g}."]
    if "table" in figures:
        lines += ["", "## The lookup table: balance and disruption", "", *_table_lines(figures["table"])]
    for name in ("resolve", "commit", "handover", "settle", "start"):
        if name in figures:
            lines += ["", f"## {name.capitalize()}", ""]
            lines += [f"- {key}: {value}" for key, value in figures[name][name].items()]
    return "\n".join(lines) + "\n"


def _table_lines(table: Figures) -> list[str]:
    sizes = list(table["build_ms"])
    lines = ["| table | " + " | ".join(f"N = {n}" for n in sizes) + " |", "| --- |" + " ---: |" * len(sizes)]
    for name, row in table["balance"].items():
        lines.append(
            f"| {name} | " + " | ".join(f"{row[n]:.2f} and {table['disruption'][name][n]:.2f}" for n in sizes) + " |"
        )
    for key, said in (("build_ms", "full build, ms"), ("change_ms", "one more or less, ms")):
        lines.append(f"| {said} | " + " | ".join(f"{table[key][n]:.0f}" for n in sizes) + " |")
    return lines


def main(arguments: Sequence[str]) -> int:
    """Run, print, write. Exit status 1 where nothing could be measured, 2 for options that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a look, not a figure to quote")
    reports.add_files(parser)
    parser.add_argument("--only", default="", metavar="NAMES", help=",".join(bench.name for bench in BENCHES))
    asked = parser.parse_args(arguments)
    wanted = set(filter(None, asked.only.split(",")))
    if unknown := sorted(wanted - {bench.name for bench in BENCHES}):
        parser.error(f"there is no bench {unknown[0]!r}")
    reports.check_files(parser, asked)
    console = Console()
    if os.geteuid() != 0 and wanted != {"table"}:
        console.print("the benches load BPF programs: run them as root (--only table does without)")
        return 1
    figures: dict[str, Figures] = {}
    for bench in BENCHES:
        if wanted and bench.name not in wanted:
            continue
        console.print(f"==> {bench.name}: {bench.what}", highlight=False)
        began = time.monotonic()
        figures[bench.name] = bench.quick() if asked.quick else bench.run()
        console.print(f"    {time.monotonic() - began:.0f} s", highlight=False)
    named = reports.machine()
    show(figures, named, console)
    if asked.json is not None:
        asked.json.write_text(json.dumps(as_json(figures, named), indent=2) + "\n")
    if asked.report is not None:
        asked.report.write_text(report(figures, named, reports.command_of("bench", arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
