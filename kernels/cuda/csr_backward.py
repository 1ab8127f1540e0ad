"""The way back through attention over neighbours (csr.py): by source, and then by target for what targets get.

    delta[i, h] = sum over e of p * dp                 which is <do[i, h], o[i, h] before its offset>
    dp = <do[i, h], value[j, h] + value_a[e, h]> * w / p
    ds = p * (dp - delta)                              and through the rule to key, query and a
    dvalue[j, h, c] = sum over the edges from j of w[e, h] * do[i, h, c]

The twin of the CPU's csr_backward.py, which goes by target first. Here delta is known before, as in FlashAttention, so
one walk by source makes p again and reads each row of the targets once; of an edge only ds is kept.
"""

from typing import NamedTuple

from numba import cuda, types

from . import instructions as gpu
from .csr import INF, attention_vectors, leaky, power
from .gather import gathering, totals
from .jit import WARP, Elements, Ints, device, kernel
from .projection import writing
from .tiles import widen
from .walk import DOT, GIVEN, JOINT, SUM, NeighborJob, edge_id, share_of, walking

across, number = gpu.across, gpu.number


# --- by target, before -----------------------------------------------------------------------------------------------
@kernel(NeighborJob, registers=64)
def prepare(v):
    """slopes = the largest score, 1 / sum, SUM's term and delta, of each target and head; and the sum of all do."""
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
                put_four(job.slopes, at, (job.stats[at], part, job.stats[at + 2], delta))
        if job.wants_sums != 0:
            give(shared, sums, job)

    return prepare_backward


