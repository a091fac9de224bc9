"""What becomes of a World: ids that rest, epochs that move only with their VIP, and sentences for what cannot be."""

import itertools
from typing import Any

import msgspec
import pytest

from lbpod.core.errors import SnapshotError
from lbpod.core.limits import BACKEND_IDS_MAX, MEMBER_NONE
from lbpod.core.model import (
    Affinity,
    BackendState,
    Cluster,
    Protocol,
    Ring,
    Snapshot,
    World,
    WorldBackend,
    WorldNode,
    WorldVip,
    parse_address,
)
from lbpod.core.snapshot import Tables, check, digest_of, next_snapshot, once_more, ring_snapshot
from lbpod.core.table import TableBackend, build

CLUSTER = Cluster(vni=7, seed=11)
SECOND_NS = 1_000_000_000


def node(name: str, last: int, lb: bool = True) -> WorldNode:
    return WorldNode(name, parse_address(f"10.0.0.{last}"), f"10.0.0.{last}:9900", lb)


def backend(last: int, **kept: Any) -> WorldBackend:
    return WorldBackend(parse_address(f"10.1.0.{last}"), 8080, "n1", **kept)


def vip(*backends: WorldBackend, last: int = 1, port: int = 80, idle_s: int = 3600) -> WorldVip:
    address = parse_address(f"203.0.113.{last}")
    seconds = (idle_s * SECOND_NS, 60 * SECOND_NS)
    return WorldVip(f"shop/web{last}/http{port}", address, port, Protocol.TCP, Affinity.NONE, *seconds, backends)


NODES = (node("n1", 1), node("n2", 2), node("n3", 3, lb=False))


def follow(world: World, previous: Snapshot | None = None) -> Snapshot:
    generation = previous.generation + 1 if previous else 1
    found, _ = next_snapshot(world, previous, CLUSTER, generation, Tables(CLUSTER.seed))
    assert found is not None, "the world was expected to differ"
    return found


def sentence(world: World, previous: Snapshot | None = None) -> str:
    with pytest.raises(SnapshotError) as caught:
        follow(world, previous)
    return str(caught.value)


def test_the_first_snapshot_numbers_everything() -> None:
    found = follow(World(NODES, (vip(backend(1), backend(2)),)))
    assert [("n1", 1, 0), ("n2", 2, 1), ("n3", 3, MEMBER_NONE)] == [(n.name, n.id, n.member) for n in found.nodes]
    assert (1, (0, 1)) == (found.ring.epoch, found.ring.members)
    (only,) = found.vips
    assert (1, 1, 1) == (only.id, only.created, only.epoch)
    assert [1, 2] == [one.id for one in only.backends]
    wanted = build([TableBackend(one.id, one.address, one.port) for one in only.backends], CLUSTER.seed)
    assert wanted.digest == only.digest


def test_the_order_of_the_world_never_matters() -> None:
    vips = (vip(backend(1), backend(2), last=1), vip(backend(3), last=2))
    turned = (vip(backend(3), last=2), vip(backend(2), backend(1), last=1))
    first = follow(World(NODES, vips))
    assert first == follow(World(tuple(reversed(NODES)), turned))
    assert (None, 0) == next_snapshot(World(NODES[::-1], turned), first, CLUSTER, 2, Tables(CLUSTER.seed))


def test_an_epoch_moves_only_with_its_own_vip() -> None:
    first = follow(World(NODES, (vip(backend(1), last=1), vip(backend(2), last=2))))
    second = follow(World(NODES, (vip(backend(1), last=1), vip(backend(2), backend(3), last=2))), first)
    assert [1, 2] == [one.epoch for one in second.vips]
    assert [1, 1] == [one.created for one in second.vips]
    assert first.vips[0] == second.vips[0]
    third = follow(World(NODES, (vip(backend(1), last=1, idle_s=60), vip(backend(2), backend(3), last=2))), second)
    assert [3, 2] == [one.epoch for one in third.vips]


