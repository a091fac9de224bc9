"""What is to be written to Redis, while it waits: a bound, what gives way, and who knows how much of it was lost.

Why a file: it is the only thing that the agent's loop and the writer's thread share, so what is promised about it can
be read in one place. Whoever puts something in never waits for more than a few statements of the other side; where
there is no room the oldest entry goes, for what people look for after a fault is what came last. An entry that goes is
counted under what stands in the writer's way at that moment, not under "no room": people ask why, not where.

Left to others: what is worth an entry (``diagnostics``), how it travels (``redis_writer``).
"""

import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from lbpod.core.limits import DIAGNOSTICS_QUEUE_MAX


class Stream(StrEnum):
    """The streams of one LB; the values are the last part of their keys."""

    SLOTS = "slots"
    SETTLES = "settles"
    RING = "ring"
    ANSWERS = "answers"
    DECISIONS = "decisions"


class Loss(StrEnum):
    """Why an entry was dropped, as /metrics says it."""

    MANY = "too many"
    """More of them at one time than are kept or taken."""
    SLOW = "slow"
    GONE = "gone"
    REFUSED = "refused"
    """The password, the user or what it may do."""
    FULL = "full"
    ERROR = "error"
    """Anything else that Redis, or whatever answers in its place, says."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a stream. number: counts from 1, over all streams; a gap is what was dropped."""

    stream: Stream
    number: int
    at: datetime
    fields: Mapping[str, str]


@dataclass(frozen=True)
class Standing:
    """How far the writing has got. trouble: one sentence, empty where there is none."""

    written: int
    dropped: Mapping[Loss, int]
    waiting: int
    trouble: str


class Outbox:
    """Any thread may use it.

    Invariants: len(_entries) <= entries_max; numbers given == written + dropped + waiting + taken and not yet answered.
    """

    def __init__(self, entries_max: int = DIAGNOSTICS_QUEUE_MAX) -> None:
        self._lock: Final = threading.Lock()
        self._entries_max = entries_max
        self._entries: deque[Entry] = deque()
        self._state: Mapping[str, str] | None = None
        self._number = 0
        self._written = 0
        self._dropped: Counter[Loss] = Counter()
        self._why: Loss | None = None
        self._trouble = ""

    def put(self, stream: Stream, fields: Mapping[str, str]) -> None:
        """Leaves an entry; the oldest goes where there is no room."""
        at = datetime.now(UTC)
        with self._lock:
            self._number += 1
            if len(self._entries) >= self._entries_max:
                self._entries.popleft()
                self._dropped[self._why or Loss.MANY] += 1
            self._entries.append(Entry(stream, self._number, at, fields))

    def drop(self) -> None:
        """Counts one that is not even put in, because there are too many of its kind."""
        with self._lock:
            self._number += 1
            self._dropped[Loss.MANY] += 1

    def put_state(self, fields: Mapping[str, str]) -> None:
        """Leaves the LB's state; only the newest is kept."""
        with self._lock:
            self._state = fields

    def take(self, count_max: int) -> tuple[Sequence[Entry], Mapping[str, str] | None]:
        """The oldest entries, and the state where it has not been taken. What is taken is answered by `note`."""
        with self._lock:
            count = min(count_max, len(self._entries))
            entries = [self._entries.popleft() for _ in range(count)]
            state, self._state = self._state, None
        return entries, state

    def note(self, written: int, dropped: Mapping[Loss, int]) -> None:
        """What became of entries that were taken."""
        with self._lock:
            self._written += written
            self._dropped.update(dropped)

    def stand_in_the_way(self, why: Loss | None, sentence: str) -> bool:
        """The writer says what keeps it from writing (None: nothing does); True where that is news."""
        with self._lock:
            is_news = self._why is not why
            self._why, self._trouble = why, sentence
        return is_news

    def standing(self) -> Standing:
        """As of now."""
        with self._lock:
            return Standing(self._written, dict(self._dropped), len(self._entries), self._trouble)
