"""Who has this flow: what is asked, what an owner promises, what an answer is worth, and when it ends."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from lbpod.core.flows import Facts
from lbpod.core.hashing import flow_hash, slot_of
from lbpod.core.layout import FLOW, PENDING, RECORD, SLOT_ROUND_ONE
from lbpod.core.limits import BATCH_MAX, LEASE_NS_MAX, OUTSTANDING_MAX
from lbpod.core.maps import Record
from lbpod.core.messages import (
    Answered,
    Ask,
    AskFailed,
    KeeperEffect,
    LookRecords,
    MemberSeen,
    PendingDrained,
    PutCache,
    Refuse,
    Reply,
    ResolveAnswer,
    ResolveCall,
    Trace,
)
from lbpod.core.model import Affinity, Protocol
from lbpod.core.settle import BUSY
from lbpod.datapath.port import FlowMap
from tests.keepers import CLUSTER, SECOND_NS, VIP_ADDRESS, Cluster, Node, Rows, vip

U32 = npt.NDArray[np.uint32]


def flows_of(count: int, vip_id: int = 1) -> Rows:
    """Flows of clients 198.18.x.y."""
    rows = np.zeros(count, FLOW)
    rows["addr"][:, 10:12] = 0xFF
    rows["addr"][:, 12:14] = (198, 18)
    rows["addr"][:, 14] = np.arange(count) >> 8
    rows["addr"][:, 15] = np.arange(count) & 0xFF
    rows["port_be"] = 1_024 + np.arange(count)
    rows["vip"] = vip_id
    return rows


def slots_of(flows: Rows, port: int = 80, protocol: int = 6) -> U32:
    """Slot of each, one by one: the slow way."""
    hashes = [
        flow_hash(row["addr"].tobytes(), VIP_ADDRESS, int(row["port_be"]), port, protocol, CLUSTER.seed)
        for row in flows
    ]
    return np.array([slot_of(one) for one in hashes], dtype=np.uint32)


def tracking_cluster(protocol: Protocol = Protocol.TCP) -> Cluster:
    """Three LBs after a change that every slot is part of: from pods 1, 2 to pods 3, 4, the old ones draining."""
    cluster = Cluster()
    cluster.change(vip([1, 2], protocol=protocol))
    cluster.change(vip([3, 4], [1, 2], protocol=protocol))
    return cluster


def drained(node: Node, flows: Rows, relayed_ns: int) -> PendingDrained:
    values = np.zeros(len(flows), PENDING)
    values["slot"], values["seen_ns"] = slots_of(flows), relayed_ns
    return PendingDrained(flows, values)


def whats(effects: Sequence[KeeperEffect]) -> list[str]:
    """Of effects that tell people something, and do nothing."""
    assert all(isinstance(effect, Trace) for effect in effects), effects
    return [effect.what for effect in effects if isinstance(effect, Trace)]


def asks_of(node: Node, flows: Rows, now_ns: int, waited_ns: int = 0) -> list[Ask]:
    """waited_ns: for how long the flows have lain in `pending`."""
    effects = node.keeper.step(drained(node, flows, now_ns - waited_ns), now_ns)
    assert all(isinstance(effect, Ask) for effect in effects)
    return [effect for effect in effects if isinstance(effect, Ask)]


def pass_through(node: Node, flows: Rows, now_ns: int) -> None:
    """A packet of each has come through here, and went elsewhere than to `current`."""
    node.datapath.maps.other_seen[int(flows["vip"][0])][slots_of(flows)] = now_ns


def resolved(node: Node, flows: Rows, now_ns: int) -> tuple[U32, U32]:
    """(backends, leases in ms) that a node answers."""
    answer = node.call(ResolveCall(2, flows.tobytes()), now_ns)
    assert isinstance(answer, Reply)
    assert isinstance(answer.body, ResolveAnswer)
    return np.frombuffer(answer.body.backends, "<u4"), np.frombuffer(answer.body.leases_ms, "<u4")


# --- Asking -----------------------------------------------------------------------------------------------------------
def test_each_flow_is_asked_about_at_its_owner() -> None:
    cluster = tracking_cluster()
    node, flows = cluster["lb1"], flows_of(3_000)
    slots = slots_of(flows)
    asked = 0
    for ask in asks_of(node, flows, cluster.now_ns):
        assert isinstance(ask.body, ResolveCall)
        other = cluster._node_of(ask.node)
        owned = other.owned() | (node.owned() & other.backed())
        assert owned[slots_of(np.frombuffer(ask.body.flows, FLOW))].all()
        asked += len(ask.body.flows) // FLOW.itemsize
    own = node.owned() & ~node.backed()
    assert len(flows) == asked
    assert own[slots].any(), "the shell would not note flows of own slots; if it does, the backup is asked"


def test_where_the_owner_seems_down_its_backup_is_asked() -> None:
    cluster = tracking_cluster()
    node, flows = cluster["lb1"], flows_of(2_000)
    cluster.feed("lb1", MemberSeen(1, up=False))
    down = cluster["lb2"]
    for ask in asks_of(node, flows, cluster.now_ns):
        assert isinstance(ask.body, ResolveCall)
        assert "lb3" == cluster._node_of(ask.node).name
        slots = slots_of(np.frombuffer(ask.body.flows, FLOW))
        assert (cluster["lb3"].owned() | (down.owned() & cluster["lb3"].backed()) | node.owned())[slots].all()


def test_questions_are_cut_into_batches_and_bounded_per_peer() -> None:
    cluster = tracking_cluster()
    flows = np.concatenate([flows_of(60_000)] * 12)
    values = np.zeros(len(flows), PENDING)
    values["slot"] = np.tile(slots_of(flows[:60_000]), 12)
    node = cluster["lb1"]
    effects = node.keeper.step(PendingDrained(flows, values), cluster.now_ns)
    asks = [effect for effect in effects if isinstance(effect, Ask)]
    node.keeper.check_invariants()
    for number in {ask.node for ask in asks}:
        bodies = [ask.body for ask in asks if ask.node == number]
        assert OUTSTANDING_MAX == len(bodies)
        assert all(isinstance(body, ResolveCall) and len(body.flows) <= BATCH_MAX * FLOW.itemsize for body in bodies)
    assert [] == node.keeper.step(PendingDrained(flows[:100], values[:100]), cluster.now_ns), "beyond: dropped"
    for ask in asks:
        node.keeper.step(AskFailed(ask.token, "silence"), cluster.now_ns)
    assert node.keeper.step(PendingDrained(flows[:100], values[:100]), cluster.now_ns), "room again"


def test_unknown_vips_and_a_keeper_without_a_ring_ask_nobody() -> None:
    cluster = tracking_cluster()
    stranger = flows_of(5, vip_id=4_000)
    assert [] == asks_of(cluster["lb1"], stranger, cluster.now_ns)
    assert [] == asks_of(Cluster()["lb1"], flows_of(5), cluster.now_ns)


# --- Answering --------------------------------------------------------------------------------------------------------
def test_an_owner_answers_base_in_tracking_slots_and_current_in_steady_ones() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    cluster.change(vip([1, 2, 3]))
    node, flows = cluster["lb1"], flows_of(2_000)
    pass_through(node, flows, cluster.now_ns)
    slots = slots_of(flows)
    backends, leases_ms = resolved(node, flows, cluster.now_ns)
    ours = (node.owned() | node.backed())[slots]
    expected = np.where(node.tracking()[slots], node.base()[slots], node.current()[slots])
    assert (expected[ours] == backends[ours]).all()
    assert (leases_ms[ours] == 2_000).all(), "a quarter of the idle time"
    assert not backends[~ours].any(), "who is no replica cannot tell"
    assert not leases_ms[~ours].any()


def test_a_record_says_more_than_base_but_only_while_its_backend_lives() -> None:
    cluster = tracking_cluster()
    node = cluster["lb1"]
    flows = flows_of(400)
    flows = flows[node.owned()[slots_of(flows)]]
    records = np.zeros(len(flows), RECORD)
    records["backend"], records["round"] = 3, node.rounds(slots_of(flows))
    records["seen_ns"] = cluster.now_ns
    node.datapath.flows_put(FlowMap.RECORDS, flows, records)
    assert {3} == set(resolved(node, flows, cluster.now_ns)[0].tolist())
    cluster.change(vip([4], [1, 2]))
    backends, leases_ms = resolved(node, flows, cluster.now_ns)
    assert set(backends.tolist()) <= {1, 2}, "the record is void, its flows are over; whoever comes goes to base"
    assert not leases_ms.any(), "a new connection may have the same five-tuple"


def test_a_dead_base_is_answered_with_current_and_no_lease_for_those_that_died_with_it() -> None:
    cluster = Cluster()
    cluster.change(vip([1]))
    cluster.change(vip([2]))
    node, flows = cluster["lb1"], flows_of(100)
    flows = flows[(node.owned() | node.backed())[slots_of(flows)]]
    backends, leases_ms = resolved(node, flows, cluster.now_ns)
    assert {2} == set(backends.tolist())
    assert not leases_ms.any(), "the next connection with this five-tuple would meet it"
    records = np.zeros(len(flows), RECORD)
    records["backend"], records["round"] = 2, node.rounds(slots_of(flows))
    records["seen_ns"] = cluster.now_ns
    node.datapath.flows_put(FlowMap.RECORDS, flows, records)
    assert resolved(node, flows, cluster.now_ns)[1].all(), "whose flow has begun since"
    cluster.run(20 * SECOND_NS)
    assert not node.tracking().any()
    cluster.change(vip([2, 3]))
    pass_through(node, flows, cluster.now_ns)
    _, leases_ms = resolved(node, flows, cluster.now_ns)
    assert leases_ms[node.tracking()[slots_of(flows)]].all(), "in its next round the slot has a base that lives"


def test_no_lease_for_those_that_died_with_an_earlier_base_though_another_has_come_after_it() -> None:
    cluster = Cluster()
    cluster.change(vip([1]))
    cluster.change(vip([2]))
    cluster.change(vip([2, 3]))
    node, flows = cluster["lb1"], flows_of(100)
    flows = flows[(node.owned() & (node.base() != node.current()))[slots_of(flows)]]
    backends, leases_ms = resolved(node, flows, cluster.now_ns)
    assert {2} == set(backends.tolist()), "base, as it is now"
    assert not leases_ms.any(), "theirs was 1"


def test_a_udp_flow_without_a_record_gets_no_lease_so_that_the_owner_sees_it() -> None:
    cluster = tracking_cluster(protocol=Protocol.UDP)
    node, flows = cluster["lb1"], flows_of(400)
    flows = flows[node.owned()[slots_of(flows, protocol=17)]]
    backends, leases_ms = resolved(node, flows, cluster.now_ns)
    assert backends.all()
    assert not leases_ms.any()
    records = np.zeros(len(flows), RECORD)
    records["backend"], records["round"] = 1, node.rounds(slots_of(flows, protocol=17))
    records["seen_ns"] = cluster.now_ns
    node.datapath.flows_put(FlowMap.RECORDS, flows, records)
    assert resolved(node, flows, cluster.now_ns)[1].all()


def test_a_keeper_without_a_snapshot_cannot_tell() -> None:
    backends, leases_ms = resolved(Cluster()["lb1"], flows_of(10), 1)
    assert not backends.any()
    assert not leases_ms.any()


def test_a_look_that_fails_is_refused_for_now() -> None:
    cluster = tracking_cluster()
    node = cluster["lb1"]
    node.fails = lambda effect: isinstance(effect, LookRecords)
    answer = node.call(ResolveCall(2, flows_of(3).tobytes()), cluster.now_ns)
    assert isinstance(answer, Refuse)
    assert BUSY == answer.status


def test_long_idle_times_do_not_make_long_leases() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2], idle_s=3_600))
    cluster.change(vip([3], [1, 2], idle_s=3_600))
    pass_through(cluster["lb1"], flows_of(500), cluster.now_ns)
    _, leases_ms = resolved(cluster["lb1"], flows_of(500), cluster.now_ns)
    assert LEASE_NS_MAX // 1_000_000 == int(leases_ms.max())


def test_a_lease_counts_from_the_stamp_for_the_packet_that_was_relayed_may_be_lost() -> None:
    """A flow whose relayed packets are lost, one after the other, is not kept alive by questions about it: its owner
    would forget it, or settle its slot, while it lives on leases."""
    cluster = tracking_cluster()
    node, flows = cluster["lb1"], flows_of(400)
    flows = flows[node.owned()[slots_of(flows)]]
    assert not resolved(node, flows, cluster.now_ns)[1].any(), "nothing of these slots has come here"
    pass_through(node, flows, cluster.now_ns - SECOND_NS // 2)
    assert {1_500} == set(resolved(node, flows, cluster.now_ns)[1].tolist())
    records = np.zeros(len(flows), RECORD)
    records["backend"], records["round"] = 3, node.rounds(slots_of(flows))
    records["seen_ns"] = cluster.now_ns - SECOND_NS
    node.datapath.flows_put(FlowMap.RECORDS, flows, records)
    assert {1_000} == set(resolved(node, flows, cluster.now_ns)[1].tolist()), "its record's, where it has one"
    assert not resolved(node, flows, cluster.now_ns + SECOND_NS)[1].any()


# --- Believing --------------------------------------------------------------------------------------------------------
def answered(node: Node, flows: Rows, answer: ResolveAnswer, now_ns: int, waited_ns: int = 0) -> list[KeeperEffect]:
    """What a node does with an answer that comes half a second after the question."""
    asks = asks_of(node, flows, now_ns, waited_ns)
    assert 1 == len(asks)
    return node.keeper.step(Answered(asks[0].token, answer), now_ns + SECOND_NS // 2)


def one_owned_elsewhere(cluster: Cluster, count: int = 200) -> Rows:
    """Flows of slots that lb2 owns."""
    flows = flows_of(count)
    return flows[cluster["lb2"].owned()[slots_of(flows)]]


def make_answer(count: int, backend: int, lease_ms: int = 2_000) -> ResolveAnswer:
    return ResolveAnswer(np.full(count, backend, "<u4").tobytes(), np.full(count, lease_ms, "<u4").tobytes())


def test_a_lease_counts_from_the_packet_that_the_owner_saw() -> None:
    """Not from the question: an agent that stood still asks about packets of seconds ago."""
    cluster = tracking_cluster()
    node, flows = cluster["lb1"], one_owned_elsewhere(cluster)
    for waited_ns in (0, SECOND_NS, 5 * SECOND_NS):
        [put] = answered(node, flows, make_answer(len(flows), 1), cluster.now_ns, waited_ns)
        assert isinstance(put, PutCache)
        assert put.flows.tobytes() == flows.tobytes()
        assert {cluster.now_ns - waited_ns + 2 * SECOND_NS} == set(put.leases["until_ns"].tolist())
        assert {1} == set(put.leases["backend"].tolist())


def test_a_lease_that_had_begun_before_ends_no_later_for_the_question() -> None:
    cluster = tracking_cluster()
    flows = one_owned_elsewhere(cluster)
    [put] = answered(cluster["lb1"], flows, make_answer(len(flows), 1, 700), cluster.now_ns)
    assert isinstance(put, PutCache)
    assert {cluster.now_ns + 700_000_000} == set(put.leases["until_ns"].tolist()), "however late the answer comes"


def test_no_lease_is_longer_than_this_lb_would_give() -> None:
    cluster = tracking_cluster()
    flows = one_owned_elsewhere(cluster)
    [put] = answered(cluster["lb1"], flows, make_answer(len(flows), 1, 3_600_000), cluster.now_ns)
    assert isinstance(put, PutCache)
    assert {cluster.now_ns + 2 * SECOND_NS} == set(put.leases["until_ns"].tolist())


@pytest.mark.parametrize(
    ("backend", "lease_ms"), [(0, 2_000), (1, 0), (99, 2_000)], ids=["cannot tell", "do not keep", "nobody's id"]
)
def test_useless_answers_are_not_kept(backend: int, lease_ms: int) -> None:
    cluster = tracking_cluster()
    flows = one_owned_elsewhere(cluster)
    assert [] == answered(cluster["lb1"], flows, make_answer(len(flows), backend, lease_ms), cluster.now_ns)


def test_a_backend_of_another_vip_is_not_believed() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]), vip([5], port=81))
    cluster.change(vip([3, 4], [1, 2]), vip([5], port=81))
    assert cluster.snapshot is not None
    [stranger] = [one.id for found in cluster.snapshot.vips if found.port == 81 for one in found.backends]
    flows = one_owned_elsewhere(cluster)
    assert [] == answered(cluster["lb1"], flows, make_answer(len(flows), stranger), cluster.now_ns)


def test_an_answer_of_the_wrong_length_or_to_nobody_is_dropped() -> None:
    cluster = tracking_cluster()
    node, flows = cluster["lb1"], one_owned_elsewhere(cluster)
    assert [] == answered(node, flows, make_answer(len(flows) + 1, 1), cluster.now_ns)
    assert ["late answer"] == whats(node.keeper.step(Answered(4_711, make_answer(3, 1)), cluster.now_ns))


def test_an_answer_counts_once() -> None:
    cluster = tracking_cluster()
    node, flows = cluster["lb1"], one_owned_elsewhere(cluster)
    [ask] = asks_of(node, flows, cluster.now_ns)
    answer = Answered(ask.token, make_answer(len(flows), 1))
    assert 1 == len(node.keeper.step(answer, cluster.now_ns))
    assert ["late answer"] == whats(node.keeper.step(answer, cluster.now_ns))


def test_what_has_become_steady_meanwhile_is_not_kept() -> None:
    cluster = Cluster()
    cluster.change(vip([1]))
    cluster.change(vip([2]))
    node, flows = cluster["lb1"], one_owned_elsewhere(cluster)
    [ask] = asks_of(node, flows, cluster.now_ns)
    cluster.run(5 * SECOND_NS)
    assert 0 == node.status.tracking_slots
    assert [] == node.keeper.step(Answered(ask.token, make_answer(len(flows), 2)), cluster.now_ns)


def test_a_lease_ends_in_the_fast_path() -> None:
    cluster = tracking_cluster()
    node, flows = cluster["lb1"], one_owned_elsewhere(cluster)
    pass_through(cluster["lb2"], flows, cluster.now_ns)
    cluster.feed("lb1", drained(node, flows, cluster.now_ns))
    cluster.run(SECOND_NS // 5)
    leases = node.datapath.maps.cache.rows.values()
    assert len(flows) == len(leases)
    assert all(lease.until_ns <= cluster.now_ns + 2 * SECOND_NS for lease in leases)


# --- Arithmetic -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("affinity", list(Affinity))
def test_slots_of_a_batch_are_those_of_its_flows(affinity: Affinity) -> None:
    cluster = Cluster()
    snapshot = cluster.plan(vip([1], affinity=affinity), vip([2], port=53, protocol=Protocol.UDP), vip([3], port=81))
    facts = Facts(snapshot.vips, CLUSTER.seed)
    flows = flows_of(600)
    flows["vip"] = 1 + np.arange(600) % 3
    foreign = flows.copy()
    foreign["addr"][::7, 0] = 0x20
    by_id = {found.id: found for found in snapshot.vips}
    for rows in (flows, foreign):
        expected = []
        for row in rows:
            found = by_id[int(row["vip"])]
            port = 0 if found.affinity is Affinity.CLIENT_IP else int(row["port_be"])
            made = flow_hash(row["addr"].tobytes(), VIP_ADDRESS, port, found.port, int(found.protocol), CLUSTER.seed)
            expected.append(slot_of(made))
        assert expected == facts.slots(rows).tolist()


def test_a_record_hit_of_the_fast_path_is_what_the_owner_answers() -> None:
    cluster = tracking_cluster()
    node, flows = cluster["lb1"], flows_of(300)
    flows = flows[node.owned()[slots_of(flows)]][:5]
    rounds = node.rounds(slots_of(flows))
    node.datapath.maps.records.put(flows[0].tobytes(), Record(4, int(rounds[0]), 1))
    backends, _ = resolved(node, flows, cluster.now_ns)
    assert 4 == backends[0]


def test_nothing_is_said_of_a_flow_of_which_a_syn_alone_was_seen() -> None:
    """Its client has spoken, or nobody would ask; that made no full record, so the fast path doubts this one."""
    cluster = tracking_cluster()
    node, flows = cluster["lb1"], flows_of(300)
    flows = flows[node.owned()[slots_of(flows)]][:2]
    rounds = node.rounds(slots_of(flows))
    node.datapath.maps.embryonic.put(flows[0].tobytes(), Record(4, int(rounds[0]), 1))
    backends, leases = resolved(node, flows, cluster.now_ns)
    assert (0, 0) == (backends[0], leases[0])
    assert 0 != backends[1], "the other one goes to base"
    node.datapath.maps.embryonic.put(flows[0].tobytes(), Record(4, int(rounds[0]) + SLOT_ROUND_ONE, 1))
    backends, _ = resolved(node, flows, cluster.now_ns)
    assert 0 != backends[0], "a record of another round says nothing, and is no obstacle"
