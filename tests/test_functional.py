"""The steps of attention: each by itself, and all of them in a row against the fused path and the reference."""

import math

import numpy as np
import pytest
import reference
from cases import SECOND_PASS, close, draw, make
from test_determinism import MOST, same_bits
from test_input_errors import refused

import ruvector_numba as rv
from ruvector_numba import DimensionMismatchError, InvalidInputError, InvalidMaskError, masks
from ruvector_numba import functional as steps

core = pytest.mark.core
both = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def chain(query, key, value, grad_output, attn_mask=None, is_causal=False, scale=None, eps=0.0):
    """Forward through every step, and back."""
    seen = {"attn_mask": attn_mask, "is_causal": is_causal}
    scores = steps.attention_scores(query, key, scale)
    masked = steps.apply_mask(scores, **seen)
    weights = steps.softmax(masked, eps)
    output = steps.weighted_sum(weights, value)
    grad_weights, dv = steps.weighted_sum_backward(grad_output, weights, value)
    grad_masked = steps.softmax_backward(grad_weights, weights, eps)
    grad_scores, bias = steps.apply_mask_backward(grad_masked, **seen)
    dq, dk = steps.attention_scores_backward(grad_scores, query, key, scale)
    found = {"weights": weights, "output": output, "query": dq, "key": dk, "value": dv, "bias": bias}
    return found | {"scores": scores, "masked": masked, "grad_weights": grad_weights, "grad_scores": grad_scores}


def of_case(case):
    seen = {name: case.call[name] for name in ("attn_mask", "is_causal") if name in case.call}
    return chain(*case.inputs, case.grad_output, **seen)


def conforms(case):
    """As good as the fused path has to be."""
    got, single = of_case(case), case.query.dtype == np.float32
    given, back = (case.inputs, case.spec), ((case.grad_output, *case.inputs), case.spec)
    exact = reference.attention(*given[0], **given[1])
    naive = reference.naive32(*given[0], **given[1]) if single else (None,) * 3
    close("output", got["output"], exact[0], naive[0])
    close("weights", got["weights"], exact[2], naive[2])
    exact = reference.gradients(*back[0], **back[1])
    naive = reference.naive32_gradients(*back[0], **back[1]) if single else {}
    for name in ("query", "key", "value"):
        close(f"gradient of {name}", got[name], exact[name], naive.get(name), SECOND_PASS)
    if case.bias is None:
        assert got["bias"] is None
    else:
        low = reference.reduce_to(naive["scores"], case.bias.shape) if single else None
        close("gradient of bias", got["bias"], reference.reduce_to(exact["scores"], case.bias.shape), low, SECOND_PASS)
    assert all(x is None or x.dtype == case.query.dtype for x in got.values())
    return got


# --- all of them ---------------------------------------------------------------------------------------------------
MASKED = {
    "plain": [],
    "causal": ["causal"],
    "intervals": ["bottom_right", "window", "lengths", "segments"],
    "scattered": ["causal", "scattered"],
    "bool": ["bool"],
    "float": ["float"],
    "everything": ["causal", "lengths", "bool", "float"],
}


@core
@both
@pytest.mark.parametrize("size", [(97, 97, 16, 16), (113, 203, 40, 24), (7, 300, 3, 70), (300, 7, 65, 1)], ids=str)
@pytest.mark.parametrize("names", MASKED)
def test_the_chain_is_attention(names, size, dtype):
    conforms(make(MASKED[names], size, dtype, Hk=4))


@core
@both
@pytest.mark.parametrize("Lk", [0, 1, 7, 97])
@pytest.mark.parametrize("Lq", [0, 1, 7, 97])
def test_lengths_of_every_kind(Lq, Lk, dtype):
    conforms(make(["causal", "float"], (Lq, Lk, 8, 5), dtype, Hk=4))


@core
@both
@pytest.mark.parametrize("lead, D, Dv", [((2, 4), 0, 3), ((2, 4), 3, 0), ((0, 4), 3, 3), ((2, 0), 3, 3)])
def test_axes_of_length_0(lead, D, Dv, dtype):
    q, k, v = draw(7, 9, D, Dv, dtype, lead)
    got = chain(q, k, v, np.ones((*lead, 7, Dv), dtype), is_causal=True)
    assert got["output"].shape == (*lead, 7, Dv) and got["query"].shape == q.shape and got["key"].shape == k.shape
    exact = reference.attention(q, k, v, visible=np.tri(7, 9), scale=1 if D == 0 else None)[0]
    close("output", got["output"], exact, exact if dtype == np.float32 else None)


