"""The fast path in a lab without any agent: a test writes every node's maps by hand and then sends real packets.

Why by hand: what is proven here is the kernel's half alone, on real links. A wrong decision of an agent cannot hide
behind a right one of the fast path, or the other way round. Every node of a `Fabric` gets the same VIPs, backends,
nodes and members, as a controller would have it; a test then changes what it wants to see (a slot, an owner, a belief).
What a packet must get is the fast path's README; what became of it is asked of the counters.
"""

import ipaddress
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from lbpod.core import layout, limits, packets
from lbpod.core.hashing import flow_hash, slot_of
from lbpod.core.maps import mapped
from lbpod.core.verdicts import Verdict
from lbpod.datapath import loader
from lbpod.datapath.attach import XdpAttachment, XdpWish, attach_tc, attach_xdp, forget_old_programs
from lbpod.datapath.kernel import KernelDatapath
from lbpod.datapath.loader import LoadSettings
from lbpod.datapath.port import ArrayName, FlowMap
from lbpod.lab import Lab, Node, Pod
from tests.bpf.datapaths import another_build

VIP: Final = "203.0.113.10"
PREFIX: Final = "203.0.113.0/24"
VNI: Final = 0x48F001
SEED: Final = 0x5EED5EED
EPOCH: Final = 7
TCP: Final = layout.PROTOCOL_TCP
UDP: Final = layout.PROTOCOL_UDP
ICMP: Final = layout.PROTOCOL_ICMP

SIZES: Final = dict.fromkeys(("cache", "embryonic", "pending", "nat", "unassured", "records"), 16_384)
"""Room for any test here; the full sizes would cost each node some 300 MB."""

REST_NS: Final = 30_000_000
REST_ROUNDS_MAX: Final = 100
_COUNTED: Final[tuple[Verdict, ...]] = tuple(verdict for verdict in Verdict if verdict is not Verdict.PASS_OTHER)

Counted = dict[str, dict[Verdict, int]]
"""Node name -> verdict -> packets; only what is not 0, and not PASS_OTHER (ARP and the like are nobody's promise)."""


def address(text: str) -> bytes:
    """16 bytes of an IPv4 address."""
    return mapped(ipaddress.IPv4Address(text).packed)


