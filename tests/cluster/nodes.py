"""Nodes as Kubernetes knows them: each a network namespace of the lab, with mounts and process ids of its own, in
which containerd, kubelet and kube-proxy run as on a machine.

Why process ids of its own: whatever runs on the node, pods included, is below one process. When that is killed, be it
by a test that wants the node lost or because the test process itself has died, the kernel ends all of it and takes
mounts and pins along; nothing has to be found and ended one by one.
Why mounts of its own: three nodes share one kernel, and
/run, /var/lib and /sys/fs/bpf have to be theirs alone, so that the chart's paths need not be changed for the test.
What stays is the cgroups, which are removed by name.

Tried and dropped: a root, a state and a socket for each containerd by options alone. Kubelet has folders that no option
moves (device plugins, /var/log/containers), and pins and agents' state would have needed values in the chart.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import yaml

from lbpod.lab import Lab, LabError, Node
from lbpod.lab.kernel import NETNS_DIR
from tests.cluster.apiserver import ApiServer, Process

CGROUPS: Final = Path("/sys/fs/cgroup")
PAUSE: Final = "docker.io/holdfast/pause:test"
PODS: Final = "10.78.0.0/16"
CPU_SHARES: Final = 32 * 1024
CPU_WEIGHT: Final = 32 * 100
"""Of a node's pods together, as if the node had processors of its own: 32 times that of one process (cgroup v1, v2)."""
IMPORT_S: Final = 300
READY_S: Final = 60

_INIT: Final = """\
set -e
mount --make-rshared /
mount -t tmpfs -o mode=755 node /var/lib
mkdir /var/lib/node /var/lib/containerd /var/lib/kubelet
mount --bind "$1" /var/lib/node
mount -t tmpfs -o mode=755 node /var/log
mount -t tmpfs -o mode=755 node /run
mkdir /run/lock /run/netns
mount -t bpf bpf /sys/fs/bpf
hostname "$2"
touch /var/lib/node/up
while :; do sleep 3600 & wait; done
"""
"""Process 1 of the node: /run, /var/lib, /var/log and bpffs are its own; then it waits for orphans to end."""

_CONTAINERD: Final = f"""\
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/var/lib/node/cni"
"""


