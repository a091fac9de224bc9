"""Effects become rows: the right ones, in the right order, and only those that changed."""

from contextlib import suppress
from dataclasses import replace
from random import Random

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from lbpod.core.layout import (
    BACKEND,
    BACKEND_ALIVE,
    BACKEND_LOCAL,
    LEASE,
    MEMBER,
    MEMBER_PRESENT,
    MEMBER_UP,
    NODE_REACHABLE,
    PROTOCOL_ICMP,
    RECORD,
    vip_index,
)
from lbpod.core.limits import MEMBER_NONE, SLOT_COUNT
from lbpod.core.messages import (
    Configure,
    CreateVip,
    DatapathEffect,
    DropRecords,
    DumpRecords,
    LookRecords,
    LookSeen,
    PutCache,
    PutRecords,
    RecordsDumped,
    RecordsLooked,
    RecordsPut,
    SeenRead,
    WriteOwnership,
    WriteSlots,
)
from lbpod.core.model import Backend, Snapshot, parse_address
from lbpod.core.ownership import Member, ownership
from lbpod.datapath.apply import Applier
from lbpod.datapath.memory import MemoryDatapath, MemoryHops
from lbpod.datapath.port import U32, ArrayName, DatapathError, FlowMap
from lbpod.datapath.rows import Scene, backend_rows, changed
from tests.agents import UPLINK, VIP_ADDRESS, flows, snapshot


class Watched(MemoryDatapath):
    """Maps in memory that say what was written, and fail when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[str, int]] = []
        self.fails: ArrayName | None = None

    def write(self, name: ArrayName, indices: U32, rows: npt.NDArray[np.generic]) -> None:
        if name is self.fails:
            raise DatapathError(f"{name.value} is refused")
        self.written.append((name.value, len(indices)))
        super().write(name, indices, rows)


class Looking(MemoryDatapath):
    """Maps in memory whose slots' replicas are looked at after each write, and in the middle of it."""

    SLOTS = range(0, SLOT_COUNT, 997)

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[set[int]]] = []

    def write(self, name: ArrayName, indices: U32, rows: npt.NDArray[np.generic]) -> None:
        middle = len(indices) // 2
        for part in (slice(0, middle), slice(middle, None)):
            super().write(name, indices[part], rows[part])
            self.seen.append(self.replicas())

    def replicas(self) -> list[set[int]]:
        return [set(self.maps.replicas(slot)) for slot in self.SLOTS]


def applier(datapath: MemoryDatapath) -> Applier:
    return Applier(datapath, "n1", UPLINK, MemoryHops())


def test_configure_writes_everything_that_a_snapshot_says() -> None:
    datapath = Watched()
    applier(datapath).apply(Configure(snapshot(9), None, frozenset({10}), frozenset({0})))
    maps = datapath.maps
    assert [BACKEND_ALIVE | BACKEND_LOCAL, 0] == maps.backends["flags"][10:12].tolist()
    assert (8080, 2, 5) == (maps.backends["port_be"][11], maps.backends["node"][11], maps.backends["vip"][11])
    assert [MEMBER_PRESENT | MEMBER_UP, MEMBER_PRESENT, 0] == maps.members["flags"][:3].tolist()
    assert {parse_address("10.0.0.1"): 0, parse_address("10.0.0.2"): 1} == maps.member_by_addr
    config = maps.config[0]
    assert (0, 77, 0xDEADBEEF, 9, 3, 0) == tuple(
        int(config[field]) for field in ("self", "vni", "seed", "epoch", "ifindex", "ring_change")
    )
    assert 1600 - 64 - 40 == config["mss_max"]
    assert parse_address("10.0.0.1") == config["node_addr"].tobytes()
    assert [NODE_REACHABLE] * 2 == maps.nodes["flags"][1:3].tolist()
    assert 5 == maps.vips[vip_index(VIP_ADDRESS, 80, 6)]["id"]
    assert 1 == maps.vips[vip_index(VIP_ADDRESS, 0, PROTOCOL_ICMP)]["used"]
    assert ["nodes", "members", "backends", "config", "vips"] == [name for name, _ in datapath.written]


