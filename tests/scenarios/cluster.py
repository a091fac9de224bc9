"""A whole cluster in one process on virtual time: one Planner, its nodes, and a network that a scenario can disturb.

Decided here: when a message arrives (LATENCY_NS each way, unless a rule says that it is lost or held), when agents and
the controller tick, and what a call that is lost looks like to its sender (silence until PEER_TIMEOUT_NS). Everything
that is said is encoded and decoded as on the wire, and noted in ``log``. No asyncio, no sleep, no clock: ``advance``
moves ``now_ns`` from event to event, in an order that depends on nothing but the scenario and the seed of the faults.

Left to others: packets (``traffic``), words of a transcript (``commands``), the agent's side (``node``).
"""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from lbpod.core import wire
from lbpod.core.errors import RemoteError
from lbpod.core.limits import PEER_TIMEOUT_NS, TICK_NS
from lbpod.core.messages import (
    Answered,
    Ask,
    AskFailed,
    AskStatus,
    BeatCall,
    CommitCall,
    ControllerSeen,
    ForgetCall,
    HandoverCall,
    LbAnswered,
    LbFailed,
    LbStatus,
    MemberSeen,
    MissedCall,
    Persist,
    Persisted,
    PersistFailed,
    Phase,
    PlannerEffect,
    PlannerEvent,
    PlannerStatus,
    PrepareCall,
    Push,
    QuietCall,
    Refuse,
    Reply,
    Report,
    ResolveCall,
    RingDoneCall,
    RingPrepareCall,
    RingSwitchCall,
    SettleCall,
    SettleKind,
    SettleStep,
    StateCall,
    Tell,
    Tick,
    WorldSeen,
)
from lbpod.core.model import Cluster as ClusterOf, Snapshot, World, WorldNode, WorldVip, parse_address
from lbpod.core.planner import Planner
from tests.scenarios.node import Node
from tests.scenarios.tables import shared_tables

SECOND_NS: Final = 1_000_000_000
START_NS: Final = 1_000 * SECOND_NS
LATENCY_NS: Final = 1_000_000
STEP_NS: Final = TICK_NS // 4
"""`run until` looks this often at first, and ten times less often after two seconds."""

VNI: Final = 7
CONTROLLER: Final = "controller"
SEED_STRIDE: Final = 1_000
"""Fault seeds of one run's nodes lie this far from those of the next."""


class Fate(Enum):
    """What a rule does to a call. HELD: its sender hears nothing and gives up; it arrives once it is released."""

    LOST = "lost"
    ANSWER_LOST = "its answer lost"
    HELD = "held"


@dataclass(slots=True)
class Rule:
    """A disturbance of the network. Empty words match anything."""

    kind: str
    sender: str
    receiver: str
    fate: Fate
    left: int | None = None
    """How many more calls it takes; None: all."""

    def takes(self, call: "Call") -> bool:
        if self.left == 0 or self.kind not in {"any", call.kind}:
            return False
        if self.sender not in {"", call.sender} or self.receiver not in {"", call.receiver}:
            return False
        self.left = None if self.left is None else self.left - 1
        return True


@dataclass(slots=True, eq=False)
class Call:
    """A call on its way."""

    sender: str
    receiver: str
    kind: str
    body: Any
    on_answer: Callable[[Any], None]
    on_failure: Callable[[bool, str], None]
    """(refused by a 4xx, reason)."""
    with_snapshot: bool = False
    done: bool = False
    """The sender has its answer, or has given up."""
    answer_lost: bool = False


def kind_of(body: Any) -> str:
    """The word for a call in transcripts."""
    match body:
        case None:
            return "status"
        case Snapshot():
            return "snapshot"
        case PrepareCall():
            return "prepare"
        case CommitCall():
            return "commit"
        case RingPrepareCall():
            return "ring-prepare"
        case HandoverCall():
            return "handover"
        case RingSwitchCall():
            return "ring-switch"
        case RingDoneCall():
            return "ring-done"
        case StateCall():
            return "page"
        case ResolveCall():
            return "resolve"
        case BeatCall():
            return "beat"
        case ForgetCall():
            return "forget"
        case MissedCall():
            return "missed"
        case QuietCall():
            return "quiet"
        case SettleCall():
            settles = body.kind is SettleKind.SETTLE or body.step is not SettleStep.ASK
            return f"{'settle' if settles else 'rebase'}-{body.step.value}"
    raise AssertionError(f"{type(body).__name__} is no call")


