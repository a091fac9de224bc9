"""The simulator on many seeds, on those that have failed once, and on itself: the same number, the same story.

Each run is a process of its own, for a simulation lowers bounds that the rest of the tests take as they are.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SOAK_FACTOR

SEEDS_COUNT = 1_000 * SOAK_FACTOR
BATCH_COUNT = 100 * SOAK_FACTOR
KEPT = Path(__file__).with_name("seeds.txt")
OPEN = Path(__file__).with_name("open.txt")
ROOT = Path(__file__).parents[2]


def simulate(*args: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lbpod.simulator", *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=False,
    )


def listed(path: Path) -> list[str]:
    """The seeds of a list, as written."""
    lines = (line.split() for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return [line[0] for line in lines]


def failing(said: str) -> set[int]:
    """The seeds that many of them named as failing."""
    lines = [line.split(":")[1] for line in said.splitlines() if line.startswith("failing seeds:")]
    return {int(number) for line in lines for number in line.split()}


@pytest.mark.parametrize("first", range(1, SEEDS_COUNT, BATCH_COUNT))
def test_every_seed_keeps_every_promise_but_those_that_are_open(first: int) -> None:
    """Strict both ways: no other breaks one, and an open one that has been mended leaves the list."""
    done = simulate("--seeds", f"{first}..{first + BATCH_COUNT - 1}")
    still_open = {int(seed) for seed in listed(OPEN)} & set(range(first, first + BATCH_COUNT))
    assert still_open == failing(done.stderr), done.stderr
    assert done.returncode == int(bool(still_open)), done.stderr


def test_what_has_failed_once_fails_no_more() -> None:
    by_slots: dict[str, list[str]] = {}
    for seed in listed(KEPT):
        number, _, slots = seed.partition("/")
        by_slots.setdefault(slots or "64", []).append(number)
    for slots, seeds in by_slots.items():
        done = simulate("--slots", slots, "--seeds", ",".join(seeds))
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("slots", ["16", "256"])
def test_other_numbers_of_slots_work_as_well(slots: str) -> None:
    done = simulate("--slots", slots, "--seeds", "1..10")
    assert done.returncode == 0, done.stderr


def test_the_same_number_tells_the_same_story() -> None:
    one, other = (simulate("17", hash_seed=hash_seed) for hash_seed in ("1", "2"))
    assert one.returncode == other.returncode
    assert one.stdout == other.stdout
    assert one.stdout.splitlines()[-1].endswith("-m lbpod.simulator 17")
    assert len(one.stdout.splitlines()) > 200


def test_a_seed_comes_out_the_same_alone_and_among_others() -> None:
    alone = simulate("--seeds", "17", "--jobs", "1")
    again = simulate("--seeds", "17", "--jobs", "2")
    assert alone.stderr.splitlines()[-2].split("): ")[1] == again.stderr.splitlines()[-2].split("): ")[1]


@pytest.mark.parametrize(("args", "sentence"), [(["--seeds", "3..x"], "3..x"), (["--slots", "60", "1"], "'60'")])
def test_what_is_no_seed_is_refused_in_a_sentence(args: list[str], sentence: str) -> None:
    done = simulate(*args)
    assert done.returncode == 2
    assert sentence in done.stderr.splitlines()[-1]
