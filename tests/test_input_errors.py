"""What may not be passed: the kind of each error, its words and its hint, before any work, with nothing modified."""

import re
import types

import numpy as np
import pytest

import ruvector_numba as rv
from ruvector_numba import DimensionMismatchError, InvalidInputError, InvalidMaskError, masks

B, H, Hk, Lq, Lk, D, Dv = 2, 4, 2, 5, 6, 3, 7


class Tensor:
    """Refuses to become an array, as a tensor of torch does that requires grad."""

    def __array__(self, *_, **__):
        raise RuntimeError("it requires grad")


def arguments(**changes):
    """The arguments of a call that is right: a batch of 2, 4 heads, Lq = 5, Lk = 6, D = 3, Dv = 7."""
    rng = np.random.default_rng(0)
    given = {
        "query": rng.standard_normal((B, H, Lq, D)),
        "key": rng.standard_normal((B, H, Lk, D)),
        "value": rng.standard_normal((B, H, Lk, Dv)),
    }
    for name, change in changes.items():
        given[name] = change(given[name]) if isinstance(change, types.FunctionType) else change
    return given


def refused(function, given, kind, words, hint=None, by_position=0):
    """`function` raises this kind, no subclass, with these words and this hint, and has touched nothing."""
    arrays = [x for x in given.values() if isinstance(x, np.ndarray) and x.dtype.kind != "O"]
    before = [x.copy() for x in arrays]
    with pytest.raises(kind) as caught:
        function(*list(given.values())[:by_position], **dict(list(given.items())[by_position:]))
    assert type(caught.value) is kind
    assert re.search(words, str(caught.value)), str(caught.value)
    if hint is not None:
        assert caught.value.hint is not None and re.search(hint, caught.value.hint), str(caught.value)
    for x, was in zip(arrays, before, strict=True):
        assert x.tobytes() == was.tobytes()
    return caught.value


def label(changes, *expected):
    """An id for a row of a table below: what is changed, and the words of the error."""
    names = "+".join(changes) if isinstance(changes, dict) else repr(changes)[:30]
    return f"{names}: {expected[1] if isinstance(expected[0], type) else expected[0]}"[:80]


def cast(dtype):
    return lambda x: x.astype(dtype)


def heads(n):
    return lambda x: np.repeat(x, 3, axis=1)[:, :n]


