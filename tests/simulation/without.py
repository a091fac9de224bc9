"""The simulator with one rule taken out: is it needed? Patched here, in a process of its own, never in the package.

    python -m tests.simulation.without RULE SEED...

Plays the seeds in their order, in the rule's world (``worlds``), until one finds a promise broken that is kept with the
rule, and names it. Exit status 1 where none does: then the rule is not needed, or its world is too kind. Seeds in which
a promise is broken with the rule as well are named, and passed over.

Each rule is taken out where it is decided, and with it only what would hide that it is out.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import numpy as np

from lbpod.simulator import scale

SLOTS: Final = 64
scale.shrink(SLOTS)

# Bounds are lowered before anybody reads them.
from lbpod.core import forget, handover, limits, settle, watch  # noqa: E402
from lbpod.core.flows import Facts  # noqa: E402
from lbpod.core.keeper import Keeper  # noqa: E402
from lbpod.core.keeper_state import State  # noqa: E402
from lbpod.core.limits import MARGIN_NS, MEMBER_NONE  # noqa: E402
from lbpod.core.maps import Maps, _listed  # noqa: E402
from lbpod.core.messages import LookRecords, Reply, RingStep  # noqa: E402
from lbpod.core.oracle import _End, _Passage  # noqa: E402
from lbpod.core.packets import Relay  # noqa: E402
from lbpod.core.transition import Slots  # noqa: E402
from lbpod.core.verdicts import Verdict  # noqa: E402
from lbpod.datapath.apply import Applier  # noqa: E402
from lbpod.simulator.run import run  # noqa: E402
from tests.simulation.worlds import WORLDS, swap  # noqa: E402

NOTHING: Final = "nothing"
"""No rule, in no world of its own."""


def _none(*_: Any) -> Any:
    """No slots."""
    return np.zeros(0, dtype=np.uint32)


# --- What a packet gets -----------------------------------------------------------------------------------------------
def _relay() -> None:
    """Whoever gets a packet decides about it."""
    swap(_Passage, "_decide_as_another", lambda self, relay: self._decide_as_replica(relay))


def _chain() -> None:
    """Who begins a flow records it, and nobody else does."""
    pass_on = _Passage._pass_on

    def alone(self: _Passage, chained: Verdict, last: Verdict, chain: Any) -> Any:
        return pass_on(self, chained, last, replace(chain, left=()))

    swap(_Passage, "_pass_on", alone)


def _chain_extension() -> None:
    """A replica on the way adds nobody to the list."""

    def extend(self: _Passage, chain: Any) -> Any:
        left = tuple(member for member in chain.left if member != self.config.self)
        visited = chain.visited if self.config.self in chain.visited else (*chain.visited, self.config.self)
        return replace(chain, visited=visited, left=left)

    swap(_Passage, "_extend", extend)


def _lease() -> None:
    """An owner's answer has no end."""
    decide = _Passage._decide_as_another

    def for_ever(self: _Passage, relay: Any) -> Any:
        lease = self.maps.cache.get(self.key)
        if lease is not None:
            self.maps.cache.put(self.key, lease._replace(until_ns=1 << 62))
        return decide(self, relay)

    swap(_Passage, "_decide_as_another", for_ever)


