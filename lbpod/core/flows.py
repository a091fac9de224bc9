"""Arithmetic on thousands of flows at once: which slot, whose question, what time, still alive.

Why apart from the Keeper: these are pure functions of arrays, and the only places where the LB's brain touches single
flows. None of them loops over flows in Python (4,096 flows take about a millisecond); a loop over the few VIPs or LBs
in a batch is the most that is allowed.

Left to others: what is asked or answered when (``resolve``, ``forget``, ``quiet``), and the hash itself (``hashing``).

**The times of a flow** (DESIGN: sections 2 and 3). A flow that is silent for longer than ``idle`` may be taken for
over. A lease keeps a flow's packets away from the owner for ``lease`` at most. So an owner that has seen nothing of a
flow for ``window = idle + lease + margin`` knows that it is over, wherever its last packet went: the last one that an
LB sent by a lease may have come ``lease`` after the owner's last sight of it, and it is then silent for ``idle``.
Both settling and forgetting wait for the window. (Forgetting after ``idle`` alone was dropped: a flow that speaks
once per lease, then pauses for just under ``idle``, would lose its record.)
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from lbpod.core.hashing import MAPPED_PREFIX, SLOT_SHIFT, U8, flow_hashes, murmur3_words
from lbpod.core.layout import FLOW, NAT_ASSURED, NAT_FIN_IN, NAT_FIN_OUT, NAT_RST, NAT_SYN
from lbpod.core.limits import LEASE_DIVISOR, LEASE_NS_MAX, MARGIN_NS, NAT_HALF_OPEN_NS, VIPS_MAX
from lbpod.core.model import Affinity, Protocol, Vip, is_v4

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]
Rows = npt.NDArray[np.void]

_PREFIX: Final = np.frombuffer(MAPPED_PREFIX, dtype=np.uint8)
_FINS: Final = NAT_FIN_IN | NAT_FIN_OUT
_MS_NS: Final = 1_000_000


def lease_ns(idle_ns: int) -> int:
    """How long an answer about a flow may be used."""
    return min(idle_ns // LEASE_DIVISOR, LEASE_NS_MAX)


def window_ns(idle_ns: int, lease: int | None = None) -> int:
    """How long a replica that has seen nothing of a flow must wait to know that it is over.

    lease: the longest that may still run, where it is not the one of ``idle_ns`` (idle has been lowered).
    """
    return idle_ns + max(lease or 0, lease_ns(idle_ns)) + MARGIN_NS


def groups(values: npt.NDArray[np.generic]) -> Iterator[tuple[int, Places]]:
    """Each value that occurs, ascending, with the places where it does."""
    if not len(values):
        return
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    ends = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    for places in np.split(order, ends):
        yield int(values[places[0]]), places


class Facts:
    """What a batch of flows has to know of its VIPs: arrays by VIP id, (VIPS_MAX,) each; zero where there is none."""

    def __init__(self, vips: Iterable[Vip] = (), seed: int = 0) -> None:
        self.seed = seed
        self.known: Bools = np.zeros(VIPS_MAX, dtype=np.bool_)
        self.unannounced: Bools = np.zeros(VIPS_MAX, dtype=np.bool_)
        """Nobody can tell by a packet whether it is its flow's first: UDP, and ClientIP (the flow is the client, and a
        client's second SYN does not begin it)."""
        self.client_ip: Bools = np.zeros(VIPS_MAX, dtype=np.bool_)
        self.address: U8 = np.zeros((VIPS_MAX, 16), dtype=np.uint8)
        self.port: U16 = np.zeros(VIPS_MAX, dtype=np.uint16)
        self.protocol: U8 = np.zeros(VIPS_MAX, dtype=np.uint8)
        self.idle_ns: U64 = np.zeros(VIPS_MAX, dtype=np.uint64)
        self.lease_ns: U64 = np.zeros(VIPS_MAX, dtype=np.uint64)
        self.window_ns: U64 = np.zeros(VIPS_MAX, dtype=np.uint64)
        self._all_v4 = True
        for vip in vips:
            self._add(vip)

    def _add(self, vip: Vip) -> None:
        at, idle_ns = vip.id, max(vip.idle_ns, int(self.idle_ns[vip.id]))
        self.known[at] = True
        self.unannounced[at] = vip.protocol is Protocol.UDP or vip.affinity is Affinity.CLIENT_IP
        self.client_ip[at] = vip.affinity is Affinity.CLIENT_IP
        self.address[at] = np.frombuffer(vip.address, dtype=np.uint8)
        self.port[at] = vip.port
        self.protocol[at] = vip.protocol
        self.idle_ns[at] = idle_ns
        self.lease_ns[at] = lease_ns(idle_ns)
        self.window_ns[at] = window_ns(idle_ns)
        self._all_v4 &= is_v4(vip.address)

    def has(self, vips: U32) -> Bools:
        """(n,): which ids name a VIP. Any uint32 may be asked."""
        return (vips < VIPS_MAX) & self.known[np.where(vips < VIPS_MAX, vips, 0)]

    def vips_of(self, addresses: U8, ports: U16, protocols: U8) -> U32:
        """Id of the VIP with each address (n, 16), port (n,) in host order and protocol (n,); 0 where none is known."""
        ids = np.flatnonzero(self.known)
        if not len(ids) or not len(ports):
            return np.zeros(len(ports), dtype=np.uint32)
        marks = _marks(self.address[ids], self.port[ids], self.protocol[ids])
        order = np.argsort(marks, kind="stable")
        ids, marks = ids[order], marks[order]
        wanted = _marks(addresses, ports, protocols)
        found = ids[np.minimum(np.searchsorted(marks, wanted), len(ids) - 1)]
        # A mark is a hash: of two VIPs with the same mark only the first is found, the other counts as unknown.
        same = (self.address[found] == addresses).all(axis=1)
        same &= (self.port[found] == ports) & (self.protocol[found] == protocols)
        return np.where(same, found, 0).astype(np.uint32)

    def slots(self, flows: Rows) -> U32:
        """Slot of each flow (rows of layout.FLOW whose VIPs are known), (n,) uint32: what the fast path computes."""
        vips = flows["vip"]
        if not self._all_v4 or (flows["addr"][:, :12] != _PREFIX).any():
            return self._slots_each(flows)
        words = np.empty((len(flows), 4), dtype=np.uint32)
        words[:, 0] = np.ascontiguousarray(flows["addr"][:, 12:]).view("<u4")[:, 0]
        words[:, 1] = np.ascontiguousarray(self.address[vips, 12:]).view("<u4")[:, 0]
        ports = np.empty((len(flows), 2), dtype=">u2")
        ports[:, 0] = np.where(self.client_ip[vips], 0, flows["port_be"])
        ports[:, 1] = self.port[vips]
        words[:, 2] = ports.view("<u4")[:, 0]
        words[:, 3] = self.protocol[vips]
        return murmur3_words(words, self.seed) >> np.uint32(SLOT_SHIFT)

    def _slots_each(self, flows: Rows) -> U32:
        """The same, VIP by VIP: for the day of IPv6."""
        slots = np.zeros(len(flows), dtype=np.uint32)
        for vip, places in groups(flows["vip"]):
            slots[places] = self.slots_of(vip, flows["addr"][places], flows["port_be"][places].astype(np.uint16))
        return slots

    def slots_of(self, vip: int, addresses: U8, ports: U16) -> U32:
        """Slot of each client of one VIP. addresses: (n, 16); ports: (n,) host integers."""
        address, affine = self.address[vip].tobytes(), bool(self.client_ip[vip])
        hashes = flow_hashes(addresses, ports, address, int(self.port[vip]), int(self.protocol[vip]), affine, self.seed)
        return hashes >> np.uint32(SLOT_SHIFT)

    def leases_left_ms(self, vips: U32, since_ns: U64, now_ns: int) -> U32:
        """What is left of leases that began then, each as long as its VIP's, in milliseconds, rounded down."""
        ends_ns = since_ns.astype(np.uint64) + self.lease_ns[vips]
        left_ns = ends_ns - np.minimum(ends_ns, np.uint64(now_ns))
        left_ms: U32 = (np.minimum(left_ns, self.lease_ns[vips]) // np.uint64(_MS_NS)).astype(np.uint32)
        return left_ms


def _marks(addresses: U8, ports: U16, protocols: U8) -> U64:
    """One word for each (address, port, protocol): different ones for different IPv4 VIPs."""
    halves = np.ascontiguousarray(addresses).view("<u8")
    rest = ports.astype(np.uint64) | protocols.astype(np.uint64) << np.uint64(16)
    mixed: U64 = halves[:, 1] ^ rest << np.uint64(8) ^ halves[:, 0] * np.uint64(0x9E37_79B9_7F4A_7C15)
    return mixed


def flows_from(data: bytes) -> Rows:
    """Rows of layout.FLOW from a body. The border has checked that they are whole."""
    return np.frombuffer(data, dtype=FLOW)


def slots_bytes(slots: U32) -> bytes:
    """Slots as they travel (u16)."""
    return slots.astype("<u2").tobytes()


def slots_from(data: bytes) -> U32:
    """Slots of a body, ascending, each once: as we send them ourselves, or put in order."""
    slots = np.frombuffer(data, dtype="<u2").astype(np.uint32)
    return slots if (slots[:-1] < slots[1:]).all() else np.unique(slots)


def ids_from(data: bytes) -> U32:
    """Backend ids of a body. The border has checked their range."""
    return np.frombuffer(data, dtype="<u4").astype(np.uint32)


def over(seen_ns: U64, wait_ns: U64 | int, now_ns: int) -> Bools:
    """True where ``wait_ns`` has passed since a stamp. Nothing wraps: stamps may be a little ahead of ``now_ns``."""
    return seen_ns + np.asarray(wait_ns, dtype=np.uint64) < np.uint64(now_ns)


def live(values: Rows, client_ip: Bools, idle_ns: U64 | int, now_ns: int) -> Bools:
    """Which translated flows (rows of layout.NAT) may still have something to say.

    Over: silent for longer than idle and the margin, for what was sent just before the idle timeout is still on its
    way; or closed (RST, or both FINs) and silent for the margin, for the last data and FIN of a pod, which it may have
    to send again, and whose ACKs have to reach it; or a handshake that came to nothing. What is assured counts where it
    is in `nat`.
    """
    seen = values["seen_ns"].astype(np.uint64)
    wait_ns = np.asarray(idle_ns, dtype=np.uint64) + np.uint64(MARGIN_NS)
    ended = closed(values, client_ip) & over(seen, MARGIN_NS, now_ns) | never_opened(values, client_ip, now_ns)
    return np.asarray(~over(seen, wait_ns, now_ns) & ~ended & (values["flags"] & NAT_ASSURED == 0))


def closed(values: Rows, client_ip: Bools) -> Bools:
    """Which translated flows (rows of layout.NAT) have seen RST, or FIN from both sides.

    client_ip: (n,), those of VIPs with ClientIP affinity. Their flow is the client, and is not over with a connection.
    """
    flags = values["flags"]
    return np.asarray(((flags & NAT_RST != 0) | (flags & _FINS == _FINS)) & ~client_ip)


def never_opened(values: Rows, client_ip: Bools, now_ns: int) -> Bools:
    """Which translated flows (rows of layout.NAT) are handshakes that came to nothing. client_ip: as in ``closed``."""
    seen = values["seen_ns"].astype(np.uint64)
    return np.asarray((values["flags"] & NAT_SYN != 0) & over(seen, NAT_HALF_OPEN_NS, now_ns) & ~client_ip)


def vips_of(facts: Facts, keys: Rows, values: Rows) -> U32:
    """Id of the VIP of each translated flow (layout.NAT_KEY, NAT), 0: not known."""
    return facts.vips_of(values["vip"], values["vip_port_be"].astype(np.uint16), keys["protocol"])


@dataclass(frozen=True, slots=True)
class LiveFlows:
    """What early settle has to know of translated flows that are live, of VIPs that are known: (n,), pods: (n, 16)."""

    vips: U32
    slots: U16
    pods: U8
    ports: U16

    @staticmethod
    def among(facts: Facts, keys: Rows, values: Rows, now_ns: int) -> "LiveFlows":
        """Those among these rows of layout.NAT_KEY and NAT."""
        vips = vips_of(facts, keys, values)
        meant = (vips != 0) & live(values, facts.client_ip[vips], facts.idle_ns[vips], now_ns)
        keys, vips = keys[meant], vips[meant]
        flows = np.zeros(len(keys), dtype=FLOW)
        flows["addr"], flows["port_be"], flows["vip"] = keys["client"], keys["client_port_be"], vips
        ports = keys["pod_port_be"].astype(np.uint16)
        return LiveFlows(vips, facts.slots(flows).astype(np.uint16), keys["pod"].copy(), ports)


def endpoints_match(addresses: U8, ports: U16, wanted: Iterable[tuple[bytes, int]]) -> Bools:
    """Which (address, port) pairs are among the wanted ones (few). addresses: (n, 16) uint8; ports: (n,) host
    integers."""
    halves = np.ascontiguousarray(addresses).view("<u8")
    found = np.zeros(len(ports), dtype=np.bool_)
    for address, port in wanted:
        low, high = np.frombuffer(address, dtype="<u8")
        found |= (ports == port) & (halves[:, 1] == high) & (halves[:, 0] == low)
    return found
