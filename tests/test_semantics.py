"""Rows that see nothing, and NaN and infinity wherever they may be: hidden ones reach no result, and seen ones reach
exactly the results that they reach in the reference. Forward and backward, few queries and many.
"""

import numpy as np
import pytest
import reference
from cases import MASKS, TERMS, make

import ruvector_numba as rv
from ruvector_numba import masks

pytestmark = pytest.mark.core

NAN, INF = np.nan, np.inf
FEW, MANY = (5, 150, 6, 5), (70, 150, 6, 5)
sizes = pytest.mark.parametrize("size", [FEW, MANY], ids=["few", "many"])
HEADS = (2, 4)

# What is compiled for one element type: no term, a bool mask, a bias, all of them. Names of float32 say so: CI checks
# accesses in float64 alone.
KINDS = {
    "causal": (["causal"], np.float64, False),
    "bottom_right float32": (["bottom_right"], np.float32, False),
    "window": (["window"], np.float64, False),
    "lengths": (["lengths"], np.float64, False),
    "segments": (["segments"], np.float64, False),
    "scattered": (["scattered"], np.float64, False),
    "bool": (["bool"], np.float64, False),
    "float": (["float"], np.float64, False),
    "no mask": ([], np.float64, False),
    "softcap": (["causal", "softcap"], np.float64, True),
    "slopes float32": (["window", "slopes"], np.float32, True),
    "dropout": (["bool", "dropout"], np.float64, True),
    "float and terms float32": (["float", *TERMS], np.float32, True),
    "everything": ([*MASKS, *TERMS], np.float64, True),
    "everything float32": (["window", "bool", "float", *TERMS], np.float32, True),
}


def of_kind(kind, size):
    names, dtype, fill = KINDS[kind]
    return make(names, size, dtype, HEADS, Hk=2, fill=fill)


def results_of(case):
    """All but the weights: they have a test of their own."""
    cache = case.forward()
    g = rv.attention_backward(case.grad_output, cache, case.grad_lse)
    got = {"output": cache.output, "lse": cache.lse}
    got |= {f"gradient of {name}": getattr(g, name) for name in ("query", "key", "value", "bias")}
    output, lse, _ = reference.attention(*case.inputs, **case.spec)
    wanted = {"output": output, "lse": lse}
    found = reference.gradients(case.grad_output, *case.inputs, grad_lse=case.grad_lse, **case.spec)
    wanted |= {f"gradient of {name}": found[name] for name in ("query", "key", "value")}
    if case.bias is None:
        del got["gradient of bias"]
    else:
        wanted["gradient of bias"] = reference.reduce_to(found["scores"], case.bias.shape)
    return got, wanted


def agree(got, wanted, poison, rtol):
    """The same elements are poisoned, and the others are what they should be."""
    # an infinity may become NaN one step sooner or later: inf * 0 depends on what has underflowed
    which = np.isnan if np.isnan(poison) else lambda x: ~np.isfinite(x)
    wrong = []
    for name, w in wanted.items():
        g = np.asarray(got[name])
        leaks, lost = np.argwhere(which(g) & ~which(w)), np.argwhere(which(w) & ~which(g))
        wrong += [f"{name} is poisoned at {leaks[0].tolist()} and {len(leaks) - 1} more"] if len(leaks) else []
        wrong += [f"{name} should be poisoned at {lost[0].tolist()} and {len(lost) - 1} more"] if len(lost) else []
        if name == "lse" and not np.array_equal(np.isneginf(g), np.isneginf(w)):
            wrong.append("lse is -inf elsewhere")
        fine = np.isfinite(w) & np.isfinite(g)
        if not np.allclose(g[fine], w[fine], rtol, rtol * np.abs(w[fine]).max(initial=0)):
            wrong.append(f"{name} is wrong where it is finite")
    assert not wrong, "\n".join(wrong)


def agrees(case, poison=NAN):
    got, wanted = results_of(case)
    agree(got, wanted, poison, 1e-9 if case.query.dtype == np.float64 else 1e-3)
    return got


def poisoned(x, at, poison):
    """x with an element of a row replaced: a different row in each of the first heads of each batch."""
    x = x.copy()
    for n, (b, h) in enumerate(np.ndindex(2, x.shape[1])):
        if n < len(at):
            x[b, h, at[n] % x.shape[-2], n % x.shape[-1]] = poison
    return x


PLACES = ("query", "key", "value", "grad_output")
CASES = [(kind, place, NAN) for kind in KINDS for place in PLACES]
CASES += [
    (kind, place, poison) for kind in ("window", "no mask", "everything") for place in PLACES for poison in (INF, -INF)
]


