"""What two running agents tell a real Redis, and that nothing happens to them, whatever happens to it: killed in the
middle, out of memory, hanging, shut by a password, or not a Redis at all."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import redis
from structlog.testing import capture_logs

from lbpod.agent.agent import Agent
from lbpod.agent.metrics import Metrics
from lbpod.agent.outbox import Loss, Outbox, Stream
from lbpod.agent.redis_writer import RedisWriter
from lbpod.agent.settings import RedisTarget
from lbpod.core.layout import FLOW
from lbpod.core.limits import DIAGNOSTICS_QUEUE_MAX, DIAGNOSTICS_STATE_SECONDS, DIAGNOSTICS_STREAM_MAX
from lbpod.core.messages import Answered, AskFailed, ResolveAnswer
from lbpod.core.model import Snapshot, parse_address
from lbpod.core.transition import base_of, current_of
from lbpod.datapath.memory import MemoryDatapath
from lbpod.datapath.port import FlowMap
from lbpod.minting import mint
from tests.agents import FENCE_NEVER_NS, Caller, follow, make_parts, relayed_flows, roll_out, running, world
from tests.redis_server import RedisServer, entries, redis_server


class Pair:
    """Two running agents, n1 and n2, of three, that write to one Redis, and what was rolled out last."""

    def __init__(self, controller: Caller, maps: tuple[MemoryDatapath, MemoryDatapath], *agents: Agent) -> None:
        self.controller = controller
        self.maps = maps
        self.agents = agents
        self._newest: Snapshot | None = None
        self._backend_count = 0

    async def change(self, backend_count: int) -> Snapshot:
        """So many backends, in force at both."""
        self._backend_count = backend_count
        agents = dict(zip(("n1", "n2"), self.agents, strict=True))
        self._newest = follow(world(agents, backend_count), self._newest)
        await roll_out(self.controller, self.agents, self._newest)
        return self._newest

    async def churn(self) -> None:
        """One backend more or less."""
        await self.change(3 if self._backend_count == 4 else 4)

    async def diagnostics(self) -> dict[str, Any]:
        """As /v1/state of n1 has it."""
        status, data = await self.controller.call("GET", self.agents[0], "/v1/state", accept="application/json")
        assert 200 == status
        state: dict[str, Any] = msgspec.json.decode(data)
        found: dict[str, Any] = state["diagnostics"]
        return found

    async def dropped(self, why: Loss) -> int:
        """Entries of n1 that were dropped for this."""
        return int((await self.diagnostics())["dropped"].get(why.value, 0))

    async def until_dropped(self, why: Loss) -> None:
        """Changes something again and again, until n1 has dropped an entry for this."""
        async with asyncio.timeout(30):
            while not await self.dropped(why):
                await self.churn()

    async def until_written(self) -> None:
        """Until nothing waits and nothing is in the way."""
        async with asyncio.timeout(40):
            while True:
                now = await self.diagnostics()
                if now["redis"] == "yes" and not now["waiting"] and now["written"]:
                    return
                await asyncio.sleep(0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    mint(tmp_path / "tls", ["n1", "n2", "n3"])
    return tmp_path


@asynccontextmanager
async def pair_at(folder: Path, target: RedisTarget) -> AsyncIterator[Pair]:
    maps = MemoryDatapath(), MemoryDatapath()
    parts = [
        replace(make_parts(name, folder, each, address=parse_address(address)), redis=target)
        for name, address, each in zip(("n1", "n2"), ("10.0.0.1", "10.0.0.2"), maps, strict=True)
    ]
    async with running(parts[0]) as one, running(parts[1]) as two, Caller(folder, "controller") as controller:
        yield Pair(controller, maps, one, two)


@pytest.fixture(autouse=True)
def _no_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbpod.core.watch.FENCE_NS", FENCE_NEVER_NS)


async def _until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not await asyncio.to_thread(is_so):  # noqa: ASYNC110  (Redis tells nobody)
            await asyncio.sleep(0.05)


async def test_what_happened_can_be_read_after_the_fact(folder: Path) -> None:
    keys, values = relayed_flows(300, asker=0, owner=1)
    with redis_server(folder) as server, server.client() as client:
        async with pair_at(folder, server.target()) as pair:
            await pair.change(3)
            second = await pair.change(4)
            pair.maps[1].maps.other_seen[1][values["slot"]] = time.monotonic_ns()  # one of each has come through there
            pair.maps[0].flows_put(FlowMap.PENDING, keys, values)
            await _until(lambda: entries(client, "n1", "decisions") and entries(client, "n2", "decisions"))
            await _until(lambda: client.exists("holdfast:n1:state"))
            state = client.hgetall("holdfast:n1:state")
            assert ("n1", "10.0.0.1", "none") == (state["node"], state["address"], state["xdp"])
            assert 0 < client.ttl("holdfast:n1:state") <= DIAGNOSTICS_STATE_SECONDS
        slots = entries(client, "n1", "slots")
        assert ["committed", "prepared"] == sorted({each["what"] for each in slots if each["what"] != "written"})
        written = [each for each in slots if each["what"] == "written" and each["because"] == "PrepareCall"][-1]
        assert ("shop/web/http", written["slots"]) == (written["vip"], written["tracking"])
        number, rest = written["first"].split("; ")[0].split(" ", 1)
        old, new = (f"10.1.0.{each.address[15]}:8080" for each in _at(second, pair.maps[0], int(number)))
        assert f"tracking {old}, before {old}" == rest, "prepare does not move new flows"
        committed = [each for each in slots if each["what"] == "written" and each["because"] == "CommitCall"][-1]
        assert f"{number} tracking {new}, before {old}" in committed["first"].split("; ")
        _check_decisions(client, second, pair, slot_of=dict(zip(_clients(keys), values["slot"], strict=True)))
        numbers = sorted(int(each["n"]) for stream in Stream for each in entries(client, "n1", stream.value))
        assert list(range(1, len(numbers) + 1)) == numbers, "nothing was dropped, and nothing written twice"


def _at(snapshot: Snapshot, maps: MemoryDatapath, slot: int) -> list[Any]:
    """The backends of base and current of a slot of the only VIP."""
    word = maps.read_slots(1)[slot : slot + 1]
    by_id = {each.id: each for each in snapshot.vips[0].backends}
    return [by_id[int(base_of(word)[0])], by_id[int(current_of(word)[0])]]


def _clients(keys: Any) -> list[str]:
    return [f"{'.'.join(map(str, key['addr'][12:]))}:{key['port_be']}" for key in keys]


def _check_decisions(client: Any, snapshot: Snapshot, pair: Pair, slot_of: dict[str, Any]) -> None:
    asked, answered = entries(client, "n1", "decisions")[0], entries(client, "n2", "decisions")[0]
    for each in (asked, answered):
        source, _, vip = each["flow"].partition(" > ")
        slot = int(slot_of[source])
        assert ("203.0.113.10:80/TCP", str(slot), "n2", "2") == (vip, each["slot"], each["owner"], each["epoch"])
        old = _at(snapshot, pair.maps[1], slot)[0]
        if each["slot_is"].startswith("tracking"):
            assert f"10.1.0.{old.address[15]}:8080" == each["backend"], "an old flow belongs to base"
    assert asked["why"].startswith("n2 said so for ")
    assert "no record of it: older than the change" == answered["why"]


async def test_redis_killed_in_the_middle_is_missed_by_nobody(folder: Path) -> None:
    with capture_logs() as logs, redis_server(folder) as server:
        async with pair_at(folder, server.target()) as pair:
            await pair.change(3)
            await pair.until_written()
            server.kill()
            async with asyncio.timeout(20):
                while (await pair.diagnostics())["redis"] == "yes":
                    await pair.churn()
            await pair.churn()
            before = await pair.diagnostics()
            assert f"redis://127.0.0.1:{server.port}/0 does not take it: " in before["redis"]
            assert before["waiting"], "what waits is kept"
            server.start()
            await pair.until_written()
            after = await pair.diagnostics()
            assert before["written"] < after["written"]
            assert set(after["dropped"]) <= {Loss.GONE.value}, "only what was on its way when it died"
            with server.client() as client:
                assert "committed" in {each["what"] for each in entries(client, "n1", "slots")}
            assert 200 == (await pair.controller.call("GET", pair.agents[0], "/v1/state"))[0]
    said = [each["event"] for each in logs if each["event"].startswith("diagnostics")]
    stops, starts = said.count("diagnostics not written"), said.count("diagnostics written")
    assert 1 <= starts <= stops <= 2, "one line each when it stops and when it goes on, for each of the two agents"


async def test_a_full_redis_refuses_and_is_written_to_again_when_there_is_room(folder: Path) -> None:
    full = ("--maxmemory", "1mb", "--maxmemory-policy", "noeviction")
    with capture_logs() as logs, redis_server(folder, *full) as server:
        async with pair_at(folder, server.target()) as pair:
            with server.client() as client:
                _fill(client)
                await pair.until_dropped(Loss.FULL)
                assert "command not allowed when used memory" in (await pair.diagnostics())["redis"]
                metrics = Metrics(pair.agents[0].view).render().decode()
                assert 'holdfast_diagnostics_dropped_total{why="full"} 0.0' not in metrics
                assert "holdfast_diagnostics_trouble 1.0" in metrics
                client.config_set("maxmemory", "100mb")
            await pair.until_written()
    stops = [each for each in logs if each["event"] == "diagnostics not written"]
    assert 1 <= len(stops) <= 2, "one line for each agent"


def _fill(client: "redis.Redis") -> None:
    """Until it takes nothing more."""
    for length in (100_000, 1_000, 10):
        with contextlib.suppress(redis.OutOfMemoryError):
            for number in range(1_000):
                client.set(f"filler {length} {number}", "x" * length)


async def test_a_wrong_password_is_said_and_a_corrected_one_taken_up(folder: Path) -> None:
    file = folder / "password"
    with redis_server(folder, password="right") as server:
        async with pair_at(folder, server.target(file)) as pair:
            for written, said in ((None, "the password cannot be read from"), ("wrong\n", "invalid username-password")):
                if written is not None:
                    file.write_text(written)
                async with asyncio.timeout(30):
                    while said not in (await pair.diagnostics())["redis"]:
                        await pair.churn()
            assert "wrong" not in (await pair.diagnostics())["redis"]
            file.write_text("right\n")
            await pair.until_written()
            with server.client("right") as client:
                assert entries(client, "n1", "slots")


async def test_a_redis_that_hangs_holds_up_nothing(folder: Path) -> None:
    with redis_server(folder) as server:
        async with pair_at(folder, server.target()) as pair:
            await pair.change(3)
            await pair.until_written()
            server.send(signal.SIGSTOP)
            await pair.until_dropped(Loss.SLOW)
            server.send(signal.SIGCONT)
            await pair.until_written()
            server.send(signal.SIGSTOP)
            await pair.churn()
        server.send(signal.SIGCONT)  # both agents have ended while it hung


async def test_whoever_answers_in_its_place_is_told_from_it(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        stop = threading.Event()

        def answer() -> None:
            while not stop.is_set():
                connection, _ = stranger.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(range(256)))

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            async with pair_at(folder, RedisTarget("127.0.0.1", int(stranger.getsockname()[1]))) as pair:
                async with asyncio.timeout(20):
                    while (await pair.diagnostics())["redis"] == "yes":
                        await pair.churn()
                await pair.change(5)
        finally:
            stop.set()
            socket.create_connection(stranger.getsockname()).close()
            thread.join()


async def test_wrong_late_and_missing_answers_are_told_with_who_gave_them(folder: Path) -> None:
    """Answers come to the driver here as a peer's would; what that peer really answers comes later."""
    keys, values = relayed_flows(50, asker=0, owner=1)
    with redis_server(folder) as server, server.client() as client:
        async with pair_at(folder, server.target()) as pair:
            await pair.change(3)
            await pair.change(4)
            driver = pair.agents[0].driver
            driver.observe(_Answering(driver))
            for flow, value in zip(np.split(keys, 50), np.split(values, 50), strict=True):
                pair.maps[0].flows_put(FlowMap.PENDING, flow, value)
                await asyncio.sleep(0.02)
            await _until(
                lambda: {"wrong", "late", "none"} == {each["what"] for each in entries(client, "n1", "answers")}
            )
        told = {(each["what"], each["detail"]): each for each in entries(client, "n1", "answers") if "of" in each}
        assert {"n2"} == {each["of"] for each in told.values()}
        told_of = {detail for what, detail in told if what == "wrong" and detail.startswith("it tells of")}
        assert told_of, "it tells of eight flows more than it was asked about"
        assert told_of <= {f"it tells of {count + 8} flows and was asked about {count}" for count in range(1, 50)}
        assert any("which is no backend of shop/web/http" in detail for what, detail in told if what == "wrong")


