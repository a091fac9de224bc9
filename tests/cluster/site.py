"""A small cluster for the operator's tests: a real API server, the operator as a process of its own, and real agents on
maps in memory, each on a loopback address of its own. What controllers would write (EndpointSlices, Node statuses), the
test writes."""

import asyncio
import base64
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from lbpod.agent.agent import Agent
from lbpod.agent.settings import Endpoint
from lbpod.core.layout import SLOT_CURRENT_MASK
from lbpod.core.messages import LbStatus
from lbpod.core.model import parse_address
from lbpod.datapath.memory import MemoryDatapath
from tests.agents import Caller, make_parts, running
from tests.cluster.apiserver import ApiError, ApiServer, Json, Process, free_port
from tests.operator_objects import Body, endpoint, endpoint_slice, service
from tests.tidy.sources import ROOT

WAIT_S = 40
SYSTEM = "holdfast-system"
VIRTUAL_SERVICES = "/apis/holdfast.dev/v1alpha1/namespaces/{}/virtualservices"


async def until(what: str, said: Callable[[], Awaitable[Any]], wait_s: float = WAIT_S) -> Any:
    """Waits for something true, but not for ever, and returns it."""
    end = time.monotonic() + wait_s
    while True:
        found = await said()
        if found:
            return found
        assert time.monotonic() < end, f"waited in vain for: {what}"
        await asyncio.sleep(0.05)


def conditions_of(status: Json) -> dict[str, tuple[str, str]]:
    """By type: what it is, and why."""
    return {one["type"]: (one["status"], one["reason"]) for one in status.get("conditions", ())}


