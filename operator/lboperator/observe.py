"""What the cluster looks like: Kubernetes objects in, one World and one verdict for each VirtualService out. Pure.

Level-based: the whole of what is known is looked at each time, whatever event came last, so nothing depends on an order
of events. (What has not changed is not worked out again: ``Observer`` keeps each VirtualService's result beside what it
was made from. It may be thrown away at any time.)

**Endpoints.** All slices of a Service count, each (address, port) once, in the best state that any slice gives it, for
an endpoint that moves from one slice to another is in both, or in none, for a moment. Ready ones get new connections.
What terminates while it serves drains. So does what *was* a backend and is not ready (any more): the pod is there, and
so are its connections. What has never been ready is left out. Where nothing is ready, the table is made of what drains
(``core.snapshot.eligible``): better a pod that terminates than none. Of those, as with kube-proxy, what serves while it
terminates gets the new connections: the others have weight 0 beside it, and keep those that they have.

**Slices of another life.** A Service that was deleted and made again has another uid, and slices that belong to the
former one do not count. Until the new one has a slice, nothing is known about its endpoints, which is not the same as
knowing that there are none.

**Last good state.** Where a VirtualService cannot be served as it is (its verdict says why), what was last good of it
stays, as far as nobody else has the address meanwhile.

**Conflicts.** Of two VirtualServices that want one address, port and protocol, the older wins; the other is told so.

**Nodes.** Those that run an agent, and those that host a backend: an agent that restarts takes no backend with it. But
an endpoint on a node without an agent does not become one: nobody there could translate for it.

**Limits.** What does not fit is left out alone (``room``), its last good state if need be. Of more nodes than there can
be, or load balancers, some are left out, and no VirtualService for it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Network, ip_address
from typing import Final, NamedTuple

from lboperator.nouns import Endpoint, Key, Node, Service, Slice, VirtualService, VsPort
from lboperator.room import Room
from lbpod.core.errors import SnapshotError
from lbpod.core.limits import MEMBERS_MAX, NODES_MAX
from lbpod.core.model import (
    Affinity,
    BackendState,
    Protocol,
    World,
    WorldBackend,
    WorldNode,
    WorldVip,
    format_address,
    parse_address,
)
from lbpod.core.snapshot import check_world

_SECOND_NS: Final = 1_000_000_000
_PROTOCOLS: Final = {"TCP": Protocol.TCP, "UDP": Protocol.UDP}
_AFFINITIES: Final = {"None": Affinity.NONE, "ClientIP": Affinity.CLIENT_IP}
_NAMED_MAX: Final = 5
"""How many of what is wrong a sentence names."""


class Reason(Enum):
    """Reasons of conditions, as users meet them."""

    ACCEPTED = "Accepted"
    INVALID = "Invalid"
    NOT_ALLOWED = "AddressNotAllowed"
    CONFLICT = "AddressConflict"
    TOO_MANY = "LimitReached"
    RESOLVED = "ResolvedRefs"
    NO_SERVICE = "ServiceNotFound"
    NOT_A_BACKEND = "UnsupportedService"
    NO_SLICES = "EndpointsUnknown"
    NO_PORT = "PortNotFound"


@dataclass(frozen=True)
class Rules:
    """What the operator is told about all VirtualServices. allowed: empty, any address. selector: labels of the nodes
    whose agents take part in the ring; empty, all."""

    allowed: tuple[IPv4Network, ...] = ()
    agent_port: int = 9900
    selector: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Objects:
    """All that is known. present: names of nodes that have an agent."""

    virtual_services: Sequence[VirtualService] = ()
    services: Mapping[Key, Service] = field(default_factory=dict)
    slices: Mapping[Key, Sequence[Slice]] = field(default_factory=dict)
    """By namespace and name of their Service."""
    nodes: Mapping[str, Node] = field(default_factory=dict)
    present: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Verdict:
    """What has become of one VirtualService. accepted, resolved: what is said, '' where nothing is wrong; vips: what is
    wanted of it now, be it its last good state; homeless: endpoints left out because their node has no agent."""

    accepted_reason: Reason = Reason.ACCEPTED
    accepted: str = ""
    resolved_reason: Reason = Reason.RESOLVED
    resolved: str = ""
    vips: tuple[WorldVip, ...] = ()
    homeless: int = 0

    @property
    def is_good(self) -> bool:
        """It is served as it says."""
        return self.accepted_reason is Reason.ACCEPTED and self.resolved_reason is Reason.RESOLVED


@dataclass(frozen=True)
class Observed:
    """The outcome. verdicts: of all VirtualServices."""

    world: World
    verdicts: Mapping[Key, Verdict]


class _RefusedError(Exception):
    """Why one VirtualService cannot be served as it is."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason
        self.sentence = sentence


