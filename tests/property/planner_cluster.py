"""A toy cluster for the Planner's promises: LBs of a few lines, a network that may do anything, a store that says no.

The LBs know only the rules of DESIGN section 5 (refuse what is lower, or equal with another digest; prepare what is
staged; commit what is prepared). They check the one thing that all of Holdfast stands on: at every commit, all ring
members have prepared that very snapshot. Calls and answers are lost, late or repeated, LBs restart with and without
memory, controllers are cut off after any effect, and there may be two of them. Every die is thrown by one ``Random``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

from lbpod.core.limits import START_WAIT_NS, TICK_NS
from lbpod.core.messages import (
    AskStatus,
    CommitCall,
    ControlCall,
    LbAnswered,
    LbFailed,
    LbStatus,
    Persist,
    Persisted,
    PersistFailed,
    Phase,
    PlannerEffect,
    PlannerEvent,
    PlannerStatus,
    PrepareCall,
    Push,
    Report,
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
from lbpod.core.snapshot import digest_of

CLUSTER = Cluster(vni=7, seed=11)
LBS = ("lb1", "lb2", "lb3")
HOSTS = ("host1", "host2")
NODES = tuple(
    WorldNode(name, parse_address(f"10.0.0.{i}"), f"10.0.0.{i}:9900", name in LBS)
    for i, name in enumerate((*LBS, *HOSTS), start=1)
)
BAD_PORT = 666
"""A backend with this port is one that some LBs refuse to prepare."""


def world(picks: Iterable[tuple[int, int, BackendState]]) -> World:
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
    return World(NODES, tuple(vips))


def _meaning(snapshot: Snapshot) -> dict[int, object]:
    """What each backend's id stands for."""
    return {one.id: (vip.id, one.address, one.port) for vip in snapshot.vips for one in vip.backends}


class RefusedError(Exception):
    """The toy's 4xx."""


@dataclass
class ToyLb:
    """What a node remembers, and the rules by which it takes a call."""

    name: str
    picky: bool = False
    staged: Snapshot | None = None
    prepared: Snapshot | None = None
    committed: Snapshot | None = None

    def take(self, body: ControlCall | None, cluster: "ToyCluster") -> None:
        match body:
            case Snapshot():
                if self.staged is not None and (
                    body.generation < self.staged.generation
                    or (body.generation == self.staged.generation and digest_of(body) != digest_of(self.staged))
                ):
                    raise RefusedError(f"generation {self.staged.generation} is staged here")
                if cluster.strict_ids:
                    self._check_ids(body)
                self.staged = body
            case PrepareCall():
                self._prepare(body, cluster)
            case CommitCall():
                if self.committed is not None and self.committed.generation == body.generation:
                    return
                if self.prepared is None or self.prepared.generation != body.generation:
                    raise RefusedError(f"generation {body.generation} is not prepared here")
                cluster.check_commit(self, self.prepared)
                self.committed, self.prepared = self.prepared, None

    def _check_ids(self, new: Snapshot) -> None:
        """As the Keeper does: an id must not change its meaning while it is known."""
        meaning = _meaning(new)
        for known in (self.committed, self.prepared):
            for number, thing in _meaning(known).items() if known is not None else ():
                if meaning.get(number, thing) != thing:
                    raise RefusedError(f"id {number} means something else here")

    def _prepare(self, call: PrepareCall, cluster: "ToyCluster") -> None:
        if self.committed is not None and self.committed.generation == call.generation:
            return
        if self.staged is None or (self.staged.generation, digest_of(self.staged)) != (call.generation, call.digest):
            raise RefusedError(f"generation {call.generation} is not staged here")
        if self.picky and any(one.port == BAD_PORT for vip in self.staged.vips for one in vip.backends):
            raise RefusedError("the table has another digest here")
        self.prepared = self.staged
        cluster.ever_prepared.add((self.name, call.generation, call.digest))

    def status(self, with_snapshot: bool) -> LbStatus:
        return LbStatus(
            node=self.name,
            member=0,
            committed=self.committed.generation if self.committed else 0,
            prepared=self.prepared.generation if self.prepared else 0,
            staged=self.staged.generation if self.staged else 0,
            digest=digest_of(self.staged) if self.staged else b"",
            ring_epoch=1,
            tracking_slots=0,
            snapshot=self.staged if with_snapshot else None,
        )

    def forget(self) -> None:
        self.staged = self.prepared = self.committed = None


