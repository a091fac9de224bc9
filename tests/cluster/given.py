"""A cluster that a user has: `make e2e KUBECONFIG=... VIP=...`.

Decided here: what is asked of it before anything is made (each lack is one sentence, and a cluster that has Holdfast
already, or the leftovers of a run, is left alone), what is made there, and that all of it is taken away again, whatever
happened in between. Nodes are never harmed: a drain evicts pods of ours alone.

The router is the user's: it has to follow the agents' /readyz, as any BGP speaker beside them would. The client is
reached by a command (``client.py``). Nodes are seen by a pod on their network (``look.py``), before and afterwards.
"""

import http.client
import ipaddress
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Self

import yaml

from lbpod.lab import CheckerRun
from lbpod.lab.signals import deferred
from tests.cluster.apiserver import ApiError, Json, Process, binaries
from tests.cluster.client import Client
from tests.cluster.stage import EXAMPLE, Cluster, container_of, until
from tests.tidy.sources import ROOT

SYSTEM: Final = "holdfast-e2e"
SHOP: Final = "holdfast-e2e-web"
CRD: Final = "virtualservices.holdfast.dev"
CHART: Final = str(ROOT / "charts/holdfast")
PAGE: Final = ROOT / "tests/cluster/images/page.sh"
MARK: Final = "holdfast-e2e"
"""Label of all pods that a drain may evict: the page's and the operator's."""
KUBECTL_S: Final = 300
PROXY_S: Final = 30
REMOVE_S: Final = 240
LOOK_S: Final = 180
NODES_MIN: Final = 2
"""With one load balancer there is nobody to hand over to when it restarts."""
REMOVE_BY_HAND: Final = (
    f"helm uninstall holdfast -n {SYSTEM}; kubectl delete namespace {SHOP} {SYSTEM}; kubectl delete crd {CRD}"
    " (and kubectl uncordon NODE, where a drain was cut off)"
)
RIGHTS: Final = (
    ("create", "namespaces"),
    ("delete", "namespaces"),
    ("create", "customresourcedefinitions.apiextensions.k8s.io"),
    ("create", "clusterroles.rbac.authorization.k8s.io"),
    ("create", "clusterrolebindings.rbac.authorization.k8s.io"),
    ("create", "daemonsets.apps"),
    ("create", "secrets"),
    ("list", "services"),
    ("patch", "nodes"),
    ("create", "pods/eviction"),
)
"""What is done there, in short."""


class Refusal(Exception):  # noqa: N818 - not a failure of ours: what the user can mend, as a sentence
    """The cluster cannot be used, or must not be; nothing was made."""


@dataclass(frozen=True)
class Wish:
    """What the user has said."""

    kubeconfig: str
    vip: str
    client: str = ""
    """What stands before a command that is to run at the client; empty: the client is this machine."""
    images: str = ""
    """Where operator and load balancer come from, as the chart's image.registry; empty: its default."""
    page: str = ""
    """An image with nginx and a shell; empty: the example's."""
    values: str = ""
    """A file of more values for the chart."""


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _schedulable(node: Json) -> bool:
    taints = {one["effect"] for one in node["spec"].get("taints", ())}
    return not node["spec"].get("unschedulable") and not taints & {"NoSchedule", "NoExecute"}


def _ready(node: Json) -> bool:
    return "True" in [one["status"] for one in node["status"].get("conditions", ()) if one["type"] == "Ready"]


