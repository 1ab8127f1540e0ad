"""GAT, GATv2 and the graph transformer: the formula, all gradients, dropout, bits, and what a graph may look like."""

import tracemalloc

import graph_reference as spec
import numba
import numpy as np
import pytest
from graph_layer_cases import KINDS, first, make, random_case
from reference import central_differences
from ruvector_numba.kernels.simd import target

import ruvector_numba as rv

MOST = numba.config.NUMBA_NUM_THREADS
kinds = pytest.mark.parametrize("kind", KINDS)
DTYPES = [np.float64, np.float32]


def agrees(got, exact, dtype=np.float64):
    """Within rounding of the largest magnitude, or of 1."""
    assert got.shape == exact.shape and got.dtype == dtype
    tolerance = {np.float64: 1e-12, np.float32: 2e-5}[dtype]
    np.testing.assert_allclose(got, exact, rtol=0, atol=tolerance * max(1, np.abs(exact).max(initial=0)))


def results(case, **settings):
    """All bits of a call, by name."""
    output, cache = case.forward_cached(**settings)
    g = case.layer.backward(case.grad_output(), cache)
    pair = g.node_features if isinstance(case.x, tuple) else (g.node_features,)
    found = {
        "output": output,
        "coefficients": cache.coefficients(),
        "edge_attr": g.edge_attr,
        "edge_weight": g.edge_weight,
    }
    found |= {f"node_features {n}": x for n, x in enumerate(pair)}
    return found | {name: g.parameters.get(name) for name in case.layer.parameters}


def same_bits(got, wanted):
    assert got.keys() == wanted.keys()
    for name, w in wanted.items():
        assert (got[name] is None) == (w is None), name
        assert w is None or got[name].tobytes() == w.tobytes(), name


def gradients_are_central_differences(case, **settings):
    """Of the layer's own results: of every parameter and of every array it is called with."""
    layer, grad = case.layer, case.grad_output()
    _, cache = case.forward_cached(**settings)
    got = layer.backward(grad, cache)
    held = layer.parameters

    def loss(**changed):
        return (grad * case._replace(**changed).forward_cached(**settings)[0]).sum()

    def measured(name, found, f, x):
        wanted = central_differences(f, x)
        assert found.dtype == x.dtype
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7, err_msg=name)

    def of_flat(flat):
        layer.set_parameters(flat)
        return loss()

    zeros = {name: np.zeros(shape) for name, shape in held.shapes.items()}
    found = zeros | {name: g for name, g in got.parameters.items() if g is not None}
    assert list(found) == list(held), "gradients of parameters that there are not"
    assert all(found[name].shape == shape for name, shape in held.shapes.items())
    measured("parameters", np.concatenate([np.ravel(found[name]) for name in held]), of_flat, held.flat)
    layer.set_parameters(held.flat)
    for name in ("edge_attr", "edge_weight"):
        if getattr(case, name) is None:
            assert getattr(got, name) is None
        else:
            measured(name, getattr(got, name), lambda y, name=name: loss(**{name: y}), getattr(case, name))
    if not isinstance(case.x, tuple):
        measured("x", got.node_features, lambda y: loss(x=y), case.x)
        return
    source, target = case.x
    measured("sources", got.node_features[0], lambda y: loss(x=(y, target)), source)
    if target is None:
        assert got.node_features[1] is None
    else:
        measured("targets", got.node_features[1], lambda y: loss(x=(source, y)), target)


# --- the formula and its gradients ----------------------------------------------------------------------------------
@pytest.mark.core
@pytest.mark.parametrize("n", range(25))
@kinds
def test_random_layers(kind, n):
    case = random_case(kind, n)
    exact = case.exact()
    output, cache = case.forward_cached(training=False)
    agrees(output, exact.output)
    agrees(cache.coefficients(), exact.coefficients)
    assert np.array_equal(cache.graph.to_edge_index(), exact.edge_index)
    assert np.array_equal(case.forward(), output)
    gradients_are_central_differences(case)


