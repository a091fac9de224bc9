"""Who is alive, who is lost, and who should be in the ring: what the Planner's ring changes rest upon. Pure functions.

**A member is lost** when it has been silent for LOST_NS (``Peer.is_gone``); when it does not answer for AWAY_NS and all
members that do have given it up (their LOST_NS is over, and a controller that has just started need not count it anew),
from which a newcomer, who has not listened for so long, does not bring it back once the ring goes on without it; and
*at once* when it answers and is not what a member has to be (``_is_sound``): it has restarted empty, or the ring
changed while it was away. Such a one could be served again as it is only at the price of the records that it lacks, so
it leaves the ring and joins again as a newcomer, whom the others hand over what they have.

**Where nobody is left**, there is nothing to be handed over, and so nothing to be lost by it: those that answer are
*revived*, that is, given what is in force as if nothing had happened. So does a ring begin: nobody serves yet.

**Wanted** are the LBs that the World lists, at the address that it lists, that live and do not want to leave. Where
that would be nobody, those members stay that are told to go, with the least reason first: they want to leave; are not
listed as LBs; have another address (one of them); are lost. A ring is never empty.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from lbpod.core.limits import AWAY_NS
from lbpod.core.messages import LbStatus, Phase
from lbpod.core.model import Node, Ring, Snapshot, World
from lbpod.core.planner_peers import Aim, Peer, Step, in_ring, may_take


class Where(NamedTuple):
    """Where the Planner stands: as its fields of these names."""

    phase: Phase
    since_ns: int
    allowed: Step
    aim: Aim | None
    plain: bool
    in_force: Aim | None
    handover: int
    handover_lost: tuple[int, ...]

    def step_of(self, peer: Peer, aim: Aim) -> Step:
        """How far this node has got; while something is handed over, in the round that counts."""
        return aim.step_of(peer.status, self.handover if self.allowed is Step.HANDED and peer.ring else 0)


@dataclass(frozen=True)
class Judgement:
    """Names. lost: ring members without whom things go on; revived: those that are not what a member has to be and
    count all the same. Invariant: they have nobody in common."""

    lost: frozenset[str] = frozenset()
    revived: frozenset[str] = frozenset()


def judge(peers: Iterable[Peer], where: Where, before: Judgement, now_ns: int) -> Judgement:
    """Who is lost now. before: the last judgement; who was revived in it stays so until it serves, or is gone."""
    ring = [peer for peer in peers if peer.ring]
    given_up = _given_up(ring)
    goes_on = where.aim is not None and where.aim.changes_ring
    without = {peer.name for peer in ring if goes_on and not peer.role.new and peer.name in before.lost}
    gone = {
        peer.name
        for peer in ring
        if peer.is_gone
        or (peer.role.member in given_up and peer.is_silent(AWAY_NS))
        or (peer.name in without and peer.failures > 0)
    }
    unsound = {peer.name for peer in ring if peer.name not in gone and not _is_sound(peer, where, now_ns)}
    undone = where.aim is not None and where.aim.changes_ring and where.in_force is not where.aim
    members = {peer.name for peer in ring if (peer.role.old if undone else peer.role.new)}
    revived = before.revived & unsound
    if members and members <= gone | unsound:
        revived |= unsound & members
    return Judgement(frozenset(gone | (unsound - revived)), frozenset(revived))


def _given_up(ring: Iterable[Peer]) -> frozenset[int]:
    """Members that all members which answer and serve have given up. Who has given up everybody is no witness: it was
    cut off itself, may be, and has not heard them again yet."""
    members = {one.role.member for one in ring}
    said = {one.role.member: one.status.given_up for one in ring if one.status is not None and one.status.serving}
    heard = [frozenset(given_up) for member, given_up in said.items() if members - {member, *given_up}]
    return frozenset.intersection(*heard) if heard else frozenset()


def _is_sound(peer: Peer, where: Where, now_ns: int) -> bool:
    """It has what its place asks for, as far as is known."""
    said, role, aim, in_force = peer.said, peer.role, where.aim, where.in_force
    if said is None or aim is None:
        return True
    if aim.changes_ring:
        if role.member in where.handover_lost:
            return False
        if where.allowed >= Step.SWITCHED:
            return _is_sound_after_handover(peer, where)
        if not role.old:
            return peer.barred_ns <= now_ns
    if in_force is None:
        return said.serving
    if not in_force.changes_ring and said.prepared == in_force.generation:
        return True  # it only has to commit
    if aim.changes_ring and not can_follow(said, in_force):
        return False
    return said.serving and said.committed >= in_force.snapshot.ring.epoch


def can_follow(said: LbStatus, in_force: Aim) -> bool:
    """It has what is in force, or may still be given it: a ring changes on top of that."""
    return said.committed >= in_force.generation or in_force.step_of(said) is Step.PREPARED or may_take(said, in_force)


def _is_sound_after_handover(peer: Peer, where: Where) -> bool:
    assert where.aim is not None, "what is handed over belongs to a change"
    assert peer.said is not None, "who has said nothing is not judged by it"
    step = where.aim.step_of(peer.said)
    if step < Step.PREPARED:
        return False  # it has restarted empty, or was away: what was handed over to it is not there
    if step < Step.SWITCHED:
        return where.phase is Phase.SWITCHING or not peer.role.new
    return peer.said.serving or not peer.role.new


def members_of(snapshot: Snapshot) -> dict[str, Node]:
    """The ring's members by name."""
    return {node.name: node for node in snapshot.nodes if in_ring(node, snapshot)}


