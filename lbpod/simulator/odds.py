"""What one seed has drawn: how large the cluster is, what its clients are like, and how much goes wrong.

The probabilities themselves are drawn, not only what they lead to. A run where everything goes wrong a little seldom
gets anywhere near what a run reaches in which one thing goes wrong all the time and the rest is quiet: so each kind of
trouble is absent from many seeds, and in the others its rate is anything between seldom and always.

All chances are per event, all rates per minute of virtual time. What is not listed here is not left to chance.
"""

from dataclasses import dataclass
from random import Random

from lbpod.core.limits import DUMP_CHUNK, IDLE_TIMEOUT_SECONDS_MIN, MARGIN_NS, QUESTION_AGE_NS_MAX
from lbpod.core.model import Affinity, Protocol
from lbpod.simulator.timeline import MS_NS, SECOND_NS

IDLE_SECONDS_MAX = 8
PACKET_LIFE_NS_MAX = 350 * MS_NS
"""A packet is delivered or lost within this time. The margin pays for it, and for a question's age, and for drift."""

DRIFT_PPM_MAX = 5_000
"""Half a per cent: over the longest window here as much time as 100 ppm make of an hour's."""

assert PACKET_LIFE_NS_MAX + QUESTION_AGE_NS_MAX + 3 * IDLE_SECONDS_MAX * DRIFT_PPM_MAX * 1_000 // 2 < MARGIN_NS


@dataclass(frozen=True, slots=True)
class VipOdds:
    """A VIP that clients talk to."""

    protocol: Protocol
    affinity: Affinity
    idle_ns: int
    drain_ns: int


@dataclass(frozen=True, slots=True)
class Odds:
    """All of it."""

    lbs: int
    spares: int
    """LB nodes that are not in the World at first."""
    hosts: int
    pods_on_lbs: float
    """Share of the pods that run on LB nodes."""
    vips: tuple[VipOdds, ...]
    pods_max: int
    """Of one VIP, ready or draining."""

    change_pause_ns: int
    """Mean pause between two changes of what is wanted."""
    burst_max: int
    """Changes that are wanted before one comes into force."""
    rest_chance: float
    """Pauses that are long enough for slots to settle."""
    ring_share: float
    """Changes that are of the ring."""

    flows_max: int
    spray_chance: float
    """Flows every packet of which comes through another LB; the others follow a hash."""
    silent_chance: float
    """Pauses of a flow that last until just before its idle timeout."""
    quick_chance: float
    """Pauses that are none."""
    close_chance: float
    """Packets after which a flow ends."""

    call_delay_ns: int
    """Longest way of a call, or of its answer."""
    call_loss: float
    call_reset: float
    """Calls whose connection breaks: the caller knows at once, and not whether the call has arrived."""
    call_repeat: float
    packet_loss: float
    packet_repeat: float
    packet_late: float
    """Hops that take long."""
    packet_life_ns: int
    drift_ppm: int

    write_faults: float
    read_faults: float
    disk_faults: float
    """Map writes, map reads, writes of the controller's or an agent's file that fail."""
    records_max: int
    cache_max: int
    pending_max: int

    cut_rate: float
    """Links between two nodes that are cut, one way or both."""
    belief_rate: float
    """Beliefs about members that are wrong."""
    agent_kill_rate: float
    agent_stall_rate: float
    controller_kill_rate: float
    state_loss_chance: float
    """Of a controller that is killed: its file is gone, too."""
    crash_rate: float
    """LB machines that are gone, maps and all."""
    leave_rate: float
    """Agents that are told to end, and leave the ring first."""
    leap_rate: float
    """Clocks that leap forward."""
    tick_ns: int
    """How often agents have time for a Tick."""
    slice_max: int
    """Records that an agent lists in one go."""
    slice_pause_ns: int
    """How long it does other things before it goes on with the list."""
    look_pause_ns: int
    """How long after it has read its stamps an agent thinks about them."""
    boot_refusals: float
    """Calls to a machine that is gone which are refused as if only its agent were away."""


