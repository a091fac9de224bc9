"""What a packet costs: every path through hf_xdp, in nanoseconds above an empty program.

BPF_PROG_TEST_RUN with repeat does not restore the packet, so a driver program makes a fresh one for each run and
tail-calls the program under test; what the driver costs with an empty program is subtracted (``null_10m`` shows that
this is the same for many flows as for one: what many flows cost more is the path's own). Scenarios take turns
many times over, each after a warm-up of its own (another scenario has just used the caches), and the best turn counts:
on a shared machine everything that disturbs makes it slower, never faster. Time is the thread's own, so that a turn in
which somebody else had the processor is no loss. Each turn also checks under which verdict its packets were counted: a
figure for the wrong path would look fine.

Dropped: the kernel's own `duration` (whole nanoseconds, and wall-clock time); one long run per scenario (a neighbour's
minute would be in one figure and not in the next).

Run it: ``python -m tests.bench.fastpath [--json FILE] [--rounds N]``. ``run()`` gives the same as a dictionary.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from lbpod.core.limits import SLOT_COUNT
from lbpod.core.verdicts import Verdict
from lbpod.datapath import libbpf, loader
from lbpod.datapath.kernel import KernelDatapath
from lbpod.datapath.libbpf import BpfObject
from lbpod.datapath.loader import FastPath, LoadSettings
from lbpod.datapath.mapped import MappedArray
from lbpod.datapath.pins import PinFolder
from lbpod.datapath.port import FlowMap, NatMap
from tests.bench import reports
from tests.bench.fastpath_world import (
    FRAME_BYTES,
    KNOWN_FLOWS_COUNT,
    SELF_OWNER,
    STATE,
    TCP_SYN,
    Scenario,
    Service,
    build,
    write_config,
)
from tests.bpf.datapaths import whole_nat

HERE: Final = Path(__file__).parent
MANY_FLOWS_COUNT: Final = 10_000_000
REPEAT: Final = 150_000
"""Packets in a turn: more than there are slots, so that a turn over many flows meets nearly every one."""
ROUNDS: Final = 20
assert REPEAT > 2 * SLOT_COUNT

SCENARIOS: Final = (
    Scenario("null", program="null"),
    Scenario("null_10m", program="null", flows=MANY_FLOWS_COUNT),
    Scenario("one_call", program="one_call"),
    Scenario("parse_only", program="parse_only"),
    Scenario("fixed_encap", program="fixed_encap"),
    Scenario("steady_1", verdicts=("STEADY",)),
    Scenario("steady_1k", flows=1_000, verdicts=("STEADY",)),
    Scenario("steady_131k", flows=131_072, verdicts=("STEADY",)),
    Scenario("steady_1m", flows=1_000_000, verdicts=("STEADY",)),
    Scenario("steady_10m", flows=MANY_FLOWS_COUNT, verdicts=("STEADY",)),
    Scenario("syn_steady", tcp_flags=TCP_SYN, flows=1_000, verdicts=("STEADY",)),
    Scenario("syn_flood", tcp_flags=TCP_SYN, flows=MANY_FLOWS_COUNT, verdicts=("STEADY",)),
    Scenario(
        "one_percent_tracking",
        port=Service.ONE_PERCENT.port,
        flows=KNOWN_FLOWS_COUNT,
        verdicts=("STEADY", "CACHE_HIT"),
    ),
    Scenario("other_traffic", address="10.0.0.1", port=22, flows=1_000, verdicts=("PASS_OTHER",)),
    Scenario("other_icmp", address="10.0.0.1", protocol=1, verdicts=("PASS_OTHER",)),
    Scenario("other_arp", ethertype=0x0806, verdicts=("PASS_OTHER",)),
    Scenario("tracking_hit", port=Service.CACHED.port, flows=1_000, verdicts=("CACHE_HIT",)),
    Scenario("tracking_hit_131k", port=Service.CACHED.port, flows=KNOWN_FLOWS_COUNT, verdicts=("CACHE_HIT",)),
    Scenario("relay", port=Service.UNKNOWN.port, flows=1_000, verdicts=("RELAYED",)),
    Scenario("relay_syn", port=Service.UNKNOWN.port, tcp_flags=TCP_SYN, flows=1_000, verdicts=("RELAYED",)),
    Scenario("relay_10m", port=Service.UNKNOWN.port, flows=MANY_FLOWS_COUNT, verdicts=("RELAYED",)),
    Scenario("owner_record", port=Service.RECORDED.port, flows=1_000, self_member=SELF_OWNER, verdicts=("RECORD_HIT",)),
    Scenario(
        "syn_tracking",
        port=Service.FRESH.port,
        tcp_flags=TCP_SYN,
        flows=MANY_FLOWS_COUNT,
        self_member=SELF_OWNER,
        verdicts=("CHAIN_STARTED",),
    ),
)

GROWING: Final = ("syn_flood", "steady_10m")
"""Scenarios whose every flow is sent once while the maps are watched: new flows, and established ones."""

TARGETS: Final[Mapping[str, str]] = {
    "steady_1": "<= 45 and <= 1.7 x fixed_encap",
    "steady_10m": "<= 1.1 x steady_1",
    "syn_flood": "<= 1.1 x steady_1, no map grows",
    "one_percent_tracking": "<= 1.1 x steady",
    "other_traffic": "<= 10",
    "tracking_hit": "<= 120",
}


@dataclass(frozen=True, slots=True)
class _Bench:
    """Loaded programs and their maps."""

    port: KernelDatapath
    driver: int
    under_test: int
    """The program array of one entry."""
    state: MappedArray
    programs: Mapping[str, int]

    def turn(self, scenario: Scenario, at: int, repeat: int) -> float:
        """Run ``repeat`` packets from flow ``at`` on; mean ns of one, driver included."""
        write_config(self.port, scenario.self_member)
        row = self.state.values[0]
        row["index"], row["flows"], row["frame_bytes"] = at, scenario.flows, FRAME_BYTES
        row["words"] = scenario.words()
        libbpf.map_update(
            self.under_test, "under_test", bytes(4), self.programs[scenario.program].to_bytes(4, "little")
        )
        before = self.port.counters()
        started_ns = time.thread_time_ns()
        libbpf.prog_test_run(self.driver, scenario.template(), repeat)
        took_ns = time.thread_time_ns() - started_ns
        counted = (self.port.counters() - before)[:, 0]
        expected = sum(int(counted[Verdict[name]]) for name in scenario.verdicts)
        assert (repeat if scenario.verdicts else 0) == expected == int(counted.sum()), (
            f"{scenario.name} measures what it says; counted: "
            f"{ {Verdict(i).name: int(n) for i, n in enumerate(counted) if n} }"
        )
        return took_ns / repeat

    def held(self) -> dict[str, tuple[int, int]]:
        """Of every map that flows can be in: its entries, and the bytes of one (key and value)."""
        dumps = {name.value: self.port.flows_dump(name) for name in FlowMap} | {
            which.value: whole_nat(self.port, which) for which in NatMap
        }
        return {name: (len(keys), keys.itemsize + values.itemsize) for name, (keys, values) in dumps.items()}


@contextmanager
def _opened(path: Path, fast_path: FastPath) -> Iterator[BpfObject]:
    """Load an object of the bench; maps that the fast path has are the fast path's."""
    opened = BpfObject(str(path))
    try:
        for name in opened.map_names():
            if name in fast_path.maps:
                opened.reuse(name, fast_path.map(name).fd)
        opened.load()
        yield opened
    finally:
        opened.close()


