"""The file of the standalone controller: VirtualServices as in Kubernetes, beside backends and nodes, to a World.

One or several YAML documents: one with ``cluster``, ``tls``, ``nodes`` and ``backends`` (what Kubernetes would
otherwise know), and VirtualServices exactly as their CRD has them, as documents of their own or under
``virtualServices``. ``examples/standalone.yaml`` shows all of it.

Decided here: what each field means, its default, and what is refused; always the first mistake, in one sentence with
file, line and field. A file is used whole or not at all. Left to others: reading YAML (``marks``), watching the file
and keeping the last good state (``driver``, ``lookout``), ids and limits of a cluster (``core.snapshot``)."""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lbpod.certs import NODE_NAME_RULE, TlsFiles, files_in, is_node_name
from lbpod.core.errors import SnapshotError
from lbpod.core.limits import (
    BACKENDS_MAX,
    CONFIG_BYTES_MAX,
    DRAIN_TIMEOUT_SECONDS_DEFAULT,
    DRAIN_TIMEOUT_SECONDS_MAX,
    IDLE_TIMEOUT_SECONDS_DEFAULT,
    IDLE_TIMEOUT_SECONDS_MAX,
    IDLE_TIMEOUT_SECONDS_MIN,
    NAME_BYTES_MAX,
    UDP_IDLE_TIMEOUT_SECONDS_DEFAULT,
    VNI_MAX,
    WEIGHT_MAX,
)
from lbpod.core.model import (
    Affinity,
    BackendState,
    Cluster,
    Protocol,
    World,
    WorldBackend,
    WorldNode,
    WorldVip,
    format_address,
)
from lbpod.core.snapshot import check_world, endpoint
from lbpod.standalone.lookout import Sight, look_at
from lbpod.standalone.marks import ConfigError, Value, documents

API_VERSION: Final = "holdfast.dev/v1alpha1"
KIND: Final = "VirtualService"
AGENT_PORT: Final = 9900
"""Where an agent listens unless told otherwise."""
NAMESPACE_DEFAULT: Final = "default"

_METADATA: Final = (
    "namespace",
    *("annotations", "creationTimestamp", "deletionGracePeriodSeconds", "deletionTimestamp", "finalizers"),
    *("generateName", "generation", "labels", "managedFields", "ownerReferences", "resourceVersion", "selfLink", "uid"),
)
"""Beside the name. All but the first mean nothing here; an object exported from Kubernetes has them."""

_SECOND_NS: Final = 1_000_000_000
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_HOST: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?")
"""A name or an IPv4 address; it becomes part of a URL."""
_PROTOCOLS: Final = {"TCP": Protocol.TCP, "UDP": Protocol.UDP}
_AFFINITIES: Final = {"None": Affinity.NONE, "ClientIP": Affinity.CLIENT_IP}
_STATES: Final = {"ready": BackendState.READY, "draining": BackendState.DRAINING}


@dataclass(frozen=True)
class Settings:
    """What is not part of the World. It cannot change while the controller runs."""

    cluster: Cluster
    tls: TlsFiles
    state: Path
    """Where the controller writes its generation down."""


@dataclass(frozen=True)
class _Backend:
    """One entry of ``backends``, before a VIP's port says which of its ports is meant."""

    at: Value
    address: bytes
    node: str
    weight: int
    state: BackendState
    port: int | None
    ports: dict[str, int]
    names: dict[str, Value]
    """Where each of ``ports`` stands."""


@dataclass(frozen=True)
class _Port:
    """One entry of ``spec.ports``. target: a number, or the name of a backend's port; is_given: it was written down,
    and not just taken from the VIP's port."""

    at: Value
    name: str
    protocol: Protocol
    port: int
    target: int | str
    is_given: bool


def load(path: Path) -> tuple[World, Settings]:
    """The file's World and settings. Raises ConfigError."""
    return read(path, look_at(path))


def read(path: Path, sight: Sight) -> tuple[World, Settings]:
    """The same of what a look at the file has found. Raises ConfigError."""
    data = sight.data
    if sight.error:
        raise ConfigError(f"{path}: cannot be read: {sight.error}")
    if len(data) > CONFIG_BYTES_MAX:
        raise ConfigError(f"{path}:1: the file is larger than {CONFIG_BYTES_MAX} bytes; take something out")
    if data and not data.endswith(b"\n"):
        line = data.count(b"\n") + 1
        raise ConfigError(
            f"{path}:{line}: the last line does not end, so the file may be half written; end it with a newline"
        )
    return parse(str(path), data, path.parent)


