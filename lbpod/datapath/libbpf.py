"""libbpf through ctypes: the calls that this package needs, typed, and every refusal mapped once.

What this file decides: how a C call becomes a Python call, and how a refusal reads. libbpf explains a refusal on its
log callback (the verifier's last lines, the kernel's extended acknowledgement); those lines are collected per call
and end up in the one exception that is raised, ``KernelError``, beside the errno that callers decide by. What it leaves
to others: which maps and programs there are (``loader``), what is in them (``kernel``).

Why libbpf and ctypes: Debian ships libbpf.so.1, so nothing has to be compiled at install time; bcc needs LLVM at run
time and pylibbpf calls itself not ready. Why libbpf for XDP and clsact, too, and not pyroute2: its calls are plain
synchronous ones that work inside a running event loop (pyroute2's do not, since 0.9), and they pass on the kernel's own
words. libbpf 1.x counts map memory on the cgroup where the kernel can (5.11 and newer), so that RLIMIT_MEMLOCK, which a
container may not raise, plays no part. Structs of options carry their size first; libbpf takes any size that it knows.
"""

import ctypes as c
import errno as errno_names
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from lbpod.core.limits import KERNEL_LOG_BYTES_MAX, KERNEL_LOG_LINES_MAX
from lbpod.datapath.port import DatapathError

F_MMAPABLE: Final = 1 << 10
F_NO_PREALLOC: Final = 1 << 0
XDP_FLAGS_UPDATE_IF_NOEXIST: Final = 1 << 0
TC_EGRESS: Final = 2
PROGRAM_MAPS_MAX: Final = 64
"""Maps that the kernel lets a program use (MAX_USED_MAPS)."""
_TC_F_REPLACE: Final = 1
_OUT_SLACK_BYTES: Final = 512
"""Room in the output of a test run for what a program adds in front."""
_LOOPBACK_IFINDEX: Final = 1


class MapType(IntEnum):
    """enum bpf_map_type, as far as we use it."""

    HASH = 1
    ARRAY = 2
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    ARRAY_OF_MAPS = 12


class ProgramType(IntEnum):
    """enum bpf_prog_type, as far as we use it."""

    SCHED_CLS = 3
    XDP = 6
    SYSCALL = 31


class XdpFlag(IntEnum):
    """Attach modes of IFLA_XDP_FLAGS."""

    GENERIC = 1 << 1
    NATIVE = 1 << 2


class KernelError(DatapathError):
    """A BPF call failed. ``errno`` says how (callers decide by it), the text says what, why and, if known, where."""

    def __init__(self, errno: int, sentence: str) -> None:
        super().__init__(sentence)
        self.errno = errno


