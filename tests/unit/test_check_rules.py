"""Whose fault a failure is: what the judge of the checking client excuses, and what it does not."""

from dataclasses import replace

from hypothesis import given, strategies as st

from lbpod.lab.check_rules import Failure, Judge, Reason, Tally, Verdict
from lbpod.lab.limits import CHECK_GRACE_NS, CHECK_LOST_WITH_NS, MS_NS, SECOND_NS

LATER_NS = 1_000 * SECOND_NS
GONE_NS = 100 * SECOND_NS


def _failure(
    at_ns: int,
    backend: str | None,
    reason: Reason = Reason.RESET,
    *,
    opened_ns: int | None = None,
    asked_ns: int | None = None,
    failed_ns: int | None = None,
) -> Failure:
    """By default it was opened, asked and failed at the moment when it was noticed."""
    opened_ns = at_ns if opened_ns is None else opened_ns
    return Failure(
        at_ns=at_ns,
        opened_ns=opened_ns,
        asked_ns=opened_ns if asked_ns is None else asked_ns,
        failed_ns=at_ns if failed_ns is None else failed_ns,
        connected=reason not in (Reason.CONNECT_TIMEOUT, Reason.REFUSED),
        reason=reason,
        backend=backend,
        local_port=1,
        answers=0,
        detail="why",
    )


def _verdict(judge: Judge, failure: Failure) -> Verdict:
    judge.failed(failure)
    ((verdict, _),) = judge.verdicts(LATER_NS)
    return verdict


def _crashed(*, forgotten_after_ns: int | None) -> Judge:
    """web1 was lost silently; None: new flows are still sent to it."""
    judge = Judge()
    judge.gone("web1", GONE_NS)
    judge.haunts("web1", GONE_NS)
    if forgotten_after_ns is not None:
        judge.forgotten("web1", GONE_NS + forgotten_after_ns)
    return judge


def test_a_failure_is_judged_by_what_is_known_a_little_later() -> None:
    judge = Judge()
    judge.failed(_failure(0, "web1"))
    assert [] == list(judge.verdicts(CHECK_GRACE_NS - 1))
    judge.gone("web1", 1)  # the word comes after the RST
    assert [Verdict.BACKEND_GONE] == [verdict for verdict, _ in judge.verdicts(CHECK_GRACE_NS)]


# ----------------------------------------------------------------------------------- flows that nobody has answered


def test_another_backend_that_went_is_no_excuse_but_for_flows_without_one_begun_before() -> None:
    judge = Judge()
    judge.gone("web2", GONE_NS)
    assert Verdict.BROKEN is _verdict(judge, _failure(GONE_NS, "web1"))
    assert Verdict.UNATTRIBUTED is _verdict(judge, _failure(GONE_NS, None))
    over_ns = GONE_NS + CHECK_GRACE_NS
    assert Verdict.UNATTRIBUTED is _verdict(judge, _failure(over_ns + SECOND_NS, None, opened_ns=over_ns))
    for reason in Reason:
        late = _failure(over_ns + SECOND_NS, None, reason, opened_ns=over_ns + 1)
        assert Verdict.BROKEN is _verdict(judge, late), "no new flow was sent to it"


def test_a_flow_begun_after_a_silent_loss_can_only_have_waited_for_its_connection() -> None:
    judge = _crashed(forgotten_after_ns=6 * SECOND_NS)
    opened_ns = GONE_NS + CHECK_GRACE_NS + 1
    found = {
        reason: _verdict(judge, _failure(opened_ns + SECOND_NS, None, reason, opened_ns=opened_ns)) for reason in Reason
    }
    assert Verdict.UNATTRIBUTED is found.pop(Reason.CONNECT_TIMEOUT)
    assert {Verdict.BROKEN} == set(found.values()), "who is not there completes no handshake and resets nothing"


def test_a_flow_begun_before_a_silent_loss_may_have_failed_in_any_way() -> None:
    judge = _crashed(forgotten_after_ns=6 * SECOND_NS)
    opened_ns = GONE_NS + CHECK_GRACE_NS
    for reason in Reason:
        assert Verdict.UNATTRIBUTED is _verdict(
            judge, _failure(opened_ns + SECOND_NS, None, reason, opened_ns=opened_ns)
        )


