"""The random generators of layers, and a limit to what they draw for a layer that a file describes.

Whoever wrote the file chose the settings. A layer draws its parameters as it is made, and those of a file are put in
their place: so one that needs more of them than the file holds is stopped before it has taken the memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np

from .errors import InvalidConfigError

__all__ = ["at_most", "generator"]

_most: ContextVar[int | None] = ContextVar("the most numbers that a layer may draw", default=None)


@contextlib.contextmanager
def at_most(numbers: int) -> Iterator[None]:
    """What is made inside, in this thread, raises InvalidConfigError rather than draw more numbers."""
    before = _most.set(numbers)
    try:
        yield
    finally:
        _most.reset(before)


def generator(seed: int | None) -> np.random.Generator:
    random, most = np.random.default_rng(seed), _most.get()
    return random if most is None else _Limited(random.bit_generator, most)


class _Limited(np.random.Generator):
    """Draws from a range as many numbers as are left. Copies and pickles of it are NumPy's own."""

    def __init__(self, bits: np.random.BitGenerator, left: int) -> None:
        super().__init__(bits)
        self._left = left

    def uniform(self, low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
        self._left -= math.prod(np.atleast_1d(size).tolist()) if size is not None else 1
        if self._left < 0:
            raise InvalidConfigError("the settings need more parameters than there are", hint="are they the file's?")
        return super().uniform(low, high, size)
