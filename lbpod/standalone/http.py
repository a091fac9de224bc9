"""What the standalone controller says about itself: /healthz, /readyz, /metrics and /v1/state.

Without TLS, hence on the loopback unless told otherwise: nothing can be changed here, and kubelet, Prometheus and
people with curl have no certificates. Ready means: the file is good, and all that it once wanted has been in force
since the start. An LB that lags or is lost does not make the *controller* unready: it is in the metrics and in
/v1/state, and so is who is in the ring."""

from typing import Protocol

import msgspec
from aiohttp import web
from prometheus_client import Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from lbpod.controller.metrics import Metrics
from lbpod.core.messages import PlannerStatus


class FileMetrics(Metrics):
    """And what is true of a file only."""

    def __init__(self) -> None:
        super().__init__()
        self._config_error = Gauge(
            "holdfast_config_error", "1: the configuration file is not used, /readyz says why", registry=self.registry
        )
        self._expiry = Gauge(
            "holdfast_certificate_expiry_timestamp_seconds",
            "When the controller's certificate ends",
            registry=self.registry,
        )

    def config(self, error: str) -> None:
        """The file was read."""
        self._config_error.set(1 if error else 0)

    def certificate(self, expires_s: float | None) -> None:
        """The certificate was read. None: its dates could not be."""
        self._expiry.set(float("nan") if expires_s is None else expires_s)


class Outlook(Protocol):
    """What the driver lets be seen."""

    @property
    def status(self) -> PlannerStatus:
        """Where the Planner stands."""

    @property
    def converged(self) -> bool:
        """All that was wanted has been in force at least once since the start."""

    config_error: str
    """Why the file on disk is not used; empty: it is."""


def why_not_ready(outlook: Outlook) -> str:
    """One sentence, empty where ready."""
    if outlook.config_error:
        return f"the configuration is not used, the last good one stays: {outlook.config_error}"
    if not outlook.converged:
        return f"{outlook.status.phase.value}: {outlook.status.problem or 'nothing is in force yet'}"
    return ""


def make_app(outlook: Outlook, metrics: Metrics) -> web.Application:
    """The application, to be run by the driver."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        sentence = why_not_ready(outlook)
        return web.Response(text=f"{sentence or 'ok'}\n", status=503 if sentence else 200)

    async def state(_: web.Request) -> web.Response:
        shown = {"ready": why_not_ready(outlook) or "yes", "config_error": outlook.config_error}
        body = msgspec.json.format(msgspec.json.encode({**shown, **msgspec.to_builtins(outlook.status)}), indent=2)
        return web.Response(body=body + b"\n", content_type="application/json")

    async def all_metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/v1/state", state)
    app.router.add_get("/metrics", all_metrics)
    return app
