"""A node of the toy cluster, and what is written down about all of them, to be compared with what was promised.

A node keeps the rules of the calls as the Keeper does (DESIGN sections 3 to 5): refuse what is older, or as old and not
the same; prepare what is staged; commit what is prepared; prepare a change of the ring only on top of what it follows
upon, and end one before the next; hand over, once asked, to all who will be members, but those who are said to be lost.
What is handed over is only who had something to give: each member its name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lbpod.core.limits import MARGIN_NS, MEMBER_NONE
from lbpod.core.messages import (
    CommitCall,
    ControlCall,
    HandoverCall,
    LbStatus,
    PrepareCall,
    RingDoneCall,
    RingPrepareCall,
    RingStep,
    RingSwitchCall,
)
from lbpod.core.model import Snapshot
from lbpod.core.snapshot import digest_of

BAD_PORT = 666
"""A backend with this port is one that some LBs refuse to prepare."""


class RefusedError(Exception):
    """The toy's 4xx."""


def _names(snapshot: Snapshot, members: Iterable[int]) -> set[str]:
    wanted = set(members)
    return {node.name for node in snapshot.nodes if node.member in wanted}


def names_in_ring(snapshot: Snapshot) -> set[str]:
    """Names of its ring's members."""
    return _names(snapshot, snapshot.ring.members)


def _meaning(snapshot: Snapshot) -> dict[int, object]:
    """What each backend's id stands for."""
    return {one.id: (vip.id, one.address, one.port) for vip in snapshot.vips for one in vip.backends}


class Ledger:
    """What has happened, and what must not. strict_ids: nodes look whether an id changes its meaning."""

    def __init__(self, *, strict_ids: bool) -> None:
        self.strict_ids = strict_ids
        self._snapshots: dict[int, Snapshot] = {}
        self._prepared: set[tuple[str, int, bytes]] = set()
        self._committed: dict[int, bytes] = {}
        self._vips_in_force: list[object] = []
        self._handed: dict[tuple[str, int], int] = {}
        self._round: dict[int, int] = {}
        self._switched_ns: dict[tuple[str, int], int] = {}

    def persisted(self, snapshot: Snapshot) -> None:
        """It may be pushed from now on."""
        self._snapshots[snapshot.generation] = snapshot

    def prepared(self, name: str, snapshot: Snapshot) -> None:
        self._prepared.add((name, snapshot.generation, digest_of(snapshot)))

    def called(self, generation: int, number: int) -> None:
        """A round of the handover has been asked for."""
        self._round[generation] = max(self._round.get(generation, 0), number)

    def handed(self, name: str, generation: int, number: int) -> None:
        self._handed[name, generation] = max(self._handed.get((name, generation), 0), number)

    def ring_peers(self, generation: int) -> set[str]:
        """Who takes part in a change of the ring."""
        snapshot = self._snapshots[generation]
        return _names(snapshot, (*snapshot.ring.members, *snapshot.ring.before))

    def committed(self, lb: "ToyLb", snapshot: Snapshot) -> None:
        """Called by a node that is about to commit."""
        digest = digest_of(snapshot)
        if snapshot.vips not in self._vips_in_force:
            for name in sorted(names_in_ring(snapshot)):
                assert (name, snapshot.generation, digest) in self._prepared, (
                    f"{lb.name} commits {snapshot.generation}, which {name} has never prepared"
                )
            self._vips_in_force.append(snapshot.vips)
        self._one_state(lb, snapshot, digest)

    def switched(self, lb: "ToyLb", snapshot: Snapshot, now_ns: int) -> None:
        """Called by a node that is about to switch."""
        ring, mine = snapshot.ring, {node.name: node.member for node in snapshot.nodes}.get(lb.name)
        others = _names(snapshot, set(ring.before) - lb.handed_lost) - {lb.name}
        if mine in ring.members and not set(ring.before) | set(ring.members) <= {*lb.handed_lost, mine}:
            assert others <= lb.got, f"{lb.name} switches without what {sorted(others - lb.got)} had to hand over"
        self._switched_ns.setdefault((lb.name, snapshot.generation), now_ns)
        self._one_state(lb, snapshot, digest_of(snapshot))

    def _one_state(self, lb: "ToyLb", snapshot: Snapshot, digest: bytes) -> None:
        before = self._committed.setdefault(snapshot.generation, digest)
        assert before == digest, "two states of one generation"
        assert lb.committed is None or lb.committed.generation < snapshot.generation, "a generation went back"
        went_back = lb.committed is not None and lb.committed.ring.epoch > snapshot.ring.epoch
        assert not went_back or lb.name not in names_in_ring(snapshot), "a ring epoch went back"

    def check_first_switch(self, generation: int, peers: set[str]) -> None:
        """peers: those that are not lost."""
        if any(number == generation for _, number in self._switched_ns):
            return
        assert peers, "a ring change goes on with nobody"
        for name in sorted(peers):
            assert self._handed.get((name, generation), 0) == self._round[generation], (
                f"somebody is to switch to {generation}, and {name} has not handed over in the last round"
            )

    def check_first_end(self, generation: int, peers: set[str], now_ns: int) -> None:
        """peers: those that are not lost."""
        for name in sorted(peers):
            assert (name, generation) in self._switched_ns, f"{generation} is to end, and {name} has not switched"
            passed_ns = now_ns - self._switched_ns[name, generation]
            assert passed_ns >= MARGIN_NS, f"{generation} is to end {passed_ns} ns after {name} has switched"

    def check_ids(self, lbs: Iterable["ToyLb"]) -> None:
        """An id means the same in every snapshot in force at any member. (Host agents are not asked for theirs when a
        controller starts: 4,096 of them would send 16 GB. So if all LBs lose their memory at once, ids start anew.)"""
        serving = [lb.committed for lb in lbs if lb.committed is not None and lb.serving]
        newest = max((snapshot.ring.epoch for snapshot in serving), default=0)
        meaning: dict[tuple[str, int], object] = {}
        for snapshot in serving:
            for vip in snapshot.vips if snapshot.ring.epoch == newest else ():
                key = (vip.address, vip.port, vip.protocol)
                assert meaning.setdefault(("vip", vip.id), key) == key, "a VIP's id was given twice"
                for one in vip.backends:
                    named = (key, one.address, one.port)
                    assert meaning.setdefault(("backend", one.id), named) == named, "a backend's id was given twice"


