"""The nouns: what a cluster looks like to the people who configure it and to the LBs that serve it.

Two levels, on purpose. A *World* is what was observed (a file, or Kubernetes objects): names, no numbers. A *Snapshot*
is what the controller decided and pushes: the same things with ids, epochs and digests, whole, never a delta. Only the
Planner turns one into the other. All are frozen and compare by value, so that "nothing changed" is ``==``.

Addresses are 16 bytes (IPv4 as ``::ffff:a.b.c.d``), ports are integers in host order, times are nanoseconds.
"""

from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address, ip_address

import msgspec

from lbpod.core.limits import MEMBER_NONE

_V4_PREFIX = bytes(10) + b"\xff\xff"


def parse_address(text: str) -> bytes:
    """16 bytes of an IPv4 or IPv6 address. Raises ValueError with the text in it."""
    address = ip_address(text)
    return _V4_PREFIX + address.packed if isinstance(address, IPv4Address) else address.packed


def format_address(address: bytes) -> str:
    """The address as people write it."""
    return str(IPv4Address(address[12:])) if is_v4(address) else str(IPv6Address(address))


def is_v4(address: bytes) -> bool:
    """True for ``::ffff:a.b.c.d``."""
    return address[:12] == _V4_PREFIX


class Protocol(IntEnum):
    """Numbers of IANA's registry, as in the packet."""

    TCP = 6
    UDP = 17


class Affinity(IntEnum):
    """What a flow is: the five-tuple, or client address and VIP."""

    NONE = 0
    CLIENT_IP = 1


class BackendState(IntEnum):
    """READY gets new flows; DRAINING keeps those that it has. A backend that is gone is absent."""

    READY = 0
    DRAINING = 1


# --- Observed ---------------------------------------------------------------------------------------------------------
class WorldBackend(msgspec.Struct, frozen=True, order=True):
    """One endpoint as observed. node: name of the node that it runs on."""

    address: bytes
    port: int
    node: str
    weight: int = 1
    state: BackendState = BackendState.READY


class WorldVip(msgspec.Struct, frozen=True, order=True):
    """One VIP as observed: one port of one VirtualService. Identity: address, port, protocol."""

    name: str
    """namespace/name/port, for people."""
    address: bytes
    port: int
    protocol: Protocol
    affinity: Affinity
    idle_ns: int
    drain_ns: int
    backends: tuple[WorldBackend, ...] = ()


class WorldNode(msgspec.Struct, frozen=True, order=True):
    """One node as observed. control: ``host:port`` of its agent; lb: it takes part in the ring."""

    name: str
    address: bytes
    control: str
    lb: bool


class World(msgspec.Struct, frozen=True):
    """All that was observed at one moment. Order does not matter to the Planner."""

    nodes: tuple[WorldNode, ...] = ()
    vips: tuple[WorldVip, ...] = ()


# --- Decided ----------------------------------------------------------------------------------------------------------
class Cluster(msgspec.Struct, frozen=True):
    """What never changes while the cluster lives. seed: of every hash; vni: of every tunnel packet."""

    vni: int
    seed: int


class Node(msgspec.Struct, frozen=True):
    """A node with its numbers. Invariant: member != MEMBER_NONE iff the node runs an LB that may be in a ring."""

    id: int
    name: str
    address: bytes
    control: str
    member: int = MEMBER_NONE


class Backend(msgspec.Struct, frozen=True):
    """A backend with its number. Invariant: an id names the same (VIP, address, port) in all snapshots that any LB
    still knows (1 <= id < BACKEND_IDS_MAX)."""

    id: int
    address: bytes
    port: int
    node: int
    weight: int = 1
    state: BackendState = BackendState.READY


class Vip(msgspec.Struct, frozen=True):
    """A VIP with its backend set.

    Invariants: created <= epoch <= Snapshot.generation; epoch is the generation in which the VIP (its backends,
    weights, states or settings) last changed; digest is that of ``table(backends in state READY, else all of them)``.
    """

    id: int
    name: str
    address: bytes
    port: int
    protocol: Protocol
    affinity: Affinity
    idle_ns: int
    drain_ns: int
    created: int
    epoch: int
    digest: bytes
    backends: tuple[Backend, ...] = ()


class Ring(msgspec.Struct, frozen=True):
    """The LBs that take part, as member ids, ascending. epoch: the generation that formed the ring or changed it last,
    so it only grows.

    before: the members that this ring follows upon, where this very generation changes the ring; else empty. Such a
    generation changes nothing else: its VIPs are those of the generation in force. Members of either are nodes of the
    snapshot. Invariant: before != members.
    """

    epoch: int
    members: tuple[int, ...] = ()
    before: tuple[int, ...] = ()


class NextIds(msgspec.Struct, frozen=True):
    """Where the search for a free id of each kind goes on: after the one given last, round and round.

    It travels in the snapshot, so that a controller that has lost everything still lets an id rest as long as it can.
    """

    vip: int = 1
    node: int = 1
    member: int = 0
    backend: int = 1


class Snapshot(msgspec.Struct, frozen=True):
    """The whole desired state at one generation. What is equal but for its generation is the same state.

    Invariants: ``lbpod.core.snapshot.check`` (nodes, vips and each VIP's backends ascend by id, so equal states
    have equal bytes).
    """

    cluster: Cluster
    generation: int
    ring: Ring
    nodes: tuple[Node, ...] = ()
    vips: tuple[Vip, ...] = ()
    next_ids: NextIds = NextIds()
