"""What the control bench runs: a real API server, the operator and LB agents on kernel maps, each a process of its own.

All of it lives in the lab: agents in a namespace per node, and API server, operator and the bench itself in the
router's, which reaches every node and shows nothing to the machine. So enter ``world`` and stay in its block: sockets,
threads and processes made there are inside. What controllers and kubelets would write, the bench writes.

Times are read from what the programs log anyway (JSON lines with microseconds of one machine's clock), so that nothing
is slowed down by being asked; the moment of an event is when a watch of the bench's own hears of it.
"""

import http.client
import json
import os
import ssl
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lbpod.agent.settings import ENVIRONMENT_PREFIX
from lbpod.core.limits import SLOT_COUNT
from lbpod.core.transition import current_of, is_tracking
from lbpod.datapath import libbpf, mapped
from lbpod.datapath.layout import U64
from lbpod.lab import Lab, python
from lbpod.lab.program import Program
from tests.cluster.apiserver import ApiServer, Json, api_server
from tests.cluster.site import Site, until
from tests.operator_objects import Body, endpoint, endpoint_slice, service
from tests.tidy.sources import ROOT

SIZES: Final = "records=65536,nat=65536,cache=65536,pending=8192,embryonic=8192"
SLICES: Final = "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices"
VIRTUAL_SERVICES: Final = "/apis/holdfast.dev/v1alpha1/namespaces/{}/virtualservices"
TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
MEMORY: Final = "/dev/shm" if os.path.isdir("/dev/shm") else None
CALM_S: Final = 4.0
"""Nothing new for so long means that nothing is under way."""


# --- What programs say ------------------------------------------------------------------------------------------------
class Tail:
    """The JSON lines that a program has logged since the last look."""

    def __init__(self, log: Callable[[], Path | None]) -> None:
        self._log = log
        self._offset = 0
        self._rest = b""

    def read(self) -> list[Json]:
        """What is new; lines that are no JSON are left out."""
        path = self._log()
        if path is None or not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        found = []
        for line in lines:
            if line.startswith(b"{"):
                said = json.loads(line)
                said["at"] = datetime.fromisoformat(said["timestamp"]).timestamp()
                found.append(said)
        return found


class Slices(threading.Thread):
    """A watch of the EndpointSlices of one namespace: when each version was heard of."""

    def __init__(self, connection: http.client.HTTPSConnection, namespace: str) -> None:
        super().__init__(name="watch", daemon=True)
        self._connection = connection
        self._path = SLICES.format(namespace) + "?watch=1&resourceVersion=0"
        self.heard: dict[str, float] = {}
        """resourceVersion -> time."""

    def run(self) -> None:
        self._connection.request("GET", self._path)
        response = self._connection.getresponse()
        while line := response.readline():
            at = time.time()
            self.heard[json.loads(line)["object"]["metadata"]["resourceVersion"]] = at


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def memory_mb(pid: int) -> dict[str, float]:
    """Resident memory of a process in MB: all of it, and the part that is nobody else's (without mapped maps)."""
    said = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {
        name: round(int(said[key].split()[0]) * 1_024 / 1e6, 1) for name, key in (("rss", "VmRSS"), ("anon", "RssAnon"))
    }


# --- The world --------------------------------------------------------------------------------------------------------
@dataclass
class LabSite(Site):
    """A site whose nodes are those of a lab."""

    addresses: Sequence[str] = ()

    def node_address(self, number: int) -> str:
        return self.addresses[number - 1]


