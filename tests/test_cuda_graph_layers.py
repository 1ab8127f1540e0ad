"""GAT, GATv2 and the graph transformer on a GPU, on Numba's simulator, against what they give on the CPU in float64."""

import cuda_simulation as simulation  # first: it skips all of this where the simulator is off
import numpy as np
import pytest
from graph_layer_cases import KINDS, make, random_case
from numba import cuda

import ruvector_numba as rv
from ruvector_numba.errors import (
    AttentionError,
    DimensionMismatchError,
    GraphStructureError,
    InvalidConfigError,
    InvalidInputError,
)
from ruvector_numba.gpu.graph_kinds import kind_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
kinds = pytest.mark.parametrize("kind", KINDS)
TOLERANCE = {"float32": 4e-5, "float16": 2e-2, "bfloat16": 1.2e-1}  # softmaxes here are near 0 and 1, gradients cancel


def rounded(x, element):
    """What is stored, as float64; of a pair, and None, too."""
    if isinstance(x, tuple):
        return tuple(rounded(a, element) for a in x)
    return None if x is None else simulation.values(x, element).astype(np.float64)


def there(x, element):
    if isinstance(x, tuple):
        return tuple(there(a, element) for a in x)
    return None if x is None else cuda.to_device(simulation.values(x, element))


def agrees(name, got, exact, element):
    assert (got is None) == (exact is None), name
    if exact is None:
        return
    got = got.copy_to_host().astype(np.float64)
    assert got.shape == exact.shape, name
    size = np.abs(exact).max(initial=1)
    np.testing.assert_allclose(got, exact, rtol=0, atol=TOLERANCE[element] * size, err_msg=name)


def conforms(case, element="float32", **settings):
    """All results of a call, beside those of the CPU in float64 on the rounded inputs and parameters."""
    layer, grad = case.layer, case.grad_output()
    layer.set_parameters(rounded(layer.get_parameters(), element))
    case = case._replace(
        x=rounded(case.x, element), edge_attr=rounded(case.edge_attr, element),
        edge_weight=rounded(case.edge_weight, element),
    )  # fmt: skip
    grad = rounded(grad, element)
    output, cache = case.forward_cached(**settings)
    exact = layer.backward(grad, cache)
    arrays, weight = [there(x, element) for x in (case.x, case.edge_attr)], there(case.edge_weight, element)
    got, past = layer.forward_cached(arrays[0], case.graph, arrays[1], edge_weight=weight, **settings)
    made = layer.backward(there(grad, element), past)
    agrees("output", got, output, element)
    agrees("coefficients", past.coefficients(), cache.coefficients(), element)
    pairs = [(made.node_features, exact.node_features)]
    if isinstance(case.x, tuple):
        pairs = zip(made.node_features, exact.node_features)
    for n, (a, b) in enumerate(pairs):
        agrees(f"nodes {n}", a, b, element)
    for name in ("edge_attr", "edge_weight"):
        agrees(name, getattr(made, name), getattr(exact, name), element)
    assert list(made.parameters) == list(exact.parameters)
    for name, wanted in exact.parameters.items():
        agrees(name, made.parameters[name], wanted, element)


@pytest.mark.parametrize("n", range(9))
@kinds
def test_random_layers(kind, n):
    conforms(random_case(kind, n))


@kinds
def test_hubs_and_aligned_rows(kind):
    conforms(make(kind, 8, 8, 2, N=12, E=40, hub=40))


@pytest.mark.parametrize("element", ["float16", "bfloat16"])
@kinds
def test_half_precision(kind, element):
    conforms(make(kind, 8, 4, 2, N=12, E=60), element)


@kinds
def test_dropout_is_that_of_the_cpu(kind):
    conforms(make(kind, 4, 4, 2, N=12, E=60, dropout=0.4), seed=3)


@kinds
def test_training_and_the_same_bits_every_time(kind):
    case = make(kind, 4, 4, 2, N=12, E=60, hub=12, dtype=np.float32)
    x, grad = cuda.to_device(case.x), cuda.to_device(case.grad_output())

    def step():
        output, cache = case.layer.forward_cached(x, case.graph)
        return output, case.layer.backward(grad, cache)

    (output, made), (again, twice) = step(), step()
    np.testing.assert_array_equal(output.copy_to_host(), again.copy_to_host())
    for name, g in made.parameters.items():
        assert g.copy_to_host().tobytes() == twice.parameters[name].copy_to_host().tobytes(), name
    case.layer.update_parameters(made, learning_rate=0.5)  # the next set of parameters is uploaded
    changed, _ = step()
    np.testing.assert_allclose(changed.copy_to_host(), case.layer(case.x, case.graph), atol=1e-4)
    assert np.abs(changed.copy_to_host() - output.copy_to_host()).max() > 1e-3


