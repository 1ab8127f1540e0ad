"""Attention over neighbours, of arrays on a GPU: what the functions of graphs/neighbors.py and the layers work with.

A graph stays where it is, on the CPU; what kernels need of it is uploaded once for each device and kept beside it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .. import gpu
from ..arrays import Array
from ..errors import GraphStructureError, InvalidInputError
from ..graphs import neighbors
from ..graphs.derived import Derived
from ..graphs.graph import CSRGraph
from ..graphs.neighbors import NeighborGradients
from ..plan.dropout import threshold_and_gain
from .arrays import GpuArray, Space
from .dense import gradient
from .layouts import compact, viewed, zero

__all__ = ["Made", "NeighborTerms", "Past", "rows"]


class NeighborTerms(NamedTuple):
    """What attention over neighbours is of; see the same of plan/csr.py. Rows are those that `rows` gives.

    Of SUM the query is (Nt, H, C) or None, and its terms are products with att, (2, H, C).
    """

    rule: int
    key: GpuArray
    query: GpuArray | None
    value: GpuArray
    edge: GpuArray | None = None  # (E, H, D), or of SUM (E, H)
    bias: GpuArray | None = None
    att: GpuArray | None = None  # (H, D), or of SUM (2, H, C)
    slope: float = 0.2
    scale: float = 1.0
    normalizes: bool = True
    dropout: float = 0.0
    seed: int = 0
    edge_weight: GpuArray | None = None
    aggregation: str = "sum"
    edge_value: GpuArray | None = None
    offset: GpuArray | None = None  # (Nt or 1, H, C)


class Made(NamedTuple):
    """Gradients; None for what there was not."""

    query: GpuArray | None  # of SUM None where its nodes are those of the value, which has it then
    key: GpuArray | None
    value: GpuArray
    edge: GpuArray | None
    bias: GpuArray | None
    edge_weight: GpuArray | None
    edge_value: GpuArray | None
    offset: GpuArray | None  # (H, C)
    att: GpuArray | None


# --- the functions ---------------------------------------------------------------------------------------------------
class NeighborRecord:
    """A call of `neighbor_attention` and what came of it, on a GPU: what a `NeighborCache` has."""

    def __init__(self, past: Past, is_moved: bool) -> None:
        self.past, self.is_moved = past, is_moved

    def _space(self) -> Space:
        return Space(self.past.output.native)

    @property
    def graph(self) -> CSRGraph:
        return self.past.graph

    @property
    def output(self) -> Any:
        return gpu.home(self.is_moved, self.past.output)

    @property
    def lse(self) -> Any:
        return gpu.home(self.is_moved, self.past.lse(self._space()))

    def coefficients(self) -> Any:
        return gpu.home(self.is_moved, self.past.coefficients(self._space()))

    def gradients(self, grad_output: Any) -> NeighborGradients:
        space, output = self._space(), self.past.output
        grad_output = gpu.moved("grad_output", grad_output) if self.is_moved else grad_output
        grad = gradient("grad_output", grad_output, output.shape, output.element)
        m = self.past.backward(space, rows(space, grad))
        made = (m.query, m.key, m.value, m.bias, m.edge, m.edge_value, m.edge_weight)
        return NeighborGradients(*(gpu.home(self.is_moved, x) for x in made))


def attend(arrays: tuple[Any, ...], graph: CSRGraph, device: str | None, *settings: Any) -> NeighborRecord:
    """`neighbor_attention` of its seven arrays on a GPU; those of NumPy are moved there if `device` says so."""
    from ..plan import cuda_csr as plan

    names = ("query", "key", "value", "edge_bias", "edge_key", "edge_value", "edge_weight")
    there, is_moved = gpu.arrived(device, **dict(zip(names, arrays, strict=True)))
    found = {name: gpu.floats(name, x) for name, x in zip(names, there, strict=True) if x is not None}
    one_element(found)
    shadows = tuple(None if name not in found else gpu.shadow(found[name].shape) for name in names)
    c = neighbors.call(shadows, graph, *settings)
    space = Space(found["query"].native)
    q, k, v = (rows(space, found[name]) for name in names[:3])
    bias, edge, edge_value, weight = (rows(space, found[name]) if name in found else None for name in names[3:])
    terms = NeighborTerms(
        plan.DOT, k, q, v, edge=edge, bias=bias, scale=c.scale, dropout=c.dropout, seed=c.seed, edge_weight=weight,
        aggregation=c.aggregation, edge_value=edge_value,
    )  # fmt: skip
    return NeighborRecord(Past(graph, terms, space), is_moved)


def one_element(arrays: dict[str, GpuArray]) -> None:
    """Raise unless all are of one type."""
    if len({x.element for x in arrays.values()}) > 1:
        dtypes = {f"{name}.dtype": x.element for name, x in arrays.items()}
        raise InvalidInputError("arrays differ in dtype", shapes=dtypes, hint="cast them to one")


def edge_softmax(scores: Any, graph: CSRGraph) -> Any:
    from ..plan import cuda_csr as plan

    s = gpu.floats("scores", scores)
    neighbors.edge_numbers("scores", gpu.shadow(s.shape), neighbors.checked_graph(graph))
    space, H = Space(scores), s.shape[1] if len(s.shape) == 2 else 1
    bias = viewed(compact(space, s), (graph.num_edges, H))
    none = space.keep(space.empty((graph.num_sources, H, 0), s.element))
    made = Past(graph, NeighborTerms(plan.GIVEN, none, None, none, bias=bias), space).coefficients(space)
    return made.native if len(s.shape) == 2 else made.native.reshape(-1)


def edge_softmax_backward(grad_weights: Any, weights: Any, graph: CSRGraph) -> Any:
    from ..kernels.cuda import csr_backward as backwards
    from ..plan import cuda_csr as plan

    p = gpu.floats("weights", weights)
    neighbors.edge_numbers("weights", gpu.shadow(p.shape), neighbors.checked_graph(graph))
    grad, space = gradient("grad_weights", grad_weights, p.shape, p.element), Space(weights)
    made, w = space.empty(p.shape, p.element), _walk(graph, space, False)
    if math.prod(p.shape):
        job = backwards.SoftmaxJob(
            indptr=space.pointer(w.indptr), edge_ids=space.pointer(w.edge_ids), has_ids=int(w.edge_ids is not None),
            weights=space.pointer(compact(space, p)), grad=space.pointer(compact(space, grad)),
            out=space.pointer(made), nodes=w.nodes, H=math.prod(p.shape[1:]),
        )  # fmt: skip
        v = plan.flat(p.element)
        backwards.softmax_backward(v, job, plan.by_warps(v, w.nodes), space.stream)
    return made.native


# --- graphs ----------------------------------------------------------------------------------------------------------
class _Walk(NamedTuple):
    """The edges in the order of one of their ends, on a GPU."""

    indptr: GpuArray
    others: GpuArray
    edge_ids: GpuArray | None
    positions: GpuArray | None
    parts: GpuArray
    hubs: GpuArray
    nodes: int
    count_parts: int
    count_hubs: int
    most: int


BY_TARGET = Derived[_Walk]("the edges in the order of their targets, on a GPU")
BY_SOURCE = Derived[_Walk]("the edges in the order of their sources, on a GPU")


def _walk(graph: CSRGraph, space: Space, by_source: bool) -> _Walk:
    kind = BY_SOURCE if by_source else BY_TARGET
    return graph.derived(kind, lambda: _uploaded(graph, space, by_source), space.library.key)


def _uploaded(graph: CSRGraph, space: Space, by_source: bool) -> _Walk:
    from ..plan import cuda_csr as plan
    from ..plan.schedule import hubs_of

    if graph.indices.dtype != np.int32:
        raise GraphStructureError("the graph counts to more than 2147483647", hint="cut it, or use the CPU")
    indptr, others, positions = graph.indptr, graph.indices, None
    if by_source:
        indptr, others, positions = graph.transposed
    parts, hubs = hubs_of(indptr, plan.PART, plan.MOST)

    def upload(x: Array) -> GpuArray:  # one element extra, so that an empty array still has an address
        return space.library.view(space.library.upload(np.append(x.reshape(-1), 0).astype(np.int32)))

    ids, places = (None if x is None else upload(x) for x in (graph.edge_ids, positions))
    sizes = len(indptr) - 1, len(parts), len(hubs), plan.MOST
    return _Walk(upload(indptr), upload(others), ids, places, upload(parts), upload(hubs), *sizes)


# --- layouts ---------------------------------------------------------------------------------------------------------
def rows(space: Space, x: GpuArray) -> GpuArray:
    """With each node's heads and channels side by side, as the kernels read them; a copy only where it must be."""
    inner = gpu.contiguous_strides(x.shape[1:])
    fits = all(n <= 1 or a == b for n, a, b in zip(x.shape[1:], x.strides[1:], inner, strict=True))
    return x if fits and x.strides[0] >= 0 else compact(space, x)


