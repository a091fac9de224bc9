"""The loop: effects in their order, failures as events, nobody left waiting. The brain is a script here."""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from lbpod.agent.clock import now_ns
from lbpod.agent.driver import Driver
from lbpod.agent.remembered import Memory
from lbpod.core.layout import FLOW, PENDING, RECORD
from lbpod.core.limits import BATCH_MAX, MARGIN_NS, MEMBER_NONE, NEIGHBOUR_REFRESH_NS, QUEUE_MAX, RETRY_NS, TICK_NS
from lbpod.core.messages import (
    Answered,
    BeatAnswer,
    BeatCall,
    Called,
    CommitCall,
    Configure,
    ControlCall,
    CreateVip,
    DeleteVip,
    DumpRecords,
    EffectsFailed,
    KeeperEffect,
    KeeperEvent,
    LbStatus,
    LookNat,
    LookRecords,
    LookSeen,
    MemberSeen,
    NatLooked,
    PeerCall,
    PendingDrained,
    PrepareCall,
    QuietAnswer,
    QuietCall,
    RecordsDumped,
    RecordsLooked,
    Refuse,
    Remember,
    Reply,
    SeenRead,
    Tick,
    Trace,
    Woke,
    WriteSlots,
)
from lbpod.core.model import Snapshot
from lbpod.core.watch import Beliefs
from lbpod.datapath.apply import Applier
from lbpod.datapath.memory import MemoryDatapath, MemoryHops
from lbpod.datapath.port import U32, U64, DatapathError, FlowMap, Rows
from tests.agents import UPLINK, flows, snapshot

QUIET = QuietCall(5, b"", b"")
ANSWER = QuietAnswer(True, b"")
BEAT = BeatAnswer(0, 1, 1, serving=True)
BACK = BeatAnswer(0, 1, 1, serving=False, returning=True, owes=True)
OWING = BeatAnswer(0, 1, 1, serving=True, owes=True)
NOTHING = WriteSlots(5, np.zeros(1, np.uint32), np.zeros(1, np.uint64))
"""Writes one slot as it is."""
_T = TypeVar("_T")


class Script:
    """A brain that answers each event as it is told, and notes what it was given."""

    def __init__(self, reply: Callable[[KeeperEvent], Sequence[KeeperEffect]]) -> None:
        self._reply = reply
        self.seen: list[KeeperEvent] = []
        self.said = OWING
        """What it says to whoever asks while it has more to do."""
        self.woke = asyncio.Event()
        """It has been told that it had not run for long (so it may be on a busy machine, too)."""

    def step(self, event: KeeperEvent, now_ns: int) -> Sequence[KeeperEffect]:
        assert now_ns > 0
        if isinstance(event, Woke):
            self.woke.set()
        elif not isinstance(event, Tick):
            self.seen.append(event)
        return self._reply(event)

    def status(self, with_snapshot: bool = False) -> LbStatus:
        return LbStatus("n1", MEMBER_NONE, 0, 0, 0, b"", 0, 0)

    def beliefs(self) -> Beliefs:
        return Beliefs()

    def beat(self) -> BeatAnswer | None:
        return self.said

    def pause_ns(self, now_ns: int) -> int:
        return TICK_NS

    def is_quick(self, body: ControlCall | PeerCall) -> bool:
        return not isinstance(body, Snapshot | PrepareCall | CommitCall)


class SlowDatapath(MemoryDatapath):
    """Takes its time for the slots of a VIP, as one of many."""

    def write_slots(self, vip: int, slots: U32, words: U64) -> None:
        time.sleep(0.005)
        super().write_slots(vip, slots, words)


def driver_of(script: Script, datapath: MemoryDatapath, folder: Path, hops: MemoryHops | None = None) -> Driver:
    applier = Applier(datapath, "n1", UPLINK, MemoryHops() if hops is None else hops)
    return Driver(script, datapath, applier, Memory(folder))


async def finish(driver: Driver, running: asyncio.Task[None]) -> None:
    driver.stop()
    await asyncio.wait_for(running, 5)


