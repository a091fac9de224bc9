"""The lab gives what it promises: links without offloads, a router that reshuffles, pods that come and go."""

import json
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lbpod.lab import Capture, Client, Lab, LabError, Node, clean_leftovers, kernel as lab_kernel, start_nginx
from lbpod.lab.checksums import frame_faults, frame_payload

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]

VIP = "203.0.113.10"
PREFIX = "203.0.113.0/24"
PORTS = range(20_000, 20_200)
UDP = 17


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=3) as lab:
        yield lab


def _is_flow(frame: bytes) -> bool:
    """UDP to the VIP."""
    kind, packet = frame_payload(frame)
    return kind == 0x0800 and packet[9] == UDP and packet[16:20] == socket.inet_aton(VIP)


def _arrivals(lab: Lab, expected_count: int, send: Callable[[], None]) -> dict[int, str]:
    """Source port -> node that the packet reached, for what ``send`` makes the client send to the VIP."""
    with (
        Capture(lab.nodes[0], keep=_is_flow) as one,
        Capture(lab.nodes[1], keep=_is_flow) as two,
        Capture(lab.nodes[2], keep=_is_flow) as three,
    ):
        captures = (one, two, three)
        send()
        deadline_ns = time.monotonic_ns() + 3_000_000_000
        while sum(len(c.frames) for c in captures) < expected_count and time.monotonic_ns() < deadline_ns:
            time.sleep(0.005)
    return {
        int.from_bytes(frame_payload(frame.data)[1][20:22]): capture.host.name
        for capture in captures
        for frame in capture.frames
        if not frame.outgoing
    }


def _send_each_port(client: Client) -> None:
    for port in PORTS:
        with client.in_netns():
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sender:
            sender.bind(("", port))
            sender.sendto(b"x", (VIP, 80))


def _http_get(client: Client, address: str, path: str) -> bytes:
    with client.in_netns():
        connection = socket.create_connection((address, 8080), timeout=5)
    with connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while data := connection.recv(65_536):
            answer += data
    return answer.partition(b"\r\n\r\n")[2]


# ------------------------------------------------------------------------------------------------- links and hosts


@pytest.mark.parametrize(
    ("where", "interface", "mtu"), [("router", "node1", 1600), ("node1", "eth0", 1600), ("client1", "eth0", 1500)]
)
def test_links_have_the_mtu_of_underlay_or_client(lab: Lab, where: str, interface: str, mtu: int) -> None:
    hosts = {host.name: host for host in (lab.router, lab.client, *lab.nodes)}
    assert mtu == json.loads(hosts[where].run(["ip", "-json", "link", "show", interface]).stdout)[0]["mtu"]


def test_the_router_runs_native_xdp_and_gro_on_node_links(lab: Lab) -> None:
    link = json.loads(lab.router.run(["ip", "-json", "link", "show", "node2"]).stdout)[0]
    assert 1 == link["xdp"]["mode"], "1 is native (driver) mode"
    if shutil.which("ethtool") is None:
        pytest.skip("missing feature: ethtool")
    features = lab.router.run(["ethtool", "-k", "node2"]).stdout
    assert "generic-receive-offload: on" in features
    assert "tx-checksumming: off" in features
    assert "generic-segmentation-offload: off" in features
    assert "tx-tcp-segmentation: off" in features


def test_the_router_has_its_switches(lab: Lab) -> None:
    assert 1 == lab.router.switch("ipv4/fib_multipath_hash_policy")
    assert 1 == lab.router.switch("ipv4/conf/all/ignore_routes_with_linkdown")
    assert 1 == lab.router.switch("ipv4/ip_forward")


def test_a_frame_sent_back_by_native_xdp_is_delivered_to_the_router(lab: Lab) -> None:
    """XDP_TX on a veth vanishes unless the peer has a native XDP program: the trap this lab is built around."""
    node = lab.add_node()
    program = lab_kernel.xdp_return_load(lab_kernel.XDP_TX, "test_tx")
    try:
        lab.run.worker.call(lambda: node.attach_xdp("eth0", program))
        with Capture(lab.router, node.router_interface) as capture:
            lab.router.run(["ping", "-c", "1", "-W", "0.2", node.address], check=False)
            sent = capture.wait_for(lambda data: True, count=2)
        assert {True, False} == {frame.outgoing for frame in sent}, "what went out must have come back"
    finally:
        os.close(program)


