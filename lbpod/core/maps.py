"""The maps of one node as plain Python: what the oracle reads and writes, and what the memory datapath hands out.

Why apart from ``oracle.py``: state and rules are two things, and the simulator owns many of the former. Arrays are
NumPy arrays with the dtypes of ``layout.py`` (so that a test can copy them to and from the kernel's maps as they are);
hash maps are dicts keyed by the very bytes that the kernel uses as key. Each hash map has a bound that a test can make
tiny.

Left to others: what is written when (``oracle.py``), batches and errors (``lbpod/datapath/memory.py``). An LRU map is
approximated: it never refuses, and gives up what was put or read longest ago (the kernel's LRU is approximate as well,
in its own way, so nothing may depend on which entry goes).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from lbpod.core import layout, limits
from lbpod.core.hashing import MAPPED_PREFIX
from lbpod.core.verdicts import Verdict

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.void]


class Record(NamedTuple):
    """Value of ``records`` and ``embryonic``; field by field layout.RECORD."""

    backend: int
    round: int
    seen_ns: int


class Lease(NamedTuple):
    """Value of ``cache``; field by field layout.LEASE."""

    backend: int
    round: int
    until_ns: int


class Pending(NamedTuple):
    """Value of ``pending``; field by field layout.PENDING."""

    slot: int
    pad: int
    seen_ns: int


class Nat(NamedTuple):
    """Value of ``nat`` and ``unassured``: VIP (16 bytes) and host port of a translated flow, what was seen of it."""

    vip: bytes
    vip_port: int
    flags: int
    seen_ns: int


class Vip(NamedTuple):
    """One entry of ``vips`` that was found. address: 16 bytes, port: host order."""

    id: int
    address: bytes
    port: int
    protocol: int
    client_ip: bool


class Node(NamedTuple):
    """A REACHABLE entry of ``nodes``. address: 4 bytes."""

    address: bytes
    dst_mac: bytes
    src_mac: bytes
    ifindex: int
    mtu: int


class Backend(NamedTuple):
    """An ALIVE entry of ``backends``. address: 16 bytes, port: host order."""

    address: bytes
    port: int
    node: int
    local: bool


class Config(NamedTuple):
    """The one entry of ``config``. node_addr: 16 bytes."""

    node_addr: bytes
    self: int
    vni: int
    seed: int
    epoch: int
    ring_change: bool
    mss_max: int


V = TypeVar("V")

_ROWS_MAX: Final = 4_096
"""Rows of each kind that are kept as read."""


class FlowTable(Generic[V]):
    """A bounded hash map. evicts: LRU, makes room by itself; otherwise a new key is refused when the map is full."""

    def __init__(self, count_max: int, evicts: bool) -> None:
        self.count_max = count_max
        self.evicts = evicts
        self.rows: dict[bytes, V] = {}
        """Least recently used first, where ``evicts``. Invariant: len(rows) <= count_max (checked by ``put``)."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.rows)

    def get(self, key: bytes) -> V | None:
        value = self.rows.get(key)
        if value is not None and self.evicts:
            self.rows[key] = self.rows.pop(key)
        return value

    def put(self, key: bytes, value: V) -> bool:
        """Insert or replace; False where there is no room."""
        if key in self.rows:
            if self.evicts:
                del self.rows[key]
        elif len(self.rows) >= self.count_max:
            if not self.evicts or not self.rows:
                return False
            del self.rows[next(iter(self.rows))]
        self.rows[key] = value
        return True

    def delete(self, key: bytes) -> None:
        self.rows.pop(key, None)


def _array(dtype: np.dtype[np.void], count: int) -> Rows:
    return np.zeros(count, dtype=dtype)


def _owners() -> U32:
    return np.zeros(limits.SLOT_COUNT, dtype=np.uint32)


