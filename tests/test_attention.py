"""Dense attention against the plain formula in float64."""

import numpy as np
import pytest

import ruvector_numba as rv

SIZES = [(1, 1, 1, 1), (7, 7, 3, 5), (97, 97, 40, 33), (113, 203, 64, 64), (128, 128, 64, 64), (65, 333, 59, 16)]


def formula(query, key, value, is_causal=False, scale=None):
    """softmax(q k^T * scale) v in float64; what a query may not see is left out, a query that sees nothing gives 0."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[-3] // key.shape[-3] if query.ndim > 2 else 1
    if group > 1:
        key, value = np.repeat(key, group, -3), np.repeat(value, group, -3)
    s = query @ np.swapaxes(key, -1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        s = np.where(np.tri(*s.shape[-2:], dtype=bool), s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ value


def inputs(Lq, Lk, D, Dv, dtype, lead=(2, 3), heads=None):
    rng = np.random.default_rng(Lq + Lk + D)
    key_lead = lead if heads is None else (*lead[:-1], heads)
    shapes = (*lead, Lq, D), (*key_lead, Lk, D), (*key_lead, Lk, Dv)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_formula(size, is_causal, dtype):
    q, k, v = inputs(*size, dtype)
    got = rv.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    assert got.dtype == dtype
    tolerance = 5e-6 if dtype == np.float32 else 1e-13
    np.testing.assert_allclose(got, formula(q, k, v, is_causal), rtol=0, atol=tolerance)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_any_number_of_leading_axes(lead):
    q, k, v = inputs(20, 30, 8, 8, np.float64, lead)
    np.testing.assert_allclose(rv.scaled_dot_product_attention(q, k, v), formula(q, k, v), atol=1e-13)


def test_strided_broadcast_and_read_only_inputs():
    q, k, v = inputs(50, 70, 24, 24, np.float64)
    want = formula(q, k, v, True)
    strided = [np.asarray(np.swapaxes(np.swapaxes(x, -1, -2).copy(), -1, -2)) for x in (q, k, v)]
    strided[1].flags.writeable = False
    np.testing.assert_allclose(rv.scaled_dot_product_attention(*strided, is_causal=True), want, atol=1e-13)
    backwards = [x[..., ::-1, :].copy()[..., ::-1, :] for x in (q, k, v)]
    np.testing.assert_allclose(rv.scaled_dot_product_attention(*backwards, is_causal=True), want, atol=1e-13)
    shared = np.broadcast_to(k[:1, :1], k.shape)
    np.testing.assert_allclose(rv.scaled_dot_product_attention(q, shared, v), formula(q, shared, v), atol=1e-13)


def test_grouped_heads():
    q, k, v = inputs(33, 40, 16, 16, np.float64, (2, 6), heads=2)
    got = rv.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.3)
    np.testing.assert_allclose(got, formula(q, k, v, scale=0.3), atol=1e-13)
    with pytest.raises(rv.DimensionMismatchError, match="enable_gqa"):
        rv.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_hidden_keys_and_values_cannot_leak(poison):
    q, k, v = inputs(90, 90, 16, 16, np.float32)
    clean = rv.scaled_dot_product_attention(q, k, v, is_causal=True)
    for at in (1, 17, 64, 89):
        bad_k, bad_v = k.copy(), v.copy()
        bad_k[..., at, :], bad_v[..., at, :] = np.nan, poison
        for args in ((q, bad_k, v), (q, k, bad_v), (q, bad_k, bad_v)):
            got = rv.scaled_dot_product_attention(*args, is_causal=True)
            np.testing.assert_allclose(got[..., :at, :], clean[..., :at, :], rtol=1e-5, atol=1e-6)
            assert not np.isfinite(got[..., at:, :]).any()


def test_scores_of_any_size_and_late_maxima():
    q, k, v = inputs(64, 300, 16, 16, np.float64)
    for factor in (1e-3, 30, 1e4):
        rising = k * np.linspace(0, factor, 300)[:, None]
        np.testing.assert_allclose(rv.scaled_dot_product_attention(q, rising, v), formula(q, rising, v), atol=1e-9)


def test_bits_do_not_depend_on_threads_or_batch():
    q, k, v = inputs(150, 260, 64, 64, np.float32, (3, 4))
    want = rv.scaled_dot_product_attention(q, k, v, is_causal=True)
    with rv.threads(1):
        assert np.array_equal(want, rv.scaled_dot_product_attention(q, k, v, is_causal=True))
    alone = rv.scaled_dot_product_attention(q[1:2, 2:3], k[1:2, 2:3], v[1:2, 2:3], is_causal=True)
    assert np.array_equal(want[1:2, 2:3], alone)


def test_nothing_to_attend_to():
    q, k, v = inputs(3, 0, 4, 5, np.float32)
    assert not rv.scaled_dot_product_attention(q, k, v).any()
    q, k, v = inputs(0, 3, 4, 5, np.float32)
    assert rv.scaled_dot_product_attention(q, k, v).shape == (2, 3, 0, 5)
    q, k, v = inputs(3, 4, 0, 5, np.float64)
    np.testing.assert_allclose(
        rv.scaled_dot_product_attention(q, k, v), np.broadcast_to(v.mean(-2, keepdims=True), (2, 3, 3, 5))
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q.astype(int), k, v), "query has dtype"),
        (lambda q, k, v: (q.astype(complex), k, v), "query has dtype"),
        (lambda q, k, v: (q[0, 0, 0], k, v), "query has 1 axes"),
        (lambda q, k, v: (q.astype(np.float32), k, v), "cast them to one"),
        (lambda q, k, v: (q[..., :2], k, v), "expected 2, got 4"),
        (lambda q, k, v: (q, k[..., :3, :], v), "one value for each key"),
        (lambda q, k, v: (q[:1], k, v), "batch axes must be equal"),
    ],
)
def test_errors_say_what_is_wrong(change, words):
    with pytest.raises(rv.AttentionError, match=words):
        rv.scaled_dot_product_attention(*change(*inputs(5, 6, 4, 4, np.float64)))


def formula_with_terms(q, k, v, visible, bias, softcap, slopes, offset=0):
    """As `formula`, with every term; a hidden slot is selected away, a row that sees nothing is 0."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    s = q @ np.swapaxes(k, -1, -2) * q.shape[-1] ** -0.5
    if softcap is not None:
        s = softcap * np.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    if slopes is not None:
        i, j = np.arange(s.shape[-2])[:, None], np.arange(s.shape[-1])
        s = s - slopes[:, None, None] * abs(i + offset - j)
    s = np.where(np.broadcast_to(visible, s.shape), s, -np.inf)
    top = s.max(-1, keepdims=True)
    p = np.exp(s - np.where(np.isfinite(top), top, 0))
    total = p.sum(-1, keepdims=True)
    return np.divide(p, total, out=np.zeros_like(p), where=total > 0) @ v