def test_it_is_not_begun_after_the_loss_as_long_as_the_backend_is_being_removed() -> None:
    judge = Judge()
    judge.gone("web1", GONE_NS)
    judge.haunts("web1", GONE_NS + 2 * SECOND_NS)  # the machine was busy
    judge.forgotten("web1", GONE_NS + 6 * SECOND_NS)
    for opened_after_ns, verdict in ((2 * SECOND_NS, Verdict.UNATTRIBUTED), (3 * SECOND_NS, Verdict.BROKEN)):
        opened_ns = GONE_NS + opened_after_ns
        failure = _failure(opened_ns + 9 * SECOND_NS, None, Reason.TIMEOUT, opened_ns=opened_ns)
        assert verdict is _verdict(judge, failure)


def test_once_it_is_forgotten_whoever_begins_is_not_sent_to_it() -> None:
    judge = _crashed(forgotten_after_ns=6 * SECOND_NS)
    over_ns = GONE_NS + 6 * SECOND_NS + CHECK_GRACE_NS
    for opened_ns, verdict in ((over_ns, Verdict.UNATTRIBUTED), (over_ns + 1, Verdict.BROKEN)):
        failure = _failure(opened_ns + 10 * SECOND_NS, None, Reason.CONNECT_TIMEOUT, opened_ns=opened_ns)
        assert verdict is _verdict(judge, failure), "by when it was begun, not by when the client gave up"


def test_while_new_flows_go_to_a_dead_backend_nobody_can_tell_of_those_that_wait_in_vain() -> None:
    judge = _crashed(forgotten_after_ns=None)
    at_ns = GONE_NS + 60 * SECOND_NS
    assert Verdict.UNATTRIBUTED is _verdict(judge, _failure(at_ns, None, Reason.CONNECT_TIMEOUT))
    assert Verdict.BROKEN is _verdict(judge, _failure(at_ns, None, Reason.RESET))
    assert Verdict.BROKEN is _verdict(judge, _failure(at_ns, "web2", Reason.TIMEOUT))


def test_what_failed_before_the_loss_is_not_its_doing() -> None:
    judge = _crashed(forgotten_after_ns=None)
    before_ns = GONE_NS - CHECK_GRACE_NS
    assert Verdict.UNATTRIBUTED is _verdict(judge, _failure(before_ns, None))
    assert Verdict.BROKEN is _verdict(judge, _failure(GONE_NS, None, failed_ns=before_ns - 1))
    asked_ns = GONE_NS - CHECK_LOST_WITH_NS
    for reason in (Reason.TIMEOUT, Reason.CONNECT_TIMEOUT):
        assert Verdict.UNATTRIBUTED is _verdict(judge, _failure(GONE_NS, None, reason, opened_ns=asked_ns))
        assert Verdict.BROKEN is _verdict(judge, _failure(GONE_NS, None, reason, opened_ns=asked_ns - 1))


def test_without_a_handshake_whoever_is_begun_with_a_dead_backend_waits_for_its_answer() -> None:
    judge = Judge(unheard=Reason.TIMEOUT)
    judge.gone("web1", GONE_NS)
    judge.haunts("web1", GONE_NS)
    assert Verdict.UNATTRIBUTED is _verdict(judge, _failure(GONE_NS + SECOND_NS, None, Reason.TIMEOUT))


@given(
    st.integers(-20, 40),
    st.integers(0, 12),
    st.sampled_from(Reason),
    st.one_of(st.none(), st.integers(0, 10)),
)
def test_nothing_is_excused_that_the_older_rule_blamed(
    opened: int, age: int, reason: Reason, window: int | None
) -> None:
    """The older one: whatever failed while it haunted, and for two time-outs (20.5 s) after that."""
    judge = _crashed(forgotten_after_ns=None if window is None else window * SECOND_NS)
    opened_ns = GONE_NS + opened * SECOND_NS
    failure = _failure(opened_ns + age * SECOND_NS, None, reason, opened_ns=opened_ns)
    older = window is None or failure.at_ns <= GONE_NS + window * SECOND_NS + 20 * SECOND_NS + CHECK_GRACE_NS
    assert older or Verdict.BROKEN is _verdict(judge, failure)


# --------------------------------------------------------------------------------------------- drained backends


def test_a_drained_backend_that_leaves_excuses_its_own_flows_and_those_reset_before_any_answer() -> None:
    judge = Judge()
    judge.leaves("web1", 0)
    assert Verdict.BACKEND_GONE is _verdict(judge, _failure(1, "web1"))
    assert Verdict.BROKEN is _verdict(judge, _failure(2, "web2"))
    assert Verdict.UNATTRIBUTED is _verdict(judge, _failure(3, None))
    waits = _failure(4, None, Reason.CONNECT_TIMEOUT)
    assert Verdict.BROKEN is _verdict(judge, waits), "it answers whoever asks, so who waits in vain waits for another"


