"""What a plan knows of an array and how it says it to a kernel, and a job that waits for its arrays."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array, Shape
from ..kernels import blocks, jit
from ..kernels.gather import Rows
from ..kernels.tiles import Matrices
from . import memory
from .strides import starts

__all__ = [
    "NOTHING",
    "NOWHERE",
    "NO_ROWS",
    "Layout",
    "Ready",
    "as_matrices",
    "by_width",
    "contiguous",
    "layout",
    "padded",
    "rows",
    "with_heads",
]


class Layout(NamedTuple):
    """What a plan knows of an array."""

    shape: Shape
    strides: tuple[int, ...]


def layout(x: Array) -> Layout:
    return Layout(x.shape, x.strides)


def padded(shape: Shape, itemsize: int) -> Shape:
    """The shape of an array whose rows hold whole vectors."""
    return (*shape[:-1], blocks.padded(shape[-1], itemsize))


def with_heads(layout: Layout, rank: int) -> Layout:
    """As an array of `rank` axes at least, so that there is an axis of heads."""
    missing = rank - len(layout.shape)
    return layout if missing <= 0 else Layout((1,) * missing + layout.shape, (0,) * missing + layout.strides)


@functools.lru_cache(1024)
def as_matrices(name: str, layout: Layout, itemsize: int, repeat: int = 1) -> Matrices:
    """Each head `repeat` times."""
    steps = layout.strides[-2] // itemsize, layout.strides[-1] // itemsize
    return Matrices(name, starts(layout.shape[:-2], layout.strides[:-2], repeat, itemsize), *steps)


def contiguous(shape: Shape, itemsize: int) -> Layout:
    strides = [itemsize]
    for n in shape[:0:-1]:
        strides.append(strides[-1] * n)
    return Layout(shape, tuple(reversed(strides)))


NOTHING = np.zeros(1, np.int64)  # what a pointer that is not used points to
NOWHERE = Matrices(NOTHING, NOTHING, 0, 0)
NO_ROWS = Rows(NOTHING, 0)


def rows(x: Array | None) -> Rows:
    """An array whose rows are contiguous, each."""
    return NO_ROWS if x is None else Rows(x, x.strides[0] // x.itemsize)


def by_width(is_narrow: bool, **indices: Array | None) -> dict[str, Any]:
    """Indices as kernels take them: narrow, in the integers of their job, or those None and `wide_...` ones of int64.

    Kernels choose by that None while they are compiled; that an array is missing altogether, as one that is None here,
    a flag must tell them.
    """
    here = {name: NOTHING if x is None else x for name, x in indices.items()}
    narrow, wide = (here, dict.fromkeys(here, NOTHING)) if is_narrow else (dict.fromkeys(here), here)
    return {**narrow, **{f"wide_{name}": x for name, x in wide.items()}}


class Ready(NamedTuple):
    """A job ready to be launched with its arrays."""

    launch: jit.Launch
    scratch: int  # bytes that all threads need

    def __call__(self, **arrays: Array | None) -> None:
        self.launch(scratch=memory.scratch(self.scratch), **arrays)
