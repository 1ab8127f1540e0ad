"""How nodes are dealt out by their edges. This depends on the graph alone, so results do not depend on who does it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array

__all__ = ["Schedule", "hubs_of", "schedule"]


class Schedule(NamedTuple):
    """Which nodes a task does, and which are too large for one."""

    starts: NDArray[np.int64]  # (tasks + 1): first node of each
    parts: NDArray[np.int64]  # (P, 3): which hub, first edge, last edge
    hubs: NDArray[np.int64]  # (hubs, 3): node, first part, last part


def schedule(indptr: Array, task: int, most: int) -> Schedule:
    """Tasks of about `task` edges, where a node counts as one more; nodes of more than `most` edges are cut."""
    nodes = len(indptr) - 1
    cost = indptr + np.arange(nodes + 1)
    cuts = np.searchsorted(cost, np.arange(0, cost[-1], task))
    starts = np.unique(np.append(cuts, nodes)) if nodes else np.zeros(1, np.int64)
    return Schedule(np.ascontiguousarray(starts, np.int64), *hubs_of(indptr, task, most))


def hubs_of(indptr: Array, task: int, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The parts of nodes of more than `most` edges, about `task` edges in each, and these nodes."""
    degrees = np.diff(indptr)
    hubs, parts, first_part = [], [], 0
    for number, node in enumerate(np.flatnonzero(degrees > most)):
        cut = -(-int(degrees[node]) // task)
        ends = indptr[node] + np.arange(cut + 1, dtype=np.int64) * degrees[node] // cut
        parts.append(np.stack([np.full(cut, number), ends[:-1], ends[1:]], axis=1))
        hubs.append((node, first_part, first_part + cut))
        first_part += cut
    all_parts = np.concatenate(parts) if parts else np.zeros((0, 3))
    return np.ascontiguousarray(all_parts, np.int64), np.ascontiguousarray(np.array(hubs).reshape(-1, 3), np.int64)
