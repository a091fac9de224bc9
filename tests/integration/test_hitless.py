"""Agents are killed, restarted, upgraded and downgraded under 20,000 packets a second, and not one packet is lost.

Every datagram has a number, and every number must have reached the pod of its flow exactly once (``numbered``): packets
are counted, not connections, which forgive a loss. The agents of a mux and of a host with backends are replaced at the
same time, while the router moves flows between the LBs three times a second. First nobody is touched: a control, which
says that this machine and this harness lose nothing by themselves.

There is no controller meanwhile. It takes an LB that is silent for LOST_NS out of the ring, and then the hosts let no
packet of that LB in any more, however well it forwards: how long an agent may be away is the controller's to say, and a
busy machine must not be what this test measures.

What is printed can be quoted: the rate, and the longest gap between two datagrams at the pods in each phase.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lbpod.core.layout import CONFIG, LAYOUT_VERSION
from lbpod.datapath import libbpf
from lbpod.lab import CheckerRun, Lab, Node, Program, python
from tests.bpf.datapaths import another_build, built
from tests.integration.numbered import Account, Ledger
from tests.integration.traffic_cluster import VIP, AgentCluster, Service, reshuffling, wait_for

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]

CONTROL_S = 3
DEAD_S = 0.5
"""How long nobody looks after the fast path."""
EVENT_S = 120
"""A start takes up to three seconds of a CPU, and this load may leave an agent a tenth of one."""
ARRIVE_S = 10
"""The client reads the answers when it has sent what was due."""
PACKETS_MIN = 10_000
"""A phase with fewer has not put on the load that this is about."""
PORT = 53
NEWER = built("newer")


@dataclass
class Traffic:
    """A cluster under load, the load's ledger, and which agents are replaced."""

    cluster: AgentCluster
    ledger: Ledger
    service: Service

    @property
    def replaced(self) -> list[Node]:
        """A mux (owner of its share of the slots), and a host with backends."""
        return [self.cluster.lbs[0], self.cluster.hosts[0]]

    def add_backend(self) -> None:
        """A pod where what comes is noted; in the file with the next `write_config`."""
        self.ledger.watch(self.cluster.add_backend(self.service).pod)

    def start_client(self) -> Program:
        argv = python("-m", "tests.integration.numbered", "--ledger", str(self.ledger.folder))
        return self.cluster.lab.client.popen([*argv, "--address", VIP, "--port", str(PORT)], name="numbered")

    def dropped(self) -> dict[str, int]:
        """What links and sockets of the lab have dropped, for messages: the harness's own losses would be here."""
        lab, found = self.cluster.lab, {}
        for host in [lab.client, lab.router, *lab.nodes, *lab.pods()]:
            for link in json.loads(host.run(["ip", "-s", "-j", "link"]).stdout):
                for way, counted in link["stats64"].items():
                    found[f"{host.name} {link['ifname']} {way}"] = counted["dropped"] + counted["errors"]
            udp = [line.split() for line in host.run(["cat", "/proc/net/snmp"]).stdout.splitlines() if "Udp:" in line]
            found[f"{host.name} sockets"] = int(dict(zip(*udp[:2], strict=True))["RcvbufErrors"])
        return {name: count for name, count in found.items() if count}

    # --- What is done to the agents ---

    def stop_agents(self, number: signal.Signals) -> None:
        for node in self.replaced:
            self.cluster.agents[node.name].process.send_signal(number)
        for node in self.replaced:
            assert self.cluster.agents[node.name].process.wait(20) in (0, -number)

    def start_agents(self, *more: str) -> None:
        """New agents take over from those that are gone; ready when this returns."""
        programs = [self.cluster.start_agent(node, *more) for node in self.replaced]
        for node, program in zip(self.replaced, programs, strict=True):
            wait_for(
                lambda node=node: self.cluster.ready(node)[0] == 200,  # type: ignore[misc]
                f"{node.name} is ready",
                self.cluster.told,
                seconds=EVENT_S,
            )
            assert '"replaced": true' in program.log_text()


