"""A toy cluster for the Planner's promises: LBs of a few lines, a network that may do anything, a store that says no.

The LBs (``planner_lb``) know only the rules of the calls, and check what all of Holdfast stands on: at every commit,
all ring members have prepared that very snapshot; at every switch, who switches has what the others had to hand over.
Calls and answers are lost, late or repeated, LBs restart with and without memory, are cut off for a while, come, move
and go, controllers are cut off after any effect, and there may be two of them. Every die is thrown by one ``Random``.

The controller's own steps are checked where it takes them: the first switch and the first end of a ring change.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

from lbpod.core.limits import START_WAIT_NS, TICK_NS
from lbpod.core.messages import (
    AskStatus,
    LbAnswered,
    LbFailed,
    Persist,
    Persisted,
    PersistFailed,
    Phase,
    PlannerEffect,
    PlannerEvent,
    PlannerStatus,
    Push,
    Report,
    RingDoneCall,
    RingSwitchCall,
    Tick,
    WorldSeen,
)
from lbpod.core.model import (
    Affinity,
    BackendState,
    Cluster,
    NextIds,
    Protocol,
    Snapshot,
    World,
    WorldBackend,
    WorldNode,
    WorldVip,
    parse_address,
)
from lbpod.core.planner import Planner
from tests.property.planner_lb import BAD_PORT, Ledger, RefusedError, ToyLb, names_in_ring

CLUSTER = Cluster(vni=7, seed=11)
LBS = ("lb1", "lb2", "lb3", "lb4")
HOSTS = ("host1", "host2")


def node(name: str, *, lb: bool = True, moved: bool = False) -> WorldNode:
    """The node of this name; moved: to another address."""
    last = (*LBS, *HOSTS).index(name) + (101 if moved else 1)
    return WorldNode(name, parse_address(f"10.0.0.{last}"), f"10.0.0.{last}:9900", lb and name in LBS)


NODES = tuple(node(name) for name in ("lb1", "lb2", "lb3", *HOSTS))


def world(picks: Iterable[tuple[int, int, BackendState]], nodes: tuple[WorldNode, ...] = NODES) -> World:
    """A World with two VIPs; each pick is (VIP, backend, state)."""
    vips = []
    chosen = sorted(set(picks))
    for number in (1, 2):
        backends = tuple(
            WorldBackend(parse_address(f"10.1.{number}.{one}"), BAD_PORT if one == 13 else 80, "host1", 1, state)
            for one, state in {one: state for vip, one, state in chosen if vip == number}.items()
        )
        address = parse_address(f"203.0.113.{number}")
        vips.append(
            WorldVip(
                f"a/b/{number}", address, 80, Protocol.TCP, Affinity.NONE, 60_000_000_000, 86_400_000_000_000, backends
            )
        )
    return World(nodes, tuple(vips))


@dataclass
class Controller:
    """A Planner with what is under way to and from it. `life` grows with each restart: old answers do not arrive."""

    planner: Planner = field(default_factory=lambda: Planner(CLUSTER))
    life: int = 0
    inbox: list[PlannerEvent] = field(default_factory=list)
    calls: list[tuple[int, AskStatus | Push]] = field(default_factory=list)
    begun: set[tuple[int, int, type]] = field(default_factory=set)
    status: PlannerStatus | None = None


class ToyCluster:
    """All of it. ``run`` makes trouble; ``calm`` stops it and lets things settle."""

    def __init__(self, dice: Random, controllers: int = 1) -> None:
        self.dice = dice
        self.now_ns = 0
        self.lbs = {name: ToyLb(name) for name in (*LBS, *HOSTS)}
        self.controllers = [Controller() for _ in range(controllers)]
        self.persisted = 0
        self.persisted_ids = NextIds()
        self.store_was_lost = False
        self.wanted = world([(1, 1, BackendState.READY)])
        self.ledger = Ledger(strict_ids=controllers == 1)
        self.trouble = True

    # --- The shell ----------------------------------------------------------------------------------------------------
    def feed(self, controller: Controller, event: PlannerEvent) -> None:
        """One step; its effects are carried out in order, up to where the controller is cut off."""
        effects = controller.planner.step(event, self.now_ns)
        said = [effect.status for effect in effects if isinstance(effect, Report)]
        controller.status = said[-1] if said else controller.status
        if len(self.controllers) == 1:
            for effect in effects:
                if isinstance(effect, Push) and isinstance(effect.body, RingSwitchCall | RingDoneCall):
                    self._check_step(controller, effect.body)
        cut = self.dice.randrange(len(effects) + 1) if self.trouble and self.dice.random() < 0.02 else None
        for effect in effects[:cut]:
            self._carry_out(controller, effect)
        if cut is not None:
            self.restart(controller)

    def _check_step(self, controller: Controller, body: RingSwitchCall | RingDoneCall) -> None:
        """The first call of its kind for this generation in this life of the controller."""
        assert controller.status is not None, "who calls has said where it stands"
        step = (controller.life, body.generation, type(body))
        if step in controller.begun or body.generation < controller.status.generation:
            return  # what is older was left open somewhere, and is over everywhere else
        controller.begun.add(step)
        peers = self.ledger.ring_peers(body.generation) - set(controller.status.lost)
        if isinstance(body, RingSwitchCall):
            self.ledger.check_first_switch(body.generation, peers)
        else:
            self.ledger.check_first_end(body.generation, peers, self.now_ns)

    def _carry_out(self, controller: Controller, effect: PlannerEffect) -> None:
        match effect:
            case Persist(generation, snapshot, after):
                assert generation == snapshot.generation
                if self.trouble and self.dice.random() < 0.1:
                    controller.inbox.append(PersistFailed(generation, 0, "no space left on device"))
                elif self.persisted > after:
                    controller.inbox.append(
                        PersistFailed(generation, self.persisted, "somebody was faster", self.persisted_ids)
                    )
                else:
                    self.persisted, self.persisted_ids = generation, snapshot.next_ids
                    had = controller.status.ring if controller.status is not None else ()
                    serving = any(lb.serving for lb in self.lbs.values())
                    is_given_up = had and serving and not snapshot.ring.members and len(self.controllers) == 1
                    assert not is_given_up, f"the ring of {had} is given up"
                    self.ledger.persisted(snapshot)
                    controller.inbox.append(Persisted(generation))
            case AskStatus() | Push():
                controller.calls.append((controller.life, effect))
            case Report(status):
                controller.status = status

    def restart(self, controller: Controller) -> None:
        """kill -9: nothing is left but the store; calls that are under way may still arrive."""
        controller.planner = Planner(CLUSTER)
        controller.life += 1
        controller.inbox = [WorldSeen(self.wanted)]
        controller.status = None

    def arrive(self, controller: Controller, at: int, *, keep: bool = False, answer: bool = True) -> None:
        """A call reaches its node. keep: it will arrive once more; answer False: the answer is lost."""
        life, effect = controller.calls[at] if keep else controller.calls.pop(at)
        lb = self.lbs[effect.node]
        generation = effect.generation if isinstance(effect, Push) else 0
        lost = LbFailed(effect.node, generation, False, "timed out")
        event: PlannerEvent
        try:
            if not lb.is_up:
                event = lost
            else:
                lb.take(effect.body if isinstance(effect, Push) else None, self.lbs, self.ledger, self.now_ns)
                wants = isinstance(effect, AskStatus) and effect.with_snapshot
                event = LbAnswered(effect.node, generation, lb.status(wants))
        except RefusedError as error:
            event = LbFailed(effect.node, generation, True, str(error))
        self.ledger.check_ids(self.lbs[name] for name in LBS)
        if life == controller.life and not keep:
            controller.inbox.append(event if answer else lost)

    def tick(self, passed_ns: int = TICK_NS) -> None:
        self.now_ns += passed_ns
        for lb in self.lbs.values():
            lb.tick(self.lbs, self.ledger)
        for controller in self.controllers:
            self.feed(controller, Tick())

    # --- Trouble and calm ---------------------------------------------------------------------------------------------
    def run(self, steps: int) -> None:
        for controller in self.controllers:
            self.feed(controller, WorldSeen(self.wanted))
        for _ in range(steps):
            self._one_step(self.dice.choice(self.controllers))

    def _one_step(self, controller: Controller) -> None:
        die = self.dice.random()
        if die < 0.40 and controller.inbox:
            self.feed(controller, controller.inbox.pop(self.dice.randrange(len(controller.inbox))))
        elif die < 0.80 and controller.calls:
            self._call_fares(controller, self.dice.randrange(len(controller.calls)))
        elif die < 0.90:
            self.tick(self.dice.choice((TICK_NS, 5 * TICK_NS, 10 * TICK_NS, START_WAIT_NS)))
        elif die < 0.95:
            self._world_changes()
        elif die < 0.98:
            self._lb_changes(self.lbs[self.dice.choice(sorted(self.lbs))])
        elif die < 0.99:
            self.restart(controller)
        elif len(self.controllers) == 1 and {self.persisted} == {lb.newest for lb in self.lbs.values() if lb.is_up}:
            self.persisted, self.persisted_ids, self.store_was_lost = 0, NextIds(), True

    def _call_fares(self, controller: Controller, at: int) -> None:
        fate = self.dice.random()
        if fate >= 0.05:
            self.arrive(controller, at, keep=fate < 0.10, answer=fate > 0.15)
            return
        life, effect = controller.calls[at]  # the caller gives up; the call stays under way and may arrive late
        if life == controller.life:
            controller.calls[at] = (-1, effect)
            generation = effect.generation if isinstance(effect, Push) else 0
            controller.inbox.append(LbFailed(effect.node, generation, False, "timed out"))

    def _world_changes(self) -> None:
        nodes = self.wanted.nodes
        if self.dice.random() < 0.3:
            name = self.dice.choice(LBS)
            fate = self.dice.choice(("gone", "host", "lb", "moved"))
            nodes = tuple(one for one in nodes if one.name != name)
            if fate != "gone":
                nodes = (*nodes, node(name, lb=fate != "host", moved=fate == "moved"))
        picks = [(self.dice.choice((1, 2)), self.dice.randrange(1, 15), self.dice.choice(list(BackendState)))]
        picks = [*self._picks(), *picks] if self.dice.random() < 0.6 else picks
        self.wanted = world(picks, nodes)
        for one in self.controllers:
            one.inbox.append(WorldSeen(self.wanted))

    def _lb_changes(self, lb: ToyLb) -> None:
        if self.store_was_lost:
            return  # somebody has to remember
        fate = self.dice.random()
        if self.dice.random() < 0.3:  # whom it takes for lost, rightly or wrongly
            lb.given_up = tuple(sorted(self.dice.sample(range(len(LBS)), self.dice.randrange(len(LBS)))))
        if fate < 0.2:
            lb.picky = not lb.picky
        elif fate < 0.6:
            lb.is_up = not lb.is_up
        elif fate < 0.7:
            lb.leaving = not lb.leaving
        else:  # its agent restarts; calls under way end with the connection that they came by
            lb.restart(empty=fate > 0.8)
            for controller in self.controllers:
                for life, effect in [one for one in controller.calls if one[1].node == lb.name]:
                    controller.calls.remove((life, effect))
                    if life == controller.life:
                        generation = effect.generation if isinstance(effect, Push) else 0
                        controller.inbox.append(LbFailed(lb.name, generation, False, "connection reset"))

    def _picks(self) -> list[tuple[int, int, BackendState]]:
        return [
            (number, one.address[-1], one.state)
            for number, vip in enumerate(self.wanted.vips, start=1)
            for one in vip.backends
        ]

    def calm(self, rounds: int = 900) -> None:
        """Trouble ends: everything arrives in order until nothing moves any more. Those that are down stay so, but for
        one LB; and those that want to leave do."""
        self.trouble = False
        if not any(lb.is_up and not lb.leaving for lb in self._listed_lbs()):
            self.wanted = world(self._picks(), (*(one for one in self.wanted.nodes if one.name != "lb1"), node("lb1")))
            self.lbs["lb1"].is_up, self.lbs["lb1"].leaving = True, False
        for lb in self.lbs.values():
            lb.picky = False
        for controller in self.controllers:
            controller.inbox.append(WorldSeen(self.wanted))
        for _ in range(rounds):
            for controller in self.controllers:
                while controller.inbox:
                    self.feed(controller, controller.inbox.pop(0))
                while controller.calls:
                    self.arrive(controller, 0)
            if self.settled():
                return
            self.tick()

    def _listed_lbs(self) -> list[ToyLb]:
        return [self.lbs[one.name] for one in self.wanted.nodes if one.lb]

    def settled(self) -> bool:
        """Every controller is idle at one generation; every node that it can reach has committed it; it is what is
        wanted, and so is its ring."""
        listed = [lb for one in self.wanted.nodes if (lb := self.lbs[one.name]).is_up]
        found = [lb.committed for lb in listed if lb.committed is not None]
        generations = {snapshot.generation for snapshot in found}
        idle = all(
            one.status is not None
            and one.status.phase is Phase.IDLE
            and {one.status.generation} == generations
            and not one.inbox
            and not one.calls
            for one in self.controllers
        )
        wanted = {lb.name for lb in self._listed_lbs() if lb.is_up and not lb.leaving}
        return (
            idle
            and len(found) == len(listed)
            and all(self.is_wanted(snapshot) for snapshot in found)
            and (not wanted or wanted == names_in_ring(found[0]))
            and all(lb.serving for lb in listed if lb.name in names_in_ring(found[0]))
        )

    def is_wanted(self, snapshot: Snapshot) -> bool:
        have = {(vip.name, one.address, one.port, one.state) for vip in snapshot.vips for one in vip.backends}
        return have == {
            (vip.name, one.address, one.port, one.state) for vip in self.wanted.vips for one in vip.backends
        }
