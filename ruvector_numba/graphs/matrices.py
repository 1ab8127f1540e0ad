"""A graph layer along a sparse matrix of SciPy: `sparse_forward` of ruvector-attention's graph interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import checks
from ..arrays import Array
from ..errors import GraphStructureError
from .graph import CSRGraph
from .inputs import is_pair

__all__ = ["along_matrix"]


def along_matrix(
    forward: Callable[..., tuple[Array, Array]], node_features: Any, adjacency: Any, takes_values: bool
) -> tuple[Array, Any]:
    """`sparse_forward` in terms of `graph_forward`; the entries are the edges' features if it `takes_values`."""
    if not hasattr(adjacency, "tocsr"):
        hint = "scipy.sparse.csr_array makes one; for an edge_index there is graph_forward"
        raise GraphStructureError(f"adjacency is a {type(adjacency).__name__}, not a sparse matrix", hint=hint)
    # tocsr would add up entries of a COO matrix that have one place.
    matrix = adjacency if getattr(adjacency, "format", None) in ("csr", "csc", "coo") else adjacency.tocsr()
    graph, attr = CSRGraph.from_scipy(matrix), None
    if takes_values:
        if matrix.dtype.kind not in "biuf":
            hint = "the entries are the edges' features: take adjacency.real, or other real numbers"
            raise GraphStructureError(f"adjacency has dtype {matrix.dtype}, which is no real number", hint=hint)
        sources = checks.from_sequence("node_features", node_features[0] if is_pair(node_features) else node_features)
        attr = matrix.data[: graph.num_edges, None].astype(sources.dtype)
    output, coefficients = forward(node_features, graph, attr)
    return output, graph.to_scipy(coefficients.mean(axis=1))
