"""Next hops, kept current over netlink: the rows of ``nodes``, so that no packet costs a FIB look-up.

What this file decides: by which interface and which MAC each node of the cluster is reached, and how large a packet may
be on the way. Route look-up, link and neighbour table give the answer; events say when to ask again; every
NEIGHBOUR_REFRESH_NS all is asked again, for a path's MTU changes without an event. A row whose next hop has no MAC is
not REACHABLE: its packets are dropped and counted, its LB does not count as a replica.

XDP never shows the kernel that a neighbour is in use, so entries would grow stale and be collected. We ask the kernel
to look after them itself (``misses.keep_neighbour``). One that it refuses (its table is full) costs the nodes behind
it their row, and nobody else anything.

A look-up of all routes takes 0.03 s for a thousand nodes, and every pod that starts on this host has links and routes
to tell of. So routes are looked up again only for a route that leads to a node, a link or an address; after one look-up
the next rests, and takes what has come meanwhile together. (Links that no node's route uses cannot be left out: one
that comes up may be a better way, and the kernel tells of no route that became usable by it.) What links and neighbours
themselves say, a MAC or that a link is gone, is in the rows at once.

Where the kernel does not answer, what was known stays known, whole: tables, routes and nodes are read and looked up
aside, and take the place of the old ones together, once nothing can fail any more. (Tables that were emptied first, and
then not read, made every node unreachable; nodes that were forgotten first were still asked for by whoever had been
told that they were not.) What this file leaves to others: writing the rows (``port``), when to call (the agent), and
IPv6.
"""

import errno
import sys
import time
from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from lbpod.core.layout import NODE, NODE_REACHABLE
from lbpod.core.limits import REROUTE_PAUSE_NS, REROUTE_REST
from lbpod.core.packets import node_checksum
from lbpod.datapath import misses, netlink
from lbpod.datapath.netlink import Events, LinkMessage, Message, NeighbourMessage, Netlink, RouteMessage
from lbpod.datapath.port import U32, DatapathError, Rows

_MAPPED: Final = bytes(10) + b"\xff\xff"
_IPV4: Final = 2
_RTN_UNICAST: Final = 1
_VALID: Final = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80
"""NUD_REACHABLE, STALE, DELAY, PROBE, NOARP, PERMANENT: states in which the kernel itself would use the MAC."""
_FIXED: Final = 0x40 | 0x80
"""NUD_NOARP, PERMANENT: nobody has to look after these."""
_GROUPS: Final = netlink.GROUP_LINK | netlink.GROUP_NEIGHBOUR | netlink.GROUP_IPV4_ADDRESS | netlink.GROUP_IPV4_ROUTE
_MTU_MAX: Final = 0xFFFF


@dataclass(frozen=True, slots=True)
class NextHop:
    """How a node is reached."""

    ifindex: int
    src_mac: bytes
    """6 bytes, of that interface."""
    dst_mac: bytes
    """6 bytes, of the gateway or, on the same link, of the node."""
    mtu: int
    """Of the path, as far as this host knows."""


def node_row(address: bytes, source: bytes, hop: NextHop | None) -> npt.NDArray[np.void]:
    """One row of ``nodes``: NODE[1]. address, source: the node's and this node's own, 16 bytes. No hop: not reachable.

    csum is the sum over the outer IPv4 header without its total length: see packets.node_checksum.
    """
    assert len(address) == len(source) == 16, "addresses have 16 bytes"
    row = np.zeros(1, NODE)
    row["addr"] = np.frombuffer(address, np.uint8)
    if hop is None:
        return row
    assert len(hop.src_mac) == len(hop.dst_mac) == 6, "Ethernet addresses have 6 bytes"
    row["src_mac"] = np.frombuffer(hop.src_mac, np.uint8)
    row["dst_mac"] = np.frombuffer(hop.dst_mac, np.uint8)
    row["ifindex"] = hop.ifindex
    row["mtu"] = min(hop.mtu, _MTU_MAX)
    row["csum"] = node_checksum(source[12:], address[12:])
    row["flags"] = NODE_REACHABLE
    return row


@dataclass(frozen=True, slots=True)
class _Link:
    """An interface that is up: `mac` has 6 bytes."""

    mac: bytes
    mtu: int


@dataclass(frozen=True, slots=True)
class _Route:
    """Where packets for a node go: by which interface, to whose MAC; mtu 0: the interface's."""

    ifindex: int
    via: str
    mtu: int


@dataclass(frozen=True, slots=True)
class _Neighbour:
    """An entry of the neighbour table."""

    mac: bytes
    state: int