def test_only_what_changed_is_written_again() -> None:
    datapath = Watched()
    agent = applier(datapath)
    agent.apply(Configure(snapshot(1), None, frozenset({10, 11}), frozenset({0, 1})))
    datapath.written.clear()
    agent.apply(Configure(snapshot(1), None, frozenset({10, 11}), frozenset({0, 1})))
    assert [] == datapath.written
    agent.apply(Configure(snapshot(2), None, frozenset({10}), frozenset({0, 1})))
    assert [("backends", 1), ("config", 1)] == datapath.written
    datapath.written.clear()
    applier(datapath).apply(Configure(snapshot(2), None, frozenset({10}), frozenset({0, 1})))
    assert [] == datapath.written, "a restarted agent finds what it wants in the maps"


def test_a_belief_writes_one_row_and_a_failure_before_it_is_made_good_by_all_of_them() -> None:
    datapath = Watched()
    agent, known = applier(datapath), snapshot(1)
    agent.apply(Configure(known, None, frozenset({10, 11}), frozenset({0, 1})))
    datapath.written.clear()
    agent.apply(Configure(known, None, frozenset({10, 11}), frozenset({0})))
    assert [("members", 1)] == datapath.written
    assert [MEMBER_UP, 0] == (datapath.maps.members["flags"][:2] & MEMBER_UP).tolist()
    datapath.fails = ArrayName.BACKENDS
    died = Configure(known, None, frozenset({10}), frozenset({0}))
    with pytest.raises(DatapathError):
        agent.apply(died)
    datapath.fails = None
    agent.apply(Configure(known, None, frozenset({10}), frozenset({0, 1})))
    assert [BACKEND_ALIVE, 0] == (datapath.maps.backends["flags"][[10, 11]] & BACKEND_ALIVE).tolist()
    assert MEMBER_UP == datapath.maps.members["flags"][1] & MEMBER_UP


def test_the_mss_follows_the_uplinks_mtu_at_once_or_with_what_was_half_written() -> None:
    datapath = Watched()
    agent = applier(datapath)
    agent.follow(replace(UPLINK, mtu=1_500))
    assert [] == datapath.written, "before the first snapshot nothing of an earlier agent is touched"
    agent.apply(Configure(snapshot(1), None, frozenset({10, 11}), frozenset({0, 1})))
    assert 1_500 - 64 - 40 == datapath.maps.config["mss_max"][0]
    datapath.written.clear()
    agent.follow(replace(UPLINK, mtu=9_000))
    assert (9_000 - 64 - 40, [("config", 1)]) == (datapath.maps.config["mss_max"][0], datapath.written)
    datapath.fails = ArrayName.BACKENDS
    with pytest.raises(DatapathError):
        agent.apply(Configure(snapshot(2), None, frozenset({10}), frozenset({0, 1})))
    datapath.fails = None
    agent.follow(UPLINK)
    assert (1, 9_000 - 64 - 40) == (datapath.maps.config["epoch"][0], datapath.maps.config["mss_max"][0])
    agent.apply(Configure(snapshot(2), None, frozenset({10}), frozenset({0, 1})))
    assert (2, 1_600 - 64 - 40) == (datapath.maps.config["epoch"][0], datapath.maps.config["mss_max"][0])


@pytest.mark.parametrize("fails", list(ArrayName))
def test_what_failed_is_written_when_it_is_asked_for_again(fails: ArrayName) -> None:
    datapath, untroubled = Watched(), Watched()
    effects: list[DatapathEffect] = [
        Configure(snapshot(1), None, frozenset({10, 11}), frozenset({0, 1})),
        WriteOwnership(np.full(SLOT_COUNT, 1 << 16, np.uint32), np.zeros(SLOT_COUNT, np.uint32)),
    ]
    agent = applier(datapath)
    datapath.fails = fails
    for effect in effects:
        with suppress(DatapathError):
            agent.apply(effect)
    datapath.fails = None
    for effect in effects:
        agent.apply(effect)
        applier(untroubled).apply(effects[0])
    calm = applier(untroubled)
    for effect in effects:
        calm.apply(effect)
    for name in ArrayName:
        assert untroubled.read(name).tobytes() == datapath.read(name).tobytes()