F32, TO_FLOAT, REAL = cast(np.float32), r"cast it: {}.astype\(numpy.float32\)", "attention is real: take {}.real"
NUMBERS = r"numpy.array\({}, float\)"
INPUTS = [
    # dtypes
    ({"query": cast(int)}, InvalidInputError, "dtype int64, not float16, bfloat16, ", TO_FLOAT.format("query")),
    ({"key": cast(np.uint8)}, InvalidInputError, "key has dtype uint8", TO_FLOAT.format("key")),
    ({"value": cast(bool)}, InvalidInputError, "value has dtype bool", TO_FLOAT.format("value")),
    ({"query": cast(complex)}, InvalidInputError, "query has dtype complex128", REAL.format("query")),
    ({"key": cast(np.complex64)}, InvalidInputError, "key has dtype complex64", REAL.format("key")),
    ({"value": cast(object)}, InvalidInputError, "value has dtype object", NUMBERS.format("value")),
    ({"query": cast(str)}, InvalidInputError, "query has dtype <U32", NUMBERS.format("query")),
    ({"query": cast("S8")}, InvalidInputError, r"query has dtype \|S8", NUMBERS.format("query")),
    ({"query": cast(np.uint16)}, InvalidInputError, "query has dtype uint16", 'or pass dtype="bfloat16" if query'),
    ({"query": cast(np.longdouble)}, InvalidInputError, "query has dtype (longdouble|float128)", "cast it"),
    ({"query": cast(">f8")}, InvalidInputError, "query has dtype >f8", "cast it"),
    ({"query": F32}, InvalidInputError, "differ in dtype", r"key = key.astype\(query.dtype\)"),
    ({"key": F32}, InvalidInputError, "differ in dtype", r"key = key.astype\(query.dtype\)"),
    ({"value": F32}, InvalidInputError, "differ in dtype", r"value = value.astype\(query.dtype\)"),
    ({"query": F32, "key": F32}, InvalidInputError, "differ in dtype", r"value = value.astype\(query.dtype\)"),
    ({"query": "q"}, InvalidInputError, "query has dtype <U1", None),
    ({"query": None}, InvalidInputError, "query is None", "give an array"),
    ({"query": [[1.0], [1.0, 2.0]]}, InvalidInputError, "query cannot become an array", "rows of equal length"),
    # ranks
    ({"query": lambda x: x[0, 0, 0]}, InvalidInputError, r"has 1 axes\n  query.shape: \(3,\)", r"\(..., H, L, D\)"),
    ({"key": 1.0}, InvalidInputError, "key has 0 axes", r"\(..., H, L, D\)"),
    ({"value": lambda x: x[0]}, InvalidInputError, r"differ in rank\n  query.shape: \(2, 4, 5, 3\)", "add axes"),
    ({"query": lambda x: x[0, 0]}, InvalidInputError, "differ in rank", "add axes"),
    # sizes
    ({"query": lambda x: x[..., :2]}, DimensionMismatchError, "expected 2, got 3", "share their last axis, D"),
    ({"key": lambda x: x[..., :5, :]}, DimensionMismatchError, "expected 5, got 6", "one value for each key"),
    ({"value": lambda x: x[..., :1, :]}, DimensionMismatchError, "expected 6, got 1", "one value for each key"),
    ({"key": lambda x: x[:1]}, DimensionMismatchError, r"expected \(2,\), got \(1,\)", "broadcast_to"),
    ({"query": lambda x: x[:1]}, DimensionMismatchError, r"expected \(1,\), got \(2,\)", "batch axes must be equal"),
    ({"value": lambda x: x[:1]}, DimensionMismatchError, r"expected \(2,\), got \(1,\)", "batch axes must be equal"),
    ({"value": heads(2)}, DimensionMismatchError, "expected 4, got 2", "one value head a key head"),
    ({"key": heads(2), "value": heads(2)}, DimensionMismatchError, "expected 4, got 2",
     "share each key head among 2 query heads, pass enable_gqa=True"),
    ({"key": heads(1), "value": heads(1)}, DimensionMismatchError, "expected 4, got 1", "enable_gqa=True"),
    ({"key": heads(3), "value": heads(3)}, DimensionMismatchError, "expected 4, got 3", "must be a multiple"),
    ({"key": heads(3), "value": heads(3), "enable_gqa": True}, DimensionMismatchError, "got 3", "must be a multiple"),
    ({"key": heads(8), "value": heads(8), "enable_gqa": True}, DimensionMismatchError, "got 8", "must be a multiple"),
    ({"key": heads(0), "value": heads(0), "enable_gqa": True}, DimensionMismatchError, "got 0", "must be a multiple"),
    # masks
    ({"attn_mask": np.ones((5, 6), int)}, InvalidMaskError, "dtype int64", r"attn_mask.astype\(bool\)"),
    ({"attn_mask": np.ones((5, 6), np.uint8)}, InvalidMaskError, "dtype uint8", r"attn_mask.astype\(bool\)"),
    ({"attn_mask": np.ones((5, 6), complex)}, InvalidMaskError, "dtype complex128", None),
    ({"attn_mask": np.ones((5, 5), bool)}, InvalidMaskError, r"does not.*\n.*\(5, 5\)\n.*\(2, 4, 5, 6\)", "right"),
    ({"attn_mask": np.ones((3, 5, 6), bool)}, InvalidMaskError, "does not broadcast", "right"),
    ({"attn_mask": np.ones((2, 6), bool)}, InvalidMaskError, "does not broadcast", r"attn_mask\[:, None, None, :\]"),
    ({"attn_mask": np.ones((2, 5, 6), bool)}, InvalidMaskError, "does not broadcast", r"attn_mask\[:, None\]"),
    ({"attn_mask": np.ones((1, 2, 4, 5, 6), bool)}, InvalidMaskError, "does not broadcast", None),
    ({"attn_mask": np.zeros((5, 7))}, InvalidMaskError, "does not broadcast", None),
    ({"attn_mask": np.zeros((5, 6), np.float32)}, InvalidMaskError, "float32 and they are float64", "cast the mask"),
    ({"attn_mask": np.zeros((5, 6), np.float16)}, InvalidMaskError, "it is float16", r"astype\(np.float64\)"),
    ({"attn_mask": "causal"}, InvalidMaskError, "dtype <U6", None),
    ({"attn_mask": masks.Causal}, InvalidMaskError, "a class, not a mask", r"write Causal\(...\)"),
    ({"attn_mask": np.ma.ones((5, 6), bool)}, InvalidMaskError, "numpy.ma", "filled"),
    ({"attn_mask": masks.Lengths(keys=7)}, InvalidMaskError, "more than Lk = 6", None),
    ({"attn_mask": masks.Lengths(keys=[1, 2, 3])}, InvalidMaskError, "one entry per row of the batch", None),
    ({"attn_mask": masks.Segments([0] * 5)}, InvalidMaskError, "has 5 ids for Lk = 6", "key_ids is query_ids"),
    # numbers
    ({"dropout_p": -0.1}, InvalidInputError, "dropout_p is -0.1", "0 <= dropout_p <= 1"),
    ({"dropout_p": 1.5}, InvalidInputError, "dropout_p is 1.5", "0 <= dropout_p <= 1"),
    ({"dropout_p": np.nan}, InvalidInputError, "dropout_p is nan", "0 <= dropout_p <= 1"),
    ({"dropout_p": np.inf}, InvalidInputError, "dropout_p is inf", None),
    ({"dropout_p": "0.1"}, InvalidInputError, "dropout_p is '0.1', of type str", "one number"),
    ({"dropout_p": True}, InvalidInputError, "dropout_p is True, of type bool", "one number"),
    ({"dropout_p": None}, InvalidInputError, "dropout_p is None, of type NoneType", "one number"),
    ({"dropout_p": np.array([0.1])}, InvalidInputError, r"dropout_p is array\(\[0.1\]\)", "one number"),
    ({"scale": np.nan}, InvalidInputError, "scale is nan", "a finite number"),
    ({"scale": np.inf}, InvalidInputError, "scale is inf", "a finite number"),
    ({"scale": "1"}, InvalidInputError, "scale is '1', of type str", "one number"),
    ({"scale": 1j}, InvalidInputError, "scale is 1j, of type complex", "one number"),
    ({"scale": True}, InvalidInputError, "scale is True", "one number"),
    ({"scale": [0.1]}, InvalidInputError, r"scale is \[0.1\], of type list", "one number"),
    ({"scale": np.ones(2)}, InvalidInputError, "scale is array", "one number"),
    ({"softcap": 0.0}, InvalidInputError, "softcap is 0.0", "a positive number"),
    ({"softcap": -2}, InvalidInputError, "softcap is -2", "a positive number"),
    ({"softcap": np.nan}, InvalidInputError, "softcap is nan", "a positive number"),
    ({"softcap": np.inf}, InvalidInputError, "softcap is inf", "None for no cap"),
    ({"softcap": "30"}, InvalidInputError, "softcap is '30'", "one number"),
    ({"softcap": False}, InvalidInputError, "softcap is False", "one number"),
    ({"seed": -1, "dropout_p": 0.1}, InvalidInputError, "seed is -1", "a whole number"),
    ({"seed": 1.0}, InvalidInputError, "seed is 1.0", "a whole number"),
    ({"seed": True}, InvalidInputError, "seed is True", "a whole number"),
    ({"seed": 1 << 63}, InvalidInputError, f"seed is {1 << 63}", r"2\*\*63"),
    ({"alibi_slopes": np.ones(3)}, InvalidInputError, r"wrong shape\n.*\(3,\)\n.*\(4,\)", "each query head"),
    ({"alibi_slopes": np.ones(2), "key": heads(2), "value": heads(2), "enable_gqa": True}, InvalidInputError,
     "wrong shape", "one slope for each query head"),
    ({"alibi_slopes": 0.5}, InvalidInputError, "wrong shape", "each query head"),
    ({"alibi_slopes": np.ones((3, 4))}, InvalidInputError, "wrong shape", "each query head"),
    ({"alibi_slopes": np.ones((4, 1))}, InvalidInputError, "wrong shape", "each query head"),
    ({"alibi_slopes": [1, 2, np.nan, 4]}, InvalidInputError, "alibi_slopes is not finite", "0 for none"),
    ({"alibi_slopes": ["a"] * 4}, InvalidInputError, "alibi_slopes has dtype <U1", "one number for each head"),
    ({"alibi_slopes": ["1"] * 4}, InvalidInputError, "alibi_slopes has dtype <U1", "one number for each head"),
    ({"alibi_slopes": np.ones(4, complex)}, InvalidInputError, "has dtype complex128", "one number for each head"),
    ({"alibi_slopes": np.ones(4, "m8[s]")}, InvalidInputError, "has dtype timedelta64", "one number for each head"),
    ({"alibi_slopes": [10**400] * 4}, InvalidInputError, "has dtype object", "one number for each head"),
    ({"alibi_slopes": Tensor()}, InvalidInputError, "alibi_slopes cannot become an array", "detach"),
    # words that are arrays
    ({"dtype": np.ones(2)}, InvalidInputError, r"dtype is array\(\[1., 1.\]\)", "bfloat16"),
    ({"precision": np.ones(2)}, InvalidInputError, r"precision is array\(\[1., 1.\]\)", "bfloat16"),
    # axes of (B, L, H, D)
    ({"key": lambda x: x.swapaxes(1, 2), "value": lambda x: x.swapaxes(1, 2)}, DimensionMismatchError,
     "expected 4, got 6", r"from \(B, L, H, D\) x.swapaxes\(1, 2\)"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "words", "hint"), INPUTS, ids=[label(*row) for row in INPUTS])
