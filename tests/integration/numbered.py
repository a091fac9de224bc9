"""Numbered datagrams at a steady rate, and a ledger in which every single one is accounted for at both ends.

Why not the lab's checking client: it counts connections and requests, and TCP would send again what was lost. Here the
number in a datagram is its place in the ledger: the client notes when it sent it, an XDP program on the pod's own
interface how often it came, when and to which pod, the client how often the answer came. What is lost, doubled or went
to another pod is then a question to arrays.

Neither end may lose anything by itself. A server in user space did: on a busy machine it was not given the time to take
what came, and its socket dropped hundreds of thousands of datagrams that the network had delivered. So the pod's end
counts (and answers) in soft interrupt, and the client runs before everybody else on its CPU; where it was held up all
the same, it does not make up for it in one burst.

The client is a program, started in a host of a lab: ``python -m tests.integration.numbered --ledger FOLDER ...``.
"""

import argparse
import ipaddress
import os
import select
import signal
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from lbpod.datapath import libbpf
from lbpod.datapath.attach import interface_index
from lbpod.datapath.libbpf import BpfObject, XdpFlag
from lbpod.datapath.mapped import MappedArray
from lbpod.lab import Pod

PORT: Final = 8080
NUMBERS: Final = 8_388_608
"""Places in the ledger, used again and again: seven minutes at full rate."""
ANSWER_EVERY: Final = 3
"""The three of numbered.bpf.c."""
NOTED: Final = np.dtype([("came_ns", "<u8"), ("pod", "u1", (4,)), ("count", "<u4")])

RATE: Final = 20_000
FLOWS: Final = 256
"""Flows that never end: a number's is its remainder."""
SHORT_EVERY: Final = 61
"""Every so many datagrams, one is from a flow that has been silent for long: to a tracking slot it is a new one."""
SHORT_FLOWS: Final = 4_096
"""Sockets for those, used in turn: at full rate each is silent for 12 s."""
PAYLOAD: Final = struct.Struct("<Q24x")

_FLOW_ROOM_BYTES: Final = 1 << 20
_SO_RCVBUFFORCE: Final = 33
_BEHIND_MAX_S: Final = 0.005
"""How much of a delay is made up for. 100 datagrams at once still fit into a veth's ring of 256."""
_PAUSE_S: Final = 0.0005
_READY_MAX: Final = 64
_AT_ONCE: Final = 32


def _file(folder: Path, name: str, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    path = folder / name
    with path.open("ab") as file:
        if file.tell() == 0:
            file.truncate(count * dtype.itemsize)
    return np.memmap(path, dtype, "r+", shape=(count,))


class Sent:
    """The client's half of the ledger, shared with it through files."""

    def __init__(self, folder: Path) -> None:
        self.at_ns: Final = _file(folder, "sent", np.dtype(np.int64), NUMBERS)
        """When each was sent."""
        self.answers: Final = _file(folder, "answers", np.dtype(np.uint8), NUMBERS)
        """How many answers came to each."""
        self.totals: Final = _file(folder, "totals", np.dtype(np.int64), 2)
        """[datagrams sent, errors that the kernel told the client]"""


# --- The client ---------------------------------------------------------------------------------------------------


def _connected(target: tuple[str, int]) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _FLOW_ROOM_BYTES)
    sock.connect(target)
    sock.setblocking(False)
    return sock


