"""What the operator makes of Kubernetes objects: which endpoints are backends and in which state, which objects lose a
conflict and what they are told, and that nothing that is alive is ever taken away by a moment's confusion."""

from collections import defaultdict
from collections.abc import Sequence
from ipaddress import IPv4Network
from itertools import permutations

import pytest

from lboperator import nouns
from lboperator.observe import Objects, Observed, Observer, Reason, Rules, remembered
from lbpod.core.limits import MEMBERS_MAX, VIPS_MAX
from lbpod.core.model import Affinity, BackendState, Cluster, Protocol, WorldVip, format_address, parse_address
from lbpod.core.snapshot import Tables, next_snapshot
from tests.operator_objects import Body, endpoint, endpoint_slice, node, service, virtual_service

NODES = (node("n1", "10.0.0.1"), node("n2", "10.0.0.2"))
READY, DRAINING = BackendState.READY, BackendState.DRAINING
SECOND_NS = 1_000_000_000


def objects(
    virtual_services: Sequence[Body],
    services: Sequence[Body] = (),
    slices: Sequence[Body] = (),
    nodes: Sequence[Body] = NODES,
    present: Sequence[str] = ("n1", "n2"),
) -> Objects:
    by_service: dict[nouns.Key, list[nouns.Slice]] = defaultdict(list)
    for one in slices:
        found = nouns.endpoint_slice(one)
        by_service[found.namespace, found.service].append(found)
    return Objects(
        [nouns.virtual_service(one) for one in virtual_services],
        {found.key: found for found in map(nouns.service, services)},
        by_service,
        {found.name: found for found in map(nouns.node, nodes)},
        frozenset(present),
    )


def web(*slices: Body, vs: Body | None = None, its: Body | None = None) -> Objects:
    """One VirtualService, its Service, and these slices."""
    return objects([vs or virtual_service()], [its or service()], slices)


def observe(seen: Objects, rules: Rules | None = None) -> Observed:
    return Observer(rules or Rules(), {}).observe(seen)


def backends(observed: Observed, vip: int = 0) -> dict[str, BackendState]:
    return {f"{format_address(one.address)}:{one.port}": one.state for one in observed.world.vips[vip].backends}


def verdict(observed: Observed, name: str = "web") -> tuple[Reason, Reason, str]:
    one = observed.verdicts["shop", name]
    return one.accepted_reason, one.resolved_reason, one.accepted or one.resolved


# --- The World --------------------------------------------------------------------------------------------------------
def test_a_service_with_endpoints_becomes_a_vip_with_backends() -> None:
    observed = observe(
        web(endpoint_slice(endpoint("10.1.0.1", "n1", ready=True), endpoint("10.1.0.2", "n2", ready=True)))
    )
    (vip,) = observed.world.vips
    assert ("shop/web/http", "203.0.113.10", 80, Protocol.TCP, Affinity.NONE) == (
        vip.name,
        format_address(vip.address),
        vip.port,
        vip.protocol,
        vip.affinity,
    )
    assert (3600 * SECOND_NS, 3600 * SECOND_NS) == (vip.idle_ns, vip.drain_ns)
    assert {"10.1.0.1:8080": READY, "10.1.0.2:8080": READY} == backends(observed)
    assert ["n1", "n2"] == [one.node for one in vip.backends]
    assert [("n1", "10.0.0.1:9900", True), ("n2", "10.0.0.2:9900", True)] == [
        (one.name, one.control, one.lb) for one in observed.world.nodes
    ]
    assert observed.verdicts["shop", "web"].is_good


def test_timeouts_go_by_the_protocol() -> None:
    ports: list[Body] = [{"port": 53, "protocol": "UDP"}, {"port": 53}]
    vs = virtual_service(ports=ports, idleTimeoutSeconds=10, udpIdleTimeoutSeconds=20, drainTimeoutSeconds=30)
    observed = observe(web(endpoint_slice(), vs=vs))
    assert {"shop/web/tcp-53": 10 * SECOND_NS, "shop/web/udp-53": 20 * SECOND_NS} == {
        vip.name: vip.idle_ns for vip in observed.world.vips
    }
    assert {30 * SECOND_NS} == {vip.drain_ns for vip in observed.world.vips}


