"""How many flows a second one agent resolves by asking another: pending -> question -> answer -> cache filled.

Two processes, as in production: the owner is a child, the asker is this one. Both stand on maps in the kernel (pinned
in folders of their own, attached nowhere) and talk over the loopback with mutual TLS. Every slot tracks: all backends
have been replaced and drain. Half of the flows have a record at the owner. The pending map is filled to FLOW_COUNT
flows at once, many batches of 4,096; the time counts from the first drain to the last lease written, so filling does
not count, which in production is the fast path's work. Afterwards every lease is compared with what it should say.

Run it: ``python -m tests.bench.bench_resolve``. ``run()`` gives the same as a dictionary. Root only.
"""

import asyncio
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from lbpod.core.layout import RECORD, SLOT_ROUND_ONE
from lbpod.core.limits import BATCH_MAX
from lbpod.core.model import Affinity, BackendState, Protocol, World, WorldBackend, WorldNode, WorldVip, parse_address
from lbpod.core.transition import base_of
from lbpod.datapath.kernel import KernelDatapath
from lbpod.datapath.loader import LoadSettings, load
from lbpod.datapath.port import FlowMap, Rows
from lbpod.logs import configure_logs
from lbpod.minting import mint
from tests.agents import NODE_NAMES, VIP_ADDRESS, Caller, follow, make_parts, relayed_flows, roll_out, running

FLOW_COUNT: Final = 14 * BATCH_MAX
"""A little less than `pending` holds: a full LRU map evicts."""

ROUNDS: Final = 7
PINS: Final = Path("/sys/fs/bpf")
WAIT_SECONDS_MAX: Final = 30
ASKER, OWNER = 0, 1


class Timed(KernelDatapath):
    """The kernel's maps, with a note of when the first flow left `pending` and when how many leases were written."""

    def __init__(self, pins: Path) -> None:
        super().__init__(load(LoadSettings(pins)))
        self.began_ns = 0
        self.ended_ns = 0
        self.leases = 0

    def pending_drain(self, count_max: int) -> tuple[Rows, Rows]:
        now_ns = time.perf_counter_ns()
        flows, values = super().pending_drain(count_max)
        if len(flows) and not self.began_ns:
            self.began_ns = now_ns
        return flows, values

    def flows_put(self, name: FlowMap, keys: Rows, values: Rows) -> int:
        done = super().flows_put(name, keys, values)
        if name is FlowMap.CACHE:
            self.leases += done
            self.ended_ns = time.perf_counter_ns()
        return done


@contextlib.contextmanager
def kernel_maps(name: str) -> Iterator[Timed]:
    """Maps of one agent, and no trace of them afterwards."""
    pins = PINS / f"holdfast-bench-{os.getpid()}-{name}"
    maps = Timed(pins)
    try:
        yield maps
    finally:
        maps.close()
        shutil.rmtree(pins)


def address_of(member: int) -> bytes:
    """Of one of the three nodes."""
    return parse_address(f"10.0.0.{member + 1}")


def replaced(ports: dict[str, int], generation: int) -> World:
    """Three LBs, four backends on the third; the second generation has four others, and the first four drain."""
    nodes = tuple(
        WorldNode(name, parse_address(f"10.0.0.{number}"), f"127.0.0.1:{ports.get(name, 1)}", lb=True)
        for number, name in enumerate(NODE_NAMES, start=1)
    )
    old_state = BackendState.READY if generation == 1 else BackendState.DRAINING
    backends = [WorldBackend(parse_address(f"10.1.0.{n}"), 80, NODE_NAMES[2], 1, old_state) for n in range(1, 5)]
    if generation == 2:
        backends += [WorldBackend(parse_address(f"10.1.1.{n}"), 80, NODE_NAMES[2]) for n in range(1, 5)]
    idle_ns = 3600 * 10**9
    return World(
        nodes, (WorldVip("a/b/c", VIP_ADDRESS, 80, Protocol.TCP, Affinity.NONE, idle_ns, idle_ns, tuple(backends)),)
    )


