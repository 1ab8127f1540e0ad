"""Aggregation "max" over neighbours: whose value it is, in few edges and many, and where its gradient goes."""

import numpy as np
import pytest
from neighbor_cases import Case, conforms, draw, dtypes, results, same_bits

import ruvector_numba as rv

# of one target: less than a batch, one and a few of them, and so many that it is cut into parts
MANY = [5, 128, 129, 300, 4000, 9000]
SHAPES = [(1, 1), (3, 7), (4, 16), (2, 40), (1, 131), (17, 2)]  # heads and channels: some whole vectors, some not


def flat(E, H, C, values, dtype=np.float64, seed=0, hidden=None):
    """E edges into one of three targets, whose weights are all alike; each edge has a value of its own."""
    rng = np.random.default_rng([E, H, C, seed])
    edge_index = np.stack([rng.integers(0, 4, E), np.where(rng.random(E) < 0.02, 0, 2)])
    terms = {"edge_value": rng.choice(np.array(values, dtype), (E, H, C)), "aggregation": "max"}
    if hidden:
        terms["edge_bias"] = np.where(rng.random((E, H)) < hidden, -np.inf, 0).astype(dtype)
    q, k, v = (np.zeros((n, H, c), dtype) for n, c in ((3, 1), (4, 1), (4, C)))
    return Case(q, k, v, edge_index, terms, rng.standard_normal((3, H, C)).astype(dtype))


def choices(case):
    """(3, H, C): the edge that is the largest, the first of equal ones, the last that is NaN; -1 for none. A loop."""
    value, hidden = case.terms["edge_value"], case.terms.get("edge_bias", 0) == -np.inf
    E, H, C = value.shape
    found, top = np.full((3, H, C), -1), np.zeros((3, H, C))
    for e, target in enumerate(case.edge_index[1]):
        here, before = value[e], top[target]
        with np.errstate(invalid="ignore"):
            better = (found[target] < 0) | (here > before) | np.isnan(here)
        better &= ~np.broadcast_to(hidden, (E, H))[e][:, None]
        found[target][better], top[target][better] = e, here[better]
    return found, top


def is_right(case):
    cache = case.forward()
    found, top = choices(case)
    with np.errstate(invalid="ignore"):
        weight = np.array([1 / max(1, n) for n in degrees(case).ravel()]).reshape(3, -1, 1)
        np.testing.assert_allclose(cache.output, np.where(found < 0, 0, top * weight), rtol=1e-6, atol=0)
    gradient = rv.neighbor_attention_backward(case.grad_output, cache).edge_value
    wanted = np.zeros_like(gradient)
    target, head, channel = np.nonzero(found >= 0)
    wanted[found[target, head, channel], head, channel] = (case.grad_output * weight)[target, head, channel]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-6, atol=0)


def degrees(case):
    """(3, H): the edges of each target that no bias hides"""
    E, H, _ = case.terms["edge_value"].shape
    seen = np.ones((E, H)) if "edge_bias" not in case.terms else case.terms["edge_bias"] == 0
    return np.stack([seen[case.edge_index[1] == target].sum(axis=0) for target in range(3)])


@pytest.mark.core
@pytest.mark.parametrize("hidden", [None, 0.3, 0.995], ids=["seen", "some hidden", "most hidden"])
@pytest.mark.parametrize("E", MANY)
@dtypes
def test_the_first_of_equal_ones_has_the_gradient(E, hidden, dtype):
    """Values of which there are but three, so that each stands in all batches and parts."""
    for H, C in SHAPES:
        is_right(flat(E, H, C, [-1, 0, 2], dtype, hidden=hidden))


@pytest.mark.parametrize("E", MANY)
def test_one_that_is_larger_anywhere_is_found(E):
    for H, C in SHAPES:
        case = flat(E, H, C, [-1, 0])
        case.terms["edge_value"][np.random.default_rng(E).integers(0, E, 4)] = 1
        is_right(case)


@pytest.mark.parametrize("values", [[-np.inf], [-np.inf, np.inf, 1], [np.nan, 1], [np.nan, -np.inf, np.inf]], ids=str)
@pytest.mark.parametrize("E", MANY)
def test_infinity_and_nan(E, values):
    for H, C in SHAPES[:3]:
        is_right(flat(E, H, C, values))
        is_right(flat(E, H, C, [0] * 400 + values, hidden=0.5))


@pytest.mark.core
@dtypes
@pytest.mark.parametrize("hub", [0, 300, 9000])
@pytest.mark.parametrize("terms", ["", "edge_key edge_bias", "edge_value edge_weight"])
def test_it_is_the_specification(terms, hub, dtype):
    for H, C in SHAPES:
        conforms(draw(12, 9, 60, H, 3, C, terms, dtype, hub=hub, aggregation="max"))


def test_threads_change_no_bit():
    case = draw(300, 250, 4000, 3, 8, 21, "edge_value", np.float32, hub=9000, aggregation="max")
    with rv.threads(1):
        alone = results(case)
    same_bits(results(case), alone)


def test_what_was_chosen_is_kept_by_the_edge():
    """8 bytes of an edge with 64 channels: not the edges that each of many targets has chosen in each channel."""
    graph = rv.CSRGraph.from_edge_index([[0, 1], [4, 2]], num_nodes=(2, 50_000))
    x = np.ones((50_000, 4, 16), np.float32)
    cache = rv.neighbor_attention_forward(x, x[:2], x[:2], graph, aggregation="max")
    assert cache._past.kept.chosen.nbytes == 2 * 4 * 16 // 8