@sizes
@pytest.mark.parametrize(("kind", "place", "poison"), CASES)
def test_a_poisoned_row_reaches_what_it_reaches_in_the_reference(kind, place, poison, size):
    case = of_kind(kind, size)
    rows = (0, 17, 75, -1) if place in ("key", "value") else (0, size[0] // 2, -1)
    agrees(case._replace(**{place: poisoned(getattr(case, place), rows, poison)}), poison)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["window", "bool", "everything"])
def test_a_poisoned_row_among_several_tiles(kind, place):
    """Keys of one tile are hidden from queries that are poisoned by a key of another."""
    case = of_kind(kind, (190, 300, 6, 5))
    agrees(case._replace(**{place: poisoned(getattr(case, place), (130, 5, 100, 128), NAN)}))


@sizes
@pytest.mark.parametrize("kind", KINDS)
def test_poison_in_all_rows_that_nobody_sees(kind, size):
    """Keys and values that no query of their heads sees, queries and gradients of queries that see nothing."""
    case = of_kind(kind, size)
    visible = np.broadcast_to(case.spec["visible"], (2, 4, *size[:2]))
    if case.bias is not None:
        visible = visible & ~np.isneginf(case.bias)
    lonely, empty = ~visible.reshape(2, 2, 2, *size[:2]).any(axis=(2, 3)), ~visible.any(-1)
    clean, _ = results_of(case)
    for poison in (NAN, INF, -INF):
        places = {"key": lonely, "value": lonely, "query": empty, "grad_output": empty}
        bad = {name: np.where(at[..., None], poison, getattr(case, name)) for name, at in places.items()}
        bad["grad_lse"] = np.where(empty, poison, case.grad_lse)
        got, _ = results_of(case._replace(**{name: x.astype(case.key.dtype) for name, x in bad.items()}))
        for name, x in got.items():
            assert np.array_equal(x, clean[name], equal_nan=True), name
        for name in ("output", "gradient of query"):
            assert (got[name][empty] == 0).all(), name
        for name in ("gradient of key", "gradient of value"):
            assert (got[name][lonely] == 0).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_a_poisoned_row_are_nan_where_seen_and_0_where_hidden(kind):
    case = of_kind(kind, MANY)
    for place, rows in (("query", (0, 35, -1)), ("key", (0, 17, 75, -1)), ("value", (0, 17, 75, -1))):
        bad = case._replace(**{place: poisoned(getattr(case, place), rows, NAN)})
        wanted = {"weights": reference.attention(*bad.inputs, **bad.spec)[2]}
        agree({"weights": bad.forward().weights()}, wanted, NAN, 1e-9 if case.key.dtype == np.float64 else 1e-3)


# Rows that see nothing


EMPTY = {  # masks under which query 1 of 11, at least, sees none of 9 keys
    "bool": np.arange(11)[:, None] != 1,
    "float": np.where(np.arange(11)[:, None] == 1, -INF, 0.0),
    "bottom_right": masks.Causal("bottom_right"),
    "window": masks.Window(right=3, align="bottom_right") & masks.Window(left=1, right=0, align="bottom_right"),
    "lengths": masks.Lengths(queries=1),
    "no keys": masks.Lengths(keys=[0, 9]) & masks.Lengths(queries=1),
    "segments": masks.Segments([0, 5, 0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1, 1]),
    "scattered": masks.Segments([0, 5, 0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1, 0, 1, 0]),
    "segments and lengths": masks.Segments([0, 1] + [0] * 9, [0] * 4 + [1] * 5) & masks.Lengths(keys=4),
    "bool and causal": masks.Causal() & (np.arange(9) > 1),
    "causal and float": masks.Causal() & np.where(np.arange(9) > 1, 0.0, -INF),
    "all": masks.Full() & np.zeros((1, 1), bool),
    "all by a float": np.full((), -INF),
}


