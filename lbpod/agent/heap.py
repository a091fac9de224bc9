"""What is free goes back to the kernel: an agent that has worked on a hundred VIPs at once is small again soon after.

Why it has to be told to: glibc keeps what was freed below the top of its heap, and a heap for each thread that ever
allocated at the same time as another; tables and their digests are made in threads. After a change of a hundred VIPs
that was 200 MB of nothing.

But not at once: every temporary array of a slot table has 128 pages, and to fault them in again took as long as the
work on them (219 faults for one table of 20 backends, half of its 3 ms). So arrays lie in the heap, below a threshold
that does not move, and the top of the heap stays until ``give_back`` is called, every few seconds. Tried and dropped:
arrays that are mapped one by one, which go back at once.
"""

import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_KEPT_BYTES: Final = 32 << 20
"""Free at the top of the heap without going back at once, and what one array takes at most to lie in it: the largest
that glibc allows."""
_LIBC: Final = ctypes.CDLL(None)
IS_GLIBC: Final = hasattr(_LIBC, "malloc_trim")
"""Other C libraries have no such calls, nor the need for them."""


def share_one_heap() -> None:
    """One heap for all threads from now on: they hold the interpreter's lock anyway. What is free in it stays for the
    next array until ``give_back``."""
    if IS_GLIBC:
        _LIBC.mallopt(_M_ARENA_MAX, 1)
        _LIBC.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        _LIBC.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back() -> None:
    """Gives free memory back to the kernel: a few milliseconds, by how much there is."""
    if IS_GLIBC:
        _LIBC.malloc_trim(0)
