"""Many VIPs that change at once change in portions: who goes first, who never waits, and that each has its turn."""

from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest

from lbpod.core.limits import BACKENDS_MAX, CHANGE_GATHER_NS, PORTION_COST_MAX, PORTION_VIP_COST
from lbpod.core.messages import Tick, WorldSeen
from lbpod.core.model import (
    Affinity,
    Protocol,
    Ring,
    Snapshot,
    Vip,
    World,
    WorldBackend,
    WorldNode,
    WorldVip,
    parse_address,
)
from lbpod.core.portion import Changed, portion
from lbpod.core.snapshot import Tables, next_snapshot
from tests.planner_scene import CLUSTER, SECOND_NS, Scene, calls

NODES = (WorldNode("lb1", parse_address("10.0.0.1"), "lb1:9900", True),)
EACH = PORTION_VIP_COST + 1
"""What a VIP with one backend costs."""
AT_ONCE = -(-PORTION_COST_MAX // EACH)


def vip(number: int, *backends: int, node: str = "lb1") -> WorldVip:
    found = tuple(WorldBackend(parse_address(f"10.1.{one >> 8}.{one & 255}"), 80, node) for one in backends)
    address = parse_address(f"203.0.{number >> 8}.{number & 255}")
    return WorldVip(f"a/b{number}/http", address, 80, Protocol.TCP, Affinity.NONE, 60 * SECOND_NS, 0, found)


def world(numbers: Sequence[int], backend: int = 1) -> World:
    """VIPs of these numbers with one backend each."""
    return World(NODES, tuple(vip(number, backend) for number in numbers))


def follow(wanted: World, previous: Snapshot | None, tables: Tables) -> tuple[Snapshot, int]:
    found, waiting = next_snapshot(wanted, previous, CLUSTER, previous.generation + 1 if previous else 1, tables)
    assert found is not None, "something was to change"
    return found, waiting


@pytest.fixture
def tables() -> Tables:
    return Tables(CLUSTER.seed)


@pytest.fixture
def served(tables: Tables) -> tuple[Vip, ...]:
    """Four VIPs of one backend, the first three of which have the oldest tables."""
    first, _ = follow(world([1, 2, 3]), None, tables)
    second, _ = follow(world([1, 2, 3, 4]), first, tables)
    return second.vips


def numbers_of(those: Sequence[Changed]) -> list[int]:
    return [one.wanted.address[-1] for one in those]


def test_what_one_generation_can_do_it_does_in_the_order_of_the_world(served: tuple[Vip, ...]) -> None:
    changed = [Changed(vip(9, 1), None), Changed(vip(1, 2), served[0])]
    assert (changed, []) == portion(changed, [1])


def test_what_is_served_goes_before_what_is_new_three_to_one(served: tuple[Vip, ...]) -> None:
    changed = [Changed(vip(number, 1), None) for number in (11, 12, 13)]
    changed += [Changed(vip(number, 2), had) for number, had in zip((1, 2, 3, 4), served, strict=True)]
    now, later = portion(changed, [1], 5 * EACH)
    assert [1, 2, 3, 11, 4] == numbers_of(now)
    assert [12, 13] == numbers_of(later)


def test_of_what_is_served_the_oldest_table_goes_first(served: tuple[Vip, ...]) -> None:
    changed = [Changed(vip(number, 2), had) for number, had in zip((1, 2, 3, 4), served, strict=True)]
    now, later = portion(changed[::-1], [1], 3 * EACH)
    assert ([3, 2, 1], [4]) == (numbers_of(now), numbers_of(later))


def test_one_goes_however_much_it_costs() -> None:
    big = [Changed(vip(number, *range(1, PORTION_COST_MAX + 2)), None) for number in (1, 2)]
    now, later = portion(big, [1])
    assert (big[:1], big[1:]) == (now, later)


def test_a_vip_that_cannot_stay_as_it_is_never_waits(served: tuple[Vip, ...]) -> None:
    """Node 1 has gone: what has a backend on it would name a node that the snapshot does not list."""
    changed = [Changed(vip(11, 1), None)]
    changed += [Changed(vip(number, 2, node="lb2"), had) for number, had in zip((1, 2, 3, 4), served, strict=True)]
    now, later = portion(changed, [2], 2 * EACH)
    assert ([1, 2, 3, 4], [11]) == (numbers_of(now), numbers_of(later))


def test_a_world_of_many_vips_comes_in_portions_and_ends_as_it_would_at_once(tables: Tables) -> None:
    wanted = world(range(1, 2 * AT_ONCE + 11))
    snapshot, left = follow(world([]), None, tables)
    for here, waiting in ((AT_ONCE, AT_ONCE + 10), (2 * AT_ONCE, 10), (len(wanted.vips), 0)):
        snapshot, left = follow(wanted, snapshot, tables)
        assert (here, waiting) == (len(snapshot.vips), left)
    assert (None, 0) == next_snapshot(wanted, snapshot, CLUSTER, 5, tables)
    assert [one.address for one in wanted.vips] == [one.address for one in snapshot.vips]
    assert list(range(1, 2 * AT_ONCE + 11)) == [one.id for one in snapshot.vips], "ids are given once, at one's turn"
    assert {2: AT_ONCE, 3: AT_ONCE, 4: 10} == Counter(one.epoch for one in snapshot.vips)


def test_the_first_ring_begins_with_all_at_once(tables: Tables) -> None:
    wanted = world(range(1, 2 * AT_ONCE))
    snapshot, left = follow(wanted, None, tables)
    assert (len(wanted.vips), 0) == (len(snapshot.vips), left)
    no_ring = msgspec.structs.replace(snapshot, ring=Ring(0))
    _, left = follow(world(range(1, 2 * AT_ONCE), backend=2), no_ring, tables)
    assert 0 == left, "that was superseded before anybody served"


def test_one_that_waits_stays_as_it_was(tables: Tables) -> None:
    numbers = range(1, AT_ONCE + 1)
    before, left = follow(world(numbers), None, tables)
    assert 0 == left
    wanted = World(NODES, (*world(numbers, backend=2).vips, vip(1000, 1)))
    after, left = follow(wanted, before, tables)
    assert 1 == left, "the newcomer took the turn of one"
    assert 1 == sum(one.address == parse_address("203.0.3.232") for one in after.vips)
    assert {before.vips[-1]} == set(before.vips) & set(after.vips)


def test_where_all_fits_only_at_once_nothing_waits(tables: Tables) -> None:
    """A VIP that has nearly all backends there may be is to have one, and would wait for another that gets many."""
    second, _ = follow(world([1, 3]), follow(world([3]), None, tables)[0], tables)
    crowded = next(one for one in second.vips if one.address == parse_address("203.0.0.1"))
    of_all = tuple(
        msgspec.structs.replace(
            crowded.backends[0],
            id=number,
            address=parse_address(f"10.{9 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"),
        )
        for number in range(3, BACKENDS_MAX + 2)
    )
    vips = tuple(msgspec.structs.replace(one, backends=of_all) if one is crowded else one for one in second.vips)
    wanted = World(NODES, (vip(1, 1), vip(3, *range(1, PORTION_COST_MAX + 2))))
    found, left = follow(wanted, msgspec.structs.replace(second, vips=vips), tables)
    assert 0 == left
    assert [PORTION_COST_MAX + 1, 1] == [len(one.backends) for one in found.vips]


# --- The Planner ------------------------------------------------------------------------------------------------------
def test_a_portion_follows_upon_the_other_until_nobody_waits() -> None:
    scene = Scene()
    wanted = world(range(1, 2 * AT_ONCE + 11))
    scene.see(world([]))
    scene.see(wanted)
    assert (2, AT_ONCE + 10) == (scene.now().changes, scene.now().waiting)
    scene.later(SECOND_NS)
    assert [1, 2, 3, 4] == scene.persisted
    assert (4, 0) == (scene.now().changes, scene.now().waiting)
    assert len(wanted.vips) == len(scene.in_force["lb1"].vips)


def test_what_has_changed_meanwhile_is_in_the_next_portion() -> None:
    scene = Scene()
    scene.see(world([1]))
    many = world(range(1, 3 * AT_ONCE))
    scene.play(WorldSeen(many))
    scene.now_ns += CHANGE_GATHER_NS
    scene.play(Tick())
    assert [1, 2] == scene.persisted
    scene.play(WorldSeen(World(NODES, (vip(1, 2), *many.vips[1:]))))
    scene.now_ns += CHANGE_GATHER_NS
    scene.play(Tick())
    assert [1, 2, 3] == scene.persisted
    (first,) = [one for one in scene.in_force["lb1"].vips if one.address == parse_address("203.0.0.1")]
    assert [2] == [one.address[-1] for one in first.backends]
    assert scene.now().waiting > 0, "all others still wait"


def test_another_controller_goes_on_with_what_waits() -> None:
    scene = Scene()
    wanted = world(range(1, 2 * AT_ONCE))
    scene.see(world([]))
    scene.see(wanted)
    scene.restart()
    done = scene.see(wanted) + scene.later(SECOND_NS)
    assert ["persist 3"] == calls(done, "persist")
    assert len(wanted.vips) == len(scene.in_force["lb1"].vips)
