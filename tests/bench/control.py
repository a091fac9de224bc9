"""`python -m tests.bench.control`: what the control plane costs, beside its targets, as tables, JSON and a report.

Three questions, each to a world of its own or after the one before: how long from an EndpointSlice event until every LB
has committed, and where that time goes; what an agent takes with 100 VIPs; what the operator takes with a thousand
VirtualServices, how soon a restarted one has converged, and whether it keeps up with a hundred changes a second.

    python -m tests.bench.control [--quick] [--lbs COUNT] [--scale-lbs COUNT] [--scale-vips COUNT] [--changes COUNT]
        [--only lbs|scale] [--json FILE] [--report FILE]

Nothing fails for being slow: a bench measures, a test judges. The machine is named with what else it was doing.
"""

import argparse
import asyncio
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from lbpod.core.limits import SLOT_COUNT
from lbpod.lab.errors import LabError
from tests.bench import reports
from tests.bench.control_world import ControlWorld, Slices, cpu_seconds, memory_mb, world
from tests.bench.reports import Figures, Goal
from tests.cluster.apiserver import why_not_here
from tests.cluster.site import until

PAUSE_S: Final = 0.3
"""Between two measured changes, so that each is one of its own."""

STEPS: Final = {
    "api": "the API server: from the call to the watch event (before the clock starts)",
    "observe": "event to decision: kopf, the cache, the 5 ms in which more is gathered, tables and their digests",
    "persist": "the generation is written down: one compare-and-swap of the ConfigMap",
    "stage": "the snapshot to all LBs; each builds the tables that changed",
    "prepare": "slots that differ track, at all LBs",
    "commit": "new flows get the new table, at all LBs",
}
_PHASES: Final = ("persisting", "staging", "preparing", "committing")


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    lbs: int = 10
    changes: int = 100
    backends: int = 20
    vips: int = 100
    watch_s: float = 30.0
    scale_lbs: int = 2
    scale_vips: int = 1_000
    scale_backends: int = 10
    """Of each."""
    scale_at_once: int = 25
    """VirtualServices that are made at a time."""
    churn_s: float = 30.0
    churn_per_s: int = 100
    churn_services: int = 20


QUICK: Final = Size(3, 20, 10, 20, 10.0, 2, 100, 10, churn_s=10.0)


