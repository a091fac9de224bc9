"""The operator's shell: what begins when, and what wakes what. Nothing about the cluster is decided here.

The order of the start is what makes a restart harmless. First all that the API lists has to be known: half of what
there is would take backends away. Then the certificates, for nobody answers without. Then the identity of the cluster:
from the state object, else from what load balancers know, else new. Then what they have in force, as the last good
state of VirtualServices that cannot be served right now. Only then the first World is seen, and the Planner asks for
itself what is under way.

After that: an event changes the cache, the cache is observed whole, a World that differs goes to the Driver, and the
statuses follow what the Driver reports. A look at a thousand VirtualServices takes tens of milliseconds, and under a
stream of changes one at each event left no time for anything else: the answers of the LBs waited, and a change took
nine seconds. So after each look others have their turn, in proportion to how long it took (OBSERVE_REST).
"""

import asyncio
import os
import secrets
import time
from collections.abc import Sequence
from typing import Final, assert_never

import structlog

from lboperator.api import Api, ApiError
from lboperator.cache import Cache
from lboperator.certificates import Certificates, Certifier
from lboperator.certmanager import CertManager
from lboperator.complaint import Complaint
from lboperator.events import reference
from lboperator.issued import Terms
from lboperator.keeping import Secrets
from lboperator.lease import Lease
from lboperator.metrics import OperatorMetrics
from lboperator.nouns import Key
from lboperator.observe import Objects, Observer, Rules, remembered, why_not_address
from lboperator.presence import Presence
from lboperator.services import Services
from lboperator.settings import Settings, Source
from lboperator.state import State, StateError
from lboperator.statuses import Statuses, Wanted
from lboperator.sweep import Sweep
from lbpod.certs import CertsError, Credentials, files_in
from lbpod.controller.driver import Driver
from lbpod.controller.push import PushClient
from lbpod.core.limits import (
    API_RETRY_NS,
    CERTIFICATES_LOOK_NS,
    LOOK_AFTER_NS,
    OBSERVE_REST,
    SWEEP_NS,
    SWEEP_START_LOOKS,
)
from lbpod.core.messages import AskStatus, LbAnswered
from lbpod.core.model import Cluster, Snapshot, World, WorldBackend, WorldVip

_SECOND_NS: Final = 1_000_000_000
_LOG: Final = structlog.get_logger()

BLIND_NS: Final = 10 * SWEEP_NS
"""Who has not compared what it knows with what the API lists for so long may know how things were. The alert
HoldfastOperatorBlind goes by the same."""

_UNHEARD: Final = "the API server lists objects that no watch has told of yet"
"""So begins every start. It is no news, unless something else was in the way meanwhile."""


