"""Services of type LoadBalancer: what is made for them, what is left alone, what is refused and not half done."""

from ipaddress import IPv4Network
from typing import Any

import msgspec
import pytest

from lboperator import nouns
from lboperator.interop import Action, Change, Create, Delete, Problem, Tell, plan
from lboperator.nouns import Key, VirtualService
from lboperator.observe import Rules, why_not_address

CLASS = "holdfast.dev/holdfast"
KEY = ("shop", "web")


def service(*, ingress: str = "", annotations: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    """One of type LoadBalancer, as the API server has it."""
    points = [{"ip": ingress, "ipMode": "VIP"}] if ingress else []
    wanted = {
        "type": "LoadBalancer",
        "loadBalancerClass": CLASS,
        "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": "http"}],
        "sessionAffinity": "None",
    }
    notes = {"holdfast.dev/address": "203.0.113.10"} if annotations is None else annotations
    return {
        "metadata": {"namespace": "shop", "name": "web", "uid": "uid-1", "annotations": notes},
        "spec": {**wanted, **spec},
        "status": {"loadBalancer": {"ingress": points} if points else {}},
    }


def looked_at(body: dict[str, Any], there: list[VirtualService] | None = None, *, served: bool = False) -> list[Action]:
    programmed: frozenset[Key] = frozenset({KEY}) if served else frozenset()
    return plan({KEY: body}, there or [], programmed, CLASS)


def made_of(body: dict[str, Any], **metadata: Any) -> VirtualService:
    """The VirtualService that was made of this Service."""
    (action,) = looked_at(body)
    assert isinstance(action, Create)
    return nouns.virtual_service({**action.body, "metadata": {**action.body["metadata"], "uid": "vs", **metadata}})


def test_a_service_gets_a_virtual_service_that_belongs_to_it() -> None:
    (action,) = looked_at(service(sessionAffinity="ClientIP"))
    assert isinstance(action, Create)
    assert {
        "address": "203.0.113.10",
        "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": "http"}],
        "backendRef": {"name": "web"},
        "affinity": "ClientIP",
    } == action.body["spec"]
    (owner,) = action.body["metadata"]["ownerReferences"]
    assert ("Service", "uid-1", True, False) == (
        owner["kind"],
        owner["uid"],
        owner["controller"],
        owner["blockOwnerDeletion"],
    )


def test_once_it_is_there_nothing_is_left_to_do_but_to_tell() -> None:
    vs = made_of(service())
    assert [] == looked_at(service(), [vs])
    assert [Tell(KEY, ("203.0.113.10",))] == looked_at(service(), [vs], served=True)
    assert [] == looked_at(service(ingress="203.0.113.10"), [vs], served=True)


def test_an_ingress_point_stays_until_there_is_nothing_to_serve() -> None:
    vs, told = made_of(service()), service(ingress="203.0.113.10")
    assert [] == looked_at(told, [vs]), "a port of it waits for its turn, or no load balancer can be asked"
    assert [Tell(KEY, ())] == plan({KEY: told}, [vs], frozenset(), CLASS, empty=frozenset({KEY}))
    why = ("AddressConflict", "203.0.113.10:80/TCP is already served by shop/a, which is older")
    for programmed in (frozenset[Key](), frozenset({KEY})):
        refused = plan({KEY: told}, [vs], programmed, CLASS, refused={KEY: why})
        assert [Problem(KEY, "uid-1", *why), Tell(KEY, ())] == refused
    assert [Tell(KEY, ())] == [one for one in looked_at(told) if isinstance(one, Tell)], "its VirtualService is gone"
    elsewhere = service(ingress="203.0.113.99")
    assert [Tell(KEY, ())] == looked_at(elsewhere, [vs]), "that is not where it is"


def test_the_address_may_also_be_asked_for_in_the_spec() -> None:
    assert "203.0.113.11" == made_of(service(annotations={}, loadBalancerIP="203.0.113.11")).address


def test_changes_of_the_service_follow() -> None:
    vs = made_of(service())
    (action,) = looked_at(service(sessionAffinity="ClientIP"), [vs])
    assert isinstance(action, Change)
    assert "ClientIP" == action.spec["affinity"]
    (action,) = looked_at(service(ports=[{"protocol": "TCP", "port": 81, "targetPort": 8081}]), [vs])
    assert isinstance(action, Change)
    assert [{"protocol": "TCP", "port": 81, "targetPort": 8081}] == action.spec["ports"]


def test_another_address_is_another_virtual_service() -> None:
    vs = made_of(service())
    moved = service(annotations={"holdfast.dev/address": "203.0.113.12"})
    assert [Delete(KEY, "vs")] == looked_at(moved, [vs])
    assert isinstance(looked_at(moved)[0], Create)


@pytest.mark.parametrize(
    "body",
    [service(loadBalancerClass="other.example/lb"), service(loadBalancerClass=None)],
    ids=["another class", "no class"],
)
def test_other_classes_are_others_business(body: dict[str, Any]) -> None:
    assert [] == looked_at(body)
    assert [Delete(KEY, "vs")] == looked_at(body, [made_of(service())]), "but what was ours goes"
    told = {**body, "status": service(ingress="203.0.113.10")["status"]}
    assert [Tell(KEY, ()), Delete(KEY, "vs")] == looked_at(told, [made_of(service())]), "and what we said of it"
    theirs = {**body, "status": service(ingress="198.51.100.1")["status"]}
    assert [Delete(KEY, "vs")] == looked_at(theirs, [made_of(service())])


