"""The standalone controller's only loop: events to the Planner, its effects to disk and network, and a watched file.

Decided here: nothing about the cluster (the Planner does that), only how its effects are carried out: in their order,
one event at a time; ``Persist`` before anything after it; calls side by side, each answered by exactly one event. The
file is read again when its folder changes (an editor's rename, a ConfigMap's symlink) and looked at once a second in
case nobody tells; it is used only if its bytes have changed and all of it is good. A bad edit changes nothing but
/readyz, ``holdfast_config_error`` and one line in the log.

Left to others: logs' form (the command), certificates (``lbpod.certs``).
"""

import asyncio
import contextlib
import hashlib
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import Final, assert_never

import structlog
import watchfiles
from aiohttp import web

from lbpod.certs import CertsError, Credentials
from lbpod.core.limits import CONFIG_LOOK_NS, LOOK_AFTER_NS, TICK_NS
from lbpod.core.messages import (
    AskStatus,
    Persist,
    Persisted,
    PersistFailed,
    Phase as PlannerPhase,
    PlannerEffect,
    PlannerEvent,
    PlannerStatus,
    Push,
    Report,
    Tick,
    WorldSeen,
)
from lbpod.core.model import World
from lbpod.core.planner import Planner
from lbpod.standalone.config import Settings, load
from lbpod.standalone.http import STATE_NOTHING, Metrics, make_app
from lbpod.standalone.marks import ConfigError
from lbpod.standalone.push import PushClient
from lbpod.standalone.state import StateError, StateFile, Written

LISTEN_DEFAULT: Final = "127.0.0.1:9901"
_SECOND_NS: Final = 1_000_000_000
_MILLISECOND_NS: Final = 1_000_000
_WATCH_STEP_MS: Final = 10
_WATCH_DEBOUNCE_MS: Final = 100

_LOG: Final = structlog.get_logger()


