"""The cluster on the stage: real agents, a real controller, real servers, in the lab's hosts.

Decides how the demo's programs are started and what a step of the timeline does to them. All of it goes the way a
user would go: certificates by ``holdfast certs``, a config file that the controller watches, agents that find out the
rest. The two baselines differ from Holdfast's own run in one thing: the compiled fast path that the LBs' agents load.
"""

import http.client
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from lbpod.lab.demo.tally import LbFigures
from lbpod.lab.demo.timeline import SECOND_NS, Act
from lbpod.lab.errors import LabError
from lbpod.lab.program import Program, python
from lbpod.lab.topology import Lab, Node, Pod
from lbpod.lab.workload import HTTP_PORT, Backend, CheckerRun, start_nginx

VIP: Final = "203.0.113.10"
VIP_PORT: Final = 80
PREFIX: Final = f"{VIP}/32"
CONTROL_PORT: Final = 9900
METRICS_PORT: Final = 9902
CONTROLLER_PORT: Final = 9901
READY_WAIT_NS: Final = 60 * SECOND_NS
STOP_WAIT_NS: Final = 10 * SECOND_NS
POLL_NS: Final = 100_000_000
IDLE_SECONDS: Final = 8
"""Idle timeout of the demo's VIP: short, so that a slot that is not settled early settles within the run."""

CONTROLLER: Final = "controller"


@dataclass
class Served:
    """A backend and whether it drains."""

    backend: Backend
    draining: bool = False


