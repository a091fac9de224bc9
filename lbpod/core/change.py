"""A change of the backends at one LB: a snapshot is staged, prepared, committed; and found again after a restart.

Decided here: what is refused (an older generation, another cluster, an id that still means something else, a table
that comes out differently), what prepare and commit do to each VIP, and *in which order effects leave*. Words are
``transition``'s, settling is ``settle``'s.

**Orders**, each prefix of which is safe:

- prepare: slots are made, then backends are written alive and the VIP becomes known, then ownership, then slots turn
  tracking, then it is kept on disk, then acknowledged. Nothing is acknowledged that was not written.
- commit: ``current`` moves first and leaves the backends that are gone; only then are they marked dead; VIPs that are
  gone leave the index before their slots go; then disk, then the answer.

**What is new at this LB.** A VIP that the prepared generation has created has no flows anywhere: its slots stay 0
(dropped, not answered with RST) until commit and start steady. A VIP that is older but unknown here (this LB has lost
its maps in a living cluster) is tracked whole.

**A controller that was replaced** may prepare g2 while g1 is prepared. Some LB may have committed g1, so nothing that
g1 made track is taken back, and g1's backends are possible in its slots (``transition.prepare``, begun).

**Host-only nodes** (in no ring) go through the same steps without slots, so that "everybody is at g" means one thing.
"""

from collections.abc import Iterable

import msgspec
import numpy as np
import numpy.typing as npt

from lbpod.core import forget, owed
from lbpod.core.errors import SnapshotError
from lbpod.core.keeper_state import Effects, Endpoint, Plan, State, VipState, plan_of, same_table
from lbpod.core.limits import ENDED_NS, LEASE_NS_MAX, MARGIN_NS, RETRY_NS, SLOT_COUNT, STEADY_ASK_NS
from lbpod.core.messages import (
    CommitCall,
    CreateVip,
    DeleteVip,
    PrepareCall,
    Refuse,
    Remember,
    Reply,
    Restored,
    RingPrepareCall,
    RingStep,
    Trace,
)
from lbpod.core.model import Backend, Snapshot, Vip
from lbpod.core.snapshot import Tables, check_index, eligible, endpoint, is_table_of
from lbpod.core.transition import Slots, base_of, current_of

U32 = npt.NDArray[np.uint32]
Words = npt.NDArray[np.uint64]

CONFLICT = 409


class Refused(Exception):  # noqa: N818  (an answer, not an error of ours)
    """The call cannot be granted. str(): one sentence for whoever called."""


# --- Stage ------------------------------------------------------------------------------------------------------------
def stage(state: State, request: int, snapshot: Snapshot, with_snapshot: bool) -> Effects:
    """PUT /v1/snapshot: accept what is to be prepared next. Nothing that forwards packets changes."""
    try:
        state.staged = accept(state, snapshot) or state.staged
    except Refused as refused:
        return [Refuse(request, CONFLICT, str(refused))]
    return [Reply(request, state.status(with_snapshot))]


def accept(state: State, snapshot: Snapshot) -> Plan | None:
    """The plan to be staged, with its tables; None: it was accepted before. Raises Refused."""
    plan = plan_of(snapshot)
    if _is_known(state, plan) and not state.foreign_due:
        return None
    if not state.joins(snapshot):  # who joins forgets all that an id could have named
        _check_ids(state, snapshot)
        _check_index(state, snapshot)
    tables = _tables(state, plan, (state.prepared, state.staged))
    return Plan(_shared(state, snapshot), plan.digest, tables)


def _shared(state: State, snapshot: Snapshot) -> Snapshot:
    """The same, with the objects that are known already for VIPs that have not changed: they take no second room, and
    whoever compares two snapshots sees at once that nothing differs."""
    known = {vip.id: vip for plan in reversed(state.plans()) for vip in plan.snapshot.vips}
    if state.staged is not None:
        known |= {vip.id: vip for vip in state.staged.snapshot.vips}
    vips = tuple(known[vip.id] if known.get(vip.id) == vip else vip for vip in snapshot.vips)
    return msgspec.structs.replace(snapshot, vips=vips)


