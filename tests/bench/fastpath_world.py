"""The node that the fast path is measured on: VIPs in every state, backends, replicas, and flows that fit the driver.

Why one world for all figures: scenarios differ only in the frame that goes in and in who we are, so a difference in
nanoseconds is a difference of the path taken. Built through the datapath's own port, as an agent would. Left to others:
what is measured and how (``fastpath.py``), the packets themselves (``fastpath_driver.bpf.c``).
"""

import socket
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lbpod.core import layout
from lbpod.core.hashing import MAPPED_PREFIX, flow_hashes
from lbpod.core.limits import SLOT_COUNT
from lbpod.core.packets import node_checksum
from lbpod.datapath.kernel import KernelDatapath
from lbpod.datapath.port import ArrayName, FlowMap, Rows

SEED: Final = 0x484F4C44
VIP_ADDRESS: Final = "203.0.113.10"
CLIENT_PREFIX: Final = bytes([11, 0])
"""The first half of every client's address; the driver fills in the rest."""
NODE_ADDRESS: Final = "10.0.0.1"
BACKENDS_COUNT: Final = 100
NODES_COUNT: Final = 20
KNOWN_FLOWS_COUNT: Final = 131_072
"""Flows with a lease, or with a record."""
LOOPBACK_IFINDEX: Final = 1
"""BPF_PROG_TEST_RUN says that packets come in by it."""
FAR_NS: Final = 1 << 62
SELF_STRANGER: Final = 3
SELF_OWNER: Final = 1
BACKUP: Final = 2
FRAME_BYTES: Final = 60
"""A 64-byte Ethernet frame, without its checksum."""
WORDS_AT: Final = (0, 6, 14, 22, 30, 38, 46)
"""Where the driver's words lie in the frame."""
STATE: Final = np.dtype([("index", "<u8"), ("flows", "<u8"), ("frame_bytes", "<u8"), ("words", "<u8", (7,))])
"""struct bench_state of fastpath_driver.bpf.c."""

Keys = npt.NDArray[Any]


class Service(IntEnum):
    """The VIPs, by id; each has port 79 + id."""

    STEADY = 1
    ONE_PERCENT = 2
    """One slot in a hundred is tracking; its flows have leases."""
    CACHED = 3
    """All slots tracking, leases."""
    UNKNOWN = 4
    """All slots tracking, nothing known."""
    RECORDED = 5
    """All slots tracking, full records."""
    FRESH = 6
    """All slots tracking, no records: for first packets."""

    @property
    def port(self) -> int:
        return 79 + self


TCP_ACK: Final = 0x10
TCP_SYN: Final = 0x02


@dataclass(frozen=True, slots=True)
class Scenario:
    """One figure: which packets, through which program, as whom, and how they have to be counted."""

    name: str
    program: str = "hf_xdp"
    port: int = Service.STEADY.port
    tcp_flags: int = TCP_ACK
    flows: int = 1
    self_member: int = SELF_STRANGER
    address: str = VIP_ADDRESS
    ethertype: int = 0x0800
    protocol: int = 6
    verdicts: tuple[str, ...] = ()
    """Names of the verdicts that every packet must have been counted under; empty: not counted."""

    def template(self) -> bytes:
        """A frame with 40 bytes of IP packet; client's address and port are the driver's to fill in."""
        ethernet = bytes([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 9]) + struct.pack("!H", self.ethertype)
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0x4000, 64, self.protocol, 0)
        ip += CLIENT_PREFIX + bytes(2) + socket.inet_aton(self.address)
        tcp = struct.pack("!HHIIBBHHH", 0, self.port, 1, 1, 0x50, self.tcp_flags, 1024, 0, 0)
        return (ethernet + ip + tcp).ljust(FRAME_BYTES, b"\0")

    def words(self) -> tuple[int, ...]:
        """The same as the driver's words."""
        frame = self.template()
        return tuple(int.from_bytes(frame[at : at + 8], "little") for at in WORDS_AT)


def mapped(address: str) -> bytes:
    """16 bytes of an IPv4 address."""
    return MAPPED_PREFIX + socket.inet_aton(address)


def driver_flows(service: Service, count: int) -> Keys:
    """FLOW keys of the first ``count`` flows that the driver makes."""
    scrambled = np.arange(count, dtype=np.uint32) * np.uint32(2_654_435_761)
    keys = np.zeros(count, layout.FLOW)
    address = np.zeros((count, 16), np.uint8)
    address[:, :14] = np.frombuffer(MAPPED_PREFIX + CLIENT_PREFIX, np.uint8)
    address[:, 14:] = (scrambled >> np.uint32(16)).astype("<u2").view(np.uint8).reshape(count, 2)
    keys["addr"] = address
    keys["port_be"] = (scrambled & np.uint32(0xFFFF)).astype("<u2").view(">u2")
    keys["vip"] = int(service)
    return keys


def slots_of(service: Service, keys: Keys) -> npt.NDArray[np.uint32]:
    """Slot of each flow."""
    ports = keys["port_be"].astype(np.uint16)
    addresses = np.ascontiguousarray(keys["addr"])
    return flow_hashes(addresses, ports, mapped(VIP_ADDRESS), service.port, 6, False, SEED) >> np.uint32(16)


