"""How long a start took, step by step: an agent that was killed holds up no packet, but its LB can do nothing new
until it is back.

Decided here: processor time is what counts (on a busy node wall time says how busy it is), and both are told once, in
one line of the log, when the servers listen. The interpreter's own start and the imports are the first step.
"""

import os
import time
from pathlib import Path
from typing import Final

_NS_PER_MS: Final = 1_000_000
_START_FIELD: Final = 22 - 3
"""Of /proc/PID/stat (proc(5)), counted from behind the name, which may have blanks in it."""


class StartTimes:
    """Steps in the order in which they end."""

    def __init__(self) -> None:
        self.cpu_ms: Final[dict[str, float]] = {}
        """Step -> processor time of this process."""
        self._spent_ns = 0

    def took(self, step: str) -> None:
        """All since the last step was this one."""
        spent_ns = time.process_time_ns()
        self.cpu_ms[step] = round((spent_ns - self._spent_ns) / _NS_PER_MS, 1)
        self._spent_ns = spent_ns

    @property
    def cpu_total_ms(self) -> float:
        """Processor time until the last step's end."""
        return round(self._spent_ns / _NS_PER_MS, 1)


def since_exec_ms() -> float:
    """Wall time since this process was started, to the hundredth of a second."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began_s = int(fields[_START_FIELD]) / os.sysconf("SC_CLK_TCK")
    return round((time.clock_gettime(time.CLOCK_BOOTTIME) - began_s) * 1_000)
