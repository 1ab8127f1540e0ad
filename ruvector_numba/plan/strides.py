"""Arithmetic of shapes and strides that plans for the CPU and for a GPU share. It loads no kernels, of neither."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..arrays import Shape

__all__ = ["Sharing", "Sides", "broadcast", "sharing", "sides", "starts"]

Strided = TypeVar("Strided", bound=Any)  # a NamedTuple with a shape and strides


def starts(shape: Shape, strides: tuple[int, ...], repeat: int = 1, itemsize: int = 1) -> NDArray[np.int64]:
    """Where each matrix of a stack begins, in elements, each of the last axis `repeat` times. These are the stack's
    axes without the matrices' own; a stride of 1 is that of an element of `itemsize`."""
    at = np.zeros((), np.int64)
    for axis, (n, stride) in enumerate(zip(shape, strides, strict=True)):
        steps = np.arange(n, dtype=np.int64) * (stride // itemsize)
        at = at[..., None] + (np.repeat(steps, repeat) if axis == len(shape) - 1 else steps)
    return np.ascontiguousarray(at.reshape(-1))


def broadcast(x: Strided, shape: Shape) -> Strided:
    """The layout of numpy.broadcast_to(array, shape)."""
    missing = len(shape) - len(x.shape)
    strides = (0,) * missing + tuple(0 if n == 1 else s for n, s in zip(x.shape, x.strides, strict=True))
    return x._replace(shape=shape, strides=strides)


class Sides(NamedTuple):
    """How a matrix lies whose rows and columns are pairs, as kernels are told: see their `Pairs`."""

    outer_row: int
    row: int
    outer_col: int
    col: int
    rows: int
    cols: int


def sides(shape: Shape, strides: tuple[int, ...], itemsize: int = 1, least: int = 0) -> Sides:
    """Of (outer rows, rows, outer columns, columns), strides as for `starts`. An axis counts as `least` at least: 1 for
    who divides by it."""
    outer_row, row, outer_col, col = (s // itemsize for s in strides)
    outer_rows, rows, outer_cols, cols = (max(least, n) for n in shape)
    if outer_row == rows * row or shape[0] == 1:
        rows *= outer_rows  # one even run: no pairs
    if outer_col == cols * col or shape[2] == 1:
        cols *= outer_cols
    return Sides(outer_row, row, outer_col, col, rows, cols)


class Sharing(NamedTuple):
    """Which heads share a matrix: of matrix m, `members[begins[m] : begins[m + 1]]`."""

    matrices: int
    members: NDArray[np.int64]
    begins: NDArray[np.int64]


def sharing(shape: Shape, heads: Shape) -> Sharing:
    """Of a stack of matrices, `shape` without their own axes, that is broadcast to all heads."""
    matrices = math.prod(shape)
    owner = np.broadcast_to(np.arange(matrices).reshape(shape), heads).reshape(-1)
    members = np.argsort(owner, kind="stable").astype(np.int64)
    return Sharing(matrices, members, np.searchsorted(owner[members], np.arange(matrices + 1)).astype(np.int64))
