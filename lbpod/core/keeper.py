"""Keeper: the brain of one LB. One event goes in, effects come out, in the order in which they are to be carried out.

**Map of the Keeper.** This file receives events and hands each to the part that decides about it; what failed comes
back here.

| file | decides |
| --- | --- |
| ``keeper_state`` | what is known, and the questions that are open |
| ``change`` | snapshots: stage, prepare, commit, restore |
| ``ring`` | a ring change: stage, prepare, switch, done |
| ``handover`` | slot states and records for those who will be replicas, and what comes of them |
| ``missed`` | what a member is told that was silent: records that were made without it |
| ``watch`` | who is there: beats, which members are believed to be down, the fence, doubt |
| ``transition`` | the words of a VIP's slots |
| ``resolve`` | who has this flow: asking, and answering as owner |
| ``settle`` | from tracking back to steady, and rebase |
| ``owed`` | what a lost answer to a settle leaves behind |
| ``forget`` | when records go |
| ``quiet`` | as host agent: which slots have no live flow left |
| ``sweep`` | as host agent: when translated flows go, and whether some may have been evicted |
| ``rest`` | what is kept in less memory while nothing changes |
| ``flows`` | arithmetic on thousands of flows |

**When a write fails** (EffectsFailed), nothing that stood behind it was done: whoever waits for a Reply in the rest
is refused with 503, questions in it have failed, and what was to be written is noted (``Unwritten``). Decisions
stand: the mirror is ahead of the maps. The next Tick, and every call that would be acknowledged on the strength of
the mirror, first writes all of it whole from the mirror, and counts the quiet time of those VIPs anew (new flows may
have had the old ``current`` until now). So an acknowledgement still means: written.

No clock, no I/O, nothing random: the same events at the same times give the same effects. What no rule foresees is a
mistake of ours and ends in an AssertionError; the fast path goes on without us, and a restart restores.
"""

from typing import assert_never

import numpy as np

from lbpod.core import change, forget, handover, missed, owed, quiet, resolve, rest, ring, settle, sweep, watch
from lbpod.core.keeper_state import Answer, Effects, State
from lbpod.core.limits import MEMBER_NONE, QUICK_VIPS_MAX, SLOT_COUNT
from lbpod.core.messages import (
    Answered,
    Ask,
    AskFailed,
    BeatAnswer,
    BeatCall,
    Called,
    CommitCall,
    Configure,
    ControlCall,
    ControllerSeen,
    CreateVip,
    DeleteVip,
    DropFlows,
    DropNat,
    DropRecords,
    DumpRecords,
    EffectsFailed,
    ForgetCall,
    HandoverCall,
    KeeperEffect,
    KeeperEvent,
    LbStatus,
    LeaveWanted,
    LookNat,
    LookRecords,
    LookSeen,
    MemberSeen,
    MissedCall,
    NatLooked,
    PeerCall,
    PendingDrained,
    PrepareCall,
    PutCache,
    PutRecords,
    QuietCall,
    RecordsDumped,
    RecordsLooked,
    RecordsPut,
    Refuse,
    Remember,
    Reply,
    ResolveCall,
    Restored,
    RingDoneCall,
    RingPrepareCall,
    RingSwitchCall,
    SeenRead,
    SettleCall,
    StampNatFull,
    StateCall,
    Tell,
    Tick,
    Trace,
    Woke,
    WriteOwnership,
    WriteSlots,
)
from lbpod.core.model import Snapshot

UNWRITTEN = 503


