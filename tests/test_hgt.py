"""The heterogeneous graph transformer against its formula in plain NumPy, its gradients against differences."""

import copy
import gc
import math
import pickle
import weakref

import numpy as np
import pytest
import scipy.sparse
import scipy.special

import ruvector_numba as rv
from ruvector_numba import errors
from ruvector_numba.graphs.hgt import HGT
from ruvector_numba.parameters import ParameterSet
from ruvector_numba.plan import gelu

NODES = {"author": 5, "paper": 7, "venue": 3}
WRITES, CITES, RATES, AT = (
    ("author", "writes", "paper"),
    ("paper", "cites", "paper"),
    ("author", "rates", "paper"),
    ("paper", "at", "venue"),
)
TYPES = [WRITES, CITES, RATES, AT]
METADATA = list(NODES), TYPES
EDGES = {WRITES: 9, CITES: 11, RATES: 6, AT: 4}
WIDTHS = {"author": 3, "paper": 6, "venue": 4}


def layer(in_channels=WIDTHS, out_channels=6, heads=2, metadata=METADATA, seed=0, dtype=np.float64, **more):
    """With parameters that are all different from what they begin as."""
    made = HGT(in_channels, out_channels, metadata, heads, seed=seed, dtype=dtype, **more)
    flat = made.get_parameters()
    made.set_parameters(flat + 0.3 * np.random.default_rng(seed).standard_normal(len(flat)).astype(dtype))
    return made


