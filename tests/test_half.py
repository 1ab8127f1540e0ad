"""Dense attention of float16 and bfloat16 arrays, forward and backward, against float64 on the same numbers."""

import subprocess
import sys

import half_reference
import ml_dtypes
import numpy as np
import pytest
import reference
from cases import make

import ruvector_numba as rv
from ruvector_numba import masks

BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
kinds = pytest.mark.parametrize("kind", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
FEW, MANY = (5, 70, 16, 24), (41, 70, 16, 24)  # (Lq, Lk, D, Dv)
SIZES = [
    (1, 1, 1, 1),
    (7, 7, 3, 5),
    (97, 97, 40, 33),
    (113, 203, 16, 24),
    (130, 1, 8, 8),
    (9, 300, 65, 1),
    (203, 113, 64, 8),
    (3, 203, 40, 33),  # few queries
    (5, 9000, 16, 8),  # parts of the keys, merged
    (12, 4500, 8, 8),
]
MASKS = ["window", "lengths", "bool", "float", "softcap", "slopes", "dropout"]


def eps_of(kind):
    return float(ml_dtypes.finfo(kind).eps)


def close(name, got, exact, naive, kind):
    """At most twice the error of the plain formula in the same precision, and a rounding of the largest magnitude: on a
    few numbers that formula may be lucky. The logsumexp is float32's, and never rounded.
    """
    assert got.dtype == (np.float32 if name == "lse" else kind), f"{name} is {got.dtype}"
    got, naive = (np.asarray(x, np.float64) for x in (got, naive))
    assert got.shape == exact.shape, name
    absent = np.isneginf(exact)
    np.testing.assert_array_equal(np.isneginf(got), absent, err_msg=name)
    got, exact, naive = (np.where(absent, 0, x) for x in (got, exact, naive))
    magnitude = np.abs(exact).max(initial=1.0 if name == "lse" else 0.0)
    slack = 8 * np.finfo(np.float32).eps if name == "lse" else eps_of(kind)
    error, allowed = np.abs(got - exact).max(initial=0), 2 * np.abs(naive - exact).max(initial=0) + slack * magnitude
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}, magnitude {magnitude:.3e}"


def conforms(case, kind):
    """Every result of a case."""
    grad_lse = case.grad_lse.astype(np.float32)
    exact = reference.attention(*case.inputs, **case.spec)
    naive = half_reference.plain(kind, *case.inputs, **case.spec)
    cache = case.forward()
    close("output", cache.output, exact[0], naive[0], kind)
    close("lse", cache.lse, exact[1], naive[1], kind)
    dropped = "keep" in case.spec
    if not dropped:
        close("weights", cache.weights(), exact[2], naive[2], kind)
    got = rv.attention_backward(case.grad_output, cache, grad_lse)
    exact = reference.gradients(case.grad_output, *case.inputs, grad_lse=grad_lse, **case.spec)
    naive = half_reference.plain_gradients(kind, case.grad_output, *case.inputs, grad_lse=grad_lse, **case.spec)
    for name in ("query", "key", "value"):
        close(f"gradient of {name}", getattr(got, name), exact[name], naive[name], kind)
    if case.bias is not None:
        shape = case.bias.shape
        close("gradient of bias", got.bias, *(reference.reduce_to(x["scores"], shape) for x in (exact, naive)), kind)
    return cache


