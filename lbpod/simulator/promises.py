"""What must not happen, whatever does: the checkers. They look on, and nobody asks them anything.

1. **One flow, one backend.** A packet of a live flow reaches the pod that has the flow, or nobody. A flow is live when
   its packet is sent if a pod has it, neither side has closed it, its client has not been silent for the idle timeout,
   and the pod is wanted (a draining one until its time is over).
2. **Steady means certain.** Whenever an LB turns a slot steady, every live flow of the slot belongs to its backend.
3. **Nobody dead is chosen.** An LB that has a generation in force sends nothing to a backend that it does not have.
4. **Nobody commits what not everybody has prepared**, and one generation means one thing.
5. **Acknowledged means written** (``machine``), and all invariants of the Keeper hold (``machine``).
6. **All converges, and tracking ends**, once faults and changes end (``run``).

**What is excused**, and counted:

- flows of a slot that tracked when the *last of its replicas* was lost: both were gone before what they knew had been
  handed over (``Holders``), and flows that begin before the next ring is in force; all flows, where all LBs of the ring
  were lost together; the same, where the controller has had to give up all of them, because it has reached none for
  LOST_NS, from when it revives those that know nothing;
- a flow that nobody can tell the first packet of (UDP, ClientIP), where a replica's map of records was full when it
  came: it follows base, and replicas may differ about base for as long as an answer to a settle is outstanding;
- a packet that an LB had to decide alone because it could reach, or believed up, no replica of the slot (two wrong
  beliefs, or two links).

Nothing that a single fault does is excused.
"""

from collections import Counter
from collections.abc import Callable

from lbpod.core.layout import SLOT_TRACKING
from lbpod.core.limits import LOST_NS, SLOT_COUNT
from lbpod.core.maps import mapped
from lbpod.core.messages import LbStatus, WriteSlots
from lbpod.core.model import Affinity, Protocol, Snapshot, format_address
from lbpod.core.ownership import Member, ownership
from lbpod.core.snapshot import digest_of
from lbpod.core.transition import current_of, is_tracking
from lbpod.core.verdicts import Verdict
from lbpod.simulator.clients import Bond, Clients, Flow
from lbpod.simulator.frames import Word
from lbpod.simulator.machine import Machine, Watch
from lbpod.simulator.timeline import Timeline
from lbpod.simulator.wishes import POD_PORT, Pod, Wishes


class Violation(Exception):  # noqa: N818  (what a simulation looks for)
    """A promise is broken. str(): which, by whom."""

    def __init__(self, sentence: str, flow: Flow | None = None) -> None:
        super().__init__(sentence)
        self.story = flow.story() if flow is not None else []
        """What happened to the flow before, one line each."""


class Trip:
    """A packet's way: machines and verdicts; owed: the pod that it belongs to, None where nobody has the flow yet."""

    __slots__ = ("dead_ns", "flow", "owed", "sent_ns", "steps", "word")

    def __init__(self, flow: Flow, word: Word, sent_ns: int, dead_ns: int, owed: Pod | None) -> None:
        self.flow, self.word, self.sent_ns, self.dead_ns, self.owed = flow, word, sent_ns, dead_ns, owed
        self.steps: tuple[tuple[str, Verdict], ...] = ()

    def after(self, name: str, verdict: Verdict) -> "Trip":
        """One machine further. (Of a packet that was repeated each copy has its own way.)"""
        further = Trip(self.flow, self.word, self.sent_ns, self.dead_ns, self.owed)
        further.steps = (*self.steps, (name, verdict))
        return further

    def __str__(self) -> str:
        way = " > ".join(f"{name} {verdict.name}" for name, verdict in self.steps)
        return f"{self.word.name} by {way}"


class Holders:
    """Who has all that there is to know of each slot: its replicas, once they have it, and until their machine is gone.

    Who joins has it when somebody switches, for by then all has been handed over; who has come back empty has not.
    """

    def __init__(self) -> None:
        self._of_slot: list[set[str]] = [set() for _ in range(SLOT_COUNT)]
        self.ring_epoch = 0

    def change(self, snapshot: Snapshot, is_up: Callable[[str], bool], took_part: Callable[[str], bool]) -> list[int]:
        """This snapshot's ring is in force from now on, at somebody at least; slots of which nobody knows anything now,
        because the controller has given up all who did, though they live."""
        if snapshot.ring.epoch <= self.ring_epoch:
            return []
        given_up = [slot for slot, names in enumerate(self._of_slot) if names and not any(map(took_part, names))]
        is_first, self.ring_epoch = self.ring_epoch == 0, snapshot.ring.epoch
        nodes = [node for node in snapshot.nodes if node.member in snapshot.ring.members]
        names = {node.member: node.name for node in nodes}
        own = ownership([Member(node.member, node.address) for node in nodes], snapshot.cluster.seed)
        for slot, word in enumerate(own.tolist()):
            self._of_slot[slot] = {
                names[member]
                for member in (word & 0xFFFF, word >> 16)
                if member in names and (is_first or is_up(names[member]))
            }
        return given_up

    def lose(self, name: str) -> list[int]:
        """A machine is gone; slots of which nobody knows anything now."""
        lost = [slot for slot, names in enumerate(self._of_slot) if names == {name}]
        for names in self._of_slot:
            names.discard(name)
        return lost if self.is_anybody_left else list(range(SLOT_COUNT))

    def give_up(self, is_lost: Callable[[str], bool]) -> list[int]:
        """Those that know nothing are to go on without the lost: slots of which nobody knows anything now."""
        lost = [slot for slot, names in enumerate(self._of_slot) if names and all(map(is_lost, names))]
        for slot in lost:
            self._of_slot[slot].clear()
        return lost

    def is_orphan(self, slot: int) -> bool:
        """Its replicas are lost, and no ring without them is in force yet: who still tracks it, and who does not, may
        differ, and nobody can say who is right."""
        return self.ring_epoch > 0 and not self._of_slot[slot]

    @property
    def is_anybody_left(self) -> bool:
        """Somebody still knows of a slot."""
        return any(self._of_slot)


