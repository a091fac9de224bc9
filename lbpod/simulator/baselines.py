"""What is common today, as a model: hashing alone, and hashing with a flow table at each LB (Katran, Maglev, Cilium).

As small as can be, and kinder than the real ones: a change of the backends is known to every LB at once, no flow table
is ever full, and nothing costs time. So what breaks here breaks because of what the two know, and of nothing else. The
table is the very one that Holdfast uses, and clients, pods, router and network are those of the simulator.
"""

from collections.abc import Callable
from random import Random
from typing import Final

from lbpod.core.table import Table, TableBackend, build
from lbpod.simulator.audience import Audience
from lbpod.simulator.clients import Flow, pods_answer
from lbpod.simulator.cluster import ROUTER_LOOKS_NS
from lbpod.simulator.frames import Word
from lbpod.simulator.network import Network
from lbpod.simulator.stage import CALM, Stage, replace_lost, turned
from lbpod.simulator.timeline import Timeline
from lbpod.simulator.transcript import Transcript
from lbpod.simulator.wishes import POD_PORT, Listed, Pod, Wishes


class HashOnly:
    """An LB that asks the table, and nothing else."""

    def choose(self, flow: Flow, word: Word, by_table: Pod) -> Pod:
        """Where a packet goes."""
        return by_table


class LocalTable:
    """An LB that remembers where it has sent a flow. What no LB can know is where another one has sent it."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, int], Pod] = {}

    def choose(self, flow: Flow, word: Word, by_table: Pod) -> Pod:
        """Where a packet goes. A flow whose backend is gone gets another one."""
        key = (flow.client, flow.port)
        known = None if word is Word.SYN else self._known.get(key)
        if known is None or known.state is None:
            known = self._known[key] = by_table
        return known


Lb = HashOnly | LocalTable

BASELINES: Final[dict[str, Callable[[], Lb]]] = {"hash_only": HashOnly, "local_table": LocalTable}
"""By the names that the demo has for them."""


class BaselineStage(Stage):
    """A cluster of such LBs."""

    def __init__(self, make: Callable[[], Lb], seed: int, backend_count: int, long_count: int, short_rate: int) -> None:
        """make: an LB that has seen nothing yet."""

        def dice(name: str) -> Random:
            return Random(f"{seed}/{name}")  # the same as in a Cluster

        self.timeline = Timeline()
        self.wishes = Wishes(CALM, dice("wishes"), Transcript(self.timeline, False))
        self.reset(backend_count)
        self._network = Network(self.timeline, CALM, dice("network"))
        self._hash_seed = dice("hashes").getrandbits(32)
        self.audience = Audience(
            self.timeline,
            CALM,
            dice("clients"),
            self.wishes.services,
            self._hash_seed,
            self._enter,
            long_count=long_count,
            short_rate=short_rate,
        )
        self._make = make
        self._lbs: dict[str, Lb] = {name: make() for name in self._listed()}  # those that live
        self._seen: list[str] = []  # those that the router sends to
        self._lost = ""
        self._ready: list[Pod] = []
        self._table: Table | None = None

    def start(self) -> None:
        self.see()
        self._look()
        self.audience.start()

    def see(self) -> None:
        self._ready = self.service.ready() or [*self.service.pods]
        backends = [TableBackend(n, pod.address, POD_PORT, pod.weight) for n, pod in enumerate(self._ready, start=1)]
        self._table = build(backends, self._hash_seed)

    def reshuffle(self) -> None:
        super().reshuffle()
        self._seen = turned(self._seen, 1)

    def lose(self, dice: Random) -> str:
        self._lost = dice.choice([*self._lbs])
        del self._lbs[self._lost]
        return self._lost

    def join(self) -> str:
        new = replace_lost(self.wishes, self._lost)
        self._lbs[new] = self._make()
        return new

    def _listed(self) -> list[str]:
        return [name for name, how in self.wishes.listed.items() if how is Listed.LB]

    @property
    def joined(self) -> bool:
        return all(name in self._lbs for name in self._listed())

    @property
    def tracking(self) -> int:
        return 0

    @property
    def relayed(self) -> int:
        return 0

    @property
    def resolved(self) -> int:
        return 0

    # --- The way of a packet ------------------------------------------------------------------------------------------
    def _look(self) -> None:
        """The router: which LBs may be sent to."""
        self._seen = turned([name for name in self._listed() if name in self._lbs], self.turns)
        self.timeline.later(ROUTER_LOOKS_NS, self._look)

    def _enter(self, flow: Flow, word: Word, _: bytes) -> None:
        if self._seen:
            name = self._seen[flow.port % len(self._seen)]
            self._carry("router", name, lambda: self._arrive(name, flow, word))

    def _carry(self, sender: str, receiver: str, arrive: Callable[[], None]) -> None:
        self._network.carry(sender, receiver, self.timeline.now_ns + CALM.packet_life_ns, arrive)

    def _arrive(self, name: str, flow: Flow, word: Word) -> None:
        """At an LB, if it is still there."""
        if name not in self._lbs:
            return
        assert self._table is not None, "it has been started"
        by_table = self._ready[int(self._table.current[flow.bond.slot]) - 1]
        pod = self._lbs[name].choose(flow, word, by_table)
        self._carry(name, pod.node, lambda: self._deliver(flow, word, pod))

    def _deliver(self, flow: Flow, word: Word, pod: Pod) -> None:
        """At a pod, if it is still there."""
        answer = pods_answer(pod, flow, word) if pod.state is not None else None
        if answer is not None:
            self._carry(pod.node, "client", lambda: self.audience.answered(flow, answer, pod))