def draw(widths=WIDTHS, counts=NODES, numbers=EDGES, edge_dim=None, seed=1, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x = {kind: rng.standard_normal((n, widths[kind])).astype(dtype) for kind, n in counts.items()}
    index = {kind: np.stack([rng.integers(counts[k], size=E) for k in kind[::2]]) for kind, E in numbers.items()}
    edge_dim = edge_dim or {}
    attr = {kind: rng.standard_normal((numbers[kind], n)).astype(dtype) for kind, n in edge_dim.items()}
    return x, index, attr or None


def formula(p, x, index, attr, types, F, H):
    """HGTConv, edge by edge and head by head."""
    D, attr = F // H, attr or {}
    kqv = {t: np.split(v @ p[f"kqv_lin.lins.{t}.weight"].T + p[f"kqv_lin.lins.{t}.bias"], 3, 1) for t, v in x.items()}
    output, coefficients = {}, {kind: np.zeros((np.shape(e)[1], H)) for kind, e in index.items()}
    for t in dict.fromkeys(kind[2] for kind in types):
        o = np.zeros((len(x[t]), H, D))
        for i in range(len(x[t])):
            for h in range(H):
                part, scores, values, of = slice(h * D, (h + 1) * D), [], [], []
                for kind, (sources, targets) in index.items():
                    name, row = "__".join(kind), h * len(types) + types.index(kind)
                    for e in np.flatnonzero(np.asarray(targets) == i) if kind[2] == t else ():
                        j = sources[e]
                        extra = np.zeros(F)
                        if kind in attr:
                            extra = p[f"lin_edge.{name}.weight"] @ np.atleast_1d(attr[kind][e])
                        k = kqv[kind[0]][0][j, part] @ p["k_rel.weight"][row] + extra[part]
                        v = kqv[kind[0]][2][j, part] @ p["v_rel.weight"][row] + extra[part]
                        scores.append(kqv[t][1][i, part] @ k * p[f"p_rel.{name}"][0, h] / math.sqrt(D))
                        values.append(v)
                        of.append((kind, e))
                if scores:
                    weights = scipy.special.softmax(scores)
                    o[i, h] = weights @ values
                    for (kind, e), weight in zip(of, weights):
                        coefficients[kind][e, h] = weight
        o = o.reshape(len(x[t]), F)
        o = o / 2 * (1 + scipy.special.erf(o / math.sqrt(2)))
        o = o @ p[f"out_lin.lins.{t}.weight"].T + p[f"out_lin.lins.{t}.bias"]
        gate = scipy.special.expit(p[f"skip.{t}"])
        output[t] = gate * o + (1 - gate) * x[t] if x[t].shape[1] == F else o
    return output, coefficients


def same(found, exact, rtol=1e-12):
    assert list(found) == list(exact)
    for kind in exact:
        np.testing.assert_allclose(found[kind], exact[kind], rtol=rtol, atol=rtol, err_msg=str(kind))


CASES = {
    "plain": {},
    "one head": dict(heads=1),
    "heads of one channel": dict(heads=6),
    "all with the gate": dict(in_channels=6),
    "none with the gate": dict(out_channels=8),
    "edge features": dict(edge_dim={CITES: 2, AT: 1}),
    "edge features of all": dict(edge_dim=3),
    "types of edges missing": dict(without=[WRITES, AT]),
    "no edges at all": dict(without=TYPES),
    "an edge type of no edges": dict(empty=[CITES]),
    "a type of no nodes": dict(none=["venue"]),
    "a source type of no nodes": dict(none=["author"]),
}


def case(in_channels=WIDTHS, out_channels=6, heads=2, edge_dim=None, without=(), empty=(), none=(), dtype=np.float64):
    made = layer(in_channels, out_channels, heads, edge_dim=edge_dim, dtype=dtype)
    counts = {kind: 0 if kind in none else n for kind, n in NODES.items()}
    gone = [kind for kind in TYPES if kind in empty or not all(counts[end] for end in kind[::2])]
    numbers = {kind: 0 if kind in gone else E for kind, E in EDGES.items() if kind not in without}
    dims = {kind: n for kind, n in made.edge_dim.items() if kind in numbers}
    return made, draw(made.in_channels, counts, numbers, dims, dtype=dtype)


@pytest.mark.parametrize("name", CASES)
def test_the_formula(name):
    made, call = case(**CASES[name])
    output, cache = made.forward_cached(*call)
    exact, coefficients = formula(made.parameters, *call, TYPES, made.out_channels, made.heads)
    same({kind: output[kind] for kind in exact}, exact)
    assert set(output) == {"paper", "venue"}  # nobody's edges lead to authors
    same(cache.coefficients(), coefficients)
    again = made(*call)
    assert all((again[kind] == output[kind]).all() for kind in output)


def test_float32():
    made, call = case(edge_dim=3, dtype=np.float32)
    output = made(*call)
    exact = formula(made.parameters.as_type(np.float64), *call, TYPES, 6, 2)[0]
    for kind, x in output.items():
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, exact[kind], rtol=2e-5, atol=2e-5)
    wide = made.forward({kind: x.astype(np.float64) for kind, x in call[0].items()}, call[1],
                        {kind: a.astype(np.float64) for kind, a in call[2].items()})  # fmt: skip
    same({kind: wide[kind] for kind in exact}, exact, 1e-11)


