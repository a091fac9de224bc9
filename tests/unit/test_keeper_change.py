"""Snapshots at one LB: what is refused, what prepare and commit write and in which order, and what a restart finds."""

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import pytest

from lbpod.core import change
from lbpod.core.keeper_state import Plan
from lbpod.core.layout import vip_index
from lbpod.core.limits import LEASE_NS_MAX, MARGIN_NS, MEMBER_NONE, SLOT_COUNT, VIP_CHAIN_MAX
from lbpod.core.messages import (
    CommitCall,
    Configure,
    CreateVip,
    DeleteVip,
    KeeperEffect,
    LbStatus,
    PrepareCall,
    Refuse,
    Remember,
    Reply,
    Tick,
    WriteOwnership,
    WriteSlots,
)
from lbpod.core.model import Affinity, Backend, Cluster as ClusterOf, Ring, Snapshot, Vip
from lbpod.core.snapshot import VipKey, digest_of
from lbpod.core.table import Table, TableBackend, build, digest_before
from lbpod.core.transition import current_of
from tests.keepers import SECOND_NS, VIP_ADDRESS, Cluster, Node, SharedTables, vip

CHANGES = (Configure, CreateVip, DeleteVip, WriteOwnership, WriteSlots, Remember, Reply)


def kinds(effects: Sequence[KeeperEffect]) -> list[str]:
    """Names of the effects that change something, in their order."""
    return [type(effect).__name__ for effect in effects if isinstance(effect, CHANGES)]


def effects_of(node: Node, body: Snapshot | PrepareCall | CommitCall, now_ns: int) -> list[str]:
    node.effects.clear()
    assert isinstance(node.call(body, now_ns), Reply)
    return kinds(node.effects)


def calls(snapshot: Snapshot) -> tuple[Snapshot, PrepareCall, CommitCall]:
    digest = digest_of(snapshot)
    return snapshot, PrepareCall(snapshot.generation, digest), CommitCall(snapshot.generation, digest)


def refused(node: Node, body: Snapshot | PrepareCall | CommitCall, now_ns: int) -> str:
    """The sentence of the 409, after making sure that nothing has changed."""
    before, words = node.status, {vip: node.words(vip) for vip in node.datapath.vip_ids()}
    answer = node.call(body, now_ns)
    assert isinstance(answer, Refuse), answer
    assert 409 == answer.status
    assert before == node.status
    assert all((had == node.words(number)).all() for number, had in words.items())
    return answer.sentence


# --- A first change ---------------------------------------------------------------------------------------------------
def test_a_first_change_writes_in_the_order_that_is_safe_at_every_step() -> None:
    cluster = Cluster()
    node, (stage, prepare, commit) = cluster["lb1"], calls(cluster.plan(vip([1, 2])))
    assert ["Reply"] == effects_of(node, stage, cluster.now_ns)
    wanted = ["CreateVip", "Configure", "WriteOwnership", "Remember", "Reply"]
    assert wanted == effects_of(node, prepare, cluster.now_ns)
    assert not node.words().any(), "a new VIP is served by nobody before everybody knows it"
    wanted = ["WriteSlots", "Configure", "Remember", "Reply"]
    assert wanted == effects_of(node, commit, cluster.now_ns)
    assert {1, 2} == set(node.current().tolist())
    assert not node.tracking().any()
    status = node.status
    assert ("lb1", 1, 0, 1, 1) == (status.node, status.committed, status.prepared, status.staged, status.ring_epoch)


def test_a_second_change_tracks_before_it_moves() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    node, old = cluster["lb1"], cluster["lb1"].current()
    stage, prepare, commit = calls(cluster.plan(vip([1, 2, 3])))
    effects_of(node, stage, cluster.now_ns)
    assert ["Configure", "WriteSlots", "Remember", "Reply"] == effects_of(node, prepare, cluster.now_ns)
    assert (old == node.current()).all()
    tracked = node.tracking()
    assert (old == node.base())[tracked].all()
    assert 1 == len([effect for effect in node.effects if isinstance(effect, WriteSlots)])
    assert ["WriteSlots", "Configure", "Remember", "Reply"] == effects_of(node, commit, cluster.now_ns)
    assert (tracked == (old != node.current())).all()
    assert (old == node.base())[tracked].all()
    assert int(tracked.sum()) == node.status.tracking_slots


def test_all_lbs_come_to_the_same_words() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    cluster.change(vip([2, 3, 4], [1]))
    first, *others = cluster.muxes
    assert all((first.words() == other.words()).all() for other in others)


