"""What the API server refuses of a Service's VirtualService: told once, on the Service, and not tried for ever."""

import asyncio
import json
from contextlib import suppress
from pathlib import Path

import kopf
import pytest
from aiohttp import web

from lboperator.api import Api, Json
from lboperator.cache import Cache, Kind
from lboperator.services import Services

SERVICE = {
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
    """An API server that takes events and finds every VirtualService invalid."""

    def __init__(self) -> None:
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
            return web.json_response({"message": "spec.ports: Invalid value"}, status=422)
        return web.json_response({}, status=201)

    def paths(self, part: str) -> list[str]:
        return [path for path, _ in self.asked if part in path]


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


async def test_what_is_refused_as_invalid_is_told_once_and_tried_again_only_with_news(refusing: Refusing) -> None:
    cache = Cache()
    cache.put(Kind.SERVICE, SERVICE)
    api = Api(kopf.OperatorSettings())
    services = Services(api, cache, "holdfast.dev/holdfast", lambda _: None)
    running = asyncio.create_task(services.run())
    try:
        for tries in (1, 2):
            services.poke()
            async with asyncio.timeout(20):
                while len(refusing.paths("/virtualservices")) < tries:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await asyncio.sleep(2.5)  # two pauses after a failure
            assert tries == len(refusing.paths("/virtualservices")), "nothing was new"
        (event,) = [body for path, body in refusing.asked if path.endswith("/events")]
        assert ("Service", "web", "uid-1") == tuple(event["involvedObject"][name] for name in ("kind", "name", "uid"))
        assert "VirtualServiceRefused" == event["reason"]
        assert "spec.ports: Invalid value" in event["message"]
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await api.close()
        await refusing.stop()