def test_the_table_is_built_from_ready_backends_or_else_from_all() -> None:
    draining = backend(2, state=BackendState.DRAINING)
    both = follow(World(NODES, (vip(backend(1), draining),))).vips[0]
    alone = follow(World(NODES, (vip(backend(1)),))).vips[0]
    assert alone.digest == both.digest
    last = follow(World(NODES, (vip(draining),))).vips[0]
    assert follow(World(NODES, (vip(backend(2)),))).vips[0].digest == last.digest
    assert build([], CLUSTER.seed).digest == follow(World(NODES, (vip(),))).vips[0].digest


def test_an_id_rests_until_all_others_have_been_given() -> None:
    snapshot = follow(World(NODES, (vip(backend(1), backend(2)),)))
    given = []
    for turn in range(50):
        snapshot = follow(World(NODES, (vip(backend(1)),)), snapshot)
        snapshot = follow(World(NODES, (vip(backend(1), backend(10 + turn % 2)),)), snapshot)
        given.append(snapshot.vips[0].backends[1].id)
    assert list(range(3, 53)) == given


def test_ids_wrap_and_step_over_those_in_use() -> None:
    first = follow(World(NODES, (vip(backend(1), backend(2)),)))
    at_the_end = msgspec.structs.replace(first.next_ids, backend=BACKEND_IDS_MAX - 1)
    late = msgspec.structs.replace(first, next_ids=at_the_end)
    found = follow(World(NODES, (vip(*map(backend, range(1, 5))),)), late)
    assert [1, 2, 3, BACKEND_IDS_MAX - 1] == [one.id for one in found.vips[0].backends]
    assert 4 == found.next_ids.backend


def test_an_id_that_leaves_is_not_given_in_the_same_change() -> None:
    first = follow(World(NODES, (vip(backend(1)),)))
    full = msgspec.structs.replace(first, next_ids=msgspec.structs.replace(first.next_ids, backend=1))
    assert [2] == [one.id for one in follow(World(NODES, (vip(backend(2)),)), full).vips[0].backends]


def test_a_vip_that_comes_back_is_another_one() -> None:
    first = follow(World(NODES, (vip(backend(1)),)))
    third = follow(World(NODES, (vip(backend(1)),)), follow(World(NODES), first))
    assert (2, 3, 3) == (third.vips[0].id, third.vips[0].created, third.vips[0].epoch)
    assert 2 == third.vips[0].backends[0].id


def test_another_affinity_makes_another_vip() -> None:
    """The flows of a slot are other flows: LBs refuse an id that changes its meaning."""
    first = follow(World(NODES, (vip(backend(1)),)))
    by_client = msgspec.structs.replace(vip(backend(1)), affinity=Affinity.CLIENT_IP)
    second = follow(World(NODES, (by_client,)), first)
    assert (2, 2, 2) == (second.vips[0].id, second.vips[0].created, second.vips[0].backends[0].id)


# --- The ring ---------------------------------------------------------------------------------------------------------
def ring(snapshot: Snapshot) -> tuple[list[str], list[str]]:
    """Names of the members, and of those before."""
    names = {node.member: node.name for node in snapshot.nodes}
    return [names[member] for member in snapshot.ring.members], [names[member] for member in snapshot.ring.before]


def turn(in_force: Snapshot, members: str, world: World, newest: Snapshot | None = None) -> Snapshot:
    """The ring changes to these members (names with blanks between)."""
    newest = newest or in_force
    return ring_snapshot(in_force, newest, world, members.split(), newest.generation + 1, newest.next_ids)


def test_the_ring_stays_whatever_the_world_says() -> None:
    first = follow(World(NODES, (vip(backend(1)),)))
    gone = World((NODES[0], NODES[2], node("n4", 4)), (vip(backend(1)),))
    second = follow(gone, first)
    assert first.ring == second.ring
    assert [("n1", 0), ("n2", 1), ("n3", MEMBER_NONE), ("n4", 2)] == [(n.name, n.member) for n in second.nodes]
    moved = World((node("n1", 9), *NODES[1:]), (vip(backend(1)),))
    assert parse_address("10.0.0.1") == follow(moved, first).nodes[0].address
    assert "10.0.0.9:9900" == follow(moved, first).nodes[0].control


