"""The Planner's promises, whatever the network, the LBs, the disk and the clock do; see planner_cluster for the toy.

Safety is asserted inside the toy at each commit; here the runs are made, and afterwards, with all trouble over,
everything must come to rest at one generation that says what is wanted.

The examples are the same in each run, but for `make soak`: what is left to be found needs several misfortunes at once,
and belongs there."""

import os
from random import Random

from hypothesis import given, settings, strategies as st

from tests.property.planner_cluster import ToyCluster

MOST = settings.get_profile("holdfast").max_examples * 6 // 10
"""A run takes a tenth of a second, most of it for tables."""

SAME = not os.environ.get("HOLDFAST_SOAK")
"""The same examples each time."""


@settings(max_examples=MOST, derandomize=SAME)
@given(seed=st.integers(0, 2**32), steps=st.integers(0, 400))
def test_commits_only_what_all_have_prepared_and_converges(seed: int, steps: int) -> None:
    cluster = ToyCluster(Random(seed))
    cluster.run(steps)
    cluster.calm()
    assert cluster.settled(), cluster.controllers[0].status


@settings(max_examples=MOST // 2, derandomize=SAME)
@given(seed=st.integers(0, 2**32), steps=st.integers(0, 400))
def test_two_controllers_do_no_harm_and_agree_in_the_end(seed: int, steps: int) -> None:
    cluster = ToyCluster(Random(seed), controllers=2)
    cluster.run(steps)
    cluster.calm()
    assert cluster.settled(), [one.status for one in cluster.controllers]