def _is_known(state: State, plan: Plan) -> bool:
    """True where this very snapshot was accepted before."""
    last = state.staged
    if last is None:
        return False
    generation, cluster = plan.generation, plan.snapshot.cluster
    if cluster != last.snapshot.cluster:
        raise Refused(
            f"{state.node_name} belongs to another cluster (VNI {last.snapshot.cluster.vni}, not {cluster.vni}, or "
            "another seed); remove its maps and its state before it joins this one"
        )
    if generation < last.generation:
        raise Refused(
            f"generation {generation} is older than {last.generation}, which {state.node_name} has accepted; read its "
            "state and continue from there"
        )
    if generation == last.generation and plan.digest != last.digest:
        raise Refused(
            f"generation {generation} was accepted by {state.node_name} with other contents; two controllers are at "
            "work, stop one"
        )
    return generation == last.generation


def _check_ids(state: State, snapshot: Snapshot) -> None:
    """Ids may not change their meaning while a slot, a record or a lease may still name them."""
    wanted = {vip.id: vip for vip in snapshot.vips}
    named: dict[int, Endpoint] = {number: known for number, (known, _) in state.resting.items()}
    for plan in state.plans():
        for vip in plan.snapshot.vips:
            new = wanted.get(vip.id)
            if new is not None and _identity(new) != _identity(vip):
                raise Refused(
                    f"VIP id {vip.id} still names {endpoint(vip)} with affinity {vip.affinity.name} on "
                    f"{state.node_name}, not {endpoint(new)} with {new.affinity.name}; remove the VIP, then add it anew"
                )
            if new != vip:
                named.update(_endpoints((vip,)))
    known = [{vip.id: vip for vip in plan.snapshot.vips} for plan in state.plans()]
    changed = (vip for vip in snapshot.vips if all(those.get(vip.id) != vip for those in known))
    for number, new_one in _endpoints(changed).items():
        if named.get(number, new_one) != new_one:
            raise Refused(
                f"backend id {number} named another endpoint that flows on {state.node_name} may still refer to; use "
                "another id, or wait a minute"
            )


def _check_index(state: State, snapshot: Snapshot) -> None:
    """Between prepare and commit the index holds the VIPs of both: each set may fit, and both together not."""
    if state.committed is None:
        return
    before = {_identity(vip)[:3]: vip for vip in state.committed.snapshot.vips}
    after = {_identity(vip)[:3]: vip for vip in snapshot.vips}
    if after.keys() <= before.keys():
        return
    try:
        check_index({**before, **after}.values())
    except SnapshotError as error:
        raise Refused(
            f"{error}, counting those that are to go: remove them first, and add the new ones with another change"
        ) from error


def _identity(vip: Vip) -> tuple[bytes, int, int, int]:
    return vip.address, vip.port, int(vip.protocol), int(vip.affinity)


def _endpoints(vips: Iterable[Vip]) -> dict[int, Endpoint]:
    return {one.id: (vip.id, one.address, one.port) for vip in vips for one in vip.backends}


def _tables(state: State, plan: Plan, others: Iterable[Plan | None], from_slots: bool = True) -> dict[int, U32]:
    """Tables of the VIPs whose table is not what their slots have: from other plans, else built.

    Each LB builds its own; the controller's digest says whether it is the same, bit for bit.
    """
    tables: dict[int, U32] = {}
    if not state.in_ring(plan.snapshot):
        return tables
    sources = [({vip.id: vip for vip in other.snapshot.vips}, other.tables) for other in others if other is not None]
    for vip in plan.snapshot.vips:
        vs = state.vips.get(vip.id)
        if from_slots and vs is not None and vs.vip is not None and _makes(vip, vs.vip):
            digest = vs.vip.digest
        else:
            for known, found in sources:
                if vip.id in found and vip.id in known and _makes(vip, known[vip.id]):
                    tables[vip.id], digest = found[vip.id], known[vip.id].digest
                    break
            else:
                tables[vip.id], digest = _build(state, plan.snapshot, vip)
        if digest != vip.digest and not _is_table(tables.get(vip.id), vs, vip):
            raise Refused(
                f"the table of VIP {vip.name} comes out differently on {state.node_name} (digest {digest.hex()}, the "
                f"controller has {vip.digest.hex()}); run the same version on both"
            )
    return tables


