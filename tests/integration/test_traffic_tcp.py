"""TCP through the fast path, steady: real clients, real servers, real links; nothing decides but the maps."""

import os
import re
import shutil

import pytest

from lbpod.core.verdicts import Verdict
from lbpod.lab import Capture, start_nginx
from lbpod.lab.checksums import frame_payload
from tests.integration.traffic import VIP, Fabric, address, slot_word
from tests.integration.traffic_hosts import TcpFlow, TcpServer, fetch

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]

FILE = bytes(range(256)) * 4096
"""What the lab's nginx serves as /file."""


def test_curl_gets_its_answer_through_a_node_that_has_no_backend(fabric: Fabric) -> None:
    if shutil.which("curl") is None:
        pytest.skip("missing feature: curl")
    web = start_nginx(fabric.lab, fabric.lab.add_pod(fabric.lab.nodes[1]), name="web1")
    vip = fabric.add_vip(80)
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, web.pod, web.port)))
    with fabric.counting() as counted:
        answer = fabric.lab.client.run(["curl", "-sS", "-m", "5", f"http://{VIP}/echo?t=hi"]).stdout
    assert "web1 hi\n" == answer
    assert {"node1", "node2"} == set(counted)
    assert {Verdict.STEADY} == set(counted["node1"])
    assert {Verdict.DELIVERED, Verdict.REPLY} == set(counted["node2"])
    assert counted["node1"][Verdict.STEADY] == counted["node2"][Verdict.DELIVERED]


def test_a_backend_on_the_lbs_own_node_needs_no_tunnel(fabric: Fabric) -> None:
    vip = fabric.add_vip(81)
    pod = fabric.lab.add_pod(fabric.lab.nodes[0])
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, 7000)))
    with TcpServer(pod, 7000) as server, fabric.counting() as counted, TcpFlow(fabric.lab.client, VIP, 81) as flow:
        assert server.name == flow.server
        assert FILE == flow.echo(FILE)
    assert {"node1": {Verdict.LOCAL, Verdict.REPLY}} == {name: set(found) for name, found in counted.items()}


@pytest.mark.parametrize("number", [0, 1])
def test_a_backend_may_be_a_server_of_the_node_itself(fabric: Fabric, number: int) -> None:
    """As with hostNetwork: 0 is the LB's own node, 1 another one."""
    vip = fabric.add_vip(82 + number)
    node = fabric.lab.nodes[number]
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, node, 7000)))
    with TcpServer(node, 7000) as server, fabric.counting() as counted:
        with TcpFlow(fabric.lab.client, VIP, 82 + number) as flow:
            assert server.name == flow.server
            assert FILE == flow.echo(FILE)
            peers = [(fabric.lab.client.address, flow.local_port)]
        assert peers == server.peers
    assert {Verdict.LOCAL if number == 0 else Verdict.DELIVERED, Verdict.REPLY} == set(counted[node.name])


def test_the_server_sees_the_clients_own_address_and_port(fabric: Fabric) -> None:
    vip = fabric.add_vip(84)
    pod = fabric.lab.add_pod(fabric.lab.nodes[1])
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, 7000)))
    with TcpServer(pod, 7000) as server, TcpFlow(fabric.lab.client, VIP, 84, source_port=23_456) as flow:
        assert server.name == flow.server
        assert [(fabric.lab.client.address, 23_456)] == server.peers


@pytest.mark.parametrize("number", [0, 1])
def test_a_client_port_at_a_pods_port_is_one_vips_until_its_connection_ends(fabric: Fabric, number: int) -> None:
    """A client behind a carrier's NAT, or a proxy, has one port for two VIPs, and both lead to one port of a pod.

    To the pod that is one five-tuple. 0: the pod is on the LB's own node, 1: behind another one.
    """
    node, client = fabric.lab.nodes[number], fabric.lab.client
    pod, first, second = fabric.lab.add_pod(node), 90 + 2 * number, 91 + 2 * number
    for port in (first, second):
        vip = fabric.add_vip(port)
        fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, 7000)))
    with TcpServer(pod, 7000) as server:
        with TcpFlow(client, VIP, first, source_port=45_000) as flow:
            with fabric.counting() as counted, pytest.raises(TimeoutError):
                TcpFlow(client, VIP, second, source_port=45_000)
            assert Verdict.DROP_NAT_TAKEN in counted[node.name]
            assert FILE == flow.echo(FILE)
        with TcpFlow(client, VIP, second, source_port=45_000) as flow:
            assert FILE == flow.echo(FILE)
        assert [(client.address, 45_000)] * 2 == server.peers


