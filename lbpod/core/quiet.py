"""As host agent: which slots of a VIP still have a live flow to one of these backends on this node?

The host agent sees every packet of its pods' flows in both directions, so it alone knows when a flow has ended.
Owners ask it in order to settle before the idle timeout (``settle``, early). Its word is the only thing that may cut
the quiet time short, so it errs on one side only: *cannot tell* where entries may have been evicted, or where it does
not know what it is asked about; *live* where one side has not closed yet.

All slots of a question are answered from one list of all translated flows, and questions that come together share one
(NAT_DUMP_AGE_NS): a change makes every owner ask every host at about the same time.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lbpod.core.flows import endpoints_match, live
from lbpod.core.keeper_state import Answer, Effects, Question, State, ids_from
from lbpod.core.limits import NAT_DUMP_AGE_NS, QUEUE_MAX, SLOT_COUNT
from lbpod.core.messages import DumpNat, NatDumped, QuietAnswer, QuietCall, Refuse, Reply
from lbpod.core.model import Backend, Vip

Bools = npt.NDArray[np.bool_]

BUSY = 503
_CANNOT_TELL = QuietAnswer(can_tell=False, quiet=b"")


def asked(state: State, request: int, call: QuietCall, now_ns: int) -> Effects:
    """POST /v1/slots/quiet: answered from the last list of translated flows where it is fresh, else from a new one."""
    if state.nat is not None and now_ns - state.nat_asked_ns <= NAT_DUMP_AGE_NS:
        return [Reply(request, _answer(state, call, state.nat, now_ns))]
    if len(state.nat_waiting) >= QUEUE_MAX or not state.has_room():
        return [Refuse(request, BUSY, f"{state.node_name} has too many questions open; ask again later")]
    if state.nat_waiting:
        state.nat_waiting.append((request, call))
        return []
    state.nat_waiting.append((request, call))
    return [DumpNat(state.open(_Dumped(now_ns), now_ns))]


def let_go(state: State, now_ns: int) -> None:
    """A list that is too old to answer from is not kept: it may be large."""
    if state.nat is not None and now_ns - state.nat_asked_ns > NAT_DUMP_AGE_NS:
        state.nat = None


@dataclass(frozen=True, slots=True)
class _Dumped(Question):
    """All that wait (State.nat_waiting) are answered from this list."""

    asked_at_ns: int

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        if not isinstance(answer, NatDumped):
            return self.failed(state, "the list is not one of flows", now_ns)
        state.nat, state.nat_asked_ns = answer, self.asked_at_ns
        waiting, state.nat_waiting = state.nat_waiting, []
        return [Reply(request, _answer(state, call, answer, now_ns)) for request, call in waiting]

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        waiting, state.nat_waiting = state.nat_waiting, []
        return [Reply(request, _CANNOT_TELL) for request, _ in waiting]


def _answer(state: State, call: QuietCall, nat: NatDumped, now_ns: int) -> QuietAnswer:
    vip, backends = _find(state, call)
    if nat.full or vip is None or backends is None:
        return _CANNOT_TELL
    busy = busy_slots(state, vip, backends, nat, now_ns)
    slots = np.frombuffer(call.slots, dtype="<u2")
    return QuietAnswer(can_tell=True, quiet=(~busy[slots]).astype(np.uint8).tobytes())


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


def busy_slots(state: State, vip: Vip, backends: list[Backend], nat: NatDumped, now_ns: int) -> Bools:
    """(SLOT_COUNT,): which slots of the VIP have a live flow to one of these backends."""
    keys, values = nat.keys, nat.values
    ours = (values["vip_port_be"] == vip.port) & (keys["protocol"] == int(vip.protocol))
    ours &= (values["vip"] == np.frombuffer(vip.address, dtype=np.uint8)).all(axis=1)
    keys, values = keys[ours], values[ours]
    meant = endpoints_match(keys["pod"], keys["pod_port_be"], ((one.address, one.port) for one in backends))
    idle_ns = int(state.facts.idle_ns[vip.id])
    keys = keys[meant & live(keys, values, idle_ns, now_ns)]
    busy = np.zeros(SLOT_COUNT, dtype=np.bool_)
    busy[state.facts.slots_of(vip.id, keys["client"], keys["client_port_be"].astype(np.uint16))] = True
    return busy
