"""What a commit costs: 65,536 changed slots into the kernel's maps, and what stands around that write.

``commit_us`` is the write alone (the applier's WriteSlots on mapped arrays), the moment during which packets see some
slots old and some new. Beside it the whole of prepare and of commit at one LB: the Keeper's step and all of its
effects, the snapshot on disk included, for a VIP whose backends are all replaced, so that every slot changes. Tables
are built when the snapshot is staged, before either.

Run it: ``python -m tests.bench.bench_commit``. ``run()`` gives the same as a dictionary. Root only.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from lbpod.agent.remembered import Memory
from lbpod.core.keeper import Keeper
from lbpod.core.layout import SLOT_BASE_SHIFT, SLOT_TRACKING
from lbpod.core.limits import SLOT_COUNT
from lbpod.core.messages import (
    Called,
    CommitCall,
    CreateVip,
    KeeperEffect,
    PrepareCall,
    Refuse,
    Remember,
    Reply,
    Trace,
    WriteSlots,
)
from lbpod.core.model import Snapshot
from lbpod.core.snapshot import digest_of
from lbpod.datapath.apply import Applier
from lbpod.datapath.kernel import KernelDatapath
from lbpod.datapath.memory import MemoryHops
from tests.agents import UPLINK, follow
from tests.bench.bench_resolve import kernel_maps, replaced

WRITES: Final = 200
CHANGES: Final = 9


def _timed(work: Callable[[], object]) -> float:
    """Microseconds."""
    began_ns = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - began_ns) / 1_000


def _writes(maps: KernelDatapath, rounds: int) -> list[float]:
    """Each round writes other words to all slots."""
    applier = Applier(maps, "n1", UPLINK, MemoryHops())
    applier.apply(CreateVip(2))
    slots = np.arange(SLOT_COUNT, dtype=np.uint32)
    found = []
    for number in range(1, rounds + 1):
        words = np.full(SLOT_COUNT, number | SLOT_TRACKING | (number + 1) << SLOT_BASE_SHIFT, np.uint64)
        effect = WriteSlots(2, slots, words)
        found.append(_timed(lambda effect=effect: applier.apply(effect)))  # type: ignore[misc]
    assert (maps.read_slots(2) == words).all(), "the last words are in the map"
    return found


class _Lb:
    """A Keeper with its hands, and no sockets."""

    def __init__(self, maps: KernelDatapath, folder: Path) -> None:
        self._keeper = Keeper("n1")
        self._applier = Applier(maps, "n1", UPLINK, MemoryHops())
        self._memory = Memory(folder)

    def call(self, body: Snapshot | PrepareCall | CommitCall) -> float:
        """Microseconds of the Keeper's step and all that it wants done."""
        return _timed(lambda: self._carry_out(self._keeper.step(Called(1, body), time.monotonic_ns())))

    def _carry_out(self, effects: list[KeeperEffect]) -> None:
        assert any(isinstance(effect, Reply) for effect in effects), "nothing here is refused"
        for effect in effects:
            match effect:
                case Remember():
                    self._memory.keep(effect)
                case Reply() | Trace() | Refuse():
                    pass
                case _:
                    self._applier.apply(effect)  # type: ignore[arg-type]


def _changes(maps: KernelDatapath, folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Prepare and commit of generations that replace every backend."""
    lb, snapshot = _Lb(maps, folder), None
    prepares, commits = [], []
    for generation in range(1, rounds + 2):
        snapshot = follow(replaced({}, 1 + generation % 2), snapshot)
        digest = digest_of(snapshot)
        lb.call(snapshot)
        prepare = lb.call(PrepareCall(generation, digest))
        commit = lb.call(CommitCall(generation, digest))
        if generation > 1:
            prepares.append(prepare)
            commits.append(commit)
    return prepares, commits


def run(writes: int = WRITES, changes: int = CHANGES) -> dict[str, Any]:
    """commit_us (median of the write), and the whole of prepare and commit."""
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as folder, kernel_maps("commit") as maps:
        prepares, commits = _changes(maps, Path(folder), changes)
        written = _writes(maps, writes)
    return {
        "commit_us": round(statistics.median(written), 1),
        "commit": {
            "slots": SLOT_COUNT,
            "write_min_us": round(min(written), 1),
            "write_max_us": round(max(written), 1),
            "prepare_whole_us": round(statistics.median(prepares), 1),
            "commit_whole_us": round(statistics.median(commits), 1),
        },
    }


if __name__ == "__main__":
    print(run())
