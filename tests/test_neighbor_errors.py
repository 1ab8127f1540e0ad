"""Every way to call attention over neighbours wrongly, and what is then said."""

import numpy as np
import pytest
from neighbor_cases import refused, rows

import ruvector_numba as rv

ODD_GRAPHS = [None, "graph", 3, np.array([[0, 1], [1, 2]]), [[0, 1], [1, 2]], np.eye(3)]
BAD = [  # 7 edges from 5 sources to 3 targets, H = 2, D = 4, C = 6
    ("query", rows(4, 2, 4)), ("query", rows(3, 4)), ("query", rows(3, 2, 4, 1)), ("query", rows(3, 3, 4)),
    ("query", rows(3, 2, 5)), ("query", rows(3, 2, 4, dtype=np.int64)), ("query", rows(3, 2, 4, dtype=np.float32)),
    ("query", rows(3, 2, 4, dtype=complex)), ("query", [[1.0], [1.0, 2.0]]), ("query", np.full((3, 2, 4), "a")),
    ("query", None),
    ("key", rows(4, 2, 4)), ("key", rows(3, 2, 4)), ("key", rows(5, 4)), ("key", rows(5, 1, 4)), ("key", rows(5, 2, 3)),
    ("key", rows(5, 2, 4, dtype=np.float16)), ("key", rows(5, 2, 4, dtype=np.float32)),
    ("value", rows(4, 2, 6)), ("value", rows(5, 12)), ("value", rows(5, 1, 6)), ("value", rows(5, 2, 6, dtype=np.int8)),
    ("value", rows(5, 2, 6, dtype=np.float32)),
    ("edge_bias", rows(7)), ("edge_bias", rows(6, 2)), ("edge_bias", rows(7, 3)), ("edge_bias", rows(7, 2, 1)),
    ("edge_bias", rows(7, 2, dtype=complex)), ("edge_bias", "no"),
    ("edge_key", rows(7, 2)), ("edge_key", rows(8, 2, 4)), ("edge_key", rows(7, 2, 6)), ("edge_key", rows(7, 1, 4)),
    ("edge_value", rows(7, 2)), ("edge_value", rows(8, 2, 6)), ("edge_value", rows(7, 2, 4)),
    ("edge_weight", rows(6)), ("edge_weight", rows(7, 3)), ("edge_weight", rows(7, dtype=complex)),
    ("scale", np.nan), ("scale", np.inf), ("scale", "large"), ("scale", True), ("scale", [1.0, 2.0]),
    ("dropout_p", -0.1), ("dropout_p", 1.1), ("dropout_p", np.nan), ("dropout_p", "half"),
    ("aggregation", "median"), ("aggregation", "add"), ("aggregation", None), ("aggregation", ["sum"]),
    ("aggregation", np.array(["sum", "max"])), ("scale", 1e308),
    ("seed", -1), ("seed", 1.5), ("seed", "a"), ("seed", True), ("seed", 2**63),
]  # fmt: skip


def call_with(name=None, x=None):
    graph = rv.CSRGraph.from_edge_index([[0, 1, 2, 3, 4, 0, 0], [0, 0, 1, 1, 1, 2, 2]], (5, 3))
    good = {"query": rows(3, 2, 4), "key": rows(5, 2, 4), "value": rows(5, 2, 6), "graph": graph}
    return good | ({} if name is None else {name: x})


@pytest.mark.parametrize(
    ("name", "x"), BAD, ids=lambda x: f"{x}"[:20] if not isinstance(x, np.ndarray) else str(x.shape)
)
def test_bad_inputs(name, x):
    more = {"dropout_p": 0.5} if name == "seed" else {}
    for call in (rv.neighbor_attention, rv.neighbor_attention_forward):
        refused(lambda call=call: call(**call_with(name, x), **more), name)


