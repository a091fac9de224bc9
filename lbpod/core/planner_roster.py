"""Who there is, who is waited for, and what is next for each: the Planner's nodes, and what follows from their answers.

An answer of one of 4,096 nodes must not cost a walk over all of them: ``note`` keeps the sets in step with that one
node. Only who is lost is judged over all LBs together, and only when something has changed that it rests upon.
"""

from collections.abc import Mapping

from lbpod.core.limits import HOST_WAIT_NS, LEFT_NS
from lbpod.core.messages import ControlCall, LbStatus, Phase
from lbpod.core.model import World
from lbpod.core.planner_peers import STEP_OF_PHASE, Aim, Peer, Role, Step, has_left_open, in_ring, may_take
from lbpod.core.planner_ring import Judgement, Where, judge

_BEFORE_PREPARED = (Phase.STAGING, Phase.PREPARING, Phase.RING_PREPARING)


class Roster:
    """Invariants: the sets hold names of ``peers``; ``lbs`` are those of ``peers`` for which is_lb holds."""

    def __init__(self) -> None:
        self.peers: dict[str, Peer] = {}
        self.lbs: list[Peer] = []
        self.judgement = Judgement()
        self.waiting: set[str] = set()  # ring members that the phase waits for
        self.waiting_hosts: set[str] = set()
        self.superseded: set[str] = set()  # took part in a ring change that is given up, and may not have heard of it
        self.lagging: set[str] = set()
        self.at_generation: set[str] = set()  # ring members
        self._troubled: set[str] = set()  # those that say that something is wrong with them

    def meet(self, world: World, aim: Aim | None, *, starting: bool) -> None:
        """Who there is from now on: what the aim lists, and the LBs that might join. While starting, whom to ask: what
        the World lists, and the ring of the newest snapshot that was found."""
        forming = aim is None or not aim.snapshot.ring.members
        listed = {node.name: node for node in world.nodes}
        roles: dict[str, Role] = {}
        for node in aim.snapshot.nodes if aim is not None else ():
            old, new = node.member in aim.snapshot.ring.before, in_ring(node, aim.snapshot)  # type: ignore[union-attr]
            there = listed.get(node.name)
            if not starting or old or new:
                control = there.control if there is not None else node.control
                roles[node.name] = Role(control, node.member, old, new, there is not None and there.lb)
        for one in world.nodes:
            if one.name not in roles and (starting or one.lb or aim is None):
                had = self.peers.get(one.name)
                may = one.lb or (had is not None and had.said is not None and had.said.serving)
                roles[one.name] = Role(one.control, new=forming and starting and may, lb=one.lb, known=False)
        for name, peer in self.peers.items() if starting else ():
            # Who has been asked because of what another one said is not forgotten when a third one knows better.
            roles.setdefault(name, Role(peer.role.control, known=False))
        self.keep(roles)

    def keep(self, roles: Mapping[str, Role]) -> None:
        """These nodes there are from now on. One that is reached in another way is another one."""
        kept: dict[str, Peer] = {}
        for name, role in roles.items():
            peer = self.peers.get(name) or Peer(name, role)
            if peer.role.control != role.control:
                peer = Peer(name, role, sent_ns=peer.sent_ns)
            peer.role = role
            kept[name] = peer
        for name in self.peers.keys() - kept.keys():
            for names in (self.waiting, self.waiting_hosts, self.lagging, self.at_generation, self._troubled):
                names.discard(name)
        self.peers = kept
        self.lbs = [peer for peer in kept.values() if peer.is_lb]

    def judge(self, where: Where, now_ns: int) -> bool:
        """Find out who is lost. True if that has changed."""
        found = judge(self.lbs, where, self.judgement, now_ns)
        if found == self.judgement:
            return False
        self.judgement = found
        for peer in self.lbs:
            self.note(peer, where, now_ns)
        return True

    def supersede(self, where: Where) -> None:
        """What is aimed at is given up. Another controller may go on with it: until all that take part have staged its
        successor, and so refuse to, nobody knows that it has not come into force."""
        if where.aim is not None and where.aim.changes_ring and where.in_force is not where.aim:
            self.superseded |= {peer.name for peer in self.lbs if peer.ring}

    def note_all(self, where: Where, now_ns: int) -> None:
        """Another phase: everything is seen in another light."""
        self.waiting.clear()
        self.waiting_hosts.clear()
        if where.phase not in (Phase.STARTING, Phase.PERSISTING, Phase.STAGING):
            self.superseded.clear()
        for peer in self.peers.values():
            self.note(peer, where, now_ns)

    def note(self, peer: Peer, where: Where, now_ns: int) -> None:
        """Keep the sets in step with what this node has said."""
        if self.peers.get(peer.name) is not peer:
            return  # it was let go of meanwhile
        aim, phase = where.aim, where.phase
        step = where.step_of(peer, aim) if aim is not None else Step.NOTHING
        late = phase is Phase.STARTING and not peer.heard
        behind = late or (aim is not None and peer.role.known and step < where.allowed)
        failed = peer.failures > 0 or peer.refused != ""
        left = not peer.ring and phase is not Phase.STARTING and where.since_ns + HOST_WAIT_NS <= now_ns
        # One whose agent is away for a moment would drop all that a newcomer sends it, flows of others among it.
        may_be_back = aim is not None and aim.brings_somebody_in and not peer.is_gone and not peer.refused
        at_last = phase in _BEFORE_PREPARED and not peer.ring and (not failed or may_be_back)
        # Before a change of the backends comes into force, not even the lost are passed over: they have to leave first.
        changes_backends = aim is not None and not aim.changes_ring and not where.plain
        is_lost = peer.is_gone or peer.name in self.judgement.lost
        needed = not (is_lost or self._has_left(peer, where)) or (changes_backends and phase in _BEFORE_PREPARED)
        waits = peer.ring and needed and phase in STEP_OF_PHASE
        waits |= phase is Phase.STAGING and peer.name in self.superseded and not is_lost and not peer.refused
        _keep(self.waiting, peer.name, behind and waits)
        _keep(self.waiting_hosts, peer.name, behind and at_last)
        _keep(self.lagging, peer.name, behind and (failed or left))
        _keep(self._troubled, peer.name, peer.status is not None and peer.status.problem != "")
        _keep(self.at_generation, peer.name, peer.role.new and step is Step.COMMITTED)

    def _has_left(self, peer: Peer, where: Where) -> bool:
        """It has switched to a ring without itself, and answers no more: its agent was told to end, most likely. That a
        member has been told that all is over proves that all had switched who were not lost."""
        aim = where.aim
        if aim is None or not aim.changes_ring or peer.role.new or not peer.is_silent(LEFT_NS):
            return False
        if peer.said is not None and aim.step_of(peer.said) < Step.SWITCHED:
            return False
        is_over = where.phase is Phase.SWITCHING and any(aim.step_of(one.said) is Step.COMMITTED for one in self.lbs)
        return is_over or where.phase is Phase.RING_ENDING

    def has_unheard_hosts(self) -> bool:
        """Some have not said yet what they know: one call that failed proves nothing."""
        return any(not peer.is_lb and not peer.heard and not peer.refused for peer in self.peers.values())

    def owes_snapshot(self) -> bool:
        """One that was asked for all that it knows has not said it yet."""
        return any(peer.full_wanted and not peer.heard for peer in self.peers.values())

    def has_anybody(self) -> bool:
        """Somebody is left to go on with, or there is no ring."""
        ring = [peer for peer in self.lbs if peer.ring]
        return not ring or any(peer.name not in self.judgement.lost for peer in ring)

    def lacks_member(self) -> bool:
        """A member of the ring that is aimed at is lost."""
        return any(peer.role.new and peer.name in self.judgement.lost for peer in self.lbs)

    def lost_members(self) -> tuple[int, ...]:
        """Member ids of those that are lost."""
        return tuple(sorted(peer.role.member for peer in self.lbs if peer.ring and peer.name in self.judgement.lost))

    def next_call(self, peer: Peer, status: LbStatus, where: Where) -> tuple[int, ControlCall] | None:
        """Generation and body of what is next for this node, which has last said this; None: nothing."""
        if where.aim is not None and has_left_open(status, where.aim):
            return (status.committed, peer.left_open) if peer.left_open is not None else None
        aim, allowed = self._goal(peer, status, where)
        step = where.step_of(peer, aim) if aim is not None else Step.NOTHING
        if aim is None or step >= allowed or (step is Step.NOTHING and not may_take(status, aim)):
            return None
        if aim is where.aim and where.allowed < Step.SWITCHED:
            lost = where.handover_lost
        else:  # somebody may have switched: there is nobody left to hand anything over to
            lost = tuple(sorted({*aim.snapshot.ring.before, *aim.snapshot.ring.members} - {peer.role.member}))
        return aim.generation, aim.call_after(step, max(where.handover, 1), lost)

    def _goal(self, peer: Peer, status: LbStatus, where: Where) -> tuple[Aim | None, Step]:
        """What this node should have, and how far it may go with it: nothing more where it is lost."""
        aim, safe = where.aim, where.in_force
        if aim is None or not peer.role.known or peer.name in self.judgement.lost:
            return None, Step.NOTHING
        if safe is not None and safe is not aim and peer.ring and not peer.refused:
            step = safe.step_of(status)
            if aim.changes_ring and step is Step.PREPARED:
                return safe, Step.COMMITTED  # the ring changes on top of it
            # One that has nothing gets what is in force first: the change in flight may have to wait for somebody else.
            lacks = peer.name in self.judgement.revived and step < Step.COMMITTED and not safe.changes_ring
            if lacks and may_take(status, safe):
                return safe, Step.COMMITTED
        return aim, where.allowed

    def problem(self, where: Where) -> str:
        """The most important thing that is wrong with a node, in one sentence."""
        lagging = [self.peers[name] for name in sorted(self.lagging)]
        for peer in lagging:
            if peer.refused:
                return f"{peer.name} refuses: {peer.refused}"
        for name in sorted(self.judgement.lost):
            return f"{name} is lost: {self.peers[name].reason or 'it has restarted without its state'}"
        for peer in lagging:
            if peer.ring:
                return f"waiting for {peer.name}: {peer.reason}"
        for name in sorted(self._troubled):
            status = self.peers[name].status
            assert status is not None, "a node that has said nothing has not complained"
            return f"{name}: {status.problem}"
        for peer in self.lbs:
            if peer.role.lb and not peer.ring and where.phase is not Phase.STARTING and (peer.refused or peer.reason):
                return f"{peer.name} is not in the ring: {peer.refused or peer.reason}"
        return ""


def _keep(names: set[str], name: str, wanted: bool) -> None:
    if wanted:
        names.add(name)
    else:
        names.discard(name)
