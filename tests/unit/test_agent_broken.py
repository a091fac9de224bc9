"""A mistake of our own ends the agent wherever it shows; what the world does never does."""

import asyncio
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
from structlog.testing import capture_logs

import lbpod.agent.__main__ as command
from lbpod.agent.agent import Agent, Parts, StartError
from lbpod.agent.broken import BROKEN, BrokenError, is_ours
from lbpod.agent.run import serve
from lbpod.core.limits import TICK_NS
from lbpod.core.messages import (
    BeatAnswer,
    CommitCall,
    ControlCall,
    KeeperEffect,
    KeeperEvent,
    LbStatus,
    PeerCall,
    PrepareCall,
    QuietCall,
    Tick,
)
from lbpod.core.model import Snapshot, parse_address
from lbpod.core.watch import Beliefs
from lbpod.datapath.memory import MemoryDatapath, MemoryHops
from lbpod.minting import mint
from tests.agents import Caller, follow, make_parts, roll_out, running, world


def broken() -> NoReturn:
    raise AssertionError("this cannot be")


class LoudHops(MemoryHops):
    """A socket that has something to tell, and what happens when it is read."""

    def __init__(self, on_event: Callable[[], object]) -> None:
        super().__init__()
        self._near, self._far = socket.socketpair()
        self._far.send(b"x")
        self._on_event = on_event

    def fileno(self) -> int:
        return self._near.fileno()

    def handle_events(self) -> Sequence[int]:
        self._near.recv(1)
        self._on_event()
        return []


class BrokenBrain:
    """Fails at the first tick, or at the first call."""

    def __init__(self, fails_at: type[KeeperEvent]) -> None:
        self._fails_at = fails_at

    def step(self, event: KeeperEvent, now_ns: int) -> Sequence[KeeperEffect]:
        if isinstance(event, self._fails_at):
            broken()
        return []

    def status(self, with_snapshot: bool = False) -> LbStatus:
        return LbStatus("n1", 0, 0, 0, 0, b"", 0, 0)

    def beliefs(self) -> Beliefs:
        return Beliefs()

    def beat(self) -> BeatAnswer | None:
        return None

    def pause_ns(self, now_ns: int) -> int:
        return TICK_NS

    def is_quick(self, body: ControlCall | PeerCall) -> bool:
        return not isinstance(body, Snapshot | PrepareCall | CommitCall)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    mint(folder / "tls", ["n1", "n2", "n3"])
    return folder


def parts_of(folder: Path) -> Parts:
    return make_parts("n1", folder, MemoryDatapath(), address=parse_address("10.0.0.1"))


def test_a_reader_that_breaks_ends_the_agent_with_a_sentence(folder: Path) -> None:
    with capture_logs() as logs, pytest.raises(BrokenError, match=r"this cannot be.*forwarding goes on"):
        serve(replace(parts_of(folder), hops=LoudHops(broken)))
    assert ["critical"] == [line["log_level"] for line in logs if line["event"] == "broken"]


def test_a_brain_that_breaks_ends_the_agent_with_a_sentence(folder: Path) -> None:
    with pytest.raises(BrokenError, match="this cannot be"):
        serve(replace(parts_of(folder), brain=BrokenBrain(Tick)))


def test_what_looks_after_things_ends_the_agent_where_it_breaks(folder: Path) -> None:
    with pytest.raises(BrokenError, match="this cannot be"):
        serve(replace(parts_of(folder), substitutes=broken))


async def test_a_task_of_the_peers_that_breaks_ends_the_agent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Agent(parts_of(folder))
    task = asyncio.create_task(agent.run())
    await asyncio.wait_for(agent.started.wait(), 10)
    async with Caller(folder, "controller") as controller:
        await roll_out(controller, [agent], follow(world({"n1": agent}, 3), None))
    monkeypatch.setattr("lbpod.agent.peers.wire.encode", lambda body: broken())
    agent.peers.ask(1, 2, QuietCall(1, b"", b""))
    with pytest.raises(AssertionError, match="this cannot be"):
        await asyncio.wait_for(task, 10)


async def test_a_request_that_finds_something_broken_ends_the_agent(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Agent(parts_of(folder))
    task = asyncio.create_task(agent.run())
    await asyncio.wait_for(agent.started.wait(), 10)
    monkeypatch.setattr(agent.view, "trace", broken)
    async with Caller(folder, "viewer") as viewer:
        assert (500, b"this agent has made a mistake and stops\n") == await viewer.call("GET", agent, "/v1/trace")
    with pytest.raises(AssertionError, match="this cannot be"):
        await asyncio.wait_for(task, 10)


async def test_what_the_world_does_ends_nothing(folder: Path) -> None:
    def unplugged() -> NoReturn:
        raise OSError(5, "Input/output error")

    def of_the_loop() -> NoReturn:
        raise AssertionError("a transport has stumbled")

    async with running(replace(parts_of(folder), hops=LoudHops(unplugged))) as agent:
        asyncio.get_running_loop().call_soon(of_the_loop)
        async with Caller(folder, "viewer") as viewer:
            for _ in range(3):
                assert (200, b"[]") == await viewer.call("GET", agent, "/v1/trace")


def test_only_what_came_through_code_of_ours_is_ours() -> None:
    found: list[BaseException] = []
    for act in (broken, lambda: int("no"), lambda: parse_address("no")):
        try:
            act()
        except Exception as error:  # noqa: BLE001  (whatever it is: that is the question)
            found.append(error)
    assert [False, False, True] == [is_ours(error) for error in found]
    assert not is_ours(KeyboardInterrupt())


@pytest.mark.parametrize(("error", "status"), [(BrokenError("broken"), BROKEN), (StartError("no"), 1)])
def test_the_exit_status_says_whose_fault_it_was(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_agent(_: object) -> NoReturn:
        raise error

    monkeypatch.setattr("lbpod.agent.run.run_agent", run_agent)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(sys, "argv", ["lbpod.agent"])
    assert status == command.main()
    assert f"holdfast agent: {error}\n" == capsys.readouterr().err
