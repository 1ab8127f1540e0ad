"""Neighbour sampling: which edges may be drawn, how the subgraph is numbered, and dice that only the node decides."""

import itertools
import pickle

import numba
import numpy as np
import pytest
import scipy.sparse

import ruvector_numba as rv
from ruvector_numba.errors import DimensionMismatchError, GraphStructureError, InvalidConfigError, InvalidInputError
from ruvector_numba.graphs.graph import CSRGraph
from ruvector_numba.graphs.sampling import neighbor_batches, sample_neighbors

MOST = numba.config.NUMBA_NUM_THREADS


def draw(N=60, E=400, seed=0):
    """Hubs, isolated nodes, self-loops and duplicates."""
    rng = np.random.default_rng(seed)
    edge_index = (N * rng.random((2, E)) ** 2).astype(int)
    return CSRGraph.from_edge_index(edge_index, N), edge_index


def check(sample, graph, seeds, fan_outs):
    """All that holds whatever the dice say, edge by edge and hop by hop."""
    sources, targets = graph.to_edge_index()
    local_sources, local_targets = sample.graph.to_edge_index()
    assert sample.graph.num_sources == sample.graph.num_targets == len(sample.nodes)
    assert len(sample.edges) == sample.graph.num_edges == len(set(sample.edges.tolist()))
    assert np.array_equal(sample.nodes[local_sources], sources[sample.edges])
    assert np.array_equal(sample.nodes[local_targets], targets[sample.edges])
    assert sample.nodes.dtype == sample.edges.dtype == np.int64
    drawn = {int(i): [] for i in sample.nodes}
    for e in sample.edges.tolist():
        drawn[targets[e]].append(e)
    nodes = frontier = [int(i) for i in seeds]
    for fan_out in fan_outs:
        new = {}
        for i in frontier:
            there = np.flatnonzero(targets == i)
            assert len(drawn[i]) == (len(there) if fan_out == -1 else min(fan_out, len(there)))
            assert drawn[i] == sorted(drawn[i])  # the caller's order among edges of one target
            new.update(dict.fromkeys(sources[drawn[i]].tolist()))
        frontier = [j for j in new if j not in nodes]
        nodes = nodes + frontier
    assert sample.nodes.tolist() == nodes
    assert sum(len(drawn[i]) for i in frontier) == 0
    assert (sample.num_targets, sample.num_all_nodes) == (len(seeds), graph.num_targets)


def chosen(sample):
    """{target: its edges}, all by their numbers in the whole graph."""
    targets = sample.nodes[sample.graph.to_edge_index()[1]]
    return {int(i): sample.edges[targets == i].tolist() for i in sample.nodes}


def equal(a, b):
    parts = [(s.nodes, s.edges, s.graph.indptr, s.graph.indices, s.num_targets) for s in (a, b)]
    return all(np.array_equal(x, y) for x, y in zip(*parts))


