"""Many VIPs that change at once change in portions: who goes first, who never waits, and that each has its turn."""

from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from lbpod.core.layout import vip_index
from lbpod.core.limits import BACKENDS_MAX, CHANGE_GATHER_NS, PORTION_COST_MAX, PORTION_VIP_COST, VIP_CHAIN_MAX
from lbpod.core.messages import LbFailed, Phase, PlannerEffect, PlannerEvent, Push, Tick, WorldSeen
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
from lbpod.core.snapshot import DIGEST_BYTES, Tables, next_snapshot
from lbpod.core.table import Table
from tests.planner_scene import CLUSTER, SECOND_NS, Scene, calls

NODES = (WorldNode("lb1", parse_address("10.0.0.1"), "lb1:9900", True),)
EACH = PORTION_VIP_COST + 1
"""What a VIP with one backend costs."""
IN_FORCE = 2
"""Generation of what is served."""
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
    assert (changed, []) == portion(changed, [1], IN_FORCE)


def test_what_is_served_goes_before_what_is_new_three_to_one(served: tuple[Vip, ...]) -> None:
    changed = [Changed(vip(number, 1), None) for number in (11, 12, 13)]
    changed += [Changed(vip(number, 2), had) for number, had in zip((1, 2, 3, 4), served, strict=True)]
    now, later = portion(changed, [1], IN_FORCE, 5 * EACH)
    assert [1, 2, 3, 11, 4] == numbers_of(now)
    assert [12, 13] == numbers_of(later)


def test_of_what_is_served_the_oldest_table_goes_first(served: tuple[Vip, ...]) -> None:
    changed = [Changed(vip(number, 2), had) for number, had in zip((1, 2, 3, 4), served, strict=True)]
    now, later = portion(changed[::-1], [1], IN_FORCE, 3 * EACH)
    assert ([3, 2, 1], [4]) == (numbers_of(now), numbers_of(later))


def test_one_goes_however_much_it_costs() -> None:
    big = [Changed(vip(number, *range(1, PORTION_COST_MAX + 2)), None) for number in (1, 2)]
    now, later = portion(big, [1], IN_FORCE)
    assert (big[:1], big[1:]) == (now, later)


def test_a_vip_that_cannot_stay_as_it_is_never_waits(served: tuple[Vip, ...]) -> None:
    """Node 1 has gone: what has a backend on it would name a node that the snapshot does not list."""
    changed = [Changed(vip(number, 1), None) for number in (11, 12)]
    changed += [Changed(vip(number, 2, node="lb2"), had) for number, had in zip((1, 2, 3, 4), served, strict=True)]
    now, later = portion(changed, [2], IN_FORCE, 2 * EACH)
    assert ([1, 2, 3, 4, 11], [12]) == (numbers_of(now), numbers_of(later))


def test_the_first_of_both_kinds_goes_whatever_it_costs(served: tuple[Vip, ...]) -> None:
    size = PORTION_COST_MAX + 1
    changed = [Changed(vip(number, 1), None) for number in (11, 12)]
    changed += [
        Changed(vip(number, *range(2, 2 + size)), had) for number, had in zip((1, 2, 3, 4), served, strict=True)
    ]
    now, later = portion(changed, [1], IN_FORCE)
    assert ([1, 11], [2, 3, 4, 12]) == (numbers_of(now), numbers_of(later))
    changed = [Changed(vip(number, *range(size)), None) for number in (11, 12)]
    changed += [Changed(vip(number, 2), had) for number, had in zip((1, 2, 3, 4), served, strict=True)]
    now, later = portion(changed, [1], IN_FORCE)
    assert ([1, 2, 3, 11], [4, 12]) == (numbers_of(now), numbers_of(later))


def test_what_is_newer_than_what_is_in_force_never_waits(served: tuple[Vip, ...]) -> None:
    """The fourth was made by the second generation, which never came into force: somebody refuses it, may be."""
    changed = [Changed(vip(number, 2), had) for number, had in zip((1, 2, 3, 4), served, strict=True)]
    now, later = portion(changed, [1], IN_FORCE - 1, EACH)
    assert ([4, 1], [2, 3]) == (numbers_of(now), numbers_of(later))


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


