"""The standalone controller around its Driver: a watched file that becomes Worlds, and a state file.

Decided here: when the file is looked at. That is when its folder changes (an editor's rename, a ConfigMap's symlink)
and once a second in case nobody tells; it is used only if its bytes are others than those used last, have come to rest,
and all of it is good. A bad edit changes nothing but /readyz, ``holdfast_config_error`` and one line in the log.

Left to others: whether an edit has come to rest (``lookout``), the loop around the Planner (``lbpod.controller``), the
logs' form (the command), certificates.
"""

import asyncio
import contextlib
import signal
import sys
import time
from pathlib import Path
from typing import Final

import structlog
import watchfiles
from aiohttp import web

from lbpod.certs import CertsError, Credentials
from lbpod.controller.driver import Driver
from lbpod.core.limits import CONFIG_LOOK_NS, CONFIG_REPLACED_QUIET_NS, LOOK_AFTER_NS
from lbpod.core.messages import Persist, Persisted, PersistFailed, PlannerStatus
from lbpod.core.model import World
from lbpod.standalone.config import Settings, read
from lbpod.standalone.http import FileMetrics, make_app
from lbpod.standalone.lookout import Lookout, Sight, look_at
from lbpod.standalone.marks import ConfigError
from lbpod.standalone.state import StateError, StateFile, Written

LISTEN_DEFAULT: Final = "127.0.0.1:9901"
_SECOND_NS: Final = 1_000_000_000
_MILLISECOND_NS: Final = 1_000_000
_WATCH_STEP_MS: Final = 10
_WATCH_DEBOUNCE_MS: Final = 100

_LOG: Final = structlog.get_logger()


class Generations:
    """The state file as the Driver's Store."""

    def __init__(self, state: StateFile) -> None:
        self._state = state

    async def persist(self, effect: Persist) -> Persisted | PersistFailed:
        """In a thread: a disk may take its time."""
        wanted = Written(effect.generation, effect.snapshot.next_ids)
        try:
            found = await asyncio.to_thread(self._state.persist, wanted, effect.after)
        except StateError as error:
            return PersistFailed(effect.generation, 0, str(error))
        if found is not None:
            reason = f"{self._state.path} holds generation {found.generation}"
            return PersistFailed(effect.generation, found.generation, reason, found.next_ids)
        return Persisted(effect.generation)


class Controller:
    """One controller. ``run`` until ``stop``; make it anywhere, run it in an event loop.

    seen: the look at the file that world and settings were read from; what comes after it is an edit."""

    def __init__(self, config: Path, seen: Sight, world: World, settings: Settings) -> None:
        self.config_error = ""
        self.metrics = FileMetrics()
        self._config = config
        self._lookout = Lookout(seen)
        self._settings = settings
        self._world = world
        self._credentials = Credentials(settings.tls)
        store = Generations(StateFile(settings.state))
        self._driver = Driver(settings.cluster, self._credentials.client, store, self.metrics)
        self._stopping = asyncio.Event()

    @property
    def status(self) -> PlannerStatus:
        """Where the Planner stands."""
        return self._driver.status

    @property
    def converged(self) -> bool:
        """All that was wanted has been in force at least once since the start."""
        return self._driver.converged

    def stop(self) -> None:
        """Ends ``run`` soon; calls under way are given up, which is safe at any moment."""
        self._stopping.set()

    async def run(self) -> None:
        """Everything, until ``stop``."""
        self.metrics.config("")
        self._driver.see(self._world)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._driver.run()),
                group.create_task(self._watch()),
                group.create_task(self._look_after()),
            ]
            await self._stopping.wait()
            for task in tasks:
                task.cancel()

    async def _look_after(self) -> None:
        """Certificates that were replaced on disk are used from now on; one that is about to end is named."""
        while True:
            self.metrics.certificate(self._credentials.expires_s)
            if sentence := self._credentials.reminder(time.time()):
                _LOG.warning("certificate", sentence=sentence)
            await asyncio.sleep(LOOK_AFTER_NS / _SECOND_NS)
            try:
                if self._credentials.renew():
                    _LOG.info("certificates renewed")
            except CertsError as error:
                _LOG.warning("certificates not renewed", reason=str(error))

    # --- The file -----------------------------------------------------------------------------------------------------
    async def _watch(self) -> None:
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
                    await self._look()
            except (OSError, RuntimeError) as error:  # the folder is gone, or there are no watches left
                if str(error) != blind:
                    blind = str(error)
                    _LOG.warning("watch", reason=blind, instead="looking once a second")
                await asyncio.sleep(CONFIG_LOOK_NS / _SECOND_NS)
                await self._look()

    async def _look(self) -> None:
        """Uses the file where it has changed, once it has come to rest."""
        while True:
            sight = await asyncio.to_thread(look_at, self._config)
            wait_ns = self._lookout.wait_ns(sight, time.monotonic_ns())
            if wait_ns is None:
                return
            if wait_ns == 0:
                await self._use(sight)
                return
            # Not all of it at once: what is being written in place may be replaced meanwhile.
            await asyncio.sleep(min(wait_ns, CONFIG_REPLACED_QUIET_NS) / _SECOND_NS)

    async def _use(self, sight: Sight) -> None:
        try:
            world, settings = await asyncio.to_thread(read, self._config, sight)
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
        self._driver.see(world)


def run(config: Path, listen: str = LISTEN_DEFAULT) -> int:
    """`holdfast controller`: runs until SIGTERM or SIGINT. Returns the exit status: 0, 1 (cannot listen) or 2 (bad
    file), the latter two with one sentence on standard error. SIGHUP gets a line in the log."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the event loop takes over
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        return _fail(f"--listen {listen} is not of the form ADDRESS:PORT", 2)
    try:
        seen = look_at(config)
        world, settings = read(config, seen)
        StateFile(settings.state).read()
        controller = Controller(config, seen, world, settings)
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
    loop.add_signal_handler(signal.SIGHUP, _LOG.info, "SIGHUP: the configuration is watched; nothing to do")
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
