"""How Linux spreads flows over next hops, and how to shuffle them so that many flows move.

The kernel hashes the five-tuple to 31 bits and cuts that range into one interval per next hop, in their order, as long
as their weights say (hash threshold, RFC 2992). So the *order* decides who gets which flow, and a permutation moves
flows without changing anybody's share. No I/O here: plain arithmetic over the intervals.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Generic, TypeVar

from lbpod.lab.limits import NEXTHOP_WEIGHT_MAX

NodeT = TypeVar("NodeT")

_TRIES: Final = 16
"""Permutations drawn; the one that moves most is taken. One alone moves nothing in 1 of n! cases."""


@dataclass(frozen=True)
class NextHop(Generic[NodeT]):
    node: NodeT
    weight: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.weight <= NEXTHOP_WEIGHT_MAX:
            raise ValueError(f"weight {self.weight} is not in 1 ... {NEXTHOP_WEIGHT_MAX}")


def moved_share(before: Sequence[NextHop[NodeT]], after: Sequence[NextHop[NodeT]]) -> float:
    """Share of the hash space (0 ... 1) whose node differs. Neither list is empty."""
    stays = Fraction(0)
    for old, old_start, old_end in _intervals(before):
        for new, new_start, new_end in _intervals(after):
            if old == new:
                stays += max(Fraction(0), min(old_end, new_end) - max(old_start, new_start))
    return float(1 - stays)


def _intervals(hops: Sequence[NextHop[NodeT]]) -> list[tuple[NodeT, Fraction, Fraction]]:
    total = sum(hop.weight for hop in hops)
    result, start = [], 0
    for hop in hops:
        result.append((hop.node, Fraction(start, total), Fraction(start + hop.weight, total)))
        start += hop.weight
    return result


def best_shuffle(
    before: Sequence[NextHop[NodeT]], rng: random.Random, weight_max: int | None
) -> tuple[tuple[NextHop[NodeT], ...], float]:
    """A permutation of ``before`` (with new weights up to ``weight_max`` if given) and the share that it moves."""
    candidates = [_shuffled(before, rng, weight_max) for _ in range(_TRIES)]
    best = max(candidates, key=lambda after: moved_share(before, after))
    return best, moved_share(before, best)


def _shuffled(
    before: Sequence[NextHop[NodeT]], rng: random.Random, weight_max: int | None
) -> tuple[NextHop[NodeT], ...]:
    order = rng.sample(list(before), len(before))
    if weight_max is None:
        return tuple(order)
    return tuple(NextHop(hop.node, rng.randint(1, weight_max)) for hop in order)
