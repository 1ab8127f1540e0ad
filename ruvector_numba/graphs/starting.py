"""What the parameters of a graph layer are before it is trained."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

from ..arrays import Array
from ..errors import InvalidInputError
from ..layers import glorot_uniform
from ..parameters import ParameterSet
from ..values import check_memory

__all__ = ["starting_parameters"]


def starting_parameters(
    random: np.random.Generator, shapes: dict[str, tuple[int, ...]], dtype: DTypeLike, ones: tuple[str, ...] = ()
) -> ParameterSet:
    """A layer's initial parameters: Glorot-uniform, biases 0, and 1 where a name begins with one of `ones`."""
    try:
        np.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"dtype is {dtype!r}: {error}", hint="give float32 or float64") from None
    numbers = sum(map(math.prod, shapes.values()))
    check_memory((numbers,), np.dtype(float), "parameters", hint="give fewer channels or heads")

    def start(name: str, shape: tuple[int, ...]) -> Array:
        if ones and name.startswith(ones):
            return np.ones(shape)
        return np.zeros(shape) if name.endswith("bias") else glorot_uniform(random, shape)

    return ParameterSet({name: start(name, shape) for name, shape in shapes.items()}).as_type(dtype)