class _Tables:
    """The kernel's links that are up, and its neighbours that have a MAC, as of the last dump and the events since."""

    def __init__(self) -> None:
        self.links: Final[dict[int, _Link]] = {}
        self.neighbours: Final[dict[tuple[int, str], _Neighbour]] = {}

    def take_link(self, message: Message, *, gone: bool) -> None:
        mac, is_up = _mac(message.raw(netlink.IFLA_ADDRESS)), bool(message["flags"] & 1)
        if gone or not is_up or not any(mac):
            self.links.pop(message["index"], None)
        else:
            self.links[message["index"]] = _Link(mac, message.number(netlink.IFLA_MTU) or 0)

    def take_neighbour(self, message: Message, *, gone: bool) -> None:
        if message["family"] != _IPV4:
            return
        address = message.address(netlink.NDA_DST)
        if address is None:
            return
        key = message["ifindex"], address
        mac = _mac(message.raw(netlink.NDA_LLADDR))
        if gone or not message["state"] & _VALID or not mac:
            self.neighbours.pop(key, None)
        else:
            self.neighbours[key] = _Neighbour(mac, message["state"])


def _mac(raw: bytes) -> bytes:
    return raw if len(raw) == 6 else b""


class Neighbours:
    """Watches routes, links and neighbours for the nodes that it is told, in the network namespace of its maker.

    Invariants: `_rows` and `_hops` have exactly the nodes of `_nodes`, also after a method that has raised, and each
    row says what the hop says; `_kept` names the neighbours that the kernel was asked to look after and did not refuse,
    all of them in use by a route of `_routes`, unless the kernel did not answer when that was said last.
    """

    def __init__(self, source: bytes) -> None:
        """source: 16 bytes, this node's own address (config.node_addr)."""
        assert source[:12] == _MAPPED, "the outer header is IPv4"
        self._source: Final = source
        # Events first: what changes while the tables are being read is then read again, not missed.
        self._events: Final = Events(_GROUPS)
        self._netlink: Final = Netlink()
        self._nodes: dict[int, bytes] = {}
        self._addresses: list[int] = []
        """Of those that have an IPv4 address, ascending."""
        self._rows: dict[int, npt.NDArray[np.void]] = {}
        self._hops: dict[int, NextHop | None] = {}
        self._routes: dict[int, _Route] = {}
        self._tables = _Tables()
        self._is_behind = False
        """Something has changed since, and the routes may be others."""
        self._reroute_ns = 0
        """Until then the next look-up because of events rests."""
        self._kept: set[tuple[int, str]] = set()
        self.misses: frozenset[misses.Miss] = frozenset()
        """What this kernel lacks for it, or has refused in the last look at all that is in use."""

    def close(self) -> None:
        """Closes the sockets. The kernel goes on looking after the neighbours."""
        self._events.close()
        self._netlink.close()

    def fileno(self) -> int:
        """Readable when `handle_events` has something to do."""
        return self._events.fileno()

    def set_nodes(self, nodes: Mapping[int, bytes]) -> tuple[int, ...]:
        """The nodes to watch from now on: id -> address (16 bytes). Resolves all; ids whose row is new or changed.

        Raises DatapathError where the kernel does not answer; the nodes, and all that is known of them, are as before.
        """
        return self._resolve(dict(nodes))

    def rows(self, ids: Collection[int]) -> tuple[U32, Rows]:
        """Indices and NODE rows of these nodes, to be written to ``nodes``."""
        order = sorted(ids)
        found = np.zeros(len(order), NODE)
        for at, node in enumerate(order):
            found[at] = self._rows[node][0]
        return np.array(order, np.uint32), found

    def resolve_all(self) -> tuple[int, ...]:
        """Reads all tables, looks up all routes, has the kernel find what it does not know; changed ids, ascending.

        To be called every NEIGHBOUR_REFRESH_NS as well. Neighbours that are not known yet come as events.
        """
        return self._resolve(self._nodes)

    def handle_events(self) -> tuple[int, ...]:
        """Takes what the kernel has to tell; ids of nodes whose row has changed, ascending. Never waits.

        Routes may come later: to be called when `is_due` says so, too.
        """
        events, lost = self._events.drain()
        if lost:
            return self.resolve_all()
        for kind, message in events:
            if kind in (netlink.RTM_NEWNEIGH, netlink.RTM_DELNEIGH):
                self._tables.take_neighbour(message, gone=kind == netlink.RTM_DELNEIGH)
            elif kind in (netlink.RTM_NEWLINK, netlink.RTM_DELLINK):
                self._tables.take_link(message, gone=kind == netlink.RTM_DELLINK)
                self._is_behind = True
            elif not isinstance(message, RouteMessage) or self._leads_to_a_node(message):
                self._is_behind = True
        if is_due := self.is_due():
            self._reroute()
        return self._changed() if events or is_due else ()

    def is_due(self) -> bool:
        """Whether `handle_events` has something to do although nothing is readable: a look-up that has rested."""
        return self._is_behind and time.monotonic_ns() >= self._reroute_ns

    def _leads_to_a_node(self, route: RouteMessage) -> bool:
        """Only look-ups of addresses within its prefix can have another answer because of a route."""
        first = int.from_bytes(route.raw(netlink.RTA_DST), "big")  # none: the default route, 0.0.0.0/0
        at = bisect_left(self._addresses, first)
        return at < len(self._addresses) and self._addresses[at] < first + (1 << (32 - route["dst_len"]))

    # --- Questions: nothing that is known changes before all are answered ------------------------------------------

    def _resolve(self, nodes: dict[int, bytes]) -> tuple[int, ...]:
        tables, routes = self._read_tables(), self._routes_to(nodes)
        self._keep(tables, routes, again=True)
        for node in sorted(self._nodes):
            if nodes.get(node) != self._nodes[node]:
                del self._rows[node], self._hops[node]
        self._nodes, self._tables, self._routes, self._is_behind = nodes, tables, routes, False
        self._addresses = sorted(int.from_bytes(one[12:], "big") for one in nodes.values() if one[:12] == _MAPPED)
        return self._changed()

    def _reroute(self) -> None:
        began_ns = time.monotonic_ns()
        try:
            routes = self._routes_to(self._nodes)
            self._keep(self._tables, routes, again=False)
        finally:
            now_ns = time.monotonic_ns()
            self._reroute_ns = now_ns + max(REROUTE_PAUSE_NS, REROUTE_REST * (now_ns - began_ns))
        self._routes, self._is_behind = routes, False

    def _read_tables(self) -> _Tables:
        tables = _Tables()
        try:
            for message in self._netlink.dump(netlink.RTM_GETLINK, LinkMessage()):
                tables.take_link(message, gone=False)
            for message in self._netlink.dump(netlink.RTM_GETNEIGH, NeighbourMessage(family=_IPV4)):
                tables.take_neighbour(message, gone=False)
        except OSError as error:
            raise DatapathError(f"cannot read the kernel's link and neighbour tables: {error.strerror}") from error
        return tables

    def _routes_to(self, nodes: Mapping[int, bytes]) -> dict[int, _Route]:
        found = ((node, self._look_up(nodes[node])) for node in sorted(nodes))
        return {node: route for node, route in found if route is not None}

    def _look_up(self, address: bytes) -> _Route | None:
        if address[:12] != _MAPPED:
            return None
        text = ".".join(str(part) for part in address[12:])
        question = RouteMessage(family=_IPV4, dst_len=32)
        question.put_address(netlink.RTA_DST, text)
        try:
            answer = self._netlink.get(netlink.RTM_GETROUTE, question)
        except OSError as error:
            if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES):
                return None
            raise DatapathError(f"cannot look up the route to {text}: {error.strerror}") from error
        # A local address (this very node) or a blackhole has no next hop.
        ifindex = answer.number(netlink.RTA_OIF)
        if answer["type"] != _RTN_UNICAST or ifindex is None:
            return None
        mtu = answer.nested(netlink.RTA_METRICS).get(netlink.RTAX_MTU, b"")
        via = answer.address(netlink.RTA_GATEWAY) or text
        return _Route(ifindex, via, int.from_bytes(mtu, sys.byteorder))

    def _keep(self, tables: _Tables, routes: Mapping[int, _Route], *, again: bool) -> None:
        """Has the kernel look after the neighbours in use (again: even those that it does), and no longer others. One
        that it refuses is asked for again the next time; the others do not wait for it."""
        wanted = {(route.ifindex, route.via) for route in routes.values() if route.ifindex in tables.links}
        is_refused = False
        for key in sorted(wanted):
            there = tables.neighbours.get(key)
            is_fixed = there is not None and bool(there.state & _FIXED)
            if is_fixed or (key in self._kept and there is not None and not again):
                continue
            miss = misses.keep_neighbour(self._netlink, *key)
            if miss is misses.Miss.NEIGHBOUR_REFUSED:
                is_refused = True
                self._kept.discard(key)
                continue
            if miss is not None:
                self.misses |= {miss}
            self._kept.add(key)
        for key in sorted(self._kept - wanted):
            misses.release_neighbour(self._netlink, *key)
            self._kept.discard(key)
        refused = {misses.Miss.NEIGHBOUR_REFUSED}
        self.misses = self.misses | refused if is_refused else self.misses - refused

    # --- Conclusions ----------------------------------------------------------------------------------------------

    def _hop(self, node: int) -> NextHop | None:
        route = self._routes.get(node)
        link = self._tables.links.get(route.ifindex) if route else None
        neighbour = self._tables.neighbours.get((route.ifindex, route.via)) if route else None
        if route is None or link is None or neighbour is None:
            return None
        return NextHop(route.ifindex, link.mac, neighbour.mac, min(route.mtu or link.mtu, link.mtu))

    def _changed(self) -> tuple[int, ...]:
        """Makes the rows say what is known; the nodes whose row that has changed."""
        changed = []
        for node in sorted(self._nodes):
            hop = self._hop(node)
            if node not in self._rows or self._hops[node] != hop:
                self._rows[node] = node_row(self._nodes[node], self._source, hop)
                self._hops[node] = hop
                changed.append(node)
        return tuple(changed)
