"""Attention over neighbours against its float64 specification, dense attention, and central differences."""

import graph_reference as spec
import numpy as np
import pytest
from cases import SECOND_PASS, close
from neighbor_cases import ALL, TERMS, Case, aggregations, conforms, draw, draw_edges, dtypes, results
from reference import central_differences
from ruvector_numba.kernels.simd import target

import ruvector_numba as rv


# --- the specification itself ---------------------------------------------------------------------------------------
@aggregations
def test_the_specifications_gradients_are_central_differences(aggregation):
    case = draw(4, 3, 9, 2, 2, 3, ALL, aggregation=aggregation)
    keep = np.where(np.random.default_rng(1).random((9, 2)) < 0.7, 1 / 0.7, 0)
    gradients_are_central_differences(case, case.exact_gradients(keep=keep), lambda c: c.exact(keep=keep).output)


def gradients_are_central_differences(case, got, output):
    def loss(**changed):
        terms = case.terms | {n: x for n, x in changed.items() if n in case.terms}
        parts = {n: x for n, x in changed.items() if n not in case.terms}
        return (case.grad_output * output(case._replace(**parts, terms=terms))).sum()

    for name in ("query", "key", "value", *(n for n in TERMS if n in case.terms)):
        x = case.terms[name] if name in case.terms else getattr(case, name)
        hidden = np.isneginf(x)
        measured = central_differences(
            lambda y, name=name, hidden=hidden: loss(**{name: np.where(hidden, -np.inf, y)}), np.where(hidden, 0, x)
        )
        np.testing.assert_allclose(got[name], measured, rtol=1e-6, atol=1e-8, err_msg=name)


# --- the formula ----------------------------------------------------------------------------------------------------
@pytest.mark.core
@dtypes
@pytest.mark.parametrize("terms", ["", *TERMS, "edge_key edge_value", ALL])
def test_terms(terms, dtype):
    conforms(draw(60, 50, 400, 2, 8, 16, terms, dtype))


@pytest.mark.core
@dtypes
@pytest.mark.parametrize("terms", ["", ALL], ids=["plain", "everything"])
@aggregations
def test_aggregations(aggregation, terms, dtype):
    conforms(draw(60, 50, 400, 2, 8, 16, terms, dtype, aggregation=aggregation))


@pytest.mark.core
@pytest.mark.parametrize("terms", ["", ALL], ids=["plain", "everything"])
@pytest.mark.parametrize("channels", [(1, 1), (3, 7), (7, 3), (16, 16), (33, 33), (16, 33), (33, 1), (64, 8)], ids=str)
def test_channels(channels, terms):
    conforms(draw(30, 25, 200, 2, *channels, terms))


@pytest.mark.parametrize("terms", ["", ALL], ids=["plain", "everything"])
@pytest.mark.parametrize("H", [1, 2, 3, 4, 5])
def test_heads(H, terms):
    conforms(draw(30, 25, 200, H, 3, 7, terms))
    conforms(draw(30, 25, 200, H, 16, 16, terms, np.float32))


@pytest.mark.core
@dtypes
@pytest.mark.parametrize("vectors", [1, 2, 4])
def test_heads_of_whole_vectors(vectors, dtype):
    """Where tiles are some whole heads: one of them and several, and keys that are not as wide as values."""
    lanes = target().lanes(np.dtype(dtype).itemsize)
    n = vectors * lanes
    conforms(draw(30, 25, 300, 4, n, n, dtype=dtype, hub=5000))
    conforms(draw(30, 25, 300, 8, n, n, dtype=dtype))
    conforms(draw(30, 25, 300, 12, n, n, dtype=dtype))  # not a power of two
    conforms(draw(30, 25, 300, 4, n, 4 * lanes, "edge_value", dtype))
    conforms(draw(30, 25, 300, 4, 2 * lanes, n, "edge_bias", dtype))


@pytest.mark.parametrize("terms", ["", ALL], ids=["plain", "everything"])
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 1, 30), (3, 400, 50), (400, 3, 50), (500, 500, 300)], ids=str)
def test_few_and_many_nodes(size, terms):
    """One node, duplicates, more sources than targets and the other way round, many nodes without edges."""
    conforms(draw(*size, terms=terms))


@pytest.mark.core
@pytest.mark.parametrize("terms", ["", ALL], ids=["plain", "everything"])
@pytest.mark.parametrize("size", [(0, 0, 0), (0, 4, 0), (4, 0, 0), (1, 1, 0), (6, 3, 0)], ids=str)
@aggregations
def test_nothing_there(aggregation, size, terms):
    case = draw(*size, terms=terms, aggregation=aggregation)
    conforms(case)
    found = results(case)
    assert np.isneginf(found.pop("lse")).all()
    assert not any(x.any() for x in found.values())


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0, None])
def test_scale(scale):
    conforms(draw(scale=scale))
    exact = draw().exact(scale=5**-0.5).output
    if scale is None:
        close("output", rv.neighbor_attention(*draw().inputs, draw().graph), exact)


