"""The standalone controller with real agents (on maps in memory), real certificates and a real file on the loopback.

What is promised: an edit reaches every agent in one generation; a bad edit changes nothing and is said; agents and
controllers may restart in any order; and nobody but the node that is meant gets a snapshot.
"""

import asyncio
import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import yaml
from aiohttp.test_utils import TestServer
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from lbpod.agent.agent import Agent
from lbpod.agent.metrics import Metrics
from lbpod.agent.settings import Endpoint
from lbpod.core.limits import CERTIFICATE_DAYS, MEMBER_NONE
from lbpod.core.messages import LbStatus, Phase
from lbpod.core.model import parse_address
from lbpod.datapath.memory import MemoryDatapath
from lbpod.minting import mint
from lbpod.standalone.config import read
from lbpod.standalone.driver import Controller
from lbpod.standalone.http import make_app
from lbpod.standalone.lookout import look_at
from lbpod.standalone.state import StateFile
from tests.agents import Caller, make_parts, running

NAMES = ("n1", "n2", "web")
LBS = ("n1", "n2")
WAIT_S = 30


async def until(said: Callable[[], bool], what: str) -> None:
    """Waits, but not for ever."""
    end = time.monotonic() + WAIT_S
    while not said():
        assert time.monotonic() < end, f"waited in vain for: {what}"
        await asyncio.sleep(0.02)


