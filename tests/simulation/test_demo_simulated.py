"""The demo where no packets can be moved: the same script, the same keys, the same comparison, in the simulator."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lbpod.core.model import parse_address
from lbpod.simulator.baselines import BASELINES, LocalTable
from lbpod.simulator.clients import Bond, Flow
from lbpod.simulator.frames import Word
from lbpod.simulator.stage import CALM, turned
from lbpod.simulator.wishes import Pod, Service
from tests.integration.test_demo import KEYS

WEB = Service("shop/tcp/80", 80, CALM.vips[0], CALM.vips[0].idle_ns)
FLOW = Flow("flow1", Bond(WEB, 7, 10_001, b"\xc6\x33\x64\x01"), b"\xc6\x33\x64\x01", 10_001, False)


def pod(number: int) -> Pod:
    return Pod(f"pod{number}", parse_address(f"10.244.0.{number}"), "host1")


def play(file: Path, *arguments: str) -> tuple[int, dict[str, dict[str, int]], str]:
    """Exit status, the JSON file, the output."""
    argv = [sys.executable, "-m", "lbpod.lab.demo", "--seconds", "20", "--long", "60", "--short-rate", "20"]
    done = subprocess.run([*argv, "--json", str(file), *arguments], capture_output=True, text=True, check=False)
    assert file.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(file.read_text()), done.stdout


def test_the_comparison_is_shown_without_a_packet(tmp_path: Path) -> None:
    status, runs, out = play(tmp_path / "demo.json")
    assert 0 == status, out
    assert {"holdfast", "hash_only", "local_table"} == set(runs)
    for run in runs.values():
        assert set(run) >= KEYS
        assert run["simulated"] is True
        assert 60 == run["long_lived"]
        assert (15, 1, 1) == (run["backend_changes"], run["lb_losses"], run["lb_joins"])
    assert 0 == runs["holdfast"]["broken"], runs["holdfast"]
    assert 0 < runs["holdfast"]["relayed_packets"]
    assert 0 < runs["holdfast"]["resolved_flows"]
    assert 0 < runs["holdfast"]["tracking_slots_peak"]
    assert 0 == runs["holdfast"]["tracking_slots_end"]
    assert runs["hash_only"]["broken"] > runs["local_table"]["broken"] > 0
    assert "BROKEN" in out


def test_the_same_seed_breaks_the_same_connections_and_another_seed_others(tmp_path: Path) -> None:
    only = ("--only", "hash_only", "--only", "local_table", "--seed")
    first, again, other = (play(tmp_path / f"{n}.json", *only, seed)[1] for n, seed in enumerate(("3", "3", "4")))
    assert first == again
    assert first != other


def test_hashing_alone_follows_the_table_whatever_it_did_before() -> None:
    lb = BASELINES["hash_only"]()
    assert [1, 2] == [int(lb.choose(FLOW, Word.ACK, one).name[-1]) for one in (pod(1), pod(2))]


def test_a_flow_table_keeps_what_it_has_seen_and_its_neighbour_does_not() -> None:
    first, second = pod(1), pod(2)
    here, there = LocalTable(), LocalTable()
    assert first is here.choose(FLOW, Word.SYN, first)
    assert first is here.choose(FLOW, Word.ACK, second)
    assert second is there.choose(FLOW, Word.ACK, second)


def test_a_flow_table_gives_a_dead_backend_up_and_begins_anew_with_a_syn() -> None:
    first, second = pod(1), pod(2)
    lb = LocalTable()
    lb.choose(FLOW, Word.SYN, first)
    assert second is lb.choose(FLOW, Word.SYN, second)
    second.state = None
    assert first is lb.choose(FLOW, Word.ACK, first)


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_a_router_that_turns_sends_every_flow_to_another_lb(turns: int) -> None:
    lbs = ["a", "b", "c"]
    assert all(one != other for one, other in zip(lbs, turned(lbs, turns), strict=True))
    assert [] == turned([], turns)
