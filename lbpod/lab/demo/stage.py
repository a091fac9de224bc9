"""What a step of the demo's timeline does to the cluster, and what the audience reads off the LBs meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from lbpod.lab.cluster import Cluster, ClusterOptions, Served
from lbpod.lab.demo.tally import LbFigures
from lbpod.lab.demo.timeline import Act
from lbpod.lab.errors import LabError
from lbpod.lab.topology import Lab, Node
from lbpod.lab.workload import CheckerRun

OPTIONS: Final = ClusterOptions(idle_seconds=8, map_sizes="records=65536,nat=65536,cache=65536", on_term="stay")
"""A short idle timeout, so that a slot that is not settled early settles within the run. Nobody leaves the ring at the
end: the lab takes all of it away."""


class Stage(Cluster):
    """One cluster in one lab. Single-threaded."""

    def __init__(self, lab: Lab, lb_count: int) -> None:
        super().__init__(lab, lb_count, OPTIONS)
        self.drained: list[Served] = []  # those that END_DRAIN will remove
        self.checker: CheckerRun | None = None

    def prepare(self, backend_count: int) -> None:
        """Certificates, servers, config file."""
        self.mint([node.name for node in self.lab.nodes])
        for _ in range(backend_count):
            self.add_backend()
        self.write_config()

    def remove(self, served: Served) -> None:
        """Takes a backend away for good; the checking client hears of it first."""
        if self.checker is not None:
            self.checker.gone(served.backend.name)
        self.served.remove(served)
        self.write_config()
        self.lab.remove_pod(served.backend.pod)

    def play(self, act: Act) -> str:
        """Plays a step (all but RESHUFFLE); returns what happened in a few words."""
        ready = [one for one in self.served if not one.draining]
        match act:
            case Act.SCALE_UP:
                names = [self.add_backend().name for _ in range(2)]
                self.write_config()
                return f"+ {' and '.join(names)}"
            case Act.SCALE_DOWN:
                self.drained = ready[:2]
                for one in self.drained:
                    one.draining = True
                self.write_config()
                return f"{' and '.join(one.backend.name for one in self.drained)} drain"
            case Act.END_DRAIN:
                names = [one.backend.name for one in self.drained]
                for one in self.drained:
                    self.remove(one)
                self.drained = []
                return f"- {' and '.join(names)}"
            case Act.REPLACE:
                new = self.add_backend()
                ready[0].draining = True
                self.write_config()
                return f"{ready[0].backend.name} -> {new.name}"
            case Act.RESHUFFLE:
                raise AssertionError("the router reshuffles, not the stage")

    def reset(self, backend_count: int) -> None:
        """After a run: only so many backends, none draining, so that the next run begins like the last one."""
        self.checker = None
        for one in [one for one in self.served if one.draining]:
            self.served.remove(one)
            self.lab.remove_pod(one.backend.pod)
        while len(self.served) > backend_count:
            one = self.served.pop(0)
            self.lab.remove_pod(one.backend.pod)
        while len(self.served) < backend_count:
            self.add_backend()
        self.write_config()

    def look(self) -> list[LbFigures]:
        """What the LBs' /metrics say now."""
        return [self._figures(node) for node in self.lbs]

    def _figures(self, node: Node) -> LbFigures:
        values = self.metrics(node)
        if values is None:
            raise LabError(f"{node.name} does not answer /metrics")
        return LbFigures(
            tracking_slots=int(values.get("holdfast_tracking_slots", 0)),
            relayed_packets=int(values.get('holdfast_packets_total{verdict="relayed"}', 0)),
            resolved_flows=int(values.get("holdfast_resolved_flows_total", 0)),
            generation=int(values.get('holdfast_generation{phase="committed"}', 0)),
        )


@contextmanager
def on_stage(lab: Lab, lb_count: int, backend_count: int) -> Iterator[Stage]:
    """A stage with certificates and servers; whatever has been started on it is stopped in any case."""
    stage = Stage(lab, lb_count)
    try:
        stage.prepare(backend_count)
        yield stage
    finally:
        stage.stop()
