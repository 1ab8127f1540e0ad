"""The float32 contract where rounding matters most: at most twice the error of the plain formula, against float64."""

import numpy as np
import pytest
import reference
from cases import TERMS, close, draw, make

import ruvector_numba as rv
from ruvector_numba import masks

pytestmark = pytest.mark.core

EPS = np.finfo(np.float32).eps


def test_values_of_one_sign_and_a_flat_softmax():
    """A sum of 1347 numbers that do not cancel: long chains of additions lose here (once 4 times the plain formula)."""
    q, k, _ = draw(1347, 1347, 16, 16, np.float32, lead=(1, 1))
    q, k = q / 16, k / 16
    one_hot = np.eye(16, dtype=np.float32)[np.random.default_rng(0).integers(0, 16, 1347)][None, None]
    do = np.abs(draw(1347, 1347, 16, 16, np.float32, lead=(1, 1), seed=1)[2])
    cache = rv.attention_forward(q, k, one_hot)
    exact, naive = reference.attention(q, k, one_hot), reference.naive32(q, k, one_hot)
    close("output", cache.output, exact[0], naive[0], slack=0)
    close("lse", cache.lse, exact[1], naive[1], slack=1)
    few = rv.attention_forward(q[..., :8, :], k, one_hot)
    close("output of few queries", few.output, exact[0][..., :8, :], naive[0][..., :8, :], slack=1)
    got = rv.attention_backward(do, cache)
    exact, naive = reference.gradients(do, q, k, one_hot), reference.naive32_gradients(do, q, k, one_hot)
    for name in ("query", "key", "value"):
        close(f"gradient of {name}", getattr(got, name), exact[name], naive[name], slack=4)


@pytest.mark.parametrize("natural", [False, True], ids=["base 2", "natural"])
@pytest.mark.parametrize("Lq", [8, 40])
def test_a_row_with_one_key_is_as_good_as_its_score(Lq, natural):
    """Weight 1, output the value, lse the score, no gradient of the score: the plain formula has these to the last bit
    but for the score itself. What a running maximum or a shift adds would show here.
    """
    q, k, v = draw(40, 40, 8, 8, np.float32)
    q = q[..., :Lq, :]
    eye = np.eye(Lq, 40, dtype=bool)
    # all terms where scores are in natural units, since these kernels are compiled anyway
    terms = make([], (Lq, 40, 8, 8), np.float32, fill=True).call if natural else {"attn_mask": None}
    terms = {**terms, "enable_gqa": False, "attn_mask": masks.All([terms["attn_mask"], masks.Window(0, 0)])}
    cache = rv.attention_forward(q, k, v, **terms)
    exact = reference.attention(q, k, v, visible=eye, softcap=50.0 if natural else None)[1]
    np.testing.assert_allclose(cache.output, v[..., :Lq, :], rtol=2 * EPS)
    np.testing.assert_allclose(cache.lse, exact, rtol=0, atol=4 * EPS * np.abs(exact).max())
    # few queries have another order of sums the second time, and so another rounding of the score
    slack = 4 * (max(1, np.abs(exact).max()) if Lq == 8 else 1)
    np.testing.assert_allclose(cache.weights()[..., eye], 1, rtol=0, atol=slack * EPS)


