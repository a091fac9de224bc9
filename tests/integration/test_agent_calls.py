"""Two agents with real certificates on the loopback, on maps in memory: who may call what, and what a refusal leaves.

The test is the controller. After everything that is refused, the state is compared whole with the one before: a
refused call has changed nothing.
"""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import msgspec
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from lbpod.agent.agent import Agent
from lbpod.agent.settings import Endpoint
from lbpod.certs import files_in
from lbpod.core import wire
from lbpod.core.layout import MEMBER_UP
from lbpod.core.limits import PEER_BODY_BYTES_MAX
from lbpod.core.messages import CommitCall, PrepareCall, QuietCall, ResolveAnswer, ResolveCall
from lbpod.core.model import Snapshot, format_address, parse_address
from lbpod.core.snapshot import digest_of
from lbpod.core.transition import base_of, is_tracking
from lbpod.core.verdicts import Verdict
from lbpod.datapath.memory import MemoryDatapath
from lbpod.datapath.misses import Miss
from lbpod.datapath.port import FlowMap
from lbpod.minting import mint
from tests.agents import FENCE_NEVER_NS, Caller, follow, make_parts, relayed_flows, roll_out, running, world
from tests.metrics_page import unlisted


@dataclass
class Pair:
    """Two running agents, n1 and n2, of three."""

    folder: Path
    one: Agent
    two: Agent
    maps_one: MemoryDatapath
    maps_two: MemoryDatapath

    def snapshot(self, backend_count: int, previous: Snapshot | None = None) -> Snapshot:
        return follow(world({"n1": self.one, "n2": self.two}, backend_count), previous)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agents")
    mint(folder / "tls", ["n1", "n2", "n3"])
    return folder


