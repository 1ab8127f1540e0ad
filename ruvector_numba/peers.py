"""The libraries that attention is measured against, one adapter each, and the work that is measured.

An adapter is a function `(work, threads) -> Runner` that lays the inputs out as its library likes them and sets the
number of its threads; only `Runner.call` is timed. It raises `Unsupported` where its library has no such operation.
Libraries are imported inside their adapter: none of them is required.
"""

import dataclasses
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["OURS", "PEERS", "Build", "Runner", "Unsupported", "Work", "adapters", "installed", "layer_results"]

OURS = "ruvector-numba"
_LARGEST_SCORES = 1 << 28  # bytes of Lq x Lk scores: more would take a library that forms them too long to wait for


class Unsupported(Exception):
    """This library cannot do this work; the text says why."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One cell of the tables: attention of float32 arrays, forward or with gradients.

    `window=w` lets a query attend to w keys, the last of them its own: i - w < j <= i. `spiky` makes queries equal to
    keys, so that rows are dominated by one weight: a trick that is free on random data may not be free there. `layer`
    is self-attention of heads * dim channels between its four projections; gradients are then of the input and of all
    parameters.
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
        """Keys and values, once each: what a decode has to read at least."""
        return 8.0 * self.batch * self.heads * self.keys * self.dim

    @property
    def is_decode(self) -> bool:
        """Few queries over many keys: bound by memory, so measured in GB/s."""
        return self.queries * 64 <= self.keys

    def rate(self, seconds: float) -> float:
        """GFLOP/s, or GB/s for a decode."""
        return (self.bytes_read if self.is_decode else self.flops) / seconds / 1e9

    def inputs(self) -> list[np.ndarray]:
        """query, key, value and the output's gradient: the same numbers in every process."""
        rng = np.random.default_rng(0)
        few = (self.batch, self.heads, self.queries, self.dim)
        many = (self.batch, self.heads, self.keys, self.dim)
        query, key, value, grad = (rng.standard_normal(s, dtype=np.float32) for s in (few, many, many, few))
        if self.spiky:
            query = np.resize(key, few)
        return [query, key, value, grad]

    def layer_inputs(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """A layer's input, its output's gradient, and its parameters as rv.MultiHeadAttention names them."""
        rng = np.random.default_rng(0)
        d = self.channels
        x, grad = (rng.standard_normal((self.batch, self.queries, d), dtype=np.float32) for _ in range(2))
        shapes = {f"w_{n}": (d, d) for n in "qkvo"} | {f"b_{n}": (d,) for n in "qkvo"}
        parameters = {n: rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}
        return x, grad, {n: p / np.float32(math.sqrt(d)) for n, p in parameters.items()}


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


# --- adapters ---------------------------------------------------------------------------------------------------------
def _ruvector(work: Work, threads: int) -> Runner:
    import ruvector_numba as rv

    rv.set_num_threads(threads)
    query, key, value, grad = work.inputs()
    mask = None if work.window is None else rv.masks.Window(left=work.window - 1, right=0)
    if not work.backward:
        return Runner(lambda: [rv.scaled_dot_product_attention(query, key, value, mask, is_causal=work.causal)])

    def both() -> list[np.ndarray]:
        cache = rv.attention_forward(query, key, value, mask, is_causal=work.causal)
        gradients = rv.attention_backward(grad, cache)
        return [cache.output, gradients.query, gradients.key, gradients.value]

    return Runner(both)


def _visible(work: Work) -> np.ndarray | None:
    """The mask as a boolean matrix, for libraries that know no better; None when every key is seen."""
    if not work.causal and work.window is None:
        return None
    low, high = work.bounds(np.arange(work.queries)[:, None])
    j = np.arange(work.keys)
    return (low <= j) & (j < high)


def _refuse_large(work: Work) -> None:
    size = 4 * work.batch * work.heads * work.queries * work.keys
    if size > _LARGEST_SCORES:
        raise Unsupported(f"left out where it would form {size >> 20} MiB of scores")


def _numpy(work: Work, threads: int) -> Runner:
    """The plain formula in float32; the threads are its BLAS's."""
    _refuse_large(work)
    if importlib.util.find_spec("threadpoolctl"):
        import threadpoolctl

        threadpoolctl.threadpool_limits(threads, "blas")
    query, key, value, grad = work.inputs()
    visible = _visible(work)
    scale = np.float32(1 / math.sqrt(work.dim))

    def forward() -> tuple[np.ndarray, np.ndarray]:
        p = query @ key.swapaxes(-1, -2)
        p *= scale
        if visible is not None:
            np.copyto(p, -np.inf, where=~visible)
        p -= p.max(axis=-1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=-1, keepdims=True)
        return p @ value, p

    def both() -> list[np.ndarray]:
        output, p = forward()
        ds = grad @ value.swapaxes(-1, -2)
        ds -= (grad * output).sum(axis=-1, keepdims=True)
        ds *= p
        ds *= scale
        return [output, ds @ key, ds.swapaxes(-1, -2) @ query, p.swapaxes(-1, -2) @ grad]

    return Runner(both) if work.backward else Runner(lambda: [forward()[0]])


def _torch(work: Work, threads: int) -> Runner:
    import torch

    torch.set_num_threads(threads)
    query, key, value, grad = (torch.from_numpy(x) for x in work.inputs())
    terms: dict[str, Any] = {"is_causal": work.causal}
    if work.window is not None:
        terms = {"attn_mask": torch.from_numpy(_visible(work))}
    attention = torch.nn.functional.scaled_dot_product_attention
    if not work.backward:
        return Runner(lambda: attention(query, key, value, **terms), lambda out: [out.numpy()])
    leaves = [x.requires_grad_() for x in (query, key, value)]

    def both() -> list[Any]:
        output = attention(*leaves, **terms)
        return [output, *torch.autograd.grad(output, leaves, grad)]

    return Runner(both, lambda found: [x.detach().numpy() for x in found])


def _torch_flex(work: Work, threads: int) -> Runner:
    """torch's flex_attention, compiled: it skips blocks outside the window. Forward only, on a CPU."""
    if work.backward:
        raise Unsupported("flex_attention has no backward on a CPU")
    if work.window is None and not work.causal:
        raise Unsupported("nothing for it to skip")
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.set_num_threads(threads)
    query, key, value, _ = (torch.from_numpy(x) for x in work.inputs())
    reach = work.keys if work.window is None else work.window

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & (i - j < reach)

    blocks = create_block_mask(visible, None, None, work.queries, work.keys, device="cpu")
    compiled = torch.compile(flex_attention)
    return Runner(lambda: compiled(query, key, value, block_mask=blocks), lambda out: [out.numpy()])


def _onnx_attention(work: Work, threads: int, packed: bool) -> Runner:
    """One of ONNX Runtime's two operators; inputs and output are bound ahead, so not copied.

    Packed is com.microsoft's MultiHeadAttention on (batch, length, heads * dim); else it is ONNX's own Attention of
    opset 23 on (batch, heads, length, dim).
    """
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    arrays = dict(zip(("query", "key", "value"), work.inputs(), strict=False))
    arrays["output"] = np.zeros_like(arrays["query"])
    if packed:
        arrays = {n: x.swapaxes(1, 2).reshape(work.batch, -1, work.heads * work.dim) for n, x in arrays.items()}
        terms = {"domain": "com.microsoft", "num_heads": work.heads, "unidirectional": int(work.causal)}
    else:
        terms = {"is_causal": int(work.causal)}
    *inputs, output = (helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in arrays.items())
    operator = "MultiHeadAttention" if packed else "Attention"
    node = helper.make_node(operator, ["query", "key", "value"], ["output"], **terms)
    graph = helper.make_graph([node], "attention", inputs, [output])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    bound = {n: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x)) for n, x in arrays.items()}
    for name in ("query", "key", "value"):
        binding.bind_ortvalue_input(name, bound[name])
    binding.bind_ortvalue_output("output", bound["output"])

    def results(_: Any) -> list[np.ndarray]:
        found = bound["output"].numpy()
        return [found.reshape(work.batch, work.queries, work.heads, work.dim).swapaxes(1, 2) if packed else found]

    return Runner(lambda: session.run_with_iobinding(binding), results)


