"""What is wanted of the cluster, as Kubernetes or somebody's file would have it: VIPs, pods and LBs that come and go.

One change at a time, each of a kind that is drawn; the controller sees the whole of it. Nothing here knows what the
cluster has made of it so far.
"""

from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Final

from lbpod.core.model import (
    BackendState,
    World,
    WorldBackend,
    WorldNode,
    WorldVip,
    format_address,
    parse_address,
)
from lbpod.simulator.odds import Odds, VipOdds
from lbpod.simulator.transcript import Transcript

VIP_ADDRESS: Final = parse_address("203.0.113.10")
POD_PORT: Final = 8_080
FIRST_PORT: Final = 80


class Listed(Enum):
    """What the World says of a node that can be an LB."""

    LB = "to be an LB"
    HOST = "to be no LB"
    NOT = "not wanted"


@dataclass(slots=True, eq=False)
class Pod:
    """One pod. Two pods may have had one address, one after the other."""

    name: str
    address: bytes
    node: str
    weight: int = 1
    state: BackendState | None = BackendState.READY
    """None: it is gone."""
    connections: set[tuple[bytes, int]] = field(default_factory=set)
    """TCP connections (client and port) whose SYN it has seen."""


@dataclass(slots=True, eq=False)
class Service:
    """A VIP that is wanted, with its pods."""

    name: str
    port: int
    odds: VipOdds
    idle_ns: int
    pods: list[Pod] = field(default_factory=list)
    """READY or DRAINING."""

    def ready(self) -> list[Pod]:
        """Those that new flows may go to."""
        return [pod for pod in self.pods if pod.state is BackendState.READY]