@pytest.fixture(scope="module")
def traffic() -> Iterator[Traffic]:
    with Lab(nodes=5, clients=2) as lab:
        cluster = AgentCluster(lab, 3)
        cluster.prepare()
        folder = lab.run_dir / "ledger"
        folder.mkdir()
        with Ledger(folder) as ledger:
            traffic = Traffic(cluster, ledger, cluster.add_service("count", "UDP", PORT))
            web = cluster.add_service("web", "TCP", 80)
            for _ in cluster.hosts:
                traffic.add_backend()
            for _ in cluster.hosts:
                cluster.add_backend(web)
            try:
                cluster.start_all()
                _stop_controller(cluster)
                wait_for(lambda: cluster.tracking() == 0, "all slots are steady", cluster.told, seconds=EVENT_S)
                client = traffic.start_client()
                with reshuffling(cluster, seed=15):
                    yield traffic
                assert client.alive, client.log_text()
                client.stop()
            finally:
                cluster.stop()


def _stop_controller(cluster: AgentCluster) -> None:
    """Once all LBs are in the ring, and every node knows it: what is half done would stay half done."""
    assert cluster.controller is not None, "it was started"
    wait_for(lambda: _is_calm(cluster), "all LBs are in the ring, and all nodes know it", cluster.told, seconds=EVENT_S)
    cluster.controller.stop()
    cluster.controller = None


def _is_calm(cluster: AgentCluster) -> bool:
    samples = [cluster.metrics(node) for node in cluster.lab.nodes]
    steps = [name for each in samples for name, value in each.items() if "holdfast_ring_step{" in name and value]
    known = {(each.get('holdfast_generation{phase="committed"}'), each.get("holdfast_ring_epoch")) for each in samples}
    serving = [cluster.metric(node, "holdfast_serving") for node in cluster.lbs]
    return {'holdfast_ring_step{step="none"}'} >= set(steps) and len(known) == 1 and set(serving) == {1.0}


@dataclass(frozen=True)
class Load:
    """All slots steady, or a third of them tracking; since when, and TCP beside it."""

    traffic: Traffic
    name: str
    checker: CheckerRun
    relayed: list[float]

    def relays(self) -> list[float]:
        """Packets relayed and decided by a record, at the LBs that are not replaced."""
        others, verdicts = self.traffic.cluster.lbs[1:], ("relayed", "record_hit")
        return [self.traffic.cluster.packets(node, verdict) for node in others for verdict in verdicts]


@pytest.fixture(scope="module", params=["steady", "tracking"])
def load(traffic: Traffic, request: pytest.FixtureRequest) -> Iterator[Load]:
    """tracking: LBs relay to owners, which know the flows by their records; the flows go on, so the slots track on."""
    cluster = traffic.cluster
    checker = CheckerRun.start(
        cluster.lab, f"{VIP}:80", host=cluster.lab.clients[1], long_count=40, short_rate=10, interval_ms=200
    )
    checker.wait_until(lambda counters: counters["long_lived"] == 40, seconds=EVENT_S)
    if request.param == "tracking":
        cluster.start_controller()
        wait_for(lambda: cluster.controller_ready()[0] == 200, "the controller is ready", cluster.told, seconds=EVENT_S)
        traffic.add_backend()
        cluster.change()
        _stop_controller(cluster)
    load = Load(traffic, request.param, checker, [])
    load.relayed[:] = load.relays()
    yield load
    checker.stop()


# --- What is done, a phase each ---------------------------------------------------------------------------------------


def nothing(_: Traffic) -> None:
    time.sleep(CONTROL_S)


def kill_and_restart(traffic: Traffic) -> None:
    traffic.stop_agents(signal.SIGKILL)
    time.sleep(DEAD_S)
    traffic.start_agents()


