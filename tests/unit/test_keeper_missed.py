"""A member that was silent is sent what the other replica of its slots has recorded alone."""

import msgspec
import numpy as np
import pytest

from lbpod.core import missed as missing
from lbpod.core.layout import RECORD, RECORD_MISSING
from lbpod.core.limits import (
    ALONE_NS,
    BEAT_DOWN_NS,
    BEAT_NS,
    LOST_NS,
    OWED_HOLD_NS,
    PEER_TIMEOUT_NS,
    RETRY_NS,
    TICK_NS,
)
from lbpod.core.messages import BeatCall, Called, ControllerSeen, DumpRecords, KeeperEffect, MissedCall, PeerCall
from lbpod.core.transition import is_agreed, is_of_round, is_settling
from lbpod.datapath.port import FlowMap
from tests.keepers import SECOND_NS, SLICE_MAX, Cluster, Node, Rows, vip
from tests.unit.test_keeper_forget import no_settling, of_lb1_and_lb2, record
from tests.unit.test_keeper_listing import open_lists
from tests.unit.test_keeper_resolve import flows_of, slots_of
from tests.unit.test_keeper_settle import Bools, is_owed

DOWN_NS = BEAT_DOWN_NS + 2 * BEAT_NS + 2 * TICK_NS
UP_NS = BEAT_NS + RETRY_NS + 4 * TICK_NS


def tracking_cluster() -> Cluster:
    """Three LBs that have heard each other, and sent each other what they might have missed; all slots track."""
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    cluster.change(vip([3, 4], [1, 2]))
    cluster.blocked = no_settling
    cluster.run(2 * SECOND_NS)
    return cluster


def missed(flows: Rows, backend: int, age_ms: int = 0, full_count: int = 0) -> MissedCall:
    """What lb1 says."""
    backends, ages = (np.full(len(flows), each, "<u4").tobytes() for each in (backend, age_ms))
    return MissedCall(0, flows.tobytes(), backends, ages, full_count)


def cut_off(cluster: Cluster, name: str) -> None:
    """Nothing gets to this LB, nor from it, and the others know."""
    cluster.blocked = lambda sender, receiver, body: name in (sender, receiver) or no_settling(sender, receiver, body)
    cluster.run(DOWN_NS)


def recorded(node: Node, flows: Rows) -> list[int]:
    """Backend of each flow's record, 0: none that counts."""
    found = node.datapath.records_lookup(flows)
    valid = is_of_round(node.rounds(slots_of(flows)), found)
    return [int(one) for one in np.where(valid, found["backend"], 0)]


def test_what_was_recorded_while_a_replica_was_silent_is_there_when_it_can_be_heard_again() -> None:
    cluster = tracking_cluster()
    flows = of_lb1_and_lb2(cluster)
    before, during = flows[:3], flows[3:]
    record(cluster["lb1"], before, cluster.now_ns - 2 * SECOND_NS)
    cut_off(cluster, "lb2")
    record(cluster["lb1"], during, cluster.now_ns)
    record(cluster["lb2"], during[:1], cluster.now_ns, backend=4)
    cluster.run(SECOND_NS)
    assert 0 == sum(recorded(cluster["lb2"], during[1:]))
    cluster.blocked = no_settling
    cluster.run(UP_NS)
    assert [4] + [3] * (len(during) - 1) == recorded(cluster["lb2"], during), "what it has recorded itself stays"
    assert [0, 0, 0] == recorded(cluster["lb2"], before), "these it has not missed"
    assert not cluster["lb1"].keeper._state.watch.missed