def test_a_ring_forms_when_the_first_lbs_come() -> None:
    none = follow(World((NODES[2],)))
    assert (1, ()) == (none.ring.epoch, none.ring.members)
    some = follow(World(NODES), none)
    assert (2, (0, 1)) == (some.ring.epoch, some.ring.members)


def test_a_first_ring_leaves_out_whom_it_is_told_to() -> None:
    found, _ = next_snapshot(World(NODES), None, CLUSTER, 1, Tables(CLUSTER.seed), first_ring={"n2", "n3"})
    assert found is not None
    assert (["n2"], []) == ring(found), "n3 is no LB"
    assert [0, 1, MEMBER_NONE] == [one.member for one in found.nodes]


def test_a_first_ring_that_is_formed_anew_keeps_its_numbers() -> None:
    first = follow(World(NODES, (vip(backend(1)),)))
    forgotten = msgspec.structs.replace(first, ring=Ring(0))
    found, _ = next_snapshot(
        World(NODES, (vip(backend(1)),)), forgotten, CLUSTER, 2, Tables(CLUSTER.seed), first_ring={"n2"}
    )
    assert found is not None
    assert (2, (1,), first.vips) == (found.ring.epoch, found.ring.members, found.vips)


def test_a_ring_change_changes_nothing_else() -> None:
    first = follow(World(NODES, (vip(backend(1)),)))
    other = World((NODES[0], node("n4", 4)), (vip(backend(2)),))
    second = turn(first, "n1 n4", other)
    assert (["n1", "n4"], ["n1", "n2"]) == ring(second)
    assert (2, 2, first.vips) == (second.generation, second.ring.epoch, second.vips)
    assert first.nodes == second.nodes[:3], "n2 and n3 are still there, for they have something to hand over to"
    assert ("n4", 4, 2, "10.0.0.4:9900") == (
        second.nodes[3].name,
        second.nodes[3].id,
        second.nodes[3].member,
        second.nodes[3].control,
    )
    check(second)


def test_what_follows_a_ring_change_does_not_change_the_ring() -> None:
    world = World((*NODES, node("n4", 4)), (vip(backend(1)),))
    first = follow(World(NODES, (vip(backend(1)),)))
    second = turn(first, "n1 n4", world)
    assert (None, 0) == next_snapshot(world, second, CLUSTER, 3, Tables(CLUSTER.seed)), "n2 may come back, and is kept"
    third = follow(World(world.nodes, (vip(backend(2)),)), second)
    assert (["n1", "n4"], [], 2) == (*ring(third), third.ring.epoch)


def test_who_has_left_the_ring_and_the_world_goes_with_the_next_change() -> None:
    first = follow(World(NODES))
    left = World((NODES[0], NODES[2]))
    second = turn(first, "n1", left)
    assert ["n1", "n3"] == [one.name for one in follow(left, second).nodes]
    host = World((NODES[0], node("n2", 2, lb=False), NODES[2]))
    assert MEMBER_NONE == follow(host, second).nodes[1].member


def test_who_comes_back_has_the_number_that_it_had() -> None:
    world = World(NODES, (vip(backend(1)),))
    first = follow(world)
    second = turn(first, "n1", world)
    third = turn(second, "n1 n2", world)
    assert first.ring.members == third.ring.members
    assert third.ring.before == second.ring.members


def test_who_comes_back_at_another_address_is_another_member() -> None:
    first = follow(World(NODES))
    moved = World((NODES[0], node("n2", 22), NODES[2]))
    third = turn(turn(first, "n1", moved), "n1 n2", moved)
    found = third.nodes[1]
    assert ("n2", 2, 2, parse_address("10.0.0.22")) == (found.name, found.id, found.member, found.address)


def test_a_ring_change_that_supersedes_another_keeps_the_numbers_of_those_that_join_again() -> None:
    first = follow(World(NODES))
    more = World((*NODES, node("n4", 4), node("n5", 5)))
    given_up = turn(first, "n1 n2 n4 n5", more)
    second = turn(first, "n1 n2 n5", more, given_up)
    assert (["n1", "n2", "n5"], ["n1", "n2"]) == ring(second)
    assert (given_up.nodes, given_up.next_ids) == (second.nodes, second.next_ids), "n4 has to hear of it, too"


