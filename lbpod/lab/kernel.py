"""The few system calls that Python lacks: namespaces, mounts, ethtool, one tiny XDP program.

Why by hand: spawning ``ip``, ``ethtool``, ``nsenter`` costs a process each (a topology needs hundreds of such steps, on
two busy cores), and pyroute2 opens one socket per *thread*, in whatever namespace that thread happens to be, so the
caller must own the namespace question anyway. Everything here acts on the calling thread only.

The XDP program is two instructions (``r0 = action; exit``) given to the kernel as bytes: no compiler and no libbpf at
run time. A C file was tried first; it gave the same two instructions.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lbpod.lab.errors import LabError

CLONE_NEWNET: Final = 0x40000000
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_SHARED: Final = 1 << 20
MNT_DETACH: Final = 2
BPF_FS_MAGIC: Final = 0xCAFE4A11

NETNS_DIR: Final = Path("/run/netns")
BPFFS_DIR: Final = Path("/sys/fs/bpf")

_SIOCETHTOOL: Final = 0x8946
ETHTOOL_STXCSUM: Final = 0x17
ETHTOOL_STSO: Final = 0x1F
ETHTOOL_SGSO: Final = 0x24
ETHTOOL_SGRO: Final = 0x2C

XDP_DROP: Final = 1
XDP_PASS: Final = 2
XDP_TX: Final = 3

_BPF_PROG_LOAD: Final = 5
_BPF_PROG_TYPE_XDP: Final = 6
_SYS_BPF: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def setns(fd: int) -> None:
    """Move the calling thread into the network namespace behind ``fd``."""
    _check(_libc.setns(fd, CLONE_NEWNET), "setns")


def own_netns() -> int:
    """A descriptor of the calling thread's network namespace; the caller closes it."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def inside(fd: int) -> Iterator[None]:
    """The calling thread is inside the namespace ``fd`` until the block ends. Never ``await`` in the block."""
    back = own_netns()
    try:
        setns(fd)
        try:
            yield
        finally:
            setns(back)  # a failure here must be loud: the thread would go on in a foreign namespace
    finally:
        os.close(back)


def _prepare_netns_dir() -> None:
    """As iproute2 does: a shared mount, so that an unmount reaches every mount namespace."""
    NETNS_DIR.mkdir(mode=0o755, parents=True, exist_ok=True)
    where = str(NETNS_DIR).encode()
    if _libc.mount(b"", where, b"none", MS_SHARED | MS_REC, None) < 0:
        if ctypes.get_errno() != errno.EINVAL:
            _check(-1, f"make {NETNS_DIR} shared")
        _check(_libc.mount(where, where, b"none", MS_BIND | MS_REC, None), f"bind {NETNS_DIR}")
        _check(_libc.mount(b"", where, b"none", MS_SHARED | MS_REC, None), f"make {NETNS_DIR} shared")


def netns_create(name: str) -> int:
    """Make the network namespace ``name`` (as ``ip netns add``) and return a descriptor of it; the caller closes it."""
    _prepare_netns_dir()
    path = NETNS_DIR / name
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    back = own_netns()
    try:
        _check(_libc.unshare(CLONE_NEWNET), "unshare")
        try:
            bind = _libc.mount(b"/proc/thread-self/ns/net", str(path).encode(), b"none", MS_BIND, None)
            _check(bind, f"bind {path}")
            return own_netns()
        finally:
            setns(back)
    except OSError as error:
        netns_remove(name)
        raise LabError(f"cannot make network namespace {name}: {error}; run as root on a kernel with NET_NS") from error
    finally:
        os.close(back)


def netns_remove(name: str) -> None:
    """Take the name of a namespace away; the kernel frees it when no process and no descriptor uses it any more."""
    path = NETNS_DIR / name
    if _libc.umount2(str(path).encode(), MNT_DETACH) < 0 and ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
        _check(-1, f"unmount {path}")
    path.unlink(missing_ok=True)


def bpffs_mount() -> None:
    """Mount bpffs at /sys/fs/bpf where the machine has not; it stays, as systemd would have left it."""
    if _is_bpffs():
        return
    if not BPFFS_DIR.is_dir():
        raise LabError(f"{BPFFS_DIR} is missing: this kernel was built without BPF, use another one")
    if _libc.mount(b"bpf", str(BPFFS_DIR).encode(), b"bpf", 0, b"mode=0700") < 0:
        code = ctypes.get_errno()
        raise LabError(f"cannot mount bpffs at {BPFFS_DIR}: {os.strerror(code)}; run as root with CAP_SYS_ADMIN")


def _is_bpffs() -> bool:
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(str(BPFFS_DIR).encode(), buffer) < 0:
        return False
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF == BPF_FS_MAGIC


def ethtool_set(interface: str, settings: dict[int, int]) -> None:
    """Legacy ethtool switches (``{ETHTOOL_SGRO: 1, ...}``) of an interface in the calling thread's namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for command, value in settings.items():
            wanted = ctypes.create_string_buffer(struct.pack("=II", command, value))
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(wanted)).ljust(40, b"\0")
            fcntl.ioctl(control, _SIOCETHTOOL, request)


def xdp_return_load(action: int, name: str) -> int:
    """Load an XDP program that does ``action`` with every frame; returns its descriptor, which the caller closes.

    ``name`` (15 characters at most) is what ``bpftool prog`` shows.
    """
    number = _SYS_BPF.get(platform.machine())
    if number is None:
        raise LabError(f"the lab does not know the number of bpf(2) on {platform.machine()}; add it to kernel.py")
    instructions = ctypes.create_string_buffer(struct.pack("=BBhiBBhi", 0xB7, 0, 0, action, 0x95, 0, 0, 0), 16)
    licence = ctypes.create_string_buffer(b"Dual BSD/GPL")
    head = struct.pack("=IIQQ", _BPF_PROG_TYPE_XDP, 2, ctypes.addressof(instructions), ctypes.addressof(licence))
    attributes = head + struct.pack("=IIQII16s", 0, 0, 0, 0, 0, name.encode()[:15])
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    long = ctypes.c_long
    fd = int(_libc.syscall(long(number), long(_BPF_PROG_LOAD), buffer, long(len(attributes))))
    if fd < 0:
        code = ctypes.get_errno()
        raise LabError(f"the kernel refuses an XDP program: {os.strerror(code)}; run as root on a kernel with BPF")
    os.set_inheritable(fd, False)
    return fd
