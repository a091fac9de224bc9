"""What is said about a VirtualService: its status and conditions, and which changes of them are worth an event. Pure.

Decided here: the words. A status is written only where it differs, and says nothing that changes by the second: counts,
not lists, and figures of the ring as of when it was last at rest, for a change of one VIP passes through all load
balancers, and must not be written into a thousand others. How many slots track changes by the second: it is shown as it
was some seconds ago (``statuses``). An event is a transition that somebody should act upon or has
waited for; the same status twice is none.

What clients have reached once is not taken back for what is merely on its way: a port that is added or renamed waits
for its turn, while the others are served. Nor while the Planner is STARTING: it has not heard yet what load balancers
have, so what was said of them stays, unless none of them answers.

| condition | True means |
| --- | --- |
| Accepted | the spec can be served: valid, allowed, nobody older has the address |
| ResolvedRefs | the Service, its endpoints' slices and the named ports are found |
| Programmed | load balancers serve it, be it as it once was: first all of it, then any; False where none answers |
| Converged | all load balancers have in force what the spec and the endpoints say now |
| Degraded | it is served, but not as well as it could be: nothing ready, endpoints left out, the last good state |
| Ready | clients are served: Accepted, ResolvedRefs, Programmed, and load balancers have a backend for it |
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, Final

from lboperator.nouns import VirtualService
from lboperator.observe import Verdict
from lbpod.core.messages import Phase, PlannerStatus, VipStatus, place_of
from lbpod.core.model import BackendState

Status = dict[str, Any]
UNREACHABLE: Final = "NoLoadBalancers"
"""Why it is not programmed where no load balancer answers."""
NOTHING: Final = "NothingToServe"
"""Why it is not programmed where nothing of it could be served."""
TYPES: Final = ("Accepted", "ResolvedRefs", "Programmed", "Converged", "Degraded", "Ready")


@dataclass(frozen=True)
class Where:
    """How far the load balancers are. status: the Planner's newest; rest: as of when it was last at rest; in_force:
    what this VirtualService wants now is in force everywhere."""

    status: PlannerStatus
    rest: PlannerStatus
    in_force: bool
    tracking: Mapping[str, int] = field(default_factory=dict)
    """VIP name -> slots that track, as of a few seconds ago; only those of which any does."""

    @cached_property
    def newest(self) -> dict[str, VipStatus]:
        """VIPs of the newest generation, by their place."""
        return {one.place: one for one in self.status.vips}

    @cached_property
    def places(self) -> frozenset[str]:
        """Places of the VIPs that are in force."""
        return frozenset(one.place for one in self.status.in_force)

    @cached_property
    def served(self) -> dict[str, list[VipStatus]]:
        """VIPs that are in force, whatever is wanted, by the namespace/name of their VirtualService."""
        found: dict[str, list[VipStatus]] = defaultdict(list)
        for one in self.status.in_force:
            found[one.name.rpartition("/")[0]].append(one)
        return dict(found)

    @property
    def answers(self) -> bool:
        """A load balancer answers."""
        return len(self.status.lost) < self.status.lbs

    @property
    def is_known(self) -> bool:
        """What load balancers have is known, or else that none of them answers."""
        return self.status.phase is not Phase.STARTING or (self.status.lbs > 0 and not self.answers)


@dataclass(frozen=True)
class Event:
    """One Kubernetes event. is_warning: somebody should do something."""

    is_warning: bool
    reason: str
    message: str


class Lack(Enum):
    """What keeps a VirtualService that is served as it says from being served well."""

    READY = "NoReadyBackends"
    HOMES = "EndpointsLeftOut"


def what_lacks(verdict: Verdict) -> tuple[Lack, ...]:
    """What a VirtualService lacks though it is served as it says, worst first; nothing where it is not."""
    if not verdict.is_good:
        return ()
    is_any_ready = any(one.state is BackendState.READY for vip in verdict.vips for one in vip.backends)
    found = () if is_any_ready else (Lack.READY,)
    return (*found, Lack.HOMES) if verdict.homeless else found


@dataclass(frozen=True)
class _Served:
    """What load balancers have of one VirtualService. is_whole: all its ports; has_backend: somebody to serve it."""

    is_programmed: bool
    is_whole: bool
    has_backend: bool


def _served(vs: VirtualService, verdict: Verdict, where: Where, before: Status) -> _Served:
    was_programmed = _is_true(before, "Programmed")
    if not where.is_known:
        return _Served(was_programmed, is_whole=False, has_backend=_is_true(before, "Ready"))
    served = where.served.get(f"{vs.namespace}/{vs.name}", [])
    is_whole = bool(verdict.vips) and all(place_of(vip) in where.places for vip in verdict.vips)
    is_programmed = where.answers and (bool(served) if was_programmed else is_whole and where.in_force)
    return _Served(is_programmed, is_whole, any(one.ready or one.draining for one in served))


def status_of(vs: VirtualService, verdict: Verdict, where: Where, before: Status, now: str) -> Status:
    """The status as it should be. before: as it is; now: RFC 3339."""
    states: dict[bytes, BackendState] = {}
    for vip in verdict.vips:
        for one in vip.backends:
            states[one.address] = min(one.state, states.get(one.address, one.state))
    ready = sum(state is BackendState.READY for state in states.values())
    served = _served(vs, verdict, where, before)
    conditions = [
        _accepted(verdict),
        _resolved(verdict),
        _programmed(verdict, where, programmed=served.is_programmed),
        _converged(verdict, where, served),
        _degraded(verdict),
    ]
    conditions.append(_ready(conditions, len(states), has_backend=served.has_backend))
    return {
        "observedGeneration": vs.generation,
        "ports": ",".join(f"{port.port}/{port.protocol}" for port in vs.ports),
        "backends": {"ready": ready, "draining": len(states) - ready},
        **_figures(verdict, where, before),
        "conditions": [_stamped(one, before, vs.generation, now) for one in conditions],
    }


def _figures(verdict: Verdict, where: Where, before: Status) -> Status:
    """What load balancers have of it, in numbers; as it was said, where that is not known."""
    newest = [where.newest[place] for place in map(place_of, verdict.vips) if place in where.newest]
    figures = {
        "epoch": max((one.epoch for one in newest), default=0),
        "loadBalancers": {
            "ready": where.rest.lbs - len(where.rest.lost),
            "atEpoch": where.rest.lbs_at_generation,
        },
        "trackingSlots": sum(where.tracking.get(one.name, 0) for one in newest),
    }
    return figures if where.is_known else {name: before.get(name, figure) for name, figure in figures.items()}


def events_of(before: Status, after: Status) -> list[Event]:
    """What has happened between the two: one event for each condition that has turned bad, or good again."""
    found = []
    for kind in ("Accepted", "ResolvedRefs", "Degraded", "Ready"):  # the others come and go with every change
        old, new = condition_of(before, kind), condition_of(after, kind)
        assert new is not None, "a status that was made here has all conditions"
        was_bad, is_bad = old is not None and _is_bad(kind, old), _is_bad(kind, new)
        if kind == "Ready":
            # What makes it not ready has been said by another condition, but that nobody is there to serve it.
            if not is_bad and (old is None or was_bad):
                found.append(Event(False, new["reason"], new["message"]))
            elif is_bad and old is not None and not was_bad and new["reason"] == UNREACHABLE:
                found.append(Event(True, new["reason"], new["message"]))
        elif is_bad and (old is None or not was_bad or old["reason"] != new["reason"]):
            found.append(Event(True, new["reason"], new["message"]))
        elif was_bad and not is_bad and new["status"] != "Unknown" and new["reason"] != "LastGoodState":
            found.append(Event(False, f"{kind}Healed", new["message"]))
    return found


def _is_bad(kind: str, condition: Mapping[str, Any]) -> bool:
    """Somebody should do something about it, and no other condition says so."""
    if kind == "Degraded":
        return bool(condition["status"] == "True" and condition["reason"] != "LastGoodState")
    return bool(condition["status"] == "False")


# --- Conditions -------------------------------------------------------------------------------------------------------
_Said = tuple[str, str, str, str]
"""Type, status, reason, message."""


def _accepted(verdict: Verdict) -> _Said:
    message = verdict.accepted or "the spec can be served"
    return (
        "Accepted",
        _word(not verdict.accepted),
        verdict.accepted_reason.value,
        message + _kept(verdict.accepted, verdict),
    )


def _resolved(verdict: Verdict) -> _Said:
    if verdict.accepted:
        return "ResolvedRefs", "Unknown", "NotAccepted", "the spec is not accepted, so nothing was looked up"
    message = verdict.resolved or "the Service and its ports are found"
    said = message + _kept(verdict.resolved, verdict)
    return "ResolvedRefs", _word(not verdict.resolved), verdict.resolved_reason.value, said


def _kept(problem: str, verdict: Verdict) -> str:
    return "; the last good state stays in force" if problem and verdict.vips else ""


def _programmed(verdict: Verdict, where: Where, *, programmed: bool) -> _Said:
    if programmed:
        return "Programmed", "True", "Programmed", "load balancers serve it"
    status, is_starting = where.status, where.status.phase is Phase.STARTING
    # What was good last is known from load balancers alone, so while they are asked it may be more than nothing.
    if not verdict.vips and (verdict.accepted or not is_starting):
        return "Programmed", "False", NOTHING, "there is nothing of it that could be served"
    if not where.answers:
        when = "any more; what they forward goes on, if they are there" if status.lbs else "yet"
        return (
            "Programmed",
            "False",
            UNREACHABLE,
            f"no load balancer answers {when}; look at the pods of the DaemonSet, and at their nodes",
        )
    if is_starting:
        return "Programmed", "False", "Pending", "load balancers are being asked what they have"
    return "Programmed", "False", "Pending", "load balancers are being told"


def _converged(verdict: Verdict, where: Where, served: _Served) -> _Said:
    if not verdict.is_good:
        return "Converged", "False", "SpecNotServed", "the spec is not served as it is"
    if where.in_force and served.is_programmed and served.is_whole:
        return "Converged", "True", "Converged", "all load balancers have it in force"
    problem = where.status.problem
    return "Converged", "False", "Pending", problem or "load balancers are being told"


def _degraded(verdict: Verdict) -> _Said:
    if not verdict.vips:
        return "Degraded", "False", "NotServed", "it is not served at all"
    if not verdict.is_good:
        return "Degraded", "True", "LastGoodState", "the last good state is served, not the spec as it is"
    lacks = what_lacks(verdict)
    draining = {one.address for vip in verdict.vips for one in vip.backends if one.weight}
    if Lack.READY in lacks and draining:
        message = f"no endpoint is ready; {len(draining)} that terminate or are not ready get new connections, too"
        return "Degraded", "True", Lack.READY.value, message
    if Lack.READY in lacks:
        message = "the Service has no ready endpoint; look at its selector, and whether its pods are ready"
        return "Degraded", "True", Lack.READY.value, message
    if lacks:
        message = f"{verdict.homeless} endpoints are left out: no agent of Holdfast runs on their nodes"
        return "Degraded", "True", Lack.HOMES.value, message
    return "Degraded", "False", "AllGood", "nothing is missing"


def _ready(conditions: Sequence[_Said], backends_count: int, *, has_backend: bool) -> _Said:
    for kind, status, reason, message in conditions:
        if kind in {"Accepted", "ResolvedRefs", "Programmed"} and status != "True":
            return "Ready", "False", reason, message
    if not backends_count:
        return "Ready", "False", Lack.READY.value, "the Service has no ready endpoint"
    if not has_backend:
        return "Ready", "False", "Pending", "load balancers have no backend for it yet"
    return "Ready", "True", "Ready", "clients are served"


def _word(holds: bool) -> str:
    return "True" if holds else "False"


def condition_of(status: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """One condition of a status, whoever has written that; None where it has no such condition."""
    found = status.get("conditions")
    return next((one for one in found if one.get("type") == kind), None) if isinstance(found, list) else None


def _is_true(status: Mapping[str, Any], kind: str) -> bool:
    found = condition_of(status, kind)
    return found is not None and found.get("status") == "True"


def _stamped(said: _Said, before: Status, generation: int, now: str) -> dict[str, Any]:
    kind, status, reason, message = said
    old = condition_of(before, kind)
    since = old.get("lastTransitionTime") if old is not None and old.get("status") == status else None
    return {
        "type": kind,
        "status": status,
        "observedGeneration": generation,
        "lastTransitionTime": since or now,
        "reason": reason,
        "message": message,
    }