def test_new_backends_are_alive_before_a_slot_names_them_and_old_ones_until_none_does() -> None:
    cluster = Cluster()
    cluster.change(vip([1]))
    node, (stage, prepare, commit) = cluster["lb1"], calls(cluster.plan(vip([2])))
    effects_of(node, stage, cluster.now_ns)
    effects_of(node, prepare, cluster.now_ns)
    [configure] = [effect for effect in node.effects if isinstance(effect, Configure)]
    assert {1, 2} == configure.alive
    effects_of(node, commit, cluster.now_ns)
    [configure] = [effect for effect in node.effects if isinstance(effect, Configure)]
    assert {2} == configure.alive
    assert {2} == set(node.current().tolist()) == set(node.base().tolist())


@pytest.mark.parametrize("step", [0, 1, 2])
def test_repeating_a_call_changes_nothing(step: int) -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    node, bodies = cluster["lb1"], calls(cluster.plan(vip([1, 2, 3])))
    for body in bodies[: step + 1]:
        effects_of(node, body, cluster.now_ns)
    words, status = node.words(), node.status
    for body in bodies[: step + 1]:
        if step < 2 or not isinstance(body, Snapshot):
            assert ["Reply"] == effects_of(node, body, cluster.now_ns + SECOND_NS)
    assert (words == node.words()).all()
    assert status == node.status


# --- What is refused --------------------------------------------------------------------------------------------------
def test_an_older_generation_is_refused() -> None:
    cluster = Cluster()
    first = cluster.change(vip([1]))
    cluster.change(vip([1, 2]))
    assert "older than 2" in refused(cluster["lb1"], first, cluster.now_ns)
    for body in calls(first)[1:]:
        assert "generation 1" in refused(cluster["lb1"], body, cluster.now_ns)


def test_the_same_generation_with_other_contents_is_refused() -> None:
    cluster = Cluster()
    first = cluster.change(vip([1]))
    other = msgspec.structs.replace(first, ring=Ring(9, first.ring.members))
    assert "other contents" in refused(cluster["lb1"], other, cluster.now_ns)


def test_another_cluster_is_refused() -> None:
    cluster = Cluster()
    first = cluster.change(vip([1]))
    for stranger in (ClusterOf(8, first.cluster.seed), ClusterOf(first.cluster.vni, 1)):
        other = msgspec.structs.replace(first, cluster=stranger, generation=5)
        assert "another cluster" in refused(cluster["lb1"], other, cluster.now_ns)


def test_a_table_that_comes_out_differently_is_refused_by_name() -> None:
    cluster = Cluster()
    snapshot = cluster.plan(vip([1, 2]))
    bad = msgspec.structs.replace(snapshot, vips=(msgspec.structs.replace(snapshot.vips[0], digest=bytes(16)),))
    answer = cluster["lb1"].call(bad, cluster.now_ns)
    assert isinstance(answer, Refuse)
    assert snapshot.vips[0].name in answer.sentence
    assert isinstance(cluster["host1"].call(bad, cluster.now_ns), Reply), "a node without slots builds no table"


def test_a_digest_as_an_earlier_release_made_it_is_taken_for_tables_old_and_new() -> None:
    cluster = Cluster()
    node, snapshot = cluster["lb1"], cluster.plan(vip([1, 2, 3]))
    known, backends = snapshot.vips[0], [TableBackend(b.id, b.address, b.port) for b in snapshot.vips[0].backends]
    before = digest_before(build(backends, snapshot.cluster.seed).current, backends)
    assert before not in {None, known.digest}
    first = msgspec.structs.replace(snapshot, vips=(msgspec.structs.replace(known, digest=before),))
    for body in calls(first):
        assert isinstance(node.call(body, cluster.now_ns), Reply), "the table is built"
    for generation, digest in enumerate((known.digest, before, known.digest), start=2):
        other = msgspec.structs.replace(known, digest=digest, idle_ns=known.idle_ns + generation)
        body = msgspec.structs.replace(snapshot, generation=generation, vips=(other,))
        assert isinstance(node.call(body, cluster.now_ns), Reply), "the slots have the table"


def test_a_wrong_digest_beside_a_known_table_is_refused() -> None:
    cluster = Cluster()
    snapshot = cluster.change(vip([1, 2]))
    bad_vip = msgspec.structs.replace(snapshot.vips[0], digest=bytes(16), epoch=2)
    bad = msgspec.structs.replace(snapshot, generation=2, vips=(bad_vip,))
    assert "comes out differently" in refused(cluster["lb1"], bad, cluster.now_ns)