@dataclass(frozen=True)
class _Hosts:
    """Names of nodes. usable: they have an address; present: and an agent."""

    usable: frozenset[str]
    present: frozenset[str]


_Inputs = tuple[VirtualService, Service | None, tuple[Slice, ...], _Hosts, tuple[WorldVip, ...]]


class Observer:
    """``observe`` again and again. good: the last good state of each VirtualService, which begins with what load
    balancers remember (``remembered``) and goes on with what was seen here."""

    def __init__(self, rules: Rules, good: Mapping[Key, tuple[WorldVip, ...]]) -> None:
        self._rules = rules
        self._good = dict(good)
        self._made: dict[Key, tuple[_Inputs, Verdict]] = {}

    def observe(self, objects: Objects) -> Observed:
        """The World, as it is now."""
        usable = frozenset(name for name, node in objects.nodes.items() if node.address)
        hosts = _Hosts(usable, usable & objects.present)
        verdicts: dict[Key, Verdict] = {}
        taken: dict[tuple[bytes, int, int], VirtualService] = {}
        for vs in sorted(objects.virtual_services, key=lambda one: (one.created, one.key)):
            verdict = _without_conflicts(vs, self._verdict(vs, objects, hosts), taken)
            for vip in verdict.vips:
                taken[_place(vip)] = vs
            verdicts[vs.key] = verdict
        observed = _within_limits(verdicts, self._good, objects, self._rules)
        self._good = {key: verdict.vips for key, verdict in observed.verdicts.items()}
        self._made = {key: made for key, made in self._made.items() if key in verdicts}
        return observed

    def _verdict(self, vs: VirtualService, objects: Objects, hosts: _Hosts) -> Verdict:
        where = (vs.namespace, vs.service)
        good = self._good.get(vs.key, ())
        inputs = (vs, objects.services.get(where), tuple(objects.slices.get(where, ())), hosts, good)
        made = self._made.get(vs.key)
        if made is None or made[0] != inputs:
            made = (inputs, _judge(*inputs, self._rules))
            self._made[vs.key] = made
        return made[1]


def remembered(vips: Iterable[tuple[WorldVip, str]]) -> dict[Key, tuple[WorldVip, ...]]:
    """The last good state by VirtualService, from VIPs and their names (namespace/name/port)."""
    found: dict[Key, list[WorldVip]] = defaultdict(list)
    for vip, name in vips:
        parts = name.split("/")
        if len(parts) == 3:
            found[parts[0], parts[1]].append(vip)
    return {key: tuple(sorted(those)) for key, those in found.items()}


