"""The heterogeneous graph transformer as a layer: parameters, files, one type of each, and what it refuses."""

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse
import scipy.special
from test_hgt import AT, CITES, METADATA, NODES, WIDTHS, case, draw, formula, layer, same

import ruvector_numba as rv
from ruvector_numba import errors
from ruvector_numba.graphs.hgt import HGT


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
