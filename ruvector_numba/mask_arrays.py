"""Arrays as masks: do they fit the scores, and what do they come to."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import halves
from .arrays import Array, Shape
from .errors import InvalidMaskError
from .values import as_array
from .visibility import Sizes, Visibility, broadcasts


def as_mask(value: object, may_be_bits: bool = False) -> Array:
    """`value` as a bool or float array in native byte order; the same memory where that is possible."""
    if isinstance(value, type):
        raise InvalidMaskError(f"{value.__name__} is a class, not a mask", hint=f"write {value.__name__}(...)")
    if isinstance(value, np.ma.MaskedArray):
        hint = "pass mask.filled(...), a plain array"
        raise InvalidMaskError("a numpy.ma array, whose own mask would be lost", hint=hint)
    array = as_array("attn_mask", value, InvalidMaskError)
    is_bits = may_be_bits and array.dtype == halves.BITS
    if array.dtype.kind not in "bf" and not halves.is_bfloat16(array.dtype) and not is_bits:
        raise InvalidMaskError(
            f"dtype {array.dtype}; a mask is bool (True = attend) or float (added to the scores)",
            shapes={"attn_mask.shape": array.shape},
            hint=_cast_hint(array.dtype),
        )
    if not (array.dtype.isnative and array.flags.aligned):  # kernels read neither
        array = array.astype(array.dtype.newbyteorder("="))
    return array


def check_not_bool(name: str, value: object, meant: str) -> None:
    """Refuse a single bool, which would hide all or nothing; `meant` is what hides the future."""
    if isinstance(value, bool | np.bool_):
        hint = f"{meant} hides the future; a mask is an array, or one of rv.masks"
        raise InvalidMaskError(f"{name} is {value}, a single bool", hint=hint)


def resolved(array: Array, sizes: Sizes) -> Visibility:
    if not broadcasts(array.shape, sizes.scores):
        raise InvalidMaskError(
            "its shape does not broadcast to that of the scores, (*batch, heads, Lq, Lk)",
            shapes={"attn_mask.shape": array.shape, "scores.shape": sizes.scores},
            hint=_axes_hint(array.shape, sizes),
        )
    if array.dtype.kind == "b":
        return Visibility(allowed=array)
    is_bits = array.dtype == halves.BITS
    if is_bits and sizes.dtype != halves.BITS:
        raise InvalidMaskError(
            "dtype uint16; a mask is bool (True = attend) or float (added to the scores)",
            shapes={"attn_mask.shape": array.shape},
            hint=bits_hint(),
        )
    is_half = sizes.dtype.itemsize == 2
    is_wide = is_half and (array.dtype == np.float32 or halves.is_bfloat16(array.dtype))
    if array.dtype != sizes.dtype and not is_wide:
        cast = halves.cast("attn_mask", array.dtype, sizes.dtype).replace("numpy.", "np.")
        raise InvalidMaskError(
            f"a float mask has the dtype of the inputs, but it is {array.dtype} and they are {sizes.dtype}",
            shapes={"attn_mask.dtype": array.dtype, "query.dtype": sizes.dtype},
            hint=f"cast the mask: {cast}" + ", or attn_mask.astype(np.float32)" * is_half,
        )
    return Visibility(bias=array)


def _cast_hint(dtype: np.dtype[Any]) -> str:
    if dtype == halves.BITS:
        return bits_hint()
    if dtype.kind in "iu":
        return "attn_mask.astype(bool), if non-zero means attend"
    return "give an array of bools or floats, or one of rv.masks, such as rv.masks.Causal()"


def bits_hint() -> str:
    return (
        "attn_mask.view(ml_dtypes.bfloat16), if these are the bits of bfloat16 numbers; "
        "attn_mask != 0, if non-zero means attend"
    )


def dense(array: Array, Lq: int, Lk: int) -> NDArray[np.bool_]:
    if not broadcasts(array.shape[-2:], (Lq, Lk)):
        raise InvalidMaskError(
            "the shape of an array does not broadcast to (..., Lq, Lk)",
            shapes={"array.shape": array.shape, "(Lq, Lk)": (Lq, Lk)},
        )
    if array.dtype == halves.BITS:
        raise InvalidMaskError('dtype uint16, which a call with dtype="bfloat16" takes for bits', hint=bits_hint())
    return array if array.dtype.kind == "b" else ~np.isneginf(array)


def _axes_hint(shape: Shape, sizes: Sizes) -> str:
    """The two mistakes that are made most, and the rule for the rest."""
    batch, heads, Lq, Lk, _ = sizes
    colons = ":, " * len(batch)
    if batch and shape == (*batch, Lk):
        return f"one row of keys per batch row is attn_mask[{colons}None, None, :], or masks.Lengths(keys=...)"
    if batch and shape == (*batch, Lq, Lk):
        return f"one matrix per batch row, the same for all heads, is attn_mask[{colons}None]"
    return "axes are matched from the right and may be 1 or missing, as NumPy broadcasts"
