"""The way back through attention over neighbours (csr.py): by source, and then by target for what targets get.

    delta[i, h] = sum over e of p * dp                 which is <do[i, h], o[i, h] before its offset>
    dp = <do[i, h], value[j, h] + value_a[e, h]> * w / p
    ds = p * (dp - delta)                              and through the rule to key, query and a
    dvalue[j, h, c] = sum over the edges from j of w[e, h] * do[i, h, c]

The twin of the CPU's csr_backward.py, which goes by target first. Here delta is known before, as in FlashAttention, so
one walk by source makes p again and reads each row of the targets once; of an edge only ds is kept.
"""

import functools
from typing import NamedTuple

from numba import cuda, types

from . import instructions as gpu
from .csr import INF, attention_vectors, leaky, power, slope_of_leaky
from .csr_edge import edge_passes
from .gather import gathering, totals
from .jit import WARP, Elements, Ints, device, kernel
from .projection import writing
from .tiles import widen
from .walk import DOT, GIVEN, JOINT, SUM, NeighborJob, edge_id, walking
from .warps import adding

number = gpu.number


# --- by target, before -----------------------------------------------------------------------------------------------
@kernel(NeighborJob, registers=64)
def prepare(v):
    """back_stats = the largest score, 1 / sum, SUM's term and delta, of each target and head; and the sum of all do."""
    WIDTH, GROUPS, NORMALIZES, SHARED = v.width, v.groups, v.normalizes, v.threads * v.width
    place, item, _, joined = walking(v)
    take, give, put_four = gathering(v).take, totals(v), gpu.put_four["float32"]
    int32, int64, float32 = types.int32, types.int64, types.float32

    def prepare_backward(job):
        shared = cuda.shared.array(SHARED, float32)
        o = cuda.local.array(WIDTH, float32)
        x = cuda.local.array(WIDTH, float32)
        sums = cuda.local.array(WIDTH, float32)
        group, head, sub = place()
        for c in range(WIDTH):
            sums[c] = 0
        for turn in range(job.rounds):
            node = int32((int32(cuda.blockIdx.x) * job.rounds + turn) * GROUPS + group)
            there, delta = node < job.nodes and head < job.H, float32(0)
            take(o, 0, job.attended, node, head, sub, job.C, there)
            take(x, 0, job.grad, node, head, sub, job.C, there)
            for c in range(WIDTH):
                delta += x[c] * o[c] if o[c] != 0 else float32(0)
                sums[c] += x[c]
            delta = joined(delta)
            if there and sub == 0:
                at = (int64(node) * job.H + head) * 4
                total = job.stats[at + 1]
                part = float32(0) if total == 0 else float32(1) / total
                if not NORMALIZES:
                    delta = float32(0)
                put_four(job.back_stats, at, (job.stats[at], part, job.stats[at + 2], delta))
        if job.wants_sums != 0:
            give(shared, sums, job)

    return prepare_backward


# --- by source -------------------------------------------------------------------------------------------------------
class SourcePasses(NamedTuple):
    begin: object
    walk: object
    add_parts: object
    leave_part: object
    finish: object


