"""One API server for all tests that need one: it takes some seconds to start, and every test uses a namespace of its
own. One whole cluster, with kubelets, for the end-to-end scenes, unless the user gives one. Where they were not built,
what needs them skips (`make e2e` builds them first)."""

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from tests.cluster.apiserver import ApiServer, api_server, why_not_here
from tests.cluster.given import GivenCluster, Refusal, Wish
from tests.cluster.stage import Cluster
from tests.cluster.whole import WholeCluster, why_no_nodes
from tests.tidy.sources import ROOT

LOGS = ROOT / "build/cluster"
CRD = ROOT / "crds/virtualservices.holdfast.dev.yaml"
_NUMBERS = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--operator-away",
        type=float,
        default=30,
        metavar="SECONDS",
        help="how long the operator is gone in its scene (300 in a full run)",
    )
    given = parser.getgroup("given", "end-to-end scenes on a cluster of yours (make e2e KUBECONFIG=... VIP=...)")
    given.addoption("--kubeconfig", metavar="FILE", help="its kubeconfig; the current context counts")
    given.addoption("--vip", default="", metavar="ADDRESS", help="what your router sends to the nodes, and nobody uses")
    given.addoption("--client", default="", metavar="COMMAND", help="goes before commands at the client; none: here")
    given.addoption("--images", default="", metavar="REGISTRY", help="where Holdfast's images are")
    given.addoption("--page", default="", metavar="IMAGE", help="one with nginx and a shell")
    given.addoption("--values", default="", metavar="FILE", help="more values for the chart")


def wish_of(config: pytest.Config) -> Wish | None:
    """The cluster that the user gives; None: the suite makes its own."""
    if config.getoption("--kubeconfig", None) is None:
        return None
    return Wish(**{one.name: config.getoption(f"--{one.name}") for one in dataclasses.fields(Wish)})


def pytest_configure(config: pytest.Config) -> None:
    """A cluster that cannot be used is refused before any test, in one sentence."""
    wish = wish_of(config)
    if wish is not None:
        try:
            GivenCluster(wish, LOGS).refuse()
        except Refusal as refusal:
            raise pytest.UsageError(f"holdfast: cannot go on: {refusal}") from refusal


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is marked, and skips where the API server was not built."""
    here = [item for item in items if item.path.is_relative_to(ROOT / "tests/cluster")]
    given = bool(here) and wish_of(here[0].config) is not None
    reason = why_not_here() if here and not given else ""
    no_nodes = why_no_nodes() if here and not given else ""
    for item in here:
        item.add_marker(pytest.mark.cluster)
        needs_nodes = {"cluster", "victim"} & set(getattr(item, "fixturenames", ()))
        if reason or (needs_nodes and no_nodes):
            item.add_marker(pytest.mark.skip(reason=reason or no_nodes))


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A running API server that knows our CRD."""
    with api_server(tmp_path_factory.mktemp("api") / "server") as server:
        server.kubectl("apply", "--server-side", "-f", str(CRD))
        server.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", str(CRD))
        yield server


@pytest.fixture
def namespace(api: ApiServer) -> Iterator[str]:
    """A namespace that is this test's own. Without a namespace controller none is ever removed, but the VirtualServices
    are: operators see the whole cluster."""
    name = f"test-{next(_NUMBERS)}"
    api.call("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    yield name
    api.call("DELETE", f"/apis/holdfast.dev/v1alpha1/namespaces/{name}/virtualservices")


def say(config: pytest.Config, sentence: str) -> None:
    """To the terminal, although output is captured: what takes a while, and why nobody should lose patience."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture is not None else nullcontext():
        print(f"\n==> {sentence}", flush=True)


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The user's, or three nodes with kubelets; nothing is installed yet. Logs stay in build/cluster."""
    config, wish = request.config, wish_of(request.config)
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    if wish is None:
        say(config, "starting a Kubernetes cluster with three nodes")
        with WholeCluster(log_dir=LOGS) as running:
            yield running
        return
    say(config, f"using the cluster of {wish.kubeconfig}")
    try:
        with GivenCluster(wish, LOGS) as given:
            try:
                yield given
            finally:
                say(config, "taking everything away from it again (a minute)")
    except Refusal as refusal:
        pytest.exit(f"holdfast: cannot go on: {refusal}", returncode=2)
