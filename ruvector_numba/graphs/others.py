"""The edges of graphs of other libraries: SciPy's sparse matrices and NetworkX."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import GraphStructureError
from . import edges

__all__ = ["ends_of_networkx", "ends_of_sparse", "sparse_format"]


def sparse_format(matrix: Any) -> str:
    """ "csr", "csc" or "coo": the formats that hold one entry for each edge."""
    form = getattr(matrix, "format", None)
    if form not in ("csr", "csc", "coo") or len(matrix.shape) != 2:
        hint = "convert it: matrix.tocsr()"
        if not hasattr(matrix, "tocsr"):
            hint = "scipy.sparse.csr_array makes one; for an edge_index there is CSRGraph.from_edge_index"
        kind = f"{type(matrix).__name__} of format {form} and shape {getattr(matrix, 'shape', None)}"
        raise GraphStructureError(f"matrix is a {kind}, not a CSR, CSC or COO matrix", hint=hint)
    return str(form)


def ends_of_sparse(matrix: Any) -> tuple[Array, Array]:
    """The sources and targets of the entries of a CSC or COO matrix, in the order of ``matrix.data``."""
    if matrix.format == "coo":
        return matrix.col, matrix.row
    starts, targets = edges.starts(matrix.indptr, matrix.nnz), matrix.indices[: matrix.nnz]
    return np.repeat(np.arange(matrix.shape[1], dtype=targets.dtype), np.diff(starts)), targets


def ends_of_networkx(graph: Any) -> tuple[Array, Array, int]:
    """The sources and targets of a NetworkX graph's edges, node by node, and how many nodes there are."""
    if not hasattr(graph, "adjacency") or not hasattr(graph, "is_multigraph"):
        hint = "for arrays there are CSRGraph.from_edge_index and from_scipy"
        raise GraphStructureError(f"graph is a {type(graph).__name__}, not a NetworkX graph", hint=hint)
    numbers, ends, many = {node: n for n, node in enumerate(graph)}, [], graph.is_multigraph()
    for node, neighbours in graph.adjacency():
        for other, edge in neighbours.items():
            ends.extend([(numbers[node], numbers[other])] * (len(edge) if many else 1))
    sources, targets = np.array(ends, np.int64).reshape(-1, 2).T
    return sources, targets, len(numbers)