@dataclass
class Site:
    """A folder with certificates and a file, and the agents that run."""

    folder: Path
    agents: dict[str, Agent] = field(default_factory=dict)
    maps: dict[str, MemoryDatapath] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        return self.folder / "conf" / "demo.yaml"

    def write(self, backends: list[int], **changes: Any) -> None:
        """The file, replaced in one rename. changes: of the settings document; None removes a field."""
        nodes = [
            {
                "name": name,
                "address": f"10.0.0.{number}",
                "control": f"127.0.0.1:{self.ports.get(name, 1)}",
                "lb": name in LBS,
            }
            for number, name in enumerate(NAMES, start=1)
        ]
        service = {
            "apiVersion": "holdfast.dev/v1alpha1",
            "kind": "VirtualService",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {
                "address": "203.0.113.10",
                "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
                "backendRef": {"name": "web"},
            },
        }
        settings = {
            "cluster": {"vni": 7, "seed": 11},
            "tls": "../tls",
            "state": "demo.state",
            "nodes": nodes,
            "backends": {"shop/web": [{"address": f"10.1.0.{one}", "node": "web"} for one in backends]},
            "virtualServices": [service],
            **changes,
        }
        self.write_text(yaml.safe_dump(settings))

    def write_text(self, text: str) -> None:
        self.config.parent.mkdir(exist_ok=True)
        new = self.config.with_suffix(".new")
        new.write_text(text)
        new.replace(self.config)

    @asynccontextmanager
    async def agent(self, name: str) -> AsyncIterator[Agent]:
        """An agent that knows nothing, at the port that it had before where there is one."""
        for file in (self.folder / name).glob("*"):
            file.unlink()
        self.maps[name] = MemoryDatapath()
        address = parse_address(f"10.0.0.{NAMES.index(name) + 1}")
        parts = make_parts(name, self.folder, self.maps[name], address=address)
        if name in self.ports:
            parts = replace(parts, listen=Endpoint("127.0.0.1", self.ports[name]))
        async with running(parts) as agent:
            self.agents[name] = agent
            self.ports[name] = agent.control_port
            yield agent

    @asynccontextmanager
    async def controller(self) -> AsyncIterator[Controller]:
        """A controller that runs until the block ends."""
        seen = look_at(self.config)
        controller = Controller(self.config, seen, *read(self.config, seen))
        task = asyncio.create_task(controller.run())
        try:
            yield controller
        finally:
            controller.stop()
            await asyncio.wait_for(task, 10)

    async def states(self) -> dict[str, LbStatus]:
        async with Caller(self.folder, "viewer") as viewer:
            return {name: await viewer.state(agent) for name, agent in self.agents.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controller")
    mint(folder / "tls", NAMES)
    return folder


@pytest.fixture
async def site(folder: Path) -> AsyncIterator[Site]:
    for file in (folder / "conf").glob("*"):
        file.unlink()
    site = Site(folder)
    async with AsyncExitStack() as stack:
        for name in NAMES:
            await stack.enter_async_context(site.agent(name))
        yield site


def idle_at(controller: Controller, generation: int) -> Callable[[], bool]:
    return lambda: (Phase.IDLE, generation) == (controller.status.phase, controller.status.generation)


async def test_the_file_reaches_every_agent_and_so_does_an_edit(site: Site) -> None:
    site.write([1, 2])
    async with site.controller() as controller:
        await until(idle_at(controller, 1), "the first generation")
        site.write([1, 2, 3])
        await until(idle_at(controller, 2), "the second generation")
        assert (2, 2, "", 2) == (
            controller.status.lbs,
            controller.status.lbs_at_generation,
            controller.status.problem,
            controller.status.changes,
        )
    states = await site.states()
    assert [2, 2] == [states[name].committed for name in LBS]
    assert 2 in (states["web"].prepared, states["web"].committed)
    assert [0, 1, MEMBER_NONE] == [states[name].member for name in NAMES]
    slots = [site.maps[name].read_slots(1) & np.uint64(0xFFFFFF) for name in LBS]
    assert (slots[0] == slots[1]).all()
    assert [1, 2, 3] == sorted(np.unique(slots[0]).tolist())
    assert 2 == StateFile(site.config.parent / "demo.state").read().generation


async def test_many_vips_come_in_portions_and_are_in_force_when_the_last_is(site: Site) -> None:
    site.write([1])
    many = [f"10.1.1.{one}" for one in range(1, 121)]
    documents = list(yaml.safe_load_all(site.config.read_text()))
    async with site.controller() as controller:
        await until(idle_at(controller, 1), "the first generation")
        (settings,) = documents
        (first,) = settings["virtualServices"]
        for number in range(1, 8):
            one = copy.deepcopy(first)
            one["metadata"]["name"] = one["spec"]["backendRef"]["name"] = f"many{number}"
            one["spec"]["address"] = f"203.0.113.{20 + number}"
            settings["virtualServices"].append(one)
            settings["backends"][f"shop/many{number}"] = [{"address": each, "node": "web"} for each in many]
        site.write_text(yaml.safe_dump(settings))
        await until(lambda: controller.status.changes == 2, "the first portion")
        assert controller.status.waiting > 0
        before = controller._driver.in_force
        await until(lambda: not controller.status.waiting and controller.status.phase is Phase.IDLE, "all others")
        assert before < controller._driver.in_force
        assert controller.status.changes > 2
        assert 8 == len(controller.status.vips)
    states = await site.states()
    assert {controller.status.generation} == {states[name].committed for name in LBS}


async def test_a_file_that_is_being_written_in_place_withdraws_no_vip(site: Site) -> None:
    """Cut off before its second document it is good YAML without any VIP."""
    site.write([1, 2])
    whole = site.config.read_bytes()
    async with site.controller() as controller:
        await until(idle_at(controller, 1), "the first generation")
        services = list(yaml.safe_load(whole).pop("virtualServices"))
        head = yaml.safe_dump({key: value for key, value in yaml.safe_load(whole).items() if key != "virtualServices"})
        with site.config.open("w") as file:
            file.write(head.replace("10.1.0.2", "10.1.0.3"))
            file.flush()
            await asyncio.sleep(0.4)
            assert (1, "") == (controller.status.generation, controller.config_error)
            file.write("---\n" + yaml.safe_dump_all(services))
        await until(idle_at(controller, 2), "the edit")
        assert [2] == [vip.ready for vip in controller.status.vips]
        await asyncio.sleep(1.2)
        assert (2, "") == (controller.status.generation, controller.config_error)


async def test_an_edit_while_the_controller_starts_is_not_lost(site: Site) -> None:
    site.write([1, 2])
    seen = look_at(site.config)
    controller = Controller(site.config, seen, *read(site.config, seen))
    site.write([1, 2, 3])
    task = asyncio.create_task(controller.run())
    try:
        await until(lambda: [3] == [vip.ready for vip in controller.status.vips], "the edit")
    finally:
        controller.stop()
        await asyncio.wait_for(task, 10)


async def test_a_bad_edit_changes_nothing_and_is_said(site: Site) -> None:
    site.write([1, 2])
    async with site.controller() as controller, AsyncExitStack() as stack:
        server = TestServer(make_app(controller, controller.metrics))
        await stack.enter_async_context(server)
        client = await stack.enter_async_context(aiohttp.ClientSession(server.make_url("/")))

        async def get(path: str) -> tuple[int, str]:
            async with client.get(path) as response:
                return response.status, await response.text()

        assert 503 == (await get("/readyz"))[0]
        assert (200, "ok\n") == await get("/healthz")
        await until(idle_at(controller, 1), "the first generation")
        assert (200, "ok\n") == await get("/readyz")
        assert "holdfast_config_error 0.0" in (await get("/metrics"))[1]
        before = await site.states()

        site.write([1, 2, 3], nodes=[{"name": "n1", "address": "10.0.0.1", "lb": "perhaps"}])
        await until(lambda: controller.config_error != "", "the bad edit to be noticed")
        status, text = await get("/readyz")
        assert 503 == status
        assert "the last good one stays" in text
        assert "demo.yaml:" in text
        assert "nodes[0].lb: perhaps is neither true nor false" in text
        metrics = (await get("/metrics"))[1]
        assert "holdfast_config_error 1.0" in metrics
        assert 'holdfast_controller_calls_total{call="CommitCall",outcome="answered"}' in metrics
        site.write([1, 2, 3], cluster={"vni": 8, "seed": 11})
        await until(lambda: "are fixed while running" in controller.config_error, "another cluster to be refused")
        site.config.unlink()
        await until(lambda: "cannot be read" in controller.config_error, "the missing file to be noticed")
        assert [one.staged for one in before.values()] == [one.staged for one in (await site.states()).values()]

        site.write([1, 2, 3])
        await until(idle_at(controller, 2), "the good edit")
        assert (200, "ok\n") == await get("/readyz")
        state = json.loads((await get("/v1/state"))[1])
        assert ("yes", "idle", 2, "") == (state["ready"], state["phase"], state["generation"], state["config_error"])
        assert "shop/web/http" == state["vips"][0]["name"]


def idle_in_ring(controller: Controller, lbs: int) -> bool:
    """All that is wanted is in force at so many LBs."""
    status = controller.status
    return status.phase is Phase.IDLE and lbs == len(status.ring) == status.lbs_at_generation


async def test_an_agent_that_comes_back_empty_leaves_the_ring_and_joins_it_again(site: Site) -> None:
    site.write([1, 2])
    async with site.controller() as controller:
        await until(idle_at(controller, 1), "the first generation")
        site.agents["n2"].stop()
        site.write([1, 2, 3])
        await until(lambda: "n2" in controller.status.lagging, "the silence to be noticed")
        assert Phase.IDLE is not controller.status.phase
        assert "waiting for n2" in controller.status.problem
        async with site.agent("n2"):
            await until(lambda: controller.status.ring_changes >= 2 and idle_in_ring(controller, 2), "the way back")
            await until(
                lambda: controller.status.vips[0].ready == 3 and idle_in_ring(controller, 2), "the change to come"
            )
            assert "" == controller.status.problem
            states = await site.states()
            assert {controller.status.generation} == {one.committed for one in states.values()}
            assert states["n2"].serving


async def test_a_controller_that_restarts_changes_nothing(site: Site) -> None:
    site.write([1, 2])
    async with site.controller() as controller:
        await until(idle_at(controller, 1), "the first generation")
    before = {name: one.snapshot for name, one in (await site.states()).items()}
    async with site.controller() as controller:
        await until(idle_at(controller, 1), "the second controller")
        assert 0 == controller.status.changes
    assert before == {name: one.snapshot for name, one in (await site.states()).items()}


async def test_a_lost_state_file_does_no_harm(site: Site) -> None:
    site.write([1, 2])
    async with site.controller() as controller:
        await until(idle_at(controller, 1), "the first generation")
    (site.config.parent / "demo.state").unlink()
    site.write([1, 2, 3])
    async with site.controller() as controller:
        await until(idle_at(controller, 2), "to go on from what the LBs report")


async def test_agents_that_have_lost_all_go_on_above_the_state_file(site: Site) -> None:
    site.write([1, 2])
    async with site.controller() as controller:
        await until(idle_at(controller, 1), "the first generation")
    for agent in site.agents.values():
        agent.stop()
    async with AsyncExitStack() as stack:
        for name in NAMES:
            await stack.enter_async_context(site.agent(name))
        async with site.controller() as controller:
            await until(idle_at(controller, 2), "a generation above the one that is written down")


async def test_a_second_controller_takes_part_and_harms_nobody(site: Site) -> None:
    site.write([1, 2])
    async with site.controller() as one, site.controller() as two:
        await until(lambda: one.status.phase is two.status.phase is Phase.IDLE, "both to come to rest")
        site.write([1, 2, 3])

        def agree() -> bool:
            return (
                one.status.phase is two.status.phase is Phase.IDLE
                and one.status.generation == two.status.generation > 1
                and {3} == {vip.ready for status in (one.status, two.status) for vip in status.vips}
            )

        await until(agree, "both to agree")
    generations = {one.committed for name, one in (await site.states()).items() if name in LBS}
    assert 1 == len(generations)


async def test_nobody_but_the_node_that_is_meant_is_told(site: Site) -> None:
    """n1's address leads to n2's agent, which is a node of this cluster, but not n1."""
    site.ports["n1"] = site.ports["n2"]
    site.write([1])
    async with site.controller() as controller:
        await until(lambda: "n1" in controller.status.lagging, "n1 to be missed")
        assert "n1.lb.holdfast" in controller.status.problem
        assert 0 == controller.status.generation


# --- The command ------------------------------------------------------------------------------------------------------
def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "lbpod.cli", *argv]


