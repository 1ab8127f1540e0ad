"""Arrays of float16 and bfloat16 in float32, and float32 arrays in them: the plan of kernels/halves.py."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import Array, Shape
from ..kernels import halves as kernels
from ..kernels import jit
from ..kernels.tiles import StoredMatrices
from . import memory
from .layouts import Layout, as_matrices, contiguous, layout, with_heads

__all__ = ["room", "rounded", "widened"]

_PIECE = 1 << 14  # elements in a task: 96 KiB of both kinds
_KEPT = 1 << 23  # elements that are kept at most: 32 MiB of keys, and of values
_WORK = 8  # an element takes as long as so many multiply-adds


@functools.lru_cache(512)
def _copy(kernel: jit.Kernel, stored: Layout, plain: Layout, dtype: np.dtype[Any]) -> jit.Launch:
    """A launch that copies between an array of half precision and one of float32; each of three axes at least."""
    heads, (L, D) = math.prod(stored.shape[:-2]), stored.shape[-2:]
    rows = max(1, _PIECE // max(1, D))
    job = kernels.CopyJob(
        StoredMatrices(*as_matrices("stored", stored, dtype.itemsize)), as_matrices("plain", plain, 4), L, D, rows
    )
    return kernel.prepare(job, heads * -(-L // rows), dtype, _WORK * heads * L * D)


def room(shape: Shape, purpose: str) -> NDArray[np.float32]:
    """A contiguous array of float32, in memory that the next call for this purpose takes again.

    Fresh pages cost more than what is written to them: at L=128 a quarter of the attention itself.
    """
    size = math.prod(shape)
    if size > _KEPT:
        return np.empty(shape, np.float32)
    return memory.scratch(size, np.dtype(np.float32), purpose)[: 4 * size].view(np.float32).reshape(shape)


def widened(x: Array, purpose: str) -> NDArray[np.float32]:
    """An array in float32, in the `room` for this purpose."""
    made = room(x.shape, purpose)
    whole = with_heads(contiguous(x.shape, 4), 3)
    _copy(kernels.widen, with_heads(layout(x), 3), whole, x.dtype)(stored=x, plain=made)
    return made


def rounded(x: NDArray[np.float32], dtype: np.dtype[Any]) -> Array:
    """A contiguous array of a half type, which for bfloat16 is uint16: its bits."""
    made = np.empty(x.shape, dtype)
    whole = with_heads(contiguous(x.shape, dtype.itemsize), 3)
    _copy(kernels.round_off, whole, with_heads(layout(x), 3), dtype)(stored=made, plain=x)
    return made