# --- One VirtualService -----------------------------------------------------------------------------------------------
def _judge(
    vs: VirtualService,
    service: Service | None,
    slices: tuple[Slice, ...],
    hosts: _Hosts,
    good: tuple[WorldVip, ...],
    rules: Rules,
) -> Verdict:
    """One VirtualService for itself."""
    try:
        address = _address(vs.address, rules)
        affinity, protocols = _kinds(vs)
    except _RefusedError as refusal:
        return Verdict(accepted_reason=refusal.reason, accepted=refusal.sentence, vips=good)
    known = {(_place(vip), one.address, one.port) for vip in good for one in vip.backends}
    try:
        current = _current(vs, service, slices)
        vips, homeless = [], 0
        for port, protocol in zip(vs.ports, protocols, strict=True):
            place = (address, port.port, int(protocol))
            endpoints = _endpoints(vs, port, service, current)
            backends, lost = _backends(endpoints, hosts, {one[1:] for one in known if one[0] == place})
            homeless = max(homeless, lost)
            idle = vs.idle_seconds if protocol is Protocol.TCP else vs.udp_idle_seconds
            vips.append(
                WorldVip(
                    name=f"{vs.namespace}/{vs.name}/{port.name}",
                    address=address,
                    port=port.port,
                    protocol=protocol,
                    affinity=affinity,
                    idle_ns=idle * _SECOND_NS,
                    drain_ns=vs.drain_seconds * _SECOND_NS,
                    backends=backends,
                )
            )
    except _RefusedError as refusal:
        kept = tuple(vip for vip in good if vip.address == address)
        return Verdict(resolved_reason=refusal.reason, resolved=refusal.sentence, vips=kept)
    return Verdict(vips=tuple(sorted(vips)), homeless=homeless)


def why_not_address(address: str, rules: Rules) -> tuple[str, str] | None:
    """Why nobody may have this address, as a reason and a sentence; whether somebody has it is another question."""
    try:
        _address(address, rules)
    except _RefusedError as refusal:
        return refusal.reason.value, refusal.sentence
    return None


def _address(text: str, rules: Rules) -> bytes:
    try:
        found = ip_address(text)
    except ValueError as error:
        raise _RefusedError(Reason.INVALID, f"{text} is not an IP address; use one like 203.0.113.10") from error
    if found.version != 4 or found.is_multicast or found.is_loopback or found.is_reserved or found.packed[0] == 0:
        raise _RefusedError(Reason.INVALID, f"{text} is not an IPv4 address of one machine; use one like 203.0.113.10")
    if rules.allowed and not any(found in network for network in rules.allowed):
        ranges = ", ".join(str(network) for network in rules.allowed[:_NAMED_MAX])
        sentence = f"{text} is not in the ranges that are allowed here ({ranges}); use another address, or allow it"
        raise _RefusedError(Reason.NOT_ALLOWED, f"{sentence} in the chart's allowedAddresses")
    return parse_address(text)


def _kinds(vs: VirtualService) -> tuple[Affinity, list[Protocol]]:
    """What the CRD allows may be more than this version knows."""
    if vs.affinity not in _AFFINITIES:
        raise _RefusedError(Reason.INVALID, f"affinity {vs.affinity} is not known; use {' or '.join(_AFFINITIES)}")
    for port in vs.ports:
        if port.protocol not in _PROTOCOLS:
            raise _RefusedError(Reason.INVALID, f"protocol {port.protocol} is not known; use {' or '.join(_PROTOCOLS)}")
        if not 1 <= port.port <= 65_535:
            raise _RefusedError(Reason.INVALID, f"{port.port} is not a port; use 1 to 65535")
    if not vs.ports:
        raise _RefusedError(Reason.INVALID, "it serves no port; list one at least")
    return _AFFINITIES[vs.affinity], [_PROTOCOLS[port.protocol] for port in vs.ports]


def _current(vs: VirtualService, service: Service | None, slices: tuple[Slice, ...]) -> list[Slice]:
    """The slices that count."""
    name = f"{vs.namespace}/{vs.service}"
    if service is None:
        raise _RefusedError(Reason.NO_SERVICE, f"there is no Service {name}; create it, or correct backendRef.name")
    if service.kind == "ExternalName":
        raise _RefusedError(
            Reason.NOT_A_BACKEND, f"Service {name} is an ExternalName, which has no endpoints; use another"
        )
    current = [one for one in slices if one.owner in {"", service.uid}]
    if not current:
        sentence = f"Service {name} has no EndpointSlice yet; give it a selector, or endpoints of its own"
        raise _RefusedError(Reason.NO_SLICES, sentence)
    return [one for one in current if one.is_v4]


