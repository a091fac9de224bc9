"""A bounded packet capture on one interface of a host: frames for tests, a pcap file for people.

AF_PACKET in a thread of its own. What to know before believing a capture on veth:

- A frame that native XDP takes (drops, sends back, redirects) is not seen on that interface; look at the other end.
- Attaching native XDP to a veth turns GRO on there. A *received* frame may then be several joined by GRO: longer than
  the MTU, and ``checksum_pending`` (the kernel will make the checksum again when it splits it). What XDP itself saw is
  what the other end *sent*: judge checksums by outgoing frames. An outgoing frame of the lab must never be pending.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from lbpod.lab.errors import LabError
from lbpod.lab.host import Host
from lbpod.lab.limits import CAPTURE_BYTES_MAX, CAPTURE_FRAME_BYTES, CAPTURE_FRAMES_MAX, POLL_NS, SECOND_NS

_ETH_P_ALL: Final = 3
_SOL_PACKET: Final = 263
_PACKET_STATISTICS: Final = 6
_PACKET_AUXDATA: Final = 8
_TP_STATUS_CSUMNOTREADY: Final = 1 << 3
_SO_RCVBUFFORCE: Final = 33
_SO_TIMESTAMPNS: Final = 35
_PACKET_OUTGOING: Final = 4
_RECEIVE_BUFFER_BYTES: Final = 32 * 1024 * 1024


@dataclass(frozen=True)
class Frame:
    time_ns: int
    """Since 1970, the kernel's stamp."""
    outgoing: bool
    """Sent by the host (else received by it)."""
    checksum_pending: bool
    data: bytes
    """From the Ethernet header on."""


class Capture:
    """``with Capture(node, "eth0") as capture: ...``, then ``capture.frames``.

    ``keep`` chooses frames (default: all). Stops keeping at ``frames_max`` or 64 MiB and counts in ``dropped`` what
    came later and what the kernel dropped. ``frames`` may be read while it runs: it only grows.
    """

    def __init__(
        self,
        host: Host,
        interface: str = "eth0",
        *,
        keep: Callable[[bytes], bool] | None = None,
        frames_max: int = CAPTURE_FRAMES_MAX,
    ) -> None:
        self.host = host
        self.interface = interface
        self.frames: list[Frame] = []  # len <= frames_max; sum of len(data) <= CAPTURE_BYTES_MAX
        self.dropped = 0
        self._keep = keep
        self._frames_max = frames_max
        self._bytes = 0
        self._thread: threading.Thread | None = None
        self._wake_read = self._wake_write = -1

    def __enter__(self) -> Self:
        try:
            with self.host.in_netns():
                packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # 0: nothing before the bind
                packets.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)
                packets.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
                packets.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
                packets.bind((self.interface, _ETH_P_ALL))
        except OSError as error:
            raise LabError(f"cannot capture on {self.interface} of {self.host.name}: {error}") from error
        self._wake_read, self._wake_write = os.pipe()
        name = f"capture-{self.host.name}-{self.interface}"
        self._thread = threading.Thread(target=self._run, args=(packets,), name=name, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._wake_write)
        assert self._thread is not None
        self._thread.join()
        os.close(self._wake_read)

    def wait_for(self, wanted: Callable[[bytes], bool], *, count: int = 1, seconds: float = 5) -> list[Frame]:
        """The frames that are ``wanted``, once there are ``count`` of them; ``LabError`` after ``seconds``."""
        deadline_ns = time.monotonic_ns() + int(seconds * SECOND_NS)
        while True:
            found = [frame for frame in self.frames if wanted(frame.data)]
            if len(found) >= count:
                return found
            if time.monotonic_ns() > deadline_ns:
                where = f"{self.interface} of {self.host.name}"
                raise LabError(f"{len(found)} of {count} frames wanted were seen on {where} in {seconds} s")
            time.sleep(POLL_NS / SECOND_NS)

    def write_pcap(self, path: Path) -> None:
        """Write the frames for tcpdump or wireshark (classic pcap, nanoseconds)."""
        with path.open("wb") as file:
            file.write(struct.pack("=IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, CAPTURE_FRAME_BYTES, 1))
            for frame in list(self.frames):
                size = len(frame.data)
                file.write(struct.pack("=IIII", frame.time_ns // SECOND_NS, frame.time_ns % SECOND_NS, size, size))
                file.write(frame.data)

    def _run(self, packets: socket.socket) -> None:
        """Until woken; then takes what is still in the socket, so that nothing seen before the end is missing."""
        packets.setblocking(False)
        with packets:
            poll = select.poll()
            poll.register(packets, select.POLLIN)
            poll.register(self._wake_read, select.POLLIN | select.POLLHUP)
            woken = False
            while not woken:
                woken = any(fd == self._wake_read for fd, _ in poll.poll())
                self._drain(packets)
            statistics = packets.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
            self.dropped += int(struct.unpack("=II", statistics)[1])

    def _drain(self, packets: socket.socket) -> None:
        for _ in range(self._frames_max):  # bounded, so that a flood cannot keep us from ending
            try:
                data, control, _, address = packets.recvmsg(CAPTURE_FRAME_BYTES, 256)
            except BlockingIOError:
                return
            except OSError:
                return  # the interface is gone: so is what it could show
            self._take(data, control, outgoing=address[2] == _PACKET_OUTGOING)

    def _take(self, data: bytes, control: list[tuple[int, int, bytes]], *, outgoing: bool) -> None:
        time_ns = status = 0
        for level, kind, value in control:
            if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
                seconds, nanoseconds = struct.unpack("=qq", value[:16])
                time_ns = seconds * SECOND_NS + nanoseconds
            elif level == _SOL_PACKET and kind == _PACKET_AUXDATA:
                status = int.from_bytes(value[:4], sys.byteorder)
        if self._keep is not None and not self._keep(data):
            return
        if len(self.frames) >= self._frames_max or self._bytes + len(data) > CAPTURE_BYTES_MAX:
            self.dropped += 1
            return
        self._bytes += len(data)
        self.frames.append(Frame(time_ns, outgoing, bool(status & _TP_STATUS_CSUMNOTREADY), data))
