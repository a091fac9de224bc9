"""One LB for the oracle's unit tests: a small cast that one can know by heart, and slots that are all alike."""

from dataclasses import dataclass

import numpy as np

from lbpod.core import limits, oracle
from lbpod.core.maps import Maps, Vip, mapped
from lbpod.core.oracle import Outcome
from lbpod.core.packets import Chain, Forward, Relay
from tests.bpf import frames, world
from tests.bpf.world import HERE_IFINDEX, Flow, slot_word, v4

NOW_NS = 5_000_000_000
VIP = mapped(v4("203.0.113.10"))
TCP_VIP = Vip(1, VIP, 80, 6, client_ip=False)
UDP_VIP = Vip(2, VIP, 443, 17, client_ip=False)
STICKY_VIP = Vip(3, VIP, 8080, 6, client_ip=True)
FLOW = Flow(v4("192.0.2.7"), 40_000, TCP_VIP)
UDP_FLOW = Flow(v4("192.0.2.7"), 40_000, UDP_VIP)
SELF, PEER, THIRD = 0, 1, 2
CURRENT, BASE, DEAD, LOCAL = 1, 2, 3, 4


@dataclass
class Node:
    """One LB whose slots are all alike."""

    maps: Maps

    def run(self, ip: bytes, ifindex: int = HERE_IFINDEX, now_ns: int = NOW_NS) -> Outcome:
        return oracle.xdp(self.maps, frames.frame(ip), ifindex, now_ns)

    def slots(
        self,
        current: int = CURRENT,
        base: int = BASE,
        tracking: bool = True,
        settling: bool = False,
        number: int = 0,
        agreed: bool = False,
    ) -> None:
        for words in self.maps.slots.values():
            words[:] = slot_word(current, base, tracking, settling, number, agreed)

    def change_ring(self, next_: int, prev: int) -> None:
        """own: PEER, THIRD."""
        self.own(PEER, THIRD)
        self.maps.config["ring_change"] = 1
        self.maps.next[:], self.maps.prev[:] = world.owners(next_), world.owners(prev)

    def own(self, owner: int, backup: int = limits.MEMBER_NONE) -> None:
        self.maps.own[:] = world.owners(owner, backup)

    def from_peer(self, option: "Chain | Relay | Forward", inner: bytes, vni: int = 0x48F01D) -> Outcome:
        return self.run(frames.tunnel(v4("10.0.0.2"), v4("10.0.0.1"), frames.geneve(option.pack(), vni, inner)))

    def stamped(self, flow: Flow = FLOW) -> int:
        return int(self.maps.other_seen[flow.vip.id][flow.slot(0x5EED)])


def lone_lb() -> Node:
    """Its slots track, it owns them, and PEER is the backup; backends are CURRENT, BASE, DEAD and LOCAL, by id."""
    maps = Maps()
    world.put_config(maps, v4("10.0.0.1"), SELF)
    for index in range(4):
        world.put_node(maps, index, v4(f"10.0.0.{index + 1}"))
    for member in (SELF, PEER, THIRD):
        world.put_member(maps, member, v4(f"10.0.0.{member + 1}"), member)
        maps.member_by_addr[mapped(v4(f"10.0.0.{member + 1}"))] = member
    for vip in (TCP_VIP, UDP_VIP, STICKY_VIP):
        world.put_vip(maps, vip)
        world.put_slots(maps, vip.id, np.zeros(limits.SLOT_COUNT, np.uint64))
    for backend in (CURRENT, BASE, DEAD, LOCAL):
        address = v4(f"10.244.0.{backend}")
        world.put_backend(maps, backend, address, 9000, 3, 1, alive=backend != DEAD, local=backend == LOCAL)
    made = Node(maps)
    made.slots()
    made.own(SELF, PEER)
    return made


def option_of(outcome: Outcome) -> bytes:
    return outcome.frame[50 : 50 + (outcome.frame[42] & 0x3F) * 4]


def pod_of(outcome: Outcome) -> bytes:
    """Pod that a FORWARD names."""
    assert 0x81 == option_of(outcome)[2]
    return option_of(outcome)[16:20]
