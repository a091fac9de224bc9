"""What an LB keeps in less memory while nothing changes: most VIPs are at rest most of the time, and agents are many.

A VIP whose slots are all steady needs no word for each of them: ``Slots.fold``. Whoever needs the words has them whole
again within 0.1 ms, so nothing has to be foreseen, and nothing here can be seen from outside. Scores of backends that
no table has asked for in a while go too (``Tables.rest``), and what a list of all records has dealt with.

Tried and dropped: folding a VIP the moment it settles (a settle ends slot by slot, and a round that is under way wants
its words again); no words at all, and the table built anew when it is needed (7 ms for 20 backends, a second for a
thousand, and on a packet's question about any flow).
"""

from lbpod.core import forget
from lbpod.core.keeper_state import State
from lbpod.core.limits import FOLD_VIPS_MAX, REST_NS


def tick(state: State, now_ns: int) -> None:
    """Every REST_NS, a few VIPs at a time, so that nobody waits for it."""
    if now_ns < state.rest_at_ns:
        return
    state.rest_at_ns = now_ns + REST_NS
    foldable = [vs.slots for _, vs in sorted(state.vips.items()) if vs.slots.is_foldable]
    for slots in foldable[:FOLD_VIPS_MAX]:
        slots.fold()
    forget.let_go(state)
    if state.tables is not None:
        state.tables.rest(now_ns)