def kill_while_starting(traffic: Traffic) -> None:
    """Between steps of taking over: programs pinned and not attached, attached, restored and listening."""
    traffic.stop_agents(signal.SIGKILL)
    other = another_build(traffic.ledger.folder, 1)  # for what is pinned and has not changed is not pinned again
    for happened, more in ((_pins_programs, ("--bpf-object", str(other))), (_has_attached, ()), (_listens, ())):
        had = [_programs_pinned(traffic, node) for node in traffic.replaced]
        agents = [traffic.cluster.start_agent(node, *more) for node in traffic.replaced]
        for node, agent, before in zip(traffic.replaced, agents, had, strict=True):
            deadline = time.monotonic() + EVENT_S
            while not happened(traffic, node, agent, before):
                assert agent.alive, agent.log_text()
                assert time.monotonic() < deadline, agent.log_text()
                time.sleep(0.001)
            agent.process.send_signal(signal.SIGKILL)
        for agent in agents:
            agent.process.wait(EVENT_S)
    traffic.start_agents()


def _programs_pinned(traffic: Traffic, node: Node) -> set[str]:
    return {path.name for path in (traffic.cluster.lab.pin_dir(node) / "programs").iterdir()}


def _pins_programs(traffic: Traffic, node: Node, _: Program, before: set[str]) -> bool:
    return bool(_programs_pinned(traffic, node) - before)


def _has_attached(_: Traffic, __: Node, agent: Program, ___: set[str]) -> bool:
    return '"attached"' in agent.log_text()


def _listens(_: Traffic, __: Node, agent: Program, ___: set[str]) -> bool:
    return '"listening"' in agent.log_text()


def stop_and_restart(traffic: Traffic) -> None:
    traffic.stop_agents(signal.SIGTERM)
    time.sleep(DEAD_S)
    traffic.start_agents()


def upgrade(traffic: Traffic) -> None:
    """To programs with one map and one verdict more: the map is new, the counters are made anew."""
    traffic.stop_agents(signal.SIGTERM)
    traffic.start_agents("--bpf-object", str(NEWER))
    before = [_seen_by_newer(traffic, node) for node in traffic.replaced]
    assert None not in before, "the map that only the newer programs know is pinned"
    wait_for(
        lambda: all(
            _seen_by_newer(traffic, node) != count for node, count in zip(traffic.replaced, before, strict=True)
        ),
        "the newer programs see packets",
    )


def downgrade(traffic: Traffic) -> None:
    """The older programs do not know the map, and nobody will keep it current: its pin goes."""
    traffic.stop_agents(signal.SIGTERM)
    assert None not in [_seen_by_newer(traffic, node) for node in traffic.replaced]
    traffic.start_agents()
    assert [None, None] == [_seen_by_newer(traffic, node) for node in traffic.replaced]


PHASES = (nothing, kill_and_restart, kill_while_starting, stop_and_restart, upgrade, downgrade)


def _map(traffic: Traffic, node: Node, name: str) -> int | None:
    return libbpf.pinned(str(traffic.cluster.lab.pin_dir(node) / "maps" / name))


def _seen_by_newer(traffic: Traffic, node: Node) -> int | None:
    """Packets that the newer programs have counted; None where their map is not pinned."""
    fd = _map(traffic, node, "newer_packets")
    if fd is None:
        return None
    try:
        return int.from_bytes(libbpf.map_lookup(fd, "newer_packets", bytes(4), 8) or b"", "little")
    finally:
        os.close(fd)


@pytest.mark.parametrize("phase", PHASES)
def test_not_a_packet_is_lost(load: Load, phase: Callable[[Traffic], None], capsys: pytest.CaptureFixture[str]) -> None:
    phase(load.traffic)
    time.sleep(DEAD_S)
    found = load.traffic.ledger.account(ARRIVE_S)
    with capsys.disabled():
        print(f"\n{load.name:9s}{phase.__name__:20s}{found}")
    _expect_whole(load.traffic, found)


