"""The whole thing as a user runs it: agents, controller, config file, real servers, and clients that check every byte.

One cluster for all tests here, three LBs and two nodes with backends; what a test changes it changes by editing the
file. While it does, ECMP is reshuffled three times a second, so that established flows keep arriving at other LBs.
"""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from lbpod.lab import CheckerRun, Lab, Node
from tests.integration.traffic_cluster import VIP, AgentCluster, Service, reshuffling, wait_for
from tests.integration.traffic_hosts import fetch

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[AgentCluster]:
    with Lab(nodes=5, clients=3) as lab:
        cluster = AgentCluster(lab, 3)
        cluster.prepare()
        for name, protocol, port, affinity in (
            ("web", "TCP", 80, "None"),
            ("dns", "UDP", 53, "None"),
            ("shop", "TCP", 81, "ClientIP"),
        ):
            service = cluster.add_service(name, protocol, port, affinity=affinity)
            for _ in range(2):
                cluster.add_backend(service)
        try:
            cluster.start_all()
            yield cluster
        finally:
            cluster.stop()


def _start(cluster: AgentCluster, service: Service, client: int, long_count: int, short_rate: int) -> CheckerRun:
    udp = service.protocol == "UDP"
    return CheckerRun.start(
        cluster.lab,
        f"{VIP}:{service.port}",
        host=cluster.lab.clients[client],
        long_count=long_count,
        short_rate=short_rate,
        interval_ms=200,
        udp=udp,
    )


def _wait_open(checker: CheckerRun, count: int) -> dict[str, Any]:
    return checker.wait_until(lambda counters: counters["long_lived"] == count)


def _whole(final: dict[str, Any], checker: CheckerRun) -> None:
    """Nothing failed, and something happened."""
    kinds = ("broken", "broken_backend_gone", "broken_unattributed")
    assert [0, 0, 0] == [final[kind] for kind in kinds], checker.failures[:5]
    assert final["requests"] > 100


def _sum(cluster: AgentCluster, *verdicts: str) -> float:
    return sum(cluster.packets(node, verdict) for node in cluster.lbs for verdict in verdicts)


def test_scaling_draining_and_replacing_break_nothing_and_tracking_ends(cluster: AgentCluster) -> None:
    web, dns, shop = (cluster.services[name] for name in ("web", "dns", "shop"))
    checkers = [
        _start(cluster, web, 0, long_count=100, short_rate=50),
        _start(cluster, dns, 1, long_count=40, short_rate=20),
        _start(cluster, shop, 2, long_count=30, short_rate=0),
    ]
    for checker, count in zip(checkers, (100, 40, 30), strict=True):
        _wait_open(checker, count)
    sticky = [fetch(cluster.lab.clients[2], VIP, shop.port, "/")]
    with reshuffling(cluster, seed=11):
        for step in (_scale_up, _drain, _replace):
            step(cluster)
            sticky += [fetch(cluster.lab.clients[2], VIP, shop.port, "/") for _ in range(5)]
            _let_requests_pass(checkers[0], 200)
        assert cluster.tracking() > 0, "old flows are alive: their slots cannot have settled"
    finals = [checker.stop() for checker in checkers]
    for final, checker in zip(finals, checkers, strict=True):
        _whole(final, checker)
    assert 1 == len(finals[2]["backends"]), "ClientIP: all flows of a client at one backend"
    assert {next(iter(finals[2]["backends"]))} == {answer.decode().strip() for answer in sticky}
    assert _sum(cluster, "relayed") > 0
    assert _sum(cluster, "cache_hit") > 0
    assert _sum(cluster, "chain_started", "first_alone") > 0
    assert 0 == _sum(cluster, "decided_alone", "unrecorded_drop", "drop_no_backend", "drop_no_route")
    wait_for(lambda: cluster.tracking() == 0, "all slots settle once the old flows have ended", cluster.told)


def _scale_up(cluster: AgentCluster) -> None:
    for service in cluster.services.values():
        cluster.add_backend(service)
    cluster.change()


def _drain(cluster: AgentCluster) -> None:
    for service in cluster.services.values():
        service.draining.add(service.backends[0].name)
    cluster.change()


def _replace(cluster: AgentCluster) -> None:
    for service in cluster.services.values():
        cluster.add_backend(service)
        service.draining.add(service.backends[1].name)
    cluster.change()


def _let_requests_pass(checker: CheckerRun, count: int) -> None:
    known = checker.poll()
    have = known["requests"] if known else 0
    checker.wait_until(lambda counters: counters["requests"] >= have + count)


def test_new_connections_go_to_backends_that_are_ready(cluster: AgentCluster) -> None:
    for service in cluster.services.values():
        ready = {one.name for one in service.backends if one.name not in service.draining}
        assert len(ready) == 2, "what the test before left"
    web = cluster.services["web"]
    wanted = {one.name for one in web.backends if one.name not in web.draining}
    assert wanted == {fetch(cluster.lab.client, VIP, web.port, "/").decode().strip() for _ in range(30)}


