"""The smaller parts of the operator, each for itself: settings, the cache and its sweep, who is present, the state
object, and the last good state as load balancers remember it."""

from ipaddress import IPv4Network
from typing import Any

import pytest

from lboperator import nouns
from lboperator.cache import Cache, Kind
from lboperator.issued import Issuer
from lboperator.observe import Objects, Observer, Rules
from lboperator.presence import Presence
from lboperator.settings import Settings, SettingsError, Source, read_settings
from lboperator.shell import remembered_of
from lboperator.state import StateError, Written, decode, encode
from lboperator.sweep import Unheard
from lbpod.core.limits import AGENT_GRACE_NS, GENERATION_MAX, SWEEP_LATE_MAX, SWEEP_START_LOOKS
from lbpod.core.model import Cluster, NextIds
from lbpod.core.snapshot import Tables, next_snapshot
from tests.operator_objects import endpoint, endpoint_slice, node, service, virtual_service


# --- Settings ---------------------------------------------------------------------------------------------------------
def test_defaults_are_what_the_chart_relies_on() -> None:
    assert Settings() == read_settings({})
    assert ("holdfast.dev/holdfast", Source.MINT, ()) == (
        Settings().load_balancer_class,
        Settings().certificates,
        Settings().allowed_addresses,
    )


def test_settings_come_from_the_environment() -> None:
    found = read_settings(
        {
            "HOLDFAST_ALLOWED_ADDRESSES": "203.0.113.10/24, 198.51.100.7",
            "HOLDFAST_LB_SELECTOR": "zone=b,edge=",
            "HOLDFAST_CERTIFICATES": "certManager",
            "HOLDFAST_ISSUER": "cert-manager.io/ClusterIssuer/corp",
            "HOLDFAST_AGENT_PORT": "9000",
            "HOLDFAST_LOAD_BALANCER_CLASS": "",
            "HOLDFAST_LISTEN": "[::]:9901",
        }
    )
    assert (IPv4Network("203.0.113.0/24"), IPv4Network("198.51.100.7/32")) == found.allowed_addresses
    assert (("edge", ""), ("zone", "b")) == found.lb_selector
    assert (9000, "", "[::]:9901") == (found.agent_port, found.load_balancer_class, found.listen)
    assert (Source.CERT_MANAGER, Issuer("cert-manager.io", "ClusterIssuer", "corp")) == (
        found.certificates,
        found.issuer,
    )


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("AGENT_PORT", "0", "HOLDFAST_AGENT_PORT is '0'; it must be a number from 1 to 65535"),
        ("AGENT_PORT", "x", "it must be a number from 1 to 65535"),
        ("VNI", "16777216", "it must be a number from 0 to 16777215"),
        ("LB_SELECTOR", "edge", "HOLDFAST_LB_SELECTOR has 'edge'; it must be a list of labels"),
        ("ALLOWED_ADDRESSES", "203.0.113.1/33", "has '203.0.113.1/33', which is no IPv4 range"),
        ("ALLOWED_ADDRESSES", "2001:db8::/32", "which is no IPv4 range like 203.0.113.0/24"),
        ("CERTIFICATES", "yes", "it must be mint, certManager or own"),
        (
            "ISSUER",
            "corp",
            "HOLDFAST_ISSUER is 'corp'; it must be GROUP/KIND/NAME",
        ),
        ("CERTIFICATE_HOURS", "90d", "it must be a number from 1 to 100000"),
        ("TLS", "", "HOLDFAST_TLS is empty"),
        ("LISTEN", "9901", "it must be ADDRESS:PORT"),
        ("LOG_LEVEL", "loud", "it must be one of debug, info, warning, error"),
        ("NAMESPACE", "My Space", "it must be the name of an object"),
    ],
)
def test_a_bad_setting_is_named(name: str, value: str, sentence: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read_settings({f"HOLDFAST_{name}": value})
    assert sentence in str(refused.value)


# --- The cache --------------------------------------------------------------------------------------------------------
def seen(cache: Cache) -> bool:
    """Whether something has changed since the last look."""
    changed = cache.changed.is_set()
    cache.changed.clear()
    return changed


def test_what_does_not_matter_is_no_change() -> None:
    cache = Cache()
    body = node("n1", "10.0.0.1")
    cache.put(Kind.NODE, body)
    assert seen(cache)
    heartbeat = {**body, "status": {**body["status"], "conditions": [{"type": "Ready", "lastHeartbeatTime": "now"}]}}
    cache.put(Kind.NODE, heartbeat)
    assert not seen(cache)
    cache.put(Kind.NODE, node("n1", "10.0.0.2"))
    assert seen(cache)
    assert "10.0.0.2" == cache.nodes()["n1"].address


def test_a_status_is_kept_and_is_no_change() -> None:
    cache = Cache()
    cache.put(Kind.VIRTUAL_SERVICE, virtual_service())
    assert seen(cache)
    cache.put(Kind.VIRTUAL_SERVICE, {**virtual_service(), "status": {"epoch": 3}})
    assert not seen(cache)
    assert {("shop", "web"): {"epoch": 3}} == cache.statuses
    cache.drop(Kind.VIRTUAL_SERVICE, ("shop", "web"))
    assert seen(cache)
    assert ({}, []) == (cache.statuses, cache.virtual_services())


def told(uid: str, version: str, created: str = "", **spec: Any) -> dict[str, Any]:
    body = virtual_service(**spec)
    metadata = {**body["metadata"], "uid": uid, "resourceVersion": version, "creationTimestamp": created}
    return {**body, "metadata": metadata, "status": {"of": uid}}


T1, T2 = "2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (told("a", "99"), told("b", "101")),
        (told("a", "x9", T1), told("b", "x101", T2)),
        (told("a", "", T1), told("b", "", T2)),
    ],
    ids=["versions", "odd versions", "times"],
)
def test_what_is_told_late_of_a_former_object_of_that_name_changes_nothing(
    old: dict[str, Any], new: dict[str, Any]
) -> None:
    cache, key = Cache(), ("shop", "web")
    cache.put(Kind.VIRTUAL_SERVICE, old)
    cache.put(Kind.VIRTUAL_SERVICE, new)
    assert seen(cache)
    heard = cache.heard[Kind.VIRTUAL_SERVICE]
    cache.drop(Kind.VIRTUAL_SERVICE, key, "a")
    cache.put(Kind.VIRTUAL_SERVICE, old)
    assert (False, {key: {"of": "b"}}) == (seen(cache), cache.statuses)
    assert ["b"] == [vs.uid for vs in cache.virtual_services()]
    assert heard + 1 == cache.heard[Kind.VIRTUAL_SERVICE], "the watch has told of something all the same"
    cache.drop(Kind.VIRTUAL_SERVICE, key, "b")
    assert (True, []) == (seen(cache), cache.virtual_services())