# kernels that other tests compile too
FUSED = [("plain", np.float32), ("intervals", np.float32), ("causal", np.float64), ("bool", np.float64)]
FUSED += [("float", np.float64)]


@pytest.mark.parametrize("names, dtype", FUSED)
def test_the_chain_is_the_fused_path(names, dtype):
    case = make(MASKED[names], (113, 203, 40, 24), dtype, Hk=4)
    got, cache = of_case(case), case.forward()
    fused = rv.attention_backward(case.grad_output, cache)
    wanted = {name: getattr(fused, name) for name in ("query", "key", "value", "bias")} | {"output": cache.output}
    if names != "float":
        wanted["weights"] = cache.weights()
    for name, w in wanted.items():
        if w is not None:
            np.testing.assert_allclose(got[name], w, rtol=0, atol=60 * np.finfo(dtype).eps * np.abs(w).max())
    assert (got["bias"] is None) == (fused.bias is None)


@both
def test_one_head_without_an_axis_for_it(dtype):
    q, k, v = draw(9, 11, 4, 5, dtype, (1, 1))
    do, bias = np.ones((1, 1, 9, 5), dtype), draw(9, 11, 11, 1, dtype, (1,))[0]
    with_axes = chain(q, k, v, do, bias, is_causal=True)
    without = chain(q[0, 0], k[0, 0], v[0, 0], do[0, 0], bias, is_causal=True)
    assert without["bias"].shape == bias.shape == (1, 9, 11) and without["output"].shape == (9, 5)
    same_bits({name: x.reshape(with_axes[name].shape) for name, x in without.items()}, with_axes)


# --- the same bits -------------------------------------------------------------------------------------------------
@core
@pytest.mark.parametrize("names", ["plain", "everything"])
def test_threads_and_company(names):
    case = make(MASKED[names], (150, 260, 40, 24), np.float32, lead=(2, 4), Hk=4)
    found = []
    for n in {1, min(2, MOST), MOST}:
        with rv.threads(n):
            found.append(of_case(case))
    for other in found[1:]:
        same_bits(other, found[0])
    seen = case.call.get("attn_mask")
    seen = None if seen is None else case.spec["visible"]
    together = chain(*case.inputs, case.grad_output, seen)
    for b, h in np.ndindex(2, 4):
        at = (slice(b, b + 1), slice(h, h + 1))
        alone = chain(*(x[at] for x in (*case.inputs, case.grad_output)), None if seen is None else seen[at])
        same_bits(alone, {name: x if x is None else x[at] for name, x in together.items()})