def test_coefficients_are_those_before_dropout_and_edge_weights():
    case = draw(terms="edge_weight")
    coefficients = case.forward(dropout_p=0.5, seed=3).coefficients()
    close("coefficients", coefficients, draw(terms="edge_weight").exact().coefficients)
    sums = np.zeros((9, 2))
    np.add.at(sums, case.edge_index[1], coefficients)
    np.testing.assert_allclose(sums[case.edge_index[1]], 1, rtol=1e-14)


@pytest.mark.core
def test_a_target_that_sees_nothing_is_zero_and_gives_no_gradient():
    case = draw(30, 25, 60, terms=ALL, hidden=0.5)
    empty = np.isneginf(case.exact().lse)
    assert empty[0].all() and empty.any(axis=1).sum() > 3 and not empty.all()
    found = results(case)
    assert np.isneginf(found["lse"][empty]).all()
    assert not found["output"][empty].any() and not found["query"][empty].any()
    for name in TERMS[:3]:
        assert not found[name][np.isneginf(case.terms["edge_bias"])].any(), name


# --- the same as dense attention ------------------------------------------------------------------------------------
def simple(Nt, Ns, density, seed=0):
    """Edges without duplicates, in no order, and where they are."""
    rng = np.random.default_rng(seed)
    there = rng.random((Nt, Ns)) < density
    edge_index = np.stack(np.nonzero(there))[::-1]
    return edge_index[:, rng.permutation(edge_index.shape[1])], there


def by_head(x):
    return np.swapaxes(x, 0, 1)


@pytest.mark.parametrize("size", [(1, 1), (20, 30), (33, 12)], ids=str)
def test_it_is_dense_attention_with_a_mask(size):
    Nt, Ns = size
    edge_index, there = simple(Nt, Ns, 0.3 if Nt > 1 else 1)
    case = draw(Nt, Ns, 0, 3, 8, 5)._replace(edge_index=edge_index)
    dense = rv.scaled_dot_product_attention(*map(by_head, case.inputs), attn_mask=there)
    close("output", rv.neighbor_attention(*case.inputs, case.graph), by_head(dense))


@pytest.mark.core
def test_its_gradients_are_those_of_dense_attention():
    edge_index, there = simple(20, 30, 0.3)
    sources, targets = edge_index
    case = draw(20, 30, 0, 3, 8, 5)._replace(edge_index=edge_index)
    bias = np.random.default_rng(1).standard_normal((len(sources), 3))
    bias[::7] = -np.inf
    mask = np.full((3, 20, 30), -np.inf)
    mask[:, targets, sources] = bias.T
    dense = rv.attention_forward(*map(by_head, case.inputs), attn_mask=mask)
    wanted = rv.attention_backward(by_head(case.grad_output), dense)
    cache = case._replace(terms={"edge_bias": bias}).forward()
    got = rv.neighbor_attention_backward(case.grad_output, cache)
    close("output", cache.output, by_head(dense.output))
    close("lse", cache.lse, by_head(dense.lse))
    close("coefficients", cache.coefficients(), dense.weights()[:, targets, sources].T)
    for name in ("query", "key", "value"):
        close(name, getattr(got, name), by_head(getattr(wanted, name)))
    close("edge_bias", got.edge_bias, wanted.bias[:, targets, sources].T)


# --- gradients ------------------------------------------------------------------------------------------------------
@pytest.mark.core
@pytest.mark.parametrize("dropout", [{}, {"dropout_p": 0.4, "seed": 11}], ids=["kept", "dropped"])
@pytest.mark.parametrize("terms", ["", ALL], ids=["plain", "everything"])
@aggregations
def test_gradients_are_central_differences(aggregation, terms, dropout):
    """Of the function's own results: no specification takes part."""
    case = draw(5, 4, 13, 2, 3, 2, terms, aggregation=aggregation)
    gradients_are_central_differences(case, results(case, **dropout), lambda c: c.forward(**dropout).output)