# --- One change -------------------------------------------------------------------------------------------------------
async def one_change(bench: ControlWorld, watch: Slices, backends: Sequence[int]) -> dict[str, float] | None:
    """Milliseconds of each step, and `total` from event to the last LB; None where it became part of another change."""
    bench.operator_tail.read()
    for tail in bench.tails.values():
        tail.read()
    sent = time.time()
    version = bench.patch(0, backends)
    phases: list[tuple[str, float]] = []
    committed: dict[str, float] = {}

    async def done() -> bool:
        phases.extend((one["phase"], one["at"]) for one in bench.operator_tail.read() if one["event"] == "phase")
        for name, tail in bench.tails.items():
            for one in tail.read():
                if one["event"] == "committed":
                    committed[name] = one["at"]
        return len(committed) == len(bench.tails) and bool(phases) and phases[-1][0] == "idle"

    await until("a change to be in force", done, 180)
    if [phase for phase, _ in phases] != [*_PHASES, "idle"] or version not in watch.heard:
        return None
    heard, last = watch.heard[version], max(committed.values())
    marks = [sent, heard, *(at for _, at in phases[:4]), last]
    found = {step: 1_000 * (marks[place + 1] - marks[place]) for place, step in enumerate(STEPS)}
    return {**found, "total": 1_000 * (last - heard)}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p99."""
    return {"p50": round(float(np.percentile(values, 50)), 1), "p99": round(float(np.percentile(values, 99)), 1)}


async def latency(bench: ControlWorld, size: Size) -> Figures:
    """One endpoint more or less of one VIP, again and again."""
    bench.create(0, size.backends)
    await bench.until_calm(120)
    watch = Slices(bench.connection(None), bench.site.shop)
    watch.start()
    found = []
    for number in range(size.changes + 5):
        await asyncio.sleep(PAUSE_S)
        took = await one_change(bench, watch, range(1, size.backends + 2 - number % 2))
        if took is not None and number >= 5:  # the first few warm up
            found.append(took)
    steps = {step: percentiles([one[step] for one in found]) for step in STEPS}
    total = percentiles([one["total"] for one in found])
    return {"endpoint_to_committed_ms": {**total, "steps": steps, "changes": len(found)}}


# --- Agents and operator in steady state ------------------------------------------------------------------------------
async def busy(pids: Mapping[str, int], seconds: float) -> dict[str, float]:
    """Percent of a core that each process takes while nothing happens."""
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    began = time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    return {name: round(100 * (cpu_seconds(pid) - before[name]) / took, 2) for name, pid in pids.items()}


async def watching(bench: ControlWorld, size: Size) -> Figures:
    """What agents take where nothing happens, but that they watch each other."""

    async def is_steady() -> bool:
        return not bench.tracking_count()

    await until("no slot to track", is_steady, 300)
    cpu = list((await busy({name: program.pid for name, program in bench.lbs.items()}, size.watch_s)).values())
    return {"watching": {"agents": len(cpu), "mean": round(sum(cpu) / len(cpu), 2), "most": max(cpu)}}


async def agents(bench: ControlWorld, size: Size, found: Figures) -> None:
    """What an agent takes with so many VIPs."""
    await create_all(bench, range(1, size.vips), size.scale_backends, size.scale_at_once)
    await bench.until_calm(600)
    cpu = await busy({name: program.pid for name, program in bench.lbs.items()}, size.watch_s)
    used = [memory_mb(program.pid) for program in bench.lbs.values()]  # at rest, as it is nearly always
    found["agent_rss_mb"] = max(one["rss"] for one in used)
    found["agent_anon_mb"] = max(one["anon"] for one in used)
    found["agent_cpu_percent"] = max(cpu.values())
    found["agent_vips"], found["agent_lbs"] = size.vips, size.scale_lbs


# --- A thousand VirtualServices ---------------------------------------------------------------------------------------
async def scale(bench: ControlWorld, size: Size, found: Figures) -> None:
    """The operator with all of them: steady, under a hundred changes a second, restarted."""
    began = time.monotonic()
    await create_all(bench, range(size.vips, size.scale_vips + 1), size.scale_backends, size.scale_at_once)
    found["scale"] = {
        "virtual_services": size.scale_vips,
        "backends": size.scale_vips * size.scale_backends,
        "lbs": size.scale_lbs,
        "made_at_once": size.scale_at_once,
        "made_in_s": round(time.monotonic() - began, 1),
    }
    await bench.until_calm(1_800)
    found["operator_cpu_percent"] = (await busy({"operator": bench.operator_pid}, size.watch_s))["operator"]
    found["operator_rss_mb"] = memory_mb(bench.operator_pid)["rss"]
    found |= await restart(bench, size)
    found["churn"] = await churn(bench, size)
    found["operator_rss_after_churn_mb"] = memory_mb(bench.operator_pid)["rss"]
    found["agent_at_scale_mb"] = memory_mb(next(iter(bench.lbs.values())).pid)


async def create_all(bench: ControlWorld, numbers: Sequence[int], backends: int, at_once: int) -> None:
    """VirtualServices of these numbers, some at a time, each lot in force before the next: an LB builds the tables of
    one change in one go, and one that has been silent for LOST_NS meanwhile would be taken for lost."""
    for first in range(0, len(numbers), at_once):
        bench.operator_tail.read()
        for number in numbers[first : first + at_once]:
            bench.create(number, backends)
        await bench.until_calm(300, calm_s=1.0)


async def restart(bench: ControlWorld, size: Size) -> Figures:
    """A new operator process, until it is ready; and what that did to the slots."""
    before = bench.currents()
    await bench.site.stop_operator()
    bench.operator_tail.read()
    began, began_at = time.monotonic(), time.time()
    bench.site.start_operator()

    async def is_ready() -> bool:
        return (await bench.site.http("/readyz"))[0] == 200

    await until("the operator to be ready", is_ready, 300)
    took = time.monotonic() - began
    told = {one["event"] + " " + one.get("phase", ""): one["at"] for one in reversed(bench.operator_tail.read())}
    await bench.until_calm(600)
    after = bench.currents()
    changed = sum(int((before[one] != after[one]).sum()) if one in after else SLOT_COUNT for one in before)
    steps = {what.strip(): round(at - began_at, 2) for what, at in sorted(told.items(), key=lambda one: one[1])}
    return {
        "restart_converged_s": round(took, 2),
        "restart_steps_s": steps,
        "slots_changed_by_restart": changed,
        "slots_compared": SLOT_COUNT * len(before),
    }


async def churn(bench: ControlWorld, size: Size) -> Figures:
    """So many endpoint changes a second, spread over some Services: does it keep up?"""
    bench.operator_tail.read()
    threads, per_thread = 4, size.churn_per_s / 4
    late = [0.0] * threads
    count = int(size.churn_s * per_thread)

    def some(which: int) -> None:
        began = time.monotonic()
        for number in range(count):
            pause = began + number / per_thread - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            place = 1 + (which + threads * number) % size.churn_services
            turn = number * threads // size.churn_services % 2
            bench.patch(place, range(1 + turn, size.scale_backends + 1 + turn))
        late[which] = time.monotonic() - began - count / per_thread

    cpu, began = cpu_seconds(bench.operator_pid), time.monotonic()
    writers = [threading.Thread(target=some, args=(which,)) for which in range(threads)]
    for each in writers:
        each.start()
    for each in writers:
        await asyncio.to_thread(each.join)
    took, ended = time.monotonic() - began, time.time()
    cpu = (cpu_seconds(bench.operator_pid) - cpu) / took
    phases: list[Any] = []

    async def is_over() -> bool:
        phases.extend(one for one in bench.operator_tail.read() if one["event"] == "phase")
        return bool(phases) and phases[-1]["phase"] == "idle" and time.time() - max(phases[-1]["at"], ended) > 1

    await until("the last change to be in force", is_over, 300)
    begun = [one["at"] for one in phases if one["phase"] == "persisting"]
    last = phases[-1]["at"]
    return {
        "changes": threads * count,
        "per_second": round(threads * count / took, 1),
        "generations": len(begun),
        "in_force_after_the_last_s": round(max(last - ended, 0.0), 2),
        "longest_generation_s": round(max(end - start for start, end in itertools.pairwise([*begun, last])), 2),
        "operator_cpu_percent": round(100 * cpu, 1),
        "services": size.churn_services,
    }


# --- Targets and reports ----------------------------------------------------------------------------------------------
def _below(what: str, figure: float | None, bound: float) -> Goal:
    return Goal(
        what, "-" if figure is None else str(figure), f"< {bound:g}", None if figure is None else figure < bound
    )


def goals(found: Figures, size: Size) -> list[Goal]:
    """Every target."""
    took, rate = found.get("endpoint_to_committed_ms", {}), found.get("churn", {})
    changed = found.get("slots_changed_by_restart")
    kept = None
    if rate:
        # What waits at the end is no more than what waits at any time: the change in flight, and the next one.
        kept = rate["per_second"] >= 99 and rate["in_force_after_the_last_s"] <= 2 * rate["longest_generation_s"] + 1
    of = f"{size.scale_vips:,} VirtualServices, {size.scale_vips * size.scale_backends:,} backends"
    return [
        _below(f"endpoint event to all {size.lbs} LBs committed, p50, ms", took.get("p50"), 30),
        _below("  p99, ms", took.get("p99"), 100),
        _below(f"operator, {of}: steady CPU, % of a core", found.get("operator_cpu_percent"), 5),
        _below("  memory, MB", found.get("operator_rss_mb"), 300),
        _below("  restart to converged, s", found.get("restart_converged_s"), 10),
        Goal("  slots changed by the restart", str(changed), "0", None if changed is None else changed == 0),
        Goal("  endpoint changes a second, without falling behind", str(rate.get("per_second")), "100", kept),
        _below(f"agent, {size.vips} VIPs: memory, MB", found.get("agent_rss_mb"), 100),
        _below("  steady CPU, % of a core", found.get("agent_cpu_percent"), 1),
    ]


def report(found: Figures, size: Size, command: str) -> str:
    """All of it as Markdown."""
    lines = reports.head("What control costs", command, found["machine"])
    lines += [
        "",
        "API server, etcd, operator, agents, the bench and whatever else makes that load share these processors.",
    ]
    lines += reports.table_of(goals(found, size))
    whole = Size()
    if size.lbs < whole.lbs or size.scale_vips < whole.scale_vips:
        backends = whole.scale_vips * whole.scale_backends
        asked = f"{whole.lbs} LBs and {whole.scale_vips:,} VirtualServices with {backends:,} backends"
        lines += ["", f"**Smaller than the targets ask for** ({asked}): what is met here is not met there yet."]
    lines += [f"\n{sentence}" for sentence in found["stopped"]]
    lines += ["", "## From an endpoint event to every LB", ""]
    lines += [
        f"One endpoint more or less of a VIP with {size.backends} backends; times are the 50th and 99th percentile, ms."
    ]
    for key, lbs in (("endpoint_to_committed_ms", size.lbs), ("few_lbs_ms", size.scale_lbs)):
        if key in found:
            lines += ["", f"| {lbs} LBs: step | what it is | p50 | p99 |", "| --- | --- | ---: | ---: |"]
            took = found[key]
            lines += [f"| {name} | {STEPS[name]} | {ms['p50']} | {ms['p99']} |" for name, ms in took["steps"].items()]
            lines += [f"| **total** | from the watch event to the last LB's commit | {took['p50']} | {took['p99']} |"]
    for key, title in (
        ("watching", "Agents that do nothing but watch each other: % of a core"),
        ("scale", "At scale"),
        ("churn", "A stream of changes"),
        ("restart_steps_s", "A restarted operator: seconds since its process was started"),
    ):
        lines += ["", f"## {title}", "", *(f"- {what}: {figure}" for what, figure in found.get(key, {}).items())]
    lines += ["", "## Memory, MB", ""]
    lines += [f"- {key}: {found[key]}" for key in _MEMORY if key in found]
    lines += ["", "anon: the process' own; the rest of rss is files and mapped kernel maps."]
    return "\n".join(lines) + "\n"


_MEMORY: Final = (
    "operator_rss_mb",
    "operator_rss_after_churn_mb",
    "agent_vips",
    "agent_lbs",
    "agent_rss_mb",
    "agent_anon_mb",
    "agent_at_scale_mb",
)


async def small(size: Size, folder: Path, found: Figures) -> None:
    """Many LBs, one VIP."""
    async with world(folder / "small", size.lbs) as bench:
        found |= await latency(bench, size)
        found |= await watching(bench, size)


async def large(size: Size, folder: Path, found: Figures) -> None:
    """As many LBs as the machine has room for, a thousand VIPs at each; first one change with these few LBs."""
    async with world(folder / "large", size.scale_lbs) as bench:
        few = await latency(bench, size)
        found["few_lbs_ms"] = few["endpoint_to_committed_ms"]
        await agents(bench, size, found)
        await scale(bench, size, found)


def measure(size: Size, folder: Path, console: Console, only: str | None) -> Figures:
    """Both worlds, or one of them, one after the other; an event loop each, for threads stay in the world that they
    were made in. Where the machine does not bear one, what was found until then stands, and why it ended."""
    found: Figures = {"stopped": [], "lbs": size.lbs}
    both = (("lbs", f"{size.lbs} LBs", small), ("scale", f"{size.scale_vips:,} VIPs, {size.scale_lbs} LBs", large))
    for name, title, work in both:
        if only not in {None, name}:
            continue
        console.print(f"==> {title}", highlight=False)
        try:
            asyncio.run(work(size, folder, found))
        except (AssertionError, LabError, OSError) as error:
            found["stopped"].append(f"{title}: ended early ({str(error).splitlines()[0]}).")
        console.print({key: value for key, value in found.items() if key != "machine"})
    return found


def main(arguments: Sequence[str]) -> int:
    """Exit status 1 where this machine cannot run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.control", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller: a look, not a figure to quote")
    parser.add_argument("--lbs", type=int, metavar="COUNT", help="LBs in the first world: as many as the machine bears")
    parser.add_argument("--scale-lbs", type=int, metavar="COUNT", help="LBs in the second, of a thousand VIPs each")
    parser.add_argument("--scale-vips", type=int, metavar="COUNT", help="VirtualServices there (1000)")
    parser.add_argument("--changes", type=int, metavar="COUNT", help="changes that are measured in each world")
    parser.add_argument("--only", choices=("lbs", "scale"), help="one of the two worlds")
    reports.add_files(parser)
    asked = parser.parse_args(arguments)
    reports.check_files(parser, asked)
    console = Console()
    why_not = "it makes namespaces and loads BPF programs: run it as root" if os.geteuid() != 0 else why_not_here()
    if why_not:
        console.print(why_not)
        return 1
    named = reports.machine()
    size = QUICK if asked.quick else Size()
    chosen = {name: getattr(asked, name) for name in ("lbs", "scale_lbs", "scale_vips", "changes")}
    size = replace(size, **{name: count for name, count in chosen.items() if count})
    with tempfile.TemporaryDirectory(prefix="holdfast-control-") as folder:
        found = measure(size, Path(folder), console, asked.only)
    found["machine"] = named
    for one in goals(found, size):
        console.print(f"{one.verdict:12}  {one.what}: {one.figure} ({one.target})", highlight=False)
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")
    if asked.report is not None:
        asked.report.write_text(report(found, size, reports.command_of("bench-control", arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
