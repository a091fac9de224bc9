"""Every frame on every link, as captured: right checksums, the outer headers that README.md promises, inner untouched.

Judged by what hosts *sent* (see `lbpod.lab.capture`). What a node's XDP program sends back is seen by no capture on
that node, so it is judged where the router sends it on.
"""

import os
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from lbpod.core.hashing import flow_hash
from lbpod.core.packets import Forward
from lbpod.lab import Capture, Pod
from lbpod.lab.checksums import ipv4_faults
from tests.integration.traffic import SEED, TCP, UDP, VIP, VNI, Fabric, VipEntry, address, slot_word
from tests.integration.traffic_frames import FIN, ip_of, is_ip, is_tunnel, opened, raw, sent
from tests.integration.traffic_hosts import TcpFlow, TcpServer, UdpServer, ask, udp_socket

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]

CLIENT_PORT = 34_567


@dataclass
class Seen:
    """One conversation through the fast path, captured on every link it used."""

    captures: dict[str, Capture]
    pod: Pod
    vip: VipEntry
    backend_port: int

    def sent(self, where: str) -> list[bytes]:
        return sent(self.captures[where])


@pytest.fixture(scope="module", params=["tcp", "udp"])
def seen(request: pytest.FixtureRequest, fabric: Fabric) -> Seen:
    """A conversation with a pod behind node 2, through the LB at node 1."""
    lab, protocol = fabric.lab, TCP if request.param == "tcp" else UDP
    pod = lab.add_pod(lab.nodes[1])
    vip = fabric.add_vip(80, protocol)
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, 7000)))
    links = {
        "client": (lab.client, "eth0"),
        "router-client": (lab.router, "client1"),
        "router-lb": (lab.router, "node1"),
        "router-node": (lab.router, "node2"),
        "node": (lab.nodes[1], "eth0"),
        "node-pod": (lab.nodes[1], pod.node_interface),
        "pod": (pod, "eth0"),
    }
    with ExitStack() as stack:
        stack.enter_context(TcpServer(pod, 7000) if protocol == TCP else UdpServer(pod, 7000))
        captures = {name: stack.enter_context(Capture(host, dev)) for name, (host, dev) in links.items()}
        if protocol == TCP:
            with TcpFlow(lab.client, VIP, 80, source_port=CLIENT_PORT) as flow:
                assert b"1" * 100_001 == flow.echo(b"1" * 100_001)
            captures["client"].wait_for(is_fin, count=2)
        else:
            with udp_socket(lab.client, port=CLIENT_PORT) as client:
                for size in (0, 1, 2, 700, 1465):
                    ask(client, VIP, 80, bytes(size))
    return Seen(captures, pod, vip, 7000)


def is_fin(frame: bytes) -> bool:
    """TCP with FIN; an ARP question has the sender's address where the protocol would be, and that may hold a 6."""
    packet = ip_of(frame)
    return is_ip(frame) and packet[9:10] == bytes([TCP]) and bool(packet[33] & FIN)


def test_an_arp_question_of_an_unlucky_address_is_no_fin() -> None:
    asker, target = bytes.fromhex("0206aa00bb01"), "10.76.1.1"
    question = bytes.fromhex("0001080006040001") + asker + raw("10.76.1.2") + bytes(6) + raw(target)
    assert not is_fin(b"\xff" * 6 + asker + b"\x08\x06" + question)


def test_every_frame_that_anybody_sent_has_right_checksums(seen: Seen) -> None:
    for where, capture in seen.captures.items():
        packets = seen.sent(where)
        assert len(packets) >= 5, f"{where} must have sent something"
        assert [] == [(where, packet.hex(), ipv4_faults(packet)) for packet in packets if ipv4_faults(packet)]
        assert [] == [frame for frame in capture.frames if frame.outgoing and frame.checksum_pending]
        assert 0 == capture.dropped


def _tunnels(seen: Seen) -> list[bytes]:
    return [
        ip_of(frame.data) for frame in seen.captures["router-node"].frames if frame.outgoing and is_tunnel(frame.data)
    ]


def test_the_outer_headers_are_as_promised(seen: Seen) -> None:
    hashed = flow_hash(address("10.76.1.2"), address(VIP), CLIENT_PORT, 80, seen.vip.protocol, SEED)
    outer = _tunnels(seen)
    assert len(outer) >= 5
    for packet in outer:
        assert (0x45, 0) == (packet[0], packet[1]), "no options, TOS 0"
        assert b"\0\0\x40\0" == packet[4:8], "identification 0, DF, no fragment"
        assert 63 == packet[8], "64, and one router since"
        assert raw("10.77.1.2") + raw("10.77.2.2") == packet[12:20]
        assert 49_152 + (hashed & 0x3FFF) == int.from_bytes(packet[20:22])
        assert 6081 == int.from_bytes(packet[22:24])
        assert len(packet) - 20 == int.from_bytes(packet[24:26])
        assert b"\0\0" == packet[26:28], "no UDP checksum over IPv4"
        assert b"\x06\x40\x08\x00" == packet[28:32], "version 0, 24 bytes of options, critical, IPv4"
        assert VNI << 8 == int.from_bytes(packet[32:36])
        assert Forward(address(seen.pod.address), seen.backend_port) == opened(bytes(12) + b"\x08\x00" + packet).option


def test_the_inner_packet_is_what_reached_the_lb_byte_by_byte(seen: Seen) -> None:
    plain = seen.sent("router-lb")
    inner = [opened(bytes(12) + b"\x08\x00" + packet).inner for packet in _tunnels(seen)]
    assert len(plain) >= 5
    assert plain == inner


def test_the_pod_gets_the_clients_packet_with_its_own_address(seen: Seen) -> None:
    """TTL: 64 at the client, the router takes one, the pod's node another; the tunnel takes none."""
    before, after = seen.sent("client"), seen.sent("node-pod")
    assert len(before) == len(after)
    for packet, translated in zip(before, after, strict=True):
        assert 62 == translated[8]
        assert packet[12:16] == translated[12:16] == raw("10.76.1.2")
        assert raw(seen.pod.address) == translated[16:20]
        assert packet[20:22] + seen.backend_port.to_bytes(2) == translated[20:24]
        start = 40 if seen.vip.protocol == TCP else 28
        assert packet[start:] == translated[start:], "payload and TCP options as they were"
        assert packet[4:8] == translated[4:8], "identification and flags as they were"


def test_the_reply_gets_the_vips_address_and_nothing_else(seen: Seen) -> None:
    before, after = seen.sent("pod"), seen.sent("node")
    assert len(before) == len(after)
    for packet, translated in zip(before, after, strict=True):
        assert (64, 63) == (packet[8], translated[8])
        assert raw(VIP) + raw("10.76.1.2") == translated[12:20]
        assert (80).to_bytes(2) + packet[22:24] == translated[20:24]
        start = 40 if seen.vip.protocol == TCP else 28
        assert packet[start:] == translated[start:]
