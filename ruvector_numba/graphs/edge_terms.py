"""What a layer's scores and values have of the edges, and the way back of its gradients to the caller's edges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Array
from ..parameters import ParameterSet
from . import edges, self_loops
from .inputs import Inputs

if TYPE_CHECKING:
    from ..plan.csr import Made

__all__ = ["edge_gradients", "edge_terms", "edge_terms_back"]


def edge_terms(inputs: Inputs, p: ParameterSet, heads: int) -> dict[str, Any]:
    """The edges' attributes, and the matrix (edge_dim, H, C) that the kernels multiply them by, batch by batch."""
    if inputs.edge_attr is None:
        return {}
    weight = p["lin_edge.weight"]
    return {"edge": inputs.edge_attr, "matrix": weight.T.reshape(len(weight.T), heads, -1)}


def edge_terms_back(made: Made) -> tuple[Array | None, dict[str, Array]]:
    """The gradients of the attributes, and of lin_edge.weight by its name; none without attributes."""
    if made.edge is None or made.matrix is None:
        return None, {}
    return made.edge, {"lin_edge.weight": np.ascontiguousarray(made.matrix.reshape(len(made.matrix), -1).T)}


def edge_gradients(
    inputs: Inputs, dattr: Array | None, dweight: Array | None, policy: edges.LoopPolicy, fill_value: Any
) -> tuple[Array | None, Array | None]:
    """The gradients of what the caller's edges have, from those of the edges with self-loops."""
    if inputs.graph is not inputs.given:
        dattr = None if dattr is None else self_loops.taken_out(inputs.given, dattr, policy, fill_value)
        dweight = None if dweight is None else self_loops.taken_out(inputs.given, dweight, policy, 1.0)
    if dattr is not None and inputs.attr_shape is not None:
        dattr = dattr.reshape(inputs.attr_shape)
    return None if inputs.attr_shape is None else dattr, dweight
