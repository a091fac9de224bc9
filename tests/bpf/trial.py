"""BPF_PROG_TEST_RUN with little head room, which ``lbpod.datapath.libbpf`` has no use for.

The kernel leaves 256 bytes in front of a test's frame, of which 40 hold struct xdp_frame. Metadata is moved along with
the start of the frame, so that what it occupies is missing: the only way to see a program meet a driver without room.
"""

import ctypes as c
import os
from typing import Final

ROOM_BYTES: Final = 216
"""How far a test's frame can grow at its head."""
META_BYTES_MAX: Final = 252
_SLACK_BYTES: Final = 256


class _Opts(c.Structure):
    """struct bpf_test_run_opts of libbpf."""

    _fields_ = (
        ("sz", c.c_size_t),
        ("data_in", c.c_char_p),
        ("data_out", c.c_void_p),
        ("data_size_in", c.c_uint32),
        ("data_size_out", c.c_uint32),
        ("ctx_in", c.c_void_p),
        ("ctx_out", c.c_void_p),
        ("ctx_size_in", c.c_uint32),
        ("ctx_size_out", c.c_uint32),
        ("retval", c.c_uint32),
        ("repeat", c.c_int),
        ("duration", c.c_uint32),
        ("flags", c.c_uint32),
        ("cpu", c.c_uint32),
        ("batch_size", c.c_uint32),
    )


class _XdpMd(c.Structure):
    """struct xdp_md of linux/bpf.h."""

    _fields_ = tuple(
        (name, c.c_uint32)
        for name in ("data", "data_end", "data_meta", "ingress_ifindex", "rx_queue_index", "egress_ifindex")
    )


_LIBBPF: Final = c.CDLL("libbpf.so.1", use_errno=True)


def run_xdp(fd: int, frame: bytes, room_bytes: int) -> tuple[int, bytes]:
    """Run an XDP program on a frame that can grow by ``room_bytes`` at most: its action, and the frame as it leaves.

    room_bytes: 0..ROOM_BYTES, a multiple of 4.
    """
    meta_bytes = ROOM_BYTES - room_bytes
    assert 0 <= meta_bytes <= META_BYTES_MAX, "there is room for so much metadata"
    assert meta_bytes % 4 == 0, "metadata comes in words"
    data = bytes(meta_bytes) + frame
    out = c.create_string_buffer(len(data) + _SLACK_BYTES)
    context = _XdpMd(data=meta_bytes, data_end=len(data))
    opts = _Opts(sz=c.sizeof(_Opts), data_in=data, data_size_in=len(data), data_size_out=len(out))
    opts.data_out = c.addressof(out)
    opts.ctx_in, opts.ctx_size_in = c.addressof(context), c.sizeof(context)
    if _LIBBPF.bpf_prog_test_run_opts(fd, c.byref(opts)) != 0:
        raise OSError(c.get_errno(), f"a test run: {os.strerror(c.get_errno())}")
    return opts.retval, out.raw[meta_bytes : opts.data_size_out]