def test_numpy_arrays_are_moved_only_when_asked():
    case = make("GAT", 4, 4, 2, N=12, E=60, edge_dim=2, dtype=np.float32)
    output, cache = case.forward_cached(device="cuda")
    made = case.layer.backward(case.grad_output(), cache)
    for x in (output, cache.coefficients(), made.node_features, made.edge_attr, *made.parameters.values()):
        assert type(x) is np.ndarray
    np.testing.assert_allclose(output, case.forward(), atol=1e-5)


def test_a_class_derived_from_a_layer_is_of_its_kind():
    class Mine(rv.GAT):
        pass

    class Other(rv.GAT):
        def _attend(self, inputs, p, keeps):
            return super()._attend(inputs, p, keeps)

    case = make("GAT", 4, 4, 2, N=12, E=60, dtype=np.float32)
    x, grad = there(case.x, "float32"), there(case.grad_output(), "float32")
    made = []
    for kind in (rv.GAT, Mine):
        layer = kind(4, 4, heads=2, seed=0)
        output, cache = layer.forward_cached(x, case.graph)
        made.append([output, layer.backward(grad, cache).node_features])
    for a, b in zip(*made):
        np.testing.assert_array_equal(a.copy_to_host(), b.copy_to_host())
    for kind in (Other, type("GAT", (rv.HGT,), {})):  # one attends in a way of its own, one only has the name
        assert kind_of(kind) is None
    with pytest.raises(InvalidConfigError, match="Other does not run"):
        Other(4, 4, heads=2)(x, case.graph)


def test_a_large_offset_costs_no_digits_of_the_gradients():
    """delta is of what attention gave, not of the output less what was added to it."""
    case = make("GraphTransformer", 4, 4, 2, N=12, E=60)
    layer = case.layer
    parameters = dict(layer.parameters) | {"lin_skip.weight": 1e4 * layer.parameters["lin_skip.weight"]}
    layer.set_parameters(rounded(np.concatenate([parameters[n].ravel() for n in layer.parameters]), "float32"))
    case, grad = case._replace(x=rounded(case.x, "float32")), rounded(case.grad_output(), "float32")
    exact = layer.backward(grad, case.forward_cached()[1]).parameters["lin_query.weight"]
    _, cache = layer.forward_cached(there(case.x, "float32"), case.graph)
    made = layer.backward(there(grad, "float32"), cache).parameters["lin_query.weight"].copy_to_host()
    assert np.abs(made - exact).max() <= 2e-6 * np.abs(exact).max()


def test_bad_inputs_are_named():
    case = make("GATv2", 4, 4, 2, N=12, E=60, edge_dim=2, dtype=np.float32)
    x, attr = there(case.x, "float32"), there(case.edge_attr, "float32")
    with pytest.raises(InvalidInputError, match="edge_attr is on the CPU"):
        case.layer(x, case.graph, case.edge_attr)
    with pytest.raises(GraphStructureError, match="not a CSRGraph"):
        case.layer(x, cuda.to_device(case.edge_index), attr)
    with pytest.raises(AttentionError, match="the layer was built for 4 channels"):
        case.layer(attr, case.graph, attr)
    with pytest.raises(InvalidInputError, match="differ in dtype"):
        case.layer(x, case.graph, there(case.edge_attr, "float16"))
    with pytest.raises(InvalidInputError, match="graph_forward"):
        case.layer.graph_forward(x, case.graph, attr)
    filled = rv.GATv2(4, 4, heads=2, edge_dim=2, fill_value=[1.0, 2.0, 3.0])
    with pytest.raises(DimensionMismatchError, match=r"fill_value\.shape"):
        filled(x, case.graph, attr)
    filled.fill_value = ["one", "two"]
    with pytest.raises(InvalidInputError, match="fill_value has dtype"):
        filled(x, case.graph, attr)
    _, cache = case.layer.forward_cached(x, case.graph, attr)
    with pytest.raises(AttentionError, match=r"grad_output\.shape"):
        case.layer.backward(x, cache)
    layer = rv.HGT({"node": 4}, 4, (["node"], [("node", "to", "node")]))
    with pytest.raises(InvalidInputError, match="HGT does not run"):
        layer({"node": x}, {("node", "to", "node"): case.graph})
