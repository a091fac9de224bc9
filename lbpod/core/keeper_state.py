"""What one LB's brain knows, and the few questions that all of its parts ask of it.

Why apart from ``keeper.py``: the parts (``change``, ``resolve``, ``settle``, ``forget``, ``quiet``) decide, each
about one thing, on one state; here the state is written down once, with its invariants beside its fields. Nothing is
decided here but what follows from the snapshots: who is alive, who owns a slot, which numbers a VIP has.

**Questions.** What the Keeper asks of its shell or of a peer carries a token; what it wants to do with the answer is
kept as a ``Question`` until then. A shell gives exactly one answer; one that has not come after CALL_LOST_NS counts
as failed. So nothing waits for ever, and all that is open is bounded (QUEUE_MAX in all, OUTSTANDING_MAX to one node).

**The mirror.** ``VipState.slots`` is what the maps hold, or will hold once they take writes again. Decisions are made
on the mirror. ``Unwritten`` names what a failed effect has left to be written; it is written whole before anything
more is acknowledged (``keeper``).
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt

from lbpod.core.flows import Facts, window_ns
from lbpod.core.host_state import HostState
from lbpod.core.keeper_watch import Watch
from lbpod.core.limits import (
    BACKEND_IDS_MAX,
    BEATS_MAX,
    BEATS_OPEN_MAX,
    CALL_LOST_NS,
    MEMBER_NONE,
    OUTSTANDING_MAX,
    QUEUE_MAX,
    SLOT_COUNT,
    VIPS_MAX,
)
from lbpod.core.messages import (
    Configure,
    KeeperEffect,
    LbStatus,
    NatLooked,
    PeerAnswer,
    RecordsDumped,
    RecordsLooked,
    RecordsPut,
    RingStep,
    SeenRead,
    StateCall,
    WriteOwnership,
    WriteSlots,
)
from lbpod.core.model import Backend, Snapshot, Vip
from lbpod.core.ownership import Member, backups, owners, ownership
from lbpod.core.snapshot import Tables, digest_of
from lbpod.core.transition import Slots, base_of, current_of, is_tracking

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

Effects = list[KeeperEffect]
Answer = PeerAnswer | RecordsLooked | RecordsDumped | RecordsPut | NatLooked | SeenRead
Ids = tuple[int, ...] | None
Endpoint = tuple[int, bytes, int]
"""What a backend id names: (VIP id, address, port)."""


class Question(ABC):
    """Something asked, and what is done with the answer. Exactly one of the methods is called, once each time."""

    @abstractmethod
    def answered(self, state: "State", answer: Answer, now_ns: int) -> Effects:
        """An answer came. One of another kind than asked for is a failure."""

    @abstractmethod
    def failed(self, state: "State", reason: str, now_ns: int) -> Effects:
        """None will come."""

    def untaken(self, state: "State", reason: str, now_ns: int) -> Effects:
        """None will come, and nobody has acted on the question."""
        return self.failed(state, reason, now_ns)


@dataclass(frozen=True, slots=True)
class _Open:
    question: Question
    asked_at_ns: int
    node: int
    """0: the shell itself."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A snapshot that has been accepted, with the tables that it needs."""

    snapshot: Snapshot
    digest: bytes
    tables: dict[int, U32] = field(default_factory=dict)
    """VIP id -> table. Staged: those built for it. Prepared: exactly those that commit will write."""

    @property
    def generation(self) -> int:
        """The snapshot's."""
        return self.snapshot.generation

    @property
    def changes_ring(self) -> bool:
        """It takes the ring from one to another, and changes nothing else."""
        return bool(self.snapshot.ring.before)


class Phase(Enum):
    """Where a round of settling stands."""

    HOSTS = "host agents have been asked"
    LOOKING = "the slots are flagged, the stamps are being read"
    ASKING = "backups have been asked"


