"""The lab: clients, an ECMP router, nodes, pods; made in one go, removed without a trace.

::

    client1 10.76.1.2 ──1500── router ──1600── node1 10.77.1.2 ──1500── pod 10.78.1.1
    client2 10.76.2.2 ────────   │  └─────────  node2 10.77.2.2 ──────── pod 10.78.2.1, 10.78.2.2
                               (ECMP)           ...

Every link is a routed veth pair of its own; the router is the ``.1`` of each. Both ends lie in namespaces, so nothing
of a lab shows in the machine's own network. This file decides who is joined to whom and with which routes; how a host
is made is in ``host``, how a run is removed in ``registry``.

Traps that shaped it (README.md has the list): the router carries a native XDP program on every node link, because a
veth delivers XDP_TX frames only to a peer that has one; no end of any link offloads checksums or segmentation, because
native XDP would see half-finished packets. A link is cut at the node's end, so that the router loses the carrier, as
with a pulled cable, and keeps its routes.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from lbpod.lab import kernel, registry
from lbpod.lab.ecmp import NextHop, best_shuffle
from lbpod.lab.errors import LabError
from lbpod.lab.host import FORWARDER_SWITCHES, Host, Run, index_of, join
from lbpod.lab.limits import (
    CLIENT_MTU,
    CLIENTS_MAX,
    NODES_MAX,
    PODS_PER_NODE_MAX,
    STOP_WAIT_NS,
    UNDERLAY_MTU,
    XDP_VETH_MTU_MAX,
)
from lbpod.lab.signals import ExitOnSignal, deferred
from lbpod.lab.worker import Worker

_POD_GATEWAY: Final = "169.254.1.1"
"""Next hop of every pod: the node's end of its link, whichever that is."""

_PARTED_PRIORITY: Final = 90
"""Of the router's rules that lose what one node sends to another: before all that route."""

ROUTER_SWITCHES: Final[Mapping[str, int | str]] = {
    **FORWARDER_SWITCHES,
    "ipv4/fib_multipath_hash_policy": 1,  # by five-tuple
    "ipv4/fib_multipath_hash_seed": 1,  # where the kernel has it (6.11): the same flow takes the same path in every run
    "ipv4/conf/all/ignore_routes_with_linkdown": 1,
}
CLIENT_SWITCHES: Final[Mapping[str, int | str]] = {"ipv4/ip_local_port_range": "10000 65000"}


class Client(Host):
    """A host outside, on ``eth0`` with MTU 1500."""

    def __init__(self, run: Run, number: int) -> None:
        super().__init__(run, f"client{number}")
        self.number = number
        self.address = f"10.76.{number}.2"
        self.gateway = f"10.76.{number}.1"
        self.router_interface = self.name


class Node(Host):
    """A cluster node: ``eth0`` towards the router, one interface for each pod."""

    def __init__(self, run: Run, number: int) -> None:
        super().__init__(run, f"node{number}")
        self.number: int = number
        self.address = f"10.77.{number}.2"
        self.gateway = f"10.77.{number}.1"
        self.pod_network = f"10.78.{number}.0/24"
        self.router_interface = self.name
        self.pods: dict[int, Pod] = {}  # last byte of the address -> pod; len <= PODS_PER_NODE_MAX
        self.last_pod_number: int = 0
        self._blackholes: set[str] = set()

    def blackhole(self, prefix: str) -> None:
        """Drop what the node's stack would otherwise send back to the router. Worker only."""
        if prefix not in self._blackholes:
            with self.netlink() as ip:
                ip.route("replace", dst=prefix, type="blackhole")
            self._blackholes.add(prefix)

    def free_pod_number(self) -> int:
        """Numbers go up until they run out, so that an address is not given to the next pod at once."""
        order: list[int] = [
            *range(self.last_pod_number + 1, PODS_PER_NODE_MAX + 1),
            *range(1, self.last_pod_number + 1),
        ]
        for number in order:
            if number not in self.pods:
                return number
        raise LabError(f"{self.name} has {PODS_PER_NODE_MAX} pods already; remove some")


