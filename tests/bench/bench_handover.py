"""How many records a second one agent hands over to another, and how long an LB takes to join with them.

Two processes, as in production: the joiner is a child, the LB that owns everything is this one. Both stand on maps in
the kernel and talk over the loopback with mutual TLS. Every slot tracks, and RECORD_COUNT flows are recorded. This
process plays the controller too: it stages a ring of two, prepares, hands over, switches. The handover is timed from
its call to its answer; the join from the first call to the answer of the last switch, when the joiner may take traffic.
Memory is the largest resident size of either process meanwhile, less what it was before. Afterwards each record is
compared.

Run it: ``python -m tests.bench.bench_handover [RECORDS]``. ``run()`` gives the same as a dictionary. Root only.
"""

import asyncio
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from lbpod.core.layout import FLOW, RECORD
from lbpod.core.messages import HandoverCall, LbStatus, RingDoneCall, RingPrepareCall, RingStep, RingSwitchCall
from lbpod.core.model import Snapshot, World
from lbpod.core.snapshot import Tables, digest_of, next_snapshot, ring_snapshot
from lbpod.core.transition import is_tracking, round_of
from lbpod.core.wire import Body, decode
from lbpod.datapath.kernel import KernelDatapath
from lbpod.datapath.port import FlowMap, Rows
from lbpod.logs import configure_logs
from lbpod.minting import mint
from tests.agents import CLUSTER, NODE_NAMES, Caller, Reachable, make_parts, roll_out, running
from tests.bench.bench_resolve import address_of, kernel_maps, replaced

RECORD_COUNT: Final = 200_000
ROUNDS: Final = 3
WAIT_SECONDS_MAX: Final = 60
OWNER, JOINER = NODE_NAMES[0], NODE_NAMES[1]


class _Remote:
    """What a client needs to know of an agent in another process."""

    def __init__(self, control_port: int, pid: int) -> None:
        self.control_port, self.pid = control_port, pid


