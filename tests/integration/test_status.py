"""`holdfast status`, run as a user would, against agents with real certificates: what it prints and what it returns."""

import asyncio
import fcntl
import json
import os
import re
import struct
import sys
import termios
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lbpod.agent.agent import Agent
from lbpod.core.model import parse_address
from lbpod.datapath.memory import MemoryDatapath
from lbpod.minting import mint
from tests.agents import FENCE_NEVER_NS, Caller, follow, make_parts, roll_out, running, world

NAMES = ("n1", "n2")


@pytest.fixture
async def agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Agent]]:
    monkeypatch.setattr("lbpod.core.watch.FENCE_NS", FENCE_NEVER_NS)
    mint(tmp_path / "tls", ["n1", "n2", "n3"])
    parts = [
        make_parts(name, tmp_path, MemoryDatapath(), address=parse_address(f"10.0.0.{number}"))
        for number, name in enumerate(NAMES, start=1)
    ]
    async with running(parts[0]) as one, running(parts[1]) as two:
        yield [one, two]


async def status(folder: Path, ports: list[int], *more: str) -> tuple[int, str]:
    """Exit status and output, on a terminal of 80 columns."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    argv = [sys.executable, "-m", "lbpod.cli", "status", "--tls", str(folder / "tls"), *more]
    for port in ports:
        argv += ["--node", f"127.0.0.1:{port}"]
    process = await asyncio.create_subprocess_exec(*argv, stdout=theirs, stderr=theirs)
    os.close(theirs)

    def read_all() -> str:
        data = b""
        while True:
            try:
                data += os.read(ours, 65_536)
            except OSError:  # the other end is closed
                return data.decode()

    text = await asyncio.wait_for(asyncio.to_thread(read_all), 60)
    os.close(ours)
    return await process.wait(), re.sub("\x1b\\[[0-9;]*m", "", text)


async def test_the_exit_status_says_whether_all_are_ready(tmp_path: Path, agents: list[Agent]) -> None:
    ports = [agent.control_port for agent in agents]
    code, text = await status(tmp_path, ports)
    assert (1, 2) == (code, text.count("no snapshot has been committed yet: the controller has not called")), text
    async with Caller(tmp_path, "controller") as controller:
        first = follow(world(dict(zip(NAMES, agents, strict=True)), 3), None)
        await roll_out(controller, agents, first)
        assert 0 == (await status(tmp_path, ports))[0]
        assert 1 == (await status(tmp_path, [*ports, 1]))[0], "nobody listens there"
        code, text = await status(tmp_path, ports, "--json")
        assert (0, ["yes", "yes"]) == (code, [answer["ready"] for answer in json.loads(text).values()])


async def test_no_figure_is_cut_off_where_the_terminal_is_narrow(tmp_path: Path, agents: list[Agent]) -> None:
    _, text = await status(tmp_path, [agents[0].control_port])
    assert "\u2026" not in text
    header, _, row = [line for line in text.splitlines() if line.strip()][:3]
    assert ["agent", "node", "member", "generation", "tracking", "VIPs", "XDP", "packets", "ready"] == header.split()
    assert [f"127.0.0.1:{agents[0].control_port}", "n1", "-", "0", "0", "0", "none", "0", "no"] == row.split()
