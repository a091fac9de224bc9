"""All records of this LB, some thousands at a time.

To list a million records and to look at them takes a second: an LB that did both in one go would answer no beat
meanwhile, and others would believe it down. So a list comes in slices, between which the agent does something else;
what is dropped because of a slice is dropped in the step that looks at it: nothing that the Keeper decides comes
between. Where a drop fails, so does the rest of the list: it is not asked for any more.

What was done in one step when a list was one is not any more: between two slices rings change, slots settle, and the
same may be asked for again. Whoever acts on all of a list acts at its end, on what is in force then.

Whoever has had all slices has had each record that was there all the time at least once, in whichever map it was: the
embryonic ones come first, for what becomes a full record meanwhile is listed with those.

Left to others: which records, and what becomes of them (``forget``, ``handover``, ``missed``, ``ring``).
"""

from abc import abstractmethod

from lbpod.core.keeper_state import Answer, Effects, Question, State
from lbpod.core.messages import DumpRecords, RecordsDumped


class Listing(Question):
    """Somebody who looks at all records."""

    @abstractmethod
    def some(self, state: State, listed: RecordsDumped, now_ns: int) -> Effects:
        """One slice; perhaps an empty one."""

    @abstractmethod
    def ended(self, state: State, now_ns: int) -> Effects:
        """That was the last one."""

    def more(self, state: State, cursor: tuple[bool, int], now_ns: int) -> Effects:
        """There is more behind this cursor: asked for next, where nobody has a reason to wait."""
        return [DumpRecords(state.open(self, now_ns), cursor)]

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        """A slice came; what comes next is asked for."""
        if not isinstance(answer, RecordsDumped) or len(answer.flows) != len(answer.records):
            return self.failed(state, "the list is not one of records", now_ns)
        if answer.cursor is None:
            return [*self.some(state, answer, now_ns), *self.ended(state, now_ns)]
        # First, so that it has the room of the one that is answered.
        following = self.more(state, answer.cursor, now_ns)
        return [*self.some(state, answer, now_ns), *following]
