"""The chaos run sees what breaks: two baselines break some. (That Holdfast breaks none is `make chaos`' to say.)"""

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
