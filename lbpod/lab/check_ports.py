"""The client's ports, each of which rests before it is used again, however its last connection has ended.

TCP lets the side that closes first wait for a minute (TIME_WAIT). The other side, and whoever got a reset, may use its
port again at once, and where a client is short of ports the kernel finds just those. What becomes of a five-tuple that
is used again within a second is not what this client is there to find out: a load balancer that never sees the
servers' packets cannot know that the connection before is over (``docs/distances.md``).
"""

from collections import deque
from collections.abc import Sequence
from random import Random

from lbpod.lab.limits import CHECK_PORT_REST_NS


class Ports:
    """Those that a client has. Invariant: what waits is sorted by when it may be used again."""

    def __init__(self, ports: Sequence[int], dice: Random) -> None:
        shuffled = list(ports)
        dice.shuffle(shuffled)
        self._waiting: deque[tuple[int, int]] = deque((0, port) for port in shuffled)
        self.hurried_count = 0
        """Ports that may have been used again before they had rested: there was no other, or the kernel chose."""

    def take(self, now_ns: int) -> int:
        """The one that has rested for longest; 0: all are in use, the kernel may try."""
        if not self._waiting:
            return self.kernels()
        rested_ns, port = self._waiting.popleft()
        self.hurried_count += rested_ns > now_ns
        return port

    def kernels(self) -> int:
        """One that the kernel chooses, and nobody knows how long it has rested: 0."""
        self.hurried_count += 1
        return 0

    def give_back(self, port: int, now_ns: int) -> None:
        """Its connection is over. 0: it was the kernel's."""
        if port:
            self._waiting.append((now_ns + CHECK_PORT_REST_NS, port))


def local_ports() -> range:
    """What this network namespace's kernel chooses from."""
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
        first, last = (int(number) for number in file.read().split())
    return range(first, last + 1)
