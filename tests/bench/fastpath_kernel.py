"""The least of a loader that the bench and the verifier tests need: objects, maps, test runs, over libbpf by ctypes.

Why not lbpod.datapath: the bench links several objects by their maps (driver, references, program under test) and runs
programs by hand; the datapath makes one node's maps and never runs anything itself. Nothing is pinned here, so nothing
is left behind when the process ends.
"""

import ctypes
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

_LIB: Final = ctypes.CDLL("libbpf.so.1", use_errno=True)
BPF_MAP_TYPE_ARRAY: Final = 2
BPF_F_MMAPABLE: Final = 1 << 10
BPF_F_TEST_XDP_LIVE_FRAMES: Final = 1 << 1
ROOT: Final = Path(__file__).resolve().parents[2]


class _TestRun(ctypes.Structure):
    """struct bpf_test_run_opts of libbpf 1.x (bpf/bpf.h)."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_void_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    )


for _name, _result, _arguments in (
    ("bpf_object__open", ctypes.c_void_p, [ctypes.c_char_p]),
    ("bpf_object__load", ctypes.c_int, [ctypes.c_void_p]),
    ("bpf_object__close", None, [ctypes.c_void_p]),
    ("bpf_object__find_map_by_name", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
    ("bpf_object__find_program_by_name", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
    ("bpf_object__next_map", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]),
    ("bpf_map__name", ctypes.c_char_p, [ctypes.c_void_p]),
    ("bpf_map__fd", ctypes.c_int, [ctypes.c_void_p]),
    ("bpf_map__reuse_fd", ctypes.c_int, [ctypes.c_void_p, ctypes.c_int]),
    ("bpf_map__key_size", ctypes.c_uint32, [ctypes.c_void_p]),
    ("bpf_map__value_size", ctypes.c_uint32, [ctypes.c_void_p]),
    ("bpf_map__max_entries", ctypes.c_uint32, [ctypes.c_void_p]),
    ("bpf_program__fd", ctypes.c_int, [ctypes.c_void_p]),
    ("bpf_map_create", ctypes.c_int, [ctypes.c_int, ctypes.c_char_p] + [ctypes.c_uint32] * 3 + [ctypes.c_void_p]),
    ("bpf_map_update_elem", ctypes.c_int, [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]),
    ("bpf_map_lookup_elem", ctypes.c_int, [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]),
    ("bpf_map_delete_elem", ctypes.c_int, [ctypes.c_int, ctypes.c_void_p]),
    ("bpf_map_get_next_key", ctypes.c_int, [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]),
    ("bpf_prog_test_run_opts", ctypes.c_int, [ctypes.c_int, ctypes.c_void_p]),
):
    _function = getattr(_LIB, _name)
    _function.restype, _function.argtypes = _result, _arguments


class KernelRefusedError(Exception):
    """A call into libbpf failed; the text says which and why."""


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise KernelRefusedError(f"{what}: {os.strerror(-result if result < -1 else ctypes.get_errno())}")
    return result


class _MapCreate(ctypes.Structure):
    """struct bpf_map_create_opts of libbpf 1.x, as far as map_flags (bpf/bpf.h)."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("btf_fd", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("map_extra", ctypes.c_uint64),
        ("numa_node", ctypes.c_uint32),
        ("map_ifindex", ctypes.c_uint32),
    )


def array_create(name: str, value_bytes: int, count: int) -> int:
    """File descriptor of a new mmapable array."""
    opts = _MapCreate(sz=ctypes.sizeof(_MapCreate), map_flags=BPF_F_MMAPABLE)
    fd = _LIB.bpf_map_create(BPF_MAP_TYPE_ARRAY, name.encode(), 4, value_bytes, count, ctypes.byref(opts))
    return _checked(fd, f"map {name}")


