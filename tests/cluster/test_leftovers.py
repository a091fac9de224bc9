"""A cluster whose test process is killed with -9 leaves no process and no mount, and the next start removes all
else."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbpod.lab import clean_leftovers
from lbpod.lab.kernel import NETNS_DIR
from lbpod.lab.registry import LAB_DIR
from tests.cluster.nodes import cgroup_roots
from tests.cluster.stage import until
from tests.cluster.whole import clean_cgroups
from tests.tidy.sources import ROOT

_PROGRAM = """
import time
from tests.cluster.whole import WholeCluster
with WholeCluster() as cluster:
    cluster.kubectl("create", "deployment", "web", "--image=docker.io/holdfast/page:test", "--replicas=3")
    cluster.kubectl("rollout", "status", "deployment/web", "--timeout=120s")
    print(cluster.lab.prefix, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[str]]:
    """A process that has a cluster with running pods, and then writes its prefix."""
    program = subprocess.Popen([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert program.stdout is not None
    try:
        yield program
    finally:
        program.kill()
        program.wait()
        program.stdout.close()


def _processes(prefix: str) -> list[str]:
    """Command lines of whoever is in a cgroup of these nodes, or has their folder in its arguments."""
    members = [path for root in cgroup_roots() for path in root.glob(f"{prefix}-node*/**/cgroup.procs")]
    inside = {pid for path in members for pid in path.read_text().split()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if folder.name in inside or f"{LAB_DIR}/{prefix}/" in words:
            found.append(words)
    return sorted(found)


def test_a_cluster_that_is_killed_leaves_nothing(victim: subprocess.Popen[str]) -> None:
    assert victim.stdout is not None
    prefix = victim.stdout.readline().strip()
    assert prefix.startswith("hf"), "it came up"
    assert len([one for one in _processes(prefix) if one.startswith("nginx")]) == 3, _processes(prefix)
    victim.kill()
    victim.wait()
    until("all processes to end", lambda: not _processes(prefix), 20)
    assert prefix in clean_leftovers()
    clean_cgroups()
    assert [] == [path for root in cgroup_roots() for path in root.glob(f"{prefix}-*")]
    assert [] == list(NETNS_DIR.glob(f"{prefix}-*"))
    assert prefix not in Path("/proc/self/mountinfo").read_text()
    assert not (LAB_DIR / prefix).exists()
