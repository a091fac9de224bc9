"""Two network namespaces and a wire between them, for the tests of attaching; made and removed by the test itself.

Not the lab: these tests look at one interface, and the lab stands on what they test. A network namespace belongs to a
thread, so work inside one is done by a thread that enters it and ends there.
"""

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import pytest

_CLONE_NEWNET: Final = 0x40000000
_LIBC: Final = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


def need_namespaces() -> None:
    """Skips, for a stated reason only, where a test cannot make namespaces or load programs."""
    if os.geteuid() != 0:
        pytest.skip("missing feature: root (network namespaces and BPF programs)")


def command(line: str) -> str:
    """Runs a command; its output."""
    return subprocess.run(line.split(), check=True, capture_output=True, text=True, timeout=10).stdout


@dataclass(frozen=True)
class Space:
    """One network namespace."""

    name: str

    def ip(self, line: str) -> str:
        """`ip` in this namespace."""
        return command(f"ip -n {self.name} {line}")

    def run(self, work: Callable[[], T]) -> T:
        """Does some work in this namespace, in a thread of its own; returns or raises what it does."""
        done: list[T] = []
        failed: list[BaseException] = []

        def body() -> None:
            try:
                fd = os.open(f"/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if _LIBC.setns(fd, _CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), f"cannot enter {self.name}")
                finally:
                    os.close(fd)
                done.append(work())
            except BaseException as error:  # noqa: BLE001 - handed to the thread that asked
                failed.append(error)

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        thread.join(120)
        assert not thread.is_alive(), f"work in {self.name} did not end"
        if failed:
            raise failed[0]
        return done[0]


@contextmanager
def wire(mtu: int = 1_500) -> Iterator[tuple[Space, Space]]:
    """Two namespaces, `here` with 10.99.0.1/24 on hfa0 and `there` with 10.99.0.2/24 on hfb0, joined by a veth pair."""
    tag = f"hfat{os.getpid() % 100_000}"
    here, there = Space(f"{tag}a"), Space(f"{tag}b")
    try:
        for each in (here, there):
            command(f"ip netns add {each.name}")
            each.ip("link set lo up")
        here.ip(f"link add hfa0 mtu {mtu} type veth peer name hfb0 mtu {mtu} netns {there.name}")
        for each, device, address in ((here, "hfa0", "10.99.0.1/24"), (there, "hfb0", "10.99.0.2/24")):
            each.ip(f"addr add {address} dev {device}")
            each.ip(f"link set {device} up")
            each.run(lambda device=device: _quiet(device))  # type: ignore[misc]
        yield here, there
    finally:
        for each in (here, there):
            if Path(f"/run/netns/{each.name}").exists():
                command(f"ip netns del {each.name}")


def _quiet(device: str) -> None:
    """No reverse path filter (the tests use addresses that are not routed), no IPv6 chatter."""
    settings = {
        "ipv4/conf/all/rp_filter": "0",
        f"ipv4/conf/{device}/rp_filter": "0",
        f"ipv6/conf/{device}/disable_ipv6": "1",
    }
    for name, value in settings.items():
        path = Path("/proc/sys/net") / name
        if path.exists():
            path.write_text(value)
