"""Dense attention on a GPU, backward. Weights are made again, tile by tile, from what the forward pass kept.

    p = 2**(s - shift) * inverse      dv = p^T do      dp = do v^T      ds = p * (dp - delta)
    dq = scale * ds k      dk = scale * ds^T q         shift = max_j s      inverse = 1 / sum_j 2**(s - shift)
    delta = sum_d o * do - dlse

shift is not the logsumexp: beside a score of -1e9 float32 has no room for the logarithm of a sum. Nor is `inverse` left
for the end: without it ds, which is rounded to half precision, could leave the range of float16.

Two kernels, one that owns queries and one that owns keys, make seven products where five would do if both were one:
then the gradients of the queries would be summed by atomics, in an order that changes from run to run.
"""

import functools
from typing import NamedTuple

from numba import cuda, types

from . import instructions as gpu
from .blocks import INF, GradientJob, head_of_block, placing, scoring_tile
from .elements import STORAGE
from .jit import WARP, device, kernel
from .scoring import dice, hidden_bits, kept, scoring, sees_from, sees_to
from .tiles import cell, held, loading, operations, passed, pitch, storing, widen
from .warps import adding

ROWS_OF_A_WARP = 8  # in `prepare`; one takes 0.3 ms for half a million queries, four times what their bytes need
exp2, commit, wait_for_all_but_one = gpu.exp2, gpu.commit, gpu.wait_for_all_but_one


@kernel(GradientJob, registers=96)
def prepare(v):
    """shift, inverse and delta of each query: a warp has eight of them, whose loads are all under way at once."""
    widened, WARPS, QUERIES = widen(v.element), v.threads // WARP, ROWS_OF_A_WARP
    joined, int32, float32 = adding(), types.int32, types.float32

    def prepare_backward(job):
        lane, head = cuda.threadIdx.x & 31, head_of_block(job.matrices, 1)
        i0 = int32((cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5)) * QUERIES)
        delta = cuda.local.array(QUERIES, types.float32)
        for n in range(QUERIES):
            delta[n] = 0
        for d in range(2 * lane, job.Dv, 2 * WARP):
            for n in range(QUERIES):
                if i0 + n < job.Lq:
                    made = job.output.at[head] + (i0 + n) * job.output.row + d
                    given = job.grad_output.at[head] + (i0 + n) * job.grad_output.row + d
                    delta[n] += widened(job.output.data[made]) * widened(job.grad_output.data[given])
                    delta[n] += widened(job.output.data[made + 1]) * widened(job.grad_output.data[given + 1])
        for n in range(QUERIES):
            delta[n] = joined(delta[n])
            if lane == n and i0 + n < job.Lq:
                where = head * job.Lq + i0 + n
                top, total = job.top[where], job.total[where]
                job.shift[where] = top if top > -INF else float32(0)  # where nothing is seen, 2**(-inf - 0) = 0
                job.inverse[where] = float32(1) / total if total != 0 else float32(0)
                job.delta[where] = delta[n] - job.grad_lse[where]

    return prepare_backward


# --- by query --------------------------------------------------------------------------------------------------------
class QueryPasses(NamedTuple):
    begin_rows: object
    fetch: object
    slopes_of_cap: object
    weigh: object
    add_seen: object
    write: object


