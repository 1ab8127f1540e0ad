"""Layers, decoding steps and ONNX's operator on float16 and bfloat16 arrays."""

import ml_dtypes
import numpy as np
import pytest

import ruvector_numba as rv

BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
kinds = pytest.mark.parametrize("kind", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])


def near(got, wanted, kind):
    """Of the type, and within two roundings of the largest magnitude."""
    assert got.dtype == kind
    wanted = np.asarray(wanted, np.float64)
    atol = 2 * float(ml_dtypes.finfo(kind).eps) * np.abs(wanted).max()
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=0, atol=atol)


def draw(shape, kind, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(kind)


@kinds
@pytest.mark.parametrize("made", [rv.MultiHeadAttention, rv.ScaledDotProductAttention])
def test_layers_compute_in_float32_and_round(made, kind):
    layer = made(rv.AttentionConfig(d_model=16, num_heads=2, dropout=0.0), seed=0)
    x, mask = draw((2, 9, 16), kind), np.triu(np.ones((9, 9)), 1)
    wide = x.astype(np.float32)
    near(layer(x, mask=mask) if made is rv.MultiHeadAttention else layer.forward(x, x, x, mask)[0],
         layer.forward(wide, wide, wide, mask)[0], kind)  # fmt: skip
    output, cache = layer.forward_cached(x, x, x, mask)
    expected, wide_cache = layer.forward_cached(wide, wide, wide, mask)
    near(output, expected, kind)
    near(cache.weights(rows=[2]), wide_cache.weights(rows=[2]), kind)
    assert cache.lse is None or cache.lse.dtype == np.float32
    grad = draw((2, 9, 16), kind, 1)
    got, wanted = layer.backward(grad, cache), layer.backward(grad.astype(np.float32), wide_cache)
    for name in ("query", "key", "value"):
        near(getattr(got, name), getattr(wanted, name), kind)
    for name, gradient in got.parameters.items():
        np.testing.assert_array_equal(gradient, wanted.parameters[name])
    with pytest.raises(rv.InvalidInputError, match="the call had"):
        layer.backward(grad.astype(np.float32), cache)


@kinds
def test_decoding_step_by_step_over_a_cache_of_halves(kind):
    layer = rv.MultiHeadAttention(rv.AttentionConfig(d_model=32, num_heads=2, dropout=0.0, causal=True), seed=0)
    x = draw((2, 12, 32), kind)
    cache = layer.new_cache(2, 40, dtype=kind)
    assert cache.keys.dtype == cache.values.dtype == kind
    outputs = [layer.step(x[:, :5], cache), *(layer.step(x[:, i : i + 1], cache) for i in range(5, 12))]
    whole = layer(x.astype(np.float32))
    got = np.concatenate(outputs, axis=1)
    assert got.dtype == kind and cache.length == 12
    eps = float(ml_dtypes.finfo(kind).eps)  # keys, values and queries are rounded, and the weights go with them
    np.testing.assert_allclose(got.astype(np.float64), whole, rtol=0, atol=4 * eps * np.abs(whole).max())
    with pytest.raises(rv.InvalidInputError, match="x is float32, the cache is"):
        layer.step(x[:, :1].astype(np.float32), cache)


@kinds
def test_the_operator_of_onnx_reads_them_as_they_lie(kind):
    q, k, v = draw((2, 4, 30, 16), kind), draw((2, 2, 50, 16), kind, 1), draw((2, 2, 50, 8), kind, 2)
    bias = draw((30, 50), kind, 3)
    got = rv.interop.onnx.attention(q, k, v, bias)
    near(got.Y, rv.scaled_dot_product_attention(*(x.astype(np.float32) for x in (q, k, v)), bias.astype(np.float32),
                                                enable_gqa=True), kind)  # fmt: skip
    direct = rv.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)
    assert got.Y.tobytes() == direct.tobytes()


@kinds
@pytest.mark.parametrize("made", [rv.MultiHeadAttention, rv.ScaledDotProductAttention])
@pytest.mark.parametrize("rule", [None, rv.masks.Causal()], ids=["alone", "and a rule"])
def test_a_float_mask_of_a_layer_may_be_of_half_precision(made, rule, kind):
    layer = made(rv.AttentionConfig(d_model=16, num_heads=2, dropout=0.0), seed=0)
    x, bias = draw((2, 9, 16), kind), draw((9, 9), kind, 1)
    results = []
    for array in (bias, bias.astype(np.float32)):
        output, cache = layer.forward_cached(x, x, x, rv.masks.All([array, rule]))
        results.append((output, layer.backward(x, cache)))
    (output, g), (expected, wanted) = results
    np.testing.assert_array_equal(output.view(np.uint16), expected.view(np.uint16))
    assert g.query.dtype == g.bias.dtype == kind and wanted.bias.dtype == np.float32
    near(g.bias, wanted.bias, kind)


@kinds
def test_numbers_that_hide_may_be_of_half_precision(kind):
    layer = rv.MultiHeadAttention(rv.AttentionConfig(d_model=16, num_heads=2, dropout=0.0), seed=0)
    x, mask, padding = draw((2, 9, 16), kind), np.triu(np.ones((9, 9)), 1), np.repeat([[0.0, 1.0]], [6, 3], axis=1)
    padding = np.tile(padding, (2, 1))
    wanted = layer(x, mask=mask, key_padding_mask=padding)
    got = layer(x, mask=mask.astype(kind), key_padding_mask=padding.astype(kind))
    np.testing.assert_array_equal(got.view(np.uint16), wanted.view(np.uint16))


@kinds
@pytest.mark.parametrize("made", [rv.MultiHeadAttention, rv.ScaledDotProductAttention])
def test_mixed_types_are_called_so(made, kind):
    layer = made(rv.AttentionConfig(d_model=16, num_heads=2))
    x = draw((2, 9, 16), kind)
    for mixed in ((x, x.astype(np.float32), x), (x.astype(np.float64), x, x), (x.tolist(), x, x)):
        with pytest.raises(rv.InvalidInputError, match="query, key and value differ in dtype"):
            layer.forward(*mixed)
