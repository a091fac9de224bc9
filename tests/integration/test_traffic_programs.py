"""The programs as guests on a node: either XDP mode, beside the node's own traffic, replaced without loss."""

import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from lbpod.core.verdicts import Verdict
from lbpod.datapath import libbpf
from lbpod.datapath.attach import TC_HANDLE, TC_PRIORITY, XdpMode, XdpWish
from lbpod.lab import Lab, start_nginx, start_udp_echo
from lbpod.lab.host import Host
from tests.integration.traffic import UDP, VIP, Fabric, slot_word
from tests.integration.traffic_hosts import TcpFlow, TcpServer, UdpServer, ask, fetch, udp_socket

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]

FILE = bytes(range(256)) * 4096
PACKETS = 7_500
PACKETS_PER_S = 5_000


@pytest.fixture(scope="module", params=[XdpWish.NATIVE, XdpWish.GENERIC], ids=["native", "generic"])
def either(request: pytest.FixtureRequest) -> Iterator[Fabric]:
    """The fabric in each XDP mode."""
    with Lab(nodes=2) as lab, Fabric(lab, lab.nodes[:1], wish=request.param) as fabric:
        assert {XdpMode(request.param.value)} == {fast.attachment.mode for fast in fabric.nodes.values()}
        yield fabric


def test_the_nodes_own_connections_never_notice(either: Fabric) -> None:
    """As an administrator's ssh: to the node and from it, to a pod past the VIP, and echo; none of it is counted."""
    lab, client = either.lab, either.lab.client
    pod = lab.add_pod(lab.nodes[0])
    with (
        TcpServer(lab.nodes[0], 22, "node") as at_node,
        TcpServer(client, 2222, "client"),
        TcpServer(pod, 7000, "pod"),
        either.counting() as counted,
    ):
        talks: list[tuple[Host, str, int, str]] = [
            (client, lab.nodes[0].address, 22, "node"),
            (lab.nodes[0], client.address, 2222, "client"),
            (lab.nodes[1], lab.nodes[0].address, 22, "node"),
            (client, pod.address, 7000, "pod"),
        ]
        for host, target, port, name in talks:
            with TcpFlow(host, target, port) as flow:
                assert name == flow.server
                assert FILE == flow.echo(FILE)
        assert client.address == at_node.peers[0][0]
        client.run(["ping", "-c", "2", "-i", "0.01", "-W", "2", "-s", "1472", lab.nodes[0].address])
    assert {} == counted


def test_files_and_datagrams_pass_in_either_mode(either: Fabric) -> None:
    lab = either.lab
    webs = [start_nginx(lab, lab.add_pod(node)) for node in lab.nodes]
    vip = either.add_vip(80)
    either.spread(vip, [either.add_backend(vip, web.pod, web.port) for web in webs])
    assert [FILE] * 10 == [fetch(lab.client, VIP, 80, "/file") for _ in range(10)]
    for number, node in enumerate(lab.nodes):
        datagrams = either.add_vip(53 + number, UDP)
        pod = lab.add_pod(node)
        either.set_slots(datagrams, slot_word(either.add_backend(datagrams, pod, 9000)))
        with UdpServer(pod, 9000, "u"), udp_socket(lab.client) as client:
            for size in (0, 1, 700, 1470):
                assert b"u " + bytes(size) == ask(client, VIP, 53 + number, bytes(size))[0]


def test_uploads_and_the_size_that_fits_in_either_mode(either: Fabric) -> None:
    lab, vip = either.lab, either.add_vip(81)
    pod = lab.add_pod(lab.nodes[1])
    either.set_slots(vip, slot_word(either.add_backend(vip, pod, 7000)))
    with TcpServer(pod, 7000), TcpFlow(lab.client, VIP, 81) as flow:
        assert FILE == flow.echo(FILE)
        either.set_node(lab.nodes[0], lab.nodes[1], mtu=1400)
        with either.counting() as counted:
            assert FILE == flow.echo(FILE)
    either.set_node(lab.nodes[0], lab.nodes[1])
    assert counted["node1"][Verdict.TOO_BIG] >= 1
    lab.client.run(["ping", "-c", "2", "-i", "0.01", "-W", "2", VIP])


