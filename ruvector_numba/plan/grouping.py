"""From edges to jobs that group them (kernels/grouping.py), and back to arrays.

It runs its jobs: what there is to do next depends on what the last one found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..kernels import grouping as kernels
from . import memory, team
from .layouts import NOTHING, by_width

__all__ = ["EDGE_WORK", "Grouped", "Survey", "group", "is_same", "survey"]

CHUNK = 1 << 15  # edges: enough that their counts do not matter
MOST_CHUNKS = 1 << 10
MOST_BUCKETS = 1 << 8  # streams that one core writes side by side: 64 to 512 measured the same
EDGE_WORK = 100  # what an edge costs, in multiply-adds


class Survey(NamedTuple):
    """What is known of edges once all were seen."""

    job: kernels.DealJob
    dtype: np.dtype[Any]
    bad: int  # the first edge with an end that is no node, or -1
    is_grouped: bool  # in ascending order of keys already


class Grouped(NamedTuple):
    """The edges of key k are `others[indptr[k]:indptr[k + 1]]`; `ids` are their numbers before, None if the same."""

    indptr: Array
    others: Array
    ids: Array | None


def survey(keys: Array, others: Array, num_keys: int, num_others: int, dtype: np.dtype[Any]) -> Survey:
    """Look for edges that leave the nodes. Keys and others are contiguous, both of the dtype or both int64."""
    team.size()
    edges = len(keys)
    chunk = max(CHUNK, -(-edges // MOST_CHUNKS))
    shift = max(0, (max(num_keys, 1) - 1).bit_length() - (MOST_BUCKETS - 1).bit_length())
    chunks, buckets = -(-edges // chunk), max(1, -(-num_keys >> shift))
    job = kernels.DealJob(
        **by_width(keys.dtype == dtype, keys=keys, others=others), edges=edges, num_keys=num_keys,
        num_others=num_others, chunk=chunk, buckets=buckets, shift=shift,
        counts=np.zeros((chunks, buckets), np.int64), bad=np.zeros(chunks, np.int64),
        falls=np.zeros(chunks, np.int64), dealt_keys=NOTHING, dealt_others=NOTHING, dealt_ids=NOTHING,
    )  # fmt: skip
    kernels.survey.prepare(job, chunks, dtype, edges * EDGE_WORK)()
    bad = job.bad[job.bad >= 0]
    return Survey(job, dtype, int(bad[0]) if len(bad) else -1, not job.falls.any())


def group(survey: Survey) -> Grouped:
    """The edges of a survey that found no bad one, in the order of their keys; stable."""
    job, dtype = survey.job, survey.dtype
    if survey.is_grouped:
        keys, others = (job.keys, job.others) if job.keys is not None else (job.wide_keys, job.wide_others)
        indptr = np.zeros(job.num_keys + 1, dtype)
        np.cumsum(np.bincount(keys, minlength=job.num_keys), out=indptr[1:])
        return Grouped(indptr, others.astype(dtype), None)
    ends = np.cumsum(job.counts.T).reshape(job.buckets, -1)
    begins = np.append(ends[:, 0] - job.counts[0], job.edges)
    dealt = memory.empty((3, job.edges), dtype)
    job = job._replace(
        counts=np.ascontiguousarray(ends.T) - job.counts,
        dealt_keys=dealt[0], dealt_others=dealt[1], dealt_ids=dealt[2],
    )  # fmt: skip
    work = job.edges * EDGE_WORK
    kernels.deal.prepare(job, len(job.counts), dtype, work)()
    made = Grouped(np.zeros(job.num_keys + 1, dtype), *(memory.empty((job.edges,), dtype) for _ in range(2)))
    by_key = kernels.SortJob(*dealt, begins, job.num_keys, job.shift, *made)
    kernels.sort.prepare(by_key, job.buckets, dtype, work)()
    return made


def is_same(kept: Array, given: Array) -> bool:
    """Whether two contiguous arrays (2, E) of integers are alike in all."""
    if kept.shape != given.shape or kept.dtype != given.dtype:
        return False
    if kept.itemsize < 4:  # two rows of others are whole words
        return np.array_equal(kept, given)
    team.size()
    words = [x.reshape(-1).view(np.int64) for x in (given, kept)]
    size = len(words[0])
    differ = np.zeros(-(-size // CHUNK), np.int64)
    job = kernels.CompareJob(*words, size, CHUNK, differ)
    kernels.compare.prepare(job, len(differ), np.dtype(np.int64), size)()
    return not differ.any()
