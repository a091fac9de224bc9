"""Who has this flow? Asking the owner about flows that cannot be resolved here, and answering as one.

The fast path relays a packet that it cannot decide, and notes the flow. The packet is served; what is asked here only
spares the flow's *next* packets the detour. So nothing of this has to arrive: where a peer is silent or has enough to
do already, the flows are dropped here and the fast path notes them again.

**The lease of an answer is counted from the packet that was relayed.** That one the owner has seen, and its window
(idle + lease + margin) begins there: a flow that travels on a lease is unseen for ``lease`` and silent for ``idle`` at
most. Counting from the question, or from the answer, would add however long the question took to be asked: with an
agent that was stopped for three seconds, the owner settled slots whose flows lived, and they broke. And who answers
counts from the stamp that it has, of the record or of the slot, for the packet may have been lost: a flow whose relayed
packets were, three in a row, was forgotten while it lived on leases.

**What an owner may promise.** With a record: its backend. Without one, TCP: base, where the owner itself sends the
flow's packets; nothing, where it has asked the backup to settle the slot and has no answer (the backup decides then).
Nothing with a record of a SYN alone: the packet that made us ask would have made it a full one, had it come through,
or had the fast path not doubted it (two replicas that do not hear each other, and the other one may have begun the
flow elsewhere). UDP or ClientIP without a record: the backend, but *no lease*. Such a flow has to be seen by the
owner, so that it is recorded: the packet that made us ask was relayed there and is recorded by now, or was lost, or
found no room. A lease on base would be safe as well (a rebase waits for the window, which contains it), but it would
keep the flow from being recorded and so put the rebase off; without one, the next packet is relayed and records it.
TCP without a record where base is current (it has died, or is about to be void) or with one that names a dead
backend: no lease either. The packet may be the last word of a flow that is over, and the next one with this
five-tuple a new connection's, whose SYN may reach another LB than the lease is at. A flow that has gone back to the
backend it had is relayed a little longer.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lbpod.core.flows import flows_from, groups
from lbpod.core.keeper_state import Answer, Effects, Question, State
from lbpod.core.layout import FLOW, LEASE
from lbpod.core.limits import BATCH_MAX, MEMBER_NONE, SLOT_COUNT
from lbpod.core.messages import (
    Ask,
    LookRecords,
    PendingDrained,
    PutCache,
    RecordsLooked,
    Refuse,
    Reply,
    ResolveAnswer,
    ResolveCall,
)
from lbpod.core.transition import base_of, current_of, is_of_round, is_settling, is_tracking, means_something, round_of

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.void]

BUSY = 503
_MS_NS = np.uint64(1_000_000)


# --- As the one who asks ----------------------------------------------------------------------------------------------
def pending(state: State, event: PendingDrained, now_ns: int) -> Effects:
    """Ask the owners (or backups) of these flows, BATCH_MAX at a time, as far as there is room for questions."""
    slots = event.values["slot"].astype(np.uint32)
    relayed_ns = np.minimum(event.values["seen_ns"].astype(np.uint64), np.uint64(now_ns))
    wanted = np.flatnonzero(state.facts.has(event.flows["vip"]) & (slots < SLOT_COUNT))
    flows, slots, relayed_ns = event.flows[wanted], slots[wanted], relayed_ns[wanted]
    rounds = round_of(state.words(flows["vip"], slots)[0])
    effects: Effects = []
    for member, places in groups(state.peer(slots)):
        node = state.node_of_member.get(member, 0)
        if member == MEMBER_NONE or not node:
            continue
        for first in range(0, len(places), BATCH_MAX):
            if not state.has_room(node):
                break
            batch = places[first : first + BATCH_MAX]
            asked = _Asked(flows[batch], slots[batch], rounds[batch], relayed_ns[batch], now_ns)
            token = state.open(asked, now_ns, node)
            effects.append(Ask(token, node, ResolveCall(state.member, flows[batch].tobytes())))
    return effects


@dataclass(frozen=True, slots=True, eq=False)
class _Asked(Question):
    """These flows were asked about: what is answered about others is never believed."""

    flows: Rows
    slots: U32
    rounds: U32
    """Of the slots, when it was asked: what is answered holds no longer."""
    relayed_ns: U64
    """When the owner was last sent a packet of each."""
    asked_ns: int

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        if not isinstance(answer, ResolveAnswer):
            return []
        backends = np.frombuffer(answer.backends, dtype="<u4").astype(np.uint32)
        leases_ms = np.frombuffer(answer.leases_ms, dtype="<u4").astype(np.uint64)
        if len(backends) != len(self.flows) or len(leases_ms) != len(self.flows):
            return []
        vips = self.flows["vip"]
        words, _ = state.words(vips, self.slots)
        # Ids are in range (the border checks). vip_of differs where a backend is another VIP's, or dead.
        useful = (
            is_tracking(words)
            & (round_of(words) == self.rounds)
            & (backends != 0)
            & (leases_ms != 0)
            & (state.vip_of[backends] == vips)
        )
        places = np.flatnonzero(useful)
        if not len(places):
            return []
        leases = np.zeros(len(places), dtype=LEASE)
        leases["backend"], leases["round"] = backends[places], self.rounds[places]
        # What was left of it when it was answered, which was after the question.
        left_ns, whole_ns = leases_ms[places] * _MS_NS, state.facts.lease_ns[vips[places]]
        leases["until_ns"] = np.minimum(self.relayed_ns[places] + whole_ns, np.uint64(self.asked_ns) + left_ns)
        return [PutCache(self.flows[places], leases)]

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        return []


# --- As the one who is asked ------------------------------------------------------------------------------------------
def asked(state: State, request: int, call: ResolveCall, now_ns: int) -> Effects:
    """POST /v1/flows/resolve: look for records first, then answer."""
    if not state.has_room():
        return [Refuse(request, BUSY, f"{state.node_name} has too many questions open; ask again later")]
    flows = flows_from(call.flows)
    known = np.flatnonzero(state.facts.has(flows["vip"]))
    flows, count = flows[known], len(flows)
    looked = _Looked(request, count, known, flows, state.facts.slots(flows))
    return [LookRecords(state.open(looked, now_ns), flows, looked.slots)]


@dataclass(frozen=True, slots=True, eq=False)
class _Looked(Question):
    """A peer waits for what is recorded about these flows."""

    request: int
    count: int
    """Of flows in the question."""
    known: npt.NDArray[np.intp]
    """Which of them are of VIPs that are served here; the others get no answer."""
    flows: Rows
    slots: U32

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        if not isinstance(answer, RecordsLooked) or len(answer.records) != len(self.flows) or answer.other_seen is None:
            return self.failed(state, "the records could not be read", now_ns)
        backends, leases_ms = np.zeros((2, self.count), dtype="<u4")
        found = decide(state, self.flows, self.slots, answer, now_ns)
        backends[self.known], leases_ms[self.known] = found
        return [Reply(self.request, ResolveAnswer(backends.tobytes(), leases_ms.tobytes()))]

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        return [Refuse(self.request, BUSY, f"{state.node_name} cannot tell: {reason}")]


def decide(state: State, flows: Rows, slots: U32, looked: RecordsLooked, now_ns: int) -> tuple[U32, U32]:
    """Backend (0: cannot tell) and lease in ms (0: do not keep) of each flow (layout.FLOW), as a replica says.
    looked: their records, and the stamp of each one's slot.

    It is the fast path's own rule (lbpod/bpf/README.md, step 6) without the side effects.
    """
    records, other_seen = looked.records, looked.other_seen
    assert flows.dtype == FLOW, "flows come in the layout of the maps"
    assert other_seen is not None, "stamps were asked for"
    vips = flows["vip"]
    words, held = state.words(vips, slots)
    tracking, current, base = is_tracking(words), current_of(words), base_of(words)
    noted = records["backend"]
    recorded = means_something(words, records) & (state.vip_of[np.where(noted < len(state.vip_of), noted, 0)] == vips)
    backend = np.where(tracking & recorded, noted, np.where(tracking & state.alive[base], base, current))
    # The backup has been asked to settle and has not answered: its base counts, and it may be another by now.
    open_ = is_settling(words) & (base != current) & ~recorded & (state.owner[slots] == state.member)
    sure = held & state.is_replica(slots) & state.alive[backend] & ~open_ & ~(tracking & recorded & looked.embryonic)
    ended = (base == current) | state.orphaned(vips, slots) | is_of_round(round_of(words), records)
    leased = sure & ~(tracking & ~recorded & (ended | state.facts.unannounced[vips]))
    # Counted from when its record, or its slot, was last stamped: a packet that was lost on its way here counts not.
    stamps = np.where(recorded, records["seen_ns"], other_seen)
    stamps = np.where(tracking & (recorded | (backend != current)), stamps, now_ns)
    left_ms = state.facts.leases_left_ms(vips, stamps, now_ns)
    return np.where(sure, backend, 0).astype(np.uint32), np.where(leased, left_ms, 0).astype(np.uint32)