def _is_table(table: U32 | None, vs: VipState | None, vip: Vip) -> bool:
    """Whether this table (None: that of the slots) has a digest as another release makes it."""
    if table is None and vs is not None:
        table = current_of(vs.slots.words)
    return table is not None and is_table_of(table, vip)


def build_all(state: State, plan: Plan) -> dict[int, U32]:
    """Tables of all VIPs, for an LB that joins. Raises Refused."""
    return _tables(state, plan, (state.staged,), from_slots=False)


def _makes(vip: Vip, other: Vip) -> bool:
    return vip is other or same_table(eligible(vip.backends), eligible(other.backends))


def _build(state: State, snapshot: Snapshot, vip: Vip) -> tuple[U32, bytes]:
    if state.tables is None:
        state.tables = Tables(snapshot.cluster.seed)
    table = state.tables.table((vip.address, vip.port, int(vip.protocol)), vip.backends)
    return table.current, table.digest


# --- Prepare ----------------------------------------------------------------------------------------------------------
def prepare(state: State, request: int, call: PrepareCall, now_ns: int) -> Effects:
    """POST /v1/prepare: track every slot that will differ, so that whoever commits first disturbs nobody."""
    try:
        plan = to_prepare(state, call)
        if plan is None:
            return [Reply(request, state.status())]
        if plan.changes_ring:
            raise Refused(f"generation {plan.generation} changes the ring, not its backends; prepare the ring")
        _check_index(state, plan.snapshot)
        tables = _tables(state, plan, (state.staged,))
    except Refused as refused:
        return [Refuse(request, CONFLICT, str(refused))]
    effects = leave_ring_change(state)
    begun = state.prepared.tables if state.prepared is not None else {}
    is_new_ring = state.committed is not None and not state.committed.snapshot.ring.members
    state.prepared = Plan(plan.snapshot, plan.digest, tables)
    state.refresh()
    created: Effects = []
    written: Effects = []
    for vip in plan.snapshot.vips if state.in_ring(plan.snapshot) else ():
        vs = state.vips.get(vip.id)
        if vs is None:
            vs = state.vips[vip.id] = VipState(vip.id)
            created.append(CreateVip(vip.id))
            if vip.created == plan.generation or is_new_ring:
                continue
            written += state.write(vs, vs.slots.adopt(tables[vip.id], True, now_ns))
            vs.vip = vip
        elif vip.id in tables or vip.id in begun:
            table, steady = tables.get(vip.id, current_of(vs.slots.words)), ~vs.slots.tracking
            changed = vs.slots.prepare(table, begun.get(vip.id), state.alive, now_ns)
            fresh = changed[steady[changed]]
            # What a chain has brought already: to know a flow of UDP counts once base has moved.
            kept = base_of(vs.slots.at(fresh)) if state.is_unannounced(vs) else None
            forget.note_settled(state, vip.id, fresh, now_ns, kept)
            written += state.write(vs, changed)
    state.records_quiet &= not any(vs.slots.track for vs in state.vips.values())
    effects += [*created, state.configure()]
    gone: list[int] = []
    if not any(state.in_ring(known.snapshot) for known in state.plans()):
        gone = sorted(state.vips)  # it was to join, and is not to any more
        state.vips.clear()
    effects += [*state.update_ring(now_ns), *written, *(DeleteVip(vip) for vip in gone)]
    effects += [remember(state), Trace("prepared", detail=f"generation {plan.generation}", slots=_tracking(state))]
    return [*effects, Reply(request, state.status())]


def to_prepare(state: State, call: PrepareCall | RingPrepareCall) -> Plan | None:
    """The staged plan to prepare; None: that has been done (a lost answer)."""
    where, generation = state.node_name, call.generation
    for plan in state.plans():
        if plan.generation == generation and plan.digest == call.digest:
            return None
        if generation <= plan.generation:
            raise Refused(f"generation {generation} cannot be prepared: {where} is at {plan.generation} already")
    if state.staged is None or state.staged.generation != generation:
        raise Refused(f"generation {generation} has not been pushed to {where}; put the snapshot first")
    if state.staged.digest != call.digest:
        raise Refused(f"generation {generation} on {where} has other contents than the ones to prepare")
    return state.staged