@dataclass(slots=True)
class Round:
    """One attempt to settle slots of a VIP, as their owner. At most one per VIP at a time."""

    epoch: int
    phase: Phase
    asked_at_ns: int
    """When the host agents were asked."""
    early_slots: U32
    """Slots that host agents were asked about, ascending."""
    early_quiet: Bools
    """(len(early_slots),): no host agent that has answered has seen a live flow; False where one cannot tell."""
    early_backends: U32
    """The backends that they could tell about, every slot of the round about every one but its own current."""
    looked_ns: int = 0
    """When the slots that may be quiet were flagged, and this LB looked at its stamps."""
    waiting: int = 0
    """Answers that are still to come."""
    settled: int = 0
    """Slots that it has settled or rebased so far."""
    void: bool = False
    """A handover has made the bases of all replicas equal since: answers that are still to come say nothing more."""


@dataclass(slots=True)
class VipState:
    """One VIP that this LB serves, or will serve once a prepared change is committed."""

    id: int
    slots: Slots = field(default_factory=Slots)
    vip: Vip | None = None
    """Its definition whose table ``current`` is; None: of no one definition (not committed yet, or a crash came
    between)."""
    lease_ns: int = 0
    """Longest lease that may still run: of the largest idle time that the VIP had while it was tracking."""
    round: Round | None = None
    scan_at_ns: int = 0
    scan_pause_ns: int = 0
    early_at_ns: int = 0
    early_pause_ns: int = 0
    look_at_ns: int = 0
    turn_ns: int = 0
    """When its slots were last looked at because something was due: where many are, VIPs take turns (``settle``)."""
    early_all: bool = False
    """A backup has refused what hosts vouched for: the next round asks about every backend of the VIP."""
    early_turn: int = 0
    """Which host agents come first, where there are more than can be asked at one time."""
    owed_at_ns: int = 0
    """From then on no question that was asked before can still be acted upon: the backup may be asked what it owes."""
    owing: int = 0
    """Backups that have been asked that and have not answered. Invariant: while there are some, there is no round."""
    lifted: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, dtype=np.uint32))
    """Own slots whose flag (SETTLING) is off while the backup, which owes an answer, is silent. Ascending."""


@dataclass(slots=True)
class Dumps:
    """Lists of all records that are asked for (``forget``)."""

    is_open: bool = False
    """One has been asked for."""
    done_ns: int = 0
    """When the last one was asked for that has been worked through."""
    at_ns: int = 0
    """When the next one may be asked for."""
    forget_at_ns: int = 0
    """When the next one is due to find what may be forgotten."""
    seen_any: bool = False
    """The one at hand has had a record in it."""


@dataclass(slots=True, eq=False)
class Handover:
    """What this LB hands over in one round of a ring change (``handover``)."""

    generation: int
    round: int
    lost: frozenset[int]
    words: dict[int, Iterator[StateCall]] = field(default_factory=dict)
    """Receiver -> pages with words that have not been sent; without an entry: all are. Made when they are sent."""
    records: dict[int, deque[StateCall]] = field(default_factory=dict)
    """Receiver -> pages with records, of what has been listed, that have not been sent. Invariant: none is empty."""
    again: list[tuple[int, StateCall]] = field(default_factory=list)
    """Receivers, and pages that did not arrive."""
    under_way: dict[int, int] = field(default_factory=dict)
    """Receiver -> pages that wait for its answer. Invariant: 1..HANDOVER_PAGES_MAX."""
    looking: bool = False
    """Records are being listed: the next slice has been asked for."""
    rest: Question | None = None
    """Who goes on with the list, and waits until some of what is listed has been sent."""
    cursor: tuple[bool, int] | None = None
    """Where; None: nothing has been listed."""
    waiting: list[tuple[int, int]] = field(default_factory=list)
    """Requests of the controller that wait for the end, and since when."""
    sent_count: int = 0
    """Records that have arrived."""


@dataclass(slots=True)
class Unwritten:
    """What a failed effect has left to be written, from the mirror, before anything is acknowledged again."""

    vips: set[int] = field(default_factory=set)
    deleted: set[int] = field(default_factory=set)
    configure: bool = False
    ownership: bool = False
    remember: bool = False
    flows: bool = False
    """All leases and records are to go."""
    reason: str = ""

    def __bool__(self) -> bool:
        return bool(self.vips or self.deleted or self.configure or self.ownership or self.remember or self.flows)