class Pod(Host):
    """A pod behind a node: ``eth0`` with a /32 address, everything goes to the node."""

    def __init__(self, run: Run, node: Node, number: int) -> None:
        super().__init__(run, f"pod{node.number}-{number}")
        self.node = node
        self.number: int = number
        self.address = f"10.78.{node.number}.{number}"
        self.node_interface = f"pod{number}"


class Router(Host):
    """Forwards between all links and spreads VIP traffic over nodes by ECMP."""

    def __init__(self, run: Run) -> None:
        super().__init__(run, "router")
        self.ecmp: dict[str, tuple[NextHop[Node], ...]] = {}  # prefix -> what the kernel has now

    def set_ecmp(self, prefix: str, hops: Sequence[Node | tuple[Node, int]]) -> None:
        """Route ``prefix`` over these nodes, in this order, weight 1 where none is given. Atomic: no packet is lost.

        The nodes themselves get a blackhole for it: what no load balancer takes ends there, instead of travelling
        between node and router until its TTL does.
        """
        wanted = tuple(NextHop(*hop) if isinstance(hop, tuple) else NextHop(hop, 1) for hop in hops)
        if not wanted:
            raise ValueError(f"no next hop for {prefix}; use clear_ecmp to take the route away")

        def job() -> None:
            with self.netlink() as ip:
                paths = [
                    {
                        "gateway": hop.node.address,
                        "oif": index_of(ip, hop.node.router_interface),
                        "hops": hop.weight - 1,
                    }
                    for hop in wanted
                ]
                ip.route("replace", dst=prefix, multipath=paths)
            self.ecmp[prefix] = wanted
            for hop in wanted:
                hop.node.blackhole(prefix)

        self.run_context.worker.call(job)

    def believe_dead_links(self) -> None:
        """From now on a path stays until ``set_ecmp`` takes it out, whatever its carrier says.

        As behind a switch, where a router learns of a dead neighbour from BFD or BGP, some time later. Until then it
        has the neighbour's link address and tells nobody that a packet was lost: no "host unreachable" here, either.
        """
        self.set_switches({"ipv4/conf/all/ignore_routes_with_linkdown": 0})

        def job() -> None:
            with self.netlink() as ip:
                ip.rule("add", iifname="lo", ip_proto=socket.IPPROTO_ICMP, action="FR_ACT_BLACKHOLE", priority=100)

        self.run_context.worker.call(job)

    def clear_ecmp(self, prefix: str) -> None:
        """Take the route away; packets to it draw "network unreachable"."""

        def job() -> None:
            if self.ecmp.pop(prefix, None) is not None:
                with self.netlink() as ip:
                    ip.route("del", dst=prefix)
                # The nodes keep their blackhole: an LB may still be taking packets that are on their way.

        self.run_context.worker.call(job)

    def reshuffle(self, prefix: str, rng: random.Random, *, weight_max: int | None = None) -> float:
        """Permute the next hops of ``prefix`` so that many established flows arrive at other nodes.

        With ``weight_max`` the weights are drawn anew, too (1 ... ``weight_max``); else each node keeps its own.
        Returns the share of the hash space that moved, as the kernel's rule says (0 with one next hop).
        """
        before = self.ecmp[prefix]
        after, moved = best_shuffle(before, rng, weight_max)
        self.set_ecmp(prefix, [(hop.node, hop.weight) for hop in after])
        return moved

    def next_hop(self, client: Client, source_port: int, target: str, target_port: int, protocol: int) -> Node | None:
        """Which node a flow of ``client`` goes to now, asked of the kernel; ``None`` where it goes to no node."""

        wanted = f"{target} from {client.address} iif {client.router_interface} sport {source_port} dport {target_port}"
        # By `ip`: pyroute2 0.9 does not know RTA_SPORT and RTA_DPORT and leaves them out without a word.
        answer = self.run(["ip", "-json", "route", "get", *wanted.split(), "ipproto", str(protocol)])
        gateway = json.loads(answer.stdout)[0].get("gateway")
        known = {hop.node.address: hop.node for hops in self.ecmp.values() for hop in hops}
        return known.get(gateway)


