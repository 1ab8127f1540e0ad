"""Graphs: grouped as a stable sort groups them, on any number of threads."""

import copy
import pickle
import threading

import numba
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

import ruvector_numba as rv
from ruvector_numba.errors import DimensionMismatchError, GraphStructureError
from ruvector_numba.graphs import edges, self_loops
from ruvector_numba.graphs.derived import Derived
from ruvector_numba.graphs.graph import CSRGraph

MOST = numba.config.NUMBA_NUM_THREADS
POLICIES = ["replace", "add", "keep"]
# sources, targets, edges: nothing, one node, fewer and more nodes than buckets, several chunks of edges
SIZES = [(0, 0, 0), (1, 1, 0), (5, 0, 0), (1, 1, 9), (7, 3, 40), (3, 400, 50), (5000, 300, 2000), (3000, 70000, 100000)]


def draw(size, dtype=np.int64, seed=0):
    num_sources, num_targets, E = size
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, n, E) if E else np.zeros(0, int) for n in (num_sources, num_targets)]).astype(
        dtype
    )


def sorted_by(keys, others, n):
    """The specification: (indptr, others, ids) of edges sorted by key."""
    ids = np.argsort(keys, kind="stable")
    return np.searchsorted(keys[ids], np.arange(n + 1)), others[ids], ids


def parts(graph):
    ids = np.arange(graph.num_edges, dtype=graph.indptr.dtype) if graph.edge_ids is None else graph.edge_ids
    return [graph.indptr, graph.indices, ids, *graph.transposed]


def same(graph, other):
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(parts(graph), parts(other)))


def check(graph, edge_index, num_sources, num_targets):
    """Everything about it, from the edges as they were given."""
    sources, targets = np.asarray(edge_index, np.int64)
    indptr, indices, ids = sorted_by(targets, sources, num_targets)
    back = sorted_by(indices, targets[ids], num_sources)
    for got, wanted in zip(parts(graph), [indptr, indices, ids, *back]):
        assert np.array_equal(got, wanted)
        assert got.dtype == graph.indices.dtype
    assert (graph.num_sources, graph.num_targets, graph.num_edges) == (num_sources, num_targets, len(sources))
    assert graph.is_bipartite == (num_sources != num_targets)
    assert np.array_equal(graph.in_degrees, np.bincount(targets, minlength=num_targets))
    assert np.array_equal(graph.out_degrees, np.bincount(sources, minlength=num_sources))
    assert np.array_equal(graph.to_edge_index(), [sources, targets])
    assert graph.to_edge_index().dtype == np.int64


# --- grouping ------------------------------------------------------------------------------------------------------
@pytest.mark.core
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_edges_are_grouped_as_a_stable_sort_groups_them(size, dtype):
    edge_index = draw(size, dtype)
    graph = CSRGraph.from_edge_index(edge_index, num_nodes=size[:2])
    check(graph, edge_index, *size[:2])
    assert graph.indices.dtype == np.int32


@pytest.mark.core
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_what_int32_cannot_count_is_int64(monkeypatch, dtype):
    monkeypatch.setattr(edges, "NARROW", 1999)
    edge_index = draw((50, 40, 2000), dtype)
    graph = CSRGraph.from_edge_index(edge_index, (50, 40))
    assert graph.indices.dtype == np.int64
    check(graph, edge_index, 50, 40)
    monkeypatch.setattr(edges, "NARROW", 2020)
    graph = CSRGraph.from_edge_index(edge_index, (50, 40))
    wide = graph.with_self_loops("add")
    assert (graph.indices.dtype, wide.indices.dtype) == (np.int32, np.int64)
    check(wide, np.hstack([edge_index, [range(40)] * 2]), 50, 40)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32, np.uint64, ">i8", ">i4"])
def test_every_kind_of_integer(dtype):
    edge_index = draw((9, 9, 30), dtype)
    check(CSRGraph.from_edge_index(edge_index, 9), edge_index, 9, 9)


def test_strides_and_other_array_likes():
    edge_index = draw((9, 9, 30))
    wide = np.repeat(edge_index, 2, axis=1)[:, ::-2]
    for given_as in (np.asfortranarray(edge_index), edge_index.tolist(), tuple(edge_index), wide[:, ::-1]):
        same(CSRGraph.from_edge_index(given_as, 9), CSRGraph.from_edge_index(edge_index, 9))
    unaligned = np.frombuffer(b"x" + edge_index.tobytes(), np.int64, offset=1).reshape(2, -1)
    same(CSRGraph.from_edge_index(unaligned, 9), CSRGraph.from_edge_index(edge_index, 9))


