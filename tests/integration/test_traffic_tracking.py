"""Tracking slots on real links: three LBs whose maps are written by hand, backends behind two more nodes.

ECMP brings every packet to node 1; node 2 owns every slot, node 3 is the backup, unless a test says otherwise. So each
rule of DESIGN section 2 can be seen by itself: which LB counted what, in which order links were used, who remembers.
"""

import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest

from lbpod.core.limits import CHAIN_AGAIN_MAX
from lbpod.core.packets import Chain, Forward, Relay
from lbpod.core.verdicts import Verdict
from lbpod.datapath.port import FlowMap
from lbpod.lab import Capture, Lab, Node, Pod, start_nginx
from tests.integration.traffic import EPOCH, PREFIX, TCP, UDP, VIP, Fabric, VipEntry, address, slot_word
from tests.integration.traffic_frames import ACK, SYN, Wire, ip_of, ipv4, is_tunnel, opened, raw, tcp, tunnel
from tests.integration.traffic_hosts import TcpFlow, TcpServer, UdpServer, ask, fetch, udp_socket

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]

CLIENT = "10.76.1.2"
FAR_NS = 1 << 62


@dataclass
class Ring:
    """The lab and its five nodes by their parts."""

    fabric: Fabric
    first: Node
    owner: Node
    backup: Node
    old_pod: Pod
    new_pod: Pod

    def vip(self, port: int, protocol: int = TCP, *, client_ip: bool = False) -> tuple[VipEntry, int, int]:
        """A VIP with an old and a new backend, all slots steady on the old one: (VIP, old id, new id)."""
        vip = self.fabric.add_vip(port, protocol, client_ip=client_ip)
        old = self.fabric.add_backend(vip, self.old_pod, 7000)
        new = self.fabric.add_backend(vip, self.new_pod, 7000)
        self.fabric.set_slots(vip, slot_word(old))
        return vip, old, new


@pytest.fixture(scope="module")
def ring() -> Iterator[Ring]:
    with Lab(nodes=5) as lab, Fabric(lab, lab.nodes[:3]) as fabric:
        old, new = lab.add_pod(lab.nodes[3]), lab.add_pod(lab.nodes[4])
        with (
            TcpServer(old, 7000, "old"),
            TcpServer(new, 7000, "new"),
            UdpServer(old, 7000, "old"),
            UdpServer(new, 7000, "new"),
        ):
            first, owner, backup = fabric.lbs
            yield Ring(fabric, first, owner, backup, old, new)


@pytest.fixture(autouse=True)
def _roles(ring: Ring) -> None:
    """Every test starts with the roles of the module's text, and everybody up."""
    ring.fabric.lab.router.set_ecmp(PREFIX, [ring.first])
    ring.fabric.set_owners(ring.owner, ring.backup)
    for node in ring.fabric.lab.nodes:
        for lb in ring.fabric.lbs:
            ring.fabric.set_member(node, lb, up=True)


def test_a_new_flow_is_relayed_recorded_everywhere_and_then_served(ring: Ring) -> None:
    vip, old, new = ring.vip(80)
    ring.fabric.set_slots(vip, slot_word(new, base=old, tracking=True))
    with ring.fabric.counting() as counted:
        with TcpFlow(ring.fabric.lab.client, VIP, 80) as flow:
            assert "new" == flow.server
            assert b"x" * 10_000 == flow.echo(b"x" * 10_000)
        key = (CLIENT, flow.local_port, vip.id)
    assert {Verdict.RELAYED} == set(counted["node1"])
    assert {Verdict.CHAIN_STARTED, Verdict.PROMOTED, Verdict.RECORD_HIT} == set(counted["node2"])
    assert (1, 1) == (counted["node2"][Verdict.CHAIN_STARTED], counted["node2"][Verdict.PROMOTED])
    assert {Verdict.CHAIN_LAST: 2} == counted["node3"], "the SYN and the packet that promoted the record"
    assert {Verdict.DELIVERED, Verdict.REPLY} == set(counted["node5"])
    assert counted["node1"][Verdict.RELAYED] == sum(counted["node2"].values()) == counted["node5"][Verdict.DELIVERED]
    assert "node4" not in counted, "the old backend's node has no part in it"
    for replica in (ring.owner, ring.backup):
        fast = ring.fabric.nodes[replica.name]
        assert new == fast.flows(FlowMap.RECORDS)[key][0]
        assert key not in fast.flows(FlowMap.EMBRYONIC)
    slot = ring.fabric.slot_of(vip, CLIENT, flow.local_port)
    pending = ring.fabric.nodes["node1"].flows(FlowMap.PENDING)
    assert slot == pending[key][0], "whoever relays asks later"