class GivenCluster(Cluster):
    """A context manager: `refuse` has nothing to say, and what it makes is there inside the ``with`` block."""

    system = SYSTEM
    shop = SHOP
    drain_flags: ClassVar[Sequence[str]] = (f"--pod-selector={MARK}",)

    def __init__(self, wish: Wish, log_dir: Path) -> None:
        self._wish = wish
        self.log_dir = log_dir
        self.vip = wish.vip
        try:
            self._client = Client(shlex.split(wish.client), log_dir)
        except ValueError as error:
            raise Refusal(f"CLIENT={wish.client}: {error}.") from error
        self._page = wish.page or str(container_of(self._deployment())["image"])
        self._env = {name: value for name, value in os.environ.items() if not name.startswith("HELM_KUBE")}
        self._env |= {"KUBECONFIG": str(Path(wish.kubeconfig).expanduser().resolve())}
        self._env.pop("HELM_NAMESPACE", None)
        self._drained: set[str] = set()
        self._seen: dict[str, Json] = {}  # node -> what was there before the installation
        self._proxy: Process | None = None
        self._socket = Path()
        flags = ["--set-string", f"operator.podLabels.{MARK}=yes"]
        flags += ["--set", f"image.registry={wish.images}"] if wish.images else []
        flags += ["--values", str(Path(wish.values).expanduser().resolve())] if wish.values else []
        self.install_flags = flags

    # --- Before -------------------------------------------------------------------------------------------------------
    def refuse(self) -> None:
        """Raises Refusal where this cluster cannot be used as it is. Nothing is made."""
        self._refuse_words()
        if why := self._client.why_not():
            raise Refusal(f"{why} Say how it is reached with CLIENT='ssh host', or leave CLIENT out for this machine.")
        self._refuse_unreachable()
        self._refuse_rights()
        self._refuse_holdfast()
        self._refuse_vip()
        self._refuse_nodes()
        self._refuse_crd()

    def _refuse_words(self) -> None:
        wish = self._wish
        for word, file in (("KUBECONFIG", wish.kubeconfig), ("VALUES", wish.values)):
            if (word == "KUBECONFIG" or file) and not Path(file).expanduser().is_file():
                raise Refusal(f"{word}={file}: there is no such file.")
        if not wish.vip:
            raise Refusal("no VIP; say VIP=ADDRESS, an address that your router sends to the nodes and nobody uses.")
        try:
            ipaddress.IPv4Address(wish.vip)
        except ValueError as error:
            raise Refusal(f"VIP={wish.vip} is no IPv4 address.") from error
        for tool in ("kubectl", "helm"):
            if self._tool(tool) is None:
                raise Refusal(f"{tool} is missing; install it.")
        self._agents()

    def _refuse_unreachable(self) -> None:
        said = self._try("kubectl", "get", "--raw", "/version", "--request-timeout=10s")
        if said.returncode != 0:
            raise Refusal(
                f"the cluster of KUBECONFIG={self._wish.kubeconfig} does not answer: {_last_line(said.stderr)}"
            )

    def _refuse_rights(self) -> None:
        lacking = []
        for verb, what in RIGHTS:
            said = self._try("kubectl", "auth", "can-i", verb, what, "--all-namespaces", "--request-timeout=10s")
            if said.stdout.strip() != "yes":
                lacking.append(f"{verb} {what.partition('.')[0]}")
        if lacking:
            context = self._try("kubectl", "config", "current-context").stdout.strip()
            raise Refusal(
                f"the context {context} may not {', '.join(lacking)}; use one of an administrator of the cluster."
            )

    def _refuse_holdfast(self) -> None:
        for name in (SYSTEM, SHOP):
            if self._exists("namespace", name):
                raise Refusal(
                    f"the cluster has a namespace {name} already: another run, or one that was killed. Wait for it,"
                    f" or take away what it has left: {REMOVE_BY_HAND}"
                )
        agents = self.get("/apis/apps/v1/daemonsets?labelSelector=app.kubernetes.io/part-of=holdfast")["items"]
        if agents:
            where = agents[0]["metadata"]["namespace"]
            raise Refusal(
                f"the namespace {where} has Holdfast already, and two on a node would be in each other's way; use a"
                " cluster without it."
            )

    def _refuse_vip(self) -> None:
        for one in self.get("/api/v1/services")["items"]:
            ingress = one.get("status", {}).get("loadBalancer", {}).get("ingress", ())
            if self.vip in {*one["spec"].get("externalIPs", ()), *(each.get("ip") for each in ingress)}:
                whose = f"{one['metadata']['namespace']}/{one['metadata']['name']}"
                raise Refusal(f"VIP={self.vip} is the address of the Service {whose}; say one that nobody uses.")
        for one in self.get("/api/v1/nodes")["items"]:
            if self.vip in {each["address"] for each in one["status"].get("addresses", ())}:
                raise Refusal(
                    f"VIP={self.vip} is the address of the node {one['metadata']['name']}; say one that nobody uses."
                )

    def _refuse_nodes(self) -> None:
        nodes = self.get("/api/v1/nodes")["items"]
        able = [one for one in nodes if _ready(one) and _schedulable(one)]
        if len(able) < NODES_MIN:
            raise Refusal(f"{len(able)} of {len(nodes)} nodes are Ready and take pods, and {NODES_MIN} are needed.")

    def _refuse_crd(self) -> None:
        if self._exists("crd", CRD):
            raise Refusal(
                f"the cluster has the CRD {CRD} already, of an earlier installation; if nobody needs it and its"
                f" VirtualServices, take it away first: kubectl delete crd {CRD}"
            )

    def _refuse_pins(self) -> None:
        """Agents keep to the cluster that their maps are of, so that nobody takes over a node by mistake."""
        for node, seen in self._seen.items():
            if "holdfast" in seen["pins"]:
                raise Refusal(
                    f"the node {node} has the programs of an earlier Holdfast, which was uninstalled without taking"
                    " them along (/sys/fs/bpf/holdfast); they would refuse another one: boot the node first."
                )

    # --- Life ---------------------------------------------------------------------------------------------------------
    def __enter__(self) -> Self:
        """Our namespaces, and a look at the nodes. Raises Refusal where that cannot be had; ask `refuse` first."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)  # pytest then ends as after Ctrl-C, through `close`
        try:
            self._start_proxy()
            for name in (SYSTEM, SHOP):
                labels = {"pod-security.kubernetes.io/enforce": "privileged", MARK: "yes"}
                self._apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
            script = {"page.sh": PAGE.read_text()}
            self._apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "page"}, "data": script})
            self._seen = self._look()
            self._refuse_pins()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes away what was made, in the order in which it needs each other; what fails is said at the end."""
        failed = []
        with deferred():
            for step in (self._unserve, self._uninstall, self._uncordon, self._delete):
                try:
                    step()
                except (AssertionError, ApiError) as error:
                    failed.append(_last_line(str(error)))
            if self._proxy is not None:
                self._proxy.stop()
                shutil.rmtree(self._socket.parent, ignore_errors=True)
        assert not failed, f"not all could be taken away: {'; '.join(failed)}. By hand: {REMOVE_BY_HAND}"

    def _unserve(self) -> None:
        if self._exists("crd", CRD):
            self.kubectl("delete", "virtualservices", "--all", "--timeout=60s")

    def _uninstall(self) -> None:
        if self._try("helm", "status", "holdfast", "--namespace", self.system).returncode == 0:
            self.helm("uninstall", "holdfast", "--namespace", self.system, "--wait", "--timeout", "180s")

    def _uncordon(self) -> None:
        for one in self.get("/api/v1/nodes")["items"]:
            if one["spec"].get("unschedulable") and one["metadata"]["name"] in self._drained:
                self.kubectl("uncordon", one["metadata"]["name"])

    def _delete(self) -> None:
        words = ("--ignore-not-found", f"--timeout={REMOVE_S}s")
        self.kubectl("delete", "namespace", self.shop, self.system, *words)
        self.kubectl("delete", "crd", CRD, *words)

    # --- Asking -------------------------------------------------------------------------------------------------------
    def kubectl(self, *argv: str, stdin: str | None = None) -> str:
        return self._run("kubectl", f"--namespace={self.shop}", *argv, stdin=stdin)

    def helm(self, *argv: str) -> str:
        return self._run("helm", *argv)

    def get(self, path: str) -> Json:
        """By the proxy while that runs: a kubectl for each question is a second on a busy machine, and who says too
        late that a pod has ended calls its connections broken."""
        running = None if self._proxy is None else self._proxy.running
        if running is None or running.poll() is not None:
            return self._get_by_kubectl(path)
        connection = http.client.HTTPConnection("localhost", timeout=20)
        try:
            with closing(connection):
                connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.sock.settimeout(20)
                connection.sock.connect(str(self._socket))
                connection.request("GET", path)
                answer = connection.getresponse()
                body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(0, {"message": f"{path}: {error}"}) from error
        if answer.status != 200:
            raise ApiError(answer.status, {"message": f"{path}: {body.decode(errors='replace')}"})
        return dict(json.loads(body))

    def _start_proxy(self) -> None:
        """It answers on a socket that nobody else can open, and ends with us."""
        self._socket = Path(tempfile.mkdtemp(prefix="holdfast-e2e-"), "api")
        kubectl = [self._tool("kubectl") or "kubectl", f"--kubeconfig={self._env['KUBECONFIG']}"]
        self._proxy = Process([*kubectl, "proxy", f"--unix-socket={self._socket}"], self.log_dir / "kubectl-proxy.log")
        self._proxy.start()
        end = time.monotonic() + PROXY_S
        while not self._socket.exists():
            self._proxy.check()
            assert time.monotonic() < end, f"kubectl proxy did not come; see {self._proxy.log}"
            time.sleep(0.05)

    def _get_by_kubectl(self, path: str) -> Json:
        said = self._try("kubectl", "get", "--raw", path, "--request-timeout=20s")
        if said.returncode != 0:
            missing = "NotFound" in said.stderr
            raise ApiError(404 if missing else 0, {"message": f"{path}: {said.stderr.strip()}"})
        return dict(json.loads(said.stdout))

    def _exists(self, kind: str, name: str) -> bool:
        return bool(self._run("kubectl", "get", kind, name, "--ignore-not-found", "--output=name").strip())

    def _apply(self, body: Json) -> None:
        self.kubectl("apply", "-f", "-", stdin=json.dumps(body))

    def _run(self, *argv: str, stdin: str | None = None) -> str:
        said = self._try(*argv, stdin=stdin)
        assert 0 == said.returncode, f"{' '.join(argv)}:\n{said.stdout}{said.stderr}"
        return said.stdout

    def _try(self, *argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """In a session of its own: a Ctrl-C is for this process, which then ends the command."""
        tool = self._tool(argv[0])
        assert tool is not None, f"{argv[0]} is there"
        try:
            return subprocess.run(
                [tool, *argv[1:]],
                env=self._env,
                input=stdin,
                capture_output=True,
                text=True,
                check=False,
                timeout=KUBECTL_S,
                cwd=ROOT,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{' '.join(argv)} took longer than {KUBECTL_S} s") from error

    def _tool(self, name: str) -> str | None:
        """The user's own; where there is none, that of tools/kube.sh."""
        built = binaries() / name
        return shutil.which(name) or (str(built) if built.exists() else None)

    # --- For scenes ---------------------------------------------------------------------------------------------------
    def fetch(self, *argv: str) -> str:
        """Asked again for a while: how soon the router has learned of the VIP is not ours."""
        answers: list[str] = []

        def answered() -> bool:
            with suppress(AssertionError):
                answers.append(self._client.run(shlex.join(["curl", *argv])))
            return bool(answers)

        until(f"{self.vip} to answer at the client ({self._client}); does your router send it to the nodes?", answered)
        return answers[0]

    def start_checker(self, *, long_count: int, short_rate: int) -> CheckerRun:
        return self._client.start_checker(f"{self.vip}:80", long_count=long_count, short_rate=short_rate)

    @contextmanager
    def drained(self, node: str) -> Iterator[None]:
        self._drained.add(node)
        with super().drained(node):
            yield

    def wait_router(self) -> None:
        """Nobody here can ask the user's router; a flow that it moves later finds its backend all the same."""

    def example(self) -> str:
        """The example in our namespace, with the page that the checking client needs, and the drain's label."""
        documents = [one for one in yaml.safe_load_all(EXAMPLE.read_text()) if one]
        for one in documents:
            one["metadata"]["namespace"] = self.shop
            match one["kind"]:
                case "VirtualService":
                    one["spec"]["address"] = self.vip
                case "Deployment":
                    self._serve_page(one)
        return yaml.safe_dump_all(documents)

    def _serve_page(self, deployment: Json) -> None:
        template = deployment["spec"]["template"]
        template["metadata"]["labels"][MARK] = "yes"
        template["spec"]["volumes"] = [{"name": "page", "configMap": {"name": "page"}}]
        (container,) = template["spec"]["containers"]
        container["image"] = self._page
        container["command"] = ["sh", "/page/page.sh"]
        container["volumeMounts"] = [{"name": "page", "mountPath": "/page"}]

    def _deployment(self) -> Json:
        (found,) = (one for one in yaml.safe_load_all(EXAMPLE.read_text()) if one["kind"] == "Deployment")
        return dict(found)

    # --- Nodes --------------------------------------------------------------------------------------------------------
    def left_on_nodes(self) -> list[str]:
        """What is there now and was not before; links that came since are others'."""
        found = []
        for node, now in self._look().items():
            before = self._seen.get(node, {"links": [], "pins": now["pins"]})
            found += [f"{node}: {one} in /sys/fs/bpf" for one in now["pins"] if one not in before["pins"]]
            for kind in ("xdp", "clsact"):
                new = [one for one in now[kind] if one in before["links"] and one not in before[kind]]
                found += [f"{node}: {kind} on {one}" for one in new]
        return found

    def _look(self) -> dict[str, Json]:
        """Node -> what ``look.py`` says there, asked by a pod with the load balancers' image on each of their nodes."""
        agents = self._agents()
        spec = agents["spec"]["template"]["spec"]
        labels = "%2C".join(f"{name}%3D{value}" for name, value in (spec.get("nodeSelector") or {}).items())
        nodes = [one for one in self.get(f"/api/v1/nodes?labelSelector={labels}")["items"] if _ready(one)]
        names = [one["metadata"]["name"] for one in nodes]
        for node in names:
            self._apply(self._look_pod(node, container_of(agents)))
        end = time.monotonic() + LOOK_S
        found = {node: self._wait_look(node, end) for node in names}
        self._run("kubectl", "delete", "pods", "--selector=app=look", f"--namespace={SHOP}", f"--timeout={LOOK_S}s")
        return found

    def _agents(self) -> Json:
        """The DaemonSet as it will be. Raises Refusal where helm will have none of the user's values."""
        said = self._try("helm", "template", "holdfast", CHART, "--namespace", SYSTEM, *self.install_flags)
        if said.returncode != 0:
            why = re.sub(r"\s+", " ", said.stderr).strip()
            raise Refusal(f"helm does not take VALUES={self._wish.values} IMAGES={self._wish.images}: {why}")
        (agents,) = (one for one in yaml.safe_load_all(said.stdout) if one and one["kind"] == "DaemonSet")
        return dict(agents)

    def _look_pod(self, node: str, agent: Json) -> Json:
        container = {
            "name": "look",
            "image": agent["image"],
            "imagePullPolicy": agent["imagePullPolicy"],
            "command": ["python3", "-c", (ROOT / "tests/cluster/look.py").read_text()],
            "securityContext": {"runAsUser": 0, "capabilities": {"drop": ["ALL"]}},
            "volumeMounts": [{"name": "bpffs", "mountPath": "/sys/fs/bpf", "readOnly": True}],
        }
        spec = {
            "nodeName": node,
            "hostNetwork": True,
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "tolerations": [{"operator": "Exists"}],
            "containers": [container],
            "volumes": [{"name": "bpffs", "hostPath": {"path": "/sys/fs/bpf", "type": "Directory"}}],
        }
        metadata = {"name": f"look-{node}", "namespace": SHOP, "labels": {"app": "look"}}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}

    def _wait_look(self, node: str, end: float) -> Json:
        """What the pod on this node has said. Raises Refusal where it never will."""
        path = f"/api/v1/namespaces/{SHOP}/pods/look-{node}"
        while True:
            status = self.get(path)["status"]
            if status["phase"] in ("Succeeded", "Failed"):
                text = self._run("kubectl", "logs", f"look-{node}", f"--namespace={SHOP}")
                if status["phase"] == "Failed":
                    raise Refusal(f"the node {node} cannot be looked at: {_last_line(text)}")
                return dict(json.loads(text))
            waiting = [one["state"].get("waiting", {}) for one in status.get("containerStatuses", ())]
            for one in waiting:
                if re.search("Image|Err", one.get("reason", "")):
                    why = f"{one['reason']}: {_last_line(one.get('message', ''))}"
                    raise Refusal(
                        f"the node {node} cannot have the image ({why}); say where it is with IMAGES=REGISTRY, or load"
                        " it onto the nodes."
                    )
            if time.monotonic() > end:
                raise Refusal(f"a pod on the node {node} did not come in {LOOK_S} s; is bpffs on /sys/fs/bpf there?")
            time.sleep(0.5)
