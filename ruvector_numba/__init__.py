"""Exact attention on NumPy arrays, compiled by Numba.

The alphabet: B batch, H query heads, Hk key heads, Lq and Lk lengths, D size of query and key, Dv of value. Arrays are
(..., H, L, D).
"""

import pathlib

# In a checkout the kernels lie beside this folder; an installed package holds them.
if not pathlib.Path(__path__[0], "kernels").is_dir():
    __path__.append(str(pathlib.Path(__path__[0]).parent))

from . import masks  # noqa: E402
from .dense import scaled_dot_product_attention  # noqa: E402
from .errors import AttentionError, DimensionMismatchError, InvalidInputError, InvalidMaskError  # noqa: E402

__all__ = [
    "AttentionError",
    "DimensionMismatchError",
    "InvalidInputError",
    "InvalidMaskError",
    "masks",
    "scaled_dot_product_attention",
]
__version__ = "0.1.0.dev0"