@dataclass(frozen=True)
class Map:
    """One map of a loaded object."""

    name: str
    fd: int
    key_bytes: int
    value_bytes: int
    entries_max: int

    def put(self, key: bytes, value: bytes) -> None:
        """BPF_ANY."""
        assert len(key) == self.key_bytes, f"{self.name}: a key has {self.key_bytes} bytes"
        _checked(_LIB.bpf_map_update_elem(self.fd, key, value, 0), f"update of {self.name}")

    def get(self, key: bytes, value_bytes: int | None = None) -> bytes | None:
        """None where there is no such entry. value_bytes: of all CPUs together, for per-CPU maps."""
        buffer = ctypes.create_string_buffer(value_bytes or self.value_bytes)
        if _LIB.bpf_map_lookup_elem(self.fd, key, buffer) < 0:
            return None
        return buffer.raw

    def delete(self, key: bytes) -> None:
        """A missing key is no error."""
        _LIB.bpf_map_delete_elem(self.fd, key)

    def keys(self) -> list[bytes]:
        """All keys of a hash map, in no particular order."""
        found: list[bytes] = []
        buffer = ctypes.create_string_buffer(self.key_bytes)
        key: bytes | None = None
        while _LIB.bpf_map_get_next_key(self.fd, key, buffer) == 0 and len(found) <= self.entries_max:
            key = buffer.raw
            found.append(key)
        return found

    def rows(self, dtype: np.dtype[np.void] | type[np.generic]) -> npt.NDArray[np.generic]:
        """The array itself, mapped: what is written here is written there."""
        shape = np.dtype(dtype)
        stride = (self.value_bytes + 7) // 8 * 8
        assert shape.itemsize == stride, f"{self.name}: elements lie {stride} bytes apart"
        return map_rows(self.fd, shape, self.entries_max)


def map_rows(fd: int, dtype: np.dtype[np.void] | np.dtype[np.generic], count: int) -> npt.NDArray[np.generic]:
    """An mmapable array as NumPy array."""
    pages = (dtype.itemsize * count + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
    return np.frombuffer(mmap.mmap(fd, pages), dtype=dtype, count=count)


@dataclass(frozen=True)
class Run:
    """What a test run gave. mean_ns: per repetition, as the kernel measured it."""

    action: int
    frame: bytes
    mean_ns: int


class Object:
    """A loaded object file. maps: shared ones by name, taken over instead of being made."""

    def __init__(self, path: Path, shared: dict[str, int] | None = None) -> None:
        self._object = _LIB.bpf_object__open(str(path).encode())
        if not self._object:
            raise KernelRefusedError(f"{path} cannot be opened: {os.strerror(ctypes.get_errno())}")
        self.maps: dict[str, Map] = {}
        for found in self._maps():
            fd = (shared or {}).get(_LIB.bpf_map__name(found).decode())
            if fd is not None:
                _checked(_LIB.bpf_map__reuse_fd(found, fd), "bpf_map__reuse_fd")
        _checked(_LIB.bpf_object__load(self._object), f"{path} is refused")
        for found in self._maps():
            name = _LIB.bpf_map__name(found).decode()
            self.maps[name] = Map(
                name,
                _LIB.bpf_map__fd(found),
                _LIB.bpf_map__key_size(found),
                _LIB.bpf_map__value_size(found),
                _LIB.bpf_map__max_entries(found),
            )

    def _maps(self) -> list[int]:
        found: list[int] = []
        one = _LIB.bpf_object__next_map(self._object, None)
        while one:
            found.append(one)
            one = _LIB.bpf_object__next_map(self._object, one)
        return found

    def program(self, name: str) -> int:
        """File descriptor of a program."""
        found = _LIB.bpf_object__find_program_by_name(self._object, name.encode())
        if not found:
            raise KernelRefusedError(f"there is no program {name}")
        return _checked(_LIB.bpf_program__fd(found), f"program {name}")

    def close(self) -> None:
        """Unloads everything that nobody else holds."""
        if self._object:
            _LIB.bpf_object__close(self._object)
            self._object = None


def run(program: int, frame: bytes, repeat: int = 1, context: bytes | None = None) -> Run:
    """BPF_PROG_TEST_RUN. frame: bytes in; the frame after the last repetition comes out."""
    out = ctypes.create_string_buffer(4096)
    source = ctypes.create_string_buffer(frame, len(frame))
    opts = _TestRun(
        sz=ctypes.sizeof(_TestRun),
        data_in=ctypes.addressof(source),
        data_size_in=len(frame),
        data_out=ctypes.addressof(out),
        data_size_out=len(out),
        repeat=repeat,
    )
    if context is not None:
        held = ctypes.create_string_buffer(context, len(context))
        opts.ctx_in, opts.ctx_size_in = ctypes.addressof(held), len(context)
    _checked(_LIB.bpf_prog_test_run_opts(program, ctypes.byref(opts)), "test run")
    return Run(opts.retval, out.raw[: opts.data_size_out], opts.duration)