def views(x):
    """The same numbers, lying otherwise."""
    padded = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, x.dtype)
    padded[..., ::2] = x
    fixed = x.copy()
    fixed.setflags(write=False)
    unaligned = np.frombuffer(b"0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)
    return {
        "read-only": fixed,
        "every other": padded[..., ::2],
        "backwards": x[..., ::-1, ::-1].copy()[..., ::-1, ::-1],
        "columns first": x.swapaxes(-1, -2).copy().swapaxes(-1, -2),
        "heads inside": np.moveaxis(np.moveaxis(x, 1, 2).copy(), 2, 1),
        "unaligned": unaligned,
    }


@core
@both
@pytest.mark.parametrize("kind", list(views(np.ones((1, 1, 1, 1)))))
def test_however_arrays_lie(kind, dtype):
    case = make(MASKED["everything"], (70, 37, 20, 17), dtype, Hk=4)
    q, k, v, do = (*case.inputs, case.grad_output)
    allowed, bias = case.spec["visible"], np.broadcast_to(case.bias, (2, 4, 70, 37))
    wanted = chain(q, k, v, do, masks.All([allowed, bias]), scale=0.3)
    q, k, v, do, allowed, bias = (views(x)[kind] for x in (q, k, v, do, allowed, bias))
    same_bits(chain(q, k, v, do, masks.All([allowed, bias]), scale=0.3), wanted)
    # and the arrays between the steps
    x = {name: views(wanted[name])[kind] for name in ("scores", "masked", "weights", "grad_weights", "grad_scores")}
    same_bits(
        {
            "masked": steps.apply_mask(x["scores"], masks.All([allowed, bias])),
            "weights": steps.softmax(x["masked"]),
            "output": steps.weighted_sum(x["weights"], v),
            "value": steps.weighted_sum_backward(do, x["weights"], v)[1],
            "grad_scores": steps.softmax_backward(x["grad_weights"], x["weights"]),
            "query": steps.attention_scores_backward(x["grad_scores"], q, k, 0.3)[0],
            "key": steps.attention_scores_backward(x["grad_scores"], q, k, 0.3)[1],
        },
        {name: wanted[name] for name in ("masked", "weights", "output", "value", "grad_scores", "query", "key")},
    )


def test_a_head_repeated_without_a_copy():
    q, k, v = draw(9, 11, 4, 5, lead=(2, 6), Hk=1)
    k, v = (np.broadcast_to(x, (2, 6, *x.shape[2:])) for x in (k, v))
    same_bits({"": steps.attention_scores(q, k)}, {"": steps.attention_scores(q, k.copy())})
    weights = steps.softmax(np.broadcast_to(q[:, :1, :1, :1], (2, 6, 9, 11)))
    np.testing.assert_allclose(steps.weighted_sum(weights, v), np.repeat(v.mean(-2, keepdims=True), 9, -2))


# --- each by itself, against central differences -------------------------------------------------------------------
def differences(f, *inputs, seed=0):
    """The weights of a random loss of f, and its gradient by each input that is an array."""
    weight = np.random.default_rng(seed).standard_normal(f(*inputs).shape)

    def by(n):
        def loss(x):
            y = f(*inputs[:n], x, *inputs[n + 1 :])
            return (weight * np.where(np.isneginf(y), 0, y)).sum()

        return reference.central_differences(loss, inputs[n])

    return weight, [by(n) for n in range(len(inputs))]


def near(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-8 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("scale", [None, 1.7, 0.0, -2])
def test_gradients_of_scores(scale):
    q, k, _ = draw(5, 7, 3, 1, lead=(2,))
    weight, (dq, dk) = differences(lambda q, k: steps.attention_scores(q, k, scale), q, k)
    got = steps.attention_scores_backward(weight, q, k, scale)
    near(got[0], dq)
    near(got[1], dk)


def test_gradients_of_a_mask():
    scores, bias = draw(4, 6, 6, 1, lead=(2, 3))[0], np.array([[0.5], [1], [-1], [2]])
    allowed = np.random.default_rng(0).random((3, 4, 6)) < 0.6
    mask = masks.Lengths(keys=[4, 6]) & allowed
    weight, (ds, db) = differences(lambda s, b: steps.apply_mask(s, mask & b, True), scores, bias)
    got = steps.apply_mask_backward(weight, mask & bias, True)
    near(got[0], ds)
    near(got[1], db)
    bias[2] = -np.inf
    got = steps.apply_mask_backward(weight, bias)
    assert (got[0][..., 2, :] == 0).all() and got[1][2] == 0 and (got[1][[0, 1, 3]] != 0).all()


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.3])
def test_gradients_of_a_softmax(eps):
    scores = draw(6, 37, 37, 1, lead=(2,))[0]
    weight, (ds,) = differences(lambda s: steps.softmax(s, eps), scores)
    near(steps.softmax_backward(weight, steps.softmax(scores, eps), eps), ds)


def test_gradients_of_a_weighted_sum():
    weights, _, value = draw(5, 7, 7, 4, lead=(2,))  # not a softmax: any weights, with a 0 among them
    weights[0, 1, 2] = 0
    weight, (dw, dv) = differences(steps.weighted_sum, weights, value)
    got = steps.weighted_sum_backward(weight, weights, value)
    near(got[0], dw)
    near(got[1], dv)


# --- the contract --------------------------------------------------------------------------------------------------
@core
@both
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_hidden_does_not_leak(poison, dtype):
    """Keys, values and output gradients that nothing sees, or that only some see."""
    q, k, v = draw(150, 140, 8, 70, dtype)
    do = draw(150, 140, 8, 70, dtype, seed=1)[2][..., :1, :] + np.zeros((150, 1), dtype)
    visible = np.tri(150, 140, dtype=bool) & (np.arange(140) < 130)
    visible[:3] = False  # queries that see nothing
    clean = chain(q, k, v, do, visible)
    assert not any(clean[name][..., :3, :].any() for name in ("output", "weights", "query"))
    bad = [x.copy() for x in (q, k, v, do)]
    bad[1][..., 130:, :], bad[2][..., 130:, :] = poison, poison
    bad[0][..., :3, :], bad[3][..., :3, :] = poison, poison
    got = chain(*bad, visible)
    for name in ("weights", "output", "query", "key", "value"):
        np.testing.assert_allclose(got[name], clean[name], rtol=0, atol=100 * np.finfo(dtype).eps, err_msg=name)
    assert not any(got[name][..., :3, :].any() for name in ("output", "weights", "query"))