@dataclass(frozen=True, slots=True)
class MapInfo:
    """What the kernel says about a map."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """What the kernel says about a program."""

    type: int
    id: int
    tag: str
    name: str


@dataclass(frozen=True, slots=True)
class XdpQuery:
    """Program ids attached to an interface, 0: none."""

    native_id: int
    generic_id: int
    hardware_id: int


@dataclass(frozen=True, slots=True)
class TestRun:
    """One BPF_PROG_TEST_RUN: the program's return value, the packet afterwards, the mean time of one round."""

    retval: int
    data: bytes
    duration_ns: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Outcome of a batched call: entries done, and the errno that stopped it (0: none)."""

    count: int
    errno: int


class _MapInfo(c.Structure):
    _fields_ = (
        ("type", c.c_uint32),
        ("id", c.c_uint32),
        ("key_size", c.c_uint32),
        ("value_size", c.c_uint32),
        ("max_entries", c.c_uint32),
        ("map_flags", c.c_uint32),
        ("name", c.c_char * 16),
    )


class _ProgramInfo(c.Structure):
    _fields_ = (
        ("type", c.c_uint32),
        ("id", c.c_uint32),
        ("tag", c.c_uint8 * 8),
        ("jited_prog_len", c.c_uint32),
        ("xlated_prog_len", c.c_uint32),
        ("jited_prog_insns", c.c_uint64),
        ("xlated_prog_insns", c.c_uint64),
        ("load_time", c.c_uint64),
        ("created_by_uid", c.c_uint32),
        ("nr_map_ids", c.c_uint32),
        ("map_ids", c.c_uint64),
        ("name", c.c_char * 16),
    )


class _MapCreateOpts(c.Structure):
    _fields_ = (
        ("sz", c.c_size_t),
        ("btf_fd", c.c_uint32),
        ("btf_key_type_id", c.c_uint32),
        ("btf_value_type_id", c.c_uint32),
        ("btf_vmlinux_value_type_id", c.c_uint32),
        ("inner_map_fd", c.c_uint32),
        ("map_flags", c.c_uint32),
        ("map_extra", c.c_uint64),
        ("numa_node", c.c_uint32),
        ("map_ifindex", c.c_uint32),
    )


class _BatchOpts(c.Structure):
    _fields_ = (("sz", c.c_size_t), ("elem_flags", c.c_uint64), ("flags", c.c_uint64))


class _TestRunOpts(c.Structure):
    _fields_ = (
        ("sz", c.c_size_t),
        ("data_in", c.c_void_p),
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


class _XdpAttachOpts(c.Structure):
    _fields_ = (("sz", c.c_size_t), ("old_prog_fd", c.c_int), ("pad", c.c_int))


class _XdpQueryOpts(c.Structure):
    _fields_ = (
        ("sz", c.c_size_t),
        ("prog_id", c.c_uint32),
        ("drv_prog_id", c.c_uint32),
        ("hw_prog_id", c.c_uint32),
        ("skb_prog_id", c.c_uint32),
        ("attach_mode", c.c_uint8),
        ("pad", c.c_uint8 * 7),
    )


class _TcHook(c.Structure):
    _fields_ = (
        ("sz", c.c_size_t),
        ("ifindex", c.c_int),
        ("attach_point", c.c_int),
        ("parent", c.c_uint32),
        ("pad", c.c_uint32),
    )


class _TcOpts(c.Structure):
    _fields_ = (
        ("sz", c.c_size_t),
        ("prog_fd", c.c_int),
        ("flags", c.c_uint32),
        ("prog_id", c.c_uint32),
        ("handle", c.c_uint32),
        ("priority", c.c_uint32),
        ("pad", c.c_uint32),
    )


class _SkBuff(c.Structure):
    """The beginning of struct __sk_buff: the context of a test run of a TC program."""

    _fields_ = (("before", c.c_uint32 * 9), ("ingress_ifindex", c.c_uint32), ("ifindex", c.c_uint32))


class _XdpMd(c.Structure):
    """struct xdp_md: the context of a test run."""

    _fields_ = (
        ("data", c.c_uint32),
        ("data_end", c.c_uint32),
        ("data_meta", c.c_uint32),
        ("ingress_ifindex", c.c_uint32),
        ("rx_queue_index", c.c_uint32),
        ("egress_ifindex", c.c_uint32),
    )


_PRINT_FN = c.CFUNCTYPE(c.c_int, c.c_int, c.c_char_p, c.c_void_p)
_INT, _U32, _PTR, _STR = c.c_int, c.c_uint32, c.c_void_p, c.c_char_p

_PROTOTYPES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "libbpf_set_print": (_PTR, (_PRINT_FN,)),
    "libbpf_num_possible_cpus": (_INT, ()),
    "libbpf_version_string": (_STR, ()),
    "libbpf_probe_bpf_prog_type": (_INT, (_INT, _PTR)),
    "libbpf_probe_bpf_map_type": (_INT, (_INT, _PTR)),
    "libbpf_probe_bpf_helper": (_INT, (_INT, _INT, _PTR)),
    "bpf_object__open": (_PTR, (_STR,)),
    "bpf_object__load": (_INT, (_PTR,)),
    "bpf_object__close": (None, (_PTR,)),
    "bpf_object__next_map": (_PTR, (_PTR, _PTR)),
    "bpf_object__next_program": (_PTR, (_PTR, _PTR)),
    "bpf_map__name": (_STR, (_PTR,)),
    "bpf_map__fd": (_INT, (_PTR,)),
    "bpf_map__type": (_INT, (_PTR,)),
    "bpf_map__key_size": (_U32, (_PTR,)),
    "bpf_map__value_size": (_U32, (_PTR,)),
    "bpf_map__max_entries": (_U32, (_PTR,)),
    "bpf_map__map_flags": (_U32, (_PTR,)),
    "bpf_map__is_internal": (c.c_bool, (_PTR,)),
    "bpf_map__set_max_entries": (_INT, (_PTR, _U32)),
    "bpf_map__set_map_flags": (_INT, (_PTR, _U32)),
    "bpf_map__reuse_fd": (_INT, (_PTR, _INT)),
    "bpf_program__name": (_STR, (_PTR,)),
    "bpf_program__fd": (_INT, (_PTR,)),
    "bpf_map_create": (_INT, (_INT, _STR, _U32, _U32, _U32, _PTR)),
    "bpf_map_update_elem": (_INT, (_INT, _PTR, _PTR, c.c_uint64)),
    "bpf_map_lookup_elem": (_INT, (_INT, _PTR, _PTR)),
    "bpf_map_delete_elem": (_INT, (_INT, _PTR)),
    "bpf_map_update_batch": (_INT, (_INT, _PTR, _PTR, _PTR, _PTR)),
    "bpf_map_delete_batch": (_INT, (_INT, _PTR, _PTR, _PTR)),
    "bpf_map_lookup_batch": (_INT, (_INT, _PTR, _PTR, _PTR, _PTR, _PTR, _PTR)),
    "bpf_map_lookup_and_delete_batch": (_INT, (_INT, _PTR, _PTR, _PTR, _PTR, _PTR, _PTR)),
    "bpf_obj_pin": (_INT, (_INT, _STR)),
    "bpf_obj_get": (_INT, (_STR,)),
    "bpf_obj_get_info_by_fd": (_INT, (_INT, _PTR, _PTR)),
    "bpf_prog_get_fd_by_id": (_INT, (_U32,)),
    "bpf_prog_test_run_opts": (_INT, (_INT, _PTR)),
    "bpf_xdp_attach": (_INT, (_INT, _INT, _U32, _PTR)),
    "bpf_xdp_detach": (_INT, (_INT, _U32, _PTR)),
    "bpf_xdp_query": (_INT, (_INT, _INT, _PTR)),
    "bpf_tc_hook_create": (_INT, (_PTR,)),
    "bpf_tc_hook_destroy": (_INT, (_PTR,)),
    "bpf_tc_attach": (_INT, (_PTR, _PTR)),
    "bpf_tc_detach": (_INT, (_PTR, _PTR)),
    "bpf_tc_query": (_INT, (_PTR, _PTR)),
}


class _Library:
    """The loaded shared object, its prototypes, and the lines that it logged since the last call began."""

    def __init__(self) -> None:
        try:
            self.so = c.CDLL("libbpf.so.1", use_errno=True)
        except OSError as error:
            raise KernelError(errno_names.ENOENT, "libbpf.so.1 is missing: apt-get install libbpf1") from error
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(self.so, name)
            function.restype, function.argtypes = result, arguments
        self._vsnprintf = c.CDLL(None).vsnprintf
        self._vsnprintf.argtypes = (_PTR, c.c_size_t, _STR, _PTR)
        self.lines: deque[str] = deque(maxlen=KERNEL_LOG_LINES_MAX)
        # Kept for as long as the library may call it: for ever.
        self._print = _PRINT_FN(self._collect)
        self.so.libbpf_set_print(self._print)

    def _collect(self, level: int, text: bytes, arguments: int) -> int:
        """libbpf_print_fn_t. Level 2 is chatter. The verifier's log comes in one piece, so the end is what is kept."""
        if level < 2:
            buffer = c.create_string_buffer(KERNEL_LOG_BYTES_MAX)
            self._vsnprintf(buffer, len(buffer), text, arguments)
            self.lines.extend(line for line in buffer.value.decode(errors="replace").splitlines() if line.strip())
        return 0