@pytest.mark.parametrize("name", CASES)
def test_all_gradients_by_differences(name):
    """Of every parameter, of the features of every type, and of every edge's."""
    made, (x, index, attr) = case(**CASES[name])
    output, cache = made.forward_cached(x, index, attr)
    rng = np.random.default_rng(3)
    grads = {kind: rng.standard_normal(o.shape) for kind, o in output.items()}
    found = made.backward(grads, cache)
    assert list(found.node_features) == list(x) and list(found.edge_attr) == list(attr or {})

    def loss(p=None, **new):
        if p is not None:
            other = copy.deepcopy(made)
            other.set_parameters(p)
            return loss_of(other, x, attr)
        return loss_of(made, {**x, **new.get("x", {})}, {**(attr or {}), **new.get("attr", {})} or None)

    def loss_of(of, x, attr):
        return sum((grads[kind] * o).sum() for kind, o in of.forward(x, index, attr).items())

    flat = made.get_parameters()
    differences(lambda p: loss(p=p), flat, ParameterSet(found.parameters).flat, "parameters")
    for kind in x:
        differences(lambda v, k=kind: loss(x={k: v}), x[kind], found.node_features[kind], kind)
    for kind in attr or {}:
        differences(lambda v, k=kind: loss(attr={k: v}), attr[kind], found.edge_attr[kind], kind)


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 2e-7), (np.float64, 4e-14)])
def test_gelu_keeps_its_digits_where_it_is_small(dtype, rtol):
    """1 + erf would have none left; over several tasks."""
    x = np.linspace(-12, 12, 20_001).astype(dtype)
    grad = np.cos(3 * x)
    wide = x.astype(np.float64)
    below, density = scipy.special.ndtr(wide), np.exp(-wide * wide / 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(gelu.forward(x), wide * below, rtol)
    slope = below + wide * density
    np.testing.assert_allclose(gelu.backward(x, grad), grad * slope, rtol, atol=rtol * 1e-2)
    assert gelu.forward(x).dtype == gelu.backward(x, grad).dtype == dtype
    assert gelu.backward(x[:0], grad[:0]).shape == (0,)
    with rv.threads(1):
        one = gelu.forward(x), gelu.backward(x, grad)
    np.testing.assert_array_equal(one, (gelu.forward(x), gelu.backward(x, grad)))
    np.testing.assert_array_equal(gelu.forward(x[::2]), gelu.forward(x)[::2])
    np.testing.assert_array_equal(gelu.backward(x[::2], grad[::2]), gelu.backward(x, grad)[::2])


def test_weights_of_edges_and_their_gradients():
    made, (x, index, attr) = case(edge_dim={CITES: 1})
    rng = np.random.default_rng(5)
    weight = {CITES: rng.standard_normal(EDGES[CITES]), AT: rng.standard_normal(EDGES[AT])}
    output, cache = made.forward_cached(x, index, {CITES: attr[CITES][:, 0]}, training=True, edge_weight=weight)
    same(made(x, index, attr, edge_weight=weight), output, 0)
    same(made(x, index, attr, edge_weight={kind: np.ones(E) for kind, E in EDGES.items()}), made(x, index, attr))
    same(cache.coefficients(), made.forward_cached(x, index, attr)[1].coefficients())
    grads = {kind: rng.standard_normal(o.shape) for kind, o in output.items()}
    found = made.backward(grads, cache)
    assert list(found.edge_weight) == [CITES, AT] and found.edge_attr[CITES].shape == (EDGES[CITES],)
    assert made.backward(grads, made.forward_cached(x, index, attr)[1]).edge_weight == {}

    def loss(attr=attr, **new):
        outputs = made.forward(x, index, attr, edge_weight={**weight, **new.get("weight", {})})
        return sum((grads[kind] * o).sum() for kind, o in outputs.items())

    for kind, of_kind in weight.items():
        differences(lambda v, k=kind: loss(weight={k: v}), of_kind, found.edge_weight[kind], kind)
    differences(lambda v: loss(attr={CITES: v}), attr[CITES][:, 0], found.edge_attr[CITES], "attr")
    for wrong in ({CITES: weight[CITES][1:]}, {CITES: weight[CITES][:, None]}, {AT: weight[AT].astype("f4")}, [1.0], 3):
        with pytest.raises(errors.AttentionError, match="edge_weight"):
            made(x, index, attr, edge_weight=wrong)


def differences(f, at, gradient, name, directions=6, step=1e-5):
    """Along random directions, so that every entry counts, and along single entries."""
    assert gradient.shape == at.shape
    rng = np.random.default_rng(at.size)
    ways = [rng.standard_normal(at.shape) for _ in range(directions)] if at.size else []
    for n in rng.integers(at.size, size=12) if at.size else ():
        ways.append(np.zeros(at.shape))
        ways[-1].flat[n] = 1.0
    for way in ways:
        slope = (f(at + step * way) - f(at - step * way)) / (2 * step)
        np.testing.assert_allclose((gradient * way).sum(), slope, rtol=1e-6, atol=2e-7, err_msg=str(name))


class TestWhatANodeSees:
    def test_one_softmax_over_all_relations(self):
        made, call = case()
        coefficients = made.forward_cached(*call)[1].coefficients()
        sums = np.zeros((NODES["paper"], 2))
        for kind in (WRITES, CITES, RATES):
            np.add.at(sums, call[1][kind][1], coefficients[kind])
        reached = np.unique(np.concatenate([call[1][kind][1] for kind in (WRITES, CITES, RATES)]))
        np.testing.assert_allclose(sums[reached], 1, rtol=1e-12)

    def test_a_target_without_edges_gets_the_bias_and_its_own_share(self):
        made, (x, index, _) = case()
        index = {kind: ends[:, ends[1] != 2] for kind, ends in index.items()}
        output, p = made(x, index), made.parameters
        gate = scipy.special.expit(p["skip.paper"])
        bias = p["out_lin.lins.paper.bias"]
        np.testing.assert_allclose(output["paper"][2], gate * bias + (1 - gate) * x["paper"][2], rtol=1e-12)
        np.testing.assert_allclose(output["venue"][2], p["out_lin.lins.venue.bias"], rtol=1e-12)

    def test_nan_poisons_only_those_who_see_it(self):
        made, (x, index, _) = case()
        x["author"][1] = np.nan
        output = made(x, index)
        seeing = np.unique(np.concatenate([index[kind][1][index[kind][0] == 1] for kind in (WRITES, RATES)]))
        assert 0 < len(seeing) < NODES["paper"]
        hit = np.isnan(output["paper"]).any(axis=1)
        assert hit[seeing].all() and hit.sum() == len(seeing) and not np.isnan(output["venue"]).any()

    @pytest.mark.parametrize("out_channels", [WIDTHS["paper"], 8], ids=["beside its input", "alone"])
    def test_nan_that_nobody_sees_is_in_no_gradient(self, out_channels):
        made, (x, index, _) = case(out_channels=out_channels, heads=1)
        index = {kind: np.where(ends == 1, 0, ends) for kind, ends in index.items()}
        output, cache = made.forward_cached(x, index)
        for g in output.values():
            g[1] = 0  # the gradients too
        sound = made.backward(output, cache)
        for nodes in x.values():
            nodes[1] = np.nan
        got = made.backward(output, made.forward_cached(x, index)[1])
        for name, wanted in sound.parameters.items():
            np.testing.assert_array_equal(got.parameters[name], wanted, err_msg=name)

    def test_a_node_type_that_no_edge_touches_may_be_missing(self):
        made, (x, index, _) = case(without=[AT])
        output = made(x, index)
        del x["venue"]
        found, cache = made.forward_cached(x, index)
        assert list(found) == ["paper"] and (found["paper"] == output["paper"]).all()
        gradients = made.backward(found, cache)
        assert list(gradients.node_features) == ["author", "paper"]
        assert not gradients.parameters["kqv_lin.lins.venue.weight"].any()

    def test_a_gradient_that_is_missing_counts_as_zero(self):
        made, call = case(edge_dim=2)
        output, cache = made.forward_cached(*call)
        grad = np.ones_like(output["paper"])
        some = made.backward({"paper": grad}, cache)
        all_of_it = made.backward({"paper": grad, "venue": np.zeros_like(output["venue"])}, cache)
        for name, g in all_of_it.parameters.items():
            np.testing.assert_array_equal(some.parameters[name], g)

    def test_the_same_for_any_number_of_threads_and_any_order_of_types(self):
        numbers = {WRITES: 4000, CITES: 9000, AT: 300}
        made = layer(edge_dim={CITES: 3}, dtype=np.float32)
        x, index, attr = draw(counts={"author": 300, "paper": 900, "venue": 3}, numbers=numbers, edge_dim={CITES: 3},
                              dtype=np.float32)  # fmt: skip
        turned = {kind: index[kind] for kind in reversed(index)}

        def all_bits(threads, index):
            rv.set_num_threads(threads)
            output, cache = made.forward_cached(x, index, attr)
            g = made.backward(output, cache)
            parts = [*output.values(), *g.parameters.values(), *g.node_features.values(), *g.edge_attr.values()]
            return b"".join(part.tobytes() for part in parts)

        before = rv.get_num_threads()
        try:
            assert all_bits(1, index) == all_bits(before, index) == all_bits(1, turned)
        finally:
            rv.set_num_threads(before)


class TestGraphs:
    def graphs(self, index):
        return {
            kind: rv.CSRGraph.from_edge_index(ends, tuple(NODES[k] for k in kind[::2])) for kind, ends in index.items()
        }

    def test_ready_graphs_give_the_same_and_are_joined_once(self):
        made, (x, index, attr) = case(edge_dim=1)
        graphs = self.graphs(index)
        output, cache = made.forward_cached(x, index, attr)
        for _ in range(2):
            same(made(x, graphs, attr), output, 0)
        joined = made.forward_cached(x, graphs, attr)[1].graph
        assert joined is layer(edge_dim=1, seed=5).forward_cached(x, graphs, attr)[1].graph is not cache.graph

    def test_a_joined_graph_keeps_none_alive_and_one_for_each_pairing(self):
        made, (x, index, attr) = case(edge_dim=1)
        graphs = self.graphs(index)
        first, others = next(iter(graphs.values())), [weakref.ref(graph) for graph in list(graphs.values())[1:]]
        one = made.forward_cached(x, graphs, attr)[1].graph
        kinds = list(graphs)
        again = self.graphs(index) | {kinds[0]: first}
        two = made.forward_cached(x, again, attr)[1].graph
        assert two is not one and made.forward_cached(x, graphs, attr)[1].graph is one
        del graphs
        gc.collect()
        assert not any(ref() for ref in others)
        assert made.forward_cached(x, again, attr)[1].graph is two

    def test_what_was_joined_is_not_taken_for_other_graphs(self):
        made, (x, index, _) = case()
        graphs = self.graphs(index)
        made(x, graphs)
        fewer = {kind: graphs[kind] for kind in (WRITES, CITES)}
        same(made(x, fewer), made(x, {kind: index[kind] for kind in fewer}), 0)
        swapped = {**index, CITES: index[CITES][:, ::-1][:, :-2]}
        same(made(x, {**graphs, CITES: self.graphs(swapped)[CITES]}), made(x, swapped), 0)
        renamed = {RATES: graphs[WRITES]}
        made(x, {WRITES: graphs[WRITES]})
        same(made(x, renamed), made(x, {RATES: index[WRITES]}), 0)


class TestTheLayer:
    def test_names_and_shapes_are_those_of_hgtconv(self):
        made = HGT(
            {"a": 3, "b": 4}, 8, (["a", "b"], [("a", "x", "b"), ("b", "y.z", "a")]), 2, edge_dim={("a", "x", "b"): 5}
        )
        assert made.parameters.shapes == {
            "kqv_lin.lins.a.weight": (24, 3), "kqv_lin.lins.a.bias": (24,),
            "kqv_lin.lins.b.weight": (24, 4), "kqv_lin.lins.b.bias": (24,),
            "out_lin.lins.a.weight": (8, 8), "out_lin.lins.a.bias": (8,),
            "out_lin.lins.b.weight": (8, 8), "out_lin.lins.b.bias": (8,),
            "k_rel.weight": (4, 4, 4), "v_rel.weight": (4, 4, 4), "skip.a": (1,), "skip.b": (1,),
            "p_rel.a__x__b": (1, 2), "p_rel.b__y#z__a": (1, 2), "lin_edge.a__x__b.weight": (8, 5),
        }  # fmt: skip
        assert (made.parameters["skip.a"] == 1).all() and (made.parameters["p_rel.a__x__b"] == 1).all()
        assert not made.parameters["kqv_lin.lins.a.bias"].any() and made.parameters["k_rel.weight"].any()

    def test_it_tells_the_truth(self):
        made = layer()
        assert isinstance(made, rv.GraphAttention)
        assert (made.name(), made.d_model(), made.num_graph_heads()) == ("HGT", 6, 2)
        assert made.supports_heterogeneous() and not made.supports_edge_features() and not made.supports_masking()
        assert layer(edge_dim={CITES: 1}).supports_edge_features()
        assert repr(layer(edge_dim={CITES: 1})).startswith("HGT({'author': 3")

    def test_seeds(self):
        one, two, three = (HGT(WIDTHS, 6, METADATA, seed=seed).get_parameters() for seed in (0, 0, 1))
        assert (one == two).all() and (one != three).any()

    def test_it_learns(self):
        made, call = case(edge_dim=2)
        first = None
        for _ in range(60):
            output, cache = made.forward_cached(*call)
            loss = sum((o**2).sum() for o in output.values())
            first = first or loss
            made.update_parameters(made.backward({kind: 2 * o for kind, o in output.items()}, cache), 0.003)
        assert loss < first / 2

    def test_the_cache_is_that_of_then(self):
        made, call = case()
        output, cache = made.forward_cached(*call)
        before = made.backward(output, cache)
        made.set_parameters(2 * made.get_parameters())
        for twin in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            again = twin.backward(output, cache)
            for name, g in before.parameters.items():
                np.testing.assert_array_equal(again.parameters[name], g)
        assert "HGT" in repr(cache) and cache == cache and cache != made.forward_cached(*call)[1]
        with pytest.raises(errors.InvalidInputError, match="cache is that of another HGT"):
            layer(seed=4).backward(output, cache)

    def test_copies_and_files(self, tmp_path):
        pytest.importorskip("safetensors")
        made, call = case(edge_dim={CITES: 2})
        output, path = made(*call), str(tmp_path / "layer.safetensors")
        made.save(path)
        for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), HGT.from_file(path)):
            same(other(*call), output, 0)
        with pytest.raises(errors.InvalidConfigError, match="does not fit"):
            layer(edge_dim={AT: 2}).load(path)
        rv.GAT(3, 2, seed=0).save(path)
        with pytest.raises(errors.InvalidConfigError, match="describes no HGT"):
            HGT.from_file(path)