def remember(state: State) -> Remember:
    return Remember(
        committed=state.committed.snapshot if state.committed is not None else None,
        prepared=state.prepared.snapshot if state.prepared is not None else None,
        ring_done=state.ring_step is not RingStep.SWITCHED,
    )


def _tracking(state: State) -> int:
    return sum(vs.slots.tracking_count for vs in state.vips.values())


def leave_ring_change(state: State) -> Effects:
    """A newer generation is prepared: a ring change that was prepared, and that nobody has switched to, is taken back;
    one that was switched to is done, for nothing follows before everybody has switched (a lost call, or an agent that
    was away, or it would be known here)."""
    state.handover = None
    if state.ring_step is RingStep.NONE:
        return []
    what = "ring changed" if state.ring_step is RingStep.SWITCHED else "ring change taken back"
    state.ring_step, state.ring_round, state.records_quiet = RingStep.NONE, 0, False
    return [Trace(what, detail="a newer generation says so")]


# --- Commit -----------------------------------------------------------------------------------------------------------
def commit(state: State, request: int, call: CommitCall, now_ns: int) -> Effects:
    """POST /v1/commit: new flows get the new table. Everybody tracks what differs by now, so skew cannot hurt."""
    done, plan = state.committed, state.prepared
    if done is not None and (done.generation, done.digest) == (call.generation, call.digest):
        return [Reply(request, state.status())]
    if plan is None or plan.generation != call.generation or plan.changes_ring:
        sentence = f"generation {call.generation} has not been prepared on {state.node_name}; prepare it first"
        return [Refuse(request, CONFLICT, sentence)]
    if plan.digest != call.digest:
        sentence = f"generation {call.generation} on {state.node_name} has other contents than the ones to commit"
        return [Refuse(request, CONFLICT, sentence)]
    named = _endpoints(vip for known in reversed(state.plans()) for vip in known.snapshot.vips)
    was_alive = state.alive
    state.committed, state.prepared = Plan(plan.snapshot, plan.digest), None
    if state.staged is not None and state.staged.generation == plan.generation:
        state.staged = state.committed  # its tables are in the slots
    state.refresh()
    for number in np.flatnonzero(was_alive & ~state.alive).tolist():
        state.resting[number], state.died_at_ns = (named[number], now_ns), now_ns
    effects: Effects = []
    kept = {vip.id: vip for vip in plan.snapshot.vips} if state.in_ring(plan.snapshot) else {}
    gone = sorted(state.vips.keys() - kept.keys())
    for vip_id in gone:
        del state.vips[vip_id]
        state.purge.pop(vip_id, None)
        state.purge_kept.pop(vip_id, None)
        state.purging.pop(vip_id, None)
    effects += state.update_ring(now_ns)
    for vip_id, vs in sorted(state.vips.items()):
        effects += state.write(vs, vs.slots.commit(plan.tables.get(vip_id), state.alive, now_ns))
        vs.vip = kept[vip_id]
        _hasten(vs, now_ns)
    effects += [state.configure(), *(DeleteVip(vip_id) for vip_id in gone), remember(state)]
    effects.append(Trace("committed", detail=f"generation {plan.generation}", slots=_tracking(state)))
    return [*effects, Reply(request, state.status())]


def _hasten(vs: VipState, now_ns: int) -> None:
    """After a change the pauses between attempts to settle start short again."""
    vs.scan_at_ns = vs.early_at_ns = now_ns
    vs.scan_pause_ns = vs.early_pause_ns = RETRY_NS
    vs.look_at_ns = now_ns + STEADY_ASK_NS


def let_ids_rest(state: State, now_ns: int) -> None:
    """Ids of dead backends may be used again once no lease and no record can name them.

    Leases end by themselves; records of dead backends are dropped from each list of all records, ENDED_NS after the
    backend's death (``forget``).
    """
    over = [
        number
        for number, (_, died_at_ns) in state.resting.items()
        if died_at_ns + LEASE_NS_MAX + MARGIN_NS < now_ns and died_at_ns + ENDED_NS < state.dumps.done_ns
    ]
    for number in over:
        del state.resting[number]