def _is_from_vip(frame: bytes) -> bool:
    kind, packet = frame_payload(frame)
    return kind == 0x0800 and packet[12:16] == address(VIP)[12:]


def test_replies_go_straight_to_the_client(fabric: Fabric) -> None:
    vip = fabric.add_vip(85)
    pod = fabric.lab.add_pod(fabric.lab.nodes[1])
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, 7000)))
    router = fabric.lab.router
    with (
        TcpServer(pod, 7000),
        Capture(router, "node1", keep=_is_from_vip) as at_lb,
        Capture(router, "node2", keep=_is_from_vip) as at_backend,
        Capture(router, "client1", keep=_is_from_vip) as at_client,
    ):
        with TcpFlow(fabric.lab.client, VIP, 85) as flow:
            assert b"hello" * 1000 == flow.echo(b"hello" * 1000)
        at_client.wait_for(lambda frame: True, count=4)
    assert [] == at_lb.frames, "the LB's node must not see one reply"
    assert len(at_backend.frames) >= 4
    assert {False} == {frame.outgoing for frame in at_backend.frames}
    assert {True} == {frame.outgoing for frame in at_client.frames}


def test_wrk_with_keep_alive_sees_no_error_over_backends_everywhere(fabric: Fabric) -> None:
    if shutil.which("wrk") is None:
        pytest.skip("missing feature: wrk")
    vip = fabric.add_vip(86)
    webs = [start_nginx(fabric.lab, fabric.lab.add_pod(node)) for node in fabric.lab.nodes]
    fabric.spread(vip, [fabric.add_backend(vip, web.pod, web.port) for web in webs])
    with fabric.counting() as counted:
        report = fabric.lab.client.run(["wrk", "-t1", "-c30", "-d2s", f"http://{VIP}:86/"]).stdout
    assert "Socket errors" not in report, report
    assert "Non-2xx" not in report, report
    requests = re.search(r"(\d+) requests in", report)
    assert requests is not None, report
    assert int(requests[1]) > 100
    assert {"node1", "node2", "node3"} == set(counted)
    allowed = {Verdict.STEADY, Verdict.LOCAL, Verdict.DELIVERED, Verdict.REPLY}
    assert allowed >= {verdict for found in counted.values() for verdict in found}


def test_downloads_of_a_mebibyte_arrive_byte_by_byte(fabric: Fabric) -> None:
    vip = fabric.add_vip(87)
    webs = [start_nginx(fabric.lab, fabric.lab.add_pod(node)) for node in fabric.lab.nodes]
    fabric.spread(vip, [fabric.add_backend(vip, web.pod, web.port) for web in webs])
    answers = {fetch(fabric.lab.client, VIP, 87, "/") for _ in range(40)}
    assert {f"{web.name}\n".encode() for web in webs} == answers, "40 connections must have met all three"
    assert [FILE] * 20 == [fetch(fabric.lab.client, VIP, 87, "/file") for _ in range(20)]


def test_uploads_of_a_mebibyte_arrive_byte_by_byte(fabric: Fabric) -> None:
    vip = fabric.add_vip(88)
    pod = fabric.lab.add_pod(fabric.lab.nodes[2])
    fabric.set_slots(vip, slot_word(fabric.add_backend(vip, pod, 7000)))
    with TcpServer(pod, 7000), TcpFlow(fabric.lab.client, VIP, 88) as flow:
        assert FILE == flow.echo(FILE)


def test_a_backend_that_is_not_alive_gets_nothing(fabric: Fabric) -> None:
    vip = fabric.add_vip(89)
    pod = fabric.lab.add_pod(fabric.lab.nodes[1])
    backend = fabric.add_backend(vip, pod, 7000)
    fabric.set_slots(vip, slot_word(backend))
    with TcpServer(pod, 7000) as server:
        with TcpFlow(fabric.lab.client, VIP, 89) as flow:
            fabric.set_backend(backend, vip, pod, 7000, alive=False)
            with fabric.counting() as counted:
                flow.socket.send(b"lost")
            fabric.set_backend(backend, vip, pod, 7000)
            assert b"lost" == flow.socket.recv(4), "the client's kernel repeats it"
        assert 1 == len(server.peers)
    assert {"node1": {Verdict.DROP_NO_BACKEND}} == {name: set(found) for name, found in counted.items()}
