"""Services of type LoadBalancer with our class: each gets a VirtualService of its own, and says where it is. Pure.

The VirtualService carries the Service's name and belongs to it (owner reference), so it goes with it; everything else,
conditions included, is as with one that a person made. A person's VirtualService is left alone, whoever owns it: ours
is what we made, and carries our label. What cannot be honoured is refused, not ignored: a Service that limits its
clients' addresses must not be open to all. But a mistyped address takes nothing away from what is served.

An ingress point is told once the VirtualService is served, and stays until there is nothing of it that could be: what
is on its way, or cannot be asked, may be served all the same, and whoever takes the point for a name (external-dns)
would take that from its clients.

Addresses are requested, not handed out: by the annotation ``holdfast.dev/address`` or by ``spec.loadBalancerIP``.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from lboperator import nouns
from lboperator.nouns import Body, Key, VirtualService

ADDRESS: Final = "holdfast.dev/address"
API_VERSION: Final = "holdfast.dev/v1alpha1"


@dataclass(frozen=True)
class Create:
    """This VirtualService is to be made."""

    body: dict[str, Any]


@dataclass(frozen=True)
class Change:
    """The spec of this one is to be so. None: without that, for a merge patch keeps what it does not name."""

    key: Key
    spec: dict[str, Any]


@dataclass(frozen=True)
class Delete:
    """This one is not wanted any more; uid: of that one, and no other of its name."""

    key: Key
    uid: str


@dataclass(frozen=True)
class Tell:
    """The status of this Service is to list these ingress points."""

    key: Key
    ingress: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """This Service cannot be served."""

    key: Key
    uid: str
    reason: str
    sentence: str


Action = Create | Change | Delete | Tell | Problem
Why = tuple[str, str]
"""A reason and a sentence."""
WhyNot = Callable[[str], Why | None]
_FOLLOWED: Final = ("ports", "service", "affinity", "idle_seconds", "udp_idle_seconds")
_TIMEOUTS: Final = ("idleTimeoutSeconds", "udpIdleTimeoutSeconds")
_PORTS_MAX: Final = 32
"""As the CRD has it."""


def plan(
    services: Mapping[Key, Body],
    virtual_services: Iterable[VirtualService],
    programmed: frozenset[Key],
    load_balancer_class: str,
    why_not: WhyNot = lambda _: None,
    refused: Mapping[Key, Why] = MappingProxyType({}),
    empty: frozenset[Key] = frozenset(),
) -> list[Action]:
    """What is to be done, from all Services of type LoadBalancer. programmed: VirtualServices that are being served;
    why_not: what is wrong with an address; refused: VirtualServices that are not accepted; empty: those of which there
    is nothing to serve."""
    there = {vs.key: vs for vs in virtual_services}
    actions: list[Action] = []
    kept: set[Key] = set()
    for key in sorted(services):
        body = services[key]
        spec, metadata = body["spec"], body["metadata"]
        uid, had = metadata.get("uid", ""), there.get(key)
        if spec.get("loadBalancerClass") != load_balancer_class or metadata.get("deletionTimestamp"):
            if had is not None and had.owner == uid and _ingress(body) == (had.address,):
                actions.append(Tell(key, ()))  # what we have said there is not true any more
            continue
        sentence = _why_not(body) or _why_taken(key, had)
        if not sentence and had is not None and had.owner != uid:
            continue  # made for a Service that had this name before: it goes, and the next look makes another one
        mistake = None if sentence else _why_not_yet(body, why_not)
        why = sentence or mistake or refused.get(key)
        if why:
            actions.append(Problem(key, uid, *why))
        if not sentence:
            kept.add(key)
        if not sentence and not mistake:
            actions.extend(_serve(_virtual_service(body), had))
        ingress: tuple[str, ...] = ()
        if had is not None and not (sentence or key in refused or key in empty):
            ingress = (had.address,) if key in programmed or had.address in _ingress(body) else ()
        if ingress != _ingress(body):
            actions.append(Tell(key, ingress))
    mine = [vs for vs in there.values() if vs.owner and vs.key not in kept]
    actions.extend(Delete(vs.key, vs.uid) for vs in sorted(mine, key=lambda vs: vs.key))
    return actions


def _serve(wanted: dict[str, Any], had: VirtualService | None) -> list[Action]:
    if had is None:
        return [Create(wanted)]
    made = nouns.virtual_service(wanted)
    if made.address != had.address:
        return [Delete(had.key, had.uid)]  # an address stays for life; the next look makes another one
    same = all(getattr(made, name) == getattr(had, name) for name in _FOLLOWED)
    return [] if same else [Change(had.key, {**dict.fromkeys(_TIMEOUTS), **wanted["spec"]})]


def _why_not_yet(body: Body, why_not: WhyNot) -> Why | None:
    """What is wrong with what is asked for; what there was before stays."""
    count = len(body["spec"].get("ports") or ())
    if count > _PORTS_MAX:
        return "TooManyPorts", f"{count} ports are more than the {_PORTS_MAX} that one VirtualService may have; use two"
    return why_not(_address(body))


def _why_not(body: Body) -> Why | None:
    spec = body["spec"]
    if not _address(body):
        sentence = f"no address is requested; set the annotation {ADDRESS}, for Holdfast hands none out"
        return "NoAddressRequested", sentence
    if spec.get("loadBalancerSourceRanges"):
        return "SourceRangesUnsupported", "loadBalancerSourceRanges cannot be honoured, so the Service is not served"
    odd = sorted({str(port.get("protocol")) for port in spec.get("ports", ())} - {"TCP", "UDP", "None"})
    if odd:
        return "ProtocolUnsupported", f"{', '.join(odd)} cannot be served; use TCP or UDP"
    return None


def _why_taken(key: Key, had: VirtualService | None) -> Why | None:
    if had is None or had.owner:
        return None
    return "NameTaken", f"there is a VirtualService {key[0]}/{key[1]} that is not this Service's; rename or remove it"


def _address(body: Body) -> str:
    annotations = body["metadata"].get("annotations") or {}
    return str(annotations.get(ADDRESS) or body["spec"].get("loadBalancerIP") or "")


def _ingress(body: Body) -> tuple[str, ...]:
    found = ((body.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
    return tuple(str(one.get("ip", "")) for one in found)


def _virtual_service(body: Body) -> dict[str, Any]:
    metadata, spec = body["metadata"], body["spec"]
    ports = []
    for one in spec.get("ports", ()):
        port = {
            "protocol": one.get("protocol", "TCP"),
            "port": one["port"],
            "targetPort": one.get("targetPort", one["port"]),
        }
        ports.append({"name": one["name"], **port} if one.get("name") else port)
    return {
        "apiVersion": API_VERSION,
        "kind": "VirtualService",
        "metadata": {
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "labels": {nouns.MANAGED_BY: nouns.OPERATOR},
            "ownerReferences": [
                {
                    "apiVersion": "v1",
                    "kind": "Service",
                    "name": metadata["name"],
                    "uid": metadata["uid"],
                    "controller": True,
                    "blockOwnerDeletion": False,
                }
            ],
        },
        "spec": {
            "address": _address(body),
            "ports": ports,
            "backendRef": {"name": metadata["name"]},
            **_affinity(spec),
        },
    }


def _affinity(spec: Body) -> Body:
    """With ClientIP, how long a silent client stays with its backend is the Service's to say."""
    if spec.get("sessionAffinity") != "ClientIP":
        return {"affinity": "None"}
    seconds = ((spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}).get("timeoutSeconds")
    return {"affinity": "ClientIP", **(dict.fromkeys(_TIMEOUTS, seconds) if seconds else {})}
