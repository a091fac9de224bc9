"""What a script does to a simulated cluster, whichever way it balances: for people who cannot see the real one.

A run of the simulator is drawn from a seed, and everything goes wrong in it. Here nothing does, but for what the script
says: backends come, drain and go, the router reshuffles its paths, one LB is gone and another joins. ``Stage`` is what
the three ways of balancing have in common: what is wanted, the clients and their router; ``OurStage`` plays it to the
real Planner and Keepers, ``baselines`` to what is common today. Same seed, same pods, same clients, same reshuffles.

Left to others: what happens when (``lbpod.lab.demo``), and what it looks like.
"""

from abc import ABC, abstractmethod
from random import Random
from typing import Final, TypeVar

from lbpod.core.limits import DUMP_CHUNK, PEER_TIMEOUT_NS
from lbpod.core.model import Affinity, BackendState, Protocol
from lbpod.core.verdicts import Verdict
from lbpod.simulator.audience import Audience
from lbpod.simulator.cluster import Cluster
from lbpod.simulator.machine import Machine
from lbpod.simulator.network import Answer, Call
from lbpod.simulator.odds import Odds, VipOdds
from lbpod.simulator.timeline import MS_NS, SECOND_NS, Timeline
from lbpod.simulator.wishes import Listed, Pod, Service, Wishes

_T = TypeVar("_T")

LBS: Final = 3
SPARES: Final = 1
"""LBs that are yet to come."""
HOSTS: Final = 4
IDLE_NS: Final = 8 * SECOND_NS
START_NS_MAX: Final = 30 * SECOND_NS

CALM: Final = Odds(
    lbs=LBS,
    spares=SPARES,
    hosts=HOSTS,
    pods_on_lbs=0,
    vips=(VipOdds(Protocol.TCP, Affinity.NONE, IDLE_NS, 3_600 * SECOND_NS),),
    pods_max=1_000,
    change_pause_ns=SECOND_NS,
    burst_max=1,
    rest_chance=0,
    ring_share=0,
    flows_max=0,
    spray_chance=0,
    silent_chance=0,
    quick_chance=0,
    close_chance=0,
    call_delay_ns=20 * MS_NS,
    call_loss=0,
    call_reset=0,
    call_repeat=0,
    packet_loss=0,
    packet_repeat=0,
    packet_late=0.01,
    packet_life_ns=50 * MS_NS,
    drift_ppm=50,
    write_faults=0,
    read_faults=0,
    disk_faults=0,
    records_max=65_536,
    cache_max=65_536,
    pending_max=65_536,
    cut_rate=0,
    belief_rate=0,
    agent_kill_rate=0,
    agent_stall_rate=0,
    controller_kill_rate=0,
    state_loss_chance=0,
    crash_rate=0,
    leave_rate=0,
    leap_rate=0,
    tick_ns=200 * MS_NS,
    slice_max=DUMP_CHUNK,
    slice_pause_ns=MS_NS,
    look_pause_ns=0,
    boot_refusals=0.0,
)
"""A day on which nothing goes wrong by itself. Packets that are a little late are in it, for no day is without."""


class Stage(ABC):
    """One cluster to be played to."""

    timeline: Timeline
    wishes: Wishes
    audience: Audience
    turns: int = 0
    """How often the router was reshuffled."""

    @property
    def service(self) -> Service:
        return self.wishes.services[0]

    # --- What happens -------------------------------------------------------------------------------------------------
    def reset(self, backend_count: int) -> None:
        """So many backends of equal weight."""
        for pod in [*self.service.pods]:
            self.wishes.remove(self.service, pod)
        for _ in range(backend_count):
            self._come()

    def add(self, count: int) -> list[Pod]:
        """More backends."""
        added = [self._come() for _ in range(count)]
        self.see()
        return added

    def _come(self) -> Pod:
        pod = self.wishes._add_pod(self.service)
        pod.weight = 1
        return pod

    def drain(self, count: int) -> list[Pod]:
        """The oldest that serve get no new flows."""
        drained = self.service.ready()[:count]
        for pod in drained:
            pod.state = BackendState.DRAINING
        self.see()
        return drained

    def remove(self, pods: list[Pod]) -> None:
        """They are gone, and so are their flows."""
        for pod in pods:
            self.wishes.remove(self.service, pod)
        self.see()

    def replace(self) -> tuple[Pod, Pod]:
        """The oldest that serves drains, and a new one comes: who goes, who comes."""
        (old,) = self.service.ready()[:1]
        old.state = BackendState.DRAINING
        new = self._come()
        self.see()
        return old, new

    def reshuffle(self) -> None:
        """Every established flow arrives at another LB."""
        self.turns += 1

    @abstractmethod
    def start(self) -> None:
        """Until VIP traffic may come, and then the clients."""

    @abstractmethod
    def see(self) -> None:
        """What is wanted has changed."""

    @abstractmethod
    def lose(self, dice: Random) -> str:
        """An LB is gone for ever, all that it knew with it; which one. The router notices a little later."""

    @abstractmethod
    def join(self) -> str:
        """Another one is wanted in its place; which one."""

    # --- What is seen -------------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def joined(self) -> bool:
        """Every LB that is wanted takes traffic."""

    @property
    @abstractmethod
    def tracking(self) -> int:
        """Slots that track at the LB where most do."""

    @property
    @abstractmethod
    def relayed(self) -> int:
        """Packets, since the start."""

    @property
    @abstractmethod
    def resolved(self) -> int:
        """Flows, since the start."""