@kinds
def test_a_call_is_forward_and_float32_stays(kind):
    case = make(kind, 5, 4, 3, N=40, E=300, edge_dim=2, dtype=np.float32)
    x, graph, attr = case.call[0]
    agrees(case.layer(x, graph, attr), case.exact().output, np.float32)
    assert np.array_equal(case.layer(x, graph, attr), case.forward())
    for name, g in results(case).items():
        assert g is None or g.dtype == np.float32, name


@kinds
def test_float32_is_near_float64(kind):
    single, double = (make(kind, 5, 8, 3, N=40, E=300, edge_dim=2, dtype=dtype) for dtype in (np.float32, np.float64))
    double.layer.set_parameters(single.layer.get_parameters().astype(np.float64))
    double = double._replace(x=single.x.astype(np.float64), edge_attr=single.edge_attr.astype(np.float64))
    output, cache = double.forward_cached()
    wanted = double.layer.backward(single.grad_output().astype(np.float64), cache)
    found = results(single)
    agrees(found["output"], output, np.float32)
    agrees(found["node_features 0"], wanted.node_features, np.float32)
    agrees(found["edge_attr"], wanted.edge_attr, np.float32)
    largest = max(np.abs(g).max() for g in wanted.parameters.values())  # that of lin_key.bias cancels to nothing
    for name, g in wanted.parameters.items():
        agrees(found[name] / np.float32(largest), g / largest, np.float32)


@pytest.mark.parametrize("kind", ["GAT", "GATv2"])
def test_loops_with_an_array_to_fill_with(kind):
    fill = np.array([0.5, -2.0])
    for policy in ("replace", "add"):
        case = make(kind, edge_dim=2, add_self_loops=policy, fill_value=fill)
        agrees(case.forward(), case.exact().output)
        gradients_are_central_differences(case)


@pytest.mark.parametrize("kind", ["GAT", "GATv2"])
def test_a_new_loop_has_edge_weight_one(kind):
    for policy in ("replace", "add"):
        case = make(kind, weighted=True, add_self_loops=policy)
        agrees(case.forward(), case.exact().output)
        gradients_are_central_differences(case)


def test_one_array_for_a_layer_that_tells_sources_from_targets():
    for kind in KINDS:
        case = make(kind, (3, 3), pair=False)
        agrees(case.forward(), case.exact().output)
        gradients_are_central_differences(case)


def test_at_exactly_zero_the_slope_counts():
    """As in torch: the gradient of LeakyReLU at 0 is its slope."""

    def of_gat(slope):
        case = make("GAT", negative_slope=slope)
        zeros = {name: np.zeros(shape) for name, shape in case.layer.parameters.shapes.items()}
        case.layer.set_parameters({**zeros, "lin.weight": case.layer.parameters["lin.weight"]})
        return case, "att_src"

    def of_gatv2(slope):
        """Its edges take from each channel what the source brings, and the targets bring nothing."""
        case = make("GATv2", 1, 1, 1, edge_dim=1, add_self_loops=False, negative_slope=slope)
        case.layer.set_parameters({name: np.full(x.shape, 0.0 if "_r" in name or "bias" in name else 1.5)
                                   for name, x in case.layer.parameters.items()})  # fmt: skip
        return case._replace(edge_attr=-case.x[case.edge_index[0]]), "lin_edge.weight"

    for of_kind in (of_gat, of_gatv2):
        found = []
        for slope in (1.0, 0.2):
            case, name = of_kind(slope)
            _, cache = case.forward_cached()
            grad = np.random.default_rng(0).standard_normal(case.exact().output.shape)
            found.append(case.layer.backward(grad, cache).parameters[name])
        assert np.abs(found[0]).min() > 1e-3
        np.testing.assert_allclose(found[1], 0.2 * found[0], rtol=1e-12)


