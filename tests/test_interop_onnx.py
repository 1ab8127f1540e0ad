"""ONNX's Attention as a function on arrays, against the float64 reference. Needs no ONNX."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import reference

import ruvector_numba as rv
from ruvector_numba import DimensionMismatchError, InvalidConfigError, InvalidInputError, InvalidMaskError
from ruvector_numba.interop.onnx import attention

B, Hq, Hk, Lq, Lk, P, D, Dv = 2, 4, 2, 5, 7, 3, 8, 6
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 2e-6, "float64": 1e-13}


def draw(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def inputs(dtype=np.float64, packed=False, **more):
    shapes = {"Q": (B, Hq, Lq, D), "K": (B, Hk, Lk, D), "V": (B, Hk, Lk, Dv)}
    arrays = {name: draw(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
    if packed:
        arrays = {name: x.swapaxes(1, 2).reshape(B, x.shape[2], -1) for name, x in arrays.items()}
        more |= {"q_num_heads": Hq, "kv_num_heads": Hk}
    return arrays | more


def past(dtype=np.float64):
    return {"past_key": draw(B, Hk, P, D, seed=7, dtype=dtype), "past_value": draw(B, Hk, P, Dv, seed=8, dtype=dtype)}


def by_heads(x, heads):
    x = np.asarray(x, np.float64)
    return x if x.ndim == 4 else x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def wanted(Q, K, V, attn_mask=None, past_key=None, past_value=None, nonpad_kv_seqlen=None, *, is_causal=0, scale=None,
           softcap=0.0, left_window_size=-1, right_window_size=-1, q_num_heads=Hq, kv_num_heads=Hk, **_):  # fmt: skip
    """The operator's text, in float64: Y by heads, and the four stages of the scores."""
    q, k, v = by_heads(Q, q_num_heads), by_heads(K, kv_num_heads), by_heads(V, kv_num_heads)
    offset = np.zeros((len(q), 1, 1, 1), int)
    if past_key is not None:
        offset += past_key.shape[2]
        k, v = np.concatenate((by_heads(past_key, 0), k), 2), np.concatenate((by_heads(past_value, 0), v), 2)
    n = k.shape[2]
    if nonpad_kv_seqlen is not None:
        offset = np.reshape(nonpad_kv_seqlen, (-1, 1, 1, 1)) - q.shape[2]
    at, j = np.arange(q.shape[2])[:, None] + offset, np.arange(n)
    visible = np.ones((len(q), 1, q.shape[2], n), bool)
    if nonpad_kv_seqlen is not None:
        visible &= j < np.reshape(nonpad_kv_seqlen, (-1, 1, 1, 1))
    if is_causal:
        visible &= j <= at
    if left_window_size >= 0:
        visible &= at - left_window_size <= j
    if right_window_size >= 0:
        visible &= j <= at + right_window_size
    bias = None
    if attn_mask is not None:
        mask = np.asarray(attn_mask)
        widths = [(0, 0)] * (mask.ndim - 1) + [(0, n - mask.shape[-1])]
        if mask.dtype == bool:
            visible = visible & np.pad(mask, widths)
        else:
            bias = np.pad(mask.astype(np.float64), widths, constant_values=-np.inf)
    y, _, weights = reference.attention(
        q, k, v, visible=visible, bias=bias, scale=scale, softcap=softcap or None
    )  # fmt: skip
    raw = (
        q
        @ np.repeat(k, q.shape[1] // k.shape[1], 1).swapaxes(-1, -2)
        * (q.shape[-1] ** -0.5 if scale is None else scale)
    )
    capped = softcap * np.tanh(raw / softcap) if softcap else raw
    return y, (raw, capped, np.where(visible, capped + (0 if bias is None else bias), -np.inf), weights)


def check(call, mode=None):
    got = attention(**call, qk_matmul_output_mode=mode)
    y, stages = wanted(**call)
    name = call["Q"].dtype.name
    if call["Q"].ndim == 3:
        y = y.swapaxes(1, 2).reshape(B, Lq, -1)
    results = [(got.Y, y), *([(got.qk_matmul_output, stages[mode])] if mode is not None else [])]
    for result, expected in results:
        assert result.dtype == call["Q"].dtype and result.shape == expected.shape
        np.testing.assert_allclose(result.astype(np.float64), expected, rtol=TOLERANCE[name], atol=TOLERANCE[name])
    assert (got.qk_matmul_output is None) == (mode is None)
    return got


# Results


BIAS, SEEN = draw(Hq, Lq, Lk, seed=4), draw(B, 1, Lq, Lk, seed=5) > -0.5
BIAS[1, 2], SEEN[0, 0, 3] = -np.inf, False  # queries that see nothing
CALLS = {
    "plain": {},
    "causal": {"is_causal": 1},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 0.7},
    "bool": {"attn_mask": SEEN},
    "float, by heads": {"attn_mask": BIAS},
    "one axis": {"attn_mask": SEEN[1, 0, 0]},
    "one axis, causal": {"attn_mask": BIAS[0, 0], "is_causal": 1},
    "one query for all, causal": {"attn_mask": SEEN[:, :, :1], "is_causal": 1},
    "a short mask": {"attn_mask": BIAS[:, :, :4]},
    "a short bool mask, causal": {"attn_mask": SEEN[..., :1], "is_causal": 1},
    "window": {"left_window_size": 1, "right_window_size": 2},
    "left, causal": {"left_window_size": 0, "is_causal": 1},
    "right, causal": {"right_window_size": 3, "is_causal": 1},
    "lengths": {"nonpad_kv_seqlen": np.array([4, 7])},
    "lengths, causal": {"nonpad_kv_seqlen": np.array([3, 7]), "is_causal": 1},
    "lengths, window": {"nonpad_kv_seqlen": np.array([7, 0]), "left_window_size": 1},
    "lengths, causal, window, mask": {
        "nonpad_kv_seqlen": np.array([6, 7]), "is_causal": 1, "left_window_size": 2, "attn_mask": BIAS[:, :, :7]
    },
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True], ids=["4-D", "3-D"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_text_of_the_operator(call, packed):
    for dtype, mode in itertools.product((np.float32, np.float64), (None, 0, 1, 2, 3)):
        here = inputs(dtype, packed, **call)
        if "attn_mask" in call and call["attn_mask"].dtype.kind == "f":
            here["attn_mask"] = call["attn_mask"].astype(dtype)
        got = check(here, mode)
        k, v = (by_heads(here[name], Hk) for name in "KV")
        assert np.array_equal(got.present_key, k) and np.array_equal(got.present_value, v)


PAST_CALLS = {
    "plain": {},
    "causal": {"is_causal": 1},
    "window": {"left_window_size": 2, "right_window_size": 1},
    "left, causal": {"left_window_size": 4, "is_causal": 1},
    "float": {"attn_mask": draw(Lq, P + Lk, seed=9), "softcap": 2.0},
    "bool, causal": {"attn_mask": draw(B, Hq, Lq, P + Lk, seed=9) > 0, "is_causal": 1},
}


@pytest.mark.parametrize("packed", [False, True], ids=["4-D", "3-D"])
@pytest.mark.parametrize("call", PAST_CALLS.values(), ids=PAST_CALLS)
def test_a_past(call, packed):
    """Lk is not Lq, so no alignment of corners gives the operator's offset, which is P."""
    here = inputs(packed=packed, **past(), **call)
    for mode in (None, 0, 1, 2, 3):
        got = check(here, mode)
    assert np.array_equal(got.present_key, np.concatenate((here["past_key"], by_heads(here["K"], Hk)), 2))
    assert np.array_equal(got.present_value, np.concatenate((here["past_value"], by_heads(here["V"], Hk)), 2))


def test_token_by_token_is_the_whole_at_once():
    call = inputs(packed=True, is_causal=1)
    for name in "QKV":
        call[name] = call[name][:, :Lq]
    whole, cache = attention(**call).Y, {}
    for i in range(Lq):
        step = attention(**(call | {name: call[name][:, i : i + 1] for name in "QKV"}), **cache)
        cache = {"past_key": step.present_key, "past_value": step.present_value}
        np.testing.assert_allclose(step.Y, whole[:, i : i + 1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "call", [{}, {"is_causal": 1, "softcap": 2.0}, {"attn_mask": SEEN}], ids=["plain", "cap", "mask"]
)
def test_small_types(name, call):
    """Computed in float32: what is rounded is the input and the result."""
    dtype = np.dtype(name) if name == "float16" else pytest.importorskip("ml_dtypes").bfloat16
    for mode in (None, 1, 3):
        got = check(inputs(dtype, **past(dtype), **call) if "attn_mask" not in call else inputs(dtype, **call), mode)
    assert got.present_key.dtype == dtype


def test_keys_and_values_may_differ_in_type():
    call = inputs(np.float32)
    call["V"] = call["V"].astype(np.float16)
    got = check(call)
    assert got.Y.dtype == np.float32 and got.present_value.dtype == np.float16


def test_the_precision_of_the_softmax():
    call = inputs(np.float32)
    rounded = wanted(**call)[0].astype(np.float32)
    plain = attention(**call).Y
    for precision in (1, 10, 16):  # less than float32 is not done
        assert np.array_equal(attention(**call, softmax_precision=precision).Y, plain)
    assert np.array_equal(attention(**call, softmax_precision=11).Y, rounded) and not np.array_equal(plain, rounded)


def test_hidden_numbers_reach_nothing():
    call = inputs(nonpad_kv_seqlen=np.array([4, 6]), is_causal=1)
    before = attention(**call, qk_matmul_output_mode=3)
    for b, n in enumerate((4, 6)):
        call["K"][b, :, n:], call["V"][b, :, n:] = np.nan, np.inf
    after = attention(**call, qk_matmul_output_mode=3)
    assert np.array_equal(before.Y, after.Y) and np.array_equal(before[3], after[3])


@pytest.mark.parametrize("dtype", [bool, np.float32])
@pytest.mark.parametrize("expanded", [False, True])
def test_padding_as_a_mask(dtype, expanded):
    """It becomes a length where that says the same; not where a row sees nothing, or a key between is hidden."""
    for lengths in ([3, 7], [0, 5]):
        seen = np.arange(Lk) < np.reshape(lengths, (B, 1, 1, 1))
        mask = seen if dtype is bool else np.where(seen, np.float32(0), np.finfo(np.float32).min)
        mask = np.broadcast_to(mask, (B, 1, Lq, Lk)).copy() if expanded else mask
        for mode in (0, 2, 3, None):  # of which 2 shows what the mask has
            got = check(inputs(np.float32, attn_mask=mask), mode)
        if dtype is not bool and not all(lengths):  # the mean of the values
            np.testing.assert_allclose(got.Y[0, 0, 0], inputs(np.float32)["V"][0, 0].mean(0), rtol=1e-5, atol=1e-6)
    for odd in (draw(Lk) > 0, draw(Lq, Lk) > 0, np.arange(Lk)[::-1] < 3):
        check(inputs(np.float32, attn_mask=odd if dtype is bool else np.where(odd, 0, -np.inf).astype(np.float32)))
    nan = np.where(np.arange(Lk) < 3, 0, np.nan).astype(np.float32)
    assert np.isnan(attention(**inputs(np.float32, attn_mask=nan)).Y).all()


@pytest.mark.parametrize(("axis", "name"), [(0, "Q"), (2, "Q"), (2, "K"), (3, "V"), (3, "Q")])
def test_empty(axis, name):
    call = inputs()
    for other in {"Q": "QK" if axis == 3 else "QKV" if axis == 0 else "Q", "K": "KV", "V": "V"}[name]:
        call[other] = call[other].take(range(0), axis)
    got = attention(**call, is_causal=1, qk_matmul_output_mode=3)
    assert got.Y.shape == (*call["Q"].shape[:3], call["V"].shape[3])
    assert got.qk_matmul_output.shape == (*call["Q"].shape[:3], call["K"].shape[2])


def test_opset_23_lets_one_mask_stand_for_all_keys():
    """And from 24 on it is a mask that is short, so that only the first key is seen."""
    mask = draw(Lq, 1)
    np.testing.assert_allclose(attention(**inputs(attn_mask=mask), opset=23).Y, wanted(**inputs())[0], atol=1e-13)
    check(inputs(attn_mask=mask))


def test_nothing_is_modified_and_strides_are_free():
    call = inputs(attn_mask=BIAS)
    copies = {name: x.copy() for name, x in call.items()}
    y = attention(**call).Y
    for x in call.values():
        x.flags.writeable = False
    assert np.array_equal(attention(**{n: x[..., ::-1][..., ::-1] for n, x in call.items()}).Y, y)
    assert all(np.array_equal(call[name], x) for name, x in copies.items())


# Errors


def shaped(name, *shape, dtype=np.float64):
    return {name: np.zeros(shape, dtype)}


PACKED = {"q_num_heads": Hq, "kv_num_heads": Hk}
WRONG = {
    "Q of integers": (shaped("Q", B, Hq, Lq, D, dtype=int), InvalidInputError, "Q has dtype int64"),
    "K of another type": (shaped("K", B, Hk, Lk, D, dtype=np.float32), InvalidInputError, "Q and K differ"),
    "no V": ({"V": None}, InvalidInputError, "V is None"),
    "Q of two axes": (shaped("Q", Lq, D), InvalidInputError, "Q, K and V have three axes, or four"),
    "Q of three axes": (shaped("Q", B, Lq, D), InvalidInputError, r"Q\.shape: \(2, 5, 8\)"),
    "batch": (shaped("K", 3, Hk, Lk, D), DimensionMismatchError, "one batch size"),
    "head size": (shaped("K", B, Hk, Lk, D + 1), DimensionMismatchError, "Q and K have one head size"),
    "length": (shaped("V", B, Hk, Lk + 1, Dv), DimensionMismatchError, "a value for each key"),
    "heads of V": (shaped("V", B, Hq, Lk, Dv), DimensionMismatchError, "kv_num_heads"),
    "heads": (shaped("Q", B, 3, Lq, D), DimensionMismatchError, "multiple of kv_num_heads"),
    "q_num_heads with four axes": ({"q_num_heads": Hq}, InvalidConfigError, "leave q_num_heads out"),
    "wrong kv_num_heads with four axes": ({"kv_num_heads": 3, "opset": 23}, InvalidConfigError, "kv_num_heads"),
    "past_key alone": ({"past_key": past()["past_key"]}, InvalidInputError, "past_key is given alone"),
    "past_value": (past() | shaped("past_value", B, Hk, P, Dv + 1), DimensionMismatchError, r"past_value\.shape"),
    "past_key of three axes": (past() | shaped("past_key", B, P, Hk * D), DimensionMismatchError, r"past_key\.shape"),
    "type of past_key": (past(np.float32), InvalidInputError, "Q and K and past_key differ"),
    "mask of integers": (shaped("attn_mask", Lq, Lk, dtype=np.int64), InvalidMaskError, "attn_mask has dtype int64"),
    "mask of five axes": (shaped("attn_mask", 1, 1, 1, Lq, Lk), InvalidMaskError, "attn_mask has 5 axes"),
    "mask of no axes": ({"attn_mask": np.array(True)}, InvalidMaskError, "attn_mask has 0 axes"),
    "mask": (shaped("attn_mask", B, Lq, Lk), InvalidMaskError, "attn_mask does not broadcast"),
    "long mask": (shaped("attn_mask", Lq, Lk + 1), InvalidMaskError, "attn_mask does not broadcast"),
    "lengths": ({"nonpad_kv_seqlen": np.array([8, 1])}, InvalidInputError, "nonpad_kv_seqlen"),
    "negative lengths": ({"nonpad_kv_seqlen": np.array([-1, 1])}, InvalidInputError, "nonpad_kv_seqlen"),
    "shape of lengths": ({"nonpad_kv_seqlen": np.array([1])}, InvalidInputError, "nonpad_kv_seqlen is one"),
    "type of lengths": ({"nonpad_kv_seqlen": np.array([1.0, 2.0])}, InvalidInputError, "nonpad_kv_seqlen is one"),
    "lengths and past": (past() | {"nonpad_kv_seqlen": np.array([1, 2])}, InvalidInputError, "both given"),
    "lengths in 23": ({"nonpad_kv_seqlen": np.array([1, 2]), "opset": 23}, InvalidConfigError, "came with opset 24"),
    "window in 24": ({"left_window_size": 1, "opset": 24}, InvalidConfigError, "left_window_size came with opset 25"),
    "window": ({"right_window_size": -2}, InvalidConfigError, "right_window_size is -2"),
    "mode": ({"qk_matmul_output_mode": 4}, InvalidConfigError, "qk_matmul_output_mode is 4"),
    "precision": ({"softmax_precision": 2}, InvalidConfigError, "softmax_precision is 2"),
    "causal": ({"is_causal": 2}, InvalidConfigError, "is_causal is 2"),
    "softcap": ({"softcap": -1.0}, InvalidConfigError, "softcap is -1.0"),
    "no softcap": ({"softcap": None}, InvalidConfigError, "softcap is None"),
    "scale": ({"scale": -0.5}, InvalidConfigError, "scale is -0.5"),
    "scale as text": ({"scale": "0.5"}, InvalidInputError, "scale"),
    "opset": ({"opset": 22}, InvalidConfigError, "opset is 22.*\n.*since opset 23"),
    "opset to come": ({"opset": 99}, InvalidConfigError, "opset is 99.*\n.*newer opsets"),
    "bits for Q": (shaped("Q", B, Hq, Lq, D, dtype=np.uint16), InvalidInputError, r"Q\.view\(ml_dtypes\.bfloat16\)"),
    "bits for a mask": (shaped("attn_mask", Lq, Lk, dtype=np.uint16), InvalidMaskError, r"view\(ml_dtypes.bfloat16\)"),
    "a mask object": ({"attn_mask": rv.masks.Causal()}, InvalidMaskError, r"Causal\(.*\n.*is_causal=1"),
    "a window": ({"attn_mask": rv.masks.Window(left=3)}, InvalidMaskError, r"Window\(.*\n.*left_window_size"),
    "a ragged mask": ({"attn_mask": [[0.0], [0.0, 1.0]]}, InvalidInputError, "attn_mask cannot become an array"),
    "ragged lengths": ({"nonpad_kv_seqlen": [[1], [1, 2]]}, InvalidInputError, "nonpad_kv_seqlen cannot become"),
    "mask of whole numbers in a list": ({"attn_mask": [[1] * Lk] * Lq}, InvalidMaskError, "attn_mask has dtype int64"),
    "unknown": ({"window_size": 3}, InvalidConfigError, "Attention has no attribute window_size\n.*left_window_size"),
}  # fmt: skip


@pytest.mark.parametrize(("more", "kind", "words"), WRONG.values(), ids=WRONG)
def test_errors_name_the_argument(more, kind, words):
    with pytest.raises(kind, match=words):
        attention(**inputs() | more)


@pytest.mark.parametrize(
    ("more", "kind", "words"),
    [
        ({"q_num_heads": None}, InvalidConfigError, "q_num_heads must be given"),
        ({"kv_num_heads": 0}, InvalidConfigError, "kv_num_heads is 0"),
        ({"q_num_heads": 2.0}, InvalidConfigError, "q_num_heads is 2.0"),
        ({"q_num_heads": 3}, DimensionMismatchError, "q_num_heads"),
        (
            {"kv_num_heads": 4, "q_num_heads": 4},
            DimensionMismatchError,
            r"K by heads: \(2, 4, 7, 4\)\n.*\nHINT: Q and K",
        ),
        ({"kv_num_heads": 1, "q_num_heads": 3}, DimensionMismatchError, "a multiple of q_num_heads = 3, got 32"),
    ],
)
def test_errors_of_three_axes(more, kind, words):
    with pytest.raises(kind, match=words):
        attention(**inputs(packed=True) | more)


def test_numbers_of_numpy_and_lists_are_as_good():
    call = inputs(nonpad_kv_seqlen=[4, 6], is_causal=np.True_)
    np.testing.assert_array_equal(attention(**call).Y, attention(**call | {"is_causal": 1}).Y)


@pytest.mark.filterwarnings("error")
def test_nothing_warns_of_numbers_beyond_float16():
    x, mask = np.full((1, 1, 3, 4), 300, np.float16), np.float32([0, -1e9, 0])
    got = attention(x, x, x, mask, qk_matmul_output_mode=2, scale=1.0)
    assert np.isinf(got.qk_matmul_output[..., 1]).all() and (got.Y == 300).all()


def test_attention_loads_no_onnx():
    code = "import sys, ruvector_numba as rv; rv.interop.onnx.attention; print('onnx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["Backend", "flex_attention", "replace_attention"])
def test_what_needs_onnx_says_so_where_it_is_missing(name):
    code = f"import sys; sys.modules['onnx'] = None; import ruvector_numba as rv; rv.interop.onnx.{name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ModuleNotFoundError" in done.stderr and 'pip install ".[onnx]"' in done.stderr


def test_other_names():
    assert rv.interop.onnx is sys.modules["ruvector_numba.interop.onnx"]
    pytest.importorskip("onnx")  # without it, what needs it is not listed
    assert dir(rv.interop.onnx) == sorted(rv.interop.onnx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'layer'"):
        rv.interop.onnx.layer  # noqa: B018
