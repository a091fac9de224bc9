"""What no kernel would send, put on the wire by hand: never a crash, never delivered, each counted by its own verdict.

The thousands of random frames are compared with the oracle elsewhere; here a chosen few pass the whole road (driver,
program, stack) and must leave no trace at any server, while ordinary traffic goes on.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from lbpod.core.packets import Chain, Forward, Relay
from lbpod.core.verdicts import Verdict
from lbpod.lab import Capture, Node, Pod
from lbpod.lab.checksums import frame_payload
from tests.integration.traffic import TCP, UDP, VIP, VNI, Fabric, address, slot_word
from tests.integration.traffic_frames import ACK, GENEVE_PORT, SYN, Wire, icmp, ipv4, is_ip, tcp, tunnel, udp
from tests.integration.traffic_hosts import TcpFlow, TcpServer, udp_socket

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]

CLIENT, PORT = "10.76.1.2", 40_000
LB, HOST = "10.77.1.2", "10.77.2.2"
"""The only LB; a node that has the backend."""


@dataclass
class Scene:
    fabric: Fabric
    pod: Pod
    server: TcpServer


@pytest.fixture(scope="module")
def scene(fabric: Fabric) -> Iterator[Scene]:
    """A TCP and a UDP VIP on port 80, with a pod behind node 2."""
    pod = fabric.lab.add_pod(fabric.lab.nodes[1])
    for protocol in (TCP, UDP):
        vip = fabric.add_vip(80, protocol)
        fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, 7000)))
    with TcpServer(pod, 7000) as server:
        yield Scene(fabric, pod, server)


def _to_vip(flags: int = ACK, data: bytes = b"", *, words: int = 5) -> bytes:
    return tcp(CLIENT, PORT, VIP, 80, flags, data, words=words)


def _inner() -> bytes:
    return ipv4(CLIENT, VIP, TCP, _to_vip(SYN))


def _forward() -> Forward:
    return Forward(address("10.78.2.1"), 7000)


def _quoting(packet: bytes) -> bytes:
    return ipv4(LB, VIP, 1, icmp(3, 4, 1400, packet))


TO_THE_LB: dict[str, tuple[Callable[[], bytes], Verdict]] = {
    "IP options": (lambda: ipv4(CLIENT, VIP, TCP, _to_vip(), options=b"\x01" * 4), Verdict.DROP_IP_OPTIONS),
    "header of four words": (lambda: ipv4(CLIENT, VIP, TCP, _to_vip(), words=4), Verdict.DROP_MALFORMED),
    "longer than the frame": (lambda: ipv4(CLIENT, VIP, TCP, _to_vip(), total=200), Verdict.DROP_MALFORMED),
    "shorter than its header": (lambda: ipv4(CLIENT, VIP, TCP, _to_vip(), total=19), Verdict.DROP_MALFORMED),
    "half a TCP header": (lambda: ipv4(CLIENT, VIP, TCP, _to_vip()[:12]), Verdict.DROP_MALFORMED),
    "TCP data offset of four": (lambda: ipv4(CLIENT, VIP, TCP, _to_vip(words=4)), Verdict.DROP_MALFORMED),
    "TCP data offset past the end": (lambda: ipv4(CLIENT, VIP, TCP, _to_vip(words=15)), Verdict.DROP_MALFORMED),
    "half a UDP header": (lambda: ipv4(CLIENT, VIP, UDP, udp(CLIENT, PORT, VIP, 80)[:4]), Verdict.DROP_MALFORMED),
    "a later fragment": (lambda: ipv4(CLIENT, VIP, TCP, _to_vip(), fragment=0x0010), Verdict.DROP_FRAGMENT),
    "ICMP of no use": (lambda: ipv4(CLIENT, VIP, 1, icmp(13, 0, 0, bytes(12))), Verdict.DROP_ICMP),
    "ICMP error about nothing": (lambda: _quoting(b""), Verdict.DROP_ICMP),
    "ICMP error about another's packet": (
        lambda: _quoting(ipv4("10.78.2.1", CLIENT, TCP, bytes(20))),
        Verdict.DROP_ICMP,
    ),
}

TO_THE_HOST: dict[str, tuple[Callable[[], bytes], Verdict]] = {
    "from a stranger": (lambda: tunnel("10.76.1.2", HOST, _forward(), _inner()), Verdict.DROP_GENEVE_SOURCE),
    "from a node that is no LB": (lambda: tunnel("10.77.3.2", HOST, _forward(), _inner()), Verdict.DROP_GENEVE_SOURCE),
    "of an LB with another VNI": (
        lambda: tunnel(LB, HOST, _forward(), _inner(), vni=VNI ^ 1),
        Verdict.DROP_GENEVE_VNI,
    ),
    "truncated behind Geneve's header": (
        lambda: _cut(tunnel(LB, HOST, _forward(), _inner()), 36),
        Verdict.DROP_GENEVE_MALFORMED,
    ),
    "truncated within the option": (
        lambda: _cut(tunnel(LB, HOST, _forward(), _inner()), 50),
        Verdict.DROP_GENEVE_MALFORMED,
    ),
    "UDP length too large": (
        lambda: _patched(tunnel(LB, HOST, _forward(), _inner()), 24, b"\x05\x00"),
        Verdict.DROP_GENEVE_MALFORMED,
    ),
    "Geneve version 1": (
        lambda: _patched(tunnel(LB, HOST, _forward(), _inner()), 28, b"\x46"),
        Verdict.DROP_GENEVE_MALFORMED,
    ),
    "Geneve control packet": (
        lambda: _patched(tunnel(LB, HOST, _forward(), _inner()), 29, b"\xc0"),
        Verdict.DROP_GENEVE_MALFORMED,
    ),
    "another option class": (
        lambda: _patched(tunnel(LB, HOST, _forward(), _inner()), 36, b"\x01\x02"),
        Verdict.DROP_GENEVE_MALFORMED,
    ),
    "an IPv6 pod": (
        lambda: tunnel(LB, HOST, Forward(b"\xfd" + bytes(15), 7000), _inner()),
        Verdict.DROP_GENEVE_MALFORMED,
    ),
    "a chain of more members than places": (
        lambda: _patched(tunnel(LB, HOST, Chain(1, 1, True, (0,), (1,)), _inner()), 48, b"\x06"),
        Verdict.DROP_GENEVE_MALFORMED,
    ),
    "no VIP inside": (
        lambda: tunnel(LB, HOST, _forward(), ipv4(CLIENT, "203.0.113.99", TCP, _to_vip(SYN))),
        Verdict.DROP_GENEVE_INNER,
    ),
    "a pod's own address inside": (
        lambda: tunnel(LB, HOST, _forward(), ipv4(CLIENT, "10.78.2.1", TCP, _to_vip(SYN))),
        Verdict.DROP_GENEVE_INNER,
    ),
    "IP options inside": (
        lambda: tunnel(LB, HOST, _forward(), ipv4(CLIENT, VIP, TCP, _to_vip(SYN), options=b"\x01" * 4)),
        Verdict.DROP_GENEVE_INNER,
    ),
    "an inner packet longer than the outer one": (
        lambda: tunnel(LB, HOST, _forward(), ipv4(CLIENT, VIP, TCP, _to_vip(SYN), total=60)),
        Verdict.DROP_GENEVE_INNER,
    ),
    "nothing inside": (lambda: tunnel(LB, HOST, _forward(), b""), Verdict.DROP_GENEVE_INNER),
    "a relay to a node that is no LB": (
        lambda: tunnel(LB, HOST, Relay(1, 1, 0), _inner()),
        Verdict.DROP_GENEVE_INNER,
    ),
    "a chain to a node that is no LB": (
        lambda: tunnel(LB, HOST, Chain(1, 1, True, (0,), (1,)), _inner()),
        Verdict.DROP_GENEVE_INNER,
    ),
}

STRANGER = "10.76.1.2"
OVN: bytes = bytes.fromhex("02006558 00000500 0102800100010002") + bytes(range(60))
"""As OVN sends it: VNI 5, an option of class 0x0102 with ports in it, and an Ethernet frame."""

ANOTHERS: dict[str, Callable[[], bytes]] = {
    "of OVN, from a node that is an LB": lambda: _geneve(LB, OVN),
    "of OVN, from any other": lambda: _geneve(STRANGER, OVN),
    "Ethernet inside, and our VNI": lambda: _patched(tunnel(LB, HOST, _forward(), _inner()), 30, b"\x65\x58"),
    "IPv4 inside, another VNI": lambda: _geneve(LB, bytes.fromhex("00000800 00000500") + _inner()),
    "of another cluster": lambda: tunnel(STRANGER, HOST, _forward(), _inner(), vni=VNI ^ 1),
    "less than a Geneve header": lambda: _geneve(LB, OVN[:6]),
    "nothing but UDP": lambda: _geneve(LB, b""),
}


def _geneve(source: str, payload: bytes) -> bytes:
    return ipv4(source, HOST, UDP, udp(source, 55_555, HOST, GENEVE_PORT, payload))


def _cut(packet: bytes, length: int) -> bytes:
    """The packet ends here, and its outer headers agree with that."""
    head = _patched(packet[:length], 2, length.to_bytes(2))
    return _patched(head, 24, (length - 20).to_bytes(2))


def _patched(packet: bytes, at: int, new: bytes) -> bytes:
    return packet[:at] + new + packet[at + len(new) :]


def _meets(scene: Scene, node: Node, packet: bytes, verdict: Verdict, *, ethertype: int = 0x0800) -> None:
    """The packet is counted by this verdict alone, and nobody hears of it: neither pod nor client nor router."""
    lab = scene.fabric.lab
    with (
        Wire(lab.router, node) as wire,
        Capture(scene.pod, keep=is_ip) as at_pod,
        Capture(lab.client, keep=is_ip) as at_client,
        Capture(lab.router, node.router_interface, keep=is_ip) as at_router,
        scene.fabric.counting() as counted,
    ):
        wire.send(packet, ethertype=ethertype)
    assert {node.name: {verdict: 1}} == counted
    assert [] == at_pod.frames
    assert [] == at_client.frames
    assert [] == [frame for frame in at_router.frames if not frame.outgoing]


@pytest.mark.parametrize("name", TO_THE_LB)
def test_an_odd_packet_to_a_vip_is_dropped_by_its_own_verdict(scene: Scene, name: str) -> None:
    make, verdict = TO_THE_LB[name]
    _meets(scene, scene.fabric.lab.nodes[0], make(), verdict)


@pytest.mark.parametrize("name", TO_THE_HOST)
def test_an_odd_tunnel_packet_is_dropped_by_its_own_verdict(scene: Scene, name: str) -> None:
    make, verdict = TO_THE_HOST[name]
    _meets(scene, scene.fabric.lab.nodes[1], make(), verdict)


@pytest.mark.parametrize("name", ANOTHERS)
def test_what_another_overlay_sends_to_a_node_reaches_its_socket(scene: Scene, name: str) -> None:
    """A node has one port 6081 for all of its overlays. The kernel's own Geneve device is such a socket."""
    node, packet = scene.fabric.lab.nodes[1], ANOTHERS[name]()
    with (
        udp_socket(node, port=GENEVE_PORT) as overlay,
        Wire(scene.fabric.lab.router, node) as wire,
        scene.fabric.counting() as counted,
    ):
        wire.send(packet)
        payload, peer = overlay.recvfrom(65_536)
    source = ".".join(str(part) for part in packet[12:16])
    assert (packet[28:], (source, int.from_bytes(packet[20:22]))) == (payload, peer)
    assert {} == counted