class Client:
    """Sends numbers until it is told to stop, and reads the answers in between."""

    def __init__(self, sent: Sent, target: tuple[str, int]) -> None:
        self._sent = sent
        self._lasting = [_connected(target) for _ in range(FLOWS)]
        self._short = [_connected(target) for _ in range(SHORT_FLOWS)]
        self._poll = select.epoll()
        self._sockets = {sock.fileno(): sock for sock in [*self._lasting, *self._short]}
        for fd in self._sockets:
            self._poll.register(fd, select.EPOLLIN)
        self._number = 0
        self.stopping = False

    def run(self, rate: int) -> None:
        began = time.monotonic()
        while not self.stopping:
            behind = int((time.monotonic() - began) * rate) - self._number
            if behind > rate * _BEHIND_MAX_S:
                began += behind / rate - _BEHIND_MAX_S
            elif behind > 0:
                for _ in range(behind):
                    self._send()
                self._sent.totals[0] = self._number
            elif not self._read():
                time.sleep(_PAUSE_S)

    def _send(self) -> None:
        number = self._number
        if number % SHORT_EVERY == SHORT_EVERY - 1:
            sock = self._short[number // SHORT_EVERY % SHORT_FLOWS]
        else:
            sock = self._lasting[number % FLOWS]
        self._sent.at_ns[number % NUMBERS] = time.monotonic_ns()
        while True:
            try:
                sock.send(PAYLOAD.pack(number))
                break
            except OSError:  # an ICMP error for an earlier one, told instead of sending this one
                self._sent.totals[1] += 1
        self._number = number + 1

    def _read(self) -> bool:
        ready = self._poll.poll(0, _READY_MAX)
        for fd, _ in ready:
            sock = self._sockets[fd]
            with suppress(BlockingIOError):
                for _ in range(_AT_ONCE):
                    try:
                        self._sent.answers[PAYLOAD.unpack(sock.recv(100))[0] % NUMBERS] += 1
                    except ConnectionError:
                        self._sent.totals[1] += 1
        return bool(ready)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    with suppress(PermissionError):  # then it needs a machine that has nothing else to do
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    client = Client(Sent(options.ledger), (options.address, options.port))

    def stop(*_: object) -> None:
        client.stopping = True

    signal.signal(signal.SIGTERM, stop)
    client.run(RATE)


# --- The ledger -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Account:
    """What became of the datagrams first <= number < first + sent."""

    sent: int
    lost: npt.NDArray[np.int64]
    doubled: npt.NDArray[np.int64]
    """Numbers that came, or were answered, more than once."""
    unanswered: npt.NDArray[np.int64]
    """Numbers that came, should have been answered, and whose answer did not come."""
    pods: dict[str, int]
    seconds: float
    gap_ms: float
    """The longest time in which none came to any pod."""
    sent_gap_ms: float
    """The longest time in which the client sent none."""
    way_ms: float
    """The longest time from the client to a pod."""

    @property
    def is_whole(self) -> bool:
        """Each came once, and each answer that was sent."""
        return not (len(self.lost) or len(self.doubled) or len(self.unanswered))

    def __str__(self) -> str:
        return (
            f"{self.sent:7d} sent at {self.sent / self.seconds:5.0f}/s, {len(self.lost)} lost, {len(self.doubled)}"
            f" doubled, {len(self.unanswered)} answers lost; longest gap at the pods {self.gap_ms:.1f} ms (client's own"
            f" {self.sent_gap_ms:.1f} ms), longest way {self.way_ms:.1f} ms"
        )


class Ledger:
    """Both halves of the ledger, and the program that notes what comes to pods.

    Every number is in exactly one account, in order: what is accounted for is cleared, and its places are used again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder: Final = folder
        self.sent: Final = Sent(folder)
        self._object: Final = BpfObject(str(Path(__file__).with_name("numbered.bpf.o")))
        self._object.load()
        self._noted: Final = MappedArray("noted", self._object.map_fd("noted"), NOTED, NUMBERS)
        self._accounted = 0
        self.pods_of_flow: Final[dict[int, set[str]]] = {}
        """Where the datagrams of each lasting flow have come, over all accounts."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._noted.close()
        self._object.close()

    def watch(self, pod: Pod) -> None:
        """Notes (and answers) what comes to this pod from now on; its own server sees none of it."""
        with pod.in_netns():
            libbpf.xdp_attach(interface_index("eth0"), self._object.program_fd("note"), XdpFlag.GENERIC, None)

    def sent_count(self) -> int:
        """Datagrams sent so far."""
        return int(self.sent.totals[0])

    def _missing(self, numbers: npt.NDArray[np.int64]) -> bool:
        due = numbers[numbers % ANSWER_EVERY == 0]
        came = self._noted.values["count"][numbers % NUMBERS] > 0
        return not came.all() or not (self.sent.answers[due % NUMBERS] > 0).all()

    def account(self, wait_s: float) -> Account:
        """Everything sent since the last account; waits until it has come, `wait_s` at most."""
        numbers = np.arange(self._accounted, self.sent_count())
        assert 0 < len(numbers) < NUMBERS * 7 // 8, "an account in time: places are used again"
        deadline = time.monotonic() + wait_s
        while self._missing(numbers) and time.monotonic() < deadline:
            time.sleep(0.1)
        places = numbers % NUMBERS
        noted: npt.NDArray[Any] = self._noted.values[places].copy()
        sent_ns, answers = self.sent.at_ns[places].copy(), self.sent.answers[places].copy()
        self._noted.values[places] = np.zeros((), NOTED)
        self.sent.answers[places] = 0
        self._accounted += len(numbers)
        came = noted["count"] > 0
        pods = noted["pod"].copy().view(">u4")[:, 0]
        self._learn(numbers[came], pods[came])
        came_ns = noted["came_ns"][came].astype(np.int64)
        return Account(
            sent=len(numbers),
            lost=numbers[~came],
            doubled=numbers[(noted["count"] > 1) | (answers > 1)],
            unanswered=numbers[came & (numbers % ANSWER_EVERY == 0) & (answers == 0)],
            pods={
                _text(pod): int(count) for pod, count in zip(*np.unique(pods[came], return_counts=True), strict=True)
            },
            seconds=float(sent_ns[-1] - sent_ns[0]) / 1e9,
            gap_ms=float(np.diff(np.sort(came_ns)).max(initial=0)) / 1e6,
            sent_gap_ms=float(np.diff(sent_ns).max(initial=0)) / 1e6,
            way_ms=float((came_ns - sent_ns[came]).max(initial=0)) / 1e6,
        )

    def _learn(self, numbers: npt.NDArray[np.int64], pods: npt.NDArray[np.uint32]) -> None:
        lasting = numbers % SHORT_EVERY != SHORT_EVERY - 1
        pairs = np.unique(np.stack([numbers[lasting] % FLOWS, pods[lasting].astype(np.int64)]), axis=1)
        for flow, pod in pairs.T.tolist():
            self.pods_of_flow.setdefault(flow, set()).add(_text(pod))


def _text(pod: int) -> str:
    return str(ipaddress.IPv4Address(int(pod)))


if __name__ == "__main__":
    main()
