"""A minute of what `make chaos` plays for ten: Holdfast breaks nothing, and a harness that would see it says so.

That it would see it, two baselines show: they break some in half a minute.
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


AT_LEAST = {
    "connections": 4000,
    "long_lived": 1000,
    "backend_changes": 60,
    "lb_losses": 2,
    "lb_joins": 1,
    "agent_kills": 5,
    "controller_kills": 1,
    "ecmp_reshuffles": 30,
    "link_cuts": 1,
    "relayed_packets": 100,
}
"""What has happened in a minute at the least, on the slowest machine that the run is worth anything on."""


@pytest.mark.slow
def test_a_minute_of_chaos_breaks_nothing(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for seed in (
        1,
        2,
    ):  # a machine that is short of processors may starve an agent for as long as a client has patience
        status, found, report = _chaos(
            tmp_path,
            *("--minutes", "1", "--long", "1000", "--short-rate", "100", "--quiet-seconds", "3", "--seed", str(seed)),
            *("--link-cut-every", "10"),
        )
        assert {} == {name: found[name] for name, least in AT_LEAST.items() if found[name] < least}
        assert found["failover_ms"]["count"] > 0
        assert found["join_ms"]["count"] + found["rejoin_ms"]["count"] > 0
        assert "<svg" in report
        if not status:
            break
    assert (0, 0) == (status, found["broken"])


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