def _endpoints(
    vs: VirtualService, port: VsPort, service: Service | None, slices: list[Slice]
) -> list[tuple[Endpoint, int]]:
    """Endpoints of one port, each with the port number that it listens on."""
    if isinstance(port.target, int):
        return [(endpoint, port.target) for one in slices for endpoint in one.endpoints]
    assert service is not None, "without a Service, no slice counts"
    protocol = port.protocol
    mine = [one for one in service.ports if one.protocol == protocol]
    # The name of a pod's port is what a Service calls targetPort; a slice knows only what the Service calls it itself.
    names = {one.name for one in mine if one.target == port.target} or {
        one.name for one in mine if one.name == port.target
    }
    found = [
        (endpoint, its.port)
        for one in slices
        for its in one.ports
        if its.name in names and its.protocol == protocol and its.port
        for endpoint in one.endpoints
    ]
    if not names:
        known = sorted({str(one.target) for one in mine if isinstance(one.target, str) and one.target})
        known += sorted({one.name for one in mine if one.name} - set(known))
        sentence = f"Service {vs.namespace}/{vs.service} has no {protocol} port that is called {port.target}"
        advice = f"it has {', '.join(known[:_NAMED_MAX])}" if known else "it names none; use a number"
        raise _RefusedError(Reason.NO_PORT, f"{sentence}; {advice}")
    return found


class _Claim(NamedTuple):
    """What one slice says of an endpoint. is_mute: it does not serve. Of two that differ, the lesser counts: the better
    state, and then the order of names, for want of another."""

    state: BackendState
    is_mute: bool
    node: str


def _backends(
    endpoints: list[tuple[Endpoint, int]], hosts: _Hosts, known: set[tuple[bytes, int]]
) -> tuple[tuple[WorldBackend, ...], int]:
    """And how many endpoints are left out because of their node."""
    found: dict[tuple[bytes, int], _Claim] = {}
    homeless: set[str] = set()
    for endpoint, port in endpoints:
        try:
            address = parse_address(endpoint.address)
        except ValueError:
            continue
        state = _state(endpoint, (address, port) in known)
        if state is None:
            continue
        if endpoint.node not in (hosts.usable if (address, port) in known else hosts.present):
            homeless.add(endpoint.address)
            continue
        is_mute = state is not BackendState.READY and not _serves_on(endpoint)
        claim = _Claim(state, is_mute, endpoint.node)
        found[address, port] = min(claim, found.get((address, port), claim))
    claims = found.values()
    is_any_ready = any(one.state is BackendState.READY for one in claims)
    weight_of_mute = 1 if is_any_ready or all(one.is_mute for one in claims) else 0
    backends = [
        WorldBackend(address, port, one.node, weight_of_mute if one.is_mute else 1, one.state)
        for (address, port), one in found.items()
    ]
    return tuple(sorted(backends)), len(homeless)


def _serves_on(endpoint: Endpoint) -> bool:
    return endpoint.terminating and (endpoint.serving or endpoint.ready)


def _state(endpoint: Endpoint, known: bool) -> BackendState | None:
    """None: it is no backend."""
    if endpoint.ready and not endpoint.terminating:
        return BackendState.READY
    if _serves_on(endpoint):
        return BackendState.DRAINING
    return BackendState.DRAINING if known else None


# --- All of them ------------------------------------------------------------------------------------------------------
def _place(vip: WorldVip) -> tuple[bytes, int, int]:
    return vip.address, vip.port, int(vip.protocol)