@pytest.mark.parametrize(
    ("conditions", "state"),
    [
        ({}, READY),
        ({"ready": True}, READY),
        ({"ready": True, "serving": True, "terminating": False}, READY),
        ({"serving": False}, READY),
        ({"ready": False, "serving": True, "terminating": True}, DRAINING),
        ({"ready": True, "serving": True, "terminating": True}, DRAINING),
        ({"terminating": True}, DRAINING),
        ({"ready": False}, None),
        ({"ready": False, "serving": False, "terminating": False}, None),
        ({"ready": False, "serving": True, "terminating": False}, None),
        ({"ready": False, "serving": False, "terminating": True}, None),
        ({"ready": False, "terminating": True}, None),
    ],
)
def test_conditions_of_an_endpoint_that_was_no_backend_before(
    conditions: dict[str, bool], state: BackendState | None
) -> None:
    observed = observe(web(endpoint_slice(endpoint("10.1.0.1", **conditions))))
    assert ({} if state is None else {"10.1.0.1:8080": state}) == backends(observed)


@pytest.mark.parametrize(
    "conditions",
    [
        {"ready": False},
        {"ready": False, "serving": False, "terminating": True},
        {"ready": False, "serving": True, "terminating": True},
    ],
)
def test_a_backend_that_is_not_ready_any_more_keeps_its_connections(conditions: dict[str, bool]) -> None:
    observer = Observer(Rules(), {})
    observer.observe(web(endpoint_slice(endpoint("10.1.0.1"), endpoint("10.1.0.2"))))
    for _ in range(3):
        observed = observer.observe(web(endpoint_slice(endpoint("10.1.0.1", **conditions), endpoint("10.1.0.2"))))
        assert {"10.1.0.1:8080": DRAINING, "10.1.0.2:8080": READY} == backends(observed)
    assert {"10.1.0.2:8080": READY} == backends(observer.observe(web(endpoint_slice(endpoint("10.1.0.2")))))


def test_where_all_terminate_they_stay() -> None:
    going = [endpoint(f"10.1.0.{last}", ready=False, serving=True, terminating=True) for last in (1, 2)]
    assert {"10.1.0.1:8080": DRAINING, "10.1.0.2:8080": DRAINING} == backends(observe(web(endpoint_slice(*going))))


def weights(observed: Observed) -> dict[str, int]:
    return {format_address(one.address): one.weight for one in observed.world.vips[0].backends}


def test_where_nothing_is_ready_what_serves_while_it_terminates_gets_the_new_connections() -> None:
    serving = {"ready": False, "serving": True, "terminating": True}
    observer = Observer(Rules(), {})

    def seen(first: dict[str, bool], second: dict[str, bool]) -> dict[str, int]:
        slices = endpoint_slice(endpoint("10.1.0.1", **first), endpoint("10.1.0.2", **second))
        return weights(observer.observe(web(slices)))

    assert {"10.1.0.1": 1, "10.1.0.2": 1} == seen({}, {})
    assert {"10.1.0.1": 1, "10.1.0.2": 1} == seen({}, {"ready": False}), "the table is made of what is ready"
    for odd in ({"ready": False}, {"ready": False, "serving": False, "terminating": True}):
        assert {"10.1.0.1": 1, "10.1.0.2": 0} == seen(serving, odd)
        assert {"10.1.0.1": 1, "10.1.0.2": 1} == seen({"ready": False}, odd), "better those than none"
    assert {"10.1.0.1": 1, "10.1.0.2": 1} == seen(serving, serving)


