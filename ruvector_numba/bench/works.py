"""The work that is measured, what its right answer is, and how a library is held ready to do it."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

import numpy as np

from .. import halves

__all__ = ["HALVES", "OURS", "Build", "Runner", "Task", "Unsupported", "Work", "layer_results"]

OURS = "ruvector-numba"
HALVES = {"bfloat16": halves.BITS, "float16": np.dtype(np.float16)}  # bfloat16 by its bits
# Of a result against float64, relative to the largest magnitude; rightly they are some 1e-6, 5e-3 and 5e-4.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}


class Task(Hashable, Protocol):
    """What a piece of work says of itself: all that the bench and the tables need to know."""

    @property
    def name(self) -> str:
        """What the tables say."""

    @property
    def kind(self) -> str:
        """Which adapters do it: a key of `peers.KINDS`."""

    @property
    def unit(self) -> str:
        """Of `rate`."""

    @property
    def limit(self) -> str:
        """What of the machine bounds it: "peak", in GFLOP/s, or "bandwidth", in GB/s."""

    @property
    def length(self) -> int:
        """Of its sequences, where that matters to what must be reached."""

    def rate(self, seconds: float) -> float:
        """What a call of so many seconds comes to."""

    def used(self, rate: float) -> float:
        """What such a rate takes of the limit, in the limit's unit."""

    def reference(self) -> list[np.ndarray]:
        """The right answer in float64, in the order of a runner's `results`."""

    def tiny(self) -> Task:
        """The same kind at a size that takes no time."""


class Unsupported(Exception):
    """This library cannot do this work; the text says why."""


@dataclasses.dataclass
class Runner:
    """`call` is timed; `results` turns what it returned into [output] or [output, dquery, dkey, dvalue].

    A layer's results with gradients are those of `layer_results`.

    With `measures`, `call` is no work to be timed: it returns a rate that it has measured itself (see perf/peak.py).
    """

    call: Callable[[], Any]
    results: Callable[[Any], list[np.ndarray]] = list
    measures: bool = False
    keeps: Any = None  # what must outlive the calls

    def time(self, calls: int) -> float:
        """The median of so many calls in seconds, or of the rates that they measured.

        One more wakes the threads, save where a single call takes so long that it does not matter.
        """
        if calls > 1:
            self.call()
        taken = []
        for _ in range(calls):
            start = time.perf_counter()
            found = self.call()
            taken.append(float(found) if self.measures else time.perf_counter() - start)
        return statistics.median(taken)


Build = Callable[[Any, int], Runner]  # of the work, which its adapters know, and the number of threads


