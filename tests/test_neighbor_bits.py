"""Attention over neighbours: who a NaN reaches, what dropout drops, and what changes no bit of a result."""

import graph_reference as spec
import numba
import numpy as np
import pytest
from cases import close
from neighbor_cases import ALL, TERMS, Case, aggregations, conforms, draw, dtypes, results, same_bits
from ruvector_numba.kernels.gather import EDGES
from ruvector_numba.kernels.simd import target

import ruvector_numba as rv
from ruvector_numba.graphs.graph import _assembled

MOST = numba.config.NUMBA_NUM_THREADS


# --- NaN ------------------------------------------------------------------------------------------------------------
@pytest.mark.core
@pytest.mark.parametrize("aggregation", ["sum", "mean"])
@pytest.mark.parametrize("hub", [0, 9000])
@pytest.mark.parametrize("name", ["query", "key", "value", "edge_key", "edge_value", "edge_bias", "grad_output"])
def test_nan_reaches_who_sees_it_and_nobody_else(name, hub, aggregation):
    """Forward and backward; the specification says who that is."""
    case = draw(40, 35, 90, 2, 4, 5, ALL, hub=hub, aggregation=aggregation)
    case.terms.update({n: x.copy() for n, x in case.terms.items() if n in TERMS})
    x = case.terms[name] if name in case.terms else getattr(case, name)
    seen = np.isfinite(case.terms["edge_bias"]).all(axis=1)
    x[int(np.flatnonzero(seen)[3]) if name.startswith("edge") else 3] = np.nan
    exact = case.exact()
    wanted = case.exact_gradients() | {"output": exact.output, "lse": exact.lse, "coefficients": exact.coefficients}
    assert any(np.isnan(y).any() for y in wanted.values())
    if not hub:
        assert all(np.isfinite(y).any() for y in wanted.values())
    for part, got in results(case).items():
        np.testing.assert_allclose(got, wanted[part], rtol=1e-9, atol=1e-12, err_msg=part)


@pytest.mark.core
@pytest.mark.parametrize("vectors", [1, 2, 4])
def test_nan_behind_a_bias_reaches_nothing(vectors):
    """Heads of whole vectors, whose tiles multiply it all the same."""
    n = vectors * target().lanes(8)
    case = draw(40, 35, 200, 12, n, n, "edge_bias")
    case.terms["edge_bias"][case.edge_index[0] == 7] = -np.inf
    wanted = results(case)
    case.key[7], case.value[7] = np.nan, np.nan
    same_bits(results(case), wanted)


@pytest.mark.core
@aggregations
def test_nan_that_is_hidden_reaches_nothing(aggregation):
    case = draw(40, 35, 200, 2, 4, 5, ALL, aggregation=aggregation)
    wanted = results(case)
    hidden = np.isneginf(case.terms["edge_bias"])
    for name in ("edge_key", "edge_value"):
        case.terms[name][hidden] = np.nan
    nobody_sees = 34
    case.edge_index[0][case.edge_index[0] == nobody_sees] = 0
    wanted = results(draw(40, 35, 200, 2, 4, 5, ALL, aggregation=aggregation)._replace(edge_index=case.edge_index))
    case.key[nobody_sees], case.value[nobody_sees], case.query[0] = np.nan, np.nan, np.nan
    got = results(case)
    same_bits(got, wanted)
    assert all(np.isfinite(x).all() for name, x in got.items() if name != "lse")


# --- dropout --------------------------------------------------------------------------------------------------------
P = 0.3


def keep_of(case, seed, p=P):
    """What dropout multiplies each coefficient (E, H) with: equal scores, and a value that tells the edge."""
    targets, H = case.edge_index[1], case.query.shape[1]
    slot = np.zeros(len(targets), int)
    for _, at in spec.into(targets, len(case.query)):
        slot[at] = np.arange(len(at))
    which = np.zeros((len(targets), H, slot.max() + 1))
    which[np.arange(len(targets)), :, slot] = 1
    q, k, v = (
        np.zeros((len(case.query), H, 1)),
        np.zeros((len(case.key), H, 1)),
        np.zeros((len(case.key), *which.shape[1:])),
    )
    out = rv.neighbor_attention(q, k, v, case.graph, edge_value=which, dropout_p=p, seed=seed)
    degree = np.bincount(targets)[targets]
    keep = out[targets, :, slot] * degree[:, None]
    np.testing.assert_allclose(keep, np.where(keep > 0, 1 / (1 - p), 0), rtol=1e-12)
    return np.where(keep > 0, 1 / (1 - p), 0)