@kinds
@pytest.mark.parametrize("names", ["", "causal", "all intervals"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_masks_that_are_intervals(size, names, kind):
    names = ["causal", "window", "lengths", "segments"] if names == "all intervals" else names.split()
    conforms(make(names, size, kind), kind)


@pytest.mark.parametrize("names", [[], ["bool"], ["float"], ["softcap", "slopes"], ["dropout"], MASKS], ids=str)
@pytest.mark.parametrize("size", [FEW, MANY], ids=str)
def test_masks_and_terms(size, names):
    """With all terms given, so that all share their kernels; of float16 each part of them is tested elsewhere."""
    conforms(make(names, size, BFLOAT16, fill=True), BFLOAT16)


@kinds
@pytest.mark.parametrize("size", [(8, 130, 16, 24), (97, 130, 64, 64)], ids=str)
def test_at_most_twice_the_error_of_the_plain_formula(size, kind):
    """Without slack: the mean, over a dozen draws, of the largest error."""
    errors = {}
    for seed in range(12):
        case = make(["window"], size, kind, seed=seed)
        cache = case.forward()
        g = rv.attention_backward(case.grad_output, cache)
        exact = [*reference.attention(*case.inputs, **case.spec)[:2]]
        naive = [*half_reference.plain(kind, *case.inputs, **case.spec)[:2]]
        for found, gradients in (
            (exact, reference.gradients(case.grad_output, *case.inputs, **case.spec)),
            (naive, half_reference.plain_gradients(kind, case.grad_output, *case.inputs, **case.spec)),
        ):
            found += [gradients[name] for name in ("query", "key", "value")]
        got = cache.output, cache.lse, g.query, g.key, g.value
        for name, ours, plain, right in zip(("output", "lse", "dq", "dk", "dv"), got, naive, exact, strict=True):
            sums = errors.setdefault(name, np.zeros(2))
            sums += [np.abs(np.asarray(x, np.float64) - right).max() for x in (ours, plain)]
    ratios = {name: round(float(ours / plain), 2) for name, (ours, plain) in errors.items()}
    assert max(ratios.values()) <= 2, ratios


@kinds
def test_the_only_key_that_counts_may_come_late(kind):
    """Its weight is 1 and the gradient of its score 0, whatever weight the first key had before: the difference of two
    numbers of which neither may be off by a rounding of the type."""
    rng = np.random.default_rng(0)
    query, key = np.zeros((1, 32, 16)), np.full((1, 512, 16), -40.0)
    query[..., 0], key[0, 0, 0], key[0, 400, 0] = 1, 0, 9.6
    key[..., 1:] = rng.standard_normal((1, 512, 15))
    arrays = [rng.standard_normal((1, 32, 16)), query, key, rng.standard_normal(key.shape)]
    grad, *inputs = (x.astype(kind) for x in arrays)
    got = rv.attention_backward(grad, rv.attention_forward(*inputs, scale=1.0))
    exact = reference.gradients(grad, *inputs, scale=1.0)
    naive = half_reference.plain_gradients(kind, grad, *inputs, scale=1.0)
    for name in ("query", "key", "value"):
        close(f"gradient of {name}", getattr(got, name), exact[name], naive[name], kind)


# What half precision can hold, and cannot


@kinds
def test_numbers_at_the_edges_of_the_range(kind):
    """Scores far beyond float16, the largest numbers as values, and subnormal ones, exactly."""
    largest, least = float(ml_dtypes.finfo(kind).max), float(ml_dtypes.finfo(kind).smallest_subnormal)
    largest /= 1 if kind == FLOAT16 else 2**20  # those of bfloat16 are float32's own: sums of them must have room
    q = np.full((2, 20, 16), 200.0).astype(kind)
    k = np.full((2, 30, 16), 200.0).astype(kind)
    v = np.full((2, 30, 8), largest).astype(kind)
    cache = rv.attention_forward(q, k, v)
    np.testing.assert_allclose(cache.lse, 16 * 200.0**2 / 4 + np.log(30), rtol=1e-6)
    np.testing.assert_array_equal(cache.output.astype(np.float64), largest)
    assert np.isfinite(cache.weights().astype(np.float32)).all()
    tiny = np.full((2, 30, 8), 4 * least).astype(kind)
    got = rv.scaled_dot_product_attention(q, k, tiny).astype(np.float64)
    np.testing.assert_allclose(got, 4 * least, rtol=0, atol=1.2e-38)  # products of bfloat16 may flush them to 0
    if kind == FLOAT16:  # they are normal numbers in float32
        np.testing.assert_allclose(got, 4 * least, rtol=1e-6)
        low = np.full((1, 20, 16), 8 * least).astype(kind)
        lse = rv.attention_forward(low, k[:1], v[:1]).lse
        np.testing.assert_allclose(lse, 16 * 200 * 8 * least / 4 + np.log(30), rtol=1e-6)


@pytest.mark.parametrize("Lq", [3, 30])
def test_a_gradient_beyond_the_range_of_float16_is_infinite(Lq):
    """And no other changes."""
    x, y, do = np.ones((1, Lq, 8), FLOAT16), np.ones((1, 2, 8), FLOAT16), np.full((1, Lq, 8), 60000, FLOAT16)
    g = rv.attention_backward(do, rv.attention_forward(x, y, y))
    assert np.isinf(g.value).all() and not g.query.any() and not g.key.any()


@kinds
@pytest.mark.parametrize("Lq", [4, 40])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_hidden_numbers_reach_nothing_and_seen_ones_their_rows(poison, Lq, kind):
    case = make(["lengths"], (Lq, 70, 16, 24), kind)
    clean = case.forward()
    grad = np.ones(clean.output.shape, kind)
    before = rv.attention_backward(grad, clean)
    case.key[1, :, 60:], case.value[1, :, 60:] = poison, poison
    poisoned = case.forward()
    after = rv.attention_backward(grad, poisoned)
    pairs = [(clean.output, poisoned.output), (clean.lse, poisoned.lse)]
    pairs += [(getattr(before, name), getattr(after, name)) for name in ("query", "key", "value")]
    for x, y in pairs:  # what hides them sums in another order
        x, y = x.astype(np.float32), y.astype(np.float32)
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))  # -inf for a query that sees nothing
        x, y = (np.where(np.isfinite(x), x, 0) for x in (x, y))
        np.testing.assert_allclose(y, x, rtol=0, atol=eps_of(kind) * np.abs(x).max())
    case.value[0, :, 3] = poison
    seen = case.forward().output.astype(np.float32)
    assert not np.isfinite(seen[0, :, 0]).any() and np.isfinite(seen[1]).all()


