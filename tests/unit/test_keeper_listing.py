"""Lists of records that come in slices: what may happen between two, and what a failure in the middle means.

``Node.holds_lists`` keeps a list from going on by itself, so that a test can put something between.
"""

from lbpod.core import handover
from lbpod.core.keeper_state import Question
from lbpod.core.limits import HANDOVER_PAGES_MAX
from lbpod.core.messages import DropRecords, DumpRecords, HandoverCall, KeeperEffect, LbStatus, Refuse, Reply, RingStep
from lbpod.core.model import Snapshot
from lbpod.core.snapshot import digest_of
from tests.keepers import SECOND_NS, SLICE_MAX, Node
from tests.unit.test_keeper_ring import RingCluster, broken, flow_slots, records_of, step_at, tracking_cluster


def open_lists(node: Node, kind: type[Question]) -> list[int]:
    """Tokens of the lists of this kind that this node has asked for."""
    return [token for token, entry in node.keeper._state._open.items() if isinstance(entry.question, kind)]


def listing(cluster: RingCluster, name: str, snapshot: Snapshot) -> int:
    """This LB is told of the next ring, and has looked at the first of its records; the request that waits."""
    node = cluster[name]
    node.holds_lists = True
    request = node.begin(snapshot, cluster.now_ns)
    assert request not in node.answers
    assert 1 == len(node.held)
    return request


def list_to_the_end(cluster: RingCluster, name: str) -> None:
    while cluster[name].held:
        cluster[name].go_on(cluster.now_ns)
        cluster._collect(cluster[name])
    cluster[name].holds_lists = False


def test_no_more_is_listed_than_waits_to_be_sent() -> None:
    cluster, pods = tracking_cluster(3, first=2, flows=300)
    snapshot, owner = cluster.plan_ring("lb1", "lb2", "lb3"), cluster["lb1"]
    cluster.up_to_prepared(snapshot, cluster.nodes)
    cluster.blocked = lambda sender, receiver, body: receiver == "lb3"
    cluster.handover(snapshot, cluster.nodes)
    cluster.run(4 * SECOND_NS)
    assert RingStep.PREPARED is step_at(cluster, "lb1")
    running = owner.keeper._state.handover
    assert running is not None
    assert [HANDOVER_PAGES_MAX] == [len(pages) for pages in running.records.values()]
    assert running.rest is not None, "there is more"
    assert len(records_of(cluster, "lb1")) > (2 * HANDOVER_PAGES_MAX + 2) * SLICE_MAX
    cluster.blocked = lambda sender, receiver, body: False
    cluster.run(4 * SECOND_NS)
    assert RingStep.HANDED is step_at(cluster, "lb1")
    cluster.switch(snapshot, cluster.nodes)
    cluster.done(snapshot, cluster.nodes)
    assert [] == broken(cluster, pods, cluster.lbs)


def test_a_ring_is_not_staged_where_one_foreign_record_could_not_be_dropped() -> None:
    cluster, pods = tracking_cluster(4, first=3)
    cluster.change_ring("lb1", "lb2", "lb3", "lb4")
    owner, snapshot = cluster["lb1"], cluster.plan_ring("lb1", "lb2", "lb3")
    drops: list[int] = []

    def fails(effect: KeeperEffect) -> bool:
        drops.extend([len(effect.flows)] if isinstance(effect, DropRecords) else [])
        return isinstance(effect, DropRecords) and len(drops) == 1

    owner.fails = fails
    answer = owner.call(snapshot, cluster.now_ns)
    assert isinstance(answer, Refuse)
    assert 503 == answer.status
    assert isinstance(owner.call(snapshot, cluster.now_ns), Reply)
    assert 2 == len(drops)
    held = owner.owned() | owner.backed()
    assert held[flow_slots(cluster, records_of(cluster, "lb1"))].all()
    assert [] == broken(cluster, pods, cluster.lbs)


