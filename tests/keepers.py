"""A cluster of real Keepers in one process: real rules, maps in memory, a network that may lose and delay, virtual
time.

Each node is a Keeper, the agent's own ``Applier`` and a ``MemoryDatapath``, and packets are decided by the oracle: only
sockets and clocks are missing. What is said travels as bytes (``wire``). After each event the Keeper's invariants are
checked. Every die is thrown by the ``Random`` that the cluster is given, so a number replays a run.

Left to the tests: who changes what when, and what is promised. The controller here is three calls to everybody, in the
order of the law (nobody commits what not everybody has prepared) unless a test wants otherwise.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any, Final, get_args

import numpy as np
import numpy.typing as npt

from lbpod.core import oracle, wire
from lbpod.core.keeper import Keeper
from lbpod.core.limits import BATCH_MAX, CALL_LOST_NS, PEER_TIMEOUT_NS, TICK_NS
from lbpod.core.messages import (
    Answered,
    Ask,
    AskFailed,
    BeatAnswer,
    BeatCall,
    Called,
    CommitCall,
    ControlCall,
    DatapathEffect,
    DumpRecords,
    EffectsFailed,
    KeeperEffect,
    KeeperEvent,
    LbStatus,
    MemberSeen,
    PeerCall,
    PendingDrained,
    PrepareCall,
    Refuse,
    Remember,
    Reply,
    Restored,
    SettleAnswer,
    Tell,
    Tick,
    Trace,
)
from lbpod.core.model import (
    Affinity,
    Backend,
    BackendState,
    Cluster as ClusterOf,
    Protocol,
    Snapshot,
    World,
    WorldBackend,
    WorldNode,
    WorldVip,
    parse_address,
)
from lbpod.core.ownership import backups, owners
from lbpod.core.snapshot import Tables, VipKey, digest_of, eligible, next_snapshot
from lbpod.core.table import Table
from lbpod.core.transition import base_of, current_of, is_tracking, round_of
from lbpod.datapath.apply import Applier, found_in
from lbpod.datapath.memory import MemoryDatapath, MemoryHops
from lbpod.datapath.rows import Uplink

U32 = npt.NDArray[np.uint32]
Rows = npt.NDArray[Any]

SECOND_NS: Final = 1_000_000_000
START_NS: Final = 1_000 * SECOND_NS
CLUSTER: Final = ClusterOf(vni=7, seed=20_260)
VIP_ADDRESS: Final = parse_address("203.0.113.10")
HOSTS: Final = ("host1", "host2")
IFINDEX: Final = 0
LOOK_AGAIN_NS: Final = 1_000_000
"""How often an answer is looked for that is not there at once."""
SLICE_MAX: Final = 7
"""Flows that a node lists in one go: few, so that nearly every list comes in several."""

_CAN_FAIL: Final = (*get_args(DatapathEffect), Remember)


class SharedTables(Tables):
    """Tables that all Keepers of all tests share: each is built once."""

    _made: Final[dict[object, Table]] = {}

    def table(self, key: VipKey, backends: Sequence[Backend]) -> Table:
        made = self._made.get((key, eligible(backends)))
        if made is None:
            made = self._made[key, eligible(backends)] = super().table(key, backends)
        return made


def never(effect: KeeperEffect) -> bool:
    """No effect fails."""
    return False


def is_beat(effect: KeeperEffect) -> bool:
    """It changes nothing, and there are very many of them."""
    return isinstance(effect, Ask | Reply) and isinstance(effect.body, BeatCall | BeatAnswer)


class Node:
    """One node: a Keeper, its shell in a few lines, and its maps."""

    def __init__(self, name: str, address: bytes) -> None:
        self.name, self.address = name, address
        self.datapath = MemoryDatapath(slice_max=SLICE_MAX)
        self.fails: Callable[[KeeperEffect], bool] = never
        """Which effects the datapath (or the disk) refuses."""
        self.holds_lists = False
        """Lists of records do not go on by themselves: see ``go_on``."""
        self.held: list[DumpRecords] = []
        self.tick_at_ns = 0
        """When the next tick is due: while nothing tracks not every TICK_NS, as in an agent."""
        self.outbox: list[Ask | Tell] = []
        self.answers: dict[int, Reply | Refuse] = {}
        self.traces: list[Trace] = []
        self.effects: list[KeeperEffect] = []
        """Everything that was carried out."""
        self.remembered = Remember(None, None)
        self._numbers = itertools.count(1)
        self._start()

    def _start(self) -> None:
        uplink = Uplink("eth0", IFINDEX, bytes(6), 1_600, self.address)
        self.keeper = Keeper(self.name)
        self.keeper._state.tables = SharedTables(CLUSTER.seed)
        self.applier = Applier(self.datapath, self.name, uplink, MemoryHops(IFINDEX))

    def restart(self, now_ns: int) -> None:
        """The agent dies and starts again; the maps stay, and so does what was remembered."""
        self._start()
        found = found_in(self.datapath)
        kept = self.remembered
        restored = Restored(kept.committed, kept.prepared, found.slots, kept.ring_done, found.down, found.given_up)
        self.feed(restored, now_ns)

    def lose_everything(self) -> None:
        """The machine dies and starts again: no maps, no memory."""
        self.datapath = MemoryDatapath(slice_max=SLICE_MAX)
        self.remembered = Remember(None, None)
        self._start()

    def feed(self, event: KeeperEvent, now_ns: int) -> None:
        """One event, and all that follows from it at once."""
        todo = [event]
        while todo:
            effects = self.keeper.step(todo.pop(0), now_ns)
            if any(not is_beat(effect) for effect in effects):
                self.keeper.check_invariants()
            todo += self.carry_out(effects)

    def go_on(self, now_ns: int, fails: bool = False) -> None:
        """The next slice of each list that was held, or the answer that it cannot be read."""
        held, self.held = self.held, []
        for effect in held:
            self.feed(EffectsFailed(effect, (), "no") if fails else self._answer_of(effect), now_ns)

    def _answer_of(self, effect: DumpRecords) -> KeeperEvent:
        answer = self.applier.apply(effect)
        assert answer is not None, "a question has an answer"
        return answer

    def carry_out(self, effects: Sequence[KeeperEffect]) -> list[KeeperEvent]:
        following: list[KeeperEvent] = []
        for place, effect in enumerate(effects):
            if self.holds_lists and isinstance(effect, DumpRecords) and effect.cursor is not None:
                self.held.append(effect)
                continue
            if isinstance(effect, _CAN_FAIL) and self.fails(effect):
                return [*following, EffectsFailed(effect, tuple(effects[place + 1 :]), "the map says no")]
            self.effects.append(effect)
            event = self._perform(effect)
            if event is not None:
                following.append(event)
        return following

    def _perform(self, effect: KeeperEffect) -> KeeperEvent | None:
        match effect:
            case Ask() | Tell():
                self.outbox.append(effect)
            case Reply() | Refuse():
                assert effect.request not in self.answers, "a request is answered once"
                self._check_written(effect)
                self.answers[effect.request] = effect
            case Remember():
                self.remembered = effect
            case Trace():
                self.traces.append(effect)
            case _:
                datapath_effect: DatapathEffect = effect
                return self.applier.apply(datapath_effect)
        return None

    def _check_written(self, answer: Reply | Refuse) -> None:
        """What is acknowledged is in the maps."""
        if isinstance(answer, Reply) and isinstance(answer.body, LbStatus | SettleAnswer):
            for number, vs in self.keeper._state.vips.items():
                assert (vs.slots.words == self.words(number)).all(), f"{self.name} acknowledges what is not written"

    def begin(self, body: ControlCall | PeerCall, now_ns: int) -> int:
        """Call this node; the answer will be found in `answers` under this number."""
        number = next(self._numbers)
        self.feed(Called(number, body), now_ns)
        return number

    def call(self, body: ControlCall | PeerCall, now_ns: int) -> Reply | Refuse:
        """Call this node; the answer must be there at once."""
        return self.answers.pop(self.begin(body, now_ns))

    def drain(self, now_ns: int) -> None:
        """Take pending flows out of the map."""
        flows, values = self.datapath.pending_drain(BATCH_MAX)
        if len(flows):
            self.feed(PendingDrained(flows, values), now_ns)

    # --- What a test asks ---
    @property
    def status(self) -> LbStatus:
        return self.keeper.status()

    def words(self, vip: int = 1) -> npt.NDArray[np.uint64]:
        return self.datapath.read_slots(vip)

    def rounds(self, slots: U32, vip: int = 1) -> U32:
        """What records and leases that are made now are marked with."""
        return round_of(self.words(vip)[slots])

    def current(self, vip: int = 1) -> U32:
        return current_of(self.words(vip))

    def base(self, vip: int = 1) -> U32:
        return base_of(self.words(vip))

    def tracking(self, vip: int = 1) -> npt.NDArray[np.bool_]:
        return is_tracking(self.words(vip))

    def owned(self) -> npt.NDArray[np.bool_]:
        """(SLOT_COUNT,): slots that this LB owns."""
        return np.asarray(owners(self.datapath.maps.own) == self.status.member, dtype=np.bool_)

    def backed(self) -> npt.NDArray[np.bool_]:
        """(SLOT_COUNT,): slots that this LB backs."""
        return np.asarray(backups(self.datapath.maps.own) == self.status.member, dtype=np.bool_)


class Cluster:
    """LBs and hosts, the network between them, and the time."""

    def __init__(self, lbs: int = 3, random: Random | None = None, loss: float = 0.0, delay_ns_max: int = 0) -> None:
        self.random = random or Random(0)
        self.loss, self.delay_ns_max = loss, delay_ns_max
        self.lbs = tuple(f"lb{number}" for number in range(1, lbs + 1))
        names = (*self.lbs, *HOSTS)
        self.nodes = {name: Node(name, address_of(name)) for name in names}
        self.now_ns = START_NS
        self.generation = 0
        self.snapshot: Snapshot | None = None
        self.blocked: Callable[[str, str, PeerCall], bool] = lambda sender, receiver, body: False
        """Which calls (from, to, what) never arrive."""
        self.muted: Callable[[str, str, PeerCall], bool] = lambda sender, receiver, body: False
        """Which calls arrive, but their answers get lost."""
        self.untaken = False
        """It is certain of calls that never arrive that nobody has acted on them."""
        self.agentless: set[str] = set()
        """Machines without an agent: they refuse connections to it, and call nobody."""
        self.apart: set[frozenset[str]] = set()
        """Pairs between which no beat arrives."""
        self._tables = SharedTables(CLUSTER.seed)
        self._mail: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    @property
    def muxes(self) -> list[Node]:
        return [self.nodes[name] for name in self.lbs]

    # --- The controller ---
    def plan(self, *vips: WorldVip) -> Snapshot:
        """The next snapshot that wants these VIPs (the generation grows even if nothing changes)."""
        nodes = [WorldNode(name, node.address, f"{name}:9900", name in self.lbs) for name, node in self.nodes.items()]
        self.generation += 1
        made, _ = next_snapshot(World(tuple(nodes), vips), self.snapshot, CLUSTER, self.generation, self._tables)
        assert made is not None, "a plan changes something"
        self.snapshot = made
        return made

    def stage(self, snapshot: Snapshot, names: Iterable[str] | None = None) -> None:
        self._each(snapshot, names)

    def prepare(self, snapshot: Snapshot, names: Iterable[str] | None = None) -> None:
        self._each(PrepareCall(snapshot.generation, digest_of(snapshot)), names)

    def commit(self, snapshot: Snapshot, names: Iterable[str] | None = None) -> None:
        self._each(CommitCall(snapshot.generation, digest_of(snapshot)), names)

    def _each(self, body: Snapshot | PrepareCall | CommitCall, names: Iterable[str] | None) -> None:
        for name in names or self.nodes:
            answer = self.nodes[name].call(body, self.now_ns)
            assert isinstance(answer, Reply), answer
            self._collect(self.nodes[name])

    def change(self, *vips: WorldVip) -> Snapshot:
        """A whole change at one moment."""
        snapshot = self.plan(*vips)
        self.stage(snapshot)
        self.prepare(snapshot)
        self.commit(snapshot)
        return snapshot

    # --- Network and time ---
    def later(self, at_ns: int, action: Callable[[], None]) -> None:
        """Do something at a time (in the order in which it was asked for, where times are equal)."""
        heapq.heappush(self._mail, (at_ns, next(self._order), action))

    def believe_down(self, name: str, member: int) -> None:
        """This LB takes a member for down from now on."""
        self.feed(name, MemberSeen(member, up=False))

    def feed(self, name: str, event: KeeperEvent) -> None:
        self.nodes[name].feed(event, self.now_ns)
        self._collect(self.nodes[name])

    def believe(self, name: str, member: int, up: bool) -> None:
        """An LB believes a member to be down, and goes on believing it, until it believes it to be up."""
        for node in self.muxes:
            if node.status.member == member and node.name != name:
                (self.apart.discard if up else self.apart.add)(frozenset({name, node.name}))
        self.feed(name, MemberSeen(member, up))

    def run(self, duration_ns: int, tick: bool = True) -> None:
        """Let time pass: calls arrive, agents tick and drain."""
        end_ns = self.now_ns + duration_ns
        while self.now_ns < end_ns:
            next_ns = min(self.now_ns + TICK_NS, end_ns)
            while self._mail and self._mail[0][0] <= next_ns:
                at_ns, _, action = heapq.heappop(self._mail)
                self.now_ns = max(self.now_ns, at_ns)
                action()
            self.now_ns = next_ns
            for node in self.nodes.values() if tick else ():
                node.drain(self.now_ns)
                if self.now_ns >= node.tick_at_ns or node.status.tracking_slots:
                    node.feed(Tick(), self.now_ns)
                    node.tick_at_ns = self.now_ns + node.keeper.pause_ns(self.now_ns)
                self._collect(node)

    def deliver(self) -> None:
        """Everything that is under way now arrives, and what follows from it, without time passing (but for losses)."""
        while self._mail and self._mail[0][0] <= self.now_ns:
            heapq.heappop(self._mail)[2]()

    def _collect(self, node: Node) -> None:
        """Send what a node has to say."""
        outbox, node.outbox = node.outbox, []
        for effect in outbox:
            self._send(node, effect)

    def _send(self, sender: Node, effect: Ask | Tell) -> None:
        receiver = self._node_of(effect.node)
        asked_at_ns = self.now_ns
        lost = self.blocked(sender.name, receiver.name, effect.body) or self.random.random() < self.loss
        lost |= sender.name in self.agentless
        lost |= isinstance(effect.body, BeatCall) and frozenset({sender.name, receiver.name}) in self.apart
        body = wire.decode(type(effect.body), wire.encode(effect.body))

        is_refused = not lost and receiver.name in self.agentless

        def fail() -> None:
            if isinstance(effect, Ask):
                untaken = is_refused or (self.untaken and lost)
                self.feed(sender.name, AskFailed(effect.token, "silence", untaken, is_refused))

        def arrive() -> None:
            number = receiver.begin(body, self.now_ns)
            self._collect(receiver)
            wait(number)

        def wait(number: int) -> None:
            if number in receiver.answers:
                return reply(receiver.answers.pop(number))
            assert self.now_ns <= asked_at_ns + PEER_TIMEOUT_NS + CALL_LOST_NS, "every call is answered"
            return self.later(self.now_ns + LOOK_AGAIN_NS, lambda: wait(number))

        def reply(answer: Reply | Refuse) -> None:
            at_ns = self.now_ns + self._delay_ns()
            if not isinstance(effect, Ask):
                return
            if isinstance(answer, Refuse):
                self.later(at_ns, fail)
            elif (
                self.muted(sender.name, receiver.name, effect.body)
                or self.random.random() < self.loss
                or at_ns > asked_at_ns + PEER_TIMEOUT_NS
            ):
                self.later(asked_at_ns + PEER_TIMEOUT_NS, fail)
            else:
                answered = wire.decode(type(answer.body), wire.encode(answer.body))
                assert not isinstance(answered, LbStatus), "a peer does not answer with a status"
                self.later(at_ns, lambda: self.feed(sender.name, Answered(effect.token, answered)))

        if is_refused:
            self.later(asked_at_ns, fail)
        elif lost:
            self.later(asked_at_ns + PEER_TIMEOUT_NS, fail)
        else:
            self.later(self.now_ns + self._delay_ns(), arrive)

    def _delay_ns(self) -> int:
        return self.random.randrange(self.delay_ns_max + 1)

    def _node_of(self, number: int) -> Node:
        assert self.snapshot is not None, "a node is called by a number of the snapshot"
        return next(self.nodes[node.name] for node in self.snapshot.nodes if node.id == number)

    # --- Packets ---
    def walk(self, frame: bytes, entry: str) -> tuple[str, bytes] | None:
        """Send a frame from the router into an LB and follow it: (node, frame for its stack), None where it is
        dropped."""
        at = self.nodes[entry]
        for _ in range(16):
            outcome = oracle.xdp(at.datapath.maps, frame, IFINDEX, self.now_ns)
            if outcome.action is oracle.Action.PASS:
                return at.name, outcome.frame
            if outcome.action is oracle.Action.DROP:
                return None
            frame = outcome.frame
            address = frame[30:34]
            at = next(node for node in self.nodes.values() if node.address[12:] == address)
        raise AssertionError("a packet ends")


def address_of(name: str) -> bytes:
    """16 bytes of a node's address."""
    kind, number = (1, int(name[2:])) if name.startswith("lb") else (2, int(name[4:]))
    return parse_address(f"10.0.{kind}.{number}")


def pod_address(number: int) -> bytes:
    """16 bytes of a pod's address."""
    return parse_address(f"10.244.0.{number}")


def vip(
    ready: Iterable[int],
    draining: Iterable[int] = (),
    *,
    protocol: Protocol = Protocol.TCP,
    idle_s: int = 8,
    port: int = 80,
    affinity: Affinity = Affinity.NONE,
    weight: int = 1,
) -> WorldVip:
    """A VIP whose backends are pods by number; odd ones run on host1, even ones on host2."""
    states = [(number, BackendState.READY) for number in ready] + [(n, BackendState.DRAINING) for n in draining]
    backends = (WorldBackend(pod_address(n), 8080, HOSTS[1 - n % 2], weight, state) for n, state in states)
    name = f"shop/{protocol.name.lower()}/{port}"
    idle_ns = idle_s * SECOND_NS
    return WorldVip(name, VIP_ADDRESS, port, protocol, affinity, idle_ns, 60 * SECOND_NS, tuple(backends))
