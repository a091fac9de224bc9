"""One world through both readings of the rules: what differs, and which frame it was.

Frames are decided by the oracle and by the C program in lockstep, and each outcome is compared at once. Maps and
counters are compared when the world's last frame is through, because reading them costs more than deciding a frame;
where they differ, the world is run again with a look at everything after each frame, so that a report always names the
frame.

Stamps are the clock's: what the kernel stamped a moment before or after the oracle is equal, what one of them stamped
and the other did not is not (old stamps lie at the zero of the clock).
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

import numpy as np

from lbpod.core import layout, limits, oracle, oracle_reply, packets
from lbpod.core.maps import Record, mapped
from lbpod.core.oracle import Action, Outcome
from lbpod.core.verdicts import Verdict
from tests.bpf.frames import Draw
from tests.bpf.kernel_side import Kernel, Ran
from tests.bpf.world import HERE_IFINDEX, Flow, World, draw_world

FRAMES_PER_WORLD_COUNT: Final = 400
STAMP_SLACK_NS: Final = 10_000_000_000
"""Two stamps of one frame lie closer together than this on the busiest machine; old ones lie at the clock's zero."""
TC_ACT_SHOT: Final = 2
TC_ACT_UNSPEC: Final = 0xFFFF_FFFF
"""Lets the frame leave, and the filters behind ours look at it."""
OURS: Final = frozenset(
    {
        Verdict.RECORD_HIT,
        Verdict.PROMOTED,
        Verdict.CHAIN_STARTED,
        Verdict.FIRST_ALONE,
        Verdict.UNRECORDED_BASE,
        Verdict.OLD_TO_BASE,
        Verdict.OLD_TO_CURRENT,
    }
)
"""What a packet gets in a tracking slot that is this LB's to decide ..."""
ANOTHERS: Final = frozenset({Verdict.CACHE_HIT, Verdict.RELAYED, Verdict.DECIDED_ALONE})
"""... and in one that is not."""
_DECIDED: Final = OURS | ANOTHERS
CLOCK_MONOTONIC_COARSE: Final = 6
"""Of Linux; Python's time does not name it."""
SEED_ENV: Final = "HOLDFAST_ORACLE_SEED"


def now_ns() -> int:
    """The clock that the programs read."""
    return time.clock_gettime_ns(CLOCK_MONOTONIC_COARSE)


class Place(Enum):
    """Where in the ownership of a slot this LB is named."""

    OWN = "own"
    NEXT_ONLY = "next"
    PREV_ONLY = "prev"
    BOTH = "next and prev"
    NOWHERE = "nowhere"


@dataclass(slots=True)
class Seen:
    """What a run came across."""

    frames: int = 0
    verdicts: Counter[Verdict | None] = field(default_factory=Counter)
    decided: Counter[tuple[Place, bool, Verdict]] = field(default_factory=Counter)
    """TCP and UDP packets in tracking slots: what this LB is to the slot, whether they came by RELAY, what they got."""


def run_world(kernel: Kernel, seed: int, program: str, seen: Seen) -> None:
    """Compare one world; AssertionError with everything that one needs to see where they differ."""
    differs = _run(kernel, seed, program, seen, look_always=False)
    if differs is not None:
        precise = _run(kernel, seed, program, Seen(), look_always=True)
        raise AssertionError(
            f"{precise or differs}\nreplay: {SEED_ENV}={seed} .venv/bin/python -m pytest -x"
            f" tests/bpf/test_oracle_differential.py -k {program}"
        )


def _run(kernel: Kernel, seed: int, program: str, seen: Seen, look_always: bool) -> str | None:
    world = draw_world(seed, now_ns())
    kernel.load_world(world)
    draw = Draw(world, seed)
    frame = b""
    for number in range(FRAMES_PER_WORLD_COUNT):
        if program == "xdp":
            frame = draw.incoming()
            outcome = oracle.xdp(world.maps, frame, HERE_IFINDEX, now_ns())
            differs = _xdp_differs(outcome, kernel.xdp(frame, world.maps.headroom_bytes))
        else:
            goes_back = draw.chance(0.1)
            frame = draw.forwarded() if goes_back else draw.outgoing()
            outcome = oracle_reply.tc(world.maps, frame, now_ns(), goes_back=goes_back)
            differs = _tc_differs(outcome, kernel.tc(frame, goes_back))
        seen.frames += 1
        seen.verdicts[outcome.verdict] += 1
        if outcome.verdict in _DECIDED:
            seen.decided[(*_whose(world, frame), outcome.verdict)] += 1
        if differs is None and (look_always or number == FRAMES_PER_WORLD_COUNT - 1):
            differs = state_differs(kernel, world)
        if differs is not None:
            counted = _counted(kernel, world) if look_always else ""
            return f"world {seed}, frame {number} {outcome.verdict!r}: {differs}\n{counted}frame: {_hex(frame)}"
    return None


