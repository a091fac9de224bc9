"""The demo as people run it, short: the promise holds, the baselines show why it matters, nothing is left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lbpod.lab.registry import base36, namespaces_of
from tests.tidy.sources import ROOT

pytestmark = pytest.mark.root

KEYS = {
    "connections",
    "long_lived",
    "broken",
    "broken_backend_gone",
    "backend_changes",
    "ecmp_reshuffles",
    "lb_losses",
    "lb_joins",
    "relayed_packets",
    "resolved_flows",
    "tracking_slots_peak",
    "tracking_slots_end",
    "seconds",
}


def _demo(*arguments: str) -> tuple[int, int, str, str]:
    """Process id, exit status, output, errors."""
    argv = [sys.executable, "-m", "lbpod.cli", "demo", *arguments]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, err = process.communicate(timeout=280)
    return process.pid, process.returncode, out, err


@pytest.mark.slow
def test_no_connection_breaks_while_backends_paths_and_load_balancers_change(tmp_path: Path) -> None:
    file = tmp_path / "demo.json"
    pid, status, out, err = _demo(
        "--seconds", "16", "--long", "100", "--short-rate", "50", "--json", str(file), "--logs", str(tmp_path)
    )
    assert 0 == status, out[-3_000:] + err[-2_000:]
    runs = json.loads(file.read_text())
    assert {"holdfast", "hash_only", "local_table"} == set(runs)
    for run in runs.values():
        assert set(run) >= KEYS
        assert run["connections"] > 100
        assert 15 == run["backend_changes"]
        assert (1, 1) == (run["lb_losses"], run["lb_joins"])
        assert run["ecmp_reshuffles"] >= 4
    assert 0 == runs["holdfast"]["broken"], runs["holdfast"]
    assert 0 < runs["holdfast"]["relayed_packets"]
    assert 0 < runs["holdfast"]["resolved_flows"]
    assert 0 < runs["holdfast"]["tracking_slots_peak"]
    for baseline in ("hash_only", "local_table"):
        assert 0 < runs[baseline]["broken"], f"{baseline} must lose what it cannot keep, or the script proves nothing"
        assert 0 == runs[baseline]["relayed_packets"]
    assert "BROKEN" in out
    assert [] == namespaces_of("hf" + base36(pid)), "the demo removes what it made"


@pytest.mark.slow
def test_where_no_packets_can_be_had_make_demo_says_so_first_and_plays_in_the_simulator(tmp_path: Path) -> None:
    file = tmp_path / "demo.json"
    powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]  # root as in many a container
    argv = [*powerless, "make", "demo", f"ARGS=--seconds 16 --long 30 --short-rate 10 --json {file}"]
    # A make within make (this may be `make test`) would say so first, and take its options for ours.
    env = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=280)
    assert 0 == done.returncode, done.stdout[-3_000:] + done.stderr[-2_000:]
    said = done.stdout.splitlines()
    assert said[0].startswith("==> no real packets here: this root may not make network namespaces")
    assert said[1].startswith("No real packets here: This process may not load BPF programs")
    runs = json.loads(file.read_text())
    assert {"holdfast", "hash_only", "local_table"} == set(runs)
    assert 0 == runs["holdfast"]["broken"], runs["holdfast"]
    assert 0 < runs["local_table"]["broken"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--only", "magic"), "--only magic is not known; use holdfast, hash_only, local_table"),
        (("--json", "/nonexistent/folder/x.json"), "there is no folder /nonexistent/folder"),
        (("--json", "/tmp"), "--json /tmp: that is a folder; name a file"),
        (
            ("--seconds", "3"),
            "Invalid value for '--seconds': Input should be greater than or equal to 16. See holdfast --help",
        ),
    ],
)
def test_a_wrong_option_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    _, status, _, err = _demo(*arguments)
    assert 2 == status
    assert sentence in err
    assert 1 == len(err.strip().splitlines())