@pytest.mark.parametrize("terms", ["", ALL], ids=["plain", "everything"])
@aggregations
def test_dropout_multiplies_coefficients(aggregation, terms):
    """With what the seed decides for each edge and head, whatever else there is."""
    case = draw(30, 25, 200, 3, 4, 5, terms, aggregation=aggregation)
    keep = keep_of(case, 5)
    assert 0 < (keep == 0).mean() < 1 and (keep[:, 0] != keep[:, 1]).any()
    conforms(case, keep=keep, dropout_p=P, seed=5)


@pytest.mark.core
def test_dropout_is_what_the_seed_says():
    case = draw(300, 200, 2000)
    dropped = results(case, dropout_p=P, seed=7)
    same_bits(results(case, dropout_p=P, seed=7), dropped)
    assert not np.array_equal(case.forward(dropout_p=P, seed=8).output, dropped["output"])
    assert not np.array_equal(case.forward(dropout_p=P).output, case.forward(dropout_p=P).output)
    same_bits(results(case, dropout_p=0.0, seed=7), results(case))


def test_dropout_drops_as_often_as_told_and_keeps_the_mean():
    case = draw(900, 800, 20_000)
    for p in (0.1, 0.5, 0.9):
        share = (keep_of(case, 3, p) == 0).mean()
        assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / 40_000)
    case = draw(3, 4, 24)
    mean = np.mean([case.forward(dropout_p=P, seed=n).output for n in range(2000)], axis=0)
    np.testing.assert_allclose(mean, case.forward().output, atol=0.08)


def test_all_dropped():
    found = results(draw(terms=ALL), dropout_p=1.0, seed=1)
    assert not found["output"].any() and not any(found[n].any() for n in ("query", "key", "value", *TERMS))


# --- bits -----------------------------------------------------------------------------------------------------------
def large(aggregation="sum", dtype=np.float32, terms=ALL):
    return draw(3000, 2500, 40_000, 2, 8, 16, terms, dtype, hub=9000, aggregation=aggregation)


@pytest.mark.core
@dtypes
@aggregations
def test_threads_change_no_bit(aggregation, dtype):
    found = []
    for n in sorted({1, 2, MOST} & set(range(1, MOST + 1))):
        with rv.threads(n):
            case = large(aggregation, dtype)
            weights = rv.edge_softmax(case.terms["edge_bias"], case.graph)
            gradient = rv.edge_softmax_backward(case.terms["edge_key"][..., 0], weights, case.graph)
            more = {"softmax": weights, "softmax gradient": gradient}
            found.append(results(case, dropout_p=P, seed=2) | more)
            found[-1]["plain"] = large(aggregation, dtype, "").forward().output
    for other in found[1:]:
        same_bits(other, found[0])


@aggregations
@pytest.mark.parametrize("terms", ["", ALL], ids=["plain", "everything"])
def test_the_company_of_a_target_changes_none_of_its_bits(terms, aggregation):
    """Targets are done by batches of so many edges; each alone has the same bits, and so have its edges."""
    degrees = [0, 3, EDGES - 1, EDGES, 1, EDGES + 1, 0, 2 * EDGES + 3, 5, EDGES - 3, 2, 2, 0, 1]
    case = draw(len(degrees), 50, sum(degrees), 2, 8, 16, terms, np.float32, hidden=0.1, aggregation=aggregation)
    targets = np.repeat(np.arange(len(degrees)), degrees)
    case = case._replace(edge_index=np.stack([case.edge_index[0], targets]))
    together = results(case)
    for i in range(len(degrees)):
        mine = targets == i
        of_edges = {name: x[mine] if name in TERMS else x for name, x in case.terms.items()}
        alone = results(case._replace(edge_index=case.edge_index[:, mine], terms=of_edges))
        for name in ("output", "lse", "query"):
            assert np.array_equal(together[name][i], alone[name][i]), (name, i)
        for name in {"coefficients", *TERMS} & together.keys():
            assert np.array_equal(together[name][mine], alone[name]), (name, i)


