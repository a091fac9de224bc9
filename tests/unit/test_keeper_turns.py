"""Of two LBs that watch each other one asks for both, at rest: when that is, and what it costs."""

import pytest

from lbpod.core.limits import BEAT_DOWN_NS, BEAT_NS, TICK_NS
from lbpod.core.messages import BeatCall, PeerCall
from tests.keepers import SECOND_NS, vip
from tests.unit.test_keeper_watch import TOLD_NS, UP_AGAIN_NS, believes, between, cluster_of


def test_one_of_two_asks_for_both_while_no_slot_tracks_and_all_is_well() -> None:
    asked: list[tuple[str, str]] = []

    def note(sender: str, receiver: str, body: PeerCall) -> bool:
        asked.extend([(sender, receiver)] if isinstance(body, BeatCall) else [])
        return "lb3" in {sender, receiver} and lb3_is_gone

    lb3_is_gone = False
    cluster = cluster_of()
    cluster.blocked = note
    cluster.run(60 * SECOND_NS)
    assert {("lb1", "lb2"), ("lb1", "lb3"), ("lb2", "lb3")} == set(asked)
    assert abs(len(asked) - 3 * 60 * SECOND_NS // BEAT_NS) <= 3
    lb3_is_gone = True
    cluster.run(BEAT_DOWN_NS + 3 * TICK_NS)
    asked.clear()
    cluster.run(SECOND_NS)
    assert ("lb2", "lb1") in asked, "somebody is silent, so both ask"
    lb3_is_gone = False
    cluster.run(TOLD_NS + UP_AGAIN_NS)
    asked.clear()
    cluster.run(SECOND_NS)
    assert {("lb1", "lb2"), ("lb1", "lb3"), ("lb2", "lb3")} == set(asked)
    cluster.change(vip([1, 2, 3]))
    assert cluster["lb1"].status.tracking_slots
    asked.clear()
    cluster.run(SECOND_NS)
    assert ("lb2", "lb1") in asked, "slots track, so a wrong belief would matter"


@pytest.mark.parametrize("gone", ["lb1", "lb2"])
def test_a_loss_shows_as_soon_to_who_is_asked_as_to_who_asks(gone: str) -> None:
    member = int(gone[2]) - 1
    for late_ticks in range(2 * BEAT_NS // TICK_NS):
        cluster = cluster_of(2)
        cluster.run(late_ticks * TICK_NS)
        cluster.blocked = between(gone)
        other = "lb2" if gone == "lb1" else "lb1"
        cluster.run(BEAT_DOWN_NS - BEAT_NS - TICK_NS)
        assert believes(cluster, other, member)
        cluster.run(BEAT_NS + 3 * TICK_NS)
        assert not believes(cluster, other, member)
