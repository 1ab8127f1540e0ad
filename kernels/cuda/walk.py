"""Walking along the edges of a graph on a GPU: what the kernels of attention over neighbours are told, and who does it.

The twin of the CPU's walk.py. A node belongs to a group of lanes of one warp: `lanes` of them to each of `heads` heads,
and each holds `fours` times four channels of its head, 4 * (r * lanes + its number) and the next three. So a row of a
neighbour is read in pieces of 16 bytes, side by side, and a sum over channels is one over `lanes` lanes. If there are
more heads than a warp has room for, they are dealt out in chunks, blockIdx.y.

A hub, a node with more edges than one group should have, is cut into parts, which are items as nodes are; what they
leave in `partial` another launch adds up in their order. All this depends on the graph alone: no atomics, and the same
bits every time.
"""

import functools
from typing import NamedTuple

from numba import cuda, types

from . import instructions as gpu
from .jit import NOWHERE, Elements, Floats, Ints, device
from .scoring import dice
from .warps import adding

SUM, JOINT, DOT, GIVEN = 0, 1, 2, 3  # rules for scores, see csr.py
number, across = gpu.number, gpu.across


class Rows(NamedTuple):
    """(N, H, C): row n begins at n * step; its heads and channels lie side by side."""

    data: Elements = NOWHERE
    step: int = 0


class NeighborJob(NamedTuple):
    """What a launch does not look at may be left out."""

    H: int
    C: int
    D: int
    # the walk, by target, or by source for `backward_sources`
    indptr: Ints = NOWHERE
    by_target: Ints = NOWHERE  # that of targets, for their degrees
    others: Ints = NOWHERE  # the node at the other end
    edge_ids: Ints = NOWHERE  # the caller's number of the edge at a position, if has_ids
    positions: Ints = NOWHERE  # by target, of the edge at a position by source
    has_ids: int = 0
    parts: Ints = NOWHERE  # (count_parts, 3): which hub, first edge, last edge
    hubs: Ints = NOWHERE  # (hubs, 3): node, first part, last part
    count_parts: int = 0
    count_hubs: int = 0
    nodes: int = 0
    most: int = 0  # edges of a node that is no hub
    of_hubs: int = 0  # whether this launch adds up the parts of hubs
    rounds: int = 1  # items of one group
    partial: Floats = NOWHERE  # (parts, 2, H, line)
    partial_best: Ints = NOWHERE  # (parts, H, line)
    # the rule
    slope: float = 0.0
    scale: float = 1.0
    key: Rows = Rows()
    query: Rows = Rows()
    edge: Rows = Rows()
    bias: Elements = NOWHERE  # (E, H)
    att: Elements = NOWHERE  # (1 or 2, H, C)
    has_query: int = 0  # of SUM: whether targets have a term at all
    # what is done with scores
    seed: int = 0
    threshold: int = 0
    gain: float = 1.0
    has_dropout: int = 0
    edge_weight: Elements = NOWHERE  # (E)
    has_weight: int = 0
    is_mean: int = 0
    value: Rows = Rows()
    edge_value: Rows = Rows()
    offset: Rows = Rows()  # what each target's row of the output begins with; step 0 for one row that all share
    has_offset: int = 0
    # made on the way
    output: Rows = Rows()
    attended: Rows = Rows()  # the output less its offset, which backward needs: where there is none the output itself
    stats: Floats = NOWHERE  # (Nt, H, 4): the largest score, the sum of exp(score - it), the target's term of SUM
    best: Ints = NOWHERE  # (Nt, H, C): for the maximum, the position of the edge whose value it is
    weights: Elements = NOWHERE  # (E, H), the caller's order: p
    # backward
    grad: Rows = Rows()
    back_stats: Floats = NOWHERE  # (Nt, H, 4): as stats, but 1 / sum, and then delta
    dscores: Floats = NOWHERE  # (E, H): ds, by position by target
    dquery: Rows = Rows()
    dkey: Rows = Rows()
    dvalue: Rows = Rows()
    dedge: Rows = Rows()
    dedge_value: Rows = Rows()
    dbias: Elements = NOWHERE  # (E, H), the caller's order: ds
    wants_dbias: int = 0
    dweight: Floats = NOWHERE  # (E, H)
    adds: int = 0  # of SUM: whether the targets' term goes into dvalue, for they are the same nodes
    sums: Floats = NOWHERE  # (blocks, H, C)
    sums_from: int = 0
    wants_sums: int = 0


