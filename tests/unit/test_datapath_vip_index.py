"""The VIP index: after every single step of any change, whoever stays is found, as the fast path looks.

Keys are picked so that they collide (a few buckets only), for without collisions there is nothing to get wrong.
"""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings, strategies as st

from lbpod.core.layout import PROTOCOL_ICMP, PROTOCOL_TCP, VIP, vip_index
from lbpod.core.limits import VIP_CHAIN_MAX, VIP_INDEX_COUNT, VIPS_MAX
from lbpod.core.model import Affinity, Protocol, Vip, parse_address
from lbpod.core.snapshot import check_index
from lbpod.datapath.port import DatapathError
from lbpod.datapath.vip_index import Entry, Key, VipIndex, entries_of

BUCKETS = 4
KEYS_PER_BUCKET = VIP_CHAIN_MAX


def colliding_keys() -> list[Key]:
    """KEYS_PER_BUCKET keys for each of the first BUCKETS buckets."""
    found: dict[int, list[Key]] = {bucket: [] for bucket in range(BUCKETS)}
    for number in itertools.count():
        key = (parse_address(f"203.0.{number >> 14 & 255}.{number >> 6 & 255}"), 80 + (number & 63), PROTOCOL_TCP)
        bucket = vip_index(*key)
        if bucket in found and len(found[bucket]) < KEYS_PER_BUCKET:
            found[bucket].append(key)
            if all(len(keys) == KEYS_PER_BUCKET for keys in found.values()):
                return [key for keys in found.values() for key in keys]
    raise AssertionError("unreachable")


KEYS = colliding_keys()
Rows = npt.NDArray[Any]


def find(rows: Rows, key: Key) -> Entry | None:
    """As hf_vip_find does it."""
    place = vip_index(*key)
    for _ in range(VIP_CHAIN_MAX):
        row = rows[place]
        if (row["addr"].tobytes(), int(row["port_be"]), int(row["protocol"])) == key and row["used"]:
            return Entry(key, int(row["id"]), int(row["flags"]))
        place = int(row["next"])
        if place == 0:
            return None
    return None


def entries(numbers: dict[int, int]) -> tuple[Entry, ...]:
    """Keys by number, with their ids."""
    return tuple(Entry(KEYS[number], numbers[number], numbers[number] & 1) for number in sorted(numbers))


SETS = st.dictionaries(st.integers(0, len(KEYS) - 1), st.integers(1, 9))


@settings(deadline=None, max_examples=60)
@given(st.lists(SETS, min_size=1, max_size=8), st.sets(st.integers(0, 7)))
def test_who_stays_is_found_after_every_step(sets: list[dict[int, int]], restarts: set[int]) -> None:
    rows = np.zeros(VIP_INDEX_COUNT, VIP)
    index = VipIndex(rows)
    before: dict[int, int] = {}
    for number, wanted in enumerate(sets):
        if number in restarts:
            index = VipIndex(rows)
        for places, written in index.change(entries(wanted)):
            assert len(set(places.tolist())) == len(places)
            rows[places] = written
            for stays in sorted(before.keys() & wanted.keys()):
                found = find(rows, KEYS[stays])
                assert found is not None
                assert found.id in (before[stays], wanted[stays])
        assert {KEYS[each]: wanted[each] for each in wanted} == {
            key: found.id for key in KEYS if (found := find(rows, key)) is not None
        }
        assert len(wanted) == index.used_count
        before = wanted


def test_places_that_left_rest_for_one_change() -> None:
    rows = np.zeros(VIP_INDEX_COUNT, VIP)
    index = VipIndex(rows)
    for places, written in index.change(entries({0: 1, 1: 2, 2: 3})):
        rows[places] = written
    upper = np.flatnonzero(rows["used"][VIPS_MAX:]) + VIPS_MAX
    assert 2 == len(upper)
    for places, written in index.change(entries({0: 1})):
        rows[places] = written
    assert rows["used"][upper].all(), "a reader inside the chain must find its way out"
    for places, written in index.change(entries({0: 1, 8: 4})):
        rows[places] = written
    assert not rows["used"][upper].any()


def test_a_chain_that_is_too_long_is_refused() -> None:
    index = VipIndex(np.zeros(VIP_INDEX_COUNT, VIP))
    bucket = vip_index(*KEYS[0])
    more = next(
        (parse_address("198.51.100.1"), port, protocol)
        for protocol in range(20, 250)
        for port in range(1, 65_536)
        if vip_index(parse_address("198.51.100.1"), port, protocol) == bucket
    )
    full = entries(dict.fromkeys(range(VIP_CHAIN_MAX), 1))
    with pytest.raises(DatapathError, match="VIP index"):
        index.change((*full, Entry(more, 9, 0)))


def test_each_address_has_an_entry_for_icmp() -> None:
    address = parse_address("203.0.113.10")
    vips = [
        Vip(number, "a/b/c", address, port, Protocol.TCP, Affinity.CLIENT_IP, 1, 1, 1, 1, b"")
        for number, port in ((1, 80), (2, 443))
    ]
    assert [
        Entry((address, 0, PROTOCOL_ICMP), 0, 0),
        Entry((address, 80, 6), 1, 1),
        Entry((address, 443, 6), 2, 1),
    ] == list(entries_of(vips))


def full_set(network: int, place_load_max: int) -> list[Vip]:
    """VIPS_MAX - 1 VIPs on as many addresses, at most so many entries on each place."""
    found: list[Vip] = []
    load = np.zeros(VIPS_MAX, np.int64)
    for number in itertools.count():
        address = parse_address(f"{network}.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}")
        places = [vip_index(address, 443, PROTOCOL_TCP), vip_index(address, 0, PROTOCOL_ICMP)]
        if all(load[place] + places.count(place) <= place_load_max for place in places):
            np.add.at(load, places, 1)
            vip_id = len(found) + 1
            found.append(Vip(vip_id, "a/b/c", address, 443, Protocol.TCP, Affinity.NONE, 1, 1, 1, 1, b""))
            if len(found) == VIPS_MAX - 1:
                return found
    raise AssertionError("unreachable")


def test_as_many_vips_as_there_may_be_are_found_each_on_its_own_address_and_while_others_replace_them() -> None:
    """Committed and prepared stand in the index together; a third set replaces the prepared one before its commit."""
    committed, prepared, other = (full_set(network, VIP_CHAIN_MAX // 2) for network in (10, 11, 12))
    check_index([*committed, *prepared])
    check_index([*committed, *other])
    rows = np.zeros(VIP_INDEX_COUNT, VIP)
    index = VipIndex(rows)
    for together in (committed, [*committed, *prepared], [*committed, *other], other, committed, [*committed, *other]):
        for places, written in index.change(entries_of(together)):
            rows[places] = written
        assert 2 * len(together) == index.used_count
        for vip in together[:: len(together) // 50]:
            for port, protocol, number in ((443, PROTOCOL_TCP, vip.id), (0, PROTOCOL_ICMP, 0)):
                assert find(rows, (vip.address, port, protocol)) == Entry((vip.address, port, protocol), number, 0)
    assert 2 * (VIPS_MAX - 1) < int(np.count_nonzero(rows["used"]))