@cache
def _library() -> _Library:
    return _Library()


def _call(name: str, *arguments: Any) -> Any:
    library = _library()
    library.lines.clear()
    return getattr(library.so, name)(*arguments)


def _refused(error: int, what: str) -> KernelError:
    """The exception for a negative result; chained to the OSError that Python would have raised."""
    number = abs(error)
    # libbpf's own errors (4000 and up) have no strerror; its log says what happened.
    cause = OSError(number, os.strerror(number) if number < 4000 else "libbpf refused")
    text = f"{what}: {cause.strerror}"
    if lines := [line.removeprefix("libbpf: ") for line in _library().lines]:
        text += " (" + " | ".join(lines) + ")"
    refusal = KernelError(number, text)
    refusal.__cause__ = cause
    return refusal


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise _refused(result, what)
    return result


def _address(array: npt.NDArray[np.generic] | None) -> int | None:
    """Where a contiguous array starts. The caller keeps the array alive during the call."""
    if array is None:
        return None
    assert array.flags.c_contiguous, "libbpf reads and writes contiguous memory only"
    return int(array.ctypes.data)


def version() -> str:
    """libbpf's version, as "v1.1"."""
    return cast(bytes, _call("libbpf_version_string")).decode()


@cache
def possible_cpus() -> int:
    """CPUs that per-CPU maps have values for."""
    return _checked(_call("libbpf_num_possible_cpus"), "counting the CPUs")


