"""Attention over neighbours on a GPU, forward: the twin of the CPU's csr.py.

    s[e, h]      score of an edge, by one of four rules; a is of the edge, and optional everywhere
                 SUM     leaky(<att[0, h], value[j, h]> + <att[1, h], query[i, h]> + a[e, h])               GAT
                 JOINT   sum over c of att[h, c] * leaky(value[j, h, c] + query[i, h, c] + a[e, h, c])      GATv2
                 DOT     scale * sum over d of query[i, h, d] * (key[j, h, d] + a[e, h, d]) + bias[e, h]    transformers
                 GIVEN   bias[e, h]
    p[e, h]      softmax of s over the edges of a target
    w[e, h]      p * (kept by dropout) * (edge's weight) / (number of edges, for the mean)
    o[i, h, c]   offset + sum over e of w[e, h] * (value[j, h, c] + value_a[e, h, c]), or the largest of them

A group of lanes takes a target past its edges, some at a time, with the online softmax: of each source its rows are
read once, what scores need of them too, and nothing that has an entry for each edge is written.
"""

import functools
import math
from typing import NamedTuple

from numba import cuda, types

from . import instructions as gpu
from .gather import gathering
from .jit import Floats, device, kernel
from .projection import writing
from .scoring import LOG2E
from .walk import DOT, GIVEN, JOINT, SUM, NeighborJob, edge_id, share_of, walking

INF = math.inf
exp2, larger, number = gpu.exp2, gpu.larger, gpu.number


@device
def leaky(z, slope):
    return z if z > 0 else z * slope


@device
def slope_of_leaky(z, slope):
    return types.float32(1) if z > 0 else types.float32(slope)


@device
def power(x):
    """e**x"""
    return exp2(x * types.float32(LOG2E))


# --- scores ----------------------------------------------------------------------------------------------------------
@functools.cache
def rule_of(v):
    """rule(job, id, head, here, term, a, value, j, key, k, query, i, edges): the score of an edge, if it is `here`, and
    of SUM the slope of its LeakyReLU. What its ends bring begins at value[j], key[k] and query[i], or is SUM's term."""
    RULE, WIDTH, EDGE, BIAS = v.rule, v.width, v.edge, v.bias
    joined, one, int64, float32 = walking(v).joined, gpu.one[v.element], types.int64, types.float32

    @device
    def rule(job, id, head, here, term, a, value, j, key, k, query, i, edges):
        s, slope = float32(0), float32(1)
        if RULE == SUM:
            s = term
            if EDGE:
                s += one(job.edge.data, int64(id) * job.edge.step + head, here)
            slope = slope_of_leaky(s, job.slope)
            s = leaky(s, float32(job.slope))
        elif RULE == JOINT:
            for c in range(WIDTH):
                z = value[j + c] + query[i + c]
                if EDGE:
                    z += edges[c]
                s += a[c] * leaky(z, float32(job.slope))
            s = joined(s)
        elif RULE == DOT:
            for c in range(WIDTH):
                x = key[k + c]
                if EDGE:
                    x += edges[c]
                s += query[i + c] * x
            s = joined(s) * float32(job.scale)
        if BIAS:
            x = one(job.bias, int64(id) * job.H + head, here)
            s = float32(-INF) if x == -INF else s + x
        return s, slope

    return rule


class Scoring(NamedTuple):
    prepare: object
    look: object
    score: object


@functools.cache
def scoring(v):
    """What makes scores of the edges of one target.

    prepare(job, node, head, sub, there, q, a, b): q is what the target brings, a and b are att; returns SUM's term
    look(job, u, node, head, sub, here, values, keys): the rows of a source, to the u-th place
    score(job, u, id, head, sub, here, q, a, term, values, keys, edges): from the rows at the u-th place
    """
    RULE, WIDTH, EDGE = v.rule, v.width, v.edge
    take, joined, rule, float32 = gathering(v).take, walking(v).joined, rule_of(v), types.float32

    @device
    def prepare(job, node, head, sub, there, q, a, b):
        term = float32(0)
        if RULE == SUM:
            take(q, 0, job.query, node, head, sub, job.C, there and job.has_query != 0)
            for c in range(WIDTH):
                term += q[c] * b[c]
            term = joined(term)
        if RULE == JOINT or RULE == DOT:
            take(q, 0, job.query, node, head, sub, job.D, there)
        return term

    @device
    def look(job, u, node, head, sub, here, values, keys):
        take(values, u * WIDTH, job.value, node, head, sub, job.C, here)
        if RULE == DOT:
            take(keys, u * WIDTH, job.key, node, head, sub, job.D, here)

    @device
    def score(job, u, id, head, sub, here, q, a, term, values, keys, edges):
        s, base = float32(0), u * WIDTH
        if EDGE and RULE != SUM:
            take(edges, 0, job.edge, id, head, sub, job.D, here)
        if RULE == SUM:
            for c in range(WIDTH):
                s += values[base + c] * a[c]
            term += joined(s)
        s, _ = rule(job, id, head, here, term, a, values, base, keys, base, q, 0, edges)
        return s if here else float32(-INF)

    return Scoring(prepare, look, score)