def test_what_has_no_weight_keeps_its_place_and_gets_no_slot() -> None:
    observer = Observer(Rules(), {})
    observer.observe(web(endpoint_slice(endpoint("10.1.0.1"), endpoint("10.1.0.2"))))
    serving = endpoint("10.1.0.1", ready=False, serving=True, terminating=True)
    world = observer.observe(web(endpoint_slice(serving, endpoint("10.1.0.2", ready=False)))).world
    tables = Tables(11)
    snapshot, _ = next_snapshot(world, None, Cluster(7, 11), 1, tables)
    assert snapshot is not None
    one, other = snapshot.vips[0].backends
    assert ("10.1.0.1", "10.1.0.2") == (format_address(one.address), format_address(other.address))
    table = tables.table((world.vips[0].address, 80, 6), snapshot.vips[0].backends)
    assert {one.id} == set(table.current.tolist())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_slices_that_which_says_that_it_serves_counts(order: tuple[int, ...]) -> None:
    observer = Observer(Rules(), {})
    observer.observe(web(endpoint_slice(endpoint("10.1.0.1"), endpoint("10.1.0.2"))))
    serving = endpoint("10.1.0.1", ready=False, serving=True, terminating=True)
    ages = [
        endpoint_slice(endpoint("10.1.0.1", ready=False), endpoint("10.1.0.2", ready=False), name="old"),
        endpoint_slice(serving, name="new"),
    ]
    assert {"10.1.0.1": 1, "10.1.0.2": 0} == weights(observer.observe(web(*(ages[place] for place in order))))


def test_a_service_scaled_to_nothing_has_no_backends_and_that_is_the_truth() -> None:
    observer = Observer(Rules(), {})
    observer.observe(web(endpoint_slice(endpoint("10.1.0.1"))))
    observed = observer.observe(web(endpoint_slice()))
    assert {} == backends(observed)
    assert observed.verdicts["shop", "web"].is_good


# --- Slices -----------------------------------------------------------------------------------------------------------
def test_all_slices_of_a_service_count_and_each_endpoint_once() -> None:
    first = endpoint_slice(endpoint("10.1.0.1"), endpoint("10.1.0.2"), name="a")
    second = endpoint_slice(endpoint("10.1.0.2"), endpoint("10.1.0.3", "n2"), name="b")
    observed = observe(web(first, second))
    assert ["10.1.0.1:8080", "10.1.0.2:8080", "10.1.0.3:8080"] == sorted(backends(observed))


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_of_two_slices_the_better_state_counts_in_any_order(order: tuple[int, ...]) -> None:
    """An endpoint that moves between slices is in both for a moment, and they may be of different ages."""
    ages = [
        endpoint_slice(endpoint("10.1.0.1", ready=False), name="old"),
        endpoint_slice(endpoint("10.1.0.1", ready=False, serving=True, terminating=True), name="older"),
        endpoint_slice(endpoint("10.1.0.1", ready=True), name="new"),
    ]
    assert {"10.1.0.1:8080": READY} == backends(observe(web(*(ages[place] for place in order))))


def test_order_never_matters() -> None:
    slices = [endpoint_slice(endpoint(f"10.1.0.{last}"), name=f"s{last}") for last in range(1, 5)]
    services = [virtual_service(name, address=f"203.0.113.{last}") for last, name in enumerate("abc", start=1)]
    worlds = [
        observe(objects(list(those), [service()], list(order))).world
        for those in permutations(services)
        for order in permutations(slices)
    ]
    assert all(world == worlds[0] for world in worlds)


def test_slices_of_ipv6_and_names_are_passed_over() -> None:
    six = endpoint_slice(endpoint("fd00::1"), name="six", address_type="IPv6")
    name = endpoint_slice(endpoint("pod.example"), name="fqdn", address_type="FQDN")
    assert ["10.1.0.1:8080"] == list(backends(observe(web(six, name, endpoint_slice(endpoint("10.1.0.1"))))))