def test_the_first_edge_wins_a_tie():
    """Three times the same edge, and one that comes first but loses."""
    edge_index = np.array([[1, 0, 0, 0], [1, 1, 1, 1]])
    q, k = np.zeros((2, 1, 1)), np.zeros((2, 1, 1))
    v = np.array([2.0, 1.0]).reshape(2, 1, 1)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        edges = edge_index[:, order]
        case = Case(q, k, v, edges, {"edge_value": np.zeros((4, 1, 1)), "aggregation": "max"}, np.ones((2, 1, 1)))
        cache = case.forward()
        np.testing.assert_allclose(cache.output.ravel(), [0, 0.5])
        got = rv.neighbor_attention_backward(case.grad_output, cache).edge_value.ravel()
        first = np.flatnonzero(edges[0] == 0)[0]
        np.testing.assert_allclose(got, np.where(np.arange(4) == first, 0.25, 0))


def test_the_largest_message_may_be_negative_and_a_hidden_edge_is_no_message():
    edge_index = np.array([[0, 1], [0, 0]])
    q, k, v = np.zeros((1, 1, 1)), np.zeros((2, 1, 1)), np.array([-2.0, -4.0]).reshape(2, 1, 1)
    graph = rv.CSRGraph.from_edge_index(edge_index, (2, 1))
    assert rv.neighbor_attention(q, k, v, graph, aggregation="max").item() == -1
    hidden = np.array([[-np.inf], [0.0]])
    assert rv.neighbor_attention(q, k, v, graph, hidden, aggregation="max").item() == -4


# --- hubs -----------------------------------------------------------------------------------------------------------
@pytest.mark.core
@dtypes
@pytest.mark.parametrize("terms", ["", ALL], ids=["plain", "everything"])
def test_a_hub(terms, dtype):
    conforms(draw(40, 300, 400, 2, 8, 16, terms, dtype, hub=20_000))


@pytest.mark.parametrize("terms", ["", ALL], ids=["plain", "everything"])
@pytest.mark.parametrize("aggregation", ["mean", "max"])
def test_what_a_hub_aggregates(aggregation, terms):
    conforms(draw(40, 300, 400, 2, 8, 16, terms, hub=9000, aggregation=aggregation))


def test_a_source_that_sends_to_many():
    case = draw(300, 40, 400, 2, 8, 16, ALL, hub=0)
    more = np.stack([np.full(9000, 7), np.random.default_rng(0).integers(0, 300, 9000)])
    conforms(draw(300, 40, 9400, 2, 8, 16)._replace(edge_index=np.concatenate([case.edge_index, more], axis=1)))


@pytest.mark.core
@pytest.mark.parametrize("hidden", [slice(0, 9000), slice(0, 15_000), slice(4000, None), slice(None), slice(0)])
def test_a_hub_may_be_hidden_in_part(hidden):
    """In whole pieces of it, and altogether; what is hidden may be NaN."""
    case = draw(3, 30, 20, 1, 4, 4, hub=20_000)
    into_hub = np.flatnonzero(case.edge_index[1] == 2)[hidden]
    bias, value = np.zeros((20_020, 1)), np.zeros((20_020, 1, 4))
    bias[into_hub] = -np.inf
    value[into_hub] = np.nan
    case = case._replace(terms={"edge_bias": bias, "edge_value": value})
    conforms(case)
    assert all(np.isfinite(x).all() for name, x in results(case).items() if name != "lse")


@dtypes
def test_scores_that_differ_a_lot_along_a_hub(dtype):
    """The largest come late, and the earlier ones count for nothing then."""
    case = draw(3, 30, 20, 1, 4, 4, dtype=dtype, hub=20_000)
    bias = np.repeat(np.array([-900, 50, -300, 400, 398], dtype), 4004)[:, None]
    conforms(case._replace(terms={"edge_bias": bias}))


@pytest.mark.parametrize("hub", [0, 9000])
@pytest.mark.parametrize("size", [240, 2400])
def test_large_scores_are_rounded_alike_every_time(size, hub):
    """Scores that a second pass takes from a rounded logsumexp would be off by half a unit in its last place."""
    case = draw(30, 25, 200, 1, 4, 4, "edge_bias", np.float32, hidden=0, hub=hub)
    case = case._replace(terms={"edge_bias": case.terms["edge_bias"] + np.float32(size)})
    cache, sums = case.forward(), np.zeros((30, 1))
    np.add.at(sums, case.edge_index[1], cache.coefficients())
    np.testing.assert_allclose(sums[case.edge_index[1]], 1, rtol=0, atol=16 * np.finfo(np.float32).eps)