class Cluster:
    """LBs lb1.., hosts host1.., and the controller. fault_seed None: nothing fails by itself."""

    def __init__(self, lbs: int, hosts: int, seed: int, fault_seed: int | None, share: float = 0.1) -> None:
        """seed: of the cluster's hashes; share: of datapath operations that fail, in runs with a fault_seed."""
        self.of = ClusterOf(VNI, seed)
        self.fault_seed = fault_seed
        self.lbs = [f"lb{number}" for number in range(1, lbs + 1)]
        self.hosts = [f"host{number}" for number in range(1, hosts + 1)]
        self.now_ns = START_NS
        first_seed = (fault_seed or 0) * SEED_STRIDE
        share = 0.0 if fault_seed is None else share
        self.nodes = {
            name: Node(name, address_of(name), seed, first_seed + place, share)
            for place, name in enumerate([*self.lbs, *self.hosts])
        }
        self.vips: tuple[WorldVip, ...] = ()
        self.log: list[str] = []
        self.rules: list[Rule] = []
        self.held: list[Call] = []
        self.on_tick: list[Callable[[], None]] = []
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._written: list[Snapshot] = []
        self._planner_life = 0
        self._new_planner()
        self.later(TICK_NS, self._tick)

    def set_share(self, share: float) -> None:
        """From now on this share of datapath operations fails (nothing does in the run without faults)."""
        for node in self.nodes.values():
            node.faulty.write_share = node.faulty.read_share = 0.0 if self.fault_seed is None else share

    @property
    def faults_count(self) -> int:
        """Datapath operations that have failed so far."""
        return sum(node.faulty.fault_count for node in self.nodes.values())

    # --- The controller -----------------------------------------------------------------------------------------------
    def _new_planner(self) -> None:
        self.planner = Planner(self.of)
        self.planner._maker._tables = shared_tables(self.of.seed)
        self.planner_status: PlannerStatus | None = None
        self._planner_life += 1

    def restart_controller(self) -> None:
        """kill -9, and a new one: all that is left is what was written down, and what the LBs know."""
        self._new_planner()
        self.plan(WorldSeen(self.world))

    @property
    def world(self) -> World:
        nodes = tuple(
            WorldNode(name, node.address, f"{name}:9900", name in self.lbs) for name, node in self.nodes.items()
        )
        return World(nodes, self.vips)

    def want(self, vips: tuple[WorldVip, ...]) -> None:
        """The World changes."""
        self.vips = vips
        self.plan(WorldSeen(self.world))

    def plan(self, event: PlannerEvent) -> None:
        """One event into the Planner, and its effects carried out."""
        for effect in self.planner.step(event, self.now_ns):
            self._carry_out(effect)

    def _carry_out(self, effect: PlannerEffect) -> None:
        life = self._planner_life

        def feed(event: PlannerEvent) -> None:
            if life == self._planner_life:
                self.plan(event)

        match effect:
            case Persist(generation, snapshot):
                self.later(LATENCY_NS, lambda: feed(self._write_down(generation, snapshot)))
            case AskStatus() | Push():
                generation, body = (effect.generation, effect.body) if isinstance(effect, Push) else (0, None)
                name = effect.node
                self.send(
                    Call(
                        sender=CONTROLLER,
                        receiver=name,
                        kind=kind_of(body),
                        body=body,
                        on_answer=lambda status: feed(LbAnswered(name, generation, status)),
                        on_failure=lambda refused, reason: feed(LbFailed(name, generation, refused, reason)),
                        with_snapshot=isinstance(effect, AskStatus) and effect.with_snapshot,
                    )
                )
            case Report(status):
                self.planner_status = status

    def _write_down(self, generation: int, snapshot: Snapshot) -> PlannerEvent:
        """The store: compare and swap."""
        newest = self._written[-1] if self._written else None
        if newest is not None and newest.generation >= generation:
            return PersistFailed(generation, newest.generation, "somebody was faster", newest.next_ids)
        self._written.append(snapshot)
        return Persisted(generation)

    def snapshot(self, generation: int | None = None) -> Snapshot:
        """The newest snapshot that was written down, or the one of a generation."""
        return next(one for one in reversed(self._written) if generation in (None, one.generation))

    @property
    def is_idle(self) -> bool:
        """All that is wanted is in force at every node, and written."""
        status = self.planner_status
        if status is None or status.phase is not Phase.IDLE or self.planner.gather_end_ns is not None:
            return False
        states = [node.keeper.status() for node in self.nodes.values()]
        return all(state.committed == status.generation and not state.problem for state in states)

    # --- The network --------------------------------------------------------------------------------------------------
    def send(self, call: Call) -> None:
        """A call leaves its sender."""
        rule = next((rule for rule in self.rules if rule.takes(call)), None)
        fate = rule.fate if rule is not None else None
        self._note(call, "" if fate is None else f" ({fate.value})")
        call.answer_lost = fate is Fate.ANSWER_LOST
        if fate is Fate.HELD:
            self.held.append(call)
        if fate is not None:
            self.later(PEER_TIMEOUT_NS, lambda: self._give_up(call))
        if fate in {None, Fate.ANSWER_LOST}:
            self.later(LATENCY_NS, lambda: self._arrive(call))

    def release(self) -> int:
        """What is held arrives, in the order in which it was sent; how many calls."""
        held, self.held = self.held, []
        self.rules = [rule for rule in self.rules if rule.fate is not Fate.HELD]
        for call in held:
            self.later(LATENCY_NS, lambda call=call: self._arrive(call))  # type: ignore[misc]
        return len(held)

    def _note(self, call: Call, remark: str) -> None:
        if call.kind != "beat" and (call.kind != "status" or call.with_snapshot):
            self.log.append(f"{call.sender} -> {call.receiver}: {describe(call)}{remark}")

    def _give_up(self, call: Call) -> None:
        if not call.done:
            call.done = True
            call.on_failure(False, "no answer came in time")

    def _arrive(self, call: Call) -> None:
        node = self.nodes[call.receiver]
        if not node.up:
            self.later(LATENCY_NS, lambda: self._fail(call, False, "connection refused"))
        elif call.body is None:
            self.feed(call.receiver, ControllerSeen())
            self._answer(call, Reply(0, node.keeper.status(call.with_snapshot)))
        else:
            body = wire.decode(type(call.body), wire.encode(call.body))
            node.call(body, lambda answer: self._answer(call, answer), self.now_ns, call.with_snapshot)
            self._collect(node)

    def _answer(self, call: Call, answer: Reply | Refuse) -> None:
        if isinstance(answer, Refuse):
            if call.kind != "beat":
                self.log.append(f"{call.receiver} refuses {call.kind}: {answer.sentence}")
            refused = 400 <= answer.status < 500
            self.later(LATENCY_NS, lambda: self._fail(call, refused, answer.sentence))
        elif not call.answer_lost:
            body = wire.decode(type(answer.body), wire.encode(answer.body))
            self.later(LATENCY_NS, lambda: self._give(call, body))

    def _give(self, call: Call, body: Any) -> None:
        if not call.done:
            call.done = True
            call.on_answer(body)

    def _fail(self, call: Call, refused: bool, reason: str) -> None:
        if not call.done and not call.answer_lost:
            call.done = True
            call.on_failure(refused, reason)

    def call_directly(self, name: str, body: Any) -> Reply | Refuse:
        """A call from outside that is answered at once, checked at the border like any other."""
        answers: list[Reply | Refuse] = []
        try:
            decoded = wire.decode(type(body), wire.encode(body))
        except RemoteError as error:
            return Refuse(0, error.status, str(error))
        self.nodes[name].call(decoded, answers.append, self.now_ns)
        self._collect(self.nodes[name])
        assert len(answers) == 1, "a call of the controller is answered at once"
        return answers[0]

    def _collect(self, node: Node) -> None:
        """Send what a node has to say."""
        said, node.outbox = node.outbox, []
        for effect in said:
            self._say(node, effect)

    def _say(self, node: Node, effect: Ask | Tell) -> None:
        life = node.life

        def feed(event: Answered | AskFailed) -> None:
            if life == node.life:
                node.feed(event, self.now_ns)
                self._collect(node)

        def answered(body: Any) -> None:
            assert not isinstance(body, LbStatus), "a peer does not answer with a status"
            if isinstance(effect, Ask):
                feed(Answered(effect.token, body))

        def failed(_: bool, reason: str) -> None:
            if isinstance(effect, Ask):
                feed(AskFailed(effect.token, reason))

        receiver = node.node_names[effect.node]
        self.send(Call(node.name, receiver, kind_of(effect.body), effect.body, answered, failed))

    # --- Time ---------------------------------------------------------------------------------------------------------
    def later(self, delay_ns: int, action: Callable[[], None]) -> None:
        """Do something after a time (in the order in which it was asked for, where times are equal)."""
        heapq.heappush(self._events, (self.now_ns + delay_ns, next(self._order), action))

    def advance(self, duration_ns: int) -> None:
        """Let time pass."""
        end_ns = self.now_ns + duration_ns
        while self._events and self._events[0][0] <= end_ns:
            at_ns, _, action = heapq.heappop(self._events)
            self.now_ns = at_ns
            action()
        self.now_ns = end_ns

    def run_until(self, reached: Callable[[], bool], within_ns: int) -> bool:
        """Let time pass until something is so; False: it did not come about."""
        start_ns = self.now_ns
        while not reached():
            passed_ns = self.now_ns - start_ns
            if passed_ns >= within_ns:
                return False
            self.advance(STEP_NS if passed_ns < 2 * SECOND_NS else 10 * STEP_NS)
        return True

    def feed(self, name: str, event: Any) -> None:
        """An event for a node's Keeper, from its own shell."""
        node = self.nodes[name]
        node.feed(event, self.now_ns)
        self._collect(node)

    def believe(self, name: str, other: str, member: int, up: bool) -> None:
        """A belief that lasts until the opposite one: no beat arrives between the two."""
        pairs = {(name, other), (other, name)}
        self.rules = [rule for rule in self.rules if rule.kind != "beat" or (rule.sender, rule.receiver) not in pairs]
        if not up:
            self.rules += [Rule("beat", sender, receiver, Fate.LOST) for sender, receiver in sorted(pairs)]
        self.feed(name, MemberSeen(member, up))

    def start(self, name: str) -> None:
        """A node's agent starts."""
        self.nodes[name].start(self.now_ns)
        self._collect(self.nodes[name])

    def _tick(self) -> None:
        for node in self.nodes.values():
            if node.up:
                node.drain(self.now_ns)
                node.feed(Tick(), self.now_ns)
                self._collect(node)
        self.plan(Tick())
        for action in self.on_tick:
            action()
        self.later(TICK_NS, self._tick)


def describe(call: Call) -> str:
    """A call in a few words."""
    body = call.body
    match body:
        case Snapshot() | PrepareCall() | CommitCall():
            return f"{call.kind} generation {body.generation}"
        case SettleCall():
            early = ", by the hosts' word" if body.early_backends and body.step is SettleStep.ASK else ""
            return f"{call.kind} VIP {body.vip}, {len(body.slots) // 2} slots{early}"
        case QuietCall():
            return f"{call.kind} VIP {body.vip}, {len(body.slots) // 2} slots, {len(body.backends) // 4} backends"
        case ResolveCall() | ForgetCall() | MissedCall():
            return f"{call.kind} {len(body.flows) // 24} flows"
    return f"{call.kind}{' with snapshot' if call.with_snapshot else ''}"


def address_of(name: str) -> bytes:
    """16 bytes of a node's address."""
    kind, number = (1, int(name[2:])) if name.startswith("lb") else (2, int(name[4:]))
    return parse_address(f"10.0.{kind}.{number}")