def test_who_was_cut_off_serves_when_everybody_has_told_it_what_it_has_missed() -> None:
    """The agent of the other replica is away just when it is back: its LB waits, and the others go on without it."""
    cluster = tracking_cluster()
    flows = of_lb1_and_lb2(cluster)
    cut_off(cluster, "lb2")
    cluster.run(ALONE_NS)
    record(cluster["lb1"], flows, cluster.now_ns)
    away = [True]

    def lb1_tells_nothing(sender: str, receiver: str, body: PeerCall) -> bool:
        return (away[0] and isinstance(body, MissedCall) and sender == "lb1") or no_settling(sender, receiver, body)

    cluster.blocked = lb1_tells_nothing
    cluster.run(3 * SECOND_NS)
    beliefs = {name: cluster[name].keeper.beliefs() for name in ("lb1", "lb2", "lb3")}
    assert beliefs["lb2"].is_catching_up
    assert ((1,), (), (1,)) == tuple(beliefs[name].down for name in sorted(beliefs))
    assert {0} == set(recorded(cluster["lb2"], flows))
    away[0] = False
    cluster.run(UP_NS + PEER_TIMEOUT_NS)
    assert {3} == set(recorded(cluster["lb2"], flows))
    assert not cluster["lb2"].keeper.beliefs().is_catching_up
    assert () == cluster["lb1"].keeper.beliefs().down


