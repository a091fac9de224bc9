"""From what is wanted to what is pushed: a World (names) becomes a Snapshot (ids, epochs, digests).

Decided here: which number everything gets, when a VIP's epoch moves, what a valid snapshot is (``check``, which the
border calls for every snapshot that arrives) and its digest. Left to the Planner: when, and at which generation.

**Ids.** What existed in the previous snapshot keeps its id. A new thing gets the next free one after the id that was
given last, round and round, so that an id rests for a whole turn of its space before it means something else. Where
the search goes on travels in the snapshot (``next_ids``): a controller that restarts without a disk learns it from any
LB. "One above the highest in use" was dropped: the highest would be given again at once after its owner left, while
leases and records that name it may still live.

**Epochs.** A VIP's epoch is the generation of its last change; an LB that compares two snapshots may pass over VIPs of
equal epoch. Order never matters: a World is a set, written as tuples.

**The ring** changes by snapshots of its own (``ring_snapshot``), which change nothing else, for members hand over what
they have between two generations (DESIGN: section 4). In between members stay, and so do their addresses, which
ownership is computed from, whatever the World says. Who is to be in the ring is the Planner's to decide.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from lbpod.core.errors import SnapshotError
from lbpod.core.layout import PROTOCOL_ICMP, vip_index
from lbpod.core.limits import (
    BACKEND_IDS_MAX,
    BACKENDS_MAX,
    BUILDERS_MAX,
    COLUMNS_KEPT_NS,
    DRAIN_TIMEOUT_SECONDS_MAX,
    GENERATION_MAX,
    IDLE_TIMEOUT_SECONDS_MAX,
    IDLE_TIMEOUT_SECONDS_MIN,
    MEMBER_NONE,
    MEMBERS_MAX,
    NAME_BYTES_MAX,
    NODES_MAX,
    VIP_CHAIN_MAX,
    VIPS_MAX,
    VNI_MAX,
    WEIGHT_MAX,
)
from lbpod.core.model import (
    Backend,
    BackendState,
    Cluster,
    NextIds,
    Node,
    Ring,
    Snapshot,
    Vip,
    World,
    WorldBackend,
    WorldNode,
    WorldVip,
    format_address,
    is_v4,
)
from lbpod.core.portion import Changed, portion
from lbpod.core.table import Builder, Columns, Table, TableBackend, digest_before, table_digest

DIGEST_BYTES: Final = 16
_SECOND_NS: Final = 1_000_000_000
_ENCODER: Final = msgspec.msgpack.Encoder()

VipKey = tuple[bytes, int, int]
"""Identity of a VIP: address, port, protocol."""


def digest_of(snapshot: Snapshot) -> bytes:
    """blake2b, 16 bytes, over the canonical bytes (fields in the order of the model, ids ascending)."""
    return hashlib.blake2b(_ENCODER.encode(snapshot), digest_size=DIGEST_BYTES).digest()


def eligible(backends: Sequence[Backend]) -> tuple[Backend, ...]:
    """Backends that the table is built from: those in state READY, or else all."""
    ready = tuple(backend for backend in backends if backend.state is BackendState.READY)
    return ready or tuple(backends)


class Tables:
    """Builders of the VIPs that changed last, at most BUILDERS_MAX: a cache, which may be thrown away at any time."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._builders: OrderedDict[VipKey, Builder] = OrderedDict()
        self._columns = Columns(seed)
        self._is_used = False
        self._until_ns = 0

    @property
    def scored_count(self) -> int:
        """Backends whose scores are kept for the next table of few."""
        return self._columns.count

    def rest(self, now_ns: int) -> None:
        """Called now and then, it lets the scores go of backends that no table has asked for lately: the next table of
        few backends takes 1.3 ms more for each."""
        if self._is_used:
            self._is_used, self._until_ns = False, now_ns + COLUMNS_KEPT_NS
        elif now_ns >= self._until_ns:
            self._columns.clear()

    def table(self, key: VipKey, backends: Sequence[Backend]) -> Table:
        """The table of a VIP with these backends (all of them: who is eligible is decided here)."""
        self._is_used = True
        builder = self._builders.pop(key, None) or Builder(self._seed, columns=self._columns)
        self._builders[key] = builder
        if len(self._builders) > BUILDERS_MAX:
            self._builders.popitem(last=False)
        return builder.update(_in_table(backends))


