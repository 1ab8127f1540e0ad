"""What `MultiHeadAttention.step` keeps from one step to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import halves
from .arrays import Array
from .config import AttentionConfig
from .errors import InvalidInputError
from .values import whole_number

__all__ = ["KeyValueCache"]


@dataclass(eq=False)
class KeyValueCache:
    """The keys and values of all positions so far, for `MultiHeadAttention.step`.

    Attributes
    ----------
    keys, values : array (B, heads, max_len, d_k)
        Those of the first `length` positions are filled.
    length : int
        How many positions are filled.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> layer = rv.MultiHeadAttention(rv.AttentionConfig(d_model=16, num_heads=2, causal=True), seed=0)
    >>> x = np.random.default_rng(0).standard_normal((1, 6, 16), dtype=np.float32)
    >>> cache = layer.new_cache(batch=1, max_len=100)
    >>> prompt = layer.step(x[:, :3], cache)
    >>> cache
    KeyValueCache(3 of 100 positions, batch 1, 2 heads of 8)
    >>> steps = [layer.step(x[:, i : i + 1], cache) for i in range(3, 6)]
    >>> np.allclose(np.concatenate([prompt, *steps], axis=1), layer(x), atol=1e-6)
    True
    """

    keys: Array
    values: Array
    length: int = 0

    def __repr__(self) -> str:
        B, H, most, d_k = self.keys.shape
        return f"KeyValueCache({self.length} of {most} positions, batch {B}, {H} heads of {d_k})"

    def check(self, x: Array, dtype: np.dtype[Any], heads: int, config: AttentionConfig) -> None:
        """Raise unless x, which was given in this dtype, can be added.

        Parameters
        ----------
        x : array (B, n, d_model)
            The next n positions.
        dtype : numpy.dtype
            That x was given in, before it was widened.
        heads : int
        config : AttentionConfig
            The layer's.

        Raises
        ------
        InvalidInputError
            If x is of another dtype, batch or layer than the cache, `length` was set to no number of positions, or
            there is no room for n more.
        """
        B, H, most, d_k = self.keys.shape
        shapes = {"x.shape": x.shape, "cache": self}
        if dtype != self.keys.dtype:
            hint = f"cast x, or ask for new_cache(batch, max_len, dtype={halves.spelled(dtype)})"
            raise InvalidInputError(f"x is {dtype}, the cache is {self.keys.dtype}", shapes=shapes, hint=hint)
        if x.shape[0] != B or (H, d_k) != (heads, config.d_k):
            hint = "the cache was made for another batch, or by another layer"
            raise InvalidInputError("x does not fit the cache", shapes=shapes, hint=hint)
        longest = most if config.max_seq_len is None else min(most, config.max_seq_len)
        hint = f"give the number of positions that are filled, 0 to {most}"
        whole_number("cache.length", self.length, 0, most, hint=hint)
        if self.length + x.shape[1] > longest:
            more = f"new_cache(batch, max_len={self.length + x.shape[1]})"
            hint = (
                f"ask for {more}"
                if longest == most
                else f"the layer's max_seq_len is {longest}: configure a larger one"
            )
            reason = f"{self.length} positions and {x.shape[1]} more: the most is {longest}"
            raise InvalidInputError(reason, shapes=shapes, hint=hint)
