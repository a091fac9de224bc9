"""A cluster in the lab: real agents, a real controller, real servers, started and configured as a user would.

Shared by the demo and the chaos run. Decided here: how the programs are started (certificates by ``holdfast certs``, a
config file that the controller watches, agents that find out the rest), how they are asked how they are, and how one
that was killed comes back. What happens to them when is the business of who uses it. The two baselines differ from
Holdfast's own run in one thing: the compiled fast path that the LBs' agents load.
"""

import http.client
import os
import signal
import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from lbpod.certs import client_context, files_in
from lbpod.core import wire
from lbpod.core.errors import RemoteError
from lbpod.core.messages import LbStatus
from lbpod.lab.errors import LabError
from lbpod.lab.host import Host
from lbpod.lab.in_force import InForce, Place, edition_name, is_out, place_of
from lbpod.lab.limits import MS_NS, SECOND_NS
from lbpod.lab.program import Program, python
from lbpod.lab.topology import Lab, Node, Pod
from lbpod.lab.workload import HTTP_PORT, Backend, start_nginx

VIP: Final = "203.0.113.10"
VIP_PORT: Final = 80
PREFIX: Final = f"{VIP}/32"
CONTROL_PORT: Final = 9900
METRICS_PORT: Final = 9902
CONTROLLER_PORT: Final = 9901
READY_WAIT_NS: Final = 60 * SECOND_NS
STOP_WAIT_NS: Final = 10 * SECOND_NS
POLL_NS: Final = 100 * MS_NS
GET_SECONDS: Final = 2
CONTROLLER: Final = "controller"

TITLES: Final = {
    "holdfast": "Holdfast",
    "hash_only": "consistent hashing alone",
    "local_table": "hashing + flow table at each LB",
}
"""What can balance: its name in options and files -> what people are told."""


def bpf_object(name: str) -> Path | None:
    """The compiled fast path of that name; None: Holdfast's own."""
    return None if name == "holdfast" else Path(__file__).resolve().parent / "bpf" / f"{name}.bpf.o"


@dataclass(frozen=True)
class ClusterOptions:
    """What is chosen once for a cluster."""

    idle_seconds: int
    """Idle timeout of the VIP: longer than any pause of a client, and short enough to settle within a run."""
    map_sizes: str
    """As `holdfast agent --map-sizes` takes them."""
    on_term: str
    """As `holdfast agent --on-term` takes it: whether an LB that is told to end leaves the ring first."""


@dataclass
class Served:
    """A backend as the config file has it."""

    backend: Backend
    draining: bool = False
    weight: int = 1

    @property
    def place(self) -> Place:
        return place_of(self.backend.pod.address, self.backend.port)


@dataclass(frozen=True)
class Outgoing:
    """A backend that the config does not have any more, and whose pod still runs. edition: of the first one without."""

    served: Served
    edition: int


