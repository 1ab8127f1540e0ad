"""Arrays of float16 and bfloat16 in float32, float32 arrays in them, and copies: the plan of kernels/halves.py."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Shape
from ..halves import arithmetic
from ..kernels import halves as kernels
from ..kernels import jit
from ..kernels.tiles import StoredMatrices
from . import memory, team
from .layouts import Layout, as_matrices, contiguous, layout, with_heads

__all__ = ["KEPT", "copied", "room", "rounded"]

_PIECE = 1 << 14  # elements in a task: 96 KiB of both kinds
KEPT = 1 << 23  # elements that are kept at most: 32 MiB of keys, and of values
_SINGLE = np.dtype(np.float32)
_WORK = 8  # an element takes as long as so many multiply-adds


@functools.lru_cache(512)
def _copy(kernel: jit.Kernel, stored: Layout, plain: Layout, dtype: np.dtype[Any]) -> jit.Launch:
    """A launch that copies between an array of this type and one of that it is computed in; of three axes at least."""
    team.size()
    heads, (L, D) = math.prod(stored.shape[:-2]), stored.shape[-2:]
    rows = max(1, _PIECE // max(1, D))
    size = arithmetic(dtype).itemsize
    job = kernels.CopyJob(
        StoredMatrices(*as_matrices("stored", stored, dtype.itemsize)), as_matrices("plain", plain, size), L, D, rows
    )
    return kernel.prepare(job, heads * -(-L // rows), dtype, _WORK * heads * L * D)


def room(shape: Shape, purpose: str, dtype: np.dtype[Any] = _SINGLE) -> Array:
    """A contiguous array, in memory that the next call for this purpose takes again.

    Fresh pages cost more than what is written to them: at L=128 a quarter of the attention itself.
    """
    size = math.prod(shape)
    if size > KEPT:
        return np.empty(shape, dtype)
    size *= dtype.itemsize
    return memory.scratch(size, purpose)[:size].view(dtype).reshape(shape)


def copied(x: Array, purpose: str) -> Array:
    """An array in the type that it is computed in, contiguous, in the `room` for this purpose."""
    made = room(x.shape, purpose, arithmetic(x.dtype))
    whole = with_heads(contiguous(x.shape, made.itemsize), 3)
    _copy(kernels.widen, with_heads(layout(x), 3), whole, x.dtype)(stored=x, plain=made)
    return made


def rounded(x: NDArray[np.float32], dtype: np.dtype[Any]) -> Array:
    """A contiguous array of a half type, which for bfloat16 is uint16: its bits."""
    made = np.empty(x.shape, dtype)
    whole = with_heads(contiguous(x.shape, dtype.itemsize), 3)
    _copy(kernels.round_off, whole, with_heads(layout(x), 3), dtype)(stored=made, plain=x)
    return made
