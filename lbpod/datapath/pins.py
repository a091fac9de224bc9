"""The pin folder: what survives the agent, where it lies in bpffs, and who may touch it.

    maps/<name>               every map of the programs
    slots/<VIP id>            inner arrays, one per VIP (a process without CAP_SYS_ADMIN cannot open a map by its id,
    other_seen/<VIP id>       so what is not pinned would be lost to the next agent)
    programs/<name>_<build>_<id>      programs that are, or were until a moment ago, attached

The build says which object file a program was made of, and by which libbpf: the verifier's verdict on it is known, so
that a restart need not ask again (``loader``). Whoever does not know of builds takes it for a part of the name.

Why programs carry their id in the name: a program is ours if there is a pin with its id. So an agent that was killed at
any moment between attaching and pinning leaves nothing behind that its successor would take for somebody else's. A
single pin per program, replaced after attaching, was dropped for that gap.

The folder is locked (flock) by whoever holds it, so that two agents never write to the same maps. Nothing is ever
removed on the way out: forwarding outlives the agent.
"""

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from lbpod.core.layout import CONFIG, LAYOUT_VERSION
from lbpod.datapath import libbpf
from lbpod.datapath.layout import PER_VIP
from lbpod.datapath.port import DatapathError

_BPFFS_MAGIC: Final = 0xCAFE4A11
_STATFS_BYTES: Final = 256
"""More than struct statfs has on any machine; its first word is the type."""
assert CONFIG.fields is not None
_VERSION_AT: Final = CONFIG.fields["version"][1]
"""Where config.version lies, in every layout that there will ever be."""


def is_bpffs(path: Path) -> bool:
    """True where `path`, or the nearest parent that exists, lies in a BPF file system."""
    while not os.path.exists(path) and path != path.parent:  # Path.exists raises where bpffs refuses a name
        path = path.parent
    buffer = (ctypes.c_long * (_STATFS_BYTES // ctypes.sizeof(ctypes.c_long)))()
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.statfs(os.fsencode(path), buffer) == 0 and buffer[0] & 0xFFFFFFFF == _BPFFS_MAGIC


class PinFolder:
    """One locked pin folder. `close` gives up the lock and leaves everything where it is."""

    def __init__(self, folder: Path) -> None:
        self.folder: Final = folder
        if not is_bpffs(folder):
            raise DatapathError(f"{folder} is not in a BPF file system: mount -t bpf bpf {folder.parent}")
        try:
            for part in ("maps", "programs", *PER_VIP):
                (folder / part).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock: int | None = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            hint = "; names with dots are reserved there" if "." in folder.name else ""
            raise DatapathError(f"cannot make the pin folder {folder}: {error.strerror}{hint}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            if error.errno != errno.EWOULDBLOCK:
                raise DatapathError(f"cannot lock the pin folder {folder}: {error.strerror}") from error
            raise DatapathError(f"another process is using the maps in {folder}: stop it first") from error

    def close(self) -> None:
        """Gives up the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _names(self, part: str) -> list[str]:
        return sorted(entry.name for entry in (self.folder / part).iterdir())

    # --- Maps -----------------------------------------------------------------------------------------------------

    def maps(self) -> dict[str, int]:
        """File descriptors (to be closed by the caller) of the pinned maps, after a look at their version.

        Raises DatapathError where they are of another layout; nothing has been touched then.
        """
        found: dict[str, int] = {}
        try:
            for name in self._names("maps"):
                fd = libbpf.pinned(str(self.folder / "maps" / name))
                if fd is not None:
                    found[name] = fd
            self._check_version(found)
        except DatapathError:
            for fd in found.values():
                os.close(fd)
            raise
        return found

    def _check_version(self, found: dict[str, int]) -> None:
        if not found:
            return
        version = 0
        if "config" in found:
            size = libbpf.map_info(found["config"]).value_size
            row = libbpf.map_lookup(found["config"], "config", bytes(4), size) or b""
            version = int.from_bytes(row[_VERSION_AT : _VERSION_AT + 4], "little")
        if version != LAYOUT_VERSION:
            raise DatapathError(
                f"the maps pinned in {self.folder} have layout {version or 'unknown'}, this agent writes layout"
                f" {LAYOUT_VERSION}: they go on forwarding untouched; run the agent that made them, or start anew after"
                " `holdfast detach`"
            )

    def pin_map(self, name: str, fd: int, *, replace: bool) -> None:
        """Pins a map under its name; `replace` swaps the pin of an older one atomically."""
        path = self.folder / "maps" / name
        if not replace:
            libbpf.pin(fd, str(path))
            return
        fresh = path.with_name(f"{name}_new")
        fresh.unlink(missing_ok=True)
        libbpf.pin(fd, str(fresh))
        os.rename(fresh, path)

    def map_names(self) -> list[str]:
        """Names of the pinned maps, ascending."""
        return self._names("maps")

    def unpin_map(self, name: str) -> None:
        """Removes a map's pin. Programs that use it go on using it."""
        (self.folder / "maps" / name).unlink(missing_ok=True)

    # --- Inner arrays ---------------------------------------------------------------------------------------------

    def vip_ids(self, outer: str) -> list[int]:
        """VIPs that have a pinned inner array of this kind, ascending."""
        return sorted(int(name) for name in self._names(outer) if name.isdecimal())

    def vip_path(self, outer: str, vip: int) -> str:
        """Where the inner array of a VIP is pinned."""
        return str(self.folder / outer / str(vip))

    def vip_unpin(self, outer: str, vip: int) -> None:
        """Removes the pin of an inner array, if it is there."""
        Path(self.vip_path(outer, vip)).unlink(missing_ok=True)

    # --- Programs -------------------------------------------------------------------------------------------------

    def pin_program(self, name: str, build: str, program_id: int, fd: int) -> None:
        """Pins a program, so that it is known as ours, and what it was made of."""
        libbpf.pin(fd, str(self.folder / "programs" / f"{name}_{build}_{program_id}"))

    def built_programs(self, name: str, build: str) -> list[int]:
        """Ids of the pinned programs of this name that were made of this, newest first."""
        return sorted((number for pinned, number in self.programs() if pinned == f"{name}_{build}"), reverse=True)

    def programs(self) -> Iterator[tuple[str, int]]:
        """Name and id of every pinned program."""
        for entry in self._names("programs"):
            name, _, program_id = entry.rpartition("_")
            if name and program_id.isdecimal():
                yield name, int(program_id)

    def program_fd(self, program_id: int) -> int | None:
        """File descriptor (to be closed by the caller) of the pinned program with this id, or None: it is not ours."""
        for name, pinned_id in self.programs():
            if pinned_id == program_id:
                return libbpf.pinned(str(self.folder / "programs" / f"{name}_{program_id}"))
        return None

    def unpin_program(self, name: str, program_id: int) -> None:
        """Removes a program's pin. Where it is attached it stays attached, and will be taken for somebody else's."""
        (self.folder / "programs" / f"{name}_{program_id}").unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes every pin and the folder. What is not attached is gone with it."""
        try:
            for part in ("programs", *PER_VIP, "maps"):
                for name in self._names(part):
                    (self.folder / part / name).unlink(missing_ok=True)
                (self.folder / part).rmdir()
            with suppress(FileNotFoundError):
                self.folder.rmdir()
        except OSError as error:
            raise DatapathError(f"cannot remove the pins in {self.folder}: {error.strerror}") from error
