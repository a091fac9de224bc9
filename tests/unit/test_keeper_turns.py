"""Of two LBs that watch each other one asks for both, at rest: when that is, and what it costs."""

from collections import Counter

import pytest

from lbpod.core.keeper import Keeper
from lbpod.core.limits import BEAT_DOWN_NS, BEAT_NS, BEATS_BOTH_ASK, FENCE_NS, LOST_NS, TICK_NS
from lbpod.core.messages import BeatAnswer, BeatCall, Called, KeeperEvent, PeerCall, Reply, Tick
from lbpod.core.model import Ring, Snapshot
from tests.keepers import CLUSTER, SECOND_NS, START_NS, Node, vip
from tests.unit.test_keeper_watch import (
    LARGE,
    TOLD_NS,
    UP_AGAIN_NS,
    believes,
    between,
    cluster_of,
    in_large_ring,
    steps_of,
    ticks,
)

TURNS = {("lb1", "lb2"), ("lb1", "lb3"), ("lb2", "lb3")}
"""Who asks whom, at rest."""


def test_one_of_two_asks_for_both_while_no_slot_tracks_and_all_is_well() -> None:
    asked: list[tuple[str, str]] = []

    def note(sender: str, receiver: str, body: PeerCall) -> bool:
        asked.extend([(sender, receiver)] if isinstance(body, BeatCall) else [])
        return "lb3" in {sender, receiver} and lb3_is_gone

    lb3_is_gone = False
    cluster = cluster_of()
    cluster.blocked = note
    cluster.run(60 * SECOND_NS)
    beats = 60 * SECOND_NS // BEAT_NS
    assert TURNS | {(receiver, sender) for sender, receiver in TURNS} == set(asked)
    for turn in TURNS:
        assert abs(asked.count(turn) - beats) <= 1
        assert abs(asked.count(turn[::-1]) - beats // BEATS_BOTH_ASK) <= 1, "now and then, so that there is a line"
    lb3_is_gone = True
    cluster.run(BEAT_DOWN_NS + 3 * TICK_NS)
    asked.clear()
    cluster.run(SECOND_NS)
    assert ("lb2", "lb1") in asked, "somebody is silent, so both ask"
    lb3_is_gone = False
    cluster.run(TOLD_NS + UP_AGAIN_NS)
    asked.clear()
    cluster.run(BEATS_BOTH_ASK * BEAT_NS)
    assert all(asked.count(turn[::-1]) <= 1 for turn in TURNS)
    cluster.change(vip([1, 2, 3]))
    assert cluster["lb1"].status.tracking_slots
    asked.clear()
    cluster.run(SECOND_NS)
    assert ("lb2", "lb1") in asked, "slots track, so a wrong belief would matter"


def test_at_rest_there_is_a_tick_for_each_beat_and_else_twice_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of what an agent takes at rest is its ticks; and whatever is amiss is seen as soon as ever."""
    ticked: Counter[str] = Counter()
    feed = Node.feed

    def counted(node: Node, event: KeeperEvent, now_ns: int) -> None:
        ticked[node.name] += isinstance(event, Tick)
        feed(node, event, now_ns)

    def of_ten_seconds() -> int:
        ticked.clear()
        cluster.run(10 * SECOND_NS)
        return ticked["lb1"]

    monkeypatch.setattr(Node, "feed", counted)
    cluster = cluster_of()
    cluster.run(SECOND_NS)
    at_rest, always = 10 * SECOND_NS // BEAT_NS, 10 * SECOND_NS // TICK_NS
    assert at_rest == of_ten_seconds()
    cluster.agentless.add("lb3")
    assert always - BEAT_NS // TICK_NS <= of_ten_seconds() <= always, "somebody is silent"
    cluster.agentless.clear()
    cluster.run(TOLD_NS + UP_AGAIN_NS)
    assert at_rest == of_ten_seconds()
    cluster["lb1"].keeper._state.unwritten.configure = True
    assert TICK_NS == cluster["lb1"].keeper.pause_ns(cluster.now_ns), "something is to be written again"
    cluster["lb1"].keeper._state.unwritten.configure = False
    cluster.stage(snapshot := cluster.plan(vip([1, 2, 3])))
    cluster.prepare(snapshot)
    assert TICK_NS == cluster["lb1"].keeper.pause_ns(cluster.now_ns), "a change is under way"
    cluster.commit(snapshot)
    assert cluster["lb1"].status.tracking_slots
    assert TICK_NS == cluster["lb1"].keeper.pause_ns(cluster.now_ns), "slots track"


def test_what_is_said_in_the_middle_of_a_long_step_is_what_the_keeper_would_say() -> None:
    """One that was cut off does not serve yet, also while it writes what it has fenced."""
    cluster = cluster_of()
    cluster.run(SECOND_NS)
    keeper = cluster["lb1"].keeper
    at_rest = keeper.beat()
    assert at_rest is not None
    assert (True, False) == (at_rest.serving, at_rest.returning)
    cluster.agentless.add("lb1")
    cluster.run(FENCE_NS + SECOND_NS)
    assert cluster["lb1"].keeper.beliefs().fenced_why
    cut_off = keeper.beat()
    reply = cluster["lb1"].call(BeatCall(cluster["lb2"].status.member, 1, 1), cluster.now_ns)
    assert isinstance(reply, Reply)
    assert isinstance(reply.body, BeatAnswer)
    assert cut_off is not None
    assert (cut_off.serving, cut_off.returning) == (reply.body.serving, reply.body.returning)
    assert (True, (1, 2)) == (cut_off.returning, cut_off.down)
    assert Keeper("lb9").beat() is None


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


def test_who_asked_long_ago_and_was_not_watched_has_the_time_to_answer() -> None:
    """In a large ring one asks whom the other does not watch; much later the ring is small."""
    last = LARGE - 1
    keeper = in_large_ring(last)
    stranger = min(set(range(last)) - set(keeper.beliefs().watched))
    assert keeper._state.committed is not None
    nodes = keeper._state.committed.snapshot.nodes
    keeper.step(Tick(), START_NS)
    keeper.step(Called(1, BeatCall(stranger, 1, 1)), START_NS)
    for _ in ticks(keeper, set(), LOST_NS // TICK_NS + 20, START_NS + TICK_NS):
        assert () == keeper.beliefs().down, "nobody asked, and nobody was to"
    now_ns = START_NS + LOST_NS + 22 * TICK_NS
    for body in steps_of(Snapshot(CLUSTER, 2, Ring(2, (stranger, last)), nodes)):
        keeper.step(Called(2, body), now_ns)
    keeper.step(Tick(), now_ns)
    assert ((stranger,), (stranger,)) == (keeper.beliefs().others, keeper.beliefs().watched)
    assert () == keeper.beliefs().down
