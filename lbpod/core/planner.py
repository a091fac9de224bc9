"""The operator's brain: from the observed World to what is persisted, pushed, prepared and committed, and who lags.

Theory of operation
-------------------
One change is in flight at a time. It begins PERSISTING (the generation is written down, so that no other controller can
use it) and STAGING (every node gets the whole snapshot). A change of the backends goes on: PREPARING (every slot that
differs starts to track), COMMITTING (the new table comes into force), IDLE. A change of the ring: RING_PREPARING
(everybody learns `next`), HANDING_OVER (what the new replicas lack is sent to them), SWITCHING (`own` := `next`),
RING_ENDING (`prev` is dropped), IDLE. A step begins only when *all ring members that are not lost* have acknowledged
the one before: that is what makes skew between LBs harmless (DESIGN sections 3 and 4). What arrives meanwhile becomes
part of the next change; at IDLE the ring goes first.

Nothing is scripted per node. Each node's last answer says how far it has got, the phase says how far it may go, and
the next call follows from the two (``_call``). So lost calls, repeated ones, LBs that restart empty and a controller
that is stopped after any effect need no code of their own: whoever is behind is taken along, one call at a time.

**Starting.** The Planner keeps nothing on disk. It asks every ring member for the newest snapshot that it knows and
goes on with the newest of all: an interrupted change is finished, not undone. *No new generation is made before every
ring member has said what it knows, or is lost*: ids may be in use there. What is known is driven on after START_WAIT_NS
all the same. That a member has committed a generation proves that all had prepared it; that one has switched, that all
had handed over.

**The first ring** is made of the LBs that answer; the others are waited for START_WAIT_NS, and join later.

**Losses** (who is lost: ``planner_ring``). Where nothing can have come into force yet, a lost member is no reason to
wait: the change is superseded by one of the ring, made from what is in force. It had perhaps not prepared, and so has
to be out of everybody's door before anything is committed. While COMMITTING, SWITCHING or RING_ENDING the others finish
first. While HANDING_OVER, one that is only left behind costs another round; one that was to be a member supersedes, and
where that leaves the ring as it is, a generation without any change takes `next` back. A change never goes on without
anybody: where all are lost, it waits for them. One that has switched to a ring without itself is waited for LEFT_NS.

**Nodes without an LB** (host agents) get the same calls and are waited for until they have prepared, but for
HOST_WAIT_NS at most, and where they have just failed only if an LB joins. That is safe: a host agent decides nothing
about flows. One that lags does not know a *new* backend on its node, nor a new LB, and drops what is for or from it,
which is sent again; what it translates already goes on.

**A refused change** (4xx) can be replaced: once the World has changed, a newer generation takes its place, even half
way through a commit, for every slot that the older one touched is tracking on every ring member. A ring change is taken
back for it, but not any more once somebody may have switched. A newcomer that refuses is left out for JOIN_RETRY_NS.

**Two controllers.** A ring member that reports a generation which is not ours, or ours with another digest or a higher
round of the handover, or a persisted generation at or above ours, sends the Planner back to STARTING: it adopts what is
there and goes on from above it. A ring change that is superseded here may be driven on by another: its successor goes
no further than STAGING before all that took part have staged it: then they switch no more, and have said if they had.

Left to the shell: clocks, sockets, the disk. Left to ``snapshot``: ids, epochs, digests. Left to ``planner_peers``:
steps and calls; to ``planner_ring``: who is alive, lost, wanted; to ``planner_wanted``: drain times.
"""

from typing import assert_never

