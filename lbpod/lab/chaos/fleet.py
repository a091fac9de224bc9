"""The load balancers and the router before them: who is lost, who comes, and where flows are sent meanwhile.

The router is played as one with BGP and BFD would act. It takes the path of a lost LB out ``router_ms`` after the
loss (until then it sends into it), takes a path out where an agent's /readyz says 503, and puts one in where it says
200. Where nobody answers it keeps the path for SILENT_NS: a killed agent is no reason, for the fast path goes on
without it; but one that stays away is taken out of the ring after LOST_NS, and then the hosts drop what it forwards.
The last path is never taken out.

By default nobody is lost while another LB is not in its place, or a link between two is cut: a loss waits then, and is
left out if it waits for too long.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import Enum
from typing import Final

from lbpod.core.limits import LOST_NS
from lbpod.lab.chaos.ledger import Join, Kind, Leave, Ledger, Loss
from lbpod.lab.chaos.links import Links
from lbpod.lab.chaos.schedule import How, Step
from lbpod.lab.cluster import PREFIX, Cluster
from lbpod.lab.errors import LabError
from lbpod.lab.in_force import InForce
from lbpod.lab.limits import MS_NS, SECOND_NS
from lbpod.lab.topology import Node

LOOK_SOON_NS: Final = 100 * MS_NS
"""Between two looks at an LB that is on its way in or out."""
LOOK_NS: Final = 400 * MS_NS
"""Between two looks at one in its place."""
SILENT_NS: Final = LOST_NS // 2
"""How long /readyz may be silent before the path is taken out."""
LOSS_WAIT_NS: Final = 8 * SECOND_NS
"""How long a loss waits for everybody to be in place."""
LEAVE_WAIT_NS: Final = 30 * SECOND_NS
"""How long an LB may take to leave before it is killed, and counted as overdue."""
NOTICED_NS: Final = 500 * MS_NS
"""Half of the destroyed LBs are taken out of the config so soon, the others when the next one joins."""


class Standing(Enum):
    """Of an LB."""

    JOINING = "joining"
    UP = "up"
    LOST = "lost"
    LEAVING = "leaving"


@dataclass(eq=False)
class Lb:
    """One LB. ``path``: the router sends to it."""

    node: Node
    standing: Standing = Standing.UP
    path: bool = True
    back_ns: int = 0
    """When it was last reachable again."""
    silent_ns: int | None = None
    """Since when /readyz has not answered; None: it has."""
    loss: Loss | None = None
    join: Join | None = None
    leave: Leave | None = None

    @property
    def is_new(self) -> bool:
        """Its agent has yet to answer for the first time."""
        return self.join is not None and not self.join.again and self.join.answered_ns is None


class Fleet:
    """All LBs of a run. In the event loop's thread."""

    def __init__(
        self, cluster: Cluster, router_ms: int, ledger: Ledger, rng: random.Random, mark: Callable[[int, int], None]
    ) -> None:
        """router_ms: how long the router sends into a lost LB; mark: told of each loss, its number and when it was."""
        self.lbs: list[Lb] = [Lb(node) for node in cluster.lbs]
        self.overdue_count = 0
        """LBs that had to be killed because they did not leave in time."""
        self._cluster = cluster
        self._router_ms = router_ms
        self._ledger = ledger
        self._rng = rng
        self._mark = mark
        self._links = Links(cluster.lab, ledger)
        self._waiting_count = 0
        """Losses that wait."""
        self._vacant_count = 0
        """LBs that have left in order and were not replaced yet."""
        self._moving_count = 0
        """Machines that are being taken away or made: nobody in `lbs` is missing then, and one is all the same."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None

    # ------------------------------------------------------------------------------------------------- what happens

    def watch(self) -> None:
        """Begins to look at all LBs, each by itself, so that one that hangs does not hide the others."""
        for lb in self.lbs:
            self._spawn(self._watch(lb))

    def stop(self) -> None:
        """No more looks. Raises what went wrong in one."""
        for task in tuple(self._tasks):
            task.cancel()
        if self._failure is not None:
            raise self._failure

    @property
    def settled(self) -> bool:
        """True where every LB is in its place and none is missing."""
        complete = not self._vacant_count and not self._moving_count
        return complete and all(lb.standing is Standing.UP for lb in self.lbs)

    async def tables(self) -> list[InForce] | None:
        """What all LBs forward by that may send new flows: those to which the router sends, and those to which others
        may relay. None where one of them is silent."""
        lbs = [lb for lb in self.lbs if lb.standing is not Standing.LOST and not lb.is_new]
        answers = await asyncio.gather(*(asyncio.to_thread(self._cluster.in_force, lb.node) for lb in lbs))
        said = [(lb, answer) for lb, answer in zip(lbs, answers, strict=True) if answer is not None]
        return [answer for lb, answer in said if lb.path or answer.serving] if len(said) == len(lbs) else None

    def is_expected_dead(self, node: Node) -> bool:
        """True where nobody should start the agent of this node again."""
        lb = self._of(node)
        if lb is None:
            return node in self._cluster.lbs
        return lb.standing is Standing.LEAVING or (lb.loss is not None and lb.loss.how is How.DESTROYED)

    async def lose(self, step: Step, *, controller_up: Callable[[], bool]) -> None:
        """A loss, as soon as everybody is in place."""
        self._waiting_count += 1
        try:
            if not await self._all_in_place():
                self._ledger.happened(time.monotonic_ns(), Kind.POSTPONED, "loss: an LB was still missing")
                return
        finally:
            self._waiting_count -= 1
        assert step.how is not None, "a loss has a kind"
        for lb in self._rng.sample(self.lbs, step.count):
            self._lose(lb, step, controller_up=controller_up())

    async def _all_in_place(self) -> bool:
        """Waits for it; False where that takes too long."""
        deadline_ns = time.monotonic_ns() + LOSS_WAIT_NS
        while not self.settled or not self._links.rested:
            if time.monotonic_ns() > deadline_ns:
                return False
            await asyncio.sleep(LOOK_SOON_NS / SECOND_NS)
        return True

    def _lose(self, lb: Lb, step: Step, *, controller_up: bool) -> None:
        assert step.how is not None
        at_ns = time.monotonic_ns()
        if step.how is How.DESTROYED:
            self._cluster.lab.cut(lb.node)
            self._cluster.agents[lb.node.name].signal(signal.SIGKILL)
        else:
            self._cluster.lab.sever(lb.node)
        number = len(self._ledger.losses) + 1
        lb.standing = Standing.LOST
        lb.loss = Loss(number, at_ns, step.how, lb.node.name, controller_up)
        self._ledger.losses.append(lb.loss)
        self._mark(number, at_ns)
        down = "" if controller_up else ", the controller is dead"
        self._ledger.happened(at_ns, Kind.LOSS, f"{lb.node.name} {step.how}{down}")
        loop = asyncio.get_running_loop()
        loop.call_later(self._router_ms / 1_000, self._router_notices, lb)
        if step.how is How.BLIP:
            loop.call_later(step.away_ns / SECOND_NS, self._return, lb)
        elif step.how is How.DESTROYED and self._rng.random() < 0.5:
            loop.call_later(NOTICED_NS / SECOND_NS, self._forget, lb)

    def _router_notices(self, lb: Lb) -> None:
        if lb.standing is Standing.LOST and lb.path:
            self._set_path(lb, False, "the router has noticed")

    def _forget(self, lb: Lb) -> None:
        """Takes an LB out of the config."""
        if lb.node in self._cluster.lbs:
            self._cluster.lbs.remove(lb.node)
            self._cluster.write_config()

    def _return(self, lb: Lb) -> None:
        """An LB that was cut off is reachable again."""
        assert lb.loss is not None, "it was lost"
        self._cluster.lab.mend(lb.node)
        now_ns = time.monotonic_ns()
        self._ledger.happened(
            now_ns, Kind.RETURN, f"{lb.node.name}, {(now_ns - lb.loss.at_ns) / SECOND_NS:.1f} s later"
        )
        lb.standing, lb.back_ns = Standing.JOINING, now_ns
        if lb.loss.how is How.CUT_OFF:
            lb.join = Join(lb.node.name, True, now_ns)
            self._ledger.joins.append(lb.join)

    def part(self, step: Step) -> None:
        """Two LBs do not reach each other for a while, unless one is lost just now, or about to be."""
        there = [lb.node for lb in self.lbs if not lb.is_new]
        if self._waiting_count or len(there) < 2 or any(lb.standing is Standing.LOST for lb in self.lbs):
            return
        one, other = self._rng.sample(there, 2)
        if not self._links.is_cut(one, other):
            self._spawn(self._links.cut(one, other, step.away_ns, one_way=step.one_way))

    async def join(self) -> None:
        """Whoever was lost or has left is replaced; one that was cut off comes back itself."""
        self._moving_count += 1
        try:
            await self._join()
        finally:
            self._moving_count -= 1

    async def _join(self) -> None:
        lost = [lb for lb in self.lbs if lb.standing is Standing.LOST and lb.loss and lb.loss.how is not How.BLIP]
        if not lost:
            if self._vacant_count:
                self._vacant_count -= 1
                await self._join_new()
            return
        lb = lost[0]
        assert lb.loss is not None
        if lb.loss.how is How.CUT_OFF:
            self._return(lb)
            return
        self._set_path(lb, False, "its machine is taken away")
        await self._discard(lb)
        await self._join_new()

    async def _discard(self, lb: Lb) -> None:
        """The machine goes, the config says so."""
        self.lbs.remove(lb)
        self._forget(lb)
        self._cluster.agents.pop(lb.node.name).kill()
        await asyncio.to_thread(self._cluster.lab.remove_node, lb.node)

    async def _join_new(self) -> None:
        """A new machine under a new name."""
        node = await asyncio.to_thread(self._cluster.lab.add_node)
        started_ns = time.monotonic_ns()
        join = Join(node.name, False, started_ns)
        self._ledger.joins.append(join)
        lb = Lb(node, Standing.JOINING, path=False, join=join)
        self.lbs.append(lb)
        self._cluster.lbs.append(node)
        self._cluster.start_agent(node)
        self._cluster.write_config()
        self._ledger.happened(started_ns, Kind.JOIN, f"{node.name} starts")
        self._spawn(self._watch(lb))

    def leave(self) -> None:
        """One LB is told to end, if all are in place."""
        if not self.settled:
            self._ledger.happened(time.monotonic_ns(), Kind.POSTPONED, "leave: an LB was still missing")
            return
        lb = self._rng.choice(self.lbs)
        lb.standing = Standing.LEAVING
        lb.leave = Leave(lb.node.name, time.monotonic_ns())
        self._ledger.leaves.append(lb.leave)
        self._cluster.agents[lb.node.name].signal(signal.SIGTERM)
        self._ledger.happened(lb.leave.at_ns, Kind.LEAVE, f"{lb.node.name} is told to end")

    # ---------------------------------------------------------------------------------------------------- the router

    def _set_path(self, lb: Lb, wanted: bool, why: str) -> None:
        """Puts a path in or takes it out, in one change of the route. The others keep their order and weights."""
        if lb.path == wanted:
            return
        router = self._cluster.lab.router
        hops = [(hop.node, hop.weight) for hop in router.ecmp[PREFIX] if hop.node is not lb.node]
        if not wanted and not hops:
            return
        router.set_ecmp(PREFIX, [*hops, (lb.node, 1)] if wanted else hops)
        lb.path = wanted
        self._ledger.happened(time.monotonic_ns(), Kind.BACK if wanted else Kind.OUT, f"{lb.node.name}: {why}")

    # --------------------------------------------------------------------------------------------------------- looks

    def _of(self, node: Node) -> Lb | None:
        return next((lb for lb in self.lbs if lb.node is node), None)

    def _spawn(self, what: Coroutine[None, None, None]) -> None:
        """What goes on by itself until ``stop``; what goes wrong in it ends all looks, and is raised there."""
        task = asyncio.get_running_loop().create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error

    async def _watch(self, lb: Lb) -> None:
        while lb in self.lbs and self._failure is None:
            asked_ns = time.monotonic_ns()
            ready = await asyncio.to_thread(self._cluster.ready, lb.node)
            if lb not in self.lbs:
                return
            if asked_ns < lb.back_ns:
                continue  # what was asked while it was cut off says nothing
            if lb.standing is Standing.LEAVING:
                await self._look_at_leaving(lb, ready)
            elif lb.standing is not Standing.LOST:
                self._look_at(lb, ready)
            pause_ns = LOOK_NS if lb.standing is Standing.UP else LOOK_SOON_NS
            await asyncio.sleep(pause_ns / SECOND_NS)

    def _look_at(self, lb: Lb, ready: bool | None) -> None:
        now_ns = time.monotonic_ns()
        if ready is None:
            lb.silent_ns = lb.silent_ns or now_ns
            if now_ns - lb.silent_ns > SILENT_NS:
                self._set_path(lb, False, "/readyz is silent")
            return
        lb.silent_ns = None
        if lb.join is not None and lb.join.answered_ns is None:
            lb.join.answered_ns = now_ns
        self._set_path(lb, ready, "/readyz says 200" if ready else "/readyz says 503")
        if not ready or lb.standing is not Standing.JOINING:
            return
        lb.standing = Standing.UP
        if lb.join is not None:
            lb.join.ready_ns = now_ns
        if lb.loss is not None:
            lb.loss.over_ns = lb.loss.over_ns or now_ns
        lb.join = lb.loss = None

    async def _look_at_leaving(self, lb: Lb, ready: bool | None) -> None:
        assert lb.leave is not None, "it was told to leave"
        if ready is False:
            self._set_path(lb, False, "/readyz says 503: it leaves")
        program = self._cluster.agents[lb.node.name]
        now_ns = time.monotonic_ns()
        if program.alive and now_ns - lb.leave.at_ns > LEAVE_WAIT_NS:
            self.overdue_count += 1
            program.kill()
        if program.alive:
            return
        lb.leave.ended_ns, lb.leave.status = now_ns, program.process.returncode
        took = (now_ns - lb.leave.at_ns) / SECOND_NS
        self._ledger.happened(now_ns, Kind.LEFT, f"{lb.node.name}, status {lb.leave.status}, after {took:.1f} s")
        self._set_path(lb, False, "its agent has ended")
        if lb.path:
            raise LabError(f"{lb.node.name} has left, and it was the last that the router could send to")
        self._vacant_count += 1
        await self._discard(lb)
