"""How each kind of graph layer attends on a GPU, and the way back: the `_attend` of gat.py and transformer.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..errors import InvalidInputError
from .arrays import GpuArray
from .neighbors import NeighborTerms, Past
from .projection import linear, linear_backward
from .work import Found, Inputs, Work, columns

__all__ = ["Kind", "kind_of"]


class Kind(NamedTuple):
    """What makes the scores and values of a kind of layer, and, with the gradient of each head's output, the way back:
    the attention's own gradients, those of sources, of targets if they are not in the first, of edge attributes."""

    attend: Callable[[Work], Past]
    attend_back: Callable[..., tuple[Any, GpuArray, GpuArray | None, GpuArray | None]]


def _gat(work: Work) -> Past:
    from ..plan import cuda_csr as plan

    layer, inputs, p, space = work.layer, work.inputs, work.parameters, work.space
    (of_source, of_target), heads = layer._names(), (layer.heads, layer.out_channels)
    h = columns(linear(space, inputs.source, work.constant(of_source, lambda: p[of_source])), 0, heads)
    query: GpuArray | None = h
    if inputs.is_pair or of_source != of_target:
        query = None
        if inputs.target is not None:
            query = columns(linear(space, inputs.target, work.constant(of_target, lambda: p[of_target])), 0, heads)
    edge = None
    if inputs.edge_attr is not None:  # att . (W a) = (att W) a: no array of edges is as wide as a node
        edge = linear(space, inputs.edge_attr, _by_edge(work))
    att = work.constant("att", lambda: np.concatenate([p["att_src"], p["att_dst"]]))
    terms = NeighborTerms(plan.SUM, h, query, h, edge=edge, att=att, offset=work.offset(), **work.common())
    return Past(inputs.graph, terms, space, layer.concat)


def _by_edge(work: Work) -> GpuArray:
    from ..graphs.gat import att_by_edge

    p = work.parameters
    return work.constant("by edge", lambda: att_by_edge(p["att_edge"], p["lin_edge.weight"]))


def _gat_back(
    work: Work, past: Past, grad: GpuArray, found: Found
) -> tuple[Any, GpuArray, GpuArray | None, GpuArray | None]:
    layer, inputs, p = work.layer, work.inputs, work.parameters
    of_source, of_target = (name.removesuffix(".weight") for name in layer._names())
    made: Any = past.backward(work.space, grad, wants_offset=layer.bias)
    shape, half = p["att_src"].shape, math.prod(p["att_src"].shape)
    flat = made.att.native.reshape(-1)
    found.named["att_src"], found.named["att_dst"] = flat[:half].reshape(shape), flat[half:].reshape(shape)

    def weight(name: str) -> GpuArray:
        return work.constant(f"{name}.weight", lambda: p[f"{name}.weight"])

    dsource = found.linears(made.value, inputs.source, (of_source,), None, weight(of_source))
    dtarget = dattr = None
    if made.query is not None:
        assert inputs.target is not None
        dtarget = found.linears(made.query, inputs.target, (of_target,), None, weight(of_target))
    if inputs.edge_attr is not None:
        dattr, dby_edge, _ = linear_backward(work.space, made.edge, inputs.edge_attr, _by_edge(work))
        edge_attention_back(work, dby_edge, found)
    return made, dsource, dtarget, dattr


def edge_attention_back(work: Work, grad: GpuArray, found: Found) -> None:
    """The gradients of att_edge and lin_edge.weight, from that of their product (H, edge_dim)."""
    from ..kernels.cuda import folding
    from ..plan import cuda_csr as plan

    p, space, layer = work.parameters, work.space, work.layer
    names = ("att_edge", "lin_edge.weight")
    parts = [work.constant(name, lambda name=name: p[name]) for name in names]  # type: ignore[misc]
    made = [space.keep(space.empty(p[name].shape, work.element)) for name in names]
    rows = layer.heads * layer.out_channels
    job = folding.FoldJob(
        grad=space.pointer(grad), att=space.pointer(parts[0]), weight=space.pointer(parts[1]),
        datt=space.pointer(made[0]), dweight=space.pointer(made[1]), C=layer.out_channels, D=layer.edge_dim, rows=rows,
    )  # fmt: skip
    v = plan.fold(work.element)
    folding.fold_back(v, job, plan.by_threads(v, rows), space.stream)
    for name, x in zip(names, made, strict=True):
        found.named[name] = x.native


def _gatv2(work: Work) -> Past:
    from ..plan import cuda_csr as plan

    layer, inputs, p = work.layer, work.inputs, work.parameters
    right_name = "lin_l" if layer.share_weights else "lin_r"
    if not inputs.is_pair and not layer.share_weights:
        left, right = work.linears(inputs.source, ("lin_l", "lin_r"))
    else:
        (left,), right = work.linears(inputs.source, ("lin_l",)), None
        if not inputs.is_pair:
            right = left
        else:
            (right,) = work.linears(_target(inputs), (right_name,))
    edge = _edge_rows(work)
    att = work.constant("att", lambda: p["att"][0])
    terms = NeighborTerms(plan.JOINT, left, right, left, edge=edge, att=att, offset=work.offset(), **work.common())
    return Past(inputs.graph, terms, work.space, layer.concat)