class TestOneTypeOfEach:
    made = staticmethod(lambda **more: layer(4, 6, metadata=(["n"], [("n", "to", "n")]), **more))
    x, index = np.random.default_rng(0).standard_normal((5, 4)), np.array([[0, 1, 4, 4], [1, 1, 0, 1]])

    @pytest.mark.parametrize("edge_dim", [None, 1])
    def test_graph_and_sparse_forward(self, edge_dim):
        made = self.made(edge_dim=edge_dim)
        weights = np.array([1.0, -2.0, 3.0, 0.5])
        attr = None if edge_dim is None else weights[:, None]
        output, coefficients = made.graph_forward(self.x, self.index, attr)
        exact, wanted = formula(made.parameters, {"n": self.x}, {("n", "to", "n"): self.index},
                                None if attr is None else {("n", "to", "n"): attr}, made.edge_types, 6, 2)  # fmt: skip
        np.testing.assert_allclose(output, exact["n"], rtol=1e-12)
        np.testing.assert_allclose(coefficients, wanted["n", "to", "n"], rtol=1e-12)
        matrix = scipy.sparse.coo_array((weights, self.index[::-1]), shape=(5, 5))
        features, found = made.sparse_forward(self.x, matrix)
        np.testing.assert_allclose(features, output, rtol=1e-12)
        np.testing.assert_allclose(found.toarray()[self.index[1], self.index[0]], coefficients.mean(axis=1), rtol=1e-12)

    def test_entries_with_one_place_are_edges_of_their_own(self):
        made, twice = self.made(edge_dim=1), np.concatenate([self.index, self.index], axis=1)
        weights = np.arange(8.0)
        features, found = made.sparse_forward(self.x, scipy.sparse.coo_array((weights, twice[::-1]), shape=(5, 5)))
        output, coefficients = made.graph_forward(self.x, twice, weights)
        np.testing.assert_array_equal(features, output)
        assert found.nnz == 8 and found.sum() == pytest.approx(coefficients.mean(axis=1).sum())

    def test_several_types_are_refused(self):
        with pytest.raises(errors.InvalidInputError, match=r"several types(.|\n)*HINT: call forward"):
            layer().graph_forward(self.x, self.index)
        with pytest.raises(errors.InvalidInputError, match="several types"):
            layer().sparse_forward(self.x, scipy.sparse.eye_array(5))
        with pytest.raises(errors.GraphStructureError, match="not a sparse matrix"):
            self.made().sparse_forward(self.x, np.eye(5))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(in_channels={"author": 3}), "in_channels lacks 'paper', 'venue'"),
        (dict(in_channels=WIDTHS | {"city": 3}), "in_channels has 'city'"),
        (dict(in_channels=-1), "in_channels is -1"),
        (dict(in_channels=WIDTHS | {"paper": 0}), r"in_channels\['paper'\] is 0"),
        (dict(out_channels=0), "out_channels is 0"),
        (dict(heads=4), "heads does not divide out_channels"),
        (dict(heads=1.5), "heads is 1.5"),
        (dict(edge_dim={("a", "b", "c"): 2}), "edge_dim has"),
        (dict(edge_dim=0), "edge_dim is 0"),
        (dict(edge_dim={CITES: "2"}), "edge_dim.* is '2'"),
        (dict(metadata=None), "metadata is None"),
        (dict(metadata=(["author"], 3)), "metadata is"),
        (dict(metadata=(["author"], [CITES])), "metadata has the edge type"),
        (dict(metadata=(["author"], [("author", "author")])), "metadata has the edge type"),
        (dict(metadata=(["author"], [("author", 1, "author")])), "metadata has the edge type"),
        (dict(metadata=(list(NODES), [])), "no edge types"),
        (dict(metadata=(list(NODES), [CITES, CITES])), "a type twice"),
        (dict(metadata=(["paper", "paper"], [CITES])), "a type twice"),
        (dict(metadata=(["paper", 3], [CITES])), "no text"),
        (dict(metadata=([["paper"]], [CITES])), "metadata is"),
        (dict(metadata=("ab", [("a", "to", "b")])), "no text"),
        (dict(metadata=(["a", "a__b", "c"], [("a__b", "c", "c"), ("a", "b__c", "c")])), "a type twice"),
        (dict(seed="x"), "seed is 'x'"),
    ],
)
def test_settings_that_are_refused(changes, message):
    settings = dict(in_channels=WIDTHS, out_channels=6, metadata=METADATA, heads=2) | changes
    with pytest.raises(errors.InvalidConfigError, match=message):
        HGT(**settings)