def test_who_was_cut_off_waits_for_what_it_has_missed_though_its_agent_was_killed_meanwhile() -> None:
    cluster = tracking_cluster()
    cut_off(cluster, "lb2")
    cluster.run(SECOND_NS)
    cluster["lb2"].restart(cluster.now_ns)
    cluster.run(2 * TICK_NS)
    assert not cluster["lb2"].keeper.beliefs().is_catching_up, "it may be the only one left"
    cluster.blocked = no_settling
    waits = []
    for _ in range((BEAT_NS + TICK_NS) // TICK_NS):
        cluster.run(TICK_NS)
        waits.append(cluster["lb2"].keeper.beliefs().is_catching_up)
    assert True in waits
    cluster.run(UP_NS + SECOND_NS)
    assert not cluster["lb2"].keeper.beliefs().is_catching_up


def test_what_was_asked_before_it_knew_that_it_was_cut_off_makes_nobody_believe_it_for_long() -> None:
    cluster = tracking_cluster()
    cut_off(cluster, "lb2")
    node, member = cluster["lb1"], cluster["lb2"].status.member
    said = BeatCall(member, 0, 0, (), returning=False)
    believed: list[bool] = []
    for returning in (True, False, True, True, False):
        node.feed(Called(1_000 + len(believed), msgspec.structs.replace(said, returning=returning)), cluster.now_ns)
        believed.append(member not in node.keeper.beliefs().down)
    assert [False, True, False, False, True] == believed


def with_a_lost_answer() -> tuple[Cluster, Bools]:
    """lb2 has agreed to settle what it backs for lb1, the answers were lost, and then it was cut off: slots."""
    cluster = tracking_cluster()
    cluster.blocked, cluster.muted = lambda *_: False, is_owed
    cluster.run(20 * SECOND_NS)
    owner, backup = cluster["lb1"], cluster["lb2"]
    owed = owner.owned() & backup.backed()
    assert is_settling(owner.words())[owed].all()
    assert (backup.base() != owner.base())[owed].all()
    cluster.blocked = lambda sender, receiver, body: backup.name in (sender, receiver)
    cluster.run(ALONE_NS + DOWN_NS)
    return cluster, owed


def test_what_is_base_at_a_member_that_is_back_is_asked_before_it_is_told_what_it_has_missed() -> None:
    """What its owner begins alone before goes to its own base, and is in the list; what begins after it must not."""
    cluster, owed = with_a_lost_answer()
    owner = cluster["lb1"]
    bases_differ = []

    def lists(effect: KeeperEffect) -> bool:
        if isinstance(effect, DumpRecords) and effect.token in open_lists(owner, missing._Dumped):
            bases_differ.append(bool((owner.base() != cluster["lb2"].base())[owed].any()))
        return False

    owner.fails = lists
    cluster.muted = cluster.blocked = lambda *_: False
    cluster.run(UP_NS + SECOND_NS)
    assert [False] == bases_differ[:1]
    assert not cluster["lb2"].keeper.beliefs().is_catching_up


def test_a_member_that_cannot_say_what_is_base_is_told_what_it_has_missed_all_the_same() -> None:
    cluster, _ = with_a_lost_answer()
    cluster.muted, cluster.blocked = lambda *_: False, is_owed
    cluster.run(OWED_HOLD_NS - SECOND_NS)
    assert cluster["lb2"].keeper.beliefs().is_catching_up
    cluster.run(SECOND_NS + UP_NS + PEER_TIMEOUT_NS)
    assert not cluster["lb2"].keeper.beliefs().is_catching_up


def test_nobody_is_waited_for_longer_than_it_takes_to_be_lost() -> None:
    cluster = tracking_cluster()
    cut_off(cluster, "lb2")
    cluster.run(ALONE_NS)
    cluster.blocked = lambda sender, receiver, body: "lb3" in (sender, receiver) or no_settling(sender, receiver, body)
    cluster.run(LOST_NS - SECOND_NS)
    assert cluster["lb2"].keeper.beliefs().is_catching_up, "lb3 may have recorded something"
    cluster.run(2 * SECOND_NS)
    assert not cluster["lb2"].keeper.beliefs().is_catching_up


def test_who_had_died_before_is_not_waited_for() -> None:
    """One LB is destroyed, and a moment later the agent of another is killed: the third one hears nobody."""
    cluster = tracking_cluster()
    cut_off(cluster, "lb3")
    cluster.run(2 * SECOND_NS)
    cluster.blocked = lambda sender, receiver, body: True
    cluster.run(ALONE_NS + DOWN_NS)
    assert cluster["lb2"].keeper._state.watch.owed_by == {0, 2}
    cluster.blocked = lambda sender, receiver, body: "lb3" in (sender, receiver) or no_settling(sender, receiver, body)
    cluster.run(2 * BEAT_NS)
    assert cluster["lb2"].keeper.beliefs().is_catching_up, "lb3 may be back, too, and has not been heard yet"
    cluster.run(BEAT_DOWN_NS + UP_NS)
    assert not cluster["lb2"].keeper.beliefs().is_catching_up
    assert (2,) == cluster["lb1"].keeper.beliefs().down


def test_who_waits_to_be_told_is_not_given_up() -> None:
    """It is there, however long it does not serve: who gave it up would decide about its flows alone."""
    cluster = tracking_cluster()
    cut_off(cluster, "lb2")
    cluster.run(ALONE_NS)

    def lb1_tells_nothing(sender: str, receiver: str, body: PeerCall) -> bool:
        return (isinstance(body, MissedCall) and sender == "lb1") or no_settling(sender, receiver, body)

    record(cluster["lb1"], of_lb1_and_lb2(cluster), cluster.now_ns)
    cluster.blocked = lb1_tells_nothing
    cluster.run(LOST_NS - ALONE_NS - DOWN_NS)
    for _ in range(2 * SECOND_NS // TICK_NS):
        cluster.run(TICK_NS)
        given_up = [cluster[name].keeper.beliefs().given_up for name in ("lb1", "lb3")]
        assert [(), ()] == given_up


def test_who_hears_the_controller_is_not_cut_off() -> None:
    cluster = tracking_cluster()
    cluster.blocked = lambda sender, receiver, body: True
    for _ in range(4):
        cluster.feed("lb2", ControllerSeen())
        cluster.run(SECOND_NS)
    cluster.blocked = no_settling
    cluster.run(2 * TICK_NS)
    caught = [cluster[name].keeper.beliefs().is_catching_up for name in ("lb1", "lb2", "lb3")]
    assert [True, False, True] == caught
    cluster.run(UP_NS)
    assert not any(cluster[name].keeper.beliefs().is_catching_up for name in ("lb1", "lb2", "lb3")), "nor for ever"


def test_a_call_that_fails_is_made_again() -> None:
    cluster = tracking_cluster()
    flows = of_lb1_and_lb2(cluster)
    cut_off(cluster, "lb2")
    record(cluster["lb1"], flows, cluster.now_ns)
    lost: list[MissedCall] = []

    def loses_two(sender: str, receiver: str, body: PeerCall) -> bool:
        if isinstance(body, MissedCall) and sender == "lb1" and len(lost) < 2:
            lost.append(body)
            return True
        return no_settling(sender, receiver, body)

    cluster.blocked = loses_two
    cluster.run(UP_NS + 2 * RETRY_NS + 4 * SECOND_NS)
    assert 2 == len(lost)
    assert {3} == set(recorded(cluster["lb2"], flows))


def test_what_was_missed_in_two_silences_is_sent_from_the_first_on_and_lists_do_not_pile_up() -> None:
    cluster = tracking_cluster()
    flows, node = of_lb1_and_lb2(cluster), cluster["lb1"]
    assert len(flows) > 2 * SLICE_MAX

    def parted(sender: str, receiver: str, body: PeerCall) -> bool:
        return {"lb1", "lb2"} == {sender, receiver} or no_settling(sender, receiver, body)

    def loses_all(sender: str, receiver: str, body: PeerCall) -> bool:
        return isinstance(body, MissedCall) or no_settling(sender, receiver, body)

    cluster.blocked = parted
    cluster.run(DOWN_NS)
    record(node, flows, cluster.now_ns)
    node.holds_lists = True
    cluster.blocked = loses_all
    cluster.run(UP_NS)
    [asked] = open_lists(node, missing._Dumped)
    cluster.blocked = parted
    cluster.run(DOWN_NS)
    cluster.blocked = loses_all
    cluster.run(UP_NS + 2 * RETRY_NS)
    assert [asked] == open_lists(node, missing._Dumped), "one at a time"
    node.holds_lists = False
    node.go_on(cluster.now_ns)
    cluster.run(PEER_TIMEOUT_NS + SECOND_NS)
    cluster.blocked = no_settling
    cluster.run(PEER_TIMEOUT_NS + UP_NS + SECOND_NS)
    assert {3} == set(recorded(cluster["lb2"], flows))


def test_only_what_both_share_is_sent_and_taken() -> None:
    cluster = tracking_cluster()
    flows = flows_of(300)
    mine = cluster["lb1"].owned() | cluster["lb1"].backed()
    theirs = cluster["lb2"].owned() | cluster["lb2"].backed()
    cut_off(cluster, "lb2")
    record(cluster["lb1"], flows, cluster.now_ns)
    cluster.blocked = no_settling
    cluster.run(UP_NS)
    shared = (mine & theirs)[slots_of(flows)]
    assert 0 < shared.sum() < len(flows)
    found = np.array(recorded(cluster["lb2"], flows))
    assert {3} == set(found[shared].tolist())
    assert not found[~shared].any()
    alien = missed(flows[~shared], 3)
    cluster["lb2"].call(alien, cluster.now_ns)
    assert not np.array(recorded(cluster["lb2"], flows))[~shared].any()


def test_an_agent_that_starts_sends_what_was_seen_since_anybody_may_have_been_silent() -> None:
    cluster = tracking_cluster()
    flows = of_lb1_and_lb2(cluster)
    old, fresh = flows[:3], flows[3:]
    record(cluster["lb1"], old, cluster.now_ns - LOST_NS - SECOND_NS)
    record(cluster["lb1"], fresh, cluster.now_ns)
    cluster["lb1"].restart(cluster.now_ns)
    cluster.run(UP_NS)
    assert {3} == set(recorded(cluster["lb2"], fresh))
    assert {0} == set(recorded(cluster["lb2"], old))


def test_what_tracks_no_more_or_whose_backend_is_dead_is_not_recorded() -> None:
    cluster = tracking_cluster()
    flows = of_lb1_and_lb2(cluster)
    cluster["lb2"].call(missed(flows, 9), cluster.now_ns)
    assert (cluster["lb2"].datapath.records_lookup(flows)["round"] == RECORD_MISSING).all(), "no backend of the VIP"
    settled = Cluster()
    settled.change(vip([1, 2]))
    settled["lb2"].call(missed(flows, 1), settled.now_ns)
    assert (settled["lb2"].datapath.records_lookup(flows)["round"] == RECORD_MISSING).all()


def test_a_flow_that_the_owner_has_begun_elsewhere_ends_what_its_backup_has_agreed_to() -> None:
    cluster = tracking_cluster()
    node, flows = cluster["lb2"], of_lb1_and_lb2(cluster)
    slots = np.unique(slots_of(flows)).astype(np.uint32)
    held = node.keeper._state.vips[1].slots
    held.agree(slots)
    node.datapath.write_slots(1, slots, held.at(slots))
    node.call(missed(flows, 1), cluster.now_ns)
    assert {1} == set(recorded(node, flows))
    assert not is_agreed(node.words()[slots]).any()


def test_a_record_of_an_earlier_round_is_replaced() -> None:
    cluster = tracking_cluster()
    flows = of_lb1_and_lb2(cluster)
    stale = np.zeros(len(flows), RECORD)
    stale["backend"], stale["seen_ns"] = 4, cluster.now_ns
    cluster["lb2"].datapath.flows_put(FlowMap.RECORDS, flows, stale)
    assert {0} == set(recorded(cluster["lb2"], flows)), "void"
    cluster["lb2"].call(missed(flows, 3, full_count=len(flows)), cluster.now_ns)
    assert {3} == set(recorded(cluster["lb2"], flows))


@pytest.mark.parametrize("kept_in", [FlowMap.RECORDS, FlowMap.EMBRYONIC])
@pytest.mark.parametrize("is_full", [True, False])
def test_of_two_records_of_one_five_tuple_the_one_that_was_seen_last_counts(kept_in: FlowMap, is_full: bool) -> None:
    """The client has used its port again, or its first SYN went to one replica alone and the second to the other."""
    cluster = tracking_cluster()
    flows = of_lb1_and_lb2(cluster)
    node, now_ns = cluster["lb2"], cluster.now_ns
    mine = np.zeros(len(flows), RECORD)
    mine["backend"], mine["round"] = 4, node.rounds(slots_of(flows))
    mine["seen_ns"] = now_ns - 5 * SECOND_NS
    node.datapath.flows_put(kept_in, flows, mine)
    count = len(flows) if is_full else 0
    node.call(missed(flows, 3, age_ms=4_500, full_count=count), now_ns)
    assert {4} == set(recorded(node, flows)), "so little may be the call's own time"
    node.call(missed(flows, 3, age_ms=1_000, full_count=count), now_ns)
    assert {3} == set(recorded(node, flows))
    held = [len(node.datapath.flows_dump(each)[0]) for each in (FlowMap.RECORDS, FlowMap.EMBRYONIC)]
    assert ([len(flows), 0] if is_full else [0, len(flows)]) == held


@pytest.mark.parametrize("is_full", [True, False], ids=["full", "embryonic"])
def test_a_flow_that_began_alone_and_was_answered_overrules_a_syn_that_was_lost_with_its_chain(is_full: bool) -> None:
    """Though the client's next packet met that here a moment ago, and promoted it."""
    cluster = tracking_cluster()
    node, flows = cluster["lb2"], of_lb1_and_lb2(cluster)[:2]
    flows = flows[node.base()[slots_of(flows)] != node.current()[slots_of(flows)]][:1]
    base = int(node.base()[slots_of(flows)][0])
    record(node, flows, cluster.now_ns)
    [was] = recorded(node, flows)
    node.call(missed(flows, base, age_ms=700, full_count=int(is_full)), cluster.now_ns)
    assert [base if is_full else was] == recorded(node, flows), "a SYN alone proves nothing"
    assert was != base


def test_nothing_is_sent_where_nobody_was_silent() -> None:
    cluster = tracking_cluster()
    sent: list[PeerCall] = []

    def watches(sender: str, receiver: str, body: PeerCall) -> bool:
        if not isinstance(body, BeatCall):
            sent.append(body)
        return no_settling(sender, receiver, body)

    record(cluster["lb1"], of_lb1_and_lb2(cluster), cluster.now_ns)
    cluster.blocked = watches
    cluster.run(3 * SECOND_NS)
    assert not [body for body in sent if isinstance(body, MissedCall)]
