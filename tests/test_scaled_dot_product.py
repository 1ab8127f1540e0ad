"""The plan's scaled dot-product attention on (B, L, d_model): its own tests, its defects mended, its bad inputs."""

import copy
import pickle

import numpy as np
import pytest
import reference
from cases import close, keep_matrix

import ruvector_numba as rv

DTYPES = [np.float64, np.float32]


def layer(d_model=16, num_heads=1, **settings):
    return rv.ScaledDotProductAttention(rv.AttentionConfig(d_model=d_model, num_heads=num_heads, **settings))


def draw(Lq=9, Lk=13, d=16, Dv=16, B=2, dtype=np.float64, seed=0):
    rng = np.random.default_rng([Lq, Lk, seed])
    return [rng.standard_normal((B, *shape)).astype(dtype) for shape in ((Lq, d), (Lk, d), (Lk, Dv))]


class TestThePlansOwnTests:
    def test_scaled_dot_product_basic(self):
        ones = np.ones((2, 10, 64), np.float32)
        output, weights = layer(64).forward(ones, ones, ones)
        assert output.shape == (2, 10, 64) and weights.shape == (2, 10, 10)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)

    def test_causal_masking(self):
        ones = np.ones((1, 5, 64), np.float32)
        _, weights = layer(64, causal=True).forward(ones, ones, ones)
        assert not weights[0][np.triu_indices(5, 1)].any()


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [(9, 13), (13, 9), (1, 20), (3, 200), (97, 97)])
def test_forward_is_the_formula(size, causal, eps, dtype):
    """softmax with eps in its denominator, causal for any Lq and Lk; few queries take a kernel of their own."""
    q, k, v = draw(*size, Dv=5, dtype=dtype)
    output, weights = layer(causal=causal, eps=eps).forward(q, k, v)
    terms = {"visible": np.tri(*size, dtype=bool) if causal else None, "eps": eps}
    exact, _, p = reference.attention(q, k, v, **terms)
    naive, _, naive_p = reference.naive32(q, k, v, **terms) if dtype == np.float32 else (None,) * 3
    close("output", output, exact, naive)
    close("weights", weights, p, naive_p, slack=16)


@pytest.mark.core
@pytest.mark.parametrize("Lq", [1, 30])
def test_eps_of_keys_that_come_in_parts(Lq):
    """More keys than one task takes: eps is added once, not in every part."""
    q, k, v = draw(Lq, 9000)
    exact, lse, _ = reference.attention(q, k, v, eps=300.0)
    output, cache = layer(eps=300.0, max_seq_len=None).forward_cached(q, k, v, training=False)
    close("output", output, exact)
    close("lse", cache.lse, lse)


def gradients_by_differences(attention, arrays, mask, do):
    def loss(i):
        def f(x):
            changed = [x if n == i else a for n, a in enumerate(arrays)]
            return float((attention.forward(*changed, mask)[0] * do).sum())

        return f

    return [reference.central_differences(loss(i), x) for i, x in enumerate(arrays)]


@pytest.mark.core
@pytest.mark.parametrize("eps", [1e-6, 0.7])
@pytest.mark.parametrize("Lq", [3, 10])
def test_gradients_are_those_of_the_formula_eps_included(Lq, eps):
    attention, arrays = layer(4, eps=eps, causal=True), draw(Lq, 7, 4, 3)
    hides = np.random.default_rng(3).random((2, Lq, 7)) < 0.3
    hides[:, 1] = True
    do = np.random.default_rng(4).standard_normal((2, Lq, 3))
    g = attention.backward(do, attention.forward_cached(*arrays, hides, training=False)[1])
    for got, wanted in zip((g.query, g.key, g.value), gradients_by_differences(attention, arrays, hides, do)):
        np.testing.assert_allclose(got, wanted, atol=2e-9)
    assert not g.query[:, 1].any()
    assert g.parameters == {} and g.query_weights is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_steps_one_by_one_give_the_same_eps_included(dtype):
    steps, (q, k, v) = rv.functional, draw(20, 30, dtype=dtype)
    attention = layer(eps=0.4, causal=True)
    output, cache = attention.forward_cached(q, k, v, training=False)
    weights = steps.softmax(steps.apply_mask(steps.attention_scores(q, k), is_causal=True), eps=0.4)
    d_weights, d_value = steps.weighted_sum_backward(output, weights, v)
    d_scores = steps.softmax_backward(d_weights, weights, eps=0.4)
    d_query, d_key = steps.attention_scores_backward(d_scores, q, k)
    g = attention.backward(output, cache)
    tolerance = 1e-12 if dtype == np.float64 else 3e-6
    for one, other in (
        (steps.weighted_sum(weights, v), output), (weights, cache.weights()), (d_query, g.query), (d_key, g.key),
        (d_value, g.value),
    ):  # fmt: skip
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


