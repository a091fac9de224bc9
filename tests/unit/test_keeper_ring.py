"""A ring change at the LBs: join, leave, loss, given up half way; what is handed over, and what must not be.

The Keepers are real, maps and network are in memory (tests/keepers.py); each test plays the controller, one step at a
time, and looks at maps and packets. Who calls when is the Planner's, and its tests'.
"""

from collections.abc import Iterable
from typing import Final

import numpy as np
import pytest

from lbpod.core.layout import FLOW, RECORD, RECORD_MISSING
from lbpod.core.limits import (
    BEAT_DOWN_NS,
    HANDOVER_HOLD_NS,
    HANDOVER_RECORDS_MAX,
    HANDOVER_VIPS_MAX,
    MARGIN_NS,
    SLOT_COUNT,
)
from lbpod.core.messages import (
    CommitCall,
    HandoverCall,
    LbStatus,
    LeaveWanted,
    PeerCall,
    PrepareCall,
    Refuse,
    Reply,
    RingCall,
    RingDoneCall,
    RingPrepareCall,
    RingStep,
    RingSwitchCall,
    StateCall,
)
from lbpod.core.model import Snapshot, World, WorldNode, WorldVip
from lbpod.core.ownership import backups, owners
from lbpod.core.snapshot import digest_of, next_snapshot, ring_snapshot
from lbpod.datapath.port import FlowMap
from tests.bpf.frames import ACK, SYN, frame, ipv4, tcp
from tests.keepers import CLUSTER, HOSTS, SECOND_NS, VIP_ADDRESS, Cluster, Rows, vip

WEB: Final = vip((1, 2, 3, 4))


class RingCluster(Cluster):
    """LBs of which some form the first ring, and a controller that changes it."""

    def __init__(self, lbs: int, first: int) -> None:
        super().__init__(lbs)
        self.first = self.lbs[:first]
        self.ring: tuple[str, ...] = self.first
        self.round = 0

    @property
    def world_nodes(self) -> tuple[WorldNode, ...]:
        return tuple(
            WorldNode(name, node.address, f"{name}:9900", name in self.lbs) for name, node in self.nodes.items()
        )

    def plan(self, *vips: WorldVip) -> Snapshot:
        self.generation += 1
        made, _ = next_snapshot(
            World(self.world_nodes, vips), self.snapshot, CLUSTER, self.generation, self._tables, first_ring=self.first
        )
        assert made is not None, "a plan changes something"
        self.snapshot = made
        return made

    def plan_ring(self, *members: str, in_force: Snapshot | None = None) -> Snapshot:
        """The next ring; in_force: where it replaces a change that is not in force."""
        assert self.snapshot is not None
        self.generation += 1
        newest, world = self.snapshot, World(self.world_nodes)
        self.snapshot = ring_snapshot(in_force or newest, newest, world, members, self.generation, newest.next_ids)
        return self.snapshot

    def call(self, body: Snapshot | RingCall | PrepareCall | CommitCall, names: Iterable[str]) -> dict[str, LbStatus]:
        """Call some nodes and let everything arrive; who does not answer is missing in the result."""
        waiting: dict[str, int] = {}
        for name in names:
            waiting[name] = self.nodes[name].begin(body, self.now_ns)
            self._collect(self.nodes[name])
        self.deliver()
        found: dict[str, LbStatus] = {}
        for name, request in waiting.items():
            answer = self.nodes[name].answers.pop(request, None)
            assert not isinstance(answer, Refuse), answer
            if answer is not None:
                assert isinstance(answer.body, LbStatus)
                found[name] = answer.body
        return found

    def up_to_prepared(self, snapshot: Snapshot, names: Iterable[str]) -> None:
        names = list(names)
        self.call(snapshot, names)
        self.call(RingPrepareCall(snapshot.generation, digest_of(snapshot)), names)

    def handover(self, snapshot: Snapshot, names: Iterable[str], lost: tuple[int, ...] = ()) -> dict[str, LbStatus]:
        self.round += 1
        return self.call(HandoverCall(snapshot.generation, digest_of(snapshot), self.round, lost), names)

    def switch(self, snapshot: Snapshot, names: Iterable[str]) -> None:
        self.call(RingSwitchCall(snapshot.generation, digest_of(snapshot)), names)

    def done(self, snapshot: Snapshot, names: Iterable[str]) -> None:
        self.call(RingDoneCall(snapshot.generation, digest_of(snapshot)), names)

    def change_ring(self, *members: str, lost: Iterable[str] = ()) -> Snapshot:
        """A whole ring change, the lost ones left out."""
        gone = set(lost)
        snapshot = self.plan_ring(*members)
        names = [name for name in self.nodes if name not in gone]
        numbers = {node.name: node.member for node in snapshot.nodes}
        self.up_to_prepared(snapshot, names)
        answers = self.handover(snapshot, names, tuple(sorted(numbers[name] for name in gone)))
        assert all(status.ring_step is RingStep.HANDED for status in answers.values()), answers
        self.switch(snapshot, names)
        self.done(snapshot, names)
        self.ring = members
        return snapshot

    # --- Packets ---
    def send(self, port: int, flags: int, entry: str) -> bytes | None:
        """The pod (4 bytes) that a client's packet reaches by this LB; None: dropped."""
        client = bytes([198, 51, 100, 7])
        l4 = tcp(client, VIP_ADDRESS[12:], port, 80, flags)
        found = self.walk(frame(ipv4(client, VIP_ADDRESS[12:], 6, l4)), entry)
        return found[1][30:34] if found is not None else None


