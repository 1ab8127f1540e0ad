"""The graphs of arrays that were given before: a training loop gives one edge_index in every step.

Grouping its edges by target, putting in self-loops and grouping them by source is 22 to 32 of the 135 to 165 ms of a
GAT's two passes over a million edges (Zen 3). So the graph that was made is kept as long as the caller's array lives.
The array may be written to: what it says is compared with what it said, which takes 3 ms.
"""

from __future__ import annotations

import collections
import os
import threading
import weakref
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..plan import memory
from . import edges
from .graph import CSRGraph

__all__ = ["graph_of_edges"]

MOST = 64


class _Known(NamedTuple):
    array: weakref.ref[Any]  # the caller's, not kept alive
    said: Array  # (2, E)
    graph: CSRGraph
    size: int  # bytes of all arrays that were kept with it when it was last counted


# Replaced as a whole by who has the lock, for which nobody waits: of two threads that have a new graph at once one
# loses it, and makes it again. `_forget` runs wherever Python collects garbage, also while its own thread has the lock:
# so it only appends to `_gone`, and who has the lock looks there again after giving it back.
_known: tuple[_Known, ...] = ()
_gone: collections.deque[weakref.ref[Any]] = collections.deque()
_lock = threading.Lock()


def _unlocked() -> None:
    """Another thread of the parent may have held the lock, and is not there to give it back."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlocked)


def graph_of_edges(edge_index: Any, num_nodes: tuple[int, int]) -> CSRGraph:
    """As `CSRGraph.from_edge_index`; made anew only if this array was not given lately, or says something else now."""
    from ..plan import grouping as plan  # at the first call, as it loads the kernels

    ends = np.ascontiguousarray(edges.ends(edge_index, num_nodes)[0])
    for one in _known:
        is_it = one.array() is edge_index and (one.graph.num_sources, one.graph.num_targets) == num_nodes
        if is_it and plan.is_same(one.said, ends):
            if one.size != _size(one.said, one.graph):  # more was derived from the graph
                _settle(one)
            return one.graph
    # The copy comes first: the graph is that of the copy, whoever writes to the array meanwhile.
    said = memory.empty(ends.shape, ends.dtype)
    said[...] = ends
    graph = CSRGraph.from_edge_index(said, num_nodes)
    try:
        _settle(_Known(weakref.ref(edge_index, _forget), said, graph, 0))
    except TypeError:  # a list, which nothing can refer to without keeping it
        pass
    return graph


def _forget(gone: weakref.ref[Any]) -> None:
    if _gone is not None:  # else the interpreter is ending
        _gone.append(gone)
        _settle()


def _settle(latest: _Known | None = None) -> None:
    """Leave out the graphs whose arrays are gone. Put the latest first, and leave out the oldest beyond the limit."""
    global _known
    while (latest is not None or _gone) and _lock.acquire(blocking=False):
        try:
            _gone.clear()
            known = [one for one in _known if one.array() is not None]
            if latest is not None:
                array = latest.array()
                known, latest = _within_limit([latest, *(one for one in known if one.array() is not array)]), None
            _known = tuple(known)
        finally:
            _lock.release()


def _within_limit(known: list[_Known]) -> list[_Known]:
    kept, total, limit = [], 0, memory.limit()
    for one in known:
        size = _size(one.said, one.graph)
        if total + size <= limit:
            total += size
            kept.append(one._replace(size=size))
    return kept[:MOST]


def _size(*things: Any) -> int:
    """Bytes of the arrays in main memory that these hold, each counted once: graphs with all that is derived."""
    counted: dict[int, int] = {}
    _count(things, counted)
    return sum(counted.values())


def _count(thing: Any, counted: dict[int, int]) -> None:
    if isinstance(thing, np.ndarray):
        owner = thing.base if isinstance(thing.base, np.ndarray) else thing
        counted[id(owner)] = owner.nbytes
    elif isinstance(thing, CSRGraph) and id(thing) not in counted:
        counted[id(thing)] = 0
        _count((thing.indptr, thing.indices, thing.edge_ids, *list(thing._derived.values())), counted)
    elif isinstance(thing, tuple | list):
        for one in thing:
            _count(one, counted)
    elif isinstance(thing, dict):
        _count(list(thing.values()), counted)