def test_an_id_that_may_still_mean_another_backend_is_refused_until_it_has_rested() -> None:
    cluster = Cluster()
    snapshot = cluster.change(vip([1, 2]))
    taken = snapshot.vips[0].backends[0]
    cluster.change(vip([2, 3]))
    node = cluster["lb1"]
    after = cluster.plan(vip([2, 3, 4]))
    backends = tuple(
        sorted(
            (msgspec.structs.replace(one, id=taken.id) if one.id == 4 else one for one in after.vips[0].backends),
            key=lambda one: one.id,
        )
    )
    reused = msgspec.structs.replace(after, vips=(msgspec.structs.replace(after.vips[0], backends=backends),))
    assert f"backend id {taken.id} named another" in refused(node, reused, cluster.now_ns)
    cluster.run(LEASE_NS_MAX + MARGIN_NS + 12 * SECOND_NS)
    assert isinstance(node.call(reused, cluster.now_ns), Reply)


def test_an_id_in_use_cannot_mean_another_backend() -> None:
    cluster = Cluster()
    snapshot = cluster.change(vip([1, 2]))
    one = snapshot.vips[0]
    moved = msgspec.structs.replace(one.backends[0], port=9_999)
    other = msgspec.structs.replace(
        snapshot, generation=2, vips=(msgspec.structs.replace(one, backends=(moved, one.backends[1])),)
    )
    assert "named another endpoint" in refused(cluster["lb1"], other, cluster.now_ns)


class Counted(tuple[Vip, ...]):
    """VIPs that count how often somebody goes through them."""

    walks = 0

    def __iter__(self) -> Iterator[Vip]:
        Counted.walks += 1
        return super().__iter__()


def test_what_is_compared_with_a_snapshot_does_not_go_through_all_known_vips_for_each() -> None:
    """It is done at each LB for each generation, of four thousand VIPs at most."""
    cluster = Cluster()
    ports = range(80, 90)
    cluster.change(*(vip([1, 2], port=port) for port in ports))
    state = cluster["lb1"].keeper._state
    assert state.committed is not None
    known = state.committed.snapshot
    counted = msgspec.structs.replace(known, vips=Counted(known.vips))
    state.committed = Plan(counted, state.committed.digest)
    Counted.walks = 0
    change.accept(state, cluster.plan(*(vip([1, 3], port=port) for port in ports)))
    assert 0 < Counted.walks < len(ports)


def test_a_vip_cannot_change_its_affinity_under_its_flows() -> None:
    cluster = Cluster()
    snapshot = cluster.change(vip([1, 2]))
    changed = msgspec.structs.replace(snapshot.vips[0], affinity=Affinity.CLIENT_IP, epoch=2)
    other = msgspec.structs.replace(snapshot, generation=2, vips=(changed,))
    assert "remove the VIP" in refused(cluster["lb1"], other, cluster.now_ns)


def test_vips_that_find_no_place_beside_those_that_are_to_go_are_refused_until_these_have_gone() -> None:
    place = vip_index(VIP_ADDRESS, 80, 6)
    ports = [port for port in range(1, 65_536) if vip_index(VIP_ADDRESS, port, 6) == place][: VIP_CHAIN_MAX + 1]
    cluster = Cluster()
    before = [vip([1], port=port) for port in ports[:4]]
    after = [vip([1], port=port) for port in ports[4:]]
    cluster.change(*before)
    snapshot = cluster.plan(*after)
    for node in cluster.muxes:
        assert "with another change" in refused(node, snapshot, cluster.now_ns)
    cluster.change()
    assert VIP_CHAIN_MAX - 3 == len(cluster.change(*after).vips)


def test_nothing_is_prepared_that_was_not_pushed_nor_committed_that_was_not_prepared() -> None:
    cluster = Cluster()
    node, (stage, prepare, commit) = cluster["lb1"], calls(cluster.plan(vip([1])))
    assert "not been pushed" in refused(node, prepare, cluster.now_ns)
    assert "not been prepared" in refused(node, commit, cluster.now_ns)
    node.call(stage, cluster.now_ns)
    assert "not been prepared" in refused(node, commit, cluster.now_ns)
    wrong = PrepareCall(prepare.generation, bytes(16))
    assert "other contents" in refused(node, wrong, cluster.now_ns)
    node.call(prepare, cluster.now_ns)
    assert "other contents" in refused(node, CommitCall(commit.generation, bytes(16)), cluster.now_ns)


# --- Controllers that were replaced -----------------------------------------------------------------------------------
def test_a_superseded_change_leaves_its_slots_tracking() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    node, before = cluster["lb1"], cluster["lb1"].current()
    first = cluster.plan(vip([1, 2, 3]))
    cluster.stage(first)
    cluster.prepare(first)
    tracked = node.tracking()
    cluster.change(vip([1, 2, 4]))
    assert (node.tracking() | ~tracked).all(), "what another LB may have committed stays tracking"
    assert (node.base() == before)[tracked].all()
    assert {1, 2, 4} == set(node.current().tolist())


