"""One agent, put together: driver, peers and the two servers around a datapath that somebody else has opened.

Decided here: what is started and stopped in which order. The servers listen only after the driver has taken over what
an earlier agent left, so that nobody is told of a state that is about to change; whoever waits when the driver stops
gets 503. The constructor starts nothing. Everything that differs between production and a test (maps, next hops,
ports, certificates) comes in as ``Parts``; there is no switch for it.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy.typing as npt
import structlog
from aiohttp import web

from lbpod.agent.attachment import Attachment
from lbpod.agent.broken import is_ours, raise_what_failed
from lbpod.agent.driver import Brain, Driver
from lbpod.agent.heap import give_back
from lbpod.agent.leave import leave
from lbpod.agent.outbox import Outbox
from lbpod.agent.peers import Peers
from lbpod.agent.remembered import Memory
from lbpod.agent.server import control_app, node_app
from lbpod.agent.settings import Endpoint, RedisTarget
from lbpod.agent.start_times import StartTimes, since_exec_ms
from lbpod.agent.view import Facts, View
from lbpod.certs import CertsError, Credentials
from lbpod.core.limits import CLOSE_NS_MAX, LOOK_AFTER_NS
from lbpod.core.messages import Restored
from lbpod.datapath.apply import Applier, NextHops, found_in
from lbpod.datapath.port import ArrayName, Datapath, DatapathError
from lbpod.datapath.rows import Uplink

if TYPE_CHECKING:
    from lbpod.agent.redis_writer import RedisWriter

_LOG: Final = structlog.get_logger()


class StartError(Exception):
    """The agent cannot start, or not go on without a new start. str(): one sentence that says what is missing."""


@dataclass(frozen=True)
class Parts:
    """What an agent is made of."""

    brain: Brain
    datapath: Datapath
    hops: NextHops
    uplink: Uplink
    memory: Memory
    credentials: Credentials
    listen: Endpoint
    metrics_listen: Endpoint
    facts: Facts
    node: str
    substitutes: Callable[[], Sequence[str]] = tuple
    """What this kernel lacks and what is done instead, one sentence each."""
    redis: RedisTarget | None = None
    """Where diagnostics go; None: nowhere."""
    times: StartTimes = field(default_factory=StartTimes)
    """What its start has taken so far."""
    withdraw_ns: int | None = None
    """How long `terminate` lets /readyz say 503 before this LB asks to leave the ring; None: it stays in the ring."""
    attachment: Attachment | None = None
    """The programs on the uplink, attached; None: maps in memory."""


class Agent:
    """Runs until `stop`. All methods from the loop's thread."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._applier: Final = Applier(parts.datapath, parts.node, parts.uplink, parts.hops)
        self._uplink = parts.uplink
        """As the maps have it."""
        self.driver: Final = Driver(parts.brain, parts.datapath, self._applier, parts.memory)
        self.peers: Final = Peers(parts.credentials.client, self.driver.post)
        self.driver.connect(self.peers)
        self._outbox: Final = Outbox() if parts.redis is not None else None
        self.view: Final = View(
            self.driver,
            self.peers,
            parts.credentials,
            parts.datapath,
            parts.facts,
            parts.substitutes,
            self._outbox,
            parts.attachment,
        )
        self.started: Final = asyncio.Event()
        """Set when both servers listen."""
        self._leaving: asyncio.Task[None] | None = None
        self._named: list[str] = []
        """Substitutes that the log has named."""
        self.control_port = 0
        """Where controller and peers reach it, once started."""
        self.metrics_port = 0
        """Where /metrics is, once started."""

    async def run(self) -> None:
        """Serves until `stop`. Raises StartError where an address cannot be listened on, UplinkAnewError."""
        loop, times = asyncio.get_running_loop(), self._parts.times
        loop.set_exception_handler(self._on_loop_error)
        fd = self._parts.hops.fileno()
        if fd >= 0:
            loop.add_reader(fd, self.driver.take_hop_events)
        writer = self._start_writing()
        driving = asyncio.create_task(self.driver.run(self._restored()), name="driver")
        looking = asyncio.create_task(self._look_after(), name="look after")
        looking.add_done_callback(raise_what_failed)
        runners: list[web.AppRunner] = []
        try:
            await self._after_restore(driving)
            times.took("restore")
            self.control_port = await self._listen(runners, control_app(self.view), self._parts.listen, "control")
            app = node_app(self.view)
            self.metrics_port = await self._listen(runners, app, self._parts.metrics_listen, "metrics")
            times.took("listen")
            _LOG.info("started", ms=since_exec_ms(), cpu_ms=times.cpu_total_ms, steps=times.cpu_ms)
            self.started.set()
            await driving
        finally:
            if fd >= 0:
                loop.remove_reader(fd)
            self.driver.stop()
            others = [looking, *([self._leaving] if self._leaving is not None else [])]
            for task in others:
                task.cancel()
            await asyncio.gather(driving, *others, return_exceptions=True)
            for runner in runners:
                await runner.cleanup()
            await self.peers.close()
            if writer is not None:
                writer.stop()

    def _start_writing(self) -> "RedisWriter | None":
        """Diagnostics, where they are wanted."""
        target, outbox, parts = self._parts.redis, self._outbox, self._parts
        if target is None or outbox is None:
            return None
        # Imported only here: redis-py takes memory, and most agents never need it.
        from lbpod.agent.diagnostics import Diagnostics
        from lbpod.agent.redis_writer import RedisWriter

        self.driver.observe(Diagnostics(outbox, parts.datapath.read_slots))
        writer = RedisWriter(outbox, parts.node, target)
        writer.start()
        return writer

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback or a task has failed, and nobody waits for it."""
        error = context.get("exception")
        if error is not None and is_ours(error):
            self.driver.fail(error)
        else:
            loop.default_exception_handler(context)

    def stop(self) -> None:
        """Ends `run`. Programs, maps and pins stay."""
        self.driver.stop()

    def terminate(self) -> None:
        """Ends `run` when this LB has left the ring, or at once: where it is to stay, is told twice, or all
        the others end, too."""
        if self._parts.withdraw_ns is None or self._leaving is not None or self.driver.is_farewell:
            self.stop()
        else:
            self._leaving = asyncio.create_task(self._leave(self._parts.withdraw_ns), name="leave")
            self._leaving.add_done_callback(raise_what_failed)

    async def _leave(self, withdraw_ns: int) -> None:
        _LOG.info("left", how=(await leave(self.driver, self.started, withdraw_ns)).value)
        self.stop()

    async def _after_restore(self, driving: asyncio.Task[None]) -> None:
        ready = asyncio.create_task(self.driver.look())
        await asyncio.wait({driving, ready}, return_when=asyncio.FIRST_COMPLETED)
        if driving.done():
            ready.cancel()
            driving.result()

    async def _look_after(self) -> None:
        """What changes seldom and tells nobody. Raises UplinkAnewError, which ends the agent."""
        while True:
            if self._parts.attachment is not None:
                self._parts.attachment.look()
                self._follow(self._parts.attachment.uplink)
            self._name_substitutes()
            self._renew()
            give_back()
            if self._outbox is not None:
                self._outbox.put_state(self.view.summary())
            await asyncio.sleep(LOOK_AFTER_NS * 1e-9)

    def _follow(self, uplink: Uplink) -> None:
        """Has the maps say what the uplink is now. In the loop's thread, as whatever else writes to them."""
        if uplink == self._uplink:
            return
        try:
            self._applier.follow(uplink)
        except DatapathError as error:
            _LOG.warning("uplink not followed", reason=str(error))  # the next look tries again
            return
        _LOG.info("uplink changed", interface=uplink.name, mtu=uplink.mtu, mtu_before=self._uplink.mtu)
        self._uplink = uplink

    def _name_substitutes(self) -> None:
        """Most show only when something is needed for the first time."""
        for sentence in self._parts.substitutes():
            if sentence not in self._named:
                self._named.append(sentence)
                _LOG.warning("substitute", sentence=sentence)

    def _renew(self) -> None:
        """Certificates that were replaced on disk are used from now on."""
        try:
            if self._parts.credentials.renew():
                _LOG.info("certificates renewed")
        except CertsError as error:
            _LOG.warning("certificates not renewed", reason=str(error))
        if sentence := self._parts.credentials.reminder(time.time()):
            _LOG.warning("certificate", sentence=sentence)

    async def _listen(self, runners: list[web.AppRunner], app: web.Application, at: Endpoint, what: str) -> int:
        tls = self._parts.credentials.server if what == "control" else None
        runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=CLOSE_NS_MAX * 1e-9)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, at.host, at.port, ssl_context=tls)
        try:
            await site.start()
        except OSError as error:
            raise StartError(f"cannot listen on {at} ({what}): {error.strerror or error}") from error
        port = int(runner.addresses[0][1])
        _LOG.info("listening", what=what, host=at.host, port=port)
        return port

    def _restored(self) -> Restored | None:
        """What an earlier agent left in maps and memory; None where there is nothing to go on with.

        Maps without a memory are left as they are: they forward until the controller has pushed everything again.
        """
        datapath = self._parts.datapath
        remembered = self._parts.memory.recall()
        if remembered.why_not:
            _LOG.warning("memory not used", reason=remembered.why_not)
        vips = datapath.vip_ids()
        config: npt.NDArray[Any] = datapath.read(ArrayName.CONFIG)
        if remembered.committed is None and remembered.prepared is None:
            if vips:
                _LOG.warning("maps without a memory", vips=len(vips))
            return None
        if not vips and not config["epoch"].any():
            _LOG.warning("memory not used", reason="the maps that it belongs to are gone")
            return None
        found = found_in(datapath)
        return Restored(
            remembered.committed, remembered.prepared, found.slots, remembered.ring_done, found.down, found.given_up
        )
