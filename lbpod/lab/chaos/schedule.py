"""What happens when, as data drawn from one seed: so a run can be read before it is played, and played again.

Decided here: the moments, and which kind of loss; which load balancer or backend it hits is drawn when it is played,
among those that are there. Times count from the end of the quiet time.

Invariants: by default no two load balancers are lost at once; from each loss to the next there is a join; no load
balancer is lost in the last ``REST_NS``, so that what it costs is still measured; every third loss finds the
controller dead.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from typing import Final

from lbpod.lab.chaos.options import Options
from lbpod.lab.limits import MS_NS, SECOND_NS

REST_NS: Final = 12 * SECOND_NS
FIRST_LOSS_NS: Final = 2 * SECOND_NS
CONTROLLER_AWAY_NS: Final = (SECOND_NS, 8 * SECOND_NS)
"""For how long a killed controller stays away: from, to."""
WITHOUT_CONTROLLER_EVERY: Final = 3
"""Every so many losses happen while the controller is dead."""
BLIP_NS: Final = (1_500 * MS_NS, 4_500 * MS_NS)
"""For how long an LB that is cut off briefly is away: never long enough to be taken out of the ring."""
LINK_CUT_NS: Final = (100 * MS_NS, 4 * SECOND_NS)
"""For how long two LBs do not reach each other: from what no beat notices to where both have long believed it."""


class Act(Enum):
    """One thing that happens."""

    CHANGE = "backend change"
    CRASH = "backend dies"
    LOSS = "LB lost"
    JOIN = "LB joins"
    LEAVE = "LB leaves"
    AGENT_KILL = "agent killed"
    CONTROLLER_KILL = "controller killed"
    RESHUFFLE = "ECMP reshuffle"
    LINK_CUT = "link cut"
    """Between two LBs, while clients, hosts and the controller reach both."""


class How(StrEnum):
    """In what way an LB is lost."""

    DESTROYED = "destroyed"
    """Its machine burns; another one joins under another name."""
    CUT_OFF = "cut off"
    """Not a packet comes through, nobody is told; later the same machine is back with all that it knew."""
    BLIP = "cut off briefly"
    """The same, for so short a time that it never leaves the ring."""


_BAG: Final = (How.DESTROYED, How.CUT_OFF, How.BLIP, How.DESTROYED, How.CUT_OFF)
"""Drawn from without putting back, so that a short run has all of them."""


@dataclass(frozen=True, order=True)
class Step:
    """``at_ns``: since the quiet time ended; ``index``: tells steps of the same moment apart."""

    at_ns: int
    index: int
    act: Act
    how: How | None = None
    """Of a loss."""
    count: int = 1
    """Of a loss: LBs that are lost at once."""
    away_ns: int = 0
    """Of a controller that is killed, an LB that is cut off briefly, or a link that is cut: for how long."""
    one_way: bool = False
    """Of a link that is cut: only what the one sends is lost, not what the other one sends."""


def schedule(options: Options) -> tuple[Step, ...]:
    """The steps of a run, in order of time."""
    rng = random.Random(f"chaos {options.seed}")
    steps = [
        *_every(rng, options, Act.CHANGE, _period_ns(options.changes_per_minute - options.crashes_per_minute)),
        *_every(rng, options, Act.CRASH, _period_ns(options.crashes_per_minute)),
        *_every(rng, options, Act.AGENT_KILL, _seconds(options.agent_kill_seconds)),
        *_every(rng, options, Act.RESHUFFLE, _seconds(options.reshuffle_seconds)),
        *_losses(rng, options),
        *_leaves(options),
        *_link_cuts(options),
        *(
            replace(step, away_ns=rng.randint(*CONTROLLER_AWAY_NS))
            for step in _every(rng, options, Act.CONTROLLER_KILL, _seconds(options.controller_kill_seconds))
        ),
    ]
    steps.sort(key=lambda step: step.at_ns)
    return tuple(replace(step, index=index) for index, step in enumerate(steps))


def _seconds(count: float) -> int:
    """Rounded down, so that as many periods fit into a run as were asked for."""
    return int(count * SECOND_NS)


def _period_ns(per_minute: float) -> int:
    return _seconds(60 / per_minute) if per_minute > 0 else 0


def _every(rng: random.Random, options: Options, act: Act, period_ns: int) -> Iterator[Step]:
    """Once in each period, somewhere in it."""
    if period_ns > 0:
        for start_ns in range(0, options.length_ns - period_ns + 1, period_ns):
            yield Step(start_ns + rng.randrange(period_ns), 0, act)


def _losses(rng: random.Random, options: Options) -> Iterator[Step]:
    """A loss at the beginning of each period, a join before its end (a brief cut ends by itself)."""
    period_ns = _seconds(options.loss_seconds)
    bag: list[How] = []
    if period_ns <= 0:
        return
    starts = range(FIRST_LOSS_NS, options.length_ns - REST_NS + 1, period_ns)
    for number, start_ns in enumerate(starts, start=1):
        if not bag:
            bag = rng.sample(_BAG, len(_BAG))
        how = bag.pop()
        count = 2 if options.double_every > 0 and number % options.double_every == 0 else 1
        at_ns = start_ns + rng.randrange(max(1, period_ns // 10))
        if number % WITHOUT_CONTROLLER_EVERY == 0 and options.controller_kill_seconds > 0:
            yield Step(at_ns - 500 * MS_NS, 0, Act.CONTROLLER_KILL, away_ns=CONTROLLER_AWAY_NS[1])
        away_ns = min(rng.randint(*BLIP_NS), period_ns // 2) if how is How.BLIP else 0
        yield Step(at_ns, 0, Act.LOSS, how, count, away_ns)
        if how is not How.BLIP:
            for _ in range(count):
                yield Step(start_ns + period_ns * 45 // 100, 0, Act.JOIN)


def _leaves(options: Options) -> Iterator[Step]:
    """Between a join and the next loss; who comes instead does so a little later."""
    beat_ns = _seconds(options.loss_seconds) or _seconds(options.leave_seconds)
    first_ns = FIRST_LOSS_NS + beat_ns * 65 // 100
    if options.leave_seconds > 0:
        for at_ns in range(first_ns, options.length_ns - REST_NS + 1, _seconds(options.leave_seconds)):
            yield Step(at_ns, 0, Act.LEAVE)
            yield Step(at_ns + beat_ns * 20 // 100, 0, Act.JOIN)


def _link_cuts(options: Options) -> Iterator[Step]:
    """One in each period, every other one one way only. Dice of their own, so that a seed's other steps stay."""
    rng = random.Random(f"links {options.seed}")
    for number, step in enumerate(_every(rng, options, Act.LINK_CUT, _seconds(options.link_cut_seconds))):
        yield replace(step, away_ns=rng.randint(*LINK_CUT_NS), one_way=number % 2 == 1)
