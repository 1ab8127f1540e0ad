"""States of PyTorch Geometric's layers: arrays written by hand. Its own layers are in test_pyg_parity.py."""

import subprocess
import sys
import types

import numpy as np
import pytest

import ruvector_numba as rv
from ruvector_numba import DimensionMismatchError, InvalidConfigError, InvalidInputError, TrainingError
from ruvector_numba.interop import load_pyg_state, to_pyg_state

IN, OUT, HEADS, EDGE = 3, 4, 2, 5
ALL = HEADS * OUT

# What state_dict() of PyTorch Geometric 2.8 has, for layers (3, 4, heads=2), or ((3, 6), ...) where there is a pair.
SHAPES = [
    (rv.GAT, {}, {"att_src": (1, 2, 4), "att_dst": (1, 2, 4), "bias": (ALL,), "lin.weight": (ALL, IN)}),
    (
        rv.GAT,
        {"in_channels": (IN, 6), "concat": False, "edge_dim": EDGE, "residual": True, "bias": False},
        {
            "att_src": (1, 2, 4),
            "att_dst": (1, 2, 4),
            "att_edge": (1, 2, 4),
            "lin_src.weight": (ALL, IN),
            "lin_dst.weight": (ALL, 6),
            "lin_edge.weight": (ALL, EDGE),
            "res.weight": (OUT, 6),
        },
    ),
    (
        rv.GATv2,
        {"in_channels": (IN, 6)},
        {
            "att": (1, 2, 4),
            "bias": (ALL,),
            "lin_l.weight": (ALL, IN),
            "lin_l.bias": (ALL,),
            "lin_r.weight": (ALL, 6),
            "lin_r.bias": (ALL,),
        },
    ),
    (
        rv.GATv2,
        {"bias": False, "edge_dim": EDGE, "residual": True},
        {
            "att": (1, 2, 4),
            "lin_l.weight": (ALL, IN),
            "lin_r.weight": (ALL, IN),
            "lin_edge.weight": (ALL, EDGE),
            "res.weight": (ALL, IN),
        },
    ),
    (
        rv.GraphTransformer,
        {"beta": True, "concat": False, "edge_dim": EDGE, "bias": False},
        {
            "lin_key.weight": (ALL, IN),
            "lin_query.weight": (ALL, IN),
            "lin_value.weight": (ALL, IN),
            "lin_edge.weight": (ALL, EDGE),
            "lin_skip.weight": (OUT, IN),
            "lin_beta.weight": (1, 3 * OUT),
        },
    ),
    (
        rv.GraphTransformer,
        {"in_channels": (IN, 6), "root_weight": False},
        {
            "lin_key.weight": (ALL, IN),
            "lin_key.bias": (ALL,),
            "lin_query.weight": (ALL, 6),
            "lin_query.bias": (ALL,),
            "lin_value.weight": (ALL, IN),
            "lin_value.bias": (ALL,),
            "lin_skip.weight": (ALL, 6),
            "lin_skip.bias": (ALL,),
        },
    ),
]
every = pytest.mark.parametrize(("kind", "settings", "shapes"), SHAPES, ids=[f"{k.__name__} {s}" for k, s, _ in SHAPES])


def make(kind, **settings):
    return kind(settings.pop("in_channels", IN), OUT, HEADS, **settings, seed=0)


def draw(shapes, dtype=np.float32):
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def shared(dtype=np.float32):
    """The state of a GATv2Conv that shares its weights: it has them twice."""
    names = {"att": (1, 2, 4), "bias": (ALL,), "lin_l.weight": (ALL, IN), "lin_l.bias": (ALL,)}
    state = draw(names, dtype)
    return state | {name.replace("_l", "_r"): state[name].copy() for name in ("lin_l.weight", "lin_l.bias")}


@every
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_round_trip_is_exact(kind, settings, shapes, dtype):
    layer, state = make(kind, **settings), draw(shapes, dtype)
    assert load_pyg_state(layer, state) is None
    back = to_pyg_state(layer)
    assert back.keys() == state.keys() and layer.parameters.dtype == dtype
    for name, x in state.items():
        assert back[name].dtype == dtype and back[name].tobytes() == x.tobytes()
        assert back[name].flags.c_contiguous and back[name].flags.writeable


