"""float16 and bfloat16: how arrays of them are recognised, and what NumPy does with them here.

NumPy has no bfloat16. Arrays of the package ml_dtypes are recognised by the name of their dtype, so that it need not be
installed, and plain uint16 arrays hold the same bits where a call says ``dtype="bfloat16"``. Past the checks both are
uint16 arrays, which mean nothing else there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import Array

__all__ = [
    "BITS",
    "arithmetic",
    "cast",
    "is_bfloat16",
    "is_given_half",
    "is_half",
    "rounded",
    "spelled",
    "stored",
    "widened",
]

BITS = np.dtype(np.uint16)
_HALF = (np.dtype(np.float16), BITS)


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Is it that of ml_dtypes?"""
    return dtype.kind == "V" and dtype.name == "bfloat16"


def stored(x: Array) -> Array:
    """The same memory, as the kernels know its type."""
    return x.view(BITS) if is_bfloat16(x.dtype) else x


def is_given_half(dtype: np.dtype[Any]) -> bool:
    """Is that of a caller's array a half type? uint16 is none, unless the call says so."""
    return dtype == np.float16 or is_bfloat16(dtype)


def is_half(dtype: np.dtype[Any]) -> bool:
    """Is a stored type one that is widened to be computed with?"""
    return dtype in _HALF


def arithmetic(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What elements of a stored type are computed in."""
    return np.dtype(np.float32) if dtype in _HALF else dtype


def spelled(dtype: np.dtype[Any]) -> str:
    """How a dtype is written in a program."""
    return f"{'ml_dtypes' if is_bfloat16(dtype) else 'numpy'}.{dtype.name}"


def cast(name: str, given: np.dtype[Any], wanted: np.dtype[Any]) -> str:
    """How to write an array in another dtype, for hints; uint16 is taken for the bits of bfloat16 numbers.

    Whoever casts those by ``astype`` gets other numbers, and no error.
    """
    if given == BITS:
        if is_bfloat16(wanted):
            return f"{name}.view(ml_dtypes.bfloat16)"
        wide = f"({name}.astype(numpy.uint32) << 16).view(numpy.float32)"
        return wide if wanted == np.float32 else f"{wide}.astype({spelled(wanted)})"
    if wanted == BITS:
        return f"{name}{'' if is_bfloat16(given) else '.astype(ml_dtypes.bfloat16)'}.view(numpy.uint16)"
    return f"{name}.astype({spelled(wanted)})"


def widened(x: Array) -> Array:
    """float32 from an array of either half type, exactly; any other as it is."""
    x = stored(x)
    if x.dtype != BITS:
        return x.astype(np.float32) if x.dtype == np.float16 else x
    words = x.astype(np.uint32)
    words <<= 16
    return words.view(np.float32)


@np.errstate(over="ignore")  # beyond float16 lies infinity
def rounded(x: Array, dtype: np.dtype[Any]) -> Array:
    """An array in the given type, to the nearest; NaN stays NaN."""
    if dtype != BITS and not is_bfloat16(dtype):
        return x.astype(dtype, copy=False)
    x = np.ascontiguousarray(x, np.float32)
    words = x.view(np.uint32)
    bits = ((words + (((words >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    np.copyto(bits, np.uint16(0x7FC0), where=np.isnan(x))
    return bits.view(dtype)
