"""Graph layers as objects: their parameters and files, training, what they say of themselves, and bad calls."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import scipy.sparse
from graph_layer_cases import KINDS, make
from neighbor_cases import refused, rows

import ruvector_numba as rv
from ruvector_numba.errors import AttentionError, InvalidConfigError, OutOfMemoryError

kinds = pytest.mark.parametrize("kind", KINDS)

# In 3 (and 5 of targets), out 2, heads 4, edge_dim 6: what PyTorch Geometric has in its state.
SHAPES = {
    ("GAT", "plain"): {"att_src": (1, 4, 2), "att_dst": (1, 4, 2), "bias": (8,), "lin.weight": (8, 3)},
    ("GAT", "all"): {
        "att_src": (1, 4, 2), "att_dst": (1, 4, 2), "att_edge": (1, 4, 2), "bias": (2,), "lin_src.weight": (8, 3),
        "lin_dst.weight": (8, 5), "lin_edge.weight": (8, 6), "res.weight": (2, 5),
    },
    ("GATv2", "plain"): {
        "att": (1, 4, 2), "bias": (8,), "lin_l.weight": (8, 3), "lin_l.bias": (8,), "lin_r.weight": (8, 3),
        "lin_r.bias": (8,),
    },
    ("GATv2", "all"): {
        "att": (1, 4, 2), "bias": (2,), "lin_l.weight": (8, 3), "lin_l.bias": (8,), "lin_r.weight": (8, 5),
        "lin_r.bias": (8,), "lin_edge.weight": (8, 6), "res.weight": (2, 5),
    },
    ("GraphTransformer", "plain"): {
        f"lin_{n}.{part}": shape
        for n in ("key", "query", "value", "skip") for part, shape in (("weight", (8, 3)), ("bias", (8,)))
    },
    ("GraphTransformer", "all"): {
        "lin_key.weight": (8, 3), "lin_key.bias": (8,), "lin_query.weight": (8, 5), "lin_query.bias": (8,),
        "lin_value.weight": (8, 3), "lin_value.bias": (8,), "lin_edge.weight": (8, 6), "lin_skip.weight": (2, 5),
        "lin_skip.bias": (2,), "lin_beta.weight": (1, 6),
    },
}  # fmt: skip


def everything(kind):
    return {"edge_dim": 6, "concat": False, **({"beta": True} if kind == "GraphTransformer" else {"residual": True})}


# --- parameters ------------------------------------------------------------------------------------------------------
@kinds
def test_parameters_have_the_names_and_shapes_of_pyg(kind):
    plain = getattr(rv, kind)(3, 2, 4)
    assert dict(plain.parameters.shapes) == SHAPES[kind, "plain"]
    full = getattr(rv, kind)((3, 5), 2, 4, **everything(kind))
    assert dict(full.parameters.shapes) == SHAPES[kind, "all"]
    for layer in (plain, full):
        sizes = [int(np.prod(shape)) for shape in layer.parameters.shapes.values()]
        assert layer.parameter_count() == sum(sizes) == layer.get_parameters().size
        assert layer.parameters.dtype == np.float32
    assert not any(n.endswith("bias") for n in getattr(rv, kind)(3, 2, bias=False).parameters)


@kinds
def test_parameters_begin_seeded_small_and_not_all_alike(kind):
    one, same, other = (getattr(rv, kind)(30, 20, 4, seed=seed, dtype=np.float64) for seed in (1, 1, 2))
    assert np.array_equal(one.get_parameters(), same.get_parameters())
    assert not np.array_equal(one.get_parameters(), other.get_parameters())
    for name, x in one.parameters.items():
        bound = np.sqrt(6 / (x.shape[-1] + x.shape[-2])) if x.ndim > 1 else 1
        bound = max(bound, x.shape[-1] ** -0.5)  # that of torch's own Linear
        assert np.abs(x).max() <= bound, name
        assert name.endswith("bias") or np.unique(x).size == x.size, name


@kinds
def test_copies_pickles_and_files(kind, tmp_path):
    pytest.importorskip("safetensors")
    case = make(kind, edge_dim=2, dropout=0.1, concat=False)
    wanted = case.forward()
    for twin in (copy.deepcopy(case.layer), pickle.loads(pickle.dumps(case.layer))):
        assert np.array_equal(case._replace(layer=twin).forward(), wanted)
    path = tmp_path / "layer.safetensors"
    case.layer.save(path)
    other = make(kind, edge_dim=2, dropout=0.1, concat=False, seed=1)._replace(x=case.x, edge_index=case.edge_index)
    other = other._replace(edge_attr=case.edge_attr)
    assert not np.array_equal(other.forward(), wanted)
    other.layer.load(path)
    assert np.array_equal(other.forward(), wanted)
    before = getattr(rv, kind)(4, 2, 2, edge_dim=2)
    held = before.get_parameters()
    with pytest.raises(AttentionError):
        before.load(path)
    assert np.array_equal(before.get_parameters(), held)
    with pytest.raises(InvalidConfigError):
        getattr(rv, "GATv2" if kind != "GATv2" else "GAT")(3, 2, 2, edge_dim=2, concat=False).load(path)


@kinds
def test_training_reduces_a_loss(kind):
    case = make(kind, 4, 3, 2, N=30, E=120, edge_dim=2)
    case.layer.set_parameters(0.3 * case.layer.get_parameters())
    wanted, losses = np.random.default_rng(1).standard_normal((30, 6)), []
    for _ in range(30):
        output, cache = case.forward_cached()
        losses.append(np.mean((output - wanted) ** 2))
        case.layer.update_parameters(case.layer.backward(2 * (output - wanted) / wanted.size, cache), 0.3)
    assert losses[-1] < 0.9 * losses[0]
    assert all(b < a for a, b in itertools.pairwise(losses))


@kinds
def test_accumulated_gradients_are_the_mean(kind):
    case = make(kind)
    g = case.layer.backward(case.grad_output(), case.forward_cached()[1])
    case.layer.zero_grad()
    case.layer.accumulate(g)
    case.layer.accumulate(g)
    for name, mean in case.layer.mean_gradients().items():
        np.testing.assert_allclose(mean, g.parameters[name])


@kinds
def test_a_cache_is_answered_by_what_it_was_computed_with(kind):
    """Parameters that changed meanwhile do not matter."""
    case = make(kind)
    _, cache = case.forward_cached()
    wanted = case.layer.backward(case.grad_output(), cache)
    grad = case.grad_output()
    case.layer.set_parameters(case.layer.get_parameters() * 0)
    assert np.array_equal(case.layer.backward(grad, cache).node_features, wanted.node_features)


@kinds
def test_it_says_what_it_is(kind):
    layer = getattr(rv, kind)(3, 2, 4, edge_dim=6, concat=False)
    assert isinstance(layer, rv.Trainable)
    assert layer.name() == kind and kind in repr(layer)
    assert (layer.num_graph_heads(), layer.d_model()) == (4, 2)
    assert layer.supports_edge_features() and not layer.supports_heterogeneous()
    plain = getattr(rv, kind)(3, 2, 4)
    assert plain.d_model() == 8 and not plain.supports_edge_features()


# --- bad calls -------------------------------------------------------------------------------------------------------
BAD_SETTINGS = [
    ("in_channels", 0), ("in_channels", -3), ("in_channels", 2.5), ("in_channels", (3, 4, 5)), ("in_channels", "3"),
    ("in_channels", None), ("in_channels", (3, 0)), ("in_channels", True), ("out_channels", 0), ("out_channels", 1.5),
    ("out_channels", None), ("heads", 0), ("heads", -1), ("heads", 1.0), ("heads", "2"), ("dropout", -0.1),
    ("dropout", 1.5), ("dropout", np.nan), ("dropout", "x"), ("edge_dim", 0), ("edge_dim", -1), ("edge_dim", 1.5),
    ("aggregation", "median"), ("aggregation", None), ("dtype", np.int64), ("dtype", np.float16), ("dtype", "x"),
    ("seed", "a"), ("seed", -1), ("aggregation", np.array(["sum", "max"])), ("dtype", (None, np.zeros(2))),
]  # fmt: skip
BAD_OF_GAT = [
    ("negative_slope", np.nan), ("negative_slope", "x"), ("negative_slope", np.inf), ("add_self_loops", "sometimes"),
    ("add_self_loops", None), ("add_self_loops", np.array(["add", "keep"])), ("fill_value", "median"),
    *[("fill_value", x) for x in (None, object(), {}, True, 1j, ["a"], [[1.0], [1.0, 2.0]], np.ma.array([1.0]))],
]  # fmt: skip


def build(kind, name, x):
    return getattr(rv, kind)(**{"in_channels": 3, "out_channels": 2, name: x})


@pytest.mark.parametrize(("name", "x"), BAD_SETTINGS, ids=str)
@kinds
def test_bad_settings(kind, name, x):
    refused(lambda: build(kind, name, x), name)


@pytest.mark.parametrize("x", ["no", None, 2, 0.0, np.array([True])], ids=str)
@pytest.mark.parametrize("kind, name", [
    ("GAT", "concat"), ("GAT", "bias"), ("GAT", "residual"), ("GAT", "normalize"), ("GATv2", "share_weights"),
    ("GraphTransformer", "beta"), ("GraphTransformer", "root_weight"), ("GraphTransformer", "normalize"),
])  # fmt: skip
def test_options_are_on_or_off(kind, name, x):
    refused(lambda: build(kind, name, x), name, "give True or False")
    for on in (True, np.True_, 1):
        assert getattr(build(kind, name, on), name) is True
    for off in (False, np.False_, 0):
        assert getattr(build(kind, name, off), name) is False


@pytest.mark.parametrize(("name", "x"), BAD_OF_GAT, ids=str)
@pytest.mark.parametrize("kind", ["GAT", "GATv2"])
def test_bad_settings_of_gat(kind, name, x):
    refused(lambda: build(kind, name, x), name)


@pytest.mark.parametrize("name", ["in_channels", "out_channels", "heads", "edge_dim"])
@kinds
def test_sizes_beyond_memory(kind, name):
    for n in (10**13, 2**63, 10**400):
        with pytest.raises(OutOfMemoryError, match=name):
            build(kind, name, n)
    with pytest.raises(OutOfMemoryError, match="parameters"):  # each size would do alone
        getattr(rv, kind)(10**8, 10**8)


@pytest.mark.parametrize("number", [1e39, -1e39])
@pytest.mark.parametrize("kind, name", [
    ("GAT", "negative_slope"), ("GATv2", "negative_slope"), ("GraphTransformer", "scale"),
])  # fmt: skip
def test_numbers_beyond_float32(kind, name, number):
    layer = getattr(rv, kind)(3, 2, **{name: number}, seed=0)
    told = f"{name} is {number}", "float32 ends at 3.4e+38"
    for call in (layer.forward, layer.forward_cached):
        refused(lambda call=call: call(X.astype(np.float32), EDGES), *told)
    assert np.isfinite(layer(X, EDGES)).all()  # float64 holds them


def test_shared_weights_need_one_width():
    refused(lambda: rv.GATv2((3, 5), 2, share_weights=True), "share_weights")
    with pytest.raises(TypeError, match="share_weights"):  # GATv2 alone has it
        rv.GAT(3, 2, share_weights=True)


EDGES = np.array([[0, 1, 2, 3, 4, 0, 0], [0, 0, 1, 1, 1, 2, 2]])
LOOPLESS = {"add_self_loops": False}
X, ATTR, WEIGHT = rows(5, 3), rows(7, 6), rows(7)
BAD_CALLS = [  # of a layer with in 3, edge_dim 6
    ("x", (rows(5, 4), EDGES, ATTR)), ("x", (rows(5), EDGES, ATTR)), ("x", (rows(5, 3, 1), EDGES, ATTR)),
    ("x", (rows(5, 3, dtype=np.int64), EDGES, ATTR)), ("x", (rows(5, 3, dtype=complex), EDGES, ATTR)),
    ("x", (None, EDGES, ATTR)), ("x", ("x", EDGES, ATTR)), ("x", ([[1.0], [1.0, 2.0]], EDGES, ATTR)),
    ("x", ((X, X, X), EDGES, ATTR)), ("x", ((X, rows(3, 4)), EDGES, ATTR)), ("x", ((None, X), EDGES, ATTR)),
    ("x", (rows(4, 3), rv.CSRGraph.from_edge_index(EDGES, 5), ATTR)),
    ("x", (X, rv.CSRGraph.from_edge_index(EDGES, (5, 3)), ATTR)),
    ("x", ((X, rows(4, 3)), rv.CSRGraph.from_edge_index(EDGES, (5, 3)), ATTR)),
    ("x has 4 rows, and edge_index names node 4, at edge 4\n  x.shape: (4, 3)", (rows(4, 3), EDGES, ATTR)),
    ("x_source has 4 rows, and edge_index names source 4", ((rows(4, 3), X), EDGES, ATTR)),
    ("x_target has 2 rows, and edge_index names target 2", ((X, rows(2, 3)), EDGES, ATTR)),
    ("x has 0 rows, and edge_index names node 0", (rows(0, 3), EDGES, ATTR)),
    ("edge_index", (X, EDGES.T, ATTR)), ("edge_index", (X, EDGES.astype(float), ATTR)),
    ("edge_index", (X, EDGES[0], ATTR)),
    ("target -1", (X, np.array([[0], [-1]]), rows(1, 6))),
    ("edge_attr", (X, EDGES, rows(6, 6))), ("edge_attr", (X, EDGES, rows(7, 5))), ("edge_attr", (X, EDGES, rows(7))),
    ("edge_attr", (X, EDGES, rows(7, 6, dtype=np.int64))), ("edge_attr", (X, EDGES, rows(7, 6, 1))),
    ("edge_attr", (X, EDGES, "x")),
]  # fmt: skip


@pytest.mark.parametrize(("told", "call"), BAD_CALLS)
@kinds
def test_bad_inputs(kind, told, call):
    layer = getattr(rv, kind)(3, 2, 2, edge_dim=6, dtype=np.float64)
    refused(lambda: layer.forward(*call), told)
    refused(lambda: layer.forward_cached(*call), told)


@kinds
def test_more_bad_inputs(kind):
    layer = getattr(rv, kind)(3, 2, 2, edge_dim=6, dtype=np.float64)
    for graph in (None, "graph", 3):
        refused(lambda graph=graph: layer.forward(X, graph, ATTR))
    for weight in (rows(6), rows(7, 2), rows(7, dtype=complex), "x"):
        refused(lambda weight=weight: layer.forward(X, EDGES, ATTR, edge_weight=weight), "edge_weight")
    plain = getattr(rv, kind)(3, 2, 2, dtype=np.float64)
    refused(lambda: plain.forward(X, EDGES, ATTR), "edge_dim")
    refused(lambda: plain.graph_forward(X, EDGES, ATTR), "edge_dim")
    for seed in (-1, 1.5, "a"):
        refused(lambda seed=seed: getattr(rv, kind)(3, 2, dropout=0.5).forward_cached(X, EDGES, seed=seed), "seed")
    for matrix in (np.eye(5), EDGES, None):
        refused(lambda matrix=matrix: plain.sparse_forward(X, matrix))


def test_who_needs_features_of_edges_or_targets():
    refused(lambda: rv.GraphTransformer(3, 2, edge_dim=6, dtype=np.float64).forward(X, EDGES), "edge_attr")
    graph = rv.CSRGraph.from_edge_index(EDGES, (5, 3))
    for kind in ("GATv2", "GraphTransformer"):
        layer = getattr(rv, kind)(3, 2, dtype=np.float64)
        refused(lambda layer=layer: layer.forward((X, None), graph), "x")


@kinds
def test_bad_gradients_and_caches(kind):
    case = make(kind)
    output, cache = case.forward_cached()
    for grad in (output[1:], output[:, 1:], output[..., None], output.astype(np.float32), output * 1j, "x", None):
        refused(lambda grad=grad: case.layer.backward(grad, cache), "grad_output")
    twins = copy.deepcopy(case.layer), pickle.loads(pickle.dumps(case.layer))
    for layer, left in ((twins[0], cache), (case.layer, copy.deepcopy(cache)), (twins[1], copy.deepcopy(cache))):
        found = layer.backward(case.grad_output(), left)
        assert np.array_equal(found.node_features, case.layer.backward(case.grad_output(), cache).node_features)
    refused(lambda: make(kind).layer.backward(output, cache), f"cache is that of another {kind}")
    other = make("GAT" if kind != "GAT" else "GATv2").forward_cached()[1]
    for wrong in (None, output, other, make(kind).graph):
        refused(lambda wrong=wrong: case.layer.backward(output, wrong), "cache")


# --- matrices --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["coo", "csr", "csc", "lil"])
@kinds
def test_entries_of_a_matrix_are_edges(kind, form):
    """Duplicates of a COO matrix too, whose entries other formats add up."""
    layer = getattr(rv, kind)(3, 2, 2, edge_dim=1, dtype=np.float64, **({} if "Tr" in kind else LOOPLESS))
    (source, target), values = EDGES, np.arange(7.0)
    matrix = scipy.sparse.coo_array((values, (target, source)), shape=(5, 5))
    if form != "coo":
        matrix = matrix.asformat(form)
        target, source = matrix.tocoo().coords
        values = matrix.tocoo().data
    output, coefficients = layer.graph_forward(X, [source, target], values)
    features, found = layer.sparse_forward(X, matrix)
    np.testing.assert_allclose(features, output, rtol=1e-12)
    assert found.shape == (5, 5) and found.nnz == len(values)
    np.testing.assert_allclose(found.sum(axis=1)[:3], 1)  # the others have no edges
    np.testing.assert_allclose(found.sum(), coefficients.mean(axis=1).sum())


@kinds
def test_matrices_of_a_bipartite_graph_and_of_complex_numbers(kind):
    layer = getattr(rv, kind)((3, 4), 2, edge_dim=1, **({} if "Tr" in kind else LOOPLESS))
    pair = rows(5, 3, dtype=np.float32), rows(3, 4, dtype=np.float32)
    matrix = scipy.sparse.coo_array((np.arange(7.0), EDGES[::-1]), shape=(3, 5))
    for given in (pair, list(pair)):
        features, found = layer.sparse_forward(given, matrix)
    assert features.shape == (3, 2) and features.dtype == np.float32 and found.shape == (3, 5)
    refused(lambda: layer.sparse_forward(pair, matrix * 1j), "adjacency has dtype complex128")