class Wishes:
    """What is wanted now."""

    def __init__(self, odds: Odds, dice: Random, transcript: Transcript) -> None:
        self._odds, self._dice, self._transcript = odds, dice, transcript
        self.addresses: dict[str, bytes] = {}
        """Of all machines there are, wanted or not."""
        self.lbs = [f"lb{number}" for number in range(1, odds.lbs + odds.spares + 1)]
        self.hosts = [f"host{number}" for number in range(1, odds.hosts + 1)]
        for kind, names in enumerate((self.lbs, self.hosts), start=1):
            for number, name in enumerate(names, start=1):
                self.addresses[name] = parse_address(f"10.0.{kind}.{number}")
        self.listed = {name: Listed.LB if place < odds.lbs else Listed.NOT for place, name in enumerate(self.lbs)}
        """What the World says of each LB node."""
        self.changes = 0
        self._pods_count = 0
        self._free_addresses: list[bytes] = []
        self.services: list[Service] = []
        for place, vip in enumerate(odds.vips):
            name = f"shop/{vip.protocol.name.lower()}/{FIRST_PORT + place}"
            self.services.append(Service(name, FIRST_PORT + place, vip, vip.idle_ns))
            for _ in range(dice.randint(1, 4)):
                self._add_pod(self.services[-1])

    # --- The World ----------------------------------------------------------------------------------------------------
    def world(self) -> World:
        """All of it, as the controller sees it."""
        listed = [*((name, how) for name, how in self.listed.items()), *((name, Listed.HOST) for name in self.hosts)]
        nodes = tuple(
            WorldNode(name, self.addresses[name], f"{name}:9900", how is Listed.LB)
            for name, how in listed
            if how is not Listed.NOT
        )
        return World(nodes, tuple(self._vip(service) for service in self.services))

    def _vip(self, service: Service) -> WorldVip:
        backends = tuple(
            WorldBackend(pod.address, POD_PORT, pod.node, pod.weight, pod.state)
            for pod in service.pods
            if pod.state is not None
        )
        odds = service.odds
        return WorldVip(
            service.name,
            VIP_ADDRESS,
            service.port,
            odds.protocol,
            odds.affinity,
            service.idle_ns,
            odds.drain_ns,
            backends,
        )

    # --- One change ---------------------------------------------------------------------------------------------------
    def change(self) -> None:
        """Something else is wanted."""
        self.changes += 1
        if self._dice.random() < self._odds.ring_share and self._change_ring():
            return
        service = self._dice.choice(self.services)
        kinds = (self._come, self._come, self._drain, self._drain, self._go, self._back, self._roll, self._weigh)
        while not self._dice.choice(kinds)(service):
            pass

    def _change_ring(self) -> bool:
        """A node is to be an LB, or is not to be one any more."""
        name = self._dice.choice(self.lbs)
        if self.listed[name] is Listed.LB:
            if sum(how is Listed.LB for how in self.listed.values()) < 2:
                return False
            how = self._dice.choice((Listed.HOST, Listed.NOT))
            if how is Listed.NOT:
                self.lose_pods(name)
        else:
            how = Listed.LB
        self.listed[name] = how
        lbs = ", ".join(name for name, how in self.listed.items() if how is Listed.LB)
        self._transcript.say("wishes", f"{name} is {how.value} (LBs: {lbs})")
        return True

    def lose_pods(self, node: str) -> None:
        """A node is gone, and with it its pods."""
        for service in self.services:
            for pod in [pod for pod in service.pods if pod.node == node]:
                self.remove(service, pod)

    def _come(self, service: Service) -> bool:
        if len(service.pods) >= self._odds.pods_max:
            return False
        self._say(service, f"{self._add_pod(service).name} comes")
        return True

    def _add_pod(self, service: Service) -> Pod:
        self._pods_count += 1
        address = parse_address(f"10.244.{self._pods_count >> 8}.{self._pods_count & 0xFF}")
        if self._free_addresses and self._dice.random() < 0.3:
            address = self._free_addresses.pop(self._dice.randrange(len(self._free_addresses)))
        listed = [name for name, how in self.listed.items() if how is not Listed.NOT]
        node = self._dice.choice(listed if listed and self._dice.random() < self._odds.pods_on_lbs else self.hosts)
        pod = Pod(f"pod{self._pods_count}", address, node, self._dice.choice((1, 1, 1, 5)))
        service.pods.append(pod)
        return pod

    def _drain(self, service: Service) -> bool:
        ready = service.ready()
        if len(ready) < 2:
            return False
        pod = self._dice.choice(ready)
        pod.state = BackendState.DRAINING
        self._say(service, f"{pod.name} drains")
        return True

    def _go(self, service: Service) -> bool:
        """Without draining, or after it."""
        if len(service.pods) < 2 and self._dice.random() < 0.9:
            return False
        if not service.pods:
            return False
        self.remove(service, self._dice.choice(service.pods))
        return True

    def remove(self, service: Service, pod: Pod) -> None:
        """A pod is gone, and with it its flows."""
        service.pods.remove(pod)
        pod.state = None
        self._free_addresses.append(pod.address)
        self._say(service, f"{pod.name} is gone")

    def _back(self, service: Service) -> bool:
        """Draining is taken back."""
        draining = [pod for pod in service.pods if pod.state is BackendState.DRAINING]
        if not draining:
            return False
        pod = self._dice.choice(draining)
        pod.state = BackendState.READY
        self._say(service, f"{pod.name} is wanted again")
        return True

    def _roll(self, service: Service) -> bool:
        """One comes, one drains."""
        return self._come(service) and self._drain(service)

    def _weigh(self, service: Service) -> bool:
        if not service.pods:
            return False
        pod = self._dice.choice(service.pods)
        pod.weight = self._dice.choice([weight for weight in (1, 2, 5) if weight != pod.weight])
        self._say(service, f"{pod.name} weighs {pod.weight}")
        return True

    def _say(self, service: Service, what: str) -> None:
        self._transcript.say("wishes", f"{service.name}: {what} ({_pods(service)})")


def _pods(service: Service) -> str:
    marks = {BackendState.READY: "", BackendState.DRAINING: " draining"}
    return ", ".join(f"{pod.name}{marks[pod.state]}" for pod in service.pods if pod.state is not None) or "none left"


def described(pod: Pod) -> str:
    """For a transcript."""
    return f"{pod.name} ({format_address(pod.address)} on {pod.node})"
