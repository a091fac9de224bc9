"""End to end, on a cluster with kubelets: what a user does, and what happens to a cluster, while 200 connections from
outside are open. In this order: the first test installs the chart as the README says, the last one uninstalls it."""

import signal
import time
from collections.abc import Iterator

import pytest

from tests.cluster import scene as play
from tests.cluster.scene import Scene
from tests.cluster.stage import Cluster, until
from tests.cluster.whole import WholeCluster
from tests.tidy.sources import ROOT


@pytest.fixture
def own(cluster: Cluster) -> WholeCluster:
    """A cluster that may lose nodes and its API server, and has a second address: asked for before a scene begins."""
    if not isinstance(cluster, WholeCluster):
        pytest.skip("missing feature: own-cluster (nodes and API server of a given one are left alone; it has one VIP)")
    return cluster


@pytest.fixture
def scene(cluster: Cluster) -> Iterator[Scene]:
    with play.scene(cluster) as begun:
        yield begun


def test_the_quick_start_of_the_readme_serves_a_page(cluster: Cluster) -> None:
    transcript = ""
    for line in play.readme_commands():
        if line.startswith("curl"):
            play.wait_backends(cluster, 2)
            cluster.wait_router()
        try:
            said = play.run_like_a_reader(cluster, line)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{cluster.describe()}\n{play.agents_say(cluster)}") from error
        transcript += f"$ {cluster.here(line)}\n{said}"
    (cluster.log_dir / "quickstart.txt").write_text(transcript)
    assert said.strip() in {one["metadata"]["name"] for one in cluster.pods(cluster.shop, app="web")}
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


def test_scaled_to_nothing_and_back(cluster: Cluster) -> None:
    with play.scene(cluster) as scene:
        scene.scale(0)
        until("all pods to be told to end", lambda: not scene.pods())
        scene.wait_backends(0)
        time.sleep(play.PRE_STOP_S - 2 * play.TOLD_S - scene.watcher.oldest())
        now = scene.checker.poll()
        assert now is not None
        assert (0, 0) == (now["broken"], now["broken_backend_gone"]), "they serve until they end"
    until("the pods to be gone", lambda: not cluster.pods(cluster.shop, app="web"))
    scene.until_condition("Ready", "False")
    with play.scene(cluster) as scene:
        scene.until_condition("Ready", "True")
        scene.unbroken()


def test_a_load_balancer_pod_is_deleted(scene: Scene) -> None:
    (pod,) = scene.agents_on(scene.hosts()[0])
    scene.cluster.kubectl("-n", scene.cluster.system, "delete", "pod", pod["metadata"]["name"], "--timeout=120s")
    scene.wait_agents()
    assert 0 == scene.unbroken()["broken_backend_gone"]


def test_a_node_is_drained(scene: Scene) -> None:
    node = scene.hosts()[-1]
    with scene.cluster.drained(node):
        scene.wait_old_pods_gone()
        scene.wait_backends(play.REPLICAS)
        assert node not in scene.hosts()
    scene.unbroken()


def test_a_node_is_lost(own: WholeCluster, scene: Scene) -> None:
    node = own.node(scene.host_without_operator())
    with scene.losing(node.name):
        own.lose(node)
    scene.wait_replaced(node.name, others=len(own.nodes) - 1)
    scene.unbroken()
    own.replace(node)


def test_a_node_is_lost_while_the_backends_are_updated_and_a_load_balancer_pod_is_deleted(
    own: WholeCluster, scene: Scene
) -> None:
    node = own.node(scene.host_without_operator())
    (other, *_) = (one for one in own.nodes if one is not node)
    (pod,) = scene.agents_on(other.name)
    own.kubectl("rollout", "restart", "deployment/web")
    own.kubectl("-n", own.system, "delete", "pod", pod["metadata"]["name"], "--wait=false")
    with scene.losing(node.name):
        own.lose(node)
    own.kubectl("rollout", "status", "deployment/web", "--timeout=200s")
    scene.wait_replaced(node.name, others=len(own.nodes) - 1)
    scene.unbroken()
    own.replace(node)


def test_the_api_server_restarts(own: WholeCluster, scene: Scene) -> None:
    own.api.apiserver.stop(signal.SIGKILL)
    time.sleep(5)
    own.api.apiserver.start()
    own.api.wait()
    scene.scale(play.REPLICAS + 1)
    scene.wait_backends(play.REPLICAS + 1)
    scene.wait_agents()
    assert 0 == scene.unbroken()["broken_backend_gone"]


def test_the_operator_is_gone_and_comes_back(scene: Scene, pytestconfig: pytest.Config) -> None:
    operator = ("-n", scene.cluster.system, "scale", "deployment/holdfast-operator")
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
    scene.cluster.helm("upgrade", "holdfast", chart, "--namespace", scene.cluster.system, *changed)
    scene.wait_agents(240)
    scene.cluster.helm("rollback", "holdfast", "--namespace", scene.cluster.system)
    scene.wait_agents(240)
    scene.wait_backends(play.REPLICAS)
    assert 0 == scene.unbroken()["broken_backend_gone"]


def test_helm_test_fetches_a_page_through_an_address_of_its_own(own: WholeCluster) -> None:
    """Without the Pod that asks the operator, for that needs DNS."""
    own.let_nodes_speak_to_vips()
    release = ("holdfast", "--namespace", own.system)
    given = ("--reuse-values", "--set", f"test.address={play.TEST_VIP}")
    own.helm("upgrade", *release[:1], str(ROOT / "charts/holdfast"), *release[1:], *given)
    own.helm("test", *release, "--filter", "!name=holdfast-test-ready", "--timeout", "240s")
    assert not own.pods(own.system, **{"app.kubernetes.io/component": "test"})


def test_uninstalled_it_leaves_nothing_on_the_nodes(cluster: Cluster) -> None:
    cluster.kubectl("delete", "virtualservice", "web", "--timeout=30s")
    cluster.helm("uninstall", "holdfast", "--namespace", cluster.system, "--wait", "--timeout", "120s")
    until("the pods to be gone", lambda: not cluster.pods(cluster.system))
    assert [] == cluster.left_on_nodes()
    cluster.kubectl("delete", "namespace", cluster.system, "--timeout=60s")
