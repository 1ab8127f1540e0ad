"""Linear projections of rows, with heads split or joined on the way: what the layers are made of besides attention.

Every array here is (B, L, H, C): rows are pairs (batch, position), columns are pairs (head, channel). A plain (B, L, d)
is one head of d channels, and a weight (d_in, d_out) is a batch of one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .arrays import Array
from .plan import memory

__all__ = [
    "flattened",
    "is_finite",
    "linear",
    "linear_backward",
    "linears",
    "linears_backward",
    "only_seen",
    "product",
    "weight_gradient",
]


def product(
    left: Array,
    right: Array,
    out: Array,
    bias: Array | None = None,
    sums: Array | None = None,
    adds: bool = False,
) -> None:
    """out[i, j] = sum over k of left[i, k] * right[k, j] + bias[j], where each index is a pair.

    `sums`, if given, gets the sum of each column of `right`. If it `adds`, the products, without a bias, are added to
    what is there.
    """
    if not (out.size and left.size):
        if not adds:
            out[...] = 0 if bias is None else bias.reshape(out.shape[2:])
        if sums is not None:
            sums[...] = 0
        return
    plan = _plans()
    parts = plan.parts(left, out)
    made = out if parts == 1 else np.empty((parts, *out.shape), out.dtype)
    made_sums = None if sums is None else np.zeros((parts, sums.size), sums.dtype)
    ready = plan.product(left, right, made, bias is not None, sums is not None, adds and parts == 1)
    ready(left=left, right=right, out=made, bias=bias, sums=made_sums)
    if parts > 1 and adds:
        out += made.sum(axis=0)
    elif parts > 1:
        np.sum(made, axis=0, out=out)
    if sums is not None:
        assert made_sums is not None  # it is there where `sums` is
        sums[...] = made_sums.sum(axis=0).reshape(sums.shape)


@functools.cache
def _plans() -> Any:
    """At the first call, as it loads the kernels; asking Python for a module takes 1 us of each call."""
    from .plan import projection

    return projection


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x weight^T + bias, of x (N, d_in), weight (d_out, d_in) and bias (d_out,): as torch keeps them."""
    out = memory.empty((len(x), len(weight)), x.dtype)
    product(_matrix(x), _matrix(weight.T), _matrix(out), bias)
    return out


def linear_backward(grad: Array, x: Array, weight: Array, so_far: Array | None = None) -> tuple[Array, Array, Array]:
    """The gradients of x, weight and bias, given that of `linear`'s result (N, d_out).

    That of x is added to `so_far`, in place, where that is given.
    """
    dx = memory.empty(x.shape, x.dtype) if so_far is None else so_far
    dweight, dbias = np.empty_like(weight), np.empty(len(weight), x.dtype)
    product(_matrix(grad), _matrix(weight), _matrix(dx), adds=so_far is not None)
    weight_gradient(_matrix(x), _matrix(grad), _matrix(dweight.T), dbias)
    return dx, dweight, dbias


def weight_gradient(x: Array, dy: Array, dweight: Array, dbias: Array) -> None:
    """dweight = x^T dy and dbias = sum dy, for (B, L, H, C) arrays. What nobody saw, NaN included, is in neither."""
    product(x.transpose(2, 3, 0, 1), dy, dweight, sums=dbias)
    if not is_finite(dweight):
        product(only_seen(x, dy, 2).transpose(2, 3, 0, 1), dy, dweight)


def only_seen(x: Array, dy: Array, axes: int = 1) -> Array:
    """x, but 0 in the rows whose gradients dy are all 0: nobody saw these, and NaN times 0 is NaN. Rows are counted by
    so many axes."""
    is_seen = dy.any(axis=tuple(range(axes, dy.ndim)))
    return np.where(is_seen.reshape(*is_seen.shape, *(1,) * (x.ndim - axes)), x, 0)


def is_finite(x: Array) -> bool:
    """False if any of x is NaN or infinity. Of finite numbers it may say so too, if their sum is not."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(x.sum()))


def linears(
    x: Array, parameters: Mapping[str, Array], names: tuple[str, ...], heads: int, side_by_side: bool = False
) -> Array:
    """(names, N, heads, channels): x through the layers of these names, all at once, so that x is read once.

    Each lies by itself: of four side by side, with 64 channels, rows are 1024 bytes apart, those of one name crowd a
    quarter of the cache's sets, and taking them from anywhere, as attention over neighbours does, is slower. Two that
    are taken together come faster `side_by_side`: with key and value so, GraphTransformer's forward kernel is 1.10 to
    1.14 times as fast, and that of its way back by target 1.02 to 1.07 (Zen 3).
    """
    weight = np.concatenate([parameters[f"{name}.weight"] for name in names])
    has_bias = f"{names[0]}.bias" in parameters
    bias = np.concatenate([parameters[f"{name}.bias"] for name in names]) if has_bias else None
    width = len(weight) // len(names)
    if side_by_side:
        out = memory.empty((len(x), len(names), width), x.dtype)
    else:
        out = memory.empty((len(names), len(x), width), x.dtype).swapaxes(0, 1)
    by_name = weight.reshape(len(names), width, -1).transpose(2, 0, 1)
    product(_matrix(x), by_name[None], out[None], bias)
    return out.reshape(len(x), len(names), heads, width // heads).swapaxes(0, 1)


def linears_backward(
    grad: Array, x: Array, parameters: Mapping[str, Array], names: tuple[str, ...], so_far: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """The gradients of x and, by their names, of the parameters.

    That of x is added to `so_far`, in place, where that is given.
    """
    weight = np.concatenate([parameters[f"{name}.weight"] for name in names])
    dx, dweight, dbias = linear_backward(flattened(grad), x, weight, so_far)
    kinds = {"weight": dweight, "bias": dbias} if f"{names[0]}.bias" in parameters else {"weight": dweight}
    parts = {kind: np.split(whole, len(names)) for kind, whole in kinds.items()}
    return dx, {f"{name}.{kind}": parts[kind][n] for kind in kinds for n, name in enumerate(names)}


def flattened(x: Array) -> Array:
    """(n, ...) as (n, columns); ``reshape(n, -1)`` is an error where n is 0."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _matrix(x: Array) -> Array:
    return x[None, :, None, :]