def is_table_of(table: npt.NDArray[np.uint32], vip: Vip) -> bool:
    """Whether this is the VIP's table, as its digest says it (also one of an older controller); nothing is built."""
    backends = _in_table(vip.backends)
    return table_digest(table, backends) == vip.digest or digest_before(table, backends) == vip.digest


def _in_table(backends: Sequence[Backend]) -> list[TableBackend]:
    return [TableBackend(one.id, one.address, one.port, one.weight) for one in eligible(backends)]


def next_snapshot(
    world: World,
    previous: Snapshot | None,
    cluster: Cluster,
    generation: int,
    tables: Tables,
    next_ids: NextIds | None = None,
    first_ring: Collection[str] | None = None,
    in_force: int | None = None,
) -> tuple[Snapshot | None, int]:
    """The snapshot that follows ``previous`` for this World, or None where nothing but the generation would differ; and
    how many VIPs wait for the next one, for this one has enough to do without them (``portion``).

    next_ids: where the search for free ids goes on, where somebody newer than ``previous`` is known to have given some.
    first_ring: names of the LBs that form the ring where there is none yet (None: all that the World lists). in_force:
    generation that is, where ``previous`` never came into force (None: it did).
    Raises SnapshotError where the World cannot be served: over a limit, a thing named twice, a node that is not there.
    """
    assert previous is None or previous.cluster == cluster, "a cluster's vni and seed never change"
    assert previous is None or previous.generation < generation, "generations only grow"
    check_world(world)
    ids = _Ids(previous, next_ids)
    nodes = _nodes(world, previous, ids)
    ring = _ring(world, previous, generation, nodes, first_ring)
    numbers = {node.name: node.id for node in nodes}
    now, later, staying = _portions(world, previous, numbers, in_force)
    made = [_made(one.wanted, one.had, numbers, generation, ids, tables) for one in now]
    vips = tuple(sorted((*staying, *made), key=lambda vip: vip.id))
    snapshot = Snapshot(cluster, generation, ring, nodes, vips, ids.next_ids())
    if previous is not None:
        known = Ring(previous.ring.epoch, previous.ring.members)
        same = msgspec.structs.replace(previous, generation=generation, ring=known, next_ids=snapshot.next_ids)
        if same == snapshot:
            return None, 0
    check(snapshot)
    return snapshot, len(later)


def ring_snapshot(
    in_force: Snapshot, newest: Snapshot, world: World, members: Iterable[str], generation: int, next_ids: NextIds
) -> Snapshot:
    """The snapshot that takes the ring from that of ``in_force`` to the nodes named ``members``, and changes nothing
    else.

    newest: the last snapshot that was pushed; where that is not the one in force, it is superseded, and a new member to
    which it gave numbers keeps them. next_ids: where the search for free ids goes on. members: each is in the ring in
    force, or an LB of the World. Raises SnapshotError where one that joins is listed with what no node may have, or
    finds no free id.
    """
    assert in_force.ring.members, "a ring changes only once there is one"
    assert in_force.generation <= newest.generation < generation, "generations only grow"
    before = in_force.ring.members
    ids = _Ids(newest, next_ids, in_force)
    nodes = {node.name: node for node in in_force.nodes}
    had = {node.name: node for node in newest.nodes} | nodes
    listed = {node.name: node for node in world.nodes}
    wanted = sorted(set(members))
    for name in wanted:
        if name in nodes and nodes[name].member in before:
            continue
        one, known = listed[name], had.get(name)
        number = known.id if known is not None else ids.node.give()
        member = _member_kept(known, one)
        member = ids.member.give() if member == MEMBER_NONE else member
        nodes[name] = Node(number, name, one.address, one.control, member)
    ring = Ring(generation, tuple(sorted(nodes[name].member for name in wanted)), before)
    snapshot = Snapshot(in_force.cluster, generation, ring, with_nodes(nodes.values(), newest), in_force.vips)
    snapshot = msgspec.structs.replace(snapshot, next_ids=ids.next_ids())
    check(snapshot)
    return snapshot


def once_more(in_force: Snapshot, newest: Snapshot, generation: int) -> Snapshot:
    """What is in force with another number, and no change of the ring. newest: what is superseded by it, as above."""
    return Snapshot(
        cluster=in_force.cluster,
        generation=generation,
        ring=Ring(in_force.ring.epoch, in_force.ring.members),
        nodes=with_nodes(in_force.nodes, newest),
        vips=in_force.vips,
        next_ids=newest.next_ids,
    )