def test_a_bad_file_at_the_start_is_exit_status_2(folder: Path) -> None:
    site = Site(folder)
    site.write([1], cluster={"vni": -1, "seed": 0})
    for argv in (["controller", "--config", str(site.config), "--listen", "127.0.0.1:0"], ["check", str(site.config)]):
        ran = subprocess.run(command(*argv), capture_output=True, text=True, timeout=60, check=False)
        assert 2 == ran.returncode, ran.stderr
        assert "demo.yaml:7: cluster.vni: -1 is not a VNI; use 0 to 16777215" in ran.stderr
        assert 1 == ran.stderr.count("\n")


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (lambda site: site.write([1], tls="none"), "ca.crt is not there; make certificates with `holdfast certs DIR`"),
        (lambda site: (site.config.parent / "demo.state").write_text("{"), "demo.state is damaged; remove it"),
    ],
)
def test_what_the_controller_needs_is_said_at_the_start(
    folder: Path, damage: Callable[[Site], object], wanted: str
) -> None:
    site = Site(folder)
    site.write([1])
    damage(site)
    argv = command("controller", "--config", str(site.config), "--listen", "127.0.0.1:0")
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    (site.config.parent / "demo.state").unlink(missing_ok=True)
    assert 2 == ran.returncode
    assert wanted in ran.stderr