@dataclasses.dataclass(frozen=True)
class Work:
    """One cell of the tables: attention, forward or with gradients, of arrays of `dtype`: float32, bfloat16, float16.

    `window=w` lets a query attend to w keys, the last of them its own: i - w < j <= i. `spiky` makes queries equal to
    keys, so that rows are dominated by one weight: a trick that is free on random data may not be free there. `layer`
    is self-attention of heads * dim channels between its four projections; gradients are then of the input and of all
    parameters. Few queries of a layer are a step: the last positions, after keys and values of those before are kept.
    `group` heads share those of one key head, forward.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    causal: bool = False
    window: int | None = None
    backward: bool = False
    spiky: bool = False
    layer: bool = False
    group: int = 1
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """What the tables say: (batch, heads, length, dim) and what is done."""
        lengths = f"{self.queries}" if self.queries == self.keys else f"{self.queries}x{self.keys}"
        terms = [
            "forward + backward" if self.backward else "forward",
            "causal" if self.causal and self.window is None else "",
            f"window {self.window}" if self.window is not None else "",
            "spiky" if self.spiky else "",
            "layer" if self.layer else "",
            f"{self.group} heads on a key head" if self.group > 1 else "",
            self.dtype if self.dtype != "float32" else "",
        ]
        return f"({self.batch}, {self.heads}, {lengths}, {self.dim}) " + ", ".join(t for t in terms if t)

    def bounds(self, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The keys low <= j < high that each query of `i` attends to."""
        causal = self.causal or self.window is not None
        high = np.minimum(i + 1, self.keys) if causal else np.full_like(i, self.keys)
        low = np.maximum(i - self.window + 1, 0) if self.window is not None else np.zeros_like(i)
        return np.minimum(low, high), high

    @property
    def pairs(self) -> int:
        """Attended pairs of a query and a key, over all heads."""
        low, high = self.bounds(np.arange(self.queries))
        return int((high - low).sum()) * self.batch * self.heads

    @property
    def flops(self) -> float:
        """Two products forward and five backward, each a multiply and an add for each attended pair and channel.

        Of a layer, four projections more: a product each, and two more backward.
        """
        projections = (8.0 + 16.0 * self.backward) * self.batch * self.queries * self.channels**2
        return (4.0 + 10.0 * self.backward) * self.pairs * self.dim + self.layer * projections

    @property
    def channels(self) -> int:
        """Of a layer: its d_model."""
        return self.heads * self.dim

    @property
    def bytes_read(self) -> float:
        """Keys and values, once each, and a layer's weights: what a decode has to read at least."""
        cached = 2.0 * self.batch * self.keys * self.channels / self.group
        return self.itemsize * (cached + self.layer * 4.0 * self.channels**2)

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.dtype]

    @property
    def is_decode(self) -> bool:
        """Few queries over many keys: bound by memory, so measured in GB/s."""
        return self.queries * 64 <= self.keys

    @property
    def kind(self) -> str:
        return "layer" if self.layer else "attention"

    @property
    def unit(self) -> str:
        return "GB/s" if self.is_decode else "GFLOP/s"

    @property
    def limit(self) -> str:
        return "bandwidth" if self.is_decode else "peak"

    @property
    def length(self) -> int:
        return self.keys if self.is_decode else self.queries

    def rate(self, seconds: float) -> float:
        """GFLOP/s, or GB/s for a decode."""
        return (self.bytes_read if self.is_decode else self.flops) / seconds / 1e9

    def used(self, rate: float) -> float:
        """By pairs a CPU multiplies twice as many bfloat16 as float32, whose peak is measured."""
        if self.dtype == "bfloat16" and not self.is_decode:
            from ..kernels import simd

            return rate / 2 if simd.halves().packed else rate
        return rate

    def reference(self, slab: int = 512) -> list[np.ndarray]:
        """[output] or [output, dquery, dkey, dvalue]; with gradients of a layer, what `layer_results` lists."""
        return _layer(self, slab) if self.layer else _attention(self, self.inputs(), slab)

    def tiny(self) -> Work:
        length, keys = (1, 4096) if self.is_decode else (48, 48)
        window = None if self.window is None else 9
        return dataclasses.replace(self, batch=1, heads=2 * self.group, queries=length, keys=keys, window=window)

    def inputs(self) -> list[np.ndarray]:
        """query, key, value and the output's gradient: the same numbers in every process, float32 arrays of such as are
        in `dtype` too."""
        rng = np.random.default_rng(0)
        few = (self.batch, self.heads, self.queries, self.dim)
        many = (self.batch, self.heads // self.group, self.keys, self.dim)
        query, key, value, grad = (rng.standard_normal(s, dtype=np.float32) for s in (few, many, many, few))
        if self.spiky:
            query = np.resize(key, few)
        kind = HALVES.get(self.dtype)
        return [x if kind is None else halves.widened(halves.rounded(x, kind)) for x in (query, key, value, grad)]

    def layer_inputs(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """A layer's input at all positions, its output's gradient, and its parameters as rv.MultiHeadAttention names
        them."""
        rng = np.random.default_rng(0)
        d = self.channels
        x, grad = (rng.standard_normal((self.batch, n, d), dtype=np.float32) for n in (self.keys, self.queries))
        shapes = {f"w_{n}": (d, d) for n in "qkvo"} | {f"b_{n}": (d,) for n in "qkvo"}
        parameters = {n: rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}
        return x, grad, {n: p / np.float32(math.sqrt(d)) for n, p in parameters.items()}


# --- what is right ----------------------------------------------------------------------------------------------------
def layer_results(output: np.ndarray, dx: np.ndarray, gradients: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What is compared of a layer's backward pass.

    The gradient of b_k is 0, softmax being what it is: its rounding errors are judged beside the gradient of b_q.
    """
    weights = [gradients[f"w_{n}"] for n in "qkvo"]
    return [output, dx, *weights, np.stack([gradients["b_q"], gradients["b_k"]]), gradients["b_v"], gradients["b_o"]]


def _slab(work: Work, arrays: list[np.ndarray], rows: slice) -> list[np.ndarray]:
    """Float64 output and gradient contributions of a slab of one head's queries, by the textbook."""
    query, key, value, grad = arrays
    i = np.arange(work.queries)[rows, None]
    j = np.arange(work.keys)
    low, high = work.bounds(i)
    s = np.where((low <= j) & (j < high), query[rows] @ key.T / math.sqrt(work.dim), -np.inf)
    p = np.exp(s - s.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    output = p @ value
    if not work.backward:
        return [output]
    dp = grad[rows] @ value.T
    ds = p * (dp - (dp * p).sum(axis=1, keepdims=True)) / math.sqrt(work.dim)
    return [output, ds @ key, ds.T @ query[rows], p.T @ grad[rows]]


def _attention(work: Work, inputs: list[np.ndarray], slab: int) -> list[np.ndarray]:
    """Head by head and a slab of queries at a time."""
    found = [np.zeros(x.shape) for x in (inputs[0], *inputs[:3])[: 4 if work.backward else 1]]
    for head in np.ndindex(work.batch, work.heads):
        shared = head[0], head[1] // work.group
        doubles = [x[shared if n in (1, 2) else head].astype(np.float64) for n, x in enumerate(inputs)]
        for start in range(0, work.queries, slab):
            rows = slice(start, start + slab)
            output, *gradients = _slab(work, doubles, rows)
            found[0][head][rows] = output
            if gradients:
                found[1][head][rows] = gradients[0]
                found[2][head] += gradients[1]
                found[3][head] += gradients[2]
    return found


def _layer(work: Work, slab: int) -> list[np.ndarray]:
    """Self-attention between projections, each y = x w + b, so that dx = dy w^T, dw = x^T dy and db = sum dy."""
    x, grad, parameters = work.layer_inputs()
    p = {name: array.astype(np.float64) for name, array in parameters.items()}
    last = x[:, work.keys - work.queries :].astype(np.float64).reshape(-1, work.channels)
    x, grad = (array.astype(np.float64).reshape(-1, work.channels) for array in (x, grad))

    def split(y: np.ndarray) -> np.ndarray:
        return y.reshape(work.batch, -1, work.heads, work.dim).swapaxes(1, 2)

    def join(y: np.ndarray) -> np.ndarray:
        return y.swapaxes(1, 2).reshape(-1, work.channels)

    inputs = [split(y @ p[f"w_{n}"] + p[f"b_{n}"]) for n, y in zip("qkv", (last, x, x), strict=True)]
    joined, *above = (join(y) for y in _attention(work, [*inputs, split(grad @ p["w_o"].T)], slab))
    shape = (work.batch, work.queries, work.channels)
    output = (joined @ p["w_o"] + p["b_o"]).reshape(shape)
    if not work.backward:
        return [output]
    gradients = {"w_o": joined.T @ grad, "b_o": grad.sum(axis=0)}
    dx = np.zeros_like(x)
    for n, dy in zip("qkv", above, strict=True):
        dx += dy @ p[f"w_{n}"].T
        gradients |= {f"w_{n}": x.T @ dy, f"b_{n}": dy.sum(axis=0)}
    return layer_results(output, dx.reshape(shape), gradients)