@functools.cache
def attention_vectors(v):
    """take_att(job, head, sub, a, b): att of SUM and JOINT, in registers."""
    RULE, FOURS, LANES, one = v.rule, v.fours, v.lanes, gpu.one[v.element]
    int32, int64 = types.int32, types.int64

    @device
    def take_att(job, head, sub, a, b):
        for n in range(4 * FOURS):
            c = int32(4 * (n // 4 * LANES + sub) + n % 4)
            there, at = head < job.H and c < job.C, int64(head * int32(job.C) + c)
            if RULE == SUM or RULE == JOINT:
                a[n] = one(job.att, at, there)
            if RULE == SUM:
                b[n] = one(job.att, at + job.H * job.C, there)

    return take_att


# --- forward ---------------------------------------------------------------------------------------------------------
class Sums(NamedTuple):
    rescale: object
    add: object
    add_parts: object


@functools.cache
def summing(v):
    """rescale(o, top, total, best): what was summed under the old top, as if under `best`; returns the total.
    add(o, picked, w, values, base, more, position, live): one edge's value, which begins at values[base].
    add_parts(job, first, last, head, sub, o, picked, other, top, total): the sums of a hub's parts."""
    WIDTH, LANES, LINE = v.width, v.lanes, v.line
    HIDES, EDGE_VALUE, MAX, NORMALIZES = v.bias, v.edge_value, v.maximum, v.normalizes
    fetch = gathering(v).fetch
    int64, float32 = types.int64, types.float32

    @device
    def rescale(o, top, total, best):
        factor = float32(1)
        if NORMALIZES:
            factor = power(top - best) if best > -INF else float32(1)
            for c in range(WIDTH):
                o[c] *= factor
        return total * factor

    @device
    def add(o, picked, w, values, base, more, position, live):
        for c in range(WIDTH):
            y = values[base + c]
            if EDGE_VALUE:
                y += more[c]
            y = w * y
            if not MAX:
                o[c] += y if live or not HIDES else float32(0)
            elif live and (picked[c] < 0 or y > o[c] or y != y):
                o[c], picked[c] = y, position

    @device
    def add_parts(job, first, last, head, sub, o, picked, other, top, total):
        """The sums of a hub's parts, each under its own top."""
        for part in range(first, last):
            row = int64(part) * 2 * job.H + head
            fetch(other, job.partial, row * LINE, sub)
            t, l = job.partial[row * LINE + LINE - 4], job.partial[row * LINE + LINE - 3]
            best = larger(top, t)
            total = rescale(o, top, total, best)
            factor = float32(1)
            if NORMALIZES:
                factor = power(t - best) if t > -INF or t != t else float32(0)
            top, total = best, total + l * factor
            for c in range(WIDTH):
                y = other[c] * factor
                if not MAX:
                    o[c] += y
                else:
                    at = job.partial_best[(int64(part) * job.H + head) * LINE + (c // 4 * LANES + sub) * 4 + c % 4]
                    if at >= 0 and (picked[c] < 0 or y > o[c] or y != y):
                        o[c], picked[c] = y, at
        return top, total

    return Sums(rescale, add, add_parts)


@functools.cache
def passes(v):
    """walk(...): past the edges of one item; returns the largest score and the sum of the weights.
    finish(...): the output of a node. leave_part(...): or, of a part of a hub, what was summed."""
    WIDTH, UNROLLED, LANES, LINE = v.width, v.unrolled, v.lanes, v.line
    EDGE_VALUE, SHARES, MAX, NORMALIZES = v.edge_value, v.shares, v.maximum, v.normalizes
    NEEDS_IDS = v.edge or v.bias or v.edge_value or v.shares
    longest, one = walking(v).longest, gpu.one[v.element]
    take, put, _, leave, _ = gathering(v)
    _, look, score = scoring(v)
    rescale, add, _ = summing(v)
    int32, int64, float32 = types.int32, types.int64, types.float32

    @device
    def walk(job, node, first, last, head, sub, there, q, a, term, o, picked, values, keys, edges, more):
        """Past the edges, UNROLLED at a time: their rows are on the way while scores are made."""
        top, total = float32(-INF), float32(0)
        s = cuda.local.array(UNROLLED, float32)
        ids = cuda.local.array(UNROLLED, int32)
        degree = int32(last - first)
        if SHARES:
            degree = int32(job.by_target[max(node, 0) + 1] - job.by_target[max(node, 0)])
        for p in range(0, longest(int32(last - first)), UNROLLED):
            for u in range(UNROLLED):
                here, position = there and first + p + u < last, int32(first + p + u)
                ids[u] = position
                if NEEDS_IDS:
                    ids[u] = edge_id(job, position, here)
                look(job, u, number(job.others, position, here), head, sub, here, values, keys)
            best = top
            for u in range(UNROLLED):
                here = there and first + p + u < last
                s[u] = score(job, u, ids[u], head, sub, here, q, a, term, values, keys, edges)
                best = larger(best, s[u])
            total = rescale(o, top, total, best)
            top = best
            shift = best if best > -INF else float32(0)  # where nothing is seen: e**(-inf - 0) = 0, not NaN
            for u in range(UNROLLED):
                here, live, w = there and first + p + u < last, s[u] != -INF, float32(0)
                if NORMALIZES:
                    w = power(s[u] - shift)
                    total += w
                elif live:
                    w = s[u]
                if SHARES:
                    w *= share_of(job, ids[u], head, degree)
                    if job.has_weight != 0:
                        w *= one(job.edge_weight, int64(ids[u]), here)
                if EDGE_VALUE:
                    take(more, 0, job.edge_value, ids[u], head, sub, job.C, here)
                add(o, picked, w, values, u * WIDTH, more, int32(first + p + u), live)
        return top, total

    @device
    def finish(job, node, head, sub, there, o, picked, begin, top, total, term):
        factor = float32(1)
        if NORMALIZES:
            factor = float32(0) if total == 0 else float32(1) / total
        for c in range(WIDTH):
            o[c] *= factor
        if job.has_offset != 0:  # kept without it: to subtract it again would cancel digits that backward needs
            put(job.attended, node, head, sub, job.C, o, 0, there)
            take(begin, 0, job.offset, node, head, sub, job.C, there)
            for c in range(WIDTH):
                o[c] += begin[c]
        put(job.output, node, head, sub, job.C, o, 0, there)
        if there and sub == 0:
            at = (int64(node) * job.H + head) * 4
            job.stats[at], job.stats[at + 1], job.stats[at + 2] = top, total, term
        if MAX:
            for c in range(WIDTH):
                channel = int32((c // 4 * LANES + sub) * 4 + c % 4)
                if there and channel < job.C:
                    job.best[(int64(node) * job.H + head) * job.C + channel] = picked[c]

    @device
    def leave_part(job, part, head, sub, o, picked, top, total):
        row = int64(part) * 2 * job.H + head
        leave(job.partial, row * LINE, sub, o)
        if sub == 0:
            job.partial[row * LINE + LINE - 4], job.partial[row * LINE + LINE - 3] = top, total
        if MAX:
            at = (int64(part) * job.H + head) * LINE + sub * 4
            for c in range(WIDTH):
                job.partial_best[at + c // 4 * LANES * 4 + c % 4] = picked[c]

    return walk, finish, leave_part


@kernel(NeighborJob, registers=168)
def forward(v):
    WIDTH, UNROLLED, GROUPS, MAX = v.width, v.unrolled, v.groups, v.maximum
    ROOM, KEYS = UNROLLED * WIDTH, UNROLLED * WIDTH if v.rule == DOT else 1
    QUERY = WIDTH if v.rule != GIVEN else 1
    ATT, ATT_B = WIDTH if v.rule in (SUM, JOINT) else 1, WIDTH if v.rule == SUM else 1
    EDGE_ROOM, MORE, PICKED = WIDTH if v.edge else 1, WIDTH if v.edge_value else 1, WIDTH if v.maximum else 1
    place, item, _, _ = walking(v)
    prepare, take_att, add_parts = scoring(v).prepare, attention_vectors(v), summing(v).add_parts
    walk, finish, leave_part = passes(v)
    int32, float32 = types.int32, types.float32

    def attention_forward(job):
        values = cuda.local.array(ROOM, float32)
        keys = cuda.local.array(KEYS, float32)
        edges = cuda.local.array(EDGE_ROOM, float32)
        more = cuda.local.array(MORE, float32)
        q = cuda.local.array(QUERY, float32)
        a = cuda.local.array(ATT, float32)
        b = cuda.local.array(ATT_B, float32)
        o = cuda.local.array(WIDTH, float32)
        picked = cuda.local.array(PICKED, int32)

        # 1. Whose edges, and what the target brings.
        group, head, sub = place()
        node, first, last, part = item(job, int32(int32(cuda.blockIdx.x) * GROUPS + group))
        there = node >= 0 and head < job.H
        take_att(job, head, sub, a, b)
        term = prepare(job, node, head, sub, there, q, a, b)
        for c in range(WIDTH):
            o[c] = 0
            if MAX:
                picked[c] = -1

        # 2. Past the edges, or past the parts of a hub.
        top, total = float32(-INF), float32(0)
        if job.of_hubs != 0:
            if there:
                top, total = add_parts(job, first, last, head, sub, o, picked, values, top, total)
        else:
            top, total = walk(
                job, node, first, last, head, sub, there, q, a, term, o, picked, values, keys, edges, more
            )

        # 3. The output; or, of a part, what was summed.
        if part < 0:
            finish(job, node, head, sub, there, o, picked, values, top, total, term)
        elif there:
            leave_part(job, part, head, sub, o, picked, top, total)

    return attention_forward


# --- coefficients ----------------------------------------------------------------------------------------------------
@kernel(NeighborJob, registers=96)
def coefficients(v):
    """weights[e, h] = p, in the caller's order; 0 where the score is -inf, whatever else is NaN"""
    WIDTH, GROUPS, NORMALIZES = v.width, v.groups, v.normalizes
    KEYS, QUERY = WIDTH if v.rule == DOT else 1, WIDTH if v.rule != GIVEN else 1
    ATT, ATT_B = WIDTH if v.rule in (SUM, JOINT) else 1, WIDTH if v.rule == SUM else 1
    EDGE_ROOM = WIDTH if v.edge else 1
    place, item, longest, _ = walking(v)
    prepare, look, score = scoring(v)
    take_att, put = attention_vectors(v), writing(v.element)
    int32, int64, float32 = types.int32, types.int64, types.float32

    def attention_coefficients(job):
        values = cuda.local.array(WIDTH, float32)
        keys = cuda.local.array(KEYS, float32)
        edges = cuda.local.array(EDGE_ROOM, float32)
        q = cuda.local.array(QUERY, float32)
        a = cuda.local.array(ATT, float32)
        b = cuda.local.array(ATT_B, float32)
        group, head, sub = place()
        node, first, last, _ = item(job, int32(int32(cuda.blockIdx.x) * GROUPS + group))
        there = node >= 0 and head < job.H
        take_att(job, head, sub, a, b)
        term, top, total = prepare(job, node, head, sub, there, q, a, b), float32(0), float32(0)
        if there:
            at = (int64(node) * job.H + head) * 4
            top, total = job.stats[at], job.stats[at + 1]
        for p in range(longest(int32(last - first))):
            here, position = there and first + p < last, int32(first + p)
            id = edge_id(job, position, here)
            look(job, 0, number(job.others, position, here), head, sub, here, values, keys)
            s = score(job, 0, id, head, sub, here, q, a, term, values, keys, edges)
            w = s
            if NORMALIZES:
                w = float32(0) if total == 0 else power(s - top) / total
            if s == -INF:
                w = float32(0)
            if here and sub == 0:
                put(job.weights, int64(id) * job.H + head, w)

    return attention_coefficients


class LseJob(NamedTuple):
    stats: Floats  # (Nt, H, 4)
    lse: Floats  # (Nt, H)
    count: int


@kernel(LseJob, registers=32)
def lse(v):
    """The logarithm of the sum of e**score"""
    THREADS = v.threads

    def log_sum(job):
        n = types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if n < job.count:
            total = job.stats[4 * n + 1]
            job.lse[n] = job.stats[4 * n] + math.log(total) if total != 0 else types.float32(-INF)

    return log_sum
