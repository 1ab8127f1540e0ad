"""Memory for what kernels write: on a cache line, and taken again from call to call.

A new array costs what the system takes to clear its pages: 16 % of GraphTransformer's forward pass over 100,000 nodes,
6 to 11 % of MultiHeadAttention's two passes in a process whose C library gives its memory back. So the memory of large
arrays that are gone is kept for those to come, up to a limit, the oldest given back first.
"""

from __future__ import annotations

import collections
import functools
import math
import os
import threading
from typing import Any

import numpy as np

from ..arrays import Array, Shape
from ..errors import InvalidInputError

__all__ = ["empty", "idle", "result", "scratch"]

LINE = 64
LARGE, STEP = 1 << 20, 1 << 18  # what is smaller is NumPy's business; sizes of the others are whole steps

# Finalisers run wherever Python collects garbage, also while their own thread holds the lock: so they only append to
# `_returned`, and nobody ever waits for the lock. Who gets it moves what came back to `_idle`, by id, the oldest first.
_returned: collections.deque[Array] = collections.deque()
_idle: dict[int, Array] = {}
_lock = threading.Lock()


def _unlocked() -> None:
    """Another thread of the parent may have held the lock, and is not there to give it back."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlocked)


class _Block:
    """Memory that is kept when the last array in it is gone: what such arrays have as their base."""

    __slots__ = ("__array_interface__", "memory")

    def __init__(self, memory: Array, size: int) -> None:
        self.memory = memory
        start = memory.ctypes.data + -memory.ctypes.data % LINE
        self.__array_interface__ = {"version": 3, "data": (start, False), "shape": (size,), "typestr": "|u1"}

    def __del__(self) -> None:
        if _returned is not None:  # else the interpreter is ending
            _returned.append(self.memory)
            _settle()


def _settle() -> None:
    """Count what came back as idle, and give the oldest back to the system beyond the limit."""
    while _returned and _lock.acquire(blocking=False):
        try:
            while _returned:
                memory = _returned.popleft()
                _idle[id(memory)] = memory
            while _size() > limit():
                del _idle[next(iter(_idle))]
        finally:
            _lock.release()


@functools.cache
def limit() -> int:
    """The most bytes that are kept: RUVECTOR_NUMBA_KEEP says how many MB."""
    text = os.environ.get("RUVECTOR_NUMBA_KEEP", "").strip() or "512"
    if not text.isdecimal():
        reason = f"RUVECTOR_NUMBA_KEEP is {text!r}, and must be a whole number of MB"
        raise InvalidInputError(reason, hint="unset or correct it before starting Python")
    return int(text) << 20


def _size() -> int:
    return sum(memory.nbytes for memory in _idle.values())


def idle() -> int:
    """Bytes that are kept for arrays to come."""
    with _lock:
        return _size()


def _taken(size: int) -> Array:
    """Memory of at least so many bytes, and at most an eighth more."""
    found = None
    if _lock.acquire(blocking=False):
        try:
            fits = [key for key, memory in _idle.items() if size <= memory.nbytes <= size + size // 8]
            found = _idle.pop(fits[-1]) if fits else None
        finally:
            _lock.release()
        _settle()  # what came back meanwhile
    return np.empty(size, np.uint8) if found is None else found


def empty(shape: Shape, dtype: np.dtype[Any]) -> Array:
    """As `numpy.empty`, on a cache line: a row of 64 bytes is one line then, where in NumPy's arrays, which begin 16
    bytes behind one, it is two. Attention over neighbours, which takes rows from anywhere, gained 10 to 18 %."""
    size = math.prod(shape) * dtype.itemsize
    if size >= LARGE:
        limit()  # its error would be lost where the memory is given back
        whole = -(-(size + LINE) // STEP) * STEP
        return np.asarray(_Block(_taken(whole), size)).view(dtype).reshape(shape)
    memory = np.empty(size + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def result(shape: Shape, dtype: np.dtype[Any]) -> Array:
    """As `empty`, but on a cache line only where it is large: rows of dense arrays are read one after the other."""
    return empty(shape, dtype) if math.prod(shape) * dtype.itemsize >= LARGE else np.empty(shape, dtype)


class _Slabs(threading.local):
    """Memory that each Python thread keeps from call to call, by what it is for."""

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}


_slabs = _Slabs()
_NONE = np.empty(0, np.uint8)


def scratch(size: int, purpose: str = "kernel") -> Array:
    """At least so many bytes of memory on a cache line, that of the last call if it is large enough."""
    slab = _slabs.arrays.get(purpose, _NONE)
    if slab.size < size:
        slab = _slabs.arrays[purpose] = empty((max(size, 1 << 16),), np.dtype(np.uint8))
    return slab
