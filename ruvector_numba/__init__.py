"""Exact attention on NumPy arrays, compiled by Numba.

The alphabet: B batch, H query heads, Hk key heads, Lq and Lk lengths, D size of query and key, Dv of value. Arrays are
(..., H, L, D).
"""

import pathlib

# In a checkout the kernels lie beside this folder; an installed package holds them.
if not pathlib.Path(__path__[0], "kernels").is_dir():
    __path__.append(str(pathlib.Path(__path__[0]).parent))

from . import masks  # noqa: E402
from .dense import (  # noqa: E402
    AttentionCache,
    InputGradients,
    attention_backward,
    attention_forward,
    merge,
    scaled_dot_product_attention,
)
from .errors import (  # noqa: E402
    AttentionError,
    DimensionMismatchError,
    GraphStructureError,
    InvalidConfigError,
    InvalidInputError,
    InvalidMaskError,
    MatrixOperationError,
    NumericalInstabilityError,
    OutOfMemoryError,
    SparseMatrixError,
    TrainingError,
)
from .runtime import get_num_threads, info, set_num_threads, threads, warmup  # noqa: E402

__all__ = [
    "AttentionCache",
    "AttentionError",
    "DimensionMismatchError",
    "GraphStructureError",
    "InputGradients",
    "InvalidConfigError",
    "InvalidInputError",
    "InvalidMaskError",
    "MatrixOperationError",
    "NumericalInstabilityError",
    "OutOfMemoryError",
    "SparseMatrixError",
    "TrainingError",
    "attention_backward",
    "attention_forward",
    "get_num_threads",
    "info",
    "masks",
    "merge",
    "scaled_dot_product_attention",
    "set_num_threads",
    "threads",
    "warmup",
]
__version__ = "0.1.0.dev0"