@pytest.mark.parametrize("empty", [[[], []], np.zeros((2, 0), np.int64)], ids=["list", "array"])
@pytest.mark.parametrize(
    "num_nodes, wanted", [(None, (0, 0)), (0, (0, 0)), (4, (4, 4)), ((0, 3), (0, 3)), ((3, 0), (3, 0))]
)
def test_no_edges(empty, num_nodes, wanted):
    graph = CSRGraph.from_edge_index(empty, num_nodes)
    check(graph, np.zeros((2, 0)), *wanted)
    for policy in POLICIES:
        loops = min(wanted) if policy != "keep" else 0
        check(graph.with_self_loops(policy), [range(loops)] * 2, *wanted)
        assert graph.edge_attr_with_self_loops(np.zeros((0, 3)), policy).tolist() == [[0.0] * 3] * loops


def test_the_number_of_nodes_can_be_left_out():
    assert CSRGraph.from_edge_index([[0, 7], [1, 2]]).num_sources == 8
    assert CSRGraph.from_edge_index([[0, 1], [1, 7]]).num_targets == 8


@pytest.mark.core
def test_a_hub_of_a_million_edges():
    rng = np.random.default_rng(1)
    edge_index = np.stack([rng.integers(0, 1000, 10**6), np.full(10**6, 700)])
    edge_index[1, -1] = 3
    check(CSRGraph.from_edge_index(edge_index, 1000), edge_index, 1000, 1000)


def test_edges_in_order_need_no_ids():
    graph = CSRGraph.from_edge_index([[2, 1, 2, 0], [0, 0, 1, 3]])
    assert graph.edge_ids is None
    check(graph, [[2, 1, 2, 0], [0, 0, 1, 3]], 4, 4)
    assert CSRGraph.from_edge_index([[2, 1], [1, 0]]).edge_ids.tolist() == [1, 0]


def test_a_fall_from_one_chunk_to_the_next_is_seen():
    from ruvector_numba.plan.grouping import CHUNK

    targets = np.repeat([1, 0], [CHUNK, CHUNK])
    check(CSRGraph.from_edge_index([targets * 0, targets], 2), [targets * 0, targets], 2, 2)


@pytest.mark.core
def test_threads_change_nothing():
    edge_index = draw((3000, 2500, 100000))

    def made():
        graph = CSRGraph.from_edge_index(edge_index, (3000, 2500))
        return [graph, *map(graph.with_self_loops, ("replace", "add"))]

    with rv.threads(1):
        wanted = made()
        [graph.transposed for graph in wanted]
    for n in {2, MOST} & set(range(2, MOST + 1)):
        with rv.threads(n):
            for graph, other in zip(made(), wanted):
                same(graph, other)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_any_graph(data):
    sizes = data.draw(st.tuples(st.integers(1, 600), st.integers(1, 600)))
    ends = [
        data.draw(st.lists(st.integers(0, n - 1), min_size=E, max_size=E))
        for E in [data.draw(st.integers(0, 40))]
        for n in sizes
    ]
    graph = CSRGraph.from_edge_index(ends, sizes)
    check(graph, ends, *sizes)
    check(CSRGraph.from_scipy(graph.to_scipy()), [graph.indices, graph._targets()], *sizes)
    for policy in POLICIES:
        check(graph.with_self_loops(policy), with_loops(np.array(ends, int), min(sizes), policy), *sizes)


# --- what it is ----------------------------------------------------------------------------------------------------
def test_repr():
    assert repr(CSRGraph.from_edge_index([[0], [1]])) == "CSRGraph(num_nodes=2, num_edges=1)"
    assert repr(CSRGraph.from_edge_index([[0], [1]], (1, 2))) == "CSRGraph(num_sources=1, num_targets=2, num_edges=1)"


