"""What goes wrong, and when: each kind at its own rate, as the seed has drawn them.

Nobody here knows what a fault leads to. Times between two faults of a kind are exponential, so that some come together.
"""

from collections.abc import Callable
from random import Random
from typing import Final

from lbpod.core.messages import MemberSeen
from lbpod.simulator.cluster import Cluster
from lbpod.simulator.machine import Machine
from lbpod.simulator.network import CONTROLLER
from lbpod.simulator.timeline import MS_NS, SECOND_NS

_MINUTE_NS: Final = 60 * SECOND_NS


class Trouble:
    """All of it."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._dice: Random = cluster.dice("trouble")
        self._ended = False
        cluster.controller.on_death = self._controller_died
        self._changes_at_kills: list[int] = []
        """Changes that had come into force when the controller was killed the last two times."""
        self.losses = 0
        """LBs that were lost, or left by themselves."""

    def start(self) -> None:
        """From now on."""
        odds = self._cluster.odds
        for rate, happens in (
            (odds.cut_rate, self._cut),
            (odds.belief_rate, self._believe),
            (odds.agent_kill_rate, self._kill_agent),
            (odds.agent_stall_rate, self._stall_agent),
            (odds.controller_kill_rate, self._kill_controller),
            (odds.leap_rate, self._leap),
            (odds.crash_rate, self._crash),
            (odds.leave_rate, self._leave),
        ):
            if rate:
                self._schedule(rate, happens)

    def end(self) -> None:
        """No more, and what is broken is mended."""
        self._ended = True
        self._cluster.network.calm()
        for machine in self._cluster.machines.values():
            machine.calm()
            if not machine.up:
                machine.boot()
            if machine.up and not machine.agent_up:
                machine.start_agent()
            for member in machine.other_members():
                machine.feed(MemberSeen(member, up=True))
        self._cluster.controller.calm()

    def _schedule(self, rate: float, happens: Callable[[], None]) -> None:
        def now() -> None:
            if not self._ended:
                happens()
                self._schedule(rate, happens)

        self._cluster.timeline.later(int(_MINUTE_NS * self._dice.expovariate(rate)), now)

    def _say(self, who: str, what: str) -> None:
        self._cluster.transcript.say(who, what)

    def _machine(self) -> Machine:
        return self._dice.choice(list(self._cluster.machines.values()))

    def _lb(self) -> Machine:
        return self._cluster.machines[self._dice.choice(self._cluster.wishes.lbs)]

    def _unless_ended(self, delay_ns: int, action: Callable[[], None]) -> None:
        def now() -> None:
            if not self._ended:
                action()

        self._cluster.timeline.later(delay_ns, now)

    # --- Kinds --------------------------------------------------------------------------------------------------------
    def _cut(self) -> None:
        """A link between two, or all links of one; both ways, or one."""
        names = [*self._cluster.machines, CONTROLLER]
        one = self._dice.choice(names)
        others = [name for name in names if name != one]
        if self._dice.random() < 0.6:
            others = [self._dice.choice(others)]
        duration_ns = int(100 * MS_NS * 100 ** self._dice.random())
        ways = self._dice.choice(("to", "from", "both"))
        for other in others:
            if ways != "from":
                self._cluster.network.cut(one, other, duration_ns)
            if ways != "to":
                self._cluster.network.cut(other, one, duration_ns)
        whom = others[0] if len(others) == 1 else "everybody"
        self._say("network", f"nothing gets {_WAYS[ways]} {one} and {whom} for {duration_ns / SECOND_NS:.1f} s")

    def _believe(self) -> None:
        """An LB believes for a while that another one is down."""
        machine = self._lb()
        life, members = machine.life, machine.other_members()
        if not machine.agent_up or not members:
            return
        member = self._dice.choice(members)

        def right() -> None:
            if machine.life == life:
                machine.feed(MemberSeen(member, up=True))

        machine.feed(MemberSeen(member, up=False))
        self._unless_ended(int(100 * MS_NS * 100 ** self._dice.random()), right)

    def _kill_agent(self) -> None:
        machine = self._machine()
        if not machine.agent_up:
            return
        machine.kill_agent()
        self._say(machine.name, "its agent is killed")

        def start() -> None:
            if machine.up and not machine.agent_up:
                self._say(machine.name, "its agent starts again")
                machine.start_agent()

        self._unless_ended(int(20 * MS_NS * 200 ** self._dice.random()), start)

    def _stall_agent(self) -> None:
        machine = self._machine()
        if machine.agent_up:
            duration_ns = int(100 * MS_NS * 30 ** self._dice.random())
            machine.stall_agent(duration_ns)
            self._say(machine.name, f"its agent stands still for {duration_ns / SECOND_NS:.1f} s")

    def _kill_controller(self) -> None:
        """At any moment; but not a third time in a row before anything has come into force."""
        controller = self._cluster.controller
        if not controller.is_up or self._changes_at_kills == [controller.changes] * 2:
            return
        self._changes_at_kills = [*self._changes_at_kills[-1:], controller.changes]
        controller.kill(self._dice.random() < self._cluster.odds.state_loss_chance)

    def _controller_died(self) -> None:
        def start() -> None:
            if not self._cluster.controller.is_up:
                self._cluster.controller.start()

        self._unless_ended(int(200 * MS_NS * 30 ** self._dice.random()), start)

    def _crash(self) -> None:
        """A machine is gone, its pods with it; it comes back empty, sooner or later."""
        machine = self._lb()
        if not machine.up:
            return
        self._say(machine.name, "is gone")
        self.losses += 1
        self._cluster.promises.lost(machine)
        machine.crash()
        self._cluster.wishes.lose_pods(machine.name)
        self._cluster.controller.see()

        def boot() -> None:
            if not machine.up:
                self._say(machine.name, "comes back, empty")
                machine.boot()

        self._unless_ended(int(200 * MS_NS * 100 ** self._dice.random()), boot)

    def _leave(self) -> None:
        """An agent is told to end, and leaves the ring before."""
        machine = self._lb()
        if not machine.agent_up or not machine.is_ready:
            return
        self._say(machine.name, "its agent is to end")
        self.losses += 1

        def start() -> None:
            if machine.up and not machine.agent_up:
                self._say(machine.name, "its agent starts again")
                machine.start_agent()

        def ended() -> None:
            self._say(machine.name, "its agent has ended")
            # Also where trouble has ended meanwhile: this one was on its way out.
            self._cluster.timeline.later(int(50 * MS_NS * 100 ** self._dice.random()), start)

        machine.leave(ended)

    def _leap(self) -> None:
        """Always the same one: a settle trusts two clocks, of which one may be wrong. (An LB that is alone trusts its
        own, and so does a host agent.)"""
        machine = self._cluster.machines[self._cluster.wishes.lbs[0]]
        has_pods = any(pod.node == machine.name for service in self._cluster.wishes.services for pod in service.pods)
        if has_pods or not machine.other_members():
            return
        by_ns = int(1_500 * MS_NS * 20 ** self._dice.random())
        machine.clock.leap(by_ns)
        self._say(machine.name, f"its clock leaps by {by_ns / SECOND_NS:.2f} s")


_WAYS: Final = {"to": "from", "from": "to", "both": "between"}