from lbpod.core.limits import (
    CALL_LOST_NS,
    CHANGE_GATHER_NS,
    FOREIGN_WAIT_NS,
    GENERATION_MAX,
    HOST_PROBE_NS,
    HOST_WAIT_NS,
    JOIN_RETRY_NS,
    MARGIN_NS,
    PROBE_NS,
    REFUSED_RETRY_NS,
    RETRY_NS,
    RETRY_NS_MAX,
    START_WAIT_NS,
    TICK_NS,
)
from lbpod.core.messages import (
    AskStatus,
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
    Push,
    Report,
    Tick,
    WorldSeen,
)
from lbpod.core.model import Cluster, Snapshot, World
from lbpod.core.planner_make import (
    Maker,
    Told,
    is_first_ring,
    is_misbuilt,
    is_plain,
    is_ring_change_under_way,
    ring_base,
    ring_wanted,
)
from lbpod.core.planner_peers import STEP_OF_PHASE, Aim, Peer, Step, has_left_open, has_moved, newest_of, why_not
from lbpod.core.planner_ring import Where, can_follow, members_of
from lbpod.core.planner_roster import Roster
from lbpod.core.planner_start import in_force_reported, newest_host, newest_reported, newest_without_ring
from lbpod.core.planner_wanted import Wanted
from lbpod.core.snapshot import digest_of

_REVOCABLE = (Phase.STAGING, Phase.PREPARING, Phase.RING_PREPARING, Phase.HANDING_OVER)
"""Phases in which nothing new can be in force yet, unless a member says so."""