def flows_of(count: int) -> Rows:
    """So many different flows of VIP 1."""
    rows = np.zeros(count, FLOW)
    numbers = np.arange(count, dtype=np.uint32)
    rows["addr"][:, 10:12] = 255
    rows["addr"][:, 12:] = (numbers // 50_000 + (198 << 24)).astype(">u4").view(np.uint8).reshape(-1, 4)
    rows["port_be"] = numbers % 50_000 + 1_024
    rows["vip"] = 1
    return rows


def resident_bytes(pid: int | str, field: str = "VmHWM") -> int:
    """Largest (VmHWM) or present (VmRSS) resident size of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"there is no {field} of process {pid}")


def forget_peak(pid: int | str) -> None:
    """VmHWM counts from here."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


async def join(folder: Path, maps: KernelDatapath) -> None:
    """The child: an agent that joins. Serves until standard input ends."""
    async with running(make_parts(JOINER, folder, maps, address=address_of(1))) as agent:
        print(agent.control_port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


@contextlib.asynccontextmanager
async def joiner_process(folder: Path, count: int) -> AsyncIterator[_Remote]:
    """The joiner while it runs."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.bench.bench_handover", "--join", str(folder), str(count)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        yield _Remote(int(await asyncio.wait_for(child.stdout.readline(), WAIT_SECONDS_MAX)), child.pid)
    finally:
        child.stdin.close()
        status = await asyncio.wait_for(child.wait(), WAIT_SECONDS_MAX)
    assert 0 == status, f"the joiner ended with {status}: what is measured is not what was to be"


async def _all(controller: Caller, agents: list[Reachable], body: Body) -> float:
    """The same call to all at once; seconds until the last answer."""
    began = time.perf_counter()
    for status, data in await asyncio.gather(*(controller.say(agent, body) for agent in agents)):
        assert 200 == status, data
    return time.perf_counter() - began


async def _hand_over(controller: Caller, agents: list[Reachable], call: HandoverCall) -> float:
    """As the Planner does it: a call is answered after a while even if not all has arrived, and repeated then."""
    began = time.perf_counter()
    left = agents
    while left:
        answers = await asyncio.gather(*(controller.say(agent, call) for agent in left))
        assert {200} == {status for status, _ in answers}, answers
        steps = [decode(LbStatus, data).ring_step for _, data in answers]
        left = [agent for agent, step in zip(left, steps, strict=True) if step is not RingStep.HANDED]
    return time.perf_counter() - began


async def _change(controller: Caller, agents: list[Reachable], snapshot: Snapshot) -> dict[str, float]:
    """A whole ring change; seconds of each step."""
    generation, digest = snapshot.generation, digest_of(snapshot)
    return {
        "stage": await _all(controller, agents, snapshot),
        "prepare": await _all(controller, agents, RingPrepareCall(generation, digest)),
        "handover": await _hand_over(controller, agents, HandoverCall(generation, digest, 1)),
        "switch": await _all(controller, agents, RingSwitchCall(generation, digest)),
        "done": await _all(controller, agents, RingDoneCall(generation, digest)),
    }


async def _measure(folder: Path, maps: KernelDatapath, count: int, rounds: int) -> list[dict[str, float]]:
    flows, records = flows_of(count), np.zeros(count, RECORD)
    records["backend"] = 1
    found = []
    parts = make_parts(OWNER, folder, maps, address=address_of(0))
    async with (
        running(parts) as agent,
        joiner_process(folder, count) as remote,
        Caller(folder, "controller") as controller,
    ):
        agents: list[Reachable] = [agent, remote]
        ports = {OWNER: agent.control_port, JOINER: remote.control_port}
        snapshot: Snapshot | None = None
        for generation in (1, 2):
            world = replaced(ports, generation)
            snapshot, _ = next_snapshot(world, snapshot, CLUSTER, generation, Tables(CLUSTER.seed), first_ring=[OWNER])
            assert snapshot is not None
            await roll_out(controller, agents, snapshot)
        for _ in range(rounds):
            records["seen_ns"], records["round"] = time.monotonic_ns(), _round_of_all(maps)
            assert count == maps.flows_put(FlowMap.RECORDS, flows, records)
            for pid in ("self", remote.pid):
                forget_peak(pid)
            pids: tuple[int | str, int | str] = ("self", remote.pid)
            before = [resident_bytes(pid, "VmRSS") for pid in pids]
            snapshot = _ring(snapshot, world, [OWNER, JOINER])
            steps = await _change(controller, agents, snapshot)
            grown = [resident_bytes(pid) - had for pid, had in zip(pids, before, strict=True)]
            found.append({**steps, "sender_mib": grown[0] / 2**20, "receiver_mib": grown[1] / 2**20})
            if len(found) < rounds:
                snapshot = _ring(snapshot, world, [OWNER])
                await _change(controller, agents, snapshot)
    return found


def _round_of_all(maps: KernelDatapath) -> int:
    """Every slot tracks, and has begun to as often as any other: records of another round would mean nothing."""
    words = maps.read_slots(1)
    assert is_tracking(words).all(), "records of steady slots are not handed over"
    (number,) = np.unique(round_of(words))
    return int(number)


def _ring(snapshot: Snapshot | None, world: World, members: list[str]) -> Snapshot:
    assert snapshot is not None, "a ring changes once there is one"
    return ring_snapshot(snapshot, snapshot, world, members, snapshot.generation + 1, snapshot.next_ids)


def _check(maps: KernelDatapath, count: int) -> None:
    """Every record has arrived and says what it said."""
    keys, values = maps.flows_dump(FlowMap.RECORDS)
    assert count == len(keys), f"{len(keys)} of {count} records have arrived"
    assert (values["backend"] == 1).all()


def run(count: int = RECORD_COUNT, rounds: int = ROUNDS) -> dict[str, Any]:
    """handover_records_per_s and join_s (medians), memory, and the single rounds."""
    configure_logs("error", "bench")
    folder = Path(tempfile.mkdtemp(prefix="holdfast-bench-"))
    try:
        mint(folder / "tls", NODE_NAMES)
        with kernel_maps("owner") as maps:
            found = asyncio.run(_measure(folder, maps, count, rounds))
    finally:
        shutil.rmtree(folder)
    rates = [count / each["handover"] for each in found]
    joins = [sum(each[step] for step in ("stage", "prepare", "handover", "switch")) for each in found]
    return {
        "handover_records_per_s": round(statistics.median(rates)),
        "join_s": round(statistics.median(joins), 3),
        "handover": {
            "records": count,
            "sender_mib": round(max(each["sender_mib"] for each in found), 1),
            "receiver_mib": round(max(each["receiver_mib"] for each in found), 1),
            "rounds": [{name: round(value, 4) for name, value in each.items()} for each in found],
        },
    }


def main() -> None:
    """The bench itself, or the joiner's half of it."""
    if sys.argv[1:2] == ["--join"]:
        configure_logs("error", "bench")
        with kernel_maps("joiner") as maps:
            asyncio.run(join(Path(sys.argv[2]), maps))
            _check(maps, int(sys.argv[3]))
    else:
        print(run(*(int(count) for count in sys.argv[1:2])))


if __name__ == "__main__":
    main()
