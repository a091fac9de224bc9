"""The port in memory against the port on the kernel's maps: the same calls, the same answers.

Scenarios and the simulator run the Keeper on ``MemoryDatapath``; what they show is worth as much as that is like the
real one. So both are driven by the same random calls (some of them refused), and everything that they give back is
compared. What only the kernel has (LRU eviction, "nearly full" by CPUs) is kept out by maps that are large enough.
"""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbpod.core import layout, limits
from lbpod.core.maps import Maps, flow_key, mapped
from lbpod.datapath.kernel import KernelDatapath
from lbpod.datapath.memory import MemoryDatapath
from lbpod.datapath.port import ArrayName, Datapath, DatapathError, FlowMap
from tests.bpf.kernel_side import Kernel, loaded
from tests.bpf.world import RECORDS_SMALL_COUNT, VIP_IDS_MAX

ROUNDS = 20
CALLS_PER_ROUND = 60
VALUES = {
    FlowMap.CACHE: layout.LEASE,
    FlowMap.RECORDS: layout.RECORD,
    FlowMap.EMBRYONIC: layout.RECORD,
    FlowMap.PENDING: layout.PENDING,
}

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    if os.geteuid() != 0:
        pytest.skip("missing feature: root")
    with loaded(Path(f"/sys/fs/bpf/holdfast-port-{os.getpid()}")) as kernel:
        yield kernel


class Caller:
    """One random call at a time, made on both."""

    def __init__(self, kernel: KernelDatapath, seed: int) -> None:
        self.dice = random.Random(seed)
        maps = Maps()
        maps.records.count_max = RECORDS_SMALL_COUNT
        self.memory, self.kernel = MemoryDatapath(maps), kernel
        for name in FlowMap:
            kernel.flows_delete(name, kernel.flows_dump(name)[0])
        for vip in range(1, VIP_IDS_MAX + 1):  # both start with these, in the state that the kernel's are in
            self.memory.vip_create(vip)
            self.memory.write_slots(vip, _all_slots(), kernel.read_slots(vip))
            maps.other_seen[vip][:] = kernel.read_other_seen(vip)

    def both(self, call: Callable[[Datapath], Any]) -> tuple[Any, Any]:
        return _answer(call, self.memory), _answer(call, self.kernel)

    def flows(self) -> Any:
        count = self.dice.choice([0, 1, 5, 40, 100])
        keys = {
            flow_key(
                mapped(bytes([192, 0, 2, self.dice.randrange(16)])), self.dice.randrange(8), self.dice.randrange(2)
            )
            for _ in range(count)
        }
        return np.frombuffer(b"".join(sorted(keys)), layout.FLOW)

    def rows(self, dtype: Any, count: int) -> Any:
        return np.frombuffer(self.dice.randbytes(dtype.itemsize * count), dtype)

    def draw(self) -> Callable[[Datapath], Any]:
        name, keys = self.dice.choice(list(FlowMap)), self.flows()
        values, vip = self.rows(VALUES[name], len(keys)), self.dice.choice([1, 2, VIP_IDS_MAX + 5])
        slots = np.array(self.dice.sample(range(limits.SLOT_COUNT + self.dice.choice([0, 9])), 7), np.uint32)
        words = self.rows(np.dtype("<u8"), 7)
        count = self.dice.choice([0, 1, 10, 1_000])
        return self.dice.choice(
            [
                lambda port: port.flows_put(name, keys, values),
                lambda port: port.flows_put(name, keys, values),
                lambda port: port.flows_delete(name, keys),
                lambda port: _sorted(port.flows_dump(name)),
                lambda port: port.records_lookup(keys).tobytes(),
                lambda port: _drained(port, count),
                lambda port: port.write_slots(vip, slots, words),
                lambda port: port.read_slots(vip).tobytes(),
                lambda port: port.read_other_seen(vip).tobytes(),
                lambda port: port.vip_ids(),
                lambda port: port.vip_create(1),
                lambda port: port.vip_delete(VIP_IDS_MAX + 5),
                self._draw_write(),
            ]
        )

    def _draw_write(self) -> Callable[[Datapath], Any]:
        name = self.dice.choice([ArrayName.BACKENDS, ArrayName.NODES, ArrayName.OWN, ArrayName.VIP_STATS])
        array = self.memory.read(name)
        indices = np.array(self.dice.sample(range(len(array) + self.dice.choice([0, 0, len(array)])), 3), np.uint32)
        rows = self.rows(array.dtype, 3)

        def write(port: Datapath) -> bytes:
            port.write(name, indices, rows)
            return port.read(name)[indices].tobytes()

        return write


def _all_slots() -> Any:
    return np.arange(limits.SLOT_COUNT, dtype=np.uint32)


def _answer(call: Callable[[Datapath], Any], port: Datapath) -> Any:
    try:
        return call(port)
    except DatapathError:
        return DatapathError


def _sorted(dump: tuple[Any, Any]) -> list[tuple[bytes, bytes]]:
    return sorted((key.tobytes(), value.tobytes()) for key, value in zip(*dump, strict=True))


def _drained(port: Datapath, count: int) -> tuple[int, list[tuple[bytes, bytes]]]:
    """How many a small drain takes, and what it and a large one take together: the order is the port's choice."""
    first = port.pending_drain(count)
    rest = port.pending_drain(1_000)
    return len(first[0]), sorted(_sorted(first) + _sorted(rest))


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_same_calls_same_answers(kernel: Kernel, seed: int) -> None:
    caller = Caller(kernel.port, seed)
    for number in range(CALLS_PER_ROUND):
        in_memory, in_kernel = caller.both(caller.draw())
        if in_memory != in_kernel:
            pytest.fail(f"round {seed}, call {number}: memory {in_memory!r:.200}, kernel {in_kernel!r:.200}")


def test_the_door(kernel: Kernel) -> None:
    """A packet's outer source is looked up in what members_door was told last, and in nothing else."""
    addresses = [mapped(bytes([10, 0, 0, last])) for last in range(1, 5)]
    memory = MemoryDatapath()
    for chosen in (addresses[:3], addresses[2:], []):
        memory.members_door(chosen, list(range(len(chosen))))
        kernel.port.members_door(chosen, list(range(len(chosen))))
        assert sorted(chosen) == sorted(memory.maps.member_by_addr)
        assert sorted(chosen) == kernel.door()