def _onnxruntime(work: Work, threads: int) -> Runner:
    """The faster of its two operators on this work: neither is so everywhere."""
    if work.backward or work.window is not None:
        raise Unsupported("no gradients" if work.backward else "its operators for float32 have no window")
    candidates = [_onnx_attention(work, threads, packed) for packed in (True, False)]
    return min(candidates, key=lambda runner: runner.time(3))


def _openvino(work: Work, threads: int) -> Runner:
    if work.backward:
        raise Unsupported("no gradients")
    import openvino
    from openvino import opset13

    query, key, value, _ = work.inputs()
    nodes = [opset13.parameter(x.shape, np.float32) for x in (query, key, value)]
    feeds = list(nodes)
    inputs = [query, key, value]
    if work.window is not None:
        visible = _visible(work)
        assert visible is not None  # there is a window
        inputs.append(np.where(visible, np.float32(0), np.float32(-np.inf)))
        feeds.append(opset13.parameter(inputs[-1].shape, np.float32))
    attention = opset13.scaled_dot_product_attention(*feeds, causal=work.causal and work.window is None)
    hints = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    compiled = openvino.Core().compile_model(openvino.Model([attention], feeds), "CPU", hints)
    request = compiled.create_infer_request()
    tensors = [openvino.Tensor(x, shared_memory=True) for x in inputs]
    for index, tensor in enumerate(tensors):
        request.set_input_tensor(index, tensor)
    # a shared tensor does not own its memory: the runner keeps the arrays alive
    return Runner(request.infer, lambda _: [request.get_output_tensor(0).data.copy()], keeps=[inputs, tensors])