@core
@both
def test_what_is_seen_poisons_those_who_see_it(dtype):
    q, k, v = draw(150, 140, 8, 5, dtype)
    do = np.ones((2, 4, 150, 5), dtype)
    for name, place in (("key", k), ("value", v)):
        clean = place[0, 1, 100].copy()
        place[0, 1, 100] = np.nan
        got, wanted = chain(q, k, v, do, is_causal=True), reference.attention(q, k, v, visible=np.tri(150, 140))
        back = reference.gradients(do, q, k, v, visible=np.tri(150, 140))
        np.testing.assert_array_equal(np.isnan(got["output"]), np.isnan(wanted[0]), err_msg=name)
        np.testing.assert_array_equal(np.isnan(got["weights"]), np.isnan(wanted[2]), err_msg=name)
        assert np.isnan(got["output"][0, 1, 100:]).all() and np.isfinite(got["output"][0, 1, :100]).all()
        for grad in ("query", "key", "value"):
            np.testing.assert_array_equal(np.isnan(got[grad]), np.isnan(back[grad]), err_msg=f"{name}: {grad}")
        place[0, 1, 100] = clean


@both
def test_zeros_select(dtype):
    """Where 0 stands among weights or gradients of scores; and only there."""
    weights = np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0, 0, 0]], dtype)
    value = np.array([[1, 2], [3, 4], [np.nan, np.inf]], dtype)
    assert np.array_equal(steps.weighted_sum(weights, value), [[2, 3], [np.nan, np.inf], [0, 0]], equal_nan=True)
    do = np.array([[1, 1], [np.nan, 1], [np.inf, np.nan]], dtype)
    dw, dv = steps.weighted_sum_backward(do, weights, value)
    assert np.array_equal(dv, [[0.5, 0.5], [0.5, 0.5], [np.nan, 1]], equal_nan=True)
    assert np.isnan(dw[0, 2]) and np.array_equal(dw[0, :2], [3, 7])
    ds = steps.softmax_backward(dw, weights)
    assert np.array_equal(ds[0], [-1, 1, 0]) and np.array_equal(ds[2], [0, 0, 0]) and np.isnan(ds[1, 2])
    scores = steps.attention_scores(np.zeros((1, 2), dtype), value)  # but a query of 0 selects nothing
    assert np.array_equal(scores, [[0, 0, np.nan]], equal_nan=True)
    assert np.isneginf(steps.apply_mask(scores, [True, True, False])[0, 2]) and np.isnan(steps.apply_mask(scores)[0, 2])


@both
def test_a_scaled_value_that_overflows_is_not_nan_where_it_is_hidden(dtype):
    large = np.finfo(dtype).max
    ds, key = np.array([[0, 1.0]], dtype), np.array([[large], [1]], dtype)
    assert np.array_equal(steps.attention_scores_backward(ds, np.ones((1, 1), dtype), key, scale=100)[0], [[100]])


@both
def test_softmax_of_anything(dtype):
    inf, nan, low, high = np.inf, np.nan, np.finfo(dtype).min, np.finfo(dtype).max
    scores = np.array(
        [[0, 0, 0, 0], [-inf] * 4, [low] * 4, [high] * 4, [low, high, low, -inf], [1, -inf, -inf, -inf],
         [0, nan, -inf, 1], [0, inf, -inf, 1], [nan, nan, -inf, -inf], [-1e4, -1e4, -inf, -2e4]], dtype,
    )  # fmt: skip
    quarter, half = [0.25] * 4, 0.5
    wanted = [
        quarter, [0] * 4, quarter, quarter, [0, 1, 0, 0], [1, 0, 0, 0], [nan, nan, 0, nan], [nan, nan, 0, nan],
        [nan, nan, 0, 0], [half, half, 0, 0],
    ]  # fmt: skip
    assert np.array_equal(steps.softmax(scores), np.array(wanted, dtype), equal_nan=True)