async def test_effects_are_carried_out_in_order_and_a_failure_ends_the_list(tmp_path: Path) -> None:
    nothing = WriteSlots(9, np.zeros(1, np.uint32), np.zeros(1, np.uint64))

    def reply(event: KeeperEvent) -> Sequence[KeeperEffect]:
        match event:
            case Called():
                return [CreateVip(5), nothing, DeleteVip(5), Reply(event.request, ANSWER)]
            case EffectsFailed():
                return [event.rest[-1]]
            case _:
                return []

    script, datapath = Script(reply), MemoryDatapath()
    driver = driver_of(script, datapath, tmp_path)
    running = asyncio.create_task(driver.run(None))
    answer = await asyncio.wait_for(driver.call(QUIET), 5)
    assert isinstance(answer, Reply)
    assert ANSWER == answer.body
    failed = script.seen[1]
    assert isinstance(failed, EffectsFailed)
    assert nothing is failed.failed
    assert [DeleteVip, Reply] == [type(effect) for effect in failed.rest]
    assert "VIP 9" in failed.reason
    assert [5] == datapath.vip_ids(), "what comes after the failure is not carried out"
    assert {"WriteSlots": 1} == dict(driver.failures)
    await finish(driver, running)


async def test_questions_are_answered_before_anything_else_happens(tmp_path: Path) -> None:
    def reply(event: KeeperEvent) -> Sequence[KeeperEffect]:
        match event:
            case Called():
                return [CreateVip(5), LookSeen(1, 5), LookRecords(2, flows(2))]
            case RecordsLooked():
                return [Reply(1, ANSWER)]
            case _:
                return []

    script = Script(reply)
    driver = driver_of(script, MemoryDatapath(), tmp_path)
    running = asyncio.create_task(driver.run(None))
    first, second = asyncio.create_task(driver.call(QUIET)), asyncio.create_task(driver.call(QUIET))
    await asyncio.wait_for(first, 5)
    assert [Called, SeenRead, RecordsLooked, Called] == [type(event) for event in script.seen][:4]
    await finish(driver, running)
    late = await second
    assert isinstance(late, Refuse)
    assert (503, True) == (late.status, "stopping" in late.sentence)


async def test_a_call_that_has_waited_too_long_never_reaches_the_keeper(tmp_path: Path) -> None:
    def reply(event: KeeperEvent) -> Sequence[KeeperEffect]:
        return [Reply(event.request, ANSWER)] if isinstance(event, Called) else []

    script = Script(reply)
    driver = driver_of(script, MemoryDatapath(), tmp_path)
    calls = [asyncio.create_task(driver.call(QUIET, until_ns)) for until_ns in (now_ns() - 1, now_ns() + 10**12)]
    running = asyncio.create_task(driver.run(None))
    late, soon = await asyncio.wait_for(asyncio.gather(*calls), 5)
    assert isinstance(late, Refuse)
    assert (408, True) == (late.status, "too old" in late.sentence)
    assert isinstance(soon, Reply)
    assert 1 == sum(isinstance(event, Called) for event in script.seen)
    await finish(driver, running)


