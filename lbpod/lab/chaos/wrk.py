"""wrk beside the checking client: real downloads of 1 MiB, so that long trains of acknowledgements pass the LBs.

It opens a broken connection again without a word and does not know which backends have gone, so its errors are shown
and never judged. Its script slows it down: without one it would take all the processor time that there is.
"""

from __future__ import annotations

import re
import signal
from typing import Final, Self

from lbpod.lab.host import Host
from lbpod.lab.program import Program
from lbpod.lab.topology import Lab

DURATION_SECONDS: Final = 7 * 24 * 3_600
"""Longer than any run: it is stopped."""
PAUSE_MS: Final = 2_000
STOP_SECONDS: Final = 10
_SCRIPT: Final = f"function delay() return {PAUSE_MS} end\n"
_ERRORS: Final = re.compile(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)")
_REQUESTS: Final = re.compile(r"(\d+) requests in ")


class WrkRun:
    """A running wrk; without connections, none."""

    def __init__(self, program: Program | None) -> None:
        self._program = program

    @classmethod
    def start(cls, lab: Lab, host: Host, target: str, connections: int) -> Self:
        if connections == 0:
            return cls(None)
        script = lab.run_dir / "slow.lua"
        script.write_text(_SCRIPT)
        argv = ["wrk", "-t", "1", "-c", str(connections), "-d", f"{DURATION_SECONDS}s", "--timeout", "30s"]
        return cls(host.popen([*argv, "-s", script, f"http://{target}/file"], name="wrk"))

    def stop(self) -> dict[str, int]:
        """Its figures: requests, and errors by kind."""
        if self._program is None:
            return {}
        self._program.signal(signal.SIGINT)
        self._program.wait(STOP_SECONDS)
        return read_wrk(self._program.log_text())


def read_wrk(text: str) -> dict[str, int]:
    """The figures in wrk's last words; without errors it does not speak of them."""
    requests, errors = _REQUESTS.search(text), _ERRORS.search(text)
    kinds = ("connect", "read", "write", "timeout")
    found = {f"{kind}_errors": int(errors[place]) if errors else 0 for place, kind in enumerate(kinds, start=1)}
    return {"requests": int(requests[1]) if requests else 0, **found}