@pytest.mark.parametrize("function", [rv.scaled_dot_product_attention, rv.attention_forward])
def test_arguments(function, changes, kind, words, hint):
    out = np.full((B, H, Lq, Dv), 7.0)
    refused(function, {**arguments(**changes), "out": out}, kind, words, hint)


def test_every_error_is_a_value_error_and_shows_the_shapes():
    error = refused(rv.attention_forward, arguments(value=heads(2)), DimensionMismatchError, "Dimension mismatch")
    assert isinstance(error, ValueError) and isinstance(error, rv.AttentionError)
    assert (error.expected, error.actual) == (4, 2)
    assert str(error).splitlines()[1:4] == [
        "  query.shape: (2, 4, 5, 3)", "  key.shape  : (2, 4, 6, 3)", "  value.shape: (2, 2, 6, 7)"
    ]  # fmt: skip


@pytest.mark.parametrize("make", [lambda: masks.Window(left=-1), lambda: masks.Window(right=-2)])
def test_negative_windows(make):
    with pytest.raises(InvalidMaskError, match=r"is -\d[\s\S]*HINT: give a whole number, 0 or more"):
        make()


# out


def overlapping(name):
    """A call whose `out` is a view of the memory of one of its inputs."""
    given = arguments()
    memory = np.random.default_rng(0).standard_normal(1000)
    shape = given[name].shape
    given[name] = memory[: np.prod(shape)].reshape(shape)
    given["out"] = memory[np.prod(shape) - 1 :][: B * H * Lq * Dv].reshape(B, H, Lq, Dv)
    return given