def test_what_takes_a_ring_change_back_says_so_to_those_that_were_to_join() -> None:
    first = follow(World(NODES, (vip(backend(1)),)))
    given_up = turn(first, "n1 n4", World((NODES[0], node("n4", 4))))
    third = once_more(first, given_up, 3)
    assert (first.vips, first.ring, given_up.nodes) == (third.vips, third.ring, third.nodes)
    assert given_up.next_ids == third.next_ids
    check(third)


def test_a_node_whose_address_is_another_one_s_in_force_is_not_kept() -> None:
    first = follow(World(NODES))
    renamed = follow(World((NODES[0], NODES[1], node("n9", 3, lb=False))), first)
    assert ["n1", "n2", "n3"] == [one.name for one in once_more(first, renamed, 3).nodes]


def test_a_ring_change_gives_no_number_that_anything_in_force_has() -> None:
    """What supersedes a change that removed a node, with the search for ids at its very number."""
    first = follow(World((*NODES, node("n4", 4, lb=False))))
    removed = follow(World(NODES), first)
    at = msgspec.structs.replace(removed.next_ids, node=4, member=1)
    found = ring_snapshot(first, removed, World((*NODES, node("n5", 5))), ["n1", "n2", "n5"], 3, at)
    assert [("n4", 4, MEMBER_NONE), ("n5", 5, 2)] == [(one.name, one.id, one.member) for one in found.nodes[3:]]


def test_two_at_one_address_do_not_join() -> None:
    first = follow(World(NODES))
    with pytest.raises(SnapshotError, match=r"node address 10\.0\.0\.4 is there 2 times"):
        turn(first, "n1 n4 n5", World((*NODES, node("n4", 4), node("n5", 4))))


def test_a_digest_names_one_state() -> None:
    first = follow(World(NODES, (vip(backend(1)),)))
    assert digest_of(first) == digest_of(msgspec.structs.replace(first))
    assert digest_of(first) != digest_of(msgspec.structs.replace(first, generation=2))
    assert 16 == len(digest_of(first))