def _by_fours(x: GpuArray | None) -> bool:
    """Can all rows be read by aligned fours?"""
    if x is None:
        return True
    first = x.data[x.start :].ctypes.data if isinstance(x.data, np.ndarray) else x.data
    fits = x.shape[-1] % 4 == 0 and (x.strides[0] % 4 == 0 or x.shape[0] <= 1)
    return bool(fits and first % (16 if x.element == "float32" else 8) == 0)


def _rows(space: Space, x: GpuArray | None) -> Any:
    from ..kernels.cuda.walk import Rows

    return Rows(space.pointer(x), 0 if x is None or x.shape[0] == 1 else x.strides[0])


# --- forward ---------------------------------------------------------------------------------------------------------
class Past:
    """What a pass over the edges remembers, for its coefficients and its gradients; as `neighbors.Past`."""

    def __init__(self, graph: CSRGraph, terms: NeighborTerms, space: Space, joined: bool = False) -> None:
        """The output is (Nt, H, C), or where heads are `joined` (Nt, H * C) for who sees more than its rows."""
        from ..kernels.cuda import csr

        self.graph, self.terms = graph, terms
        Nt, (_, H, C) = graph.num_targets, terms.value.shape
        made = space.keep(space.empty((Nt, H * C) if joined else (Nt, H, C), terms.value.element))
        self.output = made._replace(shape=(Nt, H, C), strides=gpu.contiguous_strides((Nt, H, C)))
        self.attended = self.output  # less the offset, where gradients need it so
        if terms.offset is not None and terms.normalizes:
            self.attended = space.keep(space.empty((Nt, H, C), terms.value.element))
        self.stats = space.keep(space.empty((Nt, H, 4), "float32"))
        self.best = space.keep(space.empty((Nt, H, C), "int32")) if terms.aggregation == "max" else None
        _run(csr.forward, self._walk(space), self._variant(), self._job(space), space)

    def coefficients(self, space: Space) -> GpuArray:
        """(E, H), in the caller's order."""
        from ..kernels.cuda import csr

        made = space.keep(space.empty((self.graph.num_edges, self.terms.value.shape[1]), self.terms.value.element))
        job = self._job(space)._replace(weights=space.pointer(made))
        _run(csr.coefficients, self._walk(space)._replace(count_hubs=0), self._variant(), job, space)
        return made

    def lse(self, space: Space) -> GpuArray:
        from ..kernels.cuda import csr
        from ..plan import cuda_csr as plan

        shape = self.stats.shape[:2]
        made, n, v = space.keep(space.empty(shape, "float32")), math.prod(shape), plan.flat("float32")
        if n:
            job = csr.LseJob(stats=space.pointer(self.stats), lse=space.pointer(made), count=n)
            csr.lse(v, job, plan.by_threads(v, n), space.stream)
        return made

    def _walk(self, space: Space, by_source: bool = False) -> _Walk:
        return _walk(self.graph, space, by_source)

    def _variant(self, *more: GpuArray | None) -> Any:
        from ..plan import cuda_csr as plan

        t = self.terms
        _, H, C = t.value.shape
        edge = None if t.rule == plan.SUM else t.edge
        arrays = (t.key, t.query, t.value, edge, t.edge_value, t.offset, self.output, self.attended, *more)
        shares = t.dropout > 0 or t.edge_weight is not None or t.aggregation == "mean"
        options = plan.Options(
            edge=t.edge is not None, bias=t.bias is not None, edge_value=t.edge_value is not None, shares=shares,
            maximum=t.aggregation == "max", normalizes=t.normalizes,
        )  # fmt: skip
        width = max(C, t.key.shape[2])
        if width > plan.WIDEST:
            raise InvalidInputError(
                f"a head has {width} channels: the GPU takes at most {plan.WIDEST}", hint="use the CPU, or more heads"
            )
        return plan.variant(t.value.element, t.rule, H, width, all(_by_fours(x) for x in arrays), options)

    def _job(self, space: Space) -> Any:
        from ..kernels.cuda.walk import NeighborJob

        t, w = self.terms, self._walk(space)
        _, H, C = t.value.shape
        threshold, gain = threshold_and_gain(t.dropout)
        return NeighborJob(
            H=H, C=C, D=t.key.shape[2], by_target=space.pointer(w.indptr), edge_ids=space.pointer(w.edge_ids),
            has_ids=int(w.edge_ids is not None),
            slope=t.slope, scale=t.scale, key=_rows(space, t.key), query=_rows(space, t.query),
            edge=_rows(space, t.edge), bias=space.pointer(t.bias), att=space.pointer(t.att),
            has_query=int(t.query is not None),
            seed=t.seed, threshold=threshold, gain=gain,
            has_dropout=int(t.dropout > 0), edge_weight=space.pointer(t.edge_weight),
            has_weight=int(t.edge_weight is not None), is_mean=int(t.aggregation == "mean"),
            value=_rows(space, t.value), edge_value=_rows(space, t.edge_value), offset=_rows(space, t.offset),
            has_offset=int(t.offset is not None), output=_rows(space, self.output),
            attended=_rows(space, self.attended), stats=space.pointer(self.stats), best=space.pointer(self.best),
        )  # fmt: skip

    # --- backward ----------------------------------------------------------------------------------------------------
    def backward(
        self, space: Space, grad: GpuArray, room: dict[str, GpuArray] | None = None, wants_offset: bool = False
    ) -> Made:
        """The gradients of all that was given; `room` names arrays that gradients are written into."""
        from ..kernels.cuda import csr_backward as backwards
        from ..kernels.cuda import sums as sums_of
        from ..plan import cuda_csr as plan

        t, made = self.terms, dict(room or {})
        element, E, (_, H, C) = t.value.element, self.graph.num_edges, t.value.shape
        adds = t.rule == plan.SUM and t.query is t.value
        wanted = {"value": t.value, "edge_value": t.edge_value, "edge": t.edge if t.rule != plan.SUM else None}
        wanted["key"] = t.key if t.rule == plan.DOT else None
        wanted["query"] = None if adds or t.rule == plan.GIVEN else t.query
        for name, x in wanted.items():
            if x is not None and name not in made:
                made[name] = space.keep(space.empty(x.shape, element))
        if t.bias is not None or (t.rule == plan.SUM and t.edge is not None):
            made["bias"] = space.keep(space.empty((E, H), element))
        targets, sources = self._walk(space), self._walk(space, True)
        v = self._variant(grad, *(made.get(name) for name in ("value", "key", "query", "edge", "edge_value")))
        job = self._job(space)._replace(
            grad=_rows(space, grad), back_stats=space.scratch(math.prod(self.stats.shape)),
            dscores=space.scratch(E * H), dquery=_rows(space, made.get("query")), dkey=_rows(space, made.get("key")),
            dvalue=_rows(space, made["value"]), dedge=_rows(space, made.get("edge")),
            dedge_value=_rows(space, made.get("edge_value")), dbias=space.pointer(made.get("bias")),
            wants_dbias=int("bias" in made), dweight=space.scratch(E * H if t.edge_weight is not None else 1),
            adds=int(adds),
        )  # fmt: skip
        offset = space.keep(space.empty((H, C), element)) if wants_offset else None
        att = None if t.att is None else space.keep(space.empty(t.att.shape, element))
        of_source, of_target = None, att
        if t.rule == plan.SUM and att is not None:
            of_source, of_target = (gpu.part(att, n * H * C, H * C) for n in range(2))
        whole = targets._replace(count_parts=0, count_hubs=0)
        _run(backwards.prepare, whole, plan.for_prepare(v), job, space, offset)
        _run(backwards.backward_sources, sources, v, job, space, of_source)
        if t.rule in (plan.JOINT, plan.DOT) or (t.rule == plan.SUM and t.query is not None):
            _run(backwards.backward_targets, targets, plan.for_targets(v), job, space, of_target)
        elif of_target is not None:
            zero(space, of_target, 0.0)
        weight = None
        if t.edge_weight is not None:
            weight = space.keep(space.empty((E,), element))
            add, flat = sums_of.HeadsJob(numbers=job.dweight, out=space.pointer(weight), E=E, H=H), plan.flat(element)
            sums_of.add_heads(flat, add, plan.by_threads(flat, E), space.stream)
        if t.rule == plan.SUM and t.edge is not None:
            made["edge"] = made.pop("bias")
        return Made(
            query=made.get("query"), key=made.get("key"), value=made["value"], edge=made.get("edge"),
            bias=made.get("bias"), edge_weight=weight, edge_value=made.get("edge_value"), offset=offset, att=att,
        )  # fmt: skip


