"""When an edit of the file may be used: not before it can be believed to be whole.

Why: YAML that is cut off between two documents is good YAML, and means that all VIPs after the cut are to be withdrawn.
So a file that is written in place is used only once it has been the same for CONFIG_QUIET_NS, and one whose last line
does not end is never used. A file that another one was put in place of (a rename, a ConfigMap's symlink) waits for
CONFIG_REPLACED_QUIET_NS only. Tried and dropped: using such a file at once, for editors that move the old file away
write the new one in place; and asking the kernel whether somebody has it open for writing, which says nothing about a
writer that opens it once more.

Decided here: whether to use, to wait, or to do nothing. Left to others: when to look (``driver``), what the bytes mean
(``config``).
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lbpod.core.limits import CONFIG_BYTES_MAX, CONFIG_QUIET_NS, CONFIG_REPLACED_QUIET_NS


@dataclass(frozen=True)
class Sight:
    """What one look at the file has found. Bytes and fingerprint are of one reading: what is judged is what is used."""

    file: tuple[int, int] | None
    """Device and inode: another file has others. None: it cannot be read."""
    digest: bytes
    data: bytes = field(repr=False, compare=False)
    """At most one byte more than a configuration may have."""
    error: str = field(default="", compare=False)
    """Why it cannot be read."""


def look_at(path: Path) -> Sight:
    """One look. Never raises: a file that cannot be read is something to be seen, too."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            data = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        return Sight(None, b"", b"", error.strerror or str(error))
    return Sight((found.st_dev, found.st_ino), hashlib.blake2b(data).digest(), data)


class Lookout:
    """Remembers what is in use and what was seen last. used: what the first look has found, which is in use already."""

    def __init__(self, used: Sight) -> None:
        self._used = used.digest
        self._last = used.file, used.digest
        self._since_ns = 0
        """When the last one was seen for the first time."""
        self._quiet_ns = 0

    def wait_ns(self, sight: Sight, now_ns: int) -> int | None:
        """None: nothing has changed. 0: use it, this is said once. Else: use it if it is still the same by then."""
        found: Final = sight.file, sight.digest
        is_other, is_same = found[0] != self._last[0], found == self._last
        self._last = found
        if sight.digest == self._used:
            return None
        if not is_same:
            self._since_ns = now_ns
            self._quiet_ns = CONFIG_REPLACED_QUIET_NS if is_other else CONFIG_QUIET_NS
        wait_ns = max(0, self._since_ns + self._quiet_ns - now_ns)
        if wait_ns == 0:
            self._used = sight.digest
        return wait_ns