def with_nodes(nodes: Iterable[Node], newest: Snapshot) -> tuple[Node, ...]:
    """These, and those that only the superseded snapshot lists: they may have it, and have to hear of its end."""
    kept = {node.name: node for node in nodes}
    taken = {node.address for node in kept.values()}
    more = [node for node in newest.nodes if node.name not in kept and node.address not in taken]
    return tuple(sorted((*kept.values(), *more), key=lambda node: node.id))


# --- The parts of a snapshot ------------------------------------------------------------------------------------------
class _Space:
    """Free ids of one kind, from ``first`` to ``end - 1``. Invariant: first <= at < end."""

    def __init__(self, what: str, first: int, end: int, at: int, used: Iterable[int]) -> None:
        self._what, self._first, self._end = what, first, end
        self.at = at
        self._used = set(used)

    def give(self) -> int:
        for _ in range(self._end - self._first):
            found = self.at
            self.at = found + 1 if found + 1 < self._end else self._first
            if found not in self._used:
                self._used.add(found)
                return found
        raise SnapshotError(f"there are more than {self._end - self._first} {self._what}; remove some")


class _Ids:
    """The four id spaces. Used is what the previous snapshots used: what leaves with this change is not given in it."""

    def __init__(self, previous: Snapshot | None, next_ids: NextIds | None, older: Snapshot | None = None) -> None:
        at = next_ids or (previous.next_ids if previous is not None else NextIds())
        known = [snapshot for snapshot in (previous, older) if snapshot is not None]
        vips = [vip for snapshot in known for vip in snapshot.vips]
        nodes = [node for snapshot in known for node in snapshot.nodes]
        self.vip = _Space("VIPs", 1, VIPS_MAX, at.vip, (vip.id for vip in vips))
        self.node = _Space("nodes", 1, NODES_MAX, at.node, (node.id for node in nodes))
        self.member = _Space("LBs", 0, MEMBERS_MAX, at.member, (node.member for node in nodes))
        self.backend = _Space(
            "backends", 1, BACKEND_IDS_MAX, at.backend, (one.id for vip in vips for one in vip.backends)
        )

    def next_ids(self) -> NextIds:
        return NextIds(self.vip.at, self.node.at, self.member.at, self.backend.at)


def _nodes(world: World, previous: Snapshot | None, ids: _Ids) -> tuple[Node, ...]:
    known = {node.name: node for node in previous.nodes} if previous is not None else {}
    members = previous.ring.members if previous is not None else ()
    nodes = []
    for one in sorted(world.nodes):
        had = known.get(one.name)
        number = had.id if had is not None else ids.node.give()
        if had is not None and had.member in members:
            nodes.append(Node(number, one.name, had.address, one.control, had.member))
            continue
        member = _member_kept(had, one)
        if one.lb and member == MEMBER_NONE:  # by its number it knows that it is to wait for a ring
            member = ids.member.give()
        nodes.append(Node(number, one.name, one.address, one.control, member))
    listed = {node.name for node in nodes}
    nodes.extend(node for name, node in known.items() if node.member in members and name not in listed)
    return tuple(sorted(nodes, key=lambda node: node.id))


def _member_kept(had: Node | None, one: WorldNode) -> int:
    """An LB that has been in a ring may come back, and keeps its member id for that, as long as it is the same."""
    return had.member if had is not None and one.lb and had.address == one.address else MEMBER_NONE


def _is_first(one: WorldNode, first_ring: Collection[str] | None) -> bool:
    return one.lb and (first_ring is None or one.name in first_ring)


def _ring(
    world: World,
    previous: Snapshot | None,
    generation: int,
    nodes: Sequence[Node],
    first_ring: Collection[str] | None,
) -> Ring:
    if previous is not None and previous.ring.members:
        return Ring(previous.ring.epoch, previous.ring.members)
    first = {one.name for one in world.nodes if _is_first(one, first_ring)}
    members = tuple(sorted(node.member for node in nodes if node.name in first))
    return Ring(generation, members) if members or previous is None else previous.ring