def _is_syn_inside(frame: bytes) -> bool:
    return is_tunnel(frame) and opened(frame).inner[33] & (SYN | ACK) == SYN


def test_the_syn_passes_owner_and_backup_before_the_backend_sees_it(ring: Ring) -> None:
    vip, old, new = ring.vip(81)
    ring.fabric.set_slots(vip, slot_word(new, base=old, tracking=True))
    router = ring.fabric.lab.router
    with (
        Capture(router, "node2", keep=_is_syn_inside) as to_owner,
        Capture(router, "node3", keep=_is_syn_inside) as to_backup,
        Capture(router, "node5", keep=_is_syn_inside) as to_backend,
        TcpFlow(ring.fabric.lab.client, VIP, 81) as flow,
    ):
        assert "new" == flow.server
    sent = [[frame for frame in one.frames if frame.outgoing] for one in (to_owner, to_backup, to_backend)]
    assert [1, 1, 1] == [len(frames) for frames in sent], "one SYN, each link once"
    (relay,), (chain,), (forward,) = sent
    way = [ip_of(frame.data)[12:20] for frame in (relay, chain, forward)]
    stations = [raw(node.address) for node in (ring.first, ring.owner, ring.backup, ring.new_pod.node)]
    assert [one + other for one, other in pairwise(stations)] == way, "each sent by the one that got it before"
    assert Relay(EPOCH, 1, 0) == opened(relay.data).option
    assert Chain(new, EPOCH, False, (1,), (2,)) == opened(chain.data).option
    assert Forward(address(ring.new_pod.address), 7000) == opened(forward.data).option
    assert opened(relay.data).inner == opened(chain.data).inner == opened(forward.data).inner


def test_an_old_flow_stays_where_it_was_and_is_not_recorded(ring: Ring) -> None:
    vip, old, new = ring.vip(82)
    with TcpFlow(ring.fabric.lab.client, VIP, 82) as flow:
        assert "old" == flow.server
        ring.fabric.set_slots(vip, slot_word(new, base=old, tracking=True))
        with ring.fabric.counting() as counted:
            assert b"still there" == flow.echo(b"still there")
        slot = ring.fabric.slot_of(vip, CLIENT, flow.local_port)
    assert {
        "node1": {Verdict.RELAYED},
        "node2": {Verdict.OLD_TO_BASE},
        "node4": {Verdict.DELIVERED, Verdict.REPLY},
    } == {name: set(found) for name, found in counted.items()}
    key = (CLIENT, flow.local_port, vip.id)
    assert key not in ring.fabric.nodes["node2"].flows(FlowMap.RECORDS)
    assert ring.fabric.port(ring.owner).read_other_seen(vip.id)[slot] > 0, "settling must know of it"


def test_an_old_flow_whose_base_is_dead_goes_to_current(ring: Ring) -> None:
    vip, old, new = ring.vip(83)
    with TcpFlow(ring.fabric.lab.client, VIP, 83) as flow:
        ring.fabric.set_slots(vip, slot_word(new, base=old, tracking=True))
        ring.fabric.set_backend(old, vip, ring.old_pod, 7000, alive=False)
        with ring.fabric.counting() as counted, pytest.raises(ConnectionResetError):
            flow.echo(b"anybody?")
    assert {Verdict.OLD_TO_CURRENT} == set(counted["node2"])


