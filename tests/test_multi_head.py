"""Multi-head attention: the formula, its gradients, masks, bad inputs."""

import copy

import numpy as np
import pytest
import reference
from cases import keep_matrix
from multi_head_cases import DTYPES, agrees, draw, layer

import ruvector_numba as rv


class TestThePlansOwnTests:
    def test_multi_head_attention_basic(self):
        attention = rv.MultiHeadAttention(rv.AttentionConfig(d_model=512, num_heads=8))
        x = np.full((2, 10, 512), 0.1, np.float32)
        output, weights = attention.forward(x, x, x)
        assert output.shape == (2, 10, 512) and weights.shape == (2, 10, 10)

    def test_parameter_count(self):
        config = rv.AttentionConfig(d_model=512, num_heads=8, use_bias=True)
        assert rv.MultiHeadAttention(config).parameter_count() == 4 * 512 * 512 + 4 * 512

    def test_builder_pattern_invalid_config_dimension_mismatch(self):
        assert rv.AttentionBuilder().d_model(256).num_heads(4).dropout(0.1).build_multi_head().d_model() == 256
        for d_model in (0, 255):
            with pytest.raises(rv.InvalidConfigError):
                rv.AttentionBuilder().d_model(d_model).num_heads(8).build_multi_head()


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((9, 13), {}),
        ((13, 9), {"causal": True}),
        ((1, 20), {"use_bias": False}),
        ((130, 97), {"kdim": 10, "vdim": 31}),
        ((5, 5), {"d_model": 96, "num_heads": 8, "eps": 0.3, "scale": 0.2}),
        ((2, 9000), {"eps": 30.0, "max_seq_len": None}),  # parts of the keys, by the kernel for few queries
        ((9, 9000), {"eps": 30.0, "max_seq_len": None}),  # and by the other
    ],
)
def test_forward_is_the_formula(size, settings, dtype):
    attention = layer(dtype=dtype, **settings)
    q, k, v = draw(*size, settings.get("d_model", 24), settings.get("kdim"), settings.get("vdim"), dtype=dtype)
    config = attention.config
    terms = {"scale": config.get_scale(), "eps": config.eps}
    terms["visible"] = np.tri(*size, dtype=bool) if config.causal else None
    exact, weights = reference.multi_head(q, k, v, attention.parameters, config.num_heads, **terms)
    output, averaged = attention.forward(q, k, v)
    assert output.dtype == averaged.dtype == dtype
    agrees(output, exact, dtype)
    agrees(averaged, weights.mean(axis=1), dtype)
    agrees(attention.head_weights(q, k, v), weights, dtype)
    agrees(attention.head_weights(q, k, v, rows=[0]), weights[:, :, [0]], dtype)
    np.testing.assert_array_equal(attention(q, k, v), output)
    cached, cache = attention.forward_cached(q, k, v, training=False)
    np.testing.assert_array_equal(cached, output)
    np.testing.assert_array_equal(cache.attention_weights, averaged)


def test_self_attention_and_shared_values_can_be_called_briefly():
    attention, (q, k, _) = layer(), draw()
    np.testing.assert_array_equal(attention(q), attention(q, q, q))
    np.testing.assert_array_equal(attention(q, k), attention(q, k, k))
    np.testing.assert_array_equal(attention.forward(q)[1], attention.forward(q, q, q)[1])
    np.testing.assert_array_equal(attention.head_weights(q, k), attention.head_weights(q, k, k))
    g = attention.backward(q, attention.forward_cached(q, training=False)[1])
    np.testing.assert_array_equal(
        g.key, attention.backward(q, attention.forward_cached(q, q, q, training=False)[1]).key
    )


def test_bert_can_be_built_and_has_the_right_scale():
    attention = rv.MultiHeadAttention(rv.AttentionConfig(d_model=768, num_heads=12), 0)
    assert attention.config.get_scale() == 1 / 8
    x = np.random.default_rng(0).standard_normal((1, 4, 768))
    exact, _ = reference.multi_head(x, x, x, attention.parameters, 12, eps=1e-6)
    agrees(attention(x), exact, np.float64)


