"""From the snapshots in force to the rows of the arrays: pure functions, no map is touched here.

Decided here: which of two snapshots speaks where both are in force (committed, and prepared but not committed). Nodes
and backends: the newer one (an id names the same thing in both, only its node or its address in the underlay may be
newer). VIPs: the committed one, because affinity decides what a flow *is*, and must not change before the commit; a
VIP that only one of them has is served from the moment it is known until the moment it is gone from both. Members and
the tunnel's door: both rings, and while a ring changes also those that it follows upon, so that nobody is shut out half
way.

Left to others: the order of writing (``apply``), next hops (``neighbours``), who is alive (the Keeper).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lbpod.core.layout import (
    BACKEND,
    BACKEND_ALIVE,
    BACKEND_LOCAL,
    CONFIG,
    LAYOUT_VERSION,
    MEMBER,
    MEMBER_DOUBTED,
    MEMBER_PRESENT,
    MEMBER_UP,
)
from lbpod.core.limits import BACKEND_IDS_MAX, MEMBER_NONE, MEMBERS_MAX, UNDERLAY_EXTRA_BYTES
from lbpod.core.messages import Configure
from lbpod.core.model import Backend, Node, Snapshot, Vip

Rows = npt.NDArray[Any]

MSS_OVERHEAD_BYTES: Final = 40
"""IPv4 20 + TCP 20, neither with options: what separates an MTU from an MSS."""


@dataclass(frozen=True)
class Uplink:
    """The interface that VIP packets come in by. mac: 6 bytes; address: 16 bytes, of this node in the underlay."""

    name: str
    ifindex: int
    mac: bytes
    mtu: int
    address: bytes


@dataclass(frozen=True)
class Scene:
    """What is in force, seen from one node."""

    snapshots: tuple[Snapshot, ...]
    """Newest first; one or two, or none."""

    alive: frozenset[int]
    members_up: frozenset[int]
    members_doubted: frozenset[int]
    self_name: str
    ring: frozenset[int]
    """Members that count: of every ring, and of the one that it follows upon until that change is done."""

    @staticmethod
    def of(effect: Configure, self_name: str) -> "Scene":
        """The scene that an effect describes."""
        snapshots = tuple(one for one in (effect.prepared, effect.committed) if one is not None)
        ring = {member for one in snapshots for member in one.ring.members}
        for one in snapshots:
            if one is not effect.committed or not effect.ring_done:
                ring.update(one.ring.before)
        return Scene(snapshots, effect.alive, effect.members_up, effect.members_doubted, self_name, frozenset(ring))

    def nodes(self) -> Mapping[int, Node]:
        """Nodes by id."""
        return {node.id: node for snapshot in reversed(self.snapshots) for node in snapshot.nodes}

    def self_node(self) -> Node | None:
        """This node, where a snapshot knows it."""
        for snapshot in self.snapshots:
            for node in snapshot.nodes:
                if node.name == self.self_name:
                    return node
        return None

    def vips(self) -> Sequence[Vip]:
        """VIPs that are served, ascending by id."""
        found = {vip.id: vip for snapshot in self.snapshots for vip in snapshot.vips}
        return [found[number] for number in sorted(found)]

    def members(self) -> Mapping[int, Node]:
        """Nodes of the members that count, by member id."""
        return {
            node.member: node
            for snapshot in reversed(self.snapshots)
            for node in snapshot.nodes
            if node.member != MEMBER_NONE and node.member in self.ring
        }


def backend_rows(scene: Scene) -> Rows:
    """(BACKEND_IDS_MAX,) of layout.BACKEND; all zero where an id is not in use."""
    found: dict[int, tuple[Backend, int]] = {}
    for snapshot in reversed(scene.snapshots):
        for vip in snapshot.vips:
            for one in vip.backends:
                found[one.id] = (one, vip.id)
    rows = np.zeros(BACKEND_IDS_MAX, BACKEND)
    if not found:
        return rows
    here = scene.self_node()
    backends = [one for one, _ in found.values()]
    ids = np.fromiter(found, np.uint32, len(found))
    used = np.zeros(len(ids), BACKEND)
    used["addr"] = np.frombuffer(b"".join([one.address for one in backends]), np.uint8).reshape(-1, 16)
    used["port_be"] = [one.port for one in backends]
    used["node"] = [one.node for one in backends]
    used["vip"] = [vip for _, vip in found.values()]
    alive = np.zeros(BACKEND_IDS_MAX, np.bool_)
    alive[list(scene.alive)] = True
    used["flags"] = np.where(alive[ids], BACKEND_ALIVE, 0)
    if here is not None:
        used["flags"] |= np.where(used["node"] == here.id, BACKEND_LOCAL, 0).astype(np.uint8)
    rows[ids] = used
    return rows


def member_rows(scene: Scene) -> Rows:
    """(MEMBERS_MAX,) of layout.MEMBER."""
    rows = np.zeros(MEMBERS_MAX, MEMBER)
    for member, node in scene.members().items():
        row = rows[member]
        row["addr"] = np.frombuffer(node.address, np.uint8)
        row["node"] = node.id
        row["flags"] = (
            MEMBER_PRESENT
            | (MEMBER_UP if member in scene.members_up else 0)
            | (MEMBER_DOUBTED if member in scene.members_doubted else 0)
        )
    return rows


def door_of(scene: Scene) -> tuple[tuple[bytes, int], ...]:
    """(address, member) of everybody whose tunnel packets are let in, sorted."""
    return tuple(sorted((node.address, member) for member, node in scene.members().items()))


def config_row(scene: Scene, uplink: Uplink, ring_change: bool, committed: Snapshot | None) -> Rows:
    """(1,) of layout.CONFIG."""
    rows = np.zeros(1, CONFIG)
    row = rows[0]
    here = scene.self_node()
    takes_part = here is not None and here.member in scene.members()
    row["node_addr"] = np.frombuffer(uplink.address, np.uint8)
    row["mac"] = np.frombuffer(uplink.mac, np.uint8)
    row["self"] = here.member if here is not None and takes_part else MEMBER_NONE
    if scene.snapshots:
        row["vni"], row["seed"] = scene.snapshots[0].cluster.vni, scene.snapshots[0].cluster.seed
    row["epoch"] = 0 if committed is None else committed.generation & 0xFFFF_FFFF
    row["ifindex"] = uplink.ifindex
    row["ring_change"] = int(ring_change)
    row["mss_max"] = min(max(uplink.mtu - UNDERLAY_EXTRA_BYTES - MSS_OVERHEAD_BYTES, 0), 0xFFFF)
    row["version"] = LAYOUT_VERSION
    return rows


def changed(old: Rows, new: Rows) -> npt.NDArray[np.uint32]:
    """Indices of the rows that differ. old, new: (n,) of the same dtype."""
    assert old.dtype == new.dtype and old.shape == new.shape, "only rows of the same array can be compared"
    width = old.dtype.itemsize
    word = np.dtype(np.uint64 if width % 8 == 0 else np.uint32)
    left, right = (np.ascontiguousarray(rows).view(word).reshape(-1) for rows in (old, new))
    differs = (left != right).reshape(len(old), -1).any(axis=1)
    return np.flatnonzero(differs).astype(np.uint32)