def test_dropout_is_in_training_only_and_backward_replays_it():
    q, k, v = draw()
    attention = layer(dropout=0.4)
    plain, _ = attention.forward(q, k, v)
    np.testing.assert_array_equal(attention.forward_cached(q, k, v, training=False)[0], plain)
    output, cache = attention.forward_cached(q, k, v, seed=11)
    keep = keep_matrix((2, 1), 9, 13, 0.4, 11)[:, 0]
    close("output", output, reference.attention(q, k, v, keep=keep, eps=1e-6)[0])
    close("weights", cache.weights(), reference.attention(q, k, v, eps=1e-6)[2])
    g, exact = attention.backward(output, cache), reference.gradients(output, q, k, v, keep=keep)
    np.testing.assert_allclose(g.value, exact["value"], rtol=1e-5, atol=1e-5)  # the reference's gradients have no eps
    again = attention.forward_cached(q, k, v)[0]
    assert (again != attention.forward_cached(q, k, v)[0]).any()


class TestMasks:
    """In a layer, a mask hides."""

    hides = np.random.default_rng(1).random((2, 9, 13)) < 0.4

    @pytest.mark.parametrize("mask", [hides, hides.astype(np.float32), hides.astype(np.int8), 0.51 * hides])
    def test_what_is_true_or_above_one_half_hides(self, mask):
        q, k, v = draw()
        output, weights = layer().forward(q, k, v, mask)
        assert not weights[self.hides].any()
        close("output", output, reference.attention(q, k, v, visible=~self.hides, eps=1e-6)[0])
        assert (layer().forward(q, k, v, 0.5 * mask)[1] > 0).all()

    @pytest.mark.parametrize("shape", [(9, 13), (1, 13), (9, 1), (1, 9, 13), (2, 1, 13)])
    def test_they_broadcast(self, shape):
        hides = np.random.default_rng(2).random(shape) < 0.4
        q, k, v = draw()
        close("output", layer().forward(q, k, v, hides)[0], reference.attention(q, k, v, visible=~hides, eps=1e-6)[0])

    def test_the_objects_attend_and_a_float_array_among_them_is_added(self):
        q, k, v = draw()
        bias = np.random.default_rng(2).standard_normal((2, 1, 9, 13))
        mask = rv.masks.Window(left=3) & rv.masks.Lengths(keys=[13, 6]) & bias
        output, cache = layer().forward_cached(q, k, v, mask, training=False)
        visible = (np.arange(9)[:, None] - 3 <= np.arange(13)) & (np.arange(13) < np.array([13, 6])[:, None, None])
        close("output", output, reference.attention(q, k, v, visible=visible, bias=bias[:, 0], eps=1e-6)[0])
        assert layer().backward(output, cache).bias.shape == bias.shape

    def test_a_row_that_sees_nothing_is_zero(self):
        q, k, v = draw()
        output, weights = layer().forward(q, k, v, np.arange(9)[:, None] == 4)
        assert not output[:, 4].any() and not weights[:, 4].any() and np.isfinite(output).all()

    @pytest.mark.parametrize(
        ("mask", "words"),
        [
            (np.zeros((13, 9), bool), "Mask shape (13, 9) doesn't match scores shape (9, 13)"),
            (np.zeros((3, 9, 13), bool), "doesn't match scores shape (2, 9, 13)"),
            (np.zeros(13, bool), "doesn't match scores shape"),
            (np.zeros((2, 1, 9, 13), bool), "doesn't match scores shape"),
            (np.full((9, 13), -np.inf), "rv.masks.All([mask])"),
            (np.full((9, 13), np.nan), "negative numbers or NaN"),
            (np.zeros((9, 13), complex), "dtype complex128"),
            ([["a"]], "dtype <U1"),
        ],
    )
    def test_bad_masks(self, mask, words):
        with pytest.raises(rv.InvalidMaskError) as caught:
            layer().forward(*draw(), mask)
        assert words in str(caught.value)


