"""Checks of arrays that belong to the edges of a call."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..arrays import Array
from ..checks import from_sequence
from ..errors import DimensionMismatchError, InvalidInputError
from ..values import is_list

__all__ = ["checked_edges", "edge_attributes", "edge_values"]


def checked_edges(name: str, x: ArrayLike | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array | None:
    return None if x is None else edge_values(name, x, shape, dtype)


def edge_values(name: str, x: ArrayLike, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array that belongs to edges, of this shape and dtype; a list takes the dtype."""
    return _fitting(name, _read(name, x, dtype), shape, dtype)


def edge_attributes(name: str, x: ArrayLike, num_edges: int, edge_dim: int, dtype: np.dtype[Any]) -> Array:
    """Likewise attributes (E, edge_dim), which may be given as (E,) where that is 1."""
    array = _read(name, x, dtype)
    if array.ndim == edge_dim == 1:
        array = array[:, None]
    return _fitting(name, array, (num_edges, edge_dim), dtype)


def _read(name: str, x: ArrayLike, dtype: np.dtype[Any]) -> Array:
    array = from_sequence(name, x)
    return array.astype(dtype) if array.dtype == np.float64 and is_list(x) else array


def _fitting(name: str, array: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
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
