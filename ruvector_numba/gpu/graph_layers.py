"""The graph layers on arrays that lie on a GPU: what graphs/layer.py does on the CPU.

The layer checks a call, of arrays that have shapes and nothing else.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import checks, gpu
from ..errors import GraphStructureError, InvalidConfigError, InvalidInputError
from ..graphs.inputs import is_pair as given_as_pair
from ..parameters import ParameterSet
from .arrays import GpuArray, Space
from .dense import gradient
from .gate import Gated, gated, gated_back
from .graph_kinds import Kind, kind_of
from .layouts import compact, viewed, zero
from .loops import loops_taken_out
from .neighbors import Past, one_element
from .projection import linear, matrix, product, turned
from .work import Found, Inputs, Work, inputs_of

if TYPE_CHECKING:
    from ..graphs.layer import GraphGradients

__all__ = ["Record", "backward", "run"]


class Record(NamedTuple):
    """What a layer's forward pass remembers."""

    layer: Any
    kind: Kind
    inputs: Inputs
    parameters: ParameterSet
    past: Any  # with coefficients(), as a caller gets them
    gate: Gated | None
    is_moved: bool


class _Coefficients(NamedTuple):
    past: Past
    is_moved: bool

    def coefficients(self) -> Any:
        space = Space(self.past.output.native)
        return gpu.home(self.is_moved, self.past.coefficients(space))


# --- calls -----------------------------------------------------------------------------------------------------------
def run(
    layer: Any, x: Any, graph: Any, edge_attr: Any, edge_weight: Any, dropout: float, seed: Any, device: str | None
) -> tuple[Any, Record]:
    """A layer's output, and what its gradients need."""
    kind = kind_of(type(layer))
    if kind is None:
        raise InvalidConfigError(f"{layer.name()} does not run on a GPU", hint="take the arrays to the CPU")
    if gpu.is_on_gpu(graph):
        hint = "make one of it, once: CSRGraph.from_edge_index(edge_index.cpu(), num_nodes=N)"
        raise GraphStructureError("graph is an edge_index on the GPU, not a CSRGraph", hint=hint)
    is_pair = given_as_pair(x)
    if is_pair and len(x) != 2:
        raise InvalidInputError(f"x is a tuple of {len(x)}", hint="give (x_source, x_target)")
    sources = list(x) if is_pair else [x]
    names = ("x_source", "x_target") if is_pair else ("x",)
    given = dict(zip(names, sources, strict=True)) | {"edge_attr": edge_attr, "edge_weight": edge_weight}
    there, is_moved = gpu.arrived(device, **given)
    found = {name: gpu.floats(name, a) for name, a in zip(given, there, strict=True) if a is not None}
    one_element(found)
    nodes = [found.get(name) for name in names]
    shadows = [None if a is None else gpu.shadow(a.shape) for a in nodes]
    attr, weight = (gpu.shadow(found[name].shape) if name in found else None for name in ("edge_attr", "edge_weight"))
    checked = layer._checked(
        tuple(shadows) if is_pair else shadows[0], graph, attr, weight, *checks.dropout(dropout, seed)
    )
    space = Space(there[0])
    work = Work(layer, layer.parameters.as_type(np.float32), space, inputs_of(layer, checked, space, nodes, found))
    past = kind.attend(work)
    output, gate = _finish(work, past)
    record = Record(layer, kind, work.inputs, work.parameters, _Coefficients(past, is_moved), gate, is_moved)
    return gpu.home(is_moved, output), record


# --- after attention -------------------------------------------------------------------------------------------------
def _finish(work: Work, past: Past) -> tuple[GpuArray, Gated | None]:
    """The output: the attention's own where heads are joined, else their mean, bias and residual added; or gated."""
    layer, p, space, attended = work.layer, work.parameters, work.space, past.output
    N, C = attended.shape[0], layer.out_channels
    out, target = viewed(attended, (N, layer.heads * C)), work.inputs.target
    if not layer.concat:
        flat, out = out, space.keep(space.empty((N, C), work.element))
        bias = work.constant("bias", lambda: p["bias"]) if "bias" in p else None
        product(space, matrix(flat), matrix(work.mean()), matrix(out), bias)
    if getattr(layer, "beta", False):
        assert target is not None
        return gated(work, out, linear(space, target, *work.weights(("lin_skip",))))
    if not layer.concat and target is not None:
        for weight, bias in _added(work):
            product(space, matrix(target), turned(matrix(weight)), matrix(out), bias, adds=True)
    return out, None


