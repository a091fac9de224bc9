"""Clients, their flows, and the pods they talk to: packets through the oracle, from LB to LB, and what must not happen.

A packet enters at one LB, and what that LB sends by tunnel arrives at once at the node that it is addressed to; the
whole way is kept. A pod is as simple as pods are: it knows the flows whose first packet it has seen, answers them
through its node's ``hf_tc``, and answers RST to any other TCP packet.

**The promise**, checked for every packet of every scenario: a packet of a live flow reaches the pod that has the flow,
or nobody. A flow is live while its pod exists, neither side has closed it, and the client has not been silent for the
idle time. What breaks it is kept in ``broken`` and printed as MOVED.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from lbpod.core import oracle, oracle_reply, packets
from lbpod.core.hashing import flow_hashes
from lbpod.core.limits import SLOT_COUNT
from lbpod.core.maps import flow_key, mapped
from lbpod.core.model import Affinity, Backend, Protocol, WorldVip, parse_address
from lbpod.core.ownership import Member, backups, owners, ownership
from lbpod.core.verdicts import Verdict
from tests.bpf import frames
from tests.scenarios.cluster import Cluster, address_of
from tests.scenarios.node import IFINDEX
from tests.scenarios.tables import shared_tables

U32 = npt.NDArray[np.uint32]

POD_PORT: Final = 8_080
STEPS_MAX: Final = 16
"""Nodes that one packet can come through: more would be a loop."""

FIRST_PORT: Final = 10_000
CLIENTS_MAX: Final = 500
"""Addresses that are searched for a client whose flow is as wished."""

FLAGS: Final = {
    "SYN": frames.SYN,
    "ACK": frames.ACK,
    "FIN": frames.FIN | frames.ACK,
    "RST": frames.RST,
    "DATA": 0,
    "INITIAL": 0,
}
"""Words for packets: of TCP by their flags; DATA and INITIAL (of QUIC) are UDP's."""


def pod_address(number: int) -> bytes:
    """16 bytes of a pod's address."""
    return parse_address(f"10.244.{number >> 8}.{number & 0xFF}")


def pod_number(address: bytes) -> int:
    """The number of a pod by its address (4 or 16 bytes); 0: no pod's."""
    return int.from_bytes(address[-2:], "big") if address[-4:-2] == b"\x0a\xf4" else 0


@dataclass(slots=True)
class Flow:
    """A client's flow. pod: who has it; 0: nobody yet, or no more."""

    name: str
    vip: WorldVip
    client: bytes
    """4 bytes."""
    port: int
    slot: int
    pod: int = 0
    sent_ns: int = 0
    closed: bool = False
    talks: bool = False
    """It takes part in `talk`."""

    def key(self, vip_id: int) -> bytes:
        """Bytes of layout.FLOW."""
        port = 0 if self.vip.affinity is Affinity.CLIENT_IP else self.port
        return flow_key(mapped(self.client), port, vip_id)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a flow should be like; empty: anything."""

    owner: str = ""
    backup: str = ""
    pods: tuple[tuple[list[int], int], ...] = ()
    """Ready pods, and the pod that it belongs to under them."""
    client: bytes | None = None
    slot_of: Flow | None = None


@dataclass(slots=True)
class Trip:
    """A packet's way. steps: node and verdict; pod 0: it reached nobody."""

    steps: list[tuple[str, Verdict]] = field(default_factory=list)
    pod: int = 0
    remark: str = ""

    def __str__(self) -> str:
        way = " > ".join(f"{node} {verdict.name}" for node, verdict in self.steps)
        return way + (f" > pod{self.pod}" if self.pod else "") + (f" {self.remark}" if self.remark else "")