def records_of(cluster: Cluster, name: str) -> Rows:
    """Flows recorded at an LB, in full or not."""
    parts = [cluster[name].datapath.flows_dump(which)[0] for which in (FlowMap.RECORDS, FlowMap.EMBRYONIC)]
    return np.concatenate(parts, dtype=FLOW, casting="no")


def flow_slots(cluster: Cluster, flows: Rows) -> np.ndarray:
    return cluster[cluster.lbs[0]].keeper._state.facts.slots(flows)


def tracking_cluster(lbs: int, first: int, flows: int = 120) -> tuple[RingCluster, dict[int, bytes]]:
    """A cluster whose backends have just changed, with flows older and younger than the change: port -> pod."""
    cluster = RingCluster(lbs, first)
    cluster.change(WEB)
    pods: dict[int, bytes] = {}
    for port in range(2_000, 2_000 + flows):
        pods[port] = must(cluster.send(port, SYN, cluster.ring[port % first]))
    cluster.change(vip((1, 2, 3, 4, 5, 6)))
    for port in range(4_000, 4_000 + flows):
        pods[port] = must(cluster.send(port, SYN, cluster.ring[port % first]))
        if port % 3:
            assert pods[port] == cluster.send(port, ACK, cluster.ring[(port + 1) % first])
    return cluster, pods


def step_at(cluster: RingCluster, name: str) -> RingStep:
    return cluster[name].status.ring_step


def must(pod: bytes | None) -> bytes:
    assert pod is not None, "nothing is dropped here"
    return pod


def broken(cluster: RingCluster, pods: dict[int, bytes], entries: Iterable[str]) -> list[tuple[int, str]]:
    """Flows that reach another pod than theirs by one of these LBs."""
    return [(port, name) for name in entries for port, pod in pods.items() if cluster.send(port, ACK, name) != pod]


def test_who_joins_gets_records_and_words_and_serves() -> None:
    cluster, pods = tracking_cluster(3, first=2)
    before = {name: records_of(cluster, name) for name in cluster.ring}
    cluster.change_ring("lb1", "lb2", "lb3")
    assert RingStep.NONE is step_at(cluster, "lb3")
    assert cluster["lb3"].status.serving
    ours = cluster["lb3"].owned() | cluster["lb3"].backed()
    assert ours.sum() > SLOT_COUNT // 3, "two of three LBs are replicas of each slot"
    slots = flow_slots(cluster, before["lb1"])
    expected = {row.tobytes() for row in before["lb1"][ours[slots]]}
    assert expected == {row.tobytes() for row in records_of(cluster, "lb3")}
    for name in ("lb1", "lb2"):
        same = ours & cluster[name].tracking()
        assert (cluster["lb3"].base()[same] == cluster[name].base()[same]).all()
        assert cluster["lb3"].tracking()[same].all(), "what tracks at the sender tracks at the receiver"
        assert not cluster["lb3"].tracking()[ours & ~cluster[name].tracking()].any(), "what is steady there is steady"
    assert [] == broken(cluster, pods, cluster.lbs)