def _portions(
    world: World, previous: Snapshot | None, nodes: dict[str, int], in_force: int | None
) -> tuple[list[Changed], list[Changed], list[Vip]]:
    """VIPs that change now, those that wait, and what stays as it is."""
    before = previous.vips if previous is not None else ()
    known = {_key(vip): vip for vip in before}
    wanted = {_key(one) for one in world.vips}
    # Who moves to another address or port serves where it was until it is its turn.
    leaving = {vip.name: vip for vip in before if _key(vip) not in wanted}
    staying: list[Vip] = []
    changed: list[Changed] = []
    for one in sorted(world.vips, key=_key):
        had = known.get(_key(one))
        if had is not None and _is_as_wanted(had, one, nodes):
            staying.append(had)
        else:
            changed.append(Changed(one, had or leaving.pop(one.name, None)))
    if previous is None or not previous.ring.members:
        return changed, [], staying  # who serves says that it is ready, so the first ring begins with all that there is
    now, later = portion(changed, nodes.values(), previous.generation if in_force is None else in_force)
    waiting = [had for _, had in later if had is not None]
    if later and not _is_room(now, [*staying, *waiting]):
        return changed, [], staying  # it only fits once all that goes is gone
    return now, later, [*staying, *waiting]


def _is_room(now: Iterable[Changed], staying: Sequence[Vip]) -> bool:
    """There is a place for these together."""
    those: list[Vip | WorldVip] = [*staying, *(one.wanted for one in now)]
    if sum(len(vip.backends) for vip in those) > BACKENDS_MAX:
        return False
    try:
        check_index(those)
    except SnapshotError:
        return False
    return True


def _is_as_wanted(had: Vip, one: WorldVip, nodes: dict[str, int]) -> bool:
    """Nothing but ids, epochs and the digest is left to compare."""
    if had.name != one.name or had.affinity is not one.affinity:
        return False
    if (had.idle_ns, had.drain_ns) != (one.idle_ns, one.drain_ns) or len(had.backends) != len(one.backends):
        return False
    wanted = {(it.address, it.port): (nodes[it.node], it.weight, it.state) for it in one.backends}
    return all(wanted.get((it.address, it.port)) == (it.node, it.weight, it.state) for it in had.backends)


def _made(one: WorldVip, had: Vip | None, nodes: dict[str, int], generation: int, ids: _Ids, tables: Tables) -> Vip:
    if had is not None and (had.affinity is not one.affinity or _key(had) != _key(one)):
        had = None  # other flows fall on other slots: to an LB that is another VIP, with ids of its own
    backends = _backends(one, had, nodes, ids)
    return Vip(
        id=had.id if had is not None else ids.vip.give(),
        name=one.name,
        address=one.address,
        port=one.port,
        protocol=one.protocol,
        affinity=one.affinity,
        idle_ns=one.idle_ns,
        drain_ns=one.drain_ns,
        created=had.created if had is not None else generation,
        epoch=generation,
        digest=tables.table(_key(one), backends).digest,
        backends=backends,
    )


def _backends(vip: WorldVip, had: Vip | None, nodes: dict[str, int], ids: _Ids) -> tuple[Backend, ...]:
    known = {(one.address, one.port): one.id for one in had.backends} if had is not None else {}
    backends = []
    for one in sorted(vip.backends):
        number = known.get((one.address, one.port))
        if number is None:
            number = ids.backend.give()
        backends.append(Backend(number, one.address, one.port, nodes[one.node], one.weight, one.state))
    return tuple(sorted(backends, key=lambda backend: backend.id))


def _key(vip: WorldVip | Vip) -> VipKey:
    return vip.address, vip.port, int(vip.protocol)


def check_world(world: World) -> None:
    """Raise SnapshotError where a World cannot become a snapshot: what would otherwise show as a missing id, or in a
    sentence about ids that nobody has seen. ``check`` does the rest."""
    _unique("node", (node.name for node in world.nodes))
    _limit("nodes", len(world.nodes), NODES_MAX - 1)
    _limit("LBs", sum(node.lb for node in world.nodes), MEMBERS_MAX)
    _limit("VIPs", len(world.vips), VIPS_MAX - 1)
    _limit("backends", sum(len(vip.backends) for vip in world.vips), BACKENDS_MAX)
    _unique_endpoints("VIP", world.vips)
    check_index(world.vips)
    names = {node.name for node in world.nodes}
    for vip in world.vips:
        _unique_endpoints(f"backend of {vip.name}", vip.backends)
        for one in vip.backends:
            if len(one.address) != 16 or not 0 <= one.weight <= WEIGHT_MAX:
                what = f"backend {endpoint(one)} of {vip.name}"
                _address(what, one.address)
                _range(f"the weight of {what}", one.weight, 0, WEIGHT_MAX)
            if one.node not in names:
                raise SnapshotError(
                    f"backend {endpoint(one)} of {vip.name} runs on node {one.node!r}, which is not listed"
                )


