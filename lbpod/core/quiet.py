"""As host agent: which slots of a VIP still have a live flow to one of these backends on this node?

The host agent sees every packet of its pods' flows in both directions, so it alone knows when a flow has ended.
Owners ask it in order to settle before the idle timeout (``settle``, early). Its word is the only thing that may cut
the quiet time short, so it errs on one side only: *cannot tell* where entries may have been evicted (``sweep``), or
where it does not know what it is asked about; *live* where one side has not closed yet.

All slots of a question are answered from one list of all live translated flows, and questions that come together share
one: a change makes every owner ask every host at about the same time. The list is made in slices (a million entries
take half a second), and the shell may do other things between two of them. A question may use a list that was begun
before it, but by NAT_DUMP_AGE_NS at most: owners count on that (EARLY_AFTER_NS). Whoever comes later waits for the
next list.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lbpod.core import sweep
from lbpod.core.flows import LiveFlows, endpoints_match, ids_from
from lbpod.core.host_state import NatList
from lbpod.core.keeper_state import Answer, Effects, Question, State
from lbpod.core.limits import MARGIN_NS, NAT_DUMP_AGE_NS, QUEUE_MAX, SLOT_COUNT
from lbpod.core.messages import LookNat, NatLooked, QuietAnswer, QuietCall, Refuse, Reply
from lbpod.core.model import Backend, Vip

Bools = npt.NDArray[np.bool_]

BUSY = 503
_CANNOT_TELL = QuietAnswer(can_tell=False, quiet=b"")


def asked(state: State, request: int, call: QuietCall, now_ns: int) -> Effects:
    """POST /v1/slots/quiet: answered from the last list of translated flows where that is fresh, else from the next."""
    if state.host.nat is not None and _may_use(state, state.host.nat, now_ns):
        return [Reply(request, _answer(state, call, state.host.nat, now_ns))]
    if len(state.host.nat_waiting) >= QUEUE_MAX or not state.has_room():
        return [Refuse(request, BUSY, f"{state.node_name} has too many questions open; ask again later")]
    state.host.nat_waiting.append((request, call, now_ns))
    return [] if state.host.nat_looking else _begin(state, now_ns)


def let_go(state: State, now_ns: int) -> None:
    """A list that is too old to answer from is not kept: it may be large."""
    if state.host.nat is not None and not _may_use(state, state.host.nat, now_ns):
        state.host.nat = None


def _may_use(state: State, nat: NatList, asked_ns: int) -> bool:
    """May a question of that time be answered from this list?"""
    return nat.facts is state.facts and asked_ns - nat.asked_at_ns <= NAT_DUMP_AGE_NS


def _begin(state: State, now_ns: int) -> Effects:
    state.host.nat_looking = True
    return [LookNat(state.open(_Looked(NatList(now_ns, state.facts)), now_ns), None)]


@dataclass(frozen=True, slots=True)
class _Looked(Question):
    """One slice of a list."""

    nat: NatList

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        if not isinstance(answer, NatLooked):
            return self.failed(state, "the list is not one of flows", now_ns)
        nat = self.nat
        sweep.count(nat.counts, answer)
        nat.parts.append(LiveFlows.among(nat.facts, answer.keys, answer.values, now_ns - sweep.slept_ns(state, now_ns)))
        if answer.cursor is not None:
            return [LookNat(state.open(self, now_ns), answer.cursor)]
        stamp = sweep.counted(state, nat.counts, answer, now_ns)
        state.host.nat, state.host.nat_looking = nat, False
        waiting, state.host.nat_waiting = state.host.nat_waiting, []
        effects: Effects = []
        for request, call, asked_ns in waiting:
            if _may_use(state, nat, asked_ns):
                effects.append(Reply(request, _answer(state, call, nat, now_ns)))
            else:
                state.host.nat_waiting.append((request, call, asked_ns))
        # The stamp last: no answer depends on its being written.
        return [*effects, *(_begin(state, now_ns) if state.host.nat_waiting else []), *stamp]

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        state.host.nat_looking = False
        waiting, state.host.nat_waiting = state.host.nat_waiting, []
        return [Reply(request, _CANNOT_TELL) for request, _, _ in waiting]


def _answer(state: State, call: QuietCall, nat: NatList, now_ns: int) -> QuietAnswer:
    vip, backends = _find(state, call)
    if vip is None or backends is None:
        return _CANNOT_TELL
    if sweep.may_have_evicted(state, int(state.facts.idle_ns[vip.id]) + MARGIN_NS, now_ns):
        return _CANNOT_TELL
    slots = np.frombuffer(call.slots, dtype="<u2")
    return QuietAnswer(can_tell=True, quiet=(~busy_slots(vip, backends, nat)[slots]).astype(np.uint8).tobytes())


def _find(state: State, call: QuietCall) -> tuple[Vip | None, list[Backend] | None]:
    """The VIP, and the backends asked about; None where one of them is unknown here."""
    wanted = set(ids_from(call.backends).tolist())
    named: dict[int, Backend] = {}
    vip = None
    for plan in state.plans():
        for known in plan.snapshot.vips:
            if known.id == call.vip:
                vip = vip or known
                named.update((one.id, one) for one in known.backends if one.id in wanted)
    return vip, [named[number] for number in sorted(wanted)] if named.keys() == wanted else None


def busy_slots(vip: Vip, backends: list[Backend], nat: NatList) -> Bools:
    """(SLOT_COUNT,): which slots of the VIP have a live flow to one of these backends."""
    busy = np.zeros(SLOT_COUNT, dtype=np.bool_)
    for part in nat.parts:
        ours = np.flatnonzero(part.vips == vip.id)
        meant = endpoints_match(part.pods[ours], part.ports[ours], ((one.address, one.port) for one in backends))
        busy[part.slots[ours[meant]]] = True
    return busy
