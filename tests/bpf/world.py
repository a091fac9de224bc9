"""Map states for the oracle and the C program: put together by hand, or drawn at random from one number.

Why drawn so: a uniformly random state almost never meets a uniformly random packet. So a world has a small cast (some
clients, VIPs, members, backends), everything that happens is between them, and what the rules tell apart is frequent: a
dead backend, a node without a next hop, a full map, a lease that ended, a member believed down, a ring change.

Times: what is old is long ago and what is to come far in the future, so that the clock of the moment never
decides which side of a limit a packet falls on. (A TCP flow of a machine that is up for less than NAT_TAKEN_NS cannot
have been silent for so long; both readings see that alike.)
"""

import random
from dataclasses import dataclass, field
from functools import cache
from typing import Final

import numpy as np

from lbpod.core import layout, limits, packets
from lbpod.core.hashing import flow_hash, slot_of
from lbpod.core.maps import Lease, Maps, Nat, Pending, Record, Vip, flow_key, mapped, nat_key

HERE_IFINDEX: Final = 1
"""The loopback device: where BPF_PROG_TEST_RUN says that frames come from."""
OLD_NS: Final = 1
"""Stamp of what happened long ago (the clock counts from the machine's start), and end of a lease that has ended."""
LEASE_NS: Final = 3_600_000_000_000
"""How far the end of other leases lies in the future."""
VIP_IDS_MAX: Final = 12
"""VIP ids of random worlds are 1..VIP_IDS_MAX, so that a harness can make their arrays once ..."""
VIP_WITHOUT_SLOTS: Final = VIP_IDS_MAX + 1
"""... and this one, which has none."""
RECORDS_SMALL_COUNT: Final = 64
"""Room in ``records`` of random worlds: small enough to be full."""


def v4(text: str) -> bytes:
    """4 bytes of a dotted address."""
    return bytes(int(part) for part in text.split("."))


# --- By hand ----------------------------------------------------------------------------------------------------------
def put_vip(maps: Maps, vip: Vip) -> None:
    """Enter a VIP into the index, chained where its place is taken, and its address with it."""
    _enter(maps, vip)
    if maps.vip(vip.address, 0, layout.PROTOCOL_ICMP) is None:
        _enter(maps, Vip(0, vip.address, 0, layout.PROTOCOL_ICMP, client_ip=False))


def _enter(maps: Maps, vip: Vip) -> None:
    at = layout.vip_index(vip.address, vip.port, vip.protocol)
    if maps.vips[at]["used"]:
        while maps.vips[at]["next"]:
            at = int(maps.vips[at]["next"])
        upper = maps.vips["used"][limits.VIPS_MAX :]
        fresh = limits.VIPS_MAX + int(np.flatnonzero(upper == 0)[0])
        maps.vips[at]["next"] = fresh
        at = fresh
    row = maps.vips[at]
    row["addr"] = np.frombuffer(vip.address, np.uint8)
    row["port_be"], row["protocol"], row["id"], row["used"] = vip.port, vip.protocol, vip.id, 1
    row["flags"] = layout.VIP_CLIENT_IP if vip.client_ip else 0