class Operator:
    """One operator. ``run`` it inside the event loop; cancel that to end it, which is safe at any moment."""

    def __init__(self, settings: Settings, api: Api, cache: Cache, metrics: OperatorMetrics) -> None:
        self._settings = settings
        self._api = api
        self._cache = cache
        self._metrics = metrics
        self._sweep = Sweep(api, cache)
        self._state = State(api, settings.namespace, settings.state)
        self._certifier = make_certifier(settings, api, metrics)
        self._lease: Lease | None = None
        if settings.lease:
            me = f"{os.uname().nodename}-{secrets.token_hex(4)}"
            self._lease = Lease(api, settings.namespace, settings.lease, me)
        self._stands_by = False
        self._presence = Presence()
        self._present: frozenset[str] = frozenset()
        self._certified: frozenset[str] = frozenset()
        self._waiting = _UNHEARD
        self._compared_ns = time.monotonic_ns()
        """When what is known was compared with all that the API lists, last."""
        self._driver: Driver | None = None

    def why_not_ready(self) -> str:
        """One sentence; empty where ready. Whoever stands by is ready for that."""
        if self._stands_by:
            return ""
        if self._driver is None:
            return self._waiting
        if not self._driver.converged:
            status = self._driver.status
            return f"{status.phase.value}: {status.problem or 'nothing is in force yet'}"
        ago_ns = time.monotonic_ns() - self._compared_ns
        if ago_ns >= BLIND_NS:
            minutes = ago_ns // _SECOND_NS // 60
            return f"what is known was compared with the API {minutes} minutes ago; the log says why it was not since"
        return ""

    async def run(self) -> None:
        """Everything, until it is cancelled."""
        await self._look_until_complete()
        if self._lease is None:
            await self._work()
            return
        self._stands_by = True
        await self._lease.acquire()
        self._stands_by = False
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._lease.keep())
                group.create_task(self._take_over())
        finally:
            await self._lease.release()

    async def _take_over(self) -> None:
        """It may have stood by for days, and missed that something was deleted meanwhile: that must not come back."""
        await self._look_until_complete()
        await self._work()

    async def _work(self) -> None:
        """Everything but the question who works."""
        credentials = await self._try_credentials()
        cluster, good = await self._try_identity(credentials)
        driver = Driver(cluster, credentials.client, self._state, self._metrics)
        statuses = Statuses(self._api, self._cache, self._metrics, lambda: driver.in_force)
        rules = Rules(self._settings.allowed_addresses, self._settings.agent_port, self._settings.lb_selector)
        load_balancer_class = self._settings.load_balancer_class
        services = Services(self._api, self._cache, load_balancer_class, lambda one: why_not_address(one, rules))
        statuses.written = services.poke
        statuses.said_tracking = lambda: driver.tracking
        driver.listener = statuses
        self._driver = driver
        async with asyncio.TaskGroup() as group:
            group.create_task(driver.run())
            group.create_task(statuses.run())
            group.create_task(services.run())
            group.create_task(self._observe(Observer(rules, good), driver, statuses, services))
            group.create_task(self._sweep_always())
            group.create_task(self._look_after(credentials))

    # --- The start ----------------------------------------------------------------------------------------------------
    async def _look_until_complete(self) -> None:
        """Raises BlindError where something is not watched at all."""
        while True:
            try:
                if await self._compare(SWEEP_START_LOOKS):
                    return
                await self._wait(_UNHEARD)
            except ApiError as error:
                await self._wait(str(error))

    async def _try_credentials(self) -> Credentials:
        while True:
            try:
                await self._certify()
                return await asyncio.to_thread(Credentials, files_in(self._settings.tls, "controller"))
            except (ApiError, CertsError) as error:
                await self._wait(f"there are no certificates yet: {error}")

    async def _try_identity(self, credentials: Credentials) -> tuple[Cluster, dict[Key, tuple[WorldVip, ...]]]:
        while True:
            try:
                written = await self._state.read()
                newest = await self._newest(credentials)
                if written is None:
                    fresh = Cluster(self._settings.vni, secrets.randbits(32))
                    cluster, generation = (newest.cluster, newest.generation) if newest is not None else (fresh, 0)
                    written = await self._state.create(cluster, generation)
                    _LOG.info("state created", vni=cluster.vni, generation=generation, adopted=newest is not None)
                return written.cluster, remembered_of(newest) if newest is not None else {}
            except (ApiError, StateError) as error:
                await self._wait(f"the state of the cluster cannot be used: {error}")

    async def _newest(self, credentials: Credentials) -> Snapshot | None:
        """The newest snapshot that any agent tells of."""
        client = PushClient(credentials.client)
        try:
            present, nodes = self._see_present(), self._cache.nodes()
            asked = [
                client.call(AskStatus(name, f"{nodes[name].address}:{self._settings.agent_port}", True))
                for name in sorted(present)
                if name in nodes and nodes[name].address
            ]
            answers = await asyncio.gather(*asked)
        finally:
            await client.close()
        told = [one.status.snapshot for one in answers if isinstance(one, LbAnswered) and one.status.snapshot]
        return max(told, key=lambda one: one.generation, default=None)

    async def _wait(self, why: str) -> None:
        if why != self._waiting:
            self._waiting = why
            _LOG.warning("waiting", sentence=why)
        await asyncio.sleep(API_RETRY_NS / _SECOND_NS)

    # --- Always -------------------------------------------------------------------------------------------------------
    def _see_present(self) -> frozenset[str]:
        where = (self._settings.namespace, self._settings.agent_service)
        return self._presence.see(self._cache.slices().get(where, ()), time.monotonic_ns())

    async def _observe(self, observer: Observer, driver: Driver, statuses: Statuses, services: Services) -> None:
        last: World | None = None
        number = 0
        while True:
            began_ns = time.monotonic_ns()
            self._cache.changed.clear()
            present = self._see_present()
            if present != self._present:
                _LOG.info("agents", nodes=len(present))
                self._present = present
            objects = Objects(
                self._cache.virtual_services(),
                self._cache.services(),
                self._cache.slices(),
                self._cache.nodes(),
                present,
            )
            observed = observer.observe(objects)
            if observed.world != last:
                last = observed.world
                number = driver.see(last)
            self._metrics.observed(observed)
            wanted = {}
            for vs in objects.virtual_services:
                verdict, had = observed.verdicts[vs.key], statuses.wanted.get(vs.key)
                same = had is not None and had.verdict.vips == verdict.vips
                wanted[vs.key] = Wanted(vs, verdict, had.number if had is not None and same else number)
            if wanted != statuses.wanted:
                statuses.wanted = wanted
                statuses.poke()
            services.poke()
            rest_ns = min(OBSERVE_REST * (time.monotonic_ns() - began_ns), API_RETRY_NS)
            await asyncio.sleep(rest_ns / _SECOND_NS)
            await self._wake()

    async def _wake(self) -> None:
        """Returns when it is worth to look again."""
        while True:
            try:
                async with asyncio.timeout(API_RETRY_NS / _SECOND_NS):
                    await self._cache.changed.wait()
                    return
            except TimeoutError:
                if self._see_present() != self._present:  # an agent's grace is over
                    return

    async def _sweep_always(self) -> None:
        """Raises BlindError where something is not watched at all."""
        while True:
            await asyncio.sleep(SWEEP_NS / _SECOND_NS)
            try:
                self._metrics.swept("complete" if await self._compare() else "incomplete")
            except ApiError as error:
                self._metrics.swept("failed")
                _LOG.warning("not compared with the API", reason=str(error))

    async def _compare(self, patience: int = 1) -> bool:
        """As Sweep.look, and noted. What is not known yet makes it no less recent: that is Sweep's to judge."""
        is_complete = await self._sweep.look(patience)
        self._compared_ns = time.monotonic_ns()
        self._metrics.compared()
        return is_complete

    async def _look_after(self, credentials: Credentials) -> None:
        """Certificates: for nodes that come, before they expire, and where somebody replaces them."""
        done_ns = time.monotonic_ns()
        while True:
            await asyncio.sleep(LOOK_AFTER_NS / _SECOND_NS)
            try:
                look_ns = self._certifier.look_ns if self._certifier is not None else CERTIFICATES_LOOK_NS
                is_due = time.monotonic_ns() - done_ns >= look_ns
                if is_due or frozenset(self._cache.nodes()) != self._certified:
                    await self._certify()
                    done_ns = time.monotonic_ns()
                if await asyncio.to_thread(credentials.renew):
                    _LOG.info("certificates renewed")
            except (ApiError, CertsError) as error:
                _LOG.warning("certificates not renewed", reason=str(error))

    async def _certify(self) -> None:
        """Raises ApiError, CertsError."""
        nodes = frozenset(self._cache.nodes())
        if self._certifier is not None:
            await self._certifier.ensure(nodes)
        self._certified = nodes