def test_weights_that_are_shared_are_in_the_state_twice():
    layer, state = make(rv.GATv2, share_weights=True), shared()
    load_pyg_state(layer, state)
    assert not any(name.startswith("lin_r") for name in layer.parameters)
    back = to_pyg_state(layer)
    assert back.keys() == state.keys()
    assert all(back[name].tobytes() == x.tobytes() for name, x in state.items())
    assert not np.shares_memory(back["lin_l.weight"], back["lin_r.weight"])
    load_pyg_state(layer, {name: 2 * x for name, x in state.items() if not name.startswith("lin_r")})
    np.testing.assert_array_equal(to_pyg_state(layer)["lin_r.weight"], 2 * state["lin_r.weight"])


def test_the_layer_shares_no_memory_with_the_state():
    layer, state = make(rv.GAT), draw(SHAPES[0][2])
    load_pyg_state(layer, state)
    before = to_pyg_state(layer)
    for x in (*state.values(), *to_pyg_state(layer).values()):
        x += 1
    for name, x in to_pyg_state(layer).items():
        np.testing.assert_array_equal(x, before[name])


def test_tensors_and_lists_are_read():
    class Tensor:
        """A tensor of another library: on some device, requiring a gradient."""

        def __init__(self, x):
            self.x, self.is_ready = x, 0

        def detach(self):
            self.is_ready += 1
            return self

        def cpu(self):
            self.is_ready += 1
            return self

        def __array__(self, dtype=None, copy=None):
            if self.is_ready < 2:
                raise RuntimeError("detach it and bring it to the CPU first")
            return self.x

    layer, state = make(rv.GAT), draw(SHAPES[0][2])
    load_pyg_state(layer, {name: Tensor(x) for name, x in state.items()})
    np.testing.assert_array_equal(to_pyg_state(layer)["lin.weight"], state["lin.weight"])
    state = draw(SHAPES[0][2], np.float64)
    load_pyg_state(layer, {name: x.tolist() for name, x in state.items()} | {"bias": list(range(ALL))})
    np.testing.assert_array_equal(to_pyg_state(layer)["lin.weight"], state["lin.weight"])
    np.testing.assert_array_equal(to_pyg_state(layer)["bias"], np.arange(ALL))


def changed(number, drop=(), **changes):
    state = draw(SHAPES[number][2])
    for name in drop:
        del state[name]
    return state | {name.replace("__", "."): x for name, x in changes.items()}


def floats(*shape):
    return np.ones(shape, np.float32)