@pytest.mark.parametrize(
    ("world", "wanted"),
    [
        (World(NODES, (vip(), vip())), "VIP 203.0.113.1:80/TCP is there 2 times; it may be there once"),
        (World((*NODES, NODES[0])), "node n1 is there 2 times; it may be there once"),
        (World((*NODES, node("n9", 1))), "node address 10.0.0.1 is there 2 times; it may be there once"),
        (
            World(NODES, (vip(backend(1), backend(1, weight=2)),)),
            "backend of shop/web1/http80 10.1.0.1:8080 is there 2",
        ),
        (
            World((), (vip(backend(1)),)),
            "backend 10.1.0.1:8080 of shop/web1/http80 runs on node 'n1', which is not listed",
        ),
        (
            World(NODES, (vip(backend(1, weight=1_001)),)),
            "the weight of backend 10.1.0.1:8080 of shop/web1/http80 is 1001",
        ),
        (World(NODES, (vip(idle_s=1),)), "the idle time in ns of VIP shop/web1/http80 is 1000000000"),
        (World(NODES, (vip(port=0),)), "the port of VIP shop/web1/http0 is 0; it must be from 1 to 65535"),
        (World((WorldNode("n1", parse_address("2001:db8::1"), "x:1", True),)), "IPv6 is not supported yet, use IPv4"),
        (World((WorldNode("n1", bytes(4), "x:1", True),)), "the address of node n1 has 4 bytes instead of 16"),
        (World((WorldNode("n1", NODES[0].address, "", True),)), "node n1 has no control address"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_sentence(world: World, wanted: str) -> None:
    assert wanted in sentence(world)


def test_limits_are_said_in_one_sentence() -> None:
    addresses = [parse_address(f"10.{a}.{b}.{c}") for a, b, c in itertools.product(range(1, 3), range(200), range(200))]
    crowd = tuple(WorldBackend(address, 80, "n1") for address in addresses[:70_000])
    assert "there are 70000 backends; the most is 65536" == sentence(World(NODES, (vip(*crowd),)))
    many = tuple(
        WorldVip(f"a/b/{i}", addresses[i], 80, Protocol.TCP, Affinity.NONE, 60 * SECOND_NS, 0) for i in range(4_096)
    )
    assert "there are 4096 VIPs; the most is 4095" == sentence(World(NODES, many))


def test_too_long_a_chain_in_the_vip_index_is_refused() -> None:
    """Addresses that differ above the last four bytes do not exist in IPv4, so ports make the collision."""
    from lbpod.core.layout import vip_index

    address = parse_address("203.0.113.1")
    place = vip_index(address, 80, 6)
    ports = [port for port in range(1, 65_536) if vip_index(address, port, 6) == place]
    others = [parse_address(f"203.0.{a}.{b}") for a in range(256) for b in range(256)]
    keys = [(address, port) for port in ports]
    keys += [(one, port) for one in others for port in (80, 443) if vip_index(one, port, 6) == place and one != address]
    vips = tuple(
        WorldVip(f"a/b/{i}", one, port, Protocol.TCP, Affinity.NONE, 60 * SECOND_NS, 0)
        for i, (one, port) in enumerate(keys[:9])
    )
    assert 9 == len(vips)
    assert "VIPs fall on place" in sentence(World(NODES, vips))


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("generation", 0, "the generation is 0"),
        ("generation", 1 << 32, "the generation is 4294967296"),
        ("cluster", Cluster(1 << 24, 0), "the VNI is 16777216"),
        ("nodes", (), "member 0 of the ring is no node's"),
        ("ring", Ring(2, (0, 1), (0, 7)), "member 7 of the ring is no node's"),
        ("ring", Ring(2, (0,), (1, 0)), "members of the ring before"),
        ("ring", Ring(2, (0, 1), (0, 1)), "the ring is said to change, and has the same members before and after"),
    ],
)
def test_check_refuses_what_breaks_an_invariant(field: str, value: object, wanted: str) -> None:
    sound = follow(World(NODES, (vip(backend(1), backend(2)),)))
    check(sound)
    with pytest.raises(SnapshotError, match=wanted):
        check(msgspec.structs.replace(sound, **{field: value}))


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("epoch", 9, "breaks 1 <= created <= epoch <= generation: 1, 9, 1"),
        ("created", 0, "breaks 1 <= created"),
        ("digest", b"x", "has 1 bytes instead of 16"),
        ("id", 4_096, "the id of VIP shop/web1/http80 is 4096"),
        ("address", b"", "the address of VIP shop/web1/http80 has 0 bytes"),
        ("name", "", "has no name"),
    ],
)
def test_check_refuses_a_broken_vip(field: str, value: object, wanted: str) -> None:
    sound = follow(World(NODES, (vip(backend(1), backend(2)),)))
    broken = msgspec.structs.replace(sound.vips[0], **{field: value})
    with pytest.raises(SnapshotError, match=wanted):
        check(msgspec.structs.replace(sound, vips=(broken,)))


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("id", 2, "ids of the backends of shop/web1/http80 do not ascend|backend id 2 is there 2"),
        ("id", 0, "the id of backend 0 of shop/web1/http80 is 0"),
        ("port", 65_536, "the port of backend 1 of shop/web1/http80 is 65536"),
        ("node", 9, "backend 1 of shop/web1/http80 runs on node 9, which is not in the snapshot"),
        ("address", parse_address("::1"), "IPv6 is not supported yet"),
    ],
)
def test_check_refuses_a_broken_backend(field: str, value: object, wanted: str) -> None:
    sound = follow(World(NODES, (vip(backend(1), backend(2)),)))
    only = sound.vips[0]
    broken = msgspec.structs.replace(only.backends[0], **{field: value})
    with pytest.raises(SnapshotError, match=wanted):
        check(
            msgspec.structs.replace(sound, vips=(msgspec.structs.replace(only, backends=(broken, only.backends[1])),))
        )