def test_it_cannot_be_changed():
    edge_index, indptr, indices = draw((9, 9, 30)), np.array([0, 2, 3]), np.array([1, 0, 0], np.int32)
    graph, other = CSRGraph.from_edge_index(edge_index), CSRGraph.from_neighbors(indptr, indices)
    matrix = other.to_scipy()
    third = CSRGraph.from_scipy(matrix)
    edge_index[:], indptr[:], indices[:], matrix.indices[:], matrix.indptr[:] = 0, 0, 1, 1, 0
    check(graph, draw((9, 9, 30)), 9, 9)
    for kept in (other, third):
        check(kept, [[1, 0, 0], [0, 0, 1]], 2, 2)
    for array in [graph.indptr, graph.indices, graph.edge_ids, *graph.transposed]:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(AttributeError, match="cannot be changed: indices"):
        graph.indices = indices
    with pytest.raises(AttributeError, match="cannot be changed: indptr"):
        del graph.indptr
    with pytest.raises(AttributeError):
        graph.something = 1
    with pytest.raises(GraphStructureError, match="HINT: use CSRGraph"):
        CSRGraph()


def test_copies():
    graph = CSRGraph.from_edge_index(draw((9, 9, 30)))
    for other in (pickle.loads(pickle.dumps(graph)), copy.deepcopy(graph), copy.copy(graph)):
        same(other, graph)
        assert not other.indices.flags.writeable


def test_what_is_derived_is_made_once():
    graph = CSRGraph.from_edge_index(draw((3000, 3000, 100000)))
    found, start = [], threading.Barrier(4)

    def ask():
        start.wait()
        found.append((graph.transposed, graph.with_self_loops()))

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert len(found) == 4
    assert all(a is graph.transposed and b is graph.with_self_loops("replace") for a, b in found)


def test_what_is_derived_depends_on_its_kind_and_on_what_it_is_of():
    graph, other = (CSRGraph.from_edge_index([[0], [1]]) for _ in range(2))
    one, two = Derived("one"), Derived("one")
    made = [graph.derived(*key) for key in ((one, list), (two, list), (one, list, 3), (one, list, "3"))]
    assert len({*map(id, made)}) == 4 and made[0] is graph.derived(one, dict) and made[2] is graph.derived(one, dict, 3)
    assert other.derived(one, dict) == {} and pickle.loads(pickle.dumps(graph)).derived(one, dict) == {}


@pytest.mark.parametrize("in_order", [False, True])
def test_values_of_edges_there_and_back(in_order):
    edge_index = draw((9, 9, 30))
    edge_index = edge_index[:, np.argsort(edge_index[1], kind="stable")] if in_order else edge_index
    graph = CSRGraph.from_edge_index(edge_index)
    assert (graph.edge_ids is None) == in_order
    values = np.random.default_rng(0).standard_normal((30, 2, 3))
    assert np.array_equal(graph.by_position(values), values[sorted_by(edge_index[1], edge_index[0], 9)[2]])
    assert np.array_equal(graph.by_edge(graph.by_position(values)), values)
    for method in (graph.by_position, graph.by_edge, graph.edge_attr_with_self_loops, graph.to_scipy):
        for wrong in (np.zeros(29), np.zeros((2, 30)), np.float64(1.0)):
            with pytest.raises(DimensionMismatchError, match="expected 30"):
                method(wrong)
    with pytest.raises(DimensionMismatchError, match="one number for each edge"):
        graph.to_scipy(values)


# --- other ways to one ---------------------------------------------------------------------------------------------
def test_neighbors():
    graph = CSRGraph.from_neighbors([0, 2, 2, 5], [4, 0, 3, 3, 1], num_sources=5)
    assert graph.edge_ids is None
    check(graph, [[4, 0, 3, 3, 1], [0, 0, 2, 2, 2]], 5, 3)
    check(CSRGraph.from_neighbors([0], []), np.zeros((2, 0)), 0, 0)
    check(CSRGraph.from_neighbors(np.array([0, 1], np.uint64), np.array([0], np.uint8)), [[0], [0]], 1, 1)


