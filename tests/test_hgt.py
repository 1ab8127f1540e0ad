"""The heterogeneous graph transformer against its formula in plain NumPy, its gradients against differences."""

import copy
import gc
import math
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
