"""When records go: by agreement, with their slot, with their backend; and never at a backup's own motion."""

import numpy as np

from lbpod.core.layout import RECORD
from lbpod.core.limits import ENDED_NS, FORGET_SCAN_NS, LEASE_NS_MAX
from lbpod.core.messages import (
    DropRecords,
    DumpRecords,
    ForgetAnswer,
    ForgetCall,
    KeeperEffect,
    PeerCall,
    QuietCall,
    Reply,
    SettleCall,
    SettleStep,
)
from lbpod.datapath.port import FlowMap
from tests.keepers import SECOND_NS, SLICE_MAX, Cluster, Node, Rows, vip
from tests.unit.test_keeper_resolve import flows_of, slots_of

WINDOW_NS = 11 * SECOND_NS
"""Of a VIP with idle 8 s: 8 + 2 + 1."""


def no_settling(sender: str, receiver: str, body: PeerCall) -> bool:
    return isinstance(body, QuietCall | SettleCall)


def changed(lbs: int = 3) -> Cluster:
    """All slots tracking, from pods 1, 2, which drain, to 3, 4; nothing settles, so that only time can tell."""
    cluster = Cluster(lbs)
    cluster.change(vip([1, 2]))
    cluster.change(vip([3, 4], [1, 2]))
    cluster.blocked = no_settling
    return cluster


def record(node: Node, flows: Rows, seen_ns: int, backend: int = 3) -> None:
    rows = np.zeros(len(flows), RECORD)
    rows["backend"], rows["round"], rows["seen_ns"] = backend, node.rounds(slots_of(flows)), seen_ns
    node.datapath.flows_put(FlowMap.RECORDS, flows, rows)


def known(node: Node) -> int:
    return len(node.datapath.maps.records)


def of_lb1_and_lb2(cluster: Cluster) -> Rows:
    """Flows of slots that lb1 owns and lb2 backs."""
    flows = flows_of(300)
    return flows[(cluster["lb1"].owned() & cluster["lb2"].backed())[slots_of(flows)]]


def about_to_settle() -> tuple[Cluster, Node, Rows]:
    """All slots tracking, from pods that have died: they settle soon. lb1, and flows that it has recorded."""
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    cluster.change(vip([3, 4]))
    owner, flows = cluster["lb1"], of_lb1_and_lb2(cluster)
    record(owner, flows, cluster.now_ns)
    return cluster, owner, flows