class State:
    """All that one Keeper knows. The parts of the Keeper change it; nothing else does."""

    rest_at_ns = 0
    """When ``rest`` looks again."""

    def __init__(self, node_name: str) -> None:
        self.node_name: Final = node_name
        self.committed: Plan | None = None
        self.prepared: Plan | None = None
        self.staged: Plan | None = None
        """Invariant: committed <= prepared <= staged by generation, where they are there; staged is there if any is."""
        self.vips: dict[int, VipState] = {}
        """Invariant: empty unless this node is in the ring of the committed or the prepared snapshot."""
        self.tables: Tables | None = None
        self.member: int = MEMBER_NONE
        """This node's member id by the newest of committed and prepared (Planner: it never changes in a ring)."""

        self.own: U32 | None = None
        """Ownership as written to the maps; None: not yet."""
        self.next: U32 | None = None
        """Ownership by the ring to come. Invariant: not None iff ring_step is PREPARED or HANDED and this is an LB."""
        self.prev: U32 | None = None
        """Ownership by the ring before. Invariant: not None iff ring_step is SWITCHED and this is an LB."""
        self.rings: dict[tuple[Member, ...], U32] = {}
        """Ownership of the rings that own, next and prev follow from."""
        self.ring_step = RingStep.NONE
        """Invariant: PREPARED or HANDED only while `prepared` changes the ring, SWITCHED only where `committed` did."""
        self.ring_round = 0
        """Round of the last handover that is done here, of the ring change that is prepared."""
        self.handover: Handover | None = None
        """What is being handed over. Invariant: None unless ring_step is PREPARED."""
        self.foreign_due = False
        """Records of slots of which this LB is no replica could not be dropped."""
        self.leaving = False
        """This LB asks to be taken out of the ring."""
        self.owner: U16 = np.full(SLOT_COUNT, MEMBER_NONE, dtype=np.uint16)
        self.backup: U16 = self.owner.copy()
        self.replicas_changed_ns: U64 | None = None
        """When a slot's replicas last changed; None: never since they were first known."""
        self.down: set[int] = set()
        """Members that this LB believes to be down. Never this one."""
        self.given_up: set[int] = set()
        """Those of them that nothing is sent to any more. Invariant: a subset of ``down``."""
        self.watch = Watch()

        self.alive: Bools = np.zeros(BACKEND_IDS_MAX, dtype=np.bool_)
        """Invariant: exactly the backends of the committed and the prepared snapshot."""
        self.vip_of: U32 = np.zeros(BACKEND_IDS_MAX, dtype=np.uint32)
        """VIP of each backend that is alive, else 0."""
        self.facts = Facts()
        """Of the VIPs of the committed and the prepared snapshot."""
        self.node_of_member: dict[int, int] = {}
        self.resting: dict[int, tuple[Endpoint, int]] = {}
        """Backend ids that have died here: what they named, and when. Not to be used again while in here."""
        self.died_at_ns = 0
        """When a backend last died here."""
        self.purge: dict[int, U64] = {}
        """VIP -> (SLOT_COUNT,) when slots settled whose records are still to be dropped (0: none)."""
        self.purge_kept: dict[int, U32] = {}
        """Beside ``purge``: backends whose records stay all the same (0: none)."""
        self.purging: dict[int, U64] = {}
        """What the DropRecords of the last list stand for, in case the last of them fails."""
        self.dumps = Dumps()
        self.records_quiet = True
        """No slot has been tracking since a list of records came back empty."""

        self.host = HostState()
        self.unwritten = Unwritten()
        self.confirmed = (0, 0, RingStep.NONE)
        """(committed, prepared, ring_step) as last written; reported while something is unwritten."""
        self._open: dict[int, _Open] = {}
        self._outstanding: dict[int, int] = {}
        self._next_token = 1

    # --- Questions ----------------------------------------------------------------------------------------------------
    def open(self, question: Question, now_ns: int, node: int = 0) -> int:
        """Keep a question until its answer comes; returns its token."""
        token = self._next_token
        self._next_token += 1
        self._open[token] = _Open(question, now_ns, node)
        if node:
            self._outstanding[node] = self._outstanding.get(node, 0) + 1
        return token

    def close(self, token: int) -> Question | None:
        """Take out the question of a token; None: it is not open (any more)."""
        found = self._open.pop(token, None)
        if found is None:
            return None
        if found.node:
            self._outstanding[found.node] -= 1
            if not self._outstanding[found.node]:
                del self._outstanding[found.node]
        return found.question

    def has_room(self, node: int = 0) -> bool:
        """May another question be asked (of this node)?"""
        return len(self._open) < QUEUE_MAX and self._outstanding.get(node, 0) < OUTSTANDING_MAX

    def lost(self, now_ns: int) -> list[int]:
        """Tokens whose answers have not come in time."""
        # Tokens ascend with time, so the oldest are in front.
        found = []
        for token, entry in self._open.items():
            if entry.asked_at_ns + CALL_LOST_NS > now_ns:
                break
            found.append(token)
        return found

    # --- Snapshots ----------------------------------------------------------------------------------------------------
    @property
    def newest(self) -> Plan | None:
        """The newest of committed and prepared: what this LB must be able to serve."""
        return self.prepared or self.committed

    @property
    def generation(self) -> int:
        """Generation in force; 0: none."""
        return self.committed.generation if self.committed is not None else 0

    @property
    def is_calm(self) -> bool:
        """A snapshot is in force, nothing newer has been prepared, no ring change is under way and this LB is not
        fenced: the only time when slots may settle."""
        quiet = self.prepared is None and self.ring_step is RingStep.NONE
        return quiet and self.committed is not None and not self.watch.fenced_why

    def plans(self) -> list[Plan]:
        """Prepared and committed, newest first."""
        return [plan for plan in (self.prepared, self.committed) if plan is not None]

    def in_ring(self, snapshot: Snapshot) -> bool:
        """Does this node take part as an LB? In a ring change also who leaves takes part, until it is done."""
        member, ring = self.member_in(snapshot), snapshot.ring
        is_done = self.committed is not None and snapshot is self.committed.snapshot
        is_done &= self.ring_step is not RingStep.SWITCHED
        return member in ring.members or (member in ring.before and not is_done)

    def joins(self, snapshot: Snapshot) -> bool:
        """Is this LB new to the ring with this snapshot?"""
        member, ring = self.member_in(snapshot), snapshot.ring
        return bool(ring.before) and member in ring.members and member not in ring.before

    @property
    def is_serving(self) -> bool:
        """This LB is in the ring that is in force here: it has, or shares, the state of its slots."""
        if self.committed is None:
            return False
        if self.prepared is not None and self.ring_step in {RingStep.PREPARED, RingStep.HANDED}:
            return self.member in self.prepared.snapshot.ring.before
        return self.in_ring(self.committed.snapshot)

    def member_in(self, snapshot: Snapshot) -> int:
        """This node's member id in a snapshot; MEMBER_NONE where it has none."""
        return next((node.member for node in snapshot.nodes if node.name == self.node_name), MEMBER_NONE)

    def find_vip(self, vip_id: int) -> Vip | None:
        """A VIP by the newest snapshot that has it."""
        for plan in self.plans():
            for vip in plan.snapshot.vips:
                if vip.id == vip_id:
                    return vip
        return None

    def refresh(self) -> None:
        """Bring what follows from the snapshots up to date. Call it whenever committed or prepared has changed."""
        plans = self.plans()
        newest = plans[0].snapshot if plans else None
        self.member = self.member_in(newest) if newest is not None else MEMBER_NONE
        seed = newest.cluster.seed if newest is not None else 0
        self.facts = Facts((vip for plan in reversed(plans) for vip in plan.snapshot.vips), seed)
        self.node_of_member = {
            node.member: node.id
            for plan in reversed(plans)
            for node in plan.snapshot.nodes
            if node.member != MEMBER_NONE
        }
        self.alive, self.vip_of = np.zeros_like(self.alive), np.zeros_like(self.vip_of)
        for plan in plans:
            for vip in plan.snapshot.vips:
                ids = np.array([one.id for one in vip.backends], dtype=np.int64)
                self.alive[ids], self.vip_of[ids] = True, vip.id
        # The same backend has its id again: a controller that has lost everything goes on from an older state.
        self.resting = {number: known for number, known in self.resting.items() if not self.alive[number]}
        for vs in self.vips.values():
            lease = int(self.facts.lease_ns[vs.id])
            vs.lease_ns = max(vs.lease_ns, lease) if vs.slots.track is not None else lease
            self.facts.window_ns[vs.id] = window_ns(int(self.facts.idle_ns[vs.id]), vs.lease_ns)

    def configure(self) -> Configure:
        """The effect that writes all but slots."""
        members = {
            member for plan in self.plans() for member in (*plan.snapshot.ring.members, *plan.snapshot.ring.before)
        }
        return Configure(
            committed=self.committed.snapshot if self.committed is not None else None,
            prepared=self.prepared.snapshot if self.prepared is not None else None,
            alive=frozenset(np.flatnonzero(self.alive).tolist()),
            members_up=frozenset(members - self.down),
            ring_done=self.ring_step is not RingStep.SWITCHED,
            members_doubted=frozenset(members & self.down - self.given_up),
        )

    def write(self, vs: VipState, slots: U32) -> Effects:
        """The effect that brings changed slots from the mirror into the maps; none where none changed."""
        return [WriteSlots(vs.id, slots, vs.slots.at(slots))] if len(slots) else []

    # --- Slots and replicas -------------------------------------------------------------------------------------------
    def update_ring(self, now_ns: int) -> Effects:
        """Owner and backup of each slot follow from the snapshots and the step of a ring change; the effect that writes
        them, none where they are as before.

        Where the replicas of a slot have changed, the quiet time counts anew: whoever left may have seen what others
        have not.
        """
        rings: dict[tuple[Member, ...], U32] = {}
        own, next_, prev = (self._ownership(ring, rings) for ring in self._rings())
        before = (self.own, self.next, self.prev)
        self.own, self.next, self.prev, self.rings = own, next_, prev, rings
        if own is None or all(a is b for a, b in zip(before, (own, next_, prev), strict=True)):
            self.owner, self.backup = (self.owner, self.backup) if own is not None else _nobody()
            return []
        self.owner, self.backup = owners(own), backups(own)
        stamps = self.replicas_changed_ns
        for old in (before[0], before[2]):
            if old is not None and old is not own and (old != own).any():
                stamps = np.zeros(SLOT_COUNT, dtype=np.uint64) if stamps is None else stamps
                stamps[old != own] = now_ns
        self.replicas_changed_ns = stamps
        return [WriteOwnership(own, next_, prev)]

    def _rings(self) -> tuple[Ids, Ids, Ids]:
        """Members whose rings own, next and prev follow from; None: from none."""
        newest = self.newest
        if newest is None or not any(self.in_ring(plan.snapshot) for plan in self.plans()):
            return None, None, None
        ring = newest.snapshot.ring
        match self.ring_step:
            case RingStep.NONE if self._joining(newest) is not None:
                return self._joining(newest), None, None
            case RingStep.PREPARED | RingStep.HANDED:
                return ring.before, ring.members, None
            case RingStep.SWITCHED if self.committed is not None:
                # A backend generation is not prepared before the ring change is done.
                return self.committed.snapshot.ring.members, None, self.committed.snapshot.ring.before
        return ring.members, None, None

    def _joining(self, newest: Plan) -> Ids:
        """The ring that this LB is to join, where it has dropped what it knew for that (``ring.stage``) and has not
        prepared it yet. It may still count itself in an earlier ring, by which it decides nothing any more."""
        plan = self.staged
        if plan is None or plan.generation <= newest.generation or not self.joins(plan.snapshot):
            return None
        return plan.snapshot.ring.before

    def _ownership(self, members: Ids, rings: dict[tuple[Member, ...], U32]) -> U32 | None:
        newest = self.newest
        if newest is None or members is None:
            return None
        nodes = (node for node in newest.snapshot.nodes if node.member in members)
        ring = tuple(sorted(Member(node.member, node.address) for node in nodes))
        found = self.rings.get(ring)
        rings[ring] = ownership(ring, newest.snapshot.cluster.seed) if found is None else found
        return rings[ring]

    def is_up(self, members: U16) -> Bools:
        """(n,): which of these are members that are not believed to be down."""
        up: Bools = members != MEMBER_NONE
        return up & ~np.isin(members, sorted(self.down)) if self.down else up

    def peer(self, slots: U32) -> U16:
        """The replica to ask about each slot: the owner where it is up and not this LB, else the backup, or nobody."""
        result = np.full(len(slots), MEMBER_NONE, dtype=np.uint16)
        for members in (self.backup[slots], self.owner[slots]):
            fits = self.is_up(members) & (members != self.member)
            result[fits] = members[fits]
        return result

    def is_replica(self, slots: U32) -> Bools:
        """(n,): does this LB have what there is to know of the slot? One that is a replica by `next` alone does not:
        the handover may not be over."""
        replica: Bools = (self.owner[slots] == self.member) | (self.backup[slots] == self.member)
        if self.prev is not None:
            replica |= (owners(self.prev[slots]) == self.member) | (backups(self.prev[slots]) == self.member)
        return replica

    def window_ns(self, vs: VipState) -> int:
        """How long slots of a VIP must have been quiet."""
        return int(self.facts.window_ns[vs.id])

    def is_unannounced(self, vs: VipState) -> bool:
        """Nobody can tell its flows' first packets (UDP, ClientIP)."""
        return bool(self.facts.unannounced[vs.id])

    def orphaned(self, vips: U32, slots: U32) -> Bools:
        """(n,): slots of many VIPs whose unrecorded flows are dead (see Track)."""
        orphaned = np.zeros(len(slots), dtype=np.bool_)
        for vip_id in np.flatnonzero(np.bincount(vips[vips < VIPS_MAX])).tolist():
            vs = self.vips.get(vip_id)
            if vs is not None and vs.slots.track is not None:
                places = vips == vip_id
                orphaned[places] = vs.slots.track.orphaned[slots[places]]
        return orphaned

    def words(self, vips: U32, slots: U32) -> tuple[U64, Bools]:
        """Words of slots of many VIPs, and which VIPs this LB serves (elsewhere 0)."""
        words, held = np.zeros(len(slots), dtype=np.uint64), np.zeros(len(slots), dtype=np.bool_)
        for vip_id in np.flatnonzero(np.bincount(vips[vips < VIPS_MAX])).tolist():
            vs = self.vips.get(vip_id)
            if vs is not None:
                places = vips == vip_id
                words[places], held[places] = vs.slots.at(slots[places]), True
        return words, held

    # --- For people and controllers -----------------------------------------------------------------------------------
    def confirm(self) -> None:
        """What came before has been written: had it failed, the next event would have said so."""
        if not self.unwritten:
            prepared = self.prepared.generation if self.prepared is not None else 0
            self.confirmed = self.generation, prepared, self.ring_step

    def status(self, with_snapshot: bool = False) -> LbStatus:
        """Where this LB stands. What was not written yet does not count."""
        committed, prepared = self.generation, self.prepared.generation if self.prepared is not None else 0
        ring_step = self.ring_step
        if self.unwritten:
            committed, prepared, ring_step = self.confirmed
        known = self.newest or self.staged
        tracking = tuple((one, vs.slots.tracking_count) for one, vs in sorted(self.vips.items()) if vs.slots.track)
        return LbStatus(
            node=self.node_name,
            member=self.member_in(known.snapshot) if known is not None else MEMBER_NONE,
            committed=committed,
            prepared=prepared,
            staged=self.staged.generation if self.staged is not None else 0,
            digest=self.staged.digest if self.staged is not None else b"",
            ring_epoch=self.newest.snapshot.ring.epoch if self.newest is not None else 0,
            tracking_slots=sum(count for _, count in tracking),
            tracking=tracking,
            ring_step=ring_step,
            ring_round=self.handover.round if self.handover is not None else self.ring_round,
            serving=self.is_serving,
            leaving=self.leaving,
            given_up=tuple(sorted(self.given_up | self.watch.given_up_before)),
            problem=self._problem(),
            snapshot=self.staged.snapshot if with_snapshot and self.staged is not None else None,
            in_force=self._in_force_besides(committed) if with_snapshot else None,
        )

    def _in_force_besides(self, committed: int) -> Snapshot | None:
        """What is in force, and written, where the newest snapshot is another."""
        plan, staged = self.committed, self.staged
        if plan is None or plan.generation != committed or (staged and staged.generation == committed):
            return None
        return plan.snapshot

    def _problem(self) -> str:
        return f"writing to the datapath failed: {self.unwritten.reason}" if self.unwritten else self.watch.fenced_why

    def check_invariants(self) -> None:
        """Raise AssertionError where one does not hold."""
        generations = [plan.generation for plan in (self.committed, self.prepared, self.staged) if plan is not None]
        assert generations == sorted(generations), "committed <= prepared <= staged"
        assert not generations or self.staged is not None, "what is prepared or committed has been staged"
        assert not self.vips or any(self.in_ring(plan.snapshot) for plan in self.plans()), "only an LB holds slots"
        assert self.member not in self.down, "an LB believes in itself"
        assert self.given_up <= self.down, "nobody is given up who is not down"
        beats = self.watch.open.values()
        assert all(0 < count <= BEATS_OPEN_MAX for count in beats) and sum(beats) <= BEATS_MAX, "beats are bounded"
        assert len(self._open) <= QUEUE_MAX + BEATS_MAX, "questions are bounded"
        assert all(0 < count <= OUTSTANDING_MAX for count in self._outstanding.values()), "questions are bounded"
        listed = sorted({one.id for plan in self.plans() for vip in plan.snapshot.vips for one in vip.backends})
        assert listed == np.flatnonzero(self.alive).tolist(), "alive: the backends of committed and prepared"
        assert not self.alive[sorted(self.resting)].any(), "a resting id names nobody"
        for vip_id, vs in self.vips.items():
            assert vip_id == vs.id, "VIPs are filed under their ids"
            vs.slots.check_invariants(self.alive)
            current, tracking = current_of(vs.slots.words), is_tracking(vs.slots.words)
            both = np.concatenate([current, base_of(vs.slots.words)])
            assert (self.vip_of[both[both != 0]] == vip_id).all(), "a slot holds backends of its own VIP"
            assert vs.round is None or self.committed is not None, "nothing settles before the first commit"
            assert self.prepared is not None or vs.slots.track is None or not vs.slots.track.touched.any(), (
                "slots are touched only while a change is prepared"
            )
            assert not (tracking & (self.own is None)).any(), "a tracking slot has replicas to ask"
        self._check_ring()

    def _check_ring(self) -> None:
        changing = self.ring_step in {RingStep.PREPARED, RingStep.HANDED}
        assert not changing or (self.prepared is not None and self.prepared.changes_ring), "a ring change is prepared"
        if self.ring_step is RingStep.SWITCHED:
            assert self.committed is not None and self.committed.changes_ring, "a ring change is switched to"
            assert self.prepared is None, "nothing is prepared before a ring change is done"
        takes_part = self.own is not None
        assert (self.next is not None) == (takes_part and changing), "next is there while a ring change is prepared"
        assert (self.prev is not None) == (takes_part and self.ring_step is RingStep.SWITCHED), (
            "prev is there until done"
        )
        assert self.handover is None or self.ring_step is RingStep.PREPARED, "only what is prepared is handed over"


def _nobody() -> tuple[U16, U16]:
    nobody = np.full(SLOT_COUNT, MEMBER_NONE, dtype=np.uint16)
    return nobody, nobody.copy()


def plan_of(snapshot: Snapshot) -> Plan:
    """A plan without tables (they are added while it is staged)."""
    return Plan(snapshot, digest_of(snapshot))


def same_table(one: tuple[Backend, ...], other: tuple[Backend, ...]) -> bool:
    """Do these eligible backends make the same table, ids and all?"""
    return [(b.id, b.address, b.port, b.weight) for b in one] == [(b.id, b.address, b.port, b.weight) for b in other]
