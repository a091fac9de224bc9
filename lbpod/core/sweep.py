"""As host agent: when translated flows are over and go, and whether some may have gone unasked.

Why sweep at all, where the map is an LRU that makes room by itself: a host agent whose map has been full cannot tell
whether a flow is left (``quiet``), and a map that nobody cleans is full for ever once it has been. Decided here: which
entries are over, how often the map is looked through (every NAT_SWEEP_NS, sooner the fuller it is, while that helps),
and for how long an eviction is remembered. One slice each tick, so that a million entries cost ten milliseconds at a
time. Left to others: the map, and that what has been seen since is not deleted (the port's ``nat_delete``).

**What could go wrong.** A reply without an entry leaves with the pod's own address; the client answers with an RST, and
the connection is dead at the pod. An inbound packet makes the entry again, so it is the pod's own word after a long
silence that would be lost. Hence:

- Silent flows go only after their VIP's idle timeout (a flow that is silent for longer may be taken for over) *and* a
  minute; those of VIPs that are not known here, after the longest idle timeout that is, an hour at least.
- What is in `unassured` goes as soon as it has been put into `nat` (the fast path leaves it where it was, see below),
  and after two minutes where its client has sent nothing but a SYN: that handshake has come to nothing.
- Closed flows (RST, both FINs) go a minute after their last packet: the kernel's TIME_WAIT is as long, and whatever
  either side still has to send again comes sooner. The same five ports in use again begin with a SYN, which clears
  the flags and renews the stamp. (An RST that the pod ignored, of an old sequence number, marks a flow as closed
  that lives on; each of its packets renews the stamp. Should it then be silent for a minute and the pod speak first,
  the reply is lost; clearing the mark with each packet was dropped, for it would cost a write per packet.)
- An entry that is kept for too long keeps the same client's port away from the same pod's where it comes by another VIP
  (DROP_NAT_TAKEN). Where no agent sweeps, the fast path has a bound of its own (NAT_TAKEN_NS).
- Between choosing and deleting time passes. The deletion therefore names the stamp that the entry had, and the fast
  path's own map is compared with it in the very step that deletes.

**Evictions.** Seen by counting, in each of the two maps: an LRU map evicts only when nearly full (``room``), and
entries leave it otherwise only by our hand (which is why an entry that is put into `nat` stays in `unassured` until
then). So if it evicted since the sweep before last had begun, the entries that are there now and those that sweeps
have deleted since come to ``room`` together. For an idle timeout after that a flow may be alive that is not listed:
whoever asks is told that we cannot tell. The time is kept with the maps, for the next agent.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lbpod.core.flows import Facts, Rows, closed, never_opened, over, vips_of
from lbpod.core.host_state import NatCount, Sweep, nat_counts
from lbpod.core.keeper_state import Answer, Effects, Question, State
from lbpod.core.layout import NAT_ASSURED
from lbpod.core.limits import (
    MARGIN_NS,
    NAT_CLOSED_NS,
    NAT_SILENT_MARGIN_NS,
    NAT_SWEEP_NS,
    NAT_SWEEP_NS_MIN,
    NAT_UNKNOWN_IDLE_NS,
)
from lbpod.core.messages import DropNat, LookNat, NatLooked, StampNatFull

Bools = npt.NDArray[np.bool_]


def tick(state: State, now_ns: int) -> Effects:
    """Go on with the sweep at hand, or begin the next one."""
    if not state.host.sweep_at_ns:
        state.host.sweep_at_ns = now_ns + NAT_SWEEP_NS
    if state.host.sweep is None:
        if now_ns < state.host.sweep_at_ns:
            return []
        state.host.sweep = Sweep()
    if state.host.sweep.waiting or not state.has_room():
        return []
    state.host.sweep.waiting = True
    return [LookNat(state.open(_Looked(), now_ns), state.host.sweep.cursor)]


@dataclass(frozen=True, slots=True)
class _Looked(Question):
    """One slice of the sweep at hand."""

    def answered(self, state: State, answer: Answer, now_ns: int) -> Effects:
        sweep = state.host.sweep
        if not isinstance(answer, NatLooked) or sweep is None:
            return self.failed(state, "the list is not one of flows", now_ns)
        gone = are_over(state.facts, answer.keys, answer.values, now_ns - slept_ns(state, now_ns))
        sweep.waiting, sweep.cursor = False, answer.cursor
        count(sweep.counts, answer)
        sweep.counts[answer.assured].dropped += int(gone.sum())
        effects: Effects = []
        if gone.any():
            stamps = answer.values["seen_ns"][gone].astype(np.uint64)
            effects.append(DropNat(answer.assured, answer.keys[gone], stamps))
        if answer.cursor is None:
            state.host.sweep = None
            effects += counted(state, sweep.counts, answer, now_ns)
            state.host.swept = {assured: each.dropped for assured, each in sweep.counts.items()}
            state.host.sweep_at_ns = now_ns + min(_pause_ns(each) for each in sweep.counts.values())
        return effects

    def failed(self, state: State, reason: str, now_ns: int) -> Effects:
        """Begin anew, soon. What was dropped may have made room that no count has seen."""
        if state.host.sweep is not None:
            for assured, each in state.host.sweep.counts.items():
                state.host.swept[assured] += each.dropped
        state.host.sweep, state.host.sweep_at_ns = None, now_ns + NAT_SWEEP_NS_MIN
        return []


def _pause_ns(swept: NatCount) -> int:
    """Until the next sweep begins, as far as this map goes. Where nothing was over, hurry would not help."""
    if not swept.dropped:
        return NAT_SWEEP_NS
    free = max(swept.room - (swept.count - swept.dropped), 0)
    return max(NAT_SWEEP_NS_MIN, NAT_SWEEP_NS * free // swept.room)


def slept_ns(state: State, now_ns: int) -> int:
    """How much of a translated flow's silence may be none. 0 once all flows that live have been seen since."""
    host = state.host
    longest_ns = int(state.facts.idle_ns.max()) + host.slept_ns + MARGIN_NS
    return host.slept_ns if now_ns <= host.woke_ns + longest_ns else 0