def test_no_flow_moves_at_any_step_of_a_join() -> None:
    cluster, pods = tracking_cluster(3, first=2)
    snapshot = cluster.plan_ring("lb1", "lb2", "lb3")
    names = list(cluster.nodes)
    cluster.call(snapshot, names)
    prepare = RingPrepareCall(snapshot.generation, digest_of(snapshot))
    for count, name in enumerate(names):
        cluster.call(prepare, [name])
        assert [] == broken(cluster, pods, ["lb1", "lb2"]), f"after {count + 1} have prepared"
    # The joiner is asked before it has been handed anything: it relays.
    assert [] == broken(cluster, pods, ["lb3"])
    port = 9_000
    pods[port] = must(cluster.send(port, SYN, "lb3"))
    cluster.handover(snapshot, names)
    assert [] == broken(cluster, pods, cluster.lbs)
    for step in (cluster.switch, cluster.done):
        for name in names:
            step(snapshot, [name])
            port += 1
            pods[port] = must(cluster.send(port, SYN, cluster.lbs[port % 3]))
            assert [] == broken(cluster, pods, cluster.lbs), f"{step.__name__} at {name}"


def test_who_leaves_hands_over_and_has_nothing_left() -> None:
    cluster, pods = tracking_cluster(3, first=3)
    cluster.feed("lb2", LeaveWanted())
    assert cluster["lb2"].status.leaving
    cluster.change_ring("lb1", "lb3")
    assert not cluster["lb2"].status.serving
    assert 0 == len(records_of(cluster, "lb2"))
    assert [] == list(cluster["lb2"].datapath.vip_ids())
    assert [] == broken(cluster, pods, ["lb1", "lb3"])
    assert {0, 2} == {int(one) for one in np.unique(owners(cluster["lb1"].datapath.maps.own))}


def test_who_leaves_tells_those_who_stay_what_it_has_begun_alone() -> None:
    cluster, _ = tracking_cluster(3, first=3)
    leaver = cluster["lb2"].status.member
    others = [cluster[name].status.member for name in ("lb1", "lb3")]
    for member in others:
        cluster.believe("lb2", member, up=False)
    for port in range(6_000, 6_200):
        cluster.send(port, SYN, "lb2")
    for member in others:
        cluster.believe("lb2", member, up=True)
    flows = records_of(cluster, "lb2")
    flows = flows[owners(cluster["lb2"].datapath.maps.own)[flow_slots(cluster, flows)] == leaver]
    known = {name: {flow.tobytes() for flow in records_of(cluster, name)} for name in ("lb1", "lb3")}
    alone = {flow.tobytes() for flow in flows} - known["lb1"] - known["lb3"]
    assert len(alone) > 10
    cluster.change_ring("lb1", "lb3")
    for name in ("lb1", "lb3"):
        assert alone <= {flow.tobytes() for flow in records_of(cluster, name)}, "both are replicas of every slot now"


def test_what_was_begun_alone_is_told_though_a_ring_change_waits_for_its_controller() -> None:
    cluster, _ = tracking_cluster(4, first=3)
    snapshot = cluster.plan_ring("lb1", "lb2", "lb3", "lb4")
    cluster.up_to_prepared(snapshot, cluster.nodes)
    cluster.handover(snapshot, cluster.nodes)
    cluster.blocked = lambda sender, receiver, body: "lb1" in (sender, receiver)
    cluster.run(BEAT_DOWN_NS + SECOND_NS)
    for port in range(6_000, 6_200):
        cluster.send(port, SYN, "lb2")
    flows = records_of(cluster, "lb2")
    own = cluster["lb2"].datapath.maps.own[flow_slots(cluster, flows)]
    members = [cluster[name].status.member for name in ("lb1", "lb2")]
    flows = flows[np.isin(owners(own), members) & np.isin(backups(own), members)]
    alone = {flow.tobytes() for flow in flows} - {flow.tobytes() for flow in records_of(cluster, "lb1")}
    assert len(alone) > 10
    cluster.blocked = lambda sender, receiver, body: False
    cluster.run(2 * SECOND_NS)
    assert RingStep.HANDED is step_at(cluster, "lb1")
    assert alone <= {flow.tobytes() for flow in records_of(cluster, "lb1")}


