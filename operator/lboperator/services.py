"""Carries out what ``interop`` has planned for Services of type LoadBalancer: one call to the API for each action.

An action that fails is planned again at the next look, since nothing is remembered but which problems have been told.
What the API server refuses as invalid is told, too, and not tried again before something changes.
"""

import asyncio
from typing import Final, assert_never

import structlog

from lboperator.api import Api, ApiError, Json
from lboperator.cache import Cache
from lboperator.conditions import UNREACHABLE, condition_of
from lboperator.events import event, reference
from lboperator.interop import Action, Change, Create, Delete, Problem, Tell, Why, WhyNot, plan
from lboperator.nouns import Key
from lbpod.core.limits import API_RETRY_NS, STATUS_GATHER_NS

_SECOND_NS: Final = 1_000_000_000
_LOG: Final = structlog.get_logger()


class Services:
    """Looks whenever it is poked. Invariant: ``_told`` is about Services that have that problem now."""

    def __init__(self, api: Api, cache: Cache, load_balancer_class: str, why_not: WhyNot) -> None:
        """why_not: what is wrong with an address, if anything is."""
        self._api = api
        self._cache = cache
        self._class = load_balancer_class
        self._why_not = why_not
        self._due = asyncio.Event()
        self._told: dict[Key, Problem] = {}
        self._problems: set[Key] = set()

    def poke(self) -> None:
        """Something may have changed."""
        self._due.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        while self._class:
            await self._due.wait()
            await asyncio.sleep(STATUS_GATHER_NS / _SECOND_NS)
            self._due.clear()
            there, programmed, refused = self._cache.virtual_services(), self._programmed(), self._refused()
            actions = plan(self._cache.lb_services, there, programmed, self._class, self._why_not, refused)
            self._problems = {one.key for one in actions if isinstance(one, Problem)}
            failed = False
            for action in actions:
                failed |= not await self._try(action)
            self._told = {key: one for key, one in self._told.items() if key in self._problems}
            if failed:
                await asyncio.sleep(API_RETRY_NS / _SECOND_NS)
                self._due.set()

    def _programmed(self) -> frozenset[Key]:
        """An operator that reaches no load balancer says nothing about what clients reach."""

        def is_programmed(status: Json) -> bool:
            accepted, programmed = condition_of(status, "Accepted"), condition_of(status, "Programmed")
            if accepted is None or programmed is None or accepted.get("status") != "True":
                return False
            return programmed.get("status") == "True" or programmed.get("reason") == UNREACHABLE

        return frozenset(key for key, status in self._cache.statuses.items() if is_programmed(status))

    def _refused(self) -> dict[Key, Why]:
        """Whoever made a Service looks at that, and not at what we have made of it."""
        conditions = {key: condition_of(status, "Accepted") for key, status in self._cache.statuses.items()}
        return {
            key: (str(one.get("reason")), str(one.get("message")))
            for key, one in conditions.items()
            if one is not None and one.get("status") == "False"
        }

    async def _try(self, action: Action) -> bool:
        try:
            await self._carry_out(action)
        except ApiError as error:
            if error.status in {404, 409}:  # gone, or there already: the next event says so
                return True
            _LOG.warning("service not served", action=type(action).__name__, reason=str(error))
            service = self._cache.lb_services.get(_key(action))
            if error.status not in {400, 422} or service is None or not isinstance(action, Create | Change):
                return False
            problem = Problem(_key(action), service["metadata"].get("uid", ""), "VirtualServiceRefused", str(error))
            self._problems.add(problem.key)
            return await self._try(problem)
        return True

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
        if self._told.get(problem.key) == problem:
            return
        self._told[problem.key] = problem
        namespace, name = problem.key
        _LOG.warning("service", name=f"{namespace}/{name}", reason=problem.reason, sentence=problem.sentence)
        about = reference("v1", "Service", namespace, name, problem.uid)
        path, body = event(about, problem.reason, problem.sentence, is_warning=True)
        await self._api.call("POST", path, body)


def _key(action: Action) -> Key:
    if isinstance(action, Create):
        return action.body["metadata"]["namespace"], action.body["metadata"]["name"]
    return action.key


def _path(namespace: str, name: str = "") -> str:
    folder = f"/apis/holdfast.dev/v1alpha1/namespaces/{namespace}/virtualservices"
    return f"{folder}/{name}" if name else folder
