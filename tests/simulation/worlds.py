"""Worlds in which one rule is needed soon: what a seed would draw now and then, all the time, and nothing beside it.

The default odds are those of a long life: a rule that is needed once in a thousand lives is needed all the same, but a
test has no time for a thousand. Here a rule has a world of its own. Each keeps within what DESIGN promises for: with
the rule in its place no promise is broken, in the seeds that the test names. (In a few others one is, with all rules in
place: where two things go wrong at once all the time. See ``docs/distances.md``.) Patches are of the world, never of
what is tested.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final
from zlib import crc32

from lbpod.core.limits import DUMP_CHUNK
from lbpod.core.maps import FlowTable, Record
from lbpod.core.messages import RingSwitchCall, SettleCall, SettleStep, StateCall
from lbpod.core.model import Affinity, Protocol
from lbpod.simulator import clients, cluster, run
from lbpod.simulator.machine import Machine
from lbpod.simulator.network import Call, Network
from lbpod.simulator.odds import PACKET_LIFE_NS_MAX, VipOdds, draw
from lbpod.simulator.timeline import MS_NS, SECOND_NS
from lbpod.simulator.trouble import Trouble

TURN_NS: Final = 15 * SECOND_NS
TCP: Final = VipOdds(Protocol.TCP, Affinity.NONE, 4 * SECOND_NS, 60 * SECOND_NS)
UDP: Final = VipOdds(Protocol.UDP, Affinity.NONE, 4 * SECOND_NS, 60 * SECOND_NS)

QUIET: Final[dict[str, Any]] = {
    "lbs": 3,
    "spares": 1,
    "hosts": 1,
    "pods_on_lbs": 0.0,
    "vips": (TCP,),
    "pods_max": 5,
    "change_pause_ns": 500 * MS_NS,
    "burst_max": 3,
    "rest_chance": 0.05,
    "ring_share": 0.0,
    "flows_max": 32,
    "spray_chance": 1.0,
    "silent_chance": 0.0,
    "quick_chance": 0.2,
    "close_chance": 0.1,
    "call_delay_ns": MS_NS,
    "call_loss": 0.0,
    "call_reset": 0.0,
    "call_repeat": 0.0,
    "packet_loss": 0.0,
    "packet_repeat": 0.0,
    "packet_late": 0.0,
    "packet_life_ns": 50 * MS_NS,
    "drift_ppm": 0,
    "write_faults": 0.0,
    "read_faults": 0.0,
    "disk_faults": 0.0,
    "records_max": 4_096,
    "cache_max": 4_096,
    "pending_max": 4_096,
    "cut_rate": 0.0,
    "belief_rate": 0.0,
    "agent_kill_rate": 0.0,
    "agent_stall_rate": 0.0,
    "controller_kill_rate": 0.0,
    "state_loss_chance": 0.0,
    "crash_rate": 0.0,
    "leave_rate": 0.0,
    "leap_rate": 0.0,
    "tick_ns": 300 * MS_NS,
    "slice_max": DUMP_CHUNK,
    "slice_pause_ns": MS_NS,
    "look_pause_ns": 0,
    "boot_refusals": 0.0,
}
"""Nothing goes wrong. Backends change, flows come and go, and every packet takes another way."""


def swap(place: Any, name: str, by: Any) -> None:
    """Put something in the place of what is there. What is not there any more cannot be taken out: that is an error."""
    assert hasattr(place, name), f"there is no {name} any more"
    setattr(place, name, by)


@dataclass(frozen=True)
class World:
    """What is otherwise than in QUIET."""

    why: str
    odds: dict[str, Any] = field(default_factory=dict)
    patch: Callable[[], None] = lambda: None

    def enter(self) -> None:
        """For the rest of this process."""
        swap(cluster, "draw", lambda dice: replace(draw(dice), **{**QUIET, **self.odds}))
        self.patch()


def _full_maps() -> None:
    """One flow in three finds no room for what its first packet would record, at no LB: all have the same flows."""

    class Crowded(FlowTable[Record]):
        def put(self, key: bytes, value: Record) -> bool:
            return crc32(key) % 3 != 0 and super().put(key, value)

    boot = Machine._boot

    def boot_crowded(self: Machine, shown_ns: int) -> None:
        boot(self, shown_ns)
        self.maps.embryonic = Crowded(self.maps.embryonic.count_max, evicts=True)

    swap(Machine, "_boot", boot_crowded)


def _crowds() -> None:
    """Five times as many clients come."""
    swap(clients, "SPAWN_NS", 30 * MS_NS)


def _fewer_changes() -> None:
    """Where each takes long, fewer are enough."""
    swap(run, "TROUBLE_ENOUGH_NS", 15 * SECOND_NS)
    swap(run, "GENERATIONS_MIN", 6)


def _turns(every_ns: int = TURN_NS) -> None:
    """The router sends every flow to another LB now and then, and in between always to the same."""
    look = cluster.Cluster._look

    def look_and_turn(self: cluster.Cluster) -> None:
        look(self)
        turns = self.timeline.now_ns // every_ns % max(len(self._seen), 1)
        self._seen = self._seen[turns:] + self._seen[:turns]

    swap(cluster.Cluster, "_look", look_and_turn)


def _turning_crowds() -> None:
    """Crowds, whose flows all take another way every 0.7 s."""
    _crowds()
    _turns(700 * MS_NS)


def _late_switches() -> None:
    """A switch reaches some LBs seconds after others. Crowds, besides."""
    _crowds()
    _fewer_changes()
    send = Network.send

    def send_late(self: Network, call: Call) -> None:
        late_ns = self._dice.randrange(3 * SECOND_NS) if isinstance(call.body, RingSwitchCall) else 0
        self._timeline.later(late_ns, lambda: send(self, call))

    swap(Network, "send", send_late)


def _lost_agreements() -> None:
    """Of a backup's answers to settles most are lost."""
    answer = Network._answer

    def answer_seldom(self: Network, call: Call, said: Any) -> None:
        is_settle = isinstance(call.body, SettleCall) and call.body.step is SettleStep.ASK
        if self._is_calm or not is_settle or self._dice.random() > 0.8:
            answer(self, call, said)

    swap(Network, "_answer", answer_seldom)


