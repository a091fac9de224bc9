"""What comes late, and what comes to nobody: questions that are acted upon when they arrive, beats, and calls to a
machine whose agent is away. Agents on maps in memory."""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest

from lbpod.agent.age import HEADER_CLOCK
from lbpod.agent.clock import now_ns
from lbpod.agent.peers import Peers
from lbpod.certs import client_context, files_in
from lbpod.core import wire
from lbpod.core.limits import BEAT_DOWN_NS, QUESTION_AGE_NS_MAX
from lbpod.core.messages import (
    AskFailed,
    BeatCall,
    Called,
    ForgetCall,
    KeeperEvent,
    ResolveCall,
    SettleCall,
    SettleKind,
    SettleStep,
)
from lbpod.core.model import Node, parse_address
from lbpod.datapath.memory import MemoryDatapath
from lbpod.minting import mint
from tests.agents import Caller, follow, make_parts, roll_out, running, world

ASK = SettleCall(0, SettleStep.ASK, SettleKind.SETTLE, 1, 1, b"", b"")
TELL = SettleCall(0, SettleStep.TELL, SettleKind.SETTLE, 1, 1, b"", b"")
ACTED_UPON: list[wire.Body] = [ASK, ForgetCall(0, b"")]
OTHERS: list[wire.Body] = [TELL, ResolveCall(0, b"")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("age")
    mint(folder / "tls", ["n1", "n2", "n3"])
    return folder


async def test_a_question_that_comes_late_is_refused(folder: Path) -> None:
    tls = client_context(files_in(folder / "tls", "n2"))
    tls.check_hostname = False
    parts = make_parts("n1", folder, MemoryDatapath(), address=parse_address("10.0.0.1"))
    late: Callable[[], int] = lambda: now_ns() - QUESTION_AGE_NS_MAX - 1  # noqa: E731
    async with (
        running(parts) as agent,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as session,
    ):

        async def say(body: wire.Body, clock: int | None) -> tuple[int, str]:
            method, path = wire.ROUTES[type(body)]
            url = f"https://127.0.0.1:{agent.control_port}{path}"
            headers = {} if clock is None else {HEADER_CLOCK: str(clock)}
            async with session.request(method, url, data=wire.encode(body), headers=headers) as response:
                assert abs(int(response.headers[HEADER_CLOCK]) - now_ns()) < 10**10
                return response.status, await response.text(errors="replace")

        for body in ACTED_UPON:
            assert 200 == (await say(body, now_ns()))[0]
            status, sentence = await say(body, None)
            assert (408, True) == (status, "ask again" in sentence), "nobody knows how old it is"
            assert (408, "this question is too old to be acted upon; ask again\n") == await say(body, late())
            assert 408 == (await say(body, now_ns() + 10**12))[0], "reckoned before the last boot"
        for other in OTHERS:
            assert 200 == (await say(other, late()))[0], "nothing hangs on when it comes"


async def test_an_agent_says_when_it_asks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        make_parts(name, folder, MemoryDatapath(), address=parse_address(f"10.0.0.{name[1]}")) for name in ("n1", "n2")
    ]
    async with running(parts[0]) as one, running(parts[1]) as two, Caller(folder, "controller") as controller:
        snapshot = follow(world({"n1": one, "n2": two}, 3), None)
        await roll_out(controller, [one, two], snapshot)
        number = next(node.id for node in snapshot.nodes if node.name == "n2")
        heard: list[int | None] = []
        hand_over = two.driver.call

        async def listen(body: object, until_ns: int | None = None) -> object:
            if isinstance(body, ForgetCall):
                heard.append(until_ns)
            return await hand_over(body, until_ns)  # type: ignore[arg-type]

        monkeypatch.setattr(two.driver, "call", listen)
        for count in (1, 2):
            before_ns = now_ns()
            one.peers.ask(0, number, ForgetCall(0, b""))
            async with asyncio.timeout(10):
                while len(heard) < count or one.peers.under_way_count:  # noqa: ASYNC110  (an answer tells nobody here)
                    await asyncio.sleep(0.01)
        assert heard[1] is not None, "one answer at least has told what their clock shows"
        assert before_ns - 10**10 < heard[1] - QUESTION_AGE_NS_MAX <= now_ns()


async def test_a_beat_that_comes_late_is_answered_and_said_to_be_late(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [
        make_parts(name, folder, MemoryDatapath(), address=parse_address(f"10.0.0.{name[1]}")) for name in ("n1", "n2")
    ]
    async with running(parts[0]) as one, running(parts[1]) as two, Caller(folder, "controller") as controller:
        await roll_out(controller, [one, two], follow(world({"n1": one, "n2": two}, 3), None))
        heard: list[Called] = []
        step = parts[0].brain.step

        def listen(event: KeeperEvent, at_ns: int) -> object:
            heard.extend([event] if isinstance(event, Called) and isinstance(event.body, BeatCall) else [])
            return step(event, at_ns)

        monkeypatch.setattr(parts[0].brain, "step", listen)
        async with asyncio.timeout(10):
            while not heard:  # noqa: ASYNC110  (a beat of the other one)
                await asyncio.sleep(0.01)
        assert not heard[-1].late
        tls = client_context(files_in(folder / "tls", "n2"))
        tls.check_hostname = False
        late = (now_ns() - BEAT_DOWN_NS - 1).to_bytes(8)
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as session,
            session.ws_connect(f"https://127.0.0.1:{one.control_port}{wire.PATH_BEATS}") as line,
        ):
            await line.send_bytes(late + wire.encode(BeatCall(1, 977, 1)))
            assert 200 == int.from_bytes((await line.receive_bytes())[8:10])
        assert [True] == [one.late for one in heard if isinstance(one.body, BeatCall) and one.body.generation == 977]


@pytest.mark.parametrize("listens", [False, True])
async def test_only_a_machine_that_refuses_the_connection_is_without_an_agent(folder: Path, listens: bool) -> None:
    """The other one takes the connection, and ends it."""
    failed: asyncio.Future[AskFailed] = asyncio.get_running_loop().create_future()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        if not listens:
            taken.close()
        server = await asyncio.start_server(lambda _, writer: writer.close(), sock=taken) if listens else None
        peers = Peers(client_context(files_in(folder / "tls", "n1")), failed.set_result)  # type: ignore[arg-type]
        peers.know({2: Node(2, "n2", parse_address("10.0.0.2"), f"127.0.0.1:{port}", 1)})
        peers.ask(7, 2, BeatCall(0, 1, 1))
        async with asyncio.timeout(10):
            event = await failed
        await peers.close()
        if server is not None:
            server.close()
    assert (7, not listens) == (event.token, event.agentless), event.reason
