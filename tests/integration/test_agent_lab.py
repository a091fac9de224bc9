"""A real agent on the kernel's maps, in a namespace of its own: killed with -9, started again, taken off again.

The test is the controller, over TLS from inside the node's namespace. What must hold: the fast path goes on while there
is no agent, a connection that was open before stays with its backend through kill and restart, the slots are those
that were there, and `--detach-on-exit` leaves nothing behind.
"""

import http.client
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from lbpod.certs import client_context, files_in, server_name
from lbpod.core import wire
from lbpod.core.layout import SLOT_CURRENT_MASK
from lbpod.core.limits import LOOK_AFTER_NS, UNDERLAY_EXTRA_BYTES
from lbpod.core.messages import CommitCall, PrepareCall
from lbpod.core.model import (
    Affinity,
    Cluster,
    Protocol,
    Snapshot,
    World,
    WorldBackend,
    WorldNode,
    WorldVip,
    parse_address,
)
from lbpod.core.snapshot import Tables, digest_of, next_snapshot
from lbpod.datapath.rows import MSS_OVERHEAD_BYTES
from lbpod.lab import Lab, kernel as lab_kernel, python, start_nginx
from lbpod.lab.program import Program
from lbpod.lab.workload import Backend
from lbpod.minting import mint

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]

VIP = "203.0.113.10"
CLUSTER = Cluster(99, 0xABCD)
START_SECONDS_MAX = 20
SIZES = "records=65536,nat=65536,cache=65536,pending=8192,embryonic=8192"


class OneNode:
    """A lab of one node with two pods, its agent, and the calls of a controller."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.node = lab.nodes[0]
        self.backends: list[Backend] = []
        self.snapshot: Snapshot | None = None
        mint(folder / "tls", [self.node.name])
        lab.router.set_ecmp(f"{VIP}/32", [self.node])

    def start(self, *more: str) -> Program:
        program = self.node.popen(
            [
                *python("-m", "lbpod.cli"),
                *("agent", "--node", self.node.name, "--interface", "eth0", "--map-sizes", SIZES),
                *("--tls", str(self.folder / "tls"), "--state", str(self.folder / "state")),
                *("--pins", str(self.lab.pin_dir(self.node)), *more),
            ],
            name="agent",
        )
        deadline = time.monotonic() + START_SECONDS_MAX
        while '"what": "metrics"' not in program.log_text():
            assert program.alive, program.log_text()
            assert time.monotonic() < deadline, program.log_text()
            time.sleep(0.02)
        return program

    def add_backend(self) -> None:
        pod = self.lab.add_pod(self.node)
        self.backends.append(start_nginx(self.lab, pod, name=f"web{len(self.backends)}"))

    def call(
        self, method: str, path: str, data: bytes = b"", accept: str = "*/*", who: str = "controller"
    ) -> tuple[int, bytes]:
        with self.node.in_netns():
            raw = socket.create_connection((self.node.address, 9900), timeout=10)
        tls = client_context(files_in(self.folder / "tls", who))
        connection = http.client.HTTPConnection(self.node.address)
        connection.sock = tls.wrap_socket(raw, server_hostname=server_name(self.node.name))
        try:
            connection.request(method, path, data, {"Accept": accept})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def roll_out(self) -> None:
        node = WorldNode(self.node.name, parse_address(self.node.address), f"{self.node.address}:9900", lb=True)
        backends = tuple(
            WorldBackend(parse_address(one.pod.address), one.port, self.node.name) for one in self.backends
        )
        vip = WorldVip(
            "a/b/c", parse_address(VIP), 80, Protocol.TCP, Affinity.NONE, 3600 * 10**9, 3600 * 10**9, backends
        )
        generation = 1 if self.snapshot is None else self.snapshot.generation + 1
        made, _ = next_snapshot(World((node,), (vip,)), self.snapshot, CLUSTER, generation, Tables(CLUSTER.seed))
        assert made is not None
        digest = digest_of(made)
        for body in (made, PrepareCall(generation, digest), CommitCall(generation, digest)):
            method, path = wire.ROUTES[type(body)]
            status, text = self.call(method, path, wire.encode(body))
            assert 200 == status, text
        self.snapshot = made

    def state(self) -> dict[str, Any]:
        status, text = self.call("GET", wire.PATH_STATE, accept="application/json")
        assert 200 == status
        state: dict[str, Any] = msgspec.json.decode(text)
        return state

    def currents(self) -> npt.NDArray[np.uint64]:
        """`current` of every slot of VIP 1, read from its pin."""
        from lbpod.datapath import libbpf, mapped
        from lbpod.datapath.layout import U64

        fd = libbpf.pinned(str(self.lab.pin_dir(self.node) / "slots" / "1"))
        assert fd is not None, "the slots of VIP 1 are pinned"
        array = mapped.MappedArray("slots", fd, U64, 65_536)
        os.close(fd)
        found = array.words[:, 0] & np.uint64(SLOT_CURRENT_MASK)
        array.close()
        return found

    def page(self, name: str) -> str:
        """/readyz, /healthz or /metrics, as whoever is on the node sees it."""
        return self.node.run(["curl", "-s", "-m", "5", f"http://127.0.0.1:9902/{name}"]).stdout

    def metric(self, name: str) -> float:
        """One sample of /metrics, by name and labels."""
        found = [line for line in self.page("metrics").splitlines() if line.startswith(f"{name} ")]
        assert 1 == len(found), f"{name} is there once"
        return float(found[0].rpartition(" ")[2])

    def mss(self) -> int:
        """What a client may send in one packet over a new connection to the VIP, as the SYN-ACK has it."""
        with self.lab.clients[0].in_netns():
            connection = socket.create_connection((VIP, 80), timeout=5)
        with connection:
            return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)

    def fetch(self) -> str:
        """Who answers a new connection from outside."""
        return self.lab.clients[0].run(["curl", "-s", "-m", "5", f"http://{VIP}/"]).stdout.strip()


@pytest.fixture
def one(tmp_path: Path) -> Iterator[OneNode]:
    with Lab(nodes=1) as lab:
        yield OneNode(lab, tmp_path)


def until(is_so: Callable[[], bool], what: str) -> None:
    """Waits for the agent's next looks, and some more."""
    deadline = time.monotonic() + 4 * LOOK_AFTER_NS / 1e9
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def _ask(connection: http.client.HTTPConnection, what: str) -> str:
    connection.request("GET", f"/echo?t={what}")
    return connection.getresponse().read().decode().split()[0]