@dataclass(frozen=True)
class LabOptions:
    clients: int = 1
    nodes: int = 3
    underlay_mtu: int = UNDERLAY_MTU
    client_mtu: int = CLIENT_MTU
    log_dir: Path | None = None
    """Where logs go and stay; ``None``: into the run folder, removed with it."""

    def __post_init__(self) -> None:
        if not 1 <= self.clients <= CLIENTS_MAX or not 0 <= self.nodes <= NODES_MAX:
            raise ValueError(f"a lab has 1 to {CLIENTS_MAX} clients and 0 to {NODES_MAX} nodes")
        if not 576 <= self.client_mtu <= self.underlay_mtu <= XDP_VETH_MTU_MAX:
            raise ValueError(f"576 <= client_mtu <= underlay_mtu <= {XDP_VETH_MTU_MAX} (native XDP on veth) must hold")


class Lab:
    """A context manager: hosts exist inside the ``with`` block. All methods may be called from any thread."""

    run: Run
    router: Router

    def __init__(
        self,
        *,
        clients: int = 1,
        nodes: int = 3,
        underlay_mtu: int = UNDERLAY_MTU,
        client_mtu: int = CLIENT_MTU,
        log_dir: Path | None = None,
    ) -> None:
        self.options = LabOptions(clients, nodes, underlay_mtu, client_mtu, log_dir)
        self.clients: list[Client] = []
        self.nodes: list[Node] = []
        self.prefix = ""
        """Set while the lab exists; every name outside of namespaces starts with it."""
        self._worker = Worker("new")
        self._signals = ExitOnSignal()
        self._pass_fd = -1
        self._drop_fd = -1
        self._last_node_number = 0

    # ------------------------------------------------------------------------------------------- coming and going

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise LabError("the lab makes network namespaces and loads BPF programs; run it as root")
        assert not self.prefix, "a lab is entered once at a time"
        atexit.register(self.close)
        self._signals.install()
        self._worker = Worker("build")
        self._worker.start()
        try:
            self._worker.call(self._build)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _build(self) -> None:
        """In the worker as one job: an interrupt in the main thread finds either nothing or all of it registered."""
        kernel.bpffs_mount()
        self.prefix = registry.register()
        log_dir = self.options.log_dir or registry.run_dir(self.prefix) / "log"
        log_dir.mkdir(parents=True, exist_ok=True)
        registry.run_dir(self.prefix).mkdir(parents=True, exist_ok=True)
        self.run = Run(self.prefix, self._worker, log_dir)
        self._pass_fd = kernel.xdp_return_load(kernel.XDP_PASS, f"{self.prefix}_pass")
        self._drop_fd = kernel.xdp_return_load(kernel.XDP_DROP, f"{self.prefix}_drop")
        self.router = Router(self.run)
        self.router.create(ROUTER_SWITCHES)
        for _ in range(self.options.clients):
            self._add_client()
        for _ in range(self.options.nodes):
            self._add_node()

    def close(self) -> None:
        """End all programs and remove everything. Harmless when repeated. A signal waits until it is done."""
        with deferred():
            try:
                if self.prefix:
                    self._stop_programs()
                    self._worker.call(self._remove)
            finally:
                self._worker.stop()
                self._signals.remove()
                atexit.unregister(self.close)

    def _stop_programs(self) -> None:
        programs = [one for one in self.run.programs if one.alive] if hasattr(self, "run") else []
        deadline_ns = time.monotonic_ns() + STOP_WAIT_NS
        for program in programs:
            program.signal(15)
        for program in programs:
            program.finish(deadline_ns)

    def _remove(self) -> None:
        hosts: list[Host] = [*self.clients, *self.nodes, *(pod for node in self.nodes for pod in node.pods.values())]
        for host in [*hosts, self.router] if hasattr(self, "router") else hosts:
            host.close()
        for fd in (self._pass_fd, self._drop_fd):
            if fd >= 0:
                os.close(fd)
        self._pass_fd = self._drop_fd = -1
        registry.unregister(self.prefix)
        self.clients.clear()
        self.nodes.clear()
        self.prefix = ""

    # ------------------------------------------------------------------------------------------------- the pieces

    @property
    def client(self) -> Client:
        """The first client."""
        return self.clients[0]

    @property
    def run_dir(self) -> Path:
        """Folder for generated files; removed at the end."""
        return registry.run_dir(self.prefix)

    @property
    def log_dir(self) -> Path:
        return self.run.log_dir

    def pin_dir(self, node: Node) -> Path:
        """Folder of this node in bpffs (made here if need be); removed at the end. All nodes share one kernel."""
        path = registry.pin_root(self.prefix) / node.name
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    def pods(self) -> list[Pod]:
        return [node.pods[number] for node in self.nodes for number in sorted(node.pods)]

    def add_node(self) -> Node:
        """One more node, joined to the router."""
        return self._worker.call(self._add_node)

    def remove_node(self, node: Node) -> None:
        """As when a machine burns: cable and processes go at once, its pods, its pins and its namespace after them.

        Take it out of every ECMP route before: the kernel drops its paths with the link, the lab's own list keeps them.
        """
        self._worker.call(lambda: self._discard_node(node))

    def add_pod(self, node: Node, number: int | None = None) -> Pod:
        """A pod behind ``node`` at 10.78.<node>.<number>; by default the next number not used yet."""
        if number is not None and not 1 <= number <= PODS_PER_NODE_MAX:
            raise ValueError(f"pod number {number} is not in 1 ... {PODS_PER_NODE_MAX}")
        if number is not None and number in node.pods:
            raise ValueError(f"{node.name} has a pod {number} already")
        return self._worker.call(lambda: self._add_pod(node, number))

    def remove_pod(self, pod: Pod, *, silent: bool = False, stop_wait_ns: int = STOP_WAIT_NS) -> None:
        """End the pod's programs (SIGTERM, wait, SIGKILL), then take it away with link and route.

        ``silent``: the link goes first and the programs are killed, so neither FIN nor RST reaches anybody, as when
        a machine loses power.
        """
        if silent:
            self._worker.call(lambda: self._unlink_pod(pod))
        deadline_ns = time.monotonic_ns() + (0 if silent else stop_wait_ns)
        programs = pod.programs()
        for program in programs:
            program.signal(9 if silent else 15)
        for program in programs:
            program.finish(deadline_ns)
        self._worker.call(lambda: self._discard_pod(pod))

    def cut(self, node: Node) -> None:
        """Pull the node's cable: no carrier at the router, whose ECMP then leaves the node out."""

        def job() -> None:
            with node.netlink() as ip:
                ip.link("set", index=index_of(ip, "eth0"), state="down")

        self._worker.call(job)

    def heal(self, node: Node) -> None:
        """Plug the cable in again; the node gets its default route back (the kernel dropped it)."""

        def job() -> None:
            with node.netlink() as ip:
                ip.link("set", index=index_of(ip, "eth0"), state="up")
                ip.route("replace", dst="0.0.0.0/0", gateway=node.gateway)

        self._worker.call(job)

    def sever(self, node: Node) -> None:
        """Lose every packet from and to the node while all links stay up, as a broken switch in between does.

        Nobody is told: neither end sees its carrier go. From the node: dropped by XDP at the router. To the node: the
        router forgets its link address, and what could bring it back is dropped.
        """

        def job() -> None:
            self.router.attach_xdp(node.router_interface, self._drop_fd)
            with self.router.netlink() as ip:
                index = index_of(ip, node.router_interface)
                for _ in ip.get_neighbours(dst=node.address, ifindex=index):
                    ip.neigh("del", dst=node.address, ifindex=index)

        self._worker.call(job)

    def mend(self, node: Node) -> None:
        """The end of ``sever``."""
        self._worker.call(lambda: self.router.attach_xdp(node.router_interface, self._pass_fd))

    def part(self, sender: Node, receiver: Node) -> None:
        """Lose every packet from one node to another at the router; nobody is told, and the other way stays open.

        What others send to either comes through. Parting two nodes that are parted already is an error of the kernel's.
        """
        self._worker.call(lambda: self._rule_of_parted("add", sender, receiver))

    def rejoin(self, sender: Node, receiver: Node) -> None:
        """The end of ``part``, also where one of the two has been removed meanwhile."""
        self._worker.call(lambda: self._rule_of_parted("del", sender, receiver))

    # ---------------------------------------------------------------------------------- in the worker thread only

    def _rule_of_parted(self, command: str, sender: Node, receiver: Node) -> None:
        with self.router.netlink() as ip:
            ip.rule(
                command,
                iifname=sender.router_interface,
                dst=f"{receiver.address}/32",
                action="FR_ACT_BLACKHOLE",
                priority=_PARTED_PRIORITY,
            )

    def _add_client(self) -> Client:
        client = Client(self.run, len(self.clients) + 1)
        self.clients.append(client)
        client.create(CLIENT_SWITCHES)
        self._join_router(client, mtu=self.options.client_mtu, gro=False)
        return client

    def _add_node(self) -> Node:
        node = Node(self.run, self._free_node_number())
        self._last_node_number = node.number
        self.nodes.append(node)
        node.create(FORWARDER_SWITCHES)
        self._join_router(node, mtu=self.options.underlay_mtu, gro=True)
        self.router.attach_xdp(node.router_interface, self._pass_fd)
        with self.router.netlink() as ip:
            ip.route("add", dst=node.pod_network, gateway=node.address)
        node.blackhole(node.pod_network)  # pods that are gone; those that are there have routes of their own
        return node

    def _free_node_number(self) -> int:
        """Numbers go up until they run out, so that a name and an address are not given to the next node at once."""
        used = {node.number for node in self.nodes}
        last = self._last_node_number
        order: list[int] = [*range(last + 1, NODES_MAX + 1), *range(1, last + 1)]
        for number in order:
            if number not in used:
                return number
        raise LabError(f"the lab has {NODES_MAX} nodes already; remove some")

    def _discard_node(self, node: Node) -> None:
        if node not in self.nodes:
            return
        with self.router.netlink() as ip:
            for index in ip.link_lookup(ifname=node.router_interface):
                ip.link("del", index=index)
        pods = [node.pods[number] for number in sorted(node.pods)]
        registry.kill_inside({os.fstat(host.netns_fd).st_ino for host in (node, *pods)})
        for pod in pods:
            pod.discard()
        node.pods.clear()
        node.discard()
        shutil.rmtree(registry.pin_root(self.prefix) / node.name, ignore_errors=True)
        self.nodes.remove(node)

    def _join_router(self, host: Client | Node, *, mtu: int, gro: bool) -> None:
        join(self.router, host.router_interface, host, "eth0", mtu=mtu, gro=(gro, False))
        with self.router.netlink() as ip:
            ip.addr("add", index=index_of(ip, host.router_interface), address=host.gateway, prefixlen=24)
        with host.netlink() as ip:
            ip.addr("add", index=index_of(ip, "eth0"), address=host.address, prefixlen=24)
            ip.route("add", dst="0.0.0.0/0", gateway=host.gateway)

    def _add_pod(self, node: Node, number: int | None) -> Pod:
        pod = Pod(self.run, node, node.free_pod_number() if number is None else number)
        node.pods[pod.number] = pod
        node.last_pod_number = pod.number
        pod.create({})
        join(node, pod.node_interface, pod, "eth0", mtu=self.options.client_mtu, gro=(False, False))
        with pod.netlink() as ip:
            index = index_of(ip, "eth0")
            ip.addr("add", index=index, address=pod.address, prefixlen=32)
            ip.route("add", dst=f"{_POD_GATEWAY}/32", oif=index, scope="link")
            ip.route("add", dst="0.0.0.0/0", gateway=_POD_GATEWAY, oif=index)
        with node.netlink() as ip:
            index = index_of(ip, pod.node_interface)
            ip.addr("add", index=index, address=_POD_GATEWAY, prefixlen=32)
            ip.route("add", dst=f"{pod.address}/32", oif=index, scope="link", prefsrc=node.address)
        return pod

    def _unlink_pod(self, pod: Pod) -> None:
        with pod.node.netlink() as ip:
            for index in ip.link_lookup(ifname=pod.node_interface):
                ip.link("del", index=index)

    def _discard_pod(self, pod: Pod) -> None:
        if pod.node.pods.get(pod.number) is not pod:
            return
        registry.kill_inside({os.fstat(pod.netns_fd).st_ino})
        self._unlink_pod(pod)
        pod.discard()
        del pod.node.pods[pod.number]