@functools.cache
def source_passes(v):
    """What `backward_sources` is made of."""
    WIDTH, UNROLLED, LINE, RULE = v.width, v.unrolled, v.line, v.rule
    EDGE, EDGE_VALUE, BIAS, SHARES, MAX, NORMALIZES = v.edge, v.edge_value, v.bias, v.shares, v.maximum, v.normalizes
    _, _, longest, joined = walking(v)
    take, put, _, leave, fetch = gathering(v)
    look, score, weight_gradient, thin, add, spread = edge_passes(v)
    write = writing(v.element)
    int32, int64, float32 = types.int32, types.int64, types.float32

    @device
    def begin(job, node, head, sub, there, value, key, a, dv, dk):
        """What the source brings; returns its term of SUM."""
        term = float32(0)
        take(value, 0, job.value, node, head, sub, job.C, there)
        if RULE == DOT:
            take(key, 0, job.key, node, head, sub, job.D, there)
        if RULE == SUM:
            for c in range(WIDTH):
                term += value[c] * a[c]
            term = joined(term)
        for c in range(WIDTH):
            dv[c] = 0
            if RULE == JOINT or RULE == DOT:
                dk[c] = 0
        return term

    @device
    def walk(job, first, last, head, sub, there, value, key, a, term, dv, dk, grads, queries, stats, edges, more):
        dterm = float32(0)
        for begin in range(0, longest(int32(last - first)), UNROLLED):
            look(job, int32(first + begin), last, head, sub, there, grads, queries, stats)
            for u in range(UNROLLED):
                here, base, n = there and first + begin + u < last, u * WIDTH, 4 * u
                position = number(job.positions, int32(first + begin + u), here)
                id, target = position, int32(0)
                if EDGE or BIAS or EDGE_VALUE or SHARES:
                    id = edge_id(job, position, here)
                if SHARES or MAX:
                    target = number(job.others, int32(first + begin + u), here)
                if EDGE and RULE != SUM:
                    take(edges, 0, job.edge, id, head, sub, job.D, here)
                s, slope = score(job, u, id, head, here, value, key, a, edges, queries, term, stats[n + 2])
                p, live = s, here and s != -INF
                if NORMALIZES:
                    p = power(s - stats[n]) * stats[n + 1] if stats[n + 1] != 0 else float32(0)
                if not live:
                    p = float32(0)
                dp = weight_gradient(job, base, position, target, id, head, sub, here, value, more, grads)
                w = p
                if SHARES:
                    share, dp = thin(job, id, target, head, sub, here, p, dp)
                    w = p * share
                d = dp if live else float32(0)
                if NORMALIZES:
                    d = p * (dp - stats[n + 3]) if p > 0 else p
                if RULE == SUM:
                    d *= slope
                    dterm += d
                if job.wants_dbias != 0 and here and sub == 0:
                    write(job.dbias, int64(id) * job.H + head, d)
                if RULE == DOT:
                    d *= float32(job.scale)
                add(job, base, w, d, value, a, edges, grads, queries, dv, dk)
                if RULE != GIVEN and here and sub == 0:
                    job.dscores[int64(position) * job.H + head] = d
                if EDGE_VALUE or (EDGE and RULE != SUM):
                    spread(job, id, head, sub, here, w, d, base, grads, queries, value, a, edges, more)
        return dterm

    @device
    def add_parts(job, first, last, head, sub, dv, dk, other):
        """The sums of a hub's parts."""
        dterm = float32(0)
        for n in range(first, last):
            row = int64(n) * 2 * job.H + head
            fetch(other, job.partial, row * LINE, sub)
            for c in range(WIDTH):
                dv[c] += other[c]
            if RULE == JOINT or RULE == DOT:
                fetch(other, job.partial, (row + job.H) * LINE, sub)
                for c in range(WIDTH):
                    dk[c] += other[c]
            dterm += job.partial[row * LINE + LINE - 4]
        return dterm

    @device
    def leave_part(job, part, head, sub, dv, dk, dterm):
        row = int64(part) * 2 * job.H + head
        leave(job.partial, row * LINE, sub, dv)
        if RULE == JOINT or RULE == DOT:
            leave(job.partial, (row + job.H) * LINE, sub, dk)
        if sub == 0:
            job.partial[row * LINE + LINE - 4] = dterm

    @device
    def finish(job, node, head, sub, value, a, dv, dk, sums, dterm):
        """What the source gets; and, of SUM, what att gets of it."""
        for c in range(WIDTH):
            if RULE == SUM:
                dv[c] += dterm * a[c]
                sums[c] += dterm * value[c] if dterm != 0 else float32(0)  # NaN that nobody saw
            elif RULE == JOINT:
                dv[c] += dk[c]
        put(job.dvalue, node, head, sub, job.C, dv, 0, True)
        if RULE == DOT:
            put(job.dkey, node, head, sub, job.D, dk, 0, True)

    return SourcePasses(begin, walk, add_parts, leave_part, finish)