@aggregations
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("hub", [0, 300, 9000], ids=["batches", "batches of one target", "parts"])
def test_a_hidden_edge_may_have_any_weight(hub, poison, aggregation):
    case, other = (draw(30, 25, 60, terms=ALL, hub=hub, hidden=0.5, aggregation=aggregation) for _ in range(2))
    hidden = np.isneginf(case.terms["edge_bias"]).all(axis=1)
    assert 0 < hidden.sum() < len(hidden)
    other.terms["edge_weight"] = np.where(hidden, poison, case.terms["edge_weight"])
    for (name, wanted), got in zip(results(case).items(), results(other).values(), strict=True):
        np.testing.assert_array_equal(got, wanted, err_msg=name)


# --- edge_softmax ---------------------------------------------------------------------------------------------------
@pytest.mark.core
@dtypes
@pytest.mark.parametrize("heads", [(), (1,), (2,), (3,), (5,), (17,)], ids=str)
@pytest.mark.parametrize(
    "size",
    [(0, 0, 0, 0), (4, 3, 0, 0), (1, 1, 1, 0), (30, 25, 200, 0), (9, 25, 50, 1000), (9, 25, 50, 20_000)],
    ids=str,
)
def test_edge_softmax(size, heads, dtype):
    Nt, Ns, E, hub = size
    edge_index = draw_edges(Nt, Ns, E, hub)
    graph = rv.CSRGraph.from_edge_index(edge_index, (Ns, Nt))
    rng = np.random.default_rng(0)
    scores = (3 * rng.standard_normal((E + hub, *heads))).astype(dtype)
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    if E > 1:
        scores[edge_index[1] == 0] = -np.inf
    grad = rng.standard_normal(scores.shape).astype(dtype)
    single = dtype == np.float32
    exact, _ = spec.softmax(scores.astype(np.float64), edge_index[1], Nt)
    naive = spec.softmax(scores, edge_index[1], Nt)[0] if single else None
    weights = rv.edge_softmax(scores, graph)
    assert weights.dtype == dtype
    close("weights", weights, exact, naive, SECOND_PASS)
    got = rv.edge_softmax_backward(np.where(np.isneginf(scores), np.nan, grad), weights, graph)
    assert got.dtype == dtype
    wide = spec.softmax_gradient(grad.astype(np.float64), exact, edge_index[1], Nt)
    naive = spec.softmax_gradient(grad, naive, edge_index[1], Nt) if single else None
    close("gradient", got, wide, naive, SECOND_PASS)


def test_the_gradient_of_edge_softmax_is_as_exact_as_its_formula():
    """Of 20,000 edges, where exp(log(weight)) would lose four bits; and also of weights that do not sum to 1."""
    rng = np.random.default_rng(0)
    graph = rv.CSRGraph.from_edge_index(np.zeros((2, 20_000), int), 1)
    weights, grad = rng.random((2, 20_000, 2), dtype=np.float32)

    def formula(p, g):
        return p * (g - (p * g).sum(axis=0))

    exact = formula(weights.astype(np.float64), grad.astype(np.float64))
    error, naive = (
        np.sqrt(((x - exact) ** 2).mean())
        for x in (rv.edge_softmax_backward(grad, weights, graph), formula(weights, grad))
    )
    assert error <= 1.5 * naive


def test_edge_softmax_takes_arrays_of_any_layout():
    graph = rv.CSRGraph.from_edge_index(draw_edges(9, 7, 400), (7, 9))
    scores, grad = np.random.default_rng(0).standard_normal((2, 400, 3))
    weights = rv.edge_softmax(scores, graph)
    gradient = rv.edge_softmax_backward(grad, weights, graph)
    layouts = [
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: np.pad(x, ((0, 0), (1, 2)))[:, 1:4],
        lambda x: np.repeat(x, 2, axis=0)[::2],
        lambda x: x[::-1].copy()[::-1],
    ]
    for change in layouts:
        assert np.array_equal(rv.edge_softmax(change(scores), graph), weights)
        assert np.array_equal(rv.edge_softmax_backward(change(grad), change(weights), graph), gradient)


def test_edge_softmax_takes_lists():
    graph = rv.CSRGraph.from_edge_index([[0, 1], [0, 0]])
    assert rv.edge_softmax([0, 0], graph).tolist() == [0.5, 0.5]


def test_nan_among_scores_stays_with_its_target_and_head():
    edge_index = draw_edges(9, 7, 40)
    graph = rv.CSRGraph.from_edge_index(edge_index, (7, 9))
    scores = np.random.default_rng(0).standard_normal((40, 2))
    wanted = rv.edge_softmax(scores, graph)
    scores[5, 1] = np.nan
    got = rv.edge_softmax(scores, graph)
    struck = np.zeros((40, 2), bool)
    struck[edge_index[1] == edge_index[1, 5], 1] = True
    np.testing.assert_array_equal(got, np.where(struck, np.nan, wanted))