def check(path: Path) -> int:
    """`holdfast check FILE`: 0 and a summary on standard output, or 2 and a sentence on standard error."""
    try:
        world, _ = load(path)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    backends_count = sum(len(vip.backends) for vip in world.vips)
    lbs_count = sum(node.lb for node in world.nodes)
    nodes = f"{len(world.nodes)} nodes, {lbs_count} of them LBs"
    sys.stdout.write(f"{path}: good: {len(world.vips)} VIPs, {backends_count} backends, {nodes}\n")
    return 0


def parse(file: str, data: bytes, folder: Path) -> tuple[World, Settings]:
    """As ``load``, from bytes. file: for the sentences; folder: what relative paths are relative to."""
    main: Value | None = None
    services: list[Value] = []
    for document in documents(file, data):
        if document.is_list:
            services.extend(document.items())
        elif document.is_mapping and document.mapping().keys() & {"apiVersion", "kind"}:
            services.append(document)
        elif main is not None:
            raise document.error(f"a second document with settings; the first begins on line {main.line}")
        else:
            main = document
    if main is None:
        raise ConfigError(f"{file}:1: there is no document with cluster, tls, nodes and backends in it")
    required = {
        "cluster": "give vni and seed",
        "tls": "name the folder that `holdfast certs` made",
        "nodes": "list the nodes",
        "backends": "list the backends of each Service",
    }
    fields = main.fields(required, ("state", "virtualServices"))
    services.extend(fields["virtualServices"].items() if "virtualServices" in fields else ())
    settings = Settings(
        _cluster(fields["cluster"]),
        _tls(fields["tls"], folder),
        folder / (fields["state"].text() if "state" in fields else f"{Path(file).name}.state"),
    )
    nodes = _nodes(fields["nodes"])
    backends = _all_backends(fields["backends"], {node.name for node in nodes})
    world = World(nodes, _all_vips(services, nodes, backends))
    try:
        check_world(world)
    except SnapshotError as error:
        raise main.error(str(error)) from error
    return world, settings


# --- The settings document --------------------------------------------------------------------------------------------
def _cluster(at: Value) -> Cluster:
    fields = at.fields({"vni": "choose a number of your own", "seed": "choose a random number"})
    return Cluster(fields["vni"].integer(0, VNI_MAX, "a VNI"), fields["seed"].integer(0, 0xFFFF_FFFF, "a seed"))


def _tls(at: Value, folder: Path) -> TlsFiles:
    if not at.is_mapping:
        return files_in(folder / at.text(), "controller")
    fields = at.fields(dict.fromkeys(("ca", "certificate", "key"), "name the file"))
    return TlsFiles(*(folder / fields[name].text() for name in ("ca", "certificate", "key")))


def _nodes(at: Value) -> tuple[WorldNode, ...]:
    nodes: dict[str, WorldNode] = {}
    places: dict[bytes, str] = {}
    for one in at.items():
        required = {"name": "give the node's name", "address": "give the node's address"}
        fields = one.fields(required, ("control", "lb"))
        name = fields["name"].text()
        if not is_node_name(name):
            raise fields["name"].error(f"{name} is not a name for a node; use {NODE_NAME_RULE}")
        address = fields["address"].address()
        control = _control(fields["control"]) if "control" in fields else f"{format_address(address)}:{AGENT_PORT}"
        if name in nodes:
            raise fields["name"].error(f"{name} is listed twice; remove one")
        if address in places:
            raise fields["address"].error(f"{format_address(address)} is already the address of {places[address]}")
        places[address] = name
        nodes[name] = WorldNode(name, address, control, fields["lb"].yes_or_no() if "lb" in fields else False)
    if not any(node.lb for node in nodes.values()):
        raise at.error("no node is an LB; set lb: true for those that are")
    return tuple(nodes.values())


def _control(at: Value) -> str:
    host, colon, port = (text := at.text()).rpartition(":")
    is_port = port.isascii() and port.isdecimal() and len(port) < 6 and 1 <= int(port) <= 65_535
    if not colon or not is_port or not _HOST.fullmatch(host) or len(host) > NAME_BYTES_MAX:
        raise at.error(f"{text} is not of the form host:port")
    return text


def _all_backends(at: Value, nodes: set[str]) -> dict[str, list[_Backend]]:
    services: dict[str, list[_Backend]] = {}
    for key, value in at.mapping().items():
        name = key if "/" in key else f"{NAMESPACE_DEFAULT}/{key}"
        if not re.fullmatch(rf"{_NAME.pattern}/{_NAME.pattern}", name):
            raise value.error(f"{key} is not the name of a Service; use namespace/name")
        if name in services:
            raise value.error(f"{name} is listed twice; put its backends into one list")
        services[name] = [_backend(one, nodes) for one in value.items()]
    return services


