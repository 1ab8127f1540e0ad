"""Checks of arrays that belong to the edges of a call."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..arrays import Array
from ..checks import from_sequence
from ..errors import DimensionMismatchError, InvalidInputError

__all__ = ["checked_edges", "edge_values"]


def checked_edges(name: str, x: ArrayLike | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array | None:
    return None if x is None else edge_values(name, x, shape, dtype)


def edge_values(name: str, x: ArrayLike, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array that belongs to edges, of this shape and dtype; a list takes the dtype."""
    array = from_sequence(name, x)
    if array.dtype == np.float64 and not hasattr(x, "dtype"):
        array = array.astype(dtype)
    if array.shape != shape:
        shapes = {f"{name}.shape": array.shape, "expected": shape}
        hint = "one entry for each edge, in the order of the edges as they were given"
        raise DimensionMismatchError(shape, array.shape, shapes=shapes, hint=hint)
    if array.dtype != dtype:
        hint = f"cast it: {name}.astype(numpy.{dtype})"
        if array.dtype.kind == "b":
            hint = f"if True is an edge that counts: numpy.where({name}, 0, -numpy.inf).astype(numpy.{dtype})"
        raise InvalidInputError(f"{name} has dtype {array.dtype}, the nodes {dtype}", hint=hint)
    return array
