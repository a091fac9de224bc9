"""What an agent remembers from one life to the next: the snapshots that it has committed and prepared.

A single file, replaced by rename, so that a kill at any moment leaves the old one or the new one. It is not synced to
the disk: a killed agent finds it in the page cache, and after a crash of the *machine* the pinned maps are gone, so the
memory is of no use either. For the same reason the file names the boot that it belongs to, and what is from another
boot, torn or malformed is treated as nothing: the controller pushes everything again.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from lbpod.core import wire
from lbpod.core.errors import RemoteError
from lbpod.core.messages import Remember
from lbpod.core.model import Snapshot

FILE_NAME: Final = "snapshots"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class _File(msgspec.Struct):
    boot: str
    committed: bytes
    prepared: bytes
    ring_done: bool = True


@dataclass(frozen=True)
class Remembered:
    """What was found; `why_not`: one sentence where a file was there and could not be used."""

    committed: Snapshot | None
    prepared: Snapshot | None
    why_not: str = ""
    ring_done: bool = True


NOTHING: Final = Remembered(None, None)


class Memory:
    """The file in one folder. OSErrors of writing pass through: the caller counts them."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._boot = _BOOT_ID.read_text().strip()

    def keep(self, what: Remember) -> None:
        """Replaces what is remembered."""
        content = _File(self._boot, _encode(what.committed), _encode(what.prepared), what.ring_done)
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.write_bytes(msgspec.msgpack.encode(content))
        os.replace(fresh, self._path)

    def recall(self) -> Remembered:
        """What is remembered of this boot."""
        try:
            content = msgspec.msgpack.decode(self._path.read_bytes(), type=_File)
            if content.boot != self._boot:
                return Remembered(None, None, f"{self._path} is from before the last boot")
            return Remembered(_decode(content.committed), _decode(content.prepared), ring_done=content.ring_done)
        except FileNotFoundError:
            return NOTHING
        except (msgspec.DecodeError, RemoteError, OSError) as error:
            return Remembered(None, None, f"{self._path} cannot be used: {error}")

    def forget(self) -> None:
        """Removes the file, where the maps that it belongs to are removed."""
        with suppress(FileNotFoundError, NotADirectoryError):
            self._path.unlink()


def _encode(snapshot: Snapshot | None) -> bytes:
    return b"" if snapshot is None else wire.encode(snapshot)


def _decode(data: bytes) -> Snapshot | None:
    return wire.decode(Snapshot, data) if data else None