class Controller:
    """One controller. ``run`` until ``stop``; make it anywhere, run it in an event loop."""

    def __init__(self, config: Path, world: World, settings: Settings) -> None:
        self.status: PlannerStatus = STATE_NOTHING
        self.config_error = ""
        self.converged = False
        self.metrics = Metrics()
        self._config = config
        self._settings = settings
        self._world = world
        self._credentials = Credentials(settings.tls)
        self._state = StateFile(settings.state)
        self._planner = Planner(settings.cluster)
        # Bounded by its writers: one event per node's call, one per edit, one per persist.
        self._events: asyncio.Queue[PlannerEvent] = asyncio.Queue()
        self._calls: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Ends ``run`` soon; calls under way are given up, which is safe at any moment."""
        self._stopping.set()

    async def run(self) -> None:
        """Everything, until ``stop``."""
        client = PushClient(self._credentials.client)
        self.metrics.report(self.status)
        self.metrics.config("")
        try:
            async with asyncio.TaskGroup() as group:
                loop = group.create_task(self._loop(client))
                watch = group.create_task(self._watch())
                look = group.create_task(self._look_after())
                await self._stopping.wait()
                loop.cancel()
                watch.cancel()
                look.cancel()
                for call in tuple(self._calls):
                    call.cancel()
        finally:
            await client.close()

    # --- Events and effects -------------------------------------------------------------------------------------------
    async def _loop(self, client: PushClient) -> None:
        next_tick_ns = time.monotonic_ns()
        await self._feed(client, WorldSeen(self._world))
        while True:
            now_ns = time.monotonic_ns()
            wake_ns = min(next_tick_ns, self._planner.gather_end_ns or next_tick_ns)
            event: PlannerEvent
            if wake_ns <= now_ns:
                event = Tick()
                next_tick_ns = now_ns + TICK_NS
            else:
                try:
                    async with asyncio.timeout((wake_ns - now_ns) / _SECOND_NS):
                        event = await self._events.get()
                except TimeoutError:
                    continue
            await self._feed(client, event)

    async def _feed(self, client: PushClient, event: PlannerEvent) -> None:
        """One event, and those that its effects bring about at once."""
        events: deque[PlannerEvent] = deque([event])
        while events:
            # In a thread: a change that touches many VIPs builds tables for seconds, and /healthz must go on.
            effects = await asyncio.to_thread(self._planner.step, events.popleft(), time.monotonic_ns())
            for effect in effects:
                answer = await self._carry_out(client, effect)
                if answer is not None:
                    events.append(answer)

    async def _carry_out(self, client: PushClient, effect: PlannerEffect) -> PlannerEvent | None:
        match effect:
            case Persist():
                return await self._persist(effect)
            case AskStatus() | Push():
                task = asyncio.create_task(self._call(client, effect))
                self._calls.add(task)
                task.add_done_callback(self._calls.discard)
            case Report(status):
                self._report(status)
            case _:
                assert_never(effect)
        return None

    async def _persist(self, effect: Persist) -> PlannerEvent:
        wanted = Written(effect.generation, effect.snapshot.next_ids)
        try:
            found = await asyncio.to_thread(self._state.persist, wanted, effect.after)
        except StateError as error:
            return PersistFailed(effect.generation, 0, str(error))
        if found is not None:
            reason = f"{self._settings.state} holds generation {found.generation}"
            return PersistFailed(effect.generation, found.generation, reason, found.next_ids)
        return Persisted(effect.generation)

    async def _call(self, client: PushClient, effect: AskStatus | Push) -> None:
        event = await client.call(effect)
        self.metrics.called(effect, event)
        await self._events.put(event)

    def _report(self, status: PlannerStatus) -> None:
        before = self.status
        self.status = status
        self.metrics.report(status)
        if status.phase is PlannerPhase.IDLE and status.generation:
            self.converged = True
        if status.problem and status.problem != before.problem:
            _LOG.warning("problem", sentence=status.problem)
        if status.phase is not before.phase:
            _LOG.info(
                "phase",
                phase=status.phase.value,
                generation=status.generation,
                lbs=status.lbs,
                lbs_at_generation=status.lbs_at_generation,
                lagging=status.lagging,
            )

    async def _look_after(self) -> None:
        """Certificates that were replaced on disk are used from now on."""
        while True:
            await asyncio.sleep(LOOK_AFTER_NS / _SECOND_NS)
            try:
                if self._credentials.renew():
                    _LOG.info("certificates renewed")
            except CertsError as error:
                _LOG.warning("certificates not renewed", reason=str(error))

    # --- The file -----------------------------------------------------------------------------------------------------
    async def _watch(self) -> None:
        seen = await asyncio.to_thread(_fingerprint, self._config)
        blind = ""
        while True:
            # The folder, not the file: a file that is replaced takes its watch with it.
            changes = watchfiles.awatch(
                self._config.parent,
                watch_filter=None,
                debounce=_WATCH_DEBOUNCE_MS,
                step=_WATCH_STEP_MS,
                rust_timeout=CONFIG_LOOK_NS // _MILLISECOND_NS,
                yield_on_timeout=True,
                recursive=False,
            )
            try:
                async for _ in changes:
                    seen = await self._look(seen)
            except (OSError, RuntimeError) as error:  # the folder is gone, or there are no watches left
                if str(error) != blind:
                    blind = str(error)
                    _LOG.warning("watch", reason=blind, instead="looking once a second")
                await asyncio.sleep(CONFIG_LOOK_NS / _SECOND_NS)
                seen = await self._look(seen)

    async def _look(self, seen: bytes) -> bytes:
        """The file's fingerprint now; where it is not the one that was seen, the file is read."""
        found = await asyncio.to_thread(_fingerprint, self._config)
        if found != seen:
            await self._reload()
        return found

    async def _reload(self) -> None:
        try:
            world, settings = await asyncio.to_thread(load, self._config)
            if settings != self._settings:
                sentence = "cluster, tls and state are fixed while running; restart the controller"
                raise ConfigError(f"{self._config}: {sentence}")
        except ConfigError as error:
            self.config_error = str(error)
            self.metrics.config(self.config_error)
            _LOG.error("config", used=False, sentence=self.config_error)
            return
        self.config_error = ""
        self.metrics.config("")
        _LOG.info("config", used=True, vips=len(world.vips), nodes=len(world.nodes))
        await self._events.put(WorldSeen(world))


def _fingerprint(path: Path) -> bytes:
    """Of the bytes of the file; empty where it cannot be read (``load`` then says why)."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return b"unreadable"


def run(config: Path, listen: str = LISTEN_DEFAULT) -> int:
    """`holdfast controller`: runs until SIGTERM or SIGINT. Returns the exit status: 0, 1 (cannot listen) or 2 (bad
    file), the latter two with one sentence on standard error."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        return _fail(f"--listen {listen} is not of the form ADDRESS:PORT", 2)
    try:
        world, settings = load(config)
        StateFile(settings.state).read()
        controller = Controller(config, world, settings)
    except (ConfigError, CertsError, StateError) as error:
        return _fail(str(error), 2)
    try:
        asyncio.run(_serve(controller, host, int(port)))
    except OSError as error:
        return _fail(f"{listen} cannot be listened on: {error.strerror or error}", 1)
    return 0


def _fail(sentence: str, status: int) -> int:
    sys.stderr.write(f"{sentence}\n")
    return status


async def _serve(controller: Controller, host: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, controller.stop)
    runner = web.AppRunner(make_app(controller, controller.metrics), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host.strip("[]"), port).start()
        _LOG.info("started", listen=f"{host}:{port}")
        await controller.run()
    finally:
        with contextlib.suppress(OSError):
            await runner.cleanup()
    _LOG.info("stopped", forwarding="goes on without the controller")
