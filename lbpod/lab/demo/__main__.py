"""``python -m lbpod.lab.demo``: the show in the simulator. `holdfast demo` starts it where no real packets can be had.

A program of its own because a simulated cluster is one with smaller tables: the bounds are lowered before any module of
the core is imported (``lbpod.simulator.scale``), so everything else comes after that.
"""

import argparse
import sys
from pathlib import Path
from typing import Final

from lbpod.simulator import scale

SLOTS: Final = 1_024
"""Enough for slots with few flows each, as a real table has; a 64th of one, and as much quicker."""


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m lbpod.lab.demo", description="The demo, in the simulator.")
    parser.add_argument("--seconds", type=int, default=32)
    parser.add_argument("--long", type=int, default=300)
    parser.add_argument("--short-rate", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", action="append", default=[])
    chosen = parser.parse_args()
    scale.shrink(SLOTS)
    from rich.console import Console

    from lbpod.lab.demo.show import RUNS, Options
    from lbpod.lab.demo.simulated import show

    options = Options(
        seconds=chosen.seconds,
        long_count=chosen.long,
        short_rate=chosen.short_rate,
        seed=chosen.seed,
        json_file=chosen.json,
        runs=tuple(name for name in RUNS if not chosen.only or name in chosen.only),
    )
    return show(options, Console())


if __name__ == "__main__":
    sys.exit(main())
