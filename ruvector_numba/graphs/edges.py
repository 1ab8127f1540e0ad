"""Every check of what a caller says is a graph: integers that are nodes, in the right shape, or a clear error."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import ArrayLike

from ..arrays import Array
from ..checks import from_sequence
from ..errors import (
    DimensionMismatchError,
    GraphStructureError,
    InvalidConfigError,
    InvalidInputError,
    OutOfMemoryError,
)
from ..values import as_array, check_memory, check_not_masked, is_list, shown, whole_number

__all__ = [
    "LoopPolicy",
    "as_given",
    "check_num_sources",
    "checked_fill",
    "ends",
    "filled",
    "index_dtype",
    "integers",
    "loop_policy",
    "neighbors",
    "no_node",
    "padding_hint",
    "refuse_masked",
    "starts",
    "way_from",
]

LoopPolicy = Literal["replace", "add", "keep"]
FILL_HINT = 'give "mean", "add", a number or an array'
NARROW = 2**31 - 1  # what int32 can count: half the memory of int64, and reading it is what takes the time


def ends(edge_index: ArrayLike, num_nodes: int | tuple[int, int] | None) -> tuple[Array, int, int]:
    """The sources and targets (2, E), not yet looked at, and how many there are of both."""
    if edge_index is None:
        raise GraphStructureError("edge_index is None", hint="give whole numbers (2, E), or a CSRGraph")
    if (way := way_from(edge_index)) is not None:
        raise GraphStructureError(f"edge_index is a {type(edge_index).__name__}", hint=way)
    given = _as_array("edge_index", edge_index)
    if given.ndim != 2 or given.shape[0] != 2:  # asked before the dtype: a dense matrix often has another
        hint = "give two rows: the sources and the targets"
        if given.ndim == 2 and given.shape[1] == 2:
            hint = "one edge a row here: pass edge_index.T"
        elif given.ndim == 2 and given.shape[0] == given.shape[1] > 0:
            hint += "; of a dense adjacency matrix A, CSRGraph.from_scipy(scipy.sparse.csr_array(A).T)"
        raise GraphStructureError("edge_index is not (2, E)", shapes={"edge_index.shape": given.shape}, hint=hint)
    found = _of_integers("edge_index", given, is_list(edge_index))
    if num_nodes is None:
        num_sources = num_targets = int(found.max()) + 1 if found.size else 0
        _check_counted(found, num_sources)
    else:
        num_sources, num_targets = _sizes(num_nodes)
    return found, max(0, num_sources), max(0, num_targets)


def _check_counted(found: Array, num_nodes: int) -> None:
    """A number so large that its graph has no room in memory is no node that anybody meant."""
    try:
        check_memory((num_nodes + 1,), index_dtype(num_nodes), "indptr")
    except OutOfMemoryError:
        row, e = np.unravel_index(int(found.argmax()), found.shape)
        reason = f"edge {e} has {('source', 'target')[row]} {found[row, e]}, too large a number to count nodes up to"
        hint = "pass num_nodes, which says how many there are; numbers count from 0, without gaps"
        raise GraphStructureError(reason, hint=padding_hint(found[row, e]) or hint) from None


def way_from(graph: object) -> str | None:
    """How to make a CSRGraph of a graph of another library, which NumPy would take for a single object."""
    if hasattr(graph, "tocsr"):
        return "for a sparse matrix there is CSRGraph.from_scipy, whose rows are targets"
    if hasattr(graph, "adjacency") and hasattr(graph, "is_multigraph"):
        return "for a NetworkX graph there is CSRGraph.from_networkx"
    if hasattr(graph, "edge_index"):
        return "of its edges, CSRGraph.from_edge_index(data.edge_index, data.num_nodes)"
    return None


def starts(indptr: ArrayLike, num_edges: int) -> Array:
    """Where the edges of each target, or of each source, begin."""
    found = integers("indptr", indptr)
    if found.ndim != 1 or len(found) == 0:
        hint = "it has one number more than there are targets, and no other axis"
        raise GraphStructureError("indptr has the wrong shape", shapes={"indptr.shape": found.shape}, hint=hint)
    if found[0] != 0 or found[-1] != num_edges:
        reason = f"indptr goes from {found[0]} to {found[-1]}, not from 0 to the number of edges, {num_edges}"
        raise GraphStructureError(reason, hint="the sources of target i are indices[indptr[i]:indptr[i + 1]]")
    falls = np.flatnonzero(found[1:] < found[:-1])
    if len(falls):
        i = int(falls[0])
        reason = f"indptr falls from {found[i]} to {found[i + 1]} at target {i}"
        raise GraphStructureError(reason, hint="a target without sources repeats the number before")
    return found


def neighbors(indptr: ArrayLike, indices: ArrayLike, num_sources: int | None) -> tuple[Array, Array, int]:
    """The same, and the sources of all edges and how many there are, checked."""
    sources = integers("indices", indices)
    if sources.ndim != 1:
        shapes = {"indices.shape": sources.shape}
        raise GraphStructureError("indices has the wrong shape", shapes=shapes, hint="one source for each edge")
    begins = starts(indptr, len(sources))
    num_targets = len(begins) - 1
    num_sources = num_targets if num_sources is None else _size("num_sources", num_sources)
    check_num_sources(num_sources)
    if len(sources) and (sources.min() < 0 or sources.max() >= num_sources):
        e = int(np.flatnonzero((sources < 0) | (sources >= num_sources))[0])
        target = int(np.searchsorted(begins, e, side="right")) - 1
        hint = "pass num_sources if sources and targets are different nodes"
        raise no_node(e, sources[e], target, num_sources, num_targets, hint)
    return begins, sources, num_sources


def check_num_sources(n: int, name: str = "num_sources") -> None:
    """Refuse more sources than memory has numbers for: what is counted for each is made later, when it is asked for."""
    check_memory((n,), index_dtype(n), "out_degrees", hint=f"it has one number for each source: is {name} right?")


def as_given(name: str, x: ArrayLike) -> Array:
    """As `from_sequence`, but a list of whole numbers, such as labels, becomes no floats."""
    array = from_sequence(name, x)
    return np.asarray(x) if is_list(x) else array


def integers(name: str, x: ArrayLike) -> Array:
    """The argument as an array of integers, whichever kind."""
    return _of_integers(name, _as_array(name, x), is_list(x))


def _as_array(name: str, x: ArrayLike) -> Array:
    refuse_masked(name, x)
    of_tensor = f"of a tensor give {name}.detach(); of a sparse one, adj.coalesce().indices()"
    return as_array(name, x, GraphStructureError, of_tensor=of_tensor)


def _of_integers(name: str, array: Array, was_list: bool) -> Array:
    if array.dtype.kind in "iu":
        return array
    if array.size == 0 and was_list:
        return array.astype(np.int64)
    hint = f"cast it: {name}.astype(numpy.int64)"
    if array.dtype.kind not in "fb":
        hint = "give whole numbers, the nodes' places in their order"
    elif array.dtype.kind == "f":
        odd = np.argwhere(~(np.isfinite(array) & (array == np.round(array))))
        if len(odd):
            at = tuple(map(int, odd[0]))
            place = f"{'target' if name == 'indptr' else 'edge'} {at[-1] if at else 0}"
            reason = f"{name} has dtype {array.dtype}, not an integer one, and at {place} it is {array[at]}"
            raise GraphStructureError(reason, hint="leave out the edges that have no node")
    raise GraphStructureError(f"{name} has dtype {array.dtype}, not an integer one", hint=hint)


def refuse_masked(name: str, x: object) -> None:
    hint = f"leave out what it hides: {name}.compressed() has the rest, in one axis"
    check_not_masked(name, x, hint, GraphStructureError)


def _sizes(num_nodes: object) -> tuple[int, int]:
    if isinstance(num_nodes, tuple | list) and len(num_nodes) == 2:
        return _size("num_nodes[0]", num_nodes[0]), _size("num_nodes[1]", num_nodes[1])
    n = _size("num_nodes", num_nodes)
    return n, n


def _size(name: str, n: object) -> int:
    pair = "give a whole number, 0 or more, or a pair (num_sources, num_targets)"
    hint = pair if name == "num_nodes" else None
    return whole_number(name, n, 0, error=GraphStructureError, hint=hint)


def no_node(
    e: int, source: Any, target: Any, num_sources: int, num_targets: int, hint: str | None = None
) -> GraphStructureError:
    """The error of edge e, one of whose ends is no node."""
    end, n, count = "source", source, num_sources
    if 0 <= source < num_sources:
        end, n, count = "target", target, num_targets
    if (padding := padding_hint(n)) is not None:
        hint = padding
    elif hint is None and num_sources == num_targets:
        least = max(int(source), int(target)) + 1
        hint = f"pass num_nodes={least} or more, or (num_sources, num_targets) if these are different nodes"
    there = f"0 to {count - 1}" if count else "none"
    shapes = {"edge": e, "source": source, "target": target, "num_sources": num_sources, "num_targets": num_targets}
    return GraphStructureError(
        f"edge {e} has {end} {n}, and the {end}s are {there}", shapes=shapes,
        hint=hint or "the first row holds the sources, the second the targets; edge_index[::-1] swaps them",
    )  # fmt: skip


def padding_hint(n: Any) -> str | None:
    """What to do about -1, which is no node; cast to an unsigned type, it is the largest number of that."""
    hint = "nodes count from 0: leave out edges that only fill up a row"
    if isinstance(n, np.uint32 | np.uint64) and n == np.iinfo(n.dtype).max:  # fewer bytes may mean what they say
        return f"{n} is -1, cast to {n.dtype}; {hint}"
    return hint if n < 0 else None


def index_dtype(*counts: int) -> np.dtype[Any]:
    """The narrower type of integers that can hold all of these."""
    return np.dtype(np.int32 if max(counts) <= NARROW else np.int64)


def loop_policy(name: str, policy: object, may_be_bool: bool = False) -> LoopPolicy:
    """One of the words; or True and False, as in PyTorch Geometric."""
    if may_be_bool and isinstance(policy, bool | np.bool_):
        return "replace" if policy else "keep"
    if not isinstance(policy, str) or policy not in get_args(LoopPolicy):
        hint = f'give {"True, False, " if may_be_bool else ""}"replace", "add" or "keep"'
        raise InvalidConfigError(f"{name} is {shown(policy)}", hint=hint)
    return cast(LoopPolicy, policy)


def checked_fill(fill_value: str | ArrayLike) -> str | Array:
    """What loops are filled with: a word, or real numbers of whichever shape."""
    if isinstance(fill_value, str):
        if fill_value not in ("mean", "add"):
            raise InvalidConfigError(f"fill_value is {shown(fill_value)}", hint=FILL_HINT)
        return fill_value
    array = from_sequence("fill_value", fill_value)
    if array.dtype.kind not in "iuf":
        raise InvalidInputError(f"fill_value has dtype {array.dtype}, which is no real number", hint=FILL_HINT)
    return array


def filled(array: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """The numbers that `checked_fill` found, in an array of this shape."""
    try:
        return np.broadcast_to(array.astype(dtype, copy=False), shape)
    except ValueError:
        shapes = {"fill_value.shape": array.shape, "expected": shape}
        hint = "one entry for each node, or one for all"
        raise DimensionMismatchError(shape, array.shape, shapes=shapes, hint=hint) from None
