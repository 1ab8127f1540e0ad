"""The gate of a graph transformer: g = sigmoid(w . [o, r, o - r]) weighs the root's r against attention's o.

    o, r, out (N, C)    out = g r + (1 - g) o
    w (3, C)            given as two rows, for o and for r: w[0] + w[2] and w[1] - w[2]

A row at a time, which stays near the core while it is read twice.
"""

import math
from typing import NamedTuple

import numpy as np

from .gather import Rows, put_part, row_part
from .jit import inline, kernel
from .jobs import Elements
from .simd import fma, lane_sum, lanes_of, load, splat, store, zeros_of


class GateJob(NamedTuple):
    output: Rows  # (N, C): o
    root: Rows
    weight: Elements  # (2, pad)
    gate: Elements  # (N): g
    out: Rows  # of backward do
    grad: Rows  # of backward: dout
    droot: Rows
    sums: Elements  # (tasks, 2, pad): what tasks add to dw
    N: int
    C: int
    pad: int
    rows: int  # of one task


@inline
def both_rows(job, n, c):
    """Where a vector lies of row n, how much of it is there, and that of o and of r"""
    lanes = lanes_of(job.weight)
    live = min(lanes, job.C - c)
    o = row_part(job.output, n * job.output.step + c, live, lanes)
    return live, o, row_part(job.root, n * job.root.step + c, live, lanes)


@kernel
def forward(job: GateJob, slot, task):
    # task -> some rows
    lanes = lanes_of(job.weight)
    for n in range(task * job.rows, min(job.N, (task + 1) * job.rows)):
        # 1. g
        sum = zeros_of(job.weight)
        for c in range(0, job.C, lanes):
            live, o, r = both_rows(job, n, c)
            sum = fma(o, load(job.weight, c), fma(r, load(job.weight, job.pad + c), sum))
        g = 1 / (1 + math.exp(-np.float64(lane_sum(sum))))
        job.gate[n] = g
        # 2. out
        for c in range(0, job.C, lanes):
            live, o, r = both_rows(job, n, c)
            out = fma(r, splat(r, g), o * splat(o, 1 - g))
            put_part(job.out, n * job.out.step + c, out, live, lanes)


@kernel
def backward(job: GateJob, slot, task):
    # task -> some rows, and its own sums, which begin as zeros
    lanes = lanes_of(job.weight)
    of_output = job.sums + task * 2 * job.pad
    of_root = of_output + job.pad
    for n in range(task * job.rows, min(job.N, (task + 1) * job.rows)):
        # 1. d, the gradient of w . [o, r, o - r]
        sum = zeros_of(job.weight)
        for c in range(0, job.C, lanes):
            live, o, r = both_rows(job, n, c)
            sum = fma(row_part(job.grad, n * job.grad.step + c, live, lanes), r - o, sum)
        g = job.gate[n]
        d = lane_sum(sum) * g * (1 - g)
        # 2. do, dr, and what w gets
        for c in range(0, job.C, lanes):
            live, o, r = both_rows(job, n, c)
            x = row_part(job.grad, n * job.grad.step + c, live, lanes)
            do = fma(x, splat(x, 1 - g), load(job.weight, c) * splat(x, d))
            dr = fma(x, splat(x, g), load(job.weight, job.pad + c) * splat(x, d))
            put_part(job.out, n * job.out.step + c, do, live, lanes)
            put_part(job.droot, n * job.droot.step + c, dr, live, lanes)
            store(fma(o, splat(o, d), load(of_output, c)), of_output, c)
            store(fma(r, splat(r, d), load(of_root, c)), of_root, c)