def _losses_in_handovers() -> None:
    """Who leaves is lost, and with it the first records that it was to hand over."""
    _fewer_changes()

    class Hunter(Trouble):
        _hunted: Machine | None = None

        def start(self) -> None:
            super().start()
            send = self._cluster.network.send

            def send_or_die(call: Call) -> None:
                machine = self._cluster.machines.get(call.sender)
                if machine is None or self._ended or not self._is_hunted(machine, call):
                    send(call)
                else:
                    self._cluster.timeline.later(0, lambda: self._hunt(machine))

            swap(self._cluster.network, "send", send_or_die)

        def _is_hunted(self, machine: Machine, call: Call) -> bool:
            if not isinstance(call.body, StateCall) or not call.body.records:
                return False
            state = machine.keeper._state
            return state.prepared is not None and state.member not in state.prepared.snapshot.ring.members

        def _hunt(self, machine: Machine) -> None:
            self._hunted = machine
            self._crash()
            self._hunted = None

        def _lb(self) -> Machine:
            return self._hunted or super()._lb()

    swap(run, "Trouble", Hunter)


LONG: Final[dict[str, Any]] = {"close_chance": 0.01, "rest_chance": 0.3, "quick_chance": 0.0}
"""Flows that last, and pauses in which slots are left alone for longer than the window."""

RING: Final[dict[str, Any]] = {
    "ring_share": 0.3,
    "change_pause_ns": 200 * MS_NS,
    "rest_chance": 0.0,
    "close_chance": 0.2,
    "quick_chance": 0.5,
    "flows_max": 200,
}
"""The ring changes all the time, while flows begin."""

SLOW_CALLS: Final[dict[str, Any]] = {"call_delay_ns": SECOND_NS, "call_reset": 0.3}