def test_a_lost_lb_is_taken_out_with_what_the_backup_knows() -> None:
    cluster, pods = tracking_cluster(4, first=4)
    lost = cluster["lb3"].status.member
    cluster.blocked = lambda sender, receiver, body: "lb3" in (sender, receiver)
    for name in ("lb1", "lb2", "lb4"):
        cluster.believe_down(name, lost)
    cluster.change_ring("lb1", "lb2", "lb4", lost=["lb3"])
    assert [] == broken(cluster, pods, ["lb1", "lb2", "lb4"])
    again = cluster["lb1"].datapath.maps
    assert lost not in {int(one) for one in np.unique(np.concatenate([owners(again.own), backups(again.own)]))}


def test_a_loss_in_the_middle_takes_another_round() -> None:
    cluster, pods = tracking_cluster(4, first=3)
    snapshot = cluster.plan_ring("lb1", "lb2", "lb3", "lb4")
    cluster.up_to_prepared(snapshot, cluster.nodes)
    # lb2 dies before it has sent anything; the others have done their round.
    lost = cluster["lb2"].status.member
    cluster.blocked = lambda sender, receiver, body: "lb2" in (sender, receiver)
    left = [name for name in cluster.nodes if name != "lb2"]
    for name in ("lb1", "lb3", "lb4"):
        cluster.believe_down(name, lost)
    before = len(records_of(cluster, "lb4"))
    answers = cluster.handover(snapshot, left, (lost,))
    assert {RingStep.HANDED} == {status.ring_step for status in answers.values()}
    assert {cluster.round} == {status.ring_round for status in answers.values()}
    assert len(records_of(cluster, "lb4")) > before
    cluster.switch(snapshot, left)
    cluster.done(snapshot, left)
    assert [] == broken(cluster, pods, ["lb1", "lb3", "lb4"])


def test_a_handover_waits_for_who_does_not_answer_and_says_so() -> None:
    cluster, _ = tracking_cluster(3, first=2)
    snapshot = cluster.plan_ring("lb1", "lb2", "lb3")
    cluster.up_to_prepared(snapshot, cluster.nodes)
    cluster.blocked = lambda sender, receiver, body: receiver == "lb3"
    request = cluster["lb1"].begin(HandoverCall(snapshot.generation, digest_of(snapshot), 1), cluster.now_ns)
    cluster._collect(cluster["lb1"])
    cluster.run(HANDOVER_HOLD_NS + SECOND_NS)
    answer = cluster["lb1"].answers.pop(request)
    assert isinstance(answer, Reply)
    assert RingStep.PREPARED is step_at(cluster, "lb1")
    cluster.blocked = lambda sender, receiver, body: False
    cluster.run(4 * SECOND_NS)
    assert RingStep.HANDED is step_at(cluster, "lb1")
    # Asked again, it answers at once.
    again = HandoverCall(snapshot.generation, digest_of(snapshot), 1)
    assert RingStep.HANDED is cluster.call(again, ["lb1"])["lb1"].ring_step


