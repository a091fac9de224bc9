"""A ring change at one LB: prepare, switch, done, and what becomes of it when it is given up.

Theory of operation (DESIGN: section 4). A generation that changes the ring changes nothing else. It walks ::

    staged ──prepare──► PREPARED ──handover──► HANDED ──switch──► SWITCHED ──done──► NONE
                        own, next               own, next          own, prev          own

- *staged*: what may contradict a record that a chain is about to bring is dropped first. Who joins drops all it knows,
  and owns nothing from then on: one that was given up while it lived may still count itself in a ring that is over, and
  what it recorded by that would be there when it has joined. Who stays drops the records of slots of which it is no
  replica (an earlier ring has left them). Acknowledged then:
  no chain comes here before everybody has.
- *prepared*: replicas are own and next, so what is recorded from now on reaches those who will own the slot. Who
  joins serves all VIPs with every slot tracking, ``base`` = ``current`` = the table: it relays what it cannot know.
- *handed*: see ``handover``.
- *switched*: LBs switch at different moments; until all have, both rings' replicas are in every chain, and a packet
  that is relayed by either is decided where it arrives. Who only joins by ``next`` decides nothing before: what the
  router gives it, it relays.
- *done*: ``prev`` goes, and with it the slots of an LB that has left.

While any of this is under way nothing settles, nothing is rebased and nothing is forgotten (``State.is_calm``): the
words and the records that are handed over must not move meanwhile.

**Given up.** As long as nobody has switched, a change can be replaced: by another ring change (``next`` is computed
anew), or by a generation that changes no ring, which takes ``next`` back. Who has staged the replacement switches no
more, so that it is known by then whether anybody has. What ``next`` has brought here is foreign then, and is dropped
when the next ring change is staged, or with the next list of all records.

**A change of backends that was prepared, and not committed by anybody,** may be replaced by a ring change (an LB was
lost in the middle). What it made track goes on tracking, which is always safe.

Left to others: owner, backup and the three arrays (``State.update_ring``), pages (``handover``), who takes part and
when the next step comes (the Planner).
"""

from dataclasses import dataclass, field

import numpy as np

from lbpod.core import change, forget
from lbpod.core.flows import Rows
from lbpod.core.keeper_state import Effects, Plan, State, VipState
from lbpod.core.layout import FLOW, RECORD
from lbpod.core.limits import RETRY_NS
from lbpod.core.listing import Listing
from lbpod.core.messages import (
    CreateVip,
    DeleteVip,
    DropFlows,
    DropRecords,
    DumpRecords,
    RecordsDumped,
    Refuse,
    Reply,
    RingDoneCall,
    RingPrepareCall,
    RingStep,
    RingSwitchCall,
    Trace,
)
from lbpod.core.model import Snapshot

BUSY = 503


# --- Stage ------------------------------------------------------------------------------------------------------------
def stage(state: State, request: int, snapshot: Snapshot, with_snapshot: bool, now_ns: int) -> Effects:
    """PUT /v1/snapshot of a ring change: first goes what may contradict what chains will bring."""
    try:
        plan = change.accept(state, snapshot)
    except change.Refused as refused:
        return [Refuse(request, change.CONFLICT, str(refused))]
    if plan is None:
        return [Reply(request, state.status(with_snapshot))]
    if state.joins(plan.snapshot):
        state.staged = plan
        return [*state.update_ring(now_ns), DropFlows(), Reply(request, state.status(with_snapshot))]
    if not state.in_ring(plan.snapshot) or state.own is None:
        state.staged = plan
        return [Reply(request, state.status(with_snapshot))]
    if not state.has_room():
        return [Refuse(request, BUSY, f"{state.node_name} has too many questions open; ask again later")]
    return [DumpRecords(state.open(_Cleaned(request, plan, with_snapshot, _plans(state)), now_ns))]


def _plans(state: State) -> tuple[Plan | None, ...]:
    return (state.staged, state.prepared, state.committed)


