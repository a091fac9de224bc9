"""Requests that were held up, kept for a while, so that a loss is reckoned from what clients felt. No I/O, no clock.

A request is *held up* where its answer took ``HELD_NS`` or longer: Linux retransmits after 200 ms at the earliest, so
whatever answers sooner has lost no packet. (A machine that is too busy holds requests up as well. That is counted, not
excused.)

When the parent says at which moment something was lost (``mark``), each flow that had a request under way then, or sent
one within ``MARK_WINDOW_NS`` after it, and was held up, gives one figure: the time **from the loss to the answer of the
last such request**. The last, because a loss may hit twice: first the path is dead, then the owner that the next load
balancer relays to. The figure therefore contains everything: the router's reaction, the wait for the retransmission
that gets through, the other load balancers' finding out. A flow that nothing held up noticed nothing and gives none.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from lbpod.lab.limits import CHECK_HELD_MAX, CHECK_MARKS_MAX, MS_NS, SECOND_NS

HELD_NS: Final = 190 * MS_NS
MARK_WINDOW_NS: Final = 2 * SECOND_NS


@dataclass(frozen=True)
class Mark:
    """A moment at which something was lost."""

    number: int
    at_ns: int


@dataclass(frozen=True)
class MarkFigures:
    """What a group of flows felt of it."""

    flows: int
    """Flows open when it was reckoned."""
    held_ns: tuple[int, ...]
    """For each flow that was held up: from the mark to the answer that ended it; sorted."""
    unanswered: int
    """Flows held up that still had no answer when the wait was over."""


class Holdups:
    """One group of flows."""

    def __init__(self) -> None:
        self._under_way: dict[int, int] = {}  # flow -> when its request was sent; 0: open, nothing under way
        self._held: deque[tuple[int, int, int]] = deque(maxlen=CHECK_HELD_MAX)  # (sent, answered, flow), by `answered`

    def sent(self, flow: int, now_ns: int) -> None:
        self._under_way[flow] = now_ns

    def answered(self, flow: int, now_ns: int) -> None:
        sent_ns = self._under_way[flow]
        self._under_way[flow] = 0
        if now_ns - sent_ns >= HELD_NS:
            self._held.append((sent_ns, now_ns, flow))

    def over(self, flow: int) -> None:
        """The flow has ended."""
        self._under_way.pop(flow, None)

    def unanswered(self, before_ns: int) -> int:
        """Flows with a request under way that was sent at this time or earlier."""
        return sum(0 < sent_ns <= before_ns for sent_ns in self._under_way.values())

    def settled(self, mark: Mark, now_ns: int) -> bool:
        """True once no request that belongs to the mark is without an answer."""
        end_ns = mark.at_ns + MARK_WINDOW_NS
        return now_ns >= end_ns + HELD_NS and not self.unanswered(end_ns)

    def figures(self, mark: Mark) -> MarkFigures:
        """What is known of the mark now."""
        end_ns = mark.at_ns + MARK_WINDOW_NS
        last: dict[int, int] = {}
        for sent_ns, answered_ns, flow in self._held:
            if sent_ns <= end_ns and answered_ns >= mark.at_ns:
                last[flow] = answered_ns - mark.at_ns
        return MarkFigures(len(self._under_way), tuple(sorted(last.values())), self.unanswered(end_ns))


class Marks:
    """Marks that wait to be reckoned, in order of their time."""

    def __init__(self, wait_ns: int) -> None:
        self._wait_ns = wait_ns
        """How long after its window a mark waits for requests without an answer."""
        self._waiting: deque[Mark] = deque(maxlen=CHECK_MARKS_MAX)

    def add(self, mark: Mark) -> None:
        self._waiting.append(mark)

    def due(self, groups: dict[str, Holdups], now_ns: int, *, final: bool = False) -> list[Mark]:
        """Takes out those that can be reckoned now (all of them, if ``final``)."""
        found: list[Mark] = []
        while self._waiting:
            mark = self._waiting[0]
            late = now_ns >= mark.at_ns + MARK_WINDOW_NS + self._wait_ns
            if not (final or late or all(group.settled(mark, now_ns) for group in groups.values())):
                break
            found.append(self._waiting.popleft())
        return found
