"""One node of a scenario: the real Keeper and the agent's own Applier on maps in memory that fail by seed.

Only what the asyncio driver does around them is written anew here, without asyncio: an event goes in, effects are
carried out in their order, the first datapath effect that fails ends the list and comes back as EffectsFailed. What
is said to others is left in ``outbox``; who hears it, and when, is decided by ``cluster``.

The Keeper's invariants are checked after every fourth step that writes slots (they cost more than the step) and at the
end, so each transcript is a property test, too.
"""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from lbpod.core.keeper import Keeper
from lbpod.core.limits import BATCH_MAX, CASCADE_MAX
from lbpod.core.messages import (
    Ask,
    Called,
    Configure,
    EffectsFailed,
    KeeperEffect,
    KeeperEvent,
    PendingDrained,
    Refuse,
    Remember,
    Reply,
    Restored,
    Tell,
    Trace,
    WriteSlots,
)
from lbpod.datapath.apply import Applier, Found, found_in
from lbpod.datapath.faulty import FaultyDatapath
from lbpod.datapath.memory import MemoryDatapath, MemoryHops
from lbpod.datapath.port import DatapathError
from lbpod.datapath.rows import Uplink
from tests.scenarios.tables import shared_tables

IFINDEX: Final = 1
UNDERLAY_MTU: Final = 1_600
START_TRIES_MAX: Final = 200
"""Times that an agent is started again because its maps could not be read."""

CHECK_EVERY: Final = 4
"""Steps that write slots from one check of the invariants to the next."""

OnAnswer = Callable[[Reply | Refuse], None]


class Node:
    """A node with its maps (which outlive its agent) and its agent."""

    def __init__(self, name: str, address: bytes, cluster_seed: int, seed: int, share: float) -> None:
        """cluster_seed: of the hashes. seed, share: of the faults of its datapath."""
        self.name: Final = name
        self.address: Final = address
        self.up = True
        """The agent runs. The fast path does in any case."""
        self._writes_count = 0
        self.life = 0
        """Grows with each start: what was asked by an earlier life is answered to nobody."""
        self.outbox: list[Ask | Tell] = []
        self.remembered = Remember(None, None)
        self.traces: list[Trace] = []
        self.node_names: dict[int, str] = {}
        """Node id -> name, as the agent has learned it from its snapshots."""
        self._cluster_seed = cluster_seed
        self._seed = seed
        self._numbers = itertools.count(1)
        self._new_maps(share)
        self._new_agent()

    def _new_maps(self, share: float) -> None:
        self.memory = MemoryDatapath()
        self.maps = self.memory.maps
        self.faulty = FaultyDatapath(self.memory, self._seed, share, share)

    def _new_agent(self) -> None:
        uplink = Uplink("uplink", IFINDEX, bytes(6), UNDERLAY_MTU, self.address)
        self.keeper = Keeper(self.name)
        self.keeper._state.tables = shared_tables(self._cluster_seed)
        self.applier = Applier(self.faulty, self.name, uplink, MemoryHops(IFINDEX))
        self._waiting: dict[int, OnAnswer] = {}
        self.outbox = []
        self.life += 1

    # --- Life and death -----------------------------------------------------------------------------------------------
    def kill(self) -> None:
        """The agent dies. Maps and programs stay, and so does what it had remembered."""
        self.up = False
        self._new_agent()

    def start(self, now_ns: int) -> None:
        """The agent starts on what it finds; where it cannot read that, it is started again."""
        self._new_agent()
        self.up = True
        kept = self.remembered
        found = self._found()
        self.feed(
            Restored(kept.committed, kept.prepared, found.slots, kept.ring_done, found.down, found.given_up), now_ns
        )

    def _found(self) -> Found:
        for _ in range(START_TRIES_MAX):
            try:
                return found_in(self.faulty)
            except DatapathError:
                continue
        raise AssertionError("an agent can read its maps at some time")

    def lose_everything(self) -> None:
        """The machine restarts: no maps, no memory, a new agent."""
        self._new_maps(self.faulty.write_share)
        self.remembered = Remember(None, None)
        self._new_agent()
        self.up = True

    # --- Events -------------------------------------------------------------------------------------------------------
    def call(self, body: Any, on_answer: OnAnswer, now_ns: int, with_snapshot: bool = False) -> None:
        """Somebody calls this node's agent."""
        number = next(self._numbers)
        self._waiting[number] = on_answer
        self.feed(Called(number, body, with_snapshot), now_ns)

    def drain(self, now_ns: int) -> None:
        """Take a batch of pending flows out of the map, where there are any."""
        if not len(self.maps.pending):
            return
        try:
            flows, values = self.faulty.pending_drain(BATCH_MAX)
        except DatapathError:
            return
        if len(flows):
            self.feed(PendingDrained(flows, values), now_ns)

    def feed(self, event: KeeperEvent, now_ns: int) -> None:
        """One event, and all that follows from it at once."""
        todo = deque([event])
        for _ in range(CASCADE_MAX):
            if not todo:
                return
            effects = self.keeper.step(todo.popleft(), now_ns)
            if any(isinstance(effect, WriteSlots) for effect in effects):
                self._writes_count += 1
                if self._writes_count % CHECK_EVERY == 0:
                    self.keeper.check_invariants()
            todo.extend(self._carry_out(effects))
        raise AssertionError(f"{CASCADE_MAX} events followed one from the other: the Keeper asks in circles")

    def _carry_out(self, effects: Sequence[KeeperEffect]) -> list[KeeperEvent]:
        following: list[KeeperEvent] = []
        for place, effect in enumerate(effects):
            try:
                event = self._perform(effect)
            except DatapathError as error:
                return [*following, EffectsFailed(effect, tuple(effects[place + 1 :]), str(error))]
            if event is not None:
                following.append(event)
        return following

    def _perform(self, effect: KeeperEffect) -> KeeperEvent | None:
        match effect:
            case Ask() | Tell():
                self.outbox.append(effect)
            case Reply() | Refuse():
                self._waiting.pop(effect.request)(effect)
            case Remember():
                self.remembered = effect
            case Trace():
                self.traces.append(effect)
            case _:
                event = self.applier.apply(effect)
                if isinstance(effect, Configure):
                    both = (effect.committed, effect.prepared)
                    self.node_names = {node.id: node.name for one in both if one is not None for node in one.nodes}
                return event
        return None