def test_in_netns_brings_the_thread_back_even_after_an_error(lab: Lab) -> None:
    here = os.stat("/proc/thread-self/ns/net").st_ino

    def fail_inside() -> None:
        with lab.client.in_netns():
            assert here != os.stat("/proc/thread-self/ns/net").st_ino
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert here == os.stat("/proc/thread-self/ns/net").st_ino


def test_tcp_reaches_a_pod_through_router_and_node_with_right_checksums(lab: Lab) -> None:
    pod = lab.add_pod(lab.nodes[0])
    start_nginx(lab, pod, name="web1")
    with (
        Capture(lab.client) as at_client,
        Capture(lab.router, "client1") as at_router,
        Capture(pod) as at_pod,
    ):
        assert b"web1 hello\n" == _http_get(lab.client, pod.address, "/echo?t=hello")
        assert bytes(range(256)) * 4096 == _http_get(lab.client, pod.address, "/file")
    for capture in (at_client, at_router, at_pod):
        sent = [frame for frame in capture.frames if frame.outgoing]
        assert len(sent) > 3
        assert [] == [fault for frame in sent for fault in frame_faults(frame.data)]
        assert [] == [frame for frame in sent if frame.checksum_pending]
        assert max(len(frame.data) for frame in sent) <= 1500 + 14
    lab.remove_pod(pod)


# ------------------------------------------------------------------------------------------------------------ ECMP


def test_the_router_spreads_flows_and_a_reshuffle_moves_them(lab: Lab) -> None:
    lab.router.set_ecmp(PREFIX, lab.nodes[:3])
    before = _arrivals(lab, len(PORTS), lambda: _send_each_port(lab.client))
    assert sorted(PORTS) == sorted(before)
    assert {"node1", "node2", "node3"} == set(before.values())
    asked = lab.router.next_hop(lab.client, PORTS[0], VIP, 80, UDP)
    assert asked is not None
    assert before[PORTS[0]] == asked.name

    moved_share = lab.router.reshuffle(PREFIX, random.Random(3))
    after = _arrivals(lab, len(PORTS), lambda: _send_each_port(lab.client))
    moved = [port for port in PORTS if before[port] != after[port]]
    assert moved_share > 0.6
    assert len(moved) > len(PORTS) // 2


def test_weights_decide_how_many_flows_a_node_gets(lab: Lab) -> None:
    lab.router.set_ecmp(PREFIX, [(lab.nodes[0], 8), (lab.nodes[1], 1), (lab.nodes[2], 1)])
    arrived = list(_arrivals(lab, len(PORTS), lambda: _send_each_port(lab.client)).values())
    assert arrived.count("node1") > len(PORTS) // 2


def test_no_packet_is_lost_while_paths_are_reshuffled(lab: Lab) -> None:
    lab.router.set_ecmp(PREFIX, lab.nodes[:3])
    sent_count = 3_000
    with lab.client.in_netns():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    done = threading.Event()

    def send() -> None:
        with sender:
            for number in range(sent_count):
                sender.sendto(number.to_bytes(4), (VIP, 80))
                if number % 30 == 29:
                    time.sleep(0.005)
        done.set()

    captures = [Capture(node, keep=_is_flow) for node in lab.nodes[:3]]
    with captures[0], captures[1], captures[2]:
        sending = threading.Thread(target=send)
        sending.start()
        rng, reshuffles = random.Random(5), 0
        while not done.is_set():
            lab.router.reshuffle(PREFIX, rng, weight_max=3)
            reshuffles += 1
            time.sleep(0.01)
        sending.join()
        deadline_ns = time.monotonic_ns() + 3_000_000_000
        while sum(len(c.frames) for c in captures) < sent_count and time.monotonic_ns() < deadline_ns:
            time.sleep(0.005)
    assert reshuffles >= 3
    assert sent_count == sum(len(capture.frames) for capture in captures)
    assert all(capture.frames for capture in captures), "one flow, moved about, must have visited every node"


