"""What is free goes back to the kernel: an agent that has worked on a hundred VIPs at once is small again soon after.

Why it has to be told to: glibc keeps what was freed below the top of its heap, and a heap for each thread that ever
allocated at the same time as another; tables and their digests are made in threads. After a change of a hundred VIPs
that was 200 MB of nothing. Tried and dropped: a fixed threshold from which arrays are mapped one by one (they go back
at once, and every temporary array of a slot table costs 128 page faults).
"""

import ctypes
from typing import Final

_M_ARENA_MAX: Final = -8
_LIBC: Final = ctypes.CDLL(None)
IS_GLIBC: Final = hasattr(_LIBC, "malloc_trim")
"""Other C libraries have no such calls, nor the need for them."""


def share_one_heap() -> None:
    """One heap for all threads from now on: they hold the interpreter's lock anyway."""
    if IS_GLIBC:
        _LIBC.mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Gives free memory back to the kernel: a few milliseconds, by how much there is."""
    if IS_GLIBC:
        _LIBC.malloc_trim(0)