def _without_conflicts(
    vs: VirtualService, verdict: Verdict, taken: Mapping[tuple[bytes, int, int], VirtualService]
) -> Verdict:
    """The verdict without what an older one has."""
    clashes = [vip for vip in verdict.vips if _place(vip) in taken]
    if not clashes:
        return verdict
    kept = tuple(vip for vip in verdict.vips if _place(vip) not in taken)
    vip, other = clashes[0], taken[_place(clashes[0])]
    where = f"{format_address(vip.address)}:{vip.port}/{vip.protocol.name}"
    sentence = (
        f"{where} is already served by {other.namespace}/{other.name}, which is older; use another address or port"
    )
    if not verdict.is_good:
        return Verdict(verdict.accepted_reason, verdict.accepted, verdict.resolved_reason, verdict.resolved, kept)
    return Verdict(accepted_reason=Reason.CONFLICT, accepted=sentence, vips=kept)


def _world(verdicts: Mapping[Key, Verdict], objects: Objects, rules: Rules) -> World:
    vips = tuple(vip for verdict in verdicts.values() for vip in verdict.vips)
    hosts = {one.node for vip in vips for one in vip.backends}
    selected = sorted(name for name in objects.present if _is_selected(objects.nodes.get(name), rules))
    lbs = set(selected[:MEMBERS_MAX])
    nodes: list[WorldNode] = []
    addresses: set[str] = set()
    # Of too many nodes those count first that balance, then those that host a backend.
    for name in sorted(hosts | objects.present, key=lambda one: (one not in lbs, one not in hosts, one)):
        node = objects.nodes.get(name)
        # A node that has gone while its endpoints have not yet; and of two with one address, the first.
        if node is None or not node.address or node.address in addresses or len(nodes) == NODES_MAX - 1:
            continue
        addresses.add(node.address)
        control = f"{node.address}:{rules.agent_port}"
        nodes.append(WorldNode(name, parse_address(node.address), control, name in lbs))
    nodes.sort(key=lambda one: one.name)
    listed = {node.name for node in nodes}
    kept = tuple(_hosted(vip, listed) for vip in vips)
    return World(tuple(nodes), tuple(sorted(kept)))


def _is_selected(node: Node | None, rules: Rules) -> bool:
    return node is not None and bool(node.address) and set(rules.selector) <= set(node.labels)


def _hosted(vip: WorldVip, listed: set[str]) -> WorldVip:
    """Without backends of nodes that are gone: last good states may have such."""
    backends = tuple(one for one in vip.backends if one.node in listed)
    if len(backends) == len(vip.backends):
        return vip
    return WorldVip(vip.name, vip.address, vip.port, vip.protocol, vip.affinity, vip.idle_ns, vip.drain_ns, backends)


def _within_limits(
    verdicts: Mapping[Key, Verdict], good: Mapping[Key, tuple[WorldVip, ...]], objects: Objects, rules: Rules
) -> Observed:
    """All of them, or else as many as there is room for: one too many must not stop the others. Those come first that
    ask for no more than they have, then the oldest; and where what one asks for finds no room, what it had may."""
    world = _world(verdicts, objects, rules)
    try:
        check_world(world)
        return Observed(world, verdicts)
    except SnapshotError:
        room = Room()
    had = {key: {_place(vip) for vip in good.get(key, ())} for key in verdicts}
    wanted = {key: {_place(vip) for vip in verdict.vips} for key, verdict in verdicts.items()}
    claims = Counter(place for places in wanted.values() for place in places)
    kept = dict(verdicts)
    for key in sorted(verdicts, key=lambda one: not wanted[one] <= had[one]):
        sentence = room.take(verdicts[key].vips)
        if sentence:
            former = tuple(vip for vip in good.get(key, ()) if claims[_place(vip)] == (_place(vip) in wanted[key]))
            former = () if room.take(former) else former
            kept[key] = Verdict(Reason.TOO_MANY, f"there is no room for it: {sentence}", vips=former)
    return Observed(_world(kept, objects, rules), kept)
