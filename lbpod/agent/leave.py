"""Leaving the ring before the end: what SIGTERM means to an LB that has not been told to stay.

Decided here: the order. First /readyz says 503, and for the withdraw time nothing else happens: whoever announces the
VIPs looks there, and this LB decides about every packet that still comes. Then the Keeper asks to be taken out of the
ring (its status says `leaving`), the controller changes the ring, this LB hands over, and once it is out nobody misses
it. A controller that does not come is waited for LEAVE_NS_MAX, then the agent ends all the same: its programs go on
forwarding, and the others take it for lost.

A SIGTERM may come while the state that an earlier agent left is being restored: until that is done nobody can tell
whether this LB is in a ring, so it is waited for first. LEAVE_NS_MAX is for both together: more than that nobody who
ends an agent gives it.

Whoever shares a ring with nobody (a node that runs only a host agent, the only LB, one that was never joined) has
nobody to hand over to, and ends at once.
"""

import asyncio
from enum import Enum

import structlog

from lbpod.agent.clock import now_ns
from lbpod.agent.driver import Driver
from lbpod.core.limits import LEAVE_NS_MAX, TICK_NS
from lbpod.core.messages import LeaveWanted, RingStep

_LOG = structlog.get_logger()


class Left(Enum):
    """How it ended."""

    ALONE = "there is no other load balancer to hand over to"
    OUT = "it is out of the ring"
    NOT_RESTORED = "what an earlier agent left has not been restored in time; forwarding goes on without the agent"
    NOT_HEARD = "the controller has not taken it out of the ring in time; forwarding goes on without the agent"


async def leave(driver: Driver, started: asyncio.Event, withdraw_ns: int) -> Left:
    """Returns when this LB need not be waited for any more. started: what there was to restore is restored, and the
    controller can reach this agent."""
    driver.leaving = True
    began_ns = now_ns()
    try:
        async with asyncio.timeout(LEAVE_NS_MAX * 1e-9):
            await started.wait()
    except TimeoutError:
        return Left.NOT_RESTORED
    restored_ns = now_ns()
    if not driver.beliefs.others:
        return Left.ALONE
    _LOG.info("leaving", withdraw_ms=withdraw_ns // 1_000_000)
    await asyncio.sleep(withdraw_ns * 1e-9)
    driver.post(LeaveWanted())
    until_ns = now_ns() + LEAVE_NS_MAX - (restored_ns - began_ns)
    while driver.status.serving or driver.status.ring_step is not RingStep.NONE:
        if now_ns() >= until_ns:
            return Left.NOT_HEARD
        # The status is as of the last tick.
        await asyncio.sleep(TICK_NS * 1e-9)
    return Left.OUT