class Promises(Watch):
    """All checkers of one run."""

    def __init__(self, timeline: Timeline, wishes: Wishes) -> None:
        self._timeline, self._wishes = timeline, wishes
        self.clients: Clients | None = None
        self.pushed: Snapshot | None = None
        """The newest snapshot that a controller has written down."""
        self._alive: dict[int, frozenset[bytes]] = {}
        self._left_ns: dict[tuple[int, bytes], int] = {}
        """(port of the VIP, address) -> when it was last in no snapshot any more."""
        self._snapshots: dict[tuple[int, bytes], Snapshot] = {}
        self._prepared: set[tuple[str, int, bytes]] = set()
        self._committed: dict[int, bytes] = {}
        self._in_force: Snapshot | None = None
        self._holders = Holders()
        self._reached_ns: dict[str, int] = {}
        """When a controller has last heard of each machine."""
        self.machines: dict[str, Machine] = {}
        self.excused: Counter[str] = Counter()
        self.delivered = 0

    # --- One flow, one backend ----------------------------------------------------------------------------------------
    def owed(self, bond: Bond) -> Pod | None:
        """The pod that has a flow, while it is live."""
        pod = bond.pod
        if pod is None or bond.closed or bond.excuse or not self._lives(bond.service.port, pod):
            return None
        return pod if self._timeline.now_ns - bond.seen_ns < bond.service.idle_ns else None

    def bind(self, bond: Bond, pod: Pod) -> None:
        """A pod has a flow from now on; unless its own time is over already."""
        bond.pod = pod if self._has_lived(bond.service.port, pod, bond.seen_ns) else None
        if self._holders.is_orphan(bond.slot) and self._tracks(bond):
            self._excuse(bond, "both replicas lost")

    def _lives(self, port: int, pod: Pod) -> bool:
        return pod.state is not None and pod.address in self._alive.get(port, frozenset())

    def _has_lived(self, port: int, pod: Pod, since_ns: int) -> bool:
        """It lives, and has all the time since then: one that comes back is another backend, without its old flows."""
        return self._lives(port, pod) and self._left_ns.get((port, pod.address), -1) < since_ns

    def push(self, snapshot: Snapshot) -> None:
        """A controller has written a snapshot down: what is not in it has drained for long enough, or is gone."""
        self.pushed = snapshot
        self._snapshots[snapshot.generation, digest_of(snapshot)] = snapshot
        before = self._alive
        self._alive = {vip.port: frozenset(one.address for one in vip.backends) for vip in snapshot.vips}
        for port, addresses in before.items():
            for address in addresses - self._alive.get(port, frozenset()):
                self._left_ns[port, address] = self._timeline.now_ns
        for bond, _ in self._bonds():
            if bond.pod is not None and not self._lives(bond.service.port, bond.pod):
                bond.pod = None  # also where the same pod comes back: its flows had their time

    def _bonds(self) -> list[tuple[Bond, Flow | None]]:
        return self.clients.bonds() if self.clients is not None else []

    def arrived(self, trip: Trip, pod: Pod) -> None:
        """A packet has reached a pod."""
        self.delivered += 1
        flow, bond = trip.flow, trip.flow.bond
        bond.seen_ns = max(bond.seen_ns, trip.sent_ns)
        is_first = trip.word is Word.SYN and bond.service.odds.affinity is Affinity.NONE
        if is_first or pod is trip.owed:
            return
        if trip.owed is None:
            if not flow.is_tcp or bond.service.odds.affinity is Affinity.CLIENT_IP:
                self.bind(bond, pod)
            return
        port = bond.service.port
        if bond.excuse or not (self._has_lived(port, trip.owed, trip.sent_ns) and self._lives(port, pod)):
            return  # either one's time is over, and what reaches it reaches nobody
        if any(verdict is Verdict.DECIDED_ALONE for _, verdict in trip.steps):
            self._excuse(bond, "decided alone")
            return
        if self._had_no_room(bond):
            self._excuse(bond, "no room for a UDP flow")
            return
        raise Violation(f"{flow.name} belongs to {trip.owed.name}, and its {trip} reached {pod.name}", flow)

    def _excuse(self, bond: Bond, reason: str) -> None:
        bond.excuse = reason
        self.excused[reason] += 1

    def _had_no_room(self, bond: Bond) -> bool:
        """Nobody can tell this flow's first packet, and some replica's map of records was full when it came."""
        odds = bond.service.odds
        if odds.protocol is Protocol.TCP and odds.affinity is Affinity.NONE:
            return False
        start = mapped(bond.client) + bond.key_port.to_bytes(2, "big")
        return any(key.startswith(start) for machine in self.machines.values() for key in machine.records.refused)

    def lost(self, machine: Machine) -> None:
        """A machine is about to be gone, its maps with it."""
        slots = self._holders.lose(machine.name)
        self._lose(slots, "both replicas lost" if self._holders.is_anybody_left else "all LBs lost")

    def reached(self, name: str) -> None:
        self._reached_ns[name] = self._timeline.now_ns

    def revives(self, lost: frozenset[str]) -> None:
        """Now, and not only when a ring without the lost is in force: those that are revived decide before."""
        silent_ns = self._timeline.now_ns - LOST_NS + LOST_NS // 100  # a controller's clock drifts
        silent = {name for name in lost if self._reached_ns.get(name, 0) <= silent_ns}
        self._lose(self._holders.give_up(silent.__contains__), "given up by the controller")

    def _lose(self, slots: list[int], reason: str) -> None:
        """Nobody knows anything of these slots any more."""
        of = frozenset(slots)
        for bond, _ in self._bonds() if of else ():
            if bond.slot in of and bond.pod is not None and not bond.excuse:
                if not self._holders.is_anybody_left or self._tracks(bond):
                    self._excuse(bond, reason)

    def _tracks(self, bond: Bond) -> bool:
        """Somebody tracks its slot."""
        for machine in self.machines.values():
            for snapshot in (machine.in_force.committed, machine.in_force.prepared):
                for vip in snapshot.vips if snapshot is not None and machine.up else ():
                    words = machine.maps.slots.get(vip.id)
                    if vip.port == bond.service.port and words is not None:
                        if int(words[bond.slot]) & SLOT_TRACKING:
                            return True
        return False

    # --- Steady means certain -----------------------------------------------------------------------------------------
    def wrote(self, machine: Machine, effect: WriteSlots) -> None:
        steady = ~is_tracking(effect.words)
        if not steady.any():
            return
        known = [one for one in (machine.in_force.committed, machine.in_force.prepared) if one is not None]
        named = [vip for snapshot in known for vip in snapshot.vips if vip.id == effect.vip]
        if not named:
            return
        current = dict(zip(effect.slots[steady].tolist(), current_of(effect.words[steady]).tolist(), strict=True))
        address_of = {one.id: one.address for vip in named for one in vip.backends}
        for bond, flow in self._bonds():
            if bond.service.port != named[0].port or bond.slot not in current:
                continue
            pod = self.owed(bond)
            if pod is not None and pod.address != address_of.get(current[bond.slot], b""):
                sentence = f"{machine.name} turns slot {bond.slot} of {named[0].name} steady"
                whose = flow.name if flow is not None else f"a flow of {format_address(mapped(bond.client))}"
                raise Violation(f"{sentence}, where {whose} belongs to {pod.name}", flow)

    # --- Nobody commits what not everybody has prepared ---------------------------------------------------------------
    def acknowledged(self, machine: Machine, status: LbStatus) -> None:
        generation, digest = status.staged, status.digest
        if generation in (status.prepared, status.committed):
            self._prepared.add((machine.name, generation, digest))
        if generation != status.committed or generation == 0:
            return
        if self._committed.setdefault(generation, digest) != digest:
            raise Violation(f"{machine.name} has committed another generation {generation} than others have")
        snapshot = self._snapshots.pop((generation, digest), None)
        if snapshot is None:
            return  # known to be right already
        before, self._in_force = self._in_force, snapshot
        if before is not None and (snapshot.vips, snapshot.ring.members) == (before.vips, before.ring.members):
            return  # it takes back what was begun, and changes nothing
        given_up = self._holders.change(
            snapshot,
            lambda name: self.machines[name].up,
            lambda name: (name, generation, digest) in self._prepared,
        )
        self._lose(given_up, "given up by the controller")
        for node in snapshot.nodes:
            if node.member in snapshot.ring.members and (node.name, generation, digest) not in self._prepared:
                raise Violation(f"{machine.name} commits generation {generation}, which {node.name} has not prepared")

    # --- Nobody dead is chosen ----------------------------------------------------------------------------------------
    def chosen(self, machine: Machine, address: bytes, port: int) -> None:
        """An LB has sent a packet to a backend (16 bytes)."""
        known = [one for one in (machine.in_force.committed, machine.in_force.prepared) if one is not None]
        if not known:
            return  # what it had remembered is lost, and what it does is its maps' business
        known += [self.pushed] if self.pushed is not None else []  # it may be half way to that one
        backends = (one for snapshot in known for vip in snapshot.vips if vip.port == port for one in vip.backends)
        if not any((one.address, one.port) == (address, POD_PORT) for one in backends):
            raise Violation(f"{machine.name} sends a packet to a backend that it knows to be gone")
