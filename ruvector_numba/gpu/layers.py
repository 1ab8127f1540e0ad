"""The layers of dense attention on arrays of a GPU: the same passes as multi_head.py and scaled_dot_product.py.

The parameters stay arrays of NumPy, and are copied to the GPU once for each set of them; gradients are arrays there.
"""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from .. import gpu, layers, masks
from ..config import AttentionConfig
from ..errors import InvalidInputError, InvalidMaskError
from ..parameters import ParameterSet
from ..results import AttentionGradients
from . import dense, layouts
from .arrays import GpuArray, Space
from .projection import product, turned

__all__ = ["Inputs", "OneHead", "Record", "batch", "multi_head", "one_head", "uploaded"]

Inputs = tuple[GpuArray, GpuArray, GpuArray]
NAMES = "query", "key", "value"


# --- what a layer is given ---------------------------------------------------------------------------------------
def batch(query: Any, key: Any, value: Any, widths: tuple[int, int, int | None], longest: int | None) -> Inputs:
    """The three arrays where they lie, of these widths and of one type; see `layers.batch`."""
    q, k, v = (gpu.floats(name, x) for name, x in zip(NAMES, (query, key, value), strict=True))
    if not q.element == k.element == v.element:
        dtypes = {"query.dtype": q.element, "key.dtype": k.element, "value.dtype": v.element}
        raise InvalidInputError("query, key and value differ in dtype", shapes=dtypes, hint="cast them to one")
    shadows = [gpu.shadow(x.shape) for x in (q, k, v)]
    layers.batch(shadows[0], shadows[1], shadows[2], widths, longest)
    return q, k, v


def hidden(
    space: Space, mask: Any, padded: Any, scores: tuple[int, int, int, int], per_head: bool, device: str | None
) -> masks.Mask | GpuArray | None:  # fmt: skip
    """What the engine is told of a layer's `mask`, which hides, and of what `layers.padded` made of its padding."""
    if device == "cuda" and not gpu.is_on_gpu(mask):  # numbers hide as they do on the CPU
        mask = layers.hidden(mask, scores, per_head)
        if isinstance(mask, np.ndarray):
            mask = space.keep(space.library.view(space.library.upload(mask)))
    elif mask is not None and not isinstance(mask, masks.Mask):
        seen = gpu.view("mask", mask)
        if seen.element not in ("bool", "uint8"):
            hint = "give bools there, True where a key is hidden"
            raise InvalidMaskError(f"mask has dtype {seen.element} on the GPU", hint=hint)
        layers.check_hidden(seen.shape, np.dtype(bool), scores, per_head)
        mask = layouts.inverted(space, seen._replace(element="bool"))
        mask = _expanded(mask, 1) if len(seen.shape) == 3 else mask
    if padded is None or mask is None:
        if not isinstance(padded, np.ndarray):
            return mask if padded is None else padded
        return space.keep(space.library.view(space.library.upload(padded)))
    if isinstance(mask, masks.Mask) and isinstance(padded, masks.Mask):
        return masks.All([mask, padded])
    hint = "join them there: mask | key_padding_mask[:, None, :]"
    raise InvalidMaskError("mask and key_padding_mask are both given, and one is a matrix on the GPU", hint=hint)


def uploaded(space: Space, parameters: ParameterSet, element: str) -> dict[str, GpuArray]:
    """A set of parameters on the GPU in this type."""
    return {
        name: gpu.kept(parameters.copies, space, name, element, functools.partial(parameters.__getitem__, name))
        for name in parameters
    }


def _all_home(is_moved: bool, g: AttentionGradients) -> AttentionGradients:
    return AttentionGradients(**{f.name: gpu.home(is_moved, getattr(g, f.name)) for f in fields(g)})


# --- axes --------------------------------------------------------------------------------------------------------
def _expanded(x: GpuArray, axis: int) -> GpuArray:
    """With an axis of 1 more."""
    shape, strides = list(x.shape), list(x.strides)
    shape.insert(axis, 1)
    strides.insert(axis, 0)
    return x._replace(shape=tuple(shape), strides=tuple(strides))