def permuted(case, order):
    terms = {n: x[order] if n in TERMS else x for n, x in case.terms.items()}
    return case._replace(edge_index=case.edge_index[:, order], terms=terms)


def in_order(found, order):
    return {n: x[order] if n in (*TERMS, "coefficients") else x for n, x in found.items()}


@pytest.mark.core
@dtypes
@aggregations
def test_edges_in_another_order_that_keeps_that_of_each_target_change_no_bit(aggregation, dtype):
    case = large(aggregation, dtype)
    targets = case.edge_index[1]
    shuffled = targets[np.random.default_rng(0).permutation(len(targets))]
    order = np.empty(len(targets), int)
    order[np.argsort(shuffled, kind="stable")] = np.argsort(targets, kind="stable")
    assert np.array_equal(targets[order], shuffled) and not np.array_equal(targets, shuffled)
    same_bits(results(permuted(case, order)), in_order(results(case), order))


def test_edges_in_any_order_change_nothing_but_rounding():
    case = large(dtype=np.float64)
    order = np.random.default_rng(0).permutation(case.edge_index.shape[1])
    wanted = in_order(results(case), order)
    for name, got in results(permuted(case, order)).items():
        close(name, got, wanted[name])


def strange(x, how):
    """The same numbers, laid out otherwise."""
    if how == "read-only":
        y = x.copy()
        y.flags.writeable = False
    elif how == "every second":
        y = np.repeat(x, 2, axis=-1)[..., ::2]
    elif how == "backwards":
        y = x[::-1].copy()[::-1]
    elif how == "columns first":
        y = np.asfortranarray(x)
    else:
        y = np.frombuffer(b"_" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)
    assert np.array_equal(x, y)
    return y


@dtypes
@pytest.mark.parametrize("how", ["read-only", "every second", "backwards", "columns first", "unaligned"])
def test_any_layout_of_the_inputs(how, dtype):
    case = draw(30, 25, 200, 3, 8, 16, ALL, dtype)
    wanted = results(case)
    terms = {name: strange(x, how) for name, x in case.terms.items()}
    laid = Case(*(strange(x, how) for x in case.inputs), case.edge_index, terms, strange(case.grad_output, how))
    before = [x.copy() for x in (*laid.inputs, *terms.values(), laid.grad_output)]
    same_bits(results(laid), wanted)
    for x, kept in zip((*laid.inputs, *terms.values(), laid.grad_output), before):
        assert np.array_equal(x, kept)


def test_broadcast_inputs_and_lists():
    case = draw(6, 5, 20, 1, 3, 3)
    one = np.broadcast_to(case.key[:1], case.key.shape)
    same_bits(results(case._replace(key=one)), results(case._replace(key=one.copy())))
    listed = [x.tolist() for x in case.inputs]
    close("output", rv.neighbor_attention(*listed, case.graph), case.exact().output)


def test_graphs_too_large_for_int32_give_the_same_bits():
    """Such a graph does not fit a test: a small one with its index type."""
    rng = np.random.default_rng(5)
    small = rv.CSRGraph.from_edge_index(rng.integers(0, 9, (2, 60)), num_nodes=9)
    large = _assembled(*(x.astype(np.int64) for x in (small.indptr, small.indices, small.edge_ids)), 9)
    x = rng.standard_normal((9, 2, 5))
    found = []
    for graph in (small, large):
        cache = rv.neighbor_attention_forward(x, x, x, graph)
        gradients = rv.neighbor_attention_backward(np.ones_like(x), cache)
        found.append((cache.output, cache.coefficients(), gradients.query, gradients.key, gradients.value))
    assert large.transposed.targets.dtype == np.int64
    assert all(np.array_equal(one, two) for one, two in zip(*found, strict=True))