class OurStage(Stage):
    """The real Planner, real Keepers, and the fast path as the oracle has it."""

    def __init__(self, seed: int, backend_count: int, long_count: int, short_rate: int) -> None:
        self._cluster = _Shown(seed, long_count, short_rate)
        self.timeline, self.wishes = self._cluster.timeline, self._cluster.wishes
        self.audience = self._cluster.audience
        self.reset(backend_count)
        self._lost = ""

    def start(self) -> None:
        self._cluster.start()
        if not self.timeline.run_until(lambda: self.joined, START_NS_MAX):
            raise AssertionError("a cluster in which nothing goes wrong starts")
        self.audience.start()

    def see(self) -> None:
        self._cluster.controller.see()

    def reshuffle(self) -> None:
        self._cluster.turn()

    def lose(self, dice: Random) -> str:
        machine = dice.choice(self._lbs())
        self._cluster.promises.lost(machine)
        machine.crash()
        self._cluster.network.listeners[machine.name] = _Gone(self.timeline)
        self._lost = machine.name
        return machine.name

    def join(self) -> str:
        new = replace_lost(self.wishes, self._lost)
        self.see()
        return new

    def _lbs(self) -> list[Machine]:
        listed = self.wishes.listed
        return [machine for name, machine in self._cluster.machines.items() if listed.get(name) is Listed.LB]

    @property
    def joined(self) -> bool:
        return all(machine.up and machine.is_ready for machine in self._lbs())

    @property
    def tracking(self) -> int:
        return max(machine.keeper.status().tracking_slots for machine in self._lbs())

    @property
    def relayed(self) -> int:
        return sum(int(one.maps.counters[Verdict.RELAYED, 0]) for one in self._cluster.machines.values())

    @property
    def resolved(self) -> int:
        return sum(machine.resolved_flows for machine in self._cluster.machines.values())


class _Gone:
    """A machine that is no more: who calls it learns so once a connection has taken too long (controller/push.py)."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def hear(self, call: Call, answer: Answer) -> None:
        def fail() -> None:
            if not call.is_done:
                call.is_done = True
                call.on_failure(False, "no connection came about in time")

        self._timeline.later(PEER_TIMEOUT_NS, fail)


class _Shown(Cluster):
    """A simulated cluster whose clients are an audience, and whose router turns its paths when it is told to."""

    def __init__(self, seed: int, long_count: int, short_rate: int) -> None:
        super().__init__(seed, keeps=False, odds=CALM)
        self.audience = Audience(
            self.timeline,
            CALM,
            self.dice("clients"),
            self.wishes.services,
            self.of.seed,
            self._enter,
            long_count=long_count,
            short_rate=short_rate,
        )
        self.audience.bind = self.promises.bind
        self.clients = self.promises.clients = self.audience
        self._turns = 0

    def turn(self) -> None:
        """All flows go to another LB."""
        self._turns += 1
        self._seen = turned(self._seen, 1)

    def _look(self) -> None:
        super()._look()
        self._seen = turned(self._seen, self._turns)


def replace_lost(wishes: Wishes, lost: str) -> str:
    """A node that was not wanted is to be an LB in place of that one."""
    new = next(name for name, how in wishes.listed.items() if how is Listed.NOT)
    wishes.listed[lost], wishes.listed[new] = Listed.NOT, Listed.LB
    return new


def turned(lbs: list[_T], turns: int) -> list[_T]:
    """The same, beginning elsewhere."""
    place = turns % len(lbs) if lbs else 0
    return lbs[place:] + lbs[:place]
