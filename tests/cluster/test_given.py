"""A user's cluster that cannot be used, or must not be, is refused in one sentence before anything is made there: each
lack against a real API server, through the same pytest that `make e2e KUBECONFIG=...` starts. (The scenes on a given
cluster are played by hand, on one with nodes: README.md says how.)"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.apiserver import ApiServer, free_port
from tests.cluster.given import SYSTEM
from tests.tidy.sources import ROOT

VIP = "203.0.113.77"
SCENES = "tests/cluster/test_scenes.py"


def refused(kubeconfig: object, *flags: str) -> str:
    """What stands behind "cannot go on": one line, and nothing else was done."""
    argv = [sys.executable, "-m", "pytest", "-q", SCENES, "--kubeconfig", str(kubeconfig), *flags]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    said = [line for line in (ran.stdout + ran.stderr).splitlines() if line.strip()]
    assert (1, 4) == (len(said), ran.returncode), ran.stdout + ran.stderr
    found = re.fullmatch(r"ERROR: holdfast: cannot go on: (.*)", said[0])
    assert found, said
    return found[1]


def refused_here(api: ApiServer, *flags: str) -> str:
    return refused(api.kubeconfig, "--vip", VIP, *flags)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "no VIP; say VIP=ADDRESS, an address that your router sends to the nodes and nobody uses."),
        (("--vip", "2001:db8::1"), "VIP=2001:db8::1 is no IPv4 address."),
        (("--vip", VIP, "--values", "/no/such.yaml"), "VALUES=/no/such.yaml: there is no such file."),
        (("--vip", VIP, "--client", "ssh 'host"), "CLIENT=ssh 'host: No closing quotation."),
    ],
)
def test_what_is_said_wrong(api: ApiServer, flags: tuple[str, ...], sentence: str) -> None:
    assert sentence == refused(api.kubeconfig, *flags)


def test_no_such_file() -> None:
    assert "KUBECONFIG=/no/such: there is no such file." == refused("/no/such", "--vip", VIP)


def test_values_that_the_chart_does_not_know(api: ApiServer, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text("loadBalancers: {colour: red}\n")
    said = refused_here(api, "--values", str(values))
    assert said.startswith(f"helm does not take VALUES={values} IMAGES=: ")
    assert "colour" in said


@pytest.mark.parametrize("client", ["false", "no-such-command", "env -i PATH=/no"])
def test_a_client_that_is_not_there(api: ApiServer, client: str) -> None:
    said = refused_here(api, "--client", client)
    assert said.startswith(f"a shell with python3 does not answer at the client ({client}): ")
    assert said.endswith("Say how it is reached with CLIENT='ssh host', or leave CLIENT out for this machine.")


def test_a_cluster_that_does_not_answer(api: ApiServer, tmp_path: Path) -> None:
    elsewhere = tmp_path / "kubeconfig"
    elsewhere.write_text(re.sub(r"server: .*", f"server: https://127.0.0.1:{free_port()}", api.kubeconfig.read_text()))
    said = refused(elsewhere, "--vip", VIP)
    assert said.startswith(f"the cluster of KUBECONFIG={elsewhere} does not answer: ")
    assert "refused" in said


def test_a_context_without_rights(api: ApiServer) -> None:
    api.pki.sign("reader", "reader", "")
    said = refused(api.write_kubeconfig("reader"), "--vip", VIP)
    assert said.startswith("the context test may not create namespaces, delete namespaces, create customresourcedef")
    assert said.endswith("use one of an administrator of the cluster.")


def test_what_another_run_has_left(api: ApiServer) -> None:
    api.call("POST", "/api/v1/namespaces", {"metadata": {"name": SYSTEM}})
    try:
        said = refused_here(api)
        assert said.startswith(f"the cluster has a namespace {SYSTEM} already: another run, or one that was killed.")
        assert f"helm uninstall holdfast -n {SYSTEM}; kubectl delete namespace" in said
    finally:
        # There is no namespace controller here; its part is to find nothing in it.
        api.call("DELETE", f"/api/v1/namespaces/{SYSTEM}")
        left = api.call("GET", f"/api/v1/namespaces/{SYSTEM}")
        left["spec"]["finalizers"] = []
        api.call("PUT", f"/api/v1/namespaces/{SYSTEM}/finalize", left)


def test_a_cluster_that_has_holdfast(api: ApiServer, namespace: str) -> None:
    chart = str(ROOT / "charts/holdfast")
    api.helm("install", "lb", chart, "--namespace", namespace, "--set", "crds.enabled=false")
    try:
        assert refused_here(api).startswith(f"the namespace {namespace} has Holdfast already, and two on a node")
    finally:
        api.helm("uninstall", "lb", "--namespace", namespace, "--no-hooks")


def test_an_address_that_is_taken(api: ApiServer, namespace: str) -> None:
    spec = {"ports": [{"port": 80}], "externalIPs": [VIP]}
    path = f"/api/v1/namespaces/{namespace}/services"
    api.call("POST", path, {"metadata": {"name": "web"}, "spec": spec})
    try:
        assert f"VIP={VIP} is the address of the Service {namespace}/web; say one that nobody uses." == refused_here(
            api
        )
    finally:
        api.call("DELETE", f"{path}/web")


def test_too_few_nodes(api: ApiServer) -> None:
    assert refused_here(api).endswith("nodes are Ready and take pods, and 2 are needed.")


@pytest.fixture
def ready_nodes(api: ApiServer) -> Iterator[None]:
    """Two that say so."""
    names = ("given-1", "given-2")
    for name in names:
        api.call("POST", "/api/v1/nodes", {"metadata": {"name": name}})
        said = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
        api.merge(f"/api/v1/nodes/{name}/status", said)
        api.merge(f"/api/v1/nodes/{name}", {"spec": {"taints": None}})  # a new one has "not ready"
    yield
    for name in names:
        api.call("DELETE", f"/api/v1/nodes/{name}")


@pytest.mark.usefixtures("ready_nodes")
def test_a_crd_that_was_left_behind(api: ApiServer) -> None:
    said = refused_here(api)
    assert said.startswith("the cluster has the CRD virtualservices.holdfast.dev already, of an earlier installation")
    assert said.endswith("kubectl delete crd virtualservices.holdfast.dev")


def test_only_a_kubeconfig_that_is_said_with_the_command_counts() -> None:
    def make(*words: str) -> str:
        env = {**os.environ, "KUBECONFIG": "/somebody/else"}
        argv = ["make", "--dry-run", "e2e", *words]
        return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout

    assert "--kubeconfig" not in make()
    assert "tools/setup.sh cluster" in make()
    assert '--kubeconfig "$KUBECONFIG" --vip "$VIP"' in make("KUBECONFIG=mine")
    assert "tools/setup.sh python" in make("KUBECONFIG=mine")
