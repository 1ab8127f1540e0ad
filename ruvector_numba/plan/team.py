"""How many threads there are to plan for, and the one check of the environment variable that says so.

The kernels ask that variable at their first launch; whoever plans one asks before, so that the error is ours.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ..errors import InvalidInputError
from ..kernels import jit

__all__ = ["scratch", "size", "threads"]


def size() -> int:
    """The number of threads that was set for the process; 0 where none was, and Numba's own number counts."""
    try:
        return int(jit.team())
    except ValueError as error:
        raise InvalidInputError(str(error), hint="unset or correct it before starting Python") from None


_asked = functools.cache(size)  # once without an error


def threads() -> int:
    """How many threads a large job is planned for."""
    _asked()
    return int(jit.threads())


def scratch(elements: int, dtype: np.dtype[Any]) -> int:
    """Bytes for all threads that there may ever be, of which each needs so many elements."""
    _asked()
    return int(elements * dtype.itemsize * jit.slots())