# One rounding, and the same bits always


@kinds
@pytest.mark.parametrize("size", [FEW, MANY, (5, 9000, 16, 8)], ids=str)
def test_the_same_bits_on_any_threads_and_in_any_company(size, kind):
    case = make(["causal"], size, kind)

    def results(**more):
        cache = case.forward(**more)
        g = rv.attention_backward(case.grad_output, cache)
        return cache.output, cache.lse, g.query, g.key, g.value

    with rv.threads(1):
        alone = results()
    for x, y in zip(alone, results(), strict=True):
        assert x.tobytes() == y.tobytes()
    q, k, v = (x[1:] for x in case.inputs)
    part = rv.scaled_dot_product_attention(q, k, v, **case.call)
    assert part.tobytes() == alone[0][1:].tobytes()


@kinds
def test_strides_out_and_read_only_arrays(kind):
    case = make([], (41, 70, 16, 24), kind)
    wanted = case.forward().output

    def turned(x):
        y = np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
        y.flags.writeable = False
        return y

    out = np.empty((2, 41, 4, 24), kind).swapaxes(1, 2)
    q, k, v = map(turned, case.inputs)
    assert rv.scaled_dot_product_attention(q, k, v, enable_gqa=True, out=out) is out
    np.testing.assert_array_equal(out.astype(np.float32), wanted.astype(np.float32))
    by_column = [np.asfortranarray(x) for x in case.inputs]
    got = rv.scaled_dot_product_attention(*by_column, enable_gqa=True)
    np.testing.assert_allclose(got.astype(np.float64), wanted.astype(np.float64), atol=4 * eps_of(kind))


def test_bits_of_bfloat16_in_uint16_arrays():
    case = make(["float", "causal"], MANY, BFLOAT16, bias_shape=(41, 70))
    bits = [x.view(np.uint16) for x in case.inputs]
    mask = case.bias.view(np.uint16)
    known = rv.attention_forward(*case.inputs, case.bias, is_causal=True, enable_gqa=True)
    cache = rv.attention_forward(*bits, mask, is_causal=True, enable_gqa=True, dtype="bfloat16")
    assert cache.output.dtype == np.uint16 and cache.lse.dtype == np.float32
    np.testing.assert_array_equal(cache.output, known.output.view(np.uint16))
    np.testing.assert_array_equal(cache.weights(rows=3), known.weights(rows=3).view(np.uint16))
    got = rv.attention_backward(case.grad_output.view(np.uint16), cache)
    expected = rv.attention_backward(case.grad_output, known)
    for name in ("query", "key", "value", "bias"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name).view(np.uint16), err_msg=name)
    out = np.empty((2, 4, 41, 24), np.uint16)
    assert (
        rv.scaled_dot_product_attention(*bits, mask, is_causal=True, enable_gqa=True, dtype="bfloat16", out=out) is out
    )
    np.testing.assert_array_equal(out, cache.output)


def test_a_float_mask_may_be_wider_than_the_inputs():
    case = make(["float"], MANY, BFLOAT16)
    same = case.forward()
    wider = rv.attention_forward(*case.inputs, case.bias.astype(np.float32), enable_gqa=True)
    assert same.output.tobytes() == wider.output.tobytes()
    assert rv.attention_backward(case.grad_output, wider).bias.dtype == np.float32


def test_products_of_bfloat16_from_float32_arrays():
    case = make(["window"], (97, 130, 64, 64), np.float32)
    rounded = [x.astype(BFLOAT16) for x in case.inputs]
    cache = case.forward(precision="bfloat16")
    assert cache.output.dtype == cache.weights(rows=0).dtype == np.float32
    exact = reference.attention(*rounded, **case.spec)
    np.testing.assert_allclose(cache.output, exact[0], rtol=0, atol=4e-3 * np.abs(exact[0]).max())
    np.testing.assert_allclose(cache.lse, exact[1], rtol=1e-5)
    got = rv.attention_backward(case.grad_output, cache)
    exact = reference.gradients(case.grad_output, *case.inputs, **case.spec)
    for name in ("query", "key", "value"):
        x = getattr(got, name)
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, exact[name], rtol=0, atol=1e-2 * np.abs(exact[name]).max(), err_msg=name)
    off = case.forward()
    assert np.abs(off.output - cache.output).max() > 1e-4  # it is off unless asked for


