"""Kubernetes objects, reduced to what Holdfast looks at: frozen, comparable, and small enough to keep thousands of.

Why not the bodies themselves: two bodies differ with every heartbeat of a Node and every write of a status, while what
matters has not changed; here "nothing changed" is ``==``. A body comes from the API server, which has validated it, but
not against *our* assumptions, so what is missing or odd becomes a default or is left out, and never an exception.

Decided here: what is read of each kind. What it means is ``observe``'s business.
"""

from collections.abc import Iterable, Mapping
from ipaddress import AddressValueError, IPv4Address
from typing import Any, Final

import msgspec

Body = Mapping[str, Any]
Key = tuple[str, str]
"""Namespace and name; cluster-wide objects have namespace ''."""

SERVICE_NAME_LABEL: Final = "kubernetes.io/service-name"
MANAGED_BY: Final = "app.kubernetes.io/managed-by"
OPERATOR: Final = "holdfast-operator"


class VsPort(msgspec.Struct, frozen=True):
    """One entry of spec.ports. target: a number, or the name of a port."""

    name: str
    protocol: str
    port: int
    target: int | str


class VirtualService(msgspec.Struct, frozen=True):
    """What a VirtualService wants. created: RFC 3339, so that text order is time order; owner: uid of the Service that
    it was made for, '' where a person made it."""

    namespace: str
    name: str
    uid: str
    created: str
    generation: int
    address: str
    ports: tuple[VsPort, ...]
    service: str
    affinity: str
    idle_seconds: int
    udp_idle_seconds: int
    drain_seconds: int
    owner: str = ""

    @property
    def key(self) -> Key:
        """Namespace and name."""
        return self.namespace, self.name


class ServicePort(msgspec.Struct, frozen=True):
    """One port of a Service. target: as in the Service, '' where it gives none."""

    name: str
    protocol: str
    port: int
    target: int | str


class Service(msgspec.Struct, frozen=True):
    """A Service, as far as it names ports."""

    namespace: str
    name: str
    uid: str
    kind: str
    ports: tuple[ServicePort, ...]

    @property
    def key(self) -> Key:
        """Namespace and name."""
        return self.namespace, self.name


class Endpoint(msgspec.Struct, frozen=True):
    """One endpoint of a slice. As Kubernetes means them: `ready` unset is true, `serving` unset is `ready`."""

    address: str
    node: str
    ready: bool
    serving: bool
    terminating: bool


class SlicePort(msgspec.Struct, frozen=True):
    """One port of a slice; port 0: unset, which means all ports."""

    name: str
    protocol: str
    port: int


class Slice(msgspec.Struct, frozen=True):
    """An EndpointSlice. owner: uid of the Service that it was made for, '' where nobody owns it."""

    namespace: str
    name: str
    service: str
    owner: str
    is_v4: bool
    ports: tuple[SlicePort, ...]
    endpoints: tuple[Endpoint, ...]

    @property
    def key(self) -> Key:
        """Namespace and name."""
        return self.namespace, self.name


class Node(msgspec.Struct, frozen=True):
    """A node. address: its first InternalIP that is IPv4, '' where it has none."""

    name: str
    address: str
    labels: tuple[tuple[str, str], ...]

    @property
    def key(self) -> Key:
        """Without a namespace."""
        return "", self.name


Noun = VirtualService | Service | Slice | Node


class Life(msgspec.Struct, frozen=True):
    """Which of all objects that have ever had a name, and how new what is told of it is."""

    uid: str
    version: str
    created: str

    def is_before(self, other: "Life") -> bool:
        """This tells of an object that had the name before the other one. Versions of one kind are numbers that only
        rise, as far as the API server keeps to what it always did; else the times at which they were made tell,
        unless they are equal."""
        if self.uid == other.uid:
            return False
        if _is_number(self.version) and _is_number(other.version):
            return int(self.version) < int(other.version)
        return bool(self.created) and self.created < other.created


def key_of(body: Body) -> Key:
    """Namespace and name of a body."""
    metadata = _mapping(body.get("metadata"))
    return _text(metadata.get("namespace")), _text(metadata.get("name"))


def life_of(body: Body) -> Life:
    """Of a body."""
    metadata = _mapping(body.get("metadata"))
    uid, version = _text(metadata.get("uid")), _text(metadata.get("resourceVersion"))
    return Life(uid, version, _text(metadata.get("creationTimestamp")))


