"""Virtual time: what happens next happens now. And the clocks of machines, which run as they please.

No clock, no sleep, no event loop: a heap of what is to happen, taken in the order of time, and where times are equal in
the order in which it was asked for. So nothing depends on anything but the seed, and an hour passes in a second.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Final

MS_NS: Final = 1_000_000
SECOND_NS: Final = 1_000_000_000
LOOK_NS: Final = 250 * MS_NS
_MILLION: Final = 1_000_000

Action = Callable[[], None]


class Timeline:
    """The time of the simulation, which no machine knows."""

    def __init__(self) -> None:
        self.now_ns = 0
        self._heap: list[tuple[int, int, Action]] = []
        self._count = 0

    def later(self, delay_ns: int, action: Action) -> None:
        """Do something after a time."""
        assert delay_ns >= 0, "nothing happens in the past"
        self._count += 1
        heappush(self._heap, (self.now_ns + delay_ns, self._count, action))

    def run(self, end_ns: int) -> None:
        """Let time pass until then."""
        heap = self._heap
        while heap and heap[0][0] <= end_ns:
            self.now_ns, _, action = heappop(heap)
            action()
        self.now_ns = end_ns

    def run_until(self, is_over: Callable[[], bool], within_ns: int) -> bool:
        """Let time pass until something is so, which is looked at now and then; False: it did not come about."""
        end_ns = self.now_ns + within_ns
        while not is_over():
            if self.now_ns >= end_ns:
                return False
            self.run(min(self.now_ns + LOOK_NS, end_ns))
        return True


class Clock:
    """A machine's monotonic clock. It begins anew with each boot, is too fast or too slow, and may leap."""

    def __init__(self, timeline: Timeline, drift_ppm: int, shown_ns: int) -> None:
        self._timeline = timeline
        self._drift_ppm = drift_ppm
        self._since_ns = timeline.now_ns
        self._shown_ns = shown_ns
        """What it shows at first."""

    def now_ns(self) -> int:
        """What it shows now."""
        passed_ns = self._timeline.now_ns - self._since_ns
        return self._shown_ns + passed_ns + passed_ns * self._drift_ppm // _MILLION

    def leap(self, by_ns: int) -> None:
        """Forward, all at once."""
        assert by_ns >= 0, "a monotonic clock never goes back"
        self._shown_ns += by_ns
