"""One host of the lab: a network namespace, its links, and the programs inside.

Decides how a namespace is set up (switches, offloads) and how code and programs get into it. Which hosts there are and
how they are joined is ``topology``'s business.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from lbpod.lab import kernel
from lbpod.lab.errors import LabError
from lbpod.lab.limits import PROGRAMS_MAX, RUN_SECONDS_MAX
from lbpod.lab.program import Program, spawn
from lbpod.lab.worker import Worker

BASE_SWITCHES: Final[Mapping[str, int | str]] = {
    "ipv4/conf/all/rp_filter": 0,  # direct server return: replies come from an address that is not on the path
    "ipv4/conf/default/rp_filter": 0,
    "ipv6/conf/all/disable_ipv6": 1,  # no router solicitations in the captures
    "ipv6/conf/default/disable_ipv6": 1,
}
FORWARDER_SWITCHES: Final[Mapping[str, int | str]] = {
    "ipv4/ip_forward": 1,
    "ipv4/conf/all/send_redirects": 0,
    "ipv4/conf/default/send_redirects": 0,
}

_XDP_FLAGS_DRV_MODE: Final = 1 << 2
_NO_OFFLOADS: Final = {kernel.ETHTOOL_STSO: 0, kernel.ETHTOOL_SGSO: 0, kernel.ETHTOOL_STXCSUM: 0}


class Run:
    """What all hosts of one lab share: prefix, worker thread, folders and the list of programs."""

    def __init__(self, prefix: str, worker: Worker, log_dir: Path) -> None:
        self.prefix = prefix
        self.worker = worker
        self.log_dir = log_dir
        self.programs: list[Program] = []  # len <= PROGRAMS_MAX; only the worker appends and prunes
        self._lock = threading.Lock()
        self._sequence = 0

    def next_log(self, host: str, name: str) -> Path:
        with self._lock:
            self._sequence += 1
            return self.log_dir / f"{self._sequence:03d}-{host}-{name}.log"

    def track(self, program: Program) -> None:
        self.programs = [one for one in self.programs if one.alive]
        if len(self.programs) >= PROGRAMS_MAX:
            program.kill()
            raise LabError(f"{PROGRAMS_MAX} programs run in this lab already; stop some")
        self.programs.append(program)


class Host:
    """A network namespace with a name.

    ``netns_fd`` is valid between :meth:`create` and :meth:`discard`, which only the worker calls.
    """

    def __init__(self, run: Run, name: str) -> None:
        self.run_context = run
        self.name = name
        self.netns = f"{run.prefix}-{name}"
        self.netns_fd = -1

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def create(self, switches: Mapping[str, int | str]) -> None:
        """Make the namespace with ``net.*`` switches set and ``lo`` up. Worker only."""
        self.netns_fd = kernel.netns_create(self.netns)
        self.set_switches({**BASE_SWITCHES, **switches})
        with self.netlink() as ip:
            ip.link("set", index=1, state="up")

    def discard(self) -> None:
        """Forget the namespace; the kernel frees it with its links. Worker only."""
        if self.netns_fd >= 0:
            kernel.netns_remove(self.netns)
            self.close()

    def close(self) -> None:
        """Close the descriptor of the namespace, which otherwise keeps it alive. Worker only."""
        if self.netns_fd >= 0:
            os.close(self.netns_fd)
            self.netns_fd = -1

    @contextmanager
    def in_netns(self) -> Iterator[None]:
        """The calling *thread* is inside this host until the block ends.

        Sockets made here stay in the host for ever and may be used anywhere afterwards. Never ``await`` in the block.
        """
        if self.netns_fd < 0:
            raise LabError(f"{self.name} does not exist any more (or not yet)")
        with kernel.inside(self.netns_fd):
            yield

    @contextmanager
    def netlink(self) -> Iterator[Any]:
        """An ``IPRoute`` inside this host, for the length of the block. Worker only: see ``worker`` for the reason."""
        with self.in_netns():
            ip = IPRoute()
        try:
            yield ip
        except NetlinkError as error:
            raise LabError(f"{self.name}: the kernel refuses a change of links or routes: {error}") from error
        finally:
            ip.close()

    def set_switches(self, switches: Mapping[str, int | str]) -> None:
        """Write ``/proc/sys/net`` switches of this host; ones that this kernel lacks are left out (IPv6, ECMP seed)."""
        with self.in_netns():
            for name, value in switches.items():
                with suppress(FileNotFoundError):
                    Path("/proc/sys/net", name).write_text(str(value))

    def switch(self, name: str) -> int:
        """Value of a ``/proc/sys/net`` switch of this host."""
        with self.in_netns():
            return int(Path("/proc/sys/net", name).read_text())

    def set_offloads(self, interface: str, *, gro: bool) -> None:
        """No segmentation and no checksum offload; GRO as asked (it is what lets XDP_REDIRECT deliver to a veth)."""
        with self.in_netns():
            kernel.ethtool_set(interface, {**_NO_OFFLOADS, kernel.ETHTOOL_SGRO: int(gro)})

    def attach_xdp(self, interface: str, program_fd: int) -> None:
        """Attach a loaded XDP program in native mode, replacing whatever is there. Worker only."""
        xdp = {"attrs": [["IFLA_XDP_FD", program_fd], ["IFLA_XDP_FLAGS", _XDP_FLAGS_DRV_MODE]]}
        with self.netlink() as ip:
            ip.link("set", index=index_of(ip, interface), xdp=xdp)

    def mac(self, interface: str = "eth0") -> str:
        """Link address of an interface, ``02:...``."""

        def job() -> str:
            with self.netlink() as ip:
                index = index_of(ip, interface)
                return str(ip.link("get", index=index)[0].get_attr("IFLA_ADDRESS"))

        return self.run_context.worker.call(job)

    def popen(
        self,
        argv: Sequence[str | Path],
        *,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[str] | None = None,
        stdout: int | IO[str] | None = None,
        stderr: int | IO[str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Program:
        """Start a program inside this host; it ends with the lab at the latest.

        Streams left ``None``: no input, output and errors to a log file of its own (``Program.log``).
        """
        label = name or Path(argv[0]).name
        run = self.run_context
        log = run.next_log(self.name, label) if stdout is None or stderr is None else None

        def job() -> Program:
            with self.in_netns():
                process = spawn(argv, log=log, stdin=stdin, stdout=stdout, stderr=stderr, env=env, pass_fds=pass_fds)
            program = Program(label, self.name, process, log)
            run.track(program)
            return program

        return run.worker.call(job)

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        timeout_s: float = 30,
        check: bool = True,
        input_text: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a short command to its end and return its output as text.

        ``LabError`` after ``timeout_s`` (it is killed), and, with ``check``, on an exit status other than 0.
        """
        assert 0 < timeout_s <= RUN_SECONDS_MAX, f"a command may take {RUN_SECONDS_MAX} s at most"
        pipe = subprocess.PIPE
        program = self.popen(argv, env=env, stdin=None if input_text is None else pipe, stdout=pipe, stderr=pipe)
        try:
            out, err = program.process.communicate(input_text, timeout_s)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{program.name} in {self.name} took longer than {timeout_s} s and was killed") from error
        finally:
            program.kill()
        status = program.process.returncode
        if check and status != 0:
            raise LabError(f"{program.name} in {self.name} ended with {status}: {(err or out).strip()[-500:]}")
        return subprocess.CompletedProcess([str(part) for part in argv], status, out, err)

    def programs(self) -> list[Program]:
        """Programs that still run in this host."""
        return [one for one in self.run_context.programs if one.host == self.name and one.alive]


def index_of(ip: Any, interface: str) -> int:
    found = ip.link_lookup(ifname=interface)
    if not found:
        raise LabError(f"there is no interface {interface}")
    return int(found[0])


def join(left: Host, left_name: str, right: Host, right_name: str, *, mtu: int, gro: tuple[bool, bool]) -> None:
    """A veth pair between two hosts, both ends up, without offloads; GRO as given for (left, right). Worker only."""
    with left.netlink() as ip:
        peer = {"ifname": right_name, "mtu": mtu, "net_ns_fd": right.netns_fd}
        ip.link("add", ifname=left_name, kind="veth", mtu=mtu, peer=peer)
        left.set_offloads(left_name, gro=gro[0])
        right.set_offloads(right_name, gro=gro[1])
        ip.link("set", index=index_of(ip, left_name), state="up")
    with right.netlink() as ip:
        ip.link("set", index=index_of(ip, right_name), state="up")