def test_only_the_first_address_of_an_endpoint_counts() -> None:
    both = {"addresses": ["10.1.0.1", "10.1.0.9"], "nodeName": "n1", "conditions": {}}
    assert ["10.1.0.1:8080"] == list(backends(observe(web(endpoint_slice(both)))))


def test_slices_of_a_service_of_the_same_name_before_do_not_count() -> None:
    """Deleted and made again: until the new one has a slice, the last good state stays."""
    observer = Observer(Rules(), {})
    old = endpoint_slice(endpoint("10.1.0.1"), owner="uid-1")
    observer.observe(web(old))
    observed = observer.observe(web(old, its=service(uid="uid-2")))
    assert {"10.1.0.1:8080": READY} == backends(observed)
    reason, resolved, sentence = verdict(observed)
    assert (Reason.ACCEPTED, Reason.NO_SLICES) == (reason, resolved)
    assert "Service shop/web has no EndpointSlice yet" in sentence
    new = endpoint_slice(endpoint("10.1.0.2"), owner="uid-2", name="new")
    observed = observer.observe(web(old, new, its=service(uid="uid-2")))
    assert {"10.1.0.2:8080": READY} == backends(observed)
    assert observed.verdicts["shop", "web"].is_good


def test_slices_that_nobody_owns_are_written_by_hand_and_count() -> None:
    assert ["10.1.0.1:8080"] == list(backends(observe(web(endpoint_slice(endpoint("10.1.0.1"), owner="")))))


# --- Ports ------------------------------------------------------------------------------------------------------------
def test_without_a_target_port_it_is_the_same_port() -> None:
    vs = virtual_service(ports=[{"port": 80}])
    assert ["10.1.0.1:80"] == list(backends(observe(web(endpoint_slice(endpoint("10.1.0.1")), vs=vs))))


def test_a_named_port_is_what_the_pods_call_it_and_may_differ_from_pod_to_pod() -> None:
    vs = virtual_service(ports=[{"port": 80, "targetPort": "web-port"}])
    its = service(ports=[{"name": "http", "port": 80, "targetPort": "web-port"}, {"name": "web-port", "port": 81}])
    old = endpoint_slice(endpoint("10.1.0.1"), name="a", ports=[{"name": "http", "protocol": "TCP", "port": 8080}])
    new = endpoint_slice(endpoint("10.1.0.2"), name="b", ports=[{"name": "http", "protocol": "TCP", "port": 9090}])
    assert ["10.1.0.1:8080", "10.1.0.2:9090"] == sorted(backends(observe(web(old, new, vs=vs, its=its))))


def test_a_named_port_may_also_be_what_the_service_calls_it() -> None:
    vs = virtual_service(ports=[{"port": 80, "targetPort": "http"}])
    its = service(ports=[{"name": "http", "port": 80, "targetPort": 8080}])
    assert ["10.1.0.1:8080"] == list(backends(observe(web(endpoint_slice(endpoint("10.1.0.1")), vs=vs, its=its))))


def test_the_only_port_of_a_service_may_have_no_name() -> None:
    vs = virtual_service(ports=[{"port": 80, "targetPort": "http"}])
    its = service(ports=[{"port": 80, "targetPort": "http"}])
    ports = [{"name": "", "protocol": "TCP", "port": 8080}]
    assert ["10.1.0.1:8080"] == list(
        backends(observe(web(endpoint_slice(endpoint("10.1.0.1"), ports=ports), vs=vs, its=its)))
    )


def test_protocols_are_told_apart() -> None:
    vs = virtual_service(ports=[{"port": 53, "protocol": "UDP", "targetPort": "dns"}])
    its = service(
        ports=[
            {"name": "tcp", "port": 53, "targetPort": "dns"},
            {"name": "udp", "protocol": "UDP", "port": 53, "targetPort": "dns"},
        ]
    )
    ports = [{"name": "tcp", "protocol": "TCP", "port": 5301}, {"name": "udp", "protocol": "UDP", "port": 5302}]
    assert ["10.1.0.1:5302"] == list(
        backends(observe(web(endpoint_slice(endpoint("10.1.0.1"), ports=ports), vs=vs, its=its)))
    )


