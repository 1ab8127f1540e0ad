"""Every way to get a graph wrong, and what is then said."""

import types

import numpy as np
import pytest
import scipy.sparse

import ruvector_numba as rv
from ruvector_numba.errors import (
    DimensionMismatchError,
    GraphStructureError,
    InvalidConfigError,
    InvalidInputError,
    OutOfMemoryError,
)
from ruvector_numba.graphs.graph import CSRGraph


def refused(call, *told, kind=GraphStructureError):
    with pytest.raises(kind) as caught:
        call()
    for part in told:
        assert part in str(caught.value)


@pytest.mark.core
@pytest.mark.parametrize("where", [0, 77, 99_999])
@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("value", [-1, 50, 2**40])
def test_an_index_that_is_no_node(where, end, value):
    edge_index = np.random.default_rng(0).integers(0, 50, (2, 100_000))
    edge_index[end, where] = value
    told = f"edge {where} has {['source', 'target'][end]} {value}, and the {['sources', 'targets'][end]} are 0 to 49"
    hint = "nodes count from 0" if value < 0 else f"pass num_nodes={value + 1} or more"
    refused(lambda: CSRGraph.from_edge_index(edge_index, 50), told, hint)
    edge_index[0, -1] = -9  # the first is told
    if where != 99_999:
        refused(lambda: CSRGraph.from_edge_index(edge_index, 50), told)


def test_more_indices_that_are_no_nodes():
    refused(lambda: CSRGraph.from_edge_index([[0, 1], [1, -2]]), "edge 1 has target -2", "0 to 1")
    refused(lambda: CSRGraph.from_edge_index([[-3], [-2]]), "edge 0 has source -3", "are none")
    refused(lambda: CSRGraph.from_edge_index([[0, 9], [1, 1]], (3, 12)), "edge 1 has source 9", "edge_index[::-1]")
    refused(lambda: CSRGraph.from_edge_index([[0], [0]], 0), "edge 0 has source 0, and the sources are none")
    top = np.array([[0, 2**63], [1, 1]], np.uint64)
    refused(lambda: CSRGraph.from_edge_index(top, 4), f"edge 1 has source {2**63}", f"num_nodes={2**63 + 1}")
    refused(lambda: CSRGraph.from_edge_index(np.array([[2**31 - 1], [0]], np.int32), 4), f"num_nodes={2**31}")
    huge = np.array([[0, 1], [2, 2**61]])
    refused(lambda: CSRGraph.from_edge_index(huge), f"edge 1 has target {2**61}, too large", "pass num_nodes")
    refused(lambda: CSRGraph.from_edge_index(huge, 2**62), "is num_nodes right?", kind=OutOfMemoryError)


@pytest.mark.parametrize("n", [2**63, 10**30, 10**15], ids=str)
def test_more_sources_than_memory(n):
    empty = scipy.sparse.coo_array((3, 4))
    empty._shape = (3, n)
    for call, told in (
        (lambda: CSRGraph.from_edge_index([[0], [0]], (n, 3)), "is num_nodes right?"),
        (lambda: CSRGraph.from_neighbors([0, 1], [0], n), "is num_sources right?"),
        (lambda: CSRGraph.from_scipy(empty), "is num_nodes right?"),
    ):
        refused(call, "out_degrees", told, kind=OutOfMemoryError)


def test_a_graph_is_made_by_its_methods():
    for call in (lambda: CSRGraph([[0], [1]]), lambda: CSRGraph([[0], [1]], num_nodes=2)):
        refused(call, "use CSRGraph.from_edge_index")


@pytest.mark.parametrize("wrong, told", [
    (np.ma.array([1.0, 2.0]), "values is a numpy.ma array, whose own mask would be lost"),
    ([[1.0], [1.0, 2.0]], "values cannot become an array"), (None, "values is None"),
    (scipy.sparse.eye_array(2), "values is a sparse matrix"), (["a", "b"], "values has dtype <U1"),
    ([object(), object()], "values has dtype object"),
], ids=str)  # fmt: skip
def test_values_of_edges_that_are_none(wrong, told):
    graph = CSRGraph.from_edge_index([[0, 1], [1, 0]])
    if wrong is not None:
        refused(lambda: graph.to_scipy(wrong), told, kind=InvalidInputError)
    if "dtype" not in told:  # entries of a matrix are numbers; here they may be anything
        refused(lambda: graph.by_position(wrong), told, kind=InvalidInputError)
        refused(lambda: graph.by_edge(wrong), told, kind=InvalidInputError)