# --- Restart ----------------------------------------------------------------------------------------------------------
def restore(state: State, event: Restored, now_ns: int) -> Effects:
    """The agent has restarted; the fast path has not. Take up what was kept, and write only what differs."""
    state.committed = plan_of(event.committed) if event.committed is not None else None
    state.prepared = plan_of(event.prepared) if event.prepared is not None else None
    state.staged = state.prepared or state.committed
    if state.prepared is not None and state.prepared.changes_ring:
        state.ring_step = RingStep.PREPARED
    elif state.committed is not None and state.committed.changes_ring and not event.ring_done:
        state.ring_step = RingStep.SWITCHED
    state.refresh()
    state.down = set(event.down - {state.member})  # one answer, and it is up; the other way round takes BEAT_DOWN_NS
    state.watch.given_up_before = set(event.given_up & state.down)
    state.watch.hearsay = set(state.down)
    created: Effects = []
    written: Effects = []
    nothing = np.zeros(SLOT_COUNT, dtype=np.uint32)
    changing = state.prepared is not None and not state.prepared.changes_ring
    for vip_id, (committed, prepared) in sorted(_vips_to_restore(state).items()):
        found = event.slots.get(vip_id)
        table = _table_of(state, committed, found) if committed is not None else nothing
        other = _build_of(state, prepared) if prepared is not None and not _same(prepared, committed) else None
        if other is not None and state.prepared is not None:
            state.prepared.tables[vip_id] = other
        vs = state.vips[vip_id] = VipState(vip_id, Slots(found))
        if found is None:
            created.append(CreateVip(vip_id))
        if committed is not None and (found is None or not found.any()) and table.any():
            changed = vs.slots.adopt(table, changing, now_ns)
        else:
            changed = vs.slots.restore(table, other, state.alive, changing, now_ns)
        vs.vip = committed if (current_of(vs.slots.words) == table).all() else None
        if state.prepared is not None and prepared is not None and vs.vip is None:
            state.prepared.tables.setdefault(vip_id, _build_of(state, prepared))
        written += state.write(vs, changed)
        if len(agreed := vs.slots.agreed):  # what was to be dropped has been forgotten
            forget.note_settled(state, vip_id, agreed, now_ns, current_of(vs.slots.at(agreed)))
        owed.wait(vs, now_ns)
        _hasten(vs, now_ns)
    state.refresh()
    state.records_quiet = False
    # Whose slots these were before, and until when, has been forgotten: they may have seen what this LB has not.
    state.replicas_changed_ns = np.full(SLOT_COUNT, now_ns, dtype=np.uint64)
    effects: Effects = [*created]
    if state.newest is not None:
        effects += [state.configure(), *state.update_ring(now_ns)]
    effects += written
    effects += [DeleteVip(vip_id) for vip_id in sorted(event.slots.keys() - state.vips.keys())]
    return [*effects, Trace("restored", detail=f"generation {state.generation}", slots=_tracking(state))]


def _vips_to_restore(state: State) -> dict[int, tuple[Vip | None, Vip | None]]:
    """VIP id -> as committed, as prepared."""
    found: dict[int, tuple[Vip | None, Vip | None]] = {}
    if state.committed is not None and state.in_ring(state.committed.snapshot):
        found = {vip.id: (vip, None) for vip in state.committed.snapshot.vips}
    if state.prepared is not None and state.in_ring(state.prepared.snapshot):
        for vip in state.prepared.snapshot.vips:
            found[vip.id] = found.get(vip.id, (None, None))[0], vip
    return found


def _same(prepared: Vip, committed: Vip | None) -> bool:
    backends: tuple[Backend, ...] = committed.backends if committed is not None else ()
    return same_table(eligible(prepared.backends), eligible(backends))


def _table_of(state: State, vip: Vip, found: Words | None) -> U32:
    """The committed table: what the slots found have, where their digest says so. Building it for each VIP would be
    most of what a start takes where there are many."""
    current = current_of(found) if found is not None else None
    return current if current is not None and is_table_of(current, vip) else _build_of(state, vip)


def _build_of(state: State, vip: Vip) -> U32:
    assert state.newest is not None, "only what was kept is restored"
    return _build(state, state.newest.snapshot, vip)[0]
