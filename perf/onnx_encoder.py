"""A sentence encoder in a file of ONNX: its attention on these kernels, beside ONNX Runtime alone.

    python perf/onnx_encoder.py                         two minutes; perf/onnx-<cpu>.json
    python perf/onnx_encoder.py --smoke --output build  tiny sizes: shows that it works

The encoder is that of MiniLM by its sizes (384 channels, 12 heads, feed-forward 1536), cut to two layers, with random
weights: embeddings, layers, the mean over a sentence's tokens, length 1. It comes with attention written out, as most
files have it, and with the operator Attention of opset 23. Sentences differ in length and are padded.

Every answer is checked against ONNX Runtime's own before it is timed.
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from run import HERE, machine, slug

import ruvector_numba as rv

Array = NDArray[Any]

CAVEATS = (
    "The encoder has two layers of MiniLM's sizes and random weights. Both sides run the same file in the same "
    "process, in blocks of calls taken in turn after a pause; a ratio is the median over pairs of blocks next to each "
    "other. onnxruntime alone has its default options, all optimisations on; the parts between attentions have those "
    "too, but their threads do not spin when idle.",
)


class Sizes(NamedTuple):
    layers: int = 2
    d_model: int = 384
    heads: int = 12
    hidden: int = 1536
    vocabulary: int = 30522
    positions: int = 2048


class Builder:
    """Collects nodes and weights of a graph; a method returns the name of what it adds."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.sizes, self.rng = sizes, np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        name = f"constant_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        weight = self.rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)
        product = self.add("MatMul", x, self.constant(weight))
        return self.add("Add", product, self.constant(0.1 * self.rng.standard_normal(outputs)))

    def norm(self, x: str) -> str:
        ones, zeros = (self.constant(np.full(self.sizes.d_model, value)) for value in (1, 0))
        return self.add("LayerNormalization", x, ones, zeros, axis=-1, epsilon=1e-12)

    def gelu(self, x: str) -> str:
        erf = self.add("Erf", self.add("Div", x, self.constant(np.sqrt(2))))
        return self.add("Mul", self.add("Mul", x, self.add("Add", erf, self.constant(1))), self.constant(0.5))


