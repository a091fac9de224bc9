"""What the lookup table costs and how good it is, beside the two tables that everybody compares with.

Three ways to fill 65,536 slots: ours (bounded rendezvous, slack 0.05 and 0.10), plain rendezvous (the same scores, no
bound), and Maglev (NSDI 2016, section 3.4), written down here only to be compared with. Two figures of quality: balance
(fullest backend / fair share) and disruption (slots moved / least possible, when one backend goes), means over a few
seeds and removals; and two times, which mean something only beside each other and on the machine that is named.

Run it: ``python -m tests.bench.bench_table [--json FILE]``. ``run()`` gives the same as a dictionary.
"""

import hashlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table as RichTable

from lbpod.core.hashing import MAPPED_PREFIX, SLOT_WORDS, identity_words, pair_costs
from lbpod.core.limits import SLOT_COUNT
from lbpod.core.table import Builder, Slack, TableBackend, build

SIZES: Final = (10, 100, 1000)
SEEDS: Final = (0, 1, 2, 3)
MAGLEV_SLOTS: Final = 65_537

Ids = npt.NDArray[np.uint32]
Maker = Callable[[Sequence[TableBackend], int], Ids]


def backends_of(count: int, weight: int = 1) -> list[TableBackend]:
    """Make ``count`` backends at neighbouring addresses, ids from 1."""
    return [
        TableBackend(n + 1, MAPPED_PREFIX + (0x0A000000 + n).to_bytes(4, "big"), 8080, weight) for n in range(count)
    ]


def bounded(slack: Slack) -> Maker:
    """Our table."""
    return lambda backends, seed: build(backends, seed, slack).current


def plain_rendezvous(backends: Sequence[TableBackend], seed: int) -> Ids:
    """Every slot to the backend that scores it highest. Equal weights only."""
    words = np.array([identity_words(b.identity, seed, b"hf-table") for b in backends], dtype=np.uint32)
    step = max(1, 131_072 // len(backends))
    best = [pair_costs(SLOT_WORDS[at : at + step], words).argmin(axis=1) for at in range(0, SLOT_COUNT, step)]
    ids: Ids = np.array([b.id for b in backends], dtype=np.uint32)[np.concatenate(best)]
    return ids


def maglev(backends: Sequence[TableBackend], seed: int) -> Ids:
    """Backends take turns; each takes the next free entry of its own permutation. Equal weights only."""
    starts, skips = [], []
    for backend in backends:
        digest = hashlib.blake2b(backend.identity, digest_size=16, key=seed.to_bytes(4, "little")).digest()
        starts.append(int.from_bytes(digest[:8], "little") % MAGLEV_SLOTS)
        skips.append(int.from_bytes(digest[8:], "little") % (MAGLEV_SLOTS - 1) + 1)
    entries = [0] * MAGLEV_SLOTS
    filled = 0
    while True:
        for n, backend in enumerate(backends):
            at = starts[n]
            while entries[at]:
                at = (at + skips[n]) % MAGLEV_SLOTS
            entries[at] = backend.id
            starts[n] = (at + skips[n]) % MAGLEV_SLOTS
            filled += 1
            if filled == MAGLEV_SLOTS:
                return np.array(entries, dtype=np.uint32)


def balance(current: Ids, backends_count: int) -> float:
    """Fullest backend / fair share."""
    return float(np.bincount(current).max()) * backends_count / len(current)


def disruption(before: Ids, after: Ids, gone: int) -> float:
    """Slots that moved / slots that had to, when the backend with the id ``gone`` went."""
    return float((before != after).sum()) / float((before == gone).sum())


def removals(count: int) -> tuple[int, ...]:
    """Positions of the backends that are taken out, one at a time."""
    return (0, count // 3, count // 2, count - 1)


def quality(make: Maker, count: int, seeds: Sequence[int] = SEEDS) -> tuple[float, float]:
    """Mean balance over the seeds, and mean disruption over the seeds and removals."""
    backends = backends_of(count)
    balances, disruptions = [], []
    for seed in seeds:
        before = make(backends, seed)
        balances.append(balance(before, count))
        for position in removals(count):
            after = make(backends[:position] + backends[position + 1 :], seed)
            disruptions.append(disruption(before, after, backends[position].id))
    return statistics.mean(balances), statistics.mean(disruptions)


def times_ms(count: int, rounds: int = 5) -> tuple[float, float]:
    """Median time of a full build, and of one backend less or more, in milliseconds."""
    backends = backends_of(count)
    fewer = backends[: count // 2] + backends[count // 2 + 1 :]
    full, change = [], []
    for seed in range(rounds):
        builder = Builder(seed)
        full.append(_clock(lambda b=builder: b.update(backends)))  # type: ignore[misc]  # b is bound on purpose
        change.append(_clock(lambda b=builder: b.update(fewer)))  # type: ignore[misc]
        change.append(_clock(lambda b=builder: b.update(backends)))  # type: ignore[misc]
    return statistics.median(full), statistics.median(change)


def _clock(action: Callable[[], object]) -> float:
    start_ns = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - start_ns) / 1e6


def run(sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Measure everything: {build_ms, change_ms: {N: ms}, balance, disruption: {table: {N: figure}}, machine}."""
    makers: dict[str, tuple[Maker, Sequence[int]]] = {
        "maglev": (maglev, SEEDS[:1]),  # pure Python: one seed is enough to see it
        "plain": (plain_rendezvous, SEEDS),
        "bounded_0.05": (bounded(Slack(1, 20)), SEEDS),
        "bounded_0.10": (bounded(Slack(1, 10)), SEEDS),
    }
    figures = {name: {str(n): quality(make, n, seeds) for n in sizes} for name, (make, seeds) in sorted(makers.items())}
    durations = {str(n): times_ms(n) for n in sizes}
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "build_ms": {n: round(full, 1) for n, (full, _) in durations.items()},
        "change_ms": {n: round(change, 1) for n, (_, change) in durations.items()},
        "balance": {name: {n: round(f[0], 3) for n, f in row.items()} for name, row in figures.items()},
        "disruption": {name: {n: round(f[1], 3) for n, f in row.items()} for name, row in figures.items()},
    }


def show(figures: dict[str, Any], console: Console) -> None:
    """Print the figures for people."""
    sizes = list(figures["build_ms"])
    table = RichTable(title="Lookup table: balance and disruption, when one backend goes")
    table.add_column("table")
    for n in sizes:
        table.add_column(f"N = {n}", justify="right")
    for name, row in figures["balance"].items():
        table.add_row(name, *(f"{row[n]:.2f} and {figures['disruption'][name][n]:.2f}" for n in sizes))
    table.add_section()
    table.add_row("full build, ms", *(f"{figures['build_ms'][n]:.0f}" for n in sizes))
    table.add_row("one more or less, ms", *(f"{figures['change_ms'][n]:.0f}" for n in sizes))
    console.print(table)
    console.print(" ".join(f"{key} {value}" for key, value in figures["machine"].items()))


def main(arguments: Sequence[str]) -> int:
    """Run, print, and write JSON where asked."""
    if arguments and (len(arguments) != 2 or arguments[0] != "--json"):
        print("usage: python -m tests.bench.bench_table [--json FILE]", file=sys.stderr)
        return 2
    figures = run()
    show(figures, Console())
    if arguments:
        Path(arguments[1]).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
