"""The hash of a flow has to be the one that the C program computes: same bytes, same seed, same slot.

The vectors are shared with the tests of the C program, so that neither side can drift alone. The costs of pairs are
Python's only; here they are compared with the formula in scalar Python, and looked at for the two properties that the
table relies on: no ties within an identity, and no sign of one identity in another.
"""

import json
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import mmh3
import numpy as np
import pytest
from hypothesis import given, strategies as st

from lbpod.core import hashing
from lbpod.core.limits import SLOT_COUNT
from lbpod.core.model import parse_address

VECTORS: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "murmur3.json").read_text()
)
VIP_V4 = parse_address("203.0.113.10")
VIP_V6 = parse_address("2001:db8:ffff::10")
MASK = 0xFFFFFFFF

u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, MASK)
v4 = st.ip_addresses(v=4).map(lambda address: parse_address(str(address)))
any_address = st.one_of(v4, st.binary(min_size=16, max_size=16))


def fmix32(h: int) -> int:
    """murmur3's finaliser, as it is written in the reference."""
    h = (h ^ h >> 16) * 0x85EBCA6B & MASK
    h = (h ^ h >> 13) * 0xC2B2AE35 & MASK
    return h ^ h >> 16


@pytest.mark.parametrize("vector", VECTORS["murmur3"], ids=lambda v: f"{len(v['bytes']) // 2}-{v['seed']}")
def test_murmur3_agrees_with_the_vectors(vector: dict[str, Any]) -> None:
    message = bytes.fromhex(vector["bytes"])
    words = np.frombuffer(message, dtype="<u4").astype(np.uint32).reshape(1, -1)
    assert vector["hash"] == mmh3.hash(message, vector["seed"], signed=False)
    assert [vector["hash"]] == hashing.murmur3_words(words, vector["seed"]).tolist()


@pytest.mark.parametrize("flow", VECTORS["flows"], ids=lambda v: f"{v['src']}-{v['sport']}-{v['proto']}")
def test_flows_agree_with_the_vectors(flow: dict[str, Any]) -> None:
    src, dst = parse_address(flow["src"]), parse_address(flow["dst"])
    sport = 0 if flow["client_ip"] else flow["sport"]
    assert flow["bytes"] == hashing.flow_tuple(src, dst, sport, flow["dport"], flow["proto"]).hex()
    h = hashing.flow_hash(src, dst, sport, flow["dport"], flow["proto"], flow["seed"])
    assert (flow["hash"], flow["slot"]) == (h, hashing.slot_of(h))
    many = hashing.flow_hashes(
        np.frombuffer(src, dtype=np.uint8).reshape(1, 16),
        np.array([flow["sport"]], dtype=np.uint16),
        dst,
        flow["dport"],
        flow["proto"],
        flow["client_ip"],
        flow["seed"],
    )
    assert [flow["hash"]] == many.tolist()


def test_the_vectors_tell_the_cases_apart() -> None:
    lengths = {len(bytes.fromhex(flow["bytes"])) for flow in VECTORS["flows"]}
    assert {16, 40} == lengths
    assert {True, False} == {flow["client_ip"] for flow in VECTORS["flows"]}
    assert {4, 6} == {ip_address(flow["src"]).version for flow in VECTORS["flows"]}


@given(
    flows=st.lists(st.tuples(any_address, u16), min_size=0, max_size=40),
    vip=st.sampled_from((VIP_V4, VIP_V6)),
    port=u16,
    proto=st.sampled_from((6, 17)),
    affinity=st.booleans(),
    seed=u32,
)
def test_many_at_once_is_each_one(
    flows: list[tuple[bytes, int]], vip: bytes, port: int, proto: int, affinity: bool, seed: int
) -> None:
    """IPv4 and IPv6 clients mixed, contiguous or not."""
    packed = np.frombuffer(b"".join(address for address, _ in flows), dtype=np.uint8).reshape(-1, 16)
    spread = np.zeros((len(flows), 20), dtype=np.uint8)
    spread[:, :16] = packed
    sports = np.array([sport for _, sport in flows], dtype=np.uint16)
    expected = [
        hashing.flow_hash(address, vip, 0 if affinity else sport, port, proto, seed) for address, sport in flows
    ]
    assert expected == hashing.flow_hashes(packed, sports, vip, port, proto, affinity, seed).tolist()
    assert expected == hashing.flow_hashes(spread[:, :16], sports, vip, port, proto, affinity, seed).tolist()


@given(st.binary(min_size=0, max_size=64).filter(lambda b: len(b) % 4 == 0), u32)
def test_words_hash_as_their_bytes(message: bytes, seed: int) -> None:
    words = np.frombuffer(message, dtype="<u4").astype(np.uint32).reshape(1, -1)
    assert [mmh3.hash(message, seed, signed=False)] == hashing.murmur3_words(words, seed).tolist()


def test_a_slot_is_the_top_sixteen_bits() -> None:
    assert [0, 0, 1, SLOT_COUNT - 1] == [hashing.slot_of(h) for h in (0, 0xFFFF, 0x10000, MASK)]


def test_costs_are_what_the_formula_says() -> None:
    first, second = hashing.identity_words(b"someone", 7, b"tests")
    slots = np.array([0, 1, 2, 40_000, SLOT_COUNT - 1])
    words = [fmix32((int(slot) + 1) * 0x9E3779B1 & MASK) for slot in slots]
    expected = [fmix32((word ^ first) * second & MASK) for word in words]
    identities = np.array([[first, second]], dtype=np.uint32)
    assert words == hashing.SLOT_WORDS[slots].tolist()
    assert expected == hashing.pair_costs(hashing.SLOT_WORDS[slots], identities)[:, 0].tolist()


@given(st.binary(min_size=1, max_size=18), u32)
def test_no_two_slots_cost_one_identity_the_same(identity: bytes, seed: int) -> None:
    words = np.array([hashing.identity_words(identity, seed, b"tests")], dtype=np.uint32)
    assert SLOT_COUNT == len(np.unique(hashing.pair_costs(hashing.SLOT_WORDS, words)))


def test_neighbouring_identities_do_not_resemble_each_other() -> None:
    """Addresses that differ in one bit: the costs of 64 of them are uniform, and no two are correlated."""
    words = [hashing.identity_words(parse_address(f"10.0.0.{n}"), 1, b"tests") for n in range(64)]
    costs = hashing.pair_costs(hashing.SLOT_WORDS, np.array(words, dtype=np.uint32)) / 2.0**32
    assert np.abs(costs.mean(axis=0) - 0.5).max() < 5 * 0.2887 / SLOT_COUNT**0.5
    correlation = np.corrcoef(costs, rowvar=False) - np.eye(64)
    assert np.abs(correlation).max() < 6 / SLOT_COUNT**0.5


def test_seed_and_domain_change_an_identity() -> None:
    everyone = [
        hashing.identity_words(b"x", 1, b"a"),
        hashing.identity_words(b"x", 2, b"a"),
        hashing.identity_words(b"x", 1, b"b"),
        hashing.identity_words(b"y", 1, b"a"),
    ]
    assert 4 == len(set(everyone))
    assert all(second % 2 == 1 for _, second in everyone)