# --- The owner: a child ----------------------------------------------------------------------------------------------
async def own(folder: Path, maps: KernelDatapath) -> None:
    """Serves until standard input ends."""
    parts = make_parts(NODE_NAMES[OWNER], folder, maps, address=address_of(OWNER))
    async with running(parts) as agent:
        flows, values = relayed_flows(FLOW_COUNT, ASKER, OWNER)
        records = np.zeros(FLOW_COUNT // 2, RECORD)
        records["backend"], records["round"] = 1, SLOT_ROUND_ONE
        # Seen after the slots have begun to track: what is older then says nothing any more, and goes.
        seen_ns = time.monotonic_ns() + WAIT_SECONDS_MAX * 10**9
        records["seen_ns"] = seen_ns
        maps.flows_put(FlowMap.RECORDS, flows[::2], records)
        print(agent.control_port, flush=True)
        while 1 not in maps.vip_ids():  # noqa: ASYNC110  (maps tell nobody)
            await asyncio.sleep(0.01)
        # And of the others the slots: for what has not come through here nobody gets a lease.
        maps._of_vip("other_seen", 1).words[values["slot"], 0] = seen_ns
        await asyncio.to_thread(sys.stdin.read)


@contextlib.asynccontextmanager
async def owner_process(folder: Path) -> AsyncIterator[int]:
    """The owner's control port while it runs."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.bench.bench_resolve", "--own", str(folder)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        yield int(await asyncio.wait_for(child.stdout.readline(), WAIT_SECONDS_MAX))
    finally:
        child.stdin.close()
        await asyncio.wait_for(child.wait(), WAIT_SECONDS_MAX)


# --- The asker -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Remote:
    """What a client needs to know of an agent in another process."""

    control_port: int


async def _round(maps: Timed, flows: Rows, values: Rows) -> float:
    """Flows a second. The map is filled in one call, during which the driver, in this very thread, cannot drain."""
    maps.flows_delete(FlowMap.CACHE, flows)
    maps.began_ns = maps.leases = 0
    maps.flows_put(FlowMap.PENDING, flows, values)
    deadline_ns = time.monotonic_ns() + WAIT_SECONDS_MAX * 10**9
    while maps.leases < len(flows):
        assert time.monotonic_ns() < deadline_ns, f"only {maps.leases} of {len(flows)} flows were resolved"
        await asyncio.sleep(0.005)
    return len(flows) / ((maps.ended_ns - maps.began_ns) * 1e-9)


def _check(maps: Timed, flows: Rows, values: Rows) -> None:
    """Every flow has a lease, and it says base, or the record's backend."""
    keys, leases = maps.flows_dump(FlowMap.CACHE)
    found = {key.tobytes(): int(lease["backend"]) for key, lease in zip(keys, leases, strict=True)}
    bases = base_of(maps.read_slots(1)[values["slot"]]).tolist()
    for place, (flow, base) in enumerate(zip(flows, bases, strict=True)):
        assert found[flow.tobytes()] == (1 if place % 2 == 0 else base), "a lease says the wrong backend"


async def _measure(folder: Path, maps: Timed, rounds: int) -> list[float]:
    flows, values = relayed_flows(FLOW_COUNT, ASKER, OWNER)
    parts = make_parts(NODE_NAMES[ASKER], folder, maps, address=address_of(ASKER))
    async with owner_process(folder) as port, running(parts) as agent, Caller(folder, "controller") as controller:
        ports = {NODE_NAMES[ASKER]: agent.control_port, NODE_NAMES[OWNER]: port}
        snapshot = None
        for generation in (1, 2):
            snapshot = follow(replaced(ports, generation), snapshot)
            await roll_out(controller, [agent, _Remote(port)], snapshot)
        found = [await _round(maps, flows, values) for _ in range(rounds)]
        _check(maps, flows, values)
        return found


def run(rounds: int = ROUNDS) -> dict[str, Any]:
    """resolve_flows_per_s (median), and the single rounds."""
    configure_logs("error", "bench")
    folder = Path(tempfile.mkdtemp(prefix="holdfast-bench-"))
    try:
        mint(folder / "tls", NODE_NAMES)
        with kernel_maps("asker") as maps:
            found = asyncio.run(_measure(folder, maps, rounds))
    finally:
        shutil.rmtree(folder)
    return {
        "resolve_flows_per_s": round(statistics.median(found)),
        "resolve": {
            "flows": FLOW_COUNT,
            "batch": BATCH_MAX,
            "rounds_flows_per_s": [round(each) for each in found],
        },
    }


def main() -> None:
    """The bench itself, or the owner's half of it."""
    if sys.argv[1:2] == ["--own"]:
        configure_logs("error", "bench")
        with kernel_maps("owner") as maps:
            asyncio.run(own(Path(sys.argv[2]), maps))
    else:
        print(run())


if __name__ == "__main__":
    main()
