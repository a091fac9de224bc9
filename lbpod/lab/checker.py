"""The checking client: many long-lived flows and a stream of short ones, every answer compared byte by byte.

A program of its own, so that it can run inside the client's namespace and its pauses are nobody else's::

    python -m lbpod.lab.checker --target 203.0.113.10:80 --long 300 --short-rate 200 --interval-ms 300

It writes one JSON line a second (``"kind": "tick"``), one for each of the first failures (``"failure"``), and a last
one (``"final"``) when it is told to stop: by SIGTERM, SIGINT or the line ``stop`` on its input. Other lines it takes:
``gone NAME`` (say it *before* the backend is removed), ``leaves NAME`` and ``left NAME`` (in between, the config is
without a backend that has drained, and not in force everywhere; its pod goes afterwards), ``haunts NAME`` (said once
the backend is removed) and ``forgotten NAME`` (in between, new flows go to a backend that is gone),
``alive NAME``, and ``mark NUMBER NS`` (something was lost at this time of the monotonic clock: a line ``"mark"`` says
later whom it held up for how long, see ``check_holdups``). ``check_rules`` says what counts as broken.

Ticks and the final line carry the counters of ``check_rules.Tally``, ``ports_hurried`` (``check_ports``), ``t_ns``
(since start), ``unanswered`` (questions of long-lived flows that have been open for ``CHECK_UNANSWERED_NS``), and
``latency_ns`` (percentiles of the last second; in the final line, of the whole run).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import resource
import secrets
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import IO

from lbpod.lab.check_flows import (
    LOSSES_MAX_HTTP,
    LOSSES_MAX_UDP,
    Group,
    World,
    long_flow,
    open_http,
    open_udp,
    short_stream,
)
from lbpod.lab.check_holdups import HELD_NS, Mark, Marks
from lbpod.lab.check_ports import Ports, local_ports
from lbpod.lab.check_rules import Histogram, Judge, Reason, Verdict
from lbpod.lab.limits import (
    CHECK_FAILURES_TOLD_MAX,
    CHECK_LONG_MAX,
    CHECK_SHORT_RATE_MAX,
    CHECK_TIMEOUT_NS,
    CHECK_UNANSWERED_NS,
    MS_NS,
    SECOND_NS,
)

RAMP_PER_SECOND = 500
"""Long-lived flows are opened over ``long / RAMP_PER_SECOND`` seconds, but at least over one interval."""


class Stop(Exception):  # noqa: N818 - not an error: the way out of the task group
    """The checker was told to end."""


class Reporter:
    """Judges failures and writes lines."""

    def __init__(self, world: World, groups: Sequence[Group], told_max: int, out: IO[str]) -> None:
        self._world = world
        self._holdups = {group.name: group.holdups for group in groups}
        self._told_max = told_max
        self._out = out
        self._start_ns = time.monotonic_ns()
        self._told: Counter[Verdict] = Counter()

    async def run(self) -> None:
        """One line a second until cancelled; a late second is not made up for."""
        due_ns = self._start_ns
        while True:
            due_ns = max(due_ns + SECOND_NS, time.monotonic_ns())
            await asyncio.sleep((due_ns - time.monotonic_ns()) / SECOND_NS)
            self.report("tick", self._world.latency, self.counters)
            self._world.latency.clear()

    def report(self, kind: str, latency: Histogram, counters: Callable[[], dict[str, object]]) -> None:
        self.judge(final=kind == "final")
        self.reckon(final=kind == "final")
        hurried = {"ports_hurried": self._world.ports.hurried_count}
        self._write({"kind": kind, "t_ns": self._age_ns(), **counters(), **hurried, "latency_ns": latency.summary()})

    def counters(self) -> dict[str, object]:
        """What has been counted, and how many wait in vain, as it seems."""
        before_ns = time.monotonic_ns() - CHECK_UNANSWERED_NS
        unanswered = sum(holdups.unanswered(before_ns) for holdups in self._holdups.values())
        return {**self._world.tally.as_dict(), "unanswered": unanswered}

    def judge(self, *, final: bool) -> None:
        tally = self._world.tally
        for verdict, failure in self._world.judge.verdicts(time.monotonic_ns(), final=final):
            tally.judged(verdict, failure)
            if self._told[verdict] < self._told_max:
                self._told[verdict] += 1
                self._write(
                    {
                        "kind": "failure",
                        "at_ns": failure.at_ns,
                        "t_ns": failure.at_ns - self._start_ns,
                        "age_ns": failure.at_ns - failure.opened_ns,
                        "asked_ns": failure.asked_ns,
                        "failed_ns": failure.failed_ns,
                        "gone_ns": failure.gone_ns,
                        "verdict": verdict,
                        "reason": failure.reason,
                        "backend": failure.backend,
                        "local_port": failure.local_port,
                        "answers": failure.answers,
                        "detail": failure.detail,
                    }
                )

    def reckon(self, *, final: bool) -> None:
        for mark in self._world.marks.due(self._holdups, time.monotonic_ns(), final=final):
            figures = {name: holdups.figures(mark) for name, holdups in self._holdups.items()}
            groups = {name: dataclasses.asdict(one) for name, one in figures.items()}
            self._write({"kind": "mark", "mark": mark.number, "at_ns": mark.at_ns, "groups": groups})

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
        match line.split():
            case ["gone", name]:
                world.judge.gone(name, time.monotonic_ns())
            case ["leaves", name]:
                world.judge.leaves(name, time.monotonic_ns())
            case ["left", name]:
                world.judge.left(name, time.monotonic_ns())
            case ["haunts", name]:
                world.judge.haunts(name, time.monotonic_ns())
            case ["forgotten", name]:
                world.judge.forgotten(name, time.monotonic_ns())
            case ["alive", name]:
                world.judge.alive(name)
            case ["mark", number, at_ns]:
                world.marks.add(Mark(int(number), int(at_ns)))
            case ["stop"]:
                stop.set()

    def read() -> None:
        for line in sys.stdin:
            try:
                loop.call_soon_threadsafe(obey, line)
            except RuntimeError:
                return  # the loop has ended before us

    threading.Thread(target=read, name="orders", daemon=True).start()


async def check(world: World, groups: Sequence[Group], out: IO[str], *, short_rate: int, told_max: int) -> None:
    """Run until told to stop, then write the last line."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for ending in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(ending, stop.set)
    _listen(world, stop, loop)
    reporter = Reporter(world, groups, told_max, out)
    counters: dict[str, object] = {}
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(reporter.run())
            for kind in groups:
                ramp_ns = max(kind.interval_ns, kind.count * SECOND_NS // RAMP_PER_SECOND)
                for number in range(kind.count):
                    tasks.create_task(long_flow(world, kind, number, ramp_ns * number // kind.count))
            if short_rate:
                tasks.create_task(short_stream(world, short_rate, tasks))
            await stop.wait()
            reporter.judge(final=True)
            counters = reporter.counters()  # now: ending the flows takes them out of the gauges
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
    parser.add_argument("--probes", type=int, default=0, help="more long-lived flows, that ask often and resend evenly")
    parser.add_argument("--probe-interval-ms", type=int, default=100, help="between two requests of a probe")
    parser.add_argument(
        "--failures-told", type=int, default=CHECK_FAILURES_TOLD_MAX, help="failures of a verdict written one by one"
    )
    parser.add_argument("--timeout-ms", type=int, help="an answer later than this is none (5000; UDP: 1000)")
    parser.add_argument("--stats-file", help="write the lines there instead of to the standard output")
    parser.add_argument("--stats-fd", type=int, help="write the lines to this descriptor")
    options = parser.parse_args()
    host, _, port = options.target.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65_536:
        parser.error(f"--target {options.target}: want address:port, like 203.0.113.10:80")
    options.host, options.port = host, int(port)
    if not 0 <= options.probes <= CHECK_LONG_MAX:
        parser.error(f"--probes {options.probes}: want 0 to {CHECK_LONG_MAX}")
    if not 0 <= options.long <= CHECK_LONG_MAX:
        parser.error(f"--long {options.long}: want 0 to {CHECK_LONG_MAX}")
    if not 0 <= options.short_rate <= CHECK_SHORT_RATE_MAX:
        parser.error(f"--short-rate {options.short_rate}: want 0 to {CHECK_SHORT_RATE_MAX}")
    times_ms = (options.interval_ms, options.probe_interval_ms, 1 if options.timeout_ms is None else options.timeout_ms)
    if min(times_ms) < 1:
        parser.error("--interval-ms, --probe-interval-ms and --timeout-ms: want 1 or more")
    return options


def _open_more_files() -> None:
    """A socket is a file, and the usual soft limit of 1,024 is there for programs that use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    options = _options()
    _open_more_files()
    default_ns = SECOND_NS if options.udp else CHECK_TIMEOUT_NS
    timeout_ns = options.timeout_ms * MS_NS if options.timeout_ms else default_ns
    losses_max = LOSSES_MAX_UDP if options.udp else LOSSES_MAX_HTTP
    world = World(
        host=options.host,
        port=options.port,
        timeout_ns=timeout_ns,
        nonce=secrets.token_hex(3),
        open_line=open_udp if options.udp else open_http,
        losses_max=losses_max,
        judge=Judge(unheard=Reason.TIMEOUT if options.udp else Reason.CONNECT_TIMEOUT),
        marks=Marks(wait_ns=timeout_ns + HELD_NS),
        ports=Ports(local_ports(), Random()),
    )
    groups = [
        Group("long", options.long, options.interval_ms * MS_NS, evenly=False),
        Group("probe", options.probes, options.probe_interval_ms * MS_NS, evenly=True),
    ]
    out: IO[str]
    if options.stats_file:
        out = open(options.stats_file, "w", encoding="utf-8")  # noqa: SIM115 - closed with the process
    elif options.stats_fd is not None:
        out = os.fdopen(options.stats_fd, "w", encoding="utf-8")
    else:
        out = sys.stdout
    asyncio.run(check(world, groups, out, short_rate=options.short_rate, told_max=options.failures_told))


if __name__ == "__main__":
    main()