class _Answering:
    """Gives each question to n2 an answer that is too long, then one that names a backend of nobody, then one twice."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._count = 0

    def seen(self, _: object, effects: Any) -> None:
        for effect in effects:
            if type(effect).__name__ != "Ask" or type(effect.body).__name__ != "ResolveCall":
                continue
            self._count += 1
            count = len(effect.body.flows) // FLOW.itemsize
            match self._count % 3:
                case 0:
                    many = bytes(4 * (count + 8))
                    self._driver.post(Answered(effect.token, ResolveAnswer(many, many)))
                case 1:
                    unknown = (77_777).to_bytes(4, "little") * count
                    self._driver.post(Answered(effect.token, ResolveAnswer(unknown, unknown)))
                case _:
                    self._driver.post(AskFailed(effect.token, "it did not answer"))


def test_streams_and_what_waits_are_bounded(folder: Path) -> None:
    outbox = Outbox()
    with redis_server(folder) as server, server.client() as client:
        writer = RedisWriter(outbox, "n1", server.target())
        total = 3 * DIAGNOSTICS_STREAM_MAX
        for number in range(total):
            outbox.put(Stream.RING, {"what": "prepared", "detail": str(number)})
        assert DIAGNOSTICS_QUEUE_MAX == outbox.standing().waiting
        writer.start()
        while outbox.standing().waiting or outbox.standing().written < DIAGNOSTICS_QUEUE_MAX:
            time.sleep(0.01)
        for number in range(DIAGNOSTICS_QUEUE_MAX):
            outbox.put(Stream.RING, {"what": "prepared", "detail": str(number)})
        while outbox.standing().written < 2 * DIAGNOSTICS_QUEUE_MAX:
            time.sleep(0.01)
        writer.stop()
        standing = outbox.standing()
        assert (2 * DIAGNOSTICS_QUEUE_MAX, {Loss.MANY: total - DIAGNOSTICS_QUEUE_MAX}) == (
            standing.written,
            standing.dropped,
        )
        assert DIAGNOSTICS_STREAM_MAX <= client.xlen("holdfast:n1:ring") < DIAGNOSTICS_STREAM_MAX + 200
        assert str(total + DIAGNOSTICS_QUEUE_MAX) == entries(client, "n1", "ring")[-1]["n"], "the newest are there"
        assert 0 < client.ttl("holdfast:n1:ring")


def test_tls_with_a_ca_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = folder / "redis.key", folder / "redis.crt"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=redis", "-days", "2"]
    files = ["-keyout", str(key), "-out", str(certificate), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, *files], check=True, capture_output=True)
    options = ("--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-auth-clients", "no")
    with redis_server(folder, *options, tls=True) as server:
        assert "does not take it" in _written(server).trouble, "a CA that nobody knows"
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert (1, "") == (_written(server).written, _written(server).trouble)


def _written(server: RedisServer) -> Any:
    """Where one entry stands after a try."""
    outbox = Outbox()
    outbox.put(Stream.RING, {"what": "prepared"})
    writer = RedisWriter(outbox, "n1", server.target())
    writer.start()
    while not outbox.standing().written and not outbox.standing().trouble:
        time.sleep(0.01)
    writer.stop()
    return outbox.standing()