@contextmanager
def _bench(pin_folder: Path) -> Iterator[_Bench]:
    """Load everything, fill the maps, and leave no trace afterwards."""
    fast_path = loader.load(LoadSettings(pin_folder=pin_folder))
    port = KernelDatapath(fast_path)
    try:
        build(port)
        with (
            _opened(HERE / "fastpath_driver.bpf.o", fast_path) as driver,
            _opened(HERE / "fastpath_reference.bpf.o", fast_path) as reference,
        ):
            programs = {name: reference.program_fd(name) for name in ("null", "one_call", "parse_only", "fixed_encap")}
            state = MappedArray("bench_state", driver.map_fd("bench_state"), STATE, 1)
            yield _Bench(
                port,
                driver.program_fd("driver"),
                driver.map_fd("under_test"),
                state,
                programs | {"hf_xdp": fast_path.program("hf_xdp").fd},
            )
            state.close()
    finally:
        port.close()
        pins = PinFolder(pin_folder)
        pins.remove()
        pins.close()


def _measure(bench: _Bench, scenarios: Sequence[Scenario], rounds: int, repeat: int) -> dict[str, float]:
    """Best mean of each scenario in ns, driver included; they take turns."""
    best: dict[str, float] = {}
    for number in range(rounds):
        for scenario in scenarios:
            at = number * scenario.flows // rounds
            bench.turn(scenario, at, repeat)
            took = bench.turn(scenario, at, repeat)
            best[scenario.name] = min(took, best.get(scenario.name, took))
    return best


