"""Promises of the Keeper under anything that a controller, a network, a kernel or time may do to a small cluster.

Drawn are the steps: changes that are staged, prepared and committed node by node (now and then given up half way), time
that passes, beliefs, restarts, writes that fail. The network loses and delays by a number of its own. The only law that
the controller keeps is the one that it can keep: nobody commits what not every LB has prepared.

Checked after each step, across the cluster: where an LB is steady, one with another backend for new flows tracks the
slot and is no replica of it (so it relays, and decides nothing); and where an owner is steady, its backup has given
up the old base. Within each node, ``tests.keepers`` checks the Keeper's invariants after every event, and that nothing
is acknowledged that is not in the maps.
"""

from collections.abc import Callable
from random import Random

import msgspec
import numpy as np
from hypothesis import given, settings, strategies as st

from lbpod.core.layout import SLOT_ROUND_MASK
from lbpod.core.messages import (
    CommitCall,
    KeeperEffect,
    LbStatus,
    PrepareCall,
    Refuse,
    Remember,
    Reply,
)
from lbpod.core.model import Protocol, Snapshot, WorldVip
from lbpod.core.snapshot import digest_of
from tests.conftest import SOAK_FACTOR
from tests.keepers import SECOND_NS, Cluster, Node, never, vip

PODS = range(1, 6)
Step = tuple[str, object]

pods = st.tuples(st.sets(st.sampled_from(PODS)), st.sets(st.sampled_from(PODS)))
names = st.sampled_from(["lb1", "lb2", "lb3", "host1"])
steps = st.one_of(
    st.tuples(st.just("change"), pods),
    st.tuples(st.just("change"), pods),
    st.tuples(st.just("half"), st.tuples(pods, st.sets(names, max_size=3))),
    st.tuples(st.just("wait"), st.sampled_from([1, 2, 5, 13])),
    st.tuples(st.just("wait"), st.sampled_from([1, 2, 5, 13])),
    st.tuples(st.just("down"), st.tuples(names, st.integers(0, 2))),
    st.tuples(st.just("up"), st.tuples(names, st.integers(0, 2))),
    st.tuples(st.just("restart"), names),
    st.tuples(st.just("fail"), st.tuples(names, st.integers(1, 8))),
)


def _but_problem(status: LbStatus) -> LbStatus:
    return msgspec.structs.replace(status, problem="")