def test_a_backend_that_is_taken_out_and_removed_breaks_only_its_own_flows(cluster: AgentCluster) -> None:
    web = cluster.services["web"]
    checker = _start(cluster, web, 0, long_count=60, short_rate=30)
    before = _wait_open(checker, 60)["backends"]
    victim = next(one for one in web.backends if one.name in before)
    with reshuffling(cluster, seed=12):
        checker.leaves(victim.name)
        cluster.take_out(web, victim)
        cluster.change()
        cluster.lab.remove_pod(victim.pod)
        checker.left(victim.name)
        _let_requests_pass(checker, 300)
    final = checker.stop()
    assert 0 == final["broken"], checker.failures[:5]
    assert final["broken_backend_gone"] >= before[victim.name]
    assert victim.name not in final["backends"]
    wait_for(lambda: cluster.tracking() == 0, "all slots settle", cluster.told)


@pytest.mark.parametrize("name", ["no YAML", "an unknown field", "a port out of range", "a backend without a node"])
def test_a_bad_edit_keeps_the_last_good_state_and_says_why(cluster: AgentCluster, name: str) -> None:
    good = cluster.config.read_text()
    web = cluster.services["web"]
    node = web.backends[0].pod.node.name
    bad = {
        "no YAML": "cluster: [\n",
        "an unknown field": good + "colour: blue\n",
        "a port out of range": good.replace("port: 80\n", "port: 80000\n", 1),
        "a backend without a node": good.replace(f"node: {node}", "node: nowhere", 1),
    }[name]
    assert good != bad
    generations = cluster.generations()
    try:
        cluster.replace_file(bad)
        wait_for(lambda: cluster.controller_ready()[0] == 503, "the controller says that the file is bad", cluster.told)
        sentence = cluster.controller_ready()[1]
        assert "holdfast.yaml:" in sentence, sentence
        assert 1 == len(sentence.strip().splitlines()), sentence
        assert 1 == cluster.controller_metrics()["holdfast_config_error"]
        assert fetch(cluster.lab.client, VIP, web.port, "/").decode().strip() in {one.name for one in web.backends}
        assert generations == cluster.generations()
    finally:
        cluster.replace_file(good)
    wait_for(lambda: cluster.controller_ready()[0] == 200, "the controller uses the good file", cluster.told)
    assert 0 == cluster.controller_metrics()["holdfast_config_error"]


def test_an_agent_killed_under_load_breaks_nothing_and_its_successor_takes_over(cluster: AgentCluster) -> None:
    """Steady slots: forwarding needs no agent. Then a change, which waits for the successor."""
    web, node = cluster.services["web"], cluster.lbs[1]
    checker = _start(cluster, web, 0, long_count=100, short_rate=50)
    _wait_open(checker, 100)
    with reshuffling(cluster, seed=13):
        passed = cluster.packets(node, "steady")
        cluster.kill_agent(node)
        _let_requests_pass(checker, 500)
        generation = max(cluster.generations())
        cluster.add_backend(web)
        cluster.write_config()
        program = cluster.start_agent(node)
        cluster.wait_agent(node)
        assert '"replaced": true' in program.log_text()
        assert cluster.packets(node, "steady") > passed, "the counters were taken over, and it went on meanwhile"
        wait_for(lambda: min(cluster.generations()) > generation, "the change comes into force", cluster.told)
        _let_requests_pass(checker, 300)
    final = checker.stop()
    _whole(final, checker)


def test_an_agent_killed_while_slots_track_breaks_neither_old_flows_nor_new_ones(cluster: AgentCluster) -> None:
    """The others believe its LB down and are wrong: its fast path goes on, and the router goes on sending to it."""
    web, node = cluster.services["web"], cluster.lbs[2]
    others = [one for one in cluster.lbs if one is not node]
    old = _start(cluster, web, 0, long_count=60, short_rate=30)
    _wait_open(old, 60)
    with reshuffling(cluster, seed=14):
        cluster.add_backend(web)
        cluster.change()
        known = [_believed_down(cluster, one) for one in others]
        cluster.kill_agent(node)
        wait_for(
            lambda: all(_believed_down(cluster, one) > before for one, before in zip(others, known, strict=True)),
            "the others believe it down",
            cluster.told,
        )
        new = _start(cluster, web, 1, long_count=120, short_rate=30)
        _wait_open(new, 120)
        _let_requests_pass(new, 400)
        cluster.start_agent(node)
        cluster.wait_agent(node)
        _let_requests_pass(new, 400)
    for checker in (old, new):
        _whole(checker.stop(), checker)
    wait_for(lambda: cluster.tracking() == 0, "all slots settle", cluster.told)


def _believed_down(cluster: AgentCluster, node: Node) -> float:
    return cluster.metric(node, 'holdfast_traces_total{what="believed down"}')


def test_a_controller_that_is_killed_and_restarted_changes_nothing_by_itself(cluster: AgentCluster) -> None:
    web = cluster.services["web"]
    assert cluster.controller is not None
    checker = _start(cluster, web, 0, long_count=30, short_rate=30)
    _wait_open(checker, 30)
    generations = cluster.generations()
    cluster.controller.process.send_signal(signal.SIGKILL)
    cluster.controller.process.wait(5)
    _let_requests_pass(checker, 100)
    cluster.start_controller()
    wait_for(lambda: cluster.controller_ready()[0] == 200, "the new controller is ready", cluster.told)
    assert generations == cluster.generations()
    cluster.add_backend(web)
    cluster.change()
    _let_requests_pass(checker, 100)
    _whole(checker.stop(), checker)
