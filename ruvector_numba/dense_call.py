"""A checked call of dense attention: what the checks hand to the plan. Nothing here checks, and the plan imports it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import halves
from .arrays import Array, Shape
from .visibility import Visibility

__all__ = ["DenseCall"]


class DenseCall(NamedTuple):
    """One checked call of attention. Key and value heads are as given: G = H // Hk query heads share one."""

    query: Array  # (*batch, H, Lq, D)
    key: Array  # (*batch, Hk, Lk, D)
    value: Array  # (*batch, Hk, Lk, Dv)
    seen: Visibility
    scale: float
    softcap: float | None
    slopes: Array | None  # (*batch or ones, H)
    dropout: float
    seed: int
    eps: float = 0.0  # the layers': added to the sum of exp(score - largest score)
    dtype: np.dtype[Any] = np.dtype(np.float32)  # of the caller's arrays and the results; `query` may be its bits
    bias_dtype: np.dtype[Any] | None = None  # of the caller's float mask; `seen.bias` has that of the arithmetic

    @property
    def output_shape(self) -> Shape:
        return (*self.query.shape[:-1], self.value.shape[-1])

    @property
    def arithmetic(self) -> np.dtype[Any]:
        return halves.arithmetic(self.query.dtype)

    @property
    def rounds(self) -> bool:
        """Are results of half precision?"""
        return self.dtype.itemsize == 2

    @property
    def batch(self) -> Shape:
        return self.query.shape[:-3]

    @property
    def heads(self) -> int:
        return self.query.shape[-3] if self.query.ndim > 2 else 1

    @property
    def group(self) -> int:
        return self.heads // self.key.shape[-3] if self.key.ndim > 2 and self.key.shape[-3] else 1
