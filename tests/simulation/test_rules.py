"""Every rule is needed: the simulator with one of them taken out finds a promise broken, and with it finds none.

A rule has a world of its own (``worlds``) in which it is needed soon: within SEEDS_COUNT seeds. Here is one that shows
it; it is tried first, for what a seed plays changes with every change of the core. The same seed, with the rule in its
place, keeps every promise. What is broken must be what one expects of that rule: a flow that moves, a slot that is
called steady and is not, tracking without an end.

    python -m tests.simulation.without RULE 1..100

finds such seeds anew, and so does HOLDFAST_SOAK=1. Each run is a process of its own, which is patched for good.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SOAK_FACTOR

ROOT = Path(__file__).parents[2]
SEEDS_COUNT = 16

MOVES = r"\S+ belongs to \S+, and its .* reached \S+"
"""A packet of a live flow reaches another pod."""

UNSURE = r"\S+ turns slot \d+ of \S+ steady, where .* belongs to \S+"
"""A slot is called steady whose flows do not all belong to its backend."""

ENDLESS = r"within \d+ s it does not come about that no slot is tracking any more"

NEEDED = {
    "prepare": (1, UNSURE),
    "relay": (1, MOVES),
    "chain": (1, MOVES),
    "chain-extension": (19, MOVES),
    "prev": (3, MOVES),
    "repeated-handover": (3, MOVES),
    "lease": (1, UNSURE),
    "owners-stamp": (5, UNSURE),
    "chain-again": (1, MOVES),
    "quiet-time": (1, UNSURE),
    "ask-settle": (1, UNSURE),
    "ask-forget": (1, MOVES),
    "own-look": (1, UNSURE),
    "backup-steady-first": (48, MOVES),
    "open-settle": (25, MOVES),
    "take-over": (19, MOVES),
    "count-anew": (92, UNSURE),
    "doubtful": (4, MOVES),
    "asked-syn": (2, MOVES),
    "syn-lease": (77, MOVES),
    "begun-alone": (102, MOVES),
    "turn-back": (125, MOVES),
    "mute": (33, MOVES),
    "open-base": (77, MOVES),
    "unrecorded-base": (1, MOVES),
    "unrecorded-drop": (7, UNSURE),
    "dead-base": (1, MOVES),
    "udp-rebase": (2, ENDLESS),
}
"""Rule -> a seed of its world that shows that it is needed, and what is broken without it."""


def search(rule: str, *seeds: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation.without", rule, *seeds],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("rule", NEEDED)
def test_without_one_rule_a_promise_is_broken_and_with_it_none(rule: str) -> None:
    seed, broken = NEEDED[rule]
    known_first = [str(seed)] if SOAK_FACTOR == 1 else []
    done = search(rule, *known_first, f"1..{SEEDS_COUNT * SOAK_FACTOR}")
    said = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(rf"without {rule}: seed \d+: Violation: {broken}", said[-1])


def test_every_rule_that_can_be_taken_out_is_shown_to_be_needed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation.without", "--list"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(NEEDED) == done.stdout.split()


def test_the_readme_of_the_simulator_has_every_rule_with_its_seed_and_how_it_breaks() -> None:
    words = {MOVES: "moves", UNSURE: "unsure", ENDLESS: "endless"}
    text = (ROOT / "lbpod" / "simulator" / "README.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| [^|]+ \| (\d+) \| (\w+) \|$", text, re.MULTILINE)
    assert sorted(rows) == sorted((rule, str(seed), words[broken]) for rule, (seed, broken) in NEEDED.items())


def test_nothing_is_found_where_nothing_is_taken_out() -> None:
    """The patch alone makes the difference, not the world, nor that there are two processes."""
    done = search("nothing", "1..2")
    assert (1, "without nothing: 2 seeds show no need of it\n") == (done.returncode, done.stdout)
