"""Which labs exist, which of them are orphans, and how to remove one without a trace.

Every run writes ``/run/holdfast-lab/<prefix>.json`` *before* it makes anything and deletes it *after* everything else
is gone. So whatever a killed run left behind is found by its file, and a file whose owner is dead (pid and start time,
since pids come again) means: clean. Normal exit and crash use the same :func:`remove_run`; there is no second, rarely
tested path.

What must be removed is known by name, not by bookkeeping: namespaces ``<prefix>-*`` (links live inside them and die
with them), pins under ``/sys/fs/bpf/<prefix>``, the run folder, and every process inside one of these namespaces,
whoever started it. A list of pids in the file was dropped: it is always a step behind, and grandchildren are not on it.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import string
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from lbpod.lab import kernel
from lbpod.lab.errors import LabError
from lbpod.lab.limits import KILL_WAIT_NS, LOCK_WAIT_NS, MS_NS, POLL_NS, SECOND_NS

LAB_DIR: Final = Path("/run/holdfast-lab")

_DIGITS: Final = string.digits + string.ascii_lowercase


def base36(number: int) -> str:
    """``number >= 0`` in digits and small letters, so that a pid needs few characters of a name."""
    digits = _DIGITS[number % 36]
    while number := number // 36:
        digits = _DIGITS[number % 36] + digits
    return digits


def process_start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, ``None`` if there is none (or only a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


@contextmanager
def _locked() -> Iterator[None]:
    """One run at a time looks at the folder. The lock lies on the folder itself, so no lock file stays behind."""
    deadline_ns = time.monotonic_ns() + LOCK_WAIT_NS
    while True:
        LAB_DIR.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(LAB_DIR, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if LAB_DIR.exists() and os.fstat(fd).st_ino == LAB_DIR.stat().st_ino:
                break
        except BlockingIOError:
            pass
        os.close(fd)
        if time.monotonic_ns() > deadline_ns:
            raise LabError(f"another run holds {LAB_DIR} for too long; look who has it open (fuser {LAB_DIR})")
        time.sleep(POLL_NS / SECOND_NS)
    try:
        yield
    finally:
        with suppress(OSError):
            LAB_DIR.rmdir()  # only if nothing is in it
        os.close(fd)


def register() -> str:
    """Clean what dead runs left, claim a prefix that no run uses and write its file; returns the prefix."""
    with _locked():
        for prefix in _orphans():
            remove_run(prefix)
        base = "hf" + base36(os.getpid())
        prefix = next(name for name in _candidates(base) if not _taken(name))
        pid = os.getpid()
        record = {
            "prefix": prefix,
            "pid": pid,
            "pid_start_ticks": process_start(pid),
            "pid_namespace": os.readlink("/proc/self/ns/pid"),
            "command": sys.argv,
        }
        fresh = LAB_DIR / f".{prefix}.new"
        fresh.write_text(json.dumps(record) + "\n")
        fresh.rename(_record_path(prefix))
        return prefix


def _candidates(base: str) -> Iterator[str]:
    """A process may hold several labs: hf1a2b, hf1a2b_1, hf1a2b_2 ... (no dots: bpffs reserves them)."""
    yield base
    for number in range(1, 1000):
        yield f"{base}_{number}"
    raise LabError(f"1000 labs of one process are open ({base}); close some")


def _taken(prefix: str) -> bool:
    return _record_path(prefix).exists() or bool(namespaces_of(prefix)) or (kernel.BPFFS_DIR / prefix).exists()


def _record_path(prefix: str) -> Path:
    return LAB_DIR / f"{prefix}.json"


def run_dir(prefix: str) -> Path:
    """Folder of one run: logs, generated configurations."""
    return LAB_DIR / prefix


def pin_root(prefix: str) -> Path:
    """Folder of one run in bpffs."""
    return kernel.BPFFS_DIR / prefix


def namespaces_of(prefix: str) -> list[str]:
    if not kernel.NETNS_DIR.is_dir():
        return []
    return sorted(path.name for path in kernel.NETNS_DIR.iterdir() if path.name.startswith(prefix + "-"))


def _orphans() -> list[str]:
    return [path.stem for path in sorted(LAB_DIR.glob("*.json")) if _owner_is_dead(path)]


def _owner_is_dead(path: Path) -> bool:
    """A file that cannot be read is nobody's: the rename in :func:`register` makes files whole or absent."""
    try:
        record = json.loads(path.read_text())
        if record["pid_namespace"] != os.readlink("/proc/self/ns/pid"):
            return False  # pids of another pid namespace mean nothing here
        return bool(process_start(record["pid"]) != record["pid_start_ticks"])
    except (OSError, ValueError, KeyError, TypeError):
        return True


def clean_leftovers() -> list[str]:
    """Remove every run whose process is dead; returns their prefixes. ``register`` does the same at each start."""
    with _locked():
        orphans = _orphans()
        for prefix in orphans:
            remove_run(prefix)
        return orphans


def unregister(prefix: str) -> None:
    """Remove a run of this process."""
    with _locked():
        remove_run(prefix)


def remove_run(prefix: str) -> None:
    """Processes, namespaces with their links, pins, files; the registry file last. Can be repeated at any point."""
    names = namespaces_of(prefix)
    kill_inside({(kernel.NETNS_DIR / name).stat().st_ino for name in names})
    for name in names:
        kernel.netns_remove(name)
    shutil.rmtree(pin_root(prefix), ignore_errors=True)
    shutil.rmtree(run_dir(prefix), ignore_errors=True)
    for left in (pin_root(prefix), run_dir(prefix)):
        if left.exists():
            raise LabError(f"cannot remove {left} of an earlier run; look who uses it, remove it and start again")
    _record_path(prefix).unlink(missing_ok=True)


def kill_inside(inodes: set[int]) -> None:
    """SIGKILL for every process whose network namespace is one of ``inodes``; waits until they are gone."""
    handles: list[int] = []
    try:
        for pid in processes_inside(inodes):
            with suppress(ProcessLookupError):
                handle = os.pidfd_open(pid)
                handles.append(handle)
                if _netns_inode(pid) in inodes:  # the pid may have been given away since we looked
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
        deadline_ns = time.monotonic_ns() + KILL_WAIT_NS
        for handle in handles:
            left_ms = max(0, deadline_ns - time.monotonic_ns()) // MS_NS
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            poll.poll(left_ms)
    finally:
        for handle in handles:
            os.close(handle)


def processes_inside(inodes: set[int]) -> list[int]:
    """Process ids (our own excepted) inside one of these network namespaces."""
    pids = [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()] if inodes else []
    return [pid for pid in sorted(pids) if pid != os.getpid() and _netns_inode(pid) in inodes]


def _netns_inode(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return None