# --- Maps -------------------------------------------------------------------------------------------------------------


def map_create(kind: MapType, name: str, key_size: int, value_size: int, max_entries: int, flags: int) -> int:
    """A new map's file descriptor. name: at most 15 letters, digits and underscores."""
    opts = _MapCreateOpts(sz=c.sizeof(_MapCreateOpts), map_flags=flags)
    result = _call("bpf_map_create", kind, name.encode(), key_size, value_size, max_entries, c.byref(opts))
    return _checked(result, f"creating the map {name} ({max_entries} entries)")


def map_info(fd: int) -> MapInfo:
    """What the kernel says about the map behind a file descriptor."""
    info = _MapInfo()
    length = c.c_uint32(c.sizeof(info))
    _checked(_call("bpf_obj_get_info_by_fd", fd, c.byref(info), c.byref(length)), "asking about a map")
    name = info.name.decode(errors="replace")
    return MapInfo(info.type, info.id, info.key_size, info.value_size, info.max_entries, info.map_flags, name)


def map_update(fd: int, what: str, key: bytes, value: bytes) -> None:
    """Sets one entry."""
    _checked(_call("bpf_map_update_elem", fd, key, value, 0), f"writing to the map {what}")


def map_lookup(fd: int, what: str, key: bytes, value_size: int) -> bytes | None:
    """One entry, or None where there is none."""
    value = c.create_string_buffer(value_size)
    result = _call("bpf_map_lookup_elem", fd, key, value)
    if result == -errno_names.ENOENT:
        return None
    _checked(result, f"reading the map {what}")
    return value.raw


def map_delete(fd: int, what: str, key: bytes) -> bool:
    """Deletes one entry; False where there was none."""
    result = _call("bpf_map_delete_elem", fd, key)
    if result == -errno_names.ENOENT:
        return False
    _checked(result, f"deleting from the map {what}")
    return True


def map_update_batch(fd: int, keys: npt.NDArray[np.generic], values: npt.NDArray[np.generic]) -> Batch:
    """Inserts or replaces len(keys) entries in order; stops at the first refusal and says how far it came."""
    count = c.c_uint32(len(keys))
    opts = _BatchOpts(sz=c.sizeof(_BatchOpts))
    result = _call("bpf_map_update_batch", fd, _address(keys), _address(values), c.byref(count), c.byref(opts))
    return Batch(count.value, -result)


def map_delete_batch(fd: int, keys: npt.NDArray[np.generic]) -> Batch:
    """Deletes in order; stops at the first refusal (ENOENT: a missing key) and says how far it came."""
    count = c.c_uint32(len(keys))
    opts = _BatchOpts(sz=c.sizeof(_BatchOpts))
    result = _call("bpf_map_delete_batch", fd, _address(keys), c.byref(count), c.byref(opts))
    return Batch(count.value, -result)