@pytest.mark.parametrize("tag", [0x8100, 0x88A8])
def test_a_tagged_packet_to_a_vip_is_left_to_the_stack(scene: Scene, tag: int) -> None:
    payload = b"\x00\x2a\x08\x00" + ipv4(CLIENT, VIP, TCP, _to_vip(SYN))
    _meets(scene, scene.fabric.lab.nodes[0], payload, Verdict.PASS_VLAN, ethertype=tag)


def test_a_whole_tunnel_packet_is_delivered_after_all_that(scene: Scene) -> None:
    """The same bytes without a fault: the frames above were refused for what they were meant to be refused for."""
    lab = scene.fabric.lab
    option = Forward(address(scene.pod.address), 7000)

    def is_syn(frame: bytes) -> bool:
        return is_ip(frame) and frame_payload(frame)[1][20:24] == PORT.to_bytes(2) + (7000).to_bytes(2)

    with (
        Wire(lab.router, lab.nodes[1]) as wire,
        Capture(scene.pod, keep=is_syn) as at_pod,
        scene.fabric.counting() as counted,
    ):
        wire.send(tunnel(LB, HOST, option, _inner()))
        at_pod.wait_for(is_syn)
    assert {Verdict.STEADY: 1} == counted["node1"], "the client knows of no connection: its RST"
    assert {Verdict.DELIVERED: 2, Verdict.REPLY: 1} == counted["node2"]


def test_connections_go_on_in_a_rain_of_rubbish(scene: Scene) -> None:
    lab = scene.fabric.lab
    with (
        Wire(lab.router, lab.nodes[0]) as to_lb,
        Wire(lab.router, lab.nodes[1]) as to_host,
        TcpFlow(lab.client, VIP, 80) as flow,
    ):
        assert scene.server.name == flow.server
        for _ in range(10):
            for make, _verdict in TO_THE_LB.values():
                to_lb.send(make())
            for make, _verdict in TO_THE_HOST.values():
                to_host.send(make())
            data = os.urandom(20_000)
            assert data == flow.echo(data)
