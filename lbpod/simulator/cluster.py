"""One cluster, put together: machines, network, controller, clients, and the router before them.

Decided here: the way of a packet. The router picks an LB that is ready, as far as it knows (it looks a few times a
second, so a machine that has just gone still gets its share); what an LB sends by tunnel goes to whom it is addressed
to; what reaches a pod is answered through its own machine's ``hf_tc``, straight to the client.
"""

from collections.abc import Sequence
from random import Random
from typing import Final

from lbpod.core import packets
from lbpod.core.model import Backend, Cluster as ClusterOf
from lbpod.core.oracle import Action
from lbpod.core.snapshot import Tables, VipKey, eligible
from lbpod.core.table import Table
from lbpod.core.verdicts import Verdict
from lbpod.simulator import frames
from lbpod.simulator.clients import Clients, Flow, pods_answer
from lbpod.simulator.controller import Controller
from lbpod.simulator.frames import Word
from lbpod.simulator.machine import Machine, Stage
from lbpod.simulator.network import Network
from lbpod.simulator.odds import Odds, draw
from lbpod.simulator.promises import Promises, Trip, Violation
from lbpod.simulator.timeline import MS_NS, SECOND_NS, Timeline
from lbpod.simulator.transcript import Transcript
from lbpod.simulator.wishes import POD_PORT, VIP_ADDRESS, Pod, Wishes

VNI: Final = 7
ROUTER_LOOKS_NS: Final = 400 * MS_NS
REPLY_NS: Final = MS_NS
STEPS_MAX: Final = 16


class SharedTables(Tables):
    """One builder for all machines of a run: each table is built once."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._made: dict[object, Table] = {}

    def table(self, key: VipKey, backends: Sequence[Backend]) -> Table:
        made = self._made.get((key, eligible(backends)))
        if made is None:
            made = self._made[key, eligible(backends)] = super().table(key, backends)
        return made


class Cluster:
    """What one seed makes."""

    def __init__(self, seed: int, keeps: bool, odds: Odds | None = None) -> None:
        """keeps: a transcript is wanted. odds: None: drawn from the seed."""
        self.seed = seed
        self.odds: Odds = odds or draw(self.dice("odds"))
        self.of = of = ClusterOf(VNI, self.dice("hashes").getrandbits(32))
        self.timeline = Timeline()
        self.transcript = Transcript(self.timeline, keeps)
        self.network = Network(self.timeline, self.odds, self.dice("network"))
        self.wishes = Wishes(self.odds, self.dice("wishes"), self.transcript)
        self.promises = Promises(self.timeline, self.wishes)
        stage = Stage(self.timeline, self.network, self.odds, self.transcript, SharedTables(of.seed), self.promises)
        self.machines = {
            name: Machine(name, address, stage, self.dice(name)) for name, address in self.wishes.addresses.items()
        }
        self.promises.machines = self.machines
        self._by_address = {machine.address[12:]: machine for machine in self.machines.values()}
        self.network.listeners.update(self.machines)
        self.controller = Controller(of, stage, self.dice("controller"), self.wishes.world)
        self.controller.on_push = self.promises.push
        self._router = self.dice("router")
        self._seen: list[Machine] = []
        self.clients = Clients(
            self.timeline, self.odds, self.dice("clients"), self.wishes.services, of.seed, self._enter
        )
        self.promises.clients = self.clients
        self.clients.bind = self.promises.bind

    def dice(self, name: str) -> Random:
        """Each actor has its own, so that one who does something else disturbs no other."""
        return Random(f"{self.seed}/{name}")

    def start(self) -> None:
        """Everybody who is wanted starts."""
        for machine in self.machines.values():
            machine.start_agent()
        self.controller.start()
        self._look()

    # --- The router ---------------------------------------------------------------------------------------------------
    def _look(self) -> None:
        """Which LBs may be sent to."""
        self._seen = [self.machines[name] for name in self.wishes.lbs if self._is_ready(name)]
        self.timeline.later(ROUTER_LOOKS_NS, self._look)

    def _is_ready(self, name: str) -> bool:
        return self.machines[name].up and self.machines[name].is_ready

    def _enter(self, flow: Flow, word: Word, sent: bytes) -> None:
        """A client's packet reaches the router."""
        if not self._seen:
            return
        at = self._router.randrange(1 << 16) if flow.sprays else flow.port
        machine = self._seen[at % len(self._seen)]
        now_ns = self.timeline.now_ns
        trip = Trip(flow, word, now_ns, now_ns + self.odds.packet_life_ns, self.promises.owed(flow.bond))
        self._carry("router", machine, trip, sent)

    def _carry(self, sender: str, machine: Machine, trip: Trip, sent: bytes) -> None:
        self.network.carry(sender, machine.name, trip.dead_ns, lambda: self._arrive(machine, trip, sent))

    def _arrive(self, machine: Machine, trip: Trip, sent: bytes) -> None:
        if not machine.up:
            return
        from_router = frames.destination(sent) == VIP_ADDRESS[12:]
        if from_router and not machine.is_ready:
            return
        outcome = machine.packet(sent)
        assert outcome.verdict is not None, "every frame is counted"
        trip = trip.after(machine.name, outcome.verdict)
        if outcome.action is Action.PASS:
            self._deliver(machine, trip, outcome.frame)
        elif outcome.action is Action.DROP:
            self._note(trip, "nobody")
        else:
            self._send_on(machine, trip, outcome.frame)

    def _note(self, trip: Trip, end: str) -> None:
        times = f"{trip.sent_ns / SECOND_NS:9.3f} .. {self.timeline.now_ns / SECOND_NS:.3f}"
        trip.flow.history.append(f"{times}  {trip} > {end}")

    def _send_on(self, machine: Machine, trip: Trip, sent: bytes) -> None:
        assert len(trip.steps) < STEPS_MAX, f"a packet ends: {trip}"
        tunnel = packets.parse_tunnel(sent[packets.ETHERNET_BYTES :])
        if tunnel is not None and isinstance(tunnel.option, packets.Forward):
            self.promises.chosen(machine, tunnel.option.address, trip.flow.service.port)
        receiver = self._by_address.get(frames.destination(sent))
        if receiver is not None:
            self._carry(machine.name, receiver, trip, sent)

    # --- Pods ---------------------------------------------------------------------------------------------------------
    def _deliver(self, machine: Machine, trip: Trip, sent: bytes) -> None:
        """Into a machine's own stack."""
        flow, address = trip.flow, frames.destination(sent)
        if address == VIP_ADDRESS[12:]:
            raise Violation(f"{flow.name}: {trip} ends in the stack of {machine.name}, which says that it is ready")
        pod = next((one for one in flow.service.pods if one.address[12:] == address and one.node == machine.name), None)
        if pod is None:
            return  # it is gone
        self._note(trip, pod.name)
        self.promises.arrived(trip, pod)
        word = pods_answer(pod, flow, trip.word)
        if word is not None:
            self._reply(machine, flow, pod, word)

    def _reply(self, machine: Machine, flow: Flow, pod: Pod, word: Word) -> None:
        said = frames.frame(pod.address[12:], POD_PORT, flow.client, flow.port, word)
        outcome = machine.reply(said)
        if outcome.verdict is not Verdict.REPLY:
            raise Violation(f"{flow.name}: {pod.name} answers with its own address")
        dead_ns = self.timeline.now_ns + self.odds.packet_life_ns
        self.network.carry(machine.name, "client", dead_ns, lambda: self.clients.answered(flow, word, pod))
