"""Real servers in pods, and the checking client seen from its parent.

nginx is Debian's, one worker in the foreground: the same TCP stack and the same keep-alive behaviour that users have,
and one process per pod to kill. Its answer names the backend and repeats the request's argument, so that a client can
tell byte by byte who answered what.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lbpod.lab.errors import LabError
from lbpod.lab.host import Host
from lbpod.lab.limits import (
    CHECK_BACKEND_NAME_MAX,
    CHECK_FAILURES_TOLD_MAX,
    LISTEN_WAIT_NS,
    POLL_NS,
    SECOND_NS,
    WRK_FILE_BYTES,
)
from lbpod.lab.program import Program, python
from lbpod.lab.topology import Lab, Pod

HTTP_PORT: Final = 8080
UDP_PORT: Final = 9000

_NAME: Final = re.compile(rf"[a-z0-9][a-z0-9-]{{0,{CHECK_BACKEND_NAME_MAX - 1}}}")
_LISTENING: Final = {"tcp": "0A", "udp": "07"}  # states in /proc/net: TCP_LISTEN; for UDP "closed" means bound

_NGINX_CONFIG: Final = """\
daemon off;
master_process off;
pid {folder}/pid;
error_log stderr warn;
worker_rlimit_nofile 65536;
events {{ worker_connections 16384; }}
http {{
  access_log off;
  server_tokens off;
  default_type text/plain;
  keepalive_timeout 1d;
  keepalive_requests 1000000000;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  server {{
    listen 0.0.0.0:{port} backlog=4096;
    location / {{ return 200 "{name}\\n"; }}
    location = /echo {{ return 200 "{name} $arg_t\\n"; }}
    location = /file {{ root {www}; }}
  }}
}}
"""


@dataclass(frozen=True)
class Backend:
    """A server in a pod."""

    name: str
    """What it calls itself in every answer."""
    pod: Pod
    port: int
    program: Program


def start_nginx(lab: Lab, pod: Pod, *, name: str | None = None, port: int = HTTP_PORT) -> Backend:
    """nginx in ``pod``, listening when this returns. ``name`` defaults to the pod's.

    ``GET /echo?t=X`` answers ``<name> X``, ``GET /file`` 1 MiB (for wrk), everything else ``<name>``.
    """
    name = _checked(name or pod.name)
    folder = lab.run_dir / f"nginx-{pod.name}-{port}"
    folder.mkdir(exist_ok=True)
    config = folder / "nginx.conf"
    config.write_text(_NGINX_CONFIG.format(folder=folder, name=name, port=port, www=_www(lab)))
    program = pod.popen(["nginx", "-e", "stderr", "-p", folder, "-c", config], name="nginx")
    wait_bound(pod, port, program=program)
    return Backend(name, pod, port, program)


def start_udp_echo(pod: Pod, *, name: str | None = None, port: int = UDP_PORT) -> Backend:
    """A UDP server in ``pod`` that answers ``<name> <datagram>``; bound when this returns."""
    name = _checked(name or pod.name)
    program = pod.popen(python("-m", "lbpod.lab.udp_echo", "--name", name, "--port", str(port)), name="udp_echo")
    wait_bound(pod, port, protocol="udp", program=program)
    return Backend(name, pod, port, program)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no backend name: small letters, digits and -, {CHECK_BACKEND_NAME_MAX} at most")
    return name


def _www(lab: Lab) -> Path:
    folder = lab.run_dir / "www"
    if not folder.exists():
        folder.mkdir()
        (folder / "file").write_bytes(bytes(range(256)) * (WRK_FILE_BYTES // 256))
    return folder


def wait_bound(host: Host, port: int, *, protocol: str = "tcp", program: Program | None = None) -> None:
    """Wait until something in ``host`` listens on ``port``; ``LabError`` if ``program`` ends first or time runs out.

    Read from /proc of the namespace: unlike a trial connection it leaves no trace in the server's logs and counters.
    """
    deadline_ns = time.monotonic_ns() + LISTEN_WAIT_NS
    wanted = f":{port:04X}"
    while True:
        with host.in_netns():
            lines = Path(f"/proc/thread-self/net/{protocol}").read_text().splitlines()[1:]
        sockets = [line.split() for line in lines]
        if any(one[1].endswith(wanted) and one[3] == _LISTENING[protocol] for one in sockets):
            return
        if program is not None and not program.alive:
            raise LabError(f"{program.name} in {host.name} ended at once: {program.log_text().strip()[-500:]}")
        if time.monotonic_ns() > deadline_ns:
            raise LabError(f"nothing listens on {protocol} port {port} in {host.name}; see {host.run_context.log_dir}")
        time.sleep(POLL_NS / SECOND_NS)


class CheckerRun:
    """A running checking client (``lbpod.lab.checker``). One thread at a time."""

    def __init__(self, program: Program, stats: Path) -> None:
        self.program = program
        self.ticks: list[dict[str, Any]] = []  # one a second
        self.failures: list[dict[str, Any]] = []  # len <= 3 * failures_told
        self.marks: list[dict[str, Any]] = []  # one for each `mark`
        self.final: dict[str, Any] | None = None
        self._stats = stats
        self._read_to_bytes = 0

    @classmethod
    def start(
        cls,
        lab: Lab,
        target: str,
        *,
        host: Host | None = None,
        long_count: int = 100,
        short_rate: int = 0,
        interval_ms: int = 300,
        timeout_ms: int | None = None,
        probes: int = 0,
        probe_interval_ms: int = 100,
        failures_told: int = CHECK_FAILURES_TOLD_MAX,
        udp: bool = False,
    ) -> CheckerRun:
        """Start it in ``host`` (the lab's first client) against ``target`` ("203.0.113.10:80")."""
        host = host or lab.client
        stats = host.run_context.next_log(host.name, "checker-stats").with_suffix(".jsonl")
        argv = python("-m", "lbpod.lab.checker", "--target", target, "--long", str(long_count))
        argv += ["--short-rate", str(short_rate), "--interval-ms", str(interval_ms), "--stats-file", str(stats)]
        argv += ["--probes", str(probes), "--probe-interval-ms", str(probe_interval_ms)]
        argv += ["--failures-told", str(failures_told)]
        argv += ["--timeout-ms", str(timeout_ms)] if timeout_ms is not None else []
        argv += ["--udp"] if udp else []
        return cls(host.popen(argv, name="checker", stdin=subprocess.PIPE), stats)

    def gone(self, name: str) -> None:
        """Tell it that backend ``name`` is about to be removed. Call it *before* the removal."""
        self._tell(f"gone {name}")

    def leaves(self, name: str) -> None:
        """Tell it that ``name``, which has drained, goes out of the config. Call it *before* the config is written, and
        let the pod live until ``left``."""
        self._tell(f"leaves {name}")

    def left(self, name: str) -> None:
        """No load balancer forwards by a config that has ``name``."""
        self._tell(f"left {name}")

    def haunts(self, name: str) -> None:
        """It has been removed, and new flows are sent to it until ``forgotten``. Call it *after* the removal: what was
        begun later can have waited for its connection in vain, and nothing else."""
        self._tell(f"haunts {name}")

    def forgotten(self, name: str) -> None:
        """No load balancer sends new flows to ``name`` any more."""
        self._tell(f"forgotten {name}")

    def mark(self, number: int, at_ns: int) -> None:
        """Something was lost at ``at_ns`` (monotonic); ``marks`` will say whom it held up."""
        self._tell(f"mark {number} {at_ns}")

    def alive(self, name: str) -> None:
        """Tell it that one called ``name`` serves, though an earlier one may be gone. Call it *before* it can serve."""
        self._tell(f"alive {name}")

    def _tell(self, line: str) -> None:
        try:
            self.program.stdin.write(line + "\n")
            self.program.stdin.flush()
        except OSError as error:
            raise LabError(f"the checker has ended: {self.program.log_text().strip()[-500:]}") from error

    def poll(self) -> dict[str, Any] | None:
        """Read what it has written since; returns the newest line of counters, ``None`` before the first."""
        if self._stats.exists():
            with self._stats.open("rb") as file:
                file.seek(self._read_to_bytes)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._read_to_bytes += len(whole) + len(newline)
            for line in whole.splitlines():
                self._take(json.loads(line))
        return self.final or (self.ticks[-1] if self.ticks else None)

    def wait_until(self, wanted: Callable[[dict[str, Any]], bool], *, seconds: float = 10) -> dict[str, Any]:
        """The first counters that are ``wanted`` (new ones come once a second); ``LabError`` after ``seconds``."""
        deadline_ns = time.monotonic_ns() + int(seconds * SECOND_NS)
        while True:
            counters = self.poll()
            if counters is not None and wanted(counters):
                return counters
            if not self.program.alive or time.monotonic_ns() > deadline_ns:
                raise LabError(
                    f"the checker did not get there in {seconds} s: {counters} {self.program.log_text()[-500:]}"
                )
            time.sleep(POLL_NS / SECOND_NS)

    def _take(self, line: dict[str, Any]) -> None:
        match line["kind"]:
            case "tick":
                self.ticks.append(line)
            case "failure":
                self.failures.append(line)
            case "mark":
                self.marks.append(line)
            case "final":
                self.final = line
            case other:
                raise AssertionError(f"the checker writes no lines of kind {other!r}")

    def stop(self) -> dict[str, Any]:
        """Stop it and return its final counters."""
        if self.program.alive:
            self._tell("stop")
            self.program.wait(10)
        self.program.stop()
        self.poll()
        if self.final is None:
            raise LabError(f"the checker ended without its last line: {self.program.log_text().strip()[-500:]}")
        return self.final