@contextmanager
def started(folder: Path) -> Iterator[tuple[int, Iterator[str]]]:
    """The command, once it has started: its pid, and the events of its log from then on. It has to end well."""
    site = Site(folder)
    site.write([1])
    argv = command("controller", "--config", str(site.config), "--listen", "127.0.0.1:0")
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        events = (str(json.loads(line)["event"]) for line in process.stderr)
        assert "started" == next(events)
        yield process.pid, events
        assert 0 == process.wait(20)


def test_sigterm_ends_the_controller_in_order(folder: Path) -> None:
    with started(folder) as (pid, events):
        os.kill(pid, signal.SIGTERM)
        assert "stopped" in events


def test_sighup_does_not_end_the_controller(folder: Path) -> None:
    with started(folder) as (pid, events):
        os.kill(pid, signal.SIGHUP)
        assert "SIGHUP: the configuration is watched; nothing to do" in events
        os.kill(pid, signal.SIGTERM)
        assert "stopped" in events


def test_an_edit_is_noticed_where_the_kernel_has_no_watches_left(folder: Path) -> None:
    """A machine full of containers runs out of inotify instances; the file is looked at all the same."""
    site = Site(folder)
    site.write([1])
    argv = command("controller", "--config", str(site.config), "--listen", "127.0.0.1:0")
    no_watches = 'echo 0 > /proc/sys/user/max_inotify_instances && exec "$0" "$@"'
    with subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "sh", "-c", no_watches, *argv], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        lines = (json.loads(line) for line in process.stderr)
        patience = threading.Timer(WAIT_S, process.kill)
        patience.start()
        try:
            reason = next(line["reason"] for line in lines if line["event"] == "watch")
            assert "Too many open files" in reason
            for text, used in (("nodes: []", False), (None, True)):
                site.write_text(text) if text else site.write([1, 2])
                assert used is next(line["used"] for line in lines if line["event"] == "config")
        finally:
            patience.cancel()
            process.terminate()


