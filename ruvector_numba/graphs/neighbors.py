"""Attention over neighbours: a node of a graph attends to the sources of the edges into it, and to nothing else.

    query (Nt, H, D)    key (Ns, H, D)    value (Ns, H, C)    what belongs to edges is (E, ...), in the caller's order

    s = scale * q_i . (k_j + edge_key)  + edge_bias          of the edge from source j to target i
    p = softmax of s over the edges into i                   -inf hides an edge; of no edges at all nothing comes
    o = sum over the edges of p * edge_weight * (v_j + edge_value)         or their mean, or largest in each channel

It is dense attention with a mask, in time and memory proportional to the edges.

>>> import numpy as np, ruvector_numba as rv
>>> graph = rv.CSRGraph.from_edge_index([[0, 1, 2], [2, 2, 1]])
>>> x = np.eye(3)[:, None, :]
>>> rv.neighbor_attention(x, x, x, graph)[:, 0]
array([[0. , 0. , 0. ],
       [0. , 0. , 1. ],
       [0.5, 0.5, 0. ]])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .. import checks, gpu
from ..arrays import Array
from ..errors import DimensionMismatchError, GraphStructureError, InvalidConfigError, InvalidInputError
from ..values import shown
from . import edges
from .derived import Derived
from .edge_values import checked_edges
from .graph import CSRGraph

if TYPE_CHECKING:
    from ..gpu import neighbors as gpu_neighbors
    from ..plan import csr as plan

__all__ = [
    "NeighborCache",
    "NeighborGradients",
    "neighbor_attention",
    "neighbor_attention_backward",
    "neighbor_attention_forward",
]

AGGREGATIONS = ("sum", "mean", "max")


# --- what the layers work with ---------------------------------------------------------------------------------------
class Past:
    """A pass over the edges: its output, and all that its coefficients and gradients need."""

    def __init__(self, graph: CSRGraph, terms: plan.NeighborTerms, keeps: bool = True) -> None:
        from ..plan import csr as plan

        self.graph, self.terms = graph, terms
        self.kept = plan.forward(by_target(graph), terms, keeps)

    @property
    def output(self) -> Array:
        return self.kept.output

    @property
    def lse(self) -> Array:
        with np.errstate(divide="ignore"):
            heads = self.output.shape[1]
            return self.kept.bounds[:, :heads] + np.log(self.kept.totals[:, :heads])

    def coefficients(self) -> Array:
        from ..plan import csr as plan

        return plan.coefficients(by_target(self.graph), self.terms, self.kept)

    def backward(self, grad: Array, grad_weights: Array | None = None, joined: tuple[str, ...] = ()) -> plan.Made:
        from ..plan import csr as plan

        targets, sources = by_target(self.graph), by_source(self.graph)
        return plan.backward(targets, sources, self.terms, self.kept, packed(grad), grad_weights, joined)

    def gradients(self, grad_output: ArrayLike) -> NeighborGradients:
        grad = checks.gradient("grad_output", grad_output, self.output.shape, self.output.dtype)
        back = self.backward(grad)
        assert back.key is not None  # dot products have keys
        of_edges = back.bias, back.edge, back.edge_value, back.edge_weight
        return NeighborGradients(back.query, back.key, back.value, *of_edges)


BY_TARGET: Derived[plan.Walk] = Derived("the edges in the order of their targets, cut into tasks")
BY_SOURCE: Derived[plan.Walk] = Derived("the edges in the order of their sources, cut into tasks")


def by_target(graph: CSRGraph) -> plan.Walk:
    from ..plan import csr as plan

    return graph.derived(BY_TARGET, lambda: plan.walk_of(graph.indptr, graph.indices, graph.edge_ids))


def by_source(graph: CSRGraph) -> plan.Walk:
    from ..plan import csr as plan

    turned = graph.transposed
    return graph.derived(
        BY_SOURCE, lambda: plan.walk_of(turned.indptr, turned.targets, graph.edge_ids, turned.positions)
    )


def packed(x: Array) -> Array:
    """The array with each node's numbers side by side, as the kernels read them; a copy only where it must be."""
    itemsize, wanted = x.itemsize, x.itemsize
    if x.ndim == 1:
        return np.ascontiguousarray(x)
    fits = x.flags.aligned and x.strides[0] % itemsize == 0 and x.strides[0] >= 0
    for n, stride in zip(x.shape[:0:-1], x.strides[:0:-1], strict=True):
        fits = fits and (n <= 1 or stride == wanted)
        wanted *= n
    return x if fits else np.ascontiguousarray(x)


