"""The one thing that the standalone controller keeps on disk: the generation, written down before anything is pushed.

Why: a generation that was pushed must never be used for something else, even if the controller dies in between, and
even if a second one runs by mistake. So ``persist`` is a compare-and-swap under a lock, and the file is replaced whole
(temporary file, fsync, rename, fsync of the folder). Where the search for free ids had come to lies beside it, for the
same reason.

Losing the file is harmless: generations then continue from the highest that any LB reports. A damaged file is not taken
for a lost one: somebody should look at it first.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from lbpod.core.limits import GENERATION_MAX
from lbpod.core.model import NextIds

_FILE_BYTES_MAX: Final = 65_536


class StateError(Exception):
    """The state file cannot be read or written. str(): one sentence with the file."""


class Written(msgspec.Struct, frozen=True):
    """What the file holds, as JSON. generation 0: nothing yet."""

    generation: int
    next_ids: NextIds = NextIds()


@dataclass(frozen=True)
class StateFile:
    """The file. Every method may block for as long as the disk does: not for the event loop."""

    path: Path

    def read(self) -> Written:
        """What is written down. Raises StateError."""
        try:
            with self.path.open("rb") as file:
                written = msgspec.json.decode(file.read(_FILE_BYTES_MAX), type=Written)
        except FileNotFoundError:
            return Written(0)
        except OSError as error:
            raise StateError(f"{self.path} cannot be read: {error.strerror}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._damaged() from error
        if not 0 <= written.generation <= GENERATION_MAX:
            raise self._damaged()
        return written

    def persist(self, wanted: Written, after: int) -> Written | None:
        """Write down what is wanted, unless what is there is newer than ``after``. Returns None, or what is there:
        somebody has used that generation, and ids with it. Raises StateError."""
        assert after < wanted.generation, "a generation is above all that its maker knows"
        try:
            with self._locked():
                found = self.read()
                if found.generation > after:
                    return found
                self._replace(msgspec.json.encode(wanted))
                return None
        except OSError as error:
            raise StateError(f"{self.path} cannot be written: {error.strerror}") from error

    def _damaged(self) -> StateError:
        return StateError(
            f"{self.path} is damaged; remove it, and generations continue from the highest that any LB reports"
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """A lock file of its own: the state file itself is replaced, and a lock on it would go with it."""
        with self.path.with_name(self.path.name + ".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _replace(self, data: bytes) -> None:
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self.path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
