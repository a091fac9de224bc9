"""A whole Kubernetes: a control plane, three nodes with kubelets, an ECMP router before them, and clients outside.

::

    client1 ── router ─┬─ node1  containerd, kubelet, kube-proxy, pods 10.78.1.0/24
                       ├─ node2
                       ├─ node3
                       └─ node4  etcd, API server, controller manager, scheduler (nothing else runs here)

Hosts, links and the router are the lab's; what runs on a node is in ``nodes.py``. This file decides how they become one
cluster, and who tells the router where load balancers are: in a real network a BGP speaker beside the agent, here a
thread that asks each agent's /readyz as often as such a speaker would.
"""

import http.client
import shutil
import socket
import subprocess
import threading
from pathlib import Path
from typing import Final, Self

from lbpod.lab import CheckerRun, Lab, LabError, Node
from lbpod.lab.registry import LAB_DIR
from tests.cluster.apiserver import START_S, ApiServer, Json, Process, binaries
from tests.cluster.nodes import IMPORT_S, PODS, KubeNode, cgroup_roots, remove_cgroups
from tests.cluster.stage import Cluster, example_with, until
from tests.tidy.sources import ROOT

WORKERS: Final = 3
VIPS: Final = "203.0.113.0/24"
PAGE: Final = "docker.io/holdfast/page:test"
ASK_S: Final = 0.25
"""How often an agent is asked whether it takes traffic: more often than once in the second between /readyz saying no
and the load balancer leaving."""
TOOLS: Final = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
    "helm",
)
PROGRAMS: Final = ("etcd", "containerd", "ctr", "runc", "nft")


def images() -> Path:
    """The archive of tools/images.sh."""
    ran = subprocess.run([ROOT / "tools/images.sh", "file"], capture_output=True, text=True, check=True)
    return Path(ran.stdout.strip())


def why_no_nodes() -> str:
    """What is missing for a whole cluster, as a sentence; empty: nothing is."""
    missing = [name for name in TOOLS if not (binaries() / name).exists()]
    missing += [name for name in PROGRAMS if shutil.which(name) is None]
    missing += [] if images().exists() else [images().name]
    return f"missing feature: kubernetes nodes ({', '.join(missing)} not there; run `make e2e`)" if missing else ""


class Announcer:
    """What a BGP speaker does on each node: VIP traffic goes to the nodes whose agent says that it is ready."""

    def __init__(self, lab: Lab, nodes: list[Node]) -> None:
        self._lab = lab
        self.nodes = nodes
        """Whom it asks; whoever takes a node away or adds one replaces the list."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="announcer", daemon=True)
        self.ready: tuple[str, ...] = ()
        """Nodes whose agents said so when they were asked last. With none left, the router keeps what it had."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        now: list[Node] = []
        while not self._stop.wait(ASK_S):
            ready = [node for node in self.nodes if self._is_ready(node)]
            if ready and ready != now:
                self._lab.router.set_ecmp(VIPS, ready)
                now = ready
            self.ready = tuple(node.name for node in ready)

    def _is_ready(self, node: Node) -> bool:
        """Asked inside the node. A node that does not answer in time is out, as with BFD."""
        try:
            with node.in_netns():
                sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            with sock:
                sock.settimeout(2)  # it may wait for others to speak
                sock.connect(("127.0.0.1", 9902))
                connection = http.client.HTTPConnection("127.0.0.1", 9902)
                connection.sock = sock
                connection.request("GET", "/readyz")
                return connection.getresponse().status == 200
        except (OSError, LabError, http.client.HTTPException):
            return False