def test_committing_the_superseded_change_is_refused() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    first = cluster.plan(vip([1, 2, 3]))
    cluster.stage(first)
    cluster.prepare(first)
    second = cluster.plan(vip([1, 2, 4]))
    cluster.stage(second)
    cluster.prepare(second)
    assert "not been prepared" in refused(cluster["lb1"], calls(first)[2], cluster.now_ns)
    cluster.commit(second)


def test_a_change_staged_before_another_was_committed_is_computed_from_what_is_there() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    first = cluster.plan(vip([1, 2, 3]))
    cluster.stage(first)
    cluster.prepare(first)
    back = cluster.plan(vip([1, 2]))
    cluster.stage(back)
    cluster.commit(first)
    cluster.prepare(back)
    cluster.commit(back)
    assert {1, 2} == set(cluster["lb1"].current().tolist())


# --- VIPs come and go -------------------------------------------------------------------------------------------------
def test_a_vip_without_backends_drops_and_takes_its_first_ones_without_tracking() -> None:
    cluster = Cluster()
    cluster.change(vip([]))
    node = cluster["lb1"]
    assert not node.words().any()
    cluster.change(vip([1, 2]))
    assert {1, 2} == set(node.current().tolist())
    assert 0 == node.status.tracking_slots


def test_a_vip_whose_backends_all_go_is_tracked_until_the_margin_has_passed() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    cluster.change(vip([]))
    assert SLOT_COUNT == cluster["lb1"].status.tracking_slots
    assert not cluster["lb1"].current().any()
    cluster.run(6 * SECOND_NS)
    assert 0 == cluster["lb1"].status.tracking_slots


def test_one_backend_before_and_after_is_never_tracked() -> None:
    cluster = Cluster()
    cluster.change(vip([1]))
    cluster.change(vip([1], idle_s=20))
    assert 0 == cluster["lb1"].status.tracking_slots


def test_the_second_of_two_that_drains_is_not_one_backend() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    old = cluster["lb1"].current()
    cluster.change(vip([1], [2]))
    node = cluster["lb1"]
    assert (node.tracking() == (old == 2)).all()
    assert (node.base() == 2)[old == 2].all()


def test_draining_ones_serve_where_nobody_is_ready() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    cluster.change(vip([], [1, 2]))
    assert {1, 2} == set(cluster["lb1"].current().tolist())
    assert 0 == cluster["lb1"].status.tracking_slots


def test_a_vip_that_is_removed_is_served_until_the_commit() -> None:
    cluster = Cluster()
    cluster.change(vip([1]), vip([2], port=81))
    node, (stage, prepare, commit) = cluster["lb1"], calls(cluster.plan(vip([1])))
    effects_of(node, stage, cluster.now_ns)
    assert ["Configure", "Remember", "Reply"] == effects_of(node, prepare, cluster.now_ns)
    assert [1, 2] == list(node.datapath.vip_ids())
    assert ["Configure", "DeleteVip", "Remember", "Reply"] == effects_of(node, commit, cluster.now_ns)
    assert [1] == list(node.datapath.vip_ids())


def test_an_lb_without_state_in_a_living_cluster_tracks_everything() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    node = cluster["lb1"]
    node.lose_everything()
    cluster.change(vip([1, 2, 3]))
    assert SLOT_COUNT == node.status.tracking_slots
    assert (node.current() == cluster["lb2"].current()).all()


# --- Odd rings --------------------------------------------------------------------------------------------------------
def test_a_node_outside_the_ring_goes_the_same_way_without_slots() -> None:
    cluster = Cluster()
    node = cluster["host1"]
    stage, prepare, commit = calls(cluster.plan(vip([1])))
    assert ["Reply"] == effects_of(node, stage, cluster.now_ns)
    assert ["Configure", "Remember", "Reply"] == effects_of(node, prepare, cluster.now_ns)
    assert ["Configure", "Remember", "Reply"] == effects_of(node, commit, cluster.now_ns)
    assert (MEMBER_NONE, 1) == (node.status.member, node.status.committed)
    node.feed(Tick(), cluster.now_ns)
    assert [] == list(node.datapath.vip_ids())


def test_a_ring_of_one_has_no_backup_and_settles_alone() -> None:
    cluster = Cluster(lbs=1)
    cluster.change(vip([1]))
    cluster.change(vip([2]))
    assert SLOT_COUNT == cluster["lb1"].status.tracking_slots
    cluster.run(4 * SECOND_NS)
    assert 0 == cluster["lb1"].status.tracking_slots