def test_a_lease_keeps_packets_from_being_relayed_until_it_ends(ring: Ring) -> None:
    vip, old, new = ring.vip(84)
    ring.fabric.set_slots(vip, slot_word(new, base=old, tracking=True))
    with TcpFlow(ring.fabric.lab.client, VIP, 84) as flow:
        ring.fabric.put_flow(ring.first, FlowMap.CACHE, CLIENT, flow.local_port, vip, (new, 0, FAR_NS))
        with ring.fabric.counting() as leased:
            assert b"one" == flow.echo(b"one")
        ring.fabric.put_flow(ring.first, FlowMap.CACHE, CLIENT, flow.local_port, vip, (new, 0, 1))
        with ring.fabric.counting() as ended:
            assert b"two" == flow.echo(b"two")
        ring.fabric.put_flow(ring.first, FlowMap.CACHE, CLIENT, flow.local_port, vip, (new, 0, FAR_NS))
    assert {"node1": {Verdict.CACHE_HIT}, "node5": {Verdict.DELIVERED, Verdict.REPLY}} == {
        name: set(found) for name, found in leased.items()
    }
    assert {Verdict.RELAYED} == set(ended["node1"])
    deadline_ns = time.monotonic_ns() + 2_000_000_000
    key = (CLIENT, flow.local_port, vip.id)
    while key in ring.fabric.nodes["node1"].flows(FlowMap.CACHE):
        assert time.monotonic_ns() < deadline_ns, "the FIN uses the lease for the last time"
        time.sleep(0.01)


def test_the_backup_serves_while_the_owner_is_believed_down_and_tells_it_all_the_same(ring: Ring) -> None:
    vip, old, new = ring.vip(85)
    ring.fabric.set_slots(vip, slot_word(new, base=old, tracking=True))
    ring.fabric.set_member(ring.first, ring.owner, up=False)
    with ring.fabric.counting() as counted, TcpFlow(ring.fabric.lab.client, VIP, 85) as flow:
        assert "new" == flow.server
        assert b"mine" == flow.echo(b"mine")
        assert {Verdict.RELAYED} == set(counted.get("node1", {Verdict.RELAYED: 0}))
        ring.fabric.set_member(ring.first, ring.owner, up=True)
        with ring.fabric.counting() as after:
            assert b"yours" == flow.echo(b"yours"), "a wrong belief is harmless: the owner knows the flow"
    assert (1, 1) == (counted["node3"][Verdict.CHAIN_STARTED], counted["node3"][Verdict.PROMOTED])
    assert 2 == counted["node2"][Verdict.CHAIN_LAST]
    assert {"node1": {Verdict.RELAYED}, "node2": {Verdict.RECORD_HIT}, "node5": {Verdict.DELIVERED, Verdict.REPLY}} == {
        name: set(found) for name, found in after.items()
    }


def test_what_not_every_replica_can_be_told_goes_where_it_would_look(ring: Ring) -> None:
    """The owner is believed down, wrongly: its agent was killed, say. It knows nothing of what is new meanwhile."""
    vip, old, new = ring.vip(86)
    ring.fabric.set_slots(vip, slot_word(new, base=old, tracking=True))
    for at in (ring.first, ring.backup):
        ring.fabric.set_member(at, ring.owner, up=False)
    with ring.fabric.counting() as counted, TcpFlow(ring.fabric.lab.client, VIP, 86) as flow:
        assert "old" == flow.server
    assert 1 == counted["node3"][Verdict.FIRST_ALONE]
    assert "node2" not in counted
    with TcpFlow(ring.fabric.lab.client, VIP, 86) as flow, ring.fabric.counting() as counted:
        ring.fabric.lab.router.set_ecmp(PREFIX, [ring.owner])
        assert b"and now through the owner" == flow.echo(b"and now through the owner")
    assert {"node2": {Verdict.OLD_TO_BASE}, "node4": {Verdict.DELIVERED, Verdict.REPLY}} == {
        name: set(found) for name, found in counted.items()
    }


def test_without_any_replica_the_first_lb_decides_alone(ring: Ring) -> None:
    vip, old, new = ring.vip(87)
    with TcpFlow(ring.fabric.lab.client, VIP, 87) as before:
        ring.fabric.set_slots(vip, slot_word(new, base=old, tracking=True))
        for lb in (ring.owner, ring.backup):
            ring.fabric.set_member(ring.first, lb, up=False)
        with ring.fabric.counting() as counted:
            assert b"old flow" == before.echo(b"old flow"), "to base"
            with TcpFlow(ring.fabric.lab.client, VIP, 87) as begun:
                assert "old" == begun.server, "where its next packets will be looked for, whoever gets them"
                assert b"new flow" == begun.echo(b"new flow")
    assert {"node1": {Verdict.DECIDED_ALONE}, "node4": {Verdict.DELIVERED, Verdict.REPLY}} == {
        name: set(found) for name, found in counted.items()
    }