def map_lookup_batch(
    fd: int,
    cursor: int | None,
    keys: npt.NDArray[np.generic],
    values: npt.NDArray[np.generic],
    *,
    delete: bool = False,
) -> tuple[Batch, int]:
    """Fills keys and values from where `cursor` points (None: the start), and returns where to go on.

    errno ENOENT says that the end was reached (the count is good), ENOSPC that the next bucket does not fit.
    """
    count = c.c_uint32(len(keys))
    opts = _BatchOpts(sz=c.sizeof(_BatchOpts))
    begin, end = c.c_uint32(cursor or 0), c.c_uint32(0)
    result = _call(
        "bpf_map_lookup_and_delete_batch" if delete else "bpf_map_lookup_batch",
        fd,
        None if cursor is None else c.byref(begin),
        c.byref(end),
        _address(keys),
        _address(values),
        c.byref(count),
        c.byref(opts),
    )
    return Batch(count.value, -result), end.value


# --- Pins -------------------------------------------------------------------------------------------------------------


def pin(fd: int, path: str) -> None:
    """Pins a map or program; the file must not exist."""
    _checked(_call("bpf_obj_pin", fd, path.encode()), f"pinning {path}")


def pinned(path: str) -> int | None:
    """File descriptor of a pinned map or program, or None where nothing is pinned."""
    result = _call("bpf_obj_get", path.encode())
    if result == -errno_names.ENOENT:
        return None
    return _checked(result, f"opening the pin {path}")


# --- Programs ---------------------------------------------------------------------------------------------------------


def program_info(fd: int) -> ProgramInfo:
    """What the kernel says about the program behind a file descriptor."""
    info = _ProgramInfo()
    length = c.c_uint32(c.sizeof(info))
    _checked(_call("bpf_obj_get_info_by_fd", fd, c.byref(info), c.byref(length)), "asking about a program")
    return ProgramInfo(info.type, info.id, bytes(info.tag).hex(), info.name.decode(errors="replace"))


def program_map_ids(fd: int) -> frozenset[int]:
    """Ids of the maps that the program behind a file descriptor uses."""
    room = (c.c_uint32 * PROGRAM_MAPS_MAX)()
    info = _ProgramInfo(nr_map_ids=PROGRAM_MAPS_MAX, map_ids=c.addressof(room))
    length = c.c_uint32(c.sizeof(info))
    _checked(_call("bpf_obj_get_info_by_fd", fd, c.byref(info), c.byref(length)), "asking about a program's maps")
    assert info.nr_map_ids <= PROGRAM_MAPS_MAX, "the kernel lets a program use no more maps than that"
    return frozenset(room[: info.nr_map_ids])


def program_name(program_id: int) -> str | None:
    """Name of any loaded program, or None where we may not know (that takes CAP_SYS_ADMIN)."""
    fd = _call("bpf_prog_get_fd_by_id", program_id)
    if fd < 0:
        return None
    try:
        return program_info(fd).name
    finally:
        os.close(fd)


def prog_test_run(
    fd: int, data: bytes, repeat: int = 1, ifindex: int | None = None, *, goes_back: bool = False
) -> TestRun:
    """Runs an XDP or TC program on a frame, `repeat` times in a row on the same packet.

    data: an Ethernet frame (14 bytes at least). ifindex: the interface that it came in by (XDP only); it must exist in
    this network namespace. goes_back (TC only): it came in by the interface that it leaves by, which is the loopback.
    The packet is not restored between rounds (DESIGN, section 6).
    """
    buffer = np.frombuffer(data, np.uint8)
    out = np.zeros(len(data) + _OUT_SLACK_BYTES, np.uint8)
    opts = _TestRunOpts(sz=c.sizeof(_TestRunOpts), repeat=repeat)
    opts.data_in, opts.data_size_in = _address(buffer), len(data)
    opts.data_out, opts.data_size_out = _address(out), len(out)
    context: _XdpMd | _SkBuff | None = None
    if ifindex is not None:
        context = _XdpMd(data_end=len(data), ingress_ifindex=ifindex)
    elif goes_back:
        context = _SkBuff(ingress_ifindex=_LOOPBACK_IFINDEX)
    if context is not None:
        opts.ctx_in, opts.ctx_size_in = c.addressof(context), c.sizeof(context)
    _checked(_call("bpf_prog_test_run_opts", fd, c.byref(opts)), "a test run")
    return TestRun(opts.retval, out[: opts.data_size_out].tobytes(), opts.duration)


