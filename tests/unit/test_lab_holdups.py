"""What a loss cost is reckoned from the requests that it held up, and from no others."""

from lbpod.lab.check_holdups import HELD_NS, MARK_WINDOW_NS, Holdups, Mark, MarkFigures, Marks

MS = 1_000_000
LOSS = Mark(1, 1_000 * MS)


def _asked(holdups: Holdups, flow: int, sent_ms: int, answered_ms: int) -> None:
    holdups.sent(flow, sent_ms * MS)
    holdups.answered(flow, answered_ms * MS)


def test_a_flow_that_nothing_held_up_gives_no_figure() -> None:
    holdups = Holdups()
    _asked(holdups, 1, 990, 1_001)
    _asked(holdups, 1, 1_100, 1_101)
    assert MarkFigures(1, (), 0) == holdups.figures(LOSS)


def test_what_counts_is_from_the_loss_to_the_answer_of_the_last_request_held_up() -> None:
    holdups = Holdups()
    _asked(holdups, 1, 980, 1_001)  # answered at once: its packet had passed before
    _asked(holdups, 1, 1_050, 1_450)  # the path is dead
    _asked(holdups, 1, 1_500, 1_501)
    _asked(holdups, 1, 1_600, 1_900)  # the owner is dead
    _asked(holdups, 2, 995, 1_200)  # under way when it happened
    _asked(holdups, 3, 500, 800)  # over before
    _asked(holdups, 4, 3_001, 3_500)  # sent when the window was over
    assert MarkFigures(4, (200 * MS, 900 * MS), 0) == holdups.figures(LOSS)


def test_an_answer_that_comes_just_before_the_first_retransmission_could_is_none() -> None:
    holdups = Holdups()
    holdups.sent(1, LOSS.at_ns)
    holdups.answered(1, LOSS.at_ns + HELD_NS - 1)
    holdups.sent(2, LOSS.at_ns)
    holdups.answered(2, LOSS.at_ns + HELD_NS)
    assert (HELD_NS,) == holdups.figures(LOSS).held_ns


def test_a_mark_waits_for_the_answers_and_not_for_ever() -> None:
    holdups, marks = Holdups(), Marks(wait_ns=5_000 * MS)
    groups = {"long": holdups}
    end_ns = LOSS.at_ns + MARK_WINDOW_NS
    marks.add(LOSS)
    holdups.sent(1, end_ns)
    assert [] == marks.due(groups, end_ns + HELD_NS)
    assert [] == marks.due(groups, end_ns + 5_000 * MS - 1)
    assert [LOSS] == marks.due(groups, end_ns + 5_000 * MS)
    assert MarkFigures(1, (), 1) == holdups.figures(LOSS)
    assert [] == marks.due(groups, end_ns + 9_000 * MS), "reckoned once"


def test_a_mark_is_due_once_all_are_answered_or_gone() -> None:
    holdups, marks = Holdups(), Marks(wait_ns=5_000 * MS)
    end_ns = LOSS.at_ns + MARK_WINDOW_NS
    marks.add(LOSS)
    holdups.sent(1, LOSS.at_ns)
    holdups.sent(2, LOSS.at_ns)
    holdups.answered(1, LOSS.at_ns + 700 * MS)
    assert [] == marks.due({"long": holdups}, end_ns + HELD_NS)
    holdups.over(2)
    assert [] == marks.due({"long": holdups}, end_ns + HELD_NS - 1), "what is sent last may yet be held up"
    assert [LOSS] == marks.due({"long": holdups}, end_ns + HELD_NS)
    assert MarkFigures(1, (700 * MS,), 0) == holdups.figures(LOSS)


def test_who_waits_is_counted_from_some_age_on_and_no_longer_than_it_waits() -> None:
    holdups = Holdups()
    holdups.sent(1, 1_000 * MS)
    holdups.sent(2, 1_001 * MS)
    _asked(holdups, 3, 900, 1_000)
    assert 1 == holdups.unanswered(1_000 * MS)
    holdups.over(1)
    assert 0 == holdups.unanswered(1_000 * MS)