@pytest.fixture
async def pair(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    monkeypatch.setattr("lbpod.core.watch.FENCE_NS", FENCE_NEVER_NS)
    maps = MemoryDatapath(), MemoryDatapath()
    for name in ("n1", "n2"):
        for file in (folder / name).glob("*"):
            file.unlink()
    async with (
        running(make_parts("n1", folder, maps[0], address=parse_address("10.0.0.1"))) as one,
        running(make_parts("n2", folder, maps[1], address=parse_address("10.0.0.2"))) as two,
    ):
        yield Pair(folder, one, two, *maps)


async def test_a_change_goes_through_both_agents(pair: Pair) -> None:
    async with Caller(pair.folder, "controller") as controller:
        first = pair.snapshot(3)
        await roll_out(controller, [pair.one, pair.two], first)
        state = await controller.state(pair.one)
        assert (1, 0, first, "") == (state.committed, state.prepared, state.snapshot, state.problem)
        assert 0 == state.tracking_slots
        assert (pair.maps_one.read_slots(1) == pair.maps_two.read_slots(1)).all()
        await roll_out(controller, [pair.one, pair.two], pair.snapshot(4, first))
        state = await controller.state(pair.two)
        assert 2 == state.committed
        assert 0 < state.tracking_slots < 65_536 / 3
        assert 4 == len(np.unique(pair.maps_two.read_slots(1) & np.uint64(0xFFFFFF)))


async def test_flows_that_one_relays_are_resolved_by_the_other(pair: Pair) -> None:
    keys, values = relayed_flows(300, asker=0, owner=1)
    async with Caller(pair.folder, "controller") as controller:
        first = pair.snapshot(3)
        await roll_out(controller, [pair.one, pair.two], first)
        await roll_out(controller, [pair.one, pair.two], pair.snapshot(4, first))
    tracking = is_tracking(pair.maps_one.read_slots(1)[values["slot"]])
    expected = int(tracking.sum())
    assert 0 < expected < 300
    pair.maps_two.maps.other_seen[1][values["slot"]] = time.monotonic_ns()  # one of each has just come through there
    pair.maps_one.flows_put(FlowMap.PENDING, keys, values)
    async with asyncio.timeout(10):
        while len(pair.maps_one.maps.cache) < expected:  # noqa: ASYNC110  (maps in memory tell nobody)
            await asyncio.sleep(0.01)
    cached, leases = pair.maps_one.flows_dump(FlowMap.CACHE)
    bases = base_of(pair.maps_two.read_slots(1))
    slot_of = {key.tobytes(): int(slot) for key, slot in zip(keys, values["slot"], strict=True)}
    for key, lease in zip(cached, leases, strict=True):
        assert bases[slot_of[key.tobytes()]] == lease["backend"], "an old flow belongs to base"
    assert 1 <= pair.one.peers.asked["ResolveCall"]
    assert 0 == pair.one.peers.failed["ResolveCall"]
    assert (expected, 300) == (pair.one.driver.resolved_flows, pair.two.driver.looked_up_flows)


@pytest.mark.parametrize("who", ["viewer", "n2"])
async def test_only_a_controller_may_change_anything(pair: Pair, who: str) -> None:
    async with Caller(pair.folder, "controller") as controller, Caller(pair.folder, who) as caller:
        first = pair.snapshot(3)
        await roll_out(controller, [pair.one], first)
        before = await controller.state(pair.one)
        second = pair.snapshot(5, first)
        for body in (second, PrepareCall(2, digest_of(second)), CommitCall(2, digest_of(second))):
            status, data = await caller.say(pair.one, body)
            assert 403 == status
            assert f"{who} has the role" in data.decode()
        assert before == await controller.state(pair.one)
        assert before == await caller.state(pair.one), "looking is allowed to everybody with a certificate"


@pytest.mark.parametrize("who", ["viewer", "controller"])
async def test_only_an_lb_may_ask_about_flows(pair: Pair, who: str) -> None:
    async with Caller(pair.folder, who) as caller:
        for body in (ResolveCall(0, b""), QuietCall(1, b"", b"")):
            status, data = await caller.say(pair.one, body)
            assert (403, True) == (status, "takes lb" in data.decode())
    async with Caller(pair.folder, "n2") as peer:
        status, data = await peer.say(pair.one, ResolveCall(1, b""))
        assert (200, b"") == (status, wire.decode(ResolveAnswer, data).backends)


async def test_without_a_certificate_of_this_cluster_nobody_gets_in(pair: Pair, tmp_path: Path) -> None:
    mint(tmp_path / "tls", ["n1"])
    (tmp_path / "tls" / "ca.crt").write_bytes((pair.folder / "tls" / "ca.crt").read_bytes())
    for caller in (Caller(pair.folder, None), Caller(tmp_path, "controller")):
        async with caller:
            with pytest.raises((aiohttp.ClientError, ssl.SSLError, OSError)):
                await caller.state(pair.one)
    async with Caller(pair.folder, "viewer") as viewer:
        strangers = (await _json(viewer, pair.one))["strangers"]
    assert isinstance(strangers, int)
    assert strangers >= 2, "each is counted (a client may try again)"


async def test_what_is_refused_changes_nothing(pair: Pair) -> None:
    async with Caller(pair.folder, "controller") as controller:
        first = pair.snapshot(3)
        second = pair.snapshot(5, first)
        await roll_out(controller, [pair.one], first)
        await roll_out(controller, [pair.one], second)
        before, json_before = await controller.state(pair.one), await _json(controller, pair.one)
        slots = pair.maps_one.read_slots(1)
        other = msgspec.structs.replace(second, next_ids=first.next_ids)
        third = digest_of(pair.snapshot(6, second))
        bad: list[tuple[int, wire.Body, str]] = [
            (409, first, "older"),
            (409, other, "other contents"),
            (409, PrepareCall(3, third), "has not been pushed"),
            (409, CommitCall(3, third), "has not been prepared"),
            (409, _with_another_table(pair.snapshot(6, second)), "comes out differently on n1"),
            (
                409,
                msgspec.structs.replace(second, generation=3, cluster=msgspec.structs.replace(second.cluster, seed=9)),
                "cluster",
            ),
        ]
        for expected, body, said in bad:
            status, data = await controller.say(pair.one, body)
            assert (expected, True) == (status, said in data.decode()), data
            assert 1 == data.decode().count("\n"), "one sentence, one line"
        assert before == await controller.state(pair.one)
        after = await _json(controller, pair.one)
        assert _without_counts(json_before) == _without_counts(after)
        assert {"/v1/snapshot 409": 4, "/v1/prepare 409": 1, "/v1/commit 409": 1} == after["refused_calls"]
        assert (slots == pair.maps_one.read_slots(1)).all()


def _with_another_table(snapshot: Snapshot) -> Snapshot:
    """As a controller of another version would push it: it has built other tables from the same backends."""
    vip = msgspec.structs.replace(snapshot.vips[0], digest=bytes(16))
    return msgspec.structs.replace(snapshot, vips=(vip,))


async def _json(caller: Caller, agent: Agent) -> dict[str, object]:
    status, data = await caller.call("GET", agent, wire.PATH_STATE, accept="application/json")
    assert 200 == status
    state: dict[str, object] = msgspec.json.decode(data)
    return state


def _without_counts(state: dict[str, object]) -> dict[str, object]:
    """But for beliefs, and for what has merely been counted."""
    counts = {"others", "refused_calls", "failed_calls", "happened"}
    return {name: value for name, value in state.items() if name not in counts}


async def test_malformed_and_oversized_bodies_are_refused(pair: Pair) -> None:
    good = wire.encode(PrepareCall(1, bytes(16)))
    async with Caller(pair.folder, "controller") as controller, Caller(pair.folder, "n2") as peer:
        before = await controller.state(pair.one)
        for caller, method, path, data, expected, said in (
            (controller, "POST", wire.PATH_PREPARE, b"", 400, "empty"),
            (controller, "POST", wire.PATH_PREPARE, good[:-1], 400, "malformed"),
            (controller, "POST", wire.PATH_PREPARE, b"\x09" + good[1:], 400, "version 9"),
            (controller, "PUT", wire.PATH_SNAPSHOT, b"\x01\x80", 400, "malformed"),
            (controller, "PUT", wire.PATH_SNAPSHOT, bytes(32 * 1024 * 1024 + 1), 413, "body"),
            (controller, "POST", wire.PATH_COMMIT, bytes(PEER_BODY_BYTES_MAX + 1), 413, "body"),
            (peer, "POST", wire.PATH_RESOLVE, wire.encode(ResolveCall(1, bytes(24 * 4097))), 413, "4096"),
            (peer, "POST", wire.PATH_RESOLVE, wire.encode(ResolveCall(1, bytes(23))), 400, "23 bytes"),
            (controller, "GET", "/v1/nothing", b"", 404, "/v1/nothing"),
            (controller, "GET", wire.PATH_PREPARE, b"", 405, "POST"),
        ):
            status, text = await caller.call(method, pair.one, path, data)
            assert (expected, True) == (status, said in text.decode()), (path, text)
        assert before == await controller.state(pair.one)


async def _get(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


async def test_health_readiness_and_metrics(pair: Pair) -> None:
    base = f"http://127.0.0.1:{pair.one.metrics_port}"
    assert (200, "ok\n") == await _get(f"{base}/healthz")
    status, text = await _get(f"{base}/readyz")
    assert (503, True) == (status, "no snapshot" in text)
    async with Caller(pair.folder, "controller") as controller:
        await roll_out(controller, [pair.one], pair.snapshot(3))
        async with asyncio.timeout(5):
            while (await _get(f"{base}/readyz"))[0] != 200:  # noqa: ASYNC110  (one asks over HTTP)
                await asyncio.sleep(0.02)
        pair.maps_one.maps.counters[Verdict.STEADY] = (7, 700)
        status, text = await _get(f"{base}/metrics")
        assert 200 == status
        metrics = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert 7 == metrics["holdfast_packets_total", "steady"]
        assert 700 == metrics["holdfast_bytes_total", "steady"]
        assert 1 == metrics["holdfast_generation", "committed"]
        assert 1 == metrics["holdfast_ready",]
        assert set() == unlisted(text)
        assert 1_048_576 == metrics["holdfast_vip_bytes",]
        state = await _json(controller, pair.one)
        assert [format_address(b"\0" * 10 + b"\xff\xff\xcb\0\x71\x0a") + ":80/TCP"] == [
            vip["endpoint"]
            for vip in state["vips"]  # type: ignore[attr-defined]
        ]
        status, data = await controller.call("GET", pair.one, "/v1/trace")
        said = [line["what"] for line in msgspec.json.decode(data)]
        assert ["prepared", "committed"] == [what for what in said if not what.startswith("believed")]


async def test_a_member_that_is_silent_is_believed_down_and_its_backup_is_asked(pair: Pair) -> None:
    """n3 does not run: questions about its slots fail, and the backup is asked from then on."""
    keys, values = relayed_flows(300, asker=0, owner=2)
    async with Caller(pair.folder, "controller") as controller:
        first = pair.snapshot(3)
        await roll_out(controller, [pair.one, pair.two], first)
        await roll_out(controller, [pair.one, pair.two], pair.snapshot(4, first))
    async with asyncio.timeout(20):
        while len(pair.maps_one.maps.cache) == 0:
            pair.maps_two.maps.other_seen[1][values["slot"]] = time.monotonic_ns()
            pair.maps_one.flows_put(FlowMap.PENDING, keys, values)
            await asyncio.sleep(0.05)
    assert 3 <= pair.one.peers.failed["BeatCall"]
    await _until(lambda: [False, True] == [_is_up(pair.maps_one, member) for member in (2, 1)])
    async with Caller(pair.folder, "viewer") as viewer:
        others = (await _json(viewer, pair.one))["others"]
    assert isinstance(others, dict)
    assert ["n2", "n3"] == sorted(others)
    assert ("up", True) == (others["n2"], others["n3"] in {"doubted", "down"})


async def test_an_agent_that_dies_is_down_and_up_with_its_first_word(pair: Pair) -> None:
    """The third agent has a control port that stays the same, so that it can come back."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = Endpoint("127.0.0.1", free.getsockname()[1])
    parts = replace(make_parts("n3", pair.folder, MemoryDatapath(), address=parse_address("10.0.0.3")), listen=listen)
    async with Caller(pair.folder, "controller") as controller:
        async with running(parts) as three:
            agents = {"n1": pair.one, "n2": pair.two, "n3": three}
            await roll_out(controller, list(agents.values()), follow(world(agents, 3), None))
            await _until(lambda: three.driver.status.serving and _is_up(pair.maps_one, 2))
        died_ns = time.monotonic_ns()
        await _until(lambda: not _is_up(pair.maps_one, 2))
        print(f"down after {(time.monotonic_ns() - died_ns) / 1e6:.0f} ms")
        async with running(parts):
            await _until(lambda: _is_up(pair.maps_one, 2))
    said = [line.trace.what for line in pair.one.driver.trace if line.trace.detail == "member 2"]
    assert ["believed down", "believed up"] == said[-2:]


def _is_up(maps: MemoryDatapath, member: int) -> bool:
    return bool(maps.maps.members["flags"][member] & MEMBER_UP)


async def _until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110  (maps in memory tell nobody)
            await asyncio.sleep(0.01)


async def test_a_restarted_agent_takes_up_where_the_earlier_one_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lbpod.core.watch.FENCE_NS", FENCE_NEVER_NS)
    maps = MemoryDatapath()
    for file in (folder / "n1").glob("*"):
        file.unlink()
    async with Caller(folder, "controller") as controller:
        async with running(make_parts("n1", folder, maps, address=parse_address("10.0.0.1"))) as agent:
            first = follow(world({"n1": agent}, 3), None)
            await roll_out(controller, [agent], first)
            await roll_out(controller, [agent], follow(world({"n1": agent}, 4), first))
            before, slots, vips = await controller.state(agent), maps.read_slots(1), maps.maps.vips.copy()
        async with running(make_parts("n1", folder, maps, address=parse_address("10.0.0.1"))) as agent:
            assert before == await controller.state(agent)
            assert (slots == maps.read_slots(1)).all()
            assert (vips == maps.maps.vips).all()


async def test_what_this_kernel_lacks_is_named_in_the_state_and_once_in_the_log(folder: Path) -> None:
    lacking = [Miss.NATIVE_XDP.value]
    parts = replace(make_parts("n1", folder, MemoryDatapath()), substitutes=lambda: sorted(lacking))
    with capture_logs() as logs:
        async with Caller(folder, "viewer") as viewer, running(parts) as agent:
            assert lacking == (await _json(viewer, agent))["substitutes"]
            lacking.append(Miss.MANAGED_NEIGHBOURS.value)
            agent._name_substitutes()
            agent._name_substitutes()
            assert sorted(lacking) == (await _json(viewer, agent))["substitutes"]
    assert lacking == [line["sentence"] for line in logs if line["event"] == "substitute"]


async def test_a_node_that_is_listed_with_another_address_is_not_ready(folder: Path) -> None:
    for file in (folder / "n1").glob("*"):
        file.unlink()
    parts = make_parts("n1", folder, MemoryDatapath(), address=parse_address("10.9.9.9"))
    async with Caller(folder, "controller") as controller, running(parts) as agent:
        await roll_out(controller, [agent], follow(world({"n1": agent}, 3), None))
        status, text = await _get(f"http://127.0.0.1:{agent.metrics_port}/readyz")
        assert (503, True) == (status, "10.0.0.1" in text)
        assert "--node-address" in text


async def test_certificates_that_are_renewed_on_disk_are_taken_up_while_agents_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """n1 shows the new one to whoever calls, and calls n2 with it; nobody is restarted."""
    monkeypatch.setattr("lbpod.agent.agent.LOOK_AFTER_NS", 20_000_000)
    mint(tmp_path / "tls", ["n1", "n2", "n3"])
    files = files_in(tmp_path / "tls", "n1")

    async def serial(agent: Agent) -> object:
        async with Caller(tmp_path, "viewer") as viewer:
            return (await viewer.certificate(agent))["serialNumber"]

    async with (
        running(make_parts("n1", tmp_path, MemoryDatapath(), address=parse_address("10.0.0.1"))) as one,
        running(make_parts("n2", tmp_path, MemoryDatapath(), address=parse_address("10.0.0.2"))) as two,
        Caller(tmp_path, "controller") as controller,
    ):
        before = await serial(one)
        files.certificate.unlink()
        files.key.unlink()
        mint(tmp_path / "tls", ["n1", "n2", "n3"])
        async with asyncio.timeout(20):
            while before == await serial(one):  # noqa: ASYNC110  (one sees it in a handshake)
                await asyncio.sleep(0.02)
        snapshot = follow(world({"n1": one, "n2": two}, 3), None)
        await roll_out(controller, [one, two], snapshot)
        one.peers.ask(1, 2, ResolveCall(0, b""))
        async with asyncio.timeout(20):
            while one.peers.under_way_count:  # noqa: ASYNC110  (an answer tells nobody here)
                await asyncio.sleep(0.02)
        assert (1, 0) == (one.peers.asked["ResolveCall"], one.peers.failed["ResolveCall"])
