"""The agent's clock: the very one that the programs read, so that their stamps and our times can be compared.

The programs stamp with ``bpf_ktime_get_coarse_ns``, which is CLOCK_MONOTONIC_COARSE: it moves by ticks of some
milliseconds. Reading CLOCK_MONOTONIC here would be up to one tick ahead of a stamp made at the same moment; harmless
behind the margin of a second, but "the same clock" needs no argument. Neither moves while the machine is suspended.

A container in a time namespace of its own would see another clock than the programs do; such a container must not run
an agent (nothing creates one unasked).
"""

import time
from typing import Final

CLOCK_MONOTONIC_COARSE: Final = 6
"""From linux/time.h; Python's time module has no name for it."""


def now_ns() -> int:
    """Nanoseconds of the coarse monotonic clock."""
    return time.clock_gettime_ns(CLOCK_MONOTONIC_COARSE)
