"""A node as the Planner sees it: what it has said, how far it has got with a snapshot, and which call is next for it.

Pure facts and functions, apart from the Planner so that its phases can be read without them. Decided here: the order of
the steps, which step an answer means, and when silence counts. *Silence lasts from when the first call that failed was
sent until the last one failed, and two have to have failed*: nobody is lost because time has passed in which nobody
asked. A controller that was itself stopped finds all its calls timed out at once, and must not blame the others.
"""

from dataclasses import dataclass
from enum import IntEnum

import msgspec

from lbpod.core.limits import LOST_NS, MEMBER_NONE
from lbpod.core.messages import (
    CommitCall,
    ControlCall,
    HandoverCall,
    LbStatus,
    Phase,
    PrepareCall,
    RingDoneCall,
    RingPrepareCall,
    RingStep,
    RingSwitchCall,
)
from lbpod.core.model import Cluster, Node, Snapshot
from lbpod.core.snapshot import digest_of


class Step(IntEnum):
    """How far a node has got with a snapshot, or how far it may go. HANDED and SWITCHED: where it changes the ring."""

    NOTHING = 0
    STAGED = 1
    PREPARED = 2
    HANDED = 3
    SWITCHED = 4
    COMMITTED = 5


STEP_OF_PHASE = {
    Phase.STAGING: Step.STAGED,
    Phase.PREPARING: Step.PREPARED,
    Phase.COMMITTING: Step.COMMITTED,
    Phase.RING_PREPARING: Step.PREPARED,
    Phase.HANDING_OVER: Step.HANDED,
    Phase.SWITCHING: Step.SWITCHED,
    Phase.RING_ENDING: Step.COMMITTED,
}
"""How far nodes are to get in a phase."""


@dataclass(frozen=True)
class Aim:
    """A snapshot with its digest."""

    snapshot: Snapshot
    digest: bytes

    @property
    def generation(self) -> int:
        return self.snapshot.generation

    @property
    def changes_ring(self) -> bool:
        return bool(self.snapshot.ring.before)

    @property
    def brings_somebody_in(self) -> bool:
        """An LB joins: host agents have to open their door to it."""
        ring = self.snapshot.ring
        return self.changes_ring and not set(ring.members) <= set(ring.before)

    def step_of(self, status: LbStatus | None, handover: int = 0) -> Step:
        """How far the node with this status has got with this snapshot. handover: the round that counts (0: any)."""
        if status is None or (status.staged == self.generation and status.digest != self.digest):
            return Step.NOTHING
        if status.committed == self.generation:
            return Step.SWITCHED if status.ring_step is RingStep.SWITCHED else Step.COMMITTED
        if status.prepared == self.generation:
            handed = status.ring_step is RingStep.HANDED and handover in {0, status.ring_round}
            return Step.HANDED if handed else Step.PREPARED
        return Step.STAGED if status.staged == self.generation else Step.NOTHING

    def call_after(self, step: Step, handover: int, lost: tuple[int, ...]) -> ControlCall:
        """The call that takes a node from this step to the next."""
        generation, digest = self.generation, self.digest
        if step is Step.NOTHING:
            return self.snapshot
        if not self.changes_ring:
            call = PrepareCall if step is Step.STAGED else CommitCall
            return call(generation, digest)
        if step is Step.STAGED:
            return RingPrepareCall(generation, digest)
        if step is Step.PREPARED:
            return HandoverCall(generation, digest, handover, lost)
        return RingSwitchCall(generation, digest) if step is Step.HANDED else RingDoneCall(generation, digest)


@dataclass(frozen=True)
class Role:
    """What a node is to the cluster.

    old: of the ring that the aim follows upon, where it changes the ring; new: of the aim's ring (before there is any:
    it may become one of the first). lb: the World lists it as an LB, so it may join. known: it is in the aim.
    """

    control: str
    member: int = MEMBER_NONE
    old: bool = False
    new: bool = False
    lb: bool = False
    known: bool = True