# --- gradients --------------------------------------------------------------------------------------------------------
@pytest.mark.core
@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({}, {}),
        ({"causal": True, "use_bias": False, "eps": 0.5}, {}),
        ({"kdim": 3, "vdim": 7, "dropout": 0.3}, {"seed": 4}),
        ({}, {"key_padding_mask": np.arange(6) >= np.array([[6], [2]])}),
        ({}, {"mask": np.random.default_rng(1).random((2, 2, 5, 6)) < 0.4}),
    ],
)
def test_all_gradients_are_central_differences(settings, terms):
    attention = layer(4, 2, **settings)
    arrays = draw(5, 6, 4, settings.get("kdim"), settings.get("vdim"))
    do = np.random.default_rng(4).standard_normal((2, 5, 4))

    def run(parameters, q, k, v):
        attention.set_parameters(parameters)
        return attention.forward_cached(q, k, v, training="seed" in terms, **terms)

    start = attention.get_parameters()
    g = attention.backward(do, run(start, *arrays)[1])
    given = [start, *arrays]
    wanted = [
        reference.central_differences(
            lambda x, i=i: float((run(*(x if n == i else a for n, a in enumerate(given)))[0] * do).sum()), given[i]
        )
        for i in range(4)
    ]
    assert list(g.parameters) == list(attention.parameters)
    flat = np.concatenate([x.ravel() for x in g.parameters.values()])
    for got, exact in zip((flat, g.query, g.key, g.value), wanted):
        np.testing.assert_allclose(got, exact, atol=5e-9)


def test_the_plans_eight_fields_have_the_shapes_of_the_parameters():
    attention = layer(kdim=5, vdim=6)
    q, k, v = draw(kdim=5, vdim=6)
    g = attention.backward(q, attention.forward_cached(q, k, v)[1])
    assert [x.shape for x in g.parameters.values()] == list(attention.parameters.shapes.values())
    assert g.query_weights is g.parameters["w_q"] and g.output_bias is g.parameters["b_o"] and g.bias is None
    unbiased = layer(use_bias=False)
    q, k, v = draw()
    assert unbiased.backward(q, unbiased.forward_cached(q, k, v)[1]).key_bias is None


def test_dropout_drops_the_weights_of_the_seed_and_is_replayed():
    attention, (q, k, v) = layer(dropout=0.4), draw()
    output, cache = attention.forward_cached(q, k, v, seed=11)
    keep = keep_matrix((2, 3), 9, 13, 0.4, 11)
    exact, weights = reference.multi_head(q, k, v, attention.parameters, 3, keep=keep, eps=1e-6)
    agrees(output, exact, np.float64)
    agrees(cache.weights(), weights.mean(axis=1), np.float64)
    first, again = (attention.backward(output, cache) for _ in range(2))
    np.testing.assert_array_equal(first.key_weights, again.key_weights)
    drawn = [layer(dropout=0.4).forward_cached(q, k, v)[0] for _ in range(2)]
    np.testing.assert_array_equal(*drawn)  # the layer's own seed
    assert (attention.forward_cached(q, k, v)[0] != attention.forward_cached(q, k, v)[0]).any()


def test_a_cache_is_answered_by_what_it_was_computed_with():
    attention, (q, k, v) = layer(), draw()
    output, cache = attention.forward_cached(q, k, v, training=False)
    before = attention.backward(output, cache)
    attention.update_parameters(before, 0.1)
    for late in (attention.backward(output, cache), copy.deepcopy(attention).backward(output, cache)):
        np.testing.assert_array_equal(late.value_weights, before.value_weights)
        np.testing.assert_array_equal(late.query, before.query)