@kernel(NeighborJob, registers=168)
def backward_sources(v):
    WIDTH, UNROLLED, GROUPS, RULE = v.width, v.unrolled, v.groups, v.rule
    ROOM, QUERIES = UNROLLED * WIDTH, UNROLLED * WIDTH if v.rule in (JOINT, DOT) else 1
    KEY, ATT = WIDTH if v.rule == DOT else 1, WIDTH if v.rule in (SUM, JOINT) else 1
    ATT_B = WIDTH if v.rule == SUM else 1
    DKEY, STATS = WIDTH if v.rule in (JOINT, DOT) else 1, 4 * UNROLLED
    EDGE_ROOM, MORE = WIDTH if v.edge else 1, WIDTH if v.edge_value else 1
    SHARED = v.threads * v.width if v.rule == SUM else 1
    place, item, _, _ = walking(v)
    take_att, give = attention_vectors(v), totals(v)
    begin, walk, add_parts, leave_part, finish = source_passes(v)
    int32, float32 = types.int32, types.float32

    def backward_by_source(job):
        shared = cuda.shared.array(SHARED, float32)
        grads = cuda.local.array(ROOM, float32)
        queries = cuda.local.array(QUERIES, float32)
        stats = cuda.local.array(STATS, float32)
        edges = cuda.local.array(EDGE_ROOM, float32)
        more = cuda.local.array(MORE, float32)
        value = cuda.local.array(WIDTH, float32)
        key = cuda.local.array(KEY, float32)
        a = cuda.local.array(ATT, float32)
        b = cuda.local.array(ATT_B, float32)
        dv = cuda.local.array(WIDTH, float32)
        dk = cuda.local.array(DKEY, float32)
        sums = cuda.local.array(ATT_B, float32)
        group, head, sub = place()
        take_att(job, head, sub, a, b)
        if RULE == SUM:
            for c in range(WIDTH):
                sums[c] = 0
        for turn in range(job.rounds):
            # 1. Whose edges, and what the source brings.
            node, first, last, part = item(job, int32((int32(cuda.blockIdx.x) * job.rounds + turn) * GROUPS + group))
            there, dterm = node >= 0 and head < job.H, float32(0)
            term = begin(job, node, head, sub, there, value, key, a, dv, dk)

            # 2. Past the edges, or past the parts of a hub.
            if job.of_hubs == 0:
                dterm = walk(
                    job, first, last, head, sub, there, value, key, a, term, dv, dk, grads, queries, stats, edges, more
                )
            elif there:
                dterm = add_parts(job, first, last, head, sub, dv, dk, grads)

            # 3. What the source gets; or, of a part, what was summed.
            if part >= 0 and there:
                leave_part(job, part, head, sub, dv, dk, dterm)
            elif there:
                finish(job, node, head, sub, value, a, dv, dk, sums, dterm)
        if RULE == SUM and job.wants_sums != 0:
            give(shared, sums, job)

    return backward_by_source


# --- by target -------------------------------------------------------------------------------------------------------
class TargetPasses(NamedTuple):
    walk_numbers: object
    walk: object
    add_parts: object
    leave_part: object
    finish: object


@functools.cache
def target_passes(v):
    """What `backward_targets` is made of."""
    WIDTH, UNROLLED, LANES, LINE, RULE = v.width, v.unrolled, v.lanes, v.line, v.rule
    EDGE, SELECTS = v.edge, v.bias
    _, _, longest, joined = walking(v)
    take, put, add, leave, fetch = gathering(v)
    int32, int64, float32 = types.int32, types.int64, types.float32

    @device
    def walk_numbers(job, first, last, head, sub, there):
        """SUM: the edges' own numbers, an edge to each lane of a head."""
        found = float32(0)
        for p in range(0, longest(int32(last - first)), LANES):
            if there and first + p + sub < last:
                found += job.dscores[int64(first + p + sub) * job.H + head]
        return joined(found)

    @device
    def walk(job, first, last, head, sub, there, q, a, dq, sums, keys, edges):
        for p in range(0, longest(int32(last - first)), UNROLLED):
            for u in range(UNROLLED):
                here = there and first + p + u < last
                j = number(job.others, int32(first + p + u), here)
                if RULE == DOT:
                    take(keys, u * WIDTH, job.key, j, head, sub, job.D, here)
                else:
                    take(keys, u * WIDTH, job.value, j, head, sub, job.D, here)
            for u in range(UNROLLED):
                here, position, d = there and first + p + u < last, int32(first + p + u), float32(0)
                if here:
                    d = job.dscores[int64(position) * job.H + head]
                if EDGE:
                    take(edges, 0, job.edge, edge_id(job, position, here), head, sub, job.D, here)
                for c in range(WIDTH):
                    k = keys[u * WIDTH + c]
                    if EDGE:
                        k += edges[c]
                    if RULE == JOINT:
                        z = k + q[c]
                        dq[c] += d * a[c] * slope_of_leaky(z, job.slope)
                        sums[c] += d * leaky(z, float32(job.slope))
                    elif SELECTS:
                        dq[c] += d * k if d != 0 else float32(0)
                    else:
                        dq[c] += d * k

    @device
    def add_parts(job, first, last, head, sub, dq, other):
        """The sums of a hub's parts."""
        dterm = float32(0)
        for n in range(first, last):
            row = int64(n) * 2 * job.H + head
            fetch(other, job.partial, row * LINE, sub)
            for c in range(WIDTH):
                dq[c] += other[c]
            dterm += job.partial[row * LINE + LINE - 4]
        return dterm

    @device
    def leave_part(job, part, head, sub, dq, dterm):
        row = int64(part) * 2 * job.H + head
        leave(job.partial, row * LINE, sub, dq)
        if sub == 0:
            job.partial[row * LINE + LINE - 4] = dterm

    @device
    def finish(job, node, head, sub, there, q, a, b, dq, sums, dterm):
        if RULE == SUM:
            take(q, 0, job.query, node, head, sub, job.C, there)
            for c in range(WIDTH):
                sums[c] += dterm * q[c] if dterm != 0 else float32(0)
                dq[c] = dterm * b[c]
        if RULE == SUM and job.adds != 0:
            add(job.dvalue, node, head, sub, job.C, dq, 0, there)
            put(job.dvalue, node, head, sub, job.C, dq, 0, there)
        else:
            put(job.dquery, node, head, sub, job.D, dq, 0, there)

    return TargetPasses(walk_numbers, walk, add_parts, leave_part, finish)