def _jax(work: Work, threads: int) -> Runner:
    _refuse_large(work)
    if hasattr(os, "sched_setaffinity"):  # XLA makes a thread for each CPU that it may use, and has no other knob
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    query, key, value, grad = (jax.numpy.asarray(x.swapaxes(1, 2)) for x in work.inputs())
    window = None if work.window is None else (work.window - 1, 0)

    def forward(query: Any, key: Any, value: Any) -> Any:
        return jax.nn.dot_product_attention(query, key, value, is_causal=work.causal, local_window_size=window)

    def both(query: Any, key: Any, value: Any, grad: Any) -> Any:
        output, pull_back = jax.vjp(forward, query, key, value)
        return (output, *pull_back(grad))

    compiled = jax.jit(both) if work.backward else jax.jit(lambda q, k, v, g: (forward(q, k, v),))
    return Runner(
        lambda: jax.block_until_ready(compiled(query, key, value, grad)),
        lambda found: [np.asarray(x).swapaxes(1, 2) for x in found],
    )


# --- adapters of layers -----------------------------------------------------------------------------------------------
def layer_results(output: np.ndarray, dx: np.ndarray, gradients: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What is compared of a layer's backward pass.

    The gradient of b_k is 0, softmax being what it is: its rounding errors are judged beside the gradient of b_q.
    """
    weights = [gradients[f"w_{n}"] for n in "qkvo"]
    return [output, dx, *weights, np.stack([gradients["b_q"], gradients["b_k"]]), gradients["b_v"], gradients["b_o"]]


def _ruvector_layer(work: Work, threads: int) -> Runner:
    import ruvector_numba as rv

    rv.set_num_threads(threads)
    x, grad, parameters = work.layer_inputs()
    settings: dict[str, Any] = {"dropout": 0.0, "max_seq_len": None, "eps": 1e-12}  # the others have no eps
    layer = rv.MultiHeadAttention(rv.AttentionConfig(work.channels, work.heads, **settings), seed=0)
    layer.set_parameters(parameters)
    if not work.backward:
        return Runner(lambda: [layer(x)])

    def both() -> tuple[np.ndarray, np.ndarray, Any]:
        output, cache = layer.forward_cached(x, x, x)
        g: Any = layer.backward(grad, cache)
        dx = g.query + g.key
        dx += g.value
        return output, dx, g

    return Runner(both, lambda found: layer_results(found[0], found[1], found[2].parameters))


def _torch_module(work: Work, training: bool, batch_first: bool) -> Runner:
    """torch.nn.MultiheadAttention in one of its modes, on inputs as that one likes them."""
    import torch

    x, grad, parameters = work.layer_inputs()
    module = torch.nn.MultiheadAttention(work.channels, work.heads, batch_first=batch_first).train(training)
    state = {
        "in_proj_weight": np.concatenate([parameters[f"w_{n}"].T for n in "qkv"]),
        "in_proj_bias": np.concatenate([parameters[f"b_{n}"] for n in "qkv"]),
        "out_proj.weight": np.ascontiguousarray(parameters["w_o"].T),
        "out_proj.bias": parameters["b_o"],
    }
    module.load_state_dict({name: torch.from_numpy(p) for name, p in state.items()})

    def turned(array: np.ndarray) -> np.ndarray:
        return array if batch_first else np.ascontiguousarray(array.swapaxes(0, 1))

    leaf, above = (torch.from_numpy(turned(array)) for array in (x, grad))

    def forward() -> Any:
        with torch.inference_mode():
            return module(leaf, leaf, leaf, need_weights=False)[0]

    if not work.backward:
        return Runner(forward, lambda output: [turned(output.numpy())])
    leaf.requires_grad_()

    def both() -> list[Any]:
        leaf.grad = None
        module.zero_grad(set_to_none=True)
        output = module(leaf, leaf, leaf, need_weights=False)[0]
        output.backward(above)
        return [output, leaf.grad, *(p.grad for p in module.parameters())]

    def results(found: list[Any]) -> list[np.ndarray]:
        output, dx, w_in, b_in, w_out, b_out = (t.detach().numpy() for t in found)
        gradients = {"w_o": w_out.T, "b_o": b_out}
        for n, w, b in zip("qkv", np.split(w_in, 3), np.split(b_in, 3), strict=True):
            gradients |= {f"w_{n}": w.T, f"b_{n}": b}
        return layer_results(turned(output), turned(dx), gradients)

    return Runner(both, results)


def _torch_layer(work: Work, threads: int) -> Runner:
    """The fastest of its modes on this work: eval has a fused path, train takes the parts, and likes length first."""
    import torch

    torch.set_num_threads(threads)
    modes = ((False, True), (True, True), (True, False))
    return min((_torch_module(work, *mode) for mode in modes), key=lambda runner: runner.time(3))


Build = Callable[[Work, int], Runner]
PEERS: dict[str, Build] = {
    "ruvector-numba": _ruvector,
    "torch": _torch,
    "torch-flex": _torch_flex,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "jax": _jax,
    "numpy": _numpy,
}
LAYERS: dict[str, Build] = {"ruvector-numba": _ruvector_layer, "torch": _torch_layer}
_NEEDS = {"torch-flex": ("torch",), "onnxruntime": ("onnxruntime", "onnx"), "ruvector-numba": ("ruvector_numba",)}


def adapters(work: Work) -> dict[str, Build]:
    """Those of this kind of work, whether or not they are installed."""
    return LAYERS if work.layer else PEERS


def installed() -> list[str]:
    """The names of PEERS whose packages can be imported here."""
    return [n for n in PEERS if all(importlib.util.find_spec(m) is not None for m in _NEEDS.get(n, (n,)))]