def test_a_cache_made_by_hand():
    attention, (q, k, v) = layer(), draw()
    hides = np.random.default_rng(1).random((2, 9, 13)) < 0.3
    output, weights = attention.forward(q, k, v, hides)
    g = attention.backward(output, rv.AttentionCache(q, k, v, weights, hides))
    same = attention.backward(output, attention.forward_cached(q, k, v, hides, training=False)[1])
    for name in ("query_weights", "key_bias", "value"):
        np.testing.assert_array_equal(getattr(g, name), getattr(same, name))


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("kind", [None, "matrix", "object"])
def test_a_cache_is_rebuilt_with_its_padding(kind, scattered):
    attention, (q, k, v) = layer(dropout=0.0), draw()
    mask = {"matrix": np.tri(9, 13) == 0, "object": rv.masks.Window(7, 7), None: None}[kind]
    padding = np.arange(13) >= np.array([[12], [7]])
    if scattered:
        padding = padding[:, ::-1] | padding
    output, cache = attention.forward_cached(q, k, v, mask, key_padding_mask=padding)
    wanted = attention.backward(output, cache)
    g = attention.backward(output, rv.AttentionCache(cache.query, cache.key, cache.value, mask=cache.mask))
    for name in ("query_weights", "key_bias", "query", "key", "value"):
        np.testing.assert_array_equal(getattr(g, name), getattr(wanted, name))


# --- masks ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(9, 13), (2, 9, 13), (2, 1, 13), (2, 3, 9, 13), (2, 1, 1, 13), (1, 3, 9, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_hide(shape, padded):
    attention, (q, k, v) = layer(), draw()
    hides = np.random.default_rng(2).random(shape) < 0.4
    padding = np.arange(13) >= np.array([[13], [8]])
    visible = ~(hides[:, None] if hides.ndim == 3 else hides) & (~padding[:, None, None] if padded else True)
    exact, weights = reference.multi_head(q, k, v, attention.parameters, 3, visible=visible, eps=1e-6)
    output, averaged = attention.forward(q, k, v, hides, key_padding_mask=padding if padded else None)
    agrees(output, exact, np.float64)
    agrees(averaged, weights.mean(axis=1), np.float64)


@pytest.mark.parametrize("kind", [bool, np.float32, np.int64])
@pytest.mark.parametrize("scattered", [False, True])
def test_padding_of_any_place_and_kind(scattered, kind):
    attention, (q, k, v) = layer(), draw()
    padding = np.arange(13) >= np.array([[13], [0]])
    if scattered:
        padding = np.random.default_rng(3).random((2, 13)) < 0.5
    exact, _ = reference.multi_head(q, k, v, attention.parameters, 3, visible=~padding[:, None, None], eps=1e-6)
    output = attention(q, k, v, key_padding_mask=padding.astype(kind))
    agrees(output, exact, np.float64)
    if not scattered:
        np.testing.assert_array_equal(output[1], np.broadcast_to(attention.parameters["b_o"], (9, 24)))


@pytest.mark.core
def test_padding_may_hold_nan_forward_and_backward():
    attention, (q, k, v) = layer(), draw()
    padding = np.arange(13) >= np.array([[13], [8]])
    clean, cache = attention.forward_cached(q, k, v, training=False, key_padding_mask=padding)
    wanted = attention.backward(clean, cache)
    k[1, 8:], v[1, 8:] = np.nan, np.inf
    output, cache = attention.forward_cached(q, k, v, training=False, key_padding_mask=padding)
    np.testing.assert_array_equal(output, clean)
    g = attention.backward(output, cache)
    for name, x in {**g.parameters, "query": g.query, "key": g.key, "value": g.value}.items():
        same = wanted.parameters[name] if name in wanted.parameters else getattr(wanted, name)
        np.testing.assert_allclose(x, same, rtol=1e-12, atol=1e-13, err_msg=name)


def test_a_float_array_in_a_mask_object_is_added_and_has_a_gradient():
    attention, (q, k, v) = layer(), draw()
    bias = np.random.default_rng(2).standard_normal((3, 9, 13))
    output, cache = attention.forward_cached(q, k, v, rv.masks.All([bias]), training=False)
    exact, _ = reference.multi_head(q, k, v, attention.parameters, 3, bias=bias, eps=1e-6)
    agrees(output, exact, np.float64)
    assert attention.backward(output, cache).bias.shape == bias.shape


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"mask": np.zeros((6, 9, 13), bool)}, "Mask shape (6, 9, 13) doesn't match scores shape (2, 9, 13)"),
        ({"mask": np.zeros((2, 4, 9, 13), bool)}, "(B, heads, Lq, Lk): (2, 3, 9, 13)"),
        ({"mask": np.where(np.tri(9, 13), 0, -np.inf)}, "rv.masks.All([mask])"),
        ({"mask": rv.masks.Lengths(keys=[1, 2, 3])}, "keys"),
        ({"key_padding_mask": np.zeros(13, bool)}, "key_padding_mask has the wrong shape"),
        ({"key_padding_mask": np.zeros((13, 2), bool)}, "(B, Lk)"),
        ({"key_padding_mask": np.full((2, 13), -np.inf)}, "key_padding_mask has negative numbers"),
        ({"key_padding_mask": np.full((2, 13), -np.inf)}, "is key_padding_mask == -numpy.inf here"),
        ({"key_padding_mask": np.full((2, 13), "x")}, "dtype <U1"),
    ],
)
def test_bad_masks(masks, words):
    for call in (layer().forward, layer().forward_cached, layer(), layer().head_weights):
        with pytest.raises(rv.InvalidMaskError) as caught:
            call(*draw(), **masks)
        assert words in str(caught.value)