@dataclass
class ControlWorld:
    """One that runs."""

    lab: Lab
    site: LabSite
    states: Path
    """What agents remember lies here: in memory, as in a pod, where it is under /run."""
    lbs: dict[str, Program] = field(default_factory=dict)
    tails: dict[str, Tail] = field(default_factory=dict)
    last_phase: Json = field(default_factory=dict)
    operator_tail: Tail = field(init=False)
    _threads: threading.local = field(default_factory=threading.local)

    def __post_init__(self) -> None:
        self.operator_tail = Tail(lambda: self.site.operator.log if self.site.operator is not None else None)

    # --- The API ----------------------------------------------------------------------------------------------------
    def connection(self, timeout_s: float | None = 60) -> http.client.HTTPSConnection:
        """A new one, as admin. timeout_s: None where silence is no fault."""
        pki = self.site.api.pki.folder
        tls = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        tls.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        return http.client.HTTPSConnection("127.0.0.1", self.site.api.port, context=tls, timeout=timeout_s)

    def call(self, method: str, path: str, body: Any, content_type: str = "application/json") -> Json:
        """One call on the connection of this thread."""
        if not hasattr(self._threads, "connection"):
            self._threads.connection = self.connection()
        self._threads.connection.request(method, path, json.dumps(body), {"Content-Type": content_type})
        response = self._threads.connection.getresponse()
        said = response.read()
        assert response.status < 300, f"{method} {path}: {response.status} {said[:500]!r}"
        return dict(json.loads(said))

    def create(self, number: int, backends: int) -> None:
        """VirtualService, Service and EndpointSlice of this number."""
        name, shop = f"web-{number}", self.site.shop
        made = service(name, namespace=shop)
        made["metadata"].pop("uid")
        self.call("POST", f"/api/v1/namespaces/{shop}/services", made)
        self.call("POST", SLICES.format(shop), self.slice_of(number, range(1, backends + 1)))
        spec = {
            "address": f"198.18.{number >> 8}.{number & 255}",
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
            "backendRef": {"name": name},
        }
        wanted = {
            "apiVersion": "holdfast.dev/v1alpha1",
            "kind": "VirtualService",
            "metadata": {"name": name},
            "spec": spec,
        }
        self.call("POST", VIRTUAL_SERVICES.format(shop), wanted)

    def slice_of(self, number: int, backends: Sequence[int]) -> Body:
        """Its backends, spread over all nodes."""
        nodes = list(self.lbs) or [self.site.node_name(one + 1) for one in range(len(self.site.addresses))]
        endpoints = [
            endpoint(f"10.{64 + (number >> 8)}.{number & 255}.{one}", nodes[one % len(nodes)], ready=True)
            for one in backends
        ]
        made = endpoint_slice(
            *endpoints, name=f"web-{number}-a", namespace=self.site.shop, service=f"web-{number}", owner=""
        )
        made["metadata"].pop("uid")
        made["metadata"].pop("ownerReferences")
        return made

    def patch(self, number: int, backends: Sequence[int]) -> str:
        """Other backends for a Service; the version of its slice."""
        endpoints = self.slice_of(number, backends)["endpoints"]
        path = f"{SLICES.format(self.site.shop)}/web-{number}-a"
        said = self.call("PATCH", path, {"endpoints": endpoints}, "application/merge-patch+json")
        return str(said["metadata"]["resourceVersion"])

    # --- Programs ---------------------------------------------------------------------------------------------------
    def start_lb(self, number: int) -> None:
        """The agent of this node, as its container runs it, with the certificate that the operator has made."""
        node, name = self.lab.nodes[number - 1], self.site.node_name(number)
        env = {
            "NODE": name,
            "NODE_ADDRESS": node.address,
            "INTERFACE": "eth0",
            "TLS": str(self.site.folder / "tls"),
            "STATE": str(self.states / name),
            "PINS": str(self.lab.pin_dir(node)),
            "LISTEN": f"0.0.0.0:{self.site.agent_port}",
            "MAP_SIZES": SIZES,
            "ON_TERM": "stay",
        }
        set_to = {ENVIRONMENT_PREFIX + setting: value for setting, value in env.items()}
        program = node.popen(python("-m", "lbpod.agent"), name="agent", env={**os.environ, **set_to})
        self.lbs[name] = program
        self.tails[name] = Tail(lambda: program.log)

    @property
    def operator_pid(self) -> int:
        operator = self.site.operator
        assert operator is not None, "it was started"
        assert operator.running is not None, "it runs"
        return operator.running.pid

    async def until_calm(self, wait_s: float, calm_s: float = CALM_S) -> None:
        """Until all is in force at all LBs, and operator and agents have had nothing to say for calm_s. It reads what
        they have said."""
        calm_since = time.monotonic()

        async def said() -> bool:
            nonlocal calm_since
            told = self.operator_tail.read()
            self.last_phase = next((one for one in reversed(told) if one["event"] == "phase"), self.last_phase)
            for tail in self.tails.values():
                told += tail.read()
            in_force = (len(self.tails), "idle", len(self.tails))
            last = tuple(self.last_phase.get(name) for name in ("lbs", "phase", "lbs_at_generation"))
            moves = any(one["event"] in {"phase", "prepared", "committed", "virtual service"} for one in told)
            if moves or (self.tails and last != in_force) or (await self.site.http("/readyz"))[0] != 200:
                calm_since = time.monotonic()
            return time.monotonic() - calm_since >= calm_s

        await until("nothing more to happen", said, wait_s)

    def currents(self) -> dict[tuple[str, str], npt.NDArray[np.uint32]]:
        """`current` of every slot of each VIP at every LB."""
        return {where: current_of(words) for where, words in self._words()}

    def tracking_count(self) -> int:
        """Slots that track, over all VIPs and LBs."""
        return sum(int(np.count_nonzero(is_tracking(words))) for _, words in self._words())

    def _words(self) -> Iterator[tuple[tuple[str, str], npt.NDArray[np.uint64]]]:
        """Node and pin, and the words of a VIP there, read from the kernel. To be used before the next."""
        for node in self.lab.nodes:
            for pin in sorted((self.lab.pin_dir(node) / "slots").iterdir()):
                fd = libbpf.pinned(str(pin))
                assert fd is not None, f"{pin} was there a moment ago"
                array = mapped.MappedArray("slots", fd, U64, SLOT_COUNT)
                os.close(fd)
                yield (node.name, pin.name), array.words[:, 0]
                array.close()


@contextmanager
def _inside(folder: Path, nodes: int) -> Iterator[tuple[Lab, ApiServer]]:
    """A lab and an API server in its router, which the calling thread is inside of until the end."""
    folder.mkdir()
    with Lab(nodes=nodes) as lab, lab.router.in_netns(), api_server(folder / "api") as api:
        crd = str(ROOT / "crds/virtualservices.holdfast.dev.yaml")
        api.kubectl("apply", "--server-side", "-f", crd)
        api.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", crd)
        yield lab, api


@asynccontextmanager
async def world(folder: Path, lbs: int) -> AsyncIterator[ControlWorld]:
    """API server, operator and so many LBs that form a ring; VirtualServices there are none yet."""
    with _inside(folder, lbs) as (lab, api), tempfile.TemporaryDirectory(prefix="holdfast-", dir=MEMORY) as states:
        site = LabSite(api, folder, "shop", "op-1", addresses=[node.address for node in lab.nodes])
        made = ControlWorld(lab, site, Path(states))
        for name in (site.system, site.shop):
            api.call("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        site.install()
        await site.add_nodes(lbs)
        await site.list_agents(*range(1, lbs + 1))
        site.start_operator()
        try:
            await site.lay_out_certificates()
            for number in range(1, lbs + 1):
                made.start_lb(number)
            await made.until_calm(180)
            yield made
        finally:
            await site.stop_operator()
