"""What a node's maps hold, as text for people: the "map dump out" of a transcript.

Times are left out unless asked for (they depend on how often something had to be written again), ids are replaced by
names (pods, flows, nodes), and LBs that say the same share one paragraph.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from lbpod.core import layout
from lbpod.core.maps import Maps
from lbpod.core.model import format_address
from lbpod.core.transition import base_of, current_of, is_settling, is_tracking
from tests.scenarios.cluster import SECOND_NS, Cluster
from tests.scenarios.node import Node
from tests.scenarios.traffic import pod_number

_NOT_SHOWN = layout.SLOT_ROUND_MASK | layout.SLOT_AGREED


def seconds(ns: int) -> str:
    """A time as people write it."""
    return f"{ns / SECOND_NS:.3f}".rstrip("0").rstrip(".") + "s"


def together(texts: Mapping[str, str]) -> str:
    """Node -> text; nodes with the same text share it."""
    groups: dict[str, list[str]] = {}
    for name, text in texts.items():
        groups.setdefault(text, []).append(name)
    parts = []
    for text, names in groups.items():
        parts.append(" ".join(names))
        parts += [f"  {line}" for line in text.split("\n")]
    return "\n".join(parts)


def pod(maps: Maps, backend: int) -> str:
    """A backend id as its pod, with a mark where the fast path may not choose it."""
    if not backend:
        return "nobody"
    row = maps.backends[backend]
    dead = "" if int(row["flags"]) & layout.BACKEND_ALIVE else "(dead)"
    number = pod_number(row["addr"].tobytes())
    return f"pod{number}{dead}" if number else f"id{backend}{dead}"


def slots(node: Node, vip: int, flags: bool = False) -> str:
    """Slots of a VIP, counted by phase, base and current. flags: SETTLING as well."""
    if vip not in node.maps.slots:
        return "no slots"
    hidden = _NOT_SHOWN if flags else _NOT_SHOWN | layout.SLOT_SETTLING
    words = node.maps.slots[vip] & ~np.uint64(hidden)
    found, counts = np.unique(words, return_counts=True)
    lines = [f"{word(node, one)}: {count}" for one, count in zip(found, counts.tolist(), strict=True)]
    return "\n".join(sorted(lines))


def slot(node: Node, vip: int, number: int) -> str:
    """One slot of a VIP, without its SETTLING flag (it comes and goes with every attempt)."""
    if vip not in node.maps.slots:
        return "no slots"
    return word(node, node.maps.slots[vip][number] & ~np.uint64(layout.SLOT_SETTLING | _NOT_SHOWN))


def word(node: Node, one: np.uint64) -> str:
    """One word."""
    words = np.array([one])
    base, current = pod(node.maps, int(base_of(words)[0])), pod(node.maps, int(current_of(words)[0]))
    if not is_tracking(words)[0]:
        return f"steady {current}"
    return f"{'settling' if is_settling(words)[0] else 'tracking'} base {base}, current {current}"


def client(address: bytes, port: int) -> str:
    """A client as people write it. address: 4 bytes."""
    return f"{'.'.join(str(byte) for byte in address)}:{port}"


def flow_map(node: Node, name: str, names: Mapping[bytes, str], times_ns: int | None) -> str:
    """A hash map by flow, one line each. names: of flow keys; times_ns: now, where times are wanted."""
    maps, lines = node.maps, []
    for key in names.keys() | flow_table(maps, name).keys():
        for kind, value in _entries(maps, name, key):
            shown = names.get(key) or _plain(key)
            lines.append(f"{shown} {kind}" + _time(value, times_ns))
    return "\n".join(sorted(lines)) or "empty"


def flow_table(maps: Maps, name: str) -> dict[bytes, object]:
    """A hash map's entries by key; records: both kinds."""
    if name == "records":
        return {**maps.records.rows, **maps.embryonic.rows}
    return {"cache": dict[bytes, object](maps.cache.rows), "pending": dict[bytes, object](maps.pending.rows)}[name]


def _entries(maps: Maps, name: str, key: bytes) -> Iterable[tuple[str, int]]:
    """(what is there, its time)."""
    if name == "cache" and key in maps.cache.rows:
        lease = maps.cache.rows[key]
        yield pod(maps, lease.backend), lease.until_ns
    if name == "pending" and key in maps.pending.rows:
        yield "waits", maps.pending.rows[key].seen_ns
    if name == "records" and key in maps.records.rows:
        full = maps.records.rows[key]
        yield f"{pod(maps, full.backend)} full", full.seen_ns
    if name == "records" and key in maps.embryonic.rows:
        embryonic = maps.embryonic.rows[key]
        yield f"{pod(maps, embryonic.backend)} embryonic", embryonic.seen_ns


def _plain(key: bytes) -> str:
    return f"{format_address(key[:16])}:{int.from_bytes(key[16:18], 'big')}"


def _time(value_ns: int, times_ns: int | None) -> str:
    if times_ns is None:
        return ""
    gone_ns = times_ns - value_ns
    return f", {seconds(gone_ns)} ago" if gone_ns >= 0 else f", in {seconds(-gone_ns)}"


def backends(node: Node) -> str:
    """The backends that may be chosen."""
    rows = node.maps.backends
    lines = []
    for number in np.flatnonzero(rows["flags"] & layout.BACKEND_ALIVE).tolist():
        where = node.node_names.get(int(rows[number]["node"]), "?")
        local = ", local" if rows[number]["flags"] & layout.BACKEND_LOCAL else ""
        lines.append(f"{number}: {pod(node.maps, number)} on {where}{local}")
    return "\n".join(lines) or "empty"


def vips(node: Node) -> str:
    """The VIPs that the fast path finds."""
    lines = []
    for row in node.maps.vips[node.maps.vips["used"] != 0]:
        protocol = {1: "ICMP", 6: "TCP", 17: "UDP"}[int(row["protocol"])]
        affinity = ", ClientIP" if row["flags"] & layout.VIP_CLIENT_IP else ""
        lines.append(
            f"{int(row['id'])}: {format_address(row['addr'].tobytes())}:{int(row['port_be'])}/{protocol}{affinity}"
        )
    return "\n".join(sorted(lines)) or "empty"


def node_state(node: Node) -> str:
    """Where an agent stands."""
    if not node.up:
        return "agent is dead"
    status = node.keeper.status()
    return f"committed {status.committed}, prepared {status.prepared}, staged {status.staged}"


def controller_state(cluster: Cluster) -> str:
    """Where the controller stands; reasons are left out, for they depend on what failed."""
    status = cluster.planner_status
    if status is None:
        return "nothing to do"
    vips = "".join(
        f"\n{vip.name}: epoch {vip.epoch}, {vip.ready} ready, {vip.draining} draining" for vip in status.vips
    )
    return (
        f"{status.phase.value}, generation {status.generation}, at {status.lbs_at_generation} of {status.lbs} LBs{vips}"
    )