@kernel(NeighborJob, registers=128)
def backward_targets(v):
    WIDTH, GROUPS, RULE = v.width, v.groups, v.rule
    ROOM, EDGE_ROOM = v.unrolled * WIDTH, WIDTH if v.edge else 1
    ATT, ATT_B = WIDTH if v.rule in (SUM, JOINT) else 1, WIDTH if v.rule == SUM else 1
    SHARED = v.threads * v.width if v.rule != DOT else 1
    place, item, _, _ = walking(v)
    take, take_att, give = gathering(v).take, attention_vectors(v), totals(v)
    walk_numbers, walk, add_parts, leave_part, finish = target_passes(v)
    int32, float32 = types.int32, types.float32

    def backward_by_target(job):
        shared = cuda.shared.array(SHARED, float32)
        keys = cuda.local.array(ROOM, float32)
        edges = cuda.local.array(EDGE_ROOM, float32)
        q = cuda.local.array(WIDTH, float32)
        a = cuda.local.array(ATT, float32)
        b = cuda.local.array(ATT_B, float32)
        dq = cuda.local.array(WIDTH, float32)
        sums = cuda.local.array(WIDTH, float32)
        group, head, sub = place()
        take_att(job, head, sub, a, b)
        for c in range(WIDTH):
            sums[c] = 0
        for turn in range(job.rounds):
            # 1. Whose edges, and what the target brings.
            node, first, last, part = item(job, int32((int32(cuda.blockIdx.x) * job.rounds + turn) * GROUPS + group))
            there, dterm = node >= 0 and head < job.H, float32(0)
            if RULE == JOINT:
                take(q, 0, job.query, node, head, sub, job.D, there)
            for c in range(WIDTH):
                dq[c] = 0

            # 2. Past the edges, or past the parts of a hub.
            if job.of_hubs != 0:
                dterm = add_parts(job, first, last if there else first, head, sub, dq, keys)
            elif RULE == SUM:
                dterm = walk_numbers(job, first, last, head, sub, there)
            else:
                walk(job, first, last, head, sub, there, q, a, dq, sums, keys, edges)

            # 3. What the target gets; or, of a part, what was summed.
            if part < 0:
                finish(job, node, head, sub, there, q, a, b, dq, sums, dterm)
            elif there:
                leave_part(job, part, head, sub, dq, dterm)
        if RULE != DOT and job.wants_sums != 0:
            give(shared, sums, job)

    return backward_by_target


# --- softmax over edges ----------------------------------------------------------------------------------------------
class SoftmaxJob(NamedTuple):
    indptr: Ints
    edge_ids: Ints
    has_ids: int
    weights: Elements  # (E, H), as the next, in the caller's order
    grad: Elements
    out: Elements
    nodes: int
    H: int


@kernel(SoftmaxJob, registers=64)
def softmax_backward(v):
    """out = weights * (grad - the sum over the target's edges of weights * grad): a warp for a target. Where a weight
    is 0 nobody saw the edge, and its gradient may be NaN: such products are left out, not multiplied."""
    WARPS, write, widened, joined = v.threads // WARP, writing(v.element), widen(v.element), adding()
    int32, int64, float32 = types.int32, types.int64, types.float32

    @device
    def share(job, at, total):
        """weights * (grad - total) of one edge"""
        weight = widened(job.weights[at])
        return weight * (widened(job.grad[at]) - total) if weight != 0 else float32(0)

    def backward_of_softmax(job):
        t = int32(cuda.threadIdx.x)
        node = int32(int32(cuda.blockIdx.x) * WARPS + (t >> 5))
        if node < job.nodes:
            first, last = job.indptr[node], job.indptr[node + 1]
            for h in range(job.H):
                total = float32(0)
                for p in range(first + (t & 31), last, WARP):
                    total += share(job, int64(edge_id(job, int32(p), True)) * job.H + h, float32(0))
                total = joined(total)
                for p in range(first + (t & 31), last, WARP):
                    at = int64(edge_id(job, int32(p), True)) * job.H + h
                    write(job.out, at, share(job, at, total))

    return backward_of_softmax
