"""What Prometheus may know of a controller: where its Planner stands, and how its calls to the agents end.

In a registry of their own, so that two controllers may live in one process, and so that whoever owns one can add what
only it knows. The names are an interface: dashboards and alerts break when they change.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge

from lbpod.core.messages import LbAnswered, LbFailed, Phase, PlannerStatus, Push


class Metrics:
    """Prometheus metrics of one controller. In a registry of their own, so that two may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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
        self._waiting = Gauge(
            "holdfast_controller_waiting_vips",
            "VIPs whose change waits for the next generation, as one changes a bounded number",
            registry=self.registry,
        )
        self._calls = Counter(
            "holdfast_controller_calls", "Calls to agents", ["call", "outcome"], registry=self.registry
        )

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
        self._waiting.set(status.waiting)

    def called(self, effect: object, event: LbAnswered | LbFailed) -> None:
        """A call to an agent has ended."""
        call = type(effect.body).__name__ if isinstance(effect, Push) else "AskStatus"
        outcome = "answered" if isinstance(event, LbAnswered) else "refused" if event.refused else "silent"
        self._calls.labels(call, outcome).inc()