def test_nothing_is_dropped_for_a_ring_before_it_is_staged() -> None:
    """A ring that was handed over is superseded here and switched to all the same: what it has brought is needed."""
    cluster, pods = tracking_cluster(4, first=3, flows=300)
    first = cluster.snapshot
    snapshot = cluster.plan_ring("lb1", "lb2")
    cluster.up_to_prepared(snapshot, cluster.nodes)
    cluster.handover(snapshot, cluster.nodes)
    before = {row.tobytes() for row in records_of(cluster, "lb1")}
    held = cluster["lb1"].owned() | cluster["lb1"].backed()
    assert not held[flow_slots(cluster, records_of(cluster, "lb1"))].all(), "some are of slots that it is about to get"
    newer = cluster.plan_ring("lb1", "lb2", "lb4", in_force=first)
    request = listing(cluster, "lb1", newer)
    cluster["lb1"].go_on(cluster.now_ns)
    cluster.switch(snapshot, cluster.nodes)
    assert RingStep.SWITCHED is step_at(cluster, "lb1")
    assert before == {row.tobytes() for row in records_of(cluster, "lb1")}
    list_to_the_end(cluster, "lb1")
    answer = cluster["lb1"].answers.pop(request)
    assert isinstance(answer, Reply)
    assert isinstance(answer.body, LbStatus)
    assert snapshot.generation == answer.body.committed, "whoever supersedes it hears that it is in force"
    cluster.done(snapshot, cluster.nodes)
    assert [] == broken(cluster, pods, ["lb1", "lb2"])


def test_a_ring_that_is_told_of_twice_drops_nothing_that_it_has_brought_meanwhile() -> None:
    cluster, pods = tracking_cluster(4, first=3, flows=300)
    snapshot = cluster.plan_ring("lb1", "lb2", "lb4")
    node = cluster["lb1"]
    first, second = listing(cluster, "lb1", snapshot), node.begin(snapshot, cluster.now_ns)
    assert 2 == len(node.held)
    late = node.held.pop()
    list_to_the_end(cluster, "lb1")
    assert isinstance(node.answers.pop(first), Reply)
    cluster.up_to_prepared(snapshot, cluster.nodes)
    cluster.handover(snapshot, cluster.nodes)
    brought = {row.tobytes() for row in records_of(cluster, "lb1")}
    assert not (node.owned() | node.backed())[flow_slots(cluster, records_of(cluster, "lb1"))].all()
    node.held.append(late)
    node.holds_lists = True
    list_to_the_end(cluster, "lb1")
    assert isinstance(node.answers.pop(second), Reply)
    assert brought == {row.tobytes() for row in records_of(cluster, "lb1")}
    cluster.switch(snapshot, cluster.nodes)
    cluster.done(snapshot, cluster.nodes)
    assert [] == broken(cluster, pods, ["lb1", "lb2", "lb4"])


def test_a_list_that_fails_in_a_handover_goes_on_and_one_of_an_earlier_round_answers_nobody() -> None:
    cluster, pods = tracking_cluster(3, first=2, flows=300)
    snapshot, node = cluster.plan_ring("lb1", "lb2", "lb3"), cluster["lb1"]
    cluster.up_to_prepared(snapshot, cluster.nodes)
    node.holds_lists = True
    first = node.begin(HandoverCall(snapshot.generation, digest_of(snapshot), 1), cluster.now_ns)
    [stale] = node.held
    second = node.begin(HandoverCall(snapshot.generation, digest_of(snapshot), 2), cluster.now_ns)
    node.held = [stale]
    node.go_on(cluster.now_ns, fails=True)
    assert {first, second}.isdisjoint(node.answers), "the second round will answer both"
    running = node.keeper._state.handover
    assert running is not None
    [token] = open_lists(node, handover._Listed)
    node.held = [DumpRecords(token, running.cursor)]
    node.go_on(cluster.now_ns, fails=True)
    assert running is node.keeper._state.handover, "it goes on where it was"
    node.holds_lists = False
    cluster._collect(node)
    cluster.run(2 * SECOND_NS)
    assert {first, second} <= node.answers.keys()
    assert RingStep.HANDED is step_at(cluster, "lb1")
    others = [name for name in cluster.nodes if name != "lb1"]
    cluster.call(HandoverCall(snapshot.generation, digest_of(snapshot), 2), others)
    cluster.switch(snapshot, cluster.nodes)
    cluster.done(snapshot, cluster.nodes)
    assert [] == broken(cluster, pods, cluster.lbs)