def has_the_slope_of_a_loss(case):
    """The gradients along one random direction of all parameters and inputs."""
    inputs = {name: getattr(case, name) for name in ("x", "edge_attr") if getattr(case, name) is not None}
    grad = case.grad_output()
    g = case.layer.backward(grad, case.forward_cached()[1])
    rng, flat = np.random.default_rng(0), case.layer.get_parameters()
    way, ways = rng.standard_normal(flat.shape), {name: rng.standard_normal(y.shape) for name, y in inputs.items()}
    slope = np.concatenate([np.ravel(g.parameters[n]) for n in case.layer.parameters]) @ way
    found = {"x": g.node_features, "edge_attr": g.edge_attr}
    slope += sum((found[name] * ways[name]).sum() for name in inputs)

    def loss(t):
        case.layer.set_parameters(flat + t * way)
        return (grad * case._replace(**{name: y + t * ways[name] for name, y in inputs.items()}).forward()).sum()

    t = 1e-7  # short: of 9000 scores some are close to the kink of LeakyReLU
    measured = (loss(t) - loss(-t)) / (2 * t)
    case.layer.set_parameters(flat)
    np.testing.assert_allclose(slope, measured, rtol=1e-4)


@kinds
def test_a_hub(kind):
    """Against the specification, and the gradients along one random direction."""
    case = make(kind, 4, 8, 2, N=30, E=100, hub=9000, edge_dim=2)
    agrees(case.forward(), case.exact().output)
    has_the_slope_of_a_loss(case)


@pytest.mark.core
@pytest.mark.parametrize("channels", [7, 8])
def test_a_gate_of_many_nodes(channels):
    """Of several tasks; rows are whole vectors, or not."""
    found = []
    for n in sorted({1, MOST}):
        with rv.threads(n):
            case = make("GraphTransformer", 4, channels, 3, N=700, E=1500, beta=True)
            found.append(results(case))
    assert all(np.array_equal(found[0][name], x) for name, x in found[-1].items() if x is not None)
    agrees(case.forward(), case.exact().output)
    has_the_slope_of_a_loss(case)


def test_a_gate_takes_gradients_of_any_layout():
    case = make("GraphTransformer", 4, 3, 2, beta=True)
    grad, (_, cache) = case.grad_output(), case.forward_cached()
    wanted = case.layer.backward(grad, cache)
    for other in (np.asfortranarray(grad), np.repeat(grad, 2, axis=1)[:, ::2], grad[::-1].copy()[::-1]):
        got = case.layer.backward(other, cache)
        assert np.array_equal(got.node_features, wanted.node_features)
        assert all(np.array_equal(x, wanted.parameters[name]) for name, x in got.parameters.items())


def test_a_gate_that_is_open_or_shut():
    """Where exp(-z) is infinity or 0"""
    case = make("GraphTransformer", 4, 3, 2, N=50, E=200, beta=True, dtype=np.float32)
    weight = case.layer.parameters["lin_beta.weight"]
    case.layer.set_parameters({**case.layer.parameters, "lin_beta.weight": 1e6 * weight})
    with np.errstate(over="ignore"):  # of the specification's exp
        agrees(case.forward(), case.exact().output, np.float32)
        assert all(np.isfinite(x).all() for x in results(case).values() if x is not None)


@pytest.mark.core
@pytest.mark.parametrize("edge_dim", [None, 3])
@pytest.mark.parametrize("vectors", [1, 2, 4])
@kinds
def test_heads_of_whole_vectors(kind, vectors, edge_dim):
    """Which are read as whole tiles; 12 heads are three tiles and no power of two."""
    case = make(kind, 3, vectors * target().lanes(8), 12, N=40, E=300, edge_dim=edge_dim)
    exact = case.exact()
    agrees(case.forward(), exact.output)
    agrees(case.forward_cached()[1].coefficients(), exact.coefficients)
    has_the_slope_of_a_loss(case)
    found = []
    for n in (1, MOST):
        with rv.threads(n):
            found.append(results(case))
    same_bits(*found)


