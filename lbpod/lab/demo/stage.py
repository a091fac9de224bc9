"""What a step of the demo's timeline does to the backends, and what the audience reads off the LBs meanwhile.

LBs are lost and come as in a chaos run (``lbpod.lab.chaos.fleet``).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from lbpod.lab.cluster import Cluster, ClusterOptions, Served
from lbpod.lab.demo.tally import Said
from lbpod.lab.demo.timeline import Act
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

    def prepare(self, backend_count: int, node_count: int) -> None:
        """Certificates for so many nodes, those that are yet to come included; servers; config file."""
        self.mint([f"node{number + 1}" for number in range(node_count)])
        for _ in range(backend_count):
            self.add_backend()
        self.write_config()

    def remove(self, served: Served) -> None:
        """Takes a backend out of the config; the checking client hears of it first. Its pod goes when no LB forwards by
        a config that has it, so that no connection which never got an answer is excused by it."""
        if self.checker is not None:
            self.checker.leaves(served.backend.name)
        self.take_out(served)

    def play(self, act: Act) -> str:
        """Plays a change of the backends; returns what happened in a few words."""
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
            case Act.RESHUFFLE | Act.LOSS | Act.JOIN:
                raise AssertionError("what happens to router and LBs is not the stage's")

    def reset(self, backend_count: int) -> None:
        """After a run: only so many backends, none draining, so that the next run begins like the last one."""
        self.checker = None
        for gone in self.outgoing:
            self.lab.remove_pod(gone.served.backend.pod)
        self.outgoing.clear()
        for one in [one for one in self.served if one.draining]:
            self.served.remove(one)
            self.lab.remove_pod(one.backend.pod)
        while len(self.served) > backend_count:
            one = self.served.pop(0)
            self.lab.remove_pod(one.backend.pod)
        while len(self.served) < backend_count:
            self.add_backend()
        self.write_config()

    def look(self, lbs: Iterable[Node]) -> Said:
        """What the /metrics of these LBs say now, of those that answer."""
        said = {node.name: self.metrics(node) for node in lbs}
        return {name: values for name, values in said.items() if values is not None}


@contextmanager
def on_stage(lab: Lab, lb_count: int, backend_count: int, joins_max: int) -> Iterator[Stage]:
    """A stage with certificates and servers; whatever has been started on it is stopped in any case."""
    stage = Stage(lab, lb_count)
    try:
        stage.prepare(backend_count, len(lab.nodes) + joins_max)
        yield stage
    finally:
        stage.stop()
