"""What the way back through attention over neighbours (csr_backward.py) does with one edge, from its source's side."""

import functools
from typing import NamedTuple

from numba import types

from . import instructions as gpu
from .csr import rule_of, slope_of_leaky
from .gather import gathering
from .jit import device
from .walk import DOT, JOINT, share_of, walking

number = gpu.number


class EdgePasses(NamedTuple):
    look: object
    score: object
    weight_gradient: object
    thin: object
    add: object
    spread: object


@functools.cache
def edge_passes(v):
    """What is done with one edge, in this order. The u-th of those that are looked at together has its target's rows
    from grads[base] and queries[base] on."""
    WIDTH, UNROLLED, LANES, RULE = v.width, v.unrolled, v.lanes, v.rule
    EDGE, EDGE_VALUE, BIAS, MAX = v.edge, v.edge_value, v.bias, v.maximum
    joined, one, four = walking(v).joined, gpu.one[v.element], gpu.four["float32"]
    (take, put), rule = gathering(v)[:2], rule_of(v)
    int32, int64, float32 = types.int32, types.int64, types.float32

    @device
    def look(job, first, last, head, sub, there, grads, queries, stats):
        """The rows of the targets of some edges, and what is known of their softmax."""
        for u in range(UNROLLED):
            here = there and first + u < last
            i = number(job.others, int32(first + u), here)
            take(grads, u * WIDTH, job.grad, i, head, sub, job.C, here)
            if RULE == JOINT or RULE == DOT:
                take(queries, u * WIDTH, job.query, i, head, sub, job.D, here)
            n, at = 4 * u, (int64(i) * job.H + head) * 4
            stats[n], stats[n + 1], stats[n + 2], stats[n + 3] = four(job.back_stats, at, here)

    @device
    def score(job, u, id, head, here, value, key, a, edges, queries, term, target_term):
        """As forward makes it, but from the source's side; and what a LeakyReLU's slope was, of SUM."""
        return rule(job, id, head, here, term + target_term, a, value, 0, key, 0, queries, u * WIDTH, edges)

    @device
    def weight_gradient(job, base, position, target, id, head, sub, here, value, more, grads):
        """dp, before shares; of the maximum, grads are left only where this edge's value was the largest."""
        if EDGE_VALUE:
            take(more, 0, job.edge_value, id, head, sub, job.C, here)
        dp = float32(0)
        for c in range(WIDTH):
            y = value[c]
            if EDGE_VALUE:
                y += more[c]
            if MAX:
                channel, chosen = int32((c // 4 * LANES + sub) * 4 + c % 4), int32(-1)
                if here and channel < job.C:
                    chosen = job.best[(int64(target) * job.H + head) * job.C + channel]
                if chosen != position:
                    grads[base + c], y = float32(0), float32(0)
            dp += grads[base + c] * y
        return joined(dp)

    @device
    def thin(job, id, node, head, sub, here, p, dp):
        """The share of p that counts, and dp times it; by the way what the edge's own weight gets of this head."""
        degree = int32(job.by_target[node + 1] - job.by_target[node]) if here else int32(1)
        share = share_of(job, id, head, degree)
        if job.has_weight != 0:
            if here and sub == 0:
                job.dweight[int64(id) * job.H + head] = share * p * dp if p != 0 and share != 0 else float32(0)
            share *= one(job.edge_weight, int64(id), here)
        return share, dp * share if share != 0 else float32(0)

    @device
    def add(job, base, w, d, value, a, edges, grads, queries, dv, dk):
        """dv += w do, and dk from ds through the rule; what is hidden is selected out."""
        for c in range(WIDTH):
            x = w * grads[base + c]
            dv[c] += x if w != 0 or not BIAS else float32(0)
            if RULE == DOT:
                x = d * queries[base + c]
                dk[c] += x if d != 0 or not BIAS else float32(0)
            elif RULE == JOINT:
                z = value[c] + queries[base + c]
                if EDGE:
                    z += edges[c]
                dk[c] += d * a[c] * slope_of_leaky(z, job.slope)

    @device
    def spread(job, id, head, sub, here, w, d, base, grads, queries, value, a, edges, more):
        """The gradients of what belongs to the edge itself: rows of its own."""
        if EDGE_VALUE:
            for c in range(WIDTH):
                more[c] = w * grads[base + c] if w != 0 else float32(0)
            put(job.dedge_value, id, head, sub, job.C, more, 0, here)
        if EDGE and RULE == DOT:
            for c in range(WIDTH):
                edges[c] = d * queries[base + c] if d != 0 else float32(0)
            put(job.dedge, id, head, sub, job.D, edges, 0, here)
        if EDGE and RULE == JOINT:
            for c in range(WIDTH):
                z = value[c] + queries[base + c] + edges[c]
                edges[c] = d * a[c] * slope_of_leaky(z, job.slope)
            put(job.dedge, id, head, sub, job.D, edges, 0, here)

    return EdgePasses(look, score, weight_gradient, thin, add, spread)