OUT_HINT = r"give numpy.empty\(\(2, 4, 5, 7\), query.dtype\)"
READ_ONLY = np.zeros((B, H, Lq, Dv))
READ_ONLY.flags.writeable = False
OUTS = [
    ([0.0], InvalidInputError, "out is a list", "give a NumPy array"),
    (np.zeros((B, H, Lq, Dv + 1)), DimensionMismatchError, r"expected \(2, 4, 5, 7\), got \(2, 4, 5, 8\)", "Lq, Dv"),
    (np.zeros((H, Lq, Dv)), DimensionMismatchError, r"expected \(2, 4, 5, 7\), got \(4, 5, 7\)", "Lq, Dv"),
    (np.zeros((B, H, Lq, Dv), np.float32), InvalidInputError, "another dtype.*\n.*float32\n.*float64", OUT_HINT),
    (np.zeros((B, H, Lq, Dv), ">f8"), InvalidInputError, "another dtype", OUT_HINT),
    (READ_ONLY, InvalidInputError, "out cannot be written to", "read-only"),
    (np.frombuffer(bytearray(B * H * Lq * Dv * 8 + 1), np.float64, offset=1).reshape(B, H, Lq, Dv), InvalidInputError,
     "out cannot be written to", "not aligned"),
]  # fmt: skip