@pytest.mark.parametrize(
    ("old", "new"),
    [(told("a", "x9", T1), told("b", "x2", T1)), (told("a", "", T1), told("b", "")), (told("", ""), told("b", "1"))],
    ids=["one second", "no time", "nothing"],
)
def test_where_nothing_says_which_is_newer_the_last_that_came_counts(old: dict[str, Any], new: dict[str, Any]) -> None:
    cache = Cache()
    cache.put(Kind.VIRTUAL_SERVICE, old)
    cache.put(Kind.VIRTUAL_SERVICE, new)
    assert ["b"] == [vs.uid for vs in cache.virtual_services()]


def test_one_object_may_be_told_of_in_any_version() -> None:
    cache = Cache()
    cache.put(Kind.VIRTUAL_SERVICE, told("a", "9"))
    cache.put(Kind.VIRTUAL_SERVICE, told("a", "8", address="203.0.113.11"))
    assert ["203.0.113.11"] == [vs.address for vs in cache.virtual_services()]
    cache.drop(Kind.VIRTUAL_SERVICE, ("shop", "web"))
    assert [] == cache.virtual_services(), "the sweep knows no uid"


def test_slices_are_found_by_their_service_also_where_that_changes() -> None:
    cache = Cache()
    for name in ("b", "a"):
        cache.put(Kind.SLICE, endpoint_slice(endpoint("10.1.0.1"), name=name))
    assert ["a", "b"] == [one.name for one in cache.slices()["shop", "web"]]
    cache.put(Kind.SLICE, endpoint_slice(endpoint("10.1.0.1"), name="a", service="other"))
    assert {("shop", "other"): ["a"], ("shop", "web"): ["b"]} == {
        where: [one.name for one in those] for where, those in cache.slices().items()
    }
    cache.drop(Kind.SLICE, ("shop", "b"))
    cache.drop(Kind.SLICE, ("shop", "unknown"))
    assert [("shop", "other")] == list(cache.slices())


def test_services_of_type_load_balancer_are_kept_whole() -> None:
    cache = Cache()
    plain, balanced = service(), service(kind="LoadBalancer")
    cache.put(Kind.SERVICE, plain)
    assert (True, {}) == (seen(cache), cache.lb_services)
    cache.put(Kind.SERVICE, balanced)
    assert (True, [("shop", "web")]) == (seen(cache), list(cache.lb_services))
    cache.put(Kind.SERVICE, balanced)
    assert not seen(cache)
    told = {**balanced, "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.10"}]}}}
    cache.put(Kind.SERVICE, told)
    assert seen(cache), "somebody has written its status"
    cache.put(Kind.SERVICE, plain)
    assert (True, {}) == (seen(cache), cache.lb_services)