# --- launches --------------------------------------------------------------------------------------------------------
def _run(kernel: Any, walk: _Walk, v: Any, job: Any, space: Space, sums: GpuArray | None = None) -> None:
    """All nodes and the parts of hubs, then hubs. `sums`, if given, gets what the groups have summed."""
    from ..plan import cuda_csr as plan

    items = walk.nodes + walk.count_parts
    if not items or not job.H:
        if sums is not None:
            zero(space, sums, 0.0)
        return
    each = 1 if sums is None else plan.rounds(v, items)
    first, second = plan.blocks(v, items, each), plan.blocks(v, walk.count_hubs, 1)
    partial = space.scratch(walk.count_parts * 2 * job.H * v.line) if walk.count_parts else space.nothing
    best = space.scratch(walk.count_parts * job.H * v.line, "int32") if walk.count_parts else space.nothing
    columns = job.H * job.C
    made = space.nothing if sums is None else space.scratch((first + second) * columns)
    job = job._replace(
        indptr=space.pointer(walk.indptr), others=space.pointer(walk.others), positions=space.pointer(walk.positions),
        parts=space.pointer(walk.parts), hubs=space.pointer(walk.hubs), count_parts=walk.count_parts,
        count_hubs=walk.count_hubs, nodes=walk.nodes, most=walk.most, rounds=each, partial=partial,
        partial_best=best, sums=made, wants_sums=int(sums is not None),
    )  # fmt: skip
    kernel(v, job, plan.grid(v, items, each, job.H), space.stream)
    if second:
        hubs = job._replace(of_hubs=1, rounds=1, sums_from=first)
        kernel(v, hubs, plan.grid(v, walk.count_hubs, 1, job.H), space.stream)
    if sums is not None and columns:
        from ..kernels.cuda import sums as sums_of

        add = sums_of.SumJob(sums=made, out=space.pointer(sums), rows=first + second, columns=columns)
        sums_of.add_up(plan.adding(sums.element), add, plan.by_columns(columns), space.stream)