def test_a_packet_relayed_three_times_is_decided_where_it_is(ring: Ring) -> None:
    vip, old, new = ring.vip(88)
    ring.fabric.set_slots(vip, slot_word(new, base=old, tracking=True))
    inner = ipv4(CLIENT, VIP, TCP, tcp(CLIENT, 50_000, VIP, 88, ACK, b"astray"))
    for hops, expected in ((2, Verdict.RELAYED), (3, Verdict.DECIDED_ALONE)):
        with Wire(ring.fabric.lab.router, ring.first) as wire, ring.fabric.counting() as counted:
            wire.send(tunnel(ring.backup.address, ring.first.address, Relay(EPOCH, hops, 2), inner))
        assert 1 == counted["node1"][expected]


def test_a_full_record_wins_over_a_chain_which_turns_back(ring: Ring) -> None:
    """SYN, and the RST of a client that knows of no connection: the owner says new, the backup knows better."""
    vip, old, new = ring.vip(89)
    ring.fabric.set_slots(vip, slot_word(new, base=old, tracking=True))
    ring.fabric.put_flow(ring.backup, FlowMap.RECORDS, CLIENT, 45_678, vip, (old, 0, FAR_NS))
    with Wire(ring.fabric.lab.router, ring.first) as wire, ring.fabric.counting() as counted:
        wire.send(ipv4(CLIENT, VIP, TCP, tcp(CLIENT, 45_678, VIP, 89, SYN)))
    assert {
        "node1": {Verdict.RELAYED: 2},
        "node2": {Verdict.CHAIN_STARTED: 1, Verdict.CHAIN_LAST: 1, Verdict.RECORD_HIT: 1},
        "node3": {Verdict.CHAIN_CONFLICT: 1},
        "node4": {Verdict.DELIVERED: 2, Verdict.REPLY: 1},
    } == counted
    assert old == ring.fabric.nodes["node2"].flows(FlowMap.RECORDS)[CLIENT, 45_678, vip.id][0]


def test_a_backend_on_a_replicas_own_node_is_reached_through_the_chain_all_the_same(ring: Ring) -> None:
    vip, old, _ = ring.vip(90)
    pod = ring.fabric.lab.add_pod(ring.owner)
    local = ring.fabric.add_backend(vip, pod, 7000)
    ring.fabric.set_slots(vip, slot_word(local, base=old, tracking=True))
    with (
        TcpServer(pod, 7000, "local"),
        ring.fabric.counting() as counted,
        TcpFlow(ring.fabric.lab.client, VIP, 90) as flow,
    ):
        assert "local" == flow.server
        assert b"x" * 5_000 == flow.echo(b"x" * 5_000)
    assert {Verdict.RELAYED} == set(counted["node1"])
    assert {Verdict.CHAIN_LAST: 2} == counted["node3"]
    assert {Verdict.CHAIN_STARTED, Verdict.PROMOTED, Verdict.DELIVERED, Verdict.LOCAL, Verdict.REPLY} == set(
        counted["node2"]
    )


def test_with_client_ip_affinity_all_connections_of_a_client_stay_together(ring: Ring) -> None:
    """The flow is the client, so its next SYN begins nothing: it goes where its older connections are."""
    vip, old, new = ring.vip(91, client_ip=True)
    client = ring.fabric.lab.client
    with TcpFlow(client, VIP, 91) as first:
        ring.fabric.set_slots(vip, slot_word(new, base=old, tracking=True))
        with ring.fabric.counting() as counted, TcpFlow(client, VIP, 91) as second:
            assert ("old", "old") == (first.server, second.server)
            assert b"first" == first.echo(b"first")
        assert old == ring.fabric.nodes["node2"].flows(FlowMap.RECORDS)[CLIENT, 0, vip.id][0]
        ring.fabric.set_slots(vip, slot_word(new, base=new, tracking=True))
        with TcpFlow(client, VIP, 91) as third:
            assert "old" == third.server, "rebased: the client's record decides, whatever its port"
        assert b"first" == first.echo(b"first")
    assert {Verdict.CHAIN_STARTED, Verdict.RECORD_HIT} == set(counted["node2"])
    assert {Verdict.CHAIN_LAST: 1 + CHAIN_AGAIN_MAX} == counted["node3"]


