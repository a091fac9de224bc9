"""What people read of a run: one line for everything that somebody did, with the time, in the order in which it was.

Kept only where somebody will read it. A run that is one of thousands says nothing but whether it went well; the command
that it prints where it did not tells the whole story again.
"""

from lbpod.simulator.timeline import SECOND_NS, Timeline


class Transcript:
    """Lines of one run."""

    def __init__(self, timeline: Timeline, keeps: bool) -> None:
        self._timeline = timeline
        self.keeps = keeps
        self.lines: list[str] = []

    def say(self, who: str, what: str) -> None:
        """Somebody did something."""
        if self.keeps:
            self.lines.append(f"{self._timeline.now_ns / SECOND_NS:9.3f}  {who:<12} {what}")