class TestCaches:
    def test_one_made_by_hand_of_the_plans_five_fields(self):
        q, k, v = draw()
        attention, hides = layer(), np.tri(9, 13, dtype=bool)
        output, weights = attention.forward(q, k, v, hides)
        by_hand = rv.AttentionCache(query=q, key=k, value=v, attention_weights=weights, mask=hides)
        g = attention.backward(output, by_hand)
        same = attention.backward(output, attention.forward_cached(q, k, v, hides, training=False)[1])
        for name in ("query", "key", "value"):
            np.testing.assert_array_equal(getattr(g, name), getattr(same, name))
        np.testing.assert_array_equal(by_hand.attention_weights, weights)
        np.testing.assert_array_equal(by_hand.weights(rows=[3]), weights[:, [3]])

    def test_what_it_remembers(self):
        q, k, v = draw()
        output, cache = layer().forward_cached(q, k, v, training=False)
        assert cache.query is not None and cache.output is output and cache.mask is None
        np.testing.assert_array_equal(cache.attention_weights, layer().forward(q, k, v)[1])
        assert repr(cache) == "AttentionCache(query (2, 9, 16), key (2, 13, 16), value (2, 13, 16))"

    def test_one_of_a_function_or_another_layer_is_refused(self):
        q, k, v = draw()
        for cache, words in (
            (rv.attention_forward(q, k, v), "that of another kind of attention"),
            ((q, k, v), "cache is a tuple"),
        ):
            with pytest.raises(rv.InvalidInputError) as caught:
                layer().backward(q, cache)
            assert words in str(caught.value)
        with pytest.raises(rv.InvalidInputError, match="of a layer"):
            rv.attention_backward(q, layer().forward_cached(q, k, v)[1])
        with pytest.raises(rv.InvalidInputError, match="built by hand"):
            rv.attention_backward(q, rv.AttentionCache(q, k, v))
        with pytest.raises(rv.InvalidInputError, match="without weights"):
            rv.AttentionCache(q, k, v).weights()


def test_the_scale_is_that_of_a_head():
    assert layer(512, 8).config.get_scale() == 0.125
    q, k, v = draw()
    close("output", layer(16, 4).forward(q, k, v)[0], reference.attention(q, k, v, scale=0.5, eps=1e-6)[0])
    close("output", layer(scale=0.1).forward(q, k, v)[0], reference.attention(q, k, v, scale=0.1, eps=1e-6)[0])


def test_it_can_be_called_and_keys_and_values_have_defaults():
    attention = rv.ScaledDotProductAttention(rv.AttentionConfig(8, 2, dropout=0.0))
    x, y = np.random.default_rng(0).standard_normal((2, 2, 5, 8))
    np.testing.assert_array_equal(attention(x, y, y), attention.forward(x, y, y)[0])
    np.testing.assert_array_equal(attention(x), attention(x, x, x))
    np.testing.assert_array_equal(attention.forward(x, y)[1], attention.forward(x, y, y)[1])
    g = attention.backward(x, attention.forward_cached(x, y)[1])
    np.testing.assert_array_equal(g.value, attention.backward(x, attention.forward_cached(x, y, y)[1]).value)