def _whose(world: World, frame: bytes) -> tuple[Place, bool]:
    """What this LB is to the slot of a packet that got one of ``_DECIDED``, and whether that came by RELAY."""
    maps, ip = world.maps, frame[packets.ETHERNET_BYTES :]
    here = mapped(packets.destination(ip)) == maps.settings().node_addr
    tunnel = packets.parse_tunnel(ip) if here else None
    packet = ip if tunnel is None else tunnel.inner
    sport, dport = packets.ports(packet[packets.IPV4_BYTES :])
    vip = maps.vip(mapped(packets.destination(packet)), dport, packets.protocol(packet))
    assert vip is not None, "only packets to a VIP get such a verdict"
    return _place(world, Flow(packets.source(packet), sport, vip)), tunnel is not None


def _place(world: World, flow: Flow) -> Place:
    maps, slot = world.maps, flow.slot(world.maps.settings().seed)
    self_ = maps.settings().self
    words = [int(array[slot]) for array in (maps.own, maps.next, maps.prev)]
    own, next_, prev = (self_ != limits.MEMBER_NONE and self_ in (word & 0xFFFF, word >> 16) for word in words)
    if own or not maps.settings().ring_change:
        return Place.OWN if own else Place.NOWHERE
    if next_ and prev:
        return Place.BOTH
    return Place.NEXT_ONLY if next_ else Place.PREV_ONLY if prev else Place.NOWHERE


def _hex(frame: bytes) -> str:
    """The frame, with its zeros at the end as a number."""
    bare = frame.rstrip(b"\0")
    return f"{bare.hex()} and {len(frame) - len(bare)} zeros"


def _counted(kernel: Kernel, world: World) -> str:
    """How the last frame was counted by the program, where that is not how the oracle did."""
    more = kernel.counters().astype(np.int64)[:, 0] - world.maps.counters.astype(np.int64)[:, 0]
    return "".join(f"program counted {Verdict(int(at)).name} {more[at]:+d}\n" for at in np.flatnonzero(more))


def _xdp_differs(outcome: Outcome, ran: Ran) -> str | None:
    if outcome.action != ran.action:
        return f"oracle {outcome.action!r}, program returned {ran.action}"
    if outcome.action is not Action.DROP and outcome.frame != ran.frame:
        return f"another frame leaves\noracle:  {_hex(outcome.frame)}\nprogram: {_hex(ran.frame)}"
    return None


def _tc_differs(outcome: Outcome, ran: Ran) -> str | None:
    if ran.action != (TC_ACT_SHOT if outcome.action is oracle.Action.DROP else TC_ACT_UNSPEC):
        return f"program returned {ran.action:#x}"
    if outcome.frame != ran.frame:
        return f"another frame leaves\noracle:  {_hex(outcome.frame)}\nprogram: {_hex(ran.frame)}"
    return None


# --- Maps and counters ------------------------------------------------------------------------------------------------
def state_differs(kernel: Kernel, world: World) -> str | None:
    """A sentence about the first map that differs, None where all are equal."""
    expected, counted = world.maps.counters, kernel.counters()
    for verdict in Verdict:
        if (expected[verdict] != counted[verdict]).any():
            return f"counter {verdict.name}: oracle {expected[verdict].tolist()}, program {counted[verdict].tolist()}"
    found = kernel.flows()
    for name, entries in sorted(found.items()):
        differs = _entries_differ(name, getattr(world.maps, name).rows, entries)
        if differs is not None:
            return differs
    for vip in sorted(world.maps.other_seen):
        differs = _stamps_differ(f"other_seen of VIP {vip}", world.maps.other_seen[vip], kernel.other_seen(vip))
        if differs is not None:
            return differs
    differs = _stamps_differ("vip_stats", world.maps.vip_stats["unrecorded_ns"], kernel.unrecorded_ns())
    return differs or _lookup_differs(kernel, world)


def _lookup_differs(kernel: Kernel, world: World) -> str | None:
    """hf_lookup on the flows of the world, most of which are recorded somewhere."""
    keys = sorted(
        {flow.key for flow in world.flows} | world.maps.records.rows.keys() | world.maps.embryonic.rows.keys()
    )
    expected = dict(zip(keys, world.maps.lookup(keys), strict=True))
    rows = kernel.port.records_lookup(np.frombuffer(b"".join(keys), layout.FLOW))
    found = {key: Record(*row) for key, row in zip(keys, rows.tolist(), strict=True)}
    return _entries_differ("looked up", expected, found)


def _entries_differ(name: str, expected: dict[bytes, Any], found: dict[bytes, Any]) -> str | None:
    for key in sorted(expected.keys() | found.keys()):
        ours, theirs = expected.get(key), found.get(key)
        if ours is None or theirs is None or not _alike(ours, theirs):
            return f"{name}[{key.hex()}]: oracle {ours}, program {theirs}"
    return None


def _alike(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> bool:
    """Equal, but for stamps (always the last field) that lie close together."""
    return ours[:-1] == theirs[:-1] and abs(ours[-1] - theirs[-1]) < STAMP_SLACK_NS


def _stamps_differ(name: str, ours: "np.ndarray[Any, Any]", theirs: "np.ndarray[Any, Any]") -> str | None:
    for at in np.flatnonzero(ours != theirs):
        if abs(int(ours[at]) - int(theirs[at])) >= STAMP_SLACK_NS:
            return f"{name}[{at}]: oracle {ours[at]}, program {theirs[at]}"
    return None