def _gatv2_back(
    work: Work, past: Past, grad: GpuArray, found: Found
) -> tuple[Any, GpuArray, GpuArray | None, GpuArray | None]:
    layer, inputs, dtarget = work.layer, work.inputs, None
    both = not inputs.is_pair and not layer.share_weights
    room, whole = _room(work, ("value", "query")) if both else ({}, None)
    made: Any = past.backward(work.space, grad, room, wants_offset=layer.bias)
    found.put("att", made.att, work.parameters["att"].shape)
    if both:
        assert whole is not None
        dsource = found.linears(whole, inputs.source, ("lin_l", "lin_r"), None)
    else:
        dsource = found.linears(made.value, inputs.source, ("lin_l",), None)
        name = "lin_l" if layer.share_weights else "lin_r"
        more = found.linears(made.query, _target(inputs), (name,), None if inputs.is_pair else dsource)
        dtarget = more if inputs.is_pair else None
    return made, dsource, dtarget, _edge_rows_back(work, (made.edge,), found)


def _transformer(work: Work) -> Past:
    from ..plan import cuda_csr as plan

    layer, inputs = work.layer, work.inputs
    root = ("lin_skip",) if layer._begins_with_root else ()
    if inputs.is_pair:
        key, value = work.linears(inputs.source, ("lin_key", "lin_value"))
        query, *offset = work.linears(_target(inputs), ("lin_query", *root))
    else:
        key, value, query, *offset = work.linears(inputs.source, ("lin_key", "lin_value", "lin_query", *root))
    edge = _edge_rows(work)
    terms = NeighborTerms(
        plan.DOT, key, query, value, edge=edge, edge_value=edge, scale=layer._scale,
        offset=offset[0] if offset else None, **work.common(),
    )  # fmt: skip
    return Past(inputs.graph, terms, work.space, layer.concat)


def _transformer_back(
    work: Work, past: Past, grad: GpuArray, found: Found
) -> tuple[Any, GpuArray, GpuArray | None, GpuArray | None]:
    inputs, dtarget = work.inputs, None
    names = ("key", "value") if inputs.is_pair else ("key", "value", "query")
    room, whole = _room(work, names)
    made: Any = past.backward(work.space, grad, room)
    dsource = found.linears(whole, inputs.source, tuple(f"lin_{name}" for name in names), None)
    if inputs.is_pair:
        dtarget = found.linears(made.query, _target(inputs), ("lin_query",), None)
    return made, dsource, dtarget, _edge_rows_back(work, (made.edge, made.edge_value), found)


def _target(inputs: Inputs) -> GpuArray:
    if inputs.target is None:
        raise InvalidInputError("x_target is None", hint="the layer needs features of the targets")
    return inputs.target


def _edge_rows(work: Work) -> GpuArray | None:
    """(E, H, C): what the edges' attributes add."""
    attr = work.inputs.edge_attr
    return None if attr is None else work.linears(attr, ("lin_edge",))[0]


def _edge_rows_back(work: Work, grads: tuple[GpuArray | None, ...], found: Found) -> GpuArray | None:
    attr, dattr = work.inputs.edge_attr, None
    for grad in grads:
        if attr is not None and grad is not None:
            dattr = found.linears(grad, attr, ("lin_edge",), dattr)
    return dattr


def _room(work: Work, names: tuple[str, ...]) -> tuple[dict[str, GpuArray], GpuArray]:
    """Where gradients shall be written that are to lie side by side."""
    H, C, N = work.layer.heads, work.layer.out_channels, work.inputs.source.shape[0]
    whole = work.space.keep(work.space.empty((N, len(names) * H * C), work.element))
    return {name: columns(whole, n * H * C, (H, C)) for n, name in enumerate(names)}, whole


@functools.cache
def kinds() -> dict[type, Kind]:
    """How layers of these classes attend."""
    from ..graphs.gat import GAT, GATv2
    from ..graphs.transformer import GraphTransformer

    return {
        GAT: Kind(_gat, _gat_back), GATv2: Kind(_gatv2, _gatv2_back),
        GraphTransformer: Kind(_transformer, _transformer_back),
    }  # fmt: skip


def kind_of(layer_class: type) -> Kind | None:
    """The kind of a class of layers, or of the class that it is derived from; None if the GPU knows none, or if the
    class has a way of its own to attend, of which the kernels know nothing."""
    base = next((c for c in layer_class.__mro__ if c in kinds()), None)
    if base is None:
        return None
    is_own = any(getattr(layer_class, name) is not getattr(base, name) for name in _HOOKS)
    return None if is_own else kinds()[base]


# that compute, on a CPU
_HOOKS = "_run", "_attend", "_join_heads", "_finish", "_backward", "_finish_back", "_join_heads_back", "_attend_back"
