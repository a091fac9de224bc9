"""A whole cluster as a user would run it: certificates, a config file, the real commands, in the lab's hosts.

What a test does here is edit the file (`write_config`) and look at what everybody can look at: /readyz, /metrics, the
answers of real servers. Nothing reaches past the commands into their insides.
"""

import http.client
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from lbpod.lab import Lab, Node, Pod, Program, python, start_nginx, start_udp_echo
from lbpod.lab.host import Host
from lbpod.lab.workload import Backend

VIP: Final = "203.0.113.10"
PREFIX: Final = f"{VIP}/32"
CONTROL_PORT: Final = 9900
CONTROLLER_PORT: Final = 9901
METRICS_PORT: Final = 9902
MAP_SIZES: Final = "records=65536,nat=65536,cache=65536,pending=16384,embryonic=16384"
WAIT_S: Final = 30
RESHUFFLE_S: Final = 0.3
NAMESPACE: Final = "tests"


@dataclass
class Service:
    """One VirtualService with one port, and the backends behind it."""

    name: str
    protocol: str
    port: int
    affinity: str = "None"
    backends: list[Backend] = field(default_factory=list)
    draining: set[str] = field(default_factory=set)

    def as_yaml(self) -> dict[str, Any]:
        return {
            "apiVersion": "holdfast.dev/v1alpha1",
            "kind": "VirtualService",
            "metadata": {"name": self.name, "namespace": NAMESPACE},
            "spec": {
                "address": VIP,
                "ports": [{"name": "main", "protocol": self.protocol, "port": self.port, "targetPort": 8080}],
                "backendRef": {"name": self.name},
                "affinity": self.affinity,
                "idleTimeoutSeconds": 4,
                "udpIdleTimeoutSeconds": 4,
            },
        }

    def backends_yaml(self) -> list[dict[str, Any]]:
        return [
            {
                "address": one.pod.address,
                "port": one.port,
                "node": one.pod.node.name,
                "state": "draining" if one.name in self.draining else "ready",
            }
            for one in self.backends
        ]