def test_kill_9_and_restart_move_no_connection_and_keep_the_slots(one: OneNode) -> None:
    agent = one.start()
    one.add_backend()
    one.add_backend()
    one.roll_out()
    assert one.fetch() in {"web0", "web1"}
    with one.lab.clients[0].in_netns():
        sockets = [socket.create_connection((VIP, 80), timeout=5) for _ in range(20)]
    connections = []
    for each in sockets:
        connection = http.client.HTTPConnection(VIP)
        connection.sock = each
        connections.append(connection)
    served_by = [_ask(connection, "before") for connection in connections]
    assert {"web0", "web1"} == set(served_by)
    one.add_backend()
    one.roll_out()
    slots = one.currents()

    agent.process.send_signal(signal.SIGKILL)
    agent.process.wait(5)
    assert served_by == [_ask(connection, "dead") for connection in connections]
    assert one.fetch() in {"web0", "web1", "web2"}
    assert (slots == one.currents()).all()

    agent = one.start()
    assert '"replaced": true' in agent.log_text()
    state = one.state()
    assert (2, 2, True, "") == (state["committed"], state["staged"], state["taken_over"], state["problem"])
    assert (slots == one.currents()).all()
    assert served_by == [_ask(connection, "again") for connection in connections]
    one.add_backend()
    one.roll_out()
    assert not (slots == one.currents()).all()
    assert served_by == [_ask(connection, "changed") for connection in connections]
    for connection in connections:
        connection.close()


def test_sigterm_leaves_the_fast_path_and_detach_on_exit_leaves_nothing(one: OneNode) -> None:
    agent = one.start()
    one.add_backend()
    one.roll_out()
    assert 0 == agent.stop()
    assert "web0" == one.fetch()
    agent = one.start("--detach-on-exit")
    assert "web0" == one.fetch()
    state = one.state()
    assert ("native", "eth0", 1, 0) == (
        state["xdp"]["mode"],
        state["interface"],
        len(state["vips"]),
        state["bytes_per_flow_steady"],
    )
    assert 1 <= state["packets"]["local"]
    assert 0 == agent.stop()
    assert not (one.lab.pin_dir(one.node) / "maps").exists()
    assert "prog/xdp" not in one.node.run(["ip", "link", "show", "eth0"]).stdout
    assert "hf_tc" not in one.node.run(["tc", "filter", "show", "dev", "eth0", "egress"]).stdout


def test_an_end_after_a_farewell_leaves_nothing_and_only_that(one: OneNode) -> None:
    agent = one.start()
    one.add_backend()
    one.roll_out()
    said = [one.call("POST", wire.PATH_FAREWELL, who=who)[0] for who in (one.node.name, "viewer", "controller")]
    assert [403, 403, 200] == said
    assert "web0" == one.fetch(), "nothing ends yet"
    agent.process.send_signal(signal.SIGKILL)
    agent.process.wait(5)
    agent = one.start()
    assert 0 == agent.stop()
    assert "web0" == one.fetch(), "a new process has not heard of it"

    agent = one.start()
    assert 200 == one.call("POST", wire.PATH_FAREWELL)[0]
    assert 0 == agent.stop()
    assert '"forwarding": "ends with it"' in agent.log_text()
    assert not (one.lab.pin_dir(one.node) / "maps").exists()
    assert "prog/xdp" not in one.node.run(["ip", "link", "show", "eth0"]).stdout
    assert "clsact" not in one.node.run(["tc", "qdisc", "show", "dev", "eth0"]).stdout


