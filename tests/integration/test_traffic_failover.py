"""Agents that die and agents that leave, as others see it: real processes in the lab, with a controller and without.

Times are printed, not asserted: `pytest -rP` shows them.
"""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from lbpod.lab import Lab, Node
from tests.integration.traffic_cluster import VIP, AgentCluster, wait_for
from tests.integration.traffic_hosts import fetch

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[AgentCluster]:
    with Lab(nodes=4, clients=1) as lab:
        cluster = AgentCluster(lab, 3)
        cluster.prepare()
        cluster.add_backend(cluster.add_service("web", "TCP", 80))
        try:
            cluster.start_all()
            wait_ring(cluster)
            yield cluster
        finally:
            cluster.stop()


def wait_ring(cluster: AgentCluster) -> None:
    """Until all LBs are in one ring, no change of it is under way, and nobody is believed to be down."""

    def together() -> bool:
        for node in cluster.lbs:
            seen = cluster.metrics(node)
            others = [value for name, value in seen.items() if name.startswith("holdfast_member_down")]
            if [0.0] * (len(cluster.lbs) - 1) != others or seen.get('holdfast_ring_step{step="none"}') != 1:
                return False
        return True

    wait_for(together, "all LBs are in the ring", cluster.told, seconds=60)


def down(cluster: AgentCluster, at: Node, about: Node) -> bool:
    """Does one LB believe another to be down? False, too, where it is not of the ring."""
    return cluster.metric(at, f'holdfast_member_down{{node="{about.name}"}}') == 1


def test_an_agent_that_is_killed_is_down_for_the_others_until_it_is_back(cluster: AgentCluster) -> None:
    first, second, third = cluster.lbs
    cluster.kill_agent(first)
    _wait_down(cluster, first, second, third)
    cluster.start_agent(first)
    wait_ring(cluster)


def test_nobody_needs_the_controller_for_it(cluster: AgentCluster) -> None:
    first, second, third = cluster.lbs
    assert cluster.controller is not None
    cluster.controller.process.send_signal(signal.SIGKILL)
    cluster.controller.process.wait(5)
    cluster.kill_agent(first)
    _wait_down(cluster, first, second, third)
    assert fetch(cluster.lab.clients[0], VIP, 80, "/"), "it goes on forwarding"
    cluster.start_agent(first)
    wait_ring(cluster)
    cluster.start_controller()
    cluster.wait_ready()


def test_an_lb_that_was_left_out_takes_no_traffic_before_the_controller_has_told_it(cluster: AgentCluster) -> None:
    """It is cut off, taken out of the ring, and back while nobody is there who could tell it but its peers."""
    first, second, _ = cluster.lbs
    cluster.lab.sever(first)
    members = f'holdfast_member_down{{node="{first.name}"}}'
    wait_for(lambda: members not in cluster.metrics(second), "the others form a ring without it", cluster.told)
    assert (200, "ok\n") == cluster.ready(first), "it hears nobody, and may be the only one that is left"
    assert cluster.controller is not None
    cluster.controller.process.send_signal(signal.SIGKILL)
    cluster.controller.process.wait(5)
    cluster.lab.mend(first)
    ends_ns = time.monotonic_ns() + 3 * 10**9
    said = ""
    while time.monotonic_ns() < ends_ns:
        # The first word that it hears may be one that was on its way all the time, of the generation before.
        status, said = cluster.ready(first)
        assert 503 == status, cluster.told()
        time.sleep(0.05)
    assert "in force elsewhere" in said, cluster.told()
    assert 200 == cluster.ready(second)[0], "those in the ring do not mind"
    cluster.start_controller()
    wait_ring(cluster)
    cluster.wait_ready()


def _wait_down(cluster: AgentCluster, dead: Node, *others: Node) -> None:
    began_ns = time.monotonic_ns()
    for at in others:
        wait_for(lambda at=at: down(cluster, at, dead), f"{at.name} believes it", cluster.told)  # type: ignore[misc]
        print(f"{at.name} believes {dead.name} down after {(time.monotonic_ns() - began_ns) / 1e6:.0f} ms")


def test_sigterm_leaves_the_ring_and_a_new_agent_joins_it(cluster: AgentCluster) -> None:
    first, second, _ = cluster.lbs
    cluster.kill_agent(first)
    cluster.start_agent(first, "--on-term", "leave")
    wait_ring(cluster)
    began_ns = time.monotonic_ns()
    agent = cluster.agents[first.name]
    agent.signal(signal.SIGTERM)
    wait_for(lambda: cluster.ready(first)[0] in {503, 0}, "it takes no more traffic", cluster.told)
    assert 0 == agent.wait(30), cluster.told()
    print(f"left after {(time.monotonic_ns() - began_ns) / 1e6:.0f} ms")
    assert "it is out of the ring" in agent.log_text(), agent.log_text()
    members = f'holdfast_member_down{{node="{first.name}"}}'
    wait_for(lambda: members not in cluster.metrics(second), "others do not count it any more", cluster.told)
    cluster.start_agent(first)
    wait_ring(cluster)