# --- Invariants -------------------------------------------------------------------------------------------------------
def check(snapshot: Snapshot) -> None:
    """Raise SnapshotError with one sentence at the first invariant that does not hold."""
    _range("the VNI", snapshot.cluster.vni, 0, VNI_MAX)
    _range("the seed", snapshot.cluster.seed, 0, 0xFFFF_FFFF)
    _range("the generation", snapshot.generation, 1, GENERATION_MAX)
    _check_nodes(snapshot)
    at = snapshot.next_ids
    _range("next_ids.vip", at.vip, 1, VIPS_MAX - 1)
    _range("next_ids.node", at.node, 1, NODES_MAX - 1)
    _range("next_ids.member", at.member, 0, MEMBERS_MAX - 1)
    _range("next_ids.backend", at.backend, 1, BACKEND_IDS_MAX - 1)
    _ascending("VIPs", [vip.id for vip in snapshot.vips])
    _limit("backends", sum(len(vip.backends) for vip in snapshot.vips), BACKENDS_MAX)
    _unique_endpoints("VIP", snapshot.vips)
    _unique("backend id", (one.id for vip in snapshot.vips for one in vip.backends))
    check_index(snapshot.vips)
    nodes = {node.id for node in snapshot.nodes}
    for vip in snapshot.vips:
        _check_vip(vip, snapshot.generation)
        _check_backends(vip, nodes)


def _check_nodes(snapshot: Snapshot) -> None:
    nodes = snapshot.nodes
    _ascending("nodes", [node.id for node in nodes])
    _unique("node", (node.name for node in nodes))
    _unique("node address", (format_address(node.address) for node in nodes if len(node.address) == 16))
    _unique("member id", (node.member for node in nodes if node.member != MEMBER_NONE))
    for node in nodes:
        _name("a node", node.name)
        _range(f"the id of node {node.name}", node.id, 1, NODES_MAX - 1)
        _address(f"node {node.name}", node.address)
        if not 1 <= len(node.control.encode()) <= NAME_BYTES_MAX + len(":65535"):
            raise SnapshotError(f"node {node.name} has no control address of the form host:port")
        if node.member != MEMBER_NONE:
            _range(f"the member id of node {node.name}", node.member, 0, MEMBERS_MAX - 1)
    _range("the ring's epoch", snapshot.ring.epoch, 0, GENERATION_MAX)
    _ascending("members of the ring", list(snapshot.ring.members))
    _ascending("members of the ring before", list(snapshot.ring.before))
    if snapshot.ring.before and snapshot.ring.before == snapshot.ring.members:
        raise SnapshotError("the ring is said to change, and has the same members before and after")
    known = {node.member for node in nodes if node.member != MEMBER_NONE}
    for member in (*snapshot.ring.members, *snapshot.ring.before):
        if member not in known:
            raise SnapshotError(f"member {member} of the ring is no node's")


def _check_vip(vip: Vip, generation: int) -> None:
    if not vip.name or any(len(part.encode()) > NAME_BYTES_MAX for part in vip.name.split("/")):
        raise SnapshotError(f"VIP {vip.id} has no name, or one with a part longer than {NAME_BYTES_MAX} bytes")
    _range(f"the id of VIP {vip.name}", vip.id, 1, VIPS_MAX - 1)
    _address(f"VIP {vip.name}", vip.address)
    _range(f"the port of VIP {vip.name}", vip.port, 1, 65_535)
    idle_min, idle_max = IDLE_TIMEOUT_SECONDS_MIN * _SECOND_NS, IDLE_TIMEOUT_SECONDS_MAX * _SECOND_NS
    _range(f"the idle time in ns of VIP {vip.name}", vip.idle_ns, idle_min, idle_max)
    _range(f"the drain time in ns of VIP {vip.name}", vip.drain_ns, 0, DRAIN_TIMEOUT_SECONDS_MAX * _SECOND_NS)
    if not 1 <= vip.created <= vip.epoch <= generation:
        raise SnapshotError(
            f"VIP {vip.name} breaks 1 <= created <= epoch <= generation: {vip.created}, {vip.epoch}, {generation}"
        )
    if len(vip.digest) != DIGEST_BYTES:
        raise SnapshotError(f"the table digest of VIP {vip.name} has {len(vip.digest)} bytes instead of {DIGEST_BYTES}")


