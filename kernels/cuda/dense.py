"""Dense attention on a GPU, forward: the twin of the CPU's dense.py.

    query (B * H) x (Lq, D)   key (B * Hk) x (Lk, D)   value (B * Hk) x (Lk, Dv)   output (B * H) x (Lq, Dv)

A block of threads owns a block of queries of one head and takes it past the keys, tile by tile, as in FlashAttention-2
(Dao, 2023): each warp owns 16 * tall queries, whose scores, softmax and outputs never leave its registers. Keys and
values come to shared memory while the tile before is worked on. No atomics: the same bits every time.

Few queries are packed: those of all the heads that share a key head are one block, and the keys are cut into parts,
each a block of threads of its own, whose results `merge` joins.
"""

import functools
import math

from numba import cuda, types

from . import instructions as gpu
from .blocks import INF, AttentionJob, head_of_block, placing, scoring_tile
from .elements import STORAGE
from .jit import WARP, device, kernel
from .scoring import LN2, hidden_bits
from .softmax import softmax
from .tiles import cell, held, loading, operations, passed, pitch, storing
from .warps import adding

across, commit, exp2, larger, wait_for_all = gpu.across, gpu.commit, gpu.exp2, gpu.larger, gpu.wait_for_all


@functools.cache
def passes(v):
    """add_seen(job, o, s, hidden, odd, at, k0): o += p v of the rows of values with NaN or infinity, to those that see
    them. write(job, head0, row0, at, o, top, total): the outputs, and what the backward pass needs."""
    KEYS, SLOTS, WIDE, PACKED = v.keys, 2 * v.tall, v.width // 8, v.packed
    add_row = operations(v.element, v.width, v.tall, KEYS, v.hold > 0).add_row
    _, owner = placing(PACKED, SLOTS)
    put, int32, float32 = storing(v.element), types.int32, types.float32

    @device
    def add_seen(job, o, s, hidden, odd, at, k0):
        for j in range(KEYS):
            if odd[j] != 0:
                add_row(o, s, hidden, j, job.value.data, at + (k0 + j) * job.value.row, job.Dv)

    @device
    def share_of(job, where, first, top, total):
        """By what an output is divided, which is left for the backward pass."""
        seen = top > -INF or total != 0
        total += float32(job.epsilon)
        if first:
            job.lse[where] = top * float32(LN2) + math.log(total) if seen else float32(-INF)
            job.top[where], job.total[where] = top, total
        return float32(1) / total if seen else float32(0)

    @device
    def write(job, head0, row0, at, o, top, total):
        t = cuda.threadIdx.x & 3
        for r in range(SLOTS):
            if at[r] >= 0:
                head, i = owner(job, head0, int32(row0 + 8 * r))
                where, share = head * job.Lq + i, float32(1)
                if PACKED:
                    where = (head * job.splits + cuda.blockIdx.z % job.splits) * job.Lq + i
                    if t == 0:
                        job.top[where], job.total[where] = top[r], total[r]
                else:
                    share = share_of(job, where, t == 0, top[r], total[r])
                for c in range(WIDE):
                    n, d = cell(r, c, WIDE), 8 * c + 2 * t
                    if d < job.Dv:
                        if PACKED:
                            job.parts[where * job.Dv + d], job.parts[where * job.Dv + d + 1] = o[n], o[n + 1]
                        else:
                            there = job.output.at[head] + i * job.output.row + d
                            put(job.output.data, there, o[n] * share, o[n + 1] * share)

    return add_seen, write


