"""Agents hear that Holdfast is being removed: real agents with real certificates, and the program that a hook runs."""

from dataclasses import replace
from pathlib import Path

from lboperator.farewell import Agent, agents_in, tell_all
from lboperator.settings import Settings
from lbpod.core.limits import FAREWELL_NS
from lbpod.core.messages import BeatCall, Refuse
from lbpod.datapath.memory import MemoryDatapath
from lbpod.minting import mint
from tests.agents import make_parts, running
from tests.operator_objects import endpoint, endpoint_slice


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