def test_programs_that_somebody_takes_off_the_uplink_are_put_back(one: OneNode) -> None:
    agent = one.start()
    one.add_backend()
    one.roll_out()
    assert "web0" == one.fetch()
    for program, line in (("hf_xdp", "ip link set dev eth0 xdp off"), ("hf_tc", "tc qdisc del dev eth0 clsact")):
        one.node.run(line.split())
        sample = f'holdfast_reattached_total{{program="{program}"}}'
        until(lambda sample=sample: 1 == one.metric(sample), program)  # type: ignore[misc]
        assert ("web0", "ok\n") == (one.fetch(), one.page("readyz"))
    assert 2 == agent.log_text().count('"event": "attached again"')
    assert ("native", "") == (one.state()["xdp"]["mode"], one.state()["problem"])


def test_an_lb_whose_place_on_the_uplink_is_taken_is_not_ready_and_says_by_whom(one: OneNode) -> None:
    agent = one.start()
    one.add_backend()
    one.roll_out()
    one.node.run(["ip", "link", "set", "dev", "eth0", "xdp", "off"])
    program = lab_kernel.xdp_return_load(lab_kernel.XDP_PASS, "foreign")  # iproute2 would leave folders in bpffs
    one.lab.run.worker.call(lambda: one.node.attach_xdp("eth0", program))
    os.close(program)
    until(lambda: "ok\n" != one.page("readyz"), "503")
    sentence = one.page("readyz")
    assert sentence.startswith("hf_xdp is not attached to eth0 any more: another program (id "), sentence
    assert "ip link set dev eth0 xdp off" in sentence
    assert (0, 1) == (
        one.metric('holdfast_xdp_attached{interface="eth0",mode="none"}'),
        one.metric('holdfast_tc_attached{interface="eth0"}'),
    )
    assert sentence.strip() == one.state()["xdp"]["why"]
    one.node.run(["ip", "link", "set", "dev", "eth0", "xdp", "off"])
    until(lambda: "ok\n" == one.page("readyz"), "200")
    assert ("web0", 1) == (one.fetch(), one.metric('holdfast_xdp_attached{interface="eth0",mode="native"}'))
    assert 1 == agent.log_text().count('"event": "not attached"'), "one line, however long it takes"


def test_an_uplink_that_is_made_anew_ends_the_agent_once_it_is_there_again(one: OneNode) -> None:
    agent = one.start()
    one.add_backend()
    one.roll_out()
    one.node.run(["ip", "link", "del", "dev", "eth0"])
    until(lambda: "the interface eth0 is gone" in one.page("readyz"), "503")
    assert (0, 0) == (
        one.metric('holdfast_xdp_attached{interface="eth0",mode="none"}'),
        one.metric('holdfast_tc_attached{interface="eth0"}'),
    )
    one.node.run(["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "cable"])
    time.sleep(1.5 * LOOK_AFTER_NS / 1e9)
    assert agent.alive, "a start could do nothing yet: it has no address, and is down"
    for line in ("link set cable up", "link set eth0 up", f"address add {one.node.address}/24 dev eth0"):
        one.node.run(["ip", *line.split()])
    assert 1 == agent.wait(20)
    (sentence,) = [line for line in agent.log_text().splitlines() if not line.startswith("{")]
    assert "the interface eth0 has been made anew (index " in sentence
    one.start()
    assert ("native", 1, "") == (one.state()["xdp"]["mode"], one.state()["committed"], one.state()["problem"])


def test_the_mss_follows_the_mtu_of_the_uplink(one: OneNode) -> None:
    one.start()
    one.add_backend()
    one.roll_out()
    before = one.mss()
    one.node.run(["ip", "link", "set", "dev", "eth0", "mtu", "1300"])
    until(lambda: one.mss() <= 1300 - UNDERLAY_EXTRA_BYTES - MSS_OVERHEAD_BYTES, f"{before} has become less")
    assert before > 1300 - UNDERLAY_EXTRA_BYTES - MSS_OVERHEAD_BYTES
    assert "web0" == one.fetch()


def test_what_the_machine_lacks_is_one_sentence_and_exit_1(one: OneNode) -> None:
    common = [*python("-m", "lbpod.cli"), "agent", "--node", one.node.name, "--tls", str(one.folder / "tls")]
    for more, said in (
        (["--interface", "nope"], "no interface 'nope'"),
        (["--interface", "eth0", "--pins", str(one.folder)], "BPF file system"),
        (["--interface", "eth0", "--bpf-object", "/nothing.o"], "/nothing.o"),
        (["--interface", "eth0", "--node", "stranger"], "stranger.crt is not there"),
    ):
        result = one.node.run([*common, *more], check=False)
        assert (1, True) == (result.returncode, said in result.stderr), result.stderr
        assert 1 == len([line for line in result.stderr.splitlines() if not line.startswith("{")])
    result = one.node.run([*common, "--listen", "9900"], check=False)
    assert (2, True) == (result.returncode, "ADDRESS:PORT" in result.stderr)
