"""Carries out what ``interop`` has planned for Services of type LoadBalancer: one call to the API for each action.

An action that fails is planned again at the next look, since nothing is remembered but which problems have been told,
and what was refused. What the API server refuses to make or to change (it is invalid, a quota is used up, a webhook is
against it) is told, too, and not sent again before it differs or some minutes have passed: the quota may have been
raised, and nothing tells of that. A problem is told once, however its sentence may change: some count.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Final, assert_never

import structlog

from lboperator.api import Api, ApiError, Json
from lboperator.cache import Cache
from lboperator.conditions import NOTHING, condition_of
from lboperator.events import event, reference
from lboperator.interop import Action, Change, Create, Delete, Problem, Tell, Why, WhyNot, plan
from lboperator.nouns import Key
from lbpod.core.limits import API_RETRY_NS, STATUS_GATHER_NS

_SECOND_NS: Final = 1_000_000_000
_REFUSED_AGAIN_NS: Final = 180 * _SECOND_NS
"""What was refused is sent again after so long, though it is the same."""
_REFUSALS: Final = (400, 403, 422)
_LOG: Final = structlog.get_logger()

_Mark = tuple[Key, str, str]
"""Of a problem: its Service, that one's uid, the reason."""


@dataclass(frozen=True)
class _Refusal:
    """What the API server has refused, and until when it is not sent again."""

    action: Create | Change
    problem: Problem
    until_ns: int


class Services:
    """Looks whenever it is poked. Invariant: ``_told`` and ``_refusals`` are about problems that there are now."""

    def __init__(self, api: Api, cache: Cache, load_balancer_class: str, why_not: WhyNot) -> None:
        """why_not: what is wrong with an address, if anything is."""
        self._api = api
        self._cache = cache
        self._class = load_balancer_class
        self._why_not = why_not
        self._due = asyncio.Event()
        self._told: set[_Mark] = set()
        self._met: set[_Mark] = set()
        """Problems of this look."""
        self._refusals: dict[Key, _Refusal] = {}

    def poke(self) -> None:
        """Something may have changed."""
        self._due.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        while self._class:
            await self._wait()
            await asyncio.sleep(STATUS_GATHER_NS / _SECOND_NS)
            self._due.clear()
            there, wanted = self._cache.virtual_services(), self._cache.lb_services
            programmed, refused, empty = self._programmed(), self._refused(), self._empty()
            actions = plan(wanted, there, programmed, self._class, self._why_not, refused, empty)
            failed = False
            self._met = set()
            for action in actions:
                failed |= not await self._try(action)
            self._told &= self._met
            self._refusals = {key: one for key, one in self._refusals.items() if _mark(one.problem) in self._met}
            if failed:
                await asyncio.sleep(API_RETRY_NS / _SECOND_NS)
                self._due.set()

    async def _wait(self) -> None:
        """Returns when something may have changed, or when it is time to try again what was refused."""
        again_ns = min((one.until_ns for one in self._refusals.values()), default=None)
        left_ns = None if again_ns is None else max(again_ns - time.monotonic_ns(), 0)
        try:
            async with asyncio.timeout(None if left_ns is None else left_ns / _SECOND_NS):
                await self._due.wait()
        except TimeoutError:
            return

    def _programmed(self) -> frozenset[Key]:
        return self._with("Programmed", "status", "True")

    def _empty(self) -> frozenset[Key]:
        return self._with("Programmed", "reason", NOTHING)

    def _with(self, kind: str, field: str, value: str) -> frozenset[Key]:
        """VirtualServices with such a condition."""
        conditions = {key: condition_of(status, kind) for key, status in self._cache.statuses.items()}
        return frozenset(key for key, one in conditions.items() if one is not None and one.get(field) == value)

    def _refused(self) -> dict[Key, Why]:
        """Whoever made a Service looks at that, and not at what we have made of it."""
        conditions = {key: condition_of(status, "Accepted") for key, status in self._cache.statuses.items()}
        return {
            key: (str(one.get("reason")), str(one.get("message")))
            for key, one in conditions.items()
            if one is not None and one.get("status") == "False"
        }

    async def _try(self, action: Action) -> bool:
        refusal = self._refusals.get(_key(action))
        if refusal is not None and refusal.action == action and time.monotonic_ns() < refusal.until_ns:
            self._met.add(_mark(refusal.problem))
            return True
        try:
            await self._carry_out(action)
        except ApiError as error:
            if error.status in {404, 409}:  # gone, or there already: the next event says so
                return True
            _LOG.warning("service not served", action=type(action).__name__, reason=str(error))
            if error.status not in _REFUSALS or not isinstance(action, Create | Change):
                return False
            return await self._refused_by_api(action, str(error))
        return True

    async def _refused_by_api(self, action: Create | Change, sentence: str) -> bool:
        key = _key(action)
        service, before = self._cache.lb_services.get(key), self._refusals.get(key)
        if service is None:
            return False
        problem = Problem(key, service["metadata"].get("uid", ""), "VirtualServiceRefused", sentence)
        if before is not None and before.action != action:
            self._told.discard(_mark(problem))  # why this is refused, too, is news
        self._refusals[key] = _Refusal(action, problem, time.monotonic_ns() + _REFUSED_AGAIN_NS)
        return await self._try(problem)

    async def _carry_out(self, action: Action) -> None:
        match action:
            case Create(body):
                await self._api.call("POST", _path(body["metadata"]["namespace"]), body)
            case Change(key, spec):
                await self._api.merge(_path(*key), {"spec": spec})
            case Delete(key, uid):
                options: Json = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
                await self._api.call("DELETE", _path(*key), options)
            case Tell(key, ingress):
                points = [{"ip": address, "ipMode": "VIP"} for address in ingress]
                path = f"/api/v1/namespaces/{key[0]}/services/{key[1]}/status"
                await self._api.merge(path, {"status": {"loadBalancer": {"ingress": points}}})
            case Problem():
                await self._tell(action)
            case _:
                assert_never(action)

    async def _tell(self, problem: Problem) -> None:
        mark = _mark(problem)
        self._met.add(mark)
        if mark in self._told:
            return
        self._told.add(mark)
        namespace, name = problem.key
        _LOG.warning("service", name=f"{namespace}/{name}", reason=problem.reason, sentence=problem.sentence)
        about = reference("v1", "Service", namespace, name, problem.uid)
        path, body = event(about, problem.reason, problem.sentence, is_warning=True)
        await self._api.call("POST", path, body)


def _key(action: Action) -> Key:
    if isinstance(action, Create):
        return action.body["metadata"]["namespace"], action.body["metadata"]["name"]
    return action.key


def _mark(problem: Problem) -> _Mark:
    return problem.key, problem.uid, problem.reason


def _path(namespace: str, name: str = "") -> str:
    folder = f"/apis/holdfast.dev/v1alpha1/namespaces/{namespace}/virtualservices"
    return f"{folder}/{name}" if name else folder
