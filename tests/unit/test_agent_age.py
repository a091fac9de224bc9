"""The age of a question: never told younger than it is, whatever the two clocks show."""

import pytest
from hypothesis import given, strategies as st

from lbpod.agent.age import HEADER_CLOCK, Clocks, read_clock

TIMES = st.integers(0, 2**62)


@given(theirs=TIMES, ours=TIMES, home=st.integers(0, 2**40), pause=st.integers(0, 2**50), there=st.integers(0, 2**40))
def test_a_question_is_never_told_younger_than_it_is(theirs: int, ours: int, home: int, pause: int, there: int) -> None:
    """home: how long their answer came; pause: until the next question; there: how long that one takes."""
    clocks = Clocks()
    assert {} == clocks.headers("n2", ours)
    clocks.heard("n2", theirs, ours + home)
    told = read_clock(clocks.headers("n2", ours + home + pause)[HEADER_CLOCK])
    assert told is not None
    assert there + home == theirs + home + pause + there - told


def test_the_last_answer_counts_and_each_name_has_its_own() -> None:
    clocks = Clocks()
    clocks.heard("n2", 1000, 10)
    clocks.heard("n3", 5, 10)
    clocks.heard("n2", 7, 20)
    clocks.heard("n2", None, 30)
    clocks.heard("n2", 2**64 - 1, 30)
    assert {HEADER_CLOCK: "17"} == clocks.headers("n2", 30)
    assert {HEADER_CLOCK: "25"} == clocks.headers("n3", 30)
    assert {HEADER_CLOCK: "0"} == clocks.headers("n3", 1)


@pytest.mark.parametrize("text", [None, "", "-1", "1.5", "0x10", " 1", "1" * 21, "\u0661"])
def test_what_is_no_time_is_nothing(text: str | None) -> None:
    assert read_clock(text) is None