@dataclass(slots=True)
class Maps:
    """Every map of one node, all zero, as the kernel makes them. Arrays keep their identity; write into them."""

    vips: Rows = field(default_factory=lambda: _array(layout.VIP, limits.VIP_INDEX_COUNT))
    slots: dict[int, U64] = field(default_factory=dict)
    """VIP id -> (SLOT_COUNT,) words."""
    other_seen: dict[int, U64] = field(default_factory=dict)
    """VIP id -> (SLOT_COUNT,) ns. Invariant: the same keys as ``slots``."""
    backends: Rows = field(default_factory=lambda: _array(layout.BACKEND, limits.BACKEND_IDS_MAX))
    nodes: Rows = field(default_factory=lambda: _array(layout.NODE, limits.NODES_MAX))
    members: Rows = field(default_factory=lambda: _array(layout.MEMBER, limits.MEMBERS_MAX))
    own: U32 = field(default_factory=_owners)
    next: U32 = field(default_factory=_owners)
    prev: U32 = field(default_factory=_owners)
    vip_stats: Rows = field(default_factory=lambda: _array(layout.VIP_STAT, limits.VIPS_MAX))
    config: Rows = field(default_factory=lambda: _array(layout.CONFIG, 1))
    cache: FlowTable[Lease] = field(default_factory=lambda: FlowTable(limits.CACHE_MAX, evicts=True))
    records: FlowTable[Record] = field(default_factory=lambda: FlowTable(limits.RECORDS_MAX, evicts=False))
    embryonic: FlowTable[Record] = field(default_factory=lambda: FlowTable(limits.EMBRYONIC_MAX, evicts=True))
    pending: FlowTable[Pending] = field(default_factory=lambda: FlowTable(limits.PENDING_MAX, evicts=True))
    nat: FlowTable[Nat] = field(default_factory=lambda: FlowTable(limits.NAT_MAX, evicts=True))
    unassured: FlowTable[Nat] = field(default_factory=lambda: FlowTable(limits.UNASSURED_MAX, evicts=True))
    member_by_addr: dict[bytes, int] = field(default_factory=dict)
    """16-byte outer source address -> member id."""
    counters: U64 = field(default_factory=lambda: np.zeros((len(Verdict), 2), dtype=np.uint64))
    headroom_bytes: int = 216
    """How far a frame can grow at its head: XDP_PACKET_HEADROOM (256) less the kernel's struct xdp_frame (40)."""

    def settings(self) -> Config:
        return _config(self.config.tobytes())

    def vip(self, address: bytes, port: int, protocol: int) -> Vip | None:
        """Look a VIP up. address: 16 bytes; port: host order. (address, 0, ICMP) says whether it is a VIP's address."""
        at = layout.vip_index(address, port, protocol)
        for _ in range(limits.VIP_CHAIN_MAX):
            found, at = _entry(self.vips[at].tobytes())
            if found is not None and found[1:4] == (address, port, protocol):
                return found
            if at == 0 or at >= limits.VIP_INDEX_COUNT:
                return None
        return None

    def backend(self, backend: int) -> Backend | None:
        """Give the backend where it is ALIVE. 0 and ids outside the array are nobody."""
        if not 0 < backend < len(self.backends):
            return None
        return _backend(self.backends[backend].tobytes())

    def node(self, node: int) -> Node | None:
        """Give the node where it is REACHABLE."""
        if node >= len(self.nodes):
            return None
        return _node(self.nodes[node].tobytes())

    def member_node(self, member: int, flag: int = layout.MEMBER_UP) -> int | None:
        """Give the node index of a member that is PRESENT and has this flag, and whose node is REACHABLE."""
        if member >= len(self.members):
            return None
        node = _node_of_member(self.members[member].tobytes(), flag)
        return node if node is not None and self.node(node) is not None else None

    def replicas(self, slot: int) -> list[int]:
        """Replicas of a slot, each once, in the order of the chain: own, then next and prev during a ring change."""
        if not self.settings().ring_change:
            return self.owners(slot)
        return _listed(self.own[slot], self.next[slot], self.prev[slot])

    def owners(self, slot: int) -> list[int]:
        """Owner and backup of a slot, whether or not the ring changes."""
        return _listed(self.own[slot])

    def lookup(self, keys: Sequence[bytes]) -> list[Record]:
        """What is recorded about flows (bytes of layout.FLOW), alive or not, as `hf_lookup` reads it; round
        RECORD_MISSING: nothing, with RECORD_EMBRYONIC: found in `embryonic`."""
        return [self.records.get(key) or self._lookup_embryonic(key) for key in keys]

    def _lookup_embryonic(self, key: bytes) -> Record:
        found = self.embryonic.get(key)
        if found is None:
            return Record(0, layout.RECORD_MISSING, 0)
        return found._replace(round=found.round | layout.RECORD_EMBRYONIC)

    def assure(self, key: bytes, entry: Nat) -> Nat:
        """Put what was unassured into `nat`; what its old entry is from then on."""
        self.nat.put(key, entry._replace(flags=entry.flags & (layout.NAT_FIN_IN | layout.NAT_FIN_OUT)))
        return entry._replace(flags=entry.flags | layout.NAT_ASSURED)

    def count(self, verdict: Verdict, frame_bytes: int) -> None:
        self.counters[verdict, 0] += np.uint64(1)
        self.counters[verdict, 1] += np.uint64(frame_bytes)