def put_slots(maps: Maps, vip: int, words: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> None:
    """Give a VIP its table; other_seen starts at zero."""
    maps.slots[vip] = words
    maps.other_seen[vip] = np.zeros(limits.SLOT_COUNT, dtype=np.uint64)


def slot_word(
    current: int, base: int = 0, tracking: bool = False, settling: bool = False, number: int = 0, agreed: bool = False
) -> int:
    """number: of the round, 0..63."""
    flags = (layout.SLOT_TRACKING if tracking else 0) | (layout.SLOT_SETTLING if settling else 0)
    flags |= layout.SLOT_AGREED if agreed else 0
    return current | flags | number * layout.SLOT_ROUND_ONE | base << layout.SLOT_BASE_SHIFT


def put_config(maps: Maps, node_addr: bytes, member: int, ring_change: bool = False, mss_max: int = 0) -> None:
    row = maps.config[0]
    row["node_addr"] = np.frombuffer(mapped(node_addr), np.uint8)
    row["self"], row["ring_change"], row["mss_max"] = member, int(ring_change), mss_max
    row["vni"], row["seed"], row["epoch"], row["ifindex"] = 0x48F01D, 0x5EED, 17, HERE_IFINDEX
    row["version"] = layout.LAYOUT_VERSION


def put_node(
    maps: Maps, index: int, address: bytes, reachable: bool = True, ifindex: int = HERE_IFINDEX, mtu: int = 0
) -> None:
    """After ``put_config``: the partial checksum holds this node's own address, too."""
    row = maps.nodes[index]
    row["addr"] = np.frombuffer(mapped(address), np.uint8)
    row["dst_mac"] = np.frombuffer(b"\x02\xdd" + address, np.uint8)
    row["src_mac"] = np.frombuffer(b"\x02\x55" + address, np.uint8)
    row["ifindex"], row["mtu"], row["flags"] = ifindex, mtu, layout.NODE_REACHABLE if reachable else 0
    row["csum"] = packets.node_checksum(maps.settings().node_addr[12:], address)


def put_member(
    maps: Maps,
    member: int,
    address: bytes,
    node: int,
    present: bool = True,
    up: bool = True,
    doubted: bool = False,
) -> None:
    row = maps.members[member]
    row["addr"], row["node"] = np.frombuffer(mapped(address), np.uint8), node
    flags = ((present, layout.MEMBER_PRESENT), (up, layout.MEMBER_UP), (doubted, layout.MEMBER_DOUBTED))
    row["flags"] = sum(flag for is_set, flag in flags if is_set)


def put_backend(
    maps: Maps, backend: int, address: bytes, port: int, node: int, vip: int, alive: bool = True, local: bool = False
) -> None:
    row = maps.backends[backend]
    row["addr"], row["port_be"], row["node"], row["vip"] = np.frombuffer(mapped(address), np.uint8), port, node, vip
    row["flags"] = (layout.BACKEND_ALIVE if alive else 0) | (layout.BACKEND_LOCAL if local else 0)


def owners(owner: int, backup: int = limits.MEMBER_NONE) -> int:
    return owner | backup << 16


@dataclass(frozen=True, slots=True)
class Flow:
    """A client (4 bytes, port) and the VIP that it speaks to."""

    client: bytes
    port: int
    vip: Vip

    @property
    def key(self) -> bytes:
        return flow_key(mapped(self.client), 0 if self.vip.client_ip else self.port, self.vip.id)

    def slot(self, seed: int) -> int:
        port = 0 if self.vip.client_ip else self.port
        vip = self.vip
        return slot_of(flow_hash(mapped(self.client), vip.address, port, vip.port, vip.protocol, seed))


# --- At random --------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class World:
    """A drawn map state and its cast. Everything follows from ``seed`` (and from ``now_ns`` for the leases)."""

    seed: int
    now_ns: int
    maps: Maps = field(default_factory=Maps)
    vips: list[Vip] = field(default_factory=list)
    flows: list[Flow] = field(default_factory=list)
    node_ids: list[int] = field(default_factory=list)
    member_ids: list[int] = field(default_factory=list)
    backend_ids: list[int] = field(default_factory=list)
    peers: list[bytes] = field(default_factory=list)
    """Addresses (4 bytes) that the tunnel's door knows."""

    def pods(self) -> list[tuple[bytes, int]]:
        rows = self.maps.backends[self.backend_ids]
        return [(row["addr"].tobytes()[12:], int(row["port_be"])) for row in rows]


def draw_world(seed: int, now_ns: int) -> World:
    """Draw one. Costs some milliseconds: most of it are the 65,536 slots of each VIP."""
    dice, world = random.Random(seed), World(seed, now_ns)
    _draw_config(dice, world)
    _draw_nodes(dice, world)
    _draw_vips(dice, world)
    _draw_backends(dice, world)
    _draw_slots(dice, world)
    _draw_flows(dice, world)
    return world


def _draw_config(dice: random.Random, world: World) -> None:
    world.member_ids = dice.sample([0, 1, 2, 3, 7, 255, 256, limits.MEMBERS_MAX - 1], 6)
    member = limits.MEMBER_NONE if dice.random() < 0.1 else world.member_ids[0]
    put_config(world.maps, v4("10.0.0.1"), member, dice.random() < 0.6, dice.choice([0, 536, 1400, 1460]))
    if dice.random() < 0.08:
        world.maps.headroom_bytes = dice.choice([0, 12, 16, 24, 28, 44, 48, 56, 60])
    row = world.maps.config[0]
    row["vni"] = dice.choice([1, 0x48F01D, limits.VNI_MAX])
    row["seed"], row["epoch"] = dice.getrandbits(32), dice.getrandbits(32)


def _draw_nodes(dice: random.Random, world: World) -> None:
    world.node_ids = dice.sample([0, 1, 2, 3, 40, 41, 1000, limits.NODES_MAX - 1], 7)
    for index, node in enumerate(world.node_ids):
        mtu = dice.choice([0, 0, 1500, 1600, 9000, 200, 120])
        address = v4(f"10.0.{dice.randrange(4)}.{index + 1}")
        put_node(world.maps, node, address, dice.random() < 0.9, dice.choice([HERE_IFINDEX, HERE_IFINDEX, 2, 77]), mtu)
    for index, member in enumerate(world.member_ids):
        node = world.node_ids[index] if dice.random() < 0.97 else 70_000
        address = v4(f"10.0.0.{index + 1}")
        put_member(world.maps, member, address, node, dice.random() < 0.93, dice.random() < 0.7, dice.random() < 0.3)
        if dice.random() < 0.9:
            world.peers.append(address)
            world.maps.member_by_addr[mapped(address)] = member
    if not world.peers:
        world.peers.append(v4("10.0.0.9"))
        world.maps.member_by_addr[mapped(v4("10.0.0.9"))] = world.member_ids[1]


def _draw_vips(dice: random.Random, world: World) -> None:
    """Some VIPs on one address, some elsewhere, and some that share one place of the index."""
    shared, other = mapped(v4("203.0.113.10")), mapped(v4(f"198.51.{dice.randrange(256)}.{dice.randrange(256)}"))
    tcp, udp = layout.PROTOCOL_TCP, layout.PROTOCOL_UDP
    named = [(shared, 80, tcp), (shared, 443, udp), (shared, 443, tcp), (other, 53, udp), (other, 80, tcp)]
    ports = _neighbours(shared, 80, tcp)[: dice.choice([0, 2, limits.VIP_CHAIN_MAX - 1])]
    named += [(shared, port, tcp) for port in ports]
    ids = dice.sample(range(1, VIP_IDS_MAX + 1), len(named))
    if dice.random() < 0.2:
        ids[dice.randrange(len(ids))] = VIP_WITHOUT_SLOTS
    for vip_id, (address, port, protocol) in zip(ids, named, strict=True):
        vip = Vip(vip_id, address, port, protocol, client_ip=dice.random() < 0.3)
        put_vip(world.maps, vip)
        world.vips.append(vip)


@cache
def _neighbours(address: bytes, port: int, protocol: int) -> list[int]:
    """Other ports that share the place of this one in the VIP index."""
    place = layout.vip_index(address, port, protocol)
    return [other for other in range(65_536) if other != port and layout.vip_index(address, other, protocol) == place]


def _draw_backends(dice: random.Random, world: World) -> None:
    everywhere = [1, 2, 3, 100, 65_535, 65_536, limits.BACKEND_IDS_MAX - 1, 5, 6, 7]
    world.backend_ids = dice.sample(everywhere, 8)
    for index, backend in enumerate(world.backend_ids):
        node = dice.choice(world.node_ids) if dice.random() < 0.96 else dice.choice([limits.NODES_MAX, 1 << 31])
        address, vip = v4(f"10.244.{dice.randrange(3)}.{index + 2}"), dice.choice(world.vips).id
        port = dice.choice([8080, 80, 0, 65_535, 53])
        put_backend(world.maps, backend, address, port, node, vip, dice.random() < 0.8, dice.random() < 0.2)
    world.maps.backends[0] = world.maps.backends[dice.choice(world.backend_ids)]  # 0 is nobody, whatever lies there


def _draw_slots(dice: random.Random, world: World) -> None:
    draw = np.random.default_rng(dice.getrandbits(64))
    for vip in world.vips:
        if vip.id == VIP_WITHOUT_SLOTS:
            continue
        words = np.array([_draw_word(dice, world) for _ in range(12)], dtype=np.uint64)
        put_slots(world.maps, vip.id, words[draw.integers(0, len(words), limits.SLOT_COUNT, dtype=np.uint8)])
    maps = world.maps
    for array in (maps.own, maps.next, maps.prev):
        # In own less often while the ring changes, or there would be few slots with this LB in next or prev alone.
        seldom = array is maps.own and maps.settings().ring_change
        pairs = np.array([owners(*_draw_pair(dice, world, seldom)) for _ in range(8)], dtype=np.uint32)
        array[:] = pairs[draw.integers(0, len(pairs), limits.SLOT_COUNT, dtype=np.uint8)]


def _draw_word(dice: random.Random, world: World) -> int:
    strange = [0, limits.BACKEND_IDS_MAX, layout.SLOT_CURRENT_MASK]
    current, base = (dice.choice(world.backend_ids if dice.random() < 0.95 else strange) for _ in range(2))
    if dice.random() < 0.02:
        base = 0xFFFF_FFFF
    number = dice.choice([0, 0, 5, 63])
    agreed = dice.random() < 0.1
    tracking, settling = dice.random() < 0.8, dice.random() < 0.2
    return slot_word(current, current if agreed else base, tracking, settling, number, agreed)


def _draw_pair(dice: random.Random, world: World, self_seldom: bool) -> tuple[int, int]:
    ring = world.member_ids if self_seldom else [*world.member_ids, world.member_ids[0], world.member_ids[0]]
    owner, backup = dice.choice(ring), dice.choice(ring)
    if dice.random() < 0.1:
        backup = limits.MEMBER_NONE
    if dice.random() < 0.05:
        owner = dice.choice([limits.MEMBER_NONE, limits.MEMBERS_MAX])
    return owner, backup


def _draw_flows(dice: random.Random, world: World) -> None:
    maps = world.maps
    clients = [v4(f"192.0.2.{last}") for last in dice.sample(range(1, 255), 6)]
    world.flows = [
        Flow(dice.choice(clients), dice.choice([dice.randrange(65_536), 1024, 40_000]), dice.choice(world.vips))
        for _ in range(40)
    ]
    maps.records.count_max = RECORDS_SMALL_COUNT
    for flow in world.flows:
        if dice.random() < 0.25:
            round_ = _draw_round(dice, world, flow) | dice.randint(0, limits.CHAIN_AGAIN_MAX)
            maps.records.put(flow.key, Record(_draw_backend(dice, world), round_, OLD_NS))
        if dice.random() < 0.25:
            seen_ns = world.now_ns if random.Random(flow.key).random() < 0.4 else OLD_NS  # other dice, as in _draw_nat
            maps.embryonic.put(flow.key, Record(_draw_backend(dice, world), _draw_round(dice, world, flow), seen_ns))
        if dice.random() < 0.4:
            until_ns = dice.choice([world.now_ns + LEASE_NS, world.now_ns + LEASE_NS, OLD_NS])
            maps.cache.put(flow.key, Lease(_draw_backend(dice, world), _draw_round(dice, world, flow), until_ns))
        if dice.random() < 0.1:
            maps.pending.put(flow.key, Pending(flow.slot(maps.settings().seed), 0, OLD_NS))
        if dice.random() < 0.3:
            _draw_nat(dice, world, flow)
    if dice.random() < 0.4:
        while len(maps.records) < RECORDS_SMALL_COUNT:
            maps.records.put(flow_key(mapped(dice.randbytes(4)), 0, 0), Record(1, 0, 0))


def _draw_round(dice: random.Random, world: World, flow: Flow) -> int:
    """Mostly the one that the flow's slot is in."""
    words = world.maps.slots.get(flow.vip.id)
    if words is None or dice.random() < 0.1:
        return dice.choice([0, layout.SLOT_ROUND_ONE, layout.SLOT_ROUND_MASK])
    return int(words[flow.slot(world.maps.settings().seed)]) & layout.SLOT_ROUND_MASK


def _draw_backend(dice: random.Random, world: World) -> int:
    return dice.choice(world.backend_ids) if dice.random() < 0.96 else dice.choice([0, limits.BACKEND_IDS_MAX, 1 << 31])


def _draw_nat(dice: random.Random, world: World, flow: Flow) -> None:
    pod, port = dice.choice(world.pods())
    vip = flow.vip if dice.random() < 0.8 else dice.choice(world.vips)
    key = nat_key(mapped(flow.client), mapped(pod), flow.port, port, flow.vip.protocol)
    flags = dice.choice([0, 0, 0, 0, *range(8)])
    entry = Nat(vip.address, vip.port, flags, dice.choice([OLD_NS, world.now_ns]))
    kind = random.Random(key).randrange(8)  # other dice, so that worlds stay what they were but for this
    if kind < 5:
        world.maps.nat.put(key, entry)
    if kind > 2:
        flags |= (0, layout.NAT_SYN, layout.NAT_ANSWERED, layout.NAT_SYN | layout.NAT_ANSWERED)[kind % 4]
        flags |= layout.NAT_ASSURED * (kind == 4)
        world.maps.unassured.put(key, entry._replace(flags=flags))