def test_a_service_that_is_gone_takes_its_own_with_it_and_no_other() -> None:
    mine = made_of(service())
    persons = nouns.virtual_service({"metadata": {"namespace": "shop", "name": "mine", "uid": "x"}})
    assert [Delete(KEY, "vs")] == plan({}, [mine, persons], frozenset(), CLASS)
    going = service()
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert [Delete(KEY, "vs")] == looked_at(going, [mine])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (service(annotations={}), "NoAddressRequested"),
        (service(loadBalancerSourceRanges=["10.0.0.0/8"]), "SourceRangesUnsupported"),
        (service(ports=[{"protocol": "SCTP", "port": 1}]), "ProtocolUnsupported"),
    ],
)
def test_what_cannot_be_honoured_is_refused_and_withdrawn(body: dict[str, Any], reason: str) -> None:
    (problem,) = looked_at(body)
    assert isinstance(problem, Problem)
    assert reason == problem.reason
    body["status"] = service(ingress="203.0.113.10")["status"]
    kinds = [type(one) for one in looked_at(body, [made_of(service())], served=True)]
    assert [Problem, Tell, Delete] == kinds


@pytest.mark.parametrize(
    "change",
    [
        {"address": "203.0.113.1O"},
        {"address": "192.0.2.7"},
        {"ports": [{"protocol": "TCP", "port": port} for port in range(1, 34)]},
    ],
    ids=["no address", "not allowed", "too many ports"],
)
def test_a_mistake_takes_nothing_away(change: dict[str, Any]) -> None:
    rules = Rules(allowed=(IPv4Network("203.0.113.0/24"),))
    address = change.pop("address", "203.0.113.10")
    body = service(ingress="203.0.113.10", annotations={"holdfast.dev/address": address}, **change)
    actions = plan({KEY: body}, [made_of(service())], frozenset({KEY}), CLASS, lambda one: why_not_address(one, rules))
    (problem,) = actions
    assert isinstance(problem, Problem)
    assert problem.reason in {"Invalid", "AddressNotAllowed", "TooManyPorts"}
    fresh = plan({KEY: body}, [], frozenset(), CLASS, lambda one: why_not_address(one, rules))
    assert [Problem, Tell] == [type(one) for one in fresh], "nor is anything made of it"


def test_what_is_wrong_with_the_virtual_service_is_said_of_its_service() -> None:
    why = ("AddressConflict", "203.0.113.10:80/TCP is already served by shop/a, which is older")
    actions = plan({KEY: service()}, [made_of(service())], frozenset(), CLASS, refused={KEY: why, ("shop", "a"): why})
    assert [Problem(KEY, "uid-1", *why)] == actions


def test_with_client_ip_the_service_says_for_how_long() -> None:
    config = {"clientIP": {"timeoutSeconds": 10_800}}
    vs = made_of(service(sessionAffinity="ClientIP", sessionAffinityConfig=config))
    assert ("ClientIP", 10_800, 10_800) == (vs.affinity, vs.idle_seconds, vs.udp_idle_seconds)
    longer = service(sessionAffinity="ClientIP", sessionAffinityConfig={"clientIP": {"timeoutSeconds": 86_400}})
    (action,) = looked_at(longer, [vs])
    assert isinstance(action, Change)
    assert 86_400 == action.spec["udpIdleTimeoutSeconds"]
    plain = made_of(service())
    assert ("None", 3_600, 60) == (plain.affinity, plain.idle_seconds, plain.udp_idle_seconds)


def test_without_client_ip_its_times_go_with_one_change() -> None:
    config = {"clientIP": {"timeoutSeconds": 10_800}}
    (action,) = looked_at(service(sessionAffinity="ClientIP", sessionAffinityConfig=config))
    assert isinstance(action, Create)
    spec = action.body["spec"]
    vs = nouns.virtual_service({**action.body, "metadata": {**action.body["metadata"], "uid": "vs"}})
    (change,) = looked_at(service(), [vs])
    assert isinstance(change, Change)
    assert (None, None) == (change.spec["idleTimeoutSeconds"], change.spec["udpIdleTimeoutSeconds"])
    merged = {name: value for name, value in {**spec, **change.spec}.items() if value is not None}
    assert made_of(service()) == msgspec.structs.replace(vs, affinity="None", idle_seconds=3_600, udp_idle_seconds=60)
    assert [] == looked_at(service(), [nouns.virtual_service({"metadata": action.body["metadata"], "spec": merged})])
    (fresh,) = looked_at(service())
    assert isinstance(fresh, Create)
    assert {"affinity", "address", "ports", "backendRef"} == fresh.body["spec"].keys()


@pytest.mark.parametrize(
    "other",
    [
        {"labels": {}},
        {"name": "web-vip"},
        {"ownerReferences": [{"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": "web", "uid": "k"}]},
        {"ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": "web", "uid": "uid-1"}]},
    ],
    ids=["label", "name", "kind", "controller"],
)
def test_an_owner_alone_does_not_make_it_ours(other: dict[str, Any]) -> None:
    persons = made_of(service(), **other)
    assert "" == persons.owner
    assert [] == plan({}, [persons], frozenset(), CLASS)


def test_what_was_made_for_a_former_service_of_that_name_goes_without_a_word() -> None:
    former, body = made_of(service()), service()
    body["metadata"]["uid"] = "uid-2"
    assert [Delete(KEY, "vs")] == looked_at(body, [former], served=True)
    assert isinstance(looked_at(body)[0], Create)


def test_a_persons_virtual_service_of_that_name_is_left_alone() -> None:
    persons = nouns.virtual_service({"metadata": {"namespace": "shop", "name": "web", "uid": "x"}})
    (problem,) = looked_at(service(), [persons], served=True)
    assert isinstance(problem, Problem)
    assert "NameTaken" == problem.reason
