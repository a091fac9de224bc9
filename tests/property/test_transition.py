"""Words of slots under any sequence of moves, beside a slow twin that knows one slot and writes down every backend.

The twin keeps, as a set, all backends that a flow of its slot may have. That is what ``possible`` and ``unknown`` stand
for, and what an early settle relies on: the clever one may never claim to know less.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings, strategies as st

from lbpod.core.limits import BACKEND_IDS_MAX, SLOT_COUNT
from lbpod.core.transition import Slots, base_of, current_of, is_settling, is_tracking

WATCHED = 6
"""The first slots differ; all others are as the last of them."""
BACKENDS = range(1, 9)
U32 = npt.NDArray[np.uint32]

tables = st.lists(st.sampled_from([0, *BACKENDS]), min_size=WATCHED, max_size=WATCHED)
slot_sets = st.lists(st.integers(0, WATCHED - 2), min_size=1, max_size=3, unique=True)
moves = st.one_of(
    st.tuples(st.just("prepare"), tables),
    st.tuples(st.just("commit"), st.sets(st.sampled_from(list(BACKENDS)))),
    st.tuples(st.sampled_from(["flag", "unflag", "agree", "rebase", "settle"]), slot_sets),
)


@dataclass
class Twin:
    """One slot, written for reading."""

    current: int = 0
    base: int = 0
    tracking: bool = False
    settling: bool = False
    flows: set[int] = field(default_factory=set)
    """Backends that live flows may have, while tracking."""

    def prepare(self, wanted: int, begun: int | None, alive: set[int]) -> None:
        held = self.current or begun or 0
        if held and held != wanted and not self.tracking:
            self.tracking, self.base = True, held
            self.flows = {held}
        if self.tracking and self.base not in alive:
            self.base = self.current
        if self.tracking and begun:
            self.flows.add(begun)
        self.flows &= alive  # an id that has died never comes back as the same backend

    def commit(self, wanted: int | None, alive: set[int]) -> None:
        if self.tracking:
            self.flows.add(self.current)
        if wanted is not None:
            self.current = wanted
        if self.tracking:
            self.flows.add(self.current)
            if self.base not in alive:
                self.base = self.current
        else:
            self.base = self.current
        self.flows &= alive

    def settle(self) -> None:
        if self.tracking:
            self.base, self.tracking, self.settling, self.flows = self.current, False, False, set()


class Pair:
    """The clever one and its twins, moved alike, as a Keeper would move them."""

    def __init__(self) -> None:
        self.slots = Slots()
        self.twins = [Twin() for _ in range(WATCHED)]
        self.living: set[int] = set()
        self.prepared: list[int] | None = None
        self.prepared_living: set[int] = set()

    def move(self, name: str, argument: list[int] | set[int]) -> None:
        alive = self.living | self.prepared_living
        if self.slots.is_foldable and len(argument) % 2:
            self.slots.fold()  # at rest before, or not: no move may tell
        if name == "prepare":
            wanted = list(argument)
            self.prepared_living = set(wanted) - {0}
            alive = self.living | self.prepared_living
            begun = self.prepared
            self.slots.prepare(spread(wanted), None if begun is None else spread(begun), mask(alive), 1)
            for place, twin in enumerate(self.twins):
                twin.prepare(wanted[place], None if begun is None else begun[place], alive)
            self.prepared = wanted
        elif name == "commit" and self.prepared is not None:
            # Backends that are drained may live on beside those of the table.
            self.living = self.prepared_living | (self.living & set(argument))
            self.slots.commit(spread(self.prepared), mask(self.living), 2)
            for place, twin in enumerate(self.twins):
                twin.commit(self.prepared[place], self.living)
            self.prepared, self.prepared_living = None, set()
        elif self.prepared is None and name != "commit":
            self._settle_moves(name, sorted(argument), alive)

    def _settle_moves(self, name: str, places: list[int], alive: set[int]) -> None:
        """What the Keeper does only while nothing is prepared."""
        slots = np.array(places, dtype=np.uint32)
        current = current_of(self.slots.words[slots])
        twins = [self.twins[place] for place in places]
        if name == "flag":
            self.slots.flag(slots)
            for twin in twins:
                twin.settling = twin.tracking
        elif name == "unflag":
            self.slots.unflag(slots)
            for twin in twins:
                twin.settling = False
        elif name in {"agree", "rebase"}:
            if name == "agree":
                self.slots.agree(slots)
            else:
                self.slots.rebase(slots, current, mask(alive), 3)
            for twin in twins:
                twin.base = twin.current if twin.tracking else twin.base
                if name == "agree":  # only what is quiet is agreed to
                    twin.flows &= {twin.current}
        else:
            self.slots.finish(slots)
            for twin in twins:
                twin.settle()

    def check(self) -> None:
        alive = self.living | self.prepared_living
        self.slots.check_invariants(mask(alive))
        words = self.slots.words[:WATCHED]
        assert [twin.current for twin in self.twins] == current_of(words).tolist()
        assert [twin.base for twin in self.twins] == base_of(words).tolist()
        assert [twin.tracking for twin in self.twins] == is_tracking(words).tolist()
        assert [twin.settling for twin in self.twins] == is_settling(words).tolist()
        rows = self.slots.possible(np.arange(WATCHED, dtype=np.uint32), mask(alive))
        for place, twin in enumerate(self.twins):
            if twin.tracking and self.slots.track is not None and not self.slots.track.unknown[place]:
                assert (twin.flows & alive) - {twin.current} <= set(rows[place].tolist())


def spread(backends: list[int]) -> U32:
    made = np.full(SLOT_COUNT, backends[-1], dtype=np.uint32)
    made[:WATCHED] = backends
    return made


def mask(backends: set[int]) -> npt.NDArray[np.bool_]:
    made = np.zeros(BACKEND_IDS_MAX, dtype=np.bool_)
    made[sorted(backends)] = True
    return made


@settings(max_examples=60)
@given(st.lists(moves, min_size=1, max_size=14))
def test_any_sequence_of_moves_is_what_the_twin_says(sequence: list[tuple[str, list[int] | set[int]]]) -> None:
    pair = Pair()
    for name, argument in sequence:
        pair.move(name, argument)
        pair.check()
