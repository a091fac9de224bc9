"""Packets that are as large as they may be, and larger: MSS, "packet too big" both ways, errors by what they quote."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lbpod.core.verdicts import Verdict
from lbpod.lab import Capture, Pod, start_nginx
from lbpod.lab.checksums import inet_checksum, ipv4_faults
from lbpod.lab.host import Host
from tests.integration.traffic import ICMP, TCP, UDP, VIP, Fabric, slot_word
from tests.integration.traffic_frames import ip_of, is_icmp, raw, sent
from tests.integration.traffic_hosts import TcpFlow, TcpServer, UdpServer, ask, fetch, udp_socket

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]

DATA = os.urandom(200_000)
FULL_BYTES = 1500
TUNNEL_BYTES = 60


def _mss(packets: list[bytes]) -> list[int]:
    """MSS options of SYN and SYN-ACK packets; Linux puts the option first."""
    return [int.from_bytes(packet[42:44]) for packet in packets if packet[9] == TCP and packet[33] & 2]


def _learned_mtu(host: Host, target: str) -> int | None:
    """What the kernel of a host believes about the path to an address: what it was told, or None."""
    answer = json.loads(host.run(["ip", "-json", "route", "get", target]).stdout)
    metrics = answer[0].get("metrics", [{}])[0]
    found = metrics.get("mtu")
    return None if found is None else int(found)


def test_segments_of_full_size_pass_both_ways_without_any_clamp(fabric: Fabric) -> None:
    lab, vip = fabric.lab, fabric.add_vip(80)
    pod = lab.add_pod(lab.nodes[1])
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, 7000)))
    with (
        TcpServer(pod, 7000),
        Capture(lab.client) as at_client,
        Capture(lab.router, "client1") as at_router,
        Capture(lab.router, "node2") as behind_lb,
        TcpFlow(lab.client, VIP, 80) as flow,
    ):
        assert DATA == flow.echo(DATA)
    assert [1460] == _mss(sent(at_client))
    assert [1460] == _mss(sent(at_router))
    assert FULL_BYTES == max(map(len, sent(at_client)))
    assert FULL_BYTES == max(map(len, sent(at_router)))
    assert FULL_BYTES + TUNNEL_BYTES == max(map(len, sent(behind_lb)))


def test_the_mss_of_the_syn_ack_is_lowered_and_obeyed(fabric: Fabric) -> None:
    lab, vip = fabric.lab, fabric.add_vip(81)
    pod = lab.add_pod(lab.nodes[1])
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, 7000)))
    fabric.set_config(lab.nodes[1], mss_max=1201)
    with (
        TcpServer(pod, 7000),
        Capture(lab.client) as at_client,
        Capture(pod) as at_pod,
        Capture(lab.router, "client1") as at_router,
    ):
        with TcpFlow(lab.client, VIP, 81) as flow:
            assert DATA == flow.echo(DATA)
        fabric.set_config(lab.nodes[1], mss_max=0)
    assert [1460] == _mss(sent(at_client)), "what the client offers is its own affair"
    assert [1460] == _mss(sent(at_pod))
    assert [1201] == _mss(sent(at_router))
    assert 1201 + 40 == max(map(len, sent(at_client)))
    assert FULL_BYTES == max(map(len, sent(at_router))), "the way back has no tunnel"
    assert [] == [packet for packet in sent(at_router) if ipv4_faults(packet)]


def test_a_packet_too_large_for_the_tunnel_tells_the_client_which_size_fits(fabric: Fabric) -> None:
    lab, vip = fabric.lab, fabric.add_vip(82)
    pod = lab.add_pod(lab.nodes[1])
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, 7000)))
    with (
        TcpServer(pod, 7000),
        TcpFlow(lab.client, VIP, 82) as flow,
        Capture(lab.client, keep=is_icmp) as errors,
        fabric.counting() as counted,
    ):
        assert b"small" == flow.echo(b"small")
        fabric.set_node(lab.nodes[0], lab.nodes[1], mtu=1400)
        assert DATA == flow.echo(DATA), "the connection goes on with smaller segments"
        assert 1400 - 64 == _learned_mtu(lab.client, VIP)
    fabric.set_node(lab.nodes[0], lab.nodes[1])
    lab.client.run(["ip", "route", "flush", "cache"])
    assert counted["node1"][Verdict.TOO_BIG] >= 1
    told = ip_of(errors.frames[0].data)
    assert [] == ipv4_faults(told)
    assert raw(VIP) + raw(lab.client.address) == told[12:20]
    assert (3, 4, 1336) == (told[20], told[21], int.from_bytes(told[26:28]))
    assert raw(lab.client.address) + raw(VIP) == told[28 + 12 : 28 + 20], "it quotes the packet that did not fit"


def test_a_packet_without_df_that_does_not_fit_is_dropped_and_counted(fabric: Fabric) -> None:
    lab, vip = fabric.lab, fabric.add_vip(83, UDP)
    pod = lab.add_pod(lab.nodes[1])
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, 9000)))
    fabric.set_node(lab.nodes[0], lab.nodes[1], mtu=1400)
    with UdpServer(pod, 9000, "u") as server, udp_socket(lab.client) as client:
        client.setsockopt(0, 10, 0)  # IP_MTU_DISCOVER: IP_PMTUDISC_DONT, no DF
        with fabric.counting() as counted, Capture(lab.client, keep=is_icmp) as errors:
            client.sendto(bytes(1400 - 60 - 28 + 1), (VIP, 83))
        assert {"node1": {Verdict.TOO_BIG: 1}} == counted
        assert [] == errors.frames
        assert 1402 - 88 == len(ask(client, VIP, 83, bytes(1400 - 60 - 28))[0]), "the last size that fits"
        assert 1 == len(server.peers)
    fabric.set_node(lab.nodes[0], lab.nodes[1])


@contextmanager
def _narrow_client_link(fabric: Fabric, mtu: int) -> Iterator[None]:
    """The router's link to the client takes less than the pods believe."""
    router = fabric.lab.router
    router.run(["ip", "link", "set", "client1", "mtu", str(mtu)])
    try:
        yield
    finally:
        router.run(["ip", "link", "set", "client1", "mtu", str(FULL_BYTES)])