@both
@pytest.mark.parametrize("eps", [1e-6, 0.5, 3])
def test_eps_is_added_to_the_denominator(eps, dtype):
    scores = 3 * draw(40, 97, 97, 1, dtype)[0]
    scores[..., :50] = -np.inf
    scores[..., 3, :] = -np.inf
    top = scores.max(-1, keepdims=True).astype(np.float64)
    e = np.exp(scores - np.where(np.isneginf(top), 0, top))
    exact = e / (e.sum(-1, keepdims=True) + eps)
    close("weights", steps.softmax(scores, eps), exact, exact if dtype == np.float32 else None)


def test_equal_largest_scores_share_the_gradient_of_their_maximum():
    """A softmax with eps does not change when all scores grow alike, so its gradients sum to 0; and by symmetry."""
    scores = np.array([[1.0, 1, 0, 1, -np.inf], [2, 2, 2, 2, 2]])
    weights = steps.softmax(scores, 0.5)
    ds = steps.softmax_backward([[1.0, 1, 5, 1, 9], [1, 2, 3, 4, 5]], weights, 0.5)
    np.testing.assert_allclose(ds.sum(-1), 0, atol=1e-15)
    np.testing.assert_allclose(ds[0, [1, 3, 4]], [ds[0, 0], ds[0, 0], 0])


@both
def test_float32_sums_lose_little(dtype):
    """A long sum of numbers that do not cancel."""
    weights, value = np.full((4, 5000), 0.1, dtype), np.full((5000, 3), 0.7, dtype)
    wanted = weights.astype(np.float64) @ value.astype(np.float64)
    np.testing.assert_allclose(steps.weighted_sum(weights, value), wanted, rtol=60 * np.finfo(dtype).eps)
    scores = np.zeros((2, 5001), dtype)
    np.testing.assert_allclose(steps.softmax(scores), 1 / 5001, rtol=2 * np.finfo(dtype).eps)


# --- bad input -----------------------------------------------------------------------------------------------------
Q, K, V = (2, 5, 3), (2, 6, 3), (2, 6, 4)
S, O = (2, 5, 6), (2, 5, 4)
GIVEN = {
    "attention_scores": {"query": Q, "key": K},
    "attention_scores_backward": {"grad_scores": S, "query": Q, "key": K},
    "apply_mask": {"scores": S},
    "apply_mask_backward": {"grad_masked": S},
    "softmax": {"scores": S},
    "softmax_backward": {"grad_weights": S, "weights": S},
    "weighted_sum": {"weights": S, "value": V},
    "weighted_sum_backward": {"grad_output": O, "weights": S, "value": V},
}
FORMS = {
    "query": "Lq, D", "key": "Lk, D", "scores": "Lq, Lk", "grad_masked": "Lq, Lk", "weights": "Lq, Lk",
    "value": "Lk, Dv",
}  # fmt: skip
arguments = pytest.mark.parametrize("function, name", [(f, name) for f, given in GIVEN.items() for name in given])


def given_to(function, **changes):
    rng = np.random.default_rng(0)
    return {**{name: rng.standard_normal(shape) for name, shape in GIVEN[function].items()}, **changes}


@pytest.mark.parametrize("function", GIVEN)
def test_what_is_right_is_taken_and_left_alone(function):
    given = given_to(function)
    before = {name: x.copy() for name, x in given.items()}
    getattr(steps, function)(**given)
    getattr(steps, function)(*given.values())
    getattr(steps, function)(**{name: x.tolist() for name, x in given.items()})
    for name, x in given.items():
        assert np.array_equal(x, before[name])
    assert function in steps.__all__ and len(steps.__all__) == len(GIVEN)


@arguments
@pytest.mark.parametrize("dtype", ["complex", "object", "S8", "float16", ">f8"])
def test_dtypes(function, name, dtype):
    x = given_to(function)[name].astype(dtype)
    refused(getattr(steps, function), given_to(function, **{name: x}), InvalidInputError, f"{name} has dtype")


@arguments
def test_mixed_dtypes(function, name):
    given = given_to(function)
    if len(given) > 1:
        given[name] = given[name].astype(np.float32)
        refused(getattr(steps, function), given, InvalidInputError, "dtype", "cast")