@pytest.mark.parametrize("kind", ["array", "matrix"])
@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
def test_sparse_matrices(form, kind):
    """Rows are targets: the matrix times x is what each target receives. Zeros and duplicates are edges."""
    sources, targets = draw((20, 30, 200))
    values = np.random.default_rng(1).standard_normal(200)
    values[:5] = 0
    x = np.random.default_rng(2).standard_normal((20, 2))
    coo = getattr(scipy.sparse, f"coo_{kind}")((values, (targets, sources)), shape=(30, 20))
    matrix = coo if form == "coo" else getattr(scipy.sparse, f"{form}_{kind}")((30, 20))
    if form == "csr":  # as `tocsr` makes it, but with duplicates kept
        indptr, indices, ids = sorted_by(targets, sources, 30)
        matrix = getattr(scipy.sparse, f"csr_{kind}")((values[ids], indices, indptr), shape=(30, 20))
        sources, targets = sources[ids], targets[ids]
    elif form == "csc":
        indptr, indices, ids = sorted_by(sources, targets, 20)
        matrix = getattr(scipy.sparse, f"csc_{kind}")((values[ids], indices, indptr), shape=(30, 20))
        sources, targets = sources[ids], targets[ids]
    graph = CSRGraph.from_scipy(matrix)
    check(graph, [sources, targets], 20, 30)
    made = graph.to_scipy(matrix.data)
    assert made.nnz == 200
    assert np.array_equal(graph.by_edge(made.data), matrix.data)
    np.testing.assert_allclose(made @ x, matrix @ x, rtol=1e-13, atol=1e-13)
    ones = graph.to_scipy()
    assert ones.dtype == np.float32
    assert (ones.data == 1).all()


def test_spare_room_of_a_sparse_matrix_is_not_read():
    matrix = scipy.sparse.csr_array(([1.0, 2.0, 0, 0], [1, 0, 99, 99], [0, 1, 4]), shape=(2, 2))
    matrix.indptr[-1] = 2
    for form in (matrix, matrix.T):
        assert CSRGraph.from_scipy(form).num_edges == 2


def test_networkx():
    networkx = pytest.importorskip("networkx")
    path = networkx.Graph([("b", "a"), ("a", "c"), ("c", "c")])
    check(CSRGraph.from_networkx(path), [[0, 1, 1, 2, 2], [1, 0, 2, 1, 2]], 3, 3)
    directed = networkx.DiGraph([("b", "a"), ("c", "a")])
    check(CSRGraph.from_networkx(directed), [[0, 2], [1, 1]], 3, 3)
    check(CSRGraph.from_networkx(networkx.MultiDiGraph([(0, 1), (0, 1)])), [[0, 0], [1, 1]], 2, 2)
    check(CSRGraph.from_networkx(networkx.MultiGraph([(0, 1), (0, 1)])), [[0, 0, 1, 1], [1, 1, 0, 0]], 2, 2)
    check(CSRGraph.from_networkx(networkx.empty_graph(3)), np.zeros((2, 0)), 3, 3)


# --- self-loops ----------------------------------------------------------------------------------------------------
def with_loops(edge_index, n, policy):
    """The specification."""
    if policy == "keep":
        return edge_index
    kept = edge_index[:, edge_index[0] != edge_index[1]] if policy == "replace" else edge_index
    return np.hstack([kept, [range(n), range(n)]]).astype(int)


def attr_with_loops(edge_index, attr, n, policy, fill):
    if policy == "keep":
        return attr
    kept = edge_index[0] != edge_index[1] if policy == "replace" else np.ones(len(attr), bool)
    loops = np.zeros((n, *attr.shape[1:]), attr.dtype)
    for i in range(n):
        here = attr[kept & (edge_index[1] == i)]
        loops[i] = fill if not isinstance(fill, str) else here.sum(0) / (max(1, len(here)) if fill == "mean" else 1)
    return np.concatenate([attr[kept], loops])


@pytest.mark.core
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [(1, 1, 9), (20, 20, 100), (30, 20, 100), (20, 30, 100), (900, 900, 40000)], ids=str)
def test_self_loops(size, policy):
    edge_index, n = draw(size), min(size[:2])
    graph = CSRGraph.from_edge_index(edge_index, size[:2])
    check(graph.with_self_loops(policy), with_loops(edge_index, n, policy), *size[:2])
    if policy == "keep":
        assert graph.with_self_loops(policy) is graph


