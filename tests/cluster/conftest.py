"""One API server for all tests that need one: it takes some seconds to start, and every test uses a namespace of its
own. One whole cluster, with kubelets, for the end-to-end scenes. Where they were not built, what needs them skips
(`make e2e` builds them first)."""

import itertools
import shutil
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from tests.cluster.apiserver import ApiServer, api_server, why_not_here
from tests.cluster.whole import WholeCluster, why_no_nodes
from tests.tidy.sources import ROOT


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--operator-away",
        type=float,
        default=30,
        metavar="SECONDS",
        help="how long the operator is gone in its scene (300 in a full run)",
    )


CRD = ROOT / "crds/virtualservices.holdfast.dev.yaml"
_NUMBERS = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is marked, and skips where the API server was not built."""
    here = [item for item in items if item.path.is_relative_to(ROOT / "tests/cluster")]
    reason = why_not_here() if here else ""
    no_nodes = why_no_nodes() if here else ""
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


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[WholeCluster]:
    """Three nodes with kubelets, and nothing installed yet. Its logs stay in build/cluster."""
    logs = ROOT / "build/cluster"
    shutil.rmtree(logs, ignore_errors=True)
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture is not None else nullcontext():
        print("\n==> starting a Kubernetes cluster with three nodes", flush=True)
    with WholeCluster(log_dir=logs) as running:
        yield running