@pytest.mark.parametrize(("count", "size"), [(1, PORTION_COST_MAX), (2, PORTION_COST_MAX // 2), (3, 210), (9, 600)])
def test_a_new_one_is_served_though_what_costs_much_changes_all_the_time(
    monkeypatch: pytest.MonkeyPatch, tables: Tables, count: int, size: int
) -> None:
    nothing = np.zeros(1, dtype=np.uint32)
    monkeypatch.setattr(tables, "table", lambda *_: Table(nothing, bytes(DIGEST_BYTES)))

    def churn(at: int) -> list[WorldVip]:
        return [vip(number, *range(at, at + size)) for number in range(1, count + 1)]

    snapshot, _ = follow(World(NODES, tuple(churn(1))), None, tables)
    snapshot, left = follow(World(NODES, (*churn(2), vip(200, 1))), snapshot, tables)
    assert parse_address("203.0.0.200") in {one.address for one in snapshot.vips}
    assert left < count
    for at in range(3, count + 3):
        snapshot, _ = follow(World(NODES, (*churn(at), vip(200, 1))), snapshot, tables)
    assert 2 < min(one.epoch for one in snapshot.vips if one.name != "a/b200/http"), "each had its turn meanwhile"


# --- Who moves --------------------------------------------------------------------------------------------------------
def at_port(one: WorldVip, port: int) -> WorldVip:
    return msgspec.structs.replace(one, port=port)


def test_who_moves_to_another_port_is_served_where_it_was_until_it_is_its_turn(tables: Tables) -> None:
    numbers = range(1, AT_ONCE + 11)
    before, _ = follow(World(NODES, world(numbers).vips), None, tables)
    wanted = World(NODES, tuple(at_port(one, 8080) for one in world(numbers).vips))
    snapshot, waiting = follow(wanted, before, tables)
    assert 10 == waiting
    assert {80: 10, 8080: AT_ONCE} == Counter(one.port for one in snapshot.vips)
    assert {one.name for one in wanted.vips} == {one.name for one in snapshot.vips}
    snapshot, waiting = follow(wanted, snapshot, tables)
    assert 0 == waiting
    assert {8080: AT_ONCE + 10} == Counter(one.port for one in snapshot.vips)
    assert not {one.id for one in before.vips} & {one.id for one in snapshot.vips}, "they are other VIPs to an LB"
    backends = [one.backends[0].id for one in (*before.vips, *snapshot.vips)]
    assert len(set(backends)) == len(backends)


def test_who_moves_goes_before_what_is_new(tables: Tables) -> None:
    before, _ = follow(World(NODES, (vip(1000, 1),)), None, tables)
    wanted = World(NODES, (*world(range(1, 2 * AT_ONCE)).vips, at_port(vip(1000, 1), 8080)))
    snapshot, waiting = follow(wanted, before, tables)
    assert AT_ONCE == waiting
    assert [8080] == [one.port for one in snapshot.vips if one.name == "a/b1000/http"]


def test_a_place_that_another_takes_is_left_at_once(tables: Tables) -> None:
    """Two change places, and many others are new: at each place there is one VIP at any time."""
    before, _ = follow(world([1, 2]), None, tables)
    one, two = world([1, 2]).vips
    swapped = (msgspec.structs.replace(one, name=two.name), msgspec.structs.replace(two, name=one.name))
    snapshot, _ = follow(World(NODES, (*swapped, *world(range(3, 2 * AT_ONCE)).vips)), before, tables)
    named = {(each.name, each.address) for each in snapshot.vips}
    assert {(each.name, each.address) for each in swapped} <= named


def test_where_the_index_has_no_place_for_those_that_wait_to_move_nothing_waits(tables: Tables) -> None:
    """The last one is to fall where as many are as fit, once one of these, which moves, has left."""
    crowd = in_one_place(VIP_CHAIN_MAX + 1)
    others = [vip(number, 1) for number in range(1, AT_ONCE + 1)]
    before, _ = follow(World(NODES, (*others, *crowd[:-1])), None, tables)
    changed = [vip(number, 2) for number in range(1, AT_ONCE + 1)]
    moved = msgspec.structs.replace(vip(3000, 1), name=crowd[0].name)
    snapshot, waiting = follow(World(NODES, (*changed, moved, *crowd[1:])), before, tables)
    assert 0 == waiting
    assert {one.address for one in (moved, *crowd[1:])} <= {one.address for one in snapshot.vips}


def in_one_place(count: int) -> list[WorldVip]:
    """VIPs that share a place of the index, of one backend each."""
    places: dict[int, list[WorldVip]] = {}
    for port in range(1, 65_536):
        one = at_port(vip(2000, 1), port)
        there = places.setdefault(vip_index(one.address, port, int(one.protocol)), [])
        there.append(msgspec.structs.replace(one, name=f"c/p{port}/http"))
        if len(there) == count:
            return there
    raise AssertionError("some place is taken often enough")


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


def test_what_mends_a_refused_portion_is_in_the_next_one() -> None:
    """Many others have changed as well meanwhile, and all of them have older tables."""
    scene = Scene()
    answer = scene._answer

    def refusing(effect: PlannerEffect, done: list[str]) -> PlannerEvent | None:
        if isinstance(effect, Push) and isinstance(effect.body, Snapshot):
            if parse_address("10.1.0.66") in {one.address for each in effect.body.vips for one in each.backends}:
                return LbFailed(effect.node, effect.generation, True, "not that one")
        return answer(effect, done)

    scene._answer = refusing  # type: ignore[method-assign]
    numbers = range(2, AT_ONCE + 11)
    scene.see(World(NODES, (vip(1, 1), *world(numbers).vips)))
    scene.see(World(NODES, (vip(1, 66), *world(numbers).vips)))
    assert "lb1 refuses: not that one" == scene.now().problem
    scene.see(World(NODES, (vip(1, 2), *world(numbers, backend=2).vips)))
    scene.later(SECOND_NS)
    assert [1, 2, 3, 4] == scene.persisted
    assert (Phase.IDLE, 0, "") == (scene.now().phase, scene.now().waiting, scene.now().problem)
    assert {2} == {one.address[-1] for each in scene.in_force["lb1"].vips for one in each.backends}
