"""What comes late when a cable is plugged in again: beats, and answers to beats, of before it was pulled."""

from lbpod.core.limits import BEAT_DOWN_NS, TICK_NS
from lbpod.core.messages import Answered, Ask, BeatAnswer, BeatCall, Called, Reply
from tests.unit.test_keeper_watch import believes, without_lb3


def test_a_beat_that_was_long_on_its_way_is_answered_and_brings_nobody_up() -> None:
    cluster, lost = without_lb3()
    node, said = cluster["lb1"], BeatCall(lost, 1, 1)
    node.feed(Called(901, said, late=True), cluster.now_ns)
    assert isinstance(node.answers.pop(901), Reply)
    assert not believes(cluster, "lb1", lost)
    node.feed(Called(903, BeatCall(lost, 1, 1, down=(1,)), late=True), cluster.now_ns)
    assert frozenset() == node.keeper._state.watch.said_down.get(lost, frozenset()), "nor does what it said then count"
    node.feed(Called(902, said), cluster.now_ns)
    assert believes(cluster, "lb1", lost)


def test_an_answer_that_was_as_long_on_its_way_brings_nobody_up_but_the_next_one_does() -> None:
    """A cable is plugged in again, and what was answered before it was pulled comes first."""
    cluster, lost = without_lb3()
    node = cluster["lb1"]

    def asked() -> int:
        """The newest beat's token."""
        number = node.keeper._state.node_of_member[lost]
        return next(
            one.token
            for one in reversed(node.effects)
            if isinstance(one, Ask) and one.node == number and isinstance(one.body, BeatCall)
        )

    before, serving = asked(), BeatAnswer(lost, 1, 1, serving=True)
    cluster.run(BEAT_DOWN_NS + TICK_NS)
    node.feed(Answered(before, serving), cluster.now_ns)
    assert not believes(cluster, "lb1", lost)
    kept = asked()
    cluster.run(BEAT_DOWN_NS + TICK_NS)
    node.feed(Answered(kept, serving), cluster.now_ns)
    assert not believes(cluster, "lb1", lost), "another one that was kept"
    since = asked()
    cluster.run(BEAT_DOWN_NS + TICK_NS)
    node.feed(Answered(since, serving), cluster.now_ns)
    assert believes(cluster, "lb1", lost), "slow, but asked of an LB that can be reached"