class Run:
    """A cluster, and a controller that goes on with what it has begun."""

    def __init__(self, seed: int, protocol: Protocol) -> None:
        self.protocol = protocol
        self.cluster = Cluster(3, Random(seed), loss=0.1, delay_ns_max=200_000_000)
        self.cluster.change(*self._vips({1, 2}, set()))

    def _vips(self, ready: set[int], draining: set[int]) -> list[WorldVip]:
        return [vip(sorted(ready), sorted(draining - ready), protocol=self.protocol), vip([1], port=81)]

    def step(self, name: str, argument: object) -> None:
        match name, argument:
            case "change", (set() as ready, set() as draining):
                self._roll_out(ready, draining, None)
            case "half", ((set() as ready, set() as draining), set() as only):
                self._roll_out(ready, draining, only)
            case "wait", int() as seconds:
                self.cluster.run(seconds * SECOND_NS)
            case (("down" | "up"), (str() as who, int() as member)):
                self.cluster.believe(who, member, up=name == "up")
            case "restart", str() as who:
                self.cluster[who].restart(self.cluster.now_ns)
            case "fail", (str() as who, int() as count):
                self.cluster[who].fails = fail_next(count)
            case _:
                raise AssertionError(f"{name} {argument} is no step")

    def _roll_out(self, ready: set[int], draining: set[int], only: set[str] | None) -> None:
        """only: whom the controller still reaches after everybody has prepared; None: everybody."""
        generation = self.cluster.generation
        try:
            snapshot = self.cluster.plan(*self._vips(ready, draining))
        except AssertionError:
            self.cluster.generation = generation
            return
        digest = digest_of(snapshot)
        for body in (snapshot, PrepareCall(snapshot.generation, digest)):
            for node in self.cluster.nodes.values():
                self._insist(node, body)
                self.check()
        for name in self.cluster.nodes:
            if only is None or name in only:
                self._insist(self.cluster[name], CommitCall(snapshot.generation, digest))
                self.check()

    def _insist(self, node: Node, body: Snapshot | PrepareCall | CommitCall) -> None:
        """Call until it is done: 503 is no answer. Then again: nothing may change."""
        for _ in range(12):
            answer = node.call(body, self.cluster.now_ns)
            self.cluster._collect(node)
            if isinstance(answer, Reply):
                break
            assert isinstance(answer, Refuse)
            assert 503 == answer.status, answer
        else:
            raise AssertionError("writes fail for a while, not for ever")
        status, words = node.status, {number: node.words(number) for number in node.datapath.vip_ids()}
        again = node.call(body, self.cluster.now_ns)
        assert isinstance(again, Reply)
        assert isinstance(again.body, LbStatus)
        # What is wrong may have ended meanwhile: an LB that had heard nobody has just been called.
        assert 1 == len({_but_problem(each) for each in (status, node.status, again.body)})
        assert all((had == node.words(number)).all() for number, had in words.items())

    def check(self) -> None:
        """What holds across the cluster, in the maps."""
        muxes = self.cluster.muxes
        for number in muxes[0].datapath.vip_ids():
            if all(number in node.datapath.vip_ids() for node in muxes):
                for node in muxes:
                    for other in muxes:
                        self._check_steady(node, other, number)
                        self._check_agreed(node, other, number)

    def _check_steady(self, steady: Node, other: Node, number: int) -> None:
        """Owner and backup may settle a slot at a generation that a third LB has not committed: it relays to them."""
        differ = (steady.current(number) != other.current(number)) & ~steady.tracking(number)
        differ &= (steady.current(number) != 0) & (other.current(number) != 0)
        assert other.tracking(number)[differ].all(), "two LBs are steady with different backends"
        assert not (other.owned() | other.backed())[differ].any(), "a replica still decides otherwise"

    def _check_agreed(self, owner: Node, backup: Node, number: int) -> None:
        calm = not owner.status.prepared and not backup.status.prepared
        if calm and owner.status.committed == backup.status.committed:
            both = owner.owned() & backup.backed() & ~owner.tracking(number)
            assert (backup.base(number) == backup.current(number))[both].all(), "a steady owner was agreed with"


def fail_next(count: int) -> Callable[[KeeperEffect], bool]:
    """The next so many writes, looks and rememberings, all but the first of three, fail."""
    left = [count]

    def fails(effect: KeeperEffect) -> bool:
        left[0] -= 1
        return left[0] >= 0 and (left[0] % 3 != 0 or isinstance(effect, Remember))

    return fails


@settings(max_examples=8 * SOAK_FACTOR)
@given(st.integers(0, 2**32 - 1), st.sampled_from(Protocol), st.lists(steps, min_size=3, max_size=9))
def test_promises_hold_whatever_happens(seed: int, protocol: Protocol, drawn: list[Step]) -> None:
    run = Run(seed, protocol)
    for name, argument in drawn:
        run.step(name, argument)
        run.check()
    for node in run.cluster.nodes.values():
        node.fails = never
        for member in range(3):
            run.cluster.believe(node.name, member, up=True)
    run.cluster.loss = 0
    run.step("change", ({1, 2, 3}, set()))
    run.cluster.run(45 * SECOND_NS)
    # Not the round: each LB counts its own, and one that has missed a settle has begun one fewer.
    words = [node.words() & ~np.uint64(SLOT_ROUND_MASK) for node in run.cluster.muxes]
    assert [0, 0, 0] == [node.status.tracking_slots for node in run.cluster.muxes], "in the end all is steady"
    assert all(np.array_equal(words[0], other) for other in words)
