"""What keeps an agent from starting is one sentence, and Ctrl-C ends it at any moment. Run as a user would."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lbpod.lab import Lab, python
from lbpod.minting import mint
from tests.integration.traffic_cluster import wait_for

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]

INTERRUPTED_WHILE_LIBBPF_CALLS = """
import ctypes, os, signal
from lbpod.agent import run
from lbpod.agent.settings import read_settings

@ctypes.CFUNCTYPE(None)
def calls_back():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000): pass

run.files_in = lambda *_: calls_back()
run.run_agent(read_settings({}, {}))
"""


READS_AS_NOBODY = """
import os, sys
from pathlib import Path
from lbpod.certs import CertsError, client_context, files_in

os.setgid(65534)
os.setuid(65534)
try:
    client_context(files_in(Path(sys.argv[1]), "n1"))
except CertsError as error:
    print(error, end="")
"""


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--interface", "lo", "the interface lo has no Ethernet address; choose another one with --interface"),
        ("--node-address", "fe80::1", "--node-address is 'fe80::1', which is IPv6; give the node's IPv4 address"),
        ("--node-address", "192.0.2.77", "--node-address is 192.0.2.77, which no interface here has"),
        ("--pins", "/sys/fs/bpf/hfstart-1.0", "names with dots are reserved there"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(tmp_path: Path, option: str, value: str, wanted: str) -> None:
    with Lab(nodes=1) as lab:
        node = lab.nodes[0]
        mint(tmp_path / "tls", [node.name])
        options = {"--interface": "eth0", "--pins": str(lab.pin_dir(node)), option: value}
        argv = [*python("-m", "lbpod.cli", "agent", "--node", node.name, "--tls", str(tmp_path / "tls"))]
        argv += ["--state", str(tmp_path / "state"), *(word for pair in options.items() for word in pair)]
        agent = node.popen(argv, name="agent")
        status = agent.wait(30)
        lines = [line for line in agent.log_text().splitlines() if not line.startswith("{")]
    assert (1, 1) == (status, len(lines)), lines
    assert wanted in lines[0]


def test_sighup_does_not_end_an_agent(tmp_path: Path) -> None:
    with Lab(nodes=1) as lab:
        node = lab.nodes[0]
        mint(tmp_path / "tls", [node.name])
        argv = [*python("-m", "lbpod.cli", "agent", "--node", node.name, "--tls", str(tmp_path / "tls"))]
        argv += ["--state", str(tmp_path / "state"), "--interface", "eth0", "--pins", str(lab.pin_dir(node))]
        agent = node.popen(argv, name="agent")
        wait_for(lambda: '"started"' in agent.log_text(), "the agent has started", agent.log_text)
        agent.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "SIGHUP: certificates are watched" in agent.log_text(), "a line of the log", agent.log_text)
        agent.process.send_signal(signal.SIGINT)
        assert 0 == agent.wait(30)
        assert '"stopped"' in agent.log_text()


def test_the_agent_of_a_container_takes_no_arguments() -> None:
    argv = [sys.executable, "-m", "lbpod.agent", "--tls", "somewhere", "--nonsense"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (2, "") == (done.returncode, done.stdout)
    sentence = "--tls is not known here; set HOLDFAST_* in the environment, or use `holdfast agent`"
    assert f"holdfast agent: {sentence}\n" == done.stderr


def test_certificates_that_may_not_be_read_are_one_sentence(tmp_path: Path) -> None:
    mint(tmp_path / "tls", ["n1"])
    argv = [sys.executable, "-c", READS_AS_NOBODY, str(tmp_path / "tls")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert "ca.crt cannot be read: Permission denied; run this as who may read it, root say" in done.stdout, done.stderr


def test_an_interrupt_during_the_start_is_not_lost() -> None:
    argv = [sys.executable, "-c", INTERRUPTED_WHILE_LIBBPF_CALLS]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (-signal.SIGINT, "") == (done.returncode, done.stderr)