LIN_R = ["lin_r.weight", "lin_r.bias"]
MODEL = {f"conv{n}.{name}": x for n in (1, 2) for name, x in draw(SHAPES[0][2]).items()}
V2 = ["lin_l.bias", "lin_r.bias", "bias"]
BIASES = ["lin_key.bias", "lin_query.bias", "lin_value.bias", "lin_skip.bias"]
REFUSED = [
    # names
    (0, {}, changed(0, ["att_dst"]), InvalidInputError, "missing: att_dst", "counterpart: a GATConv"),
    (0, {}, changed(0, scale=floats(1)), InvalidInputError, "unknown: scale", "counterpart"),
    (0, {}, {}, InvalidInputError, "missing: att_src, att_dst, lin.weight, bias", None),
    (0, {}, changed(0) | {7: floats(1)}, InvalidInputError, "unknown: 7", None),
    (0, {}, changed(5), InvalidInputError, "unknown: lin_key.weight, .*, lin_skip.bias\n", "counterpart"),
    (0, {}, changed(1, ["att_src"]), InvalidInputError, "missing: att_src", "counterpart"),
    (0, {}, MODEL, InvalidInputError, "prefixes: conv1., conv2.", r"name.removeprefix\('conv1.'\)"),
    (0, {}, MODEL | {"conv1.bias": None, "conv0.att_src": None}, InvalidInputError, "prefixes: conv0", "'conv1.'"),
    (4, {}, {f"0.{n}": x for n, x in changed(4).items()}, InvalidInputError, "have a prefix", "'0.'"),
    # of a layer built in another way
    (0, {"edge_dim": 5}, changed(0), InvalidInputError, "missing: att_edge, lin_edge.weight", "state's edge_dim$"),
    (0, {"residual": True}, changed(0), InvalidInputError, "missing: res.weight", "state's residual$"),
    (0, {"bias": False}, changed(0), InvalidInputError, "unknown: bias", "state's bias$"),
    (0, {"in_channels": (3, 6)}, changed(0), InvalidInputError, "unknown: lin.weight", "state's in_channels$"),
    (2, {}, changed(2, V2), InvalidInputError, "missing: lin_l.bias, lin_r.bias, bias", "state's bias$"),
    (2, {}, changed(2, LIN_R), InvalidInputError, "missing: lin_r.weight", "state's share_weights$"),
    (4, {"beta": False}, changed(4), InvalidInputError, "unknown: lin_beta.weight", "state's beta$"),
    (4, {"bias": True}, changed(4), InvalidInputError, "missing: lin_key.bias", "state's bias$"),
    (5, {"edge_dim": 2}, changed(5, BIASES), InvalidInputError, "missing: lin_key.bias", "state's bias, edge_dim$"),
    # shapes
    (0, {}, changed(0, bias=floats(7)), DimensionMismatchError, r"bias.shape: \(7,\)", r"it is GAT\(in_channels=3"),
    (0, {}, changed(0, lin__weight=floats(3, 8)), DimensionMismatchError, r"expected \(8, 3\), got \(3, 8\)", None),
    (0, {}, changed(0, att_src=floats(2, 4)), DimensionMismatchError, r"expected \(1, 2, 4\)", None),
    # contents
    (0, {}, changed(0, bias=np.ones(8)), InvalidInputError, r"bias.dtype\s*: float64", "cast them"),
    (0, {}, changed(0, bias=np.arange(8)), InvalidInputError, "bias has dtype int64", "astype"),
    (0, {}, changed(0, bias=np.ones(8, np.float16)), InvalidInputError, "bias has dtype float16", r"\.float\(\)"),
    (0, {}, changed(0, bias=None), InvalidInputError, "bias is None", None),
    (0, {}, changed(0, bias=[[1.0], [1.0, 2.0]]), InvalidInputError, "bias cannot become an array", "rows of"),
    (0, {}, changed(0, bias=np.full(8, np.nan, np.float32)), TrainingError, "'bias' is not finite", None),
    # no state at all
    (0, {}, None, InvalidInputError, "arrays is a NoneType", r"conv.state_dict\(\)"),
    (0, {}, [floats(3)], InvalidInputError, "arrays is a list", None),
]


@pytest.mark.parametrize(("number", "changes", "state", "error", "words", "hint"), REFUSED)
def test_refused_and_unchanged(number, changes, state, error, words, hint):
    kind, settings, _ = SHAPES[number]
    layer = make(kind, **settings | changes)
    before = layer.parameters
    with pytest.raises(error, match=words) as caught:
        load_pyg_state(layer, state)
    assert type(caught.value) is error
    if hint is not None:
        assert caught.match(f"(?m)HINT: .*{hint}")
    assert layer.parameters is before


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"lin_r.weight": floats(ALL, IN)}, InvalidConfigError, "lin_r.weight differs from lin_l.weight"),
        ({"lin_r.bias": floats(ALL)}, InvalidConfigError, "lin_r.bias differs .*\n.*share_weights=False"),
        ({"lin_r.bias": floats(ALL + 1)}, DimensionMismatchError, r"lin_r.bias.shape: \(9,\)"),
        ({"lin_r.bias": np.ones(ALL)}, InvalidInputError, r"lin_r.bias.dtype\s*: float64"),
        ({"lin_r.bias": np.ones(ALL, int)}, InvalidInputError, "lin_r.bias has dtype int64"),
        ({"lin_r.scale": floats(1)}, InvalidInputError, "unknown: lin_r.scale"),
        (
            {"lin_l.bias": floats(ALL) * np.nan, "lin_r.bias": floats(ALL) * np.nan},
            TrainingError,
            "'lin_l.bias' is not finite",
        ),
    ],
)
def test_shared_weights_that_are_not_equal_are_refused(changes, error, words):
    layer = make(rv.GATv2, share_weights=True)
    before = layer.parameters
    with pytest.raises(error, match=words) as caught:
        load_pyg_state(layer, shared() | changes)
    assert type(caught.value) is error and layer.parameters is before