# --- by source -------------------------------------------------------------------------------------------------------
@kernel(NeighborJob, registers=168)
def backward_sources(v):
    WIDTH, UNROLLED, GROUPS, LANES, LINE, RULE = v.width, v.unrolled, v.groups, v.lanes, v.line, v.rule
    ROOM, QUERIES = UNROLLED * WIDTH, UNROLLED * WIDTH if v.rule in (JOINT, DOT) else 1
    KEY, ATT = WIDTH if v.rule == DOT else 1, WIDTH if v.rule in (SUM, JOINT) else 1
    ATT_B = WIDTH if v.rule == SUM else 1
    DKEY, SLOPES = WIDTH if v.rule in (JOINT, DOT) else 1, 4 * UNROLLED
    EDGE, EDGE_VALUE, BIAS, SHARES, MAX = v.edge, v.edge_value, v.bias, v.shares, v.maximum
    EDGE_ROOM, MORE = WIDTH if v.edge else 1, WIDTH if v.edge_value else 1
    SHARED, NORMALIZES = v.threads * v.width if v.rule == SUM else 1, v.normalizes
    place, item, longest, joined = walking(v)
    take, put, _, leave, fetch = gathering(v)
    take_att, give, write, one = attention_vectors(v), totals(v), writing(v.element), gpu.one[v.element]
    four = gpu.four["float32"]
    int32, int64, float32 = types.int32, types.int64, types.float32

    @device
    def score(job, u, id, head, here, value, key, a, edges, queries, term, target_term):
        """As forward makes it, but from the source's side; and what a LeakyReLU's slope was, of SUM."""
        s, slope, base = float32(0), float32(1), u * WIDTH
        if RULE == SUM:
            s = term + target_term
            if EDGE:
                s += one(job.edge.data, int64(id) * job.edge.step + head, here)
            slope = float32(1) if s > 0 else float32(job.slope)
            s = leaky(s, float32(job.slope))
        elif RULE == JOINT:
            for c in range(WIDTH):
                z = value[c] + queries[base + c]
                if EDGE:
                    z += edges[c]
                s += a[c] * leaky(z, float32(job.slope))
            s = joined(s)
        elif RULE == DOT:
            for c in range(WIDTH):
                k = key[c]
                if EDGE:
                    k += edges[c]
                s += queries[base + c] * k
            s = joined(s) * float32(job.scale)
        if BIAS:
            x = one(job.bias, int64(id) * job.H + head, here)
            s = float32(-INF) if x == -INF else s + x
        return s, slope

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
                edges[c] = d * a[c] * (float32(1) if z > 0 else float32(job.slope))
            put(job.dedge, id, head, sub, job.D, edges, 0, here)

    @device
    def look(job, first, last, head, sub, there, grads, queries, slopes):
        """The rows of the targets of some edges, and what is known of their softmax."""
        for u in range(UNROLLED):
            here = there and first + u < last
            i = number(job.others, int32(first + u), here)
            take(grads, u * WIDTH, job.grad, i, head, sub, job.C, here)
            if RULE == JOINT or RULE == DOT:
                take(queries, u * WIDTH, job.query, i, head, sub, job.D, here)
            n, at = 4 * u, (int64(i) * job.H + head) * 4
            slopes[n], slopes[n + 1], slopes[n + 2], slopes[n + 3] = four(job.slopes, at, here)

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
                dk[c] += d * a[c] * (float32(1) if z > 0 else float32(job.slope))

    @device
    def walk(job, first, last, head, sub, there, value, key, a, term, dv, dk, grads, queries, slopes, edges, more):
        dterm = float32(0)
        for begin in range(0, longest(int32(last - first)), UNROLLED):
            look(job, int32(first + begin), last, head, sub, there, grads, queries, slopes)
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
                s, slope = score(job, u, id, head, here, value, key, a, edges, queries, term, slopes[n + 2])
                p, live = s, here and s != -INF
                if NORMALIZES:
                    p = power(s - slopes[n]) * slopes[n + 1] if slopes[n + 1] != 0 else float32(0)
                if not live:
                    p = float32(0)
                dp = weight_gradient(job, base, position, target, id, head, sub, here, value, more, grads)
                w = p
                if SHARES:
                    share, dp = thin(job, id, target, head, sub, here, p, dp)
                    w = p * share
                d = dp if live else float32(0)
                if NORMALIZES:
                    d = p * (dp - slopes[n + 3]) if p > 0 else p
                if RULE == SUM:
                    d *= slope
                    dterm += d
                if job.wants_dbias != 0 and here and sub == 0:
                    write(job.dbias, int64(id) * job.H + head, d)
                if RULE == DOT:
                    d *= float32(job.scale)
                add(job, base, w, d, value, a, edges, grads, queries, dv, dk)
                if RULE != GIVEN and here and sub == 0:
                    job.changes[int64(position) * job.H + head] = d
                if EDGE_VALUE or (EDGE and RULE != SUM):
                    spread(job, id, head, sub, here, w, d, base, grads, queries, value, a, edges, more)
        return dterm

    def backward_by_source(job):
        shared = cuda.shared.array(SHARED, float32)
        grads = cuda.local.array(ROOM, float32)
        queries = cuda.local.array(QUERIES, float32)
        slopes = cuda.local.array(SLOPES, float32)
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
            there, term, dterm = node >= 0 and head < job.H, float32(0), float32(0)
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

            # 2. Past the edges, or past the parts of a hub.
            if job.of_hubs == 0:
                dterm = walk(
                    job, first, last, head, sub, there, value, key, a, term, dv, dk, grads, queries, slopes, edges, more
                )
            elif there:
                for n in range(first, last):
                    row = int64(n) * 2 * job.H + head
                    fetch(grads, job.partial, row * LINE, sub)
                    for c in range(WIDTH):
                        dv[c] += grads[c]
                    if RULE == JOINT or RULE == DOT:
                        fetch(grads, job.partial, (row + job.H) * LINE, sub)
                        for c in range(WIDTH):
                            dk[c] += grads[c]
                    dterm += job.partial[row * LINE + LINE - 4]

            # 3. What the source gets; or, of a part, what was summed.
            if part >= 0 and there:
                row = int64(part) * 2 * job.H + head
                leave(job.partial, row * LINE, sub, dv)
                if RULE == JOINT or RULE == DOT:
                    leave(job.partial, (row + job.H) * LINE, sub, dk)
                if sub == 0:
                    job.partial[row * LINE + LINE - 4] = dterm
            elif there:
                for c in range(WIDTH):
                    if RULE == SUM:
                        dv[c] += dterm * a[c]
                        sums[c] += dterm * value[c]
                    elif RULE == JOINT:
                        dv[c] += dk[c]
                put(job.dvalue, node, head, sub, job.C, dv, 0, True)
                if RULE == DOT:
                    put(job.dkey, node, head, sub, job.D, dk, 0, True)
        if RULE == SUM and job.wants_sums != 0:
            give(shared, sums, job)

    return backward_by_source


