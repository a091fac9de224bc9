"""From the snapshots in force to the rows of the arrays: pure functions, no map is touched here.

Decided here: which of two snapshots speaks where both are in force (committed, and prepared but not committed). Nodes
and backends: the newer one (an id names the same thing in both, only its node or its address in the underlay may be
newer). VIPs: the committed one, because affinity decides what a flow *is*, and must not change before the commit; a
VIP that only one of them has is served from the moment it is known until the moment it is gone from both. Members and
the tunnel's door: both rings, and while a ring changes also those that it follows upon, so that nobody is shut out half
way.

Left to others: the order of writing (``apply``), next hops (``neighbours``), who is alive (the Keeper).
"""

from collections.abc import Iterable, Mapping, Sequence
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
    rows = np.zeros(BACKEND_IDS_MAX, BACKEND)
    found = _backends_of(vip for snapshot in reversed(scene.snapshots) for vip in snapshot.vips)
    if found:
        rows[np.fromiter(found, np.uint32, len(found))] = _rows_of(scene, found)
    return rows


def backend_rows_since(before: Scene, scene: Scene) -> tuple[npt.NDArray[np.uint32], Rows] | None:
    """Ids and rows of the backends that may have other rows than in the scene before; None where all may have.

    By VIP: what is the very same object in both takes no time, so a change of one VIP among a thousand is as quick as
    that of one alone. Kept equal to ``backend_rows`` by a test on random scenes.
    """
    here, was = scene.self_node(), before.self_node()
    if (None if here is None else here.id) != (None if was is None else was.id):
        return None
    old, new = _by_vip(before), _by_vip(scene)
    changed_vips = [number for number in sorted(old.keys() | new.keys()) if old.get(number) != new.get(number)]
    found = _backends_of(vip for number in changed_vips for vip in new.get(number, ()))
    gone = _backends_of(vip for number in changed_vips for vip in old.get(number, ())).keys() - found.keys()
    if not (before.alive ^ scene.alive) <= found.keys() | gone:
        return None
    ids = np.array([*found, *sorted(gone)], np.uint32)
    rows = np.zeros(len(ids), BACKEND)
    if found:
        rows[: len(found)] = _rows_of(scene, found)
    return ids, rows


def _by_vip(scene: Scene) -> dict[int, tuple[Vip, ...]]:
    """VIP id -> what the snapshots say of it, oldest first."""
    found: dict[int, tuple[Vip, ...]] = {}
    for snapshot in reversed(scene.snapshots):
        for vip in snapshot.vips:
            found[vip.id] = (*found.get(vip.id, ()), vip)
    return found


def _backends_of(vips: Iterable[Vip]) -> dict[int, tuple[Backend, int]]:
    """Backend id -> backend and VIP id; of several, the last one counts."""
    return {one.id: (one, vip.id) for vip in vips for one in vip.backends}


def _rows_of(scene: Scene, found: Mapping[int, tuple[Backend, int]]) -> Rows:
    here = scene.self_node()
    backends = [one for one, _ in found.values()]
    rows = np.zeros(len(found), BACKEND)
    rows["addr"] = np.frombuffer(b"".join([one.address for one in backends]), np.uint8).reshape(-1, 16)
    rows["port_be"] = [one.port for one in backends]
    rows["node"] = [one.node for one in backends]
    rows["vip"] = [vip for _, vip in found.values()]
    rows["flags"] = [BACKEND_ALIVE if number in scene.alive else 0 for number in found]
    if here is not None:
        rows["flags"] |= np.where(rows["node"] == here.id, BACKEND_LOCAL, 0).astype(np.uint8)
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


def down_in(members: Rows) -> frozenset[int]:
    """Members that these rows (MEMBERS_MAX of layout.MEMBER) say to be down."""
    flags = members["flags"]
    return frozenset(np.flatnonzero((flags & MEMBER_PRESENT != 0) & (flags & MEMBER_UP == 0)).tolist())


def given_up_in(members: Rows) -> frozenset[int]:
    """Those of them (``down_in``) that are not waited for any more."""
    return down_in(members) - frozenset(np.flatnonzero(members["flags"] & MEMBER_DOUBTED != 0).tolist())


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
    # Flat, as hardly ever anything differs: a look at each short row by itself takes twenty times as long.
    places = np.flatnonzero(left != right) // (width // word.itemsize)
    return places[np.flatnonzero(np.diff(places, prepend=-1))].astype(np.uint32)