def test_while_two_snapshots_are_in_force_both_are_served() -> None:
    datapath = Watched()
    agent = applier(datapath)
    both = Configure(snapshot(1, backends=2, ring=(0,)), snapshot(2, backends=3), frozenset({10, 11, 12}), frozenset())
    agent.apply(both)
    assert 3 == np.count_nonzero(datapath.maps.backends["flags"] & BACKEND_ALIVE)
    assert 2 == len(datapath.maps.member_by_addr)
    assert 1 == datapath.maps.config["epoch"][0], "the epoch is that of what is committed"
    agent.apply(Configure(snapshot(1, backends=0), None, frozenset(), frozenset()))
    assert not datapath.maps.backends["flags"].any()


def test_a_node_that_no_snapshot_knows_takes_no_part() -> None:
    datapath = Watched()
    Applier(datapath, "stranger", UPLINK, MemoryHops()).apply(
        Configure(snapshot(1), None, frozenset({10}), frozenset())
    )
    assert MEMBER_NONE == datapath.maps.config["self"][0]
    assert BACKEND_ALIVE == datapath.maps.backends["flags"][10]
    assert UPLINK.address == datapath.maps.config["node_addr"][0].tobytes()


def test_before_the_first_snapshot_nothing_of_an_earlier_agent_is_touched() -> None:
    datapath = Watched()
    applier(datapath).apply(Configure(snapshot(1), None, frozenset({10}), frozenset()))
    datapath.written.clear()
    agent = applier(datapath)
    agent.take_hop_events()
    agent.resolve_hops()
    agent.stop_believing()
    assert [] == datapath.written


def test_next_hops_of_an_earlier_agent_are_believed_for_a_while() -> None:
    datapath, hops = Watched(), MemoryHops()
    applier(datapath).apply(Configure(snapshot(1), None, frozenset({10}), frozenset()))
    hops.known = False
    agent = Applier(datapath, "n1", UPLINK, hops)
    agent.apply(Configure(snapshot(1), None, frozenset({10}), frozenset()))
    agent.take_hop_events()
    assert [NODE_REACHABLE] * 2 == datapath.maps.nodes["flags"][1:3].tolist()
    agent.stop_believing()
    assert [0, 0] == datapath.maps.nodes["flags"][1:3].tolist()
    hops.known = True
    agent.take_hop_events()
    assert [NODE_REACHABLE] * 2 == datapath.maps.nodes["flags"][1:3].tolist()


def owned_by(*members: int) -> U32:
    return ownership([Member(member, parse_address(f"10.0.0.{member}")) for member in members], seed=7)


