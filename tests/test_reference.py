"""The reference against central differences and against what the contract says in words."""

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

NAN, INF = np.nan, np.inf


def draw(rng, H=2, Hk=None, Lq=3, Lk=4, D=3, Dv=2, lead=()):
    Hk = H if Hk is None else Hk
    shapes = (*lead, H, Lq, D), (*lead, Hk, Lk, D), (*lead, Hk, Lk, Dv)
    return [rng.standard_normal(shape) for shape in shapes]


def terms_of(kind, rng, shape):
    """One set of optional terms for scores of `shape`."""
    *_, H, Lq, Lk = shape
    visible = rng.random(shape) < 0.7
    visible[..., 0, :] = False  # an empty row
    bias = rng.standard_normal((1, Lq, Lk))
    bias[..., 1, 0] = -INF
    terms = {
        "plain": {},
        "scale": {"scale": -0.3},
        "visible": {"visible": visible},
        "bias": {"bias": bias},
        "softcap": {"softcap": 0.8},
        "slopes": {"slopes": rng.random(H), "offset": Lk - Lq},
        "keep": {"keep": np.where(rng.random(shape) < 0.5, 0.0, 2.0)},
    }
    if kind == "everything":
        return {name: value for one in terms.values() for name, value in one.items()}
    return terms[kind]


KINDS = ["plain", "scale", "visible", "bias", "softcap", "slopes", "keep", "everything"]


@pytest.mark.parametrize("sizes", [{}, {"H": 4, "Hk": 2}, {"H": 2, "Hk": 1, "lead": (2,)}, {"Lq": 5, "Lk": 1, "D": 1}])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_central_differences(kind, sizes):
    rng = np.random.default_rng(len(kind))
    q, k, v = draw(rng, **sizes)
    terms = terms_of(kind, rng, (*q.shape[:-1], k.shape[-2]))
    output, lse, _ = reference.attention(q, k, v, **terms)
    do, dlse = rng.standard_normal(output.shape), rng.standard_normal(lse.shape)

    def loss(q=q, k=k, v=v, **other):
        output, lse, _ = reference.attention(q, k, v, **{**terms, **other})
        return (do * output).sum() + (dlse * np.where(np.isneginf(lse), 0, lse)).sum()

    got = reference.gradients(do, q, k, v, grad_lse=dlse, **terms)
    close = {"rtol": 1e-6, "atol": 1e-7}
    np.testing.assert_allclose(got["query"], reference.central_differences(lambda x: loss(q=x), q), **close)
    np.testing.assert_allclose(got["key"], reference.central_differences(lambda x: loss(k=x), k), **close)
    np.testing.assert_allclose(got["value"], reference.central_differences(lambda x: loss(v=x), v), **close)
    if "bias" in terms:
        hidden = np.isneginf(terms["bias"])
        measured = reference.central_differences(
            lambda x: loss(bias=np.where(hidden, -INF, x)), np.where(hidden, 0, terms["bias"])
        )
        np.testing.assert_allclose(reference.reduce_to(got["scores"], terms["bias"].shape), measured, **close)


def test_equals_the_formula_of_the_textbook():
    q, k, v = draw(np.random.default_rng(0), H=1)
    output, lse, weights = reference.attention(q, k, v)
    e = np.exp(q[0] @ k[0].T / np.sqrt(3))
    np.testing.assert_allclose(weights[0], e / e.sum(1, keepdims=True), rtol=1e-14)
    np.testing.assert_allclose(lse[0], np.log(e.sum(1)), rtol=1e-13)
    np.testing.assert_allclose(output[0], e @ v[0] / e.sum(1, keepdims=True), rtol=1e-13)


def test_two_axes_are_one_head():
    q, k, v = draw(np.random.default_rng(1), H=1)
    for one, many in zip(
        reference.attention(q[0], k[0], v[0], slopes=0.5), reference.attention(q, k, v, slopes=[0.5]), strict=True
    ):
        np.testing.assert_array_equal(one, many[0])