def write_config(port: KernelDatapath, self_member: int) -> None:
    """Settings of the node; who we are is what scenarios change."""
    row = np.zeros(1, layout.CONFIG)
    row["node_addr"] = np.frombuffer(mapped(NODE_ADDRESS), np.uint8)
    row["self"], row["vni"], row["seed"], row["epoch"], row["ifindex"] = self_member, 4711, SEED, 1, LOOPBACK_IFINDEX
    port.write(ArrayName.CONFIG, np.zeros(1, np.uint32), row)


def _write_places(port: KernelDatapath) -> None:
    nodes = np.zeros(NODES_COUNT, layout.NODE)
    for at in range(NODES_COUNT):
        address = f"10.0.1.{at + 1}"
        nodes[at]["addr"] = np.frombuffer(mapped(address), np.uint8)
        nodes[at]["dst_mac"], nodes[at]["src_mac"] = [2, 0, 0, 0, 1, at], [2, 0, 0, 0, 0, 1]
        nodes[at]["csum"] = node_checksum(socket.inet_aton(NODE_ADDRESS), socket.inet_aton(address))
    nodes["ifindex"], nodes["mtu"], nodes["flags"] = LOOPBACK_IFINDEX, 1600, layout.NODE_REACHABLE
    port.write(ArrayName.NODES, np.arange(NODES_COUNT, dtype=np.uint32), nodes)
    backends = np.zeros(BACKENDS_COUNT, layout.BACKEND)
    for at in range(BACKENDS_COUNT):
        backends[at]["addr"] = np.frombuffer(mapped(f"10.244.0.{at + 1}"), np.uint8)
        backends[at]["node"] = at % NODES_COUNT
    backends["port_be"], backends["flags"] = 8080, layout.BACKEND_ALIVE
    port.write(ArrayName.BACKENDS, np.arange(1, BACKENDS_COUNT + 1, dtype=np.uint32), backends)
    members = np.zeros(SELF_STRANGER + 1, layout.MEMBER)
    members["node"] = np.arange(len(members))
    members["flags"] = layout.MEMBER_PRESENT | layout.MEMBER_UP
    port.write(ArrayName.MEMBERS, np.arange(len(members), dtype=np.uint32), members)
    own = np.full(SLOT_COUNT, SELF_OWNER | BACKUP << 16, np.uint32)
    port.write(ArrayName.OWN, np.arange(SLOT_COUNT, dtype=np.uint32), own)


def _write_vips(port: KernelDatapath) -> None:
    wanted = [(service.port, 6, int(service)) for service in Service] + [(0, 1, 0)]
    rows = np.zeros(len(wanted), layout.VIP)
    places = np.array([layout.vip_index(mapped(VIP_ADDRESS), p, proto) for p, proto, _ in wanted], np.uint32)
    assert len(set(places.tolist())) == len(places), "the VIPs of the bench do not collide"
    rows["addr"] = np.frombuffer(mapped(VIP_ADDRESS), np.uint8)
    rows["used"] = 1
    for row, (number, protocol, identity) in zip(rows, wanted, strict=True):
        row["port_be"], row["protocol"], row["id"] = number, protocol, identity
    for service in Service:
        port.vip_create(int(service))
    port.write(ArrayName.VIPS, places, rows)


def _write_slots(port: KernelDatapath) -> npt.NDArray[np.uint64]:
    """The same table for every VIP; returns it, without flags."""
    dice = np.random.default_rng(1)
    every = np.arange(SLOT_COUNT, dtype=np.uint32)
    table = dice.integers(1, BACKENDS_COUNT + 1, SLOT_COUNT, np.uint64)
    tracking = table | np.uint64(layout.SLOT_TRACKING) | table << np.uint64(layout.SLOT_BASE_SHIFT)
    for service in Service:
        words = tracking.copy() if service > Service.ONE_PERCENT else table.copy()
        if service is Service.ONE_PERCENT:
            words[::100] = tracking[::100]
        port.write_slots(int(service), every, words)
    return table


def _write_flows(port: KernelDatapath, table: npt.NDArray[np.uint64]) -> None:
    """Leases and records, each to the very backend that the table says: what is found is then what is sent to."""

    def put(name: FlowMap, keys: Keys, values: Rows) -> None:
        assert port.flows_put(name, keys, values) == len(keys), f"{name.value} has room for the bench"

    for service in (Service.ONE_PERCENT, Service.CACHED):
        keys = driver_flows(service, KNOWN_FLOWS_COUNT)
        slots = slots_of(service, keys)
        if service is Service.ONE_PERCENT:
            keys, slots = keys[slots % 100 == 0], slots[slots % 100 == 0]
        leases = np.zeros(len(keys), layout.LEASE)
        leases["backend"], leases["until_ns"] = table[slots], FAR_NS
        put(FlowMap.CACHE, keys, leases)
    keys = driver_flows(Service.RECORDED, KNOWN_FLOWS_COUNT)
    records = np.zeros(len(keys), layout.RECORD)
    records["backend"] = table[slots_of(Service.RECORDED, keys)]
    put(FlowMap.RECORDS, keys, records)


def build(port: KernelDatapath) -> None:
    """Everything but ``config``."""
    _write_places(port)
    _write_vips(port)
    _write_flows(port, _write_slots(port))
