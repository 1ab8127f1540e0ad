"""Edges grouped by one of their ends, in parallel: a stable counting sort in two passes.

The nodes are cut into at most 256 buckets of neighbours in number, the edges into chunks. First each chunk deals its
edges to the buckets, a few streams that are written side by side; then each bucket, which stays near the core, sorts
its own. One pass over all nodes at once would write each edge to a cache line of its own, far from the last.

A stable sort has one result, so neither the chunks nor the threads show in it.
"""

from typing import NamedTuple

from .jit import apart, kernel
from .jobs import Elements, Indices


class DealJob(NamedTuple):
    """Edges as they were given, each with a key and another node, in arrays of the result's type or of int64."""

    keys: Elements | None  # if None, the wide ones count
    others: Elements | None
    wide_keys: Indices
    wide_others: Indices
    edges: int
    num_keys: int
    num_others: int
    chunk: int  # edges in one
    buckets: int
    shift: int  # of a key, to its bucket
    counts: Indices  # (chunks, buckets): edges; for `deal`, where the next of them goes
    bad: Indices  # of each chunk, the first edge with an end that is no node, or -1
    falls: Indices  # of each chunk, how often a key is less than the one before
    dealt_keys: Elements  # what `deal` makes, bucket by bucket
    dealt_others: Elements
    dealt_ids: Elements


@apart
def number(narrow, wide, e):
    return wide[e] if narrow is None else narrow[e]


@kernel
def survey(job: DealJob, slot, task):
    # task -> one chunk; counts begin as zeros
    first, last = task * job.chunk, min(job.edges, (task + 1) * job.chunk)
    counts, before, falls, bad = job.counts + task * job.buckets, 0, 0, -1
    if first > 0:
        before = number(job.keys, job.wide_keys, first - 1)
    for e in range(first, last):
        key, other = number(job.keys, job.wide_keys, e), number(job.others, job.wide_others, e)
        if key < 0 or key >= job.num_keys or other < 0 or other >= job.num_others:
            bad = e
            break
        counts[key >> job.shift] += 1
        falls += key < before
        before = key
    job.bad[task], job.falls[task] = bad, falls


@kernel
def deal(job: DealJob, slot, task):
    # task -> one chunk
    at = job.counts + task * job.buckets
    for e in range(task * job.chunk, min(job.edges, (task + 1) * job.chunk)):
        key = number(job.keys, job.wide_keys, e)
        bucket = key >> job.shift
        p = at[bucket]
        at[bucket] = p + 1
        job.dealt_keys[p], job.dealt_ids[p] = key, e
        job.dealt_others[p] = number(job.others, job.wide_others, e)


class SortJob(NamedTuple):
    """The edges of each bucket, as dealt, and what becomes of all of them."""

    keys: Elements
    others: Elements
    ids: Elements
    begins: Indices  # (buckets + 1): where a bucket's edges begin
    num_keys: int
    shift: int
    indptr: Elements  # (num_keys + 1); its first is 0
    sorted_others: Elements
    sorted_ids: Elements


@kernel
def sort(job: SortJob, slot, task):
    # task -> one bucket; the end of each key's group counts, then says where its next edge goes, and is right at last
    ends, first, last = job.indptr + 1, job.begins[task], job.begins[task + 1]
    low, high = task << job.shift, min(job.num_keys, (task + 1) << job.shift)
    for key in range(low, high):
        ends[key] = 0
    for e in range(first, last):
        ends[job.keys[e]] += 1
    at = first
    for key in range(low, high):
        count = ends[key]
        ends[key] = at
        at += count
    for e in range(first, last):
        key = job.keys[e]
        p = ends[key]
        ends[key] = p + 1
        job.sorted_others[p], job.sorted_ids[p] = job.others[e], job.ids[e]


class CompareJob(NamedTuple):
    """Two arrays, eight bytes by eight."""

    given: Indices
    kept: Indices
    size: int
    chunk: int
    differ: Indices  # of each chunk: 0 if none does


@kernel
def compare(job: CompareJob, slot, task):
    # task -> one chunk; all of it, in vectors, for mostly none does
    differ = 0
    for i in range(task * job.chunk, min(job.size, (task + 1) * job.chunk)):
        differ |= job.given[i] ^ job.kept[i]
    job.differ[task] = differ
