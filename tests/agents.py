"""What tests of the agent share: a small cluster's snapshot, next hops that are known at once, flows."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lbpod.agent.rows import Uplink
from lbpod.core.layout import FLOW, NODE, NODE_REACHABLE
from lbpod.core.model import Affinity, Backend, Cluster, Node, Protocol, Ring, Snapshot, Vip, parse_address
from lbpod.datapath.port import U32

UPLINK = Uplink("eth0", 3, bytes.fromhex("020000000001"), 1600, parse_address("10.0.0.1"))
VIP_ADDRESS = parse_address("203.0.113.10")
Rows = npt.NDArray[Any]


class Hops:
    """Next hops that are known at once, or not."""

    def __init__(self) -> None:
        self.nodes: Mapping[int, bytes] = {}
        self.known = True

    def set_nodes(self, nodes: Mapping[int, bytes]) -> Sequence[int]:
        self.nodes = nodes
        return sorted(nodes)

    def rows(self, ids: Collection[int]) -> tuple[U32, Rows]:
        rows = np.zeros(len(ids), NODE)
        for place, number in enumerate(sorted(ids)):
            rows[place]["addr"] = np.frombuffer(self.nodes[number], np.uint8)
            rows[place]["flags"] = NODE_REACHABLE if self.known else 0
        return np.array(sorted(ids), np.uint32), rows

    def handle_events(self) -> Sequence[int]:
        return sorted(self.nodes)

    def resolve_all(self) -> Sequence[int]:
        return sorted(self.nodes)

    def fileno(self) -> int:
        return -1


def snapshot(generation: int, *, backends: int = 2, ring: tuple[int, ...] = (0, 1)) -> Snapshot:
    nodes = tuple(
        Node(number, f"n{number}", parse_address(f"10.0.0.{number}"), f"10.0.0.{number}:9900", number - 1)
        for number in (1, 2)
    )
    vip = Vip(
        5,
        "shop/web/http",
        VIP_ADDRESS,
        80,
        Protocol.TCP,
        Affinity.NONE,
        10**12,
        10**12,
        1,
        generation,
        bytes(16),
        tuple(Backend(10 + each, parse_address(f"10.1.0.{each + 1}"), 8080, 1 + each % 2) for each in range(backends)),
    )
    return Snapshot(Cluster(77, 0xDEADBEEF), generation, Ring(1, ring), nodes, (vip,))


def flows(count: int) -> Rows:
    rows = np.zeros(count, FLOW)
    rows["port_be"] = np.arange(1, count + 1)
    rows["vip"] = 5
    return rows