LOST_AGREEMENTS: Final = World(
    "Answers to settles are lost, flows begin meanwhile, and some believe others to be down.",
    {"rest_chance": 0.3, "belief_rate": 40.0},
    _lost_agreements,
)
CUT_OFF: Final = World(
    "Links to owners are cut, so backups serve flows that last.", LONG | {"spray_chance": 0.0, "cut_rate": 30.0}
)

CUT_IN_TWO: Final = World(
    "Links between nodes are cut, one or all of a node, one way or both, while clients reach all LBs.",
    {"cut_rate": 10.0, "close_chance": 0.3},
)

CUT_AND_TURNED: Final = World(
    "The same, sixty times a minute, for crowds that stay with one LB for 0.7 s.",
    {
        "lbs": 4,
        "cut_rate": 60.0,
        "close_chance": 0.9,
        "spray_chance": 0.0,
        "flows_max": 100,
        "vips": (replace(TCP, idle_ns=30 * SECOND_NS),),
    },
    _turning_crowds,
)

WORLDS: Final[dict[str, World]] = {
    "prepare": World("Some LBs commit before others.", {"call_delay_ns": SECOND_NS}),
    "relay": World("Every packet takes another way."),
    "chain": World("Every packet takes another way."),
    "chain-extension": World(
        "What one LB has begun before it prepared is on its way while another, which has prepared, hands over.",
        RING | {"packet_late": 0.9, "packet_life_ns": PACKET_LIFE_NS_MAX},
        _crowds,
    ),
    "prev": World("LBs switch long after one another.", RING, _late_switches),
    "repeated-handover": World(
        "Who leaves is lost while it hands over.",
        RING | {"lbs": 4, "ring_share": 0.1, "close_chance": 0.02, "flows_max": 80, "call_delay_ns": 300 * MS_NS},
        _losses_in_handovers,
    ),
    "lease": World(
        "Flows stay with one LB, which has no reason to ask again.", LONG | {"spray_chance": 0.0, "silent_chance": 0.0}
    ),
    "owners-stamp": World(
        "Flows stay with one LB, and a third of all packets is lost.",
        LONG | {"spray_chance": 0.0, "packet_loss": 0.35, "silent_chance": 0.5},
    ),
    "chain-again": World(
        "Nobody can tell first packets, of which some are lost, and flows enter at one replica, and then at another.",
        LONG | {"vips": (UDP,), "spray_chance": 0.0, "packet_loss": 0.2},
        _turns,
    ),
    "quiet-time": World("Flows outlive the margin.", LONG),
    "ask-settle": CUT_OFF,
    "ask-forget": World("Flows enter at their backup for long, and then do not.", LONG | {"spray_chance": 0.0}, _turns),
    "own-look": CUT_OFF,
    "backup-steady-first": World(
        "The same, and some packets are lost, so that one replica alone has a record.",
        LOST_AGREEMENTS.odds | {"packet_loss": 0.1},
        _lost_agreements,
    ),
    "open-settle": LOST_AGREEMENTS,
    "take-over": World(
        "Some flows find no room, and answers to settles come after the next change.",
        SLOW_CALLS | {"close_chance": 0.3, "change_pause_ns": 300 * MS_NS},
        _full_maps,
    ),
    "count-anew": World(
        "Of two LBs one is lost, and what it alone has seen lasts.",
        LONG | {"lbs": 2, "spares": 0, "crash_rate": 6.0, "spray_chance": 0.0},
    ),
    "doubtful": CUT_IN_TWO,
    "asked-syn": CUT_AND_TURNED,
    "syn-lease": CUT_AND_TURNED,
    "begun-alone": CUT_IN_TWO,
    "turn-back": CUT_IN_TWO,
    "mute": CUT_IN_TWO,
    "open-base": CUT_IN_TWO,
    "unrecorded-base": World("Some flows find no room.", {}, _full_maps),
    "unrecorded-drop": World("Some flows find no room, and answers to settles are late.", SLOW_CALLS, _full_maps),
    "dead-base": World("Some flows find no room, and backends go without draining.", {}, _full_maps),
    "udp-rebase": World("Nobody can tell first packets.", {"vips": (UDP,), "flows_max": 12}),
}
"""Rule -> its world."""
