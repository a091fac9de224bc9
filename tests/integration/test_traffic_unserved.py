"""A port of a VIP that nobody serves: the packet ends at the first load balancer, and crosses no link twice."""

import os
from collections.abc import Iterator

import pytest

from lbpod.core.verdicts import Verdict
from lbpod.lab import Capture, Node
from lbpod.lab.checksums import frame_payload
from tests.integration.traffic import PREFIX, UDP, VIP, Fabric, address, slot_word
from tests.integration.traffic_hosts import UdpServer, ask, udp_socket

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]


def _is_to_vip(frame: bytes) -> bool:
    kind, packet = frame_payload(frame)
    return kind == 0x0800 and packet[16:20] == address(VIP)[12:]


@pytest.fixture
def node(fabric: Fabric) -> Iterator[Node]:
    """An LB's node that sends back to the router what it does not serve, as any node does that forwards: the lab's own
    blackhole is away."""
    there = fabric.lab.nodes[0]
    there.run(["ip", "route", "del", "blackhole", PREFIX])
    yield there
    there.run(["ip", "route", "replace", "blackhole", PREFIX])


def test_a_packet_to_a_port_that_nobody_serves_ends_at_the_first_lb(fabric: Fabric, node: Node) -> None:
    fabric.add_vip(90)
    with (
        Capture(fabric.lab.router, node.router_interface, keep=_is_to_vip) as link,
        udp_socket(fabric.lab.client) as client,
        fabric.counting() as counted,
    ):
        for _ in range(3):
            client.sendto(b"?", (VIP, 91))
        link.wait_for(_is_to_vip, count=3)
    assert {node.name: {Verdict.DROP_UNSERVED: 3}} == counted
    assert [True] * 3 == [frame.outgoing for frame in link.frames], "they came to the node, and never left it"


def test_without_that_it_goes_round_until_its_ttl_is_used_up(fabric: Fabric, node: Node) -> None:
    """What the test above guards against, and what proves that it could fail."""
    node.run(["tc", "qdisc", "del", "dev", "eth0", "clsact"])
    try:
        with (
            Capture(fabric.lab.router, node.router_interface, keep=_is_to_vip) as link,
            udp_socket(fabric.lab.client) as client,
        ):
            client.sendto(b"?", (VIP, 91))
            assert len(link.wait_for(_is_to_vip, count=60)) >= 60
    finally:
        fabric.replace_programs(node)


def test_what_is_served_still_is_and_a_pod_reaches_a_vip_through_the_router(fabric: Fabric, node: Node) -> None:
    """What a pod sends has come in by no uplink, so it may leave."""
    served = fabric.lab.add_pod(fabric.lab.nodes[1])
    vip = fabric.add_vip(92, UDP)
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, served, 9000)))
    asking = fabric.lab.add_pod(node)
    with UdpServer(served, 9000, "u"), udp_socket(fabric.lab.client) as client, udp_socket(asking) as pods:
        assert b"u client" == ask(client, VIP, 92, b"client")[0]
        with fabric.counting() as counted:
            pods.sendto(b"pod", (VIP, 92))
    assert 1 == counted[node.name][Verdict.STEADY], "to the router, and back to its load balancer"
    assert Verdict.DROP_UNSERVED not in counted[node.name]
