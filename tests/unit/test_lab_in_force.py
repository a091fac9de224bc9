"""When is a backend out of all tables? Not when generations have passed: when none in force was made before it went."""

from typing import Final

import msgspec

from lbpod.core.messages import LbStatus
from lbpod.core.model import BackendState, Cluster, Snapshot, World, WorldBackend, WorldNode, parse_address
from lbpod.core.snapshot import Tables, next_snapshot, once_more, ring_snapshot
from lbpod.lab.in_force import InForce, edition_name, is_out, place_of
from tests.unit.test_snapshot import vip

CLUSTER = Cluster(vni=7, seed=11)
NODES: Final = tuple(WorldNode(f"n{n}", parse_address(f"10.0.0.{n}"), f"10.0.0.{n}:9900", lb=True) for n in (1, 2, 3))


def backend(last: int, state: BackendState = BackendState.READY) -> WorldBackend:
    return WorldBackend(parse_address(f"10.1.0.{last}"), 8080, "n1", state=state)


def world(edition: int, *backends: WorldBackend) -> World:
    return World(NODES, (msgspec.structs.replace(vip(*backends), name=f"demo/web/{edition_name(edition)}"),))


def follow(wanted: World, previous: Snapshot | None) -> Snapshot:
    generation = previous.generation + 1 if previous else 1
    found, _ = next_snapshot(wanted, previous, CLUSTER, generation, Tables(CLUSTER.seed))
    assert found is not None
    return found


def says(in_force: Snapshot | None, staged: Snapshot | None = None) -> InForce:
    """What an LB answers that has committed the one and may have been given the other."""
    return InForce.of(
        LbStatus(
            node="n1",
            member=0,
            committed=in_force.generation if in_force else 0,
            prepared=0,
            staged=staged.generation if staged else in_force.generation if in_force else 0,
            digest=b"",
            ring_epoch=1,
            tracking_slots=0,
            snapshot=staged or in_force,
            in_force=in_force if staged else None,
            serving=True,
        )
    )


FIRST: Final = follow(world(1, backend(1), backend(2)), None)
PLACE: Final = place_of("10.1.0.2", 8080)


def test_changes_of_the_ring_carry_a_dead_backend_on_however_many_there_are() -> None:
    snapshot, wanted = FIRST, world(2, backend(1))
    for members in (("n1", "n2"), ("n1", "n2", "n3"), ("n1", "n3")):
        snapshot = ring_snapshot(snapshot, snapshot, wanted, members, snapshot.generation + 1, snapshot.next_ids)
        assert not is_out(PLACE, 2, [says(snapshot)])
        snapshot = once_more(snapshot, snapshot, snapshot.generation + 1)
        assert not is_out(PLACE, 2, [says(snapshot)])
    assert is_out(PLACE, 2, [says(follow(world(2, backend(1)), snapshot))])


def test_every_lb_has_to_forward_without_it_and_what_is_only_staged_does_not_count() -> None:
    second = follow(world(2, backend(1)), FIRST)
    assert is_out(PLACE, 2, [says(second), says(second)])
    assert not is_out(PLACE, 2, [says(second), says(FIRST)])
    assert not is_out(PLACE, 2, [says(second), says(FIRST, staged=second)])
    assert not is_out(PLACE, 2, [says(second), says(None)])
    assert not is_out(PLACE, 2, [says(None, staged=second)])


def test_a_backend_that_has_not_come_yet_is_not_out_because_it_is_not_there() -> None:
    place = place_of("10.1.0.3", 8080)
    came_with, went_with = 2, 3
    with_it = follow(world(came_with, backend(1), backend(2), backend(3)), FIRST)
    assert not is_out(place, went_with, [says(FIRST)]), "the change that brings it may be under way"
    assert not is_out(place, went_with, [says(with_it)])
    assert is_out(place, went_with, [says(follow(world(went_with, backend(1), backend(2)), with_it))])


def test_one_that_drains_gets_no_new_flows_unless_nobody_else_is_there() -> None:
    drains = follow(world(2, backend(1), backend(2, BackendState.DRAINING)), FIRST)
    assert is_out(PLACE, 2, [says(drains)])
    alone = follow(world(2, backend(2, BackendState.DRAINING)), FIRST)
    assert not is_out(PLACE, 2, [says(alone)])