def test_no_flow_has_moved_and_no_connection_is_broken(load: Load) -> None:
    """After all that was done, over all of it."""
    assert {1} == {len(pods) for pods in load.traffic.ledger.pods_of_flow.values()}
    final = load.checker.wait_until(lambda counters: counters["requests"] > 200, seconds=EVENT_S)
    kinds = ("broken", "broken_backend_gone", "broken_unattributed")
    assert [0, 0, 0] == [final[kind] for kind in kinds], load.checker.failures[:5]
    cluster = load.traffic.cluster
    tracking = [cluster.metric(node, "holdfast_tracking_slots") for node in cluster.lbs]
    assert ({True} if load.name == "tracking" else {False}) == {count > 0 for count in tracking}
    if load.name == "tracking":
        assert all(new > old for old, new in zip(load.relayed, load.relays(), strict=True))
        assert 0 == sum(cluster.packets(node, "unrecorded_drop") for node in cluster.lbs)


def _expect_whole(traffic: Traffic, found: Account) -> None:
    if not found.is_whole:
        pytest.fail(f"{found}\n{found!r}\nthe lab dropped {traffic.dropped()}\n{traffic.cluster.told()}")
    assert found.sent >= PACKETS_MIN
    assert 0 == traffic.ledger.sent.totals[1], "the kernel told the client of an error"


# --- What is refused --------------------------------------------------------------------------------------------------


def _fast_path_of(traffic: Traffic, node: Node) -> tuple[object, ...]:
    """Everything that a refused agent must have left as it was: programs in force, pins."""
    pins = traffic.cluster.lab.pin_dir(node)
    xdp = json.loads(node.run(["ip", "-d", "-j", "link", "show", "eth0"]).stdout)[0]["xdp"]
    tc = node.run(["tc", "filter", "show", "dev", "eth0", "egress"]).stdout
    return xdp, tc, sorted(str(path.relative_to(pins)) for path in pins.rglob("*"))


def _refused(traffic: Traffic, node: Node, sentence: str, *more: str) -> None:
    """An agent that is started says why it cannot, in one line, and ends; everything is as before."""
    before = _fast_path_of(traffic, node)
    done = node.run(traffic.cluster.agent_argv(node, *more), check=False)
    said = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert (1, 1) == (done.returncode, len(said)), done.stderr
    assert sentence in said[0]
    assert before == _fast_path_of(traffic, node)


@contextmanager
def _layout_of(traffic: Traffic, node: Node, version: int) -> Iterator[None]:
    """The pinned maps say that they are of another layout."""
    fd = _map(traffic, node, "config")
    assert fd is not None, "config is pinned"
    row: npt.NDArray[Any] = np.frombuffer(libbpf.map_lookup(fd, "config", bytes(4), CONFIG.itemsize) or b"", CONFIG)
    other = row.copy()
    other["version"] = version
    libbpf.map_update(fd, "config", bytes(4), other.tobytes())
    try:
        yield
    finally:
        libbpf.map_update(fd, "config", bytes(4), row.tobytes())
        os.close(fd)


def test_what_does_not_fit_is_refused_in_one_sentence_and_moves_no_packet(traffic: Traffic) -> None:
    traffic.stop_agents(signal.SIGTERM)
    mux, host = traffic.replaced
    for node, version in ((mux, LAYOUT_VERSION + 1), (host, LAYOUT_VERSION - 1)):
        with _layout_of(traffic, node, version):
            _refused(traffic, node, f"have layout {version}, this agent writes layout {LAYOUT_VERSION}")
    for node, name, sentence in (
        (mux, "foreign", "is not in the object"),
        (host, "other_layout", "was built from other headers than this package's"),
        (mux, "resized", "has 4096 entries and the programs need 8192, which is another layout"),
    ):
        _refused(traffic, node, sentence, "--bpf-object", str(built(name)))
    traffic.start_agents()
    _expect_whole(traffic, traffic.ledger.account(ARRIVE_S))