def _bytes_of(text: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(address(text), np.uint8)


def mac(text: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex(text.replace(":", "")), np.uint8)


def slot_word(current: int, *, base: int = 0, tracking: bool = False, settling: bool = False) -> int:
    flags = (layout.SLOT_TRACKING if tracking else 0) | (layout.SLOT_SETTLING if settling else 0)
    return current | flags | base << layout.SLOT_BASE_SHIFT


@dataclass
class FastNode:
    """One node with the fast path on its uplink. `port` is what an agent would write to."""

    node: Node
    port: KernelDatapath
    attachment: XdpAttachment

    def flows(self, name: FlowMap) -> dict[tuple[str, int, int], tuple[int, ...]]:
        """(client, port, VIP id) -> fields of the value."""
        keys, values = self.port.flows_dump(name)
        return {
            (str(ipaddress.IPv4Address(key["addr"].tobytes()[12:])), int(key["port_be"]), int(key["vip"])): tuple(value)
            for key, value in zip(keys, values.tolist(), strict=True)
        }


@dataclass(frozen=True)
class VipEntry:
    """A VIP of the fabric. id: its index into slots."""

    id: int
    address: str
    port: int
    protocol: int
    client_ip: bool


class Fabric:
    """The fast path on all nodes of a lab. `lbs` are the ring: member id = position; ECMP leads the VIPs to them.

    Invariant: node id = node number, on every node; the rows of all nodes are alike but for LOCAL, `self` and what a
    test changes at one node.
    """

    def __init__(self, lab: Lab, lbs: Sequence[Node], *, wish: XdpWish = XdpWish.NATIVE) -> None:
        self.lab = lab
        self.lbs = list(lbs)
        self.nodes: dict[str, FastNode] = {}
        self.vips: dict[int, VipEntry] = {}
        self._wish = wish
        self._places: set[int] = set()
        self._backend_last = 0
        self._builds = 0

    def __enter__(self) -> Self:
        try:
            for node in self.lab.nodes:
                self.nodes[node.name] = self._load(node, self._wish)
                self._configure(self.nodes[node.name])
            self.lab.router.set_ecmp(PREFIX, self.lbs)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for name in sorted(self.nodes):
            self.nodes.pop(name).port.close()

    def _load(self, node: Node, wish: XdpWish, programs: Path = loader.PACKAGED_OBJECT) -> FastNode:
        fast_path = loader.load(LoadSettings(self.lab.pin_dir(node), programs, SIZES))
        with node.in_netns():
            attachment = attach_xdp(fast_path, "eth0", wish)
            attach_tc(fast_path, "eth0")
            forget_old_programs(fast_path)
        return FastNode(node, KernelDatapath(fast_path), attachment)

    def replace_programs(self, node: Node) -> None:
        """What an agent's upgrade does: give the maps up, take them over again, replace both programs in place."""
        self.nodes.pop(node.name).port.close()
        self._builds += 1
        self.nodes[node.name] = self._load(node, XdpWish.AUTO, another_build(self.lab.run_dir, self._builds))

    # --- What every node knows of the others ---

    def _configure(self, fast: FastNode) -> None:
        self.set_config(fast.node)
        for other in self.lab.nodes:
            self.set_node(fast.node, other)
        for lb in self.lbs:
            self.set_member(fast.node, lb, up=True)
        fast.port.members_door([address(lb.address) for lb in self.lbs], [self.member(lb) for lb in self.lbs])
        none = np.full(limits.SLOT_COUNT, 0xFFFF_FFFF, np.uint32)
        for name in (ArrayName.OWN, ArrayName.NEXT, ArrayName.PREV):
            fast.port.write(name, _indices(range(limits.SLOT_COUNT)), none)

    def set_config(self, at: Node, *, mss_max: int = 0) -> None:
        """The settings of one node."""
        row = np.zeros(1, layout.CONFIG)
        row["node_addr"], row["mac"] = _bytes_of(at.address), mac(at.mac())
        row["self"] = self.member(at)
        row["vni"], row["seed"], row["epoch"] = VNI, SEED, EPOCH
        row["ifindex"], row["mss_max"] = self.nodes[at.name].attachment.ifindex, mss_max
        self.port(at).write(ArrayName.CONFIG, _indices([0]), row)

    def member(self, node: Node) -> int:
        """Member id of a node, MEMBER_NONE where it is no LB."""
        return self.lbs.index(node) if node in self.lbs else limits.MEMBER_NONE

    def port(self, node: Node) -> KernelDatapath:
        return self.nodes[node.name].port

    def set_node(self, at: Node, other: Node, *, mtu: int | None = None, reachable: bool = True) -> None:
        """What `at` knows of the way to `other`: through the router, which is the next hop of everything here."""
        row = np.zeros(1, layout.NODE)
        row["addr"] = _bytes_of(other.address)
        row["dst_mac"] = mac(self.lab.router.mac(at.router_interface))
        row["src_mac"] = mac(at.mac())
        row["ifindex"] = self.nodes[at.name].attachment.ifindex
        row["csum"] = packets.node_checksum(address(at.address)[12:], address(other.address)[12:])
        row["mtu"] = self.lab.options.underlay_mtu if mtu is None else mtu
        row["flags"] = layout.NODE_REACHABLE if reachable else 0
        self.port(at).write(ArrayName.NODES, _indices([other.number]), row)

    def set_member(self, at: Node, lb: Node, *, up: bool) -> None:
        """Whether `at` believes that `lb` is up."""
        row = np.zeros(1, layout.MEMBER)
        row["addr"], row["node"] = _bytes_of(lb.address), lb.number
        row["flags"] = layout.MEMBER_PRESENT | (layout.MEMBER_UP if up else 0)
        self.port(at).write(ArrayName.MEMBERS, _indices([self.member(lb)]), row)

    # --- VIPs, backends, slots, owners: the same everywhere, unless `at` names some nodes ---

    def add_vip(self, port: int, protocol: int = TCP, *, client_ip: bool = False, vip: str = VIP) -> VipEntry:
        """A VIP without backends. Its address gets its ICMP entry."""
        entry = VipEntry(len(self.vips) + 1, vip, port, protocol, client_ip)
        self.vips[entry.id] = entry
        rows: dict[int, tuple[str, int, int, int, int]] = {
            layout.vip_index(address(vip), port, protocol): (vip, port, protocol, entry.id, int(client_ip)),
            layout.vip_index(address(vip), 0, ICMP): (vip, 0, ICMP, 0, 0),
        }
        place = layout.vip_index(address(vip), port, protocol)
        assert len(rows) == 2, "the VIPs of a test are chosen not to collide"
        assert place not in self._places, "the VIPs of a test are chosen not to collide"
        self._places |= set(rows)
        for fast in self.nodes.values():
            fast.port.vip_create(entry.id)
            for index, (text, number, proto, vip_id, flags) in sorted(rows.items()):
                row = np.zeros(1, layout.VIP)
                row["addr"], row["port_be"], row["protocol"] = _bytes_of(text), number, proto
                row["id"], row["flags"], row["used"] = vip_id, flags, 1
                fast.port.write(ArrayName.VIPS, _indices([index]), row)
        return entry

    def add_backend(self, vip: VipEntry, host: Pod | Node, port: int) -> int:
        """A backend at a pod, or (hostNetwork) at a node itself; its id. On its own node it is LOCAL."""
        self._backend_last += 1
        self.set_backend(self._backend_last, vip, host, port)
        return self._backend_last

    def set_backend(self, backend: int, vip: VipEntry, host: Pod | Node, port: int, *, alive: bool = True) -> None:
        node = host.node if isinstance(host, Pod) else host
        for fast in self.nodes.values():
            row = np.zeros(1, layout.BACKEND)
            row["addr"], row["port_be"] = _bytes_of(host.address), port
            row["node"], row["vip"] = node.number, vip.id
            local = layout.BACKEND_LOCAL if fast.node is node else 0
            row["flags"] = (layout.BACKEND_ALIVE if alive else 0) | local
            fast.port.write(ArrayName.BACKENDS, _indices([backend]), row)

    def set_slots(
        self, vip: VipEntry, word: int, *, slots: Iterable[int] | None = None, at: Sequence[Node] | None = None
    ) -> None:
        """The same word in these slots (all)."""
        chosen = np.arange(limits.SLOT_COUNT, dtype=np.uint32) if slots is None else _indices(slots)
        for node in at or self.lab.nodes:
            self.port(node).write_slots(vip.id, chosen, np.full(len(chosen), word, np.uint64))

    def spread(self, vip: VipEntry, backends: Sequence[int]) -> None:
        """All slots steady, over these backends in turn."""
        slots = np.arange(limits.SLOT_COUNT, dtype=np.uint32)
        words = np.array(backends, np.uint64)[slots % len(backends)]
        for fast in self.nodes.values():
            fast.port.write_slots(vip.id, slots, words)

    def set_owners(self, owner: Node, backup: Node | None) -> None:
        """Owner and backup of every slot."""
        word = self.member(owner) | (limits.MEMBER_NONE if backup is None else self.member(backup)) << 16
        self._write_own(np.full(limits.SLOT_COUNT, word, np.uint32))

    def spread_owners(self) -> None:
        """Owner of a slot: the LBs in turn; backup: the next one."""
        slots = np.arange(limits.SLOT_COUNT, dtype=np.uint32)
        count = len(self.lbs)
        self._write_own((slots % count | (slots + 1) % count << 16).astype(np.uint32))

    def _write_own(self, words: npt.NDArray[np.uint32]) -> None:
        for fast in self.nodes.values():
            fast.port.write(ArrayName.OWN, _indices(range(limits.SLOT_COUNT)), words)

    # --- What became of the packets ---

    def slot_of(self, vip: VipEntry, client: str, port: int) -> int:
        """The slot of a client's flow."""
        sport = 0 if vip.client_ip else port
        return slot_of(flow_hash(address(client), address(vip.address), sport, vip.port, vip.protocol, SEED))

    def put_flow(
        self, at: Node, name: FlowMap, client: str, port: int, vip: VipEntry, value: tuple[int, int, int]
    ) -> None:
        """One entry of a flow map. value: the fields of layout.RECORD or layout.LEASE."""
        key = np.zeros(1, layout.FLOW)
        key["addr"], key["port_be"], key["vip"] = _bytes_of(client), 0 if vip.client_ip else port, vip.id
        dtype = layout.LEASE if name is FlowMap.CACHE else layout.RECORD
        assert self.port(at).flows_put(name, key, np.array([value], dtype)) == 1, "a test's map has room"

    def counters(self) -> Mapping[str, npt.NDArray[np.uint64]]:
        return {name: fast.port.counters()[:, 0] for name, fast in self.nodes.items()}

    @contextmanager
    def counting(self) -> Iterator[Counted]:
        """What is counted inside the block; it begins and ends when nothing is on its way any more."""
        before = self._counters_at_rest()
        counted: Counted = {}
        yield counted
        after = self._counters_at_rest()
        for name, new in after.items():
            grown: npt.NDArray[Any] = new - before[name]
            found: dict[Verdict, int] = {v: int(grown[v]) for v in _COUNTED if grown[v]}
            if found:
                counted[name] = found

    def _counters_at_rest(self) -> Mapping[str, npt.NDArray[np.uint64]]:
        """Counters that did not change for REST_NS (the last acknowledgements may still be on their way)."""
        last = self.counters()
        for _ in range(REST_ROUNDS_MAX):
            time.sleep(REST_NS / 1e9)
            now = self.counters()
            if all(np.array_equal(last[name][1:], now[name][1:]) for name in now):
                return now
            last = now
        raise AssertionError("packets are still being counted: something sends without end")


def _indices(numbers: Iterable[int]) -> npt.NDArray[np.uint32]:
    return np.fromiter(numbers, np.uint32)