def test_a_query_head_reads_the_key_head_of_its_group():
    q, k, v = draw(np.random.default_rng(2), H=6, Hk=2)
    output, _, _ = reference.attention(q, k, v)
    for h in range(6):
        alone, _, _ = reference.attention(q[h], k[h // 3], v[h // 3])
        np.testing.assert_allclose(output[h], alone, rtol=1e-14)


def test_order_of_the_terms():
    q = k = np.array([[2.0]])
    terms = {"scale": 1.5, "softcap": 3.0, "bias": [[0.25]], "slopes": 0.5, "offset": -2}
    _, lse, _ = reference.attention(q, k, np.ones((1, 1)), **terms)
    np.testing.assert_allclose(lse, [3 * np.tanh(6 / 3) + 0.25 - 0.5 * 2], rtol=1e-15)


@pytest.mark.parametrize("Lk", [0, 4])
def test_an_empty_row_is_zero(Lk):
    rng = np.random.default_rng(3)
    q, k, v = draw(rng, Lk=Lk)
    visible = np.ones((3, Lk), bool)
    visible[1] = False
    empty = [1] if Lk else [0, 1, 2]
    output, lse, weights = reference.attention(q, k, v, visible=visible)
    assert (output[:, empty] == 0).all() and (weights[:, empty] == 0).all() and np.isneginf(lse[:, empty]).all()
    grad = np.full(output.shape, NAN)
    grad[:, [i for i in range(3) if i not in empty]] = 1
    got = reference.gradients(grad, q, k, v, visible=visible, grad_lse=np.where(np.isneginf(lse), NAN, 1))
    assert (got["query"][:, empty] == 0).all() and (got["scores"][:, empty] == 0).all()
    assert all(np.isfinite(array).all() for array in got.values())


def test_no_queries():
    q, k, v = draw(np.random.default_rng(4), Lq=0)
    output, lse, weights = reference.attention(q, k, v)
    assert (output.shape, lse.shape, weights.shape) == ((2, 0, 2), (2, 0), (2, 0, 4))
    got = reference.gradients(output, q, k, v)
    assert (got["key"] == 0).all() and (got["value"] == 0).all() and got["query"].shape == q.shape


def test_very_negative_scores_are_data():
    q, k = np.array([[-1e300]]), np.ones((3, 1))
    output, lse, weights = reference.attention(q, k, np.arange(3.0)[:, None], bias=[[-1e300, -1e300, -1e300]])
    np.testing.assert_allclose(weights, np.full((1, 3), 1 / 3))
    assert output == 1 and np.isfinite(lse).all()


@pytest.mark.parametrize("by", ["visible", "bias"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_what_is_hidden_does_not_leak(poison, by):
    rng = np.random.default_rng(5)
    q, k, v = draw(rng, Lq=4, Lk=4)
    visible = np.tri(4, dtype=bool)
    term = {"visible": visible} if by == "visible" else {"bias": np.where(visible, 0.0, -INF)}
    do = rng.standard_normal((2, 4, 2))
    clean = reference.attention(q, k, v, **term)
    clean_gradients = reference.gradients(do, q, k, v, **term)
    k[:, 2] = v[:, 2] = poison  # seen by queries 2 and 3
    for dirty, wanted in zip(reference.attention(q, k, v, **term), clean, strict=True):
        np.testing.assert_allclose(dirty[:, :2], wanted[:, :2], rtol=1e-14)
    output, _, weights = reference.attention(q, k, v, **term)
    assert not np.isfinite(output[:, 2:]).any()
    assert (weights[:, ~visible] == 0).all()
    got = reference.gradients(do, q, k, v, **term)
    for name in ("query", "scores"):
        np.testing.assert_allclose(got[name][:, :2], clean_gradients[name][:, :2], rtol=1e-13, atol=1e-16)
    assert (got["scores"][:, ~visible] == 0).all()


def test_a_poisoned_query_reaches_only_the_keys_it_sees():
    rng = np.random.default_rng(6)
    q, k, v = draw(rng, Lq=4, Lk=4)
    visible = np.tri(4, dtype=bool)[::-1, ::-1]  # query i sees keys from i on
    do = rng.standard_normal((2, 4, 2))
    q[:, 2], do[:, 2] = NAN, NAN
    got = reference.gradients(do, q, k, v, visible=visible)
    for name in ("key", "value"):
        assert np.isfinite(got[name][:, :2]).all() and np.isnan(got[name][:, 2:]).all()
    assert np.isfinite(got["query"][:, [0, 1, 3]]).all() and np.isnan(got["query"][:, 2]).all()


def test_infinite_scores():
    v = np.array([[1.0], [2.0]])
    output, lse, _ = reference.attention([[1.0]], [[INF], [0.0]], v)
    assert np.isnan(output).all() and np.isnan(lse).all()  # inf - inf
    output, lse, weights = reference.attention([[1.0]], [[-INF], [0.0]], v)
    assert output == 2 and lse == 0 and (weights == [[0, 1]]).all()
    output, lse, _ = reference.attention([[1.0]], [[-INF], [-INF]], v)
    assert output == 0 and np.isneginf(lse)
    output, lse, _ = reference.attention([[1.0]], [[INF], [0.0]], v, softcap=1.0)
    assert np.isfinite(output).all() and np.isfinite(lse).all()


def test_weights_are_those_before_dropout():
    q, k, v = draw(np.random.default_rng(7))
    keep = np.array([0.0, 2.0, 2.0, 0.0])
    output, lse, weights = reference.attention(q, k, v, keep=keep)
    plain = reference.attention(q, k, v)
    np.testing.assert_array_equal(weights, plain[2])
    np.testing.assert_array_equal(lse, plain[1])
    np.testing.assert_allclose(output, (weights * keep) @ v, rtol=1e-14)


def test_naive32_stays_in_float32():
    rng = np.random.default_rng(8)
    q, k, v = (array.astype(np.float32) for array in draw(rng, Lq=20, Lk=30, D=16))
    terms = {"softcap": 5.0, "bias": rng.standard_normal((20, 30)), "slopes": [0.1, 0.2], "visible": np.tri(20, 30) > 0}
    single, exact = reference.naive32(q, k, v, **terms), reference.attention(q, k, v, **terms)
    do = single[0]
    single_gradients = reference.naive32_gradients(do, q, k, v, **terms)
    exact_gradients = reference.gradients(do, q, k, v, **terms)
    pairs = [*zip(single, exact, strict=True)] + [
        (single_gradients[name], exact_gradients[name]) for name in single_gradients
    ]
    for low, high in pairs:
        assert low.dtype == np.float32 and high.dtype == np.float64
        error = np.abs(low - high).max()
        assert 0 < error < 1e-5


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_the_order_of_keys_does_not_matter(Lq, Lk, seed):
    rng = np.random.default_rng(seed)
    q, k, v = draw(rng, Lq=Lq, Lk=Lk)
    visible, at = rng.random((2, Lq, Lk)) < 0.6, rng.permutation(Lk)
    output, lse, weights = reference.attention(q, k, v, visible=visible)
    shuffled = reference.attention(q, k[:, at], v[:, at], visible=visible[..., at])
    np.testing.assert_allclose(shuffled[0], output, atol=1e-14)
    np.testing.assert_allclose(shuffled[1], lse, atol=1e-14)
    np.testing.assert_allclose(shuffled[2], weights[..., at], atol=1e-14)
    np.testing.assert_allclose(weights.sum(-1), visible.any(-1), atol=1e-14)


def test_reduce_to():
    full = np.arange(24.0).reshape(2, 3, 4)
    for shape in [(), (4,), (1, 4), (3, 1), (2, 1, 4), (1, 1, 1), (2, 3, 4)]:
        share = np.zeros(shape)
        wanted = reference.central_differences(lambda x: (np.broadcast_to(x, full.shape) * full).sum(), share)
        np.testing.assert_allclose(reference.reduce_to(full, shape), wanted, rtol=1e-8)


def test_central_differences_of_a_cubic():
    x = np.array([[1.0, -2.0], [0.5, 3.0]])
    np.testing.assert_allclose(reference.central_differences(lambda x: (x**3).sum(), x), 3 * x**2, rtol=1e-8)