@pytest.mark.parametrize(
    "name, x, told",
    [
        ("key", rows(5, 1, 4), "expected (2, 4), got (1, 4)"),
        ("value", rows(5, 3, 6), "expected (5, 2), got (5, 3)"),
        ("value", rows(4, 2, 6), "expected (5, 2), got (4, 2)"),
    ],
)
def test_the_sizes_told_are_those_that_differ(name, x, told):
    refused(lambda: rv.neighbor_attention(**call_with(name, x)), told)


@pytest.mark.parametrize("scale", [1e39, -1e39, 2e38])
def test_scales_beyond_float32(scale):
    given = {name: x.astype(np.float32) if isinstance(x, np.ndarray) else x for name, x in call_with().items()}
    for call in (rv.neighbor_attention, rv.neighbor_attention_forward):
        refused(lambda call=call: call(**given, scale=scale), f"scale is {scale}", "float32 ends at 3.4e+38")
    assert np.isfinite(rv.neighbor_attention(**call_with("scale", scale))).all()


def test_what_others_call_add_is_sum():
    refused(
        lambda: rv.neighbor_attention(**call_with("aggregation", "add")), "aggregation is 'add'\nHINT: give \"sum\""
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_heads(dtype):
    graph, x = call_with()["graph"], rows(5, 0, 4, dtype=dtype)
    cache = rv.neighbor_attention_forward(x[:3], x, x, graph)
    assert cache.output.shape == (3, 0, 4) and cache.coefficients().shape == (7, 0)
    assert rv.neighbor_attention_backward(cache.output, cache).key.shape == (5, 0, 4)


@pytest.mark.parametrize("graph", ODD_GRAPHS, ids=lambda x: type(x).__name__)
def test_what_is_no_graph(graph):
    refused(lambda: rv.neighbor_attention(**call_with("graph", graph)), "graph", "CSRGraph")
    refused(lambda: rv.edge_softmax(rows(2), graph), "graph", "CSRGraph")
    refused(lambda: rv.edge_softmax_backward(rows(2), rows(2), graph), "graph", "CSRGraph")


def test_a_graph_of_another_size():
    for size, name in [((4, 3), "key"), ((5, 4), "query"), ((6, 3), "key")]:
        graph = rv.CSRGraph.from_edge_index(np.zeros((2, 7), int), size)
        refused(lambda graph=graph: rv.neighbor_attention(**call_with("graph", graph)), name)


@pytest.mark.core
def test_bad_gradients_and_caches():
    cache = rv.neighbor_attention_forward(**call_with())
    odd = [rows(3, 2, 6, dtype=dtype) for dtype in (np.float32, complex)]
    for grad in (rows(3, 2, 5), rows(3, 2), rows(4, 2, 6), *odd, "a", None):
        refused(lambda grad=grad: rv.neighbor_attention_backward(grad, cache), "grad_output")
    q = rows(1, 3, 4)
    for other in (None, rows(3, 2, 6), rv.attention_forward(q, q, q), call_with()["graph"]):
        refused(lambda other=other: rv.neighbor_attention_backward(rows(3, 2, 6), other), "cache")


@pytest.mark.parametrize(
    "scores",
    [rows(6), rows(8, 2), rows(7, 2, 1), np.array(1.0), rows(7, dtype=np.int64), rows(7, dtype=complex), "no", None],
    ids=str,
)
def test_bad_scores(scores):
    graph = call_with()["graph"]
    refused(lambda: rv.edge_softmax(scores, graph), "scores")
    if np.shape(scores) in ((6,), (8, 2)):
        told = f"expected {(7, *scores.shape[1:])}, got {scores.shape}"
        refused(lambda: rv.edge_softmax(scores, graph), told)
    refused(lambda: rv.edge_softmax_backward(rows(7), scores, graph), "weights")


def test_bad_gradients_of_weights():
    graph = call_with()["graph"]
    for grad in (rows(6), rows(7, 3), rows(7), rows(7, 2, dtype=np.float32), rows(7, 2, dtype=complex), None):
        refused(lambda grad=grad: rv.edge_softmax_backward(grad, rows(7, 2), graph), "grad_weights")
