"""Clients and their flows, and the pods that answer: well-behaved, and the nastiest that may still expect to be served.

A TCP client opens with a SYN, talks, pauses and closes; the nasty ones pause until just before the idle timeout, send
their request right behind the SYN-ACK, send every packet through another LB, or leave without a word. A UDP client has
no first packet. A client with ClientIP affinity is one flow, however many connections it opens. What a client gets no
answer to it sends again; a five-tuple is used again once what was known of its last flow is forgotten.

A pod is as simple as pods are: it knows the TCP connections whose SYN it has seen, and answers RST to all others.

Decided here: who sends what when. Where packets go is the machines' doing, and what may not happen is ``promises``.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Final

from lbpod.core.flows import window_ns
from lbpod.core.hashing import flow_hash, slot_of
from lbpod.core.limits import FORGET_SCAN_NS
from lbpod.core.maps import mapped
from lbpod.core.model import Affinity, Protocol, format_address
from lbpod.simulator import frames
from lbpod.simulator.frames import Word
from lbpod.simulator.odds import Odds
from lbpod.simulator.timeline import MS_NS, SECOND_NS, Timeline
from lbpod.simulator.wishes import VIP_ADDRESS, Pod, Service

SYN_RETRY_NS: Final = 1_200 * MS_NS
"""Longer than a packet lives: there are never two SYNs of one attempt under way."""

RETRY_NS: Final = 350 * MS_NS
SYN_TRIES_MAX: Final = 6
JUST_BEFORE_NS: Final = 30 * MS_NS
REST_NS: Final = 2 * FORGET_SCAN_NS
"""A five-tuple is used again so long after records of its last flow may be forgotten. Sooner, it may meet one."""

SPAWN_NS: Final = 150 * MS_NS
CALM_SPAWN_NS: Final = 2 * SECOND_NS
CALM_FLOWS_MAX: Final = 2
HISTORY_MAX: Final = 12


class State(Enum):
    """Where a client stands. WAITING: for an answer; PAUSING: it will speak again."""

    OPENING = "opening"
    WAITING = "waiting"
    PAUSING = "pausing"
    OVER = "over"


@dataclass(slots=True, eq=False)
class Bond:
    """What must stay together: all packets of it belong to one pod. A flow, or all flows of a client."""

    service: Service
    slot: int
    key_port: int
    client: bytes
    pod: Pod | None = None
    seen_ns: int = 0
    """When the last packet that has arrived was sent."""
    closed: bool = False
    excuse: str = ""
    """Why it need not hold any more; empty: it must."""


@dataclass(slots=True, eq=False)
class Flow:
    """One connection of a client, or its datagrams."""

    name: str
    bond: Bond
    client: bytes
    port: int
    sprays: bool
    state: State = State.OPENING
    tries: int = 0
    turn: int = 0
    """Grows with everything that the client does: what was to be done before is not done."""
    closing: bool = False
    said: Word | None = None
    """Its last word."""
    history: deque[str] = field(default_factory=lambda: deque(maxlen=HISTORY_MAX))

    def story(self) -> list[str]:
        """For people: who it is, and what became of its last packets."""
        where = f"{self.name}: {format_address(mapped(self.client))}:{self.port} to {self.service.name}"
        return [f"{where}, slot {self.bond.slot}, idle after {self.service.idle_ns // SECOND_NS} s", *self.history]

    @property
    def service(self) -> Service:
        return self.bond.service

    @property
    def is_tcp(self) -> bool:
        return self.service.odds.protocol is Protocol.TCP


Send = Callable[[Flow, Word, bytes], None]


class Clients:
    """All of them. `send` puts a frame on its way to an LB; what becomes of it comes back by `answered`."""

    def __init__(
        self, timeline: Timeline, odds: Odds, dice: Random, services: list[Service], seed: int, send: Send
    ) -> None:
        """seed: of the cluster's hashes."""
        self._timeline, self._odds, self._dice, self._services = timeline, odds, dice, services
        self._seed, self._send = seed, send
        self.flows: list[Flow] = []
        """Those that are not over."""
        self.opened = 0
        self.bind: Callable[[Bond, Pod], None] = lambda bond, pod: None
        """A client has a pod's answer to its first packet."""
        self._is_calm = False
        self._next_port = 10_000
        self._affine: dict[tuple[str, bytes], Bond] = {}
        self._free: deque[tuple[int, Service, bytes, int]] = deque()
        """Five-tuples to be used again, and from when."""

    def start(self) -> None:
        """From now on flows begin."""
        self._spawn()

    def calm(self) -> None:
        """Flows that are there end with their next word; new ones come now and then, and end at once."""
        self._is_calm = True
        for flow in list(self.flows):
            flow.closing = True
            if flow.state is State.PAUSING:
                self._speak(flow)

    def bonds(self) -> list[tuple[Bond, Flow | None]]:
        """All that may be live, each with a flow of it: a client with affinity may have none open just now."""
        found: dict[int, tuple[Bond, Flow | None]] = {id(bond): (bond, None) for bond in self._affine.values()}
        found.update((id(flow.bond), (flow.bond, flow)) for flow in self.flows)
        return list(found.values())

    # --- Beginning ----------------------------------------------------------------------------------------------------
    def _spawn(self) -> None:
        flows_max = CALM_FLOWS_MAX if self._is_calm else self._odds.flows_max
        while len(self.flows) < flows_max and self._dice.random() < 0.7:
            service = self._dice.choice(self._services)
            # A client with affinity that comes again and again is one flow, which never ends.
            lasts = self._is_calm and service.odds.affinity is Affinity.CLIENT_IP
            if not service.ready() or lasts:
                break
            self._begin(service)
        self._timeline.later(CALM_SPAWN_NS if self._is_calm else SPAWN_NS, self._spawn)

    def _begin(self, service: Service) -> None:
        client, port = self._tuple(service)
        affine = service.odds.affinity is Affinity.CLIENT_IP
        bond = self._affine.get((service.name, client)) if affine else None
        if bond is None:
            key_port = 0 if affine else port
            bond = Bond(service, self._slot(service, client, key_port), key_port, client)
            if affine:
                self._affine[service.name, client] = bond
        self.opened += 1
        flow = Flow(f"flow{self.opened}", bond, client, port, self._dice.random() < self._odds.spray_chance)
        flow.closing = self._is_calm
        self.flows.append(flow)
        self._speak(flow)

    def _tuple(self, service: Service) -> tuple[bytes, int]:
        if self._free and self._free[0][0] <= self._timeline.now_ns and self._free[0][1] is service:
            _, _, client, port = self._free.popleft()
            return client, port
        self._next_port += 1
        return bytes([198, 51, 100, self._dice.randint(1, 3)]), self._next_port

    def _slot(self, service: Service, client: bytes, port: int) -> int:
        protocol = int(service.odds.protocol)
        return slot_of(flow_hash(mapped(client), VIP_ADDRESS, port, service.port, protocol, self._seed))

    # --- Talking ------------------------------------------------------------------------------------------------------
    def _speak(self, flow: Flow) -> None:
        """Say the next word, and again if there is no answer."""
        if flow.state is State.OPENING:
            word, retry_ns = (Word.SYN, SYN_RETRY_NS) if flow.is_tcp else (Word.DATA, RETRY_NS)
        else:
            word, retry_ns = self._word(flow), RETRY_NS
            flow.state = State.WAITING
        flow.said = word
        flow.turn += 1
        turn = flow.turn
        self._timeline.later(retry_ns, lambda: self._again(flow, turn))
        source = frames.frame(flow.client, flow.port, VIP_ADDRESS[12:], flow.service.port, word)
        self._send(flow, word, source)
        if word is Word.RST:
            self._end(flow)

    def _word(self, flow: Flow) -> Word:
        if not flow.is_tcp:
            return Word.DATA
        if flow.closing:
            return Word.FIN
        if self._dice.random() < self._odds.close_chance:
            flow.closing = True
            if self._dice.random() < 0.3:
                return Word.RST
            return Word.FIN
        return Word.ACK

    def _again(self, flow: Flow, turn: int) -> None:
        """No answer has come."""
        if turn != flow.turn or flow.state is State.OVER:
            return
        flow.tries += 1
        is_tired = flow.state is State.OPENING and flow.tries >= SYN_TRIES_MAX
        if is_tired or (flow.state is State.WAITING and self._is_silent(flow.bond)):
            self._end(flow)
        else:
            self._speak(flow)

    def _is_silent(self, bond: Bond) -> bool:
        """Nothing of it has arrived anywhere for longer than it may be silent."""
        return self._timeline.now_ns - bond.seen_ns >= bond.service.idle_ns

    def answered(self, flow: Flow, word: Word, pod: Pod) -> None:
        """A pod's packet has come."""
        if flow.state is State.OVER:
            return
        if word is Word.RST:
            self._end(flow)
            return
        if word is Word.SYN_ACK:
            if flow.state is not State.OPENING:
                return
            if flow.service.odds.affinity is Affinity.NONE:
                self.bind(flow.bond, pod)
        elif flow.state is not State.WAITING and flow.is_tcp:
            return
        elif word is Word.ACK and flow.said is Word.FIN:
            return  # to a word before, which was repeated or late: its FIN is still to be answered
        if word is Word.FIN or (flow.closing and not flow.is_tcp):
            self._end(flow)
            return
        self._pause(flow)

    def _pause(self, flow: Flow) -> None:
        flow.state, flow.tries = State.PAUSING, 0
        flow.turn += 1
        turn = flow.turn
        if not flow.is_tcp and self._dice.random() < self._odds.close_chance:
            self._end(flow)
            return
        self._timeline.later(self._pause_ns(flow), lambda: self._resume(flow, turn))

    def _pause_ns(self, flow: Flow) -> int:
        die, idle_ns = self._dice.random(), flow.service.idle_ns
        if self._is_calm or die < self._odds.quick_chance:
            return 0
        if die > 1 - self._odds.silent_chance:
            # Counted from the last word that has arrived; at least that of now.
            return max(flow.bond.seen_ns + idle_ns - JUST_BEFORE_NS - self._timeline.now_ns, 0)
        return int(SECOND_NS * self._dice.choice((0.2, 1, 3)) * self._dice.random())

    def _resume(self, flow: Flow, turn: int) -> None:
        if turn == flow.turn and flow.state is State.PAUSING:
            self._speak(flow)

    def _end(self, flow: Flow) -> None:
        flow.state = State.OVER
        self.flows.remove(flow)
        if flow.service.odds.affinity is Affinity.NONE:
            flow.bond.closed = True
        free_ns = self._timeline.now_ns + window_ns(flow.service.idle_ns) + REST_NS
        self._free.append((free_ns, flow.service, flow.client, flow.port))


def pods_answer(pod: Pod, flow: Flow, word: Word) -> Word | None:
    """What a pod says to a packet; None: nothing."""
    connection = (flow.client, flow.port)
    match word:
        case Word.DATA:
            return Word.DATA
        case Word.SYN:
            pod.connections.add(connection)
            return Word.SYN_ACK
        case Word.RST:
            pod.connections.discard(connection)
            return None
        case _ if connection not in pod.connections:
            return Word.RST
        case Word.FIN:
            return Word.FIN
    return Word.ACK
