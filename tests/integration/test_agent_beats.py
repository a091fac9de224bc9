"""Lines that beats travel on: what they take and refuse, how long they last, and what becomes of one that is closed,
stuck or silent. Agents on maps in memory, real TLS."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from lbpod.agent import beats
from lbpod.agent.clock import now_ns
from lbpod.agent.peers import Peers
from lbpod.certs import Credentials, client_context, files_in
from lbpod.core import wire
from lbpod.core.limits import BEAT_BYTES_MAX, BEAT_CONNECTIONS_MAX, PEER_TIMEOUT_NS
from lbpod.core.messages import Answered, AskFailed, BeatAnswer, BeatCall, KeeperEvent
from lbpod.core.model import Node, parse_address
from lbpod.datapath.memory import MemoryDatapath
from lbpod.minting import mint
from tests.agents import Caller, Reachable, follow, make_parts, roll_out, running, world

BEAT = BeatCall(1, 1, 1)
ASKED = struct.Struct(">Q")
ANSWERED = struct.Struct(">QH")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beats")
    mint(folder / "tls", ["n1", "n2", "n3"])
    return folder


@asynccontextmanager
async def line_to(folder: Path, agent: Reachable, who: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    tls = client_context(files_in(folder / "tls", who))
    tls.check_hostname = False
    url = f"https://127.0.0.1:{agent.control_port}{wire.PATH_BEATS}"
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as session,
        session.ws_connect(url) as line,
    ):
        yield line


async def say(line: aiohttp.ClientWebSocketResponse, data: bytes) -> tuple[int, int, bytes]:
    """The clock of the other side, a status, and the rest."""
    await line.send_bytes(ASKED.pack(now_ns()) + data)
    answer = await line.receive_bytes()
    return (*ANSWERED.unpack_from(answer), answer[ANSWERED.size :])


# --- The side that is asked -------------------------------------------------------------------------------------------
async def test_a_line_takes_beats_one_after_the_other_and_refuses_what_is_none(folder: Path) -> None:
    parts = [
        make_parts(name, folder, MemoryDatapath(), address=parse_address(f"10.0.0.{name[1]}")) for name in ("n1", "n2")
    ]
    async with running(parts[0]) as one, running(parts[1]) as two, Caller(folder, "controller") as controller:
        async with line_to(folder, one, "n2") as line:
            _, status, sentence = await say(line, wire.encode(BEAT))
            assert (503, b"n1 is no load balancer that it knows of") == (status, sentence)
        await roll_out(controller, [one, two], follow(world({"n1": one, "n2": two}, 3), None))
        before = one.view.refused[wire.PATH_BEATS, 400]
        async with line_to(folder, one, "n2") as line:
            clock_ns, status, data = await say(line, wire.encode(BEAT))
            assert 200 == status
            assert 0 == wire.decode(BeatAnswer, data).member
            assert clock_ns <= now_ns()
            for broken, wanted in ((b"", "the body is empty"), (b"\x01\xff", "malformed"), (b"\x09", "version 9")):
                _, status, data = await say(line, broken)
                assert 400 == status
                assert wanted in data.decode()
            assert 200 == (await say(line, wire.encode(BEAT)))[1], "it goes on"
        assert before + 3 == one.view.refused[wire.PATH_BEATS, 400]


@pytest.mark.parametrize("data", ["a text", b"short", bytes(BEAT_BYTES_MAX + 1)])
async def test_what_is_no_frame_ends_the_line(folder: Path, data: str | bytes) -> None:
    parts = make_parts("n1", folder, MemoryDatapath())
    async with running(parts) as one, line_to(folder, one, "n2") as line:
        await (line.send_str(data) if isinstance(data, str) else line.send_bytes(data))
        ended = await line.receive(timeout=10)
        assert ended.type in {aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED}


async def test_only_load_balancers_get_a_line(folder: Path) -> None:
    async with running(make_parts("n1", folder, MemoryDatapath())) as one:
        for who in ("controller", "viewer"):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
                async with line_to(folder, one, who):
                    pass
            assert 403 == refusal.value.status
        async with Caller(folder, "n2") as caller:
            status, sentence = await caller.call("GET", one, wire.PATH_BEATS)
        assert (400, b"/v1/beats is a WebSocket; ask for one (RFC 6455)\n") == (status, sentence)


async def test_a_line_on_which_nobody_asks_is_closed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beats, "BEAT_LINE_NS", 200_000_000)
    async with running(make_parts("n1", folder, MemoryDatapath())) as one, line_to(folder, one, "n2") as line:
        await say(line, wire.encode(BEAT))
        assert aiohttp.WSMsgType.CLOSE == (await line.receive(timeout=10)).type


async def test_an_agent_that_ends_says_so_on_all_lines_and_waits_for_none(folder: Path) -> None:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(running(make_parts("n1", folder, MemoryDatapath())))
        line = await stack.enter_async_context(line_to(folder, one, "n2"))
        await say(line, wire.encode(BEAT))
        one.stop()
        ended = await line.receive(timeout=10)
        assert (aiohttp.WSMsgType.CLOSE, aiohttp.WSCloseCode.GOING_AWAY) == (ended.type, ended.data)


async def test_who_has_hung_up_before_the_line_began_is_no_error(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tls = client_context(files_in(folder / "tls", "n2"))
    tls.check_hostname = False
    async with running(make_parts("n1", folder, MemoryDatapath())) as one:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.control_port, ssl=tls)
        wish = f"GET {wire.PATH_BEATS} HTTP/1.1\r\nHost: n1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        writer.write(f"{wish}Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode())
        writer.close()
        assert b"" == await reader.read()
        async with line_to(folder, one, "n2") as line:
            await say(line, wire.encode(BEAT))
    assert [] == [one for one in caplog.records if one.name == "aiohttp.server"]


# --- The side that asks -----------------------------------------------------------------------------------------------
class Other:
    """A server in the place of n2's agent. silent: it takes beats and does not answer."""

    def __init__(self, folder: Path) -> None:
        self.silent = False
        self.clock_ns = now_ns
        self.lines: list[web.WebSocketResponse] = []
        self.beats = 0
        self._tls = Credentials(files_in(folder / "tls", "n2")).server
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get(wire.PATH_BEATS, self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self._tls, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        line = web.WebSocketResponse()
        await line.prepare(request)
        self.lines.append(line)
        async for _ in line:
            self.beats += 1
            if not self.silent:
                await line.send_bytes(
                    ANSWERED.pack(self.clock_ns(), 200) + wire.encode(BeatAnswer(1, 1, 1, serving=True))
                )
        return line


@asynccontextmanager
async def asking(folder: Path) -> AsyncIterator[tuple[Peers, Other, "asyncio.Queue[KeeperEvent]"]]:
    events: asyncio.Queue[KeeperEvent] = asyncio.Queue()
    peers = Peers(client_context(files_in(folder / "tls", "n1")), events.put_nowait)
    other = Other(folder)
    await other.start()
    peers.know({2: Node(2, "n2", parse_address("10.0.0.2"), f"127.0.0.1:{other.port}", 1)})
    try:
        yield peers, other, events
    finally:
        await peers.close()
        await other.stop()


async def next_of(events: "asyncio.Queue[KeeperEvent]") -> KeeperEvent:
    async with asyncio.timeout(10):
        return await events.get()


async def test_beats_one_after_the_other_share_a_line(folder: Path) -> None:
    async with asking(folder) as (peers, other, events):
        for token in range(1, 31):
            peers.ask(token, 2, BEAT)
            assert Answered(token, BeatAnswer(1, 1, 1, serving=True)) == await next_of(events)
            # Longer than any call may take, in all: a line is no call.
            await asyncio.sleep(1.2 * PEER_TIMEOUT_NS * 1e-9 / 30)
        assert (1, 30) == (len(other.lines), other.beats)


async def test_a_line_that_was_closed_meanwhile_fails_no_beat(folder: Path) -> None:
    async with asking(folder) as (peers, other, events):
        peers.ask(1, 2, BEAT)
        await next_of(events)
        await other.stop()
        await other.start()
        peers.ask(2, 2, BEAT)
        assert Answered(2, BeatAnswer(1, 1, 1, serving=True)) == await next_of(events)
        await other.stop()
        peers.ask(3, 2, BEAT)
        failed = await next_of(events)
        assert isinstance(failed, AskFailed)
        assert failed.agentless, "its machine is there and says that its agent is not"
        await other.start()


async def test_lines_to_nodes_that_are_gone_are_closed(folder: Path) -> None:
    async with asking(folder) as (peers, other, events):
        there = Node(2, "n2", parse_address("10.0.0.2"), f"127.0.0.1:{other.port}", 1)
        peers.ask(1, 2, BEAT)
        await next_of(events)
        peers.know({3: Node(3, "n3", parse_address("10.0.0.3"), "127.0.0.1:1", 2)})
        peers.know({2: there})
        peers.ask(2, 2, BEAT)
        assert isinstance(await next_of(events), Answered)
        async with asyncio.timeout(10):
            while not other.lines[0].closed:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert [True, False] == [line.closed for line in other.lines]


async def test_a_node_that_is_elsewhere_now_gets_a_new_line(folder: Path) -> None:
    async with asking(folder) as (peers, other, events):
        peers.ask(1, 2, BEAT)
        await next_of(events)
        elsewhere = Other(folder)
        await elsewhere.start()
        peers.know({2: Node(2, "n2", parse_address("10.0.0.2"), f"127.0.0.1:{elsewhere.port}", 1)})
        peers.ask(2, 2, BEAT)
        assert isinstance(await next_of(events), Answered)
        assert (1, 1) == (other.beats, elsewhere.beats)
        await elsewhere.stop()


async def test_a_clock_beyond_all_bounds_is_not_believed(folder: Path) -> None:
    async with asking(folder) as (peers, other, events):
        other.clock_ns = lambda: 2**64 - 1
        for token in (1, 2):
            peers.ask(token, 2, BEAT)
            assert isinstance(await next_of(events), Answered)


async def test_a_stuck_line_holds_up_no_other_beat_and_is_given_up(folder: Path) -> None:
    async with asking(folder) as (peers, other, events):
        other.silent = True
        peers.ask(1, 2, BEAT)
        async with asyncio.timeout(10):
            while not other.beats:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        other.silent = False
        for token in (2, 3):
            peers.ask(token, 2, BEAT)
            answered = await next_of(events)
            assert isinstance(answered, Answered)
            assert token == answered.token
        assert BEAT_CONNECTIONS_MAX == len(other.lines)
        failed = await next_of(events)
        assert isinstance(failed, AskFailed)
        assert (1, "n2", False) == (failed.token, failed.reason.split()[0], failed.agentless)
        async with asyncio.timeout(10):
            while not other.lines[0].closed:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert not other.lines[1].closed
