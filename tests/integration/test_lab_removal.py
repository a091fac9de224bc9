"""A lab leaves no trace: at its end, after Ctrl-C and SIGTERM, and, once another starts, after kill -9.

Each case runs a lab in a process of its own and looks at what is left of its prefix. Labs of others may live on this
machine at the same time, so only our own prefix is looked at.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lbpod.lab import Lab, Program, kernel as lab_kernel, registry

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]

END_S = 45

# Whoever is started by nohup ignores SIGHUP, in the background of a script SIGINT, and so do its children.
HOLDER = """
import signal
import sys
import time
from lbpod.lab import Lab
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
with Lab(nodes=2) as lab:
    pod = lab.add_pod(lab.nodes[0])
    (lab.pin_dir(lab.nodes[0]) / "sub").mkdir()
    pod.popen(["sh", "-c", "sleep 300 & sleep 300"])
    print(lab.prefix, flush=True)
    if sys.argv[1] == "leave":
        sys.exit(0)
    time.sleep(300)
"""


@contextmanager
def _holder(mode: str) -> Iterator[tuple[subprocess.Popen[str], str, set[int]]]:
    """A process that holds a lab, its prefix, and the network namespaces of it."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, mode], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        prefix = process.stdout.readline().split()[0]
        names = registry.namespaces_of(prefix)
        yield process, prefix, {(lab_kernel.NETNS_DIR / name).stat().st_ino for name in names}
    finally:
        process.kill()
        process.communicate()
        registry.clean_leftovers()


def _traces(prefix: str, inodes: set[int]) -> list[str]:
    paths = [
        registry.LAB_DIR / f"{prefix}.json",
        registry.run_dir(prefix),
        registry.pin_root(prefix),
        *(lab_kernel.NETNS_DIR / name for name in registry.namespaces_of(prefix)),
    ]
    links = [name for name in os.listdir("/sys/class/net") if name.startswith(prefix)]
    processes = [f"pid {pid}" for pid in registry.processes_inside(inodes)]
    return [str(path) for path in paths if path.exists()] + links + processes


def wait_for_output(program: Program) -> None:
    deadline_ns = time.monotonic_ns() + 5_000_000_000
    while not program.log_text() and time.monotonic_ns() < deadline_ns:
        time.sleep(0.005)


def test_a_lab_in_use_is_seen_and_its_end_leaves_nothing() -> None:
    with Lab(nodes=2) as lab:
        prefix = lab.prefix
        pod = lab.add_pod(lab.nodes[1])
        lab.pin_dir(lab.nodes[0])
        stubborn = pod.popen(["sh", "-c", "trap '' TERM; echo ready; setsid sleep 300 & sleep 300"])
        wait_for_output(stubborn)
        lab.client.popen(["sleep", "300"])
        inodes = {os.fstat(host.netns_fd).st_ino for host in (lab.router, lab.client, *lab.nodes, pod)}
        assert len(_traces(prefix, inodes)) > 8
    assert [] == _traces(prefix, inodes)


def test_logs_stay_where_they_were_asked_for(tmp_path: Path) -> None:
    with Lab(nodes=0, log_dir=tmp_path) as lab:
        lab.client.popen(["echo", "hello"]).wait(5)
    assert ["hello\n"] == [path.read_text() for path in tmp_path.iterdir()]


def test_two_labs_of_one_process_do_not_meet() -> None:
    with Lab(nodes=0) as one, Lab(nodes=0) as two:
        assert one.prefix != two.prefix
        assert not two.prefix.startswith(one.prefix + "-")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_lab_without_a_trace(number: signal.Signals) -> None:
    with _holder("stay") as (process, prefix, inodes):
        assert len(_traces(prefix, inodes)) > 5
        process.send_signal(number)
        process.send_signal(number)  # an impatient one, too
        process.wait(END_S)
        assert [] == _traces(prefix, inodes)


def test_an_exit_inside_the_block_leaves_nothing() -> None:
    with _holder("leave") as (process, prefix, inodes):
        assert 0 == process.wait(END_S)
        assert [] == _traces(prefix, inodes)


def test_kill_9_leaves_no_process_and_the_next_start_cleans_the_rest() -> None:
    with _holder("stay") as (process, prefix, inodes):
        assert len(_traces(prefix, inodes)) > 5
        with Lab(nodes=0):
            assert len(_traces(prefix, inodes)) > 5, "a lab whose process lives is nobody else's business"
        process.kill()
        process.wait(5)
        with Lab(nodes=0):
            assert [] == _traces(prefix, inodes)


def test_programs_die_with_a_lab_that_is_killed() -> None:
    """PR_SET_PDEATHSIG: before anybody cleans. (What such a program started itself is found by its namespace.)"""
    holder = 'print(lab.prefix, lab.client.popen(["sleep", "300"]).pid, flush=True); time.sleep(60)'
    script = f"import time\nfrom lbpod.lab import Lab\nwith Lab(nodes=0) as lab:\n    {holder}\n"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        _, pid = process.stdout.readline().split()
        assert registry.process_start(int(pid)) is not None
        deadline_ns = time.monotonic_ns() + 5_000_000_000
        while Path(f"/proc/{pid}/comm").read_text() != "sleep\n" and time.monotonic_ns() < deadline_ns:
            time.sleep(0.005)  # setpriv asks for the signal, and only then becomes it
        process.kill()
        process.wait(5)
        deadline_ns = time.monotonic_ns() + 5_000_000_000
        while registry.process_start(int(pid)) is not None and time.monotonic_ns() < deadline_ns:
            time.sleep(0.005)
        assert registry.process_start(int(pid)) is None
    finally:
        process.kill()
        process.communicate()
        registry.clean_leftovers()
