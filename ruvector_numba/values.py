"""Checks of single values, which know nothing of attention: numbers, switches, seeds, memory for an array."""

from __future__ import annotations

import math
import numbers
import operator
import os
import reprlib
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import AttentionError, InvalidInputError, OutOfMemoryError

__all__ = [
    "as_array",
    "check_memory",
    "check_not_masked",
    "is_list",
    "random_seed",
    "real_number",
    "shown",
    "switch",
    "whole_number",
]

SMALL = 1 << 30  # bytes; what is smaller is not compared with the memory there is


def shown(x: object) -> str:
    """A value as an error shows it: in one line, be it a dictionary of arrays."""
    if isinstance(x, np.ndarray) and x.size > 8:
        return f"an array of shape {x.shape}"
    told = repr(x)
    return told if len(told) <= 100 and "\n" not in told else reprlib.repr(x)


def real_number(
    name: str, x: object, error: Callable[..., AttentionError] = InvalidInputError, hint: str = "give one number"
) -> float:
    if type(x) is float:
        return x
    if isinstance(x, np.ndarray) and x.ndim == 0:
        x = x[()]
    if isinstance(x, bool | np.bool_) or not isinstance(x, numbers.Real):
        raise error(f"{name} is {shown(x)}, of type {type(x).__name__}", hint=hint)
    try:
        return float(x)
    except OverflowError:
        raise error(f"{name} is beyond what float64 holds", hint="give a smaller number") from None


def whole_number(
    name: str,
    x: object,
    least: float = -math.inf,
    most: float = math.inf,
    error: Callable[..., AttentionError] = InvalidInputError,
    hint: str | None = None,
) -> int:
    """One whole number from `least` to `most`, of Python or of NumPy. True and False are none."""
    if type(x) is int and least <= x <= most:
        return x
    try:
        found = None if isinstance(x, bool | np.bool_) else operator.index(x)  # type: ignore[arg-type]
    except TypeError:
        found = None
    if found is None or not least <= found <= most:
        there = f" from {least} to {most}" if most < math.inf else f", {least} or more" if least > -math.inf else ""
        raise error(f"{name} is {shown(x)}", hint=hint or f"give a whole number{there}")
    return int(found)


def switch(name: str, x: object, error: Callable[..., AttentionError] = InvalidInputError) -> bool:
    """An option that is on or off: a bool, or 0 or 1. Other things are not asked whether they are true."""
    if type(x) is bool:
        return x
    if isinstance(x, np.bool_) or (isinstance(x, int | np.integer) and x in (0, 1)):
        return bool(x)
    raise error(f"{name} is {shown(x)}, of type {type(x).__name__}", hint="give True or False")


def random_seed(seed: object) -> int:
    """The seed of the random generator, 63 bits; a fresh one if None is given."""
    if seed is None:
        return secrets.randbits(63)
    return whole_number("seed", seed, 0, (1 << 63) - 1, hint="give a whole number, 0 <= seed < 2**63, or None")


def is_list(x: object) -> bool:
    """Has it no dtype of its own? Then it takes the one that is wanted; arrays of any library keep theirs."""
    return not hasattr(x, "dtype")


def as_array(
    name: str,
    x: object,
    error: Callable[..., AttentionError] = InvalidInputError,
    hint: str = "give rows of equal length",
    of_tensor: str | None = None,
) -> NDArray[Any]:
    """What NumPy makes of an array-like, which may raise anything that its library does.

    `hint` is for uneven lists, `of_tensor` for tensors that NumPy cannot read.
    """
    try:
        return np.asarray(x)
    except ValueError as why:
        raise error(f"{name} cannot become an array: {why}", hint=hint) from None
    except (TypeError, RuntimeError) as why:
        from .gpu.arrays import is_on_gpu  # which needs this module

        if not is_on_gpu(x):
            of_tensor = of_tensor or f"of a tensor give {name}.detach().float(), and .to_dense() first if it is sparse"
            raise error(f"{name} cannot become an array: {why}", hint=of_tensor) from None
        raise error(f"{name} is on the GPU", hint="not everything runs there: copy it to the CPU") from None


def check_not_masked(
    name: str, x: object, hint: str | None = None, error: Callable[..., AttentionError] = InvalidInputError
) -> None:
    """Refuse arrays of numpy.ma, whose masks NumPy's functions drop without a word."""
    if isinstance(x, np.ma.MaskedArray):
        hint = hint or f"pass {name}.filled(0), a plain array"
        raise error(f"{name} is a numpy.ma array, whose own mask would be lost", hint=hint)


def check_memory(shape: tuple[int, ...], dtype: np.dtype[Any], purpose: str, hint: str | None = None) -> None:
    """Refuse an array that this machine has no memory for."""
    size = math.prod(shape) * dtype.itemsize
    if size < SMALL:
        return
    try:
        present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return
    if size > present:
        raise OutOfMemoryError(size, shapes={f"{purpose} shape": shape, "bytes": size, "memory": present}, hint=hint)
