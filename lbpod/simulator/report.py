"""What people see: the transcript of one seed, or how many have gone well, and last the command that replays a failure.

Many seeds are played by as many processes as there are cores, each seed by itself, so a seed comes out the same alone
and among others.
"""

import gc
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lbpod.simulator import scale
from lbpod.simulator.run import Result, run

COUNTED: Final = ("changes", "generations", "flows", "packets", "seconds")
FOUND_SHOWN_MAX: Final = 20
"""Failures that are shown as they come; of the others only the seeds."""


def command(seed: int, slots: int) -> str:
    """What replays a seed."""
    option = "" if slots == scale.SLOT_COUNT_DEFAULT else f" --slots {slots}"
    return f"{sys.executable} -m lbpod.simulator {seed}{option}"


def tell(seed: int, slots: int) -> int:
    """One seed, with its transcript."""
    console = Console(soft_wrap=True, highlight=False)
    result = run(seed, keeps=True)
    for line in result.lines:
        console.print(line, markup=False)
    if result.detail:
        console.print(result.detail, markup=False)
    console.print(f"seed {seed}: {result.found or 'every promise was kept'}", markup=False)
    console.print(_sum([result]))
    console.print(command(seed, slots), markup=False)
    return 1 if result.found else 0


def play(seeds: Sequence[int], jobs: int, slots: int) -> int:
    """Many seeds."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    begun_s = time.monotonic()
    results = list(_watched(console, _results(seeds, jobs), len(seeds), slots))
    passed_s = time.monotonic() - begun_s
    found = sorted(result.seed for result in results if result.found)
    if found:
        console.print("failing seeds: " + " ".join(map(str, found)))
    rate = f"{len(results) / passed_s:.2f} seeds a second, {jobs} processes"
    console.print(f"{len(results)} seeds, {len(found)} failing, in {passed_s:.0f} s ({rate}): {_sum(results)}")
    excusing = sum(any(name not in COUNTED for name in result.counts) for result in results)
    console.print(f"{excusing} seeds ({excusing / len(results):.1%}) excuse something")
    return 1 if found else 0


def _results(seeds: Sequence[int], jobs: int) -> Iterator[Result]:
    if jobs == 1:
        _collect_seldom()
        yield from map(run, seeds)
        return
    # Forked: the bounds of this process are those of its children.
    with multiprocessing.get_context("fork").Pool(jobs, _collect_seldom) as pool:
        yield from pool.imap_unordered(run, seeds)


def _collect_seldom() -> None:
    """What a process has imported stays; and of what a run makes, little is garbage that refers to itself."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _watched(console: Console, results: Iterator[Result], count: int, slots: int) -> Iterator[Result]:
    columns = (
        TextColumn("seeds"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failing]}"),
    )
    failing = 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("seeds", total=count, failing="")
        for result in results:
            failing += bool(result.found)
            if result.found and failing <= FOUND_SHOWN_MAX:
                progress.console.print(f"seed {result.seed}: {result.found}", markup=False)
                progress.console.print(f"  {command(result.seed, slots)}", markup=False)
            progress.update(task, advance=1, failing=f"{failing} failing" if failing else "")
            yield result


def _sum(results: Iterable[Result]) -> str:
    counts: Counter[str] = Counter()
    for result in results:
        counts.update(result.counts)
    said = [f"{counts[name]:,} {name}" for name in COUNTED]
    said += [f"{count:,} excused ({name})" for name, count in sorted(counts.items()) if name not in COUNTED]
    return ", ".join(said)