@arguments
def test_ragged_lists_and_single_rows(function, name):
    call = getattr(steps, function)
    refused(
        call, given_to(function, **{name: [[1.0], [1.0, 2.0]]}), InvalidInputError, f"{name} cannot become an array"
    )
    if name in FORMS:
        wrong = given_to(function, **{name: np.ones(3)})
        refused(call, wrong, InvalidInputError, f"{name} has 1 axes", rf"give \(.*{FORMS[name]}\)")
    else:
        refused(call, given_to(function, **{name: np.ones(3)}), DimensionMismatchError, f"{name}.shape")


@arguments
def test_sizes(function, name):
    """One more of each axis is refused, with the shapes, unless there is nothing that it has to fit."""
    given = given_to(function)
    others = [n for n in given if n != name]
    for axis in range(3 if others else 0):
        shape = list(given[name].shape)
        shape[axis] += 1
        wrong = given_to(function, **{name: np.ones(shape)})
        if (function, name, axis) in {
            ("attention_scores", "query", 1), ("attention_scores", "key", 1), ("weighted_sum", "weights", 1),
            ("weighted_sum", "value", 2),
        }:  # fmt: skip
            getattr(steps, function)(**wrong)
        else:
            refused(getattr(steps, function), wrong, DimensionMismatchError, r"\.shape *: \([23], ", ".")


@pytest.mark.parametrize("function", ["attention_scores", "weighted_sum"])
def test_ranks(function):
    given = given_to(function)
    name = next(iter(given))
    refused(
        getattr(steps, function),
        {**given, name: given[name][0]},
        InvalidInputError,
        "differ in rank",
        "add axes to one",
    )


@pytest.mark.parametrize("function", ["attention_scores", "attention_scores_backward"])
@pytest.mark.parametrize("scale", [np.nan, np.inf, "1", True, [1.0, 2.0], 1j])
def test_scales(function, scale):
    refused(getattr(steps, function), given_to(function, scale=scale), InvalidInputError, "scale is", "number")


@pytest.mark.parametrize("function", ["softmax", "softmax_backward"])
@pytest.mark.parametrize("eps", [-1e-9, np.nan, np.inf, "0", None, True])
def test_epsilons(function, eps):
    refused(getattr(steps, function), given_to(function, eps=eps), InvalidInputError, "eps is", "give")


@pytest.mark.parametrize("function", ["apply_mask", "apply_mask_backward"])
@pytest.mark.parametrize(
    "mask, words",
    [
        (np.ones((5, 7), bool), "does not broadcast"),
        (np.ones((1, 1, 5, 6), bool), "does not broadcast"),
        (np.ones((5, 6), int), "dtype int64"),
        (np.ones((5, 6), np.float32), "a float mask has the dtype"),
        (masks.Lengths(keys=7), "more than Lk = 6"),
        (masks.Causal, "is a class"),
        ("causal", "dtype"),
    ],
)
def test_masks_that_do_not_fit(function, mask, words):
    refused(getattr(steps, function), given_to(function, attn_mask=mask), InvalidMaskError, words)


def test_masks_of_no_axes():
    scores = given_to("apply_mask")["scores"]
    assert np.array_equal(steps.apply_mask(scores, np.array(True)), scores)
    assert np.isneginf(steps.apply_mask(scores, np.array(False))).all()
    assert np.array_equal(steps.apply_mask(scores, np.array(2.0)), scores + 2)
    assert np.isneginf(steps.apply_mask(scores, np.array(True) & masks.Full() & np.array(-np.inf))).all()
    assert steps.apply_mask_backward(scores, np.array(2.0))[1] == pytest.approx(scores.sum())
    assert math.isclose(steps.apply_mask_backward(scores, np.zeros((5, 1)))[1].sum(), scores.sum())


@pytest.mark.parametrize("call", [lambda x: steps.attention_scores(x, x, scale=1e39),
                                  lambda x: steps.attention_scores_backward(x @ x.T, x, x, scale=-1e39)])  # fmt: skip
def test_a_scale_that_float32_cannot_hold(call):
    with pytest.raises(InvalidInputError, match=r"scale is -?1e\+39[\s\S]*HINT: float32 ends at"):
        call(np.ones((3, 2), np.float32))


def test_an_eps_that_float32_cannot_hold():
    with pytest.raises(InvalidInputError, match=r"eps is 1e\+39[\s\S]*HINT: give 0"):
        steps.softmax(np.ones((3, 2), np.float32), eps=1e39)
    assert steps.softmax(np.ones((3, 2)), eps=1e39).max() < 1e-38