def _heads_apart(b: Builder, x: str, *perm: int) -> str:
    """(B, L, d_model) to (B, H, L, D), or as `perm` says."""
    s = b.sizes
    shape = b.constant([0, 0, s.heads, s.d_model // s.heads], np.int64)
    return b.add("Transpose", b.add("Reshape", x, shape), perm=perm)


def _written_out(b: Builder, q: str, k: str, v: str, mask: str) -> str:
    """As torch exported BERT: softmax(q k^T / sqrt(D) + mask) v, with the mask 0 or a very low number."""
    s = b.sizes
    query, value = _heads_apart(b, q, 0, 2, 1, 3), _heads_apart(b, v, 0, 2, 1, 3)
    scores = b.add("MatMul", query, _heads_apart(b, k, 0, 2, 3, 1))
    scaled = b.add("Div", scores, b.constant(np.sqrt(s.d_model / s.heads)))
    weights = b.add("Softmax", b.add("Add", scaled, mask), axis=-1)
    context = b.add("Transpose", b.add("MatMul", weights, value), perm=(0, 2, 1, 3))
    return b.add("Reshape", context, b.constant([0, 0, s.d_model], np.int64))


def _operator(b: Builder, q: str, k: str, v: str, mask: str) -> str:
    heads = b.sizes.heads
    return b.add("Attention", q, k, v, mask, q_num_heads=heads, kv_num_heads=heads)


def encoder(sizes: Sizes, operator: bool = False, seed: int = 0) -> onnx.ModelProto:
    """input_ids and attention_mask, (B, L) int64, to embeddings (B, d_model) of length 1."""
    b, s = Builder(sizes, seed), sizes
    words = b.add("Gather", b.constant(b.rng.standard_normal((s.vocabulary, s.d_model))), "input_ids")
    length = b.add("Shape", "input_ids", start=1, end=2)
    places = b.constant(b.rng.standard_normal((s.positions, s.d_model)))
    zero, axis = b.constant([0], np.int64), b.constant([0], np.int64)
    x = b.norm(b.add("Add", words, b.add("Slice", places, zero, length, axis)))
    there = b.add("Cast", "attention_mask", to=TensorProto.FLOAT)
    hidden = b.add("Sub", b.constant(1), b.add("Unsqueeze", there, b.constant([1, 2], np.int64)))
    mask = b.add("Mul", hidden, b.constant(np.finfo(np.float32).min))
    if operator:  # whose mask ONNX Runtime wants in full, (B, 1, L, L)
        one = b.constant([1], np.int64)
        mask = b.add("Expand", mask, b.add("Concat", one, one, length, one, axis=0))
    for _ in range(s.layers):
        q, k, v = (b.linear(x, s.d_model, s.d_model) for _ in range(3))
        context = (_operator if operator else _written_out)(b, q, k, v, mask)
        x = b.norm(b.add("Add", b.linear(context, s.d_model, s.d_model), x))
        inner = b.gelu(b.linear(x, s.d_model, s.hidden))
        x = b.norm(b.add("Add", b.linear(inner, s.hidden, s.d_model), x))
    weight = b.add("Unsqueeze", there, b.constant([2], np.int64))
    axes = b.constant([1], np.int64)
    total = b.add("ReduceSum", b.add("Mul", x, weight), axes, keepdims=0)
    mean = b.add("Div", total, b.add("ReduceSum", weight, axes, keepdims=0))
    b.nodes.append(helper.make_node("LpNormalization", [mean], ["embedding"], axis=-1, p=2))
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["B", "L"]) for n in ("input_ids", "attention_mask")]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["B", s.d_model])]
    graph = helper.make_graph(b.nodes, "encoder", inputs, outputs, b.weights)
    opsets = [helper.make_opsetid("", 23 if operator else 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11 if operator else 8)


def sentences(batch: int, length: int, sizes: Sizes, seed: int = 1) -> dict[str, Array]:
    """Random tokens; lengths from a quarter of the longest on."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(max(1, length // 4), length + 1, batch)
    lengths[0] = length
    return {
        "input_ids": rng.integers(0, sizes.vocabulary, (batch, length)),
        "attention_mask": (np.arange(length) < lengths[:, None]).astype(np.int64),
    }


def _block(call: Callable[[], Any], seconds: float) -> float:
    """Milliseconds of a call: the median of those that fit."""
    time.sleep(0.05)  # the other side's threads go to sleep
    call()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def _row(model: onnx.ModelProto, feeds: dict[str, Array], threads: int, blocks: int, what: str) -> dict[str, Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    data = model.SerializeToString()
    alone = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    ours = rv.interop.onnx.replace_attention(model, session_options=options)
    wanted, got = alone.run(None, feeds)[0], ours.run(feeds)["embedding"]
    error = float(np.abs(got - wanted).max())
    if not error < 1e-5:
        raise SystemExit(f"{what}: embeddings of length 1 differ by {error}")
    calls = (lambda: ours.run(feeds)), (lambda: alone.run(None, feeds))
    times = [[_block(call, 0.3) for call in calls] for _ in range(blocks)]
    ratio = statistics.median(theirs / mine for mine, theirs in times)
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{what}: {mine:.1f} ms, onnxruntime alone {theirs:.1f} ms, {ratio:.2f} times as fast, error {error:.1e}")
    return {
        "what": what, "threads": threads, "attentions": len(ours.attentions), "ours_ms": mine, "onnxruntime_ms": theirs,
        "times_as_fast": ratio, "difference": error,
    }  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one block")
    parser.add_argument("--output", type=pathlib.Path, default=HERE, metavar="FOLDER")
    options = parser.parse_args()
    if options.smoke and options.output.resolve() == HERE:
        parser.error("--smoke measures nothing: send it elsewhere with --output FOLDER")
    sizes = Sizes(2, 32, 4, 64, 100, 64) if options.smoke else Sizes()
    shapes = [(2, 16)] if options.smoke else [(8, 128), (4, 512), (1, 2048)]
    rows = []
    for threads in options.threads:
        rv.set_num_threads(threads)
        for operator in (False, True):
            model = encoder(sizes, operator)
            kind = "the operator" if operator else "written out"
            for batch, length in shapes:
                what = f"{kind}, {batch} sentences of up to {length} tokens, {threads} threads"
                feeds = sentences(batch, length, sizes)
                rows.append(_row(model, feeds, threads, 1 if options.smoke else 7, what))
    found = machine()
    found["versions"] |= {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    path = options.output / f"onnx-{slug(found['cpu'], found['target'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": found, "caveats": CAVEATS, "rows": rows}, indent=1) + "\n")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
