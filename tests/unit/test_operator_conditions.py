"""Status, conditions and events: what users read of a VirtualService, word by word, and that the same state twice is
neither a new status nor an event."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from lboperator import nouns
from lboperator.conditions import TYPES, Event, Lack, Where, events_of, status_of, what_lacks
from lboperator.observe import Reason, Verdict
from lboperator.statuses import tracking_of
from lbpod.core.messages import Phase, PlannerStatus, VipStatus, place_of
from lbpod.core.model import Affinity, BackendState, Protocol, WorldBackend, WorldVip, parse_address
from tests.operator_objects import virtual_service

T1, T2 = "2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"
VS = nouns.virtual_service(virtual_service(generation=3))


def vip(ready: int = 2, draining: int = 0) -> WorldVip:
    states = [BackendState.READY] * ready + [BackendState.DRAINING] * draining
    backends = tuple(
        WorldBackend(parse_address(f"10.1.0.{last}"), 8080, "n1", 1, state)
        for last, state in enumerate(states, start=1)
    )
    address = parse_address("203.0.113.10")
    return WorldVip("shop/web/http", address, 80, Protocol.TCP, Affinity.NONE, 1, 1, backends)


HTTP = VipStatus("shop/web/http", 16, 2, 0, 7, "203.0.113.10:80/TCP")
REST = PlannerStatus(Phase.IDLE, 17, 3, 3, (), "", 1, (HTTP,), ("n1", "n2", "n3"), in_force=(HTTP,))
CHANGING = PlannerStatus(Phase.PREPARING, 18, 3, 0, ("n2",), "waiting for n2", 1, (HTTP,), in_force=(HTTP,))
STARTING = PlannerStatus(Phase.STARTING, 0, 3, 0, (), "", 0, ())
GOOD = Verdict(vips=(vip(),))


def said(verdict: Verdict, before: dict[str, Any] | None = None, now: str = T1, **where: Any) -> dict[str, Any]:
    stand = replace(Where(REST, REST, True), **where)
    return status_of(VS, verdict, stand, before or {}, now)


def another_port(name: str, port: int, backends: tuple[WorldBackend, ...] | None = None) -> WorldVip:
    one = vip()
    backends = one.backends if backends is None else backends
    return msgspec.structs.replace(one, name=name, port=port, backends=backends)


def words(status: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {one["type"]: (one["status"], one["reason"]) for one in status["conditions"]}


def test_all_is_well() -> None:
    status = said(GOOD)
    conditions = status.pop("conditions")
    assert {
        "observedGeneration": 3,
        "epoch": 16,
        "ports": "80/TCP",
        "backends": {"ready": 2, "draining": 0},
        "loadBalancers": {"ready": 3, "atEpoch": 3},
        "trackingSlots": 0,
    } == status
    assert list(TYPES) == [one["type"] for one in conditions]
    assert [("True", 3, T1)] * 4 + [("False", 3, T1), ("True", 3, T1)] == [
        (one["status"], one["observedGeneration"], one["lastTransitionTime"]) for one in conditions
    ]
    assert [Event(False, "Ready", "clients are served")] == events_of({}, {"conditions": conditions})


def test_the_same_state_is_the_same_status_and_no_event() -> None:
    first = said(GOOD)
    again = said(GOOD, first, T2)
    assert first == again
    assert [] == events_of(first, again)


def test_backends_of_several_ports_count_once() -> None:
    other = vip(1, 1)
    both = Verdict(vips=(vip(2), another_port("shop/web/x", 81, other.backends)))
    assert {"ready": 2, "draining": 0} == said(both)["backends"]


@pytest.mark.parametrize(
    ("verdict", "wanted"),
    [
        (
            Verdict(Reason.CONFLICT, "203.0.113.10:80/TCP is already served by a/b"),
            {
                "Accepted": ("False", "AddressConflict"),
                "ResolvedRefs": ("Unknown", "NotAccepted"),
                "Programmed": ("False", "NothingToServe"),
                "Converged": ("False", "SpecNotServed"),
                "Degraded": ("False", "NotServed"),
                "Ready": ("False", "AddressConflict"),
            },
        ),
        (
            Verdict(resolved_reason=Reason.NO_SERVICE, resolved="there is no Service", vips=(vip(),)),
            {
                "Accepted": ("True", "Accepted"),
                "ResolvedRefs": ("False", "ServiceNotFound"),
                "Programmed": ("True", "Programmed"),
                "Converged": ("False", "SpecNotServed"),
                "Degraded": ("True", "LastGoodState"),
                "Ready": ("False", "ServiceNotFound"),
            },
        ),
        (
            Verdict(vips=(vip(0, 2),)),
            {
                "Accepted": ("True", "Accepted"),
                "ResolvedRefs": ("True", "ResolvedRefs"),
                "Programmed": ("True", "Programmed"),
                "Converged": ("True", "Converged"),
                "Degraded": ("True", "NoReadyBackends"),
                "Ready": ("True", "Ready"),
            },
        ),
        (
            Verdict(vips=(vip(0, 0),)),
            {
                "Accepted": ("True", "Accepted"),
                "ResolvedRefs": ("True", "ResolvedRefs"),
                "Programmed": ("True", "Programmed"),
                "Converged": ("True", "Converged"),
                "Degraded": ("True", "NoReadyBackends"),
                "Ready": ("False", "NoReadyBackends"),
            },
        ),
    ],
    ids=["conflict", "no service", "all draining", "nobody"],
)
def test_what_is_wrong_is_said_by_the_condition_that_it_belongs_to(
    verdict: Verdict, wanted: dict[str, tuple[str, str]]
) -> None:
    assert wanted == words(said(verdict))


def test_where_nothing_is_ready_those_are_counted_that_get_new_connections() -> None:
    one, other = vip(0, 2).backends
    mute = msgspec.structs.replace(other, weight=0)
    status = said(Verdict(vips=(msgspec.structs.replace(vip(0), backends=(one, mute)),)))
    (degraded,) = [each for each in status["conditions"] if each["type"] == "Degraded"]
    assert "no endpoint is ready; 1 that terminate or are not ready get new connections, too" == degraded["message"]
    assert {"ready": 0, "draining": 2} == status["backends"]


def test_endpoints_that_are_left_out_degrade_and_no_more() -> None:
    status = said(Verdict(vips=(vip(),), homeless=2))
    assert ("True", "EndpointsLeftOut") == words(status)["Degraded"]
    assert ("True", "Ready") == words(status)["Ready"]
    assert any("2 endpoints are left out" in one.message for one in events_of({}, status))


def test_the_last_good_state_is_mentioned_where_it_stays() -> None:
    def message(vips: tuple[WorldVip, ...]) -> str:
        status = said(Verdict(Reason.INVALID, "affinity X is not known; use None", vips=vips))
        return str(status["conditions"][0]["message"])

    assert "affinity X is not known; use None; the last good state stays in force" == message((vip(),))
    assert "affinity X is not known; use None" == message(())


def test_a_change_on_its_way_is_not_converged_and_serves_on() -> None:
    before = said(GOOD)
    status = said(GOOD, before, T2, status=CHANGING, in_force=False)
    assert ("True", "Programmed") == words(status)["Programmed"]
    assert ("False", "Pending") == words(status)["Converged"]
    assert ("True", "Ready") == words(status)["Ready"]
    assert {"ready": 3, "atEpoch": 3} == status["loadBalancers"], "as of the last rest"
    converged = next(one for one in status["conditions"] if one["type"] == "Converged")
    assert ("waiting for n2", T2) == (converged["message"], converged["lastTransitionTime"])
    assert [] == events_of(before, status), "this comes and goes with every change"


@pytest.mark.parametrize(
    "wanted",
    [
        (vip(), another_port("shop/web/alt", 81)),
        (another_port("shop/web/web", 80),),
        (another_port("shop/web/http", 81),),
    ],
    ids=["one more port", "another name", "another port"],
)
def test_a_port_that_waits_for_its_turn_takes_nothing_from_what_is_served(wanted: tuple[WorldVip, ...]) -> None:
    good = said(GOOD)
    status = said(Verdict(vips=wanted), good, T2, status=CHANGING, in_force=False)
    expected = {**words(good), "Converged": ("False", "Pending")}
    assert expected == words(status)
    assert [] == events_of(good, status)
    in_force = tuple(VipStatus(one.name, 18, 2, 0, 7, place_of(one)) for one in wanted)
    done = msgspec.structs.replace(REST, vips=in_force, in_force=in_force)
    assert words(good) == words(said(Verdict(vips=wanted), status, T2, status=done))


def test_it_is_programmed_for_the_first_time_once_all_its_ports_are_in_force() -> None:
    both = Verdict(vips=(vip(), another_port("shop/web/alt", 81)))
    assert ("False", "Pending") == words(said(both, status=CHANGING, in_force=False))["Programmed"]
    assert ("False", "Pending") == words(said(both, status=CHANGING))["Programmed"], "whatever the World's number says"
    two = (HTTP, VipStatus("shop/web/alt", 18, 2, 0, 8, "203.0.113.10:81/TCP"))
    assert ("True", "Programmed") == words(said(both, status=msgspec.structs.replace(REST, in_force=two)))["Programmed"]


def test_what_is_not_served_any_more_is_not_programmed() -> None:
    gone = msgspec.structs.replace(REST, vips=(), in_force=())
    status = said(GOOD, said(GOOD), T2, status=gone, in_force=False)
    assert {"Programmed": ("False", "Pending"), "Ready": ("False", "Pending")} == {
        kind: words(status)[kind] for kind in ("Programmed", "Ready")
    }


def test_while_load_balancers_are_asked_what_they_have_nothing_is_taken_back() -> None:
    good = said(GOOD)
    status = said(GOOD, good, T2, status=STARTING, rest=STARTING, in_force=False)
    assert {**words(good), "Converged": ("False", "Pending")} == words(status)
    assert [good[name] for name in ("epoch", "loadBalancers", "trackingSlots")] == [
        status[name] for name in ("epoch", "loadBalancers", "trackingSlots")
    ]
    fresh = said(GOOD, status=STARTING, rest=STARTING, in_force=False)
    assert ("False", "Pending") == words(fresh)["Programmed"], "nor is anything promised"
    unknown = Verdict(resolved_reason=Reason.NO_SLICES, resolved="it has no slice")
    status = said(unknown, good, T2, status=STARTING, rest=STARTING, in_force=False)
    assert ("True", "Programmed") == words(status)["Programmed"], "the last good state is not known yet"
    mute = msgspec.structs.replace(STARTING, lost=("n1", "n2", "n3"))
    for verdict in (GOOD, unknown):
        for before in (good, said(verdict, good, T2, status=mute, rest=mute, in_force=False)):
            status = said(verdict, before, T2, status=mute, rest=mute, in_force=False)
            assert ("False", "NoLoadBalancers") == words(status)["Programmed"]
    taken = said(Verdict(Reason.CONFLICT, "taken"), good, T2, status=mute, rest=mute, in_force=False)
    assert ("False", "NothingToServe") == words(taken)["Programmed"], "that is no load balancer's to say"


def test_clients_are_served_once_load_balancers_have_a_backend() -> None:
    empty = msgspec.structs.replace(HTTP, ready=0)
    before = said(Verdict(vips=(vip(0),)), status=msgspec.structs.replace(REST, vips=(empty,), in_force=(empty,)))
    assert ("False", "NoReadyBackends") == words(before)["Ready"]
    staged = msgspec.structs.replace(CHANGING, in_force=(empty,))
    status = said(GOOD, before, T2, status=staged, in_force=False)
    assert {"Programmed": ("True", "Programmed"), "Ready": ("False", "Pending")} == {
        kind: words(status)[kind] for kind in ("Programmed", "Ready")
    }
    assert ["DegradedHealed"] == [one.reason for one in events_of(before, status)]
    status = said(GOOD, status, T2, status=CHANGING, in_force=False)
    assert ("True", "Ready") == words(status)["Ready"], "others may still wait"


def test_nothing_is_programmed_before_it_was_in_force_once() -> None:
    begun = PlannerStatus(Phase.STAGING, 1, 3, 0, (), "", 0, REST.vips, in_force=REST.vips)
    status = said(GOOD, status=begun, rest=begun, in_force=False)
    assert {"Programmed": ("False", "Pending"), "Ready": ("False", "Pending")} == {
        kind: words(status)[kind] for kind in ("Programmed", "Ready")
    }
    nobody = PlannerStatus(Phase.STARTING, 0, 0, 0, (), "", 0, ())
    status = said(GOOD, status=nobody, rest=nobody, in_force=False)
    assert ("False", "Pending") == words(status)["Converged"]
    assert 0 == status["epoch"]


def test_where_no_load_balancer_answers_nobody_is_told_that_clients_are_served() -> None:
    lost = msgspec.structs.replace(REST, lost=("n1", "n2", "n3"))
    good = said(GOOD)
    status = said(GOOD, good, T2, status=lost)
    assert {
        **{kind: words(good)[kind] for kind in ("Accepted", "ResolvedRefs", "Degraded")},
        "Programmed": ("False", "NoLoadBalancers"),
        "Converged": ("False", "Pending"),
        "Ready": ("False", "NoLoadBalancers"),
    } == words(status)
    (event,) = events_of(good, status)
    assert (True, "NoLoadBalancers") == (event.is_warning, event.reason)
    assert [] == events_of(status, said(GOOD, status, T2, status=lost))
    assert [Event(False, "Ready", "clients are served")] == events_of(status, said(GOOD, status, T2))
    assert words(good) == words(said(GOOD, good, T2, status=msgspec.structs.replace(REST, lost=("n1", "n2")))), (
        "one is left"
    )


def test_before_any_load_balancer_has_answered_no_event_says_so() -> None:
    status = said(GOOD, status=msgspec.structs.replace(REST, lbs=0))
    assert ("False", "NoLoadBalancers") == words(status)["Programmed"]
    assert [] == events_of({}, status)


def test_what_lacks_is_counted_where_it_is_served_as_it_says() -> None:
    assert () == what_lacks(GOOD)
    assert (Lack.READY,) == what_lacks(Verdict(vips=(vip(0, 2),)))
    assert (Lack.READY, Lack.HOMES) == what_lacks(Verdict(vips=(vip(0),), homeless=2))
    assert (Lack.HOMES,) == what_lacks(Verdict(vips=(vip(),), homeless=1))
    assert () == what_lacks(Verdict(Reason.CONFLICT, "taken", vips=(vip(0),))), "that is not served as it says"


def test_events_are_transitions() -> None:
    good = said(GOOD)
    missing = said(
        Verdict(resolved_reason=Reason.NO_SERVICE, resolved="there is no Service a", vips=(vip(),)), good, T2
    )
    assert [
        Event(True, "ServiceNotFound", "there is no Service a; the last good state stays in force"),
    ] == events_of(good, missing)
    other = said(Verdict(resolved_reason=Reason.NO_PORT, resolved="no port b", vips=(vip(),)), missing, T2)
    assert ["PortNotFound"] == [one.reason for one in events_of(missing, other)]
    healed = said(GOOD, other, T2)
    assert [(False, "ResolvedRefsHealed"), (False, "Ready")] == [
        (one.is_warning, one.reason) for one in events_of(other, healed)
    ]


def test_tracking_slots_are_those_of_its_ports_where_most_track() -> None:
    status = msgspec.structs.replace(REST, vips=(HTTP, VipStatus("shop/web/x", 16, 2, 0, 9, "203.0.113.10:81/TCP")))
    tracking = tracking_of(status, {"n1": {7: 10, 8: 5}, "n2": {7: 12, 9: 1}, "n3": {}})
    assert {"shop/web/http": 12, "shop/web/x": 1} == tracking
    other = vip(1, 1)
    both = Verdict(vips=(vip(2), another_port("shop/web/x", 81, other.backends)))
    assert 13 == said(both, status=status, tracking=tracking)["trackingSlots"]
    assert {} == tracking_of(status, {})