# --- bad inputs -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "words", "change"),
    [
        (rv.InvalidInputError, "Batch sizes must match across Q, K, V", lambda q, k, v: (q[:1], k, v)),
        (rv.InvalidInputError, "Key and value sequence lengths must match", lambda q, k, v: (q, k, v[:, :5])),
        (rv.DimensionMismatchError, "expected 24, got 23", lambda q, k, v: (q[..., :23], k, v)),
        (rv.DimensionMismatchError, "24 channels of value", lambda q, k, v: (q, k, v[..., :23])),
        (rv.InvalidInputError, "query has 2 axes", lambda q, k, v: (q[0], k, v)),
        (rv.InvalidInputError, "key has dtype int64", lambda q, k, v: (q, k.astype(np.int64), v)),
        (rv.InvalidInputError, "differ in dtype", lambda q, k, v: (q, k, v.astype(np.float32))),
        (rv.InvalidInputError, "query has 50 positions, max_seq_len is 40", lambda q, k, v: (draw(50)[0], k, v)),
    ],
)
def test_bad_inputs(kind, words, change):
    attention = layer(max_seq_len=40)
    for call in (attention.forward, attention.forward_cached, attention, attention.head_weights):
        with pytest.raises(kind) as caught:
            call(*change(*draw()))
        assert words in str(caught.value)


def test_bad_gradient_caches_and_settings():
    attention, (q, k, v) = layer(), draw()
    output, cache = attention.forward_cached(q, k, v)
    with pytest.raises(rv.DimensionMismatchError, match="grad_output"):
        attention.backward(output[0], cache)
    with pytest.raises(rv.InvalidInputError, match="grad_output has dtype float32"):
        attention.backward(output.astype(np.float32), cache)
    with pytest.raises(rv.InvalidInputError, match="another kind of attention"):
        attention.backward(output, rv.attention_forward(q, k, v))
    with pytest.raises(rv.InvalidInputError, match="not an AttentionCache"):
        attention.backward(output, None)
    with pytest.raises(rv.InvalidInputError, match="rows"):
        cache.weights(rows=[99])
    for bad, words in (
        ({"d_model": 10}, "divisible"),
        ({"kdim": 0}, "kdim is "),
        ({"vdim": 2.5}, "vdim"),
        ({"seed": "x"}, "seed"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"dropout": float("nan")}, "dropout"),
    ):
        with pytest.raises(rv.InvalidConfigError) as caught:
            layer(**bad)
        assert words in str(caught.value)
    with pytest.raises(rv.InvalidInputError, match="dtype is float16"):
        layer(dtype=np.float16, use_bias=False)


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_nothing_to_attend_to_or_by(shape):
    B, Lq, Lk = shape
    attention, (q, k, v) = layer(), draw(Lq, Lk, B=B)
    output, cache = attention.forward_cached(q, k, v)
    np.testing.assert_array_equal(output, np.broadcast_to(attention.parameters["b_o"], q.shape))
    g = attention.backward(np.ones_like(output), cache)
    np.testing.assert_array_equal(g.output_bias, np.full(24, float(B * Lq)))
    assert not any(x.any() for x in (g.query, g.key, g.value, g.query_weights, g.key_bias))
    assert attention.forward(q, k, v)[1].shape == shape