@kernel(AttentionJob, registers=255, stack={256: 720})  # of 256 channels, the sums do not stay in registers
def forward(v):
    KEYS, TALL, SLOTS, ROWS, SCORES, PACKED = v.keys, v.tall, 2 * v.tall, v.rows, v.scores, v.packed
    TILE, SUMS, STORED = KEYS * pitch(v.element, v.width), TALL * v.width // 2, STORAGE[v.element]
    HELD, PASSED = held(v.element, v.width, TALL, v.hold > 0), passed(v.element, TALL, KEYS, v.threads)
    SPANS, DROPOUT, SOME_HIDDEN = v.threads // WARP * 4, v.dropout, v.bias or v.mask
    load_rows, times_transposed, times, _ = operations(v.element, v.width, TALL, KEYS, v.hold > 0)
    begin, take_out, forget = loading(v.element, v.width, KEYS, v.threads)
    place, _ = placing(PACKED, SLOTS)
    finish, thin = scoring_tile(v)
    exponentials, join = softmax(SLOTS, KEYS // 8, v.width // 8)
    add_seen, write = passes(v)
    int32 = types.int32

    def attention_forward(job):
        keys = cuda.shared.array(TILE, STORED)
        values = cuda.shared.array(TILE, STORED)
        odd = cuda.shared.array(KEYS, types.int32)
        spans = cuda.shared.array(SPANS, types.int32)
        shared = cuda.shared.array(PASSED, types.float32)
        rows = cuda.local.array(HELD, types.int32)
        s = cuda.local.array(SCORES, types.float32)
        o = cuda.local.array(SUMS, types.float32)
        top = cuda.local.array(SLOTS, types.float32)
        total = cuda.local.array(SLOTS, types.float32)
        at = cuda.local.array(SLOTS, types.int64)
        lo = cuda.local.array(SLOTS, types.int32)
        hi = cuda.local.array(SLOTS, types.int32)

        # 1. The rows of this warp, the longest first, and which keys they see.
        warp, g = cuda.threadIdx.x >> 5, (cuda.threadIdx.x & 31) >> 2
        row0 = int32((cuda.gridDim.x - 1 - cuda.blockIdx.x) * ROWS + warp * 16 * TALL + g)
        forget(odd)
        head0 = int32(head_of_block(job.matrices, job.splits if PACKED else 1) * job.heads)
        low, near, far, high = place(job, head0, row0, at, lo, hi, spans)
        load_rows(rows, job.query.data, at, job.D)
        for r in range(SLOTS):
            top[r], total[r] = -INF, 0
        for i in range(SUMS):
            o[i] = 0

        # 2. Past the keys. While a tile of keys is multiplied its values arrive; then the next keys.
        key_at, value_at = job.key.at[head0], job.value.at[head0]
        low = low // KEYS * KEYS
        if low < high:
            begin(keys, 0, job.key.data, key_at + low * job.key.row, job.key.row, job.Lk - low, job.D)
        commit()
        for start in range(low, high, KEYS):
            k0, next0 = int32(start), int32(start + KEYS)
            wait_for_all()
            cuda.syncthreads()
            begin(values, 0, job.value.data, value_at + k0 * job.value.row, job.value.row, job.Lk - k0, job.Dv)
            commit()
            for i in range(SCORES):
                s[i] = 0
            times_transposed(s, rows, keys, 0, job.query.data, at, job.D)
            edge = SOME_HIDDEN or k0 < near or k0 + KEYS > far
            finish(job, s, at, lo, hi, head0, row0, k0, edge)
            wait_for_all()
            cuda.syncthreads()
            if next0 < high:
                begin(keys, 0, job.key.data, key_at + next0 * job.key.row, job.key.row, job.Lk - next0, job.D)
            commit()
            spoiled, hidden = False, types.int64(0)
            if edge:
                spoiled = take_out(values, 0, odd)
                if spoiled:
                    hidden = hidden_bits(s, SCORES)

            # 3. p = 2**(s - top); o += p v.
            exponentials(s, o, top, total)
            if DROPOUT:
                thin(job, s, head0, row0, k0)
            times(o, s, values, 0, shared)
            if spoiled:
                add_seen(job, o, s, hidden, odd, value_at, k0)
                forget(odd)

        # 4. Divide.
        join(total)
        write(job, head0, row0, at, o, top, total)

    return attention_forward


@kernel(AttentionJob, registers=96)
def merge(v):
    """The union of the parts of a query's keys. A block of threads has one query; its warps deal out the parts, whose
    sums are added up in the order of the warps. No part waits for another: 16 to 64 of them take 4 to 8 us (H200, 256
    queries), and took 14 to 62 one after the other."""
    THREADS, WARPS, WIDTH, put = v.threads, v.threads // WARP, v.width, storing(v.element)
    SUMS = WARPS * WIDTH
    joined, float32 = adding(), types.float32

    def merge_parts(job):
        sums = cuda.shared.array(SUMS, types.float32)
        warp, lane, i, head = cuda.threadIdx.x >> 5, cuda.threadIdx.x & 31, cuda.blockIdx.y, cuda.blockIdx.x
        first, step = head * job.splits * job.Lq + i, job.Lq

        # 1. The largest score, and the sum of exp(score - it).
        best, total = float32(-INF), float32(0)
        for n in range(lane, job.splits, WARP):
            best = larger(best, job.top[first + n * step])
        for b in range(5):
            best = larger(best, across(best, 1 << b))
        shift = best if best > -INF else float32(0)
        for n in range(lane, job.splits, WARP):
            total += exp2(job.top[first + n * step] - shift) * job.total[first + n * step]
        total = joined(total)
        seen = best > -INF or total != 0
        total += float32(job.epsilon)
        share = float32(1) / total if seen else float32(0)

        # 2. Each warp's parts; what saw nothing is 0, and weighs 2**-inf = 0.
        for d in range(2 * lane, job.Dv, 2 * WARP):
            low, high = float32(0), float32(0)
            for n in range(warp, job.splits, WARPS):
                where = first + n * step
                weight = exp2(job.top[where] - shift)
                low += weight * job.parts[where * job.Dv + d]
                high += weight * job.parts[where * job.Dv + d + 1]
            sums[warp * WIDTH + d], sums[warp * WIDTH + d + 1] = low, high
        cuda.syncthreads()

        # 3. Their sums.
        for d in range(2 * cuda.threadIdx.x, job.Dv, 2 * THREADS):
            low, high = float32(0), float32(0)
            for w in range(WARPS):
                low += sums[w * WIDTH + d]
                high += sums[w * WIDTH + d + 1]
            put(job.output.data, job.output.at[head] + i * job.output.row + d, low * share, high * share)
        if cuda.threadIdx.x == 0:
            where = head * job.Lq + i
            job.merged_top[where], job.merged_total[where] = best, total
            job.lse[where] = best * float32(LN2) + math.log(total) if seen else float32(-INF)

    return merge_parts