@pytest.mark.parametrize("heads", [2, 6], ids=["a key head each", "three share one"])
@pytest.mark.parametrize("seen", [0.0, INF, NAN], ids=str)
def test_hidden_values_of_any_chunk_beside_values_that_are_seen(seen, heads):
    """Few queries, whose keys come in chunks: what comes before a chunk that is done again is kept, infinite or not."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, heads, 3, 16))
    key, value = (rng.standard_normal((2, 2, 2500, 16)) for _ in range(2))
    shows = rng.random((2, heads, 3, 2500)) < 0.7
    shows[..., [5, 1700, 2499]], shows[..., 7], shows[:, :, 1, 7] = False, True, False
    value[..., 7, 4] = seen  # the second query does not see it
    clean = rv.scaled_dot_product_attention(query, key, value, shows, enable_gqa=True)
    key[..., 1700, :] = NAN
    for j, hidden in ((5, INF), (1700, NAN), (2499, -INF)):
        value[..., j, :] = hidden
    found = rv.scaled_dot_product_attention(query, key, value, shows, enable_gqa=True)
    assert found.tobytes() == clean.tobytes()
    assert np.isfinite(found[:, :, 1]).all() and np.isfinite(np.delete(found, 4, axis=-1)).all()


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("name", EMPTY)
def test_a_row_that_sees_nothing(name, few):
    case = make([], (11, 9, 4, 3), lead=HEADS, Hk=4)
    mask = EMPTY[name]
    if isinstance(mask, np.ndarray):
        visible, bias = (mask, None) if mask.dtype == bool else (True, mask)
    else:
        visible, bias = mask.to_dense(11, 9), None
    dense = np.broadcast_to(visible if bias is None else ~np.isneginf(bias), (2, 1, 11, 9))
    if few:  # four of the queries, through a mask of their own
        visible, mask, bias = dense[..., :4, :], dense[..., :4, :], None
        case = case._replace(
            query=case.query[..., :4, :], grad_output=case.grad_output[..., :4, :], grad_lse=case.grad_lse[..., :4]
        )
    empty = ~np.broadcast_to(dense[..., : case.query.shape[-2], :].any(-1), case.grad_lse.shape)
    assert empty[..., 1].all()
    case.call["attn_mask"] = mask
    case.spec.update(visible=visible, bias=bias)
    case = case._replace(
        grad_output=np.where(empty[..., None], NAN, case.grad_output), grad_lse=np.where(empty, NAN, case.grad_lse)
    )
    got = agrees(case)
    for result in ("output", "gradient of query"):
        assert (got[result][empty] == 0).all(), result
    assert (case.forward().weights()[empty] == 0).all()
    assert np.isneginf(got["lse"][empty]).all()
    assert all(np.isfinite(x).all() for name, x in got.items() if name != "lse")


# Scores that are not finite


@sizes
def test_scores_of_minus_infinity_from_the_data(size):
    """Weight 0, as any score far below; a row of nothing else is empty. Gradients of such keys are what IEEE says."""
    case = make([], size, lead=HEADS, Hk=4)
    q, k = case.query.copy(), case.key.copy()
    q[..., 0] = np.abs(q[..., 0])
    k[0, 0, :3, 0] = -INF
    k[1, 1, :, 0] = -INF
    case = case._replace(query=q, key=k)
    got, weights = agrees(case), case.forward().weights()
    assert (weights[0, 0, :, :3] == 0).all() and (weights[1, 1] == 0).all() and np.isfinite(got["output"]).all()
    assert np.isneginf(got["lse"][1, 1]).all() and (got["output"][1, 1] == 0).all()


@sizes
def test_infinity_minus_infinity_is_nan(size):
    case = make(["causal"], size, lead=HEADS, Hk=4)
    q, k = case.query.copy(), case.key.copy()
    q[..., :2] = np.abs(q[..., :2])
    k[0, 0, 3, :2] = INF, -INF
    got = agrees(case._replace(query=q, key=k))
    assert np.isfinite(got["output"][0, 0, :3]).all() and np.isnan(got["output"][0, 0, 3:]).all()


@sizes
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("with_causal", [False, True])
def test_a_bias_that_is_not_finite(with_causal, poison, size):
    """A seen one makes its row NaN; one that is hidden by another mask does nothing, nor has it a gradient."""
    case = make(["float", "causal"] if with_causal else ["float"], size, lead=HEADS, Hk=4)
    case.bias[0, 1, 3] = case.bias[1, 4, 4] = case.bias[2, 2, 0] = poison
    got = agrees(case)
    assert np.isfinite(got["output"][:, 0, 1]).all() == with_causal
    assert np.isnan(got["output"][:, 2, 2]).all() and np.isfinite(got["output"][:, 3]).all()


def test_a_softcap_makes_infinite_scores_finite():
    case = make(["softcap"], (11, 20, 4, 4), lead=HEADS, Hk=4, fill=True)
    q, k = case.query.copy(), case.key.copy()
    q[..., 0] = np.abs(q[..., 0])
    k[0, 0, 3, 0], k[0, 1, 4, 0] = INF, -INF
    cache = rv.attention_forward(q, k, case.value, **case.call)
    assert np.isfinite(cache.output).all() and np.isfinite(cache.lse).all()
    np.testing.assert_allclose(cache.output, reference.attention(q, k, case.value, **case.spec)[0], rtol=1e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@sizes
def test_finite_scores_of_any_size_are_data(size, dtype):
    """Also the most negative ones, whose row is not empty, and sums that end far from where they began."""
    case = make([], size, dtype, lead=HEADS, Hk=4)
    for factor in (1e-30, 1e3, 1e18):
        k = case.key * np.linspace(-factor, factor, size[1], dtype=dtype)[:, None]
        got = rv.attention_forward(case.query, k, case.value)
        output, lse, _ = reference.attention(case.query, k, case.value)
        # with scores of 1e18 the largest takes it all, unless two are nearer than rounding
        assert np.isfinite(got.output).all() and np.isfinite(got.lse).all()
        np.testing.assert_allclose(got.lse, lse, rtol=1e-6 if dtype == np.float32 else 1e-14)
    edge_of_the_range(dtype, size[0], np.finfo(dtype).min / 2)


def edge_of_the_range(dtype, Lq, score):
    got = rv.attention_forward(
        np.full((Lq, 1), score, dtype), np.ones((40, 1), dtype), np.eye(40, dtype=dtype), scale=1.0
    )
    np.testing.assert_allclose(got.output, 1 / 40, rtol=1e-6)
    assert np.isfinite(got.lse).all()


@pytest.mark.xfail(
    strict=True, reason="scores in base 2 overflow from 0.69 of the largest number on, and count as -inf"
)
def test_scores_at_the_very_edge_of_the_range():
    edge_of_the_range(np.float64, 9, np.finfo(np.float64).min)


def test_the_lowest_finite_bias_is_data():
    bias = np.full((12, 9), np.finfo(np.float64).min)
    bias[3] = -INF
    k, v = np.random.default_rng(0).standard_normal((2, 9, 4))
    got = rv.scaled_dot_product_attention(np.zeros((12, 4)), k, v, bias)
    np.testing.assert_allclose(got[[0, 11]], np.broadcast_to(v.mean(0), (2, 4)), atol=1e-14)
    assert (got[3] == 0).all()


@pytest.mark.parametrize("low", [np.finfo(np.float32).min, -1e30, 1e30])
@pytest.mark.parametrize("queries, keys", [(3, 3), (1, 2500), (70, 300)])
def test_a_whole_row_of_one_huge_float32_score_is_shared_evenly(low, queries, keys):
    """Beside such scores a logsumexp forgets how many there are: the weights of 3 keys once summed to 3."""
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.standard_normal((2, n, 4), dtype=np.float32) for n in (queries, keys, keys, queries))
    cache = rv.attention_forward(q * 0, k, v, np.full((queries, keys), low, np.float32))
    np.testing.assert_allclose(cache.output, np.broadcast_to(v.mean(1, keepdims=True), do.shape), atol=1e-5)
    np.testing.assert_allclose(cache.weights(), 1 / keys, rtol=1e-5)
    gradients = rv.attention_backward(do, cache)
    np.testing.assert_allclose(gradients.value, np.broadcast_to(do.sum(1, keepdims=True) / keys, v.shape), atol=1e-5)
    np.testing.assert_allclose(cache.lse, low, rtol=1e-6)


def test_many_channels_and_many_keys():
    """Heads that have kernels of their own, over keys whose sums keep what they lose: rows that see nothing, NaN in
    hidden rows, one thread."""
    case = of_kind("lengths", (41, 1100, 300, 270))
    agrees(case)
    visible = np.broadcast_to(case.spec["visible"], (2, 4, 41, 1100)).reshape(2, 2, 2, 41, 1100)
    lonely, empty = ~visible.any(axis=(2, 3)), ~visible.any(-1).reshape(2, 4, 41)
    assert lonely.any() and empty.any()
    clean, _ = results_of(case)
    with rv.threads(1):
        alone, _ = results_of(case)
    bad = {name: np.where(lonely[..., None], NAN, getattr(case, name)) for name in ("key", "value")}
    bad |= {name: np.where(empty[..., None], NAN, getattr(case, name)) for name in ("query", "grad_output")}
    bad = {name: x.astype(case.key.dtype) for name, x in bad.items()}
    poisoned_by_nan, _ = results_of(case._replace(**bad))
    for name, x in clean.items():
        assert np.array_equal(x, alone[name]), name
        assert np.array_equal(x, poisoned_by_nan[name]), name