class Traffic:
    """All flows of a scenario."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._known: dict[int, set[bytes]] = {}
        """Pod -> flows (client and port) that it has."""
        self._turn = 0
        self._nodes = {node.address[12:]: node for node in cluster.nodes.values()}
        ring = [Member(place, address_of(name)) for place, name in enumerate(cluster.lbs)]
        own = _ownership(tuple(ring), cluster.of.seed)
        # Owners by name: what a flow is looked for by, long before any LB has written it down.
        names = np.array([*cluster.lbs, "none"])
        self.owner = names[np.minimum(owners(own), len(cluster.lbs))]
        self.backup = names[np.minimum(backups(own), len(cluster.lbs))]
        self.flows: dict[str, Flow] = {}
        self.broken: list[str] = []
        self.talk_every_ns = 0
        cluster.on_tick.append(self._talk)

    # --- Looking for flows --------------------------------------------------------------------------------------------
    def table(self, vip: WorldVip, pods: Iterable[int]) -> U32:
        """(SLOT_COUNT,) pod of each slot, were these its ready ones: ids play no part in a table."""
        backends = [Backend(number, pod_address(number), POD_PORT, 1) for number in sorted(pods)]
        tables = shared_tables(self._cluster.of.seed)
        return tables.table((vip.address, vip.port, int(vip.protocol)), backends).current

    def find(self, name: str, vip: WorldVip, wish: "Wish") -> Flow:
        """The first flow that is as wished, in a slot that no other flow of the VIP is in (unless that is wished)."""
        fits = np.ones(SLOT_COUNT, dtype=np.bool_)
        others = [flow.slot for flow in self.flows.values() if flow.vip.name == vip.name]
        if wish.slot_of is not None:
            fits[:] = np.arange(SLOT_COUNT) == wish.slot_of.slot
        elif wish.client is None:
            fits[others] = False
        for wanted, names in ((wish.owner, self.owner), (wish.backup, self.backup)):
            fits &= (names == wanted) | (wanted == "")
        for ready, pod in wish.pods:
            fits &= self.table(vip, ready) == pod
        affine = vip.affinity is Affinity.CLIENT_IP
        port = FIRST_PORT + len(self.flows)
        for number in range(CLIENTS_MAX):
            client = wish.client or bytes([198, 51, 100 + number // 250, number % 250 + 1])
            ports = np.arange(port, port + 1 if affine else 60_000, dtype=np.uint16)
            taken = [flow.port for flow in self.flows.values() if flow.client == client]
            found = np.flatnonzero(fits[self._slots(vip, client, ports)] & ~np.isin(ports, taken))
            if len(found):
                at = int(ports[found[0]])
                flow = Flow(name, vip, client, at, int(self._slots(vip, client, ports[found[:1]])[0]))
                self.flows[name] = flow
                return flow
        raise AssertionError(f"there is no such flow as {name}; another seed of the cluster may have one")

    def _slots(self, vip: WorldVip, client: bytes, ports: npt.NDArray[np.uint16]) -> U32:
        addresses = np.tile(np.frombuffer(mapped(client), np.uint8), (len(ports), 1))
        affine, seed = vip.affinity is Affinity.CLIENT_IP, self._cluster.of.seed
        hashes = flow_hashes(addresses, ports, vip.address, vip.port, int(vip.protocol), affine, seed)
        return hashes >> np.uint32(16)

    # --- Packets ------------------------------------------------------------------------------------------------------
    def next_lb(self) -> str:
        """The router sends each packet to another LB."""
        self._turn += 1
        return self._cluster.lbs[self._turn % len(self._cluster.lbs)]

    def send(self, flow: Flow, word: str, via: str) -> Trip:
        """Send one packet of a flow from the router into an LB, to its end, and let the pod answer."""
        flow.vip = next((vip for vip in self._cluster.vips if vip.name == flow.vip.name), flow.vip)
        trip, arrived = self._walk(_frame(flow, word), via)
        now_ns, first = self._cluster.now_ns, word in {"SYN", "INITIAL"}
        if flow.pod and now_ns - flow.sent_ns > flow.vip.idle_ns:
            self._forget(flow)
        if arrived is None:
            return trip
        trip.pod = pod_number(arrived[30:34])
        if not trip.pod:
            return trip  # into the LB's own stack
        node = self._cluster.nodes[trip.steps[-1][0]]
        lives = any(pod_number(one.address) == trip.pod for one in flow.vip.backends)
        if flow.pod not in {0, trip.pod} and self._is_alive(flow) and not first:
            trip.remark = f"MOVED from pod{flow.pod}"
            self.broken.append(f"{flow.name} {trip}")
        elif not lives:
            trip.remark = "(which is gone)"
        elif word == "RST":
            self._forget(flow)
        else:
            self._answer(flow, word, trip, node)
        return trip

    def _walk(self, frame: bytes, via: str) -> tuple[Trip, bytes | None]:
        trip, node = Trip(), self._cluster.nodes[via]
        for _ in range(STEPS_MAX):
            outcome = oracle.xdp(node.maps, frame, IFINDEX, self._cluster.now_ns)
            assert outcome.verdict is not None, "every frame is counted"
            trip.steps.append((node.name, outcome.verdict))
            if outcome.action is oracle.Action.PASS:
                return trip, outcome.frame
            if outcome.action is oracle.Action.DROP:
                return trip, None
            frame = outcome.frame
            node = self._nodes[frame[30:34]]
        raise AssertionError(f"a packet ends: {trip}")

    def _answer(self, flow: Flow, word: str, trip: Trip, node: object) -> None:
        """The pod has the packet."""
        key = flow.client + flow.port.to_bytes(2, "big") + bytes([flow.vip.protocol])
        known = self._known.setdefault(trip.pod, set())
        udp = flow.vip.protocol is Protocol.UDP
        if key not in known and not udp and word != "SYN":
            trip.remark = "RST"
            self._reply(flow, frames.RST, trip)
            self._forget(flow)
            return
        known.add(key)
        flow.pod, flow.sent_ns, flow.closed = trip.pod, self._cluster.now_ns, False
        if word == "FIN":
            self._reply(flow, frames.FIN | frames.ACK, trip)
            self._forget(flow)
        else:
            self._reply(flow, frames.SYN | frames.ACK if word == "SYN" else frames.ACK, trip)

    def _reply(self, flow: Flow, flags: int, trip: Trip) -> None:
        """The pod's answer leaves its node as the VIP's."""
        pod = pod_address(trip.pod)[12:]
        if flow.vip.protocol is Protocol.UDP:
            l4 = frames.udp(pod, flow.client, POD_PORT, flow.port, b"answer")
        else:
            l4 = frames.tcp(pod, flow.client, POD_PORT, flow.port, flags)
        frame = frames.frame(frames.ipv4(pod, flow.client, int(flow.vip.protocol), l4))
        outcome = oracle_reply.tc(self._cluster.nodes[trip.steps[-1][0]].maps, frame, self._cluster.now_ns)
        assert outcome.verdict is Verdict.REPLY, "a pod's answer is translated"
        ip = outcome.frame[14:]
        assert packets.source(ip) == flow.vip.address[12:], "a pod's answer comes from the VIP"
        assert packets.ports(ip[20:])[0] == flow.vip.port, "a pod's answer comes from the VIP's port"

    def _is_alive(self, flow: Flow) -> bool:
        """The flow has not ended, and its pod neither: it is wanted, and its drain time is not over."""
        wanted = {pod_number(one.address) for one in flow.vip.backends}
        vips = self._cluster.snapshot().vips
        pushed = {pod_number(one.address) for vip in vips if vip.name == flow.vip.name for one in vip.backends}
        return not flow.closed and flow.pod in wanted & pushed

    def _forget(self, flow: Flow) -> None:
        key = flow.client + flow.port.to_bytes(2, "big") + bytes([flow.vip.protocol])
        for known in self._known.values():
            known.discard(key)
        flow.pod, flow.closed = 0, True

    # --- Many flows ---------------------------------------------------------------------------------------------------
    def open_flows(self) -> list[Flow]:
        """Flows that a pod has."""
        return [flow for flow in self.flows.values() if flow.pod]

    def _talk(self) -> None:
        """Every talkative flow that has been silent for long enough sends something, through whichever LB."""
        now_ns = self._cluster.now_ns
        for flow in self.open_flows() if self.talk_every_ns else ():
            if flow.talks and now_ns - flow.sent_ns >= self.talk_every_ns:
                self.send(flow, "DATA" if flow.vip.protocol is Protocol.UDP else "ACK", self.next_lb())


@cache
def _ownership(ring: tuple[Member, ...], seed: int) -> U32:
    return ownership(ring, seed)


def _frame(flow: Flow, word: str) -> bytes:
    """One packet from the client."""
    vip = flow.vip.address[12:]
    if flow.vip.protocol is Protocol.UDP:
        assert word in {"DATA", "INITIAL"}, "UDP has no flags: DATA or INITIAL"
        payload = frames.QUIC_INITIAL if word == "INITIAL" else b"hello"
        l4 = frames.udp(flow.client, vip, flow.port, flow.vip.port, payload)
    else:
        l4 = frames.tcp(flow.client, vip, flow.port, flow.vip.port, FLAGS[word])
    return frames.frame(frames.ipv4(flow.client, vip, int(flow.vip.protocol), l4))