@dataclass(frozen=True, slots=True, eq=False)
class _Cleaned(Listing):
    """All records, to find those that are foreign here. Nothing happens before the last slice: staged and rid of them,
    or neither. (Who has not staged it may still switch to the ring before, and own what was to be dropped.)"""

    request: int
    plan: Plan
    with_snapshot: bool
    plans: tuple[Plan | None, ...]
    """Those that there were when it was accepted."""
    found: list[tuple[Rows, Rows]] = field(default_factory=list)
    """Flows that were foreign when they were listed, and their records."""

    def some(self, state: State, listed: RecordsDumped, now_ns: int) -> Effects:
        gone = forget.foreign(state, listed.flows)
        self.found.append((listed.flows[gone], listed.records[gone]))
        return []

    def ended(self, state: State, now_ns: int) -> Effects:
        newest = state.staged
        if newest is not None and newest.generation > self.plan.generation:
            return [Reply(self.request, state.status(self.with_snapshot))]
        is_as_it_was = all(one is other for one, other in zip(self.plans, _plans(state), strict=True))
        try:
            plan = self.plan if is_as_it_was else change.accept(state, self.plan.snapshot)
        except change.Refused as refused:
            return [Refuse(self.request, change.CONFLICT, str(refused))]
        if plan is None:  # it has come twice, and chains may have brought what was foreign when it was listed
            return [Reply(self.request, state.status(self.with_snapshot))]
        state.staged, state.foreign_due = plan, False
        flows = np.concatenate([part[0] for part in self.found], dtype=FLOW, casting="no")
        records = np.concatenate([part[1] for part in self.found], dtype=RECORD, casting="no")
        gone = forget.foreign(state, flows)
        effects: Effects = [DropRecords(flows[gone], records[gone])] if gone.any() else []
        return [*effects, Reply(self.request, state.status(self.with_snapshot))]

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        return [Refuse(self.request, BUSY, f"{state.node_name} cannot look at its records: {reason}")]


# --- Prepare ----------------------------------------------------------------------------------------------------------
def prepare(state: State, request: int, call: RingPrepareCall, now_ns: int) -> Effects:
    """POST /v1/ring/prepare: from now on `next` is in every chain."""
    try:
        plan = change.to_prepare(state, call)
        if plan is None:
            return [Reply(request, state.status())]
        tables = _check_prepare(state, plan)
    except change.Refused as refused:
        return [Refuse(request, change.CONFLICT, str(refused))]
    effects = change.leave_ring_change(state)
    gone: list[int] = []
    if state.joins(plan.snapshot):
        gone = sorted(state.vips)
        state.vips.clear()
        state.committed = None
        state.resting.clear()
    state.prepared, state.ring_step, state.ring_round = plan, RingStep.PREPARED, 0
    state.refresh()
    known = {vip.id for vip in plan.snapshot.vips}
    if not any(state.in_ring(each.snapshot) for each in state.plans()):
        known = set()  # the ring change before has taken it out
    gone += sorted(state.vips.keys() - known)
    effects += _leave_backends(state, known)
    written: Effects = []
    for vip in plan.snapshot.vips if state.in_ring(plan.snapshot) else ():
        if vip.id not in state.vips:
            vs = state.vips[vip.id] = VipState(vip.id, vip=vip)
            effects.append(CreateVip(vip.id))
            written += state.write(vs, vs.slots.adopt(tables[vip.id], False, now_ns))
    effects += [state.configure(), *state.update_ring(now_ns), *written]
    effects += [DeleteVip(vip) for vip in gone if vip not in state.vips]
    effects += [change.remember(state), Trace("ring prepared", detail=f"generation {plan.generation}")]
    return [*effects, Reply(request, state.status())]