def _grown(bench: _Bench, name: str, repeat: int) -> dict[str, Any]:
    """Every one of the many flows sends a packet to a steady slot: which map grew, and by how many bytes a flow?"""
    scenario = next(s for s in SCENARIOS if s.name == name)
    before = bench.held()
    for at in range(0, MANY_FLOWS_COUNT, repeat):
        bench.turn(scenario, at, repeat)
    after = bench.held()
    return {
        "flows": MANY_FLOWS_COUNT,
        "entries_before": {name: count for name, (count, _) in before.items()},
        "entries_after": {name: count for name, (count, _) in after.items()},
        "bytes_per_flow": sum((n - before[name][0]) * one for name, (n, one) in after.items()) / MANY_FLOWS_COUNT,
    }


def run(rounds: int = ROUNDS, repeat: int = REPEAT, only: Sequence[str] = ()) -> dict[str, Any]:
    """Measure. only: names of scenarios (null and fixed_encap always come along); empty: all of them."""
    wanted = [s for s in SCENARIOS if not only or s.name in {*only, "null", "fixed_encap"}]
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        with _bench(Path(f"/sys/fs/bpf/holdfast-bench-{os.getpid()}")) as bench:
            grown = {name: _grown(bench, name, MANY_FLOWS_COUNT // 10) for name in GROWING} if not only else {}
            best = _measure(bench, wanted, rounds, repeat)
    finally:
        os.sched_setaffinity(0, allowed)
    above = {name: round(took - best["null"], 1) for name, took in best.items() if name != "null"}
    return {
        "machine": {"processor": reports.processor(), "kernel": platform.release(), "cpus": os.cpu_count()},
        "rounds": rounds,
        "packets_per_round": repeat,
        "driver_ns": round(best["null"], 1),
        "ns_above_null": above,
        "per_fixed_encap": {name: round(took / above["fixed_encap"], 2) for name, took in above.items()},
        "syn_flood_maps": grown.get("syn_flood", {}),
        "steady_maps": grown.get("steady_10m", {}),
        "bytes_per_steady_flow": grown["steady_10m"]["bytes_per_flow"] if grown else None,
        "bytes_per_vip": {"slots": 8 * SLOT_COUNT, "other_seen": 8 * SLOT_COUNT},
    }


def show(figures: dict[str, Any], console: Console) -> None:
    """Print the figures for people."""
    table = Table(title="One packet, ns above an empty program")
    for column in ("path", "ns", "/ fixed_encap", "target"):
        table.add_column(column, justify="left" if column in ("path", "target") else "right")
    for name, took in figures["ns_above_null"].items():
        table.add_row(name, f"{took:.1f}", f"{figures['per_fixed_encap'][name]:.2f}", TARGETS.get(name, ""))
    console.print(table)
    flood = figures["syn_flood_maps"]
    if flood:
        grown = [n for n, count in flood["entries_after"].items() if count != flood["entries_before"][n]]
        console.print(f"SYN flood of {flood['flows']:,} flows on steady slots: maps that grew: {grown or 'none'}")
        console.print(f"bytes per steady flow: {figures['bytes_per_steady_flow']:g}")
    console.print(f"bytes per VIP: {sum(figures['bytes_per_vip'].values()):,}")
    console.print(" ".join(f"{key} {value}" for key, value in figures["machine"].items()))


def main(arguments: Sequence[str]) -> int:
    """Run, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fastpath")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--repeat", type=int, default=REPEAT)
    parser.add_argument("only", nargs="*", help="names of scenarios; all without")
    asked = parser.parse_args(arguments)
    figures = run(rounds=asked.rounds, repeat=asked.repeat, only=asked.only)
    show(figures, Console())
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