def virtual_service(body: Body) -> VirtualService:
    """Defaults are the CRD's; they are there already, unless the CRD is older than we are."""
    metadata, spec = _mapping(body.get("metadata")), _mapping(body.get("spec"))
    ports = []
    for one in _mappings(spec.get("ports")):
        port, protocol = _number(one.get("port")), _text(one.get("protocol")) or "TCP"
        target = one.get("targetPort")
        name = _text(one.get("name")) or f"{protocol.lower()}-{port}"
        ports.append(VsPort(name, protocol, port, target if isinstance(target, int | str) else port))
    return VirtualService(
        namespace=_text(metadata.get("namespace")),
        name=_text(metadata.get("name")),
        uid=_text(metadata.get("uid")),
        created=_text(metadata.get("creationTimestamp")),
        generation=_number(metadata.get("generation")),
        address=_text(spec.get("address")),
        ports=tuple(ports),
        service=_text(_mapping(spec.get("backendRef")).get("name")),
        affinity=_text(spec.get("affinity")) or "None",
        idle_seconds=_number(spec.get("idleTimeoutSeconds"), 3_600),
        udp_idle_seconds=_number(spec.get("udpIdleTimeoutSeconds"), 60),
        drain_seconds=_number(spec.get("drainTimeoutSeconds"), 3_600),
        owner=_maker(metadata),
    )


def service(body: Body) -> Service:
    """Any type; only ExternalName has no endpoints."""
    metadata, spec = _mapping(body.get("metadata")), _mapping(body.get("spec"))
    ports = []
    for one in _mappings(spec.get("ports")):
        target = one.get("targetPort")
        ports.append(
            ServicePort(
                _text(one.get("name")),
                _text(one.get("protocol")) or "TCP",
                _number(one.get("port")),
                target if isinstance(target, int | str) else "",
            )
        )
    return Service(
        _text(metadata.get("namespace")),
        _text(metadata.get("name")),
        _text(metadata.get("uid")),
        _text(spec.get("type")) or "ClusterIP",
        tuple(ports),
    )


def endpoint_slice(body: Body) -> Slice:
    """Of discovery.k8s.io/v1."""
    metadata = _mapping(body.get("metadata"))
    ports = [
        SlicePort(_text(one.get("name")), _text(one.get("protocol")) or "TCP", _number(one.get("port")))
        for one in _mappings(body.get("ports"))
    ]
    return Slice(
        namespace=_text(metadata.get("namespace")),
        name=_text(metadata.get("name")),
        service=_text(_mapping(metadata.get("labels")).get(SERVICE_NAME_LABEL)),
        owner=_owner(metadata),
        is_v4=body.get("addressType") == "IPv4",
        ports=tuple(ports),
        endpoints=tuple(_endpoints(_mappings(body.get("endpoints")))),
    )


def _endpoints(found: Iterable[Body]) -> Iterable[Endpoint]:
    for one in found:
        conditions = _mapping(one.get("conditions"))
        ready = conditions.get("ready") is not False
        serving = conditions.get("serving")
        addresses = one.get("addresses")
        # All addresses of one endpoint are equivalent, and clients should use the first (KEP-4962).
        if isinstance(addresses, list) and addresses:
            yield Endpoint(
                address=_text(addresses[0]),
                node=_text(one.get("nodeName")),
                ready=ready,
                serving=serving if isinstance(serving, bool) else ready,
                terminating=conditions.get("terminating") is True,
            )


def node(body: Body) -> Node:
    """Labels are kept whole: any of them may be selected by."""
    metadata, status = _mapping(body.get("metadata")), _mapping(body.get("status"))
    addresses = [
        _text(one.get("address")) for one in _mappings(status.get("addresses")) if one.get("type") == "InternalIP"
    ]
    labels = tuple(sorted((str(name), str(value)) for name, value in _mapping(metadata.get("labels")).items()))
    return Node(_text(metadata.get("name")), next(filter(_is_ipv4, addresses), ""), labels)


def _owner(metadata: Body) -> str:
    owners = [one for one in _mappings(metadata.get("ownerReferences")) if one.get("kind") == "Service"]
    return _text(owners[0].get("uid")) if owners else ""


def _maker(metadata: Body) -> str:
    """The Service for which the operator has made this, '' where a person made it, who may have given it any owner."""
    name, labels = metadata.get("name"), _mapping(metadata.get("labels"))
    for one in _mappings(metadata.get("ownerReferences")):
        is_service = (one.get("apiVersion"), one.get("kind"), one.get("name")) == ("v1", "Service", name)
        if is_service and one.get("controller") is True and labels.get(MANAGED_BY) == OPERATOR:
            return _text(one.get("uid"))
    return ""


def _mapping(found: object) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}


def _mappings(found: object) -> list[Mapping[str, Any]]:
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list | tuple) else []


def _text(found: object) -> str:
    return found if isinstance(found, str) else ""


def _is_ipv4(text: str) -> bool:
    try:
        IPv4Address(text)
    except AddressValueError:
        return False
    return True


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _number(found: object, default: int = 0) -> int:
    return found if isinstance(found, int) and not isinstance(found, bool) else default