# --- attention -------------------------------------------------------------------------------------------------------
class NeighborCache:
    """The output of `neighbor_attention_forward`, and all that its gradients need.

    Attributes
    ----------
    output : array (Nt, H, C)
    lse : array (Nt, H)
        The natural logarithm of the sum of exp(score) over a target's edges; -inf where there are none.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> graph = rv.CSRGraph.from_edge_index([[0, 1, 2, 2], [1, 2, 0, 1]])
    >>> x = np.zeros((3, 1, 4))
    >>> cache = rv.neighbor_attention_forward(x, x, x, graph)
    >>> np.exp(cache.lse).ravel().round(), cache.coefficients().ravel()
    (array([1., 2., 1.]), array([0.5, 1. , 1. , 0.5]))
    """

    __slots__ = ("_past", "output")

    def __init__(self, past: Past | gpu_neighbors.NeighborRecord) -> None:
        self._past, self.output = past, past.output

    def __repr__(self) -> str:
        return f"NeighborCache(output {self.output.shape}, {self._past.graph!r})"

    @property
    def lse(self) -> Array:
        """(Nt, H): the logarithm of the sum of exp(score) over a target's edges; -inf where there are none."""
        return self._past.lse

    def coefficients(self) -> Array:
        """The weight of each edge, after the softmax, before dropout and edge weights; computed now.

        Returns
        -------
        array (E, H)
            In the caller's order of edges.
        """
        return self._past.coefficients()


@dataclass(frozen=True, slots=True, eq=False)
class NeighborGradients:
    """The gradients of what `neighbor_attention` was given, of the same shapes; None for what was not.

    Attributes
    ----------
    query : array (Nt, H, D)
    key, value : array (Ns, H, D) and (Ns, H, C)
    edge_bias : array (E, H) or None
    edge_key, edge_value : array (E, H, D) and (E, H, C), or None
    edge_weight : array (E,) or None
        These four in the caller's order of edges.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> graph = rv.CSRGraph.from_edge_index([[0, 1, 2, 2], [1, 2, 0, 1]])
    >>> x = np.ones((3, 2, 4))
    >>> cache = rv.neighbor_attention_forward(x, x, x, graph, edge_bias=np.zeros((4, 2)))
    >>> gradients = rv.neighbor_attention_backward(cache.output, cache)
    >>> gradients.value.shape, gradients.edge_bias.shape, gradients.edge_key
    ((3, 2, 4), (4, 2), None)
    """

    query: Array
    key: Array
    value: Array
    edge_bias: Array | None
    edge_key: Array | None
    edge_value: Array | None
    edge_weight: Array | None


def neighbor_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    graph: CSRGraph,
    edge_bias: ArrayLike | None = None,
    edge_key: ArrayLike | None = None,
    edge_value: ArrayLike | None = None,
    scale: float | None = None,
    *,
    edge_weight: ArrayLike | None = None,
    dropout_p: float = 0.0,
    aggregation: str = "sum",
    seed: int | None = None,
    device: str | None = None,
) -> Array:
    """Attention of each node to the sources of its edges.

    Parameters
    ----------
    query : array (Nt, H, D), float32 or float64
        One row for each target.
    key, value : array (Ns, H, D) and (Ns, H, C)
        One row for each source.
    graph : CSRGraph
        With Ns sources and Nt targets. Nothing else will do: of an edge_index make one, once, by
        ``CSRGraph.from_edge_index(edge_index, (Ns, Nt))``.
    edge_bias : array (E, H), optional
        Added to the scores; -inf hides an edge from a head.
    edge_key, edge_value : array (E, H, D) and (E, H, C), optional
        Added to the keys and to the values that go along the edges.
    scale : float, optional
        Multiplies the products of query and key; 1 / sqrt(D) if None.
    edge_weight : array (E,), optional
        Multiplies the weights after the softmax.
    dropout_p : float, default 0
        The probability to drop a weight, after the softmax; the others are divided by 1 - dropout_p.
    aggregation : {"sum", "mean", "max"}, default "sum"
        How a target joins its messages, weight times value: "mean" is their sum divided by the number of its edges;
        "max" takes the largest in each channel, and among equal ones the first edge's in the caller's order. -inf takes
        an edge out of the softmax and of "max"; "mean" still divides by all edges, as PyTorch Geometric's does. A
        dropped edge brings 0 to "max".
    seed : int, optional
        Decides what is dropped, by an edge's number in the caller's order; a fresh one if None.
    device : {"cuda", "cpu"}, optional
        "cuda" moves arrays of NumPy to the GPU and the results back. Without it, arrays that lie on a GPU (of CuPy,
        torch or Numba: float32, float16 or bfloat16) stay there, and so do the results.

    Returns
    -------
    array (Nt, H, C)
        0 for a target without edges. The same to the bit for any number of threads; edges of different targets may be
        given in any order, those of one target are added in the caller's. Not so with dropout, where an edge that gets
        another number may be dropped in place of another.

    Raises
    ------
    InvalidInputError
        If an array is missing, has the wrong number of axes, or holds other than float32 or float64 numbers, if they
        differ in dtype, `scale`, `dropout_p` or `seed` is no such number, or the dtype cannot hold `scale`.
    DimensionMismatchError
        If two sizes differ that must agree.
    InvalidConfigError
        If `aggregation` is unknown.
    GraphStructureError
        If `graph` is no `CSRGraph`.

    References
    ----------
    The attention of `TransformerConv` of PyTorch Geometric; edge weights as in `GATConv` of DGL.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> graph = rv.CSRGraph.from_edge_index([[0, 1, 2, 2], [1, 2, 0, 1]])
    >>> x = np.random.default_rng(0).standard_normal((3, 2, 4))
    >>> rv.neighbor_attention(x, x, x, graph).shape
    (3, 2, 4)
    """
    arrays = query, key, value, edge_bias, edge_key, edge_value, edge_weight
    return _attend(arrays, graph, scale, dropout_p, aggregation, seed, device, keeps=False).output


