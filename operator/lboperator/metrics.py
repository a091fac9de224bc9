"""The operator's metrics and its small HTTP server: /healthz, /readyz and /metrics.

Ready means: what it knows is complete, as of not long ago, and all that was wanted has been in force since the start.
Where it is not, nobody restarts it: /healthz says that the process lives, and nothing else. A load balancer that lags
makes the *operator* not unready, it is in the metrics; nor does a VirtualService that cannot be served.
"""

import time
from collections import Counter as Tally
from typing import Final, Protocol

from aiohttp import web
from prometheus_client import Counter, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from lboperator.conditions import Lack, what_lacks
from lboperator.observe import Observed, Reason
from lbpod.controller.metrics import Metrics

_BAD: Final = tuple(one for one in Reason if one not in {Reason.ACCEPTED, Reason.RESOLVED})


class OperatorMetrics(Metrics):
    """Beside those of all controllers."""

    def __init__(self) -> None:
        super().__init__()
        self._services = Gauge("holdfast_virtualservices", "VirtualServices", registry=self.registry)
        self._bad = Gauge(
            "holdfast_virtualservices_not_served",
            "VirtualServices that are not served as they say, by reason",
            ["reason"],
            registry=self.registry,
        )
        self._degraded = Gauge(
            "holdfast_virtualservices_degraded",
            "VirtualServices that are served as they say, but not as well as they could be, by reason",
            ["reason"],
            registry=self.registry,
        )
        self._observed = Gauge(
            "holdfast_operator_observed_timestamp_seconds",
            "When the cluster was looked at last, as a Unix time",
            registry=self.registry,
        )
        self._wanted = Gauge(
            "holdfast_operator_wanted_lbs",
            "Load balancers that there should be: agents that the API tells of, on nodes that balance",
            registry=self.registry,
        )
        self._statuses = Counter(
            "holdfast_operator_status_writes", "Statuses written", ["outcome"], registry=self.registry
        )
        self._swept = Counter(
            "holdfast_operator_sweeps", "Comparisons with what the API lists", ["outcome"], registry=self.registry
        )
        self._compared = Gauge(
            "holdfast_operator_swept_timestamp_seconds",
            "When what is known was compared with all that the API lists last, as a Unix time",
            registry=self.registry,
        )
        self._trouble = Gauge(
            "holdfast_operator_certificates_trouble",
            "1 while certificates are not issued as they should be, by reason",
            ["reason"],
            registry=self.registry,
        )

    def observed(self, seen: Observed) -> None:
        """The cluster was looked at."""
        verdicts = seen.verdicts
        tally = Tally(
            reason
            for one in verdicts.values()
            for reason in (one.accepted_reason, one.resolved_reason)
            if reason in _BAD
        )
        self._services.set(len(verdicts))
        self._wanted.set(sum(node.lb for node in seen.world.nodes))
        for reason in _BAD:
            self._bad.labels(reason.value).set(tally[reason])
        lacking = Tally(reason for one in verdicts.values() for reason in what_lacks(one))
        for kind in Lack:
            self._degraded.labels(kind.value).set(lacking[kind])
        self._observed.set(time.time())

    def wrote_status(self, outcome: str) -> None:
        """A status was written, or could not be."""
        self._statuses.labels(outcome).inc()

    def swept(self, outcome: str) -> None:
        """A comparison has ended."""
        self._swept.labels(outcome).inc()

    def compared(self) -> None:
        """The API has listed everything, and it was compared with what is known."""
        self._compared.set(time.time())

    def troubled(self, before: str, after: str) -> None:
        """What is wrong with the certificates has changed from one reason to another; empty: nothing is."""
        if before:
            self._trouble.labels(before).set(0)
        if after:
            self._trouble.labels(after).set(1)


class Outlook(Protocol):
    """What the server asks."""

    def why_not_ready(self) -> str:
        """One sentence, or empty."""


def make_app(outlook: Outlook, metrics: OperatorMetrics) -> web.Application:
    """The application, to be run by the operator."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        sentence = outlook.why_not_ready()
        return web.Response(text=f"{sentence or 'ok'}\n", status=503 if sentence else 200)

    async def all_metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", all_metrics)
    return app
