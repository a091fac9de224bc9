"""Writes that fail: nothing is acknowledged that was not written, and what was decided is written in the end."""

from collections.abc import Callable

import pytest

from lbpod.core.limits import CALL_LOST_NS, EARLY_AFTER_NS, QUEUE_MAX, TICK_NS
from lbpod.core.messages import (
    Answered,
    Ask,
    Called,
    CommitCall,
    Configure,
    CreateVip,
    DeleteVip,
    DumpRecords,
    KeeperEffect,
    LookSeen,
    PrepareCall,
    PutCache,
    QuietAnswer,
    QuietCall,
    Refuse,
    Remember,
    Reply,
    ResolveCall,
    Tick,
    Trace,
    WriteOwnership,
    WriteSlots,
)
from lbpod.core.snapshot import digest_of
from tests.keepers import SECOND_NS, Cluster, Node, never, vip
from tests.unit.test_keeper_resolve import flows_of

WRITES = (CreateVip, Configure, WriteOwnership, WriteSlots, Remember)


def of_kind(*kinds: type[object]) -> Callable[[KeeperEffect], bool]:
    return lambda effect: isinstance(effect, kinds)


def assert_maps_are_the_mirror(node: Node) -> None:
    for number, vs in node.keeper._state.vips.items():
        assert (vs.slots.words == node.words(number)).all()


def first_prepare(cluster: Cluster) -> PrepareCall:
    snapshot = cluster.plan(vip([1, 2]), vip([3], port=81))
    cluster.stage(snapshot)
    return PrepareCall(snapshot.generation, digest_of(snapshot))


@pytest.mark.parametrize("kind", WRITES)
def test_a_prepare_that_cannot_be_written_is_refused_for_now_and_made_good(kind: type[object]) -> None:
    cluster = Cluster()
    node, call = cluster["lb1"], first_prepare(cluster)
    if kind is WriteSlots:
        cluster.prepare(cluster.snapshot)  # type: ignore[arg-type]
        cluster.commit(cluster.snapshot)  # type: ignore[arg-type]
        call_of = cluster.plan(vip([1, 2, 4]), vip([3], port=81))
        cluster.stage(call_of)
        call = PrepareCall(call_of.generation, digest_of(call_of))
    committed = node.status.committed
    node.fails = of_kind(kind)
    for _ in range(2):
        answer = node.call(call, cluster.now_ns)
        assert isinstance(answer, Refuse)
        assert 503 == answer.status
        assert (committed, 0) == (node.status.committed, node.status.prepared)
        assert "the map says no" in node.status.problem
    node.fails = never
    assert isinstance(node.call(call, cluster.now_ns), Reply)
    assert call.generation == node.status.prepared
    assert "" == node.status.problem
    assert_maps_are_the_mirror(node)


@pytest.mark.parametrize("kind", [WriteSlots, Configure, Remember, DeleteVip])
def test_a_commit_that_cannot_be_written_is_refused_for_now_and_made_good_by_itself(kind: type[object]) -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]), vip([5], port=81))
    snapshot = cluster.plan(vip([3, 4], [2]))
    cluster.stage(snapshot)
    cluster.prepare(snapshot)
    node = cluster["lb1"]
    node.fails = of_kind(kind)
    answer = node.call(CommitCall(2, digest_of(snapshot)), cluster.now_ns)
    assert isinstance(answer, Refuse)
    assert 503 == answer.status
    assert (1, 2) == (node.status.committed, node.status.prepared)
    node.feed(Tick(), cluster.now_ns + TICK_NS)
    assert (1, 2) == (node.status.committed, node.status.prepared), "still not written"
    node.fails = never
    node.feed(Tick(), cluster.now_ns + 2 * TICK_NS)
    assert (2, 0) == (node.status.committed, node.status.prepared)
    assert isinstance(node.call(CommitCall(2, digest_of(snapshot)), cluster.now_ns), Reply)
    assert_maps_are_the_mirror(node)
    assert [1] == list(node.datapath.vip_ids())
    assert snapshot == node.remembered.committed


def test_slots_written_late_count_their_time_anew() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    snapshot = cluster.plan(vip([3, 4]))
    cluster.stage(snapshot)
    cluster.prepare(snapshot)
    node = cluster["lb1"]
    node.fails = of_kind(WriteSlots)
    assert isinstance(node.call(CommitCall(2, digest_of(snapshot)), cluster.now_ns), Refuse)
    cluster.commit(snapshot, ["lb2", "lb3", "host1", "host2"])
    cluster.run(5 * SECOND_NS)
    node.fails = never
    cluster.run(SECOND_NS)
    assert node.tracking()[node.owned() | node.backed()].all(), "new flows had the old current until now"
    cluster.run(9 * SECOND_NS)
    assert [0, 0, 0] == [one.status.tracking_slots for one in cluster.muxes]


def test_a_settle_that_cannot_be_written_is_not_agreed_to() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    cluster.change(vip([3, 4]))
    backup = cluster["lb2"]
    backup.fails = of_kind(WriteSlots)
    cluster.run(6 * SECOND_NS)
    assert cluster["lb1"].tracking()[backup.backed()].all()
    assert 2 == backup.status.committed
    backup.fails = never
    cluster.run(12 * SECOND_NS)
    assert [0, 0, 0] == [one.status.tracking_slots for one in cluster.muxes]
    assert_maps_are_the_mirror(backup)


@pytest.mark.parametrize("kind", [LookSeen, DumpRecords, PutCache])
def test_what_cannot_be_read_only_delays(kind: type[object]) -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    cluster.change(vip([3, 4]))
    for node in cluster.muxes:
        node.fails = of_kind(kind)
    cluster.run(4 * SECOND_NS)
    for node in cluster.muxes:
        node.fails = never
        assert "" == node.status.problem
    cluster.run(10 * SECOND_NS)
    assert [0, 0, 0] == [one.status.tracking_slots for one in cluster.muxes]


def test_an_answer_that_never_comes_is_given_up() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    cluster.change(vip([3, 4], [1, 2]))
    node = cluster["lb1"]
    [*asks] = node.keeper.step(Tick(), cluster.now_ns + EARLY_AFTER_NS + SECOND_NS)
    late = next(effect for effect in asks if isinstance(effect, Ask) and isinstance(effect.body, QuietCall))
    node.keeper.step(Tick(), cluster.now_ns + EARLY_AFTER_NS + SECOND_NS + CALL_LOST_NS)
    node.keeper.check_invariants()
    [trace] = node.keeper.step(Answered(late.token, QuietAnswer(True, b"")), cluster.now_ns + CALL_LOST_NS * 2)
    assert isinstance(trace, Trace)
    assert "late answer" == trace.what


def test_too_many_questions_are_refused_and_not_kept() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    cluster.change(vip([3, 4], [1, 2]))
    node = cluster["lb1"]
    body = ResolveCall(1, flows_of(2).tobytes())
    for request in range(QUEUE_MAX):
        node.keeper.step(Called(request, body), cluster.now_ns)
    [refuse] = node.keeper.step(Called(QUEUE_MAX, body), cluster.now_ns)
    assert isinstance(refuse, Refuse)
    assert 503 == refuse.status
    node.keeper.check_invariants()
