"""The checking client behind a command: ``ssh host``, ``kubectl exec -i pod --``, ``ip netns exec NAME``, or nothing,
which is this machine.

Why it is sent along: a client outside a user's cluster has no checkout. It needs a shell and Python 3.11; the checker's
few modules, which import the standard library alone, go in by its input, and its lines come back by its output.

Why all of it goes through the input of ``sh``: ssh joins its words and has another shell split them, the others do not,
so no quoting is right for both. The shell may read on beyond its first line, so nothing follows that line before Python
has answered; from then on the input is the checker's own. Nothing is written there, and a client whose connection is
lost ends at its next line, a second later.
"""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lbpod.lab import CheckerRun, LabError, Program
from lbpod.lab.program import spawn

MODULES: Final = ("limits", "check_rules", "check_holdups", "check_ports", "check_flows", "checker")
"""Of lbpod.lab, each behind those that it imports; the last one is run."""
ANSWER_S: Final = 30
"""So long may a client take to answer at all."""
_READY: Final = "holdfast-client: ready"

_BOOTSTRAP: Final = f"""\
import json, sys, types
print("{_READY}", file=sys.stderr, flush=True)
told = json.loads(sys.stdin.readline())
sys.argv = told["argv"]
sys.modules["lbpod"] = types.ModuleType("lbpod")
sys.modules["lbpod.lab"] = types.ModuleType("lbpod.lab")
for name, source in told["modules"]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, name, "exec"), module.__dict__)
"""


def _sources() -> list[tuple[str, str]]:
    """Name and text of what is sent; the last one under the name that makes it run."""
    found = []
    for name in MODULES:
        spec = importlib.util.find_spec(f"lbpod.lab.{name}")
        assert spec is not None, f"lbpod.lab.{name} is a module of this checkout"
        assert spec.origin is not None, f"lbpod.lab.{name} has a source"
        found.append(("__main__" if name == MODULES[-1] else spec.name, Path(spec.origin).read_text()))
    return found


class Client:
    """command: what stands before `sh`; empty: this machine."""

    def __init__(self, command: Sequence[str], log_dir: Path) -> None:
        self._command = [*command, "sh"]
        self._python = "python3" if command else sys.executable
        self._log_dir = log_dir
        self._count = 0

    def __str__(self) -> str:
        return " ".join(self._command[:-1]) or "this machine"

    def run(self, line: str) -> str:
        """What a line of shell prints there. Raises AssertionError with what it says where it fails."""
        try:
            ran = subprocess.run(
                self._command, input=f"{line}\n", capture_output=True, text=True, check=False, timeout=ANSWER_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise AssertionError(f"{line} at {self}: {error}") from error
        assert 0 == ran.returncode, f"{line} at {self}: {ran.stdout}{ran.stderr}"
        return ran.stdout

    def why_not(self) -> str:
        """What keeps it from being one, as a sentence; empty: nothing does."""
        version = "import sys; print(sys.version_info >= (3, 11), sys.version.split()[0])"
        try:
            said = self.run(f"command -v curl >/dev/null || echo no-curl; {self._python} -c {shlex.quote(version)}")
        except AssertionError as error:
            last = re.sub(r"\s+", " ", str(error))[-300:]
            return f"a shell with python3 does not answer at the client ({self}): {last}"
        if "no-curl" in said:
            return f"the client ({self}) has no curl; install it there."
        return "" if "True" in said else f"the client ({self}) has Python {said.split()[-1]}, and 3.11 is needed."

    def start_checker(self, target: str, *, long_count: int, short_rate: int) -> CheckerRun:
        """The checker is running there when this returns. Call it in the main thread: it ends with the thread."""
        self._count += 1
        log = self._log_dir / f"{self._count:03d}-client-checker.log"
        stats = log.with_suffix(".jsonl")
        argv = ["checker", "--target", target, "--long", str(long_count), "--short-rate", str(short_rate)]
        with stats.open("w") as out:
            process = spawn(self._command, log=log, stdin=subprocess.PIPE, stdout=out, stderr=None, env=None)
        program = Program("checker", str(self), process, log)
        program.stdin.write(f"exec {self._python} -c {shlex.quote(_BOOTSTRAP)}\n")
        program.stdin.flush()
        end = time.monotonic() + ANSWER_S
        while _READY not in program.log_text():
            if not program.alive or time.monotonic() > end:
                program.kill()
                raise LabError(f"the checker did not start at the client ({self}): {program.log_text()[-500:]}")
            time.sleep(0.02)
        program.stdin.write(json.dumps({"argv": argv, "modules": _sources()}) + "\n")
        program.stdin.flush()
        return CheckerRun(program, stats)
