"""Links between two load balancers, cut for a while, one way or both, while everybody else reaches both of them.

Each such cut is one more thing that goes on beside all others but for losses: what only two replicas know must not be
with one that is destroyed while the other could not be told. So a loss waits until all links have been whole for
REST_NS (``fleet``), and no link is cut while an LB is lost, or a loss waits.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from lbpod.lab.chaos.ledger import Kind, Ledger, LinkCut
from lbpod.lab.limits import SECOND_NS
from lbpod.lab.topology import Lab, Node

REST_NS: Final = 3 * SECOND_NS
"""After a cut: the two tell each other what they have missed, or do once a killed agent is back."""


class Links:
    """In the event loop's thread, but for the router's rules."""

    def __init__(self, lab: Lab, ledger: Ledger) -> None:
        self._lab = lab
        self._ledger = ledger

    @property
    def rested(self) -> bool:
        """No link is cut, and none was a moment ago."""
        soonest_ns = time.monotonic_ns() - REST_NS
        return all(cut.over_ns is not None and cut.over_ns <= soonest_ns for cut in self._ledger.link_cuts)

    def is_cut(self, one: Node, other: Node) -> bool:
        """One way or both."""
        names = {one.name, other.name}
        return any(cut.over_ns is None and {cut.sender, cut.receiver} == names for cut in self._ledger.link_cuts)

    async def cut(self, sender: Node, receiver: Node, away_ns: int, *, one_way: bool) -> None:
        """For ``away_ns``. The router loses what the one sends to the other, and unless ``one_way`` what comes back."""
        ways = [(sender, receiver)] if one_way else [(sender, receiver), (receiver, sender)]
        cut = LinkCut(time.monotonic_ns(), sender.name, receiver.name, one_way)
        self._ledger.link_cuts.append(cut)
        self._ledger.happened(cut.at_ns, Kind.LINK_CUT, f"{cut}, for {away_ns / SECOND_NS:.1f} s")
        for way in ways:
            await asyncio.to_thread(self._lab.part, *way)
        await asyncio.sleep(away_ns / SECOND_NS)
        for way in ways:
            await asyncio.to_thread(self._lab.rejoin, *way)
        cut.over_ns = time.monotonic_ns()
        self._ledger.happened(cut.over_ns, Kind.LINK_BACK, str(cut))