def _check_prepare(state: State, plan: Plan) -> dict[int, change.U32]:
    """Tables of the VIPs that are new here. Raises Refused."""
    if not plan.changes_ring:
        raise change.Refused(f"generation {plan.generation} changes no ring; prepare its backends")
    if state.joins(plan.snapshot):
        return change.build_all(state, plan)
    is_member = state.member_in(plan.snapshot) in plan.snapshot.ring.before
    if is_member and (state.committed is None or state.committed.snapshot.vips != plan.snapshot.vips):
        raise change.Refused(
            f"{state.node_name} is in the ring and has not committed what generation {plan.generation} says is "
            "in force; bring it there first"
        )
    return {}


def _leave_backends(state: State, known: set[int]) -> Effects:
    """A change of backends that was prepared is no more: its VIPs go, what tracks goes on tracking."""
    for vip_id in sorted(state.vips.keys() - known):
        del state.vips[vip_id]
    effects: Effects = []
    for _, vs in sorted(state.vips.items()):
        effects += state.write(vs, vs.slots.leave(state.alive))
    return effects


# --- Switch and done --------------------------------------------------------------------------------------------------
def switch(state: State, request: int, call: RingSwitchCall, now_ns: int) -> Effects:
    """POST /v1/ring/switch: the new ring's replicas have all that there is to know, so they own the slots."""
    done, plan = state.committed, state.prepared
    if done is not None and (done.generation, done.digest) == (call.generation, call.digest):
        return [Reply(request, state.status())]
    where = state.node_name
    if plan is None or plan.generation != call.generation or plan.digest != call.digest or not plan.changes_ring:
        sentence = f"{where} has not prepared a ring change of generation {call.generation} with these contents"
        return [Refuse(request, change.CONFLICT, sentence)]
    if state.staged is not None and state.staged.generation > plan.generation:
        sentence = (
            f"generation {state.staged.generation} has been pushed to {where}, which supersedes {call.generation}"
        )
        return [Refuse(request, change.CONFLICT, sentence)]
    if state.ring_step is not RingStep.HANDED:
        sentence = f"{where} has not handed over what generation {call.generation} takes from it; let it do that first"
        return [Refuse(request, change.CONFLICT, sentence)]
    state.committed, state.prepared, state.ring_step = Plan(plan.snapshot, plan.digest), None, RingStep.SWITCHED
    state.refresh()
    known = {vip.id: vip for vip in plan.snapshot.vips}
    for vip_id, vs in state.vips.items():
        vs.vip = known[vip_id]
    # Ownership first, for a chain must not miss the new replicas; `self` and who is a member follow.
    effects = [*state.update_ring(now_ns), state.configure(), change.remember(state)]
    return [*effects, Trace("ring switched", detail=f"generation {plan.generation}"), Reply(request, state.status())]


def done(state: State, request: int, call: RingDoneCall, now_ns: int) -> Effects:
    """POST /v1/ring/done: everybody has switched, and what was on its way to an old owner has arrived."""
    plan, where = state.committed, state.node_name
    if plan is None or (plan.generation, plan.digest) != (call.generation, call.digest):
        sentence = f"{where} has not switched to the ring of generation {call.generation} with these contents"
        return [Refuse(request, change.CONFLICT, sentence)]
    if state.ring_step is not RingStep.SWITCHED:
        return [Reply(request, state.status())]
    state.ring_step, state.ring_round, state.records_quiet = RingStep.NONE, 0, False
    stays = state.in_ring(plan.snapshot)
    gone = [] if stays else sorted(state.vips)
    if not stays:
        state.vips.clear()
    effects = [*state.update_ring(now_ns), state.configure(), *(DeleteVip(vip) for vip in gone)]
    if not stays:
        state.purge.clear()
        state.purge_kept.clear()
        state.purging.clear()
        effects.append(DropFlows())
    for _, vs in sorted(state.vips.items()):
        vs.scan_at_ns, vs.scan_pause_ns, vs.early_pause_ns = now_ns, RETRY_NS, RETRY_NS
    effects += [change.remember(state), Trace("ring changed", detail=f"generation {plan.generation}")]
    return [*effects, Reply(request, state.status())]