def neighbor_attention_forward(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    graph: CSRGraph,
    edge_bias: ArrayLike | None = None,
    edge_key: ArrayLike | None = None,
    edge_value: ArrayLike | None = None,
    scale: float | None = None,
    *,
    edge_weight: ArrayLike | None = None,
    dropout_p: float = 0.0,
    aggregation: str = "sum",
    seed: int | None = None,
    device: str | None = None,
) -> NeighborCache:
    """`neighbor_attention` with what its gradients need: the scores, (E, H), and their logsumexp.

    Parameters
    ----------
    query, key, value, graph, edge_bias, edge_key, edge_value, scale, edge_weight, dropout_p, aggregation, seed, device
        As in `neighbor_attention`.

    Returns
    -------
    NeighborCache
        It refers to the arrays, on a GPU to the output too: they must not change before the backward pass.

    Raises
    ------
    InvalidInputError, DimensionMismatchError, InvalidConfigError, GraphStructureError
        As in `neighbor_attention`.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> graph = rv.CSRGraph.from_edge_index([[0, 1, 2, 2], [1, 2, 0, 1]])
    >>> x = np.random.default_rng(0).standard_normal((3, 2, 4))
    >>> cache = rv.neighbor_attention_forward(x, x, x, graph)
    >>> cache.coefficients().shape
    (4, 2)
    >>> rv.neighbor_attention_backward(np.ones_like(cache.output), cache).query.shape
    (3, 2, 4)
    """
    arrays = query, key, value, edge_bias, edge_key, edge_value, edge_weight
    return NeighborCache(_attend(arrays, graph, scale, dropout_p, aggregation, seed, device))


def neighbor_attention_backward(grad_output: ArrayLike, cache: NeighborCache) -> NeighborGradients:
    """The gradients of a loss by all that `neighbor_attention_forward` was given, from that by its output. Exact.

    Parameters
    ----------
    grad_output : array (Nt, H, C)
        The gradient of the loss by the output, in its dtype.
    cache : NeighborCache
        The result of `neighbor_attention_forward`.

    Returns
    -------
    NeighborGradients
        Each in the shape of what it is the gradient of. Those of edges stand in the caller's order.

    Raises
    ------
    InvalidInputError
        If `cache` is no `NeighborCache`, or `grad_output` has another dtype than the output.
    DimensionMismatchError
        If `grad_output` has another shape than the output.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> graph = rv.CSRGraph.from_edge_index([[0, 1, 2, 2], [1, 2, 0, 1]])
    >>> x = np.random.default_rng(0).standard_normal((3, 2, 4))
    >>> cache = rv.neighbor_attention_forward(x, x, x, graph, edge_weight=np.ones(4))
    >>> gradients = rv.neighbor_attention_backward(np.ones_like(cache.output), cache)
    >>> gradients.value.shape, gradients.edge_weight.shape, gradients.edge_bias
    ((3, 2, 4), (4,), None)
    """
    if not isinstance(cache, NeighborCache):
        hint = "give what neighbor_attention_forward returned"
        raise InvalidInputError(f"cache is a {type(cache).__name__}, not a NeighborCache", hint=hint)
    return cache._past.gradients(grad_output)


# --- checks ----------------------------------------------------------------------------------------------------------
def checked_graph(graph: object) -> CSRGraph:
    if not isinstance(graph, CSRGraph):
        hint = edges.way_from(graph) or "make one: CSRGraph.from_edge_index(edge_index, num_nodes=N)"
        raise GraphStructureError(f"graph is a {type(graph).__name__}, not a CSRGraph", hint=hint)
    return graph


