"""What an LB keeps in less memory while nothing changes, and that nobody can tell."""

import pytest

from lbpod.core.limits import COLUMNS_KEPT_NS, FOLD_VIPS_MAX, REST_NS, SLOT_COUNT
from lbpod.core.model import Backend
from lbpod.core.snapshot import Tables
from tests.keepers import SECOND_NS, Cluster, Node, pod_address, vip


def kept_bytes(node: Node) -> list[int]:
    return [vs.slots.kept_bytes for vs in node.keeper._state.vips.values()]


def test_vips_at_rest_are_folded_and_their_tables_forgotten() -> None:
    cluster = Cluster(2)
    cluster.change(vip([1, 2]))
    words = cluster["lb1"].words()
    cluster.run(2 * REST_NS)
    for node in cluster.muxes:
        assert all(count < 2 * SLOT_COUNT for count in kept_bytes(node))
        assert not node.keeper._state.staged.tables  # type: ignore[union-attr]
    assert (words == cluster["lb1"].words()).all()


def test_a_vip_that_tracks_is_whole_and_folded_once_it_has_settled() -> None:
    cluster = Cluster(2)
    cluster.change(vip([1, 2]))
    cluster.run(2 * REST_NS)
    cluster.change(vip([3, 4], [1, 2]))
    assert all(node.status.tracking_slots for node in cluster.muxes)
    assert [8 * SLOT_COUNT] == kept_bytes(cluster["lb1"])
    cluster.run(30 * SECOND_NS)
    assert [0, 0] == [node.status.tracking_slots for node in cluster.muxes]
    assert all(count < 2 * SLOT_COUNT for node in cluster.muxes for count in kept_bytes(node))
    state = cluster["lb1"].keeper._state
    assert [{}, {}, {}] == [state.purge, state.purging, state.purge_kept], "what was purged is no longer kept"


def test_few_vips_are_folded_at_a_time() -> None:
    cluster = Cluster(1)
    cluster.change(*(vip([1, 2], port=number) for number in range(1, FOLD_VIPS_MAX + 4)))
    counts = set()
    for _ in range(30):
        cluster.run(REST_NS // 10)
        counts.add(sum(count < 2 * SLOT_COUNT for count in kept_bytes(cluster["lb1"])))
    assert {FOLD_VIPS_MAX, FOLD_VIPS_MAX + 3} <= counts <= {0, FOLD_VIPS_MAX, FOLD_VIPS_MAX + 3}


@pytest.mark.parametrize("backends", [3, 20])
def test_scores_go_when_no_table_has_asked_for_them(backends: int) -> None:
    tables, key = Tables(7), (pod_address(9), 80, 6)
    pods = [Backend(number, pod_address(number), 8_080, 1) for number in range(1, backends + 1)]
    before = tables.table(key, pods)
    tables.rest(1)
    tables.rest(COLUMNS_KEPT_NS)
    assert backends == tables.scored_count
    tables.rest(COLUMNS_KEPT_NS + 1)
    assert 0 == tables.scored_count
    assert before.digest == tables.table(key, pods).digest
