"""Agents hear that Holdfast is being removed: real agents with real certificates, and the program that a hook runs."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from lboperator.farewell import LIST_TRIES, Agent, agents_in, tell_all
from lboperator.settings import Settings
from lbpod.core.limits import FAREWELL_NS
from lbpod.core.messages import BeatCall, Refuse
from lbpod.datapath.memory import MemoryDatapath
from lbpod.minting import mint
from tests.agents import make_parts, running
from tests.operator_objects import Body, endpoint, endpoint_slice


def test_agents_are_those_of_the_slices_ready_or_not() -> None:
    slices = [
        endpoint_slice(endpoint("10.0.0.1", "n1", ready=True), endpoint("10.0.0.2", "n2", ready=False)),
        endpoint_slice(endpoint("10.0.0.1", "n1", ready=True), endpoint("10.0.0.3", "", ready=True)),
        {"endpoints": None},
    ]
    assert {Agent("n1", "10.0.0.1"), Agent("n2", "10.0.0.2")} == agents_in({"items": slices})
    assert set() == agents_in({})


async def test_who_has_heard_ends_at_once_and_who_cannot_be_told_is_named(tmp_path: Path) -> None:
    mint(tmp_path / "tls", ["n1"])
    parts = replace(make_parts("n1", tmp_path, MemoryDatapath()), withdraw_ns=FAREWELL_NS)
    async with running(parts) as agent:
        settings = Settings(tls=tmp_path / "tls", agent_port=agent.control_port)
        heard = [agent.driver.is_farewell]
        missed = await tell_all(settings, frozenset({Agent("n1", "127.0.0.1"), Agent("n2", "127.0.0.1")}))
        heard.append(agent.driver.is_farewell)
        assert ["n2"] == list(missed), "the certificate is not n2's"
        assert [False, True] == heard
        agent.terminate()
        answer = await agent.driver.call(BeatCall(0, 0, 0))
    assert isinstance(answer, Refuse), "it has stopped, and does not leave the ring first"


@asynccontextmanager
async def listing(folder: Path, slices: list[Body], failures: int) -> AsyncIterator[list[str]]:
    """An API server that fails so many times before it lists; what it was asked, and a kubeconfig for it in folder."""
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path_qs)
        if len(asked) <= failures:
            return web.json_response({"message": "etcdserver: leader changed"}, status=500)
        return web.json_response({"items": slices})

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        config = {
            "current-context": "it",
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
            "clusters": [{"name": "it", "cluster": {"server": f"http://127.0.0.1:{runner.addresses[0][1]}"}}],
            "users": [{"name": "it", "user": {}}],
        }
        (folder / "kubeconfig").write_text(json.dumps(config))
        yield asked
    finally:
        await runner.cleanup()


async def run_farewell(folder: Path, port: int) -> tuple[int | None, str]:
    """Exit status and log of the program that the Job runs."""
    env = {
        **os.environ,
        "KUBECONFIG": str(folder / "kubeconfig"),
        "HOLDFAST_TLS": str(folder / "tls"),
        "HOLDFAST_AGENT_PORT": str(port),
    }
    argv = (sys.executable, "-m", "lboperator.farewell")
    output = asyncio.subprocess.PIPE
    program = await asyncio.create_subprocess_exec(*argv, env=env, stdout=output, stderr=asyncio.subprocess.STDOUT)
    said, _ = await asyncio.wait_for(program.communicate(), 60)
    return program.returncode, said.decode()


@pytest.mark.parametrize(("failures", "status"), [(1, 0), (LIST_TRIES, 1)])
async def test_a_list_that_fails_is_tried_again_and_no_success_where_it_still_fails(
    tmp_path: Path, failures: int, status: int
) -> None:
    mint(tmp_path / "tls", ["n1"])
    parts = replace(make_parts("n1", tmp_path, MemoryDatapath()), withdraw_ns=FAREWELL_NS)
    slices = [endpoint_slice(endpoint("127.0.0.1", "n1"))]
    async with running(parts) as agent, listing(tmp_path, slices, failures) as asked:
        said = await run_farewell(tmp_path, agent.control_port)
        assert (status, not status) == (said[0], agent.driver.is_farewell), said[1]
    assert min(failures + 1, LIST_TRIES) == len(asked)


async def test_without_certificates_there_is_nobody_to_tell(tmp_path: Path) -> None:
    async with listing(tmp_path, [endpoint_slice(endpoint("127.0.0.1", "n1"))], 0):
        status, log = await run_farewell(tmp_path, 1)
    assert 0 == status
    assert "nobody told" in log