def syscall_run(fd: int, context: npt.NDArray[np.generic]) -> int:
    """Runs a SEC("syscall") program once on a context that it may change; its return value."""
    opts = _TestRunOpts(sz=c.sizeof(_TestRunOpts))
    opts.ctx_in, opts.ctx_size_in = _address(context), context.nbytes
    _checked(_call("bpf_prog_test_run_opts", fd, c.byref(opts)), "running a syscall program")
    return int(opts.retval)


# --- Attachment -------------------------------------------------------------------------------------------------------


def xdp_query(ifindex: int) -> XdpQuery:
    """Which XDP programs sit on an interface."""
    opts = _XdpQueryOpts(sz=c.sizeof(_XdpQueryOpts))
    _checked(_call("bpf_xdp_query", ifindex, 0, c.byref(opts)), f"asking interface {ifindex} for its XDP program")
    return XdpQuery(opts.drv_prog_id, opts.skb_prog_id, opts.hw_prog_id)


def xdp_attach(ifindex: int, fd: int, mode: XdpFlag, replaces_fd: int | None) -> None:
    """Attaches; where `replaces_fd` is given, only in place of that very program (atomically), else only if none is."""
    opts = _XdpAttachOpts(sz=c.sizeof(_XdpAttachOpts), old_prog_fd=replaces_fd or 0)
    flags = int(mode) | (0 if replaces_fd else XDP_FLAGS_UPDATE_IF_NOEXIST)
    result = _call("bpf_xdp_attach", ifindex, fd, flags, c.byref(opts))
    _checked(result, f"attaching XDP ({mode.name.lower()}) to interface {ifindex}")


def xdp_detach(ifindex: int, mode: XdpFlag, expected_fd: int) -> None:
    """Detaches that very program."""
    opts = _XdpAttachOpts(sz=c.sizeof(_XdpAttachOpts), old_prog_fd=expected_fd)
    result = _call("bpf_xdp_detach", ifindex, int(mode), c.byref(opts))
    _checked(result, f"detaching XDP from interface {ifindex}")


def _hook(ifindex: int) -> _TcHook:
    return _TcHook(sz=c.sizeof(_TcHook), ifindex=ifindex, attach_point=TC_EGRESS)


def clsact_create(ifindex: int) -> bool:
    """Makes the clsact qdisc; False where it was there already."""
    result = _call("bpf_tc_hook_create", c.byref(_hook(ifindex)))
    if result == -errno_names.EEXIST:
        return False
    _checked(result, f"adding clsact to interface {ifindex}")
    return True


def clsact_destroy(ifindex: int) -> None:
    """Removes the clsact qdisc with all that is in it, whoever put it there."""
    hook = _TcHook(sz=c.sizeof(_TcHook), ifindex=ifindex, attach_point=TC_EGRESS | 1)
    _checked(_call("bpf_tc_hook_destroy", c.byref(hook)), f"removing clsact from interface {ifindex}")


def tc_query(ifindex: int, handle: int, priority: int) -> int:
    """Id of the program at this place of the egress hook, 0: none (or no clsact)."""
    opts = _TcOpts(sz=c.sizeof(_TcOpts), handle=handle, priority=priority)
    result = _call("bpf_tc_query", c.byref(_hook(ifindex)), c.byref(opts))
    if result in (-errno_names.ENOENT, -errno_names.EINVAL):
        return 0
    _checked(result, f"asking interface {ifindex} for its TC programs")
    return int(opts.prog_id)


def tc_attach(ifindex: int, fd: int, handle: int, priority: int, *, replace: bool) -> None:
    """Puts a program (direct action) at this place of the egress hook, atomically where it replaces one."""
    opts = _TcOpts(sz=c.sizeof(_TcOpts), prog_fd=fd, handle=handle, priority=priority)
    opts.flags = _TC_F_REPLACE if replace else 0
    result = _call("bpf_tc_attach", c.byref(_hook(ifindex)), c.byref(opts))
    _checked(result, f"attaching TC egress to interface {ifindex}")


