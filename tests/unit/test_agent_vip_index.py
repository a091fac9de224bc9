"""The VIP index: after every single step of any change, whoever stays is found, as the fast path looks.

Keys are picked so that they collide (a few buckets only), for without collisions there is nothing to get wrong.
"""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbpod.agent.vip_index import Entry, Key, VipIndex, entries_of
from lbpod.core.layout import PROTOCOL_ICMP, PROTOCOL_TCP, VIP, vip_index
from lbpod.core.limits import VIP_CHAIN_MAX, VIP_INDEX_COUNT, VIPS_MAX
from lbpod.core.model import Affinity, Protocol, Vip, parse_address
from lbpod.datapath.port import DatapathError

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
