"""The libraries that attention is measured against, one adapter each; those of graphs are in `peers_graph.py`.

An adapter is a function `(work, threads) -> Runner` that lays the inputs out as its library likes them and sets the
number of its threads; only `Runner.call` is timed. It raises `Unsupported` where its library has no such operation.
Libraries are imported inside their adapter: none of them is required.
"""

import importlib.util
import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from .. import halves
from .peers_graph import GRAPHS
from .works import HALVES, OURS, Build, Runner, Task, Unsupported, Work, layer_results

__all__ = ["KINDS", "LAYERS", "PEERS", "adapters", "installed"]

_LARGEST_SCORES = 1 << 28  # bytes of Lq x Lk scores: more would take a library that forms them too long to wait for


# --- adapters ---------------------------------------------------------------------------------------------------------
def _ruvector(work: Work, threads: int) -> Runner:
    import ruvector_numba as rv

    rv.set_num_threads(threads)
    kind = HALVES.get(work.dtype)
    query, key, value, grad = (x if kind is None else halves.rounded(x, kind) for x in work.inputs())
    mask = None if work.window is None else rv.masks.Window(left=work.window - 1, right=0)
    terms: dict[str, Any] = {"is_causal": work.causal, "dtype": work.dtype if kind == halves.BITS else None}
    terms["enable_gqa"] = work.group > 1

    def results(found: list[np.ndarray]) -> list[np.ndarray]:
        return [halves.widened(x) for x in found]

    if not work.backward:
        return Runner(lambda: [rv.scaled_dot_product_attention(query, key, value, mask, **terms)], results)

    def both() -> list[np.ndarray]:
        cache = rv.attention_forward(query, key, value, mask, **terms)
        gradients = rv.attention_backward(grad, cache)
        return [cache.output, gradients.query, gradients.key, gradients.value]

    return Runner(both, results)


def _visible(work: Work) -> np.ndarray | None:
    """The mask as a boolean matrix, for libraries that know no better; None when every key is seen."""
    if not work.causal and work.window is None:
        return None
    low, high = work.bounds(np.arange(work.queries)[:, None])
    j = np.arange(work.keys)
    return (low <= j) & (j < high)


def _refuse_halves(work: Work) -> None:
    if work.dtype != "float32":
        raise Unsupported(f"{work.dtype} is not measured of it")


def _refuse_large(work: Work) -> None:
    size = 4 * work.batch * work.heads * work.queries * work.keys
    if size > _LARGEST_SCORES:
        raise Unsupported(f"left out where it would form {size >> 20} MiB of scores")


def _numpy(work: Work, threads: int) -> Runner:
    """The plain formula in float32; the threads are its BLAS's."""
    _refuse_halves(work)
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
    query, key, value, grad = (torch.from_numpy(x).to(getattr(torch, work.dtype)) for x in work.inputs())
    terms: dict[str, Any] = {"is_causal": work.causal, "enable_gqa": work.group > 1}
    if work.window is not None:
        terms = {"attn_mask": torch.from_numpy(_visible(work))}
    attention = torch.nn.functional.scaled_dot_product_attention
    if not work.backward:
        return Runner(lambda: attention(query, key, value, **terms), lambda out: [out.float().numpy()])
    leaves = [x.requires_grad_() for x in (query, key, value)]

    def both() -> list[Any]:
        output = attention(*leaves, **terms)
        return [output, *torch.autograd.grad(output, leaves, grad)]

    return Runner(both, lambda found: [x.detach().float().numpy() for x in found])


def _torch_flex(work: Work, threads: int) -> Runner:
    """torch's flex_attention, compiled: it skips blocks outside the window. Forward only, on a CPU."""
    _refuse_halves(work)
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
    _refuse_halves(work)
    if work.backward or work.window is not None:
        raise Unsupported("no gradients" if work.backward else "its operators for float32 have no window")
    operators = (True, False) if work.group == 1 else (False,)  # MultiHeadAttention has no shared heads
    candidates = [_onnx_attention(work, threads, packed) for packed in operators]
    return min(candidates, key=lambda runner: runner.time(3))


def _openvino(work: Work, threads: int) -> Runner:
    """Asked for bfloat16, it is given float32 arrays and rounds them itself, as it does when it runs a model."""
    if work.dtype == "float16":
        _refuse_halves(work)
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
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[work.dtype],
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
    _refuse_halves(work)
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
def _ruvector_layer(work: Work, threads: int) -> Runner:
    import ruvector_numba as rv

    rv.set_num_threads(threads)
    x, grad, parameters = work.layer_inputs()
    settings: dict[str, Any] = {"dropout": 0.0, "max_seq_len": None, "eps": 1e-12}  # the others have no eps
    layer = rv.MultiHeadAttention(rv.AttentionConfig(work.channels, work.heads, **settings), seed=0)
    layer.set_parameters(parameters)
    if work.is_decode:
        past, new = np.split(x, [work.keys - work.queries], axis=1)
        cache = layer.new_cache(work.batch, work.keys)
        layer.step(past, cache)

        def step() -> list[np.ndarray]:
            cache.length = past.shape[1]
            return [layer.step(new, cache)]

        return Runner(step)
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


def _torch_step(work: Work) -> Runner:
    """A step as it is written with torch, whose module has none; keys and values have room for all positions."""
    import torch

    x, _, parameters = work.layer_inputs()
    p = {name: torch.from_numpy(np.ascontiguousarray(array.T)) for name, array in parameters.items()}
    w, b = (torch.cat([p[f"{kind}_{n}"] for n in "qkv"]) for kind in "wb")
    F, before = torch.nn.functional, work.keys - work.queries

    def heads(y: Any) -> Any:
        return y.view(work.batch, -1, work.heads, work.dim).transpose(1, 2)

    sequence, new = torch.from_numpy(x), torch.from_numpy(x[:, before:])
    with torch.inference_mode():
        keys, values = (heads(y).contiguous() for y in F.linear(sequence, w, b).chunk(3, -1)[1:])

    def step() -> list[Any]:
        with torch.inference_mode():
            query, key, value = (heads(y) for y in F.linear(new, w, b).chunk(3, -1))
            keys[:, :, before:], values[:, :, before:] = key, value
            joined = F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(2)
            return [F.linear(joined, p["w_o"], p["b_o"])]

    return Runner(step, lambda found: [found[0].numpy()])


def _torch_layer(work: Work, threads: int) -> Runner:
    """The fastest of its modes on this work: eval has a fused path, train takes the parts, and likes length first."""
    import torch

    torch.set_num_threads(threads)
    if work.is_decode:
        return _torch_step(work)
    modes = ((False, True), (True, True), (True, False))
    return min((_torch_module(work, *mode) for mode in modes), key=lambda runner: runner.time(3))


PEERS: dict[str, Build] = {
    OURS: _ruvector,
    "torch": _torch,
    "torch-flex": _torch_flex,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "jax": _jax,
    "numpy": _numpy,
}
LAYERS: dict[str, Build] = {OURS: _ruvector_layer, "torch": _torch_layer}
KINDS = {"attention": PEERS, "layer": LAYERS, "graph": GRAPHS}
_NEEDS = {"torch-flex": ("torch",), "onnxruntime": ("onnxruntime", "onnx"), OURS: ("ruvector_numba",)}


def adapters(work: Task) -> dict[str, Build]:
    """Those of this kind of work, whether or not they are installed."""
    return KINDS[work.kind]


def installed(known: Iterable[str] = PEERS) -> list[str]:
    """Those of the known names whose packages can be imported here."""
    return [n for n in known if all(importlib.util.find_spec(m) is not None for m in _NEEDS.get(n, (n,)))]