def test_a_join_that_is_given_up_leaves_nothing_behind() -> None:
    cluster, pods = tracking_cluster(3, first=2)
    in_force = cluster.snapshot
    assert in_force is not None
    snapshot = cluster.plan_ring("lb1", "lb2", "lb3")
    cluster.up_to_prepared(snapshot, cluster.nodes)
    cluster.handover(snapshot, cluster.nodes)
    # The controller takes it back with a generation that changes no ring.
    cluster.snapshot = in_force
    plain = cluster.plan(vip((1, 2, 3, 4, 5, 6), (7,)))
    cluster.stage(plain)
    cluster.prepare(plain)
    assert [] == list(cluster["lb3"].datapath.vip_ids())
    cluster.commit(plain)
    for name in ("lb1", "lb2"):
        maps = cluster[name].datapath.maps
        assert not maps.config[0]["ring_change"]
        assert {0, 1} == {int(one) for one in np.unique(owners(maps.own))}
    assert [] == broken(cluster, pods, ["lb1", "lb2"])
    # And it may join later: what it still had is gone before the first chain can come.
    cluster.change_ring("lb1", "lb2", "lb3")
    assert [] == broken(cluster, pods, cluster.lbs)


def test_a_change_of_backends_that_nobody_committed_gives_way_to_a_ring_change() -> None:
    cluster, pods = tracking_cluster(3, first=3)
    in_force = cluster.snapshot
    assert in_force is not None
    begun = cluster.plan(vip((1, 2, 5, 6, 7, 8)))
    cluster.stage(begun)
    cluster.prepare(begun, ["lb1", "lb3", *HOSTS])
    lost = cluster["lb2"].status.member
    cluster.blocked = lambda sender, receiver, body: "lb2" in (sender, receiver)
    for name in ("lb1", "lb3"):
        cluster.believe_down(name, lost)
    snapshot = cluster.plan_ring("lb1", "lb3", in_force=in_force)
    left = [name for name in cluster.nodes if name != "lb2"]
    cluster.up_to_prepared(snapshot, left)
    cluster.handover(snapshot, left, (lost,))
    cluster.switch(snapshot, left)
    cluster.done(snapshot, left)
    assert [] == broken(cluster, pods, ["lb1", "lb3"])
    cluster.nodes = {name: cluster.nodes[name] for name in left}
    cluster.change(vip((1, 2, 3, 4, 5, 6, 7, 8)))
    assert [] == broken(cluster, pods, ["lb1", "lb3"])


def test_an_agent_that_restarts_in_the_middle_goes_on() -> None:
    cluster, pods = tracking_cluster(3, first=2)
    snapshot = cluster.plan_ring("lb1", "lb2", "lb3")
    cluster.up_to_prepared(snapshot, cluster.nodes)
    cluster.handover(snapshot, cluster.nodes)
    for name in ("lb1", "lb3"):
        cluster[name].restart(cluster.now_ns)
        assert RingStep.PREPARED is step_at(cluster, name), "who was handed what is not remembered"
    answers = cluster.handover(snapshot, cluster.nodes)
    assert {RingStep.HANDED} == {status.ring_step for status in answers.values()}
    cluster.switch(snapshot, cluster.nodes)
    cluster["lb1"].restart(cluster.now_ns)
    assert RingStep.SWITCHED is step_at(cluster, "lb1")
    assert [] == broken(cluster, pods, cluster.lbs)
    cluster.done(snapshot, cluster.nodes)
    cluster["lb1"].restart(cluster.now_ns)
    assert RingStep.NONE is step_at(cluster, "lb1")
    assert [] == broken(cluster, pods, cluster.lbs)


def test_a_stale_lb_that_comes_back_knows_nothing() -> None:
    cluster, pods = tracking_cluster(3, first=3)
    cluster.blocked = lambda sender, receiver, body: "lb2" in (sender, receiver)
    cluster.change_ring("lb1", "lb3", lost=["lb2"])
    assert len(records_of(cluster, "lb2")) > 0
    stale = cluster["lb2"]
    nodes = cluster.nodes
    cluster.nodes = {name: node for name, node in nodes.items() if name != "lb2"}
    # The backends roll meanwhile; flows of those that are gone are over.
    cluster.change(vip((5, 6, 7, 8)))
    pods = {port: pod for port, pod in pods.items() if pod[3] in (5, 6)}
    cluster.nodes = {**cluster.nodes, "lb2": stale}
    cluster.blocked = lambda sender, receiver, body: False
    cluster.change_ring("lb1", "lb2", "lb3")
    assert cluster["lb2"].status.serving
    assert [] == broken(cluster, pods, cluster.lbs)
    assert set(np.unique(cluster["lb2"].current()).tolist()) == set(np.unique(cluster["lb1"].current()).tolist())


