"""One way of two: an LB whose words do not come through, while it hears those of others."""

from lbpod.core.messages import BeatAnswer, BeatCall, Reply
from tests.unit.test_keeper_watch import UP_AGAIN_NS, believes, between, cluster_of, nothing


def test_who_calls_and_does_not_hear_is_down_until_it_answers() -> None:
    """lb2's words come through to lb1, and lb1's do not to lb2: no chain would."""
    cluster = cluster_of()
    cluster.blocked = between("lb1")
    lb1, epoch = cluster["lb1"], cluster["lb1"].status.committed
    heard = BeatCall(1, epoch, epoch)
    lb1.call(BeatCall(1, epoch, epoch, down=(0,)), cluster.now_ns)
    assert not believes(cluster, "lb1", 1)
    assert believes(cluster, "lb1", 2)
    told = lb1.call(BeatCall(2, epoch, epoch), cluster.now_ns)
    assert isinstance(told, Reply)
    assert isinstance(told.body, BeatAnswer)
    assert () == told.body.down, "it says so to others only once it has found the same"
    lb1.call(heard, cluster.now_ns)
    assert believes(cluster, "lb1", 1)
    lb1.call(BeatCall(1, epoch, epoch, down=(0,)), cluster.now_ns)
    cluster.blocked = nothing
    cluster.run(UP_AGAIN_NS)
    assert believes(cluster, "lb1", 1), "an answer needs both ways"
