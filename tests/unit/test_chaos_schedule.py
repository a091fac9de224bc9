"""A chaos run is decided by its seed, and keeps the promises that its verdict rests upon."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from lbpod.lab.chaos.options import Options
from lbpod.lab.chaos.schedule import BLIP_NS, LINK_CUT_NS, REST_NS, Act, How, Step, schedule
from lbpod.lab.limits import SECOND_NS

SEEDS = st.integers(0, 1_000_000)


def _of(steps: tuple[Step, ...], act: Act) -> list[Step]:
    return [step for step in steps if step.act is act]


def test_the_same_seed_gives_the_same_steps_and_another_seed_others() -> None:
    assert schedule(Options(seed=3)) == schedule(Options(seed=3))
    assert schedule(Options(seed=3)) != schedule(Options(seed=4))


@given(SEEDS)
@settings(max_examples=10)
def test_ten_minutes_hold_what_was_asked_for(seed: int) -> None:
    steps = schedule(Options(seed=seed, link_cut_seconds=6))
    counts = Counter(step.act for step in steps)
    assert 800 == counts[Act.CHANGE] + counts[Act.CRASH]
    assert 10 == counts[Act.CRASH]
    assert 30 == counts[Act.LOSS]
    assert 30 <= counts[Act.CONTROLLER_KILL] == 20 + 10
    assert 400 == counts[Act.RESHUFFLE]
    assert 85 == counts[Act.AGENT_KILL]
    assert 10 == counts[Act.LEAVE]
    assert 100 == counts[Act.LINK_CUT]
    lasting = [step for step in _of(steps, Act.LOSS) if step.how is not How.BLIP]
    assert len(lasting) + counts[Act.LEAVE] == counts[Act.JOIN]
    assert sorted(steps) == list(steps)
    assert all(0 <= step.at_ns < 600 * SECOND_NS for step in steps)


@given(SEEDS, st.sampled_from([1, 2, 5]))
@settings(max_examples=30)
def test_whoever_is_lost_for_good_is_followed_by_another_before_the_next_loss(seed: int, minutes: int) -> None:
    missing = 0
    for step in schedule(Options(minutes=minutes, seed=seed, leave_seconds=0)):
        if step.act is Act.JOIN:
            missing -= 1
        elif step.act is Act.LOSS:
            assert 0 == missing, "never two at once"
            assert 1 == step.count
            assert step.at_ns <= minutes * 60 * SECOND_NS - REST_NS + 2 * SECOND_NS
            if step.how is How.BLIP:
                assert BLIP_NS[0] <= step.away_ns <= BLIP_NS[1]
            else:
                missing += 1
    assert 0 == missing


def test_one_minute_loses_three_and_each_kind_comes_within_five_losses() -> None:
    assert 3 == len(_of(schedule(Options(minutes=1)), Act.LOSS))
    hows = [step.how for step in _of(schedule(Options(minutes=5)), Act.LOSS)]
    assert set(How) == set(hows[:5])


def test_every_third_loss_finds_the_controller_dead() -> None:
    steps = schedule(Options(minutes=5))
    third = _of(steps, Act.LOSS)[2]
    kills = [step for step in _of(steps, Act.CONTROLLER_KILL) if 0 < third.at_ns - step.at_ns <= SECOND_NS]
    assert any(kill.at_ns + kill.away_ns > third.at_ns + 5 * SECOND_NS for kill in kills)


def test_links_are_cut_one_way_and_both_ways_in_turn_and_the_other_steps_stay_as_they_were() -> None:
    steps = schedule(Options(minutes=5, link_cut_seconds=6))
    cuts = _of(steps, Act.LINK_CUT)
    assert {True: 25, False: 25} == Counter(step.one_way for step in cuts)
    assert all(LINK_CUT_NS[0] <= step.away_ns <= LINK_CUT_NS[1] for step in cuts)
    others = [replace(step, index=0) for step in steps if step.act is not Act.LINK_CUT]
    assert others == [replace(step, index=0) for step in schedule(Options(minutes=5))]


def test_two_are_lost_at_once_only_where_that_was_asked_for() -> None:
    losses = _of(schedule(Options(minutes=5, double_every=4)), Act.LOSS)
    assert [1, 1, 1, 2, 1, 1, 1, 2] == [loss.count for loss in losses[:8]]


def test_a_rate_of_nothing_is_never() -> None:
    quiet = Options(
        changes_per_minute=0,
        crashes_per_minute=0,
        loss_seconds=0,
        leave_seconds=0,
        agent_kill_seconds=0,
        controller_kill_seconds=0,
        reshuffle_seconds=0,
    )
    assert () == schedule(quiet)


@pytest.mark.parametrize("wrong", [{"lbs": 2}, {"minutes": 0}, {"backends": 3}, {"interval_ms": 20_000}])
def test_options_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(AssertionError):
        Options(**wrong)
