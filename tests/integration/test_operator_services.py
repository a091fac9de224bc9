"""What the API server refuses of a Service's VirtualService: told once, on the Service, and not tried for ever."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import kopf
import pytest
from aiohttp import web

from lboperator.api import Api, Json
from lboperator.cache import Cache, Kind
from lboperator.services import Services

SERVICE: Json = {
    "metadata": {
        "namespace": "shop",
        "name": "web",
        "uid": "uid-1",
        "annotations": {"holdfast.dev/address": "203.0.113.10"},
    },
    "spec": {
        "type": "LoadBalancer",
        "loadBalancerClass": "holdfast.dev/holdfast",
        "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": "http"}],
    },
}


class Refusing:
    """An API server that takes events and refuses every VirtualService, with ``status``."""

    def __init__(self) -> None:
        self.status = 422
        self.message = "spec.ports: Invalid value"
        self.asked: list[tuple[str, Json]] = []
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}"

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        self.asked.append((f"{request.method} {request.path}", await request.json()))
        if request.path.endswith("/virtualservices"):
            return web.json_response({"message": self.message}, status=self.status)
        return web.json_response({}, status=201)

    def paths(self, part: str) -> list[str]:
        return [path for path, _ in self.asked if part in path]

    def events(self) -> list[Json]:
        return [body for path, body in self.asked if path.endswith("/events")]

    async def asked_for(self, tries: int) -> None:
        """Waits until so many were asked for, and a little longer: no more are."""
        async with asyncio.timeout(20):
            while len(self.paths("/virtualservices")) < tries:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await asyncio.sleep(1.6)  # more than a pause after a failure and the next look
        assert tries == len(self.paths("/virtualservices")), "nothing was new"


@pytest.fixture
async def refusing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refusing:
    server = Refusing()
    config = {
        "current-context": "it",
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        "clusters": [{"name": "it", "cluster": {"server": await server.start()}}],
        "users": [{"name": "it", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    return server


@asynccontextmanager
async def looking(server: Refusing, cache: Cache) -> AsyncIterator[Services]:
    api = Api(kopf.OperatorSettings())
    services = Services(api, cache, "holdfast.dev/holdfast", lambda _: None)
    running = asyncio.create_task(services.run())
    try:
        services.poke()
        yield services
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await api.close()
        await server.stop()


def with_ports(*ports: int) -> Json:
    return {**SERVICE, "spec": {**SERVICE["spec"], "ports": [{"protocol": "TCP", "port": port} for port in ports]}}


@pytest.mark.parametrize("status", [422, 403], ids=["invalid", "forbidden"])
async def test_what_is_refused_is_told_once_and_tried_again_only_with_news(refusing: Refusing, status: int) -> None:
    refusing.status = status
    cache = Cache()
    cache.put(Kind.SERVICE, SERVICE)
    async with looking(refusing, cache) as services:
        await refusing.asked_for(1)
        services.poke()
        await refusing.asked_for(1)
        (event,) = refusing.events()
        assert ("Service", "web", "uid-1") == tuple(event["involvedObject"][name] for name in ("kind", "name", "uid"))
        assert "VirtualServiceRefused" == event["reason"]
        assert "spec.ports: Invalid value" in event["message"]
        refusing.message = "spec.address: Invalid value"
        cache.put(Kind.SERVICE, with_ports(80, 81))
        services.poke()
        await refusing.asked_for(2)
        assert "spec.address: Invalid value" in refusing.events()[1]["message"]
        assert 2 == len(refusing.events())


async def test_after_some_time_the_same_is_tried_again_and_not_told_again(
    refusing: Refusing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lboperator.services._REFUSED_AGAIN_NS", 3_000_000_000)
    cache = Cache()
    cache.put(Kind.SERVICE, SERVICE)
    async with looking(refusing, cache):
        await refusing.asked_for(1)
        await refusing.asked_for(2)
        assert 1 == len(refusing.events()), "nobody has poked it"


async def test_a_sentence_that_counts_is_told_once(refusing: Refusing) -> None:
    cache = Cache()
    cache.put(Kind.SERVICE, SERVICE)
    async with looking(refusing, cache) as services:
        await refusing.asked_for(1)
        body = refusing.asked[0][1]
        for count in (1, 2):
            said = {"type": "Accepted", "status": "False", "reason": "LimitReached", "message": f"{count} too many"}
            cache.put(
                Kind.VIRTUAL_SERVICE,
                {**body, "metadata": {**body["metadata"], "uid": "vs"}, "status": {"conditions": [said]}},
            )
            services.poke()
            await refusing.asked_for(1)
        assert ["VirtualServiceRefused", "LimitReached"] == [event["reason"] for event in refusing.events()]
