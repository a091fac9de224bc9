"""One minute of chaos, in which nothing breaks; and that the harness would see it: two baselines break some.

Fewer connections than `make chaos` has, so that two processors can keep up with it: what an overloaded machine breaks
is not what a run is about. Everything happens as often as there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lbpod.lab.registry import base36, namespaces_of

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]

SMALL = ("--quiet-seconds", "3", "--interval-ms", "1000", "--idle-seconds", "10", "--probes", "10", "--wrk", "2")


def _chaos(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, the JSON file, the report; and nothing is left behind."""
    argv = [sys.executable, "-m", "lbpod.cli", "chaos", "--logs", str(folder / "logs"), *arguments]
    argv += ["--json", str(folder / "chaos.json"), "--html", str(folder / "chaos.html")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        out, _ = process.communicate(timeout=290)
    assert (folder / "chaos.json").exists(), out[-3_000:]
    assert [] == namespaces_of("hf" + base36(process.pid)), "the run removes what it made"
    return process.returncode, json.loads((folder / "chaos.json").read_text()), (folder / "chaos.html").read_text()


FIGURES = {
    "connections",
    "long_lived",
    "broken",
    "broken_backend_gone",
    "broken_two_replicas_lost",
    "backend_changes",
    "lb_losses",
    "lb_joins",
    "agent_kills",
    "controller_kills",
    "ecmp_reshuffles",
    "failover_ms",
    "join_ms",
    "minutes",
}


@pytest.mark.slow
def test_a_minute_in_which_everything_changes_and_dies_breaks_no_connection(tmp_path: Path) -> None:
    status, found, page = _chaos(tmp_path, "--minutes", "1", "--long", "200", "--short-rate", "40", *SMALL)
    assert 0 == status, (found["broken"], found["broken_reasons"], found["machine"], found["events"])
    assert set(found) >= FIGURES
    assert (0, 0) == (found["broken"], found["broken_two_replicas_lost"])
    assert found["connections"] > 1_000
    assert 1.0 == found["minutes"]
    assert found["backend_changes"] >= 75
    assert found["lb_losses"] >= 2
    assert found["lb_joins"] >= 2
    assert found["agent_kills"] >= 5
    assert found["controller_kills"] >= 2
    assert found["ecmp_reshuffles"] >= 35
    assert found["relayed_packets"] > 0
    for times in (found["failover_ms"], found["join_ms"]):
        assert 0 < times["p50"] <= times["p99"] <= times["max"]
    assert "<svg" in page


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["hash_only", "local_table"])
def test_the_same_chaos_breaks_what_a_baseline_cannot_keep(tmp_path: Path, baseline: str) -> None:
    status, found, _ = _chaos(
        tmp_path, "--run", baseline, "--minutes", "0.4", "--long", "200", "--short-rate", "50", "--lbs", "3", *SMALL
    )
    assert 1 == status
    assert found["broken"] > 0, "a harness that sees nothing here sees nothing anywhere"
    assert baseline == found["run"]
    assert found["backend_changes"] > 15
    assert 0 == found["relayed_packets"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--run", "magic"), "--run magic is not known; use holdfast, hash_only, local_table"),
        (("--html", "/nonexistent/x.html"), "there is no folder /nonexistent"),
        (("--idle-seconds", "5"), "--idle-seconds 5: twice the 5000 ms between two requests, at least"),
    ],
)
def test_a_wrong_option_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    argv = [sys.executable, "-m", "lbpod.cli", "chaos", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert 2 == done.returncode
    assert sentence in done.stderr
    assert 1 == len(done.stderr.strip().splitlines())