A, B, C = owned_by(0, 1, 2), owned_by(1, 2, 3), owned_by(0, 3)
WAYS = {
    "all steps": [WriteOwnership(A), WriteOwnership(A, B), WriteOwnership(B, None, A), WriteOwnership(B)],
    "given up": [WriteOwnership(A), WriteOwnership(A, B), WriteOwnership(A)],
    "another next": [WriteOwnership(A, B), WriteOwnership(A, C), WriteOwnership(C, None, A)],
    "prepare missed": [WriteOwnership(A), WriteOwnership(B, None, A)],
    "switch missed": [WriteOwnership(A, B), WriteOwnership(B)],
    "done missed": [WriteOwnership(A, None, B), WriteOwnership(A, C), WriteOwnership(C, None, A)],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("restarts", [False, True])
def test_no_replica_is_missing_between_two_writes(way: str, restarts: bool) -> None:
    """Also where the agent is another one after each step."""
    datapath = Looking()
    configure = Configure(snapshot(1), None, frozenset(), frozenset())
    agent = applier(datapath)
    agent.apply(configure)
    agent.apply(WAYS[way][0])
    moved = 0
    for effect in WAYS[way][1:]:
        old = datapath.replicas()
        datapath.seen.clear()
        if restarts:
            agent = applier(datapath)
            agent.apply(configure)
        agent.apply(effect)
        assert len(datapath.seen) >= 2
        new = datapath.replicas()
        moved += old != new
        for seen in datapath.seen:
            for before, between, after in zip(old, seen, new, strict=True):
                assert before & after <= between <= before | after
    assert moved


def test_a_switch_keeps_old_and_new_replicas_all_the_time() -> None:
    datapath = Looking()
    agent = applier(datapath)
    agent.apply(Configure(snapshot(1), None, frozenset(), frozenset()))
    agent.apply(WriteOwnership(A, B))
    both = datapath.replicas()
    datapath.seen.clear()
    agent.apply(WriteOwnership(B, None, A))
    assert len(datapath.seen) >= 6
    assert all(both == seen for seen in datapath.seen)


def test_a_ring_change_outlives_the_agent_that_began_it() -> None:
    datapath = Watched()
    configure = Configure(snapshot(1), None, frozenset(), frozenset())
    agent = applier(datapath)
    agent.apply(configure)
    agent.apply(WriteOwnership(A, B))
    datapath.written.clear()
    agent = applier(datapath)
    agent.apply(configure)
    agent.apply(WriteOwnership(A, B))
    assert [] == datapath.written
    agent = applier(datapath)
    agent.apply(configure)
    agent.apply(WriteOwnership(B))
    assert 0 == datapath.maps.config["ring_change"][0]


@pytest.mark.parametrize("fails", [ArrayName.PREV, ArrayName.OWN, ArrayName.NEXT, ArrayName.CONFIG])
def test_a_step_that_failed_half_way_is_taken_when_it_is_tried_again(fails: ArrayName) -> None:
    datapath = Watched()
    agent = applier(datapath)
    agent.apply(Configure(snapshot(1), None, frozenset(), frozenset()))
    agent.apply(WriteOwnership(A))
    for effect in (WriteOwnership(A, B), WriteOwnership(B, None, A), WriteOwnership(B)):
        datapath.fails = fails
        with suppress(DatapathError):
            agent.apply(effect)
        datapath.fails = None
        agent.apply(effect)
        calm = MemoryDatapath()
        other = applier(calm)
        other.apply(Configure(snapshot(1), None, frozenset(), frozenset()))
        other.apply(effect)
        for name in (ArrayName.OWN, ArrayName.NEXT, ArrayName.PREV, ArrayName.CONFIG):
            assert calm.read(name).tobytes() == datapath.read(name).tobytes()


def test_while_a_ring_changes_nobody_of_before_or_after_is_shut_out() -> None:
    datapath = Watched()
    agent = applier(datapath)
    joins = snapshot(2, ring=(0, 1), before=(0,))
    leaves = snapshot(3, ring=(0,), before=(0, 1))

    def let_in() -> list[int]:
        present = np.flatnonzero(datapath.maps.members["flags"] & MEMBER_PRESENT).tolist()
        assert present == sorted(datapath.maps.member_by_addr.values())
        return list(present)

    for committed, prepared, ring_done, expected in (
        (snapshot(1, ring=(0,)), None, True, [0]),
        (snapshot(1, ring=(0,)), joins, True, [0, 1]),
        (joins, None, False, [0, 1]),
        (joins, leaves, True, [0, 1]),
        (None, leaves, True, [0, 1]),
        (leaves, None, False, [0, 1]),
        (leaves, None, True, [0]),
        (leaves, snapshot(4, ring=(0,)), True, [0]),
    ):
        agent.apply(Configure(committed, prepared, frozenset(), frozenset({0, 1}), ring_done))
        assert expected == let_in()


def test_a_leaving_lb_takes_part_until_the_change_is_done() -> None:
    """Its own id stays: what is relayed to it is still its to decide."""
    datapath = Watched()
    agent = applier(datapath)
    for ring_done, member in ((False, 0), (True, MEMBER_NONE)):
        leaves = snapshot(2, ring=(1,), before=(0, 1))
        agent.apply(Configure(leaves, None, frozenset(), frozenset({0, 1}), ring_done))
        assert member == datapath.maps.config["self"][0]


def test_ring_change_is_said_after_next_is_there_and_unsaid_before_it_goes() -> None:
    datapath = Watched()
    agent = applier(datapath)
    agent.apply(Configure(snapshot(1), None, frozenset(), frozenset()))
    own, other = np.zeros(SLOT_COUNT, np.uint32), np.ones(SLOT_COUNT, np.uint32)
    agent.apply(WriteOwnership(own))
    assert (datapath.maps.next == 0xFFFF_FFFF).all()
    datapath.written.clear()
    agent.apply(WriteOwnership(own, other))
    assert [("next", SLOT_COUNT), ("config", 1)] == datapath.written
    assert 1 == datapath.maps.config["ring_change"][0]
    datapath.written.clear()
    agent.apply(WriteOwnership(other))
    assert ["own", "config", "next"] == [name for name, _ in datapath.written]
    assert 0 == datapath.maps.config["ring_change"][0]


def test_records_that_find_no_room_are_kept_among_the_embryonic_ones() -> None:
    datapath = Watched()
    datapath.maps.records.count_max = 2
    agent = applier(datapath)
    records = np.zeros(5, RECORD)
    records["backend"] = 10
    put = agent.apply(PutRecords(7, flows(5), records, full_count=4))
    assert put == RecordsPut(7, 3), "two of those that are full, and the one that is not"
    assert (2, 3) == (len(datapath.maps.records), len(datapath.maps.embryonic))
    assert put == agent.apply(PutRecords(7, flows(5), records, full_count=4)), "a page may come twice"
    assert (2, 3) == (len(datapath.maps.records), len(datapath.maps.embryonic))


def test_records_that_even_that_map_does_not_take_are_a_failure() -> None:
    datapath = Watched()
    datapath.maps.embryonic.count_max, datapath.maps.embryonic.evicts = 1, False
    with pytest.raises(DatapathError):
        applier(datapath).apply(PutRecords(7, flows(2), np.ones(2, RECORD), full_count=0))


def test_questions_are_answered_with_their_token() -> None:
    datapath = Watched()
    agent = applier(datapath)
    agent.apply(CreateVip(5))
    agent.apply(WriteSlots(5, np.array([7], np.uint32), np.array([42], np.uint64)))
    assert 42 == datapath.read_slots(5)[7]
    datapath.maps.other_seen[5][7] = 99
    datapath.maps.vip_stats["unrecorded_ns"][5] = 55
    seen = agent.apply(LookSeen(3, 5))
    assert isinstance(seen, SeenRead)
    assert (3, 99, 55) == (seen.token, seen.other_seen[7], seen.unrecorded_ns)
    records = np.zeros(2, RECORD)
    records["backend"] = 10
    datapath.flows_put(FlowMap.RECORDS, flows(3)[:2], records)
    datapath.flows_put(FlowMap.EMBRYONIC, flows(3)[2:], records[:1])
    looked = agent.apply(LookRecords(4, flows(4)))
    assert isinstance(looked, RecordsLooked)
    assert ([10, 10, 10, 0], None) == (looked.records["backend"].tolist(), looked.other_seen)
    of_two = flows(3)
    of_two["vip"] = (5, 6, 5)  # 6 has no slots here: an LB that has left the ring may be asked about any
    stamped = agent.apply(LookRecords(4, of_two, np.array([7, 7, 8], np.uint32)))
    assert isinstance(stamped, RecordsLooked)
    assert stamped.other_seen is not None
    assert [99, 0, 0] == stamped.other_seen.tolist()
    dumped = agent.apply(DumpRecords(5))
    assert isinstance(dumped, RecordsDumped)
    assert 3 == len(dumped.flows) == len(dumped.records)
    assert sorted(flow.tobytes() for flow in flows(3)) == sorted(flow.tobytes() for flow in dumped.flows)
    agent.apply(DropRecords(flows(4), looked.records))
    assert 0 == len(datapath.maps.records) + len(datapath.maps.embryonic)
    agent.apply(PutCache(flows(2), np.zeros(2, LEASE)))
    assert 2 == len(datapath.maps.cache)


def test_a_list_of_records_comes_in_slices_and_misses_none_that_becomes_a_full_one_meanwhile() -> None:
    datapath = MemoryDatapath(slice_max=2)
    agent, rows = applier(datapath), np.zeros(9, RECORD)
    rows["backend"] = np.arange(9) + 1
    datapath.flows_put(FlowMap.EMBRYONIC, flows(9)[:5], rows[:5])
    datapath.flows_put(FlowMap.RECORDS, flows(9)[5:], rows[5:])
    seen: list[tuple[int, bool]] = []
    cursor: tuple[bool, int] | None = None
    for token in range(20):
        listed = agent.apply(DumpRecords(token, cursor))
        assert isinstance(listed, RecordsDumped)
        assert token == listed.token
        assert 1 <= len(listed.flows) == len(listed.records) <= 4
        assert {flow.tobytes() for flow in listed.flows} <= {flow.tobytes() for flow in flows(9)}
        seen += [(int(one), at < listed.full_count) for at, one in enumerate(listed.records["backend"])]
        cursor = listed.cursor
        if cursor is None:
            break
        if token == 0:  # one that has been listed, and one that has not
            for at in (0, 4):
                datapath.flows_put(FlowMap.RECORDS, flows(9)[at : at + 1], rows[at : at + 1])
                datapath.flows_delete(FlowMap.EMBRYONIC, flows(9)[at : at + 1])
    assert cursor is None
    assert set(range(1, 10)) == {backend for backend, _ in seen}
    assert {1, 5, 6, 7, 8, 9} == {backend for backend, full in seen if full}


def _random_snapshot(dice: Random, generation: int, before: Snapshot) -> Snapshot:
    """Some VIPs as they were, others with other backends, one gone or new; now and then this node has another id."""
    vips = {vip.id: vip for vip in before.vips}
    for number in dice.sample(range(1, 6), 2):
        ids = sorted(dice.sample(range(100 * number, 100 * number + 8), dice.randrange(6)))
        backends = tuple(
            Backend(one, parse_address(f"10.1.{number}.{one % 100}"), 8080, dice.choice((1, 2))) for one in ids
        )
        vips[number] = msgspec.structs.replace(before.vips[0], id=number, port=number, backends=backends)
    vips.pop(dice.choice(sorted(vips)))
    nodes = before.nodes if dice.random() < 0.9 else tuple(reversed(before.nodes))
    nodes = tuple(msgspec.structs.replace(node, id=number) for number, node in enumerate(nodes, start=1))
    wanted = msgspec.structs.replace(before, generation=generation, nodes=nodes, vips=tuple(vips.values()))
    return wanted if wanted.vips else before


@pytest.mark.parametrize("seed", range(6))
def test_rows_of_backends_written_change_by_change_are_those_that_the_whole_scene_has(seed: int) -> None:
    dice, datapath = Random(seed), Watched()
    agent, committed, prepared = applier(datapath), snapshot(1), None
    for generation in range(2, 25):
        if prepared is None or dice.random() < 0.2:
            prepared = _random_snapshot(dice, generation, committed)
        else:
            committed, prepared = prepared, None
        listed = {
            one.id for known in (committed, prepared) if known is not None for vip in known.vips for one in vip.backends
        }
        alive = frozenset(number for number in sorted(listed) if dice.random() < 0.95)
        effect = Configure(committed, prepared, alive, frozenset({0, 1}))
        datapath.fails = dice.choice((None, None, None, ArrayName.BACKENDS, ArrayName.CONFIG))
        with suppress(DatapathError):
            agent.apply(effect)
        datapath.fails = None
        agent.apply(effect)
        wanted = backend_rows(Scene.of(effect, "n1"))
        assert [] == changed(wanted, datapath.maps.backends).tolist(), f"generation {generation}"


def test_what_differs_is_found_in_every_width_of_row() -> None:
    for dtype in (BACKEND, MEMBER, np.dtype(np.uint32)):
        old = np.zeros(50, dtype)
        new = old.copy()
        bytes_of_each = new.view(np.uint8).reshape(50, -1)
        for place in (0, 7, 7, 8, 49):
            bytes_of_each[place, place % dtype.itemsize] += 1
        bytes_of_each[20] = 1  # all of it
        assert [0, 7, 8, 20, 49] == changed(old, new).tolist(), dtype
        assert [] == changed(new, new).tolist()