@dataclass
class Controller:
    """A Planner with what is under way to and from it. `life` grows with each restart: old answers do not arrive."""

    planner: Planner = field(default_factory=lambda: Planner(CLUSTER))
    life: int = 0
    inbox: list[PlannerEvent] = field(default_factory=list)
    calls: list[tuple[int, AskStatus | Push]] = field(default_factory=list)
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
        self.wanted = world([(1, 1, BackendState.READY)])
        self.ever_prepared: set[tuple[str, int, bytes]] = set()
        self.ever_committed: dict[int, bytes] = {}
        self.trouble = True
        self.strict_ids = controllers == 1  # with two, ids can collide in host agents, and somebody has to look

    # --- Promises -----------------------------------------------------------------------------------------------------
    def check_commit(self, lb: ToyLb, snapshot: Snapshot) -> None:
        """Called by an LB that is about to commit."""
        digest = digest_of(snapshot)
        ring = [node.name for node in snapshot.nodes if node.member in snapshot.ring.members]
        for name in ring:
            assert (name, snapshot.generation, digest) in self.ever_prepared, (
                f"{lb.name} commits {snapshot.generation}, which {name} has never prepared"
            )
        assert self.ever_committed.setdefault(snapshot.generation, digest) == digest, "two states of one generation"
        assert lb.committed is None or lb.committed.generation < snapshot.generation, "a generation went back"

    def check_ids(self) -> None:
        """An id means the same in every snapshot in force at any LB. (Host agents are not asked for theirs when a
        controller starts: 4,096 of them would send 16 GB. So if all LBs lose their memory at once, ids start anew.)"""
        meaning: dict[tuple[str, int], object] = {}
        for lb in (self.lbs[name] for name in LBS):
            for vip in lb.committed.vips if lb.committed else ():
                key = (vip.address, vip.port, vip.protocol)
                assert meaning.setdefault(("vip", vip.id), key) == key, "a VIP's id was given twice"
                for one in vip.backends:
                    named = (key, one.address, one.port)
                    assert meaning.setdefault(("backend", one.id), named) == named, "a backend's id was given twice"

    # --- The shell ----------------------------------------------------------------------------------------------------
    def feed(self, controller: Controller, event: PlannerEvent) -> None:
        """One step; its effects are carried out in order, up to where the controller is cut off."""
        effects = controller.planner.step(event, self.now_ns)
        cut = self.dice.randrange(len(effects) + 1) if self.trouble and self.dice.random() < 0.02 else None
        for effect in effects[:cut]:
            self._carry_out(controller, effect)
        if cut is not None:
            self.restart(controller)

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
        body = effect.body if isinstance(effect, Push) else None
        event: PlannerEvent
        try:
            lb.take(body, self)
            wants = isinstance(effect, AskStatus) and effect.with_snapshot
            event = LbAnswered(effect.node, generation, lb.status(wants))
        except RefusedError as error:
            event = LbFailed(effect.node, generation, True, str(error))
        self.check_ids()
        if life == controller.life and not keep:
            lost = LbFailed(effect.node, generation, False, "timed out")
            controller.inbox.append(event if answer else lost)

    def tick(self, passed_ns: int = TICK_NS) -> None:
        self.now_ns += passed_ns
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
            at = self.dice.randrange(len(controller.calls))
            fate = self.dice.random()
            if fate < 0.05:
                life, effect = controller.calls[at]  # the caller gives up; the call stays under way and may arrive late
                if life == controller.life:
                    controller.calls[at] = (-1, effect)
                    generation = effect.generation if isinstance(effect, Push) else 0
                    controller.inbox.append(LbFailed(effect.node, generation, False, "timed out"))
            else:
                self.arrive(controller, at, keep=fate < 0.10, answer=fate > 0.15)
        elif die < 0.90:
            self.tick(self.dice.choice((TICK_NS, 5 * TICK_NS, START_WAIT_NS)))
        elif die < 0.96:
            picks = [(self.dice.choice((1, 2)), self.dice.randrange(1, 15), self.dice.choice(list(BackendState)))]
            self.wanted = world([*self._picks(), *picks] if self.dice.random() < 0.6 else picks)
            for one in self.controllers:
                one.inbox.append(WorldSeen(self.wanted))
        elif die < 0.98:
            lb = self.lbs[self.dice.choice(sorted(self.lbs))]
            lb.picky = not lb.picky
            if self.dice.random() < 0.3:
                lb.forget()
        elif die < 0.99:
            self.restart(controller)
        else:
            if len(self.controllers) == 1:
                self.persisted, self.persisted_ids = 0, NextIds()  # the store is lost

    def _picks(self) -> list[tuple[int, int, BackendState]]:
        return [
            (number, one.address[-1], one.state)
            for number, vip in enumerate(self.wanted.vips, start=1)
            for one in vip.backends
        ]

    def calm(self, rounds: int = 400) -> None:
        """Trouble ends: everything arrives in order until nothing moves any more."""
        self.trouble = False
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

    def settled(self) -> bool:
        """Every controller is idle at one generation, and every node has committed it, and it is what is wanted."""
        generations = {lb.committed.generation if lb.committed else 0 for lb in self.lbs.values()}
        idle = all(
            one.status is not None
            and one.status.phase is Phase.IDLE
            and {one.status.generation} == generations
            and not one.inbox
            and not one.calls
            for one in self.controllers
        )
        return idle and all(lb.committed is not None and self.is_wanted(lb.committed) for lb in self.lbs.values())

    def is_wanted(self, snapshot: Snapshot) -> bool:
        have = {(vip.name, one.address, one.port, one.state) for vip in snapshot.vips for one in vip.backends}
        return have == {
            (vip.name, one.address, one.port, one.state) for vip in self.wanted.vips for one in vip.backends
        }
