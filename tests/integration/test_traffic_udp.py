"""UDP and echo through the fast path: answers from the VIP, no checksum stays no checksum, fragments are dropped."""

import os

import pytest

from lbpod.core.verdicts import Verdict
from lbpod.lab import Capture
from lbpod.lab.checksums import frame_faults, frame_payload
from tests.integration.traffic import UDP, VIP, Fabric, slot_word
from tests.integration.traffic_frames import is_icmp
from tests.integration.traffic_hosts import UdpServer, ask, udp_socket

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]


@pytest.mark.parametrize(("number", "port"), [(0, 53), (1, 54)])
def test_a_datagram_is_answered_from_the_vip(fabric: Fabric, number: int, port: int) -> None:
    """0: a backend on the LB's own node, 1: behind another one."""
    vip = fabric.add_vip(port, UDP)
    pod = fabric.lab.add_pod(fabric.lab.nodes[number])
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, 9000)))
    with UdpServer(pod, 9000) as server, udp_socket(fabric.lab.client) as client, fabric.counting() as counted:
        answer = ask(client, VIP, port, b"question")
        assert (f"{server.name} question".encode(), (VIP, port)) == answer
        assert [(fabric.lab.client.address, client.getsockname()[1])] == server.peers
    there = {"node1": {Verdict.STEADY: 1}, "node2": {Verdict.DELIVERED: 1, Verdict.REPLY: 1}}
    assert ({"node1": {Verdict.LOCAL: 1, Verdict.REPLY: 1}} if number == 0 else there) == counted


def test_datagrams_of_every_size_that_fits_come_back(fabric: Fabric) -> None:
    vip = fabric.add_vip(55, UDP)
    pod = fabric.lab.add_pod(fabric.lab.nodes[1])
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, 9000)))
    with UdpServer(pod, 9000, "u") as server, udp_socket(fabric.lab.client) as client:
        for size in (0, 1, 2, 17, 63, 64, 65, 511, 512, 1469, 1470):  # 1470 + "u ": 1500 bytes with headers
            data = os.urandom(size)
            assert f"{server.name} ".encode() + data == ask(client, VIP, 55, data)[0]


def test_a_socket_at_a_pods_port_is_one_vips_while_it_is_used(fabric: Fabric) -> None:
    """From which VIP the pod's answers come must not depend on who has asked last."""
    node = fabric.lab.nodes[1]
    pod = fabric.lab.add_pod(node)
    for port in (62, 63):
        vip = fabric.add_vip(port, UDP)
        fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, 9000)))
    with UdpServer(pod, 9000, "u") as server, udp_socket(fabric.lab.client) as client:
        assert (b"u first", (VIP, 62)) == ask(client, VIP, 62, b"first")
        with fabric.counting() as counted:
            client.sendto(b"another's", (VIP, 63))
        assert {Verdict.DROP_NAT_TAKEN: 1} == counted[node.name]
        assert (b"u again", (VIP, 62)) == ask(client, VIP, 62, b"again")
        assert 2 == len(server.peers)


def _is_udp(frame: bytes) -> bool:
    kind, packet = frame_payload(frame)
    return kind == 0x0800 and packet[9] == UDP


def _udp_checksum(frame: bytes) -> int:
    return int.from_bytes(frame_payload(frame)[1][26:28])


@pytest.mark.parametrize(("number", "port"), [(0, 56), (1, 57)])
def test_a_datagram_without_checksum_stays_without(fabric: Fabric, number: int, port: int) -> None:
    """RFC 768: 0 means that the sender made none. Neither way may the translation invent one."""
    vip = fabric.add_vip(port, UDP)
    pod = fabric.lab.add_pod(fabric.lab.nodes[number])
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, 9000)))
    with (
        UdpServer(pod, 9000, "u", checksums=False),
        udp_socket(fabric.lab.client, checksums=False) as client,
        Capture(pod, keep=_is_udp) as at_pod,
        Capture(fabric.lab.client, keep=_is_udp) as at_client,
    ):
        assert b"u bare" == ask(client, VIP, port, b"bare")[0]
        at_pod.wait_for(_is_udp, count=2)
        at_client.wait_for(_is_udp, count=2)
    for frame in at_pod.frames + at_client.frames:
        assert 0 == _udp_checksum(frame.data)
        assert [] == frame_faults(frame.data)


def test_later_fragments_are_dropped_and_counted(fabric: Fabric) -> None:
    vip = fabric.add_vip(58, UDP)
    pod = fabric.lab.add_pod(fabric.lab.nodes[1])
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, 9000)))
    with UdpServer(pod, 9000) as server, udp_socket(fabric.lab.client) as client, fabric.counting() as counted:
        client.sendto(bytes(4000), (VIP, 58))
    assert [] == server.peers
    assert {Verdict.STEADY: 1, Verdict.DROP_FRAGMENT: 2} == counted["node1"]
    assert {Verdict.DELIVERED: 1} == counted["node2"]


def test_the_vip_answers_echo(fabric: Fabric) -> None:
    fabric.add_vip(59, UDP)
    with Capture(fabric.lab.client, keep=is_icmp) as capture, fabric.counting() as counted:
        for size in ("0", "56", "1472"):
            fabric.lab.client.run(["ping", "-c", "3", "-i", "0.01", "-W", "2", "-s", size, "-M", "do", VIP])
    assert {"node1": {Verdict.ICMP_ECHO: 9}} == counted
    assert 18 == len(capture.frames)
    assert [] == [fault for frame in capture.frames for fault in frame_faults(frame.data)]
    answers = [frame_payload(frame.data)[1] for frame in capture.frames if not frame.outgoing]
    assert {63} == {packet[8] for packet in answers}, "64 at the node, one less behind the router"


def test_a_port_without_vip_is_left_to_the_node(fabric: Fabric) -> None:
    fabric.add_vip(60, UDP)
    with udp_socket(fabric.lab.client) as client, fabric.counting() as counted:
        client.sendto(b"?", (VIP, 61))
    assert {} == counted, "it is neither ours nor dropped by us; the node has no route for it"
