"""What becomes of a call, and of a packet, between two machines: late, lost, twice, in another order, or cut off.

A call (HTTP) is answered, refused, or not answered until its caller gives up; and a call that was given up may have
arrived, or may still. Its body goes through the bytes of the wire on both ways. A packet has a life: it is where it
should be within that time, or it is lost (DESIGN's margin is about nothing else). Links are cut one way or both, for
calls and packets alike.

Left to others: who hears a call (``machine``), and what a packet is (``clients``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any, Final, Protocol

from lbpod.core import wire
from lbpod.core.messages import BeatAnswer, BeatCall, Refuse, Reply
from lbpod.core.model import Snapshot
from lbpod.simulator.odds import Odds
from lbpod.simulator.timeline import MS_NS, Action, Timeline

CONTROLLER: Final = "controller"

Answer = Callable[[Reply | Refuse], None]


@dataclass(slots=True, eq=False)
class Call:
    """A call on its way."""

    sender: str
    receiver: str
    body: Any
    """None: GET /v1/state."""
    timeout_ns: int
    on_answer: Callable[[Any], None]
    on_failure: Callable[[bool, str], None]
    """(refused by a 4xx, reason)."""
    with_snapshot: bool = False
    clock_ns: int | None = None
    """What the receiver's clock should show, as the sender believes."""
    shown_ns: int = 0
    """What the receiver's clock showed when it answered."""
    is_refused: bool = False
    """It was answered, by a refusal."""
    is_agentless: bool = False
    """The machine itself has refused the connection."""
    is_repeated: bool = False
    """It arrives twice: what is said of one copy says nothing of the other."""
    is_done: bool = False
    """The caller has an answer, or has given up."""


class Listener(Protocol):
    """Somebody who can be called."""

    def hear(self, call: Call, answer: Answer) -> None:
        """A call has arrived; `answer` may be called later, once, or never."""


@lru_cache(maxsize=8)
def _snapshot(data: bytes) -> Snapshot:
    """A snapshot is pushed to everybody, and is never changed: read once."""
    return wire.decode(Snapshot, data)


def over_the_wire(body: Any) -> Any:
    """What the other side makes of a body. (Every other call is a beat: those are left as they are.)"""
    if isinstance(body, BeatCall | BeatAnswer):
        return body
    data = wire.encode(body)
    return _snapshot(data) if isinstance(body, Snapshot) else wire.decode(type(body), data)


class Network:
    """All links. Everything that is calm is quick and safe: see `calm`."""

    def __init__(self, timeline: Timeline, odds: Odds, dice: Random) -> None:
        self._timeline, self._odds, self._dice = timeline, odds, dice
        self.listeners: dict[str, Listener] = {}
        self._cuts: dict[tuple[str, str], int] = {}
        """(sender, receiver) -> until when nothing gets through."""
        self._is_calm = False

    def calm(self) -> None:
        """From now on nothing is lost, nothing is late, and nothing is cut."""
        self._is_calm = True
        self._cuts.clear()

    # --- Links --------------------------------------------------------------------------------------------------------
    def cut(self, sender: str, receiver: str, duration_ns: int) -> None:
        """Nothing gets from one to the other for so long."""
        self._cuts[sender, receiver] = self._timeline.now_ns + duration_ns

    def is_cut(self, sender: str, receiver: str) -> bool:
        """Now."""
        return self._cuts.get((sender, receiver), 0) > self._timeline.now_ns

    def _happens(self, chance: float) -> bool:
        return not self._is_calm and chance > 0 and self._dice.random() < chance

    def _way_ns(self) -> int:
        """How long a call or an answer is on its way: mostly short, seldom as long as may be."""
        if self._is_calm:
            return MS_NS
        return int(self._odds.call_delay_ns * self._dice.random() ** 3)

    # --- Calls --------------------------------------------------------------------------------------------------------
    def send(self, call: Call) -> None:
        """A call leaves its sender."""
        self._timeline.later(call.timeout_ns, lambda: self._fail(call, False, "no answer came in time"))
        if self._happens(self._odds.call_reset):
            self._timeline.later(self._way_ns(), lambda: self._fail(call, False, "connection reset"))
            if self._dice.random() < 0.5:
                return
        if self.is_cut(call.sender, call.receiver) or self._happens(self._odds.call_loss):
            return
        self._timeline.later(self._way_ns(), lambda: self._arrive(call))
        if self._happens(self._odds.call_repeat):
            call.is_repeated = True
            self._timeline.later(self._way_ns(), lambda: self._arrive(call))

    def _arrive(self, call: Call) -> None:
        self.listeners[call.receiver].hear(call, lambda answer: self._answer(call, answer))

    def _answer(self, call: Call, answer: Reply | Refuse) -> None:
        if self.is_cut(call.receiver, call.sender) or self._happens(self._odds.call_loss):
            return
        if isinstance(answer, Refuse):
            self._timeline.later(self._way_ns(), lambda: self._refuse(call, answer))
        else:
            self._timeline.later(self._way_ns(), lambda: self._give(call, over_the_wire(answer.body)))

    def _give(self, call: Call, body: Any) -> None:
        if not call.is_done:
            call.is_done = True
            call.on_answer(body)

    def no_agent(self, call: Call) -> None:
        """It has arrived at a machine where nobody listens."""
        if not self.is_cut(call.receiver, call.sender):
            self._timeline.later(self._way_ns(), lambda: self._refuse_connection(call))

    def _refuse_connection(self, call: Call) -> None:
        call.is_agentless = True
        self._fail(call, False, "connection refused")

    def _refuse(self, call: Call, answer: Refuse) -> None:
        call.is_refused = True
        self._fail(call, 400 <= answer.status < 500, answer.sentence)

    def _fail(self, call: Call, refused: bool, reason: str) -> None:
        if not call.is_done:
            call.is_done = True
            call.on_failure(refused, reason)

    # --- Packets ------------------------------------------------------------------------------------------------------
    def carry(self, sender: str, receiver: str, dead_ns: int, arrive: Action) -> None:
        """A packet goes from one to the other: it arrives once, twice, or never; not later than `dead_ns`."""
        if self.is_cut(sender, receiver) or self._happens(self._odds.packet_loss):
            return
        for _ in range(1 + self._happens(self._odds.packet_repeat)):
            delay_ns = MS_NS // 10
            if self._happens(self._odds.packet_late):
                delay_ns = self._dice.randrange(self._odds.packet_life_ns)
            if self._timeline.now_ns + delay_ns <= dead_ns:
                self._timeline.later(delay_ns, arrive)
