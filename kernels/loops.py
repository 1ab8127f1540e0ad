"""Self-loops put into a graph whose edges are grouped by target, and what belongs to its edges, there and back.

rows (E, C)     of the caller's edges        more (E', C)    of those with loops: edges that stay, then the loops

forth   more[new id of e] = rows[e]                 more[loop of i] = sum or mean of the rows of i's edges that stay
back    rows[e] = more[new id of e] + more[loop of i] (divided by their number); of an edge that is gone, 0
"""

from typing import NamedTuple

from .gather import AHEAD
from .jit import apart, kernel
from .jobs import Bytes, Elements, Indices, Ints
from .simd import prefetch
from .walk import number

CONSTANT, SUM, MEAN = 0, 1, 2  # what loops are filled with


class LoopsJob(NamedTuple):
    """A graph grouped by target, and the same with self-loops: the last of their groups, as the caller's last edges."""

    indptr: Elements
    indices: Elements
    ids: Elements | None  # of the caller's edges; None if these are grouped already
    num_targets: int
    targets: int  # of one task
    degrees: Elements  # (num_targets): edges that are no loops
    stays: Bytes  # of each of the caller's edges: 0 if it is a loop
    new_ids: Elements | None  # of the caller's edges, when some are gone
    new_indptr: Elements
    new_indices: Elements
    made_ids: Elements
    removes: int  # 1: loops that are there are gone
    kept: int  # edges that stay
    loops: int  # nodes that get one


@apart
def edge_id(ids, p):
    return p if ids is None else ids[p]


@kernel
def find_loops(job: LoopsJob, slot, task):
    # task -> some targets
    for i in range(task * job.targets, min(job.num_targets, (task + 1) * job.targets)):
        first, last = job.indptr[i], job.indptr[i + 1]
        degree = last - first
        for p in range(first, last):
            if job.indices[p] == i:
                degree -= 1
                job.stays[edge_id(job.ids, p)] = 0
        job.degrees[i] = degree


@kernel
def put_loops(job: LoopsJob, slot, task):
    # task -> some targets
    for i in range(task * job.targets, min(job.num_targets, (task + 1) * job.targets)):
        at = job.new_indptr[i]
        for p in range(job.indptr[i], job.indptr[i + 1]):
            if job.removes == 0 or job.indices[p] != i:
                job.new_indices[at] = job.indices[p]
                job.made_ids[at] = edge_id(job.new_ids, edge_id(job.ids, p))
                at += 1
        if i < job.loops:
            job.new_indices[at], job.made_ids[at] = i, job.kept + i


# --- what belongs to edges -------------------------------------------------------------------------------------------
class RowsJob(NamedTuple):
    """Positions are those of edges that are grouped by target, with and without loops."""

    indptr: Ints | None  # if None, the wide ones count
    indices: Ints | None
    ids: Ints | None  # of the caller's edges, if has_ids
    new_indptr: Ints | None
    new_ids: Ints | None
    wide_indptr: Indices
    wide_indices: Indices
    wide_ids: Indices
    wide_new_indptr: Indices
    wide_new_ids: Indices
    has_ids: int
    num_targets: int
    targets: int  # of one task
    removes: int  # 1: loops that are there are gone
    kept: int  # edges that stay
    loops: int  # nodes that get one
    fills: int  # CONSTANT, SUM or MEAN
    E: int
    rows: Elements  # (E, C)
    more: Elements  # (E', C)
    C: int


@apart
def stays(job, p, i):
    return job.removes == 0 or number(job.indices, job.wide_indices, p) != i


@apart
def row_of(job, p):
    """Where the row of the edge at a position begins"""
    return (number(job.ids, job.wide_ids, p) if job.has_ids else p) * job.C


@apart
def new_row_of(job, q):
    return number(job.new_ids, job.wide_new_ids, q) * job.C


@apart
def fetch_soon(job, p, q):
    """Ask for the rows of edges that come later: the caller's order is any. (A million edges of 8: 37 ms without.)"""
    prefetch(job.rows, row_of(job, min(p + AHEAD, job.E - 1)))
    prefetch(job.more, new_row_of(job, min(q + AHEAD, job.kept + job.loops - 1)))


@kernel
def put_rows(job: RowsJob, slot, task):
    # task -> some targets
    C, more = job.C, job.more
    for i in range(task * job.targets, min(job.num_targets, (task + 1) * job.targets)):
        first, last = number(job.indptr, job.wide_indptr, i), number(job.indptr, job.wide_indptr, i + 1)
        begin = number(job.new_indptr, job.wide_new_indptr, i)
        fills, loop, q = job.fills != CONSTANT and i < job.loops, (job.kept + i) * C, begin
        for c in range(C if fills else 0):
            more[loop + c] = 0
        for p in range(first, last):
            fetch_soon(job, p, q)
            if stays(job, p, i):
                at, to = row_of(job, p), new_row_of(job, q)
                for c in range(C):
                    more[to + c] = job.rows[at + c]
                for c in range(C if fills else 0):
                    more[loop + c] += job.rows[at + c]
                q += 1
        for c in range(C if fills and job.fills == MEAN and q > begin else 0):
            more[loop + c] /= q - begin


@kernel
def take_rows(job: RowsJob, slot, task):
    # task -> some targets; the adjoint of put_rows, where the gradients are `more` and `rows` is made
    C, more = job.C, job.more
    for i in range(task * job.targets, min(job.num_targets, (task + 1) * job.targets)):
        first, last = number(job.indptr, job.wide_indptr, i), number(job.indptr, job.wide_indptr, i + 1)
        q, end = number(job.new_indptr, job.wide_new_indptr, i), number(job.new_indptr, job.wide_new_indptr, i + 1)
        fills, loop = job.fills != CONSTANT and i < job.loops, (job.kept + i) * C
        count = end - q - 1 if fills and job.fills == MEAN else 1  # the loop is the last
        for p in range(first, last):
            fetch_soon(job, p, q)
            to = row_of(job, p)
            if stays(job, p, i):
                at = new_row_of(job, q)
                for c in range(C):
                    job.rows[to + c] = more[at + c] + (more[loop + c] / count if fills else 0)
                q += 1
            else:
                for c in range(C):
                    job.rows[to + c] = 0
