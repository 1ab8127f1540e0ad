"""What graph layers are called with, checked: nodes, a graph with self-loops, and what belongs to its edges."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike

from .. import checks
from ..checks import Array
from ..errors import DimensionMismatchError, GraphStructureError, InvalidConfigError, InvalidInputError
from . import edges
from .graph import CSRGraph

__all__ = [
    "Inputs",
    "checked_slope",
    "edge_gradients",
    "features",
    "graph_of",
    "initial",
    "listed",
    "loop_policy",
    "size",
    "switch",
]


class Inputs(NamedTuple):
    """A checked call: nodes, the graph with its self-loops, and what belongs to its edges."""

    source: Array  # (Ns, in)
    target: Array | None  # (Nt, in): the same object where the nodes are; None where targets have no features
    is_pair: bool
    given: CSRGraph  # the caller's
    graph: CSRGraph
    edge_attr: Array | None  # (E, edge_dim), of `graph`
    edge_weight: Array | None  # (E)
    attr_shape: tuple[int, ...] | None  # the caller's
    dropout: float
    seed: int


def loop_policy(add_self_loops: object) -> edges.LoopPolicy:
    """True and False as in PyTorch Geometric, or one of the names."""
    if isinstance(add_self_loops, bool | np.bool_):
        return "replace" if add_self_loops else "keep"
    if add_self_loops not in ("replace", "add", "keep"):
        hint = 'give True, False, "replace", "add" or "keep"'
        raise InvalidConfigError(f"add_self_loops is {add_self_loops!r}", hint=hint)
    return add_self_loops


def checked_slope(negative_slope: object) -> float:
    try:
        slope = checks.scale_of(negative_slope, 1)
    except InvalidInputError:
        slope = math.nan
    if negative_slope is None or not math.isfinite(slope):
        raise InvalidConfigError(f"negative_slope is {negative_slope!r}", hint="give a finite number")
    return slope


def listed(x: Any) -> Any:
    return np.asarray(x).tolist()


def size(name: str, n: object) -> int:
    try:
        found = operator.index(cast(Any, n))
    except TypeError:
        found = 0
    if isinstance(n, bool) or found <= 0:
        raise InvalidConfigError(f"{name} is {n!r}", hint="give a whole number above 0")
    return found


def switch(name: str, x: object) -> bool:
    """An option that is on or off: a text would be on whatever it says."""
    is_one = isinstance(x, bool | np.bool_) or (isinstance(x, int | np.integer) and x in (0, 1))
    if not is_one:
        raise InvalidConfigError(f"{name} is {x!r}", hint="give True or False")
    return bool(x)


def initial(dice: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    if name.endswith("bias"):
        return np.zeros(shape)
    bound = math.sqrt(6 / (shape[-1] + shape[-2]))
    return dice.uniform(-bound, bound, shape)


def features(name: str, x: ArrayLike) -> Array:
    array = checks.floats(name, x)
    if array.ndim != 2:
        raise InvalidInputError(f"{name} has {array.ndim} axes", hint="give (nodes, channels)")
    return array if array.flags.aligned else array.copy()


def graph_of(graph: Any, sources: int, targets: int | None, is_pair: bool) -> CSRGraph:
    if not isinstance(graph, CSRGraph):
        if hasattr(graph, "tocsr"):
            raise GraphStructureError("graph is a matrix", hint="CSRGraph.from_scipy(matrix), or sparse_forward")
        if targets is None:
            hint = "give a CSRGraph: nothing else says how many targets there are when x_target is None"
            raise GraphStructureError("graph is an edge_index", hint=hint)
        return CSRGraph.from_edge_index(graph, num_nodes=(sources, targets))
    wanted = graph.num_sources, graph.num_targets
    if wanted != (sources, wanted[1] if targets is None else targets):
        shapes = {"nodes (sources, targets)": (sources, targets), "graph": graph}
        hint = (
            "x_source has one row for each source, x_target each target" if is_pair else "x has one row for each node"
        )
        raise DimensionMismatchError(wanted, (sources, targets), shapes=shapes, hint=hint)
    return graph


def edge_gradients(
    inputs: Inputs, dattr: Array | None, dweight: Array | None, policy: edges.LoopPolicy, fill_value: Any
) -> tuple[Array | None, Array | None]:
    """The gradients of what the caller's edges have, from those of the edges with self-loops."""
    if dattr is not None:
        dattr = _without_loops(inputs, dattr, policy, fill_value).reshape(inputs.attr_shape)
    if dweight is not None:
        dweight = _without_loops(inputs, dweight, policy, 1.0)
    return dattr, dweight


def _without_loops(inputs: Inputs, grad: Array, policy: edges.LoopPolicy, fill_value: Any) -> Array:
    """The adjoint of `edge_attr_with_self_loops`: what loops were filled with came from the other edges."""
    given = inputs.given
    if inputs.graph is given:
        return grad
    loops = min(given.num_sources, given.num_targets)
    kept = len(grad) - loops
    source, target = given.to_edge_index()
    stays = source != target if policy == "replace" else np.ones(len(source), np.bool_)
    out = np.zeros((given.num_edges, *grad.shape[1:]), grad.dtype)
    out[stays] = grad[:kept]
    if isinstance(fill_value, str):
        of_loops = np.zeros((given.num_targets, *grad.shape[1:]), grad.dtype)
        of_loops[:loops] = grad[kept:]
        if fill_value == "mean":
            degrees = np.bincount(target[stays], minlength=given.num_targets)
            of_loops /= np.maximum(degrees, 1).reshape(-1, *[1] * (grad.ndim - 1)).astype(grad.dtype)
        out[stays] += of_loops[target[stays]]
    return out