class Strange:
    """A tensor that refuses to be an array."""

    def __init__(self, error):
        self.error = error

    def detach(self):
        return self

    def cpu(self):
        raise self.error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("uninitialized"), "lin.weight has no numbers yet\n.*in_channels=-1"),
        (TypeError("BFloat16"), r"lin.weight cannot become an array: BFloat16\n.*\.float\(\)"),
    ],
)
def test_tensors_that_are_no_arrays_are_refused(error, words):
    with pytest.raises(InvalidInputError, match=words):
        load_pyg_state(make(rv.GAT), changed(0, lin__weight=Strange(error)))


def test_tensors_without_numbers_are_refused():
    class Meta:
        is_meta = True

        def detach(self):
            return self

        def cpu(self):
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    words = "lin.weight is on the device meta, where tensors have no numbers\nHINT: .*load_state_dict"
    with pytest.raises(InvalidInputError, match=words):
        load_pyg_state(make(rv.GAT), changed(0, lin__weight=Meta()))


KINDS = [("a", "z", "b"), ("b", "y", "b"), ("b", "x", "a")]


@pytest.mark.parametrize("order", [[2, 1, 0], [1, 0, 2]])
def test_edge_types_in_another_order_are_refused(order):
    """The rows of k_rel and v_rel are in that order, and nothing but the order of the names tells."""
    state = to_pyg_state(rv.HGT(IN, OUT, (["a", "b"], KINDS), HEADS, seed=1))
    kinds = [KINDS[i] for i in order]
    other = rv.HGT(IN, OUT, (["b", "a"], kinds), HEADS, seed=2)
    before = other.parameters
    with pytest.raises(InvalidConfigError, match="edge types in another order") as caught:
        load_pyg_state(other, state)
    assert caught.value.shapes == {"in the state": KINDS, "layer.edge_types": kinds}
    assert other.parameters is before
    load_pyg_state(rv.HGT(IN, OUT, (["b", "a"], KINDS), HEADS), state)
    expression = caught.value.hint[caught.value.hint.index("{") :]
    load_pyg_state(other, eval(expression, {"state": state, "layer": other}))
    np.testing.assert_array_equal(other.parameters["k_rel.weight"], state["k_rel.weight"])


def test_a_state_whose_names_were_sorted_is_taken_at_its_word():
    """As safetensors gives it back: it no longer says what the order was."""
    layer = rv.HGT(IN, OUT, (["a", "b"], KINDS[::-1]), HEADS, seed=1)
    state = to_pyg_state(layer)
    assert list(state) != sorted(state)
    twin = rv.HGT(IN, OUT, (["a", "b"], KINDS[::-1]), HEADS, seed=2)
    load_pyg_state(twin, dict(sorted(state.items())))
    assert twin.parameters == layer.parameters


def test_the_hint_for_a_whole_model_works():
    layer = make(rv.GAT)
    with pytest.raises(InvalidInputError) as caught:
        load_pyg_state(layer, MODEL)
    expression = caught.value.hint[caught.value.hint.index("{") :]
    load_pyg_state(layer, eval(expression, {"state": MODEL}))
    np.testing.assert_array_equal(layer.parameters["lin.weight"], MODEL["conv1.lin.weight"])


@pytest.mark.parametrize("function", [lambda x: load_pyg_state(x, changed(0)), to_pyg_state])
@pytest.mark.parametrize(
    "x", [None, {}, types.SimpleNamespace(state_dict=dict), rv.MultiHeadAttention(rv.AttentionConfig(8, 2))]
)
def test_what_is_no_layer_on_graphs_is_refused(function, x):
    with pytest.raises(InvalidInputError, match=f"layer is a {type(x).__name__}\n.*GATv2"):
        function(x)


def test_nothing_heavy_is_loaded():
    code = "import sys, ruvector_numba as rv; rv.interop.load_pyg_state; "
    code += "print(sorted({'torch', 'torch_geometric', 'scipy'} & {*sys.modules}))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
