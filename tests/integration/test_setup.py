"""What keeps a machine from being made ready is one plain sentence: tools/setup.sh where something is missing.

Each case takes away the real thing (root, bpffs, capabilities, the system call), in a process or a mount namespace of
its own; only the kernel's age is told by a `uname` of ours. Nothing is installed: every case ends before that, or on a
machine that has it all."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.tidy.sources import ROOT

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]

SETUP = str(ROOT / "tools/setup.sh")
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
NO_BPFFS = "mount -t tmpfs none /sys/fs/bpf && mount --bind /bin/false /bin/mount && exec " + SETUP + " machine"

WITHOUT_THE_SYSTEM_CALL = """
import ctypes, os, platform, struct, sys
bpf = {"x86_64": 321, "aarch64": 280}[platform.machine()]
load, equal, give = 0x20, 0x15, 0x06  # of classic BPF: the call's number; is it bpf()?; ERRNO | EPERM, or ALLOW
code = ((load, 0, 0, 0), (equal, 0, 1, bpf), (give, 0, 0, 0x00050001), (give, 0, 0, 0x7FFF0000))
text = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in code))
program = struct.pack("@HP", len(code), ctypes.addressof(text))
prctl = ctypes.CDLL(None, use_errno=True).prctl
assert 0 == prctl(22, 2, program, 0, 0), os.strerror(ctypes.get_errno())  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
os.execv(sys.argv[1], sys.argv[1:])
"""


def _says(*argv: str, path: Path | None = None) -> str:
    """The one sentence on standard error of a set-up that cannot go on."""
    env = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"} if path else None
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert 1 == done.returncode, done.stdout + done.stderr
    assert done.stderr.startswith("holdfast: cannot go on: ")
    assert 1 == done.stderr.count("\n"), done.stderr
    return done.stderr.removeprefix("holdfast: cannot go on: ").strip()


def test_who_is_not_root_is_told_so_even_where_root_was_here_before() -> None:
    assert Path(ROOT / "build").exists(), "made by root: nobody can write there"
    assert _says(*NOBODY, SETUP, "machine").startswith("this needs root (it makes network namespaces and loads BPF")


def test_a_folder_that_belongs_to_somebody_else_is_named() -> None:
    said = _says(*NOBODY, SETUP, "tools")
    assert "build/ cannot be written here by nobody; run it again with sudo, or as who owns it." == said


def test_the_demo_goes_on_without_root_where_the_python_packages_are_there() -> None:
    python = (*NOBODY, "sh", "-c", ".venv/bin/python -c ''")
    is_usable = 0 == subprocess.run(python, cwd=ROOT, capture_output=True, check=False).returncode
    argv = (*NOBODY, SETUP, "demo")
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("==> no real packets here: this needs root (it makes network namespaces")
    assert 1 == done.stdout.count("\n"), "and nothing else is asked for"
    assert (3 if is_usable else 1) == done.returncode, done.stderr
    assert is_usable == ("" == done.stderr)


def test_the_demo_goes_on_where_bpf_is_refused() -> None:
    argv = (str(ROOT / ".venv/bin/python"), "-c", WITHOUT_THE_SYSTEM_CALL, SETUP, "demo")
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert 3 == done.returncode, done.stdout + done.stderr
    assert "==> no real packets here: bpf() is refused here although we are root" in done.stdout


@pytest.mark.parametrize("release", ["5.14.21-generic", "4.19.0-26-amd64"])
def test_an_old_kernel_is_named(tmp_path: Path, release: str) -> None:
    (tmp_path / "uname").write_text(f"#!/bin/sh\necho {release}\n")
    (tmp_path / "uname").chmod(0o755)
    assert f"the kernel is {release}, and Holdfast needs 5.15 or newer." == _says(SETUP, "machine", path=tmp_path)


def test_a_root_that_may_not_make_namespaces_is_told_so() -> None:
    said = _says("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", SETUP, "machine")
    assert said.startswith("this root may not make network namespaces (a container?); run it on a machine or in a VM")


def test_a_machine_without_bpffs_is_told_so() -> None:
    said = _says("unshare", "--mount", "sh", "-c", NO_BPFFS)
    assert said.startswith("/sys/fs/bpf is not a BPF file system and cannot be mounted as one")


def test_a_bpf_call_that_is_refused_is_said() -> None:
    said = _says(str(ROOT / ".venv/bin/python"), "-c", WITHOUT_THE_SYSTEM_CALL, SETUP, "machine")
    assert "bpf() is refused here although we are root (a container, seccomp or kernel lockdown?)." == said
