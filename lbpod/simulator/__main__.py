"""``python -m lbpod.simulator SEED`` tells the story of one seed; ``--seeds 1..1000`` plays many, on all cores.

Nothing but the standard library may be imported before the bounds are lowered (``scale``), so the rest comes inside.
"""

import argparse
import os
import sys

from lbpod.simulator import scale


def _seeds(text: str) -> list[int]:
    """``1..1000``, or ``3,17,42``, or both."""
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        if not first.isdecimal() or not (last.isdecimal() if dots else not last):
            raise argparse.ArgumentTypeError(f"{part!r} is neither a seed nor a range like 1..1000")
        found += range(int(first), int(last or first) + 1)
    return found


def _slots(text: str) -> int:
    if not text.isdecimal() or int(text).bit_count() != 1 or int(text) > 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a power of two up to 65536")
    return int(text)


def main() -> int:
    """The exit status: 0: all promises were kept; 1: not by every seed."""
    parser = argparse.ArgumentParser(
        prog="python -m lbpod.simulator",
        description="A whole cluster in one process, on virtual time: backends and load balancers come, go and die, "
        "and no live connection may break. One number replays a run exactly.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("seed", nargs="?", type=int, help="play this seed and print its transcript")
    which.add_argument("--seeds", type=_seeds, metavar="A..B", help="play many seeds, on all cores")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (as many as there are cores)")
    parser.add_argument(
        "--slots", type=_slots, default=scale.SLOT_COUNT_DEFAULT, help="slots of a table (%(default)s): fewer is faster"
    )
    chosen = parser.parse_args()
    scale.shrink(chosen.slots)
    from lbpod.simulator import report

    if chosen.seeds is None:
        return report.tell(chosen.seed, chosen.slots)
    return report.play(chosen.seeds, max(chosen.jobs, 1), chosen.slots)


if __name__ == "__main__":
    sys.exit(main())