def test_a_port_that_nobody_has_is_said_with_those_that_there_are() -> None:
    vs = virtual_service(ports=[{"port": 80, "targetPort": "metrics"}])
    observed = observe(web(endpoint_slice(endpoint("10.1.0.1")), vs=vs))
    assert (Reason.ACCEPTED, Reason.NO_PORT) == verdict(observed)[:2]
    assert "Service shop/web has no TCP port that is called metrics; it has http" == verdict(observed)[2]
    assert () == observed.world.vips


# --- What cannot be served --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("vs", "its", "wanted", "sentence"),
    [
        (virtual_service(address="web"), service(), (Reason.INVALID, Reason.RESOLVED), "web is not an IP address"),
        (virtual_service(address="::1"), service(), (Reason.INVALID, Reason.RESOLVED), "not an IPv4 address of one"),
        (virtual_service(address="224.0.0.1"), service(), (Reason.INVALID, Reason.RESOLVED), "not an IPv4 address of"),
        (virtual_service(address="0.0.0.1"), service(), (Reason.INVALID, Reason.RESOLVED), "not an IPv4 address of"),
        (virtual_service(ports=[]), service(), (Reason.INVALID, Reason.RESOLVED), "serves no port"),
        (virtual_service(ports=[{"port": 0}]), service(), (Reason.INVALID, Reason.RESOLVED), "0 is not a port"),
        (
            virtual_service(ports=[{"port": 1, "protocol": "SCTP"}]),
            service(),
            (Reason.INVALID, Reason.RESOLVED),
            "protocol SCTP is not known; use TCP or UDP",
        ),
        (virtual_service(affinity="Cookie"), service(), (Reason.INVALID, Reason.RESOLVED), "affinity Cookie is not"),
        (
            virtual_service(service="shop"),
            service(),
            (Reason.ACCEPTED, Reason.NO_SERVICE),
            "there is no Service shop/shop",
        ),
        (
            virtual_service(),
            service(kind="ExternalName"),
            (Reason.ACCEPTED, Reason.NOT_A_BACKEND),
            "is an ExternalName, which has no endpoints",
        ),
    ],
)
def test_the_last_good_state_stays_and_fixed_input_heals(
    vs: Body, its: Body, wanted: tuple[Reason, Reason], sentence: str
) -> None:
    observer = Observer(Rules(), {})
    slices = endpoint_slice(endpoint("10.1.0.1"))
    good = observer.observe(web(slices)).world
    for _ in range(2):
        observed = observer.observe(web(slices, vs=vs, its=its))
        assert wanted == verdict(observed)[:2]
        assert sentence in verdict(observed)[2]
        assert good == observed.world
    assert () == observe(web(slices, vs=vs, its=its)).world.vips, "without a good state there is nothing to keep"
    assert good == observer.observe(web(slices)).world


def test_an_address_outside_the_allowed_ranges_is_refused() -> None:
    rules = Rules(allowed=(IPv4Network("198.51.100.0/24"), IPv4Network("192.0.2.0/24")))
    observed = observe(web(endpoint_slice(endpoint("10.1.0.1"))), rules)
    assert Reason.NOT_ALLOWED is verdict(observed)[0]
    assert (
        "203.0.113.10 is not in the ranges that are allowed here (198.51.100.0/24, 192.0.2.0/24)"
        in verdict(observed)[2]
    )
    allowed = Rules(allowed=(IPv4Network("203.0.113.0/24"),))
    assert observe(web(endpoint_slice(endpoint("10.1.0.1"))), allowed).verdicts["shop", "web"].is_good