def _swapped(x: GpuArray) -> GpuArray:
    """(B, H, L, C) for (B, L, H, C), and back."""
    (a, b, c, d), (i, j, k, m) = x.shape, x.strides
    return x._replace(shape=(a, c, b, d), strides=(i, k, j, m))


def _heads(x: GpuArray, H: int) -> GpuArray:
    """(n, d) as (1, n, H, d / H)"""
    (n, d), (row, col) = x.shape, x.strides
    return x._replace(shape=(1, n, H, d // H), strides=(0, row, d // H * col, col))


# --- scaled dot product attention --------------------------------------------------------------------------------
class OneHead(NamedTuple):
    """What a pass of ScaledDotProductAttention was computed from and with."""

    inputs: tuple[Any, Any, Any]
    past: dense.Past
    is_moved: bool

    @property
    def output(self) -> Any:
        return gpu.home(self.is_moved, self.past.result[:, 0])

    @property
    def lse(self) -> Any:
        return gpu.home(self.is_moved, self.past.lse[:, 0])

    def weights(self, rows: Any = None) -> Any:
        return gpu.home(self.is_moved, self.past.weights(rows, averaged=True))

    def backward(self, grad_output: Any) -> AttentionGradients:
        B, _, Lq, Dv = self.past.call.checked.output_shape
        grad_output = gpu.moved("grad_output", grad_output) if self.is_moved else grad_output
        grad = dense.gradient("grad_output", grad_output, (B, Lq, Dv), self.past.call.query.element)
        g = self.past.backward(_expanded(grad, 1))
        made = AttentionGradients(query=g.query[:, 0], key=g.key[:, 0], value=g.value[:, 0], bias=g.bias)
        return _all_home(self.is_moved, made)


def one_head(
    config: AttentionConfig, arrays: tuple[Any, Any, Any], mask: Any, dropout: float, seed: int | None,
    device: str | None,
) -> OneHead:  # fmt: skip
    """The pass of ScaledDotProductAttention."""
    (query, key, value), is_moved = gpu.arrived(device, **dict(zip(NAMES, arrays, strict=True)))
    q, k, v = batch(query, key, value, (config.d_model, config.d_model, None), config.max_seq_len)
    space = Space(q.native)
    seen = hidden(space, mask, None, (q.shape[0], 1, q.shape[1], k.shape[1]), per_head=False, device=device)
    q, k, v = (_expanded(x, 1) for x in (q, k, v))
    c = dense.call(q, k, v, seen, dropout_p=dropout, is_causal=config.causal, scale=config.get_scale(), seed=seed)
    past = dense.forward(c._replace(checked=c.checked._replace(eps=config.eps)))
    return OneHead(arrays, past, is_moved)


# --- multi-head attention ----------------------------------------------------------------------------------------
class Record(NamedTuple):
    """What a pass of MultiHeadAttention was computed from and with."""

    inputs: tuple[Any, Any, Any]
    arrays: Inputs  # the same, where they lie
    parameters: ParameterSet
    past: dense.Past
    joined: GpuArray  # (B, Lq, heads, d_k): what w_o is applied to
    output: Any
    mask: Any  # of the layer, its key_padding_mask included
    is_moved: bool

    @property
    def lse(self) -> Any:
        return gpu.home(self.is_moved, self.past.lse)

    def weights(self, rows: Any = None) -> Any:
        """Averaged over the heads: (B, rows, Lk), in float32."""
        return gpu.home(self.is_moved, self.past.weights(rows, averaged=True))

    def head_weights(self, rows: Any = None) -> Any:
        return gpu.home(self.is_moved, self.past.weights(rows))

    def backward(self, grad_output: Any) -> AttentionGradients:
        grad_output = gpu.moved("grad_output", grad_output) if self.is_moved else grad_output
        return _all_home(self.is_moved, self._backward(grad_output))

    def _backward(self, grad_output: Any) -> AttentionGradients:
        x, element = self.joined, self.joined.element
        (B, Lq, H, d_k), d = x.shape, x.shape[2] * x.shape[3]
        grad = _expanded(dense.gradient("grad_output", grad_output, (B, Lq, d), element), 2)
        space = Space(grad.native)
        parameters = uploaded(space, self.parameters, element)
        # output = joined w_o + b_o
        w_o = parameters["w_o"]
        rows = w_o._replace(shape=(H, d_k, 1, d), strides=(d_k * d, d, 0, 1))
        grad_joined = space.empty((B, H, Lq, d_k), element)
        product(space, grad, turned(rows), _swapped(grad_joined))
        made = {"o": _weight_gradients(space, x, grad)}
        # joined = attention of the heads
        g = self.past.backward(grad_joined)
        # heads = inputs w + b
        inputs = []
        for x, name, dy in zip(self.arrays, "qkv", (g.query, g.key, g.value), strict=True):
            by_rows = _swapped(gpu.view(name, dy))
            dx = space.empty(x.shape, element)
            product(space, by_rows, turned(_heads(parameters[f"w_{name}"], H)), _expanded(dx, 2))
            inputs.append(dx.native)
            made[name] = _weight_gradients(space, _expanded(x, 2), by_rows)
        parts: dict[str, Any] = {}
        for name, whole in zip("qkvo", ("query", "key", "value", "output"), strict=True):
            parts[f"{whole}_weights"], bias = made[name]
            if f"b_{name}" in parameters:
                parts[f"{whole}_bias"] = bias
        dq, dk, dv = inputs
        return AttentionGradients(**parts, query=dq, key=dk, value=dv, bias=g.bias)


def _weight_gradients(space: Space, x: GpuArray, dy: GpuArray) -> tuple[Any, Any]:
    """dw = x^T dy and db = sum dy, of (B, L, H, C) arrays."""
    (H, C), (G, M) = x.shape[2:], dy.shape[2:]
    dw, db = space.empty((H * C, G * M), dy.element), space.empty((G * M,), dy.element)
    out = dw._replace(shape=(H, C, G, M), strides=(C * G * M, G * M, M, 1))
    product(space, turned(x), dy, out, sums=db, over_rows=True)
    return dw.native, db.native


def multi_head(
    config: AttentionConfig, parameters: ParameterSet, widths: tuple[int, int, int], arrays: tuple[Any, Any, Any],
    mask: Any, key_padding_mask: Any, dropout: float, seed: int | None, device: str | None,
) -> Record:  # fmt: skip
    """The pass of MultiHeadAttention."""
    H, d, d_k = config.num_heads, config.d_model, config.d_k
    (query, key, value), is_moved = gpu.arrived(device, **dict(zip(NAMES, arrays, strict=True)))
    inputs = batch(query, key, value, widths, config.max_seq_len)
    (B, Lq, _), Lk, element = inputs[0].shape, inputs[1].shape[1], inputs[0].element
    space, padding = Space(inputs[0].native), key_padding_mask
    if gpu.is_on_gpu(padding):  # its lengths must be known here
        padding = gpu.library(padding).download(padding)
    padded = layers.padded(padding, B, Lk)
    seen = hidden(space, mask, padded, (B, H, Lq, Lk), per_head=True, device=device)
    mask = layers.with_padding(mask, key_padding_mask, padded, (B, H, Lq, Lk))
    there = uploaded(space, parameters, element)
    heads = []
    for x, name in zip(inputs, "qkv", strict=True):
        heads.append(space.keep(space.empty((B, H, x.shape[1], d_k), element)))
        w, b = _heads(there[f"w_{name}"], H), there.get(f"b_{name}")
        product(space, _expanded(x, 2), w, _swapped(heads[-1]), b)
    q, k, v = heads
    c = dense.call(q, k, v, seen, dropout_p=dropout, is_causal=config.causal, scale=config.get_scale(), seed=seed)
    joined = layouts.room(space, (B, Lq, H, d_k), element)
    past = dense.forward(c._replace(checked=c.checked._replace(eps=config.eps)), _swapped(joined))
    joined = joined._replace(shape=(B, Lq, H, d_k))
    output, w = space.empty((B, Lq, d), element), there["w_o"]
    rows = w._replace(shape=(H, d_k, 1, d), strides=(d_k * d, d, 0, 1))
    product(space, joined, rows, _expanded(output, 2), there.get("b_o"))
    return Record(arrays, inputs, parameters, past, joined, gpu.home(is_moved, output), mask, is_moved)