class Keeper:
    """The LB's brain on one node (also of a node that is in no ring, where it is only the host agent's)."""

    def __init__(self, node_name: str) -> None:
        self._state = State(node_name)

    def step(self, event: KeeperEvent, now_ns: int) -> list[KeeperEffect]:
        """Take one event; give what is to be done about it, in this order. now_ns: monotonic, as the fast path's
        clock."""
        if not isinstance(event, EffectsFailed):
            self._state.confirm()
        match event:
            case Called():
                return [*watch.called(self._state, event.body, now_ns), *self._called(event, now_ns)]
            case Answered():
                return self._answered(event.token, event.body, now_ns)
            case RecordsLooked() | RecordsDumped() | RecordsPut() | NatLooked() | SeenRead():
                return self._answered(event.token, event, now_ns)
            case AskFailed():
                return self._unanswered(event, now_ns)
            case PendingDrained():
                return resolve.pending(self._state, event, now_ns)
            case MemberSeen():
                return watch.member_seen(self._state, event, now_ns)
            case Woke():
                return watch.woke(self._state, event, now_ns)
            case ControllerSeen():
                return watch.controller_heard(self._state, now_ns)
            case LeaveWanted():
                self._state.leaving = True
                return [Trace("wants to leave the ring")]
            case EffectsFailed():
                return self._effects_failed(event, now_ns)
            case Tick():
                return self._tick(now_ns)
            case Restored():
                return change.restore(self._state, event, now_ns)
        assert_never(event)

    def status(self, with_snapshot: bool = False) -> LbStatus:
        """Where this LB stands (GET /v1/state). with_snapshot: and the newest snapshot that it has accepted."""
        return self._state.status(with_snapshot)

    def beliefs(self) -> watch.Beliefs:
        """Who is believed to be down (metrics, GET /v1/state)."""
        return watch.beliefs(self._state)

    def tracking_slots(self) -> dict[int, int]:
        """VIP id -> slots that are tracking (metrics)."""
        return {vip: vs.slots.tracking_count for vip, vs in sorted(self._state.vips.items())}

    def beat(self) -> BeatAnswer | None:
        """What a beat would be answered now, to one that it may owe something; None: by no load balancer."""
        return None if self._state.member == MEMBER_NONE else watch.answer(self._state, owes=True)

    def pause_ns(self, now_ns: int) -> int:
        """How long until the next Tick is wanted, after one."""
        return watch.pause_ns(self._state, now_ns)

    def is_quick(self, body: ControlCall | PeerCall) -> bool:
        """Whether a call takes milliseconds: it builds no table, and few VIPs change or track (QUICK_VIPS_MAX)."""
        state = self._state
        match body:
            case PrepareCall():
                plan = state.staged
            case CommitCall():
                plan = state.prepared
            case Snapshot() | RingPrepareCall() | RingSwitchCall():
                return False
            case _:
                return True
        tracking = sum(vs.slots.track is not None for vs in state.vips.values())
        return plan is None or len(plan.tables) + tracking <= QUICK_VIPS_MAX

    def check_invariants(self) -> None:
        """Raise AssertionError with a sentence where one does not hold. For tests, after every step."""
        self._state.check_invariants()

    # --- Events -------------------------------------------------------------------------------------------------------
    def _called(self, event: Called, now_ns: int) -> Effects:
        state, request, body = self._state, event.request, event.body
        match body:
            case ResolveCall():
                return resolve.asked(state, request, body, now_ns)
            case ForgetCall():
                return forget.asked(state, request, body, now_ns)
            case QuietCall():
                return quiet.asked(state, request, body, now_ns)
            case SettleCall():
                return [*self._write_again(now_ns), *settle.called(state, request, body, now_ns)]
            case StateCall():
                return [*self._write_again(now_ns), *handover.received(state, request, body, now_ns)]
            case MissedCall():
                return [*self._write_again(now_ns), *missed.received(state, request, body, now_ns)]
            case BeatCall():
                return watch.asked(state, request, body, now_ns, late=event.late)
        return [*self._write_again(now_ns), *self._controlled(event, body, now_ns)]

    def _controlled(self, event: Called, body: ControlCall, now_ns: int) -> Effects:
        """A call of the controller."""
        state, request = self._state, event.request
        match body:
            case Snapshot() if body.ring.before:
                return ring.stage(state, request, body, event.with_snapshot, now_ns)
            case Snapshot():
                return change.stage(state, request, body, event.with_snapshot)
            case PrepareCall():
                return change.prepare(state, request, body, now_ns)
            case CommitCall():
                return change.commit(state, request, body, now_ns)
            case RingPrepareCall():
                return ring.prepare(state, request, body, now_ns)
            case HandoverCall():
                return handover.wanted(state, request, body, now_ns)
            case RingSwitchCall():
                return ring.switch(state, request, body, now_ns)
            case RingDoneCall():
                return ring.done(state, request, body, now_ns)
        assert_never(body)

    def _answered(self, token: int, answer: Answer, now_ns: int) -> Effects:
        question = self._state.close(token)
        if question is None:
            return [Trace("late answer", detail="what was asked had been given up, or was never asked")]
        return question.answered(self._state, answer, now_ns)

    def _unanswered(self, event: AskFailed, now_ns: int) -> Effects:
        question = self._state.close(event.token)
        if question is None:
            return []
        if event.agentless:
            watch.agentless(self._state, question, now_ns)
        return (question.untaken if event.untaken else question.failed)(self._state, event.reason, now_ns)

    def _tick(self, now_ns: int) -> Effects:
        state = self._state
        effects = self._write_again(now_ns)
        for token in state.lost(now_ns):
            effects += self._unanswered(AskFailed(token, "no answer came in time"), now_ns)
        effects += watch.tick(state, now_ns)
        effects += missed.tick(state, now_ns)
        quiet.let_go(state, now_ns)
        change.let_ids_rest(state, now_ns)
        rest.tick(state, now_ns)
        effects += owed.lift(state, now_ns)  # before anything is answered: what is answered has been written
        effects += handover.tick(state, now_ns)
        return [*effects, *settle.tick(state, now_ns), *forget.tick(state, now_ns), *sweep.tick(state, now_ns)]

    # --- Failures -----------------------------------------------------------------------------------------------------
    def _effects_failed(self, event: EffectsFailed, now_ns: int) -> Effects:
        effects: Effects = []
        for undone in (event.failed, *event.rest):
            effects += self._undone(undone, event.reason, now_ns)
        if self._state.unwritten:
            self._state.unwritten.reason = event.reason
        return [*effects, Trace("effects failed", detail=f"{type(event.failed).__name__}: {event.reason}")]

    def _undone(self, effect: KeeperEffect, reason: str, now_ns: int) -> Effects:
        """What becomes of an effect that was not carried out."""
        unwritten = self._state.unwritten
        match effect:
            case WriteSlots() | CreateVip():
                unwritten.vips.add(effect.vip)
            case DeleteVip():
                unwritten.deleted.add(effect.vip)
            case Configure():
                unwritten.configure = True
            case WriteOwnership():
                unwritten.ownership = True
            case Remember():
                unwritten.remember = True
            case DropRecords():
                forget.drop_failed(self._state)
            case DropFlows():
                unwritten.flows = True
            case Ask() | LookRecords() | DumpRecords() | PutRecords() | LookNat() | LookSeen():
                return self._unanswered(AskFailed(effect.token, reason), now_ns)
            case Reply():
                sentence = f"{self._state.node_name} could not write what it would have to acknowledge: {reason}"
                return [Refuse(effect.request, UNWRITTEN, sentence)]
            case Refuse():
                return [effect]
            case PutCache() | Tell() | DropNat() | StampNatFull() | Trace():
                # The fast path notes flows again; a lost telling is asked about; the next sweep finds what is still
                # over, and that the stamp is missing; nobody needs a trace.
                pass
            case _:
                assert_never(effect)
        return []

    def _write_again(self, now_ns: int) -> Effects:
        """Everything that failed effects have left to be written, whole, from the mirror."""
        state, unwritten = self._state, self._state.unwritten
        if not unwritten:
            return []
        effects: Effects = []
        written: Effects = []
        for vip in sorted(unwritten.vips & state.vips.keys()):
            vs = state.vips[vip]
            vs.slots.count_anew(now_ns)
            effects.append(CreateVip(vip))
            written.append(WriteSlots(vip, np.arange(SLOT_COUNT, dtype=np.uint32), vs.slots.words.copy()))
        if state.newest is not None:
            effects.append(state.configure())
        if unwritten.ownership and state.own is not None:
            effects.append(WriteOwnership(state.own, state.next, state.prev))
        if unwritten.flows:
            effects.append(DropFlows())
        effects += written
        effects += [DeleteVip(vip) for vip in sorted(unwritten.deleted - state.vips.keys())]
        if unwritten.remember:
            effects.append(change.remember(state))
        state.unwritten = type(unwritten)()
        return effects
