"""From effects to the datapath: the only file that writes to it.

What this file decides: the order in which the parts of a Configure become visible, and what need not be written at all.
A *mirror* of every array remembers what is in the map, so that a change of one backend writes one row, and so that
writing the same thing again (after a failure, after a restart) costs nothing and disturbs nobody.

Order: what is referred to before what refers to it (nodes, members, door, backends, config, and the VIP index last). A
prefix of this order is safe: a VIP that is not yet in the index is passed on to the stack as before. In a change that
removes things the index still leads to them for some microseconds, to rows that say 'not alive'.

Ownership has an order of its own. Between any two writes a slot's replicas are some that it had or is to have, and all
that it had and is to have: one that were missing for a moment would be left out of a chain, and not know the flow.

Left to others: what to write (the Keeper), rows (``rows``), chains (``vip_index``), next hops
(``neighbours``). Every method raises DatapathError and may be called again.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lbpod.core.flows import groups
from lbpod.core.layout import (
    FLOW,
    NODE,
    NODE_REACHABLE,
    RECORD,
    RECORD_EMBRYONIC,
    RECORD_MISSING,
    VIP_STAT,
)
from lbpod.core.limits import MARGIN_NS, NODES_MAX, SLOT_COUNT
from lbpod.core.messages import (
    Configure,
    CreateVip,
    DatapathEffect,
    DeleteVip,
    DropFlows,
    DropNat,
    DropRecords,
    DumpRecords,
    KeeperEvent,
    LookNat,
    LookRecords,
    LookSeen,
    NatLooked,
    PutCache,
    PutRecords,
    RecordsDumped,
    RecordsLooked,
    RecordsPut,
    SeenRead,
    StampNatFull,
    WriteOwnership,
    WriteSlots,
)
from lbpod.core.transition import is_of_round
from lbpod.datapath import rows
from lbpod.datapath.port import U32, U64, ArrayName, Datapath, DatapathError, FlowMap, NatMap
from lbpod.datapath.rows import Rows, Scene, Uplink
from lbpod.datapath.vip_index import Entry, VipIndex, entries_of

NOBODY = np.uint32(0xFFFF_FFFF)
"""An ownership entry without owner and backup: MEMBER_NONE twice."""

NAT_STAT = 0
"""The row of vip_stats that is no VIP's: its stamp says when nat or unassured last may have evicted."""


class NextHops(Protocol):
    """Where the frames to each node go: what is needed of ``datapath.neighbours.Neighbours``. The driver owns it."""

    def set_nodes(self, nodes: Mapping[int, bytes]) -> Sequence[int]:
        """The nodes of interest from now on: id -> address (16 bytes); ids whose row is new or has changed. Where it
        raises, the nodes are those from before, and `rows` has them."""

    def rows(self, ids: Collection[int]) -> tuple[U32, Rows]:
        """Indices and rows (layout.NODE) of these nodes."""

    def handle_events(self) -> Sequence[int]:
        """Takes what is new, and never waits; ids whose row has changed."""

    def is_due(self) -> bool:
        """Whether `handle_events` has something to do although there is nothing to read: it has put that off."""

    def resolve_all(self) -> Sequence[int]:
        """Asks for everything again; ids whose row has changed."""

    def fileno(self) -> int:
        """Readable when there may be events; negative where there never are."""


class _Mirror:
    """One array, and what is in it. Invariant: `_rows` is None or equals the map, but for what the programs write."""

    def __init__(self, datapath: Datapath, name: ArrayName) -> None:
        self._datapath, self._name = datapath, name
        self._rows: Rows | None = None

    def write(self, wanted: Rows) -> int:
        """Makes the map equal to `wanted`; how many rows that took."""
        known = self._known()
        indices = rows.changed(known, wanted)
        return self._replace(known, indices, wanted[indices])

    def write_at(self, indices: U32, wanted: Rows) -> int:
        """Makes these rows of the map (each named once) equal to `wanted`, and leaves the others."""
        known = self._known()
        places = rows.changed(known[indices], wanted)
        return self._replace(known, indices[places], wanted[places])

    def _known(self) -> Rows:
        if self._rows is None:
            self._rows = self._datapath.read(self._name)
        return self._rows

    def _replace(self, known: Rows, indices: U32, wanted: Rows) -> int:
        if len(indices) == 0:
            return 0
        self._rows = None
        self._datapath.write(self._name, indices, wanted)
        known[indices] = wanted
        self._rows = known
        return len(indices)