def wanted_ring(
    world: World, in_force: Snapshot, peers: Mapping[str, Peer], lost: frozenset[str], now_ns: int
) -> frozenset[str]:
    """Names of those that should be in the ring."""
    members = members_of(in_force)
    taken = {node.address: node.name for node in in_force.nodes}
    alive = {name: node for name, node in members.items() if name not in lost}
    listed = {node.name: node for node in world.nodes}
    # Who has another address now leaves first, and joins with that.
    here = {name for name, node in alive.items() if name not in listed or listed[name].address == node.address}
    able = {name for name in here if name in listed and listed[name].lb}
    wanted = {name for name in able if (peer := peers.get(name)) is None or peer.said is None or not peer.said.leaving}
    for node in world.nodes:
        peer = peers.get(node.name)
        if not node.lb or node.name in members or peer is None or peer.status is None or peer.status.leaving:
            continue
        # Its address may still be another's, who has to leave the snapshot first.
        if peer.barred_ns <= now_ns and taken.get(node.address, node.name) == node.name:
            wanted.add(node.name)
    # Where everybody is to leave for an address of its own, somebody waits for the others to be back.
    last = min(alive, key=lambda name: (name in listed and listed[name].lb, name), default=None)
    return frozenset(wanted or able or here or ({last} if last is not None else members))


def without_joins(wanted: frozenset[str], in_force: Snapshot) -> frozenset[str]:
    """Those of them that are in the ring already; where there is nobody, the ring as it is."""
    members = members_of(in_force).keys()
    return frozenset(wanted & members or members)


def first_ring(world: World, peers: Mapping[str, Peer], lost: frozenset[str]) -> frozenset[str]:
    """Names of those that form the ring where there is none: the LBs of the World that answer."""
    listed = [node.name for node in world.nodes if node.lb and node.name in peers and node.name not in lost]
    here = {name: status for name in listed if (status := peers[name].status) is not None}
    return frozenset({name for name, status in here.items() if not status.leaving} or here)


def before_change(change: Snapshot) -> Snapshot:
    """What was in force when this change of the ring began, where nobody has told: it changed nothing but the ring. The
    epoch of that ring is lost; that of the change is above it, and not in force anywhere."""
    return msgspec.structs.replace(change, ring=Ring(change.ring.epoch, change.ring.before))