@dataclass(slots=True)
class Peer:
    """A node as the Planner sees it. Invariants: status is None or said; at most one call under way (sent_ns >= 0)."""

    name: str
    role: Role
    status: LbStatus | None = None
    """Its last answer; None: unknown, or the last call failed."""
    said: LbStatus | None = None
    """Its last answer, whatever failed since; None: it has never answered."""
    heard: bool = False
    """It has said what it knows since the Planner started."""
    waited: bool = False
    """The Planner has given up waiting for that."""
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
    silent_ns: int = 0
    """When the first of them was sent; meaningful where failures > 0."""
    failed_ns: int = 0
    """When the last of them failed; likewise."""
    reason: str = ""
    """Of the last failure; empty once it answers."""
    refused: str = ""
    """The sentence of the last refusal; empty once it takes a call."""
    was_step: bool = False
    """What was sent last rests on something that was sent before."""
    doubted: bool = False
    """It has refused since it last took a call."""
    left_open: RingDoneCall | None = None
    """What ends the ring change that it has switched to, where that is known."""
    foreign_ns: int | None = None
    """Since when it has something newer than ours, though it is no member."""
    barred_ns: int = 0
    """It does not join before this: it has refused to."""

    @property
    def ring(self) -> bool:
        """It takes part in what ring members have to agree on."""
        return self.role.old or self.role.new

    @property
    def is_lb(self) -> bool:
        """It is in the ring, or may join it."""
        return self.ring or self.role.lb

    @property
    def is_gone(self) -> bool:
        """It has been silent for so long that the others go on without it."""
        return self.is_silent(LOST_NS)

    def is_silent(self, for_ns: int) -> bool:
        """It has not answered for so long, and not only once."""
        return self.failures > 1 and self.silent_ns + for_ns <= self.failed_ns

    def sent(self, now_ns: int, *, full: bool = False, is_step: bool = False) -> None:
        """A question for its status (full: and its snapshot), a push, or a step that rests on what was pushed."""
        self.sent_ns, self.full, self.was_step = now_ns, full, is_step

    def answered(self, status: LbStatus, now_ns: int) -> None:
        self.status = self.said = status
        if status.ring_step is not RingStep.SWITCHED:
            self.left_open = None
        elif status.staged == status.committed:
            self.left_open = RingDoneCall(status.committed, status.digest)
        elif status.in_force is not None:
            self.left_open = RingDoneCall(status.committed, digest_of(status.in_force))
        self.sent_ns, self.asked_ns, self.next_ns = -1, now_ns, now_ns
        self.failures, self.reason = 0, ""

    def stands_by_refusal(self) -> bool:
        """Not where it refuses a step for the first time: the agent that had taken what goes before may have died, and
        that with it. It is asked what it has first, and pushed to again."""
        stands = self.doubted or not self.was_step
        self.doubted = True
        return stands

    def forget_snapshots(self) -> None:
        """They are megabytes, and have been looked at."""
        if self.said is not None and (self.said.snapshot is not None or self.said.in_force is not None):
            self.said = msgspec.structs.replace(self.said, snapshot=None, in_force=None)
            self.status = self.said if self.status is not None else None

    def failed(self, reason: str, next_ns: int, now_ns: int, *, is_there: bool) -> None:
        """is_there: it has answered, if only to refuse."""
        if self.failures == 0 or is_there:
            self.silent_ns = self.sent_ns if self.sent_ns >= 0 and not is_there else now_ns
        self.sent_ns, self.status, self.failed_ns = -1, None, now_ns
        self.failures += 1
        self.reason, self.next_ns = reason, next_ns


def newest_of(status: LbStatus) -> int:
    """The highest generation that the node knows; 0: none."""
    return max(status.committed, status.prepared, status.staged)


def why_not(peer: Peer, status: LbStatus, cluster: Cluster, *, starting: bool) -> str:
    """One sentence where this answer counts as a refusal; else empty."""
    if status.node != peer.name:
        return f"the agent at {peer.role.control} says that it is {status.node}"
    theirs = status.snapshot.cluster if status.snapshot is not None else cluster
    if theirs != cluster:
        return f"it belongs to a cluster with VNI {theirs.vni} and seed {theirs.seed}; give this one the same"
    newest = newest_of(status)
    tells = status.snapshot is not None or newest == 0 or not (peer.is_lb or peer.full_wanted)
    if starting and peer.full and not tells:
        return f"it does not say what its generation {newest} is"
    return ""


def may_take(status: LbStatus, aim: Aim) -> bool:
    """A node refuses what is older than what it has staged, or as old and not the same."""
    return status.staged < aim.generation or (status.staged == aim.generation and status.digest == aim.digest)


def has_left_open(status: LbStatus, aim: Aim) -> bool:
    """A change of the ring that is over has not been ended there: one change after the other."""
    return status.ring_step is RingStep.SWITCHED and status.committed < aim.generation


def has_moved(status: LbStatus, before: LbStatus | None) -> bool:
    """The node has got somewhere, or become something, that decisions depend on."""
    return before is None or _standing(status) != _standing(before)


def _standing(status: LbStatus) -> tuple[object, ...]:
    return (
        *(status.committed, status.prepared, status.staged, status.digest),
        *(status.ring_step, status.ring_round, status.serving, status.leaving, status.given_up),
    )


def in_ring(node: Node, snapshot: Snapshot) -> bool:
    """It is a member of the snapshot's ring."""
    return node.member in snapshot.ring.members