@pytest.mark.parametrize("edge_dim", [1, 7, 70, 300])
@kinds
def test_any_number_of_edge_features(kind, edge_dim):
    """Beside 5 heads of 65 channels: more of both than are summed at once, and none that fills vectors or tiles."""
    case = make(kind, 3, 65, 5, N=12, E=200, edge_dim=edge_dim)
    agrees(case.forward(), case.exact().output)
    has_the_slope_of_a_loss(case)


def test_an_edge_that_its_infinite_feature_hides_adds_nothing():
    """Of score -inf: its features meet no gradient, and infinity times 0 would be NaN in that of their matrix."""
    case = make("GATv2", 3, 5, 2, N=10, E=60, edge_dim=1, add_self_loops=False)
    parameters = dict(case.layer.parameters)
    parameters["att"], parameters["lin_edge.weight"] = abs(parameters["att"]), -abs(parameters["lin_edge.weight"])
    case.layer.set_parameters(parameters)
    rest = case._replace(edge_index=case.edge_index[:, 1:], edge_attr=case.edge_attr[1:])
    assert (rest.edge_index[1] == case.edge_index[1, 0]).any()
    case.edge_attr[0] = np.inf
    grad = case.grad_output()
    found, wanted = (c.layer.backward(grad, c.forward_cached()[1]) for c in (case, rest))
    agrees(case.forward(), rest.forward())
    agrees(found.node_features, wanted.node_features)
    agrees(found.parameters["lin_edge.weight"], wanted.parameters["lin_edge.weight"])
    agrees(found.edge_attr[1:], wanted.edge_attr)
    assert not found.edge_attr[0].any()


@pytest.mark.parametrize("kind", ["GATv2", "GraphTransformer"])
def test_features_of_edges_become_no_array_as_wide_as_nodes(kind):
    case = make(kind, 4, 32, 8, N=50, E=20_000, edge_dim=1, aggregation="mean")
    case.layer.backward(case.grad_output(), case.forward_cached()[1])  # compiles
    tracemalloc.start()
    try:
        output, cache = case.forward_cached()
        case.layer.backward(output, cache)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 20_000 * 8 * 32 * 8 / 4


# --- graphs ----------------------------------------------------------------------------------------------------------
@kinds
def test_edge_index_and_graph_are_alike(kind):
    case = make(kind, 5, 4, 3, N=40, E=300, edge_dim=2)
    x, graph, attr = case.call[0]
    output, cache = case.layer.forward_cached(x, graph, attr)
    for other in (case.edge_index, case.edge_index.astype(np.int32), case.edge_index.tolist()):
        again, other_cache = case.layer.forward_cached(x, other, attr)
        assert np.array_equal(again, output)
        assert np.array_equal(other_cache.coefficients(), cache.coefficients())
        assert np.array_equal(case.layer.forward(x, other, attr), output)
    pair = make(kind, (5, 3), 4, 3, N=(40, 30), E=300)
    assert np.array_equal(pair.layer.forward(pair.x, pair.edge_index), pair.forward())


@pytest.mark.core
@pytest.mark.parametrize("size", [(0, 0), (1, 0), (1, 3), (5, 0)], ids=str)
@kinds
def test_small_graphs(kind, size):
    N, E = size
    for more in ({}, {"add_self_loops": False}) if kind != "GraphTransformer" else ({}, {"beta": True}):
        case = make(kind, N=N, E=E, edge_dim=2, **more)
        agrees(case.forward(), case.exact().output)
        for name, g in results(case).items():
            assert (g is not None and np.isfinite(g).all()) or name == "edge_weight", name


@kinds
def test_isolated_nodes_give_the_bias_or_the_root(kind):
    more = {} if kind == "GraphTransformer" else {"add_self_loops": False}
    case = make(kind, N=6, E=0, **more)._replace(edge_index=np.array([[0, 1], [1, 0]]))
    p = case.layer.parameters
    wanted = np.broadcast_to(p["bias"], (4, 4)) if more else case.x[2:] @ p["lin_skip.weight"].T + p["lin_skip.bias"]
    agrees(case.forward()[2:], wanted)
    g = case.layer.backward(case.grad_output(), case.forward_cached()[1])
    assert g.node_features[2:].any() == (kind == "GraphTransformer")