@functools.cache
def query_passes(v):
    """What `to_query` is made of, but for what it shares with the forward pass."""
    KEYS, SLOTS, SCORES, BLOCKS, WIDE = v.keys, 2 * v.tall, v.scores, v.keys // 8, v.width // 8
    SOFTCAP = v.softcap
    begin, _, _ = loading(v.element, v.width, KEYS, v.threads)
    add_row = operations(v.element, v.width, v.tall, KEYS, v.hold > 0).add_row
    _, slope_of_cap = scoring(v.element, v.softcap, v.slopes, v.bias, v.mask)
    put, float32 = storing(v.element), types.float32

    @device
    def begin_rows(job, head, row0, at, grad_at, shift, inverse, delta):
        """Where the output's gradients of this lane's rows begin, and what is known of their softmax: delta has
        `inverse` in it already."""
        for r in range(SLOTS):
            grad_at[r], shift[r], inverse[r], delta[r] = -1, 0, 0, 0
            if at[r] >= 0:
                grad_at[r] = job.grad_output.at[head] + (row0 + 8 * r) * job.grad_output.row
                where = head * job.Lq + row0 + 8 * r
                shift[r], inverse[r] = job.shift[where], job.inverse[where]
                delta[r] = job.delta[where] * inverse[r]

    @device
    def fetch(job, keys, values, to, key_at, value_at, k0):
        """Begin to copy a tile of keys and one of values."""
        live = job.Lk - k0
        begin(keys, to, job.key.data, key_at + k0 * job.key.row, job.key.row, live, job.D)
        begin(values, to, job.value.data, value_at + k0 * job.value.row, job.value.row, live, job.Dv)

    @device
    def slopes_of_cap(job, cap_slopes, s):
        if SOFTCAP:
            for i in range(SCORES):
                cap_slopes[i] = slope_of_cap(job.terms, s[i])

    @device
    def weigh(s, ds, cap_slopes, shift, inverse, delta, edge):
        """ds = p * (dp - delta), 0 where hidden; `inverse` and the difference are one instruction"""
        for r in range(SLOTS):
            for b in range(BLOCKS):
                for e in range(2):
                    n = cell(r, b, BLOCKS) + e
                    x = exp2(s[n] - shift[r]) * (ds[n] * inverse[r] - delta[r])
                    if SOFTCAP:
                        x *= cap_slopes[n]
                    ds[n] = x
        if edge:
            for n in range(SCORES):
                if s[n] == -INF:
                    ds[n] = float32(0)

    @device
    def add_seen(job, dq, ds, hidden, odd, at, k0):
        """dq += ds k of the keys with NaN or infinity, in the rows that see them"""
        for j in range(KEYS):
            if odd[j] != 0:
                add_row(dq, ds, hidden, j, job.key.data, at + (k0 + j) * job.key.row, job.D)

    @device
    def write(job, head, row0, t, at, dq):
        for r in range(SLOTS):
            for c in range(WIDE):
                n, d = cell(r, c, WIDE), 8 * c + 2 * t
                if at[r] >= 0 and d < job.D:
                    there = job.grad_query.at[head] + (row0 + 8 * r) * job.grad_query.row + d
                    put(job.grad_query.data, there, dq[n] * float32(job.slope), dq[n + 1] * float32(job.slope))

    return QueryPasses(begin_rows, fetch, slopes_of_cap, weigh, add_seen, write)


