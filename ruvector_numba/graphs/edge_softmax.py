"""The softmax of numbers that belong to edges, over the edges into each target."""

from __future__ import annotations

from numpy.typing import ArrayLike

from .. import checks, gpu
from ..arrays import Array
from ..projection import flattened
from .graph import CSRGraph
from .neighbors import by_target, checked_graph, edge_numbers, packed

__all__ = ["edge_softmax", "edge_softmax_backward"]


def edge_softmax(scores: ArrayLike, graph: CSRGraph) -> Array:
    """The softmax of the scores of edges over all edges into the same target.

    Parameters
    ----------
    scores : array (E,) or (E, H), float32 or float64; on a GPU float32, float16 or bfloat16
        In the caller's order of edges. -inf hides an edge: it gets 0, also where all edges of a target are hidden.
    graph : CSRGraph

    Returns
    -------
    array of the shape and dtype of `scores`

    Raises
    ------
    InvalidInputError
        If `scores` holds other than float32 or float64 numbers.
    DimensionMismatchError
        If there is not one entry for each edge.
    GraphStructureError
        If `graph` is no `CSRGraph`.

    References
    ----------
    `softmax` of PyTorch Geometric and `edge_softmax` of DGL, without their 1e-16 in the denominator.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> graph = rv.CSRGraph.from_edge_index([[0, 1, 2], [2, 2, 1]])
    >>> rv.edge_softmax(np.log([1.0, 3.0, 5.0]), graph)
    array([0.25, 0.75, 1.  ])
    """
    if gpu.any_on_gpu(scores):
        from ..gpu import neighbors as gpu_neighbors

        return gpu_neighbors.edge_softmax(scores, graph)
    s = edge_numbers("scores", scores, checked_graph(graph))
    from ..plan import csr as plan

    return plan.softmax(by_target(graph), packed(flattened(s))).reshape(s.shape)


def edge_softmax_backward(grad_weights: ArrayLike, weights: ArrayLike, graph: CSRGraph) -> Array:
    """The gradient of the scores that `edge_softmax` was given.

    Parameters
    ----------
    grad_weights : array of the shape and dtype of `weights`
    weights : array (E,) or (E, H)
        The result of `edge_softmax`.
    graph : CSRGraph

    Returns
    -------
    array of the shape of `weights`
        weights * (grad_weights - the sum over the target's edges of weights * grad_weights).

    Raises
    ------
    InvalidInputError
        If an array holds other than float32 or float64 numbers, or they differ in dtype.
    DimensionMismatchError
        If there is not one entry for each edge, or the arrays differ in shape.
    GraphStructureError
        If `graph` is no `CSRGraph`.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> graph = rv.CSRGraph.from_edge_index([[0, 1, 2], [2, 2, 1]])
    >>> rv.edge_softmax_backward(np.array([1.0, 0.0, 1.0]), np.array([0.25, 0.75, 1.0]), graph)
    array([ 0.1875, -0.1875,  0.    ])
    """
    if gpu.any_on_gpu(weights):
        from ..gpu import neighbors as gpu_neighbors

        return gpu_neighbors.edge_softmax_backward(grad_weights, weights, graph)
    p = edge_numbers("weights", weights, checked_graph(graph))
    grad = checks.gradient("grad_weights", grad_weights, p.shape, p.dtype)
    from ..plan import csr as plan

    w, g = (packed(flattened(x)) for x in (p, grad))
    return plan.softmax_backward(by_target(graph), w, g).reshape(p.shape)
