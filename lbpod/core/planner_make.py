"""The next generation: from what is wanted, and from what is in force, to the snapshot that is to be persisted.

Decided here: upon what a new snapshot follows. One of the backends follows upon the newest that was pushed, whose ids
live on in it. One that changes the ring follows upon what is *in force*, for it changes nothing else; so does the one
that takes such a change back. Left to the Planner: when, and at which generation.
"""

from collections.abc import Iterable

import msgspec

from lbpod.core.errors import SnapshotError
from lbpod.core.messages import VipStatus, place_of
from lbpod.core.model import BackendState, Cluster, NextIds, Ring, Snapshot, World
from lbpod.core.planner_peers import Aim, Peer
from lbpod.core.planner_ring import (
    Where,
    before_change,
    first_ring,
    members_of,
    wanted_ring,
    without_joins,
)
from lbpod.core.planner_roster import Roster
from lbpod.core.snapshot import Tables, next_snapshot, once_more, ring_snapshot


class Maker:
    """Makes snapshots of one cluster. problem: why the World cannot be served, in one sentence; empty: it can.
    waiting_count: VIPs that are not as the World wants them, for the last snapshot of it had enough to do with others.
    written: newest generation known to be written down, by whomever, and how far ids were given in it."""

    def __init__(self, cluster: Cluster) -> None:
        self.problem = ""
        self.waiting_count = 0
        self.written = (0, NextIds())
        self._cluster = cluster
        self._tables = Tables(cluster.seed)

    def note_written(self, peers: Iterable[Peer]) -> None:
        """Whatever a node tells was written down by somebody, and gave numbers."""
        for peer in peers:
            told = peer.status.snapshot if peer.status is not None else None
            if told is not None and told.generation > self.written[0]:
                self.written = (told.generation, told.next_ids)

    def backends(self, world: World, where: Where, roster: Roster, generation: int, *, force: bool) -> Snapshot | None:
        """What the World wants, where that differs. force: where it does not, the same once more."""
        previous = where.aim.snapshot if where.aim is not None else None
        first: frozenset[str] | None = None
        if is_first_ring(where, roster):
            first = self.first_members(world, roster)
            if previous is not None and previous.ring.members:  # superseded before it was in force
                previous = msgspec.structs.replace(previous, ring=Ring(0))
        found: Snapshot | None = None
        in_force = where.in_force.generation if where.in_force is not None else None
        next_ids = self._next_ids(previous) if previous is None or self.written[0] > previous.generation else None
        try:
            found, self.waiting_count = next_snapshot(
                world, previous, self._cluster, generation, self._tables, next_ids, first, in_force
            )
            self.problem = ""
        except SnapshotError as error:
            self.problem, self.waiting_count = str(error), 0
        if found is None and force and previous is not None:
            return once_more(previous, previous, generation)
        return found

    def first_members(self, world: World | None, roster: Roster) -> frozenset[str]:
        """Names of those that would form the first ring now."""
        return first_ring(world, roster.peers, roster.judgement.lost) if world is not None else frozenset()

    def first_ring(self, world: World, where: Where, roster: Roster, generation: int) -> Snapshot | None:
        """The first ring lacks one of its members before it is in force: form it from those that are left."""
        names = self.first_members(world, roster)
        if where.aim is None or not names or names == members_of(where.aim.snapshot).keys():
            return None
        return self.backends(world, where, roster, generation, force=False)

    def ring(self, world: World, wanted: frozenset[str], where: Where, generation: int) -> Snapshot | None:
        """From the ring in force to this one; the old one again where what is aimed at is given up."""
        base = ring_base(where)
        if base is None or where.aim is None:
            return None
        newest = where.aim.snapshot
        for names in (wanted, without_joins(wanted, base)):
            if names == members_of(base).keys():
                break
            try:
                return ring_snapshot(base, newest, world, names, generation, self._next_ids(newest))
            except SnapshotError as error:
                self.problem = str(error)
        given_up = is_ring_change_under_way(where) or is_misbuilt(where)
        return once_more(base, newest, generation) if given_up else None

    def plain(self, where: Where, generation: int) -> Snapshot | None:
        """What is in force, without the change of the ring that it may have been."""
        base = ring_base(where)
        return once_more(base, where.aim.snapshot, generation) if base is not None and where.aim is not None else None

    def _next_ids(self, newest: Snapshot | None) -> NextIds:
        if newest is None or self.written[0] > newest.generation:
            return self.written[1]
        return newest.next_ids


def is_plain(snapshot: Snapshot, in_force: Snapshot) -> bool:
    """It changes nothing that packets depend on."""
    if snapshot.ring.before or snapshot.ring.members != in_force.ring.members:
        return False
    return snapshot.vips == in_force.vips


def ring_base(where: Where) -> Snapshot | None:
    """What a change of the ring follows upon; None: there is no ring yet, or nobody has told."""
    if where.in_force is not None:
        return where.in_force.snapshot if where.in_force.snapshot.ring.members else None
    if where.aim is not None and where.aim.changes_ring:
        return before_change(where.aim.snapshot)
    return None


def ring_wanted(world: World, base: Snapshot, roster: Roster, now_ns: int, *, hold: bool) -> frozenset[str]:
    """The ring that there should be. hold: only those that are lost leave, and nobody joins."""
    if hold:
        members = frozenset(members_of(base))
        return members - roster.judgement.lost or members
    return wanted_ring(world, base, roster.peers, roster.judgement.lost, now_ns)


def is_ring_change_under_way(where: Where) -> bool:
    """The aim changes the ring, and is not known to be in force anywhere."""
    return where.aim is not None and where.aim.changes_ring and where.in_force is not where.aim


def is_misbuilt(where: Where) -> bool:
    """The aim follows upon another ring than that in force: somebody else has changed it meanwhile."""
    if where.aim is None or where.in_force is None or where.aim is where.in_force:
        return False
    ring, in_force = where.aim.snapshot.ring, where.in_force.snapshot.ring
    return bool(in_force.members) and (ring.before or ring.members) != in_force.members


def is_first_ring(where: Where, roster: Roster) -> bool:
    """No ring is in force."""
    if where.aim is None or not where.aim.snapshot.ring.members:
        return True
    if where.in_force is not None:
        return not where.in_force.snapshot.ring.members
    # Nobody tells what is in force: then nothing is, as far as those that live know.
    alive = [peer.said for peer in roster.lbs if peer.ring and peer.name not in roster.judgement.lost]
    return not where.aim.changes_ring and all(said is None or said.committed == 0 for said in alive)


class Told:
    """What is said of the VIPs of a snapshot, worked out once for each of the two that matter: the newest, and that
    which is in force."""

    def __init__(self) -> None:
        self._made: list[tuple[Snapshot, tuple[VipStatus, ...]]] = []

    def of(self, aim: Aim | None) -> tuple[VipStatus, ...]:
        """What people want to know about its VIPs."""
        if aim is None:
            return ()
        for snapshot, vips in self._made:
            if snapshot is aim.snapshot:
                return vips
        self._made = [*self._made[-1:], (aim.snapshot, _vips_of(aim.snapshot))]
        return self._made[-1][1]


def _vips_of(snapshot: Snapshot) -> tuple[VipStatus, ...]:
    found = []
    for vip in snapshot.vips:
        ready = sum(one.state is BackendState.READY for one in vip.backends)
        draining = sum(one.state is BackendState.DRAINING for one in vip.backends)
        found.append(VipStatus(vip.name, vip.epoch, ready, draining, vip.id, place_of(vip)))
    return tuple(found)