def test_an_unknown_udp_flow_goes_to_base_and_is_recorded_through_the_chain(ring: Ring) -> None:
    vip, old, new = ring.vip(92, UDP)
    ring.fabric.set_slots(vip, slot_word(new, base=old, tracking=True))
    quic_initial = b"\xc0\x00\x00\x00\x01" + bytes(20)
    with udp_socket(ring.fabric.lab.client) as one, udp_socket(ring.fabric.lab.client) as two:
        with ring.fabric.counting() as counted:
            assert b"old 1" == ask(one, VIP, 92, b"1")[0]
            assert b"old 2" == ask(one, VIP, 92, b"2")[0]
        with ring.fabric.counting() as quic:
            assert b"new " + quic_initial == ask(two, VIP, 92, quic_initial)[0]
            assert b"new then" == ask(two, VIP, 92, b"then")[0]
    for found, backend in ((counted, "node4"), (quic, "node5")):
        assert {Verdict.RELAYED: 2} == found["node1"]
        assert {Verdict.CHAIN_STARTED: 1, Verdict.RECORD_HIT: 1} == found["node2"]
        assert {Verdict.CHAIN_LAST: 2} == found["node3"], "its first few packets all travel the chain"
        assert {Verdict.DELIVERED: 2, Verdict.REPLY: 2} == found[backend]


def test_a_routers_error_finds_the_pod_through_the_owner(ring: Ring) -> None:
    """The flow is recorded at the replicas alone; the error arrives at an LB that does not know it."""
    lab, vip = ring.fabric.lab, ring.fabric.add_vip(93)
    web = start_nginx(lab, ring.new_pod)
    old, new = ring.fabric.add_backend(vip, ring.old_pod, 7000), ring.fabric.add_backend(vip, ring.new_pod, web.port)
    ring.fabric.set_slots(vip, slot_word(new, base=old, tracking=True))
    lab.router.run(["ip", "link", "set", "client1", "mtu", "1300"])
    try:
        with ring.fabric.counting() as counted:
            assert bytes(range(256)) * 4096 == fetch(lab.client, VIP, 93, "/file")
        learned = ring.new_pod.run(["ip", "route", "get", CLIENT]).stdout
    finally:
        lab.router.run(["ip", "link", "set", "client1", "mtu", "1500"])
    assert counted["node1"][Verdict.ICMP_ERROR] == counted["node2"][Verdict.ICMP_ERROR] >= 1
    assert "mtu 1300" in learned


def _shuffle(ring: Ring, ending: threading.Event) -> None:
    rng = random.Random(7)
    while not ending.wait(0.01):
        ring.fabric.lab.router.reshuffle(PREFIX, rng, weight_max=3)


def test_nothing_breaks_while_backends_change_and_paths_are_shuffled(ring: Ring) -> None:
    """By hand what a controller does: prepare everywhere, commit one LB after the other, packets arriving anywhere."""
    fabric, lab = ring.fabric, ring.fabric.lab
    vip, old, new = ring.vip(94)
    fabric.spread_owners()
    lab.router.set_ecmp(PREFIX, fabric.lbs)
    before = [TcpFlow(lab.client, VIP, 94) for _ in range(60)]
    ending = threading.Event()
    shuffling = threading.Thread(target=_shuffle, args=(ring, ending))
    shuffling.start()
    during: list[TcpFlow] = []
    try:
        with fabric.counting() as counted:
            fabric.set_slots(vip, slot_word(old, base=old, tracking=True))
            for lb in fabric.lbs:
                fabric.set_slots(vip, slot_word(new, base=old, tracking=True), at=[lb])
                during += [TcpFlow(lab.client, VIP, 94) for _ in range(20)]
                for flow in before + during:
                    assert b"z" * 3_000 == flow.echo(b"z" * 3_000)
            after = [TcpFlow(lab.client, VIP, 94) for _ in range(20)]
            for flow in [*before, *during, *after]:
                assert b"end" == flow.echo(b"end")
    finally:
        ending.set()
        shuffling.join()
        for flow in [*before, *during]:
            flow.socket.close()
    assert {"old"} == {flow.server for flow in before}
    assert {"new"} == {flow.server for flow in after}
    assert {"old", "new"} == {flow.server for flow in during}
    for flow in after:
        flow.socket.close()
    for name in ("node1", "node2", "node3"):
        assert {Verdict.RELAYED, Verdict.RECORD_HIT, Verdict.OLD_TO_BASE, Verdict.CHAIN_STARTED} <= set(counted[name])
