"""A small cluster is a real one with smaller tables: the bounds of ``core.limits``, lowered before anybody reads them.

Slots are independent of each other, so nothing can happen in 65,536 of them that cannot happen in 64; but with fewer
slots more happens in each, and a change costs the thousandth part. The same goes for ids: in a small space they come
round, and are given again, within one run. The bounds are constants that every module takes over by value; so this must
come before any other module of the core, and a simulation is a process of its own. Nothing in the core knows of it.

Left as they are: all times, and everything that the wire and the packets fix.
"""

import sys

from lbpod.core import limits

SLOT_COUNT_DEFAULT = 64

SMALL = {
    "VIPS_MAX": 16,
    "VIP_INDEX_COUNT": 112,
    "BACKENDS_MAX": 128,
    "BACKEND_IDS_MAX": 256,
    "NODES_MAX": 64,
    "MEMBERS_MAX": 32,
    "HANDOVER_RECORDS_MAX": 4,
    "WATCH_MAX": 2,
    "DUMP_CHUNK": 64,
    "PORTION_COST_MAX": 12,
}
"""What is lowered besides the number of slots, and to what."""


def shrink(slot_count: int) -> None:
    """Lower the bounds for the rest of this process. slot_count: a power of two, at most 2^16."""
    early = sorted(
        name for name in sys.modules if name.startswith("lbpod.core.") and name not in {limits.__name__, __name__}
    )
    assert not early, f"bounds are lowered before anybody reads them, but {early[0]} is here already"
    for name, bound in {**SMALL, "SLOT_COUNT": slot_count}.items():
        assert bound <= getattr(limits, name), f"{name} is lowered, not raised"
        setattr(limits, name, bound)
    limits.check()