def test_who_was_given_up_and_is_to_join_records_nothing_by_the_ring_that_it_knows() -> None:
    """It drops what it knew when it is told, and still believes itself to be a replica: what it recorded now would be
    wrong, and would be there when it has joined."""
    cluster, pods = tracking_cluster(3, first=3)
    cluster.blocked = lambda sender, receiver, body: "lb2" in (sender, receiver)
    cluster.change_ring("lb1", "lb3", lost=["lb2"])
    cluster.blocked = lambda sender, receiver, body: False
    snapshot = cluster.plan_ring("lb1", "lb2", "lb3")
    cluster.call(snapshot, cluster.nodes)
    assert cluster["lb2"].status.serving
    for port in (*pods, *range(6_000, 6_060)):
        cluster.send(port, ACK if port in pods else SYN, "lb2")
    assert 0 == len(records_of(cluster, "lb2"))
    cluster.up_to_prepared(snapshot, cluster.nodes)
    cluster.handover(snapshot, cluster.nodes)
    cluster.switch(snapshot, cluster.nodes)
    cluster.done(snapshot, cluster.nodes)
    assert [] == broken(cluster, pods, cluster.lbs)


def test_nothing_settles_and_nothing_is_forgotten_while_the_ring_changes() -> None:
    cluster, pods = tracking_cluster(3, first=2)
    snapshot = cluster.plan_ring("lb1", "lb2", "lb3")
    cluster.up_to_prepared(snapshot, cluster.nodes)
    tracking = {name: int(cluster[name].tracking().sum()) for name in cluster.ring}
    recorded = {name: len(records_of(cluster, name)) for name in cluster.ring}
    cluster.run(40 * SECOND_NS)
    assert tracking == {name: int(cluster[name].tracking().sum()) for name in cluster.ring}
    assert recorded == {name: len(records_of(cluster, name)) for name in cluster.ring}
    cluster.handover(snapshot, cluster.nodes)
    cluster.switch(snapshot, cluster.nodes)
    cluster.run(MARGIN_NS)
    cluster.done(snapshot, cluster.nodes)
    cluster.run(60 * SECOND_NS)
    for name in cluster.lbs:
        assert 0 == cluster[name].status.tracking_slots, "afterwards everything settles"
        assert 0 == len(records_of(cluster, name))
    assert pods


def test_a_full_receiver_keeps_the_rest_among_the_embryonic_records_and_counts_it() -> None:
    cluster, pods = tracking_cluster(3, first=2)
    cluster["lb3"].datapath.maps.records.count_max = 5
    snapshot = cluster.plan_ring("lb1", "lb2", "lb3")
    cluster.up_to_prepared(snapshot, cluster.nodes)
    answers = cluster.handover(snapshot, cluster.nodes)
    assert {RingStep.HANDED} == {status.ring_step for status in answers.values()}
    full, _ = cluster["lb3"].datapath.flows_dump(FlowMap.RECORDS)
    assert 5 == len(full)
    said = [trace.what for name in ("lb1", "lb2") for trace in cluster[name].traces]
    assert "handed over records found no room" in said
    cluster.switch(snapshot, cluster.nodes)
    cluster.done(snapshot, cluster.nodes)
    assert [] == broken(cluster, pods, ("lb1", "lb2", "lb3"))


