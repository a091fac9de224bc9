"""End to end, on a cluster with kubelets: what a user does, and what happens to a cluster, while 200 connections from
outside are open. In this order: the first test installs the chart as the README says, the last one uninstalls it."""

import signal
import time
from collections.abc import Iterator

import pytest

from tests.cluster import scene as play
from tests.cluster.scene import Scene
from tests.cluster.whole import WholeCluster, until
from tests.tidy.sources import ROOT


@pytest.fixture
def scene(cluster: WholeCluster) -> Iterator[Scene]:
    with play.scene(cluster) as begun:
        yield begun


def test_the_quick_start_of_the_readme_serves_a_page(cluster: WholeCluster) -> None:
    transcript = ""
    for line in play.readme_commands():
        if line.startswith("curl"):
            play.wait_backends(cluster, 2)
            until("the router to have all nodes", lambda: len(cluster.announcer.ready) == 3)
        try:
            said = play.run_like_a_reader(cluster, line)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{cluster.describe()}\n{play.agents_say(cluster)}") from error
        transcript += f"$ {line}\n{said}"
    (cluster.lab.log_dir / "quickstart.txt").write_text(transcript)
    assert said.strip() in {one["metadata"]["name"] for one in cluster.pods(play.SHOP, app="web")}
    assert "successfully rolled out" in transcript
    assert "virtualservice.holdfast.dev/web created" in transcript


def test_a_rolling_update_of_the_backends(scene: Scene) -> None:
    before = {one["metadata"]["name"] for one in scene.pods()}
    scene.cluster.kubectl("rollout", "restart", "deployment/web")
    scene.cluster.kubectl("rollout", "status", "deployment/web", "--timeout=200s")
    scene.wait_old_pods_gone()
    scene.wait_backends(play.REPLICAS)
    assert not before & {one["metadata"]["name"] for one in scene.pods()}
    scene.unbroken()


def test_scaled_to_nothing_and_back(cluster: WholeCluster) -> None:
    with play.scene(cluster) as scene:
        scene.scale(0)
        until("all pods to be told to end", lambda: not scene.pods())
        scene.wait_backends(0)
        time.sleep(play.PRE_STOP_S - 2 * play.TOLD_S - scene.watcher.oldest())
        now = scene.checker.poll()
        assert now is not None
        assert (0, 0) == (now["broken"], now["broken_backend_gone"]), "they serve until they end"
    until("the pods to be gone", lambda: not cluster.pods(play.SHOP, app="web"))
    scene.until_condition("Ready", "False")
    with play.scene(cluster) as scene:
        scene.until_condition("Ready", "True")
        scene.unbroken()


def test_a_load_balancer_pod_is_deleted(scene: Scene) -> None:
    (pod,) = scene.agents_on(scene.cluster.nodes[0].name)
    scene.cluster.kubectl("-n", play.SYSTEM, "delete", "pod", pod["metadata"]["name"], "--timeout=120s")
    scene.wait_agents()
    assert 0 == scene.unbroken()["broken_backend_gone"]


def test_a_node_is_drained(scene: Scene) -> None:
    node = scene.cluster.nodes[1].name
    drain = ("--ignore-daemonsets", "--delete-emptydir-data", "--timeout=150s")
    try:
        scene.cluster.kubectl("drain", node, *drain)
        scene.wait_old_pods_gone()
        scene.wait_backends(play.REPLICAS)
        assert node not in {one["spec"]["nodeName"] for one in scene.pods()}
    finally:
        scene.cluster.kubectl("uncordon", node)
    scene.unbroken()


def test_a_node_is_lost(scene: Scene) -> None:
    node = scene.node_without_operator()
    scene.lose(node)
    scene.wait_replaced(node)
    scene.unbroken()
    scene.cluster.replace(node)


def test_a_node_is_lost_while_the_backends_are_updated_and_a_load_balancer_pod_is_deleted(scene: Scene) -> None:
    node = scene.node_without_operator()
    (other, *_) = (one for one in scene.cluster.nodes if one is not node)
    (pod,) = scene.agents_on(other.name)
    scene.cluster.kubectl("rollout", "restart", "deployment/web")
    scene.cluster.kubectl("-n", play.SYSTEM, "delete", "pod", pod["metadata"]["name"], "--wait=false")
    scene.lose(node)
    scene.cluster.kubectl("rollout", "status", "deployment/web", "--timeout=200s")
    scene.wait_replaced(node)
    scene.unbroken()
    scene.cluster.replace(node)


def test_the_api_server_restarts(scene: Scene) -> None:
    scene.cluster.api.apiserver.stop(signal.SIGKILL)
    time.sleep(5)
    scene.cluster.api.apiserver.start()
    scene.cluster.api.wait()
    scene.scale(play.REPLICAS + 1)
    scene.wait_backends(play.REPLICAS + 1)
    scene.wait_agents()
    assert 0 == scene.unbroken()["broken_backend_gone"]


def test_the_operator_is_gone_and_comes_back(scene: Scene, pytestconfig: pytest.Config) -> None:
    operator = ("-n", play.SYSTEM, "scale", "deployment/holdfast-operator")
    scene.cluster.kubectl(*operator, "--replicas=0")
    scene.scale(play.REPLICAS + 1)
    time.sleep(pytestconfig.getoption("--operator-away"))
    assert play.REPLICAS == play.virtual_service(scene.cluster)["status"]["backends"]["ready"]
    scene.cluster.kubectl(*operator, "--replicas=1")
    scene.wait_backends(play.REPLICAS + 1)
    assert 0 == scene.unbroken()["broken_backend_gone"]


def test_holdfast_is_upgraded_and_rolled_back(scene: Scene) -> None:
    chart = str(ROOT / "charts/holdfast")
    changed = ("--reuse-values", "--set", "loadBalancers.logLevel=debug", "--set", "operator.logLevel=debug")
    scene.cluster.helm("upgrade", "holdfast", chart, "--namespace", play.SYSTEM, *changed)
    scene.wait_agents(240)
    scene.cluster.helm("rollback", "holdfast", "--namespace", play.SYSTEM)
    scene.wait_agents(240)
    scene.wait_backends(play.REPLICAS)
    assert 0 == scene.unbroken()["broken_backend_gone"]


def test_uninstalled_it_leaves_nothing_on_the_nodes(cluster: WholeCluster) -> None:
    cluster.kubectl("delete", "virtualservice", "web", "--timeout=30s")
    cluster.helm("uninstall", "holdfast", "--namespace", play.SYSTEM, "--wait", "--timeout", "120s")
    until("the pods to be gone", lambda: not cluster.pods(play.SYSTEM))
    for node in cluster.nodes:
        assert "xdp" not in node.run("ip", "-details", "link", "show", "dev", "eth0"), node.name
        assert "clsact" not in node.run("tc", "qdisc", "show", "dev", "eth0"), node.name
        # Two that the kernel puts into every new bpffs.
        assert {"maps.debug", "progs.debug"} >= set(node.run("ls", "/sys/fs/bpf").split()), node.name
    cluster.kubectl("delete", "namespace", play.SYSTEM, "--timeout=60s")
