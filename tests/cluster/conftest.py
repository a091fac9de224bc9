"""One API server for all tests that need one: it takes some seconds to start, and every test uses a namespace of its
own. Where it was not built, everything here skips (`make e2e` builds it first)."""

import itertools
from collections.abc import Iterator

import pytest

from tests.cluster.apiserver import ApiServer, api_server, why_not_here
from tests.tidy.sources import ROOT

CRD = ROOT / "crds/virtualservices.holdfast.dev.yaml"
_NUMBERS = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is marked, and skips where the API server was not built."""
    here = [item for item in items if item.path.is_relative_to(ROOT / "tests/cluster")]
    reason = why_not_here() if here else ""
    for item in here:
        item.add_marker(pytest.mark.cluster)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


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
