"""An edge_index that is given again: its graph is kept as long as the array lives and says the same."""

import gc
import threading
import weakref

import numpy as np
import pytest

import ruvector_numba as rv
from ruvector_numba.errors import GraphStructureError
from ruvector_numba.graphs import known
from ruvector_numba.plan import memory

N, E = 60, 70_000  # several chunks of edges
X = np.random.default_rng(1).standard_normal((N, 3)).astype(np.float32)
LAYER = rv.GAT(3, 2, heads=2, seed=0)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(known, "_known", ())


def drawn(dtype=np.int64, seed=0):
    return np.random.default_rng(seed).integers(0, N, (2, E)).astype(dtype)


def graph_of(edge_index, layer=LAYER, x=X):
    return layer.forward_cached(x, edge_index)[1].graph


def says(graph, edge_index):
    """Is it the graph of these edges, with the layer's self-loops?"""
    wanted = rv.CSRGraph.from_edge_index(np.asarray(edge_index).tolist(), num_nodes=N).with_self_loops()
    pairs = zip((graph.indptr, graph.indices, graph.edge_ids), (wanted.indptr, wanted.indices, wanted.edge_ids))
    return all(np.array_equal(a, b) for a, b in pairs)


LAYOUTS = {
    "rows": lambda x: x,
    "columns": np.asfortranarray,
    "every second": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "turned": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
}


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint32, np.int16, np.uint8, ">i8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_made_once_and_again_when_one_number_changes(dtype, layout):
    edge_index = LAYOUTS[layout](drawn(dtype))
    first = graph_of(edge_index)
    assert graph_of(edge_index) is first
    for at in [(0, 0), (1, E - 1), (0, E // 2), (1, 40_000)]:
        edge_index[at] = (edge_index[at] + 1) % N
        second = graph_of(edge_index)
        assert second is not first
        assert says(second, edge_index)
        assert graph_of(edge_index) is second
        first = second


def test_an_index_that_is_no_node_is_found_in_a_known_array():
    edge_index = drawn()
    graph_of(edge_index)
    edge_index[1, 5] = N
    for _ in range(2):
        with pytest.raises(GraphStructureError, match=f"names node {N}, at edge 5"):
            LAYER(X, edge_index)
    edge_index[1, 5] = 0
    assert says(graph_of(edge_index), edge_index)


def test_layers_share_it_and_another_array_has_its_own():
    edge_index = drawn()
    first = graph_of(edge_index)
    assert graph_of(edge_index, rv.GATv2(3, 5, seed=1)) is first
    assert graph_of(edge_index.copy()) is not first
    assert graph_of(edge_index[:]) is not first


def test_the_same_array_among_more_nodes_is_another_graph():
    edge_index = drawn()
    first, more = graph_of(edge_index), graph_of(edge_index, x=np.vstack([X, X]))
    assert (first.num_targets, more.num_targets) == (N, 2 * N)
    assert says(graph_of(edge_index), edge_index)


@pytest.mark.parametrize("how", ["alone", "in a cycle"])
def test_it_goes_with_its_array(how):
    edge_index, other = drawn(), drawn(seed=1)
    kept = graph_of(other)
    graph = weakref.ref(graph_of(edge_index))
    holder = [edge_index]
    if how == "in a cycle":
        holder.append(holder)
    del edge_index, holder
    gc.collect()
    assert graph() is None
    assert graph_of(other) is kept


def test_lists_are_not_known():
    edge_index = drawn().tolist()
    first = graph_of(edge_index)
    assert graph_of(edge_index) is not first
    assert not known._known


def step(edge_index):
    """The graph, once all that two passes derive from it is there."""
    output, cache = LAYER.forward_cached(X, edge_index)
    LAYER.backward(output, cache)
    return cache.graph


def test_what_a_graph_holds_is_counted():
    edge_index = drawn()
    whole = step(edge_index)
    one, *_ = known._known
    parts = [(graph.indptr, graph.indices, graph.edge_ids) for graph in (one.graph, whole)]
    by_hand = sum(x.nbytes for x in (one.said, *parts[0], *parts[1], *whole.transposed))
    assert by_hand > 2.4 * one.said.nbytes  # what was given is less than half of it
    assert one.size < by_hand <= known._size(one.said, one.graph) < 1.02 * by_hand
    assert step(edge_index) is whole
    assert known._known[0].size == known._size(one.said, one.graph)


def test_no_more_is_kept_than_was_allowed(monkeypatch):
    *arrays, fresh = (drawn(seed=seed) for seed in range(5))
    step(arrays[0])
    limit = 3.1 * known._size(*known._known[0][1:3])
    monkeypatch.setattr(memory, "limit", lambda: limit)
    graphs = [step(one) for one in arrays]
    # The last to be taken in had grown since.
    assert [graph_of(one) is graph for one, graph in zip(arrays[::-1], graphs[::-1])] == [True, True, True, False]
    assert sum(known._size(one.said, one.graph) for one in known._known) <= limit
    monkeypatch.setattr(memory, "limit", lambda: 0)
    for _ in range(2):
        assert says(graph_of(fresh), fresh)
    assert not known._known

    monkeypatch.setattr(memory, "limit", lambda: 1 << 40)
    small = [drawn(seed=seed)[:, :50] for seed in range(known.MOST + 10)]
    for one in small:
        graph_of(one)
    assert len(known._known) == known.MOST


def test_a_graph_that_outgrows_the_limit_is_given_up_when_it_is_asked_for(monkeypatch):
    edge_index = drawn()
    monkeypatch.setattr(memory, "limit", lambda: 2 * edge_index.nbytes)
    first = step(edge_index)
    assert known._known  # what backward derives came later
    assert graph_of(edge_index) is first
    assert not known._known
    assert says(graph_of(edge_index), edge_index)


def test_an_array_that_goes_while_its_own_thread_takes_a_graph_in(monkeypatch):
    """Its callback may run anywhere: here after the test that the array lives, and while the thread has the lock."""
    arrays = [drawn()]
    graph = weakref.ref(graph_of(arrays[0]))
    within_limit = known._within_limit

    def meanwhile(entries):
        assert len(entries) == 2
        arrays.clear()
        gc.collect()
        return within_limit(entries)

    other = drawn(seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(known, "_within_limit", meanwhile)
        kept = graph_of(other)
    assert graph() is None
    assert [one.array() for one in known._known] == [other]
    assert graph_of(other) is kept


def test_nobody_waits_for_the_lock():
    edge_index, other = drawn(), drawn(seed=1)
    graph_of(edge_index)
    with known._lock:  # as if another thread were at it
        del edge_index
        assert says(graph_of(other), other)
    first = graph_of(other)  # taken in now, and what is gone left out
    assert graph_of(other) is first
    assert len(known._known) == 1


def test_types_of_edges_are_joined_once():
    kinds = [("a", "to", "b"), ("b", "to", "a")]
    layer, x = rv.HGT(3, 4, (["a", "b"], kinds), heads=2, seed=0), {"a": X, "b": X + 1}
    index = {kind: drawn(seed=seed) for seed, kind in enumerate(kinds)}
    first = layer.forward_cached(x, index)
    assert layer.forward_cached(x, index)[1].graph is first[1].graph
    index[kinds[1]][0, 7] = (index[kinds[1]][0, 7] + 1) % N
    output, cache = layer.forward_cached(x, index)
    assert cache.graph is not first[1].graph
    wanted = layer.forward(x, {kind: ends.tolist() for kind, ends in index.items()})
    assert all(np.array_equal(output[node], wanted[node]) for node in x)


def test_threads_with_arrays_of_their_own_get_their_own_graphs():
    arrays = [drawn(seed=seed) for seed in range(4)]
    wanted = [LAYER(X, rv.CSRGraph.from_edge_index(one, num_nodes=N)) for one in arrays]
    wrong = []

    def work(n):
        for _ in range(20):
            if not np.array_equal(LAYER(X, arrays[n]), wanted[n]):
                wrong.append(n)

    workers = [threading.Thread(target=work, args=[n]) for n in range(4)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert not wrong


def test_threads_whose_arrays_come_and_go_leave_nothing():
    def work(n):
        for _ in range(30):
            graph_of(drawn(seed=n)[:, :500].copy())
            holder = [drawn(seed=n)[:, :500].copy()]
            graph_of(holder[0])
            holder.append(holder)  # for the garbage collector, in whichever thread

    workers = [threading.Thread(target=work, args=[n]) for n in range(4)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    gc.collect()
    assert not known._known and not known._gone
