"""What a person needs after the fact: which events and effects are worth an entry, and what it says.

Looks on where they pass (``Driver.observe``) and leaves text in the outbox; decides nothing else, asks nobody and waits
for nothing. Nothing is kept from one event to the next but what has to be matched: questions with their answers (so
that an answer that comes too late still says whose it is), and the newest snapshots, for names.

**Bounded work.** A commit writes 65,536 slots of each of a thousand VIPs; an entry tells of one VIP how many slots were
written and how many of them track, and shows the first few. Only SLOT_ENTRIES_MAX VIPs of one event have an entry of
their own. Decisions and answers are a sample of so many a second: decisions that are not shown were never meant to be,
answers that are not are counted as dropped.

**Which decisions.** Those that pass through an agent: flows that the fast path relayed to their owner, as the asking LB
heard of them and as the owner said it, with the reason. A flow in a steady slot leaves nothing behind anywhere, which
is what makes it cheap; where it goes is the slot's ``current``.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lbpod.agent.clock import now_ns
from lbpod.agent.outbox import Outbox, Stream
from lbpod.core.hashing import flow_hash, slot_of
from lbpod.core.layout import FLOW, RECORD_MISSING
from lbpod.core.limits import (
    ANSWER_ENTRIES_PER_SECOND_MAX,
    DECISION_ENTRIES_PER_SECOND_MAX,
    DIAGNOSTICS_QUESTIONS_MAX,
    SLOT_ENTRIES_MAX,
    SLOTS_SHOWN_MAX,
)
from lbpod.core.messages import (
    Answered,
    Ask,
    AskFailed,
    BeatAnswer,
    BeatCall,
    Called,
    Configure,
    KeeperEffect,
    KeeperEvent,
    LookRecords,
    PeerAnswer,
    PeerCall,
    RecordsLooked,
    Reply,
    ResolveAnswer,
    ResolveCall,
    SettleAnswer,
    SettleCall,
    SettleStep,
    Trace,
    WriteOwnership,
    WriteSlots,
)
from lbpod.core.model import Affinity, Backend, Snapshot, Vip, format_address
from lbpod.core.transition import base_of, current_of, is_tracking
from lbpod.datapath.port import U32, U64, DatapathError

Rows = npt.NDArray[Any]

LATE: Final = "late answer"
"""What the Keeper calls an answer to a question that it has given up."""

_STREAMS: Final = {
    "prepared": Stream.SLOTS,
    "committed": Stream.SLOTS,
    "restored": Stream.SLOTS,
    "effects failed": Stream.SLOTS,
    "settled": Stream.SETTLES,
    LATE: Stream.ANSWERS,
}
"""The stream of each line of the trace; all others tell of the ring and of who is in it."""


@dataclass(frozen=True, slots=True)
class _Question:
    node: int
    body: PeerCall
    asked_ns: int


class _Rate:
    """So many a second, and no more."""

    def __init__(self, per_second_max: int) -> None:
        self._per_second_max = per_second_max
        self._second = 0
        self._count = 0

    def allows(self, at_ns: int) -> bool:
        """True where there is room for one more; it is taken."""
        second = at_ns // 1_000_000_000
        if second != self._second:
            self._second, self._count = second, 0
        self._count += 1
        return self._count <= self._per_second_max


class Diagnostics:
    """Looks on. slots: the words of a VIP as they are in the maps."""

    def __init__(self, outbox: Outbox, slots: Callable[[int], U64]) -> None:
        self._outbox = outbox
        self._slots = slots
        self._names = Names(())
        self._own: U32 | None = None
        self._questions: dict[int, _Question] = {}
        """Token -> what was asked. Invariant: DIAGNOSTICS_QUESTIONS_MAX at most, the oldest goes first."""
        self._looked: LookRecords | None = None
        self._decisions = _Rate(DECISION_ENTRIES_PER_SECOND_MAX)
        self._answers = _Rate(ANSWER_ENTRIES_PER_SECOND_MAX)

    def seen(self, event: KeeperEvent, effects: Sequence[KeeperEffect]) -> None:
        """An event, and all that the Keeper wanted to be done about it."""
        for effect in effects:
            if isinstance(effect, Configure):
                both = (effect.prepared, effect.committed)
                self._names = Names(tuple(snapshot for snapshot in both if snapshot is not None))
        self._see_answer(event, effects)
        self._see_writes(event, [effect for effect in effects if isinstance(effect, WriteSlots)])
        for effect in effects:
            match effect:
                case Trace() if effect.what != LATE:
                    self._see_trace(effect)
                case WriteOwnership():
                    self._own = effect.own
                case Ask() if not isinstance(effect.body, BeatCall):
                    self._see_question(effect)
                case LookRecords():
                    self._looked = effect

    # --- Slots, settles, ring -------------------------------------------------------------------------------------

    def _see_trace(self, line: Trace) -> None:
        said = {
            "what": line.what,
            "vip": self._names.vip_name(line.vip),
            "slots": str(line.slots or ""),
            "detail": line.detail,
        }
        fields = {name: text for name, text in said.items() if text}
        self._outbox.put(_STREAMS.get(line.what, Stream.RING), fields)

    def _see_writes(self, event: KeeperEvent, writes: Sequence[WriteSlots]) -> None:
        because = type(event.body if isinstance(event, Called) else event).__name__
        for write in writes[:SLOT_ENTRIES_MAX]:
            shown = zip(write.slots[:SLOTS_SHOWN_MAX], write.words[:SLOTS_SHOWN_MAX], strict=True)
            fields = {
                "what": "written",
                "vip": self._names.vip_name(write.vip),
                "slots": str(len(write.slots)),
                "tracking": str(int(np.count_nonzero(is_tracking(write.words)))),
                "first": "; ".join(f"{slot} {self._names.word(write.vip, word)}" for slot, word in shown),
                "because": because,
            }
            self._outbox.put(Stream.SLOTS, fields)
        more = writes[SLOT_ENTRIES_MAX:]
        if more:
            slots = sum(len(write.slots) for write in more)
            fields = {"what": "written", "vips": str(len(more)), "slots": str(slots), "because": because}
            self._outbox.put(Stream.SLOTS, fields)

    # --- Questions and answers ------------------------------------------------------------------------------------

    def _see_question(self, effect: Ask) -> None:
        if len(self._questions) >= DIAGNOSTICS_QUESTIONS_MAX:
            self._questions.pop(next(iter(self._questions)))
        self._questions[effect.token] = _Question(effect.node, effect.body, now_ns())
        if isinstance(effect.body, SettleCall) and effect.body.step is SettleStep.ASK:
            self._settle("asked", effect.node, effect.body, len(effect.body.slots) // 2)

    def _see_answer(self, event: KeeperEvent, effects: Sequence[KeeperEffect]) -> None:
        match event:
            case Answered() if not isinstance(event.body, BeatAnswer):
                question = self._questions.pop(event.token, None)
                late = next((one for one in effects if isinstance(one, Trace) and one.what == LATE), None)
                if late is not None:
                    self._answer("late", question, late.detail)
                elif question is not None:
                    self._judge(question, event.body)
            case AskFailed():
                question = self._questions.pop(event.token, None)
                if question is not None:
                    self._answer("none", question, event.reason)
            case RecordsLooked():
                for effect in effects:
                    if isinstance(effect, Reply) and isinstance(effect.body, ResolveAnswer):
                        self._see_own_decision(event, effect.body)

    def _answer(self, what: str, question: _Question | None, detail: str) -> None:
        at_ns = now_ns()
        if not self._answers.allows(at_ns):
            self._outbox.drop()
            return
        fields = {"what": what, "detail": detail}
        if question is not None:
            fields |= {
                "of": self._names.node_name(question.node),
                "call": type(question.body).__name__,
                "took_ms": str((at_ns - question.asked_ns) // 1_000_000),
            }
        self._outbox.put(Stream.ANSWERS, fields)

    def _judge(self, question: _Question, answer: PeerAnswer) -> None:
        match question.body, answer:
            case SettleCall() as call, SettleAnswer() if call.step is SettleStep.ASK:
                self._settle("agreed", question.node, call, len(answer.slots) // 2)
            case ResolveCall() as call, ResolveAnswer():
                count = len(call.flows) // FLOW.itemsize
                if not 4 * count == len(answer.backends) == len(answer.leases_ms):
                    told = len(answer.backends) // 4
                    self._answer("wrong", question, f"it tells of {told} flows and was asked about {count}")
                elif count:
                    self._see_answered_decision(question, call, answer)

    def _settle(self, what: str, node: int, call: SettleCall, slots: int) -> None:
        fields = {
            "what": what,
            "vip": self._names.vip_name(call.vip),
            "slots": str(slots),
            "kind": call.kind.value,
            "epoch": str(call.epoch),
            "backup": self._names.node_name(node),
        }
        self._outbox.put(Stream.SETTLES, fields)

    # --- Decisions ------------------------------------------------------------------------------------------------

    def _see_answered_decision(self, question: _Question, call: ResolveCall, answer: ResolveAnswer) -> None:
        """What the owner has said of the first flow of a batch."""
        flow = np.frombuffer(call.flows, dtype=FLOW, count=1)[0]
        backend = int.from_bytes(answer.backends[:4], "little")
        lease_ms = int.from_bytes(answer.leases_ms[:4], "little")
        vip = self._names.vip(int(flow["vip"]))
        if vip is not None and backend and self._names.backend(vip.id, backend) is None:
            self._answer("wrong", question, f"{_flow(flow, vip)} to {backend}, which is no backend of {vip.name}")
        elif not backend:
            self._decide(flow, vip, backend, f"{self._names.node_name(question.node)} cannot tell")
        elif lease_ms:
            self._decide(flow, vip, backend, f"{self._names.node_name(question.node)} said so for {lease_ms} ms")
        else:
            self._decide(flow, vip, backend, f"{self._names.node_name(question.node)} records it with its next packet")

    def _see_own_decision(self, event: RecordsLooked, answer: ResolveAnswer) -> None:
        """What this LB answers, as a replica, about the first flow of a batch."""
        if self._looked is None or self._looked.token != event.token or not len(event.records):
            return
        flow, backend = self._looked.flows[0], int.from_bytes(answer.backends[:4], "little")
        vip = self._names.vip(int(flow["vip"]))
        if not backend:
            why = (
                "no replica of the slot, its backend is dead, no more than a SYN was seen, or its backup owes an answer"
            )
        elif event.records[0]["round"] != RECORD_MISSING and event.records[0]["backend"] == backend:
            why = "recorded here"
        elif int.from_bytes(answer.leases_ms[:4], "little"):
            why = "no record of it: older than the change"
        else:
            why = "no record of it: recorded with its next packet"
        self._decide(flow, vip, backend, why)

    def _decide(self, flow: Any, vip: Vip | None, backend: int, why: str) -> None:
        if vip is None or not self._decisions.allows(now_ns()):
            return
        slot = self._slot(flow, vip)
        fields = {
            "flow": _flow(flow, vip),
            "vip": vip.name,
            "slot": str(slot),
            "epoch": str(vip.epoch),
            "backend": self._names.backend_name(vip.id, backend) if backend else "none",
            "why": why,
        }
        if self._own is not None:
            fields["owner"] = self._names.member_name(int(self._own[slot]) & 0xFFFF)
        try:
            fields["slot_is"] = self._names.word(vip.id, self._slots(vip.id)[slot])
        except DatapathError as error:
            fields["slot_is"] = f"not to be read: {error}"
        self._outbox.put(Stream.DECISIONS, fields)

    def _slot(self, flow: Any, vip: Vip) -> int:
        port = 0 if vip.affinity is Affinity.CLIENT_IP else int(flow["port_be"])
        return slot_of(flow_hash(flow["addr"].tobytes(), vip.address, port, vip.port, vip.protocol, self._names.seed))


def _flow(flow: Any, vip: Vip) -> str:
    client = format_address(flow["addr"].tobytes())
    return f"{client}:{int(flow['port_be'])} > {format_address(vip.address)}:{vip.port}/{vip.protocol.name}"


class Names:
    """Names for the numbers of the newest snapshots; a number where there is none. (Looked up by halving, for a
    snapshot may have tens of thousands of backends, and an entry shows a few.)"""

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self._snapshots = snapshots
        self._nodes = {node.id: node.name for snapshot in snapshots for node in snapshot.nodes}
        self._members = {node.member: node.name for snapshot in snapshots for node in snapshot.nodes}
        self.seed: Final = snapshots[0].cluster.seed if snapshots else 0

    def node_name(self, node: int) -> str:
        """The node's name."""
        return self._nodes.get(node, f"node {node}")

    def member_name(self, member: int) -> str:
        """The name of the node of an LB."""
        return self._members.get(member, f"member {member}")

    def vip(self, vip: int) -> Vip | None:
        """As in the newest snapshot that has it."""
        for snapshot in self._snapshots:
            place = bisect_left(snapshot.vips, vip, key=lambda each: each.id)
            if place < len(snapshot.vips) and snapshot.vips[place].id == vip:
                return snapshot.vips[place]
        return None

    def vip_name(self, vip: int) -> str:
        """Its name; empty for none."""
        found = self.vip(vip)
        return found.name if found is not None else f"vip {vip}" if vip else ""

    def backend(self, vip: int, backend: int) -> Backend | None:
        """A backend of this VIP, in any of the snapshots."""
        for snapshot in self._snapshots:
            place = bisect_left(snapshot.vips, vip, key=lambda each: each.id)
            if place == len(snapshot.vips) or snapshot.vips[place].id != vip:
                continue
            backends = snapshot.vips[place].backends
            place = bisect_left(backends, backend, key=lambda each: each.id)
            if place < len(backends) and backends[place].id == backend:
                return backends[place]
        return None

    def backend_name(self, vip: int, backend: int) -> str:
        """address:port; the number where it is gone, `none` for 0."""
        found = self.backend(vip, backend)
        if found is None:
            return f"backend {backend}" if backend else "none"
        return f"{format_address(found.address)}:{found.port}"

    def word(self, vip: int, word: Any) -> str:
        """What a slot's word says: where new flows go, and old ones while it tracks."""
        words = np.array([word], dtype=np.uint64)
        current = self.backend_name(vip, int(current_of(words)[0]))
        if not is_tracking(words)[0]:
            return f"steady {current}"
        return f"tracking {current}, before {self.backend_name(vip, int(base_of(words)[0]))}"