@pytest.mark.core
@pytest.mark.parametrize("where", ["x", "edge_attr"])
@kinds
def test_nan_stays_where_it_is_seen(kind, where):
    """Two parts without an edge between them: the other part does not notice, forward or backward."""
    case = make(kind, 3, 4, 2, N=20, E=90, edge_dim=2)
    edge_index = np.concatenate([case.edge_index[:, :45] % 10, case.edge_index[:, 45:] % 10 + 10], axis=1)
    case = case._replace(edge_index=edge_index)
    sound, grad = results(case), case.grad_output()
    getattr(case, where)[3] = np.nan
    output, cache = case.forward_cached()
    g = case.layer.backward(grad, cache)
    assert np.isnan(output[3 if where == "x" else edge_index[1, 3]]).all() and not np.isnan(output[:10]).all()
    assert np.array_equal(output[10:], sound["output"][10:])
    assert np.array_equal(g.node_features[10:], sound["node_features 0"][10:])
    assert np.array_equal(g.edge_attr[45:], sound["edge_attr"][45:])


@pytest.mark.core
@pytest.mark.parametrize(
    "more", [{}, {"concat": False}, {"root_weight": True, "beta": True}, {"residual": True}], ids=str
)
@pytest.mark.parametrize("pair", [False, True])
@kinds
def test_nan_that_nobody_sees_is_in_no_gradient(kind, pair, more):
    """Nodes without edges, of whose outputs the loss knows nothing."""
    options = {"root_weight": False} if kind == "GraphTransformer" else {"add_self_loops": False}
    case = make(kind, 3, 4, 2, N=(8, 8) if pair else 8, E=30, **options | more if applies(kind, more) else options)
    case = case._replace(edge_index=case.edge_index % 5)
    grad = case.grad_output()
    grad[5:] = 0
    sound, x = case.layer.backward(grad, case.forward_cached()[1]), case.x
    for nodes in x if pair else (x,):
        nodes[5:7] = [[np.nan], [np.inf]]
    got = case.layer.backward(grad, case.forward_cached()[1])
    for name, wanted in sound.parameters.items():
        np.testing.assert_array_equal(got.parameters[name], wanted, err_msg=name)


def applies(kind, settings):
    """GraphTransformer has a root where the others have a residual."""
    return not ("residual" in settings if kind == "GraphTransformer" else "beta" in settings)


# --- dropout ---------------------------------------------------------------------------------------------------------
@kinds
def test_dropout_is_what_the_seed_says(kind):
    case = make(kind, N=30, E=200, dropout=0.4)
    dropped = results(case, seed=5)
    same_bits(results(case, seed=5), dropped)
    assert not np.array_equal(results(case, seed=6)["output"], dropped["output"])
    assert not np.array_equal(case.forward_cached()[0], case.forward_cached()[0])
    assert np.array_equal(case.forward_cached(training=False, seed=5)[0], case.forward())
    agrees(case.forward(), case.exact().output)
    agrees(dropped["coefficients"], case.exact().coefficients)  # before dropout


@pytest.mark.parametrize("aggregation", ["sum", "mean", "max"])
@kinds
def test_gradients_with_dropout(kind, aggregation):
    gradients_are_central_differences(make(kind, dropout=0.4, edge_dim=2, aggregation=aggregation), seed=5)


@kinds
def test_dropout_keeps_the_mean_and_may_drop_all(kind):
    case = make(kind, N=4, E=24, dropout=0.3)
    mean = np.mean([case.forward_cached(seed=n)[0] for n in range(2000)], axis=0)
    np.testing.assert_allclose(mean, case.forward(), atol=0.1 * np.abs(case.forward()).max())
    case = make(kind, dropout=1.0)
    agrees(case.forward_cached(seed=1)[0], case.exact(keep=np.zeros_like(case.exact().coefficients)).output)


