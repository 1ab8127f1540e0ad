"""Exact attention on NumPy arrays, compiled by Numba.

The alphabet: B batch, H query heads, Hk key heads, Lq and Lk lengths, D size of query and key, Dv of value. Arrays are
(..., H, L, D).
"""

from . import masks
from .dense import scaled_dot_product_attention
from .errors import AttentionError, DimensionMismatchError, InvalidInputError, InvalidMaskError

__all__ = [
    "AttentionError",
    "DimensionMismatchError",
    "InvalidInputError",
    "InvalidMaskError",
    "masks",
    "scaled_dot_product_attention",
]
__version__ = "0.1.0.dev0"
