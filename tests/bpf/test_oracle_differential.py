"""The C program against the oracle: two readings of one set of rules, on random frames and map states.

This is what makes the oracle worth reading and the C program worth trusting: both were written from
``lbpod/bpf/README.md`` without looking at each other, so where they agree on everything that a frame does, a rule would
have to be misread twice in the same way. More than 100,000 frames in ``make test``, a hundred times as many in
``make soak``; each world is drawn from one number, which a failure prints with the command that replays it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbpod.core.verdicts import Verdict
from tests.bpf.compare import ANOTHERS, FRAMES_PER_WORLD_COUNT, OURS, SEED_ENV, Place, Seen, run_world
from tests.bpf.kernel_side import Kernel, loaded

SOAK_FACTOR = 100 if os.environ.get("HOLDFAST_SOAK") == "1" else 1
WORLDS_PER_TEST = 50
XDP_TESTS = 6 * SOAK_FACTOR
TC_TESTS = 1 * SOAK_FACTOR
assert XDP_TESTS * WORLDS_PER_TEST * FRAMES_PER_WORLD_COUNT >= 100_000 * SOAK_FACTOR, "as many as the README promises"

OUT_OF_REACH = {
    Verdict.DROP_UNSERVED: "hf_tc's",
    Verdict.REPLY: "hf_tc's",
}

WHOSE = {(place, relayed): ANOTHERS for place in Place for relayed in (False, True)} | {
    (Place.OWN, False): OURS,
    (Place.OWN, True): OURS,
    (Place.NEXT_ONLY, True): OURS,
    (Place.PREV_ONLY, True): OURS,
    (Place.BOTH, True): OURS,
}
"""Whose rules decide: in next or prev alone, ours only for what came by RELAY. Who decides relays, too, what the other
replica knows better: an owner that has asked its backup to settle, and all who have but an old SYN of it."""
EVERYWHERE = {Verdict.CACHE_HIT, Verdict.RELAYED, Verdict.RECORD_HIT, Verdict.CHAIN_STARTED}
"""Frequent enough to be seen in every place."""

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    if os.geteuid() != 0:
        pytest.skip("missing feature: root")
    with loaded(Path(f"/sys/fs/bpf/holdfast-oracle-{os.getpid()}")) as kernel:
        yield kernel


def _worlds(part: int, parts: int) -> range | list[int]:
    """Seeds of one test; or the one that is to be replayed."""
    if SEED_ENV in os.environ:
        return [int(os.environ[SEED_ENV])]
    assert part < parts
    return range(part * WORLDS_PER_TEST, (part + 1) * WORLDS_PER_TEST)


@pytest.mark.parametrize("part", range(XDP_TESTS))
def test_xdp(kernel: Kernel, part: int) -> None:
    seen = Seen()
    for seed in _worlds(part, XDP_TESTS):
        run_world(kernel, seed, "xdp", seen)
    if SEED_ENV not in os.environ:
        assert set(Verdict) - OUT_OF_REACH.keys() == set(seen.verdicts), "every way out of the program was taken"
        assert 0.5 > seen.verdicts[Verdict.PASS_OTHER] / seen.frames, "most frames are for us"
        for (place, relayed), rules in WHOSE.items():
            got = {verdict for verdict in Verdict if seen.decided[place, relayed, verdict]}
            assert rules | {Verdict.RELAYED} >= got >= rules & EVERYWHERE, f"{place}, relayed: {relayed}"


@pytest.mark.parametrize("part", range(TC_TESTS))
def test_tc(kernel: Kernel, part: int) -> None:
    seen = Seen()
    for seed in _worlds(part, TC_TESTS):
        run_world(kernel, seed, "tc", seen)
    if SEED_ENV not in os.environ:
        assert 0.4 < seen.verdicts[Verdict.REPLY] / seen.frames < 0.9, "many replies, and other things"
        assert seen.verdicts[Verdict.DROP_UNSERVED] > 100, "what would go round"