@pytest.mark.parametrize(
    "argument, change, kind, message",
    [
        ("x", lambda x: list(x.values()), errors.InvalidInputError, "x_dict is a list"),
        ("x", lambda x: {}, errors.InvalidInputError, "x_dict is empty"),
        ("x", lambda x: x | {"city": x["paper"]}, errors.InvalidInputError, "x_dict has 'city'"),
        ("x", lambda x: {"paper": x["paper"]}, errors.InvalidInputError, "x_dict lacks 'author'"),
        ("x", lambda x: x | {"paper": x["venue"]}, errors.DimensionMismatchError, "built for 6 channels of 'paper'"),
        ("x", lambda x: x | {"paper": x["paper"][0]}, errors.InvalidInputError, r"x_dict\['paper'\] has 1 axes"),
        ("x", lambda x: x | {"paper": x["paper"].astype(int)}, errors.InvalidInputError, "has dtype int64"),
        ("x", lambda x: x | {"paper": x["paper"].astype("f4")}, errors.InvalidInputError, "differ in dtype"),
        ("x", lambda x: x | {"paper": x["paper"][:1]}, errors.GraphStructureError,
         r"x_dict\['paper'\] has 1 rows, and edge_index_dict\[.*names .*, at edge \d"),
        ("index", lambda index: [index], errors.InvalidInputError, "edge_index_dict is a list"),
        ("index", lambda index: {("a", "b"): 0}, errors.InvalidInputError, r"edge_index_dict has \('a', 'b'\)"),
        ("index", lambda index: index | {AT: index[AT].T}, errors.GraphStructureError, r"'at'.*not \(2, E\)"),
        ("index", lambda index: index | {AT: index[AT] - 9}, errors.GraphStructureError, r"'at'.*edge 0 has source -"),
        ("index", lambda index: index | {AT: index[AT] + 0.5}, errors.GraphStructureError, "'at'.*dtype float64"),
        ("index", lambda index: index | {AT: rv.CSRGraph.from_edge_index(index[AT], 9)}, errors.DimensionMismatchError,
         "expected .9, 9., got .7, 3."),
        ("attr", lambda attr: attr[CITES], errors.InvalidInputError, "edge_attr_dict is a ndarray"),
        ("attr", lambda attr: None, errors.InvalidInputError, "edge_attr_dict.*'cites'.* is missing"),
        ("attr", lambda attr: attr | {AT: np.ones((4, 1))}, errors.InvalidInputError, "have no edge_dim"),
        ("attr", lambda attr: attr | {("a", "b", "c"): 0}, errors.InvalidInputError, "edge_attr_dict has"),
        ("attr", lambda attr: {CITES: attr[CITES][1:]}, errors.DimensionMismatchError, r"_dict.*shape: \(10, 2\)"),
        ("attr", lambda attr: {CITES: attr[CITES].astype("f4")}, errors.InvalidInputError, "dtype float32"),
    ],
)  # fmt: skip
def test_calls_that_are_refused(argument, change, kind, message):
    made = layer(edge_dim={CITES: 2})
    call = dict(zip(("x", "index", "attr"), draw(edge_dim=made.edge_dim)))
    call[argument] = change(call[argument])
    for method in (made, made.forward, made.forward_cached):
        with pytest.raises(kind, match=message):
            method(*call.values())


def test_options_and_sizes_that_are_refused():
    made, call = case()
    for training in ("no", None, np.array([True, False])):
        with pytest.raises(errors.InvalidInputError, match=r"training is (.|\n)*give True or False"):
            made.forward_cached(*call, training=training)
    with pytest.raises(errors.InvalidInputError, match="dtype is "):
        HGT(WIDTHS, 6, METADATA, dtype=(None, np.zeros(2)))
    with pytest.raises(errors.OutOfMemoryError, match="out_channels"):
        HGT(WIDTHS, 10**30, METADATA)


def test_gradients_that_are_refused():
    made, call = case()
    output, cache = made.forward_cached(*call)
    for grad, of, kind, message in [
        (output, None, errors.InvalidInputError, "cache is a NoneType"),
        (output["paper"], cache, errors.InvalidInputError, "grad_output is a ndarray"),
        ({"author": output["paper"]}, cache, errors.InvalidInputError, "grad_output has 'author'"),
        ({"paper": output["venue"]}, cache, errors.DimensionMismatchError, r"grad_output\['paper'\]"),
        ({"paper": output["paper"].astype("f4")}, cache, errors.InvalidInputError, "has dtype float32"),
    ]:
        with pytest.raises(kind, match=message):
            made.backward(grad, of)