@kinds
def test_merge(kind):
    q, k, v = (x.astype(kind) for x in make([], (9, 100, 16, 8), np.float32, lead=(2, 3), Hk=3).inputs)
    whole = rv.attention_forward(q, k, v)
    parts = [rv.attention_forward(q, k[..., piece, :], v[..., piece, :]) for piece in (slice(40), slice(40, 100))]
    output, lse = rv.merge([p.output for p in parts], [p.lse for p in parts])
    assert output.dtype == kind and lse.dtype == np.float32
    np.testing.assert_allclose(lse, whole.lse, rtol=1e-6)
    got, wanted = output.astype(np.float64), whole.output.astype(np.float64)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2 * eps_of(kind) * np.abs(wanted).max())


@kinds
@pytest.mark.parametrize("shape", [(0, 5, 8), (5, 0, 8), (5, 3, 0)], ids=str)
def test_nothing(shape, kind):
    Lq, Lk, D = shape
    q, k, v = np.ones((2, Lq, D), kind), np.ones((2, Lk, D), kind), np.ones((2, Lk, 4), kind)
    cache = rv.attention_forward(q, k, v)
    g = rv.attention_backward(np.ones_like(cache.output), cache)
    assert cache.output.dtype == g.key.dtype == kind and cache.output.shape == (2, Lq, 4) and g.key.shape == k.shape
    np.testing.assert_array_equal(cache.output.astype(np.float32), float(Lk > 0))


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": FLOAT16}, "differ in dtype"),
        ({"query": np.uint16, "key": np.uint16, "value": np.uint16}, 'pass dtype="bfloat16" if query'),
        ({"query": ">f2"}, "dtype >f2"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"key": np.float32, "dtype": "bfloat16"}, "key has dtype float32, and dtype is 'bfloat16'"),
        ({"precision": "bfloat16"}, "the arrays are bfloat16"),
        ({"query": np.float64, "key": np.float64, "value": np.float64, "precision": "bfloat16"}, "arrays are float64"),
        ({"query": np.float32, "key": np.float32, "value": np.float32, "precision": "half"}, "precision is 'half'"),
        ({"attn_mask": np.zeros((5, 7), np.float64)}, "it is float64 and they are bfloat16"),
        ({"attn_mask": np.zeros((5, 7), np.uint16)}, "dtype uint16; a mask is bool"),
        ({"out": np.zeros((5, 4), np.float32)}, "out has another dtype"),
    ],
    ids=str,
)
def test_what_is_refused(change, words):
    arrays = {"query": np.ones((5, 8)), "key": np.ones((7, 8)), "value": np.ones((7, 4))}
    given = {name: x.astype(change.get(name, BFLOAT16)) for name, x in arrays.items()}
    with pytest.raises(rv.AttentionError) as caught:
        rv.scaled_dot_product_attention(**given, **{n: x for n, x in change.items() if n not in arrays})
    assert words in str(caught.value)


def test_a_gradient_has_the_dtype_of_the_call():
    x = np.ones((5, 8), BFLOAT16)
    cache = rv.attention_forward(x, x, x)
    for wrong in (np.ones((5, 8), np.float32), np.ones((5, 8), np.uint16), np.ones((5, 8), np.float16)):
        with pytest.raises(rv.InvalidInputError, match="the call had bfloat16"):
            rv.attention_backward(wrong, cache)
    with pytest.raises(rv.InvalidInputError, match="the call had float32"):
        rv.attention_backward(x, cache, np.ones(5, BFLOAT16))


def test_ml_dtypes_is_not_imported():
    code = """
import sys, numpy as np, ruvector_numba as rv
x = np.full((5, 8), 0x3F80, np.uint16)
assert (rv.scaled_dot_product_attention(x, x, x, dtype="bfloat16") == x).all()
assert "ml_dtypes" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_masks_of_bfloat16_as_matrices():
    bias = np.array([[0, -np.inf, 1]]).astype(BFLOAT16)
    both = masks.Causal() & bias
    np.testing.assert_array_equal(both.to_dense(3, 3), np.tri(3, dtype=bool) & [True, False, True])