def _nat_map(assured: bool) -> NatMap:
    return NatMap.NAT if assured else NatMap.UNASSURED


def _is_belief(before: Configure, effect: Configure) -> bool:
    """Nothing but who is believed to be up differs: that has to be in the maps at once, however large the rest is."""
    same = effect.committed is before.committed and effect.prepared is before.prepared
    return same and effect.ring_done == before.ring_done and effect.alive == before.alive


class Found(NamedTuple):
    """What an earlier agent has left in the maps."""

    slots: dict[int, U64]
    """VIP id -> (SLOT_COUNT,) words."""
    down: frozenset[int]
    given_up: frozenset[int]


def found_in(datapath: Datapath) -> Found:
    """The slots of each VIP, members that are down, and which of those are not waited for. Raises DatapathError."""
    slots = {vip: datapath.read_slots(vip) for vip in datapath.vip_ids()}
    members = datapath.read(ArrayName.MEMBERS)
    return Found(slots, rows.down_in(members), rows.given_up_in(members))


class Applier:
    """Carries out the effects that touch the datapath, on one node."""

    def __init__(self, datapath: Datapath, self_name: str, uplink: Uplink, hops: NextHops) -> None:
        self._datapath = datapath
        self._self_name = self_name
        self._uplink = uplink
        self._hops = hops
        self._nodes: dict[int, bytes] | None = None
        self._inherited: Rows | None = None
        self._arrays: dict[ArrayName, _Mirror] = {name: _Mirror(datapath, name) for name in ArrayName}
        self._index: VipIndex | None = None
        self._entries: tuple[Entry, ...] | None = None
        self._door: tuple[tuple[bytes, int], ...] | None = None
        self._configured: Configure | None = None
        self._whole: Configure | None = None
        """The last Configure, where all of it is written."""
        self._ring_change: bool | None = None
        """What the map's config says, once it has been looked at: an earlier agent may have left a ring change."""
        self.rows_written = 0
        """Rows of arrays written since the start."""
        self.swept_flows = 0
        """Translated flows deleted since the start because they were over."""

    def apply(self, effect: DatapathEffect) -> KeeperEvent | None:
        """Carries out one effect; the event that answers it, where it is a question."""
        match effect:
            case Configure():
                self._configure(effect)
            case WriteOwnership():
                self._own(effect)
            case CreateVip():
                self._datapath.vip_create(effect.vip)
            case DeleteVip():
                self._datapath.vip_delete(effect.vip)
            case WriteSlots():
                self._datapath.write_slots(effect.vip, effect.slots, effect.words)
            case PutCache():
                self._datapath.flows_put(FlowMap.CACHE, effect.flows, effect.leases)
            case DropRecords():
                self._datapath.records_drop(effect.flows, effect.records)
            case DropFlows():
                for name in (FlowMap.CACHE, FlowMap.RECORDS, FlowMap.EMBRYONIC):
                    self._datapath.flows_delete(name, self._datapath.flows_dump(name)[0])
            case DropNat():
                self.swept_flows += self._datapath.nat_delete(_nat_map(effect.assured), effect.keys, effect.seen_ns)
            case StampNatFull():
                row = np.zeros(1, VIP_STAT)
                row["unrecorded_ns"] = effect.at_ns
                self._datapath.write(ArrayName.VIP_STATS, np.array([NAT_STAT], np.uint32), row)
            case _:
                return self._look(effect)
        return None

    def _look(self, effect: LookRecords | DumpRecords | PutRecords | LookNat | LookSeen) -> KeeperEvent:
        match effect:
            case PutRecords():
                return RecordsPut(effect.token, self._put_records(effect))
            case LookRecords():
                return self._look_records(effect)
            case DumpRecords():
                return self._list_records(effect)
            case LookNat():
                return self._list_nat(effect)
            case LookSeen():
                stamps = self._datapath.read_other_seen(effect.vip)
                return SeenRead(effect.token, stamps, self._unrecorded_ns(effect.vip))

    def _look_records(self, effect: LookRecords) -> RecordsLooked:
        if effect.slots is None:
            return RecordsLooked(effect.token, *self._lookup(effect.flows))
        vips, served = effect.flows["vip"], self._datapath.vip_ids()
        stamps = np.zeros(len(vips), dtype=np.uint64)  # 0: never, also of a VIP that has no slots here
        for vip, places in groups(vips):
            if vip in served:
                stamps[places] = self._datapath.read_other_seen(vip, effect.slots[places])
        return RecordsLooked(effect.token, *self._lookup(effect.flows), stamps)

    def _lookup(self, flows: Rows) -> tuple[Rows, npt.NDArray[np.bool_]]:
        """Their records, as they are in the maps, and which of them are embryonic."""
        found = self._datapath.records_lookup(flows)
        embryonic = (found["round"] != RECORD_MISSING) & (found["round"] & np.uint32(RECORD_EMBRYONIC) != 0)
        found["round"][embryonic] ^= np.uint32(RECORD_EMBRYONIC)
        return found, embryonic

    def _list_records(self, effect: DumpRecords) -> RecordsDumped:
        """A slice: of the embryonic records first, for they become full ones; of those where the others are through."""
        is_through, cursor = effect.cursor or (False, None)
        flows, records = np.zeros(0, FLOW), np.zeros(0, RECORD)
        if not is_through:
            flows, records, cursor = self._datapath.flows_slice(FlowMap.EMBRYONIC, cursor)
            if cursor is not None:
                return RecordsDumped(effect.token, flows, records, 0, (False, cursor))
        *full, cursor = self._datapath.flows_slice(FlowMap.RECORDS, cursor)
        # With the dtype said: concatenate alone would turn fields in network order into native ones.
        if len(flows):
            flows = np.concatenate([full[0], flows], dtype=FLOW, casting="no")
            records = np.concatenate([full[1], records], dtype=RECORD, casting="no")
        else:
            flows, records = full
        return RecordsDumped(effect.token, flows, records, len(full[0]), None if cursor is None else (True, cursor))

    def _list_nat(self, effect: LookNat) -> NatLooked:
        """A slice: of what is unassured first, for it may be put into `nat` meanwhile, and stays there."""
        assured, cursor = effect.cursor or (False, None)
        name = _nat_map(assured)
        keys, values, cursor = self._datapath.nat_slice(name, cursor)
        go_on = (assured, cursor) if cursor is not None else None if assured else (True, None)
        full_ns = self._unrecorded_ns(NAT_STAT) if go_on is None else 0
        return NatLooked(effect.token, keys, values, assured, go_on, self._datapath.nat_room(name), full_ns)

    def _put_records(self, effect: PutRecords) -> int:
        """How many have their place. What the fast path has recorded itself meanwhile says the same, or knows better:
        it stays; but a full record takes the place of an embryonic one, which might be evicted, and a newer one (where
        that is known) that of another connection's.

        A full record that finds no room is kept among the embryonic ones, as the fast path does it: their map makes
        room by itself, and a live flow without a record would go to base. So a map of embryonic records that takes less
        than all of them has failed."""
        found = self._datapath.records_lookup(effect.flows)
        # Also what there is of another round, which is as nothing.
        missing = ~is_of_round(effect.records["round"], found)
        same = found["backend"] == effect.records["backend"]
        wanted = missing
        if effect.seen_ns is not None:
            # A call may have been under way for a while, and made what it says look newer than it is.
            wanted = missing | (~same & (found["seen_ns"] + np.uint64(MARGIN_NS) < effect.seen_ns))
        is_full = np.arange(len(missing)) < effect.full_count
        full, embryonic = is_full & (wanted | same), ~is_full & wanted
        places, count = np.flatnonzero(full), 0
        if len(places):
            count = self._datapath.flows_put(FlowMap.RECORDS, effect.flows[places], effect.records[places])
            embryonic[places[count:]] = wanted[places[count:]]
            promoted = effect.flows[places[:count][~missing[places[:count]]]]
            if len(promoted):
                self._datapath.flows_delete(FlowMap.EMBRYONIC, promoted)
        flows, records = effect.flows[embryonic], effect.records[embryonic]
        if len(flows) and self._datapath.flows_put(FlowMap.EMBRYONIC, flows, records) < len(flows):
            raise DatapathError("the map embryonic, which makes room by itself, did not take all records")
        if (overruled := embryonic & ~missing).any():
            self._datapath.flows_delete(FlowMap.RECORDS, effect.flows[overruled])
        return len(found) - len(places[count:])

    def _unrecorded_ns(self, row: int) -> int:
        stats: npt.NDArray[Any] = self._datapath.read(ArrayName.VIP_STATS)
        return int(stats["unrecorded_ns"][row])

    # --- Configure ------------------------------------------------------------------------------------------------

    def _configure(self, effect: Configure) -> None:
        scene = Scene.of(effect, self._self_name)
        before, self._whole = self._whole, None
        self._configured = effect
        if before is not None and _is_belief(before, effect):
            self._write(ArrayName.MEMBERS, rows.member_rows(scene))
            self._whole = effect
            return
        nodes = {number: node.address for number, node in scene.nodes().items()}
        if before is None or nodes != self._nodes:
            self._route(nodes)
        self._write(ArrayName.MEMBERS, rows.member_rows(scene))
        self._open_door(rows.door_of(scene))
        self._write_backends(before, scene)
        self._write_config(self._ring_changes())
        self._write_index(entries_of(scene.vips()))
        self._whole = effect

    def _write_backends(self, before: Configure | None, scene: Scene) -> None:
        """before: what is written, where all of it is."""
        some = None if before is None else rows.backend_rows_since(Scene.of(before, self._self_name), scene)
        if some is None:
            self._write(ArrayName.BACKENDS, rows.backend_rows(scene))
        else:
            self.rows_written += self._arrays[ArrayName.BACKENDS].write_at(*some)

    # --- Next hops ------------------------------------------------------------------------------------------------

    def _route(self, nodes: dict[int, bytes]) -> None:
        if self._nodes is None:
            self._inherited = self._datapath.read(ArrayName.NODES)
        if nodes != self._nodes:
            self._hops.set_nodes(nodes)
            self._nodes = nodes
        self._write_nodes()

    def _write_nodes(self) -> None:
        """Writes all next hops. One that is not known yet keeps what an earlier agent knew, until `stop_believing`."""
        assert self._nodes is not None, "next hops are written once the nodes are known"
        wanted = np.zeros(NODES_MAX, NODE)
        indices, found = self._hops.rows(self._nodes)
        wanted[indices] = found
        if self._inherited is not None:
            unknown = (wanted["flags"] & NODE_REACHABLE) == 0
            same = (wanted["addr"] == self._inherited["addr"]).all(axis=1) & wanted["addr"].any(axis=1)
            kept = unknown & same & ((self._inherited["flags"] & NODE_REACHABLE) != 0)
            wanted[kept] = self._inherited[kept]
        self._write(ArrayName.NODES, wanted)

    def take_hop_events(self) -> None:
        """The neighbours have news. Nothing is written before the first snapshot: what is there belongs to an earlier
        one."""
        self._hops.handle_events()
        if self._nodes is not None:
            self._write_nodes()

    def take_due_hops(self) -> None:
        """The same for what the neighbours have put off, once it is due."""
        if self._hops.is_due():
            self.take_hop_events()

    def resolve_hops(self) -> None:
        """Asks for all next hops again, since a path's MTU changes without an event."""
        if self._nodes is not None:
            self._hops.resolve_all()
            self._write_nodes()

    def stop_believing(self) -> None:
        """What an earlier agent knew about next hops no longer counts (NEXT_HOP_GRACE_NS after the start)."""
        if self._inherited is not None:
            self._inherited = None
            self._write_nodes()

    # --- The rest -------------------------------------------------------------------------------------------------

    def _write_config(self, ring_change: bool) -> None:
        assert self._configured is not None, "ownership follows a configuration"
        scene = Scene.of(self._configured, self._self_name)
        row = rows.config_row(scene, self._uplink, ring_change, self._configured.committed)
        self._write(ArrayName.CONFIG, row)
        self._ring_change = ring_change

    def follow(self, uplink: Uplink) -> None:
        """The uplink's MTU or MAC is another one from now on. Where a configuration is half written, the next one
        writes that, too."""
        self._uplink = uplink
        if self._whole is not None:
            self._write_config(self._ring_changes())

    def _ring_changes(self) -> bool:
        if self._ring_change is None:
            config: npt.NDArray[Any] = self._datapath.read(ArrayName.CONFIG)
            self._ring_change = bool(config["ring_change"][0])
        return self._ring_change

    def _open_door(self, wanted: tuple[tuple[bytes, int], ...]) -> None:
        if wanted == self._door:
            return
        self._door = None
        self._datapath.members_door([address for address, _ in wanted], [member for _, member in wanted])
        self._door = wanted

    def _write_index(self, entries: tuple[Entry, ...]) -> None:
        if entries == self._entries:
            return
        index = self._index if self._index is not None else VipIndex(self._datapath.read(ArrayName.VIPS))
        self._index = self._entries = None  # made anew from the map, unless all of this succeeds
        for places, written in index.change(entries):
            self._datapath.write(ArrayName.VIPS, places, written)
            self.rows_written += len(places)
        self._index, self._entries = index, entries

    def _write(self, name: ArrayName, wanted: Rows) -> None:
        self.rows_written += self._arrays[name].write(wanted)

    # --- Ownership ------------------------------------------------------------------------------------------------

    def _own(self, effect: WriteOwnership) -> None:
        """`ring_change`, which makes `next` and `prev` count, is set when both are whole and cleared before they go.

        In this order a switch (prev := own, own := next, next := nobody) has its old and new replicas all the time. Own
        changes at the begin or end of a ring change only where this LB has missed a step; then while the others count.
        """
        was, becomes = self._ring_changes(), effect.next is not None or effect.prev is not None
        if not was:
            order: tuple[ArrayName, ...] = (ArrayName.PREV, ArrayName.NEXT, ArrayName.CONFIG, ArrayName.OWN)
        elif not becomes:
            order = (ArrayName.OWN, ArrayName.CONFIG, ArrayName.PREV, ArrayName.NEXT)
        elif effect.next is None:
            order = (ArrayName.PREV, ArrayName.OWN, ArrayName.NEXT)
        else:  # another next, or a new change before the last one was done
            order = (ArrayName.OWN, ArrayName.NEXT, ArrayName.PREV)
        owners = {ArrayName.OWN: effect.own, ArrayName.NEXT: effect.next, ArrayName.PREV: effect.prev}
        for name in order:
            if name is not ArrayName.CONFIG:
                wanted = owners[name]
                self._write(name, np.full(SLOT_COUNT, NOBODY) if wanted is None else np.asarray(wanted, np.uint32))
            elif was != becomes:
                self._write_config(becomes)
