"""Programs inside a host: started in its network namespace, logged to a file, ended by pid.

How a program gets into the namespace: the lab's worker thread enters it, forks, and comes back. The child has the
namespace and nothing else changes; above all the mount namespace stays, so bpffs remains visible (``ip netns exec``
hides it).

``setpriv --pdeathsig KILL`` runs in between, so that ``kill -9`` of the lab leaves no process behind. Doing that in a
``preexec_fn`` was dropped: Python code between fork and exec of a program with threads can hang for ever.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from lbpod.lab.errors import LabError
from lbpod.lab.limits import KILL_WAIT_NS, SECOND_NS, STOP_WAIT_NS

PACKAGE_PARENT: Final = Path(__file__).resolve().parents[2]
"""Where ``lbpod`` is imported from: put on the PYTHONPATH of every program."""


class Program:
    """A running (or ended) program. ``process`` is the plain Popen; ``log`` the file with its output, if any."""

    def __init__(self, name: str, host: str, process: subprocess.Popen[str], log: Path | None) -> None:
        self.name = name
        self.host = host
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def stdin(self) -> IO[str]:
        assert self.process.stdin is not None, f"{self.name} was not started with stdin=PIPE"
        return self.process.stdin

    @property
    def stdout(self) -> IO[str]:
        assert self.process.stdout is not None, f"{self.name} was not started with stdout=PIPE"
        return self.process.stdout

    def log_text(self) -> str:
        """What it has written so far, '' without a log file."""
        return self.log.read_text(errors="replace") if self.log is not None and self.log.exists() else ""

    def signal(self, number: int) -> None:
        """Send a signal to the program and whatever it started in its process group."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def wait(self, seconds: float) -> int:
        """Exit status; ``LabError`` if it still runs after ``seconds``."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{self.name} in {self.host} still runs after {seconds} s; see {self.log}") from error

    def stop(self, wait_ns: int = STOP_WAIT_NS) -> int:
        """SIGTERM, wait up to ``wait_ns``, SIGKILL; returns the exit status. Harmless on an ended program."""
        self.signal(signal.SIGTERM)
        return self.finish(time.monotonic_ns() + wait_ns)

    def kill(self) -> int:
        """SIGKILL, as a crash would; returns the exit status."""
        self.signal(signal.SIGKILL)
        return self.finish(time.monotonic_ns())

    def finish(self, deadline_ns: int) -> int:
        """Wait until ``deadline_ns`` (monotonic), then SIGKILL; closes the pipes."""
        try:
            self.process.wait(max(0, deadline_ns - time.monotonic_ns()) / SECOND_NS)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self.wait(KILL_WAIT_NS / SECOND_NS)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        return self.process.returncode


def spawn(
    argv: Sequence[str | Path],
    *,
    log: Path | None,
    stdin: int | IO[str] | None,
    stdout: int | IO[str] | None,
    stderr: int | IO[str] | None,
    env: Mapping[str, str] | None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[str]:
    """Start ``argv`` in the calling thread's network namespace, in a session of its own, dying with the thread.

    Streams left ``None``: no input; output and errors to ``log``.
    """
    command = [str(part) for part in argv]
    if shutil.which(command[0]) is None:
        raise LabError(f"{command[0]} is not installed; install the package that brings it")
    # A node has an installed package, with its bytecode. Where we are told to write none, each program would compile
    # all of it anew: half a second more for each start of an agent.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= env or {}
    path = [str(PACKAGE_PARENT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644) if log else subprocess.DEVNULL
    try:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=output if stdout is None else stdout,
            stderr=output if stderr is None else stderr,
            env=environment,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            text=True,
        )
    except OSError as error:
        raise LabError(
            f"cannot start {command[0]}: {error}; install util-linux (setpriv) or free some memory"
        ) from error
    finally:
        if log:
            os.close(output)


def python(*arguments: str) -> list[str]:
    """``argv`` for this very interpreter: ``python("-m", "lbpod.lab.udp_echo", ...)``."""
    return [sys.executable, *arguments]