def _owners_stamp() -> None:
    """A lease counts from the packet that was relayed, whether or not the owner has seen it."""
    swap(Facts, "leases_left_ms", lambda self, vips, since_ns, now_ns: (self.lease_ns[vips] // 10**6).astype(np.uint32))


def _chain_again() -> None:
    """Of a flow without a first packet one packet travels the chain."""
    swap(limits, "CHAIN_AGAIN_MAX", 0)


def _open_settle() -> None:
    """While the backup owes an answer to a settle, the owner decides by its own base all the same."""
    swap(_Passage, "_backup_asked", lambda self, relay: None)


def _doubtful() -> None:
    """What a SYN has recorded counts, however long ago that was and whoever has not been told."""
    swap(_Passage, "_is_doubtful", lambda self, record: False)


def _asked_syn() -> None:
    """What a SYN has recorded decides about a packet that comes long after, and the other replica is not asked."""
    meet = _Passage._meet_embryonic
    relayed = Relay(0, limits.RELAY_HOPS_MAX, 0)
    swap(_Passage, "_meet_embryonic", lambda self, record, relay: meet(self, record, relayed))


def _syn_lease() -> None:
    """An owner answers about a flow of which it has seen no more than a SYN as about any other."""
    look = Applier._lookup

    def all_full(self: Applier, flows: Any) -> Any:
        records, embryonic = look(self, flows)
        return records, np.zeros_like(embryonic)

    swap(Applier, "_lookup", all_full)


def _begun_alone() -> None:
    """A promoted record replaces whatever a SYN has left at another replica."""
    swap(_Passage, "_has_begun_alone", lambda self, chain: False)


def _turn_back() -> None:
    """A chain that meets a better record goes on with that, and nobody behind it hears of it. What ``asked-syn`` asks
    about never gets as far as that, so it is out, too."""
    _asked_syn()
    swap(_Passage, "_turn_back", lambda self, chain: chain)


def _mute() -> None:
    """Who calls is up, whether or not it hears this LB. Hidden by ``asked-syn`` as well."""
    _asked_syn()
    swap(watch, "_is_mute", lambda state, call: False)


def _open_base() -> None:
    """While an answer to a settle is outstanding, a flow begins at base all the same, whoever cannot be told."""
    swap(_Passage, "_is_base_open", lambda self: False)


def _unrecorded_base() -> None:
    """What finds no room goes to current all the same."""
    send = _Passage._to_backend

    def to_current(self: _Passage, verdict: Verdict, backend: int, stamp: bool = False) -> Any:
        return send(self, verdict, self.current if verdict is Verdict.UNRECORDED_BASE else backend, stamp)

    swap(_Passage, "_to_backend", to_current)


def _unrecorded_drop() -> None:
    """What finds no room goes to base, whoever decides, and whatever is being agreed."""
    begin = _Passage._begin

    def begin_anyhow(self: _Passage) -> Any:
        try:
            return begin(self)
        except _End as end:
            if end.verdict is not Verdict.UNRECORDED_DROP:
                raise
        return self._to_backend(Verdict.UNRECORDED_BASE, self._base_or_current(), stamp=True)

    swap(_Passage, "_begin", begin_anyhow)


# --- A change of the backends -----------------------------------------------------------------------------------------
def _prepare() -> None:
    """Nothing tracks before the commit."""
    swap(Slots, "prepare", _none)


def _dead_base() -> None:
    """A base that is gone stays base. (That it must not is an invariant as well, which has to look away.)"""
    for name in ("prepare", "commit", "leave"):
        step = getattr(Slots, name)

        def keep(self: Slots, *args: Any, step: Any = step) -> Any:
            kept = [np.ones_like(one) if getattr(one, "dtype", None) == np.bool_ else one for one in args]
            return step(self, *kept)

        swap(Slots, name, keep)
    swap(Keeper, "check_invariants", lambda self: None)


def _quiet_time() -> None:
    """A slot is quiet as soon as nothing is on its way any more."""
    swap(State, "window_ns", lambda self, vs: MARGIN_NS)


def _ask_settle() -> None:
    """The owner settles what it finds quiet itself, as if it had no backup."""
    ask = settle._ask_backup

    def alone(state: State, vs: Any, _: int, *rest: Any) -> Any:
        return ask(state, vs, MEMBER_NONE, *rest)

    swap(settle, "_ask_backup", alone)


def _own_look() -> None:
    """The backup agrees to whatever it is asked."""
    swap(settle._BackupSeen, "_may_settle", lambda self, state, slots, *_: np.ones(len(slots), dtype=np.bool_))


def _backup_steady_first() -> None:
    """The backup turns steady when it agrees."""
    swap(Slots, "agree", Slots.finish)


def _take_over() -> None:
    """The owner does not take the agreed base where something newer has come in between."""
    conclude = settle._conclude

    def unless_late(state: State, vs: Any, round_: Any, kind: Any, slots: Any, *rest: Any) -> Any:
        if state.is_calm and round_.epoch == state.generation:
            return conclude(state, vs, round_, kind, slots, *rest)
        return state.write(vs, vs.slots.unflag(slots))

    swap(settle, "_conclude", unless_late)


def _udp_rebase() -> None:
    """Unknown flows of UDP go to base for as long as the slot tracks."""
    swap(Slots, "rebase", _none)


def _ask_forget() -> None:
    """The owner forgets what it has not seen for long."""

    def alone(state: Any, flows: Any, slots: Any, now_ns: int) -> Any:
        if not len(flows):
            return []
        return [LookRecords(state.open(forget._LookedAgain(flows), now_ns), flows)]

    swap(forget, "_ask", alone)


# --- A change of the ring ---------------------------------------------------------------------------------------------
def _prev() -> None:
    """For an LB that has switched, the old replicas are none any more."""
    swap(Maps, "replicas", lambda self, slot: _listed(self.own[slot], self.next[slot]))


def _repeated_handover() -> None:
    """Who has handed over once does not do so again when somebody is lost meanwhile."""
    begin = handover._begin

    def once(state: State, request: int, call: Any, now_ns: int) -> Any:
        if state.ring_step is RingStep.HANDED:
            state.ring_round = call.round
            return [Reply(request, state.status())]
        return begin(state, request, call, now_ns)

    swap(handover, "_begin", once)


def _count_anew() -> None:
    """Who stays a replica goes on counting where it was."""
    update = State.update_ring

    def go_on(self: State, now_ns: int) -> Any:
        effects = update(self, now_ns)
        self.replicas_changed_ns = None
        return effects

    swap(State, "update_ring", go_on)


RULES: Final[dict[str, Callable[[], None]]] = {
    "prepare": _prepare,
    "relay": _relay,
    "chain": _chain,
    "chain-extension": _chain_extension,
    "prev": _prev,
    "repeated-handover": _repeated_handover,
    "lease": _lease,
    "owners-stamp": _owners_stamp,
    "chain-again": _chain_again,
    "quiet-time": _quiet_time,
    "ask-settle": _ask_settle,
    "ask-forget": _ask_forget,
    "own-look": _own_look,
    "backup-steady-first": _backup_steady_first,
    "take-over": _take_over,
    "count-anew": _count_anew,
    "open-settle": _open_settle,
    "doubtful": _doubtful,
    "asked-syn": _asked_syn,
    "syn-lease": _syn_lease,
    "begun-alone": _begun_alone,
    "turn-back": _turn_back,
    "mute": _mute,
    "open-base": _open_base,
    "unrecorded-base": _unrecorded_base,
    "unrecorded-drop": _unrecorded_drop,
    "dead-base": _dead_base,
    "udp-rebase": _udp_rebase,
}
"""Name of a rule -> what takes it out."""


# --- The search -------------------------------------------------------------------------------------------------------
def _found(seed: int) -> str:
    return run(seed).found


def _enter(rule: str, is_out: bool) -> None:
    """For the rest of a process: the rule's world, with the rule or without."""
    if rule == NOTHING:
        return
    WORLDS[rule].enter()
    if is_out:
        RULES[rule]()


def search(rule: str, seeds: list[int]) -> int:
    """Say which of the seeds is the first to show that the rule is needed. Exit status 1: none."""
    fork = multiprocessing.get_context("fork")
    with fork.Pool(1, _enter, (rule, True)) as without, fork.Pool(1, _enter, (rule, False)) as whole:
        for seed in seeds:
            found = without.apply(_found, (seed,))
            if not found:
                continue
            otherwise = whole.apply(_found, (seed,))
            if not otherwise:
                print(f"without {rule}: seed {seed}: {found}", flush=True)
                return 0
            print(f"with {rule} and without: seed {seed}: {otherwise}", flush=True)
    print(f"without {rule}: {len(seeds)} seeds show no need of it")
    return 1


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rule", choices=[*sorted(RULES), NOTHING], nargs="?")
    parser.add_argument("seeds", nargs="*", help="numbers, or A..B")
    parser.add_argument("--list", action="store_true", help="name the rules")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(sorted(RULES)))
        return 0
    seeds = [
        seed
        for text in asked.seeds
        for first, _, last in [text.partition("..")]
        for seed in range(int(first), int(last or first) + 1)
    ]
    return search(asked.rule, seeds)


if __name__ == "__main__":
    sys.exit(main())