def test_a_virtual_service_that_is_deleted_leaves_nothing() -> None:
    observer = Observer(Rules(), {})
    observer.observe(web(endpoint_slice(endpoint("10.1.0.1"))))
    assert () == observer.observe(objects([], [service()], [endpoint_slice(endpoint("10.1.0.1"))])).world.vips
    missing = observer.observe(objects([virtual_service()]))
    assert () == missing.world.vips, "one of the same name is another one"


def test_a_controller_that_starts_knows_what_was_good_from_the_load_balancers() -> None:
    good = observe(web(endpoint_slice(endpoint("10.1.0.1")))).world
    observer = Observer(Rules(), remembered((vip, vip.name) for vip in good.vips))
    observed = observer.observe(objects([virtual_service()]))
    assert (good.vips, Reason.NO_SERVICE) == (observed.world.vips, verdict(observed)[1])


# --- Conflicts and limits ---------------------------------------------------------------------------------------------
def test_of_two_that_want_one_address_the_older_wins() -> None:
    old = virtual_service("web", created="2026-01-01T00:00:00Z")
    new = virtual_service("new", created="2026-01-02T00:00:00Z")
    for order in ([old, new], [new, old]):
        observed = observe(objects(order, [service()], [endpoint_slice(endpoint("10.1.0.1"))]))
        assert ["shop/web/http"] == [vip.name for vip in observed.world.vips]
        assert observed.verdicts["shop", "web"].is_good
        reason, _, sentence = verdict(observed, "new")
        assert Reason.CONFLICT is reason
        assert "203.0.113.10:80/TCP is already served by shop/web, which is older" in sentence


def test_of_two_of_one_age_the_order_of_names_decides() -> None:
    both = [virtual_service("b"), virtual_service("a")]
    assert ["shop/a/http"] == [vip.name for vip in observe(objects(both, [service()], [endpoint_slice()])).world.vips]


def test_one_address_may_be_shared_by_ports_and_protocols() -> None:
    both = [virtual_service("a"), virtual_service("b", ports=[{"port": 80, "protocol": "UDP"}, {"port": 81}])]
    observed = observe(objects(both, [service()], [endpoint_slice()]))
    assert all(one.is_good for one in observed.verdicts.values())
    assert 3 == len(observed.world.vips)


def test_a_conflict_ends_with_the_older() -> None:
    observer = Observer(Rules(), {})
    both = [virtual_service("a"), virtual_service("b", created="2026-02-01T00:00:00Z")]
    rest = ([service()], [endpoint_slice(endpoint("10.1.0.1"))])
    assert Reason.CONFLICT is verdict(observer.observe(objects(both, *rest)), "b")[0]
    observed = observer.observe(objects(both[1:], *rest))
    assert observed.verdicts["shop", "b"].is_good
    assert ["shop/b/http"] == [vip.name for vip in observed.world.vips]


def test_where_there_is_no_room_for_all_the_oldest_are_served() -> None:
    ports = [{"port": port} for port in range(1, 33)]
    many = [
        virtual_service(
            f"v{number:03}",
            address=f"203.0.113.{number}",
            ports=ports,
            created=f"2026-01-01T00:{number // 60:02}:{number % 60:02}Z",
        )
        for number in range(1, 141)
    ]
    observed = observe(objects(many, [service()], [endpoint_slice()]))
    fit = (VIPS_MAX - 1) // 32
    assert 32 * fit == len(observed.world.vips)
    for number in range(1, 141):
        reason, _, sentence = verdict(observed, f"v{number:03}")
        assert (Reason.ACCEPTED if number <= fit else Reason.TOO_MANY) is reason
        assert number <= fit or "there is no room for it: all VirtualServices together" in sentence


CROWDED = (1227, 5134, 8424, 13528, 13623, 14846, 18111, 19881, 20889)
"""Ports of 203.0.113.10 that all fall on one place of the index, which holds eight."""


def crowded(created: str, ports: Sequence[int] = CROWDED) -> Body:
    return virtual_service("crowd", ports=[{"port": port} for port in ports], created=created)


