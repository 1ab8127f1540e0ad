"""The arguments of a kernel as a row of 8-byte values, which is all that crosses from Python to it.

A job is a NamedTuple of arrays, numbers and smaller such tuples, annotated with the kinds below. Packing takes some
50 us for one of 120 values, so that plans keep what they can; what changes from call to call has a name in its place.
"""

import ctypes
import functools
import typing

import numpy as np
from numba import types

from . import simd

Elements = typing.NewType("Elements", int)  # an array of elements of the kernel's type, which it computes with
Stored = typing.NewType("Stored", int)  # the same, or float16 or bfloat16 where the caller's arrays are that
Indices = typing.NewType("Indices", int)  # of int64
Ints = typing.NewType("Ints", int)  # of int32
Doubles = typing.NewType("Doubles", int)  # of float64
Words = typing.NewType("Words", int)  # of uint32
Bytes = typing.NewType("Bytes", int)  # of uint8
_PLAIN = int, float
_POINTEES = {
    Indices: types.int64,
    Ints: types.int32,
    Doubles: types.float64,
    Words: types.uint32,
    Bytes: types.uint8,
}

COUNTER, REPORT, HEADER = 0, 1, 2  # a job begins with the next task's number and, when checked, "left its bounds"
_DATA = object.__basicsize__  # an ndarray's data pointer is the first field after the object's header
_word_at = ctypes.c_ssize_t.from_address


def _read_address(array: np.ndarray) -> int:
    return _word_at(id(array) + _DATA).value


def _ask_address(array: np.ndarray) -> int:
    return array.ctypes.data


# Asking makes objects, 1.0 us for each array of a call; reading takes 0.2. The probe is for interpreters that differ.
_probe = np.zeros(3)[1:]
address = _read_address if _read_address(_probe) == _probe.ctypes.data else _ask_address


def bounds(array: np.ndarray) -> tuple[int, int, int]:
    """Where the array's first element lies, and the first and one-past-last byte that its strides reach."""
    at = array.ctypes.data
    spans = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    low = at + sum(min(s, 0) for s in spans)
    high = at + sum(max(s, 0) for s in spans) + array.itemsize if array.size else low
    return at, low, high


@functools.cache
def fields(job_class) -> tuple:
    """(name, kind, optional) of each field of a NamedTuple of arguments."""
    found = []
    for name, kind in typing.get_type_hints(job_class).items():
        choices = [c for c in typing.get_args(kind) if c is not type(None)]
        found.append((name, choices[0] if choices else kind, bool(choices)))
    return tuple(found)


@functools.cache
def layout(job_class, stored, absent: tuple):
    """The Numba type of such a job and the `struct` format of each field; `absent` tells which optionals are None."""
    missing, placed, forms, slot = iter(absent), [], [], 0
    for name, kind, optional in fields(job_class):
        if hasattr(kind, "_fields"):
            inner, form = layout(kind, stored, ())
            form = "".join(form)
        elif kind in _PLAIN:
            inner, form = (types.int64, "q") if kind is int else (types.float64, "d")
        else:
            pointee = stored if kind is Stored else _POINTEES.get(kind, simd.ARITHMETIC.get(stored, stored))
            inner, form = simd.PointerType(pointee), "q" * simd.POINTER_SLOTS
        placed.append((name, slot, types.none if optional and next(missing) else inner))
        forms.append(form)
        slot += len(form)
    return simd.JobType(job_class.__name__, tuple(placed)), tuple(forms)


@functools.cache
def _slots(job_class) -> tuple[tuple[int, ...], int]:
    """Where each value of such a job lies, those of the tuples in it one by one, and how many slots there are."""
    begins, size = [], 0
    for _, kind, _ in fields(job_class):
        inner, n = _slots(kind) if hasattr(kind, "_fields") else ((0,), 1 if kind in _PLAIN else simd.POINTER_SLOTS)
        begins += [size + at for at in inner]
        size += n
    return tuple(begins), size


@functools.cache
def _tuples(job_class) -> list[tuple[int, int]]:
    """Which fields are tuples, the last first, and how many values are in each."""
    kinds = [kind for _, kind, _ in fields(job_class)]
    return [(i, len(_slots(kind)[0])) for i, kind in reversed([*enumerate(kinds)]) if hasattr(kind, "_fields")]


def _values(job) -> list:
    """Those of a job and of the tuples in it: of one that is absent, each is None."""
    values = list(job)
    for i, n in _tuples(type(job)):
        values[i : i + 1] = [None] * n if job[i] is None else _values(job[i])
    return values


def flatten(job) -> tuple[list, tuple]:
    """The job's 8-byte values in order; where in the row, its header included, something is filled in at each launch,
    with what that is: names and, when accesses are checked, arrays."""
    begins, size = _slots(type(job))
    flat: list = [0] * size
    open_slots: list = []
    for value, slot in zip(_values(job), begins, strict=True):
        is_array = isinstance(value, np.ndarray)
        if type(value) is str or (is_array and simd.CHECKED):
            open_slots.append((value, HEADER + slot))
        elif value is not None:
            flat[slot] = address(value) if is_array else value
    return flat, tuple(open_slots)
