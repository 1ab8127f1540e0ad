"""Padding in masks of ONNX: a length where that changes nothing, and the numbers that it is where it would."""

import itertools

import numpy as np
import pytest

from ruvector_numba import masks
from ruvector_numba.interop.onnx import attention
from ruvector_numba.interop.onnx_masks import joined

B, H, L, D = 2, 2, 6, 4
LOWEST = float(np.finfo(np.float32).min)


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def padding(*lengths, low=LOWEST):
    return np.where(np.arange(L) < np.reshape(lengths, (-1, 1, 1, 1)), 0, low).astype(np.float32)


def by_hand(q, k, v, bias, seen):
    """In float64; a query that sees nothing gets 0."""
    scores = q.astype(np.float64) @ k.swapaxes(-1, -2).astype(np.float64) / np.sqrt(D) + bias
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300) @ v


def is_length(mask):
    return not any(isinstance(x, np.ndarray) for x in getattr(mask, "parts", (mask,)))


# The function

I, J = np.arange(L)[:, None], np.arange(L)
CALLS = {
    "window": ({"left_window_size": 1}, I - J <= 1),
    "window, causal": ({"left_window_size": 1, "is_causal": 1}, (I - J <= 1) & (J <= I)),
    "causal": ({"is_causal": 1}, J <= I),
    "lengths, causal": (
        {"is_causal": 1, "nonpad_kv_seqlen": np.array([3, 6])},
        (J < np.reshape([3, 6], (2, 1, 1, 1))) & (J <= I + np.reshape([3, 6], (2, 1, 1, 1)) - L),
    ),
    "lengths, window": (
        {"left_window_size": 0, "nonpad_kv_seqlen": np.array([5, 6])},
        (J < np.reshape([5, 6], (2, 1, 1, 1))) & (J >= I + np.reshape([5, 6], (2, 1, 1, 1)) - L),
    ),
}


@pytest.mark.parametrize("low", [LOWEST, -1e30, -np.inf])
@pytest.mark.parametrize("name", CALLS)
def test_the_operator(name, low):
    (more, seen), (q, k, v) = CALLS[name], (draw(B, H, L, D, seed=n) for n in range(3))
    mask = padding(3, 2, low=low)
    wanted = by_hand(q, k, v, mask.astype(np.float64), seen)
    results = [attention(q, k, v, mask, **more, qk_matmul_output_mode=mode) for mode in (None, 0, 1, 2, 3)]
    for result in results:
        np.testing.assert_allclose(result.Y, wanted, rtol=1e-5, atol=1e-6)
        assert np.array_equal(result.Y, results[0].Y)
    np.testing.assert_allclose(results[4].qk_matmul_output @ v, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_no_mode_changes_a_bit_of_half_precision(dtype):
    dtype = np.dtype(dtype) if dtype == "float16" else pytest.importorskip("ml_dtypes").bfloat16
    q, k, v = (draw(B, H, L, D, seed=n).astype(dtype) for n in range(3))
    for mask in (None, padding(3, 2), padding(0, 2)):
        results = [attention(q, k, v, mask, qk_matmul_output_mode=mode).Y for mode in (None, 0, 1, 2, 3)]
        assert all(np.array_equal(x, results[0]) for x in results)


# What becomes a length

CAUSAL = J <= I
LENGTHS = {
    "alone": [],
    "beside all": [masks.Full()],
    "beside causal": [masks.Causal()],
    "beside causal as an array": [CAUSAL],
    "beside causal, some queries see nothing": [masks.Causal("bottom_right")],
    "beside a window that reaches": [masks.Window(3, 0)],
    "beside lengths": [masks.Lengths(keys=[1, 6])],
    "beside padding of bools": [padding(2, 1) == 0],
    "beside a causal array and a rule": [CAUSAL, masks.Lengths(keys=5)],
}  # fmt: skip
NUMBERS = {
    "beside a window": [masks.Window(1, 0)],
    "beside a window as an array": [I - J <= 1],
    "beside an array that hides the first key from one query": [~((I == 4) & (J == 0))],
    "beside a causal array and a window": [CAUSAL, masks.Window(2, 0)],
}  # fmt: skip


@pytest.mark.parametrize("name", LENGTHS)
def test_padding_that_costs_nothing(name):
    mask = joined([*LENGTHS[name], padding(3, 4)], (B, H, L, L))
    assert not any(isinstance(x, np.ndarray) and x.dtype != bool for x in getattr(mask, "parts", (mask,)))


@pytest.mark.parametrize("name", NUMBERS)
def test_padding_that_stays_numbers(name):
    for order in itertools.permutations([*NUMBERS[name], padding(3, 4)]):
        mask = joined(order, (B, H, L, L))
        assert any(isinstance(x, np.ndarray) and x.dtype != bool for x in mask.parts)
    # What hides, and does not only lower, is a length beside anything.
    assert is_length(joined([masks.Window(1, 0), padding(3, 4, low=-np.inf)], (B, H, L, L)))
    assert is_length(joined([masks.Window(1, 0), padding(3, 0) == 0], (B, H, L, L)))


def test_no_rows_and_no_keys():
    for shape in ((0, 1, 1, L), (1, 1, 1, 0), (0, 1, 1, 0)):
        x = np.zeros((shape[0], H, 3, D), np.float32), np.zeros((shape[0], H, shape[3], D), np.float32)
        got = attention(x[0], x[1], x[1], np.zeros(shape, np.float32), is_causal=1).Y
        assert got.shape == x[0].shape and not got.any()


# Models, and subgraphs


@pytest.mark.parametrize("number", ["-inf", "-3.4028235e38", "-1e9"])
@pytest.mark.parametrize("order", ["where, add", "add, where"])
def test_a_model_with_a_window_and_padding(number, order):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx_models import check, model_of

    steps = {"where, add": "b = Where (w, a, n)  s = Add (b, m)", "add, where": "b = Add (a, m)  s = Where (w, b, n)"}
    body = f"""{{ t = Transpose <perm = [0, 1, 3, 2]> (k)  a = MatMul (q, t)
        n = Constant <value = float{{{number}}}> ()  {steps[order]}  p = Softmax (s)  y = MatMul (p, v) }}"""
    inputs = "float[B,H,L,D] q, float[B,H,L,D] k, float[B,H,L,D] v, float[B,1,1,L] m, bool[L,L] w"
    feeds = {name: draw(B, H, L, D, seed=n) for n, name in enumerate("qkv")} | {"m": padding(3, 2)}
    for window in (CAUSAL & (I - J < 2), CAUSAL):
        check(model_of(body, inputs, "float[B,H,L,D] y"), feeds | {"w": window}, tolerance=1e-5)


def test_flex_attention_with_a_window_and_padding():
    onnx = pytest.importorskip("onnx")
    from ruvector_numba.interop.onnx import flex_attention

    graph = onnx.parser.parse_graph(
        "g (float[B,H,L,S] s) => (float[B,H,L,S] t) { a = Add (s, m)  t = Where (w, a, n) }"
    )
    seen = CAUSAL & (I - J < 2)
    for name, x in (("m", padding(3, 2)), ("w", seen), ("n", np.float32(-np.inf))):
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(x), name))
    q, k, v = (draw(B, H, L, D, seed=n) for n in range(3))
    wanted = by_hand(q, k, v, padding(3, 2).astype(np.float64), seen)
    np.testing.assert_allclose(flex_attention(q, k, v, score_mod=graph), wanted, rtol=1e-5, atol=1e-6)