def test_one_that_does_not_fit_is_left_out_alone() -> None:
    rest = ([service()], [endpoint_slice(endpoint("10.1.0.1"))])
    others = [virtual_service(f"v{n}", address=f"203.0.113.{n}", created=f"2026-01-0{n}T00:00:00Z") for n in (1, 2)]
    observed = observe(objects([crowded("2025-01-01T00:00:00Z"), *others], *rest))
    assert (Reason.TOO_MANY, Reason.RESOLVED) == verdict(observed, "crowd")[:2]
    assert "there is no room for it: too many VIPs fall on the place" in verdict(observed, "crowd")[2]
    assert ["shop/v1/http", "shop/v2/http"] == [vip.name for vip in observed.world.vips]


def test_what_finds_no_room_keeps_what_it_had_and_takes_nothing_from_those_that_are_served() -> None:
    observer = Observer(Rules(), {})
    rest = ([service()], [endpoint_slice(endpoint("10.1.0.1"))])
    served = virtual_service("served", ports=[{"port": CROWDED[0]}], created="2026-01-02T00:00:00Z")
    first = objects([crowded("2026-01-01T00:00:00Z", [80, *CROWDED[1:8]]), served], *rest)
    assert all(one.is_good for one in observer.observe(first).verdicts.values())
    grown = observer.observe(objects([crowded("2026-01-01T00:00:00Z", [80, *CROWDED[1:]]), served], *rest))
    assert grown.verdicts["shop", "served"].is_good, "it is younger, and has asked for nothing new"
    assert Reason.TOO_MANY is verdict(grown, "crowd")[0]
    assert {80, *CROWDED[1:8]} == {vip.port for vip in grown.verdicts["shop", "crowd"].vips}
    assert 9 == len(grown.world.vips)
    healed = observer.observe(first)
    assert all(one.is_good for one in healed.verdicts.values())


def test_more_load_balancers_than_there_can_be_are_no_fault_of_a_virtual_service() -> None:
    nodes = [node(f"n{number:04}", f"10.0.{number // 250}.{number % 250 + 1}") for number in range(MEMBERS_MAX + 3)]
    last = endpoint_slice(endpoint("10.1.0.1", f"n{MEMBERS_MAX + 2:04}"))
    names = [nouns.node(one).name for one in nodes]
    observed = observe(objects([virtual_service()], [service()], [last], nodes, names))
    assert observed.verdicts["shop", "web"].is_good
    assert names[:MEMBERS_MAX] == [one.name for one in observed.world.nodes if one.lb]
    assert {"10.1.0.1:8080": READY} == backends(observed)


# --- Nodes ------------------------------------------------------------------------------------------------------------
def test_nodes_are_those_with_an_agent_and_those_that_host_a_backend() -> None:
    nodes = [*NODES, node("n3", "10.0.0.3"), node("n4", "10.0.0.4")]
    observer = Observer(Rules(), {})
    slices = endpoint_slice(endpoint("10.1.0.1", "n3"))
    seen = objects([virtual_service()], [service()], [slices], nodes, ["n1", "n3"])
    assert [("n1", True), ("n3", True)] == [(one.name, one.lb) for one in observer.observe(seen).world.nodes]
    gone = observer.observe(objects([virtual_service()], [service()], [slices], nodes, ["n1"]))
    assert [("n1", True), ("n3", False)] == [(one.name, one.lb) for one in gone.world.nodes]
    assert ["10.1.0.1:8080"] == list(backends(gone)), "what is in service stays while its agent is away"


def test_an_endpoint_where_no_agent_runs_is_left_out_and_counted() -> None:
    seen = objects(
        [virtual_service()],
        [service()],
        [endpoint_slice(endpoint("10.1.0.1"), endpoint("10.1.0.2", "n2"), endpoint("10.1.0.3", ""))],
        present=["n1"],
    )
    observed = observe(seen)
    assert ["10.1.0.1:8080"] == list(backends(observed))
    assert 2 == observed.verdicts["shop", "web"].homeless