@pytest.mark.parametrize("factor", [30, 300])
@pytest.mark.parametrize("size", [(4, 200, 64, 64), (40, 200, 64, 64), (12, 4200, 64, 16)], ids=str)
def test_large_scores(size, factor):
    """Of 240 and 2400: scores that a second pass rounds otherwise than the first did would not fit its lse.

    The contract without slack, over many draws: few weights are not 0 or 1, and in one draw either may be lucky.
    """
    errors = np.zeros((2, 2))  # ours and the plain formula's, of weights and of the values' gradient
    for seed in range(60):
        case = make([], size, np.float32, seed=seed)
        q = case.query * np.float32(factor)
        cache = rv.attention_forward(q, case.key, case.value, **case.call)
        weights = cache.weights()
        np.testing.assert_allclose(weights.sum(-1, dtype=np.float64), 1, rtol=0, atol=16 * EPS)
        inputs = q, case.key, case.value
        exact, naive = reference.attention(*inputs)[2], reference.naive32(*inputs)[2]
        errors[0] += [np.abs(x - exact).max() for x in (weights, naive)]
        got = rv.attention_backward(case.grad_output, cache).value
        exact, naive = (
            f(case.grad_output, *inputs)["value"] for f in (reference.gradients, reference.naive32_gradients)
        )
        errors[1] += [np.abs(x - exact).max() for x in (got, naive)]
    assert (errors[:, 0] <= 2 * errors[:, 1]).all(), errors


RESULTS = ("output", "lse", "weights", "query", "key", "value")


@pytest.mark.parametrize("names", ["", "window", "bool", "float", "softcap", "slopes", "dropout", "everything"])
@pytest.mark.parametrize("size", [(97, 130, 64, 64), (8, 130, 16, 24)], ids=str)
def test_at_most_twice_the_error_of_the_plain_formula(size, names):
    """The contract without slack: the mean, over two dozen draws, of the largest error."""
    fill = names not in ("", "window")
    names = ["window", "bool", "float", *TERMS] if names == "everything" else names.split()
    errors = {name: np.zeros(2) for name in RESULTS}
    for seed in range(24):
        case = make(names, size, np.float32, seed=seed, fill=fill)
        exact = [*reference.attention(*case.inputs, **case.spec)]
        naive = [*reference.naive32(*case.inputs, **case.spec)]
        cache = case.forward()
        g = rv.attention_backward(case.grad_output, cache, case.grad_lse)
        for results, gradients in ((exact, reference.gradients), (naive, reference.naive32_gradients)):
            found = gradients(case.grad_output, *case.inputs, grad_lse=case.grad_lse, **case.spec)
            results += [found[name] for name in RESULTS[3:]]
        got = cache.output, cache.lse, cache.weights(), g.query, g.key, g.value
        for name, ours, plain, wanted in zip(RESULTS, got, naive, exact, strict=True):
            seen = np.isfinite(wanted)
            errors[name] += [np.abs(x[seen] - wanted[seen]).max() for x in (ours, plain)]
    ratios = {name: round(float(ours / plain), 2) for name, (ours, plain) in errors.items()}
    # a score is one chain of D multiply-adds, a library's product several: it shows in the largest of a few weights
    assert ratios.pop("weights") <= 4, ratios
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize("factor", [0.01, 1])
@pytest.mark.parametrize("size", [(24, 128, 1024, 600), (80, 20_000, 16, 16)], ids=str)
def test_long_sums_lose_no_more_than_the_plain_formula(size, factor):
    """Over many channels, of many weights, and under a sum that is large: root mean squares, which no luck decides."""
    errors = {name: np.zeros(2) for name in RESULTS}
    for seed in range(3):
        case = make([], size, np.float32, lead=(1, 1), Hk=1, seed=seed)
        inputs = case.query * np.float32(factor), case.key, case.value
        cache = rv.attention_forward(*inputs)
        g = rv.attention_backward(case.grad_output, cache)
        got = cache.output, cache.lse, cache.weights(), g.query, g.key, g.value
        exact, naive = [*reference.attention(*inputs)], [*reference.naive32(*inputs)]
        for results, gradients in ((exact, reference.gradients), (naive, reference.naive32_gradients)):
            found = gradients(case.grad_output, *inputs)
            results += [found[name] for name in RESULTS[3:]]
        for name, ours, plain, wanted in zip(RESULTS, got, naive, exact, strict=True):
            errors[name] += [np.square(x - wanted, dtype=np.float64).mean() for x in (ours, plain)]
    ratios = {name: round(float(np.sqrt(ours / plain)), 2) for name, (ours, plain) in errors.items()}
    assert max(ratios.values()) <= 1.6, ratios
