"""Translated flows go when they are over and not before; a map that has been full says so, and not for ever."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, strategies as st

from lbpod.core import sweep
from lbpod.core.flows import Facts
from lbpod.core.host_state import NatCount
from lbpod.core.keeper import Keeper
from lbpod.core.layout import (
    NAT,
    NAT_ANSWERED,
    NAT_ASSURED,
    NAT_FIN_IN,
    NAT_FIN_OUT,
    NAT_KEY,
    NAT_RST,
    NAT_SYN,
)
from lbpod.core.limits import (
    DUMP_CHUNK,
    MARGIN_NS,
    NAT_CLOSED_NS,
    NAT_DUMP_AGE_NS,
    NAT_HALF_OPEN_NS,
    NAT_SILENT_MARGIN_NS,
    NAT_SWEEP_NS,
    NAT_UNKNOWN_IDLE_NS,
    TICK_NS,
)
from lbpod.core.maps import FlowTable, Nat, nat_key
from lbpod.core.messages import (
    Called,
    DropNat,
    EffectsFailed,
    KeeperEffect,
    LookNat,
    NatLooked,
    QuietAnswer,
    QuietCall,
    Reply,
    StampNatFull,
    Tick,
)
from lbpod.core.model import Affinity, Protocol, Vip, parse_address
from tests.keepers import SECOND_NS, VIP_ADDRESS, Cluster, Node, pod_address, vip

FINS = NAT_FIN_IN | NAT_FIN_OUT
IDLE_NS = 8 * SECOND_NS
ADDRESSES = [parse_address(text) for text in ("203.0.113.10", "203.0.113.11", "2001:db8::1")]
PORTS = [80, 443]
Rows = npt.NDArray[Any]


def translated(number: int) -> bytes:
    """The key of a flow from client number to pod 1."""
    client = parse_address(f"198.51.{number >> 8}.{number & 255}")
    return nat_key(client, pod_address(1), 40_000, 8080, 6)


def host_of_a_vip() -> tuple[Cluster, Node]:
    cluster = Cluster(lbs=2)
    cluster.change(vip([1, 2], idle_s=IDLE_NS // SECOND_NS))
    return cluster, cluster["host1"]


def ask(cluster: Cluster, host: Node) -> QuietAnswer:
    """Which of all slots are quiet, as far as pod 1 goes?"""
    assert cluster.snapshot is not None
    backend = next(one for one in cluster.snapshot.vips[0].backends if one.address == pod_address(1))
    slots = np.arange(16, dtype="<u2").tobytes()
    answer = host.call(QuietCall(1, slots, np.array([backend.id], "<u4").tobytes()), cluster.now_ns)
    assert isinstance(answer, Reply)
    assert isinstance(answer.body, QuietAnswer)
    return answer.body


# --- Who goes ---------------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_who_is_over_by_the_plain_rule(data: st.DataObject) -> None:
    kinds = st.sampled_from([(a, p, t) for a in ADDRESSES for p in PORTS for t in (Protocol.TCP, Protocol.UDP)])
    known = data.draw(st.dictionaries(kinds, st.integers(4, 7_200), max_size=6))
    affine = {kind: data.draw(st.sampled_from(Affinity)) for kind in sorted(known)}
    facts = Facts(
        Vip(number, "a/b/c", *kind, affine[kind], idle_s * SECOND_NS, 1, 1, 1, b"")
        for number, (kind, idle_s) in enumerate(sorted(known.items()), start=1)
    )
    now_ns = 20_000 * SECOND_NS
    around = st.sampled_from(
        [0, NAT_CLOSED_NS, NAT_SILENT_MARGIN_NS, NAT_HALF_OPEN_NS, NAT_UNKNOWN_IDLE_NS + NAT_SILENT_MARGIN_NS]
    )
    rows = data.draw(
        st.lists(st.tuples(kinds, st.integers(0, 63), around, st.integers(-2, 7_300 * SECOND_NS)), max_size=20)
    )
    keys, values = np.zeros(len(rows), NAT_KEY), np.zeros(len(rows), NAT)
    expected = []
    for at, ((address, port, protocol), flags, silence_ns, more_ns) in enumerate(rows):
        silent_ns = max(silence_ns + more_ns, 0)
        keys[at]["protocol"], values[at]["vip_port_be"], values[at]["flags"] = int(protocol), port, flags
        values[at]["vip"] = np.frombuffer(address, np.uint8)
        values[at]["seen_ns"] = now_ns - silent_ns
        longest_s = max([*known.values(), NAT_UNKNOWN_IDLE_NS // SECOND_NS])
        idle_ns = known.get((address, port, protocol), longest_s) * SECOND_NS
        is_closed = bool(flags & NAT_RST) or flags & FINS == FINS
        is_its_own = affine.get((address, port, protocol)) is not Affinity.CLIENT_IP
        expected.append(
            bool(flags & NAT_ASSURED)
            or silent_ns > idle_ns + NAT_SILENT_MARGIN_NS
            or (is_closed and is_its_own and silent_ns > NAT_CLOSED_NS)
            or (bool(flags & NAT_SYN) and is_its_own and silent_ns > NAT_HALF_OPEN_NS)
        )
    assert expected == sweep.are_over(facts, keys, values, now_ns).tolist()


def test_what_is_over_goes_and_the_rest_stays() -> None:
    cluster, host = host_of_a_vip()
    start_ns = cluster.now_ns
    put = host.datapath.maps.nat.put
    put(translated(1), Nat(VIP_ADDRESS, 80, FINS, start_ns))
    put(translated(2), Nat(VIP_ADDRESS, 80, NAT_FIN_IN, start_ns))
    put(translated(3), Nat(VIP_ADDRESS, 80, 0, start_ns + 60 * SECOND_NS))
    put(translated(4), Nat(VIP_ADDRESS, 81, 0, start_ns))
    cluster.run(NAT_CLOSED_NS - SECOND_NS)
    assert 4 == len(host.datapath.maps.nat)
    cluster.run(NAT_SWEEP_NS + 2 * SECOND_NS)
    assert {translated(3), translated(4)} == set(host.datapath.maps.nat.rows), "one was closed, one silent for too long"
    cluster.run(60 * SECOND_NS)
    assert {translated(4)} == set(host.datapath.maps.nat.rows), "an unknown VIP may have an idle timeout of an hour"
    assert 3 == host.applier.swept_flows


def test_what_is_not_assured_goes_out_of_its_own_map() -> None:
    """What has been assured meanwhile at once, a handshake that came to nothing after two minutes."""
    cluster, host = host_of_a_vip()
    start_ns, long_ns = cluster.now_ns, 3_600 * SECOND_NS
    cluster.change(vip([1, 2], idle_s=3_600))
    both = host.datapath.maps.nat, host.datapath.maps.unassured
    for table in both:
        table.put(translated(1), Nat(VIP_ADDRESS, 80, NAT_ASSURED if table is both[1] else 0, start_ns))
    for number, flags in ((2, NAT_SYN), (3, NAT_SYN | NAT_ANSWERED), (4, 0), (5, NAT_RST)):
        both[1].put(translated(number), Nat(VIP_ADDRESS, 80, flags, start_ns))
    cluster.run(NAT_SWEEP_NS + 2 * SECOND_NS)
    assert [{1}, {2, 3, 4, 5}] == [numbers_in(table) for table in both]
    cluster.run(NAT_CLOSED_NS)
    assert {2, 3, 4} == numbers_in(both[1]), "closed for a minute"
    cluster.run(NAT_HALF_OPEN_NS + NAT_SWEEP_NS - NAT_CLOSED_NS)
    assert [{1}, {4}] == [numbers_in(table) for table in both], "not so what did not begin with a SYN"
    assert cluster.now_ns < start_ns + long_ns


def numbers_in(table: FlowTable[Nat]) -> set[int]:
    """Which of the first flows a map has."""
    return {number for number in range(10) if translated(number) in table.rows}


def test_what_is_seen_between_choosing_and_deleting_stays() -> None:
    cluster, host = host_of_a_vip()
    for number in (1, 2):
        host.datapath.maps.nat.put(translated(number), Nat(VIP_ADDRESS, 80, NAT_RST, cluster.now_ns))
    refreshed = Nat(VIP_ADDRESS, 80, 0, cluster.now_ns + 90 * SECOND_NS)

    def packet_comes(effect: KeeperEffect) -> bool:
        if isinstance(effect, DropNat):
            host.datapath.maps.nat.put(translated(2), refreshed)
        return False

    host.fails = packet_comes
    cluster.run(NAT_CLOSED_NS + NAT_SWEEP_NS + SECOND_NS)
    assert {translated(2): refreshed} == host.datapath.maps.nat.rows


def test_a_large_map_is_looked_through_a_slice_each_tick() -> None:
    keeper = Keeper("n1")
    keeper.step(Tick(), 1)
    now_ns, slices = NAT_SWEEP_NS + 1, 3
    for number in range(slices):
        (look,) = keeper.step(Tick(), now_ns)
        assert isinstance(look, LookNat)
        assert [None, (True, 11), (True, 12)][number] == look.cursor
        assert [] == keeper.step(Tick(), now_ns), "one slice at a time"
        rows = np.zeros(DUMP_CHUNK, NAT)
        rows["flags"][0] = NAT_RST
        rows["seen_ns"] = [0, *[now_ns] * (DUMP_CHUNK - 1)]
        cursor = None if number == slices - 1 else (True, 11 + number)
        keeper_effects = keeper.step(
            NatLooked(look.token, np.zeros(DUMP_CHUNK, NAT_KEY), rows, True, cursor, 10**6, 0), now_ns + 10**11
        )
        assert [(DropNat, 1)] == [(type(one), len(one.keys)) for one in keeper_effects if isinstance(one, DropNat)]
        now_ns += TICK_NS
    assert [] == keeper.step(Tick(), now_ns), "that was all"


def test_the_fuller_the_map_the_sooner_the_next_sweep() -> None:
    pauses = [sweep._pause_ns(NatCount(count, dropped, 1_000)) for count, dropped in SWEEPS]
    assert [30, 30, 15, 5, 5, 30] == [pause // SECOND_NS for pause in pauses]


SWEEPS = [(0, 0), (10, 10), (501, 1), (1_001, 1), (900, 1), (999, 0)]
"""Entries, and how many of them were over."""


def test_a_failed_slice_ends_the_sweep_and_the_next_one_comes() -> None:
    keeper = Keeper("n1")
    keeper.step(Tick(), 1)
    now_ns = NAT_SWEEP_NS + 1
    (look,) = keeper.step(Tick(), now_ns)
    keeper.step(EffectsFailed(look, (), "the map says no"), now_ns)
    assert [] == keeper.step(Tick(), now_ns)
    (again,) = keeper.step(Tick(), now_ns + NAT_SWEEP_NS)
    assert isinstance(again, LookNat)


# --- Who is asked -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nat", "unassured"])
def test_a_map_that_was_full_can_tell_again_once_every_live_flow_has_been_seen(name: str) -> None:
    cluster, host = host_of_a_vip()
    table = FlowTable[Nat](1_000, evicts=True)
    setattr(host.datapath.maps, name, table)
    for number in range(900):
        table.put(translated(number), Nat(VIP_ADDRESS, 80, NAT_RST, cluster.now_ns))
    assert not ask(cluster, host).can_tell
    cluster.run(NAT_CLOSED_NS + NAT_SWEEP_NS + SECOND_NS)
    assert 0 == len(table)
    cluster.run(NAT_SWEEP_NS + IDLE_NS + MARGIN_NS)
    assert ask(cluster, host).can_tell


def test_room_that_a_sweep_has_made_does_not_hide_that_the_map_was_full() -> None:
    """800 entries are seen, then 200 come (some of all may be evicted), then 700 of those seen are deleted."""
    cluster, host = host_of_a_vip()
    nat = host.datapath.maps.nat = FlowTable(1_000, evicts=True)
    for number in range(800):
        flags = NAT_RST if number < 700 else 0
        nat.put(translated(number), Nat(VIP_ADDRESS, 80, flags, cluster.now_ns))
    assert ask(cluster, host).can_tell
    late_ns = cluster.now_ns + NAT_CLOSED_NS + NAT_SWEEP_NS + SECOND_NS

    def flood(effect: KeeperEffect) -> bool:
        if isinstance(effect, DropNat):
            for number in range(1_000, 1_200):
                nat.put(translated(number), Nat(VIP_ADDRESS, 80, 0, late_ns))
        return False

    host.fails = flood
    cluster.run(late_ns - cluster.now_ns)
    assert len(nat) < 875
    assert not ask(cluster, host).can_tell


def test_two_maps_that_have_room_are_not_one_that_is_full() -> None:
    cluster, host = host_of_a_vip()
    maps = host.datapath.maps
    for table in (FlowTable[Nat](1_000, evicts=True), FlowTable[Nat](1_000, evicts=True)):
        maps.nat, maps.unassured = table, maps.nat
        for number in range(800):
            table.put(translated(number), Nat(VIP_ADDRESS, 80, 0, cluster.now_ns))
    assert ask(cluster, host).can_tell


def test_the_next_agent_knows_that_the_map_was_full() -> None:
    cluster, host = host_of_a_vip()
    nat = host.datapath.maps.nat = FlowTable(100, evicts=True)
    for number in range(100):
        nat.put(translated(number), Nat(VIP_ADDRESS, 80, 0, cluster.now_ns))
    assert not ask(cluster, host).can_tell
    nat.rows.clear()
    host.restart(cluster.now_ns)
    cluster.run(IDLE_NS - SECOND_NS)
    assert not ask(cluster, host).can_tell
    cluster.run(SECOND_NS + MARGIN_NS + TICK_NS)
    assert ask(cluster, host).can_tell


def test_a_stamp_that_could_not_be_written_is_written_with_the_next_count() -> None:
    cluster, host = host_of_a_vip()
    nat = host.datapath.maps.nat = FlowTable(100, evicts=True)
    for number in range(100):
        nat.put(translated(number), Nat(VIP_ADDRESS, 80, 0, cluster.now_ns))
    host.fails = lambda effect: isinstance(effect, StampNatFull)
    full_ns = cluster.now_ns
    ask(cluster, host)
    assert 0 == host.datapath.maps.vip_stats["unrecorded_ns"][0]
    host.fails = lambda effect: False
    nat.rows.clear()
    cluster.run(SECOND_NS)
    ask(cluster, host)
    assert full_ns == host.datapath.maps.vip_stats["unrecorded_ns"][0]


def nothing(look: LookNat, assured: bool, cursor: tuple[bool, int | None] | None) -> NatLooked:
    """The answer of an empty map with room for a hundred."""
    return NatLooked(look.token, np.zeros(0, NAT_KEY), np.zeros(0, NAT), assured, cursor, 100, 0)


def test_who_asks_while_a_list_is_being_made_may_have_to_wait_for_the_next() -> None:
    cluster, host = host_of_a_vip()
    keeper, now_ns = host.keeper, cluster.now_ns
    call = QuietCall(1, np.arange(4, dtype="<u2").tobytes(), b"")

    def looked(effects: list[KeeperEffect], cursor: tuple[bool, int | None] | None, at_ns: int) -> list[KeeperEffect]:
        (look,) = (one for one in effects if isinstance(one, LookNat))
        return keeper.step(nothing(look, look.cursor is not None, cursor), at_ns)

    first = keeper.step(Called(1, call), now_ns)
    assert [] == keeper.step(Called(2, call), now_ns + NAT_DUMP_AGE_NS), "in time"
    second = looked(first, (True, None), now_ns + NAT_DUMP_AGE_NS)
    assert [] == keeper.step(Called(3, call), now_ns + NAT_DUMP_AGE_NS + 1), "too late"
    third = looked(second, None, now_ns + NAT_DUMP_AGE_NS + 2)
    assert [1, 2] == [one.request for one in third if isinstance(one, Reply)]
    fourth = looked(third, (True, None), now_ns + NAT_DUMP_AGE_NS + 3)
    last = looked(fourth, None, now_ns + NAT_DUMP_AGE_NS + 3)
    assert [3] == [one.request for one in last if isinstance(one, Reply)]


def test_a_list_is_of_no_use_where_the_vips_have_changed_meanwhile() -> None:
    cluster, host = host_of_a_vip()
    call = QuietCall(1, np.arange(4, dtype="<u2").tobytes(), b"")
    (look,) = host.keeper.step(Called(1, call), cluster.now_ns)
    assert isinstance(look, LookNat)
    cluster.change(vip([1, 2, 3], idle_s=IDLE_NS // SECOND_NS))
    (look,) = host.keeper.step(nothing(look, False, (True, None)), cluster.now_ns)
    assert isinstance(look, LookNat)
    assert (True, None) == look.cursor, "the other map"
    (again,) = host.keeper.step(nothing(look, True, None), cluster.now_ns)
    assert isinstance(again, LookNat)
    assert again.cursor is None