@pytest.mark.parametrize("fan_outs", [(1,), (3, 2), (-1,), (2, -1, 2), (-1, -1, -1), (1000, 1)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_subgraph(seed, fan_outs):
    graph, _ = draw(seed=seed)
    seeds = np.random.default_rng(seed).permutation(60)[:7]
    check(sample_neighbors(graph, seeds, fan_outs, seed=seed), graph, seeds, fan_outs)


def test_a_graph_that_was_grouped_already():
    graph = CSRGraph.from_neighbors([0, 3, 3, 5], [2, 1, 1, 0, 2])
    assert graph.edge_ids is None
    for seed in range(10):
        check(sample_neighbors(graph, [2, 0], (2, 2), seed=seed), graph, [2, 0], (2, 2))


def test_one_number_is_one_layer():
    graph, _ = draw()
    for fan_out in (np.int32(4), [4], np.array([4]), np.array(4)):
        assert equal(sample_neighbors(graph, [1, 2], 4), sample_neighbors(graph, [1, 2], fan_out))


def test_all_neighbours_compute_what_the_whole_graph_computes():
    graph, _ = draw()
    rng = np.random.default_rng(1)
    x, weights = rng.standard_normal((60, 3)), rng.standard_normal(400)
    A = graph.to_scipy(weights)
    sample = sample_neighbors(graph, [5, 0, 9], (-1, -1))
    part = sample.graph.to_scipy(weights[sample.edges])
    assert np.allclose((part @ np.tanh(part @ sample.features(x)))[:3], (A @ np.tanh(A @ x))[[5, 0, 9]])


# --- dice ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("most, degree", [(1, 7), (3, 6), (5, 6)])
@pytest.mark.parametrize("over", ["nodes", "seeds", "hops"])
def test_each_set_of_neighbours_is_as_likely(most, degree, over):
    times = 4000 if over == "nodes" else 1500
    if over == "nodes":
        graph = CSRGraph.from_neighbors(np.arange(times + 1) * degree, np.tile(np.arange(degree), times))
        edges = sample_neighbors(graph, np.arange(times), most).edges.reshape(times, most)
        found = edges - np.arange(times)[:, None] * degree
    elif over == "seeds":
        graph = CSRGraph.from_edge_index([range(1, degree + 1), [0] * degree])
        found = np.array([sample_neighbors(graph, [0], most, seed=seed).edges for seed in range(times)])
    else:  # what node 1 draws in the second hop, of all seeds for which it draws edge 1 in the first
        graph = CSRGraph.from_edge_index([[1, *range(2, degree + 2)], [0, *[1] * degree]])
        found = []
        for seed in range(times):
            if 1 in sample_neighbors(graph, [1], most, seed=seed).edges:
                found.append(sample_neighbors(graph, [0], (1, most), seed=seed).edges[1:] - 1)
        found = np.array(found)
    sets = {each: 0 for each in itertools.combinations(range(degree), most)}
    for each in map(tuple, found.tolist()):
        sets[each] += 1
    expected = len(found) / len(sets)
    chi_square, freedom = sum((n - expected) ** 2 / expected for n in sets.values()), len(sets) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_order_and_company_change_nothing():
    graph, _ = draw()
    seeds = np.arange(0, 60, 3)
    wanted = chosen(sample_neighbors(graph, seeds, (2, 3), seed=5))
    shuffled = sample_neighbors(graph, np.random.default_rng(0).permutation(seeds), (2, 3), seed=5)
    assert chosen(shuffled) == wanted
    for i in seeds.tolist():
        assert chosen(sample_neighbors(graph, [i], 2, seed=5))[i] == wanted[i]


def test_the_seed_decides():
    graph, _ = draw()
    samples = [sample_neighbors(graph, [0, 1, 2], 3, seed=seed) for seed in (0, 1, 2**63 - 1)]
    again = [sample_neighbors(graph, [0, 1, 2], 3, seed=seed) for seed in (0, 1, np.int64(2**63 - 1))]
    assert all(map(equal, samples, again))
    assert not any(equal(a, b) for a, b in itertools.combinations(samples, 2))
    assert equal(samples[0], sample_neighbors(graph, [0, 1, 2], 3))
    fresh = [sample_neighbors(graph, [0, 1, 2], 3, seed=None) for _ in range(10)]
    assert not all(equal(fresh[0], other) for other in fresh)


def test_what_is_drawn_stays_the_same_from_release_to_release():
    graph = CSRGraph.from_edge_index([range(1, 21), [0] * 20])
    assert sample_neighbors(graph, [0], 6, seed=7).edges.tolist() == [3, 5, 8, 11, 15, 17]


def test_threads():
    rng = np.random.default_rng(0)
    graph = CSRGraph.from_edge_index(rng.integers(0, 5000, (2, 100_000)), 5000)
    found = []
    for n in sorted({1, 2, MOST} & set(range(1, MOST + 1))):
        with rv.threads(n):
            found.append(sample_neighbors(graph, np.arange(1000), (10, 10)))
    assert all(equal(found[0], other) for other in found)


# --- what is odd ---------------------------------------------------------------------------------------------------
def test_nothing_to_draw():
    graph = CSRGraph.from_edge_index([[0, 0], [1, 1]], num_nodes=4)
    for seeds in ([], np.array([], np.int32)):
        sample = sample_neighbors(graph, seeds, (2, -1))
        assert (sample.nodes.shape, sample.edges.shape, sample.num_targets) == ((0,), (0,), 0)
        assert sample.features(np.ones((4, 3))).shape == (0, 3)
        assert list(neighbor_batches(graph, seeds, 2, 5)) == []
    sample = sample_neighbors(graph, [3, 2], (2, 2))  # both isolated
    assert (sample.nodes.tolist(), sample.graph.indptr.tolist()) == ([3, 2], [0, 0, 0])
    none = sample_neighbors(CSRGraph.from_edge_index([[], []]), [], 3)
    assert none.graph.num_targets == 0


def test_a_hub_and_many_to_draw():
    graph = CSRGraph.from_edge_index([np.arange(100_000), np.zeros(100_000, int)])
    sample = sample_neighbors(graph, [0], 3000)
    check(sample, graph, [0], [3000])
    assert 0.4 < (sample.edges < 50_000).mean() < 0.6


def test_wide_indices(monkeypatch):
    graph, edge_index = draw()
    monkeypatch.setattr("ruvector_numba.graphs.edges.NARROW", 50)
    wide = CSRGraph.from_edge_index(edge_index, 60)
    assert wide.indices.dtype == np.int64
    assert equal(sample_neighbors(wide, [3, 1], (2, 2)), sample_neighbors(graph, [3, 1], (2, 2)))


def test_a_sample_can_be_pickled_and_not_changed():
    graph, _ = draw()
    sample = sample_neighbors(graph, [3, 1], (2, 2))
    assert equal(pickle.loads(pickle.dumps(sample)), sample)
    assert repr(sample).startswith("NeighborSample(num_targets=2, num_nodes=")
    with pytest.raises(AttributeError):
        sample.nodes = sample.edges


def test_the_caller_keeps_the_nodes():
    graph, _ = draw()
    seeds = np.array([3, 1])
    sample = sample_neighbors(graph, seeds, 2)
    seeds[:] = 0
    assert sample.nodes[:2].tolist() == [3, 1]


# --- features ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.float32, np.int64, ">f4"])
def test_features_on_disk(tmp_path, dtype):
    graph, _ = draw()
    x = np.arange(180).reshape(60, 3).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    on_disk = np.load(tmp_path / "x.npy", mmap_mode="r")
    sample = sample_neighbors(graph, [3, 1], (2, 2))
    for given in (on_disk, x, x[::1, ::-1][:, ::-1]):
        found = sample.features(given)
        assert type(found) is np.ndarray
        assert found.dtype == x.dtype
        assert found.flags.owndata
        assert np.array_equal(found, x[sample.nodes])


def test_features_that_are_none():
    graph, _ = draw()
    sample = sample_neighbors(graph, [3, 1], (2, 2))
    assert sample.features(list(range(60))).tolist() == sample.nodes.tolist()
    for wrong in (np.ones((59, 3)), np.ones((len(sample.nodes), 3)), 3.0):
        with pytest.raises(DimensionMismatchError, match="expected 60, got") as caught:
            sample.features(wrong)
        assert "rows of all nodes of the whole graph" in str(caught.value)
    with pytest.raises(InvalidInputError, match="x cannot become an array"):
        sample.features([[1.0], [2.0, 3.0]])
    with pytest.raises(InvalidInputError, match=r"x is a numpy\.ma array, whose own mask would be lost"):
        sample.features(np.ma.array(np.ones(60)))


# --- batches -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_size", [1, 4, 10, 11, 12, 99])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch(batch_size, shuffle):
    graph, _ = draw()
    seeds = np.arange(0, 55, 5)
    batches = list(neighbor_batches(graph, seeds, (2, 2), batch_size, seed=3, shuffle=shuffle))
    taken = [batch.nodes[: batch.num_targets].tolist() for batch in batches]
    assert [len(each) for each in taken] == [min(batch_size, 11 - start) for start in range(0, 11, batch_size)]
    row = list(itertools.chain(*taken))
    assert sorted(row) == seeds.tolist()
    assert (row == seeds.tolist()) != shuffle
    for batch, each in zip(batches, taken):
        assert equal(batch, sample_neighbors(graph, each, (2, 2), seed=3))


def test_epochs_differ_and_the_given_order_does_not_matter():
    graph, _ = draw()

    def order(seeds, seed):
        return [int(batch.nodes[0]) for batch in neighbor_batches(graph, seeds, 1, 1, seed=seed, shuffle=True)]

    assert order(range(30), 0) == order(range(29, -1, -1), 0) != order(range(30), 1)
    firsts = np.bincount([order(range(3), seed)[0] for seed in range(600)])
    assert (abs(firsts - 200) < 50).all()


def test_nothing_is_shuffled_unless_asked_for():
    graph, _ = draw()
    seeds = [7, 3, 50, 1, 20]
    assert np.concatenate([b.nodes[: b.num_targets] for b in neighbor_batches(graph, seeds, 2, 2)]).tolist() == seeds


def test_batches_are_an_iterator_with_a_length():
    graph, _ = draw()
    batches = neighbor_batches(graph, range(7), 2, 3)
    assert isinstance(batches, rv.NeighborBatches) and iter(batches) is batches and repr(batches).endswith("3 samples)")
    first = next(batches)
    assert first.nodes[: first.num_targets].tolist() == [0, 1, 2]
    assert len(batches) == 3  # of the whole epoch
    assert [len(batch.nodes[: batch.num_targets]) for batch in batches] == [3, 1]
    with pytest.raises(StopIteration):
        next(batches)
    assert len(neighbor_batches(graph, [], 2, 3)) == 0


# --- wrong input ---------------------------------------------------------------------------------------------------
GRAPH = draw()[0]


def calls(**given):
    given = {"graph": GRAPH, "nodes": [0, 1], "fan_out": 2, "seed": 0} | given
    graph, nodes, fan_out, seed = (given[name] for name in ("graph", "nodes", "fan_out", "seed"))
    yield lambda: sample_neighbors(graph, nodes, fan_out, seed=seed)
    yield lambda: neighbor_batches(graph, nodes, fan_out, 5, seed=seed)  # at the call already


def refused(kind, *told, **given):
    for call in calls(**given):
        with pytest.raises(kind) as caught:
            call()
        assert "HINT" in str(caught.value)
        for part in told:
            assert part in str(caught.value)


@pytest.mark.parametrize(
    "nodes, kind, told",
    [
        ([3, 4, 60], GraphStructureError, "nodes[2] is 60, and the nodes are 0 to 59"),
        ([3, -1], GraphStructureError, "nodes[1] is -1"),
        (np.array([2**64 - 1], np.uint64), GraphStructureError, "nodes[0] is 18446744073709551615"),
        ([3, 7, 4, 7], InvalidInputError, "nodes holds 7 more than once"),
        ([3.0, 4.5], InvalidInputError, "nodes has dtype float64"),
        (np.array([]), InvalidInputError, "nodes has dtype float64"),
        (np.ones(60, bool), InvalidInputError, "numpy.flatnonzero"),
        (["a"], InvalidInputError, "give the nodes' whole numbers"),
        (None, InvalidInputError, "nodes has dtype object"),
        (5, InvalidInputError, "one node is [node]"),
        ([[1, 2]], InvalidInputError, "nodes.shape: (1, 2)"),
        ([[1], [2, 3]], InvalidInputError, "nodes cannot become an array"),
    ],
    ids=str,
)
def test_nodes_that_are_none(nodes, kind, told):
    refused(kind, told, nodes=nodes)


def test_nodes_that_numpy_cannot_read():
    class Tensor:
        def __array__(self, *_, **__):
            raise TypeError("can't convert a sparse tensor to numpy")

    refused(InvalidInputError, "nodes cannot become an array", "nodes.detach()", nodes=Tensor())


def test_no_nodes_at_all():
    refused(GraphStructureError, "the nodes are none", graph=CSRGraph.from_edge_index([[], []]))


@pytest.mark.parametrize("fan_out", [0, -2, 2.0, True, None, "10", [], (), [3, 0], [3, None], [[3]], {3}], ids=str)
def test_fan_outs_that_are_none(fan_out):
    refused(InvalidConfigError, "fan_out is ", "-1 for all neighbours", fan_out=fan_out)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "1", True])