@kernel(GradientJob, registers=255, stack={64: 96, 256: 640})  # of 64, tall 2 spills a little and gains a quarter
def to_query(v):
    """dq = scale * ds k. A block owns queries and goes past the keys they see."""
    KEYS, TALL, SLOTS, ROWS, SCORES, STORED = v.keys, v.tall, 2 * v.tall, v.rows, v.scores, STORAGE[v.element]
    TILE, SUMS = KEYS * pitch(v.element, v.width), TALL * v.width // 2
    HELD, HELD_GRADS = (held(v.element, v.width, TALL, v.hold > n) for n in range(2))
    PASSED, SPANS = passed(v.element, TALL, KEYS, v.threads), v.threads // 8
    TWO, SOME_HIDDEN, DROPOUT, CAP_SLOPES = 2 * TILE, v.bias or v.mask, v.dropout, SCORES if v.softcap else 1
    load_rows, times_transposed, times, _ = operations(v.element, v.width, TALL, KEYS, v.hold > 0)
    load_grads, grads_times_transposed, _, _ = operations(v.element, v.width, TALL, KEYS, v.hold > 1)
    _, take_out, forget = loading(v.element, v.width, KEYS, v.threads)
    begin_rows, fetch, slopes_of_cap, weigh, add_seen, write = query_passes(v)
    place, _ = placing(False, SLOTS)
    finish, thin = scoring_tile(v)
    int32 = types.int32

    def backward_to_query(job):
        keys = cuda.shared.array(TWO, STORED)
        values = cuda.shared.array(TWO, STORED)
        odd = cuda.shared.array(KEYS, types.int32)
        spans = cuda.shared.array(SPANS, types.int32)
        shared = cuda.shared.array(PASSED, types.float32)
        queries = cuda.local.array(HELD, types.int32)
        grads = cuda.local.array(HELD_GRADS, types.int32)
        s = cuda.local.array(SCORES, types.float32)
        ds = cuda.local.array(SCORES, types.float32)
        cap_slopes = cuda.local.array(CAP_SLOPES, types.float32)
        dq = cuda.local.array(SUMS, types.float32)
        at = cuda.local.array(SLOTS, types.int64)
        grad_at = cuda.local.array(SLOTS, types.int64)
        lo = cuda.local.array(SLOTS, types.int32)
        hi = cuda.local.array(SLOTS, types.int32)
        shift = cuda.local.array(SLOTS, types.float32)
        inverse = cuda.local.array(SLOTS, types.float32)
        delta = cuda.local.array(SLOTS, types.float32)

        # 1. The rows of this warp: queries, and the gradients of their outputs.
        head = head_of_block(job.matrices, 1)
        # t, which is for the end, is found here: found there it costs 8 bytes more of stack
        warp, g, t = cuda.threadIdx.x >> 5, (cuda.threadIdx.x & 31) >> 2, cuda.threadIdx.x & 3
        row0 = int32((cuda.gridDim.x - 1 - cuda.blockIdx.x) * ROWS + warp * 16 * TALL + g)
        forget(odd)
        low, near, far, high = place(job, head, row0, at, lo, hi, spans)
        begin_rows(job, head, row0, at, grad_at, shift, inverse, delta)
        load_rows(queries, job.query.data, at, job.D)
        load_grads(grads, job.grad_output.data, grad_at, job.Dv)
        for i in range(SUMS):
            dq[i] = 0

        # 2. Past the keys and values, two tiles of each in turn.
        key_at, value_at = job.key.at[head], job.value.at[head]
        low, now = low // KEYS * KEYS, int32(0)
        if low < high:
            fetch(job, keys, values, 0, key_at, value_at, low)
        commit()
        for start in range(low, high, KEYS):
            k0, next0 = int32(start), int32(start + KEYS)
            if next0 < high:
                fetch(job, keys, values, int32(TILE - now), key_at, value_at, next0)
            commit()
            wait_for_all_but_one()
            cuda.syncthreads()
            for i in range(SCORES):
                s[i], ds[i] = 0, 0
            times_transposed(s, queries, keys, now, job.query.data, at, job.D)
            grads_times_transposed(ds, grads, values, now, job.grad_output.data, grad_at, job.Dv)
            slopes_of_cap(job, cap_slopes, s)
            edge = SOME_HIDDEN or k0 < near or k0 + KEYS > far
            finish(job, s, at, lo, hi, head, row0, k0, edge)
            spoiled, hidden = False, types.int64(0)
            if edge:
                cuda.syncthreads()
                spoiled = take_out(keys, now, odd)
                if spoiled:
                    hidden = hidden_bits(s, SCORES)

            # 3. ds = p * (dp - delta), 0 where hidden; dq += ds k.
            if DROPOUT:
                thin(job, ds, head, row0, k0)
            weigh(s, ds, cap_slopes, shift, inverse, delta, edge)
            times(dq, ds, keys, now, shared)
            if spoiled:
                add_seen(job, dq, ds, hidden, odd, key_at, k0)
                forget(odd)
            cuda.syncthreads()
            now = int32(TILE - now)
        write(job, head, row0, t, at, dq)

    return backward_to_query


# --- by key ----------------------------------------------------------------------------------------------------------
class KeyScores(NamedTuple):
    look: object
    finish: object
    weigh: object
    clear: object