async def test_a_certificate_that_has_ended_is_said_in_logs_and_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an agent and of the controller, from the first moment: nobody speaks with them any more, and they can tell."""
    mint(tmp_path / "tls", NAMES[1:])
    with monkeypatch.context() as brief:
        brief.setattr("lbpod.minting.CERTIFICATE_DAYS", 0)
        for kind in ("crt", "key"):
            (tmp_path / "tls" / f"controller.{kind}").unlink()
        mint(tmp_path / "tls", NAMES[:1])
    site = Site(tmp_path)
    with capture_logs() as logs:
        async with site.agent("n1") as agent, site.agent("n2") as other:
            site.write([1])
            async with site.controller() as controller:

                def named() -> set[str]:
                    lines = [line["sentence"] for line in logs if line["event"] == "certificate"]
                    return {Path(line.split()[0]).name for line in lines if " ended on " in line}

                await until(lambda: {"n1.crt", "controller.crt"} <= named(), "both to be named")
                assert {"n1.crt", "controller.crt"} == named()
                seen = [Metrics(one.view).render().decode() for one in (agent, other)]
                seen.append(generate_latest(controller.metrics.registry).decode())
    ends = []
    for text in seen:
        (line,) = [line for line in text.splitlines() if line.startswith("holdfast_certificate_expiry_timestamp_")]
        ends.append(float(line.split()[1]) - time.time())
    assert [0, CERTIFICATE_DAYS, 0] == [round(left_s / 86_400) for left_s in ends]


async def test_a_certificate_that_is_renewed_on_disk_is_taken_up_while_the_controller_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster moves to another CA: both are trusted for a while, and an agent that starts later knows only the new
    one."""
    monkeypatch.setattr("lbpod.standalone.driver.LOOK_AFTER_NS", 20_000_000)
    monkeypatch.setattr("lbpod.agent.agent.LOOK_AFTER_NS", 20_000_000)
    tls, other = tmp_path / "tls", tmp_path / "other"
    mint(tls, NAMES)
    mint(other, NAMES)
    site = Site(tmp_path)
    with capture_logs() as logs:

        async def taken_up(count: int) -> None:
            await until(lambda: count <= sum(line["event"] == "certificates renewed" for line in logs), "renewal")

        async with site.agent("n1"), site.agent("web"), AsyncExitStack() as running_n2:
            await running_n2.enter_async_context(site.agent("n2"))
            site.write([1])
            async with site.controller() as controller:
                await until(lambda: controller.converged, "the first change")
                (tls / "ca.crt").write_bytes((tls / "ca.crt").read_bytes() + (other / "ca.crt").read_bytes())
                await taken_up(4)
                for name in (*NAMES, "controller"):
                    for kind in ("key", "crt"):
                        (other / f"{name}.{kind}").replace(tls / f"{name}.{kind}")
                await taken_up(8)
                await running_n2.aclose()
                (other / "ca.crt").replace(tls / "ca.crt")
                async with site.agent("n2"):
                    site.write([1, 2])
                    await until(lambda: controller.status.changes == 2, "a change with the new certificates")
