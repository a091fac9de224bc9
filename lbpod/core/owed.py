"""What a lost answer to a settle leaves behind: slots that are flagged SETTLING, and a backup that owes its word.

The backup may have agreed, and then its base is the newer one; or it has not, and both have the same. As long as the
owner does not know, the backup decides about what the owner has no record of (``lbpod/bpf/replica.h``), and first
packets that find no room, or an old record, wait (both cost a client a second or more). So the owner soon asks what
base is there (OWED), makes it its own, and takes the flag off.

**Not before MARGIN_NS has passed since the question.** A question is acted upon for QUESTION_AGE_NS_MAX, half of that,
by the backup's own clock (``lbpod/agent/server.py``): so nothing can be agreed to after the base has been told. And
nothing is asked anew before the answer has come: slots that are flagged take no part in a round.

**A backup that nobody has heard for OWED_NS** is dead, or as good as, and old flows would wait for it until the ring
has changed. The owner lifts the flag then, and puts it back when the backup speaks again: it may have agreed.

**A backup that this LB alone does not hear** is asked through another LB that does (``watch.who_hear``): as long as the
link between the two is down, what begins in these slots would get no answer, nor would old flows.

**One that was cut off and is back** is asked before it serves, and is sent what it has missed after that only
(``missed``). In between the owner, which does not use it yet, begins flows alone, at its own base: what begins before
the answer is in the list, and what begins after it goes where the backup looks. The base that the owner makes its own
says nothing about the former ones; but the backup, once it has the list, does not stand by its word (``disagree``),
and is asked to settle nothing before.

Tried and dropped: taking any backend for possible in what was taken over. The slot tracks for longer, and in a world of
wrong beliefs and lost answers twice as many runs broke.

Tried and dropped: flagged slots that are asked about again like any other, until the backup agrees. While hosts saw
live flows that took as long as they lived, and a backup that died meanwhile took their packets with it for OWED_NS.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lbpod.core import watch
from lbpod.core.flows import groups, ids_from, slots_bytes, slots_from
from lbpod.core.keeper_state import Answer, Effects, Question, State, VipState
from lbpod.core.limits import MARGIN_NS, MEMBER_NONE, RETRY_NS
from lbpod.core.messages import Ask, Refuse, Reply, SettleAnswer, SettleCall, SettleKind, SettleStep
from lbpod.core.transition import base_of, current_of, is_settling

U32 = npt.NDArray[np.uint32]

NOT_HEARD = 503
_NO_SLOTS = np.zeros(0, dtype=np.uint32)


def wait(vs: VipState, now_ns: int) -> None:
    """A question has failed just now, or may still be on its way from whoever had these slots before."""
    vs.owed_at_ns = now_ns + MARGIN_NS


def ask(state: State, vs: VipState, now_ns: int) -> Effects:
    """Ask backups that owe an answer what they have made base; nothing, where none does, or it is too soon."""
    if now_ns < vs.owed_at_ns:
        return []
    owed = is_settling(vs.slots.words) & (state.owner == state.member)
    alone = np.flatnonzero(owed & (state.backup == MEMBER_NONE)).astype(np.uint32)
    effects = state.write(vs, vs.slots.unflag(alone))
    slots = np.flatnonzero(owed & (state.backup != MEMBER_NONE)).astype(np.uint32)
    vs.owed_at_ns = now_ns + (RETRY_NS if state.watch.returning else MARGIN_NS)
    for backup, places in groups(state.backup[slots]):
        node = state.node_of_member.get(_whom(state, backup, now_ns), 0)
        if not node or not state.has_room(node):
            continue
        asked = slots[places]
        token = state.open(_OwedAsked(vs, state.generation, asked), now_ns, node)
        call = SettleCall(state.member, SettleStep.OWED, SettleKind.SETTLE, vs.id, state.generation, slots_bytes(asked))
        vs.owing += 1
        effects.append(Ask(token, node, call))
    return effects


def _whom(state: State, backup: int, now_ns: int) -> int:
    """Whom to ask what is base at this backup: itself, or one of those that hear it; MEMBER_NONE where none is left."""
    if backup not in state.down or backup in state.watch.returning:
        return backup
    hear = watch.who_hear(state, backup)
    return hear[now_ns // MARGIN_NS % len(hear)] if hear else MEMBER_NONE


def called(state: State, vs: VipState, request: int, call: SettleCall, slots: U32, now_ns: int) -> Effects:
    """OWED: what is base here of slots whose owner asks. Where this LB is not their backup, it asks that one."""
    mine = slots[state.backup[slots] == state.member]
    backup = int(state.backup[slots[0]]) if len(slots) and not len(mine) else MEMBER_NONE
    node = state.node_of_member.get(backup, 0) if backup not in state.down else 0
    if node and state.has_room(node):
        return [Ask(state.open(_PassedOn(request), now_ns, node), node, call)]
    return [Reply(request, SettleAnswer(slots_bytes(mine), base_of(vs.slots.at(mine)).astype("<u4").tobytes()))]


@dataclass(frozen=True, slots=True, eq=False)
class _PassedOn(Question):
    """A backup was asked in the place of an owner that does not hear it, and that waits for the answer."""

    request: int

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        return [Reply(self.request, answer)] if isinstance(answer, SettleAnswer) else self.failed(state, "", now_ns)

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        return [Refuse(self.request, NOT_HEARD, f"{state.node_name} does not hear that backup either")]


@dataclass(frozen=True, slots=True, eq=False)
class _OwedAsked(Question):
    """A backup was asked what is base of these flagged slots."""

    vs: VipState
    epoch: int
    slots: U32

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        self.vs.owing -= 1
        vs, same = self.vs, state.is_calm and state.generation == self.epoch
        if not isinstance(answer, SettleAnswer) or 2 * len(answer.slots) != len(answer.bases) or not same:
            return []
        if state.vips.get(vs.id) is not vs:
            return []
        slots, bases = slots_from(answer.slots), ids_from(answer.bases)
        told = np.isin(slots, self.slots) & is_settling(vs.slots.at(slots))
        slots, bases = slots[told], bases[told]
        before = vs.slots.at(slots)
        moved = base_of(before) != bases
        if state.is_unannounced(vs):
            vs.slots.rebase(slots[moved], bases[moved], state.alive, now_ns)
        else:
            vs.slots.take_over(slots[moved], bases[moved], state.alive)
        vs.slots.doubt(slots[moved & (bases != current_of(before))])  # a change has overtaken what was agreed
        vs.slots.unflag(slots)
        return state.write(vs, slots[before != vs.slots.at(slots)])

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        self.vs.owing -= 1
        return []


def lift(state: State, now_ns: int) -> Effects:
    """Take the flag off slots whose backup is gone, and put it back where it is not any more: it may have agreed."""
    gone = watch.agreed_to_be_gone(state, now_ns)
    effects: Effects = []
    for _, vs in sorted(state.vips.items()):
        if vs.slots.track is None or state.own is None:
            vs.lifted = _NO_SLOTS
            continue
        if len(vs.lifted):
            back = vs.lifted[~np.isin(state.backup[vs.lifted], sorted(gone))]
            vs.lifted = np.setdiff1d(vs.lifted, back)
            effects += state.write(vs, vs.slots.flag(back[state.owner[back] == state.member]))
        if gone:
            owed = is_settling(vs.slots.words) & (state.owner == state.member) & np.isin(state.backup, sorted(gone))
            slots = np.flatnonzero(owed).astype(np.uint32)
            vs.lifted = np.union1d(vs.lifted, slots).astype(np.uint32)
            effects += state.write(vs, vs.slots.unflag(slots))
    return effects