def _is_error(frame: bytes) -> bool:
    return is_icmp(frame) and ip_of(frame)[20] == 3


@pytest.mark.parametrize(("number", "port"), [(0, 84), (1, 85)])
def test_a_routers_error_about_a_reply_reaches_the_pod_that_sent_it(fabric: Fabric, number: int, port: int) -> None:
    """Path MTU discovery of the pod: the router knows only the VIP, the LB reads whose packet is quoted."""
    lab, vip = fabric.lab, fabric.add_vip(port)
    web = start_nginx(lab, lab.add_pod(lab.nodes[number]))
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, web.pod, web.port)))
    assert _learned_mtu(web.pod, lab.client.address) is None
    with Capture(web.pod, keep=_is_error) as at_pod, _narrow_client_link(fabric, 1300), fabric.counting() as counted:
        body = fetch(lab.client, VIP, port, "/file")
        assert bytes(range(256)) * 4096 == body
        assert 1300 == _learned_mtu(web.pod, lab.client.address)
    _check_error(ip_of(at_pod.frames[0].data), web.pod, lab.client.address, web.port)
    if number == 0:
        assert counted["node1"][Verdict.LOCAL] >= 1
    else:
        assert counted["node1"][Verdict.ICMP_ERROR] >= 1
        assert counted["node2"][Verdict.DELIVERED] > counted["node1"][Verdict.STEADY]


def _check_error(error: bytes, pod: Pod, client: str, port: int) -> None:
    """All as if the pod's own packet had met the router: addresses inside and outside, and every checksum."""
    assert [] == ipv4_faults(error)
    assert raw(pod.address) == error[16:20]
    quoted = error[28:]
    assert raw(pod.address) + raw(client) == quoted[12:20]
    assert port == int.from_bytes(quoted[20:22])
    assert 0 == inet_checksum(quoted[:20])


def test_a_clients_port_unreachable_reaches_the_pod_that_asked(fabric: Fabric) -> None:
    """The client's socket is gone when the answer comes; the pod's kernel must hear of it as of its own packet."""
    lab, vip = fabric.lab, fabric.add_vip(86, UDP)
    pod = lab.add_pod(lab.nodes[1])
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, 9000)))
    with udp_socket(pod, port=9000) as server, Capture(pod, keep=is_icmp) as at_pod:
        with udp_socket(lab.client) as client:
            client.sendto(b"asked", (VIP, 86))
            _, peer = server.recvfrom(100)
        server.connect(peer)
        with fabric.counting() as counted:
            server.send(b"too late")
            at_pod.wait_for(is_icmp)
        with pytest.raises(ConnectionRefusedError):
            server.recv(100)
    assert {"node1": {Verdict.ICMP_ERROR: 1}, "node2": {Verdict.DELIVERED: 1, Verdict.REPLY: 1}} == counted
    error = ip_of(at_pod.frames[0].data)
    assert (ICMP, 3, 3) == (error[9], error[20], error[21])
    _check_error(error, pod, lab.client.address, 9000)