@pytest.mark.parametrize(("out", "kind", "words", "hint"), OUTS, ids=[row[2][:40] for row in OUTS])
def test_out(out, kind, words, hint):
    refused(rv.scaled_dot_product_attention, {**arguments(), "out": out}, kind, words, hint)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_out_that_overlaps_an_input(name):
    refused(rv.attention_forward, overlapping(name), InvalidInputError, f"out overlaps {name}", "another array")


def test_out_that_is_an_input_or_a_mask():
    q, k, v = np.random.default_rng(0).standard_normal((3, B, H, 6, 6))
    for name, x in (("query", q), ("key", k), ("value", v)):
        given = {"query": q, "key": k, "value": v, "out": x}
        refused(rv.attention_forward, given, InvalidInputError, f"out overlaps {name}", "another array")
        refused(rv.attention_forward, {**given, "out": x[:, :, ::-1]}, InvalidInputError, f"out overlaps {name}")
    bias = np.zeros((B, H, 6, 6))
    given = {"query": q, "key": k, "value": v, "attn_mask": bias, "out": bias}
    refused(rv.attention_forward, given, InvalidInputError, "out overlaps attn_mask", "another array")


@pytest.mark.parametrize("batch", [(), (B,)])
def test_out_that_overlaps_slopes(batch):
    given = {name: x if batch else x[0] for name, x in arguments().items()}
    out = np.ones((*batch, H, Lq, Dv))
    slopes = out.reshape(-1)[: int(np.prod(batch)) * H].reshape(*batch, H)
    given |= {"alibi_slopes": slopes, "out": out}
    refused(rv.attention_forward, given, InvalidInputError, "out overlaps alibi_slopes", "another array")


@pytest.mark.parametrize("broadcast", [(1, H, Lq, Dv), (B, H, 1, Dv), (B, H, Lq, 1)])
def test_out_that_overlaps_itself(broadcast):
    out = np.broadcast_to(np.zeros(broadcast), (B, H, Lq, Dv))
    out = np.lib.stride_tricks.as_strided(np.zeros(broadcast), out.shape, out.strides)  # one that can be written to
    refused(rv.attention_forward, {**arguments(), "out": out}, InvalidInputError, "out overlaps itself", "broadcast")


# The backward pass

