"""Layers on arrays of half precision: computed in float32, results in the type that was given.

Parameters are float32 or float64, and so are their gradients. What is kept between steps, `KeyValueCache`, is of half
precision too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import checks, halves, masks
from .arrays import Array
from .results import AttentionGradients

__all__ = ["Rounded", "half_type", "widened", "widened_mask"]


def half_type(dtype: DTypeLike | None) -> np.dtype[Any] | None:
    """The dtype, if it is float16 or that of ml_dtypes."""
    try:
        kind = None if dtype is None else np.dtype(dtype)
    except TypeError:
        return None
    return kind if kind is not None and halves.is_given_half(kind) else None


def widened(*arrays: ArrayLike) -> tuple[tuple[Any, ...], np.dtype[Any] | None]:
    """Arrays of one half type in float32, and that type; anything else as it is, for the checks to look at."""
    if all(type(x) is np.ndarray and x.dtype in checks.FLOATS for x in arrays):
        return arrays, None
    kinds = {x.dtype if isinstance(x, np.ndarray) else None for x in arrays}
    if any(isinstance(x, np.ma.MaskedArray) for x in arrays):
        return arrays, None
    kind = half_type(kinds.pop()) if len(kinds) == 1 else None
    return arrays if kind is None else tuple(halves.widened(np.asarray(x)) for x in arrays), kind


def widened_mask(mask: Any) -> Any:
    """A layer's mask with arrays of half precision in float32, those inside of a mask object too."""
    if isinstance(mask, masks.All):
        return masks.All([widened_mask(part) for part in mask.parts])
    return halves.widened(mask) if isinstance(mask, np.ndarray) and half_type(mask.dtype) else mask


def _type_of_bias(mask: Any) -> np.dtype[Any] | None:
    """Of the float array in a mask object: its gradient is of that type."""
    parts = mask.parts if isinstance(mask, masks.All) else ()
    return next((x.dtype for x in parts if isinstance(x, np.ndarray) and x.dtype != bool), None)


@dataclass(frozen=True, eq=False)
class Rounded:
    """A layer's pass over widened inputs, seen by who gave the others."""

    record: Any
    inputs: tuple[Any, ...]
    output: Array
    bias: np.dtype[Any] | None  # the type of the float mask

    @classmethod
    def of(cls, record: Any, inputs: tuple[Any, ...], mask: Any, kind: np.dtype[Any]) -> Rounded:
        return cls(record, inputs, halves.rounded(record.output, kind), _type_of_bias(mask))

    @property
    def mask(self) -> Any:
        return self.record.mask

    @property
    def lse(self) -> Any:
        return self.record.lse

    def weights(self, rows: Any = None) -> Array:
        return halves.rounded(self.record.weights(rows), self.output.dtype)

    def head_weights(self, rows: Any = None) -> Array:
        return halves.rounded(self.record.head_weights(rows), self.output.dtype)

    def backward(self, grad_output: ArrayLike) -> AttentionGradients:
        kind = self.output.dtype
        grad = checks.gradient("grad_output", grad_output, self.output.shape, kind)
        g = self.record.backward(halves.widened(grad))
        kinds = {"query": kind, "key": kind, "value": kind, "bias": self.bias}
        made = {name: (getattr(g, name), kind) for name, kind in kinds.items()}
        return replace(g, **{n: halves.rounded(x, kind) for n, (x, kind) in made.items() if x is not None and kind})