class Planner:
    """``effects = planner.step(event, now_ns)``; carry them out in their order. See the module's theory of operation.

    Invariants: an id, epoch or generation never goes back; Prepare(g) is emitted only when all ring members have staged
    g, Commit(g) only when all have prepared it or one has committed it; RingSwitch(g) only when all that are not lost
    have handed over in the current round or one has switched, RingDone(g) only when all that are not lost have switched
    and MARGIN_NS has passed since; at most one call per node is under way.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._maker = Maker(cluster)
        self._effects: list[PlannerEffect] = []
        # What is wanted.
        self._wanted = Wanted()
        self._dirty_ns: int | None = None  # since when it may differ from the newest snapshot
        self._ring_dirty_ns: int | None = None  # since when another ring is wanted; only at IDLE
        self._force = False  # a new generation is needed even if nothing differs
        self._overtaken = False  # the newest snapshot is not all that the World wants
        # Where we are.
        self._now_ns = 0
        self._phase = Phase.STARTING
        self._has_moved = False  # all nodes may have a next call, not only the one that the event is about
        self._since_ns = 0  # of STARTING; of the change in flight
        self._passed_over = 0  # newest generation without a ring that was found beside one with a ring
        self._highest = 0  # highest generation ever seen or given; the next one is above it
        self._aim: Aim | None = None  # newest snapshot pushed or adopted
        self._plain = False  # it changes nothing that is in force
        self._allowed = Step.NOTHING  # how far nodes may go with it
        self._in_force: Aim | None = None  # newest snapshot that a ring member has committed
        self._next: Snapshot | None = None  # being persisted
        self._persist_ns: int | None = None  # when to try again
        self._handover = 0  # round of the handover, and who is left behind in it
        self._handover_lost: tuple[int, ...] = ()
        self._switched_ns: int | None = None  # since when all have switched
        self._ring_hold_ns = 0  # nobody joins or leaves before this but the lost
        self._roster = Roster()
        self._judged = False  # nothing that the judgement rests upon has changed since
        # What is said.
        self._persist_problem = ""
        self._foreign_problem = ""
        self._changes = 0
        self._ring_changes = 0
        self._ours = False  # the change in flight was made here, not adopted
        self._told = Told()
        self._ring: tuple[str, ...] = ()
        self._reported: PlannerStatus | None = None

    @property
    def gather_end_ns(self) -> int | None:
        """When a Tick would start a change that is being gathered; None: whenever the next Tick comes."""
        end_ns = self._gathered_ns()
        # What has been tried in vain is not tried in circles.
        return end_ns if self._phase is Phase.IDLE and end_ns is not None and self._now_ns < end_ns else None

    @property
    def is_complete(self) -> bool:
        """The newest generation has all that the World wants: nothing of it waits for the next one, or is refused."""
        return self._dirty_ns is None and not (self._overtaken or self._maker.problem)

    def _gathered_ns(self) -> int | None:
        begun = [since_ns for since_ns in (self._dirty_ns, self._ring_dirty_ns) if since_ns is not None]
        return min(begun) + CHANGE_GATHER_NS if begun else None

    def step(self, event: PlannerEvent, now_ns: int) -> list[PlannerEffect]:
        """What is to be done because of this event, in this order. now_ns: monotonic."""
        self._effects = []
        self._now_ns = now_ns
        self._has_moved = False
        touched: Peer | None = None
        match event:
            case WorldSeen(world):
                self._see(world, now_ns)
            case LbAnswered(node, generation, status):
                touched = self._answered(node, generation, status, now_ns)
            case LbFailed(node, _, refused, reason):
                touched = self._roster.peers.get(node)
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
        if isinstance(event, LbAnswered | LbFailed) and not self._has_moved:
            if touched is not None and self._roster.peers.get(touched.name) is touched:
                self._call(touched, now_ns)
        else:
            for peer in list(self._roster.peers.values()):
                self._call(peer, now_ns)
        self._report()
        return self._effects

    # --- Events -------------------------------------------------------------------------------------------------------
    def _see(self, world: World, now_ns: int) -> None:
        if self._wanted.world is None:
            self._since_ns = now_ns
        if self._wanted.see(world, now_ns):
            self._dirty(now_ns)
            self._meet()

    def _dirty(self, now_ns: int) -> None:
        self._dirty_ns = now_ns if self._dirty_ns is None else self._dirty_ns

    def _tick(self, now_ns: int) -> None:
        self._judged = False
        if self._wanted.tick(now_ns):
            self._dirty(now_ns)
        for peer in self._roster.peers.values():
            if 0 <= peer.sent_ns <= now_ns - CALL_LOST_NS:
                self._failed(peer, False, "the call was never answered, not even by an error", now_ns)

    def _answered(self, node: str, generation: int, status: LbStatus, now_ns: int) -> Peer | None:
        peer = self._roster.peers.get(node)
        if peer is None:
            return None
        sentence = why_not(peer, status, self._cluster, starting=self._phase is Phase.STARTING)
        if sentence:
            self._failed(peer, True, sentence, now_ns)
            return peer
        newest = newest_of(status)
        was, tells = peer.status, status.snapshot is not None or newest == 0 or not (peer.is_lb or peer.full_wanted)
        took_more = self._aim is not None and self._aim.step_of(status) > self._aim.step_of(was)
        if took_more and was is not None:
            peer.refused, peer.doubted = "", False
        # While STARTING, the late answer to another call is not enough: ask again. Later, what is not newer is known.
        peer.heard = peer.heard or tells or self._phase is not Phase.STARTING
        self._judged &= not peer.is_lb or (peer.failures == 0 and not has_moved(status, peer.said))
        peer.answered(status, now_ns)
        if generation and was is not None and not has_moved(status, was):
            peer.next_ns = now_ns + TICK_NS  # a handover goes on, say; and nobody is called in circles
        self._highest = max(self._highest, newest)
        if self._phase is Phase.STARTING:
            if status.serving and not peer.is_lb:
                peer.heard = False  # the World does not list it as an LB any more: what does it know?
            if status.snapshot is not None or not peer.heard:
                self._meet()
        elif self._is_foreign(peer, status, newest):
            self._meet_foreign(peer, newest, now_ns)
        else:
            peer.foreign_ns = None
            self._see_in_force(status)
        if self._phase is not Phase.STARTING:
            peer.forget_snapshots()
        self._roster.note(peer, self._where(), now_ns)
        return peer

    def _meet_foreign(self, peer: Peer, newest: int, now_ns: int) -> None:
        """This node has what another controller has made."""
        # Where no ring is in force yet, any node may know one.
        unheard_of = newest > self._maker.written[0] and is_first_ring(self._where(), self._roster)
        counts = peer.ring or peer.name in self._roster.superseded
        if (counts and newest > self._passed_over) or unheard_of:
            self._restart(f"{peer.name} has generation {newest} of another controller; going on from there", now_ns)
            peer.full_wanted = not peer.is_lb  # members are asked for all that they know anyway
        elif peer.foreign_ns is None:
            peer.foreign_ns = now_ns  # members will say so, too, if anybody still pushes it
        elif peer.foreign_ns + FOREIGN_WAIT_NS <= now_ns and (self._next is None or newest >= self._next.generation):
            self._force = True  # only a newer generation can replace it

    def _see_in_force(self, status: LbStatus) -> None:
        if self._aim is not None and self._aim.step_of(status) >= Step.SWITCHED:
            self._judged &= self._in_force is self._aim
            self._in_force = self._aim
        elif self._lacks_in_force() and (found := in_force_reported(self._roster.peers.values())) is not None:
            self._in_force, self._judged = found, False

    def _lacks_in_force(self) -> bool:
        """Nobody has told what is in force, which a change may have to be made from."""
        return self._in_force is None and self._phase in _REVOCABLE

    def _is_foreign(self, peer: Peer, status: LbStatus, newest: int) -> bool:
        aim = self._aim
        if aim is None:
            return newest > 0
        another = status.staged == aim.generation and status.digest != aim.digest
        hands_over = aim.changes_ring and peer.ring and status.prepared == aim.generation
        round_of_another = hands_over and status.ring_round > self._handover
        is_ahead = self._in_force is not None and self._in_force.generation < status.committed < aim.generation
        is_ahead &= peer.ring or peer.name in self._roster.superseded
        return newest > aim.generation or another or round_of_another or is_ahead

    def _failed(self, peer: Peer, refused: bool, reason: str, now_ns: int) -> None:
        # The exponent is bounded for its own sake. Whoever may be lost is asked as often as those that are there.
        pause_ns = min(RETRY_NS << min(peer.failures, 8), PROBE_NS if peer.is_lb else RETRY_NS_MAX)
        stands = refused and peer.stands_by_refusal()
        pause_ns = (REFUSED_RETRY_NS if stands else 0) if refused else pause_ns
        peer.failed(reason, now_ns + pause_ns, now_ns, is_there=refused)
        if stands:
            peer.refused = reason
            joins = self._aim is not None and self._aim.changes_ring and peer.role.new and not peer.role.old
            if joins and self._phase in _REVOCABLE:
                peer.barred_ns = now_ns + JOIN_RETRY_NS
        self._judged &= not peer.is_lb
        self._roster.note(peer, self._where(), now_ns)

    def _persisted(self, generation: int, now_ns: int) -> None:
        if self._next is None or self._next.generation != generation:
            return  # of a change that was given up meanwhile
        self._persist_problem = ""
        self._persist_ns = None
        self._maker.written = (generation, self._next.next_ids)
        self._ours = True
        self._take(self._next, now_ns)
        self._enter(Phase.STAGING, now_ns)

    def _persist_failed(self, event: PersistFailed, now_ns: int) -> None:
        if self._next is None or self._next.generation != event.generation:
            return
        self._highest = max(self._highest, event.highest)
        if event.highest:
            self._maker.written = (event.highest, event.next_ids)
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
            self._judge(now_ns)
            match before:
                case Phase.STARTING:
                    self._try_start(now_ns)
                case Phase.IDLE:
                    gathered_ns = self._gathered_ns()
                    if self._force or self._lacks_plain() or (gathered_ns is not None and gathered_ns <= now_ns):
                        self._begin(now_ns)
                case Phase.PERSISTING:
                    if self._persist_ns is not None and self._persist_ns <= now_ns and self._next is not None:
                        self._persist_ns = None
                        self._persist(self._next)
                case Phase.STAGING | Phase.PREPARING | Phase.RING_PREPARING | Phase.HANDING_OVER:
                    self._try_revocable(now_ns)
                case Phase.COMMITTING | Phase.SWITCHING | Phase.RING_ENDING:
                    self._try_irrevocable(now_ns)
                case _:
                    assert_never(before)
            if self._phase is before:
                return
        raise AssertionError("phases follow each other without end")

    def _judge(self, now_ns: int) -> None:
        """Who is lost, and, at IDLE, whether another ring is wanted."""
        if self._judged:
            return
        self._judged = True
        self._has_moved |= self._roster.judge(self._where(), now_ns)
        base = ring_base(self._where()) if self._phase is Phase.IDLE else None
        if base is None or self._ring_wanted(base, now_ns) == members_of(base).keys():
            self._ring_dirty_ns = None
        elif self._ring_dirty_ns is None:
            self._ring_dirty_ns = now_ns

    def _where(self) -> Where:
        return Where(
            phase=self._phase,
            since_ns=self._since_ns,
            allowed=self._allowed,
            aim=self._aim,
            plain=self._plain,
            in_force=self._in_force,
            handover=self._handover,
            handover_lost=self._handover_lost,
        )

    def _try_start(self, now_ns: int) -> None:
        if self._wanted.world is None:
            return
        found = self._found()
        if any(peer.ring and not peer.heard for peer in self._roster.lbs):
            nobody = found is None and not any(peer.heard for peer in self._roster.lbs)
            if nobody or now_ns < self._since_ns + START_WAIT_NS:
                return
        if found is None:  # host agents may still know something of a former life
            if self._roster.has_unheard_hosts() and now_ns < self._since_ns + HOST_WAIT_NS:
                return
            top = newest_host(self._roster.peers.values(), self._maker.written[0])
            if top is not None and not isinstance(top, Snapshot):
                top.heard, top.full_wanted = False, True
                return
            self._maker.written = (top.generation, top.next_ids) if top is not None else self._maker.written
        elif self._roster.owes_snapshot() and now_ns < self._since_ns + HOST_WAIT_NS:
            return
        self._maker.note_written(self._roster.peers.values())
        self._dirty(now_ns)
        if found is None:
            self._aim = self._in_force = None
            self._enter(Phase.IDLE, now_ns)
            self._meet()
        else:
            self._adopt(*found, now_ns)
        for peer in self._roster.peers.values():
            peer.waited = True
            peer.forget_snapshots()

    def _found(self) -> tuple[Aim, bool] | None:
        """The newest snapshot that is known, and whether another one has its generation."""
        found, aim = newest_reported(self._roster.peers.values()), self._aim
        if aim is not None and aim.snapshot.ring.members and (found is None or found[0].generation < aim.generation):
            return aim, False  # who knows it is silent
        return found

    def _adopt(self, newest: Aim, conflict: bool, now_ns: int) -> None:
        """Go on with what was found."""
        self._ours = False
        self._in_force = None
        self._take(newest.snapshot, now_ns)
        self._force = conflict or self._highest > newest.generation
        self._passed_over = newest_without_ring(self._roster.peers.values())
        said = [(peer.ring, peer.status) for peer in self._roster.peers.values() if peer.status is not None]
        rounds = [status.ring_round for is_ring, status in said if is_ring and status.prepared == newest.generation]
        self._handover = max(rounds, default=0)
        if any(newest.step_of(status) >= Step.SWITCHED for _, status in said):
            self._make_irrevocable(now_ns)
        else:
            self._in_force = in_force_reported(self._roster.peers.values())
            self._enter(Phase.STAGING, now_ns)

    def _try_revocable(self, now_ns: int) -> None:
        """Nothing of the change can be in force yet, so it may still be superseded."""
        aim = self._aim
        assert aim is not None, "what is in flight is aimed at"
        if self._in_force is aim:  # another controller has gone further
            self._make_irrevocable(now_ns)
            return
        if is_misbuilt(self._where()):
            self._begin(now_ns, lost=True)
            return
        passes_over = self._plain and self._roster.has_anybody()
        if (self._roster.lacks_member() and not passes_over) or (aim.changes_ring and self._lacks_plain()):
            if self._begin(now_ns, lost=True) or aim.changes_ring:
                return
        if self._give_way(now_ns):
            return
        if self._phase is Phase.HANDING_OVER and self._repeat_handover(now_ns):
            return
        if self._roster.waiting or not self._roster.has_anybody():
            return
        if self._phase is Phase.HANDING_OVER:
            self._make_irrevocable(now_ns)
        elif not self._roster.waiting_hosts or self._since_ns + HOST_WAIT_NS <= now_ns:
            if self._phase is Phase.STAGING:
                self._enter(Phase.RING_PREPARING if aim.changes_ring else Phase.PREPARING, now_ns)
            elif aim.changes_ring:
                self._hand_over(now_ns)
            else:
                self._make_irrevocable(now_ns)

    def _make_irrevocable(self, now_ns: int) -> None:
        """Everybody is ready for it, so it comes into force: node by node, from now on."""
        assert self._aim is not None, "what is in flight is aimed at"
        self._in_force = self._aim
        self._enter(Phase.SWITCHING if self._aim.changes_ring else Phase.COMMITTING, now_ns)

    def _try_irrevocable(self, now_ns: int) -> None:
        """Something of the change may be in force: those that live finish it."""
        if self._phase is Phase.COMMITTING:
            if self._give_way(now_ns):
                return
        elif self._lacks_plain() and self._begin(now_ns):
            return
        if self._roster.waiting or not (self._roster.has_anybody() or self._has_successors(now_ns)):
            self._switched_ns = None
            return
        if self._phase is Phase.SWITCHING:
            self._switched_ns = now_ns if self._switched_ns is None else self._switched_ns
            if self._switched_ns + MARGIN_NS <= now_ns:  # packets relayed to former owners have arrived
                self._enter(Phase.RING_ENDING, now_ns)
            return
        self._in_force = self._aim
        if self._phase is Phase.RING_ENDING:
            self._ring_changes += self._ours
        else:
            self._changes += self._ours
        if self._overtaken:
            self._dirty(now_ns)
        self._ours = False
        self._foreign_problem = ""
        self._enter(Phase.IDLE, now_ns)

    def _has_successors(self, now_ns: int) -> bool:
        """Others can take over from a ring of which everybody is lost."""
        base = ring_base(self._where())
        return base is not None and self._ring_wanted(base, now_ns) != members_of(base).keys()

    def _give_way(self, now_ns: int) -> bool:
        """Replace a change that somebody refuses, now that something else is wanted, or that a node does not take
        because it has a newer one."""
        refused = any(self._roster.peers[name].refused for name in self._roster.waiting)
        gathered = self._dirty_ns is not None and self._dirty_ns + CHANGE_GATHER_NS <= now_ns
        if refused and gathered and self._aim is not None and self._aim.changes_ring:
            self._ring_hold_ns = now_ns + JOIN_RETRY_NS
        return (self._force or (refused and gathered)) and self._begin(now_ns)

    # --- The handover -------------------------------------------------------------------------------------------------
    def _hand_over(self, now_ns: int) -> None:
        """A new round, without those that are lost now."""
        self._handover += 1
        self._handover_lost = self._roster.lost_members()
        self._enter(Phase.HANDING_OVER, now_ns)

    def _repeat_handover(self, now_ns: int) -> bool:
        """Another round where the one under way goes on with the wrong ones, or where somebody has lost what has been
        handed over to it."""
        assert self._aim is not None, "what is in flight is aimed at"
        if self._roster.lost_members() != self._handover_lost:
            self._hand_over(now_ns)
            return True
        for peer in self._roster.lbs:
            if peer.ring and peer.status is not None and peer.name not in self._roster.judgement.lost:
                if self._aim.step_of(peer.status) < Step.PREPARED:
                    self._enter(Phase.RING_PREPARING, now_ns)
                    return True
        return False

    # --- A new generation ---------------------------------------------------------------------------------------------
    def _begin(self, now_ns: int, *, lost: bool = False) -> bool:
        """Start a change, if there is something to change and everyone has said what they know. lost: because somebody
        is lost in the middle of another one."""
        lost_names = self._roster.judgement.lost
        if any(peer.ring and not peer.heard and peer.name not in lost_names for peer in self._roster.lbs):
            return False
        if is_first_ring(self._where(), self._roster):
            newcomers = [peer for peer in self._roster.lbs if peer.role.lb]
            if any(not (peer.heard or peer.waited) for peer in newcomers):
                self._restart("", now_ns)  # a ring is about to form: hear its members first
                return True
            if newcomers and not self._maker.first_members(self._wanted.world, self._roster):
                return False
        if self._highest >= GENERATION_MAX:
            self._maker.problem = f"generation {GENERATION_MAX} is the last that there is"
            return False
        generation = self._highest + 1
        found = self._make(generation, now_ns, lost=lost)
        self._force &= lost and found is None
        if found is None:
            return False
        self._highest = generation
        self._next = found
        self._persist(found)
        self._enter(Phase.PERSISTING, now_ns)
        return True

    def _make(self, generation: int, now_ns: int, *, lost: bool) -> Snapshot | None:
        """Another ring, where it is time for it (or the old one again where a change of it is given up); else what the
        World wants."""
        world, where, maker, roster = self._wanted.world, self._where(), self._maker, self._roster
        assert world is not None, "no change without a World"
        found: Snapshot | None = None
        if self._lacks_plain():
            found = maker.plain(where, generation)
        elif lost and is_first_ring(where, roster):
            found = maker.first_ring(world, where, roster, generation)
        elif lost or self._phase is Phase.IDLE or is_ring_change_under_way(where):
            base = ring_base(where)
            wanted = self._ring_wanted(base, now_ns) if base is not None else frozenset()
            found = maker.ring(world, wanted, where, generation)
        if found is None and lost:
            return None
        made = found or maker.backends(world, where, roster, generation, force=self._force)
        self._dirty_ns, self._overtaken = None, found is not None or maker.waiting_count > 0
        return made

    def _lacks_plain(self) -> bool:
        """Somebody is to be given what is in force; but that changes the ring, or is not known while that changes, or
        is older than what it has staged: it takes the same with a new number, and without a change."""
        given, revived = self._in_force or self._aim, self._roster.judgement.revived
        if given is None or not revived:
            return False
        said = [peer.said for peer in self._roster.lbs if peer.name in revived and peer.said is not None]
        return given.changes_ring or any(not can_follow(one, given) for one in said)

    def _ring_wanted(self, base: Snapshot, now_ns: int) -> frozenset[str]:
        assert self._wanted.world is not None, "no ring without a World"
        return ring_wanted(self._wanted.world, base, self._roster, now_ns, hold=now_ns < self._ring_hold_ns)

    def _persist(self, snapshot: Snapshot) -> None:
        """What is newer than both our base and what we know to be written has given ids that we have not heard of."""
        base = self._aim.generation if self._aim is not None else 0
        self._effects.append(Persist(snapshot.generation, snapshot, max(base, self._maker.written[0])))

    def _enter(self, phase: Phase, now_ns: int) -> None:
        self._phase = phase
        self._allowed = STEP_OF_PHASE.get(phase, self._allowed)
        self._has_moved, self._judged = True, False
        self._switched_ns = None
        if phase is not Phase.PERSISTING:
            self._next = None
        self._roster.note_all(self._where(), now_ns)

    def _restart(self, problem: str, now_ns: int) -> None:
        """Forget who knows what, and ask."""
        self._foreign_problem = problem
        self._persist_problem, self._persist_ns, self._since_ns = "", None, now_ns
        for peer in self._roster.peers.values():
            peer.status, peer.heard, peer.waited, peer.full_wanted = None, False, False, False
            # Two controllers must not chase each other at full speed.
            peer.next_ns = max(peer.next_ns, now_ns + RETRY_NS)
        self._enter(Phase.STARTING, now_ns)
        self._meet()

    # --- Nodes --------------------------------------------------------------------------------------------------------
    def _meet(self) -> None:
        """Who there is: what the aim lists, and the LBs that might join. While STARTING, whom to ask: what the World
        lists, and what the newest snapshot that was found lists as its ring."""
        world, starting = self._wanted.world, self._phase is Phase.STARTING
        assert world is not None, "nobody is asked before a World was seen"
        found = self._found() if starting else None
        self._roster.meet(world, found[0] if found is not None else self._aim, starting=starting)
        self._judged = False

    def _take(self, snapshot: Snapshot, now_ns: int) -> None:
        """Aim at this snapshot."""
        self._roster.supersede(self._where())
        self._aim = Aim(snapshot, digest_of(snapshot))
        self._since_ns, self._handover, self._handover_lost = now_ns, 0, ()
        self._plain = self._in_force is not None and is_plain(snapshot, self._in_force.snapshot)
        self._phase = Phase.STAGING
        self._meet()
        for peer in self._roster.peers.values():
            peer.next_ns = now_ns if peer.refused else peer.next_ns  # it may take this one
        self._ring = tuple(sorted(members_of(snapshot)))

    def _call(self, peer: Peer, now_ns: int) -> None:
        """Emit the one call that is next for this node, if there is one and nothing is under way."""
        if peer.sent_ns >= 0 or now_ns < peer.next_ns:
            return
        if self._phase is Phase.STARTING:
            if not peer.heard:
                self._ask(peer, peer.is_lb or peer.full_wanted, now_ns)
            return
        if peer.status is None:
            self._ask(peer, peer.ring and self._lacks_in_force(), now_ns)
            return
        pushed = self._roster.next_call(peer, peer.status, self._where())
        if pushed is not None:
            peer.sent(now_ns, is_step=not isinstance(pushed[1], Snapshot))
            self._effects.append(Push(peer.name, peer.role.control, *pushed, peer.is_lb))
            return
        is_open = self._aim is not None and has_left_open(peer.status, self._aim)
        if peer.asked_ns + (PROBE_NS if peer.is_lb or is_open else HOST_PROBE_NS) <= now_ns:
            self._ask(peer, is_open or (peer.ring and self._lacks_in_force()), now_ns)

    def _ask(self, peer: Peer, with_snapshot: bool, now_ns: int) -> None:
        peer.sent(now_ns, full=with_snapshot)
        self._effects.append(AskStatus(peer.name, peer.role.control, with_snapshot, peer.is_lb))

    # --- What is said -------------------------------------------------------------------------------------------------
    def _report(self) -> None:
        lost = self._roster.judgement.lost
        changing = self._aim is not None and self._aim.changes_ring and self._phase is not Phase.IDLE
        status = PlannerStatus(
            phase=self._phase,
            generation=self._aim.generation if self._aim is not None else 0,
            lbs=sum(peer.role.new for peer in self._roster.lbs),
            lbs_at_generation=len(self._roster.at_generation),
            lagging=tuple(sorted(self._roster.lagging)),
            problem=self._problem(),
            changes=self._changes,
            vips=self._told.of(self._aim),
            in_force=self._told.of(self._in_force or self._aim),
            ring=self._ring,
            lost=tuple(sorted(name for name in lost if changing or self._roster.peers[name].role.new)),
            ring_changes=self._ring_changes,
            waiting=self._maker.waiting_count,
        )
        if status != self._reported:
            self._reported = status
            self._effects.append(Report(status))

    def _problem(self) -> str:
        """The most important thing that is wrong, in one sentence."""
        for problem in (self._maker.problem, self._persist_problem, self._foreign_problem):
            if problem:
                return problem
        return self._roster.problem(self._where())
