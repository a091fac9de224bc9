"""The figures of DESIGN section 7: how even the table is, and how little of it moves when a backend goes.

The table is a pure function, so its figures are exact: the same on every machine, every time. The bound on the fullest
backend holds by construction and is asserted as an integer; means over four seeds and four removals each are what the
design quotes. Times are no matter for a test (``tests/bench/bench_table.py`` has them).
"""

import numpy as np
import pytest

from lbpod.core.limits import SLOT_COUNT
from lbpod.core.table import Builder, Slack
from tests.bench import bench_table

DESIGN = [
    # slack, N, balance, disruption
    (Slack(1, 20), 10, 1.02, 1.0),
    (Slack(1, 20), 100, 1.05, 1.0),
    (Slack(1, 20), 1000, 1.05, 1.5),
    (Slack(1, 10), 10, 1.02, 1.0),
    (Slack(1, 10), 100, 1.10, 1.0),
    (Slack(1, 10), 1000, 1.11, 1.2),
]


@pytest.mark.parametrize(("slack", "count", "balance", "disruption"), DESIGN)
def test_balance_and_disruption_are_those_of_the_design(
    slack: Slack, count: int, balance: float, disruption: float
) -> None:
    backends = bench_table.backends_of(count)
    most = -(-SLOT_COUNT * (slack.denominator + slack.numerator) // (slack.denominator * count))
    balances, disruptions = [], []
    for seed in bench_table.SEEDS:
        builder = Builder(seed, slack)
        before = builder.update(backends).current
        assert most >= np.bincount(before).max()
        balances.append(bench_table.balance(before, count))
        for position in bench_table.removals(count):
            after = builder.update(backends[:position] + backends[position + 1 :]).current
            disruptions.append(bench_table.disruption(before, after, backends[position].id))
    assert balance == pytest.approx(np.mean(balances), abs=0.01)
    assert disruption == round(float(np.mean(disruptions)), 1)


@pytest.mark.parametrize(
    ("slack", "count", "fullest", "moved", "least"),
    [
        (Slack(1, 20), 10, 6723, 6723, 6723),
        (Slack(1, 20), 100, 689, 709, 678),
        (Slack(1, 20), 1000, 69, 101, 69),
        (Slack(1, 10), 10, 6723, 6723, 6723),
        (Slack(1, 10), 100, 721, 677, 676),
        (Slack(1, 10), 1000, 73, 87, 73),
    ],
)
def test_the_counts_are_exact(slack: Slack, count: int, fullest: int, moved: int, least: int) -> None:
    """Seed 0, the backend in the middle goes: slots of the fullest backend, slots moved, slots that had to."""
    backends = bench_table.backends_of(count)
    gone = backends[count // 2]
    builder = Builder(0, slack)
    before = builder.update(backends).current
    after = builder.update([b for b in backends if b is not gone]).current
    counts = (np.bincount(before).max(), (before != after).sum(), (before == gone.id).sum())
    assert (fullest, moved, least) == counts


def test_plain_rendezvous_moves_the_least_but_is_not_even() -> None:
    """What the bound is for."""
    balance, disruption = bench_table.quality(bench_table.plain_rendezvous, 1000, seeds=(0,))
    assert 1.0 == disruption
    assert balance > 1.3


def test_maglev_is_even_but_moves_much() -> None:
    """What the bound is not to cost."""
    backends = bench_table.backends_of(1000)
    before = bench_table.maglev(backends, 0)
    after = bench_table.maglev(backends[1:], 0)
    assert bench_table.balance(before, 1000) < 1.01
    assert bench_table.disruption(before, after, backends[0].id) > 5