@functools.cache
def key_scores(v):
    """What `to_key` does with a tile's scores. Rows are keys, from row0 on; columns are queries, from i0 on. What is
    known of the queries lies in shared memory, in lo, hi, shift, inverse and delta from `half` on."""
    SLOTS, SCORES, BLOCKS, DROPOUT, SOFTCAP, SLOPES = 2 * v.tall, v.scores, v.keys // 8, v.dropout, v.softcap, v.slopes
    score, slope_of_cap = scoring(v.element, v.softcap, v.slopes, v.bias, v.mask)
    int32, float32 = types.int32, types.float32

    @device
    def look(job, batch, head, i):
        """What is known of query i: the keys it sees, lo and hi, shift, inverse and delta."""
        if i >= job.Lq:
            return int32(0), int32(0), float32(0), float32(0), float32(0)
        where = head * job.Lq + i
        lo, hi = sees_from(job.sight, batch, i), min(int32(job.Lk), sees_to(job.sight, batch, i))
        return lo, hi, job.shift[where], job.inverse[where], job.delta[where]

    @device
    def finish(job, s, cap_slopes, lo, hi, head, i0, half, row0, edge):
        """From q.k to scores in base 2, hidden ones -inf; bits that say which are hidden."""
        t, slope = cuda.threadIdx.x & 3, float32(0)
        if SLOPES:
            slope = job.terms.slopes[head]
        for b in range(BLOCKS):
            for e in range(2):
                i = int32(i0 + 8 * b + 2 * t + e)
                for r in range(SLOTS):
                    k, j = cell(r, b, BLOCKS) + e, int32(row0 + 8 * r)
                    if SOFTCAP:
                        cap_slopes[k] = slope_of_cap(job.terms, s[k])
                    s[k] = score(job.terms, s[k], slope, head, i, j, j < job.Lk and i < job.Lq)
        hidden = types.int64(0)
        if edge:
            for b in range(BLOCKS):
                for e in range(2):
                    n = int32(half + 8 * b + 2 * t + e)
                    for r in range(SLOTS):
                        k, j = cell(r, b, BLOCKS) + e, int32(row0 + 8 * r)
                        if j < lo[n] or j >= hi[n]:
                            s[k] = float32(-INF)
            hidden = hidden_bits(s, SCORES)
        return hidden

    @device
    def weigh(job, s, ds, thinned, cap_slopes, shift, inverse, delta, head, i0, half, row0):
        """s = p, thinned for the values; ds = p * (dp - delta)"""
        t = cuda.threadIdx.x & 3
        for b in range(BLOCKS):
            for e in range(2):
                n, i = int32(half + 8 * b + 2 * t + e), int32(i0 + 8 * b + 2 * t + e)
                thrown = types.uint64(0)
                if DROPOUT:
                    thrown = dice(job.terms.seed, head, i)
                for r in range(SLOTS):
                    k, j = cell(r, b, BLOCKS) + e, int32(row0 + 8 * r)
                    p, dp = exp2(s[k] - shift[n]) * inverse[n], ds[k]
                    if DROPOUT:
                        gain = float32(job.terms.gain) if kept(thrown, j, job.terms.threshold) else float32(0)
                        thinned[k] = p * gain
                        dp = dp * gain if gain > 0 else float32(0)
                    ds[k], s[k] = p * (dp - delta[n]), p
                    if SOFTCAP:
                        ds[k] *= cap_slopes[k]

    @device
    def clear(s, ds, thinned, hidden):
        """0 where hidden"""
        for k in range(SCORES):
            if hidden >> k & 1:
                s[k], ds[k] = float32(0), float32(0)
                if DROPOUT:
                    thinned[k] = float32(0)

    return KeyScores(look, finish, weigh, clear)


class KeySums(NamedTuple):
    begin_rows: object
    fetch: object
    add: object
    write: object


@functools.cache
def key_sums(v):
    """The tiles that `to_key` reads, and the sums that it makes; rows and columns as in `key_scores`."""
    QUERIES, SLOTS, WIDE, TO_KEY, TO_VALUE = v.keys, 2 * v.tall, v.width // 8, v.makes != "value", v.makes != "key"
    times, add_row = operations(v.element, v.width, v.tall, QUERIES, v.hold > 0)[2:]
    begin, take_out, forget = loading(v.element, v.width, QUERIES, v.threads)
    put, float32 = storing(v.element), types.float32

    @device
    def begin_rows(job, head0, row0, at, value_at):
        """Where the keys and values of this lane's rows begin, -1 where there are none."""
        for r in range(SLOTS):
            at[r], value_at[r] = -1, -1
            if row0 + 8 * r < job.Lk:
                at[r] = job.key.at[head0] + (row0 + 8 * r) * job.key.row
                value_at[r] = job.value.at[head0] + (row0 + 8 * r) * job.value.row

    @device
    def fetch(job, queries, grads, to, head, i0):
        """Begin to copy a tile of queries and one of output gradients."""
        row, live = job.query.row, job.Lq - i0
        begin(queries, to, job.query.data, job.query.at[head] + i0 * row, row, live, job.D)
        row = job.grad_output.row
        begin(grads, to, job.grad_output.data, job.grad_output.at[head] + i0 * row, row, live, job.Dv)

    @device
    def add(job, dk, dv, ds, p, queries, grads, now, shared, odd, odd_grads, hidden, edge, head, i0):
        """dv += p^T do, dk += ds^T q. Rows with NaN or infinity are added to those that see them."""
        spoiled, spoiled_grads = False, False
        if edge:
            cuda.syncthreads()
            spoiled = take_out(queries, now, odd)
            spoiled_grads = take_out(grads, now, odd_grads)
        if TO_VALUE:
            times(dv, p, grads, now, shared)
        if TO_KEY:
            times(dk, ds, queries, now, shared)
        if spoiled or spoiled_grads:
            for n in range(QUERIES):
                if TO_KEY and odd[n] != 0:
                    there = job.query.at[head] + (i0 + n) * job.query.row
                    add_row(dk, ds, hidden, n, job.query.data, there, job.D)
                if TO_VALUE and odd_grads[n] != 0:
                    there = job.grad_output.at[head] + (i0 + n) * job.grad_output.row
                    add_row(dv, p, hidden, n, job.grad_output.data, there, job.Dv)
            forget(odd)
            forget(odd_grads)

    @device
    def write(job, head0, row0, dk, dv):
        for r in range(SLOTS):
            for c in range(WIDE):
                n, d = cell(r, c, WIDE), 8 * c + 2 * (cuda.threadIdx.x & 3)
                if TO_KEY and row0 + 8 * r < job.Lk and d < job.D:
                    there = job.grad_key.at[head0] + (row0 + 8 * r) * job.grad_key.row + d
                    put(job.grad_key.data, there, dk[n] * float32(job.slope), dk[n + 1] * float32(job.slope))
                if TO_VALUE and row0 + 8 * r < job.Lk and d < job.Dv:
                    there = job.grad_value.at[head0] + (row0 + 8 * r) * job.grad_value.row + d
                    put(job.grad_value.data, there, dv[n], dv[n + 1])

    return KeySums(begin_rows, fetch, add, write)