def test_silent_records_go_from_both_together_and_not_before_the_window() -> None:
    cluster = changed()
    flows = of_lb1_and_lb2(cluster)
    for name in ("lb1", "lb2"):
        record(cluster[name], flows, cluster.now_ns)
    cluster.run(FORGET_SCAN_NS + SECOND_NS // 2)
    assert len(flows) == known(cluster["lb1"]) == known(cluster["lb2"])
    cluster.run(FORGET_SCAN_NS)
    assert 0 == known(cluster["lb1"]) == known(cluster["lb2"])


def test_what_the_backup_has_seen_stays_at_both() -> None:
    cluster = changed()
    flows = of_lb1_and_lb2(cluster)
    record(cluster["lb1"], flows, cluster.now_ns)
    for _ in range(3):
        record(cluster["lb2"], flows[:3], cluster.now_ns)
        cluster.run(FORGET_SCAN_NS)
    assert 3 == known(cluster["lb1"]) == known(cluster["lb2"])


def test_what_the_owner_has_seen_since_it_asked_stays() -> None:
    cluster = changed()
    flows = of_lb1_and_lb2(cluster)
    record(cluster["lb1"], flows, cluster.now_ns)
    owner = cluster["lb1"]

    def wake(sender: str, receiver: str, body: PeerCall) -> bool:
        if isinstance(body, ForgetCall):
            record(owner, flows[:2], cluster.now_ns)
        return no_settling(sender, receiver, body)

    cluster.blocked = wake
    cluster.run(FORGET_SCAN_NS + WINDOW_NS)
    assert 2 == known(owner)


def test_a_backup_never_starts() -> None:
    cluster = changed()
    cluster.run(SECOND_NS)  # agents that have just started send each other what they may have missed
    flows = of_lb1_and_lb2(cluster)
    record(cluster["lb2"], flows, cluster.now_ns)
    cluster.run(WINDOW_NS + 2 * FORGET_SCAN_NS)
    assert len(flows) == known(cluster["lb2"]), "the owner has none, so nobody asks"


def test_no_answer_and_no_backup_that_seems_up_mean_nothing_is_forgotten() -> None:
    cluster = changed()
    flows = of_lb1_and_lb2(cluster)
    record(cluster["lb1"], flows, cluster.now_ns)
    cluster.blocked = lambda sender, receiver, body: isinstance(body, ForgetCall) or no_settling(sender, receiver, body)
    cluster.run(WINDOW_NS + 2 * FORGET_SCAN_NS)
    assert len(flows) == known(cluster["lb1"])
    cluster.blocked = no_settling
    cluster.believe("lb1", 1, up=False)
    cluster.run(2 * FORGET_SCAN_NS)
    assert len(flows) == known(cluster["lb1"])


def test_a_ring_of_one_forgets_alone() -> None:
    cluster = changed(lbs=1)
    record(cluster["lb1"], flows_of(50), cluster.now_ns)
    cluster.run(FORGET_SCAN_NS)
    cluster.blocked = no_settling
    cluster.run(WINDOW_NS + FORGET_SCAN_NS)
    assert 0 == known(cluster["lb1"])


def forgotten(node: Node, member: int, flows: Rows, now_ns: int) -> list[int]:
    answer = node.call(ForgetCall(member, flows.tobytes()), now_ns)
    assert isinstance(answer, Reply)
    assert isinstance(answer.body, ForgetAnswer)
    return list(answer.body.agreed)


def test_the_backup_agrees_to_the_owner_of_the_slot_about_its_own_slots_only() -> None:
    cluster = changed()
    flows = of_lb1_and_lb2(cluster)[:4]
    late_ns = cluster.now_ns + WINDOW_NS + 1
    record(cluster["lb2"], flows[:2], cluster.now_ns)
    assert [0, 0, 1, 1] == forgotten(cluster["lb2"], 0, flows, cluster.now_ns + WINDOW_NS), "not yet"
    assert [0] * 4 == forgotten(cluster["lb2"], 2, flows, late_ns), "lb3 does not own them"
    assert [0] * 4 == forgotten(cluster["lb3"], 0, flows, late_ns), "lb3 does not back them"
    assert 2 == known(cluster["lb2"])
    assert [1] * 4 == forgotten(cluster["lb2"], 0, flows, late_ns)
    assert 0 == known(cluster["lb2"])
    flows["vip"] = 9
    assert [0] * 4 == forgotten(cluster["lb2"], 0, flows, late_ns), "of an unknown VIP one cannot tell"


def test_records_go_with_their_slot_at_every_replica() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    cluster.change(vip([3, 4]))
    flows = of_lb1_and_lb2(cluster)
    for name in ("lb1", "lb2"):
        record(cluster[name], flows, cluster.now_ns)
    cluster.run(2 * SECOND_NS)
    assert 0 == cluster["lb1"].status.tracking_slots
    cluster.run(2 * SECOND_NS)
    assert 0 == known(cluster["lb1"]) == known(cluster["lb2"])


def test_an_old_record_goes_even_if_its_slot_tracks_again_and_a_new_one_stays() -> None:
    cluster, owner, flows = about_to_settle()
    owner.fails = lambda effect: isinstance(effect, DropRecords)
    cluster.run(4 * SECOND_NS)
    assert 0 == owner.status.tracking_slots
    assert len(flows) == known(owner), "the map has refused to let them go"
    cluster.change(vip([5, 6], [3, 4]))
    cluster.blocked = no_settling
    record(owner, flows[:2], cluster.now_ns, backend=5)
    owner.fails = lambda effect: False
    cluster.run(3 * SECOND_NS)
    assert 2 == known(owner)


def test_one_drop_that_fails_in_the_middle_of_a_list_is_made_good_by_the_next() -> None:
    cluster, owner, flows = about_to_settle()
    assert len(flows) > 3 * SLICE_MAX
    drops: list[int] = []

    def fails(effect: KeeperEffect) -> bool:
        drops.extend([len(effect.flows)] if isinstance(effect, DropRecords) else [])
        return isinstance(effect, DropRecords) and len(drops) == 2

    owner.fails = fails
    cluster.run(3 * SECOND_NS)
    assert 0 == owner.status.tracking_slots
    assert max(drops) <= SLICE_MAX
    cluster.run(2 * SECOND_NS)
    assert 0 == known(owner)


def test_what_is_recorded_while_a_list_is_looked_at_stays() -> None:
    """A five-tuple that is used again: what the list says of it is of the flow before."""
    cluster, owner, flows = about_to_settle()
    drop, again = owner.datapath.records_drop, flows[:5]

    def drop_late(keys: Rows, values: Rows) -> None:
        owner.datapath.records_drop = drop  # type: ignore[method-assign]
        record(owner, again, cluster.now_ns, backend=4)
        drop(keys, values)

    owner.datapath.records_drop = drop_late  # type: ignore[method-assign]
    for _ in range(50):
        cluster.run(SECOND_NS // 10)
        if known(owner) < len(flows):
            break
    left, _ = owner.datapath.flows_dump(FlowMap.RECORDS)
    assert {row.tobytes() for row in again} <= {row.tobytes() for row in left}
    assert len(left) < len(flows)


def test_what_a_backup_has_agreed_to_is_over_for_its_records_though_nobody_tells_it() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    cluster.change(vip([3, 4]))
    flows = of_lb1_and_lb2(cluster)
    cluster.blocked = lambda sender, receiver, body: (
        isinstance(body, SettleCall) and body.step is not SettleStep.ASK and "lb2" in (sender, receiver)
    )
    cluster.now_ns += 1
    current = cluster["lb2"].current()[slots_of(flows)]
    flows, kept = flows[current == 3], flows[current == 4]
    for name in ("lb1", "lb2"):
        record(cluster[name], flows, cluster.now_ns, backend=4)
        record(cluster[name], kept, cluster.now_ns, backend=4)
    cluster.run(4 * SECOND_NS)
    assert cluster["lb2"].status.tracking_slots > 0
    left, _ = cluster["lb2"].datapath.flows_dump(FlowMap.RECORDS)
    names = [sorted(row.tobytes() for row in rows) for rows in (kept, left)]
    assert names[0] == names[1], "they may live, and base may yet be set to another replica's"


def test_what_a_chain_has_left_in_a_steady_slot_goes_when_the_slot_tracks() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    flows = of_lb1_and_lb2(cluster)
    record(cluster["lb1"], flows, cluster.now_ns, backend=1)
    cluster.now_ns += 1
    cluster.change(vip([3, 4], [1, 2]))
    cluster.blocked = no_settling
    record(cluster["lb1"], flows[:2], cluster.now_ns, backend=3)
    cluster.run(3 * SECOND_NS)
    assert 2 == known(cluster["lb1"]), "those that were recorded since"


def test_records_of_dead_backends_go_and_so_do_those_of_vips_that_are_no_more() -> None:
    cluster = changed()
    node, flows = cluster["lb1"], flows_of(60)
    record(node, flows[:30], cluster.now_ns, backend=1)
    other = flows[30:].copy()
    other["vip"] = 7
    record(node, other, cluster.now_ns)
    cluster.change(vip([3, 4], [2]))
    cluster.run(ENDED_NS - SECOND_NS)
    assert 20 < known(node) <= 30, "that they ended with their backend is worth knowing while their slots track"
    cluster.run(FORGET_SCAN_NS + 2 * SECOND_NS)
    assert 0 == known(node)


def test_scans_end_where_there_is_nothing_left_to_forget() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    cluster.change(vip([3, 4]))
    cluster.run(LEASE_NS_MAX)
    node = cluster["lb1"]
    node.effects.clear()
    cluster.run(3 * FORGET_SCAN_NS)
    assert [] == [effect for effect in node.effects if isinstance(effect, DumpRecords)]


def test_an_agent_that_restarts_does_not_know_any_more_who_else_may_have_seen_a_flow() -> None:
    """A handover has brought the record a while ago; the flow was seen where it came from until just before the ring
    changed. When that was has died with the agent."""
    cluster = changed(lbs=1)
    node, flows = cluster["lb1"], flows_of(3)
    record(node, flows, cluster.now_ns)
    cluster.now_ns += WINDOW_NS + SECOND_NS
    node.restart(cluster.now_ns)
    cluster.run(FORGET_SCAN_NS + 2 * SECOND_NS)
    assert 3 == known(node)
    cluster.run(WINDOW_NS + FORGET_SCAN_NS + SECOND_NS)
    assert 0 == known(node)