async def test_a_call_without_a_limit_is_never_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the clock moves while it is looked at: one call in twenty thousand was refused."""
    clock = itertools.count(1)
    monkeypatch.setattr("lbpod.agent.driver.now_ns", lambda: next(clock))
    script = Script(lambda event: [Reply(event.request, ANSWER)] if isinstance(event, Called) else [])
    driver = driver_of(script, MemoryDatapath(), tmp_path)
    running = asyncio.create_task(driver.run(None))
    assert isinstance(await asyncio.wait_for(driver.call(QUIET), 20), Reply)
    await finish(driver, running)


async def test_beats_overtake_whatever_waits_and_get_in_where_nothing_else_does(tmp_path: Path) -> None:
    def reply(event: KeeperEvent) -> Sequence[KeeperEffect]:
        match event:
            case Called(body=BeatCall()):
                return [Reply(event.request, BEAT)]
            case Called():
                return [Reply(event.request, ANSWER)]
        return []

    script = Script(reply)
    driver = driver_of(script, MemoryDatapath(), tmp_path)
    waiting = [asyncio.create_task(driver.call(QUIET)) for _ in range(QUEUE_MAX)]
    await asyncio.sleep(0)
    beat = asyncio.create_task(driver.call(BeatCall(1, 1, 1)))
    await asyncio.sleep(0)
    driver.post(Answered(7, BEAT))
    running = asyncio.create_task(driver.run(None))
    assert BEAT == _body(await asyncio.wait_for(beat, 20))
    await asyncio.wait_for(asyncio.gather(*waiting), 20)
    assert [Answered(7, BEAT), BeatCall(1, 1, 1)] == [script.seen[0], _called(script.seen[1])]
    called = sum(isinstance(event, Called) for event in script.seen)
    assert (QUEUE_MAX + 1, 1) == (called, driver.beats_answered)
    await finish(driver, running)


async def test_beats_and_the_controller_are_answered_while_the_keeper_thinks(tmp_path: Path) -> None:
    """With what it said last; who asks for a snapshot waits. Its thread thinks until the second beat is answered."""
    thinking, answered = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def reply(event: KeeperEvent) -> Sequence[KeeperEffect]:
        match event:
            case Called(body=BeatCall()):
                return [Reply(event.request, BEAT)]
            case Called(body=PrepareCall()):
                loop.call_soon_threadsafe(thinking.set)
                assert answered.wait(20)
                return [Refuse(event.request, 409, "not now")]
        return []

    driver = driver_of(Script(reply), MemoryDatapath(), tmp_path)
    running = asyncio.create_task(driver.run(None))
    assert BEAT == _body(await asyncio.wait_for(driver.call(BeatCall(1, 1, 1)), 20))
    prepare = asyncio.create_task(driver.call(PrepareCall(1, b"")))
    await asyncio.wait_for(thinking.wait(), 20)
    again = _body(await asyncio.wait_for(driver.call(BeatCall(1, 1, 1)), 20))
    assert OWING == again, "whom it owes something, only the Keeper knows"
    assert driver.status is await asyncio.wait_for(driver.look(with_snapshot=False), 20)
    with_snapshot = asyncio.create_task(driver.look())
    await asyncio.sleep(0)
    assert not prepare.done()
    assert not with_snapshot.done()
    answered.set()
    assert isinstance(await asyncio.wait_for(prepare, 20), Refuse)
    await asyncio.wait_for(with_snapshot, 20)
    await finish(driver, running)


async def test_beats_are_answered_in_the_middle_of_many_vips_and_all_else_waits(tmp_path: Path) -> None:
    """Who wrote the slots of ninety VIPs in one go heard nobody for so long that it fenced itself and began again."""

    def reply(event: KeeperEvent) -> Sequence[KeeperEffect]:
        match event:
            case Called(body=BeatCall()):
                return [Reply(event.request, BEAT)]
            case Called(body=QuietCall()):
                return [CreateVip(5), *[NOTHING] * 80, Reply(event.request, ANSWER)]
        return []

    script = Script(reply)
    driver = driver_of(script, SlowDatapath(), tmp_path)
    running = asyncio.create_task(driver.run(None))
    assert BEAT == _body(await asyncio.wait_for(driver.call(BeatCall(1, 1, 1)), 20))
    script.said = BACK  # it has been cut off, say, since it last answered one
    ended: list[str] = []

    async def ask(what: str, answer: Coroutine[object, object, _T], after_s: float) -> _T:
        await asyncio.sleep(after_s)
        found = await asyncio.wait_for(answer, 20)
        ended.append(what)
        return found

    beat, *_ = await asyncio.gather(
        ask("beat", driver.call(BeatCall(1, 1, 1)), 0.06),
        ask("state", driver.look(with_snapshot=False), 0.06),
        ask("all slots", driver.call(QUIET), 0),
    )
    assert BACK == _body(beat)
    assert ["beat", "all slots", "state"] == ended, "what is said of itself is never older than what it has answered"
    await finish(driver, running)


async def test_nobody_has_a_turn_between_a_look_and_what_the_keeper_makes_of_it(tmp_path: Path) -> None:
    """What has been read is taken for what is there now; writes of other VIPs come between all the same."""
    turns: list[str] = []

    def reply(event: KeeperEvent) -> Sequence[KeeperEffect]:
        match event:
            case Called(body=QuietCall()):
                asyncio.get_running_loop().call_soon(turns.append, "somebody else")
                return [CreateVip(5), LookSeen(1, 5), *[NOTHING] * 30, Reply(event.request, ANSWER)]
            case SeenRead():
                turns.append("seen")
        return []

    driver = driver_of(Script(reply), SlowDatapath(), tmp_path)
    running = asyncio.create_task(driver.run(None))
    await asyncio.wait_for(driver.call(QUIET), 20)
    assert ["seen", "somebody else"] == turns
    await finish(driver, running)


def _body(answer: Reply | Refuse) -> object:
    return answer.body if isinstance(answer, Reply) else answer


def _called(event: KeeperEvent) -> object:
    return event.body if isinstance(event, Called) else event


async def test_a_loop_that_stood_still_says_so_before_anything_else(tmp_path: Path) -> None:
    def reply(event: KeeperEvent) -> Sequence[KeeperEffect]:
        if isinstance(event, Called) and not script.woke.is_set():
            time.sleep((MARGIN_NS + MARGIN_NS // 10) * 1e-9)
        return [Reply(event.request, ANSWER)] if isinstance(event, Called) else []

    script = Script(reply)
    driver = driver_of(script, MemoryDatapath(), tmp_path)
    running = asyncio.create_task(driver.run(None))
    await driver.call(QUIET)
    await asyncio.wait_for(script.woke.wait(), 5)
    await finish(driver, running)


async def test_a_full_queue_refuses_at_once(tmp_path: Path) -> None:
    driver = driver_of(Script(lambda event: []), MemoryDatapath(), tmp_path)
    waiting = [asyncio.create_task(driver.call(QUIET)) for _ in range(QUEUE_MAX)]
    await asyncio.sleep(0)
    refused = await asyncio.wait_for(driver.call(PrepareCall(1, b"")), 5)
    assert isinstance(refused, Refuse)
    assert 503 == refused.status
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_pending_flows_are_drained_in_batches(tmp_path: Path) -> None:
    drained: list[int] = []
    done = asyncio.Event()

    def reply(event: KeeperEvent) -> Sequence[KeeperEffect]:
        if isinstance(event, PendingDrained):
            drained.append(len(event.flows))
            if sum(drained) == len(keys):
                done.set()
        return []

    datapath = MemoryDatapath()
    keys = np.zeros(2 * BATCH_MAX + 1, FLOW)
    keys["vip"] = 1
    keys["addr"][:, 12:] = np.arange(len(keys), dtype=">u4").view(np.uint8).reshape(-1, 4)
    datapath.flows_put(FlowMap.PENDING, keys, np.zeros(len(keys), PENDING))
    driver = driver_of(Script(reply), datapath, tmp_path)
    running = asyncio.create_task(driver.run(None))
    await asyncio.wait_for(done.wait(), 10)
    assert len(keys) == driver.drained_flows
    assert [BATCH_MAX, BATCH_MAX, 1] == drained
    await finish(driver, running)


async def test_a_disk_that_refuses_does_not_stop_a_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")

    def reply(event: KeeperEvent) -> Sequence[KeeperEffect]:
        if isinstance(event, Called):
            return [Remember(snapshot(1), None), Trace("committed"), Reply(event.request, ANSWER)]
        return []

    driver = driver_of(Script(reply), MemoryDatapath(), tmp_path / "file")
    running = asyncio.create_task(driver.run(None))
    assert isinstance(await asyncio.wait_for(driver.call(QUIET), 5), Reply)
    assert {"Remember": 1} == dict(driver.failures)
    assert "" == driver.failure, "and nobody is sent elsewhere because of it"
    assert ["committed"] == [line.trace.what for line in driver.trace]
    await finish(driver, running)


async def test_a_brain_that_asks_in_circles_stops_the_agent(tmp_path: Path) -> None:
    driver = driver_of(Script(lambda event: [LookRecords(1, flows(1))]), MemoryDatapath(), tmp_path)
    with pytest.raises(AssertionError, match="circles"):
        await asyncio.wait_for(driver.run(None), 20)


async def test_somebody_else_has_a_turn_between_two_slices_of_the_records_but_not_within_one(tmp_path: Path) -> None:
    def reply(event: KeeperEvent) -> Sequence[KeeperEffect]:
        match event:
            case Called(request=1):
                return [DumpRecords(1), Reply(1, ANSWER)]
            case Called():
                return [Reply(event.request, ANSWER)]
            case RecordsDumped():
                driver.post(MemberSeen(event.token, True))  # somebody else, who comes whatever the last slice has done
                return [DumpRecords(event.token + 1, event.cursor)] if event.cursor else []
            case _:
                return []

    class Watched(MemoryDatapath):
        def flows_slice(self, name: FlowMap, cursor: int | None) -> tuple[Rows, Rows, int | None]:
            seen_before.append(len(script.seen))
            return super().flows_slice(name, cursor)

    seen_before: list[int] = []
    script, datapath = Script(reply), Watched(slice_max=1)
    datapath.flows_put(FlowMap.RECORDS, flows(3), np.zeros(3, RECORD))
    driver = driver_of(script, datapath, tmp_path)
    asked = [asyncio.create_task(driver.call(QUIET)) for _ in range(3)]
    await asyncio.sleep(0)
    running = asyncio.create_task(driver.run(None))
    await asyncio.wait_for(asyncio.gather(*asked), 5)
    await asyncio.wait_for(driver.look(), 5)
    kinds = [type(event) for event in script.seen]
    assert [Called, RecordsDumped, Called, Called, MemberSeen, RecordsDumped, MemberSeen, RecordsDumped] == kinds[:8]
    assert [1, 1, 5, 7] == seen_before, "what is looked at is the next that the Keeper hears of"
    assert 3 == driver.effects["DumpRecords"]
    await finish(driver, running)


async def test_a_slice_that_cannot_be_read_is_a_failed_question(tmp_path: Path) -> None:
    def reply(event: KeeperEvent) -> Sequence[KeeperEffect]:
        match event:
            case Called():
                return [DumpRecords(1), Reply(event.request, ANSWER)]
            case RecordsDumped(cursor=(_, _) as cursor):
                broken.append(True)
                return [DumpRecords(2, cursor)]
            case _:
                return []

    class Broken(MemoryDatapath):
        def flows_slice(self, name: FlowMap, cursor: int | None) -> tuple[Rows, Rows, int | None]:
            if broken:
                raise DatapathError("the map says no")
            return super().flows_slice(name, cursor)

    broken: list[bool] = []
    script, datapath = Script(reply), Broken(slice_max=1)
    datapath.flows_put(FlowMap.RECORDS, flows(3), np.zeros(3, RECORD))
    driver = driver_of(script, datapath, tmp_path)
    running = asyncio.create_task(driver.run(None))
    await asyncio.wait_for(driver.call(QUIET), 5)
    await asyncio.wait_for(driver.look(), 5)
    assert [Called, RecordsDumped, EffectsFailed] == [type(one) for one in script.seen]
    failed = script.seen[-1]
    assert isinstance(failed, EffectsFailed)
    assert (DumpRecords, ()) == (type(failed.failed), failed.rest)
    assert "no" in driver.failure
    await finish(driver, running)


async def test_somebody_else_has_a_turn_between_two_slices_of_the_translated_flows(tmp_path: Path) -> None:
    def reply(event: KeeperEvent) -> Sequence[KeeperEffect]:
        match event:
            case Called(request=1):
                return [LookNat(1, None), Reply(1, ANSWER)]
            case Called():
                return [Reply(event.request, ANSWER)]
            case NatLooked(token=1):
                return [LookNat(2, event.cursor)]
            case _:
                return []

    script = Script(reply)
    driver = driver_of(script, MemoryDatapath(), tmp_path)
    asked = [asyncio.create_task(driver.call(QUIET)) for _ in range(3)]
    await asyncio.sleep(0)
    running = asyncio.create_task(driver.run(None))
    await asyncio.wait_for(asyncio.gather(*asked), 5)
    await asyncio.wait_for(driver.look(), 5)
    assert [Called, Called, Called, NatLooked, NatLooked] == [type(event) for event in script.seen]
    await finish(driver, running)


class SilentHops(MemoryHops):
    """Next hops of a kernel that does not answer while it is told not to."""

    def __init__(self) -> None:
        super().__init__()
        self.silent = False
        self.asked_ns: list[int] = []

    def resolve_all(self) -> Sequence[int]:
        self.asked_ns.append(now_ns())
        return self.handle_events()

    def handle_events(self) -> Sequence[int]:
        if self.silent:
            raise DatapathError("netlink: the kernel does not answer")
        return []


class Refusing(MemoryDatapath):
    """Maps that refuse to be drained, or VIPs, while they are told to."""

    def __init__(self) -> None:
        super().__init__()
        self.no_drain = self.no_vips = False

    def pending_drain(self, count_max: int) -> tuple[Rows, Rows]:
        if self.no_drain:
            raise DatapathError("pending cannot be read")
        return super().pending_drain(count_max)

    def vip_create(self, vip: int) -> None:
        if self.no_vips:
            raise DatapathError("no room for VIPs")
        super().vip_create(vip)


async def until(seen: Callable[[], bool]) -> None:
    """Looks again and again, for ten seconds at most."""
    async with asyncio.timeout(10):
        while not seen():  # noqa: ASYNC110  (nobody tells)
            await asyncio.sleep(0.01)


def _one_vip_a_call(event: KeeperEvent) -> Sequence[KeeperEffect]:
    if not isinstance(event, Called):
        return [event.rest[-1]] if isinstance(event, EffectsFailed) else []
    configure = Configure(snapshot(1), None, frozenset({10}), frozenset({0}))
    return [configure, CreateVip(event.request), Reply(event.request, ANSWER)]


async def test_next_hops_that_failed_are_asked_for_again_soon_and_nothing_else_makes_them_good(tmp_path: Path) -> None:
    hops = SilentHops()
    driver = driver_of(Script(_one_vip_a_call), MemoryDatapath(), tmp_path, hops)
    running = asyncio.create_task(driver.run(None))
    await asyncio.wait_for(driver.call(QUIET), 5)
    hops.silent = True
    driver.take_hop_events()
    assert "netlink" in driver.failure
    hops.silent, failed_ns = False, now_ns()
    await asyncio.wait_for(driver.call(QUIET), 5)
    driver.take_hop_events()
    assert ("netlink" in driver.failure) is not bool(hops.asked_ns), "neither effects nor events find what was lost"
    await until(lambda: driver.failure == "")
    assert 1 == len(hops.asked_ns)
    assert now_ns() - failed_ns < NEIGHBOUR_REFRESH_NS // 2
    await finish(driver, running)


async def test_a_kernel_that_never_answers_is_asked_less_and_less_often(tmp_path: Path) -> None:
    hops = SilentHops()
    driver = driver_of(Script(_one_vip_a_call), MemoryDatapath(), tmp_path, hops)
    running = asyncio.create_task(driver.run(None))
    await asyncio.wait_for(driver.call(QUIET), 5)
    hops.silent, told_ns = True, now_ns()
    driver.take_hop_events()
    await until(lambda: len(hops.asked_ns) == 3)
    pauses_ns = [after - before for before, after in itertools.pairwise([told_ns, *hops.asked_ns])]
    assert [True] * 3 == [pause_ns >= RETRY_NS << place for place, pause_ns in enumerate(pauses_ns)]
    await finish(driver, running)


async def test_each_thing_that_fails_is_made_good_by_itself_alone(tmp_path: Path) -> None:
    datapath = Refusing()
    driver = driver_of(Script(_one_vip_a_call), datapath, tmp_path)
    running = asyncio.create_task(driver.run(None))
    await asyncio.wait_for(driver.call(QUIET), 5)
    datapath.no_drain = True
    await until(lambda: driver.failure != "")
    await asyncio.wait_for(driver.call(QUIET), 5)
    assert "pending cannot be read" == driver.failure, "VIPs are written, and nothing is drained all the same"
    datapath.no_vips = True
    await asyncio.wait_for(driver.call(QUIET), 5)
    assert "no room for VIPs; pending cannot be read" == driver.failure
    datapath.no_drain = False
    await until(lambda: "pending" not in driver.failure)
    assert "no room for VIPs" == driver.failure
    datapath.no_vips = False
    await asyncio.wait_for(driver.call(QUIET), 5)
    assert "" == driver.failure
    await finish(driver, running)


class LateHops(MemoryHops):
    """Next hops that have put something off."""

    def __init__(self) -> None:
        super().__init__()
        self.due = False

    def is_due(self) -> bool:
        return self.due

    def handle_events(self) -> Sequence[int]:
        self.due = False
        return []


async def test_what_next_hops_have_put_off_is_taken_when_it_is_due_although_nothing_comes(tmp_path: Path) -> None:
    hops = LateHops()
    driver = driver_of(Script(_one_vip_a_call), MemoryDatapath(), tmp_path, hops)
    running = asyncio.create_task(driver.run(None))
    await asyncio.wait_for(driver.call(QUIET), 5)
    hops.due = True
    await until(lambda: not hops.due)
    await finish(driver, running)
