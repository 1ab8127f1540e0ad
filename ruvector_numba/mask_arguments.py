"""What masks are made of, checked: numbers and ids when one is made, lengths and batches when it meets a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arrays import Shape
from .errors import InvalidMaskError
from .values import as_array, check_not_masked, shown, whole_number
from .visibility import Sizes, broadcasts


def check_rows(name: str, **shapes: Shape) -> None:
    try:
        np.broadcast_shapes(*shapes.values())
    except ValueError:
        first, second = shapes
        raise InvalidMaskError(
            f"{name}.{first} and {name}.{second} do not agree on the rows of the batch",
            shapes={f"rows of {name}.{field}": shape for field, shape in shapes.items()},
        ) from None


def check_align(name: str, align: object) -> None:
    if not isinstance(align, str) or align not in ("top_left", "bottom_right"):
        hint = 'query 0 sits at key 0 ("top_left"), or the last query at the last key ("bottom_right")'
        raise InvalidMaskError(f"{name}.align must be 'top_left' or 'bottom_right', got {shown(align)}", hint=hint)


def reach(name: str, value: object) -> int:
    hint = "give a whole number, 0 or more; None means no limit"
    return whole_number(name, value, 0, error=InvalidMaskError, hint=hint)


def size(name: str, value: object) -> int:
    return whole_number(name, value, 0, error=InvalidMaskError)


def _integers(name: str, values: object) -> NDArray[np.int64]:
    """A read-only int64 copy: small next to the work, and safe from later changes."""
    check_not_masked(name, values, "pass a plain array", InvalidMaskError)
    array = as_array(name, values, InvalidMaskError)
    if array.size and array.dtype.kind not in "iu":
        hint = "cast them: numpy.asarray(x).astype(int)" if array.dtype.kind == "f" else "give whole numbers"
        raise InvalidMaskError(f"{name} must be integers, got dtype {array.dtype}", hint=hint)
    if array.dtype.kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise InvalidMaskError(f"{name} has {array.max()}, which does not fit an int64")
    copy = array.astype(np.int64)
    copy.setflags(write=False)
    return copy


def lengths(name: str, values: object) -> int | NDArray[np.int64]:
    array = _integers(name, values)
    if array.size and (shortest := int(array.min())) < 0:
        raise InvalidMaskError(f"{name} must not be negative, got {shortest}", hint="None means no limit")
    return int(array) if array.ndim == 0 else array


def ids(name: str, values: object) -> NDArray[np.int64]:
    array = _integers(name, values)
    if array.ndim == 0:
        raise InvalidMaskError(f"{name} must have one id per position, got the single number {array}")
    return array


def within(name: str, lengths: ArrayLike | None, L: str, size: int) -> NDArray[np.int64]:
    """The lengths as an array, which `size` must hold; None is the whole size."""
    array = np.asarray(size if lengths is None else lengths, dtype=np.int64)
    if array.size and (longest := int(array.max())) > size:
        raise InvalidMaskError(
            f"{name} has {longest}, more than {L} = {size}",
            shapes={f"{name}.shape": array.shape, L: size},
            hint=f"a length is {size} at most; where longer sequences were cut, numpy.minimum(lengths, {size})",
        )
    return array


def no_operator(form: str) -> Callable[..., NoReturn]:
    """An operator that masks refuse; `form` is what to write in its place, with arrays."""

    def refuse(*_: object) -> NoReturn:
        raise InvalidMaskError("masks are joined by & only", hint=f"make an array: {form}")

    return refuse


def check_batch(name: str, rows: Shape, sizes: Sizes) -> None:
    if not broadcasts(rows, sizes.batch):
        single = "the inputs have no batch axis, so give one for all" if not sizes.batch else None
        raise InvalidMaskError(
            f"{name} does not have one entry per row of the batch",
            shapes={f"rows of {name}": rows, "batch": sizes.batch},
            hint=single or "its leading axes must broadcast to the batch axes of the inputs",
        )
