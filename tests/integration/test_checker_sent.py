"""The checking client where there is no checkout of ours: its text goes in by the input of a shell that some command
opens, and it counts as it does anywhere."""

import os
import subprocess
from pathlib import Path

import pytest

from lbpod.lab import Lab, python, start_nginx
from tests.cluster.client import Client


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root")
def test_the_checker_is_sent_through_a_command(tmp_path: Path) -> None:
    with Lab(nodes=1) as lab:
        pod = lab.add_pod(lab.nodes[0])
        backend = start_nginx(lab, pod)
        target = f"{pod.address}:{backend.port}"
        # No module of ours can be found there: another folder, and a Python that looks at no variable.
        inside = ("ip", "netns", "exec", lab.client.netns, "env", "-C", "/", "-u", "PYTHONPATH", "PYTHONSAFEPATH=1")
        client = Client(inside, tmp_path)
        assert "" == client.why_not()
        assert backend.name == client.run(f"curl --silent http://{target}/").strip()
        checker = client.start_checker(target, long_count=20, short_rate=20)
        quiet = checker.wait_until(lambda now: now["long_lived"] == 20 and now["short_done"] >= 20)
        assert {backend.name: 20} == quiet["backends"]
        checker.gone(backend.name)
        backend.program.kill()
        final = checker.wait_until(lambda now: now["broken_backend_gone"] >= 20) and checker.stop()
        assert 20 == final["broken_backend_gone"]
        assert {"refused"} >= final["by_reason"].get("broken", {}).keys(), "new ones: there was no other backend"


def test_a_checker_whose_output_nobody_reads_any_more_ends() -> None:
    """As at the other end of a connection that is lost; the end of its input it would not mind."""
    argv = python("-m", "lbpod.lab.checker", "--target", "127.0.0.1:9", "--long", "1")
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as checker:
        assert checker.stdout is not None
        assert checker.stdout.readline()
        checker.stdout.close()
        assert 0 != checker.wait(10)