CACHE = rv.attention_forward(**arguments())
GRAD, GRAD_LSE = np.ones((B, H, Lq, Dv)), np.ones((B, H, Lq))
BACKWARD = [
    ({"grad_output": GRAD[..., :3]}, DimensionMismatchError, r"grad_output.shape: \(2, 4, 5, 3\)", "the result's own"),
    ({"grad_output": GRAD[0]}, DimensionMismatchError, r"expected \(2, 4, 5, 7\), got \(4, 5, 7\)", "the result's own"),
    ({"grad_output": 1.0}, DimensionMismatchError, r"got \(\)", "the result's own"),
    ({"grad_output": GRAD.astype(np.float32)}, InvalidInputError, "has dtype float32, the call had float64", "cast it"),
    ({"grad_output": GRAD.astype(np.float16)}, InvalidInputError, "has dtype float16", r"astype\(numpy.float64\)"),
    ({"grad_output": GRAD.astype(int)}, InvalidInputError, "has dtype int64", "cast it"),
    ({"grad_output": GRAD.astype(complex)}, InvalidInputError, "has dtype complex128", "cast it"),
    ({"grad_output": GRAD.astype(object)}, InvalidInputError, "has dtype object", "cast it"),
    ({"grad_output": GRAD.astype(bool)}, InvalidInputError, "has dtype bool", "cast it"),
    ({"grad_output": "ones"}, InvalidInputError, "has dtype <U4", "cast it"),
    ({"grad_output": None}, InvalidInputError, "grad_output is None", "give an array"),
    (
        {"grad_lse": GRAD_LSE[..., None]},
        DimensionMismatchError,
        r"expected \(2, 4, 5\), got \(2, 4, 5, 1\)",
        "own shape",
    ),
    ({"grad_lse": GRAD_LSE[:1]}, DimensionMismatchError, r"grad_lse.shape: \(1, 4, 5\)", "own shape"),
    ({"grad_lse": GRAD_LSE.astype(np.float32)}, InvalidInputError, "grad_lse has dtype float32", "cast it"),
    ({"cache": None}, InvalidInputError, "cache is a NoneType", "what attention_forward returned"),
    ({"cache": CACHE.output}, InvalidInputError, "cache is a ndarray", "what attention_forward returned"),
    ({"cache": (CACHE.output, CACHE.lse)}, InvalidInputError, "cache is a tuple", "what attention_forward returned"),
]


@pytest.mark.parametrize(("changes", "kind", "words", "hint"), BACKWARD, ids=[label(*row) for row in BACKWARD])
def test_backward(changes, kind, words, hint):
    refused(rv.attention_backward, {"grad_output": GRAD, "cache": CACHE, **changes}, kind, words, hint)


def test_ragged_gradients():
    given = {"grad_output": [[1.0], [1.0, 2.0]], "cache": CACHE}
    refused(rv.attention_backward, given, InvalidInputError, "grad_output cannot become an array", "equal length")


def test_a_float64_gradient_of_a_float32_call():
    cache = rv.attention_forward(*(x.astype(np.float32) for x in arguments().values()))
    refused(
        rv.attention_backward, {"grad_output": GRAD, "cache": cache}, InvalidInputError, "the call had float32", "cast"
    )


# Weights


ROWS = [
    (5, "rows go from 5 to 5", "there are 5 queries"),
    (-6, "rows go from -6 to -6", "there are 5 queries"),
    ([0, 7, -9], "rows go from -9 to 7", "there are 5 queries"),
    (1.0, "rows is 1.0", "a slice, a whole number, or a list"),
    ("0", "rows is '0'", "a slice, a whole number, or a list"),
    ([[0, 1]], r"rows is \[\[0, 1\]\]", "a slice, a whole number, or a list"),
    ([0.0], r"rows is \[0.0\]", "a slice, a whole number, or a list"),
    ([True, False, True, False, True], "rows is", r"a slice, a whole number, or a list.*numpy.flatnonzero\(rows\)"),
    (2**64 - 1, f"rows go from {2**64 - 1} to {2**64 - 1}", "there are 5 queries"),
    (Tensor(), "rows cannot become an array: it requires grad", "detach"),
    ((slice(0, 1), 2), "rows is", "a slice, a whole number, or a list"),
    (slice(0, 2.5), "rows is", "a slice, a whole number, or a list"),
    ([[0], [1, 2]], "rows cannot become an array", "rows of equal length"),
]


