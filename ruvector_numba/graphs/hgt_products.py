"""The products that `HGT` is made of, and their ways back: rows times stacked weights, priorities, gates."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import Array
from ..parameters import ParameterSet
from ..projection import linear_backward, product
from .hetero import EdgeType, parameter_key

__all__ = ["along", "along_back", "flat", "gate_of", "linear_back", "linear_rows"]


def flat(weights: Array) -> Array:
    return weights.reshape(-1, weights.shape[-1])


def linear_rows(x: Array, weights: Array, bias: Array | None, out: Array) -> None:
    """All that the rows of `weights` make of x, into `out`."""
    weight, flat_bias = flat(weights), None if bias is None else bias.ravel()
    product(x[None, :, None], weight.T[None, :, None], out.reshape(1, len(x), 1, len(weight)), flat_bias)


def linear_back(grad: Array, x: Array, weights: Array) -> tuple[Array, Array]:
    """The gradients of x and of `weights`, in which the biases come last."""
    weight = flat(weights[..., :-1])
    dx, dweight, dbias = linear_backward(grad.reshape(len(x), len(weight)), x, weight)
    return dx, np.concatenate([dweight, dbias[:, None]], axis=1).reshape(weights.shape)


def along(kind: EdgeType, p: ParameterSet, key: Array, value: Array) -> Array:
    """(2, H, ...): for keys, with the priority of the edge type, and for values."""
    return np.stack([priority(kind, p) * key, value])


def along_back(kind: EdgeType, p: ParameterSet, gradients: dict[str, Array], grad: Array, key: Array) -> Array:
    """The gradients of key and value; that of the priority is added to `gradients`."""
    gradients[f"p_rel.{parameter_key(*kind)}"][0] += (grad[0] * key).sum(axis=(-1, -2))
    return np.stack([priority(kind, p) * grad[0], grad[1]])


def priority(kind: EdgeType, p: ParameterSet) -> Array:
    return p[f"p_rel.{parameter_key(*kind)}"].reshape(-1, 1, 1)


def gate_of(kind: str, p: ParameterSet) -> Any:
    return 1 / (1 + np.exp(-p[f"skip.{parameter_key(kind)}"][0]))
