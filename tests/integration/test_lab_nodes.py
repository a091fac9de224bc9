"""Nodes that are lost and others that come: what the chaos run does to machines, one thing at a time."""

import os
import socket
from collections.abc import Iterator

import pytest

from lbpod.lab import Capture, Lab, Node, kernel as lab_kernel, start_nginx
from lbpod.lab.checksums import frame_payload

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]

VIP = "203.0.113.10"
PREFIX = f"{VIP}/32"
UDP = 17
ICMP = 1
ETH_IP = 0x0800


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(nodes=3) as lab:
        lab.router.set_ecmp(PREFIX, lab.nodes)
        yield lab


def _paths(lab: Lab) -> set[str]:
    """Names of the nodes that flows to the VIP are sent to."""
    hops = [lab.router.next_hop(lab.client, port, VIP, 80, UDP) for port in range(20_000, 20_040)]
    return {hop.name for hop in hops if hop is not None}


def _reaches(lab: Lab, node: Node) -> bool:
    ping = ["ping", "-c", "1", "-W", "0.3", node.address]
    return lab.client.run(ping, check=False).returncode == 0


def _reaches_soon(lab: Lab, node: Node) -> bool:
    """Neighbours that have given it up first ask for its address again."""
    return any(_reaches(lab, node) for _ in range(20))


def test_a_router_that_believes_dead_links_sends_into_them_until_it_is_told(lab: Lab) -> None:
    lab.router.believe_dead_links()
    lab.cut(lab.nodes[1])
    assert {"node1", "node2", "node3"} == _paths(lab)
    said = lab.client.run(["ping", "-c", "2", "-i", "0.1", "-W", "1", lab.nodes[1].address], check=False).stdout
    assert "100% packet loss" in said
    assert "nreachable" not in said, "behind a switch nobody would say so"
    lab.router.set_ecmp(PREFIX, [lab.nodes[0], lab.nodes[2]])
    assert {"node1", "node3"} == _paths(lab)


def test_a_severed_node_hears_and_says_nothing_with_all_links_up(lab: Lab) -> None:
    node = lab.nodes[1]
    assert _reaches(lab, node)
    lab.sever(node)
    assert not _reaches(lab, node)
    assert "LOWER_UP" in node.run(["ip", "link", "show", "eth0"]).stdout
    assert {"node1", "node2", "node3"} == _paths(lab), "the router notices nothing"
    lab.mend(node)
    assert _reaches_soon(lab, node)


def _hears(lab: Lab, listener: Node, sender: Node) -> bool:
    """A ping of the sender's comes to the listener, whether or not its answer comes back."""
    with Capture(listener, keep=lambda frame: _is_ping_of(frame, sender)) as capture:
        sender.run(["ping", "-c", "1", "-W", "0.3", listener.address], check=False)
    return bool(capture.frames)


def _is_ping_of(frame: bytes, sender: Node) -> bool:
    kind, packet = frame_payload(frame)
    return kind == ETH_IP and packet[9] == ICMP and packet[12:16] == socket.inet_aton(sender.address)


def test_two_nodes_that_are_parted_lose_what_the_one_sends_and_nothing_else(lab: Lab) -> None:
    one, other, third = lab.nodes
    lab.part(one, other)
    assert not _hears(lab, other, one)
    assert _hears(lab, one, other), "only one way is cut"
    assert _hears(lab, third, one)
    assert _hears(lab, other, third)
    assert {True} == {_reaches(lab, node) for node in (one, other)}, "clients reach both"
    said = one.run(["ping", "-c", "1", "-W", "0.3", other.address], check=False).stdout
    assert "nreachable" not in said, "nobody is told"
    lab.rejoin(one, other)
    assert _hears(lab, other, one)


def test_nodes_are_rejoined_though_one_of_them_has_been_removed(lab: Lab) -> None:
    one, other, third = lab.nodes
    lab.router.set_ecmp(PREFIX, [other, third])
    lab.part(one, other)
    lab.part(other, one)
    lab.remove_node(one)
    lab.rejoin(one, other)
    lab.rejoin(other, one)
    rules = lab.router.run(["ip", "rule", "show"]).stdout
    assert "blackhole" not in rules


def test_a_node_burns_and_another_comes_under_another_name(lab: Lab) -> None:
    burned = lab.nodes[2]
    pod = lab.add_pod(burned)
    server = start_nginx(lab, pod)
    pins = lab.pin_dir(burned)
    lab.router.set_ecmp(PREFIX, lab.nodes[:2])
    lab.remove_node(burned)
    assert not server.program.alive
    assert not pins.exists()
    assert not (lab_kernel.NETNS_DIR / burned.netns).exists()
    assert not (lab_kernel.NETNS_DIR / pod.netns).exists()
    assert ["node1", "node2"] == [node.name for node in lab.nodes]
    lab.remove_node(burned)  # once more does no harm
    new = lab.add_node()
    assert "node4" == new.name
    assert _reaches(lab, new)
    lab.router.set_ecmp(PREFIX, lab.nodes)
    assert {"node1", "node2", "node4"} == _paths(lab)
