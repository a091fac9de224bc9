"""Kernel arrays as NumPy arrays: BPF_F_MMAPABLE maps, mapped into this process and written in place.

Why not the mmap module: it keeps a file descriptor for every mapping, though the mapping itself holds the map.
Stores are single aligned 64-bit words (NumPy's fancy indexing moves
element by element), so the fast path sees each word either old or new. memcpy of a whole table was no faster where
it matters (65,536 words take some 100 us) and promises nothing about words.

An array map gives every value a multiple of eight bytes: a map of u32 has gaps, and `values` strides over them.
"""

import ctypes
import mmap
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lbpod.datapath.port import DatapathError

_WORD: Final = 8
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


class MappedArray:
    """One mapped array map. No view of it may outlive `close`; this package hands out copies only."""

    def __init__(self, name: str, fd: int, dtype: np.dtype[Any], count: int) -> None:
        self.name: Final = name
        self.count: Final = count
        stride = -(-dtype.itemsize // _WORD) * _WORD
        self._length = -(-stride * count // mmap.PAGESIZE) * mmap.PAGESIZE
        address = _LIBC.mmap(None, self._length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if address is None or address == _MAP_FAILED:
            error = OSError(ctypes.get_errno(), "mmap")
            raise DatapathError(f"cannot map the array {name} into memory") from error
        self._address: int | None = address
        memory = memoryview((ctypes.c_uint8 * self._length).from_address(address))
        self.words: npt.NDArray[np.uint64] = np.frombuffer(memory, np.uint64, count * stride // _WORD).reshape(
            count, -1
        )
        """uint64[count, words per entry]: what is written."""
        self.values: npt.NDArray[Any] = np.ndarray((count,), dtype, memory, strides=(stride,))
        """dtype[count], the same memory: what is read."""

    def check(self, indices: npt.NDArray[np.uint32]) -> None:
        """Raises DatapathError where an index is out of range."""
        if len(indices) and int(indices.max()) >= self.count:
            raise DatapathError(f"index {int(indices.max())} is past the end of the array {self.name} ({self.count})")

    def close(self) -> None:
        """Unmaps."""
        if self._address is not None:
            self.words = np.zeros((0, 1), np.uint64)
            self.values = np.zeros(0, self.values.dtype)
            _LIBC.munmap(self._address, self._length)
            self._address = None