def test_a_node_that_is_gone_takes_its_backends_with_it() -> None:
    observer = Observer(Rules(), {})
    slices = endpoint_slice(endpoint("10.1.0.1"), endpoint("10.1.0.2", "n2"))
    observer.observe(web(slices))
    observed = observer.observe(objects([virtual_service()], [service()], [slices], [NODES[0]]))
    assert ["10.1.0.1:8080"] == list(backends(observed))
    assert ["n1"] == [one.name for one in observed.world.nodes]
    kept = observer.observe(objects([virtual_service()], [], [], [NODES[1]]))
    assert {} == backends(kept), "a last good state has no backends on nodes that are gone"


def test_labels_say_whose_agents_are_load_balancers() -> None:
    nodes = [node("n1", "10.0.0.1", role="edge", zone="a"), node("n2", "10.0.0.2", role="worker")]
    observed = observe(objects([], nodes=nodes), Rules(selector=(("role", "edge"),)))
    assert {"n1": True, "n2": False} == {one.name: one.lb for one in observed.world.nodes}


def test_a_node_without_an_ipv4_address_is_no_node() -> None:
    nodes = [node("n1", "10.0.0.1"), node("n2", "fd00::2"), {"metadata": {"name": "n3"}}]
    assert ["n1"] == [
        one.name for one in observe(objects([], nodes=nodes, present=["n1", "n2", "n3", "n9"])).world.nodes
    ]


@pytest.mark.parametrize("odd", ["10.0.0.01", "node2.example.com", "10.0.0", "10.0.0.2/24", "::ffff:10.0.0.2", ""])
def test_what_is_no_ipv4_address_is_none_of_a_nodes(odd: str) -> None:
    nodes = [node("n1", "10.0.0.1"), node("n2", odd)]
    assert ["n1"] == [one.name for one in observe(objects([], nodes=nodes, present=["n1", "n2"])).world.nodes]
    body = node("n2", odd)
    body["status"]["addresses"].append({"type": "InternalIP", "address": "10.0.0.2"})
    assert "10.0.0.2" == nouns.node(body).address, "the first that is one"


def test_two_nodes_with_one_address_are_one() -> None:
    """A node that comes back under another name while its old object is still there."""
    nodes = [node("a", "10.0.0.1"), node("b", "10.0.0.1")]
    assert ["a"] == [one.name for one in observe(objects([], nodes=nodes, present=["a", "b"])).world.nodes]


# --- Odd bodies -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"metadata": None, "spec": None, "status": None},
        {"metadata": {"name": 7}, "spec": {"ports": {"a": 1}, "backendRef": []}, "endpoints": "none", "ports": 3},
        {
            "spec": {"ports": [None, {"port": True, "targetPort": []}]},
            "endpoints": [{"addresses": []}, {}],
            "ports": [{}],
        },
        {
            "status": {"addresses": [None, {"type": "InternalIP"}]},
            "endpoints": [{"addresses": [None], "conditions": 1}],
        },
    ],
)
def test_odd_bodies_are_no_exceptions(body: Body) -> None:
    seen = Objects(
        [nouns.virtual_service(body)],
        {("", ""): nouns.service(body)},
        {("", ""): [nouns.endpoint_slice(body)]},
        {"": nouns.node(body)},
        frozenset({""}),
    )
    assert () == observe(seen).world.vips


def test_remembered_vips_are_sorted_by_their_virtual_service() -> None:
    def vip(name: str, port: int) -> WorldVip:
        return WorldVip(name, parse_address("203.0.113.1"), port, Protocol.TCP, Affinity.NONE, 1, 1)

    found = remembered((one, one.name) for one in (vip("a/b/y", 2), vip("a/b/x", 1), vip("a/c/x", 3), vip("odd", 4)))
    assert {("a", "b"): [1, 2], ("a", "c"): [3]} == {key: [one.port for one in those] for key, those in found.items()}