def tc_detach(ifindex: int, handle: int, priority: int) -> None:
    """Removes the program at this place of the egress hook."""
    opts = _TcOpts(sz=c.sizeof(_TcOpts), handle=handle, priority=priority)
    result = _call("bpf_tc_detach", c.byref(_hook(ifindex)), c.byref(opts))
    _checked(result, f"detaching TC egress from interface {ifindex}")


# --- Probes: what does this kernel have? ------------------------------------------------------------------------------


def has_map_type(kind: MapType) -> bool:
    """True where a map of this kind can be made."""
    return bool(_call("libbpf_probe_bpf_map_type", kind, None) > 0)


def has_program_type(kind: ProgramType) -> bool:
    """True where a program of this kind can be loaded."""
    return bool(_call("libbpf_probe_bpf_prog_type", kind, None) > 0)


def has_helper(kind: ProgramType, helper: int) -> bool:
    """True where programs of this kind may call this helper (its number in enum bpf_func_id)."""
    return bool(_call("libbpf_probe_bpf_helper", kind, helper, None) > 0)


# --- Objects ----------------------------------------------------------------------------------------------------------


class BpfObject:
    """An opened object file: its maps can be sized or replaced by pinned ones, then everything is loaded at once."""

    def __init__(self, path: str) -> None:
        self._maps: dict[str, int] = {}
        self._programs: dict[str, int] = {}
        self._handle: int | None = _call("bpf_object__open", path.encode())
        if self._handle is None:
            raise _refused(c.get_errno(), f"opening {path}")
        self.path: Final = path
        for kind, names in (("map", self._maps), ("program", self._programs)):
            at: int | None = None
            while at := _call(f"bpf_object__next_{kind}", self._handle, at):
                names[_call(f"bpf_{kind}__name", at).decode()] = at

    def map_names(self) -> Sequence[str]:
        """The maps that the source declares (not .rodata and its like), sorted."""
        return sorted(name for name, at in self._maps.items() if not _call("bpf_map__is_internal", at))

    def program_names(self) -> Sequence[str]:
        """The programs, sorted."""
        return sorted(self._programs)

    def declared(self, name: str) -> MapInfo:
        """A map as the source (and `resize`) has it; id 0."""
        at = self._maps[name]
        asked = ("type", "key_size", "value_size", "max_entries", "map_flags")
        kind, key_size, value_size, max_entries, flags = (int(_call(f"bpf_map__{what}", at)) for what in asked)
        return MapInfo(kind, 0, key_size, value_size, max_entries, flags, name)

    def resize(self, name: str, max_entries: int) -> None:
        """Sets a map's size before loading."""
        if name not in self._maps:
            raise KernelError(errno_names.ENOENT, f"{self.path} has no map {name!r} to size")
        _checked(_call("bpf_map__set_max_entries", self._maps[name], max_entries), f"sizing the map {name}")

    def preallocate(self) -> None:
        """Has every map take its memory at once. Before loading."""
        for name, at in self._maps.items():
            flags = int(_call("bpf_map__map_flags", at))
            if flags & F_NO_PREALLOC:
                _checked(_call("bpf_map__set_map_flags", at, flags & ~F_NO_PREALLOC), f"preallocating the map {name}")

    def reuse(self, name: str, fd: int) -> None:
        """Has the programs use an existing map (its file descriptor is duplicated)."""
        _checked(_call("bpf_map__reuse_fd", self._maps[name], fd), f"reusing the pinned map {name}")

    def load(self) -> None:
        """Creates the maps and has the verifier look at the programs. All or nothing."""
        _checked(_call("bpf_object__load", self._handle), f"loading {self.path}")

    def map_fd(self, name: str) -> int:
        """A file descriptor of one's own for a loaded map."""
        return os.dup(_checked(_call("bpf_map__fd", self._maps[name]), f"the map {name}"))

    def program_fd(self, name: str) -> int:
        """A file descriptor of one's own for a loaded program."""
        return os.dup(_checked(_call("bpf_program__fd", self._programs[name]), f"the program {name}"))

    def close(self) -> None:
        """Frees libbpf's half. Descriptors that were handed out stay good."""
        if self._handle is not None:
            _call("bpf_object__close", self._handle)
            self._handle = None