def _check_backends(vip: Vip, nodes: set[int]) -> None:
    _ascending(f"backends of {vip.name}", [one.id for one in vip.backends])
    _unique_endpoints(f"backend of {vip.name}", vip.backends)
    for one in vip.backends:
        sound = (
            1 <= one.id < BACKEND_IDS_MAX
            and len(one.address) == 16
            and is_v4(one.address)
            and 1 <= one.port <= 65_535
            and 0 <= one.weight <= WEIGHT_MAX
            and one.node in nodes
        )
        if sound:
            continue
        what = f"backend {one.id} of {vip.name}"
        _range(f"the id of {what}", one.id, 1, BACKEND_IDS_MAX - 1)
        _address(what, one.address)
        _range(f"the port of {what}", one.port, 1, 65_535)
        _range(f"the weight of {what}", one.weight, 0, WEIGHT_MAX)
        raise SnapshotError(f"{what} runs on node {one.node}, which is not in the snapshot")


def index_entries(vips: Iterable[Vip | WorldVip]) -> set[tuple[bytes, int, int]]:
    """What the index has to hold for these VIPs: address, port and protocol of each, and each address once for ICMP."""
    entries = {(vip.address, vip.port, int(vip.protocol)) for vip in vips if len(vip.address) == 16}
    return entries | {(address, 0, PROTOCOL_ICMP) for address, _, _ in entries}


def check_index(vips: Iterable[Vip | WorldVip]) -> None:
    """Raise SnapshotError where the index has no place for these VIPs at one time.

    The fast path walks VIP_CHAIN_MAX entries at most.
    """
    for index, count in Counter(vip_index(*entry) for entry in sorted(index_entries(vips))).items():
        if count > VIP_CHAIN_MAX:
            raise SnapshotError(
                f"{count} VIPs fall on place {index} of the VIP index, which holds {VIP_CHAIN_MAX}; change one's port"
            )


def endpoint(of: WorldVip | Vip | WorldBackend | Backend | WorldNode) -> str:
    """Address, port and protocol as people write them: 203.0.113.10:80/TCP."""
    address = format_address(of.address) if len(of.address) == 16 else of.address.hex()
    if isinstance(of, WorldNode):
        return address
    return f"{address}:{of.port}" + (f"/{of.protocol.name}" if isinstance(of, WorldVip | Vip) else "")


def _unique(what: str, values: Iterable[object]) -> None:
    counts = Counter(values)
    if counts and (most := max(counts.values())) > 1:
        twice = next(value for value, count in counts.items() if count == most)
        raise SnapshotError(f"{what} {twice} is there {most} times; it may be there once")


def _unique_endpoints(what: str, those: Sequence[WorldVip | Vip] | Sequence[WorldBackend | Backend]) -> None:
    """Compared as they are: ten thousand of them written out would take a fifth of a second, at each event."""
    places = {_key(one) if isinstance(one, WorldVip | Vip) else (one.address, one.port) for one in those}
    if len(places) < len(those):
        _unique(what, (endpoint(one) for one in those))


def _limit(what: str, count: int, count_max: int) -> None:
    if count > count_max:
        raise SnapshotError(f"there are {count} {what}; the most is {count_max}")


def _range(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise SnapshotError(f"{what} is {value}; it must be from {low} to {high}")


def _name(what: str, name: str) -> None:
    if not 1 <= len(name.encode()) <= NAME_BYTES_MAX:
        raise SnapshotError(f"{what} has no name, or one longer than {NAME_BYTES_MAX} bytes")


def _address(what: str, address: bytes) -> None:
    if len(address) != 16:
        raise SnapshotError(f"the address of {what} has {len(address)} bytes instead of 16")
    if not is_v4(address):
        raise SnapshotError(f"the address of {what} is {format_address(address)}; IPv6 is not supported yet, use IPv4")


def _ascending(what: str, ids: list[int]) -> None:
    if any(left >= right for left, right in pairwise(ids)):
        raise SnapshotError(f"the ids of the {what} do not ascend")
