"""Statuses and events, written to the API: late enough to say something final, early enough to be of use, and only
where something differs.

Decided here: when, and how many at a time. What is said is ``conditions``' business. A write that fails is tried again;
one that the API takes but does not keep as it was (an older CRD prunes what it does not know) is not repeated at once.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import structlog

from lboperator.api import Api, ApiError, Json
from lboperator.cache import Cache
from lboperator.conditions import Event, Where, events_of, status_of
from lboperator.events import event as make_event, reference
from lboperator.metrics import OperatorMetrics
from lboperator.nouns import Key, VirtualService
from lboperator.observe import Verdict
from lbpod.core.limits import (
    API_CALLS_MAX,
    API_RETRY_NS,
    STATUS_GATHER_NS,
    SWEEP_NS,
    TRACKING_SHOWN_NS,
    TRACKING_WRITE_NS,
)
from lbpod.core.messages import Phase, PlannerStatus

_SECOND_NS: Final = 1_000_000_000
_RESTLESS_NS: Final = 2 * _SECOND_NS
"""Where the load balancers are not at rest for so long, what they say now is shown."""
_LOG: Final = structlog.get_logger()


@dataclass(frozen=True)
class Wanted:
    """What is to be said about one VirtualService. number: of the World in which it last changed."""

    vs: VirtualService
    verdict: Verdict
    number: int


def tracking_of(status: PlannerStatus, said: Mapping[str, Mapping[int, int]]) -> dict[str, int]:
    """VIP name -> slots that track at the load balancer at which most do; only VIPs of which any does. said: member of
    the ring -> VIP id -> slots."""
    most: dict[int, int] = {}
    for slots in said.values():
        for vip, count in slots.items():
            most[vip] = max(count, most.get(vip, 0))
    return {vip.name: most[vip.id] for vip in status.vips if most.get(vip.id)}


class Statuses:
    """Writes the statuses of all VirtualServices. ``wanted`` is replaced whenever the cluster was looked at."""

    def __init__(self, api: Api, cache: Cache, metrics: OperatorMetrics, in_force: Callable[[], int]) -> None:
        self.said_tracking: Callable[[], Mapping[str, Mapping[int, int]]] = dict
        """Member of the ring -> VIP id -> slots that track."""
        self.wanted: dict[Key, Wanted] = {}
        self.written: Callable[[], None] = lambda: None
        """Called where the status of any has changed."""
        self._api = api
        self._cache = cache
        self._metrics = metrics
        self._in_force = in_force
        self._due = asyncio.Event()
        self._status: PlannerStatus | None = None
        self._rest: PlannerStatus | None = None
        self._restless_ns = 0
        self._written: dict[Key, tuple[Json, int]] = {}
        self._tracking: dict[str, int] = {}
        self._tracking_at_ns = 0
        """From then on newer figures may be shown."""

    def poke(self) -> None:
        """Something may have changed."""
        self._due.set()

    def reported(self, status: PlannerStatus) -> None:
        """lbpod.controller.driver.Listener."""
        if self._status is None or (self._status.phase is Phase.IDLE and status.phase is not Phase.IDLE):
            self._restless_ns = time.monotonic_ns()
        self._status = status
        if status.phase is Phase.IDLE:
            self._rest = status
        self._due.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                async with asyncio.timeout(_RESTLESS_NS / _SECOND_NS):
                    await self._due.wait()
            except TimeoutError:
                if self._status is None or (self._status.phase is Phase.IDLE and not self._look_tracking(self._status)):
                    continue
            await asyncio.sleep(STATUS_GATHER_NS / _SECOND_NS)
            self._due.clear()
            if not await self._write_all():
                await asyncio.sleep(API_RETRY_NS / _SECOND_NS)
                self._due.set()

    def _look_tracking(self, status: PlannerStatus) -> bool:
        """Takes up how many slots track where it is time for that; True: it differs from what is shown."""
        now_ns = time.monotonic_ns()
        if now_ns < self._tracking_at_ns:
            return False
        before, self._tracking = self._tracking, tracking_of(status, self.said_tracking())
        differ = sum(before.get(name) != self._tracking.get(name) for name in before.keys() | self._tracking.keys())
        if differ:
            self._tracking_at_ns = now_ns + max(TRACKING_SHOWN_NS, differ * TRACKING_WRITE_NS)
        return bool(differ)

    async def _write_all(self) -> bool:
        """False: some have to be tried again."""
        status = self._status
        if status is None:
            return True
        now_ns = time.monotonic_ns()
        is_restless = status.phase is not Phase.IDLE and now_ns - self._restless_ns >= _RESTLESS_NS
        rest = status if is_restless or self._rest is None else self._rest
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        places = asyncio.Semaphore(API_CALLS_MAX)
        in_force = self._in_force()
        self._look_tracking(status)
        stands = {is_done: Where(status, rest, is_done, self._tracking) for is_done in (False, True)}
        todo = []
        for key, one in self.wanted.items():
            before = self._cache.statuses.get(key)
            if before is None:
                continue  # deleted meanwhile
            after = status_of(one.vs, one.verdict, stands[one.number <= in_force], before, now)
            said, at_ns = self._written.get(key, ({}, 0))
            if after != before and (after != said or now_ns - at_ns >= SWEEP_NS):
                todo.append(self._write(places, one.vs, before, after))
        self._written = {key: said for key, said in self._written.items() if key in self.wanted}
        return all(await asyncio.gather(*todo))

    async def _write(self, places: asyncio.Semaphore, vs: VirtualService, before: Json, after: Json) -> bool:
        async with places:
            path = f"/apis/holdfast.dev/v1alpha1/namespaces/{vs.namespace}/virtualservices/{vs.name}/status"
            try:
                made = await self._api.merge(path, {"status": after})
            except ApiError as error:
                self._metrics.wrote_status("gone" if error.status == 404 else "failed")
                if error.status != 404:
                    _LOG.warning("status not written", name=f"{vs.namespace}/{vs.name}", reason=str(error))
                return error.status == 404
            self._metrics.wrote_status("written")
            self.written()
            self._written[vs.key] = (after, time.monotonic_ns())
            if vs.key in self._cache.statuses:
                self._cache.statuses[vs.key] = dict(made.get("status") or {})
            for event in events_of(before, after):
                await self._tell(vs, event)
            return True

    async def _tell(self, vs: VirtualService, event: Event) -> None:
        """An event is worth one try."""
        log = _LOG.warning if event.is_warning else _LOG.info
        log("virtual service", name=f"{vs.namespace}/{vs.name}", reason=event.reason, sentence=event.message)
        about = reference("holdfast.dev/v1alpha1", "VirtualService", vs.namespace, vs.name, vs.uid)
        path, body = make_event(about, event.reason, event.message, is_warning=event.is_warning)
        try:
            await self._api.call("POST", path, body)
        except ApiError as error:
            _LOG.warning("event not written", name=f"{vs.namespace}/{vs.name}", reason=str(error))
