"""The operator's brain: from the observed World to what is persisted, pushed, prepared and committed, and who lags.

Theory of operation
-------------------
One change is in flight at a time, and it walks: PERSISTING (the generation is written down, so that no other
controller can use it) -> STAGING (every node gets the whole snapshot) -> PREPARING (every slot that differs starts to
track) -> COMMITTING (the new table comes into force) -> IDLE. A step begins only when *all ring members* have
acknowledged the one before: that is what makes skew between LBs harmless (DESIGN section 3). What arrives meanwhile
becomes part of the next change.

Nothing is scripted per node. Each node's last answer says how far it has got, the phase says how far it may go, and
the next call follows from the two (``_call``). So lost calls, repeated ones, LBs that restart empty and a controller
that is stopped after any effect need no code of their own: whoever is behind is taken along, one call at a time.

**Starting.** The Planner keeps nothing on disk. It asks every ring member for the newest snapshot that it knows and
goes on with the newest of all: an interrupted change is finished, not undone. *No new generation is made before every
ring member has said what it knows*: ids may be in use there. What is known is driven on after START_WAIT_NS all the
same, so an LB that restarted empty is served while another one is silent. That a member has committed a generation
proves that all had prepared it.

**The ring is fixed**, so a change waits for every ring member; a silent one is reported as lagging. That is no loss of
safety, only of progress, until ring changes can take the member out.

**Nodes without an LB** (host agents) get the same three calls and are waited for until they have prepared, but for
HOST_WAIT_NS at most and not at all where they have just failed. That is safe: a host agent decides nothing about
flows. One that lags does not know a *new* backend on its node, and drops first packets for it, which their clients
send again; what it translates already goes on.

**A refused change** (4xx) can be replaced: once the World has changed, a newer generation takes its place, even half
way through a commit, for every slot that the older one touched is tracking on every ring member.

**Two controllers.** A ring member that reports a generation which is not ours, or ours with another digest, or a
persisted generation at or above ours, sends the Planner back to STARTING: it adopts what is there and goes on from
above it.

Left to the shell: clocks, sockets, the disk. Left to ``snapshot``: ids, epochs, digests.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import assert_never

import msgspec

from lbpod.core.errors import SnapshotError
from lbpod.core.limits import (
    CALL_LOST_NS,
    CHANGE_GATHER_NS,
    GENERATION_MAX,
    HOST_PROBE_NS,
    HOST_WAIT_NS,
    PROBE_NS,
    REFUSED_RETRY_NS,
    RETRY_NS,
    RETRY_NS_MAX,
    START_WAIT_NS,
)
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
    VipStatus,
    WorldSeen,
)
from lbpod.core.model import BackendState, Cluster, NextIds, Node, Snapshot, World, WorldBackend, WorldVip
from lbpod.core.snapshot import Tables, digest_of, next_snapshot, ring_problem


class Step(IntEnum):
    """How far a node has got with a snapshot, or how far it may go."""

    NOTHING = 0
    STAGED = 1
    PREPARED = 2
    COMMITTED = 3


_STEP_OF_PHASE = {Phase.STAGING: Step.STAGED, Phase.PREPARING: Step.PREPARED, Phase.COMMITTING: Step.COMMITTED}


@dataclass(frozen=True)
class _Aim:
    """A snapshot with its digest."""

    snapshot: Snapshot
    digest: bytes

    @property
    def generation(self) -> int:
        return self.snapshot.generation

    def step_of(self, status: LbStatus | None) -> Step:
        """How far the node with this status has got with this snapshot."""
        if status is None:
            return Step.NOTHING
        mine = status.staged != self.generation or status.digest == self.digest
        if mine and status.committed == self.generation:
            return Step.COMMITTED
        if mine and status.prepared == self.generation:
            return Step.PREPARED
        return Step.STAGED if mine and status.staged == self.generation else Step.NOTHING


@dataclass(slots=True)
class _Peer:
    """A node as the Planner sees it. Invariant: at most one call is under way (sent_ns >= 0)."""

    name: str
    control: str
    ring: bool
    """It is a ring member, or will be one."""
    status: LbStatus | None = None
    """Its last answer; None: unknown, or the last call failed."""
    heard: bool = False
    """It has said what it knows since the Planner started."""
    full: bool = False
    """The last question was for its snapshot."""
    full_wanted: bool = False
    """The next one has to be, though it runs no LB."""
    sent_ns: int = -1
    next_ns: int = 0
    """No call before this."""
    asked_ns: int = 0
    """When it answered last."""
    failures: int = 0
    """Calls that failed since it answered last."""
    reason: str = ""
    """Of the last failure; empty once it answers."""
    refused: str = ""
    """The sentence of the last refusal; empty once it takes a call."""


class Planner:
    """``effects = planner.step(event, now_ns)``; carry them out in their order. See the module's theory of operation.

    Invariants: an id, epoch or generation never goes back; Prepare(g) is emitted only when all ring members have staged
    g, Commit(g) only when all have prepared it or one has committed it; at most one call per node is under way.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._tables = Tables(cluster.seed)
        self._effects: list[PlannerEffect] = []
        # What is wanted.
        self._world: World | None = None
        self._wanted: World | None = None  # the World without the backends that have drained for long enough
        self._dirty_ns: int | None = None  # since when it may differ from the newest snapshot
        self._force = False  # a new generation is needed even if nothing differs
        self._drains: dict[tuple[bytes, int, int, bytes, int], int] = {}  # since when: backend of a VIP
        self._drain_end_ns: int | None = None
        # Where we are.
        self._phase = Phase.STARTING
        self._since_ns = 0  # of STARTING; of the change in flight
        self._highest = 0  # highest generation ever seen or given; the next one is above it
        self._aim: _Aim | None = None  # newest snapshot pushed or adopted
        self._allowed = Step.NOTHING  # how far nodes may go with it
        self._in_force: _Aim | None = None  # newest snapshot that a ring member has committed
        self._next: Snapshot | None = None  # being persisted
        self._persist_ns: int | None = None  # when to try again
        self._written = (0, NextIds())  # newest known to be written down, by whomever, and how far ids were given in it
        self._peers: dict[str, _Peer] = {}
        # Kept beside the peers, so that an answer costs no walk over all of them.
        self._waiting: set[str] = set()  # ring members that the phase waits for
        self._waiting_hosts: set[str] = set()
        self._lagging: set[str] = set()
        self._at_generation: set[str] = set()
        self._troubled: set[str] = set()  # those that say that something is wrong with them
        # What is said.
        self._world_problem = ""
        self._persist_problem = ""
        self._foreign_problem = ""
        self._ring_problem = ""
        self._changes = 0
        self._ours = False  # the change in flight was made here, not adopted
        self._vips: tuple[VipStatus, ...] = ()
        self._reported: PlannerStatus | None = None

    @property
    def gather_end_ns(self) -> int | None:
        """When a Tick would start a change that is being gathered; None: whenever the next Tick comes."""
        return self._dirty_ns + CHANGE_GATHER_NS if self._phase is Phase.IDLE and self._dirty_ns is not None else None

    def step(self, event: PlannerEvent, now_ns: int) -> list[PlannerEffect]:
        """What is to be done because of this event, in this order. now_ns: monotonic."""
        self._effects = []
        touched: _Peer | None = None
        phase = self._phase
        match event:
            case WorldSeen(world):
                self._see(world, now_ns)
            case LbAnswered(node, _, status):
                touched = self._answered(node, status, now_ns)
            case LbFailed(node, _, refused, reason):
                touched = self._peers.get(node)
                if touched is not None:
                    self._failed(touched, refused, reason, now_ns)
            case Persisted(generation):
                self._persisted(generation, now_ns)
            case PersistFailed():
                self._persist_failed(event, now_ns)
            case Tick():
                self._tick(now_ns)
            case _:
                assert_never(event)
        self._advance(now_ns)
        if phase is self._phase and isinstance(event, LbAnswered | LbFailed):
            if touched is not None and touched.name in self._peers:
                self._call(touched, now_ns)
        else:
            for peer in list(self._peers.values()):
                self._call(peer, now_ns)
        self._report()
        return self._effects

    # --- Events -------------------------------------------------------------------------------------------------------
    def _see(self, world: World, now_ns: int) -> None:
        if self._world is None:
            self._since_ns = now_ns
        if world != self._world:
            self._world = world
            self._drain(now_ns)
        if self._phase is Phase.STARTING:
            self._meet()

    def _drain(self, now_ns: int) -> None:
        """Recompute what is wanted: draining backends go when their time is over, counted from when they were first
        seen draining (a Planner that restarts counts anew: later is the safe side)."""
        assert self._world is not None, "there is nothing to drain before a World was seen"
        drains: dict[tuple[bytes, int, int, bytes, int], int] = {}
        ends = []
        vips: list[WorldVip] = []
        for vip in self._world.vips:
            kept: list[WorldBackend] = []
            for one in vip.backends:
                if one.state is BackendState.DRAINING:
                    key = (vip.address, vip.port, int(vip.protocol), one.address, one.port)
                    drains[key] = self._drains.get(key, now_ns)
                    end_ns = drains[key] + vip.drain_ns
                    if end_ns <= now_ns:
                        continue
                    ends.append(end_ns)
                kept.append(one)
            vips.append(vip if len(kept) == len(vip.backends) else msgspec.structs.replace(vip, backends=tuple(kept)))
        self._drains = drains
        self._drain_end_ns = min(ends, default=None)
        wanted = World(self._world.nodes, tuple(vips))
        if wanted != self._wanted:
            self._wanted = wanted
            self._dirty_ns = now_ns if self._dirty_ns is None else self._dirty_ns

    def _tick(self, now_ns: int) -> None:
        if self._drain_end_ns is not None and self._drain_end_ns <= now_ns:
            self._drain(now_ns)
        for peer in self._peers.values():
            if 0 <= peer.sent_ns <= now_ns - CALL_LOST_NS:
                self._failed(peer, False, "the call was never answered, not even by an error", now_ns)

    def _answered(self, node: str, status: LbStatus, now_ns: int) -> _Peer | None:
        peer = self._peers.get(node)
        if peer is None:
            return None
        if status.node != node:
            self._failed(peer, True, f"the agent at {peer.control} says that it is {status.node}", now_ns)
            return peer
        theirs = status.snapshot.cluster if status.snapshot is not None else self._cluster
        if theirs != self._cluster:
            sentence = f"it belongs to a cluster with VNI {theirs.vni} and seed {theirs.seed}; give this one the same"
            self._failed(peer, True, sentence, now_ns)
            return peer
        newest = _newest(status)
        tells = status.snapshot is not None or newest == 0 or not (peer.ring or peer.full_wanted)
        if self._phase is Phase.STARTING and peer.full and not tells:
            self._failed(peer, True, f"it does not say what its generation {newest} is", now_ns)
            return peer
        took_more = self._aim is not None and self._aim.step_of(status) > self._aim.step_of(peer.status)
        peer.refused = "" if took_more and peer.status is not None else peer.refused
        # While STARTING, the late answer to another call is not enough: ask again. Later, what is not newer is known.
        peer.heard = peer.heard or tells or self._phase is not Phase.STARTING
        peer.status, peer.sent_ns, peer.next_ns = status, -1, now_ns
        peer.asked_ns, peer.failures, peer.reason = now_ns, 0, ""
        self._highest = max(self._highest, newest)
        if self._phase is Phase.STARTING:
            if status.snapshot is not None:
                self._meet()
        elif self._is_foreign(status, newest):
            if peer.ring:
                self._restart(f"{node} has generation {newest} of another controller; going on from there", now_ns)
            elif self._next is None or newest >= self._next.generation:
                self._force = True  # only a newer generation can replace what this host agent has
        elif self._aim is not None and peer.ring and status.committed == self._aim.generation:
            self._in_force = self._aim
        self._note(peer, now_ns)
        return peer

    def _is_foreign(self, status: LbStatus, newest: int) -> bool:
        if self._aim is None:
            return newest > 0
        another = status.staged == self._aim.generation and status.digest != self._aim.digest
        return newest > self._aim.generation or another

    def _failed(self, peer: _Peer, refused: bool, reason: str, now_ns: int) -> None:
        peer.sent_ns = -1
        peer.status = None
        peer.failures += 1
        peer.reason = reason
        if refused:
            peer.refused = reason
            peer.next_ns = now_ns + REFUSED_RETRY_NS
        else:
            # The exponent is bounded for its own sake; RETRY_NS_MAX bounds the pause.
            peer.next_ns = now_ns + min(RETRY_NS << min(peer.failures - 1, 8), RETRY_NS_MAX)
        self._note(peer, now_ns)

    def _persisted(self, generation: int, now_ns: int) -> None:
        if self._next is None or self._next.generation != generation:
            return  # of a change that was given up meanwhile
        self._persist_problem = ""
        self._persist_ns = None
        self._written = (generation, self._next.next_ids)
        self._ours = True
        self._take(self._next, now_ns)
        self._enter(Phase.STAGING, now_ns)

    def _persist_failed(self, event: PersistFailed, now_ns: int) -> None:
        if self._next is None or self._next.generation != event.generation:
            return
        self._highest = max(self._highest, event.highest)
        if event.highest:
            self._written = (event.highest, event.next_ids)
            sentence = f"generation {event.highest} was written down by another controller; going on from there"
            self._restart(sentence, now_ns)
        else:
            self._persist_problem = f"generation {event.generation} cannot be written down: {event.reason}"
            self._persist_ns = now_ns + RETRY_NS

    # --- Phases -------------------------------------------------------------------------------------------------------
    def _advance(self, now_ns: int) -> None:
        """Go on as far as possible. Each round enters another phase or ends, and no phase is entered twice."""
        for _ in range(len(Phase) + 1):
            before = self._phase
            match before:
                case Phase.STARTING:
                    self._try_start(now_ns)
                case Phase.IDLE:
                    if self._force or (self._dirty_ns is not None and self._dirty_ns + CHANGE_GATHER_NS <= now_ns):
                        self._begin(now_ns)
                case Phase.PERSISTING:
                    if self._persist_ns is not None and self._persist_ns <= now_ns and self._next is not None:
                        self._persist_ns = None
                        self._persist(self._next)
                case Phase.STAGING | Phase.PREPARING | Phase.COMMITTING:
                    self._try_next_phase(now_ns)
                case _:
                    assert_never(before)
            if self._phase is before:
                return
        raise AssertionError("phases follow each other without end")

    def _try_start(self, now_ns: int) -> None:
        if self._world is None:
            return
        found = self._newest_reported()
        if any(peer.ring and not peer.heard for peer in self._peers.values()):
            if found is None or now_ns < self._since_ns + START_WAIT_NS:
                return
        if found is None and not self._have_asked_hosts(now_ns):
            return
        for peer in self._peers.values():
            if peer.status is not None and peer.status.snapshot is not None:
                peer.status = msgspec.structs.replace(peer.status, snapshot=None)  # megabytes, and not needed any more
        self._dirty_ns = now_ns if self._dirty_ns is None else self._dirty_ns
        if found is None:
            self._aim = self._in_force = None
            self._enter(Phase.IDLE, now_ns)
            return
        newest, conflict = found
        self._ours = False
        self._take(newest.snapshot, now_ns)
        self._force = conflict or self._highest > newest.generation
        ring = [peer.status for peer in self._peers.values() if peer.ring and peer.status is not None]
        if any(newest.step_of(status) is Step.COMMITTED for status in ring):
            self._in_force = self._aim
            self._enter(Phase.COMMITTING, now_ns)
        else:
            self._in_force = None
            self._enter(Phase.STAGING, now_ns)

    def _have_asked_hosts(self, now_ns: int) -> bool:
        """No LB knows anything. Host agents may still: of a former life, whose ids must not be given again. True if
        there is nothing left to ask; at most one of them is asked for its snapshot, the one with the highest
        generation."""
        hosts = [peer for peer in self._peers.values() if not peer.ring]
        if any(not peer.heard and peer.failures == 0 for peer in hosts) and now_ns < self._since_ns + HOST_WAIT_NS:
            return False
        heard = [(_newest(peer.status), peer.name) for peer in hosts if peer.status is not None]
        newest, name = max(heard, default=(0, ""))
        if newest <= self._written[0]:
            return True
        top = self._peers[name]
        if top.status is not None and top.status.snapshot is not None:
            self._written = (newest, top.status.snapshot.next_ids)
            return True
        top.heard, top.full_wanted = False, True
        return False

    def _newest_reported(self) -> tuple[_Aim, bool] | None:
        """The newest snapshot that a (future) ring member reports, and whether others hold another one of its
        generation. Of two of the same generation, that which has got furthest: only one can have been committed."""
        reported: dict[bytes, tuple[int, Step, _Aim]] = {}
        for peer in self._peers.values():
            if peer.ring and peer.status is not None and peer.status.snapshot is not None:
                aim = _Aim(peer.status.snapshot, digest_of(peer.status.snapshot))
                step = max(aim.step_of(peer.status), reported.get(aim.digest, (0, Step.NOTHING))[1])
                reported[aim.digest] = (aim.generation, step, aim)
        if not reported:
            return None
        _, _, newest = max(reported.values(), key=lambda one: (one[0], one[1], one[2].digest))
        return newest, sum(generation == newest.generation for generation, _, _ in reported.values()) > 1

    def _try_next_phase(self, now_ns: int) -> None:
        refused = any(self._peers[name].refused for name in self._waiting)
        gathered = self._dirty_ns is not None and self._dirty_ns + CHANGE_GATHER_NS <= now_ns
        if (self._force or (refused and gathered)) and self._begin(now_ns):
            return
        if self._waiting:
            return
        if self._phase is Phase.COMMITTING:
            self._in_force = self._aim
            self._changes += self._ours
            self._ours = False
            self._foreign_problem = ""
            self._enter(Phase.IDLE, now_ns)
        elif not self._waiting_hosts or self._since_ns + HOST_WAIT_NS <= now_ns:
            self._enter(Phase.PREPARING if self._phase is Phase.STAGING else Phase.COMMITTING, now_ns)

    def _begin(self, now_ns: int) -> bool:
        """Start a change, if there is something to change and everyone has said what they know."""
        assert self._wanted is not None, "no change without a World"
        if any(peer.ring and not peer.heard for peer in self._peers.values()):
            return False
        previous = self._aim.snapshot if self._aim is not None else None
        if previous is None or not previous.ring.members:
            if any(node.lb and node.name not in self._peers for node in self._wanted.nodes):
                self._restart("", now_ns)  # a ring is about to form: hear its members first
                return True
        if self._highest >= GENERATION_MAX:
            self._world_problem = f"generation {GENERATION_MAX} is the last that there is"
            return False
        generation = self._highest + 1
        self._dirty_ns = None
        found: Snapshot | None = None
        others = self._written[0] > (previous.generation if previous is not None else 0)
        next_ids = self._written[1] if others else None
        try:
            found = next_snapshot(self._wanted, previous, self._cluster, generation, self._tables, next_ids)
            self._world_problem = ""
            self._ring_problem = ring_problem(self._wanted, found or previous)
        except SnapshotError as error:
            self._world_problem = str(error)
        if found is None and self._force and previous is not None:
            found = msgspec.structs.replace(previous, generation=generation)
        self._force = False
        if found is None:
            return False
        self._highest = generation
        self._next = found
        self._persist(found)
        self._enter(Phase.PERSISTING, now_ns)
        return True

    def _persist(self, snapshot: Snapshot) -> None:
        """What is newer than both our base and what we know to be written has given ids that we have not heard of."""
        base = self._aim.generation if self._aim is not None else 0
        self._effects.append(Persist(snapshot.generation, snapshot, max(base, self._written[0])))

    def _enter(self, phase: Phase, now_ns: int) -> None:
        self._phase = phase
        self._allowed = _STEP_OF_PHASE.get(phase, self._allowed)
        if phase is not Phase.PERSISTING:
            self._next = None
        self._waiting.clear()
        self._waiting_hosts.clear()
        for peer in self._peers.values():
            self._note(peer, now_ns)

    def _restart(self, problem: str, now_ns: int) -> None:
        """Forget who knows what, and ask."""
        self._foreign_problem = problem
        self._persist_problem, self._persist_ns = "", None
        self._since_ns = now_ns
        for peer in self._peers.values():
            peer.status, peer.heard, peer.full_wanted = None, False, False
            peer.next_ns = max(
                peer.next_ns, now_ns + RETRY_NS
            )  # two controllers must not chase each other at full speed
        self._enter(Phase.STARTING, now_ns)
        self._meet()

    # --- Nodes --------------------------------------------------------------------------------------------------------
    def _meet(self) -> None:
        """While STARTING: whom to ask is what the World lists, and what any snapshot that was found lists."""
        assert self._world is not None, "nobody is asked before a World was seen"
        wanted = {node.name: (node.control, node.lb) for node in self._world.nodes}
        found = self._newest_reported()
        aim = found[0] if found is not None else self._aim
        if aim is not None and aim.snapshot.ring.members:
            members = {node.name: node for node in aim.snapshot.nodes if _in_ring(node, aim.snapshot)}
            wanted = {name: (control, name in members) for name, (control, _) in wanted.items()}
            wanted |= {name: (node.control, True) for name, node in members.items() if name not in wanted}
        self._keep_peers(wanted)

    def _take(self, snapshot: Snapshot, now_ns: int) -> None:
        """Aim at this snapshot."""
        self._aim = _Aim(snapshot, digest_of(snapshot))
        self._since_ns = now_ns
        self._keep_peers({node.name: (node.control, _in_ring(node, snapshot)) for node in snapshot.nodes})
        for peer in self._peers.values():
            peer.next_ns = now_ns if peer.refused else peer.next_ns  # it may take this one
        self._vips = tuple(
            VipStatus(
                vip.name,
                vip.epoch,
                sum(one.state is BackendState.READY for one in vip.backends),
                sum(one.state is BackendState.DRAINING for one in vip.backends),
            )
            for vip in snapshot.vips
        )

    def _keep_peers(self, wanted: dict[str, tuple[str, bool]]) -> None:
        kept: dict[str, _Peer] = {}
        for name, (control, ring) in wanted.items():
            peer = self._peers.get(name) or _Peer(name, control, ring)
            if peer.control != control:
                peer = _Peer(name, control, ring, sent_ns=peer.sent_ns)
            peer.ring = ring
            kept[name] = peer
        for name in self._peers.keys() - kept.keys():
            for names in (self._waiting, self._waiting_hosts, self._lagging, self._at_generation, self._troubled):
                names.discard(name)
        self._peers = kept

    def _note(self, peer: _Peer, now_ns: int) -> None:
        """Keep the sets in step with what this node has said."""
        step = self._aim.step_of(peer.status) if self._aim is not None else Step.NOTHING
        late = self._phase is Phase.STARTING and not peer.heard
        behind = late or (self._aim is not None and step < self._allowed)
        failed = peer.failures > 0 or peer.refused != ""
        left = not peer.ring and self._phase is not Phase.STARTING and self._since_ns + HOST_WAIT_NS <= now_ns
        at_last = self._phase in (Phase.STAGING, Phase.PREPARING) and not peer.ring and not failed
        _keep(self._waiting, peer.name, behind and peer.ring and self._phase in _STEP_OF_PHASE)
        _keep(self._waiting_hosts, peer.name, behind and at_last)
        _keep(self._lagging, peer.name, behind and (failed or left))
        _keep(self._troubled, peer.name, peer.status is not None and peer.status.problem != "")
        _keep(self._at_generation, peer.name, peer.ring and step is Step.COMMITTED)

    def _call(self, peer: _Peer, now_ns: int) -> None:
        """Emit the one call that is next for this node, if there is one and nothing is under way."""
        if peer.sent_ns >= 0 or now_ns < peer.next_ns:
            return
        if self._phase is Phase.STARTING:
            if not peer.heard:
                self._ask(peer, peer.ring or peer.full_wanted, now_ns)
            return
        if peer.status is None:
            self._ask(peer, False, now_ns)
            return
        aim, allowed = self._goal(peer)
        if aim is not None and _may_take(peer.status, aim):
            step = aim.step_of(peer.status)
            if step < allowed:
                body: ControlCall = aim.snapshot
                if step is Step.STAGED:
                    body = PrepareCall(aim.generation, aim.digest)
                elif step is Step.PREPARED:
                    body = CommitCall(aim.generation, aim.digest)
                peer.sent_ns = now_ns
                peer.full = False
                self._effects.append(Push(peer.name, peer.control, aim.generation, body))
                return
        if peer.asked_ns + (PROBE_NS if peer.ring else HOST_PROBE_NS) <= now_ns:
            self._ask(peer, False, now_ns)

    def _ask(self, peer: _Peer, with_snapshot: bool, now_ns: int) -> None:
        peer.sent_ns = now_ns
        peer.full = with_snapshot
        self._effects.append(AskStatus(peer.name, peer.control, with_snapshot))

    def _goal(self, peer: _Peer) -> tuple[_Aim | None, Step]:
        """What this node should have. A ring member that has nothing (it restarted empty) gets what is in force first:
        the change in flight may have to wait for somebody else."""
        assert peer.status is not None, "a node is asked before it is told"
        safe = self._in_force
        if safe is not None and safe is not self._aim and peer.ring and not peer.refused:
            if peer.status.committed == 0 and _may_take(peer.status, safe):
                return safe, Step.COMMITTED
        return self._aim, self._allowed

    # --- What is said -------------------------------------------------------------------------------------------------
    def _report(self) -> None:
        status = PlannerStatus(
            phase=self._phase,
            generation=self._aim.generation if self._aim is not None else 0,
            lbs=sum(peer.ring for peer in self._peers.values()),
            lbs_at_generation=len(self._at_generation),
            lagging=tuple(sorted(self._lagging)),
            problem=self._problem(),
            changes=self._changes,
            vips=self._vips,
        )
        if status != self._reported:
            self._reported = status
            self._effects.append(Report(status))

    def _problem(self) -> str:
        """The most important thing that is wrong, in one sentence."""
        for problem in (self._world_problem, self._persist_problem, self._foreign_problem):
            if problem:
                return problem
        lagging = [self._peers[name] for name in sorted(self._lagging)]
        for peer in lagging:
            if peer.refused:
                return f"{peer.name} refuses: {peer.refused}"
        for peer in lagging:
            if peer.ring:
                return f"waiting for {peer.name}: {peer.reason}"
        for name in sorted(self._troubled):
            status = self._peers[name].status
            assert status is not None, "a node that has said nothing has not complained"
            return f"{name}: {status.problem}"
        return self._ring_problem


def _keep(names: set[str], name: str, wanted: bool) -> None:
    if wanted:
        names.add(name)
    else:
        names.discard(name)


def _newest(status: LbStatus) -> int:
    """The highest generation that the node knows; 0: none."""
    return max(status.committed, status.prepared, status.staged)


def _may_take(status: LbStatus, aim: _Aim) -> bool:
    """A node refuses what is older than what it has staged, or as old and not the same."""
    return status.staged < aim.generation or (status.staged == aim.generation and status.digest == aim.digest)


def _in_ring(node: Node, snapshot: Snapshot) -> bool:
    return node.member in snapshot.ring.members