@dataclass
class ToyLb:
    """What a node remembers, and the rules by which it takes a call. got: from whom it has what it will own."""

    name: str
    picky: bool = False
    is_up: bool = True
    leaving: bool = False
    given_up: tuple[int, ...] = ()
    staged: Snapshot | None = None
    prepared: Snapshot | None = None
    committed: Snapshot | None = None
    step: RingStep = RingStep.NONE
    round: int = 0
    handed_lost: frozenset[int] = frozenset()
    got: set[str] = field(default_factory=set)

    # --- Calls --------------------------------------------------------------------------------------------------------
    def take(self, body: ControlCall | None, lbs: Mapping[str, "ToyLb"], ledger: Ledger, now_ns: int) -> None:
        match body:
            case Snapshot():
                self._stage(body, ledger)
            case PrepareCall() | RingPrepareCall():
                self._prepare(body, ledger)
            case CommitCall():
                if not self._has_committed(body):
                    snapshot = self._ready(body)
                    ledger.committed(self, snapshot)
                    self.committed, self.prepared, self.step = snapshot, None, RingStep.NONE
            case HandoverCall():
                self._hand_over(body, lbs, ledger)
            case RingSwitchCall():
                if not self._has_committed(body):
                    snapshot = self._ready(body)
                    if self.staged is not None and self.staged.generation > body.generation:
                        raise RefusedError("something newer is staged here")
                    if self.step is not RingStep.HANDED:
                        raise RefusedError("nothing has been handed over here")
                    ledger.switched(self, snapshot, now_ns)
                    self.committed, self.prepared, self.step = snapshot, None, RingStep.SWITCHED
            case RingDoneCall():
                if self.committed is None or self.committed.generation != body.generation:
                    raise RefusedError(f"{body.generation} is not switched to here")
                self.step, self.round = RingStep.NONE, 0
            case None:
                pass

    def _has_committed(self, call: CommitCall | RingSwitchCall) -> bool:
        return self.committed is not None and self.committed.generation == call.generation

    def _ready(self, call: CommitCall | RingSwitchCall | HandoverCall) -> Snapshot:
        if self.prepared is None or self.prepared.generation != call.generation:
            raise RefusedError(f"generation {call.generation} is not prepared here")
        return self.prepared

    def _stage(self, new: Snapshot, ledger: Ledger) -> None:
        if self.staged is not None and (
            new.generation < self.staged.generation
            or (new.generation == self.staged.generation and digest_of(new) != digest_of(self.staged))
        ):
            raise RefusedError(f"generation {self.staged.generation} is staged here")
        for known in (self.committed, self.prepared) if ledger.strict_ids else ():
            meaning = _meaning(new)
            for number, thing in _meaning(known).items() if known is not None else ():
                if meaning.get(number, thing) != thing:
                    raise RefusedError(f"id {number} means something else here")
        self.staged = new

    def _prepare(self, call: PrepareCall | RingPrepareCall, ledger: Ledger) -> None:
        new = self.staged
        for known in (self.committed, self.prepared):
            if known is not None and known.generation >= call.generation:
                if known.generation > call.generation:
                    raise RefusedError(f"{self.name} is at {known.generation} already")
                return
        if new is None or (new.generation, digest_of(new)) != (call.generation, call.digest):
            raise RefusedError(f"generation {call.generation} is not staged here")
        if self.step is RingStep.SWITCHED:
            raise RefusedError("a ring change has not ended here")
        if self.picky and any(one.port == BAD_PORT for vip in new.vips for one in vip.backends):
            raise RefusedError("the table has another digest here")
        assert bool(new.ring.before) is isinstance(call, RingPrepareCall), "each kind of change has its own call"
        if isinstance(call, RingPrepareCall):
            if self.name in _names(new, new.ring.before):
                if self.committed is None or self.committed.vips != new.vips:
                    raise RefusedError("what is in force is not committed here")
            elif self.name in names_in_ring(new):
                self.committed = None
            self.got = set()
        self.prepared, self.round, self.handed_lost = new, 0, frozenset()
        self.step = RingStep.PREPARED if new.ring.before else RingStep.NONE
        ledger.prepared(self.name, new)

    # --- The handover -------------------------------------------------------------------------------------------------
    def _hand_over(self, call: HandoverCall, lbs: Mapping[str, "ToyLb"], ledger: Ledger) -> None:
        if self.step is RingStep.SWITCHED and self.committed is not None:
            if self.committed.generation == call.generation:
                return
        snapshot = self._ready(call)
        assert snapshot.ring.before, "only a change of the ring hands anything over"
        if call.round < self.round:
            raise RefusedError(f"round {call.round} is over here")
        ledger.called(call.generation, call.round)
        if call.round > self.round or self.step is not RingStep.HANDED:
            self.round, self.step, self.handed_lost = call.round, RingStep.PREPARED, frozenset(call.lost)
        self.tick(lbs, ledger)

    def tick(self, lbs: Mapping[str, "ToyLb"], ledger: Ledger) -> None:
        """Hand over to whoever can take it."""
        snapshot = self.prepared
        if not self.is_up or snapshot is None or self.step is not RingStep.PREPARED or not self.round:
            return
        receivers = _names(snapshot, set(snapshot.ring.members) - self.handed_lost) - {self.name}
        has_all = True
        for name in sorted(receivers) if self.name in _names(snapshot, snapshot.ring.before) else ():
            has_all &= lbs[name].receive(self.name, snapshot)
        if has_all:
            self.step = RingStep.HANDED
            ledger.handed(self.name, snapshot.generation, self.round)

    def receive(self, sender: str, snapshot: Snapshot) -> bool:
        """A page; True if it is taken."""
        done = self.committed is not None and self.committed.generation == snapshot.generation
        ready = self.prepared is not None and self.prepared.generation == snapshot.generation
        if self.is_up and ready:
            self.got.add(sender)
        return self.is_up and (ready or done)

    # --- What it says -------------------------------------------------------------------------------------------------
    def member_in(self, snapshot: Snapshot | None) -> int:
        nodes = snapshot.nodes if snapshot is not None else ()
        return next((node.member for node in nodes if node.name == self.name), MEMBER_NONE)

    @property
    def newest(self) -> int:
        return self.staged.generation if self.staged else 0

    @property
    def serving(self) -> bool:
        if self.committed is None:
            return False
        if self.prepared is not None and self.step in {RingStep.PREPARED, RingStep.HANDED}:
            return self.name in _names(self.prepared, self.prepared.ring.before)
        return self.name in names_in_ring(self.committed)

    def status(self, with_snapshot: bool) -> LbStatus:
        in_force = self.committed if self.committed is not self.staged else None
        return LbStatus(
            node=self.name,
            member=self.member_in(self.prepared or self.committed or self.staged),
            committed=self.committed.generation if self.committed else 0,
            prepared=self.prepared.generation if self.prepared else 0,
            staged=self.staged.generation if self.staged else 0,
            digest=digest_of(self.staged) if self.staged else b"",
            ring_epoch=self.committed.ring.epoch if self.committed else 0,
            tracking_slots=0,
            ring_step=self.step,
            ring_round=self.round,
            serving=self.serving,
            leaving=self.leaving,
            given_up=self.given_up,
            snapshot=self.staged if with_snapshot else None,
            in_force=in_force if with_snapshot else None,
        )

    def restart(self, *, empty: bool) -> None:
        """kill -9; empty: and nothing is found again."""
        if empty:
            self.staged = self.prepared = self.committed = None
            self.step, self.round, self.got, self.leaving = RingStep.NONE, 0, set(), False
            return
        self.staged = self.prepared or self.committed
        if self.step is RingStep.HANDED:
            self.step = RingStep.PREPARED
        self.round, self.handed_lost = 0, frozenset()
