"""Which calls are for a GPU, and what is copied there and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import halves
from ..arrays import Array
from ..checks import from_sequence
from ..errors import InvalidInputError
from ..values import shown
from .arrays import ELEMENTS, GpuArray, Space, any_on_gpu, default, enter, is_on_gpu, library

__all__ = ["arrived", "concerns", "home", "kept", "moved", "to_numpy", "uploaded"]


def concerns(device: object, *arrays: object) -> bool:
    """Is a call one for the GPU: because an array lies there, or because `device` asks for it?"""
    if device is not None and not (isinstance(device, str) and device in ("cpu", "cuda")):
        raise InvalidInputError(
            f"device is {shown(device)}", hint="give 'cuda', 'cpu', or None for where the arrays are"
        )
    found = any_on_gpu(*arrays)
    if found and device == "cpu":
        raise InvalidInputError("device is 'cpu', and an array lies on a GPU", hint="copy it to the CPU first")
    return found or device == "cuda"


def moved(name: str, x: Any) -> Any:
    """An array of NumPy on the GPU, as one of Numba's; refused before that if it would not be one of numbers there."""
    if x is None or is_on_gpu(x):
        return x
    array = from_sequence(name, x)
    is_number = array.dtype.kind in "biuf" or halves.is_bfloat16(array.dtype)
    if not is_number or not array.dtype.isnative:
        raise InvalidInputError(f"{name} has dtype {array.dtype}", hint=f"cast it to one of {', '.join(ELEMENTS)}")
    enter()
    return default().upload(array)


def arrived(device: str | None, **arrays: Any) -> tuple[list[Any], bool]:
    """A call's arrays, those of NumPy moved to the GPU if `device` says so; and do results go back? They are where the
    first array was: `query`, or the features of the nodes that edges come from."""
    if device != "cuda":
        return list(arrays.values()), False
    first = next(iter(arrays.values()))
    return [moved(name, x) for name, x in arrays.items()], not is_on_gpu(first)


def home(is_moved: bool, x: Any) -> Any:
    """A result as the caller gets it, back in NumPy if the call's first array was `moved`; None stays None."""
    found = x.native if isinstance(x, GpuArray) else x
    return default().download(found) if is_moved and found is not None else found


def kept(copies: dict[Any, Any], space: Space, name: Any, element: str, make: Callable[[], Array]) -> GpuArray:
    """What `make` gives, on the GPU: uploaded once for as long as `copies` lives, those of a set of parameters."""
    known = space.library.key, element, name
    found = copies.get(known)
    if found is None:
        found = copies.setdefault(known, uploaded(space, make(), element))
    return space.keep(found)


def to_numpy(x: Any) -> Any:
    """A copy of an array on a GPU as one of NumPy, its 16 bits widened to float32; anything else as it is."""
    if not is_on_gpu(x):
        return x
    return halves.widened(library(x).download(x))


def uploaded(space: Space, x: Array, element: str) -> GpuArray:
    """An array of floats of NumPy, rounded to the element, on the GPU."""
    kind = halves.BITS if element == "bfloat16" else np.dtype(element)
    bits = halves.rounded(np.asarray(x, np.float32), kind)
    return space.library.view(space.library.upload(bits))._replace(element=element)
