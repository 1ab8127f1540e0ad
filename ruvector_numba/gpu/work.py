"""What a pass of a graph layer on a GPU works with: checked inputs, parameters that lie there, gradients as they come.

Parameters are uploaded once for each set of them: a set never changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import gpu
from ..arrays import Array, Shape
from ..graphs.graph import CSRGraph
from ..parameters import ParameterSet
from .arrays import GpuArray, Space
from .layouts import compact, viewed, zero
from .loops import loops_put_in
from .projection import linear, linear_backward

__all__ = ["Found", "Inputs", "Work", "columns", "flattened", "inputs_of"]


class Inputs(NamedTuple):
    """A checked call, as `graphs.inputs.Inputs`."""

    source: GpuArray
    target: GpuArray | None
    is_pair: bool
    given: CSRGraph
    graph: CSRGraph
    edge_attr: GpuArray | None  # of `graph`
    edge_weight: GpuArray | None
    attr_shape: Shape | None
    dropout: float
    seed: int


def inputs_of(layer: Any, checked: Any, space: Space, nodes: list[Any], of_edges: dict[str, GpuArray]) -> Inputs:
    """What the layer has checked, with the arrays themselves, and what belongs to the loops that it puts in."""
    source = compact(space, nodes[0])
    target = source if not checked.is_pair else None if nodes[1] is None else compact(space, nodes[1])
    attr, weight = (compact(space, of_edges[n]) if n in of_edges else None for n in ("edge_attr", "edge_weight"))
    if attr is not None:
        attr = viewed(attr, (attr.shape[0], layer.edge_dim))
    elif layer.edge_dim is not None:
        attr = space.keep(space.empty((0, layer.edge_dim), source.element))
    given, policy = checked.given, layer.add_self_loops
    if checked.graph is not given:
        attr = None if attr is None else loops_put_in(space, given, attr, policy, layer.fill_value)
        weight = None if weight is None else loops_put_in(space, given, weight, policy, 1.0)
    return Inputs(
        source, target, checked.is_pair, given, checked.graph, attr, weight, checked.attr_shape, checked.dropout,
        checked.seed,
    )  # fmt: skip


class Work:
    """One pass of a layer: its inputs, parameters and the space that it works in."""

    def __init__(self, layer: Any, parameters: ParameterSet, space: Space, inputs: Inputs) -> None:
        self.layer, self.parameters, self.space, self.inputs = layer, parameters, space, inputs

    @property
    def element(self) -> str:
        return self.inputs.source.element

    def constant(self, name: Any, make: Callable[[], Array]) -> GpuArray:
        """Something made of the parameters, uploaded once."""
        return gpu.kept(self.parameters.copies, self.space, name, self.element, make)

    def weights(self, names: tuple[str, ...]) -> tuple[GpuArray, GpuArray | None]:
        """The weights of several layers, one below the other, and their biases."""
        p = self.parameters

        def stacked(kind: str) -> GpuArray:
            return self.constant((names, kind), lambda: np.concatenate([p[f"{name}.{kind}"] for name in names]))

        return stacked("weight"), stacked("bias") if f"{names[0]}.bias" in p else None

    def linears(self, x: GpuArray, names: tuple[str, ...]) -> list[GpuArray]:
        """x through these layers, all at once: (N, H, C) of each."""
        H, C = self.layer.heads, self.layer.out_channels
        made = linear(self.space, x, *self.weights(names))
        return [columns(made, n * H * C, (H, C)) for n in range(len(names))]

    def offset(self) -> GpuArray | None:
        """What the attention's output begins with: the residual and the bias, where no heads are averaged."""
        layer, p = self.layer, self.parameters
        bias = self.constant("bias", lambda: p["bias"]) if "bias" in p and layer.concat else None
        if not (layer.concat and layer.residual and self.inputs.target is not None):
            return None if bias is None else viewed(bias, (1, layer.heads, layer.out_channels))
        made = linear(self.space, self.inputs.target, self.constant("res.weight", lambda: p["res.weight"]), bias)
        return viewed(made, (made.shape[0], layer.heads, layer.out_channels))

    def mean(self) -> GpuArray:
        """(H * C, C): what takes the mean over heads, as a product."""
        H, C = self.layer.heads, self.layer.out_channels
        return self.constant("mean", lambda: np.tile(np.eye(C, dtype=np.float32), (H, 1)) / np.float32(H))

    def common(self) -> dict[str, Any]:
        layer, inputs = self.layer, self.inputs
        slope = getattr(layer, "negative_slope", 0.2)
        return dict(
            slope=slope, normalizes=layer.normalize, dropout=inputs.dropout, seed=inputs.seed,
            edge_weight=inputs.edge_weight, aggregation=layer.aggregation,
        )  # fmt: skip


def columns(x: GpuArray, first: int, shape: Shape) -> GpuArray:
    """(N, *shape): some columns, from `first` on, of a contiguous (N, ...)."""
    n, row = x.shape[0], math.prod(x.shape[1:])
    at = gpu.part(x, first, 0)
    return at._replace(shape=(n, *shape), strides=(row, *gpu.contiguous_strides(shape)))


class Found:
    """Gradients of parameters as they come, and of nodes, which may come in several parts."""

    def __init__(self, work: Work) -> None:
        self.work, self.named = work, dict[str, Any]()
        self._made: dict[tuple[str, ...], tuple[GpuArray, GpuArray]] = {}

    def linears(
        self, grad: GpuArray, x: GpuArray, names: tuple[str, ...], dx: GpuArray | None, weight: GpuArray | None = None
    ) -> GpuArray:
        """Back through the layers of these names; those of the parameters are added to what was found before."""
        space = self.work.space
        w = self.work.weights(names)[0] if weight is None else weight
        flat = compact(space, flattened(grad))
        dx, dweight, dbias = linear_backward(space, flat, x, w, dx, self._made.get(names))
        self._made[names] = dweight, dbias
        step = dweight.shape[0] // len(names)
        for n, name in enumerate(names):
            own = slice(n * step, (n + 1) * step)
            self.named[f"{name}.weight"], self.named[f"{name}.bias"] = dweight.native[own], dbias.native[own]
        return dx

    def put(self, name: str, x: GpuArray, shape: Shape) -> None:
        self.named[name] = x.native.reshape(shape)

    def of(self, name: str) -> Any:
        """As the caller gets it; 0 for a parameter that was not used."""
        if name not in self.named:
            made = self.work.space.empty(self.work.parameters[name].shape, self.work.element)
            zero(self.work.space, made, 0.0)
            self.named[name] = made.native
        return self.named[name]


def flattened(x: GpuArray) -> GpuArray:
    return x._replace(shape=(x.shape[0], math.prod(x.shape[1:])), strides=(x.strides[0], 1))