def page(cluster: RingCluster, snapshot: Snapshot, **fields: object) -> StateCall:
    lb3 = cluster["lb3"].keeper._state
    assert lb3.next is not None
    ours = (owners(lb3.next) == lb3.member) | (backups(lb3.next) == lb3.member)
    slots = np.flatnonzero(ours)[:10].astype("<u2").tobytes()
    return StateCall(**{"member": 0, "generation": snapshot.generation, "round": 1, "covered": slots, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"generation": 99}, "has not prepared the ring change of generation 99"),
        ({"member": 2}, "about slots that it will not have"),
        ({"member": 77}, "about slots that it will not have"),
        ({"covered": np.arange(SLOT_COUNT, dtype="<u2").tobytes()}, "about slots that it will not have"),
        ({"steady_vips": np.array([9], "<u4").tobytes()}, "does not serve VIP 9"),
        ({"vip": 9}, "does not serve VIP 9"),
    ],
)
def test_pages_that_nobody_may_send(fields: dict[str, object], sentence: str) -> None:
    cluster, _ = tracking_cluster(3, first=2, flows=0)
    snapshot = cluster.plan_ring("lb1", "lb2", "lb3")
    cluster.up_to_prepared(snapshot, cluster.nodes)
    words = cluster["lb3"].words().copy()
    answer = cluster["lb3"].call(page(cluster, snapshot, **fields), cluster.now_ns)
    assert isinstance(answer, Refuse)
    assert sentence in answer.sentence
    assert (words == cluster["lb3"].words()).all()


def test_a_page_may_come_twice_and_late() -> None:
    cluster, pods = tracking_cluster(3, first=2)
    sent: list[StateCall] = []

    def listen(sender: str, receiver: str, body: PeerCall) -> bool:
        sent.extend([body] if isinstance(body, StateCall) else [])
        return False

    cluster.blocked = listen
    cluster.change_ring("lb1", "lb2", "lb3")
    assert len(sent) > 2
    words, records = cluster["lb3"].words().copy(), len(records_of(cluster, "lb3"))
    for body in sent:
        assert len(body.records) <= HANDOVER_RECORDS_MAX * RECORD.itemsize
        cluster["lb3"].call(body, cluster.now_ns)
    assert (words == cluster["lb3"].words()).all()
    assert records == len(records_of(cluster, "lb3"))
    assert [] == broken(cluster, pods, cluster.lbs)


def test_a_page_tells_of_few_steady_vips() -> None:
    """A receiver that walks over the slots of 400 VIPs for one page answers when its sender has given up waiting, gets
    the page again, and never joins."""
    cluster = RingCluster(3, first=2)
    cluster.change(*(vip((1, 2), port=port) for port in range(80, 80 + HANDOVER_VIPS_MAX + 2)))
    told: list[bytes] = []

    def listen(sender: str, receiver: str, body: PeerCall) -> bool:
        told.extend([body.steady_vips] if isinstance(body, StateCall) and body.steady_vips else [])
        return False

    cluster.blocked = listen
    cluster.change_ring("lb1", "lb2", "lb3")
    assert cluster["lb3"].status.serving
    vips = [np.frombuffer(one, "<u4").tolist() for one in told]
    assert [2, 2, HANDOVER_VIPS_MAX, HANDOVER_VIPS_MAX] == sorted(map(len, vips)), "two senders, in two pages each"
    ours = cluster["lb3"].owned() | cluster["lb3"].backed()
    for one in (1, HANDOVER_VIPS_MAX + 2):
        assert not cluster["lb3"].tracking(one)[ours].any(), "what is steady there is steady"


def test_what_a_chain_has_recorded_meanwhile_stays() -> None:
    cluster, _ = tracking_cluster(3, first=2, flows=40)
    snapshot = cluster.plan_ring("lb1", "lb2", "lb3")
    cluster.up_to_prepared(snapshot, cluster.nodes)
    cluster.handover(snapshot, cluster.nodes)
    lb3 = cluster["lb3"].datapath
    flows, records = lb3.flows_dump(FlowMap.RECORDS)
    assert len(flows) > 3
    # A chain has brought another backend for the first flow, and an embryonic record of the second.
    other = records[:1].copy()
    other["backend"] = 1 + other["backend"] % 6
    lb3.flows_put(FlowMap.RECORDS, flows[:1], other)
    lb3.flows_delete(FlowMap.RECORDS, flows[1:2])
    lb3.flows_put(FlowMap.EMBRYONIC, flows[1:2], records[1:2])
    cluster.handover(snapshot, cluster.nodes)
    again = lb3.records_lookup(flows)
    assert not (again["round"] == RECORD_MISSING).any()
    assert other["backend"][0] == again["backend"][0], "it knows better"
    assert (records["backend"][1:] == again["backend"][1:]).all()
    assert flows[1].tobytes() in lb3.maps.records.rows, "a full record takes the place of an embryonic one"
    assert flows[1].tobytes() not in lb3.maps.embryonic.rows