# --- by target -------------------------------------------------------------------------------------------------------
@kernel(NeighborJob, registers=128)
def backward_targets(v):
    WIDTH, UNROLLED, GROUPS, LANES, LINE, RULE = v.width, v.unrolled, v.groups, v.lanes, v.line, v.rule
    ROOM, EDGE = UNROLLED * WIDTH, v.edge
    ATT, ATT_B = WIDTH if v.rule in (SUM, JOINT) else 1, WIDTH if v.rule == SUM else 1
    EDGE_ROOM, SHARED, SELECTS = WIDTH if v.edge else 1, v.threads * v.width if v.rule != DOT else 1, v.bias
    place, item, longest, joined = walking(v)
    take, put, add, leave, fetch = gathering(v)
    take_att, give = attention_vectors(v), totals(v)
    int32, int64, float32 = types.int32, types.int64, types.float32

    @device
    def walk_numbers(job, first, last, head, sub, there):
        """SUM: the edges' own numbers, an edge to each lane of a head."""
        found = float32(0)
        for p in range(0, longest(int32(last - first)), LANES):
            if there and first + p + sub < last:
                found += job.changes[int64(first + p + sub) * job.H + head]
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
                    d = job.changes[int64(position) * job.H + head]
                if EDGE:
                    take(edges, 0, job.edge, edge_id(job, position, here), head, sub, job.D, here)
                for c in range(WIDTH):
                    k = keys[u * WIDTH + c]
                    if EDGE:
                        k += edges[c]
                    if RULE == JOINT:
                        z = k + q[c]
                        dq[c] += d * a[c] * (float32(1) if z > 0 else float32(job.slope))
                        sums[c] += d * leaky(z, float32(job.slope))
                    elif SELECTS:
                        dq[c] += d * k if d != 0 else float32(0)
                    else:
                        dq[c] += d * k

    @device
    def finish(job, node, head, sub, there, q, a, b, dq, sums, dterm):
        if RULE == SUM:
            take(q, 0, job.query, node, head, sub, job.C, there)
            for c in range(WIDTH):
                sums[c] += dterm * q[c]
                dq[c] = dterm * b[c]
        if RULE == SUM and job.adds != 0:
            add(job.dvalue, node, head, sub, job.C, dq, 0, there)
            put(job.dvalue, node, head, sub, job.C, dq, 0, there)
        else:
            put(job.dquery, node, head, sub, job.D, dq, 0, there)

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
            node, first, last, part = item(job, int32((int32(cuda.blockIdx.x) * job.rounds + turn) * GROUPS + group))
            there, dterm = node >= 0 and head < job.H, float32(0)
            if RULE == JOINT:
                take(q, 0, job.query, node, head, sub, job.D, there)
            for c in range(WIDTH):
                dq[c] = 0
            if job.of_hubs != 0:
                for n in range(first, last if there else first):
                    row = int64(n) * 2 * job.H + head
                    fetch(keys, job.partial, row * LINE, sub)
                    for c in range(WIDTH):
                        dq[c] += keys[c]
                    dterm += job.partial[row * LINE + LINE - 4]
            elif RULE == SUM:
                dterm = walk_numbers(job, first, last, head, sub, there)
            else:
                walk(job, first, last, head, sub, there, q, a, dq, sums, keys, edges)
            if part < 0:
                finish(job, node, head, sub, there, q, a, b, dq, sums, dterm)
            elif there:
                row = int64(part) * 2 * job.H + head
                leave(job.partial, row * LINE, sub, dq)
                if sub == 0:
                    job.partial[row * LINE + LINE - 4] = dterm
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
    WARPS, write, widened = v.threads // WARP, writing(v.element), widen(v.element)
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
                for b in range(5):
                    total += across(total, 1 << b)
                for p in range(first + (t & 31), last, WARP):
                    at = int64(edge_id(job, int32(p), True)) * job.H + h
                    write(job.out, at, share(job, at, total))

    return backward_of_softmax