@pytest.mark.parametrize(("rows", "words", "hint"), ROWS, ids=[label(*row) for row in ROWS])
def test_rows(rows, words, hint):
    refused(CACHE.weights, {"rows": rows}, InvalidInputError, words, hint)


def test_weights_that_do_not_fit_into_memory():
    """3 million queries and keys, each seeing only itself: the output is small, the weights are 36 terabytes."""
    L = 3_000_000
    x = np.broadcast_to(np.ones((1, 1), np.float32), (L, 1))
    cache = rv.attention_forward(x, x, x, masks.Window(0, 0))
    assert (cache.output == 1).all()
    with pytest.raises(rv.OutOfMemoryError) as caught:
        cache.weights()
    error = caught.value
    assert error.size == 4 * L * L and isinstance(error, MemoryError)
    assert str(error).startswith(f"Out of memory: failed to allocate {4 * L * L} bytes")
    assert error.shapes["weights shape"] == (L, L) and "rows=" in error.hint
    assert cache.weights(rows=L - 1).shape == (1, L)


# merge

OUT, LSE = np.ones((2, 5, 7)), np.ones((2, 5))
MERGES = [
    ([], [], InvalidInputError, "0 outputs and 0 lses", "at least one"),
    ([OUT, OUT], [LSE], InvalidInputError, "2 outputs and 1 lses", "one lse for each output"),
    ([OUT, OUT[:, :4]], [LSE, LSE[:, :4]], DimensionMismatchError, r"outputs\[1\].shape: \(2, 4, 7\)", "Lq, Dv"),
    ([OUT, OUT[0]], [LSE, LSE[0]], DimensionMismatchError, r"expected \(2, 5, 7\), got \(5, 7\)", "Lq, Dv"),
    ([OUT, OUT], [LSE, LSE[..., None]], DimensionMismatchError, r"lses\[1\].shape   : \(2, 5, 1\)", "Lq, Dv"),
    ([OUT, OUT], [LSE[0], LSE], DimensionMismatchError, r"lses\[0\].shape   : \(5,\)", "Lq, Dv"),
    (
        [OUT],
        [LSE[0]],
        DimensionMismatchError,
        r"expected \(2, 5\), got \(5,\)\n(.*\n)*  expected        : \(2, 5\)",
        None,
    ),
    ([LSE], [OUT], DimensionMismatchError, r"expected \(2, 5\), got \(2, 5, 7\)", "outputs and lses swapped"),
    ([OUT[0, 0]], [LSE[0, 0]], InvalidInputError, r"outputs\[0\] has 1 axes", "Lq, Dv"),
    ([OUT, OUT.astype(np.float32)], [LSE, LSE], InvalidInputError, "one kind", "cast them"),
    ([OUT.astype(int)], [LSE], InvalidInputError, r"outputs\[0\].dtype: int64", "cast them"),
    ([OUT], [LSE.astype(complex)], InvalidInputError, r"lses\[0\].dtype   : complex128", "cast them"),
    ([OUT.astype(object)], [LSE], InvalidInputError, r"outputs\[0\].dtype: object", "cast them"),
]


@pytest.mark.parametrize(("outputs", "lses", "kind", "words", "hint"), MERGES, ids=[row[3] for row in MERGES])
def test_merge(outputs, lses, kind, words, hint):
    refused(rv.merge, {"outputs": outputs, "lses": lses}, kind, words, hint)


def test_merge_of_what_is_no_sequence_of_arrays():
    refused(rv.merge, {"outputs": [[[1.0], [1.0, 2.0]]], "lses": [LSE]}, InvalidInputError, "outputs", None)
    for outputs in (1.0, np.array(1.0), None):
        refused(rv.merge, {"outputs": outputs, "lses": [LSE]}, InvalidInputError, "sequences of arrays", None)