class AgentCluster:
    """Agents on all nodes of a lab, the first `lb_count` of them LBs, and a controller in the router. One thread."""

    def __init__(self, lab: Lab, lb_count: int) -> None:
        self.lab = lab
        self.lbs: list[Node] = lab.nodes[:lb_count]
        self.hosts: list[Node] = lab.nodes[lb_count:]
        self.services: dict[str, Service] = {}
        self.agents: dict[str, Program] = {}
        self.controller: Program | None = None
        self.folder = lab.run_dir / "cluster"
        self.config = self.folder / "holdfast.yaml"
        self._placed = 0

    # --- The programs ---

    def prepare(self) -> None:
        """Certificates, and the VIPs' route."""
        self.folder.mkdir()
        names = [node.name for node in self.lab.nodes]
        self.lab.router.run(python("-m", "lbpod.cli", "certs", str(self.folder / "tls"), *names))
        self.lab.router.set_ecmp(PREFIX, self.lbs)

    def agent_argv(self, node: Node, *more: str) -> list[str]:
        argv = python("-m", "lbpod.cli", "agent", "--node", node.name, "--interface", "eth0")
        argv += ["--on-term", "stay"]
        argv += ["--listen", f"0.0.0.0:{CONTROL_PORT}", "--metrics-listen", f"127.0.0.1:{METRICS_PORT}"]
        argv += ["--tls", str(self.folder / "tls"), "--state", str(self.folder / f"state-{node.name}")]
        return [*argv, "--pins", str(self.lab.pin_dir(node)), "--map-sizes", MAP_SIZES, *more]

    def start_agent(self, node: Node, *more: str) -> Program:
        self.agents[node.name] = node.popen(self.agent_argv(node, *more), name="agent")
        return self.agents[node.name]

    def start_controller(self) -> Program:
        argv = python("-m", "lbpod.cli", "controller", "--config", str(self.config))
        argv += ["--listen", f"127.0.0.1:{CONTROLLER_PORT}"]
        self.controller = self.lab.router.popen(argv, name="controller")
        return self.controller

    def start_all(self) -> None:
        for node in self.lab.nodes:
            self.start_agent(node)
        self.write_config()
        self.start_controller()
        self.wait_ready()

    def wait_ready(self) -> None:
        """Until all agents and the controller say so."""
        for node in self.lab.nodes:
            self.wait_agent(node)
        wait_for(lambda: self.controller_ready()[0] == 200, "the controller is ready", self.told)

    def wait_agent(self, node: Node) -> None:
        wait_for(lambda: self.ready(node)[0] == 200, f"{node.name} is ready", self.told)

    def told(self) -> str:
        """What agents and controller say, for messages."""
        programs = [*self.agents.values(), *([self.controller] if self.controller else [])]
        said = [f"{node.name}: {self.ready(node)}" for node in self.lab.nodes]
        return "\n".join([*said, *(f"{one.host}/{one.name}: {one.log_text()[-600:]}" for one in programs)])

    def kill_agent(self, node: Node) -> None:
        """As a crash would."""
        self.agents[node.name].process.send_signal(signal.SIGKILL)
        self.agents[node.name].process.wait(5)

    # --- The config ---

    def add_service(self, name: str, protocol: str, port: int, *, affinity: str = "None") -> Service:
        self.services[name] = Service(name, protocol, port, affinity)
        return self.services[name]

    def add_backend(self, service: Service) -> Backend:
        """A new pod with a server, on the hosts in turn; in the file with the next `write_config`."""
        pod = self.next_pod()
        started = start_nginx(self.lab, pod) if service.protocol == "TCP" else start_udp_echo(pod, port=8080)
        service.backends.append(started)
        return started

    def next_pod(self) -> Pod:
        """A new pod, on the hosts in turn."""
        host = self.hosts[self._placed % len(self.hosts)]
        self._placed += 1
        return self.lab.add_pod(host)

    def take_out(self, service: Service, backend: Backend) -> None:
        """Out of the list; its pod goes on. In the file with the next `write_config`."""
        service.backends.remove(backend)
        service.draining.discard(backend.name)

    def write_config(self) -> None:
        """The whole wish, replaced in one rename."""
        nodes = [{"name": node.name, "address": node.address, "lb": node in self.lbs} for node in self.lab.nodes]
        settings = {
            "cluster": {"vni": 4711, "seed": 20_261_123},
            "tls": str(self.folder / "tls"),
            "state": str(self.folder / "controller.state"),
            "nodes": nodes,
            "virtualServices": [service.as_yaml() for service in self.services.values()],
            "backends": {f"{NAMESPACE}/{one.name}": one.backends_yaml() for one in self.services.values()},
        }
        self.replace_file(yaml.safe_dump(settings, sort_keys=False))

    def replace_file(self, text: str) -> None:
        fresh = self.config.with_suffix(".new")
        fresh.write_text(text)
        os.replace(fresh, self.config)

    def change(self) -> None:
        """Writes the file and waits until every LB has committed a newer generation."""
        before = self.generations()
        self.write_config()
        wait_for(
            lambda: all(new > old for new, old in zip(self.generations(), before, strict=True)),
            "every LB commits the change",
            self.told,
        )

    def generations(self) -> list[float]:
        """What the LBs have committed."""
        return [self.metric(node, 'holdfast_generation{phase="committed"}') for node in self.lbs]

    # --- Looking on ---

    def ready(self, node: Node) -> tuple[int, str]:
        """/readyz of an agent; (0, why) where it does not answer."""
        return _get(node, METRICS_PORT, "/readyz")

    def controller_ready(self) -> tuple[int, str]:
        return _get(self.lab.router, CONTROLLER_PORT, "/readyz")

    def metric(self, node: Node, name: str) -> float:
        """One sample of an agent's /metrics, by its name with labels; 0 where it is not there."""
        return self.metrics(node).get(name, 0.0)

    def metrics(self, node: Node) -> dict[str, float]:
        return _samples(*_get(node, METRICS_PORT, "/metrics"))

    def controller_metrics(self) -> dict[str, float]:
        return _samples(*_get(self.lab.router, CONTROLLER_PORT, "/metrics"))

    def packets(self, node: Node, verdict: str) -> float:
        return self.metric(node, f'holdfast_packets_total{{verdict="{verdict}"}}')

    def tracking(self) -> float:
        """Tracking slots, over all LBs."""
        return sum(self.metric(node, "holdfast_tracking_slots") for node in self.lbs)

    def stop(self) -> None:
        for program in [*([self.controller] if self.controller else []), *self.agents.values()]:
            program.signal(signal.SIGTERM)
        for program in [*([self.controller] if self.controller else []), *self.agents.values()]:
            program.stop()


@contextmanager
def reshuffling(cluster: AgentCluster, seed: int) -> Iterator[None]:
    """Inside the block the router moves flows to other LBs, again and again."""
    ending, rng = threading.Event(), random.Random(seed)

    def run() -> None:
        while not ending.wait(RESHUFFLE_S):
            cluster.lab.router.reshuffle(PREFIX, rng, weight_max=3)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


def wait_for(holds: Callable[[], bool], what: str, told: Callable[[], str] = str, *, seconds: float = WAIT_S) -> None:
    """Until it holds; AssertionError with what was told after `seconds`."""
    deadline_ns = time.monotonic_ns() + int(seconds * 1e9)
    while not holds():
        assert time.monotonic_ns() < deadline_ns, f"not within {seconds} s: {what}\n{told()}"
        time.sleep(0.05)


def _get(host: Host, port: int, path: str) -> tuple[int, str]:
    """GET on the loopback of a host; status 0 where nobody answers."""
    with host.in_netns():
        raw = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    raw.settimeout(5)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    try:
        raw.connect(("127.0.0.1", port))
        connection.sock = raw
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except (OSError, http.client.HTTPException) as error:
        return 0, repr(error)
    finally:
        connection.close()
        raw.close()


def _samples(status: int, text: str) -> dict[str, float]:
    """Samples of Prometheus' text format by name and labels as written; none where there was no answer."""
    found: dict[str, float] = {}
    for line in text.splitlines() if status == 200 else ():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found
