"""A few LBs and hosts whose maps say the same, and a frame's way through them: the oracle as a whole cluster.

No Keeper and no messages: what one node sends by tunnel arrives at the node that it is addressed to, at once. That is
enough to ask what the packets' rules promise by themselves: who has recorded a flow when the pod sees it, how often a
packet is relayed, where it ends.
"""

from dataclasses import dataclass, field

import numpy as np

from lbpod.core import limits, oracle
from lbpod.core.maps import Maps, Vip, mapped
from lbpod.core.oracle import Action, Outcome
from tests.bpf import world
from tests.bpf.frames import frame
from tests.bpf.world import HERE_IFINDEX, Flow

VIP_ADDRESS = mapped(world.v4("203.0.113.10"))
TCP_VIP = Vip(1, VIP_ADDRESS, 80, 6, client_ip=False)
UDP_VIP = Vip(2, VIP_ADDRESS, 53, 17, client_ip=False)
STEPS_MAX = limits.RELAY_HOPS_MAX + limits.REPLICAS_MAX + 2
"""Tunnels that one packet can go through: relays, a chain, the last one to the pod's node."""


def node_address(node: int) -> bytes:
    return bytes([10, 0, 0, node + 1])


@dataclass(slots=True)
class Trail:
    """Where a frame went: node and outcome of each step. The last one delivered or dropped it."""

    steps: list[tuple[int, Outcome]] = field(default_factory=list)

    @property
    def nodes(self) -> list[int]:
        return [node for node, _ in self.steps]

    @property
    def last(self) -> Outcome:
        return self.steps[-1][1]

    @property
    def pod(self) -> bytes | None:
        """Whom the packet was delivered to (4 bytes), None where it was dropped."""
        return self.last.frame[30:34] if self.last.action is Action.PASS else None


class Cluster:
    """LBs are nodes 0..lbs-1 and members with the same ids, hosts the nodes after them. Backend i (1..) is pod i.

    Slots and ownership are the same arrays for all nodes (copies would cost more than the packets do).
    """

    def __init__(self, lbs: int, hosts: int, ring_change: bool = False) -> None:
        self.lbs, self.count = lbs, lbs + hosts
        self._words = np.zeros(limits.SLOT_COUNT, np.uint64)
        self.nodes = [self._node(node, ring_change) for node in range(self.count)]
        self.now_ns = 1_000

    def _node(self, node: int, ring_change: bool) -> Maps:
        maps = Maps()
        member = node if node < self.lbs else limits.MEMBER_NONE
        world.put_config(maps, node_address(node), member, ring_change)
        for other in range(self.count):
            world.put_node(maps, other, node_address(other))
        for other in range(self.lbs):
            world.put_member(maps, other, node_address(other), other)
            maps.member_by_addr[mapped(node_address(other))] = other
        for vip in (TCP_VIP, UDP_VIP):
            world.put_vip(maps, vip)
            world.put_slots(maps, vip.id, self._words)
        return maps

    def put_backend(self, backend: int, node: int) -> None:
        for index, maps in enumerate(self.nodes):
            world.put_backend(maps, backend, self.pod(backend), 8080, node, TCP_VIP.id, local=index == node)

    @staticmethod
    def pod(backend: int) -> bytes:
        return bytes([10, 244, 0, backend])

    def put_slots(self, current: int, base: int, tracking: bool) -> None:
        self._words[:] = world.slot_word(current, base, tracking)

    def put_slots_at(self, node: int, current: int, base: int, tracking: bool) -> None:
        """At one node only, whatever the others say."""
        words = np.full(limits.SLOT_COUNT, world.slot_word(current, base, tracking), np.uint64)
        for vip in (TCP_VIP, UDP_VIP):
            world.put_slots(self.nodes[node], vip.id, words)

    def put_owners(self, own: int, next_: int, prev: int) -> None:
        """Of every slot, in everyone's view; see ``world.owners``."""
        arrays = [np.full(limits.SLOT_COUNT, word, np.uint32) for word in (own, next_, prev)]
        for maps in self.nodes:
            maps.own, maps.next, maps.prev = arrays

    def put_owners_at(self, node: int, own: int, next_: int, prev: int) -> None:
        """Of every slot, in one LB's view: it is at a stage of a ring change of its own."""
        maps = self.nodes[node]
        maps.own, maps.next, maps.prev = (np.full(limits.SLOT_COUNT, word, np.uint32) for word in (own, next_, prev))
        nobody = world.owners(limits.MEMBER_NONE)
        maps.config["ring_change"] = int(next_ != nobody or prev != nobody)

    def hand_over(self, node: int, to: int) -> None:
        """All records of one LB to another, whose own ones stay where they name the same flow."""
        there, here = self.nodes[to], self.nodes[node]
        for key, record in here.embryonic.rows.items():
            if key not in there.records.rows and key not in there.embryonic.rows:
                there.embryonic.put(key, record)
        for key, record in here.records.rows.items():
            there.records.put(key, record)
            there.embryonic.delete(key)

    def walk(self, packet: bytes, entry: int) -> Trail:
        """Send an IPv4 packet from the router into LB ``entry`` and follow it to its end."""
        trail, node, moving = Trail(), entry, frame(packet)
        while True:
            self.now_ns += 1
            outcome = oracle.xdp(self.nodes[node], moving, HERE_IFINDEX, self.now_ns)
            trail.steps.append((node, outcome))
            if outcome.action not in (Action.TX, Action.REDIRECT):
                return trail
            assert len(trail.steps) <= STEPS_MAX, "a packet ends"
            node, moving = outcome.frame[33] - 1, outcome.frame

    def knows(self, node: int, flow: Flow) -> int | None:
        """Backend that a node has recorded for a flow."""
        maps = self.nodes[node]
        record = maps.records.get(flow.key) or maps.embryonic.get(flow.key)
        return None if record is None else record.backend