def cgroup_roots() -> list[Path]:
    """Where cgroups of each kind are made: one place, or one for each controller (cgroup v1)."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return sorted(path for path in CGROUPS.iterdir() if path.is_dir() and not path.is_symlink())


def make_cgroup(name: str) -> None:
    """As kubelet wants its root: there already, with processors and memory to give away."""
    for root in cgroup_roots():
        (root / name).mkdir(exist_ok=True)
        for file in ("cpuset.cpus", "cpuset.mems"):
            if (root / file).exists():
                (root / name / file).write_text((root / file).read_text())
        # Pods share their node's weight, and whatever else runs on this machine has one for each process.
        for file, weight in (("cpu.shares", CPU_SHARES), ("cpu.weight", CPU_WEIGHT)):
            if (root / name / file).exists():
                (root / name / file).write_text(str(weight))


def remove_cgroups(name: str) -> None:
    """The cgroup and all below it, of every kind; whoever was in it has ended, or ends now."""
    end = time.monotonic() + READY_S
    for root in cgroup_roots():
        folders = [Path(folder) for folder, _, _ in os.walk(root / name, topdown=False)]
        for folder in folders:
            while folder.exists():
                try:
                    folder.rmdir()
                except OSError as error:
                    if time.monotonic() > end:
                        raise LabError(f"{folder} cannot be removed: {error}; look who is in it") from error
                    time.sleep(0.05)


@dataclass
class KubeNode:
    """One node, from `boot` to `kill`. images: an archive that containerd imports."""

    lab: Lab
    host: Node
    api: ApiServer
    tools: Path
    images: Path
    folder: Path = field(init=False)
    cgroup: str = field(init=False)
    programs: list[Process] = field(default_factory=list)
    _init: Process | None = None
    _pid: int = 0

    def __post_init__(self) -> None:
        self.name = self.host.name
        self.cgroup = f"{self.lab.prefix}-{self.name}"
        self.folder = self.lab.run_dir / self.name
        (self.folder / "cni").mkdir(parents=True)

    # --- Life ---------------------------------------------------------------------------------------------------------
    def boot(self) -> None:
        """Process 1, containerd with the images on their way, kube-proxy. Kubelet comes with `join`."""
        self._write_settings()
        make_cgroup(self.cgroup)
        log = self.lab.log_dir
        inside = ["nsenter", f"--net={NETNS_DIR / self.host.netns}", "--"]
        own = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        argv = [*inside, *own, "bash", "-c", _INIT, "init", str(self.folder), self.name]
        self._init = Process(argv, log / f"{self.name}-init.log")
        self._init.start()
        self._wait_for(self.folder / "up")
        self._pid = self._child_of(self._init)
        self._start("containerd", "containerd", "--config", "/var/lib/node/containerd.toml")

    def load(self) -> subprocess.Popen[bytes]:
        """The images, imported by a process that the caller waits for."""
        argv = ["ctr", "-n", "k8s.io", "images", "import", "--no-unpack", str(self.images)]
        argv = [
            "bash",
            "-c",
            f"for _ in {{1..100}}; do ctr version >/dev/null 2>&1 && exec {' '.join(argv)}; sleep 0.1; done; exit 1",
        ]
        with (self.lab.log_dir / f"{self.name}-import.log").open("ab") as log:
            return subprocess.Popen(self._inside(*argv), stdout=log, stderr=log)

    def join(self) -> None:
        """Kubelet and kube-proxy."""
        config = "/var/lib/node/kubelet.yaml"
        kubelet = [f"--config={config}", "--kubeconfig=/var/lib/node/kubelet.kubeconfig"]
        kubelet += [f"--hostname-override={self.name}", f"--node-ip={self.host.address}"]
        self._start("kubelet", str(self.tools / "kubelet"), *kubelet)
        self._start("kube-proxy", str(self.tools / "kube-proxy"), "--config=/var/lib/node/proxy.yaml")

    def kill(self) -> None:
        """As when the machine loses power: everything on it ends at once, and its pins and mounts are gone."""
        if self._init is None:
            return
        self._init.stop(signal.SIGKILL)
        for one in self.programs:
            one.reap()
        self.programs.clear()
        self._init = None
        (self.folder / "up").unlink(missing_ok=True)

    def remove(self) -> None:
        """What a dead node leaves behind."""
        self.kill()
        remove_cgroups(self.cgroup)

    def run(self, *argv: str) -> str:
        """What a command on the node prints. Raises AssertionError where it fails."""
        ran = subprocess.run(self._inside(*argv), capture_output=True, text=True, check=False, timeout=60)
        assert 0 == ran.returncode, f"{' '.join(argv)} on {self.name}: {ran.stdout}{ran.stderr}"
        return ran.stdout

    # --- How --------------------------------------------------------------------------------------------------------
    def _inside(self, *argv: str) -> list[str]:
        kinds = ["--mount", "--uts", "--ipc", "--pid", "--net"]
        return ["nsenter", "--target", str(self._pid), *kinds, "--", *argv]

    def _start(self, name: str, *argv: str) -> None:
        program = Process(self._inside(*argv), self.lab.log_dir / f"{self.name}-{name}.log")
        program.start()
        self.programs.append(program)

    def _wait_for(self, path: Path) -> None:
        assert self._init is not None
        end = time.monotonic() + READY_S
        while not path.exists():
            self._init.check()
            assert time.monotonic() < end, f"{path} did not come; see {self._init.log}"
            time.sleep(0.02)

    def _child_of(self, process: Process) -> int:
        """Process 1 of the node, as seen from outside."""
        assert process.running is not None
        pid = process.running.pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(child)

    def _write_settings(self) -> None:
        # Kubelet and API server resolve /var/lib/node only inside; kubeconfigs are the same file from both sides.
        self.api.pki.sign(f"system:node:{self.name}", f"system:node:{self.name}", "system:nodes")
        path = self.api.write_kubeconfig(f"system:node:{self.name}")
        self._write("kubelet.kubeconfig", path.read_text())
        self._write("proxy.kubeconfig", self.api.write_kubeconfig("admin").read_text())
        self._write("ca.crt", (self.api.pki.folder / "ca.crt").read_text())
        self._write("containerd.toml", _CONTAINERD)
        self._write("resolv.conf", "")
        self._write("cni/10-pods.conflist", json.dumps(self._cni()))
        self._write("kubelet.yaml", yaml.safe_dump(self._kubelet()))
        self._write("proxy.yaml", yaml.safe_dump(self._proxy()))

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def _cni(self) -> dict[str, object]:
        ipam = {"type": "host-local", "ranges": [[{"subnet": self.host.pod_network}]], "routes": [{"dst": "0.0.0.0/0"}]}
        plugins: Sequence[object] = [{"type": "ptp", "mtu": self.lab.options.client_mtu, "ipam": ipam}]
        return {"cniVersion": "0.4.0", "name": "pods", "plugins": plugins}

    def _kubelet(self) -> dict[str, object]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": False},
                "x509": {"clientCAFile": "/var/lib/node/ca.crt"},
            },
            "authorization": {"mode": "AlwaysAllow"},
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "resolvConf": "/var/lib/node/resolv.conf",
            # The machine's own limits: cgroup v1, no CAP_SYS_RESOURCE, a disk that is not the node's.
            "failCgroupV1": False,
            "featureGates": {"KubeletInUserNamespace": True},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "cgroupsPerQOS": True,
            "enforceNodeAllocatable": [],
            "localStorageCapacityIsolation": False,
            "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "failSwapOn": False,
            "makeIPTablesUtilChains": False,
            "nodeStatusUpdateFrequency": "2s",
            "nodeLeaseDurationSeconds": 20,
            "serializeImagePulls": False,
        }

    def _proxy(self) -> dict[str, object]:
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clusterCIDR": PODS,
            "hostnameOverride": self.name,
            "clientConnection": {"kubeconfig": "/var/lib/node/proxy.kubeconfig"},
            # Limits of connection tracking are the machine's, which a namespace may not change.
            "conntrack": {
                "maxPerCore": 0,
                "min": 0,
                "tcpEstablishedTimeout": "0s",
                "tcpCloseWaitTimeout": "0s",
            },
        }
