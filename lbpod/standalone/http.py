"""What the standalone controller says about itself: /healthz, /readyz, /metrics and /v1/state.

Without TLS, hence on the loopback unless told otherwise: nothing can be changed here, and kubelet, Prometheus and
people with curl have no certificates. Ready means: the file is good, and all that it once wanted has been in force
since the start. An LB that lags or is lost does not make the *controller* unready: it is in the metrics and in
/v1/state, and so is who is in the ring."""

from typing import Final, Protocol

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from lbpod.core.messages import LbAnswered, LbFailed, Phase, PlannerStatus, Push

STATE_NOTHING: Final = PlannerStatus(Phase.STARTING, 0, 0, 0, (), "", 0, ())


class Outlook(Protocol):
    """What the driver lets be seen."""

    status: PlannerStatus
    config_error: str
    """Why the file on disk is not used; empty: it is."""
    converged: bool
    """All that was wanted has been in force at least once since the start."""


class Metrics:
    """Prometheus metrics of one controller. In a registry of their own, so that two may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._config_error = Gauge(
            "holdfast_config_error", "1: the configuration file is not used, /readyz says why", registry=self.registry
        )
        self._generation = Gauge(
            "holdfast_controller_generation", "Newest generation pushed or in force", registry=self.registry
        )
        self._phase = Gauge("holdfast_controller_phase", "1 at the current phase", ["phase"], registry=self.registry)
        self._lbs = Gauge("holdfast_controller_lbs", "Members of the ring", registry=self.registry)
        self._at_generation = Gauge(
            "holdfast_controller_lbs_at_generation", "Ring members that have committed it", registry=self.registry
        )
        self._lost = Gauge(
            "holdfast_controller_lost_lbs",
            "Ring members believed lost, which are being taken out",
            registry=self.registry,
        )
        self._ring_changes = Gauge(
            "holdfast_controller_ring_changes", "Changes of the ring finished since the start", registry=self.registry
        )
        self._lagging = Gauge("holdfast_controller_lagging_nodes", "Nodes that are behind", registry=self.registry)
        self._problem = Gauge(
            "holdfast_controller_problem", "1: something is wrong, /v1/state says what", registry=self.registry
        )
        self._changes = Gauge(
            "holdfast_controller_changes", "Changes brought into force since the start", registry=self.registry
        )
        self._calls = Counter(
            "holdfast_controller_calls", "Calls to agents", ["call", "outcome"], registry=self.registry
        )

    def config(self, error: str) -> None:
        """The file was read."""
        self._config_error.set(1 if error else 0)

    def report(self, status: PlannerStatus) -> None:
        """The Planner's status has changed."""
        self._generation.set(status.generation)
        for phase in Phase:
            self._phase.labels(phase.value).set(1 if phase is status.phase else 0)
        self._lbs.set(status.lbs)
        self._at_generation.set(status.lbs_at_generation)
        self._lost.set(len(status.lost))
        self._ring_changes.set(status.ring_changes)
        self._lagging.set(len(status.lagging))
        self._problem.set(1 if status.problem else 0)
        self._changes.set(status.changes)

    def called(self, effect: object, event: LbAnswered | LbFailed) -> None:
        """A call to an agent has ended."""
        call = type(effect.body).__name__ if isinstance(effect, Push) else "AskStatus"
        outcome = "answered" if isinstance(event, LbAnswered) else "refused" if event.refused else "silent"
        self._calls.labels(call, outcome).inc()


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