def test_wrk_sees_no_error_in_either_mode(either: Fabric) -> None:
    if shutil.which("wrk") is None:
        pytest.skip("missing feature: wrk")
    lab, vip = either.lab, either.add_vip(82)
    webs = [start_nginx(lab, lab.add_pod(node)) for node in lab.nodes]
    either.spread(vip, [either.add_backend(vip, web.pod, web.port) for web in webs])
    report = lab.client.run(["wrk", "-t1", "-c20", "-d1s", f"http://{VIP}:82/"]).stdout
    assert re.search(r"\d+ requests in", report), report
    assert "Socket errors" not in report, report
    assert "Non-2xx" not in report, report


class Stream:
    """Numbered datagrams at a steady rate, and the answers to them. Sender and reader are threads of this process."""

    def __init__(self, fabric: Fabric, port: int) -> None:
        self.answered: set[int] = set()
        self.sent_count = 0
        self._fabric = fabric
        self._port = port
        self._reading_ends = threading.Event()

    def run(self, meanwhile: threading.Event) -> None:
        """Sends PACKETS; `meanwhile` is set when the last one has been sent. Then waits for what is on its way."""
        with udp_socket(self._fabric.lab.client) as client:
            client.setsockopt(1, 33, 8 * 1024 * 1024)  # SO_RCVBUFFORCE
            client.settimeout(0.1)
            reader = threading.Thread(target=self._read, args=(client,), daemon=True)
            reader.start()
            started_ns = time.monotonic_ns()
            for number in range(PACKETS):
                client.sendto(number.to_bytes(4), (VIP, self._port))
                self.sent_count += 1
                ahead_ns = started_ns + number * 1_000_000_000 // PACKETS_PER_S - time.monotonic_ns()
                if ahead_ns > 1_000_000:
                    time.sleep(ahead_ns / 1e9)
            meanwhile.set()
            deadline_ns = time.monotonic_ns() + 3_000_000_000
            while len(self.answered) < PACKETS and time.monotonic_ns() < deadline_ns:
                time.sleep(0.01)
            self._reading_ends.set()
            reader.join()

    def _read(self, client: socket.socket) -> None:
        while not self._reading_ends.is_set():
            try:
                self.answered.add(int.from_bytes(client.recv(100)[-4:]))
            except TimeoutError:
                continue


def test_replacing_the_programs_under_load_loses_no_packet(either: Fabric) -> None:
    """At the LB and at the backend's node in turn; 5,000 packets a second there and back, every one is answered."""
    lab = either.lab
    pod = lab.add_pod(lab.nodes[1])
    echo = start_udp_echo(pod, name="e")
    vip = either.add_vip(60, UDP)
    either.set_slots(vip, slot_word(either.add_backend(vip, pod, echo.port)))
    stream, all_sent = Stream(either, 60), threading.Event()
    running = threading.Thread(target=stream.run, args=(all_sent,))
    before = {name: _program_ids(fast.attachment.ifindex, lab, name) for name, fast in either.nodes.items()}
    running.start()
    replaced = 0
    while not all_sent.is_set() or replaced < 2:
        either.replace_programs(lab.nodes[replaced % 2])
        replaced += 1
    running.join()
    after = {name: _program_ids(fast.attachment.ifindex, lab, name) for name, fast in either.nodes.items()}
    assert PACKETS == stream.sent_count
    assert [] == sorted(set(range(PACKETS)) - stream.answered)
    assert [] == [name for name in before if set(before[name]) & set(after[name])], "other programs than before"
    assert all(fast.attachment.replaced for fast in either.nodes.values())


def _program_ids(ifindex: int, lab: Lab, name: str) -> list[int]:
    node = next(node for node in lab.nodes if node.name == name)
    with node.in_netns():
        there = libbpf.xdp_query(ifindex)
        return [there.native_id or there.generic_id, libbpf.tc_query(ifindex, TC_HANDLE, TC_PRIORITY)]