def test_a_backend_that_has_left_excuses_only_its_own_flows() -> None:
    judge = Judge()
    judge.leaves("web1", 0)
    judge.left("web1", SECOND_NS)
    over_ns = SECOND_NS + CHECK_GRACE_NS
    assert Verdict.UNATTRIBUTED is _verdict(judge, _failure(over_ns, None))
    assert Verdict.BROKEN is _verdict(judge, _failure(over_ns + 1, None))
    assert Verdict.BACKEND_GONE is _verdict(judge, _failure(2 * SECOND_NS, "web1"))


def test_a_client_that_stood_still_learns_late_that_the_backend_has_left() -> None:
    judge = Judge()
    judge.leaves("web1", 0)
    judge.left("web1", SECOND_NS)
    assert Verdict.UNATTRIBUTED is _verdict(judge, _failure(5 * SECOND_NS, None, opened_ns=SECOND_NS - 1))
    assert Verdict.BROKEN is _verdict(judge, _failure(5 * SECOND_NS, None, opened_ns=2 * SECOND_NS))
    assert Verdict.BROKEN is _verdict(judge, _failure(5 * SECOND_NS, None, Reason.TIMEOUT, opened_ns=0))


# ------------------------------------------------------------------------------------ flows of a backend that went


def test_a_reset_that_came_before_its_backend_went_is_broken_however_late_it_was_noticed() -> None:
    judge = Judge()
    judge.leaves("web1", GONE_NS)
    noticed_ns = GONE_NS + 4 * SECOND_NS
    first_ns = GONE_NS - CHECK_GRACE_NS
    for reason in (Reason.RESET, Reason.CLOSED, Reason.OTHER_BACKEND, Reason.WRONG_BYTES, Reason.NETWORK):
        excused = _failure(noticed_ns, "web1", reason, opened_ns=0, asked_ns=noticed_ns, failed_ns=first_ns)
        assert Verdict.BACKEND_GONE is _verdict(judge, excused)
        assert Verdict.BROKEN is _verdict(judge, replace(excused, failed_ns=first_ns - 1))


def test_a_question_asked_long_before_its_backend_went_was_lost_before() -> None:
    judge = Judge()
    judge.leaves("web1", GONE_NS)
    asked_ns = GONE_NS - CHECK_LOST_WITH_NS
    excused = _failure(asked_ns + 10 * SECOND_NS, "web1", Reason.TIMEOUT, opened_ns=0, asked_ns=asked_ns)
    assert Verdict.BACKEND_GONE is _verdict(judge, excused)
    assert Verdict.BROKEN is _verdict(judge, replace(excused, asked_ns=asked_ns - 1))


def test_the_line_of_one_that_broke_first_says_when_its_backend_went() -> None:
    judge = Judge()
    judge.gone("web1", GONE_NS)
    judge.failed(_failure(GONE_NS, "web1", failed_ns=GONE_NS - 1_500 * MS_NS))
    judge.failed(_failure(GONE_NS, "web1"))
    judge.failed(_failure(GONE_NS, "web2"))
    (_, first), (_, gone), (_, other) = judge.verdicts(LATER_NS)
    assert (GONE_NS, "why; web1 went only 1.500 s later") == (first.gone_ns, first.detail)
    assert (GONE_NS, "why") == (gone.gone_ns, gone.detail)
    assert (None, "why") == (other.gone_ns, other.detail)


def test_a_name_that_comes_again_excuses_nothing() -> None:
    judge = _crashed(forgotten_after_ns=None)
    judge.leaves("web1", GONE_NS)
    judge.alive("web1")
    assert Verdict.BROKEN is _verdict(judge, _failure(GONE_NS + SECOND_NS, "web1"))
    assert Verdict.BROKEN is _verdict(judge, _failure(GONE_NS + SECOND_NS, None, Reason.CONNECT_TIMEOUT))


def test_who_could_not_be_opened_is_counted_apart_from_connections() -> None:
    tally = Tally()
    tally.judged(Verdict.UNATTRIBUTED, _failure(0, None, Reason.CONNECT_TIMEOUT))
    tally.judged(Verdict.BROKEN, _failure(0, "web1"))
    assert 1 == tally.as_dict()["failed_unopened"]
