"""Attention over neighbours on a GPU, on Numba's simulator, against the float64 specification.

A node of more than 9 edges is a hub here, cut into parts of 4.
"""

import cuda_simulation as simulation  # first: it skips all of this where the simulator is off
import numpy as np
import pytest
from neighbor_cases import AGGREGATIONS, ALL, TERMS, draw
from numba import cuda

import ruvector_numba as rv
from ruvector_numba.errors import DimensionMismatchError, InvalidInputError

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN and wrapping integers are data here
TOLERANCE = {"float32": 5e-6, "float16": 4e-3, "bfloat16": 3e-2}


def rounded(case, element):
    """The case with all its arrays rounded to the element, which float64 holds."""

    def of(x):
        return simulation.values(x, element).astype(np.float64)

    terms = {name: of(x) if name in TERMS else x for name, x in case.terms.items()}
    return case._replace(
        query=of(case.query), key=of(case.key), value=of(case.value), terms=terms, grad_output=of(case.grad_output)
    )


def call(case, element, **more):
    def there(x):
        return cuda.to_device(simulation.values(x, element))

    terms = {name: there(x) if name in TERMS else x for name, x in case.terms.items()}
    cache = rv.neighbor_attention_forward(*map(there, case.inputs), case.graph, **terms, **more)
    made = rv.neighbor_attention_backward(there(case.grad_output), cache)
    return cache, made


def agrees(name, got, exact, element):
    got = got.copy_to_host().astype(np.float64)
    assert got.shape == exact.shape, name
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(exact), err_msg=name)
    finite = np.isfinite(exact)
    size = np.abs(exact[finite]).max(initial=1)
    np.testing.assert_allclose(got[finite], exact[finite], rtol=0, atol=TOLERANCE[element] * size, err_msg=name)


def conforms(case, element="float32", keep=None, **more):
    case = rounded(case, element)
    cache, made = call(case, element, **more)
    for name, exact in zip(("output", "lse", "coefficients"), case.exact(keep=keep)):
        got = cache.coefficients() if name == "coefficients" else getattr(cache, name)
        agrees(name, got, exact, element)
    exact = case.exact_gradients(keep=keep)
    for name in ("query", "key", "value", *TERMS):
        if name in TERMS and name not in case.terms:
            assert getattr(made, name) is None
        else:
            agrees(f"gradient of {name}", getattr(made, name), exact[name], element)


@pytest.mark.parametrize("element", TOLERANCE)
def test_plain(element):
    conforms(draw(H=2, D=4, C=8, E=60), element)


@pytest.mark.parametrize("terms", [*TERMS, ALL])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_terms(terms, aggregation):
    conforms(draw(terms=terms, aggregation=aggregation, hub=25))


@pytest.mark.parametrize("H, D, C", [(1, 1, 1), (3, 7, 2), (1, 40, 33), (5, 4, 16), (2, 130, 4), (33, 1, 3)])
def test_any_number_of_heads_and_channels(H, D, C):
    conforms(draw(H=H, D=D, C=C, hub=12))


@pytest.mark.parametrize("Nt, Ns, E", [(1, 1, 1), (5, 3, 0), (0, 3, 0), (4, 50, 200), (40, 2, 90)])
def test_any_graph(Nt, Ns, E):
    conforms(draw(Nt=Nt, Ns=Ns, E=E))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_hubs_are_joined_from_their_parts(aggregation):
    conforms(draw(Nt=7, Ns=5, E=120, hub=50, aggregation=aggregation, terms="edge_value"))


def test_half_precision_with_all_terms():
    conforms(draw(terms=ALL, C=8, D=8, hub=20), "bfloat16")


def test_dropout_is_that_of_the_cpu():
    case = draw(terms="edge_weight", dropout_p=0.4, hub=20, dtype=np.float32)
    output = rv.neighbor_attention(*case.inputs, case.graph, **case.terms, seed=5)
    cache, _ = call(case, "float32", seed=5)
    np.testing.assert_allclose(cache.output.copy_to_host(), output, atol=1e-5)


def test_what_is_hidden_does_not_leak():
    case = draw(terms="edge_bias", hub=20, dtype=np.float32)
    alone = case.edge_index[0] == 3
    case.terms["edge_bias"][alone] = -np.inf
    clean, made = call(case, "float32")
    case.key[3], case.value[3] = np.nan, np.inf
    dirty, again = call(case, "float32")
    for a, b in ((clean.output, dirty.output), (made.query, again.query), (made.edge_bias, again.edge_bias)):
        np.testing.assert_array_equal(a.copy_to_host(), b.copy_to_host())
    assert not again.value.copy_to_host()[3].any() and not again.key.copy_to_host()[3].any()