# --- bits ------------------------------------------------------------------------------------------------------------
@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@kinds
def test_threads_change_no_bit(kind, dtype):
    case = make(kind, 16, 8, 2, N=3000, E=30_000, hub=9000, edge_dim=3, dropout=0.3, dtype=dtype)
    found = []
    for n in sorted({1, 2, MOST} & set(range(1, MOST + 1))):
        with rv.threads(n):
            found.append(results(case, seed=2))
    for other in found[1:]:
        same_bits(other, found[0])


@kinds
def test_edges_in_any_order_change_nothing_but_rounding(kind):
    case = make(kind, 5, 4, 3, N=40, E=300, edge_dim=2)
    order = np.random.default_rng(0).permutation(300)
    other = case._replace(edge_index=case.edge_index[:, order], edge_attr=case.edge_attr[order])
    got, wanted = results(other), results(case)
    wanted["edge_attr"] = wanted["edge_attr"][order]
    for name in wanted:
        if wanted[name] is not None and name != "coefficients":
            agrees(got[name], wanted[name])


@kinds
def test_any_layout_of_the_inputs(kind):
    case = make(kind, 6, 4, 2, N=40, E=300, edge_dim=2)
    wanted = results(case)

    def read_only(x):
        x = np.asfortranarray(np.repeat(x, 2, axis=0))[::2]
        x.flags.writeable = False
        return x

    same_bits(results(case._replace(x=read_only(case.x), edge_attr=read_only(case.edge_attr))), wanted)


# --- the plan's two forward passes -----------------------------------------------------------------------------------
@pytest.mark.parametrize("edge_dim", [None, 2])
@kinds
def test_graph_forward(kind, edge_dim):
    """Coefficients in the caller's order, of the caller's edges: those of new loops are left out."""
    case = make(kind, N=9, E=0, edge_dim=edge_dim)
    edge_index = np.stack(np.nonzero(~np.eye(9, dtype=bool)))[:, np.random.default_rng(0).permutation(72)[:30]]
    attr = None if edge_dim is None else np.random.default_rng(1).standard_normal((30, edge_dim))
    case = case._replace(edge_index=edge_index, edge_attr=attr)
    features, coefficients = case.layer.graph_forward(case.x, edge_index, attr)
    agrees(features, case.exact().output)
    agrees(coefficients, case.exact().coefficients[:30])


@kinds
def test_sparse_forward(kind):
    import scipy.sparse

    case = make(kind, N=9, E=0)
    there = np.random.default_rng(0).random((9, 9)) < 0.4
    np.fill_diagonal(there, False)
    matrix = scipy.sparse.csr_array(there.astype(np.float32))
    targets, sources = np.nonzero(there)
    case = case._replace(edge_index=np.stack([sources, targets]))
    features, coefficients = case.layer.sparse_forward(case.x, matrix)
    exact = case.exact()
    agrees(features, exact.output)
    assert isinstance(coefficients, scipy.sparse.csr_array) and coefficients.shape == (9, 9)
    wanted = np.zeros((9, 9))
    wanted[targets, sources] = exact.coefficients[: len(sources)].mean(axis=1)
    assert np.array_equal(coefficients.indptr, matrix.indptr) and np.array_equal(coefficients.indices, matrix.indices)
    agrees(coefficients.toarray(), wanted)


def test_normalization_left_out():
    """Coefficients are the scores then, and do not sum to 1."""
    for kind, oracle in (("GAT", spec.gat), ("GATv2", spec.gatv2)):
        case = make(kind, normalize=False)
        coefficients = case.forward_cached()[1].coefficients()
        agrees(coefficients, case.exact().coefficients)
        assert not np.allclose(coefficients, oracle(case.layer.parameters, first(case.x), case.edge_index).coefficients)
    for settings in ({}, {"normalize": False}):  # in this order: a hub's parts leave what the next ones must not find
        case = make("GAT", 4, 8, 2, N=30, E=100, hub=9000, **settings)
        agrees(case.forward(), case.exact().output)
