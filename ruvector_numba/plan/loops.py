"""From a graph to jobs that put self-loops into it (kernels/loops.py), and into what belongs to its edges.

It runs its jobs, as `grouping` does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..kernels import loops as kernels
from . import memory
from .grouping import EDGE_WORK, Grouped
from .layouts import NOTHING, by_width

__all__ = ["FILLS", "Loops", "find_loops", "put_loops", "put_rows", "take_rows"]

TARGETS = 1 << 9  # of a task
FILLS = {"mean": kernels.MEAN, "add": kernels.SUM}


class Loops(NamedTuple):
    """Where a graph has self-loops."""

    degrees: Array  # of each target, edges that are none
    stays: NDArray[np.bool_]  # of the caller's edges: is it none?


def _loops_job(graph: Grouped, **more: Any) -> tuple[kernels.LoopsJob, int]:
    """The job and the number of its tasks."""
    num_targets = len(graph.indptr) - 1
    fields = dict(
        indptr=graph.indptr, indices=graph.others, ids=graph.ids, num_targets=num_targets, targets=TARGETS,
        degrees=NOTHING, stays=NOTHING, new_ids=None, new_indptr=NOTHING, new_indices=NOTHING, made_ids=NOTHING,
        removes=0, kept=0, loops=0,
    )  # fmt: skip
    return kernels.LoopsJob(**{**fields, **more}), -(-num_targets // TARGETS)


def find_loops(graph: Grouped) -> Loops:
    found = Loops(np.empty(len(graph.indptr) - 1, graph.indptr.dtype), np.ones(len(graph.others), np.bool_))
    job, tasks = _loops_job(graph, degrees=found.degrees, stays=found.stays.view(np.uint8))
    kernels.find_loops.prepare(job, tasks, graph.indptr.dtype, len(graph.others) * EDGE_WORK)()
    return found


def put_loops(graph: Grouped, gone: Loops | None, loops: int, dtype: np.dtype[Any]) -> Grouped:
    """With one more self-loop for each of the first `loops` targets, and without those that shall be gone."""
    graph = Grouped(*(None if x is None else x.astype(dtype, copy=False) for x in graph))  # type: ignore[arg-type]
    degrees = np.diff(graph.indptr) if gone is None else gone.degrees
    new_ids = None
    if gone is not None and not gone.stays.all():
        new_ids = np.cumsum(gone.stays, out=memory.empty(gone.stays.shape, dtype))
        new_ids -= 1
    indptr = np.zeros(len(graph.indptr), dtype)
    np.cumsum(degrees + (np.arange(len(degrees)) < loops), out=indptr[1:])
    edges = int(indptr[-1])
    made = Grouped(indptr, *(memory.empty((edges,), dtype) for _ in range(2)))
    job, tasks = _loops_job(
        graph, new_ids=new_ids, new_indptr=made.indptr, new_indices=made.others, made_ids=made.ids,
        removes=int(new_ids is not None), kept=edges - loops, loops=loops,
    )  # fmt: skip
    kernels.put_loops.prepare(job, tasks, dtype, edges * EDGE_WORK)()
    return made


def put_rows(given: Grouped, whole: Grouped, removes: bool, loops: int, fill: object, rows: Array, more: Array) -> None:
    """`more` (E', C) of the edges with self-loops from `rows` (E, C); loops are filled if `fill` is a word."""
    _run_rows(kernels.put_rows, given, whole, removes, loops, fill, rows, more)


def take_rows(
    given: Grouped, whole: Grouped, removes: bool, loops: int, fill: object, rows: Array, more: Array
) -> None:
    """The gradients `rows` of what `put_rows` was given, from those of what it made."""
    _run_rows(kernels.take_rows, given, whole, removes, loops, fill, rows, more)


def _run_rows(
    kernel: Any, given: Grouped, whole: Grouped, removes: bool, loops: int, fill: object, rows: Array, more: Array
) -> None:
    integers = whole.indptr.dtype
    named = dict(
        indptr=given.indptr, indices=given.others, ids=given.ids, new_indptr=whole.indptr, new_ids=whole.ids
    )  # fmt: skip
    of_one_type = {name: None if x is None else x.astype(integers, copy=False) for name, x in named.items()}
    targets = len(given.indptr) - 1
    job = kernels.RowsJob(
        **by_width(integers == np.int32, **of_one_type), has_ids=int(given.ids is not None), num_targets=targets,
        targets=TARGETS, removes=int(removes), kept=len(more) - loops, loops=loops,
        fills=FILLS[fill] if isinstance(fill, str) else kernels.CONSTANT, E=len(rows), rows=rows, more=more,
        C=rows.shape[1],
    )  # fmt: skip
    if more.size:
        kernel.prepare(job, -(-targets // TARGETS), rows.dtype, len(more) * (EDGE_WORK + rows.shape[1]))()