class Cluster:
    """One cluster in one lab. Whoever uses it from several threads may only ask (``get``, ``metrics``, ``ready``) in
    them. ``lbs`` are listed as load balancers, ``hosts`` carry the pods.
    """

    def __init__(self, lab: Lab, lb_count: int, options: ClusterOptions) -> None:
        self.lab = lab
        self.options = options
        self.lbs: list[Node] = lab.nodes[:lb_count]
        self.hosts: list[Node] = lab.nodes[lb_count:]
        self.served: list[Served] = []  # oldest first
        self.outgoing: list[Outgoing] = []
        self.agents: dict[str, Program] = {}  # node name -> its agent, alive or not
        self.controller: Program | None = None
        self.controllers: list[Program] = []  # all that were ever started, one after the other
        self.folder = lab.run_dir / "cluster"
        self.config = self.folder / "holdfast.yaml"
        self.lb_object: Path | None = None
        self.edition = 0
        """Of the config: how often it was written with other backends than before (lbpod.lab.in_force)."""
        self._written: list[dict[str, object]] = []  # the backends that it has
        self._viewer: ssl.SSLContext | None = None
        self._states: dict[str, Path] = {}  # node name -> where its agent remembers
        self._placed = 0

    # -------------------------------------------------------------------------------------------------- programs

    def mint(self, names: list[str]) -> None:
        """Certificates for nodes of these names."""
        self.folder.mkdir(exist_ok=True)
        self.lab.router.run(python("-m", "lbpod.cli", "certs", str(self.folder / "tls"), *names), timeout_s=120)

    def start(self, lb_object: Path | None) -> None:
        """A new cluster: controller and agents, those of the LBs with this fast path (None: Holdfast's own)."""
        self.lb_object = lb_object
        for node in [*self.lbs, *self.hosts]:
            self.start_agent(node)
        (self.folder / "controller.state").unlink(missing_ok=True)
        self.start_controller()

    def start_controller(self) -> None:
        """The controller, new or again, in the router, from where all nodes can be reached."""
        argv = python("-m", "lbpod.cli", "controller", "--config", str(self.config))
        argv += ["--listen", f"127.0.0.1:{CONTROLLER_PORT}"]
        self.controller = self.lab.router.popen(argv, name=CONTROLLER)
        self.controllers.append(self.controller)

    def start_agent(self, node: Node) -> None:
        """The agent of a node on which none has run."""
        self._states[node.name] = self.folder / f"state-{node.name}-{time.monotonic_ns()}"
        self.start_agent_again(node)

    def start_agent_again(self, node: Node) -> None:
        """As a supervisor would: it finds what an earlier one has pinned and written down."""
        argv = python("-m", "lbpod.cli", "agent", "--node", node.name, "--node-address", node.address)
        argv += ["--interface", "eth0", "--listen", f"0.0.0.0:{CONTROL_PORT}", "--detach-on-exit"]
        argv += ["--on-term", self.options.on_term]
        argv += ["--metrics-listen", f"127.0.0.1:{METRICS_PORT}", "--tls", str(self.folder / "tls")]
        argv += ["--state", str(self._states[node.name])]
        argv += ["--pins", str(self.lab.pin_dir(node)), "--map-sizes", self.options.map_sizes]
        if self.lb_object is not None and node in self.lbs:
            argv += ["--bpf-object", str(self.lb_object)]
        self.agents[node.name] = node.popen(argv, name="agent")

    def stop(self) -> None:
        """Ends controller and agents; these take their programs and pins along."""
        programs = [*self.agents.values(), *([self.controller] if self.controller is not None else [])]
        self.controller = None
        self.agents.clear()
        for program in programs:
            program.signal(signal.SIGINT)  # nobody takes over: with SIGTERM an LB might hand over first
        for program in programs:
            program.finish(time.monotonic_ns() + STOP_WAIT_NS)

    # --------------------------------------------------------------------------------------------------- questions

    def wait_ready(self) -> None:
        """Until every agent and the controller say that they are ready. LabError where one has ended instead."""
        deadline_ns = time.monotonic_ns() + READY_WAIT_NS
        assert self.controller is not None, "the controller is started before anybody waits for it"
        places: list[tuple[Host, int, Program]] = [
            *((node, METRICS_PORT, self.agents[node.name]) for node in [*self.lbs, *self.hosts]),
            (self.lab.router, CONTROLLER_PORT, self.controller),
        ]
        for host, port, program in places:
            while not self.ready(host, port):
                if not program.alive:
                    raise LabError(f"{program.name} in {host.name} has ended: {program.log_text().strip()[-800:]}")
                if time.monotonic_ns() > deadline_ns:
                    raise LabError(f"{program.name} in {host.name} is not ready; see {program.log}")
                time.sleep(POLL_NS / SECOND_NS)

    def ready(self, host: Host, port: int = METRICS_PORT) -> bool | None:
        """What /readyz says; None: nobody answers."""
        try:
            return self.get(host, port, "/readyz")[0] == 200
        except (OSError, LabError):
            return None

    def metrics(self, node: Node) -> dict[str, float] | None:
        """The samples of an agent's /metrics, by name with labels as written; None: nobody answers."""
        try:
            status, text = self.get(node, METRICS_PORT, "/metrics")
        except (OSError, LabError):
            return None
        return dict(_samples(text)) if status == 200 else None

    def in_force(self, node: Node) -> InForce | None:
        """What an LB forwards by; None: nobody answers."""
        path = f"{wire.PATH_STATE}?{wire.QUERY_SNAPSHOT}=1"
        try:
            status, body = self._fetch(node, CONTROL_PORT, path, self._viewer_context())
            return InForce.of(wire.decode(LbStatus, body)) if status == 200 else None
        except (OSError, LabError, RemoteError):
            return None

    def _viewer_context(self) -> ssl.SSLContext:
        if self._viewer is None:
            self._viewer = client_context(files_in(self.folder / "tls", "viewer"))
            self._viewer.check_hostname = False  # asked on its own loopback
        return self._viewer

    def get(self, host: Host, port: int, path: str) -> tuple[int, str]:
        """GET on the loopback of a host of the lab. Raises OSError."""
        status, body = self._fetch(host, port, path, None)
        return status, body.decode()

    def _fetch(self, host: Host, port: int, path: str, tls: ssl.SSLContext | None) -> tuple[int, bytes]:
        with host.in_netns():
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.settimeout(GET_SECONDS)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        try:
            sock.connect(("127.0.0.1", port))
            if tls is not None:
                sock = tls.wrap_socket(sock)
            connection.sock = sock
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except http.client.HTTPException as error:
            raise OSError(f"{host.name}:{port}{path}: {error!r}") from error
        finally:
            connection.close()
            sock.close()

    # --------------------------------------------------------------------------------------------- what is served

    def new_backend(self) -> Backend:
        """A new pod with nginx, on the hosts in turn; not yet in the config."""
        host = self.hosts[self._placed % len(self.hosts)]
        self._placed += 1
        pod: Pod = self.lab.add_pod(host)
        return start_nginx(self.lab, pod)

    def add_backend(self) -> Backend:
        """A new backend, for the next config."""
        backend = self.new_backend()
        self.served.append(Served(backend))
        return backend

    def take_out(self, served: Served) -> None:
        """Out of the config. Its pod may go when nobody forwards by a config that has it: see ``let_go``."""
        self.served.remove(served)
        self.outgoing.append(Outgoing(served, self.write_config()))

    def let_go(self, everybody: Iterable[InForce]) -> list[Backend]:
        """Those whose pods may be removed now, which is left to the caller. everybody: what each LB that may send new
        flows forwards by."""
        all_of_them = list(everybody)
        free = [one for one in self.outgoing if all_of_them and is_out(one.served.place, one.edition, all_of_them)]
        self.outgoing = [one for one in self.outgoing if one not in free]
        return [one.served.backend for one in free]

    def write_config(self) -> int:
        """The whole wish, replaced in one rename, as a careful editor would. Returns its edition."""
        nodes = [
            {
                "name": one.name,
                "address": one.address,
                "control": f"{one.address}:{CONTROL_PORT}",
                "lb": one in self.lbs,
            }
            for one in [*self.lbs, *self.hosts]
        ]
        backends: list[dict[str, object]] = [
            {
                "address": one.backend.pod.address,
                "port": one.backend.port,
                "node": one.backend.pod.node.name,
                "state": "draining" if one.draining else "ready",
                "weight": one.weight,
            }
            for one in self.served
        ]
        if backends != self._written:
            self._written, self.edition = backends, self.edition + 1
        service = {
            "apiVersion": "holdfast.dev/v1alpha1",
            "kind": "VirtualService",
            "metadata": {"name": "web", "namespace": "demo"},
            "spec": {
                "address": VIP,
                "ports": [
                    {
                        "name": edition_name(self.edition),
                        "protocol": "TCP",
                        "port": VIP_PORT,
                        "targetPort": HTTP_PORT,
                    }
                ],
                "backendRef": {"name": "web"},
                "idleTimeoutSeconds": self.options.idle_seconds,
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
        return self.edition


def _samples(text: str) -> Iterator[tuple[str, float]]:
    """Samples of the Prometheus text format: name with labels as written, value."""
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            yield name, float(value)