def test_the_same_bits_every_time():
    case = draw(terms=ALL, hub=25, dtype=np.float32)
    first, second = (call(case, "float32") for _ in range(2))
    for name in ("query", "key", "value", *TERMS):
        a, b = (getattr(made, name).copy_to_host() for _, made in (first, second))
        assert a.tobytes() == b.tobytes(), name


@pytest.mark.parametrize("shape", [(65,), (65, 3)])
def test_softmax_over_edges(shape):
    case = draw(hub=25, dtype=np.float32)
    rng = np.random.default_rng(6)
    scores, grad = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    scores[4:7] = -np.inf
    wanted = rv.edge_softmax(scores, case.graph)
    got = rv.edge_softmax(cuda.to_device(scores), case.graph)
    np.testing.assert_allclose(got.copy_to_host(), wanted, atol=1e-6)
    made = rv.edge_softmax_backward(cuda.to_device(grad), got, case.graph)
    np.testing.assert_allclose(made.copy_to_host(), rv.edge_softmax_backward(grad, wanted, case.graph), atol=1e-6)


def test_softmax_over_edges_does_not_multiply_what_has_weight_0():
    graph = rv.CSRGraph.from_edge_index([[0, 1, 2], [0, 0, 0]], num_nodes=3)
    weights, grad = np.float32([0.5, 0.5, 0]), np.float32([1, 0, np.nan])
    made = rv.edge_softmax_backward(*map(cuda.to_device, (grad, weights)), graph)
    np.testing.assert_array_equal(made.copy_to_host(), [0.25, -0.25, 0])
    np.testing.assert_array_equal(rv.edge_softmax_backward(grad, weights, graph), [0.25, -0.25, 0])


def test_numpy_arrays_are_moved_only_when_asked():
    case = draw(terms="edge_bias", dtype=np.float32)
    cache = rv.neighbor_attention_forward(*case.inputs, case.graph, **case.terms, device="cuda")
    made = rv.neighbor_attention_backward(case.grad_output, cache)
    for x in (cache.output, cache.lse, cache.coefficients(), made.query, made.edge_bias):
        assert type(x) is np.ndarray
    np.testing.assert_allclose(cache.output, case.exact().output, atol=1e-5)
    assert "output (9, 2, 6)" in repr(cache)
    with pytest.raises(InvalidInputError, match="key is on the CPU"):
        rv.neighbor_attention(cuda.to_device(case.query), case.key, case.value, case.graph)


def test_any_strides_are_read_where_they_lie():
    case = draw(Nt=7, Ns=7, D=4, C=4, dtype=np.float32)
    x = np.random.default_rng(0).standard_normal((7, 3, 2, 4)).astype(np.float32)
    there = cuda.to_device(x)
    got = rv.neighbor_attention(*(there[:, n] for n in range(3)), case.graph)
    wanted = rv.neighbor_attention(*(x[:, n] for n in range(3)), case.graph)
    np.testing.assert_allclose(got.copy_to_host(), wanted, atol=1e-6)


def test_bad_inputs_are_named():
    case = draw(dtype=np.float32)
    q, k, v = map(cuda.to_device, case.inputs)
    with pytest.raises(InvalidInputError, match="differ in dtype"):
        rv.neighbor_attention(q, cuda.to_device(case.key.astype(np.float16)), v, case.graph)
    with pytest.raises(InvalidInputError, match="float64 on the GPU"):
        rv.neighbor_attention(q, cuda.to_device(case.key.astype(np.float64)), v, case.graph)
    with pytest.raises(DimensionMismatchError, match=r"edge_bias\.shape"):
        rv.neighbor_attention(q, k, v, case.graph, edge_bias=q)
    wide = [cuda.to_device(np.zeros((n, 1, 600), np.float32)) for n in (9, 7, 7)]
    with pytest.raises(InvalidInputError, match="at most 512"):
        rv.neighbor_attention(*wide, case.graph)
    cache = rv.neighbor_attention_forward(q, k, v, case.graph)
    with pytest.raises(DimensionMismatchError, match=r"grad_output\.shape"):
        rv.neighbor_attention_backward(k, cache)