def test_who_was_left_behind_at_the_end_of_a_ring_change_takes_part_in_the_next() -> None:
    """A host is not waited for, and an LB that is lost neither: nobody tells them any more that it is done."""
    cluster, pods = tracking_cluster(4, first=4)
    snapshot = cluster.plan_ring("lb1", "lb2", "lb3")
    cluster.up_to_prepared(snapshot, cluster.nodes)
    cluster.handover(snapshot, cluster.nodes)
    cluster.switch(snapshot, cluster.nodes)
    left = {"lb2", "lb4", "host1"}
    cluster.done(snapshot, [name for name in cluster.nodes if name not in left])
    without = cluster.plan_ring("lb1", "lb3")
    there = [name for name in cluster.nodes if name != "lb2"]
    cluster.up_to_prepared(without, there)
    assert RingStep.PREPARED is step_at(cluster, "lb4")
    assert not cluster["lb4"].datapath.vip_ids(), "it has left the ring"
    cluster.handover(without, there, (numbers(snapshot)["lb2"],))
    cluster.switch(without, there)
    cluster.done(without, there)
    cluster.ring = ("lb1", "lb3")
    again = cluster.change_ring("lb1", "lb2", "lb3")
    assert {again.generation} == {node.status.committed for node in cluster.nodes.values()}
    cluster.ring = ("lb1", "lb2", "lb3")
    assert [] == broken(cluster, pods, cluster.ring)
    cluster.change(vip((1, 2, 3, 4, 5)))
    assert {again.generation + 1} == {node.status.committed for node in cluster.nodes.values()}


def numbers(snapshot: Snapshot) -> dict[str, int]:
    """Member ids by name."""
    return {node.name: node.member for node in snapshot.nodes}


def test_steps_out_of_order_are_refused() -> None:
    cluster, _ = tracking_cluster(3, first=2, flows=0)
    snapshot = cluster.plan_ring("lb1", "lb2", "lb3")
    digest = digest_of(snapshot)
    lb1 = cluster["lb1"]
    for body in (
        RingPrepareCall(snapshot.generation, digest),
        HandoverCall(snapshot.generation, digest, 1),
        RingSwitchCall(snapshot.generation, digest),
        RingDoneCall(snapshot.generation, digest),
    ):
        assert isinstance(lb1.call(body, cluster.now_ns), Refuse), body
    cluster.up_to_prepared(snapshot, cluster.nodes)
    for wrong in (
        CommitCall(snapshot.generation, digest),
        RingSwitchCall(snapshot.generation, digest),
        RingDoneCall(snapshot.generation, digest),
    ):
        assert isinstance(lb1.call(wrong, cluster.now_ns), Refuse), wrong
    cluster.handover(snapshot, cluster.nodes)
    assert isinstance(
        lb1.call(HandoverCall(snapshot.generation, digest, 0 + cluster.round - 1), cluster.now_ns), Refuse
    )
    cluster.switch(snapshot, cluster.nodes)
    plain = cluster.plan(vip((1, 2)))
    cluster.call(plain, cluster.nodes)
    # It has missed the end of the ring change: that something else is prepared says that it is over.
    cluster.call(PrepareCall(plain.generation, digest_of(plain)), ["lb1"])
    assert RingStep.NONE is step_at(cluster, "lb1")


def test_a_member_that_has_not_committed_what_is_in_force_is_refused() -> None:
    cluster, _ = tracking_cluster(3, first=3, flows=0)
    change = cluster.plan(vip((1, 2)))
    cluster.stage(change)
    cluster.prepare(change)
    cluster.commit(change, ["lb1", "lb3", *HOSTS])
    snapshot = cluster.plan_ring("lb1", "lb2")
    cluster.call(snapshot, cluster.nodes)
    answer = cluster["lb2"].call(RingPrepareCall(snapshot.generation, digest_of(snapshot)), cluster.now_ns)
    assert isinstance(answer, Refuse)
    assert "has not committed" in answer.sentence