def test_it_has_no_parameters():
    attention = layer()
    assert attention.parameter_count() == 0 and attention.get_parameters().size == 0
    attention.set_parameters([])
    with pytest.raises(rv.InvalidConfigError, match="Expected 0 parameters, got 3"):
        attention.set_parameters([1.0, 2.0, 3.0])
    attention.update_parameters(rv.AttentionGradients(), 0.1)
    assert attention.regularization_loss(0.1) == 0


def test_it_says_what_it_is():
    attention = layer()
    assert isinstance(attention, rv.Attention) and isinstance(attention, rv.TrainableAttention)
    assert (attention.name(), attention.d_model(), attention.supports_masking()) == (
        "ScaledDotProductAttention", 16, True,
    )  # fmt: skip
    assert "d_model=16" in repr(attention)


def test_copies_and_pickles():
    q, k, v = draw()
    attention = layer()
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention)), copy.copy(attention)):
        np.testing.assert_array_equal(other.forward(q, k, v)[0], attention.forward(q, k, v)[0])


@pytest.mark.parametrize(
    ("kind", "words", "change"),
    [
        (rv.InvalidInputError, "Batch sizes must match across Q, K, V", lambda q, k, v: (q[:1], k, v)),
        (rv.InvalidInputError, "Key and value sequence lengths must match", lambda q, k, v: (q, k, v[:, :5])),
        (rv.DimensionMismatchError, "expected 16, got 15", lambda q, k, v: (q[..., :15], k, v)),
        (rv.DimensionMismatchError, "expected 16, got 15", lambda q, k, v: (q, k[..., :15], v)),
        (rv.InvalidInputError, "query has 2 axes", lambda q, k, v: (q[0], k, v)),
        (rv.InvalidInputError, "value has 4 axes", lambda q, k, v: (q, k, v[None])),
        (rv.InvalidInputError, "differ in dtype", lambda q, k, v: (q, k.astype(np.float16), v)),
        (rv.InvalidInputError, "differ in dtype", lambda q, k, v: (q, k, v.astype(np.float32))),
        (rv.InvalidInputError, "key has 50 positions, max_seq_len is 40", lambda q, k, v: (q, *draw(1, 50)[1:])),
        (rv.InvalidInputError, "cannot become an array", lambda q, k, v: ([[[1.0], [1.0, 2.0]]], k, v)),
    ],
)
def test_bad_inputs(kind, words, change):
    attention = layer(max_seq_len=40)
    for call in (attention.forward, attention.forward_cached):
        with pytest.raises(kind) as caught:
            call(*change(*draw()))
        assert words in str(caught.value)


def test_bad_gradients_and_settings():
    q, k, v = draw()
    output, cache = layer().forward_cached(q, k, v)
    with pytest.raises(rv.DimensionMismatchError, match="grad_output"):
        layer().backward(output[:, :3], cache)
    with pytest.raises(rv.InvalidInputError, match="seed"):
        layer().forward_cached(q, k, v, seed=-1)
    with pytest.raises(rv.InvalidConfigError, match="d_model"):
        layer(d_model=0)
    with pytest.raises(rv.InvalidConfigError, match="seed is 'x'"):
        rv.ScaledDotProductAttention(rv.AttentionConfig(), seed="x")
    with pytest.raises(rv.InvalidConfigError, match="config is a dict"):
        rv.ScaledDotProductAttention({"d_model": 8})


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (0, 0, 0)])
def test_nothing_to_attend_to_or_by(shape):
    B, Lq, Lk = shape
    q, k, v = draw(Lq, Lk, B=B)
    output, cache = layer().forward_cached(q, k, v)
    g = layer().backward(np.ones_like(output), cache)
    assert output.shape == q.shape and not output.any() and not any(x.any() for x in (g.query, g.key, g.value))
    assert layer().forward(q, k, v)[1].shape == shape
