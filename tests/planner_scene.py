"""A Planner and nodes that do as they are told, for tests told as scenes: what happens, and what exactly is done.

Nodes answer as LbStatus says and keep nothing else. Everything happens at one instant, until ``later``.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from lbpod.core.limits import (
    CHANGE_GATHER_NS,
)
from lbpod.core.messages import (
    AskStatus,
    CommitCall,
    HandoverCall,
    LbAnswered,
    LbFailed,
    LbStatus,
    Persist,
    Persisted,
    Phase,
    PlannerEffect,
    PlannerEvent,
    PlannerStatus,
    PrepareCall,
    Push,
    Report,
    RingDoneCall,
    RingPrepareCall,
    RingStep,
    RingSwitchCall,
    Tick,
    WorldSeen,
)
from lbpod.core.model import (
    Affinity,
    BackendState,
    Cluster,
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

CLUSTER = Cluster(7, 11)
SECOND_NS = 1_000_000_000
DRAIN_NS = 60 * SECOND_NS


def world(*backends: int, draining: Sequence[int] = (), lbs: int = 2, hosts: int = 0) -> World:
    """`lbs` LBs lb1.., `hosts` other nodes host1.., one VIP with these backends (last octet)."""
    names = [f"lb{number}" for number in range(1, lbs + 1)] + [f"host{number}" for number in range(1, hosts + 1)]
    nodes = tuple(
        WorldNode(name, parse_address(f"10.0.0.{place}"), f"{name}:9900", name.startswith("lb"))
        for place, name in enumerate(names, start=1)
    )
    found = tuple(
        WorldBackend(
            parse_address(f"10.1.0.{last}"),
            80,
            "lb1",
            state=BackendState.DRAINING if last in draining else BackendState.READY,
        )
        for last in backends
    )
    address = parse_address("203.0.113.1")
    vip = WorldVip("a/b/http", address, 80, Protocol.TCP, Affinity.NONE, 60 * SECOND_NS, DRAIN_NS, found)
    return World(nodes, (vip,))


WORDS = {
    Snapshot: "stage",
    PrepareCall: "prepare",
    CommitCall: "commit",
    RingPrepareCall: "learn",
    HandoverCall: "hand",
    RingSwitchCall: "switch",
    RingDoneCall: "end",
}
NOTHING = LbStatus("", 0, 0, 0, 0, b"", 0, 0)


class Scene:
    """A Planner and nodes that do as they are told; by name: silent and refusing ones, and who has given up nobody."""

    def __init__(self) -> None:
        self.planner = Planner(CLUSTER)
        self.now_ns = SECOND_NS
        self.nodes: dict[str, LbStatus] = {}
        self.staged: dict[str, Snapshot] = {}
        self.in_force: dict[str, Snapshot] = {}
        self.leaving: set[str] = set()
        self.silent: set[str] = set()
        self.given_up: tuple[int, ...] = ()
        self.unaware: set[str] = set()
        self.refusing: dict[str, str] = {}
        self.persisted: list[int] = []
        self.status: PlannerStatus | None = None
        self.log: list[str] = []

    def step(self, event: PlannerEvent) -> list[PlannerEffect]:
        effects = self.planner.step(event, self.now_ns)
        for effect in effects:
            if isinstance(effect, Report):
                self.status = effect.status
        return effects

    def play(self, event: PlannerEvent) -> list[str]:
        """The event and all that follows at the same instant; returns what was done, in words."""
        done: list[str] = []
        events = [event]
        while events:
            for effect in self.step(events.pop(0)):
                answer = self._answer(effect, done)
                if answer is not None:
                    events.append(answer)
        self.log.extend(done)
        return done

    def later(self, passed_ns: int) -> list[str]:
        """Time passes in ticks; returns what was done."""
        end_ns = self.now_ns + passed_ns
        done = []
        while self.now_ns < end_ns:
            self.now_ns = min(self.now_ns + SECOND_NS // 4, end_ns)
            done += self.play(Tick())
        return done

    def see(self, wanted: World) -> list[str]:
        """A new World, and the time to gather what comes with it."""
        done = self.play(WorldSeen(wanted))
        self.now_ns += CHANGE_GATHER_NS
        return done + self.play(Tick())

    def _answer(self, effect: PlannerEffect, done: list[str]) -> PlannerEvent | None:
        match effect:
            case Persist(generation, _, _):
                done.append(f"persist {generation}")
                self.persisted.append(generation)
                return Persisted(generation)
            case AskStatus(name, _, with_snapshot):
                done.append(f"ask {name}" + (" all" if with_snapshot else ""))
                if name in self.silent:
                    return LbFailed(name, 0, False, "timed out")
                return LbAnswered(name, 0, self._said(name, with_snapshot))
            case Push(name, _, generation, body):
                word = WORDS[type(body)]
                more = f" round {body.round} without {list(body.lost)}" if isinstance(body, HandoverCall) else ""
                done.append(f"{word} {generation} {name}{more}")
                if name in self.silent:
                    return LbFailed(name, generation, False, "timed out")
                if self.refusing.get(name) == word:
                    return LbFailed(name, generation, True, f"cannot {word}")
                self._take(name, generation, body)
                return LbAnswered(name, generation, self._said(name, False))
            case _:
                return None

    def _said(self, name: str, with_snapshot: bool) -> LbStatus:
        had = self.nodes.get(name, msgspec.structs.replace(NOTHING, node=name))
        staged, force = self.staged.get(name), self.in_force.get(name)
        had = msgspec.structs.replace(had, leaving=name in self.leaving)
        had = msgspec.structs.replace(had, given_up=() if name in self.unaware else self.given_up)
        if not with_snapshot:
            return had
        return msgspec.structs.replace(had, snapshot=staged, in_force=force if force != staged else None)

    def _take(self, name: str, generation: int, body: Any) -> None:
        new: dict[str, Any] = {}
        match body:
            case Snapshot():
                self.staged[name] = body
                new = {"staged": generation, "digest": digest_of(body)}
            case PrepareCall():
                new = {"prepared": generation, "ring_step": RingStep.NONE, "ring_round": 0}
            case RingPrepareCall():
                new = {"prepared": generation, "ring_step": RingStep.PREPARED, "ring_round": 0}
            case HandoverCall():
                new = {"ring_step": RingStep.HANDED, "ring_round": body.round}
            case RingSwitchCall():
                new = {"prepared": 0, "committed": generation, "ring_step": RingStep.SWITCHED}
            case CommitCall() | RingDoneCall():
                new = {"prepared": 0, "committed": generation, "ring_step": RingStep.NONE}
        self.nodes[name] = msgspec.structs.replace(self._said(name, False), **new)
        if "committed" in new:
            self.in_force[name] = self.staged[name]
            self._serve(name, is_done=not isinstance(body, RingSwitchCall))

    def _serve(self, name: str, *, is_done: bool) -> None:
        ring, nodes = self.in_force[name].ring, self.in_force[name].nodes
        members = ring.members if is_done else (*ring.members, *ring.before)
        mine = [node.member for node in nodes if node.name == name]
        self.nodes[name] = msgspec.structs.replace(
            self.nodes[name], serving=any(member in members for member in mine), ring_epoch=ring.epoch
        )

    def empty(self, name: str) -> None:
        """It has restarted and knows nothing."""
        for known in (self.nodes, self.staged, self.in_force):
            known.pop(name, None)

    def ring(self) -> list[str]:
        """Names of the ring in force at the first LB."""
        snapshot = self.in_force["lb1"]
        return [node.name for node in snapshot.nodes if node.member in snapshot.ring.members]

    def restart(self) -> None:
        """Another Planner takes over."""
        self.planner = Planner(CLUSTER)
        self.status = None

    def now(self) -> PlannerStatus:
        assert self.status is not None, "nothing was reported yet"
        return self.status

    def backends(self, name: str = "lb1") -> list[int]:
        return sorted(one.address[-1] for vip in self.staged[name].vips for one in vip.backends)


def calls(done: list[str], word: str) -> list[str]:
    return [one for one in done if one.startswith(word)]


def without_asking(done: list[str]) -> list[str]:
    return [one for one in done if not one.startswith("ask")]


def quiet(scene: Scene) -> None:
    """Time enough for everything to come to rest."""
    scene.later(30 * SECOND_NS)
    assert Phase.IDLE is scene.now().phase


def lose_at(scene: Scene, name: str, word: str) -> None:
    """This node is silent from this call on."""
    answer = scene._answer

    def silent(effect: PlannerEffect, done: list[str]) -> PlannerEvent | None:
        if isinstance(effect, Push) and effect.node == name and WORDS[type(effect.body)] == word:
            scene.silent.add(name)
        return answer(effect, done)

    scene._answer = silent  # type: ignore[method-assign]