class Variant(NamedTuple):
    """What is known when a kernel is compiled."""

    element: str
    rule: int
    lanes: int
    heads: int
    fours: int
    wide: bool  # whether all rows can be read and written by aligned fours
    threads: int
    resident: int = 4
    edge: bool = False
    bias: bool = False
    edge_value: bool = False
    shares: bool = False  # is what a value is multiplied by anything but p?
    maximum: bool = False
    normalizes: bool = True

    @property
    def group(self):
        return self.lanes * self.heads

    @property
    def groups(self):
        """In a block."""
        return self.threads // self.group

    @property
    def width(self):
        """Channels that a lane holds."""
        return 4 * self.fours

    @property
    def line(self):
        """Numbers of a head in `partial`: all channels that its lanes hold, and four more."""
        return self.width * self.lanes + 4

    @property
    def unrolled(self):
        """Edges whose rows are on their way at once; for the maximum one, or registers would not hold it all."""
        return 1 if self.maximum else max(1, 4 // self.fours)


class Walk(NamedTuple):
    place: object
    item: object
    longest: object
    joined: object


@functools.cache
def walking(v):
    """place(): this lane's group, head, and number among the lanes of its head.
    item(job, n): node, first and last edge of item n, or part, and the part's number or -1; node -1 if there is none.
    longest(count): the largest count of the warp, so that all its lanes go on together.
    joined(x): the sum over the lanes of a head."""
    GROUP, LANES, HEADS = v.group, v.lanes, v.heads
    BEYOND, FIRST = (32 // GROUP).bit_length() - 1, GROUP
    int32 = types.int32

    @device
    def place():
        t = int32(cuda.threadIdx.x)
        lane = t % int32(GROUP)
        return t // int32(GROUP), int32(int32(cuda.blockIdx.y) * HEADS + lane // LANES), int32(lane % LANES)

    @device
    def item(job, n):
        if job.of_hubs != 0:
            if n < job.count_hubs:
                return job.hubs[3 * n], job.hubs[3 * n + 1], job.hubs[3 * n + 2], int32(-1)
        elif n < job.count_parts:
            return job.hubs[3 * job.parts[3 * n]], job.parts[3 * n + 1], job.parts[3 * n + 2], int32(n)
        elif n < job.count_parts + job.nodes:
            node = int32(n - job.count_parts)
            first, last = job.indptr[node], job.indptr[node + 1]
            if last - first <= job.most:
                return node, first, last, int32(-1)
        return int32(-1), int32(0), int32(0), int32(-1)

    @device
    def longest(count):
        for b in range(BEYOND):
            count = max(count, across(count, FIRST << b))
        return count

    return Walk(place, item, longest, adding(LANES))


@device
def edge_id(job, position, here):
    """The caller's number of the edge."""
    return number(job.edge_ids, position, here) if job.has_ids != 0 else position


@device
def is_kept(job, edge, head):
    """32 bits from (seed, head, edge) alone, those of the CPU."""
    low = dice(job.seed, head, edge) & types.uint64(0xFFFFFFFF)
    return types.int64(low) >= job.threshold


@device
def share_of(job, edge, head, degree):
    """What p is multiplied by after the softmax, but for the edge's own weight."""
    share = types.float32(1)
    if job.is_mean != 0:
        share = share / types.float32(max(degree, 1))
    if job.has_dropout != 0:
        share = share * types.float32(job.gain) if is_kept(job, edge, head) else types.float32(0)
    return share