class Tensor:
    """One that NumPy cannot read."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


def test_graphs_and_arrays_of_other_libraries():
    data, net = types.SimpleNamespace(edge_index=np.zeros((2, 3), int)), types.SimpleNamespace()
    net.adjacency = net.is_multigraph = None
    x = np.ones((3, 3))
    for graph, told in (
        (None, "give whole numbers"), (net, "CSRGraph.from_networkx"), (data, "data.edge_index"),
        (scipy.sparse.eye_array(3), "CSRGraph.from_scipy"), (Tensor(), "edge_index.detach()"),
    ):  # fmt: skip
        refused(lambda graph=graph: CSRGraph.from_edge_index(graph), "edge_index", told)
        refused(lambda graph=graph: rv.GAT(3, 2)(x, graph), told)
        made = rv.HGT(3, 2, (["n"], [("n", "to", "n")]))
        refused(lambda graph=graph, made=made: made({"n": x}, {("n", "to", "n"): graph}), told)


def test_arrays_that_numpy_cannot_read_or_that_are_none():
    edge_index = np.zeros((2, 3), int)
    for wrong, told in (
        (Tensor(), "x.detach().float()"), (None, "is None"), (scipy.sparse.csr_array(np.eye(3)), "x.toarray()"),
    ):  # fmt: skip
        refused(lambda wrong=wrong: rv.GAT(3, 2)(wrong, edge_index), told, kind=InvalidInputError)
    graph, q = CSRGraph.from_edge_index(edge_index), np.ones((1, 2, 4))
    refused(lambda: rv.edge_softmax(None, graph), "scores is None", kind=InvalidInputError)
    refused(lambda: rv.neighbor_attention(q, None, q, graph), "key is None", kind=InvalidInputError)
    mask = np.ones((3, 2), bool)
    told = "numpy.where(edge_bias, 0, -numpy.inf)"
    refused(lambda: rv.neighbor_attention(q, q, q, graph, mask), told, kind=InvalidInputError)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_list_takes_the_dtype_of_the_nodes(dtype):
    q, graph = np.ones((1, 1, 4), dtype), CSRGraph.from_edge_index([[0, 0], [0, 0]])
    output = rv.neighbor_attention(q, q, q, graph, edge_weight=[1.0, 3.0])
    assert output.dtype == dtype and (output == 2).all()
    x, edge_index, kind = np.ones((2, 3), dtype), [[0, 1], [1, 0]], ("n", "to", "n")
    for attr, dim in (([1.0, 2.0], 1), ([1, 2], 1), ([[1.0], [2.0]], 1), ([[1.0, 2.0], [3.0, 4.0]], 2)):
        for layer in (rv.GAT(3, 2, edge_dim=dim, seed=0), rv.GATv2(3, 2, edge_dim=dim, seed=0)):
            output, cache = layer.forward_cached(x, edge_index, attr)
            assert np.array_equal(output, layer(x, edge_index, np.array(attr, dtype))) and output.dtype == dtype
            assert layer.backward(output, cache).edge_attr.shape == np.shape(attr)
        layer = rv.HGT(3, 2, (["n"], [kind]), edge_dim=dim, seed=0)
        (output, cache), want = (f({"n": x}, {kind: edge_index}, {kind: a}) for f, a in (
            (layer.forward_cached, attr), (layer, np.array(attr, dtype))
        ))  # fmt: skip
        assert np.array_equal(output["n"], want["n"]) and output["n"].dtype == dtype
        assert layer.backward(output, cache).edge_attr[kind].shape == np.shape(attr)
    wide = np.ones(2, np.float32 if dtype == np.float64 else np.float64)  # an array keeps its own
    refused(lambda: rv.GAT(3, 2, edge_dim=1)(x, edge_index, wide), "edge_attr has dtype", kind=InvalidInputError)


def test_nodes_and_graph_swapped():
    x, edge_index = np.ones((3, 3), np.float32), np.array([[0, 1, 2], [1, 2, 0]])
    graph = CSRGraph.from_edge_index(edge_index)
    for layer in (rv.GAT(3, 2), rv.GraphTransformer(3, 2)):
        for call in (layer, layer.forward_cached, layer.graph_forward):
            for wrong, told in ((graph, "x is a CSRGraph"), (edge_index, "x is an edge_index")):
                swapped = "x and graph are swapped: call layer(x, graph)"
                refused(lambda call=call, wrong=wrong: call(wrong, x), told, swapped, kind=InvalidInputError)


@pytest.mark.parametrize("dtype", [np.float32, int, bool])
def test_a_dense_adjacency_matrix_is_no_edge_index(dtype):
    points, x = np.zeros((4, 4), dtype), np.ones((4, 3), np.float32)
    points[0, [1, 2]] = 1
    told = "edge_index is not (2, E)", "edge_index.shape: (4, 4)", "CSRGraph.from_scipy(scipy.sparse.csr_array(A).T)"
    refused(lambda: rv.GAT(3, 2)(x, points), *told)
    refused(lambda: CSRGraph.from_edge_index(points), *told)
    A = points
    graph = eval(told[2], {"CSRGraph": CSRGraph, "scipy": scipy, "A": A})
    assert graph.to_edge_index().tolist() == [[0, 0], [1, 2]]


def test_what_is_a_graph_of_another_library_is_told_the_way():
    q, edge_attr, data = np.ones((3, 1, 4)), np.ones(3), types.SimpleNamespace(edge_index=np.zeros((2, 3), int))
    for graph, way in ((scipy.sparse.eye_array(3, format="csr"), "from_scipy"), (data, "data.edge_index")):
        refused(lambda graph=graph: rv.neighbor_attention(q, q, q, graph), "not a CSRGraph", way)
        refused(lambda graph=graph: rv.edge_softmax(edge_attr, graph), "not a CSRGraph", way)


def test_minus_one_as_an_unsigned_number():
    x, told = np.ones((3, 3)), "is -1, cast to uint64; nodes count from 0: leave out edges"
    for edge_index in (np.array([[0, 1], [1, -1]]), np.array([[-1, 1], [1, 0]])):
        wrapped = edge_index.astype(np.uint64)
        refused(lambda wrapped=wrapped: CSRGraph.from_edge_index(wrapped, 3), f"{2**64 - 1} {told}")
        refused(lambda wrapped=wrapped: CSRGraph.from_edge_index(wrapped), f"{2**64 - 1} {told}")
        refused(lambda wrapped=wrapped: rv.GAT(3, 2)(x, wrapped), f"{2**64 - 1} {told}")
    indices = np.array([-1]).astype(np.uint64)
    refused(lambda: CSRGraph.from_neighbors([0, 1], indices), f"{2**64 - 1} {told}")
    narrow = np.array([[0, 1], [1, -1]]).astype(np.uint32)
    refused(lambda: CSRGraph.from_edge_index(narrow, 3), f"{2**32 - 1} is -1, cast to uint32")
    narrow = np.array([[0, 1], [1, 255]], np.uint8)  # which may well be node 255
    refused(lambda: CSRGraph.from_edge_index(narrow, 255), "pass num_nodes=256 or more")


def test_a_bipartite_graph_has_no_num_nodes():
    assert CSRGraph.from_edge_index([[0], [1]], 5).num_nodes == 5
    bipartite = CSRGraph.from_edge_index([[0], [1]], (4, 3))
    refused(lambda: bipartite.num_nodes, "sources and targets differ", "ask for num_sources or num_targets")
    assert not hasattr(bipartite, "num_nodes") and getattr(bipartite, "num_nodes", 7) == 7


@pytest.mark.parametrize("shape", [(5, 2), (3, 4), (4,), (2, 2, 2), ()])
def test_shapes(shape):
    hint = "pass edge_index.T" if shape == (5, 2) else "give two rows"
    refused(lambda: CSRGraph.from_edge_index(np.zeros(shape, int)), f"edge_index.shape: {shape}", hint)


@pytest.mark.parametrize(
    "given_as, told",
    [
        (np.zeros((2, 3)), "HINT: cast it: edge_index.astype(numpy.int64)"),
        (np.zeros((2, 0)), "dtype float64"),
        ([[0.0, 1.0], [1.0, 0.0]], "HINT: cast it"),
        (np.zeros((2, 3), np.float16), "dtype float16"),
        (np.zeros((2, 3), bool), "dtype bool"),
        (np.zeros((2, 3), complex), "give whole numbers"),
        ([[0.0, np.nan], [0.0, 1.0]], "at edge 1 it is nan"),
        ([[0.0, 1.0], [0.0, np.inf]], "at edge 1 it is inf"),
        ([[0.5, 1.0], [0.0, np.inf]], "at edge 0 it is 0.5"),
        ([["a"], ["b"]], "give whole numbers"),
        ([[0, 1], [0]], "give rows of equal length"),
        (None, "give whole numbers"),
        (np.ma.array([[0, 1], [1, 0]], mask=[[1, 0], [0, 0]]), "is a numpy.ma array, whose own mask would be lost"),
        (scipy.sparse.eye_array(3), "CSRGraph.from_scipy"),
    ],
    ids=str,
)
def test_no_integers(given_as, told):
    refused(lambda: CSRGraph.from_edge_index(given_as), "edge_index", told)


@pytest.mark.parametrize("wrong", [-1, 2.0, True, "3", (1, 2, 3), np.array([3])], ids=str)
def test_numbers_of_nodes(wrong):
    refused(lambda: CSRGraph.from_edge_index([[0], [0]], wrong), "num_nodes is", "or a pair (num_sources, num_targets)")
    refused(lambda: CSRGraph.from_neighbors([0, 1], [0], wrong), "num_sources is", "give a whole number")
    refused(lambda: CSRGraph.from_edge_index([[0], [0]], (1, wrong)), "num_nodes[1] is")


@pytest.mark.parametrize(
    "indptr, indices, num_sources, told",
    [
        ([0, 2], [0, 1, 0], None, "indptr goes from 0 to 2, not from 0 to the number of edges, 3"),
        ([1, 3], [0, 1, 0], None, "indptr goes from 1 to 3"),
        ([0, 2, 1, 3], [0, 1, 0], None, "indptr falls from 2 to 1 at target 1"),
        ([], [], None, "indptr.shape: (0,)"),
        ([[0, 1]], [0], None, "indptr.shape: (1, 2)"),
        ([0, 1], [[0]], None, "indices.shape: (1, 1)"),
        ([0, 1, 3], [0, 1, 2], None, "edge 2 has source 2, and the sources are 0 to 1"),
        ([0, 1, 3], [0, 1, 2], None, "pass num_sources"),
        ([0, 1, 3], [0, -1, 2], 3, "edge 1 has source -1"),
        ([0.0, 1.0], [0], None, "indptr has dtype float64"),
        ([0.0, np.nan], [0], None, "at target 1 it is nan"),
        ([0, 1], [0.0], None, "indices has dtype float64"),
    ],
)
def test_neighbors_that_are_none(indptr, indices, num_sources, told):
    refused(lambda: CSRGraph.from_neighbors(indptr, indices, num_sources), told)


def test_sparse_matrices_that_are_none():
    for form in ("lil", "dok", "bsr", "dia"):
        refused(lambda form=form: CSRGraph.from_scipy(scipy.sparse.eye_array(3, format=form)), form, "matrix.tocsr()")
    refused(lambda: CSRGraph.from_scipy(np.eye(3)), "matrix is a ndarray", "CSRGraph.from_edge_index")
    refused(lambda: CSRGraph.from_scipy(scipy.sparse.coo_array(np.ones(3))), "shape (3,)")
    broken = scipy.sparse.csr_array(np.eye(3))
    broken.indices[1] = 3
    for matrix in (broken, broken.T):
        refused(lambda matrix=matrix: CSRGraph.from_scipy(matrix), "edge 1 has ")
    broken.indptr[1] = 3
    for matrix in (broken, broken.T):
        refused(lambda matrix=matrix: CSRGraph.from_scipy(matrix), "indptr falls from 3 to 2 at target 1")


def test_other_things_are_no_networkx_graphs():
    refused(lambda: CSRGraph.from_networkx([[0], [1]]), "graph is a list, not a NetworkX graph")


@pytest.mark.parametrize("wrong", ["remove", None, 3, np.zeros(2)], ids=str)
def test_policies_that_are_none(wrong):
    graph = CSRGraph.from_edge_index([[0], [1]])
    for call in (graph.with_self_loops, lambda policy: graph.edge_attr_with_self_loops([1.0], policy)):
        refused(lambda call=call: call(wrong), 'give "replace", "add" or "keep"', kind=InvalidConfigError)


def test_attributes_that_are_none():
    graph = CSRGraph.from_edge_index([[0], [1]])
    for wrong in (np.array([1]), np.array(["a"]), np.array([1j])):
        refused(lambda wrong=wrong: graph.edge_attr_with_self_loops(wrong), "not float32", kind=InvalidInputError)
    attr = np.ones((1, 3))
    for fill, kind, told in [
        ("max", InvalidConfigError, "fill_value is 'max'"),
        (None, InvalidInputError, "fill_value is None"),
        ([1.0, 2.0], DimensionMismatchError, "fill_value.shape: (2,)"),
        (np.zeros((3, 3)), DimensionMismatchError, "one entry for each node"),
        ([[1.0], [2.0, 3.0]], InvalidInputError, "fill_value cannot become an array"),
        ([1j], InvalidInputError, "fill_value has dtype complex128"),
    ]:
        refused(lambda fill=fill: graph.edge_attr_with_self_loops(attr, "add", fill), told, kind=kind)


def test_tensors_of_torch_that_are_no_arrays():
    torch = pytest.importorskip("torch")
    x, edge_index = np.ones((3, 3), np.float32), np.zeros((2, 3), int)
    whole = torch.ones(3, 3)
    for wrong in (whole.requires_grad_(), whole.detach().to_sparse(), whole.bfloat16(), whole.to("meta")):
        refused(lambda wrong=wrong: rv.GAT(3, 2)(wrong, edge_index), "x.detach().float()", kind=InvalidInputError)
    for wrong in (torch.eye(3).to_sparse(), torch.zeros(2, 3, dtype=torch.long, device="meta")):
        refused(lambda wrong=wrong: rv.GAT(3, 2)(x, wrong), "edge_index.detach()", "adj.coalesce().indices()")
