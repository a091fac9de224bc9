"""What every test may rely on, and what a skip costs.

On a developer's laptop a test may skip because the machine lacks something. In CI the machine is ours and complete, so
a skip hides a hole: with CI=true it counts as a failure, unless its reason is `missing feature: NAME ...`, NAME is in
`FEATURES`, and the probe beside it agrees that the machine does not have it. A new feature that tests may lack is
added here, with its probe.

Hypothesis runs without a deadline (a busy machine is not a bug) and prints the line that replays a failure.
`HOLDFAST_SOAK=1` (`make soak`) asks for a hundred times as many cases; tests with loops of their own scale them by the
`soak_factor` fixture.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

SOAK_FACTOR = 100 if os.environ.get("HOLDFAST_SOAK") == "1" else 1
IN_CI = os.environ.get("CI", "").lower() in {"1", "true"}
EARNED = re.compile(r"missing feature: (?P<name>[a-z0-9_-]+)")

settings.register_profile(
    "holdfast",
    deadline=None,
    max_examples=100 * SOAK_FACTOR,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("holdfast")


def _has_namespaces() -> bool:
    """True where this process may make a network namespace."""
    return subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False, timeout=10).returncode == 0


def _has_command(name: str) -> Callable[[], bool]:
    return lambda: shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is not None


def _has_kubernetes() -> bool:
    """True where tools/kube.sh has built an API server."""
    ran = subprocess.run(["tools/kube.sh", "folder"], capture_output=True, text=True, check=False, timeout=10)
    return ran.returncode == 0 and (Path(ran.stdout.strip()) / "kube-apiserver").exists()


FEATURES: dict[str, Callable[[], bool]] = {
    "root": lambda: os.geteuid() == 0,
    "bpf": lambda: Path("/proc/sys/kernel/unprivileged_bpf_disabled").exists(),
    "namespaces": _has_namespaces,
    "clang": lambda: subprocess.run(["tools/find-clang.sh"], capture_output=True, check=False).returncode == 0,
    "curl": _has_command("curl"),
    "etcd": _has_command("etcd"),
    "ethtool": _has_command("ethtool"),
    "kubernetes": _has_kubernetes,
    "nginx": _has_command("nginx"),
    "own-cluster": lambda: not any(word.startswith("--kubeconfig") for word in sys.argv),
    "promtool": _has_command("promtool"),
    "tcpdump": _has_command("tcpdump"),
    "wrk": _has_command("wrk"),
}


def skip_is_earned(reason: str) -> bool:
    """True if the reason names a feature of `FEATURES` that this machine, when asked, does not have."""
    named = EARNED.search(reason)
    return named is not None and named["name"] in FEATURES and not FEATURES[named["name"]]()


def _unearned(report: pytest.TestReport | pytest.CollectReport) -> str | None:
    """The sentence that turns a skip into a failure, or None if the report is no skip or the skip is earned."""
    if not IN_CI or not report.skipped or hasattr(report, "wasxfail"):
        return None
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if skip_is_earned(reason):
        return None
    return f"a skip must be earned: in CI {report.nodeid} may not skip for {reason!r}; see tests/conftest.py"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail what skips without reason while it runs."""
    report = yield
    if sentence := _unearned(report):
        report.outcome = "failed"
        report.longrepr = sentence
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Fail what skips without reason while it is collected (importorskip, a skip at module level)."""
    report = yield
    if sentence := _unearned(report):
        report.outcome = "failed"
        report.longrepr = sentence
    return report


@pytest.fixture(scope="session")
def soak_factor() -> int:
    """How many times the usual number of random cases to run: 1, or 100 in `make soak`."""
    return SOAK_FACTOR
