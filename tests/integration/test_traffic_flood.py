"""Clients that nobody is: whoever makes up addresses takes no room from a connection that has long been silent."""

import os

import pytest

from lbpod.core.verdicts import Verdict
from lbpod.datapath.port import NatMap
from tests.bpf.datapaths import whole_nat
from tests.bpf.frames import ACK, SYN
from tests.integration import traffic_frames as frames
from tests.integration.traffic import TCP, UDP, VIP, Fabric, slot_word
from tests.integration.traffic_hosts import TcpFlow, TcpServer, UdpServer

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]

FLOOD_PACKETS = 40_000
"""More than twice what each map of translated flows has room for here (traffic.SIZES)."""


def made_up(number: int) -> tuple[str, int]:
    """An address of the range that is kept for benchmarks (RFC 2544), and a port."""
    return f"198.18.{number >> 8 & 255}.{number & 255}", 1024 + number % 60_000


@pytest.mark.parametrize(
    ("vip_port", "kind", "flags"), [(100, TCP, SYN), (101, TCP, ACK), (102, UDP, 0)], ids=["SYN", "ACK", "UDP"]
)
def test_a_silent_connection_outlives_a_flood_to_its_own_pod(
    fabric: Fabric, vip_port: int, kind: int, flags: int
) -> None:
    """And its server is the first to speak again: nothing of the client's brings its entry back."""
    node, port = fabric.lab.nodes[1], 7000
    pod = fabric.lab.add_pod(node)
    flooded = fabric.add_vip(vip_port, kind)
    silent = fabric.add_vip(vip_port) if kind == UDP else flooded
    for vip in {silent.id: silent, flooded.id: flooded}.values():
        fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, port)))
    with TcpServer(pod, port) as server, UdpServer(pod, port), TcpFlow(fabric.lab.client, VIP, silent.port) as flow:
        assert b"now be silent" == flow.echo(b"now be silent")
        with fabric.counting() as counted, frames.Wire(fabric.lab.router, fabric.lab.nodes[0]) as wire:
            for number in range(FLOOD_PACKETS):
                source, sport = made_up(number)
                if kind == UDP:
                    l4 = frames.udp(source, sport, VIP, flooded.port, b"?")
                else:
                    l4 = frames.tcp(source, sport, VIP, flooded.port, flags)
                wire.send(frames.ipv4(source, VIP, kind, l4))
        assert counted[node.name][Verdict.DELIVERED] > FLOOD_PACKETS // 2, "the flood reaches the pod"
        datapath = fabric.port(node)
        assert len(whole_nat(datapath, NatMap.UNASSURED)[0]) >= datapath.nat_room(NatMap.UNASSURED), "it fills the map"
        assert len(whole_nat(datapath, NatMap.NAT)[0]) < 100, "and only that one"
        server.say(b"news")
        assert b"news" == flow.socket.recv(4)
        assert b"and on" == flow.echo(b"and on")