@pytest.mark.parametrize("terms", [0, 1, 2, 3, 4, 5, 6, 7])
def test_terms_and_masks(terms):
    dtype = (np.float32, np.float64)[terms.bit_count() % 2]  # each set of terms is compiled anew, 3 s
    q, k, v = inputs(75, 150, 16, 24, dtype)
    rng = np.random.default_rng(terms)
    softcap = 1.5 if terms & 1 else None
    slopes = np.array([0.02, 0.1, 0.5]) if terms & 2 else None
    bias = rng.standard_normal((3, 1, 150)).astype(dtype) if terms & 4 else None
    allowed = rng.random((2, 1, 75, 150)) < 0.3
    allowed[:, :, 5] = False
    window = rv.masks.Window(40, 3) & rv.masks.Lengths(queries=[70, 75], keys=[150, 90])
    visible = window.to_dense(75, 150)
    visible = (visible if visible.ndim == 4 else visible[:, None]) & allowed
    mask = window & allowed if bias is None else window & allowed & bias
    got = rv.scaled_dot_product_attention(q, k, v, mask, softcap=softcap, alibi_slopes=slopes)
    want = formula_with_terms(q, k, v, visible, bias, softcap, slopes)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 if dtype == np.float32 else 1e-12)
    assert not got[:, :, 5].any()
    # what is hidden from everybody may be anything
    k, v = k.copy(), v.copy()
    k[1, :, 95:], v[1, :, 95:] = np.nan, np.inf
    again = rv.scaled_dot_product_attention(q, k, v, mask, softcap=softcap, alibi_slopes=slopes)
    np.testing.assert_allclose(again, want, rtol=0, atol=1e-5 if dtype == np.float32 else 1e-12)


def test_finite_values_however_negative_are_data():
    q, k, v = inputs(9, 12, 4, 4, np.float32)
    lowest = np.full((9, 12), np.finfo(np.float32).min)
    want = np.broadcast_to(v.mean(-2, keepdims=True), (2, 3, 9, 4))
    np.testing.assert_allclose(rv.scaled_dot_product_attention(q, k, v, lowest), want, atol=1e-6)
    assert not rv.scaled_dot_product_attention(q, k, v, np.full((9, 12), -np.inf, np.float32)).any()


def test_integer_masks_are_refused_with_a_hint():
    q, k, v = inputs(5, 6, 4, 4, np.float64)
    with pytest.raises(rv.InvalidMaskError, match="bool"):
        rv.scaled_dot_product_attention(q, k, v, np.ones((5, 6), int))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("left", [0, 1, 3, 5, 12, 37])
def test_windows_that_begin_anywhere(left, dtype):
    """A chunk that ends in the middle of a tile repeats its last key there: it must count once."""
    for right in (0, 1, 6, 20, None):
        q, k, v = inputs(133, 150, 16, 16, dtype, (1, 1))
        window = rv.masks.Window(left, right)
        want = formula_with_terms(q, k, v, window.to_dense(133, 150), None, None, None)
        got = rv.scaled_dot_product_attention(q, k, v, window)
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-6 if dtype == np.float32 else 1e-13)