class WholeCluster(Cluster):
    """A context manager: the cluster runs inside the ``with`` block."""

    def __init__(self, log_dir: Path | None = None) -> None:
        self.lab = Lab(nodes=WORKERS + 1, log_dir=log_dir)
        self.nodes: list[KubeNode] = []
        self._control: list[Process] = []

    def __enter__(self) -> Self:
        self.lab.__enter__()
        try:
            clean_cgroups()
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nodes first, which takes all pods along, then the control plane, then the lab."""
        if hasattr(self, "announcer"):
            self.announcer.stop()
        for node in self.nodes:
            node.remove()
        for one in self._control:
            one.stop(9)
        if hasattr(self, "api"):
            self.api.stop()
        self.lab.close()

    def _start(self) -> None:
        *workers, control = self.lab.nodes
        self.log_dir = self.lab.run.log_dir
        self.tools = binaries()
        self.api = ApiServer(
            self.lab.run_dir / "control",
            self.tools,
            port=6443,
            address=control.address,
            netns=Path("/run/netns", control.netns),
            flags=[
                "--kubelet-preferred-address-types=InternalIP",
                "--kubelet-client-certificate=" + str(self.lab.run_dir / "control/pki/admin.crt"),
                "--kubelet-client-key=" + str(self.lab.run_dir / "control/pki/admin.key"),
                "--default-not-ready-toleration-seconds=5",
                "--default-unreachable-toleration-seconds=5",
            ],
        )
        self.api.start()
        self.nodes = [KubeNode(self.lab, one, self.api, self.tools, images()) for one in workers]
        for node in self.nodes:
            node.boot()
        loads = [node.load() for node in self.nodes]
        self._start_controllers()
        for node, load in zip(self.nodes, loads, strict=True):
            assert 0 == load.wait(IMPORT_S), f"{node.name} did not import the images; see {self.lab.log_dir}"
            node.join()
        self.announcer = Announcer(self.lab, workers)
        self.announcer.start()
        self.wait_nodes(*(node.name for node in self.nodes))

    def lose(self, node: KubeNode) -> None:
        """The cable is out and the power off, both at once; the router learns of it as it would in a real network."""
        self.lab.cut(node.host)
        node.kill()

    def replace(self, lost: KubeNode) -> KubeNode:
        """A lost node is given up, and a new one with another name and empty maps takes its place."""
        self.announcer.nodes = [one for one in self.announcer.nodes if one is not lost.host]
        until("the router to have heard", lambda: lost.name not in self.announcer.ready)
        self.api.call("DELETE", f"/api/v1/nodes/{lost.name}")
        lost.remove()
        self.lab.remove_node(lost.host)
        self.nodes.remove(lost)
        new = KubeNode(self.lab, self.lab.add_node(), self.api, self.tools, images())
        self.nodes.append(new)
        new.boot()
        assert 0 == new.load().wait(IMPORT_S), f"{new.name} did not import the images; see {self.lab.log_dir}"
        new.join()
        self.announcer.nodes = [*self.announcer.nodes, new.host]
        self.wait_nodes(new.name)
        return new

    def let_nodes_speak_to_vips(self) -> None:
        """For clients on nodes: the lab keeps nodes from sending to VIPs, as what nobody serves would go in circles."""
        self.wait_router()
        for node in self.nodes:
            node.host.run(["ip", "route", "del", "blackhole", VIPS])

    def _start_controllers(self) -> None:
        pki, admin = self.api.pki.folder, self.api.kubeconfig
        controllers = [
            f"--kubeconfig={admin}",
            "--leader-elect=false",
            f"--service-account-private-key-file={pki / 'sa.key'}",
            f"--root-ca-file={pki / 'ca.crt'}",
            "--allocate-node-cidrs=false",
            f"--cluster-cidr={PODS}",
            "--node-monitor-period=1s",
            "--node-monitor-grace-period=20s",
            "--bind-address=127.0.0.1",
        ]
        scheduler = [f"--kubeconfig={admin}", "--leader-elect=false", "--bind-address=127.0.0.1"]
        for name, flags in (("kube-controller-manager", controllers), ("kube-scheduler", scheduler)):
            argv = [*self.api.inside, str(self.tools / name), *flags]
            process = Process(argv, self.lab.log_dir / f"{name}.log")
            process.start()
            self._control.append(process)

    # --- Asking -------------------------------------------------------------------------------------------------------
    def kubectl(self, *argv: str, stdin: str | None = None) -> str:
        return self.api.kubectl(*argv, stdin=stdin)

    def helm(self, *argv: str) -> str:
        return self.api.helm(*argv)

    def get(self, path: str) -> Json:
        return self.api.call("GET", path)

    # --- For scenes ---------------------------------------------------------------------------------------------------
    def fetch(self, *argv: str) -> str:
        return self.lab.client.run(["curl", *argv]).stdout

    def start_checker(self, *, long_count: int, short_rate: int) -> CheckerRun:
        return CheckerRun.start(self.lab, f"{self.vip}:80", long_count=long_count, short_rate=short_rate)

    def wait_router(self) -> None:
        until("the router to have all nodes", lambda: len(self.announcer.ready) == len(self.nodes))

    def example(self) -> str:
        """The example as it is, but for the image: there is no registry here."""
        return example_with(PAGE)

    def left_on_nodes(self) -> list[str]:
        found = []
        for node in self.nodes:
            if "xdp" in node.run("ip", "-details", "link", "show", "dev", "eth0"):
                found.append(f"{node.name}: an XDP program on eth0")
            if "clsact" in node.run("tc", "qdisc", "show", "dev", "eth0"):
                found.append(f"{node.name}: clsact on eth0")
            pins = set(node.run("ls", "/sys/fs/bpf").split()) - {"maps.debug", "progs.debug"}  # the kernel's own
            found += [f"{node.name}: {one} in /sys/fs/bpf" for one in sorted(pins)]
        return found

    def node(self, name: str) -> KubeNode:
        (found,) = (one for one in self.nodes if one.name == name)
        return found

    def wait_nodes(self, *names: str) -> None:
        """Until these nodes are Ready."""

        def ready() -> bool:
            found = set()
            for one in self.get("/api/v1/nodes")["items"]:
                words = {each["type"]: each["status"] for each in one["status"].get("conditions", ())}
                found |= {one["metadata"]["name"]} if words.get("Ready") == "True" else set()
            return set(names) <= found

        until(f"nodes {names} to be Ready", ready, START_S)


def clean_cgroups() -> None:
    """Of runs that were killed with -9: the kernel and the lab have removed all but these."""
    alive = {path.stem for path in LAB_DIR.glob("*.json")}
    found = {path.name for root in cgroup_roots() for path in root.glob("hf*-node*")}
    for name in sorted(found):
        if name.partition("-")[0] not in alive:
            remove_cgroups(name)