def _backend(at: Value, nodes: set[str]) -> _Backend:
    required = {"address": "give the backend's address", "node": "name the node that it runs on"}
    fields = at.fields(required, ("port", "ports", "weight", "state"))
    if "port" in fields and "ports" in fields:
        raise fields["ports"].error("give either port or ports, not both")
    node = fields["node"].text()
    if node not in nodes:
        raise fields["node"].error(f"{node} is not one of the nodes; list it there, or correct the name")
    ports = fields["ports"].mapping() if "ports" in fields else {}
    return _Backend(
        at=at,
        address=fields["address"].address(),
        node=node,
        weight=fields["weight"].integer(0, WEIGHT_MAX, "a weight") if "weight" in fields else 1,
        state=BackendState(fields["state"].choice(_STATES)) if "state" in fields else BackendState.READY,
        port=fields["port"].port() if "port" in fields else None,
        ports={name: value.port() for name, value in ports.items()},
        names=ports,
    )


# --- VirtualServices --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Known:
    """What a VirtualService is read against; the last two grow with each that has been read."""

    backends: dict[str, list[_Backend]]
    owners: dict[bytes, str]
    """Whose an address is, of nodes and backends."""
    described: dict[str, int] = field(default_factory=dict)
    """Line of each VirtualService."""
    meant: dict[str, set[str]] = field(default_factory=dict)
    """Names that a backend's port may have, by Service."""


def _all_vips(
    services: list[Value], nodes: tuple[WorldNode, ...], backends: dict[str, list[_Backend]]
) -> tuple[WorldVip, ...]:
    vips: list[WorldVip] = []
    seen: dict[str, tuple[str, int]] = {}
    backends_count = 0
    owners = {one.address: f"a backend of {service}" for service, listed in backends.items() for one in listed}
    known = _Known(backends, owners | {node.address: f"the node {node.name}" for node in nodes})
    for service in services:
        for at, vip in _vips(service, known):
            where = endpoint(vip)
            if where in seen:
                name, line = seen[where]
                raise at.error(f"{where} is already served by {name} (line {line}); a VIP is served once")
            seen[where] = (vip.name, at.line)
            backends_count += len(vip.backends)
            if backends_count > BACKENDS_MAX:
                raise at.error(f"with the backends of this port there are {backends_count}; the most is {BACKENDS_MAX}")
            vips.append(vip)
    _check_port_names(known)
    return tuple(vips)


def _vips(at: Value, known: _Known) -> list[tuple[Value, WorldVip]]:
    """Each port of a VirtualService, and where it stands."""
    required = {
        "apiVersion": f"use {API_VERSION}",
        "kind": f"use {KIND}",
        "metadata": "give a name",
        "spec": "describe it",
    }
    fields = at.fields(required, ("status",))
    for one, wanted in (("apiVersion", API_VERSION), ("kind", KIND)):
        if fields[one].text() != wanted:
            raise fields[one].error(f"{fields[one].text()} is not known; use {wanted}")
    metadata = fields["metadata"].fields({"name": "give the VirtualService one"}, _METADATA)
    namespace = _name(metadata["namespace"]) if "namespace" in metadata else NAMESPACE_DEFAULT
    name = f"{namespace}/{_name(metadata['name'])}"
    if name in known.described:
        raise metadata["name"].error(f"{name} is already described on line {known.described[name]}; remove one")
    known.described[name] = metadata["name"].line
    spec_required = {
        "address": "give the VIP",
        "ports": "list the ports that are served",
        "backendRef": "name the Service whose backends serve it",
    }
    timeouts = ("idleTimeoutSeconds", "udpIdleTimeoutSeconds", "drainTimeoutSeconds")
    spec = fields["spec"].fields(spec_required, ("affinity", *timeouts))
    address = spec["address"].address()
    if address in known.owners:
        whose = known.owners[address]
        raise spec["address"].error(f"{format_address(address)} is {whose}; a VIP is the address of no machine")
    reference = spec["backendRef"].fields({"name": "name the Service"})["name"]
    service = f"{namespace}/{reference.text()}"
    if service not in known.backends:
        raise reference.error(f"no backends are listed for {service}; list them under backends (an empty list will do)")
    affinity = Affinity(spec["affinity"].choice(_AFFINITIES)) if "affinity" in spec else Affinity.NONE
    idle_ns = {
        Protocol.TCP: _seconds(spec, timeouts[0], IDLE_TIMEOUT_SECONDS_DEFAULT),
        Protocol.UDP: _seconds(spec, timeouts[1], UDP_IDLE_TIMEOUT_SECONDS_DEFAULT),
    }
    drain_ns = _seconds(spec, timeouts[2], DRAIN_TIMEOUT_SECONDS_DEFAULT, 0, DRAIN_TIMEOUT_SECONDS_MAX)
    ports = _ports(spec["ports"])
    known.meant.setdefault(service, set()).update(*({one.name, str(one.target)} for one in ports))
    return [
        (
            port.at,
            WorldVip(
                name=f"{name}/{port.name}",
                address=address,
                port=port.port,
                protocol=port.protocol,
                affinity=affinity,
                idle_ns=idle_ns[port.protocol],
                drain_ns=drain_ns,
                backends=_backends_of(port, known.backends[service], alone=len(ports) == 1),
            ),
        )
        for port in ports
    ]