# --- Restart ----------------------------------------------------------------------------------------------------------
def restarted(node: Node, now_ns: int) -> list[str]:
    node.effects.clear()
    node.restart(now_ns)
    return kinds(node.effects)


def test_a_restart_writes_no_slot_that_is_equal() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    cluster.change(vip([1, 2, 3]))
    node, words, status = cluster["lb1"], cluster["lb1"].words(), cluster["lb1"].status
    assert ["Configure", "WriteOwnership"] == restarted(node, cluster.now_ns)
    assert (words == node.words()).all()
    assert status == node.status


def test_a_restart_builds_only_the_tables_that_its_slots_do_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2, 3]))
    node, built = cluster["lb1"], list[VipKey]()
    made = SharedTables.table

    def counted(tables: SharedTables, key: VipKey, backends: Sequence[Backend]) -> Table:
        built.append(key)
        return made(tables, key, backends)

    monkeypatch.setattr(SharedTables, "table", counted)
    restarted(node, cluster.now_ns)
    assert [] == built
    words = node.words()
    ((vip_id, found),) = ((one, node.datapath.read_slots(one).copy()) for one in node.datapath.vip_ids())
    found[7] = found[np.flatnonzero(found != found[7])[0]]
    node.datapath.write_slots(vip_id, np.array([7], np.uint32), found[7:8])
    restarted(node, cluster.now_ns)
    assert 1 == len(built), "one slot has another backend than the digest stands for"
    assert (current_of(words) == current_of(node.words())).all()


def test_a_restart_between_prepare_and_commit_goes_on() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    snapshot = cluster.plan(vip([1, 2, 3]))
    cluster.stage(snapshot)
    cluster.prepare(snapshot)
    node = cluster["lb1"]
    restarted(node, cluster.now_ns)
    assert snapshot.generation == node.status.prepared
    cluster.commit(snapshot)
    assert (node.words() == cluster["lb2"].words()).all()


def test_a_restart_in_the_middle_of_a_commit_goes_on() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    snapshot = cluster.plan(vip([1, 2, 3]), vip([1, 4], port=81))
    cluster.stage(snapshot)
    cluster.prepare(snapshot)
    node, written = cluster["lb1"], [0]

    def second_write(effect: KeeperEffect) -> bool:
        written[0] += isinstance(effect, WriteSlots)
        return written[0] > 1

    node.fails = second_write
    assert isinstance(node.call(calls(snapshot)[2], cluster.now_ns), Refuse)
    node.fails = lambda effect: False
    restarted(node, cluster.now_ns)
    assert (1, 2) == (node.status.committed, node.status.prepared)
    cluster.commit(snapshot)
    other = cluster["lb2"]
    for number in (1, 2):
        assert (node.current(number) == other.current(number)).all()
        assert (node.base(number) == other.base(number))[other.tracking(number)].all()


def test_a_restart_without_maps_tracks_what_it_remembers() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    node = cluster["lb1"]
    remembered = node.remembered
    node.lose_everything()
    node.remembered = remembered
    restarted(node, cluster.now_ns)
    assert SLOT_COUNT == node.status.tracking_slots
    assert (node.current() == cluster["lb2"].current()).all()


def test_a_restart_removes_slots_that_nobody_remembers() -> None:
    cluster = Cluster()
    node = cluster["lb1"]
    node.datapath.vip_create(9)
    assert ["DeleteVip"] == restarted(node, cluster.now_ns)


def test_status_shows_the_snapshot_where_it_was_asked_for() -> None:
    cluster = Cluster()
    snapshot = cluster.change(vip([1]))
    status = cluster["lb1"].keeper.status(with_snapshot=True)
    assert isinstance(status, LbStatus)
    assert snapshot == status.snapshot
    assert cluster["lb1"].status.snapshot is None
    assert digest_of(snapshot) == status.digest


def test_ownership_is_written_once_and_is_the_same_everywhere() -> None:
    cluster = Cluster()
    cluster.change(vip([1]))
    cluster.change(vip([1, 2]))
    owns = [node.datapath.maps.own for node in cluster.muxes]
    assert all((owns[0] == own).all() for own in owns)
    assert 1 == sum(isinstance(effect, WriteOwnership) for effect in cluster["lb1"].effects)
    assert SLOT_COUNT == sum(int(node.owned().sum()) for node in cluster.muxes)
    assert np.array_equal(cluster["host1"].datapath.maps.own, np.zeros(SLOT_COUNT, dtype=np.uint32))