def draw(dice: Random) -> Odds:
    """What this seed is about."""

    def between(low: float, high: float) -> float:
        return float(low * (high / low) ** dice.random())

    def maybe(share: float, low: float, high: float) -> float:
        """0, but in this share of all seeds something between the two, each order of magnitude as likely as another."""
        value = between(low, high)
        return value if dice.random() < share else 0.0

    return Odds(
        lbs=dice.choice((2, 2, 3, 3, 3, 3, 4, 5)),
        spares=dice.choice((0, 1, 1, 2)),
        hosts=dice.randint(1, 2),
        pods_on_lbs=maybe(0.4, 0.1, 0.7),
        vips=_draw_vips(dice),
        pods_max=dice.randint(3, 8),
        change_pause_ns=int(between(20 * MS_NS, SECOND_NS)),
        burst_max=dice.choice((2, 3, 5, 8)),
        rest_chance=maybe(0.8, 0.01, 0.1),
        ring_share=maybe(0.8, 0.05, 0.6),
        flows_max=dice.randint(4, 16),
        spray_chance=dice.choice((0.0, 0.5, 1.0)),
        silent_chance=maybe(0.7, 0.05, 0.8),
        quick_chance=maybe(0.7, 0.05, 0.3),
        close_chance=between(0.02, 0.3),
        call_delay_ns=int(between(MS_NS, SECOND_NS)),
        call_loss=maybe(0.4, 0.001, 0.03),
        call_reset=maybe(0.5, 0.005, 0.3),
        call_repeat=maybe(0.4, 0.01, 0.3),
        packet_loss=maybe(0.5, 0.005, 0.3),
        packet_repeat=maybe(0.4, 0.01, 0.3),
        packet_late=maybe(0.6, 0.01, 0.5),
        packet_life_ns=int(between(MS_NS, PACKET_LIFE_NS_MAX)),
        drift_ppm=int(maybe(0.5, 50, DRIFT_PPM_MAX)),
        write_faults=maybe(0.3, 0.005, 0.15),
        read_faults=maybe(0.3, 0.005, 0.15),
        disk_faults=maybe(0.3, 0.01, 0.3),
        records_max=dice.choice((1, 3, 8)) if dice.random() < 0.15 else 4_096,
        cache_max=dice.choice((1, 4)) if dice.random() < 0.15 else 4_096,
        pending_max=dice.choice((1, 4)) if dice.random() < 0.15 else 4_096,
        cut_rate=maybe(0.4, 0.8, 9),
        belief_rate=maybe(0.5, 1.5, 90),
        agent_kill_rate=maybe(0.5, 0.8, 15),
        agent_stall_rate=maybe(0.4, 0.8, 15),
        controller_kill_rate=maybe(0.4, 0.8, 9),
        state_loss_chance=dice.choice((0.0, 0.5, 1.0)),
        crash_rate=maybe(0.6, 0.5, 6),
        leave_rate=maybe(0.4, 0.5, 6),
        leap_rate=maybe(0.2, 0.5, 5),
        tick_ns=int(between(300 * MS_NS, 600 * MS_NS)),
        slice_max=dice.choice((4, 16, DUMP_CHUNK, DUMP_CHUNK)),
        slice_pause_ns=int(between(MS_NS, SECOND_NS)),
        look_pause_ns=int(maybe(0.5, MS_NS, 300 * MS_NS)),
        boot_refusals=maybe(0.4, 0.1, 1.0),
    )


def _draw_vips(dice: Random) -> tuple[VipOdds, ...]:
    kinds = [(Protocol.TCP, Affinity.NONE)]
    kinds += [(Protocol.UDP, Affinity.NONE)] if dice.random() < 0.6 else []
    kinds += [(Protocol.TCP, Affinity.CLIENT_IP)] if dice.random() < 0.2 else []
    return tuple(
        VipOdds(
            protocol,
            affinity,
            idle_ns=dice.randint(IDLE_TIMEOUT_SECONDS_MIN, IDLE_SECONDS_MAX) * SECOND_NS,
            drain_ns=dice.choice((2, 10, 60)) * SECOND_NS,
        )
        for protocol, affinity in kinds
    )