def _reached(lab: Lab) -> set[str]:
    hops = [lab.router.next_hop(lab.client, port, VIP, 80, UDP) for port in PORTS[:40]]
    return {hop.name for hop in hops if hop is not None}


def test_a_cut_node_gets_no_flows_until_it_is_healed(lab: Lab) -> None:
    lab.router.set_ecmp(PREFIX, lab.nodes[:3])
    lab.cut(lab.nodes[1])
    assert {"node1", "node3"} == _reached(lab)
    lab.heal(lab.nodes[1])
    assert {"node1", "node2", "node3"} == _reached(lab)
    lab.client.run(["ping", "-c", "1", "-W", "2", lab.nodes[1].address])


# ------------------------------------------------------------------------------------------------------------ pods


def test_pods_come_and_go(lab: Lab) -> None:
    node: Node = lab.nodes[2]
    pod = lab.add_pod(node)
    assert f"10.78.3.{pod.number}" == pod.address
    lab.client.run(["ping", "-c", "1", "-W", "2", pod.address])
    lab.remove_pod(pod)
    assert 1 == lab.client.run(["ping", "-c", "1", "-W", "0.2", pod.address], check=False).returncode
    assert pod.address not in node.run(["ip", "route"]).stdout
    assert not (lab_kernel.NETNS_DIR / pod.netns).exists()
    assert pod.number + 1 == lab.add_pod(node).number, "an address is not given to the next pod at once"
    again = lab.add_pod(node, number=pod.number)
    assert pod.address == again.address
    with pytest.raises(ValueError, match="has a pod"):
        lab.add_pod(node, number=pod.number)


def test_a_pod_removed_silently_sends_neither_fin_nor_rst(lab: Lab) -> None:
    pod = lab.add_pod(lab.nodes[0])
    start_nginx(lab, pod)
    with lab.client.in_netns():
        connection = socket.create_connection((pod.address, 8080), timeout=5)
    with connection, Capture(lab.client) as capture:
        lab.remove_pod(pod, silent=True)
        time.sleep(0.05)
        assert [] == [frame for frame in capture.frames if frame_payload(frame.data)[0] == 0x0800]


# -------------------------------------------------------------------------------------------------------- programs


def test_a_program_writes_to_its_log_and_is_ended(lab: Lab) -> None:
    program = lab.client.popen(["sh", "-c", "echo here; ip -brief link; exec sleep 60"])
    deadline_ns = time.monotonic_ns() + 5_000_000_000
    while "eth0" not in program.log_text() and time.monotonic_ns() < deadline_ns:
        time.sleep(0.005)
    assert "here" in program.log_text()
    assert [program] == lab.client.programs()
    assert -15 == program.stop()
    assert [] == lab.client.programs()


def test_a_command_that_takes_too_long_is_killed(lab: Lab) -> None:
    with pytest.raises(LabError, match=r"took longer than 0\.2 s"):
        lab.client.run(["sleep", "60"], timeout_s=0.2)
    assert [] == lab.client.programs()


def test_a_command_that_fails_says_why(lab: Lab) -> None:
    with pytest.raises(LabError, match="no such thing"):
        lab.client.run(["sh", "-c", "echo no such thing >&2; exit 3"])
    with pytest.raises(LabError, match="not installed"):
        lab.client.run(["no-such-program"])


def test_bpffs_is_seen_inside_a_host(lab: Lab) -> None:
    pins = lab.pin_dir(lab.nodes[0])
    assert [] == os.listdir(pins)
    assert str(pins) == lab.nodes[0].run(["ls", "-d", str(pins)]).stdout.strip()


def test_a_live_lab_is_no_leftover(lab: Lab) -> None:
    assert lab.prefix not in clean_leftovers()
    assert (lab_kernel.NETNS_DIR / lab.router.netns).exists()