def _added(work: Work) -> list[tuple[GpuArray, GpuArray | None]]:
    """The linear layer of the targets that is added to a mean of heads, if there is one."""
    layer, p = work.layer, work.parameters
    if "res.weight" in p:
        return [(work.constant("res.weight", lambda: p["res.weight"]), None)]
    return [work.weights(("lin_skip",))] if getattr(layer, "root_weight", False) else []


# --- backward --------------------------------------------------------------------------------------------------------
def backward(grad_output: Any, record: Record) -> GraphGradients:
    """The gradients of a pass that `run` made; see `GraphLayer.backward`."""
    from ..graphs.layer import GraphGradients

    layer, inputs, past = record.layer, record.inputs, record.past.past
    if record.is_moved:
        grad_output = gpu.moved("grad_output", grad_output)
    N, H, C = past.output.shape
    given = gradient("grad_output", grad_output, (N, layer.width), inputs.source.element)
    work = Work(layer, record.parameters, Space(past.output.native), inputs)
    found, space = Found(work), work.space
    grad = compact(space, given)
    attended, added = (grad, grad) if record.gate is None else gated_back(work, grad, record.gate, found)
    heads = viewed(attended, (N, H, C)) if layer.concat else _spread(work, attended)
    made, dsource, dtarget, dattr = record.kind.attend_back(work, past, heads, found)
    if made.offset is not None:
        _bias_gradient(work, made.offset, found)
    if inputs.target is not None:
        dtarget = _add_back(work, added, found, dtarget if inputs.is_pair else dsource)
    dweight = made.edge_weight
    if inputs.graph is not inputs.given:
        dattr = None if dattr is None else _without_loops(work, dattr, layer.fill_value)
        dweight = None if dweight is None else _without_loops(work, dweight, 1.0)

    result = functools.partial(gpu.home, record.is_moved)
    nodes: Any = result(dsource)
    if inputs.is_pair:
        if dtarget is None and inputs.target is not None:
            dtarget = space.keep(space.empty(inputs.target.shape, inputs.target.element))
            zero(space, dtarget, 0.0)
        nodes = nodes, result(dtarget)
    named = {name: result(found.of(name)) for name in record.parameters}
    attr = None if dattr is None or inputs.attr_shape is None else dattr.native.reshape(inputs.attr_shape)
    return GraphGradients(named, nodes, result(attr), result(dweight))


def _spread(work: Work, grad: GpuArray) -> GpuArray:
    """The gradient of each head, where their mean was taken."""
    space, (N, C), H = work.space, grad.shape, work.layer.heads
    made = space.keep(space.empty((N, H, C), work.element))
    product(space, matrix(grad), turned(matrix(work.mean())), matrix(viewed(made, (N, H * C))))
    return made


def _bias_gradient(work: Work, sums: GpuArray, found: Found) -> None:
    """That of the output's own bias, from the sums of each head's gradients."""
    space, (H, C) = work.space, sums.shape
    if work.layer.concat:
        found.put("bias", sums, (H * C,))
        return
    made, ones = space.empty((1, C), work.element), work.constant("ones", lambda: np.ones((1, H), np.float32))
    product(space, matrix(ones), matrix(sums), matrix(made))
    found.put("bias", made, (C,))


def _add_back(work: Work, grad: GpuArray, found: Found, dx: GpuArray | None) -> GpuArray | None:
    """The gradient of the targets through what was added to the attention's output."""
    target, layer = work.inputs.target, work.layer
    assert target is not None
    if "res.weight" in work.parameters:
        return found.linears(
            grad, target, ("res",), dx, work.constant("res.weight", lambda: work.parameters["res.weight"])
        )
    return found.linears(grad, target, ("lin_skip",), dx) if getattr(layer, "root_weight", False) else dx


def _without_loops(work: Work, grad: GpuArray, fill_value: Any) -> GpuArray:
    return loops_taken_out(work.space, work.inputs.given, grad, work.layer.add_self_loops, fill_value)