def test_an_annotation_of_such_a_service_is_a_change() -> None:
    cache = Cache()
    body = service(kind="LoadBalancer")
    cache.put(Kind.SERVICE, body)
    seen(cache)
    cache.put(
        Kind.SERVICE, {**body, "metadata": {**body["metadata"], "annotations": {"holdfast.dev/address": "1.2.3.4"}}}
    )
    assert seen(cache)


def test_what_no_watch_tells_of_ends_the_process_unless_the_watch_is_only_late() -> None:
    silent, late = Unheard(), Unheard()
    one, other = ("web", "one"), ("web", "other")
    assert set() == silent.look({one}, 7), "it may have been made a moment ago"
    assert {one} == silent.look({one, other}, 7)
    assert set() == silent.look(set(), 7)
    assert set() == silent.look({one}, 7), "counted anew"
    at_start = Unheard()
    found = [at_start.look({one}, 0, SWEEP_START_LOOKS) for _ in range(2 * SWEEP_START_LOOKS)]
    assert [set()] * (2 * SWEEP_START_LOOKS - 1) + [{one}] == found, "a watch that has only just begun"
    found = [late.look({one}, heard) for heard in range(1, SWEEP_LATE_MAX + 1)]
    assert [set()] * (SWEEP_LATE_MAX - 1) + [{one}] == found


def test_strangers_are_what_was_deleted_unseen_and_what_was_never_heard_of() -> None:
    cache = Cache()
    cache.put(Kind.NODE, node("old", "10.0.0.1"))
    cache.put(Kind.NODE, node("kept", "10.0.0.2"))
    before = cache.number
    cache.put(Kind.NODE, node("new", "10.0.0.3"))  # made while the list was under way
    gone, missing = cache.strangers(Kind.NODE, {("", "kept"), ("", "unheard")}, before)
    assert ([("", "old")], {("", "unheard")}) == (gone, missing)


# --- Who is present ---------------------------------------------------------------------------------------------------
def test_an_agent_that_is_replaced_was_never_away() -> None:
    presence = Presence()
    both = [nouns.endpoint_slice(endpoint_slice(endpoint("10.0.0.1", "n1"), endpoint("10.0.0.2", "n2", ready=False)))]
    one = [nouns.endpoint_slice(endpoint_slice(endpoint("10.0.0.1", "n1")))]
    assert {"n1", "n2"} == presence.see(both, 0)
    assert {"n1", "n2"} == presence.see(one, AGENT_GRACE_NS - 1)
    assert {"n1"} == presence.see(one, AGENT_GRACE_NS)
    assert {"n1", "n2"} == presence.see(both, AGENT_GRACE_NS + 1)
    assert frozenset() == presence.see([], 3 * AGENT_GRACE_NS)


# --- The state object -------------------------------------------------------------------------------------------------
def config_map(data: dict[str, str]) -> dict[str, Any]:
    return {"metadata": {"namespace": "system", "name": "state", "resourceVersion": "7"}, "data": data}


def test_the_state_comes_back_as_it_was_written() -> None:
    written = Written(Cluster(7, 0xFFFF_FFFF), GENERATION_MAX, NextIds(2, 3, 4, 5), "7")
    assert written == decode(config_map(encode(written)))


@pytest.mark.parametrize(
    "damage",
    [{"seed": "x"}, {"seed": "-1"}, {"vni": "16777216"}, {"generation": "-1"}, {"nextIds": "{"}, {"nextIds": "[]"}],
)
def test_a_damaged_state_is_not_taken_for_a_lost_one(damage: dict[str, str]) -> None:
    with pytest.raises(StateError, match=r"ConfigMap system/state .*; delete it, and what load balancers know is used"):
        decode(config_map({**encode(Written(Cluster(7, 1))), **damage}))
    with pytest.raises(StateError):
        decode({**config_map({}), "data": None})


# --- What load balancers remember -------------------------------------------------------------------------------------
def test_what_they_remember_is_what_was_observed() -> None:
    vs = nouns.virtual_service(virtual_service())
    its = nouns.service(service())
    slices = (nouns.endpoint_slice(endpoint_slice(endpoint("10.1.0.1"), endpoint("10.1.0.2"))),)
    n1 = nouns.node(node("n1", "10.0.0.1"))
    objects = Objects([vs], {its.key: its}, {vs.key: slices}, {"n1": n1}, frozenset({"n1"}))
    world = Observer(Rules(), {}).observe(objects).world
    cluster = Cluster(7, 11)
    snapshot, _ = next_snapshot(world, None, cluster, 1, Tables(cluster.seed))
    assert snapshot is not None
    assert {("shop", "web"): world.vips} == remembered_of(snapshot)