def checked_aggregation(aggregation: object) -> str:
    is_word = isinstance(aggregation, str)  # an array is asked nothing: it has no one answer
    if not is_word or aggregation not in AGGREGATIONS:
        hint = 'give "sum"' if is_word and aggregation == "add" else 'give "sum", "mean" or "max"'
        raise InvalidConfigError(f"aggregation is {shown(aggregation)}", hint=hint)
    return str(aggregation)


def edge_numbers(name: str, x: ArrayLike, graph: CSRGraph) -> Array:
    array = checks.floats(name, x)
    if array.ndim not in (1, 2) or len(array) != graph.num_edges:
        shapes = {f"{name}.shape": array.shape, "expected": f"({graph.num_edges},) or ({graph.num_edges}, H)"}
        expected = (graph.num_edges, *array.shape[1:2])
        raise DimensionMismatchError(expected, array.shape, shapes=shapes, hint="one entry for each edge")
    return array


def _nodes(arguments: dict[str, Any]) -> list[Array]:
    """Arrays of nodes, (N, heads, channels), of one dtype."""
    arrays = {name: checks.floats(name, x) for name, x in arguments.items()}
    shapes = {f"{name}.shape": x.shape for name, x in arrays.items()}
    for name, x in arrays.items():
        if x.ndim != 3:
            hint = "give (nodes, heads, channels); for one head, x[:, None, :]"
            raise InvalidInputError(f"{name} has {x.ndim} axes", shapes=shapes, hint=hint)
    if len({x.dtype for x in arrays.values()}) > 1:
        dtypes = {f"{name}.dtype": x.dtype for name, x in arrays.items()}
        raise InvalidInputError("query, key and value differ in dtype", shapes=dtypes, hint="cast them to one")
    return list(arrays.values())


class NeighborCall(NamedTuple):
    """A checked call."""

    query: Array
    key: Array
    value: Array
    edge_bias: Array | None
    edge_key: Array | None
    edge_value: Array | None
    edge_weight: Array | None
    scale: float
    dropout: float
    seed: int
    aggregation: str


def call(
    arrays: tuple[Any, ...],
    graph: CSRGraph,
    scale: float | None,
    dropout_p: float,
    aggregation: str,
    seed: int | None,
) -> NeighborCall:
    """Check the arguments of `neighbor_attention`: its seven arrays and the rest."""
    query, key, value, *of_edges = arrays
    checked_graph(graph)
    q, k, v = _nodes({"query": query, "key": key, "value": value})
    (Nt, H, D), (Ns, _, C) = q.shape, v.shape
    shapes = {"query.shape": q.shape, "key.shape": k.shape, "value.shape": v.shape, "graph": graph}
    for expected, actual in (((H, D), k.shape[1:]), ((len(k), H), v.shape[:2])):
        if actual != expected:
            hint = "query (Nt, H, D), key (Ns, H, D), value (Ns, H, C)"
            raise DimensionMismatchError(expected, actual, shapes=shapes, hint=hint)
    if (Nt, Ns) != (graph.num_targets, graph.num_sources):
        wanted = graph.num_targets, graph.num_sources
        raise DimensionMismatchError(wanted, (Nt, Ns), shapes=shapes, hint="a query for each target, a key each source")
    E = graph.num_edges
    wanted_shapes = {"edge_bias": (E, H), "edge_key": (E, H, D), "edge_value": (E, H, C), "edge_weight": (E,)}
    bias, edge, edge_value, weight = (
        checked_edges(name, x, shape, q.dtype) for (name, shape), x in zip(wanted_shapes.items(), of_edges, strict=True)
    )
    probability, number = checks.dropout(dropout_p, seed)
    factor, aggregation = checks.scale_of(scale, D), checked_aggregation(aggregation)
    if scale is not None:
        checks.check_range(q.dtype, factor, None)
    return NeighborCall(q, k, v, bias, edge, edge_value, weight, factor, probability, number, aggregation)


def _attend(
    arrays: tuple[Any, ...],
    graph: CSRGraph,
    scale: float | None,
    dropout_p: float,
    aggregation: str,
    seed: int | None,
    device: str | None,
    keeps: bool = True,
) -> Past | gpu_neighbors.NeighborRecord:
    if gpu.concerns(device, *arrays):
        from ..gpu import neighbors as gpu_neighbors

        return gpu_neighbors.attend(arrays, graph, device, scale, dropout_p, aggregation, seed)
    from ..plan import csr as plan

    c = call(arrays, graph, scale, dropout_p, aggregation, seed)
    bias, edge, edge_value, weight = (None if x is None else packed(x) for x in c[3:7])
    terms = plan.NeighborTerms(
        plan.DOT, packed(c.key), packed(c.query), packed(c.value), edge=edge, bias=bias, scale=c.scale,
        dropout=c.dropout, seed=c.seed, edge_weight=weight, aggregation=c.aggregation, edge_value=edge_value,
    )  # fmt: skip
    return Past(graph, terms, keeps)