class Stage:
    """One cluster in one lab. Single-threaded. ``lbs`` take part in the ring, ``hosts`` carry the pods."""

    def __init__(self, lab: Lab, lb_count: int) -> None:
        self.lab = lab
        self.lbs: list[Node] = lab.nodes[:lb_count]
        self.hosts: list[Node] = lab.nodes[lb_count:]
        self.served: list[Served] = []  # oldest first
        self.drained: list[Served] = []  # those that END_DRAIN will remove
        self.agents: dict[str, Program] = {}
        self.controller: Program | None = None
        self.checker: CheckerRun | None = None
        self.folder = lab.run_dir / "demo"
        self.config = self.folder / "holdfast.yaml"
        self._placed = 0

    # ------------------------------------------------------------------------------------------------ setting up

    def prepare(self, backend_count: int) -> None:
        """Certificates, servers, config file."""
        self.folder.mkdir()
        nodes = [node.name for node in self.lab.nodes]
        self.lab.router.run(python("-m", "lbpod.cli", "certs", str(self.folder / "tls"), *nodes))
        for _ in range(backend_count):
            self.add_backend()
        self.write_config()

    def start(self, bpf_object: Path | None) -> None:
        """A new cluster: controller and agents, those of the LBs with this fast path (None: Holdfast's own)."""
        for node in self.lab.nodes:
            self._start_agent(node, bpf_object if node in self.lbs else None)
        (self.folder / "controller.state").unlink(missing_ok=True)
        argv = python("-m", "lbpod.cli", "controller", "--config", str(self.config))
        argv += ["--listen", f"127.0.0.1:{CONTROLLER_PORT}"]
        # In the router, from where all nodes can be reached.
        self.controller = self.lab.router.popen(argv, name=CONTROLLER)

    def stop(self) -> None:
        """Ends controller and agents; these take their programs and pins along."""
        programs = [*self.agents.values(), *([self.controller] if self.controller is not None else [])]
        self.controller = None
        self.agents.clear()
        for program in programs:
            program.signal(signal.SIGTERM)
        for program in programs:
            program.finish(time.monotonic_ns() + STOP_WAIT_NS)

    def _start_agent(self, node: Node, bpf_object: Path | None) -> None:
        argv = python("-m", "lbpod.cli", "agent", "--node", node.name, "--node-address", node.address)
        argv += ["--interface", "eth0", "--listen", f"0.0.0.0:{CONTROL_PORT}", "--detach-on-exit"]
        argv += ["--on-term", "stay"]  # the lab takes all of it away
        argv += ["--metrics-listen", f"127.0.0.1:{METRICS_PORT}", "--tls", str(self.folder / "tls")]
        argv += ["--state", str(self.folder / f"state-{node.name}-{time.monotonic_ns()}")]
        argv += ["--pins", str(self.lab.pin_dir(node)), "--map-sizes", "records=65536,nat=65536,cache=65536"]
        argv += ["--bpf-object", str(bpf_object)] if bpf_object else []
        self.agents[node.name] = node.popen(argv, name="agent")

    def wait_ready(self) -> None:
        """Until every agent and the controller say that they are ready. LabError where one has ended instead."""
        deadline_ns = time.monotonic_ns() + READY_WAIT_NS
        waiting = [(node, METRICS_PORT, self.agents[node.name]) for node in self.lab.nodes]
        assert self.controller is not None, "the controller is started before anybody waits for it"
        places: list[tuple[Any, int, Program]] = [*waiting, (self.lab.router, CONTROLLER_PORT, self.controller)]
        for host, port, program in places:
            while not self._ready(host, port):
                if not program.alive:
                    raise LabError(f"{program.name} in {host.name} has ended: {program.log_text().strip()[-800:]}")
                if time.monotonic_ns() > deadline_ns:
                    raise LabError(f"{program.name} in {host.name} is not ready; see {program.log}")
                time.sleep(POLL_NS / SECOND_NS)

    def _ready(self, host: Any, port: int) -> bool:
        try:
            return self._get(host, port, "/readyz")[0] == 200
        except OSError:
            return False

    def _get(self, host: Any, port: int, path: str) -> tuple[int, str]:
        """GET on the loopback of a host of the lab."""
        with host.in_netns():
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.settimeout(2)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        try:
            sock.connect(("127.0.0.1", port))
            connection.sock = sock
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except http.client.HTTPException as error:
            raise OSError(f"{host.name}:{port}{path}: {error!r}") from error
        finally:
            connection.close()
            sock.close()

    # --------------------------------------------------------------------------------------------- what is served

    def add_backend(self) -> Backend:
        """A new pod with nginx, on the hosts in turn."""
        host = self.hosts[self._placed % len(self.hosts)]
        self._placed += 1
        pod: Pod = self.lab.add_pod(host)
        backend = start_nginx(self.lab, pod)
        self.served.append(Served(backend))
        return backend

    def write_config(self) -> None:
        """The whole wish, replaced in one rename, as a careful editor would."""
        nodes = [
            {
                "name": one.name,
                "address": one.address,
                "control": f"{one.address}:{CONTROL_PORT}",
                "lb": one in self.lbs,
            }
            for one in self.lab.nodes
        ]
        backends = [
            {
                "address": one.backend.pod.address,
                "port": one.backend.port,
                "node": one.backend.pod.node.name,
                "state": "draining" if one.draining else "ready",
            }
            for one in self.served
        ]
        service = {
            "apiVersion": "holdfast.dev/v1alpha1",
            "kind": "VirtualService",
            "metadata": {"name": "web", "namespace": "demo"},
            "spec": {
                "address": VIP,
                "ports": [{"name": "http", "protocol": "TCP", "port": VIP_PORT, "targetPort": HTTP_PORT}],
                "backendRef": {"name": "web"},
                "idleTimeoutSeconds": IDLE_SECONDS,
                "drainTimeoutSeconds": 3_600,
            },
        }
        settings = {
            "cluster": {"vni": 7_077, "seed": 20_140_617},
            "tls": str(self.folder / "tls"),
            "state": str(self.folder / "controller.state"),
            "nodes": nodes,
            "virtualServices": [service],
            "backends": {"demo/web": backends},
        }
        new = self.config.with_suffix(".new")
        new.write_text(yaml.safe_dump(settings, sort_keys=False))
        os.replace(new, self.config)

    def remove(self, served: Served) -> None:
        """Takes a backend away for good; the checking client hears of it first."""
        if self.checker is not None:
            self.checker.gone(served.backend.name)
        self.served.remove(served)
        self.write_config()
        self.lab.remove_pod(served.backend.pod)

    def play(self, act: Act) -> str:
        """Plays a step (all but RESHUFFLE); returns what happened in a few words."""
        ready = [one for one in self.served if not one.draining]
        match act:
            case Act.SCALE_UP:
                names = [self.add_backend().name for _ in range(2)]
                self.write_config()
                return f"+ {' and '.join(names)}"
            case Act.SCALE_DOWN:
                self.drained = ready[:2]
                for one in self.drained:
                    one.draining = True
                self.write_config()
                return f"{' and '.join(one.backend.name for one in self.drained)} drain"
            case Act.END_DRAIN:
                names = [one.backend.name for one in self.drained]
                for one in self.drained:
                    self.remove(one)
                self.drained = []
                return f"- {' and '.join(names)}"
            case Act.REPLACE:
                new = self.add_backend()
                ready[0].draining = True
                self.write_config()
                return f"{ready[0].backend.name} -> {new.name}"
            case Act.RESHUFFLE:
                raise AssertionError("the router reshuffles, not the stage")

    def reset(self, backend_count: int) -> None:
        """After a run: only so many backends, none draining, so that the next run begins like the last one."""
        self.checker = None
        for one in [one for one in self.served if one.draining]:
            self.served.remove(one)
            self.lab.remove_pod(one.backend.pod)
        while len(self.served) > backend_count:
            one = self.served.pop(0)
            self.lab.remove_pod(one.backend.pod)
        while len(self.served) < backend_count:
            self.add_backend()
        self.write_config()

    # ------------------------------------------------------------------------------------------------ looking on

    def look(self) -> list[LbFigures]:
        """What the LBs' /metrics say now."""
        return [self._figures(node) for node in self.lbs]

    def _figures(self, node: Node) -> LbFigures:
        status, text = self._get(node, METRICS_PORT, "/metrics")
        if status != 200:
            raise LabError(f"{node.name} answers {status} to /metrics")
        values = dict(_samples(text))
        return LbFigures(
            tracking_slots=int(values.get("holdfast_tracking_slots", 0)),
            relayed_packets=int(values.get('holdfast_packets_total{verdict="relayed"}', 0)),
            resolved_flows=int(values.get("holdfast_resolved_flows_total", 0)),
            generation=int(values.get('holdfast_generation{phase="committed"}', 0)),
        )


def _samples(text: str) -> Iterator[tuple[str, float]]:
    """Samples of the Prometheus text format: name with labels as written, value."""
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            yield name, float(value)


@contextmanager
def on_stage(lab: Lab, lb_count: int, backend_count: int) -> Iterator[Stage]:
    """A stage with certificates and servers; whatever has been started on it is stopped in any case."""
    stage = Stage(lab, lb_count)
    try:
        stage.prepare(backend_count)
        yield stage
    finally:
        stage.stop()
