"""The checking client: many long-lived flows and a stream of short ones, every answer compared byte by byte.

A program of its own, so that it can run inside the client's namespace and its pauses are nobody else's::

    python -m lbpod.lab.checker --target 203.0.113.10:80 --long 300 --short-rate 200 --interval-ms 300

It writes one JSON line a second (``"kind": "tick"``), one for each of the first failures (``"failure"``), and a last
one (``"final"``) when it is told to stop: by SIGTERM, SIGINT or the line ``stop`` on its input. Other lines it takes:
``gone NAME`` (say it *before* the backend is removed) and ``alive NAME``. ``check_rules`` says what counts as broken.

Ticks and the final line carry the counters of ``check_rules.Tally``, ``t_ns`` (since start), and ``latency_ns``
(percentiles of the last second; in the final line, of the whole run).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import IO

from lbpod.lab.check_flows import (
    LOSSES_MAX_HTTP,
    LOSSES_MAX_UDP,
    World,
    long_flow,
    open_http,
    open_udp,
    short_stream,
)
from lbpod.lab.check_rules import Histogram, Judge
from lbpod.lab.limits import (
    CHECK_FAILURES_TOLD_MAX,
    CHECK_GRACE_NS,
    CHECK_LONG_MAX,
    CHECK_SHORT_RATE_MAX,
    CHECK_TIMEOUT_NS,
    MS_NS,
    SECOND_NS,
)

RAMP_PER_SECOND = 500
"""Long-lived flows are opened over ``long / RAMP_PER_SECOND`` seconds, but at least over one interval."""


class Stop(Exception):  # noqa: N818 - not an error: the way out of the task group
    """The checker was told to end."""


class Reporter:
    """Judges failures and writes lines."""

    def __init__(self, world: World, out: IO[str]) -> None:
        self._world = world
        self._out = out
        self._start_ns = time.monotonic_ns()
        self._told = 0

    async def run(self) -> None:
        """One line a second until cancelled; a late second is not made up for."""
        due_ns = self._start_ns
        while True:
            due_ns = max(due_ns + SECOND_NS, time.monotonic_ns())
            await asyncio.sleep((due_ns - time.monotonic_ns()) / SECOND_NS)
            self.report("tick", self._world.latency, self._world.tally.as_dict)
            self._world.latency.clear()

    def report(self, kind: str, latency: Histogram, counters: Callable[[], dict[str, object]]) -> None:
        self.judge(final=kind == "final")
        self._write({"kind": kind, "t_ns": self._age_ns(), **counters(), "latency_ns": latency.summary()})

    def judge(self, *, final: bool) -> None:
        tally = self._world.tally
        for verdict, failure in self._world.judge.verdicts(time.monotonic_ns(), final=final):
            tally.judged(verdict, failure)
            if self._told < CHECK_FAILURES_TOLD_MAX:
                self._told += 1
                self._write(
                    {
                        "kind": "failure",
                        "t_ns": failure.at_ns - self._start_ns,
                        "verdict": verdict,
                        "reason": failure.reason,
                        "backend": failure.backend,
                        "local_port": failure.local_port,
                        "answers": failure.answers,
                        "detail": failure.detail,
                    }
                )

    def _age_ns(self) -> int:
        return time.monotonic_ns() - self._start_ns

    def _write(self, line: dict[str, object]) -> None:
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()


def _listen(world: World, stop: asyncio.Event, loop: asyncio.AbstractEventLoop) -> None:
    """Reads the parent's lines in a thread: a pipe, a terminal and /dev/null all work, and only this thread waits.

    The end of the input means nothing (with /dev/null it comes at once).
    """

    def obey(line: str) -> None:
        word, _, name = line.strip().partition(" ")
        if word == "gone":
            world.judge.gone(name, time.monotonic_ns())
        elif word == "alive":
            world.judge.alive(name)
        elif word == "stop":
            stop.set()

    def read() -> None:
        for line in sys.stdin:
            try:
                loop.call_soon_threadsafe(obey, line)
            except RuntimeError:
                return  # the loop has ended before us

    threading.Thread(target=read, name="orders", daemon=True).start()


async def check(world: World, out: IO[str], *, long_count: int, short_rate: int) -> None:
    """Run until told to stop, then write the last line."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for ending in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(ending, stop.set)
    _listen(world, stop, loop)
    reporter = Reporter(world, out)
    ramp_ns = max(world.interval_ns, long_count * SECOND_NS // RAMP_PER_SECOND)
    counters: dict[str, object] = {}
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(reporter.run())
            for number in range(long_count):
                group.create_task(long_flow(world, number, ramp_ns * number // long_count))
            if short_rate:
                group.create_task(short_stream(world, short_rate, group))
            await stop.wait()
            reporter.judge(final=True)
            counters = world.tally.as_dict()  # now: ending the flows takes them out of the gauges
            raise Stop
    except* Stop:
        pass
    reporter.report("final", world.latency_all, lambda: counters)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", required=True, help="address:port (IPv4)")
    parser.add_argument("--udp", action="store_true", help="talk to lbpod.lab.udp_echo instead of HTTP")
    parser.add_argument("--long", type=int, default=100, help="long-lived flows")
    parser.add_argument("--short-rate", type=int, default=0, help="short flows a second")
    parser.add_argument("--interval-ms", type=int, default=300, help="between two requests of a long-lived flow")
    parser.add_argument("--timeout-ms", type=int, help="an answer later than this is none (5000; UDP: 1000)")
    parser.add_argument("--stats-file", help="write the lines there instead of to the standard output")
    parser.add_argument("--stats-fd", type=int, help="write the lines to this descriptor")
    options = parser.parse_args()
    host, _, port = options.target.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65_536:
        parser.error(f"--target {options.target}: want address:port, like 203.0.113.10:80")
    options.host, options.port = host, int(port)
    if not 0 <= options.long <= CHECK_LONG_MAX:
        parser.error(f"--long {options.long}: want 0 to {CHECK_LONG_MAX}")
    if not 0 <= options.short_rate <= CHECK_SHORT_RATE_MAX:
        parser.error(f"--short-rate {options.short_rate}: want 0 to {CHECK_SHORT_RATE_MAX}")
    if options.interval_ms < 1 or (options.timeout_ms is not None and options.timeout_ms < 1):
        parser.error("--interval-ms and --timeout-ms: want 1 or more")
    return options


def main() -> None:
    options = _options()
    default_ns = SECOND_NS if options.udp else CHECK_TIMEOUT_NS
    timeout_ns = options.timeout_ms * MS_NS if options.timeout_ms else default_ns
    losses_max = LOSSES_MAX_UDP if options.udp else LOSSES_MAX_HTTP
    world = World(
        host=options.host,
        port=options.port,
        interval_ns=options.interval_ms * MS_NS,
        timeout_ns=timeout_ns,
        nonce=secrets.token_hex(3),
        open_line=open_udp if options.udp else open_http,
        losses_max=losses_max,
        judge=Judge(blame_window_ns=(losses_max + 1) * timeout_ns + CHECK_GRACE_NS),
    )
    out: IO[str]
    if options.stats_file:
        out = open(options.stats_file, "w", encoding="utf-8")  # noqa: SIM115 - closed with the process
    elif options.stats_fd is not None:
        out = os.fdopen(options.stats_fd, "w", encoding="utf-8")
    else:
        out = sys.stdout
    asyncio.run(check(world, out, long_count=options.long, short_rate=options.short_rate))


if __name__ == "__main__":
    main()