def are_over(facts: Facts, keys: Rows, values: Rows, now_ns: int) -> Bools:
    """(n,): which translated flows (layout.NAT_KEY, NAT) have nothing more to say."""
    vips = vips_of(facts, keys, values)
    unknown_ns = max(int(facts.idle_ns.max()), NAT_UNKNOWN_IDLE_NS)
    idle_ns = np.where(vips != 0, facts.idle_ns[vips], np.uint64(unknown_ns))
    seen = values["seen_ns"].astype(np.uint64)
    silent = over(seen, idle_ns + np.uint64(NAT_SILENT_MARGIN_NS), now_ns)
    client_ip = facts.client_ip[vips]
    ended = closed(values, client_ip) & over(seen, NAT_CLOSED_NS, now_ns) | never_opened(values, client_ip, now_ns)
    return np.asarray(silent | ended | (values["flags"] & NAT_ASSURED != 0))


# --- Evictions --------------------------------------------------------------------------------------------------------
def count(counts: dict[bool, NatCount], answer: NatLooked) -> None:
    """Some more entries have been looked at."""
    met = counts[answer.assured]
    met.count += len(answer.keys)
    met.room = answer.room


def counted(state: State, counts: dict[bool, NatCount], last: NatLooked, now_ns: int) -> Effects:
    """All entries have been looked at, there were so many. Note whether some may have been evicted before."""
    going_on = state.host.sweep.counts if state.host.sweep is not None else nat_counts()
    is_full = any(
        each.count + going_on[assured].dropped + state.host.swept[assured] >= each.room
        for assured, each in counts.items()
    )
    state.host.nat_full_ns = now_ns if is_full else max(state.host.nat_full_ns, last.full_ns)
    # Also where an earlier stamp could not be written.
    return [StampNatFull(state.host.nat_full_ns)] if state.host.nat_full_ns > last.full_ns else []


def may_have_evicted(state: State, wait_ns: int, now_ns: int) -> bool:
    """May a flow that was seen within this time be missing from the map?"""
    return state.host.nat_full_ns != 0 and now_ns <= state.host.nat_full_ns + wait_ns