@kernel(GradientJob, registers=255, stack={128: 200, 256: 640})  # of 128, smaller tiles spill less and are slower
def to_key(v):
    """dv = p^T do, dk = scale * ds^T q. A block owns keys of one head and goes past all queries that see them, those of
    every head that shares the keys. Rows are keys and columns are queries."""
    QUERIES, TALL, SLOTS, ROWS, SCORES, STORED = v.keys, v.tall, 2 * v.tall, v.rows, v.scores, STORAGE[v.element]
    TILE, SUMS = QUERIES * pitch(v.element, v.width), TALL * v.width // 2
    HELD, HELD_VALUES = (held(v.element, v.width, TALL, v.hold > n) for n in range(2))
    PASSED, TWO, BOTH = passed(v.element, TALL, QUERIES, v.threads), 2 * TILE, 2 * QUERIES
    TO_KEY, TO_VALUE, DROPOUT, SOME_HIDDEN = v.makes != "value", v.makes != "key", v.dropout, v.bias or v.mask
    DK, DV, THIN = SUMS if TO_KEY else 1, SUMS if TO_VALUE else 1, SCORES if DROPOUT else 1
    CAP_SLOPES = SCORES if v.softcap else 1
    load_rows, times_transposed, _, _ = operations(v.element, v.width, TALL, QUERIES, v.hold > 0)
    load_values, values_times_transposed, _, _ = operations(v.element, v.width, TALL, QUERIES, v.hold > 1)
    _, _, forget = loading(v.element, v.width, QUERIES, v.threads)
    look, finish, weigh, clear = key_scores(v)
    begin_rows, fetch, add, write = key_sums(v)
    int32, float32 = types.int32, types.float32

    def backward_to_key(job):
        queries = cuda.shared.array(TWO, STORED)
        grads = cuda.shared.array(TWO, STORED)
        odd = cuda.shared.array(QUERIES, types.int32)
        odd_grads = cuda.shared.array(QUERIES, types.int32)
        lo = cuda.shared.array(BOTH, types.int32)
        hi = cuda.shared.array(BOTH, types.int32)
        shift = cuda.shared.array(BOTH, types.float32)
        inverse = cuda.shared.array(BOTH, types.float32)
        delta = cuda.shared.array(BOTH, types.float32)
        shared = cuda.shared.array(PASSED, types.float32)
        keys = cuda.local.array(HELD, types.int32)
        values = cuda.local.array(HELD_VALUES, types.int32)
        s = cuda.local.array(SCORES, types.float32)
        ds = cuda.local.array(SCORES, types.float32)
        thinned = cuda.local.array(THIN, types.float32)
        cap_slopes = cuda.local.array(CAP_SLOPES, types.float32)
        dk = cuda.local.array(DK, types.float32)
        dv = cuda.local.array(DV, types.float32)
        at = cuda.local.array(SLOTS, types.int64)
        value_at = cuda.local.array(SLOTS, types.int64)

        # 1. The rows of this warp: keys and values.
        forget(odd)
        forget(odd_grads)
        head0 = int32(head_of_block(job.key_matrices, 1) * job.group)
        batch = int32(head0 // job.H)
        warp, g = cuda.threadIdx.x >> 5, (cuda.threadIdx.x & 31) >> 2
        j0 = int32(cuda.blockIdx.x * ROWS)
        j1, row0 = int32(min(job.Lk, j0 + ROWS)), int32(j0 + warp * 16 * TALL + g)
        begin_rows(job, head0, row0, at, value_at)
        load_rows(keys, job.key.data, at, job.D)
        load_values(values, job.value.data, value_at, job.Dv)
        for i in range(DK):
            dk[i] = 0
        for i in range(DV):
            dv[i] = 0

        # 2. Past the queries that may see one of these keys, first <= j - i < last: head by head, two tiles in turn.
        low = int32(max(0, j0 - job.sight.last + 1) // QUERIES * QUERIES)
        high = int32(min(job.Lq, j1 - job.sight.first))
        tiles = int32(max(0, high - low + QUERIES - 1) // QUERIES)
        turns, now, half = int32(tiles * job.group), int32(0), int32(0)
        if tiles > 0:
            fetch(job, queries, grads, 0, head0, low)
        commit()
        n, some, missing = int32(cuda.threadIdx.x), int32(0), int32(0)
        if n < QUERIES and tiles > 0:
            lo[n], hi[n], shift[n], inverse[n], delta[n] = look(job, batch, head0, int32(low + n))
            some, missing = lo[n] < j1 and hi[n] > j0, lo[n] > j0 or hi[n] < j0 + ROWS
        some, missing = cuda.syncthreads_or(int32(some)), cuda.syncthreads_or(int32(missing))
        head, i0 = head0, low
        for turn in range(turns):
            next_head, next0 = head, int32(i0 + QUERIES)
            if next0 >= high:
                next_head, next0 = int32(head + 1), low
            next_lo, next_hi = int32(0), int32(0)
            next_shift, next_inverse, next_delta = float32(0), float32(0), float32(0)
            if turn + 1 < turns:
                fetch(job, queries, grads, int32(TILE - now), next_head, next0)
                if cuda.threadIdx.x < QUERIES:  # asked for now, needed when this tile is done
                    next_lo, next_hi, next_shift, next_inverse, next_delta = look(
                        job, batch, next_head, int32(next0 + cuda.threadIdx.x)
                    )
            commit()
            wait_for_all_but_one()
            cuda.syncthreads()

            # 3. Scores, and which of them are hidden; p, and ds = p * (dp - delta); dv += p^T do, dk += ds^T q.
            if some != 0:
                for i in range(SCORES):
                    s[i], ds[i] = 0, 0
                times_transposed(s, keys, queries, now, job.key.data, at, job.D)
                if TO_KEY:
                    values_times_transposed(ds, values, grads, now, job.value.data, value_at, job.Dv)
                edge = SOME_HIDDEN or missing != 0
                hidden = finish(job, s, cap_slopes, lo, hi, head, i0, half, row0, edge)
                weigh(job, s, ds, thinned, cap_slopes, shift, inverse, delta, head, i0, half, row0)
                if edge:
                    clear(s, ds, thinned, hidden)
                p = thinned if DROPOUT else s
                add(job, dk, dv, ds, p, queries, grads, now, shared, odd, odd_grads, hidden, edge, head, i0)

            # 4. On to the next tile.
            now, half, head, i0 = int32(TILE - now), int32(QUERIES - half), next_head, next0
            some, missing = int32(0), int32(0)
            if cuda.threadIdx.x < QUERIES:
                n = int32(half + cuda.threadIdx.x)
                lo[n], hi[n], shift[n], inverse[n], delta[n] = next_lo, next_hi, next_shift, next_inverse, next_delta
                some, missing = next_lo < j1 and next_hi > j0, next_lo > j0 or next_hi < j0 + ROWS
            missing = cuda.syncthreads_or(int32(missing))
            some = cuda.syncthreads_or(int32(some)) if job.sight.limits_row != 0 else int32(1)
        write(job, head0, row0, dk, dv)

    return backward_to_key