def _ports(at: Value) -> list[_Port]:
    ports: list[_Port] = []
    for one in at.items():
        fields = one.fields({"port": "give the VIP's port"}, ("name", "protocol", "targetPort"))
        port = fields["port"].port()
        protocol = Protocol(fields["protocol"].choice(_PROTOCOLS)) if "protocol" in fields else Protocol.TCP
        name = _name(fields["name"]) if "name" in fields else f"{protocol.name.lower()}-{port}"
        if any(other.name == name for other in ports):
            raise one.error(f"two ports are called {name}; names tell them apart")
        target: int | str = port
        if "targetPort" in fields:
            at_target = fields["targetPort"]
            target = at_target.port() if at_target.is_integer else at_target.text()
        ports.append(_Port(fields["port"], name, protocol, port, target, "targetPort" in fields))
    if not ports:
        raise at.error("the list is empty; a VirtualService serves one port at least")
    return ports


def _backends_of(port: _Port, backends: list[_Backend], *, alone: bool) -> tuple[WorldBackend, ...]:
    """alone: the VirtualService has this port only, so that a backend's ``port`` cannot mean another one."""
    found: dict[tuple[bytes, int], WorldBackend] = {}
    for one in backends:
        number = _number_of(port, one, alone=alone)
        backend = WorldBackend(one.address, number, one.node, one.weight, one.state)
        if (one.address, number) in found:
            raise one.at.error(f"{endpoint(backend)} is listed twice; remove one")
        found[one.address, number] = backend
    return tuple(found.values())


def _number_of(port: _Port, one: _Backend, *, alone: bool) -> int:
    """The backend's port that this one of a VIP means. Nothing that the backend says of it is passed over."""
    line = port.at.line
    named = one.ports.get(str(port.target)) or one.ports.get(port.name)
    if named is not None:
        return named
    if one.port is None:
        if isinstance(port.target, str):
            raise one.at.error(f"port {port.target} is not among its ports, but it is the targetPort on line {line}")
        return port.target
    if not alone:
        raise one.at.error(
            f"port {one.port} could mean any of several ports (one is on line {line}); use ports, by name"
        )
    if port.is_given and isinstance(port.target, int) and port.target != one.port:
        raise one.at.error(f"port {one.port} is not the targetPort on line {line}, {port.target}; remove one of them")
    return one.port


def _check_port_names(known: _Known) -> None:
    """Raises where a backend names a port that nobody asks for, of the Services that anything is served by."""
    for service, meant in known.meant.items():
        for one in known.backends[service]:
            for name in sorted(one.names.keys() - meant):
                ports = ", ".join(sorted(meant))
                raise one.names[name].error(f"no port of a VirtualService is meant by that name; known here: {ports}")


def _seconds(
    spec: dict[str, Value],
    field: str,
    default: int,
    low: int = IDLE_TIMEOUT_SECONDS_MIN,
    high: int = IDLE_TIMEOUT_SECONDS_MAX,
) -> int:
    """Nanoseconds of a field in seconds."""
    seconds = spec[field].integer(low, high, "a number of seconds") if field in spec else default
    return seconds * _SECOND_NS


def _name(at: Value) -> str:
    name = at.text()
    if not _NAME.fullmatch(name) or len(name) > NAME_BYTES_MAX:
        raise at.error(f"{name} is not a name; use a-z, 0-9, '-' and '.', {NAME_BYTES_MAX} characters at most")
    return name