def test_seeds_that_are_none(seed):
    refused(InvalidInputError, f"seed is {seed!r}", seed=seed)


def test_graphs_that_are_none():
    refused(GraphStructureError, "graph is a list", "CSRGraph.from_edge_index", graph=[[0], [1]])
    matrix = scipy.sparse.csr_array(np.eye(3))
    refused(GraphStructureError, "graph is a csr_array", "CSRGraph.from_scipy", graph=matrix)
    bipartite = CSRGraph.from_edge_index([[0], [1]], (4, 3))
    refused(GraphStructureError, "different nodes", "num_sources: 4", "num_nodes=N", graph=bipartite)


@pytest.mark.parametrize("shuffle", ["no", None, 2, 0.0, np.array([True, False])], ids=str)
def test_shuffle_is_true_or_false(shuffle):
    with pytest.raises(InvalidInputError, match="shuffle is ") as caught:
        neighbor_batches(GRAPH, [0], 1, 1, shuffle=shuffle)
    assert "HINT: give True or False" in str(caught.value)


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, None, "3"])
def test_batch_sizes_that_are_none(batch_size):
    with pytest.raises(InvalidConfigError, match="batch_size is ") as caught:
        neighbor_batches(GRAPH, [0], 1, batch_size)
    assert "HINT: give a whole number, 1 or more" in str(caught.value)
