"""Clients for an audience: long-lived connections that talk all the time and never end, and a stream of short ones.

As in the demo's lab (``lbpod.lab.check_flows``): a long-lived connection that breaks is opened again, and whose fault a
failure is depends on whether the backend that served it was there. The clients' packets, their patience and their pods
are those of ``clients``; what a seed draws of habits, these have none of.
"""

from random import Random
from typing import Final

from lbpod.simulator.clients import Clients, Flow, Send, State
from lbpod.simulator.frames import Word
from lbpod.simulator.odds import Odds
from lbpod.simulator.timeline import MS_NS, SECOND_NS, Timeline
from lbpod.simulator.wishes import Pod, Service

REQUEST_NS: Final = 300 * MS_NS
"""From one answer of a long-lived connection to the next request, on average."""
THINK_NS: Final = 20 * MS_NS
"""Of a short one."""
REOPEN_NS: Final = 100 * MS_NS
RAMP_NS: Final = SECOND_NS


class Audience(Clients):
    """All clients of one run."""

    def __init__(
        self,
        timeline: Timeline,
        odds: Odds,
        dice: Random,
        services: list[Service],
        seed: int,
        send: Send,
        *,
        long_count: int,
        short_rate: int,
    ) -> None:
        """short_rate: short connections opened a second."""
        super().__init__(timeline, odds, dice, services, seed, send)
        self._long_count, self._short_rate = long_count, short_rate
        self._leaves = False
        self._long: set[Flow] = set()
        self._served: dict[Flow, Pod] = {}  # flow -> who has answered its first packet
        self.connections = self.broken = self.gone = 0
        """Established; broken though their backend was there; broken because it was not."""

    @property
    def long_lived(self) -> int:
        """Long-lived connections that are open and have been answered."""
        return sum(flow in self._served for flow in self._long)

    def start(self) -> None:
        for number in range(self._long_count):
            self._timeline.later(RAMP_NS * number // self._long_count, self._open_long)
        if self._short_rate:
            self._open_short()

    def leave(self) -> None:
        """All close, and nobody comes."""
        self._leaves = True
        for flow in [*self.flows]:
            flow.closing = True
            if flow.state is State.PAUSING:
                self._speak(flow)

    def _open_long(self) -> None:
        if not self._leaves:
            self._long.add(self._open())

    def _open_short(self) -> None:
        if not self._leaves:
            self._open().closing = True
            self._timeline.later(SECOND_NS // self._short_rate, self._open_short)

    def _open(self) -> Flow:
        self._begin(self._services[0])
        return self.flows[-1]

    def _pause_ns(self, flow: Flow) -> int:
        if flow not in self._long:
            return THINK_NS
        return REQUEST_NS // 2 + self._dice.randrange(REQUEST_NS)

    def answered(self, flow: Flow, word: Word, pod: Pod) -> None:
        if word is Word.SYN_ACK and flow.state is State.OPENING:
            self.connections += 1
            self._served[flow] = pod
        if word is Word.RST and flow.state is not State.OVER:
            self._judge(flow)
        super().answered(flow, word, pod)

    def _again(self, flow: Flow, turn: int) -> None:
        was_over = flow.state is State.OVER
        super()._again(flow, turn)
        if flow.state is State.OVER and not was_over:
            self._judge(flow)  # it has given up

    def _judge(self, flow: Flow) -> None:
        pod = self._served.get(flow)
        if pod is not None and pod.state is None:
            self.gone += 1
        else:
            self.broken += 1

    def _end(self, flow: Flow) -> None:
        super()._end(flow)
        self._served.pop(flow, None)
        if flow in self._long:
            self._long.discard(flow)
            self._timeline.later(REOPEN_NS, self._open_long)