def make_certifier(settings: Settings, api: Api, metrics: OperatorMetrics) -> Certifier | None:
    """Who sees to the certificates; None: they are simply there."""
    match settings.certificates:
        case Source.OWN:
            return None
        case Source.MINT:
            secrets_of = Secrets(api, settings.namespace)
            return Certificates(secrets_of, settings.ca_secret, settings.lb_secret, settings.tls)
        case Source.CERT_MANAGER:
            hours, renew_hours = settings.certificate_hours, settings.certificate_renew_hours
            terms = Terms(settings.issuer, settings.ca_secret, settings.lb_secret, hours, renew_hours)
            made = CertManager(api, settings.namespace, settings.ca_secret, settings.lb_secret, terms, settings.tls)
            pod = reference("v1", "Pod", settings.namespace, settings.pod, settings.pod_uid)
            made.say = Complaint(api, metrics, pod if settings.pod else None).say
            return made
        case _:
            assert_never(settings.certificates)


def remembered_of(snapshot: Snapshot) -> dict[Key, tuple[WorldVip, ...]]:
    """What a snapshot says, as the last good state of each VirtualService."""
    names = {node.id: node.name for node in snapshot.nodes}
    vips: Sequence[WorldVip] = [
        WorldVip(
            vip.name,
            vip.address,
            vip.port,
            vip.protocol,
            vip.affinity,
            vip.idle_ns,
            vip.drain_ns,
            tuple(
                sorted(
                    WorldBackend(one.address, one.port, names[one.node], one.weight, one.state) for one in vip.backends
                )
            ),
        )
        for vip in snapshot.vips
    ]
    return remembered((vip, vip.name) for vip in vips)
