"""Which of many VIPs that have changed one generation changes, and which wait for the next ones.

A generation is as slow as the tables that are built for it, at the controller and then at every LB, and nobody else's
change comes into force meanwhile. So one that brings, say, four hundred new VIPs is made in several, each of a bounded
number of tables, and what is wanted meanwhile joins those that wait. Which tables those are never matters to safety: a
generation may change any of them. Only the first ring begins with all at once (``snapshot``): no other change
waits for it, and an LB that says it is ready serves whatever there is.

Invariants: the served one whose table is the oldest and the first of the new ones go with every generation, whatever
they cost and whatever else goes, so that neither kind starves the other; of all others, what is served goes before what
is new, three to one where both wait, until the cost is used up. As the oldest table goes first, a VIP that changes all
the time is no more often in turn than others. A VIP that cannot stay as it is, for a node of its backends has gone,
never waits; nor does one that is newer than what is in force, for it may be what somebody refuses: whatever mends it
must not wait behind it. One that moves to another address or port under its name is a served one, and is served where
it was until it is its turn (``snapshot``).

Among the new ones the order is that of their addresses: one whose address is lower overtakes those that wait.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

from lbpod.core.limits import PORTION_COST_MAX, PORTION_VIP_COST
from lbpod.core.model import Vip, WorldVip

_SERVED_TO_NEW = 3


class Changed(NamedTuple):
    """A VIP that differs. wanted: as it is to be; had: as it is, perhaps at another place that it is to leave, None:
    there is none yet."""

    wanted: WorldVip
    had: Vip | None


def portion(
    changed: Sequence[Changed], nodes: Collection[int], in_force: int, cost_max: int = PORTION_COST_MAX
) -> tuple[list[Changed], list[Changed]]:
    """Those of the next generation, one at least, and those that wait.

    nodes: ids of those that the next snapshot lists. in_force: generation that is. cost_max: in backends, each VIP
    itself PORTION_VIP_COST.
    """
    if sum(map(_cost, changed)) <= cost_max:
        return list(changed), []
    staying = set(nodes)
    now: list[Changed] = []
    served: list[Changed] = []
    new: list[Changed] = []
    for one in changed:
        if one.had is None:
            new.append(one)
        else:
            may_wait = one.had.epoch <= in_force and _nodes_of(one.had) <= staying
            (served if may_wait else now).append(one)
    served.sort(key=_age)
    heads = (*served[:1], *new[:1])
    later, left = [], cost_max - sum(map(_cost, now))
    for one in _in_turn(served, new):
        if left > 0 or any(one is head for head in heads):
            now.append(one)
        else:
            later.append(one)
        left -= _cost(one)
    return now, later


def _cost(one: Changed) -> int:
    return PORTION_VIP_COST + len(one.wanted.backends)


def _nodes_of(vip: Vip) -> set[int]:
    return {backend.node for backend in vip.backends}


def _age(one: Changed) -> int:
    assert one.had is not None, "it is served"
    return one.had.epoch


def _in_turn(served: Sequence[Changed], new: Sequence[Changed]) -> Iterator[Changed]:
    """All of both, _SERVED_TO_NEW of the former and one of the latter in turn."""
    old, fresh = iter(served), iter(new)
    while group := list(chain(islice(old, _SERVED_TO_NEW), islice(fresh, 1))):
        yield from group