# --- Rows -------------------------------------------------------------------------------------------------------------
# A packet reads a dozen rows that seldom change, and NumPy takes microseconds for a field: each content is read once.
@lru_cache(maxsize=_ROWS_MAX)
def _config(data: bytes) -> Config:
    row = np.frombuffer(data, layout.CONFIG)[0]
    return Config(
        node_addr=row["node_addr"].tobytes(),
        self=int(row["self"]),
        vni=int(row["vni"]),
        seed=int(row["seed"]),
        epoch=int(row["epoch"]),
        ring_change=bool(row["ring_change"]),
        mss_max=int(row["mss_max"]),
    )


@lru_cache(maxsize=_ROWS_MAX)
def _entry(data: bytes) -> tuple[Vip | None, int]:
    """The VIP at a place of the index, None where it is not used; and the place to go on at."""
    row = np.frombuffer(data, layout.VIP)[0]
    named = (row["addr"].tobytes(), int(row["port_be"]), int(row["protocol"]))
    vip = Vip(int(row["id"]), *named, client_ip=bool(row["flags"] & layout.VIP_CLIENT_IP))
    return vip if row["used"] else None, int(row["next"])


@lru_cache(maxsize=_ROWS_MAX)
def _backend(data: bytes) -> Backend | None:
    row = np.frombuffer(data, layout.BACKEND)[0]
    flags = int(row["flags"])
    if not flags & layout.BACKEND_ALIVE:
        return None
    local = bool(flags & layout.BACKEND_LOCAL)
    return Backend(row["addr"].tobytes(), int(row["port_be"]), int(row["node"]), local)


@lru_cache(maxsize=_ROWS_MAX)
def _node(data: bytes) -> Node | None:
    row = np.frombuffer(data, layout.NODE)[0]
    if not row["flags"] & layout.NODE_REACHABLE:
        return None
    return Node(
        address=row["addr"].tobytes()[12:],
        dst_mac=row["dst_mac"].tobytes(),
        src_mac=row["src_mac"].tobytes(),
        ifindex=int(row["ifindex"]),
        mtu=int(row["mtu"]),
    )


@lru_cache(maxsize=_ROWS_MAX)
def _node_of_member(data: bytes, flag: int) -> int | None:
    row = np.frombuffer(data, layout.MEMBER)[0]
    wanted = layout.MEMBER_PRESENT | flag
    return int(row["node"]) if int(row["flags"]) & wanted == wanted else None


def _listed(*words: np.uint32) -> list[int]:
    """Members in ownership words, each once, in their order."""
    listed: list[int] = []
    for member in (half for word in words for half in (int(word) & 0xFFFF, int(word) >> 16)):
        if member != limits.MEMBER_NONE and member not in listed:
            listed.append(member)
    return listed


def flow_key(address: bytes, port: int, vip: int) -> bytes:
    """Bytes of layout.FLOW. address: 16 bytes; port: host order, 0 with ClientIP affinity."""
    return address + port.to_bytes(2, "big") + b"\x00\x00" + vip.to_bytes(4, "little")


def nat_key(client: bytes, pod: bytes, client_port: int, pod_port: int, protocol: int) -> bytes:
    """Bytes of layout.NAT_KEY. Addresses: 16 bytes; ports: host order."""
    return client + pod + client_port.to_bytes(2, "big") + pod_port.to_bytes(2, "big") + bytes([protocol, 0, 0, 0])


def mapped(address: bytes) -> bytes:
    """16 bytes of an IPv4 address."""
    return MAPPED_PREFIX + address