@dataclass
class Site:
    """One namespace pair (the operator's, and one for VirtualServices), nodes, agents, and the operator."""

    api: ApiServer
    folder: Path
    shop: str
    prefix: str
    kubeconfig: Path = Path()
    agent_port: int = field(default_factory=free_port)
    http_port: int = field(default_factory=free_port)
    agents: dict[str, Agent] = field(default_factory=dict)
    maps: dict[str, MemoryDatapath] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    operator: Process | None = None

    def install(self, *values: str) -> None:
        """The chart, as a user would; the operator then runs here, with the settings of its Deployment, and with no
        more rights than its ServiceAccount has."""
        sets = [f"fullnameOverride={self.prefix}", "crds.enabled=false", f"loadBalancers.port={self.agent_port}"]
        flags = [flag for one in (*sets, *values) for flag in ("--set", one)]
        chart = str(ROOT / "charts/holdfast")
        self.api.helm("upgrade", "--install", self.prefix, chart, "--namespace", self.system, *flags)
        deployment = self.api.call("GET", f"/apis/apps/v1/namespaces/{self.system}/deployments/{self.prefix}-operator")
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        self.settings = {one["name"]: one.get("value", "") for one in container["env"] if "valueFrom" not in one}
        account = f"{self.prefix}-operator"
        self.api.pki.sign(account, f"system:serviceaccount:{self.system}:{account}", "")
        self.kubeconfig = self.api.write_kubeconfig(account)

    def uninstall(self) -> None:
        """As a user would, but that no kubelet is here to run what the chart runs before."""
        self.api.helm("uninstall", self.prefix, "--namespace", self.system, "--no-hooks")

    # --- Objects ------------------------------------------------------------------------------------------------------
    async def call(self, method: str, path: str, body: Any = None) -> Json:
        return await asyncio.to_thread(self.api.call, method, path, body)

    async def put(self, path: str, body: Body) -> None:
        """Creates the object, or replaces it."""
        name, replaced = body["metadata"]["name"], None
        for last in (False, False, False, True):
            try:
                if replaced is None:
                    await self.call("POST", path, body)
                else:
                    await self.call("PUT", f"{path}/{name}", replaced)
                return
            except ApiError as error:
                if error.status != 409 or last:
                    raise
            # It is there, or the operator has just written its status.
            version = (await self.call("GET", f"{path}/{name}"))["metadata"]["resourceVersion"]
            replaced = {**body, "metadata": {**body["metadata"], "resourceVersion": version}}

    async def delete(self, path: str) -> None:
        await self.call("DELETE", path)

    @property
    def system(self) -> str:
        """The operator's namespace."""
        return f"{self.prefix}-system"

    def node_name(self, number: int) -> str:
        return f"{self.prefix}-n{number}"

    def node_address(self, number: int) -> str:
        return f"127.0.{self.octet}.{number}"

    @property
    def octet(self) -> int:
        return 10 + int(self.prefix.rpartition("-")[2])

    async def add_nodes(self, count: int) -> None:
        for number in range(1, count + 1):
            await self.put("/api/v1/nodes", {"metadata": {"name": self.node_name(number)}})
            addresses = [{"type": "InternalIP", "address": self.node_address(number)}]
            path = f"/api/v1/nodes/{self.node_name(number)}/status"
            await asyncio.to_thread(self.api.merge, path, {"status": {"addresses": addresses}})

    async def list_agents(self, *numbers: int) -> None:
        """The slice that the DaemonSet's Service would have."""
        endpoints = [endpoint(f"10.0.0.{number}", self.node_name(number), ready=False) for number in numbers]
        await self.put_slice(*endpoints, name="lb-1", namespace=self.system, service=f"{self.prefix}-lb")

    async def put_slice(self, *endpoints: Body, **options: Any) -> None:
        """An EndpointSlice, nobody's, in the shop unless told otherwise."""
        body = endpoint_slice(*endpoints, owner="", **{"namespace": self.shop, **options})
        for name in ("uid", "ownerReferences"):
            body["metadata"].pop(name, None)
        await self.put(f"/apis/discovery.k8s.io/v1/namespaces/{body['metadata']['namespace']}/endpointslices", body)

    async def put_service(self, name: str = "web") -> None:
        body = service(name, namespace=self.shop)
        body["metadata"].pop("uid")
        await self.put(f"/api/v1/namespaces/{self.shop}/services", body)

    async def put_virtual_service(self, name: str = "web", address: str = "203.0.113.10", **spec: Any) -> None:
        wanted = {
            "address": address,
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
            "backendRef": {"name": "web"},
        }
        body = {
            "apiVersion": "holdfast.dev/v1alpha1",
            "kind": "VirtualService",
            "metadata": {"name": name},
            "spec": {**wanted, **spec},
        }
        await self.put(VIRTUAL_SERVICES.format(self.shop), body)

    async def web(self, *backends: int, on: Sequence[int] = (1, 2), **options: Any) -> None:
        """The slice of the Service `web` with these backends, spread over these nodes."""
        endpoints = [
            endpoint(f"10.1.{one >> 8}.{one & 255}", self.node_name(on[place % len(on)]), ready=True)
            for place, one in enumerate(backends)
        ]
        await self.put_slice(*endpoints, **options)

    async def status(self, name: str = "web") -> Json:
        found = await self.call("GET", f"{VIRTUAL_SERVICES.format(self.shop)}/{name}")
        return dict(found.get("status") or {})

    async def conditions(self, name: str = "web") -> dict[str, tuple[str, str]]:
        return conditions_of(await self.status(name))

    async def until_condition(self, kind: str, value: str, reason: str, name: str = "web") -> None:
        async def said() -> bool:
            return (await self.conditions(name)).get(kind) == (value, reason)

        try:
            await until("", said)
        except AssertionError:
            log = self.operator.log.read_text() if self.operator is not None else ""
            raise AssertionError(
                f"{kind} is not {value}/{reason} but {await self.conditions(name)}\n{log[-4000:]}"
            ) from None

    async def events(self, name: str = "web") -> list[tuple[str, str]]:
        found = await self.call("GET", f"/api/v1/namespaces/{self.shop}/events")
        mine = [one for one in found["items"] if one["involvedObject"]["name"] == name]
        return [
            (one["type"], one["reason"]) for one in sorted(mine, key=lambda one: one["metadata"]["creationTimestamp"])
        ]

    # --- Processes ----------------------------------------------------------------------------------------------------
    def make_operator(self, name: str = "operator", port: int = 0) -> Process:
        """An operator that has not been started yet. name: of its log and its folder."""
        environment = {
            **os.environ,
            **self.settings,
            "KUBECONFIG": str(self.kubeconfig),
            "HOLDFAST_NAMESPACE": self.system,
            "HOLDFAST_TLS": str(self.folder / f"{name}-tls"),
            "HOLDFAST_LISTEN": f"127.0.0.1:{port or self.http_port}",
        }
        argv = ["env", *(f"{key}={value}" for key, value in environment.items()), sys.executable, "-m", "lboperator"]
        return Process(argv, self.folder / f"{name}.log")

    def start_operator(self) -> None:
        """The one that most tests know."""
        self.operator = self.make_operator()
        self.operator.start()

    async def stop_operator(self, number: int = signal.SIGTERM) -> None:
        """Ends it, while the agents, which live in this very loop, go on."""
        assert self.operator is not None, "it was started"
        await asyncio.to_thread(self.operator.stop, number)

    @asynccontextmanager
    async def agent(self, number: int) -> AsyncIterator[Agent]:
        """The agent of this node, with the certificate that the operator has made for it."""
        name = self.node_name(number)
        await self.lay_out_certificates()
        self.maps[name] = MemoryDatapath()
        parts = make_parts(name, self.folder, self.maps[name], address=parse_address(self.node_address(number)))
        parts = replace(parts, listen=Endpoint(self.node_address(number), self.agent_port))
        async with running(parts) as agent:
            self.agents[name] = agent
            yield agent

    async def secret(self, name: str) -> Mapping[str, bytes]:
        async def found() -> Json | None:
            try:
                return await self.call("GET", f"/api/v1/namespaces/{self.system}/secrets/{name}")
            except ApiError:
                return None

        body = await until(f"the Secret {name}", found)
        return {file: base64.b64decode(data) for file, data in body["data"].items()}

    async def lay_out_certificates(self) -> None:
        """What kubelet would mount, and for our own calls the viewer's."""
        folder = self.folder / "tls"
        folder.mkdir(exist_ok=True)
        files = {**await self.secret("holdfast-lb-tls"), **await self.secret("holdfast-ca")}
        for name, data in files.items():
            (folder / name).write_bytes(data)

    async def states(self) -> dict[str, LbStatus]:
        """What the agents say, by node."""
        found = {}
        async with Caller(self.folder, "viewer") as viewer:
            for name, agent in sorted(self.agents.items()):
                number = int(name.rpartition("-n")[2])
                found[name] = await viewer.state(agent, host=self.node_address(number))
        return found

    def backends(self, name: str, vip: int = 1) -> list[int]:
        """Ids of the backends in the slots of a VIP, and how many slots each has."""
        slots = self.maps[name].read_slots(vip) & np.uint64(SLOT_CURRENT_MASK)
        return sorted(np.unique(slots).tolist())

    def slots(self, name: str, vip: int = 1) -> bytes:
        """The backend of each slot of a VIP. (Whether a slot tracks is the agents' business: one that is starved of CPU
        fences itself, and all its slots track.)"""
        return (self.maps[name].read_slots(vip) & np.uint64(SLOT_CURRENT_MASK)).tobytes()

    async def http(self, path: str) -> tuple[int, str]:
        """The operator's own server; status 0: nobody answers."""
        try:
            url = f"http://127.0.0.1:{self.http_port}{path}"
            async with aiohttp.ClientSession() as session, session.get(url) as response:
                return response.status, await response.text()
        except aiohttp.ClientError:
            return 0, ""