@pytest.mark.parametrize("fill", ["mean", "add", 2, np.arange(3.0)], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [(1, 1, 9), (20, 20, 60), (30, 20, 60), (20, 30, 60)], ids=str)
def test_what_self_loops_get(size, policy, fill):
    edge_index, n = draw(size), min(size[:2])
    for order in (slice(None), np.argsort(edge_index[1], kind="stable")):
        given_edges = edge_index[:, order]
        graph = CSRGraph.from_edge_index(given_edges, size[:2])
        attr = np.random.default_rng(3).standard_normal((size[2], 3))
        wanted = attr_with_loops(given_edges, attr, n, policy, fill)
        got = graph.edge_attr_with_self_loops(attr, policy, fill)
        assert len(got) == graph.with_self_loops(policy).num_edges
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-14)
        single = graph.edge_attr_with_self_loops(attr.astype(np.float32), policy, fill)
        assert single.dtype == np.float32
        np.testing.assert_allclose(single, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("narrow", [59, 70], ids=["all wide", "wide with loops"])
def test_what_self_loops_get_where_int32_cannot_count(narrow, monkeypatch):
    edge_index, attr = draw((20, 20, 60)), np.random.default_rng(3).standard_normal((60, 3))
    wanted = CSRGraph.from_edge_index(edge_index, 20).edge_attr_with_self_loops(attr)
    monkeypatch.setattr(edges, "NARROW", narrow)
    graph = CSRGraph.from_edge_index(edge_index, 20)
    assert graph.with_self_loops().indices.dtype == np.int64
    assert np.array_equal(graph.edge_attr_with_self_loops(attr), wanted)


@pytest.mark.parametrize("fill", ["mean", "add", 0.5])
@pytest.mark.parametrize("policy", ["replace", "add"])
def test_gradients_of_what_self_loops_get(policy, fill):
    """<y, A x> = <A^T y, x>, but for what a constant adds, at one thread and two to the same bit."""
    edge_index, rng = draw((300, 300, 4000)), np.random.default_rng(0)
    graph, attr = CSRGraph.from_edge_index(edge_index, 300), rng.standard_normal((4000, 2, 5))
    put_in = graph.edge_attr_with_self_loops(attr, policy, fill)
    grad = rng.standard_normal(put_in.shape)
    constant = graph.edge_attr_with_self_loops(np.zeros_like(attr), policy, fill)
    back = self_loops.taken_out(graph, grad, policy, fill)
    np.testing.assert_allclose((back * attr).sum(), (grad * (put_in - constant)).sum(), rtol=1e-12)
    gone = edge_index[0] == edge_index[1]
    assert gone.any() and np.all(back[gone] == 0) == (policy == "replace")
    threads = rv.get_num_threads()
    try:
        rv.set_num_threads(1)
        assert np.array_equal(self_loops.taken_out(graph, grad, policy, fill), back)
        assert np.array_equal(graph.edge_attr_with_self_loops(attr, policy, fill), put_in)
    finally:
        rv.set_num_threads(threads)


def test_an_array_with_one_entry_for_each_loop():
    graph = CSRGraph.from_edge_index([[0, 1], [1, 1]], 3)
    assert graph.edge_attr_with_self_loops([5, 6], "replace", [1, 2, 3]).tolist() == [5.0, 1.0, 2.0, 3.0]
    assert graph.edge_attr_with_self_loops([5, 6], "keep").tolist() == [5.0, 6.0]


def test_nan_of_an_edge_reaches_only_its_node():
    graph = CSRGraph.from_edge_index([[0, 1, 2, 2], [1, 0, 0, 2]])
    got = graph.edge_attr_with_self_loops([np.nan, 1.0, 3.0, np.inf])
    assert np.array_equal(got, [np.nan, 1.0, 3.0, 2.0, np.nan, 0.0], equal_nan=True)


@pytest.mark.parametrize("fill", ["mean", "add", 2.0])
def test_self_loops_are_those_of_pyg(fill):
    torch, utils = pytest.importorskip("torch"), pytest.importorskip("torch_geometric.utils")
    sizes = [(6, 6, 40), (9, 5, 40)]
    sizes += [] if isinstance(fill, str) else [(5, 9, 40)]  # PyG cannot sum over more targets than sources
    for seed, size in enumerate(sizes):
        edge_index, attr, n = draw(size, seed=seed), np.random.default_rng(seed).standard_normal((40, 2)), min(size[:2])
        graph = CSRGraph.from_edge_index(edge_index, size[:2])
        ends, values = utils.remove_self_loops(torch.tensor(edge_index), torch.tensor(attr))  # as GATConv does it
        for policy, given_ends, given_values in (
            ("replace", ends, values),
            ("add", torch.tensor(edge_index), torch.tensor(attr)),
        ):
            wanted = utils.add_self_loops(given_ends, given_values, fill_value=fill, num_nodes=n)
            assert np.array_equal(graph.with_self_loops(policy).to_edge_index(), wanted[0].numpy())
            np.testing.assert_allclose(
                graph.edge_attr_with_self_loops(attr, policy, fill), wanted[1].numpy(), rtol=1e-12
            )
