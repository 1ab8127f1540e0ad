"""Arguments that NumPy or Python would take for something else: masked arrays, truthy options; and arrays too large."""

import numpy as np
import pytest

import ruvector_numba as rv
from ruvector_numba import InvalidInputError, InvalidMaskError, functional, masks, optim

X = np.ones((1, 3, 4))
CONFIG = rv.AttentionConfig(4, 2, dropout=0.0)
LAYERS = [rv.MultiHeadAttention(CONFIG, 0), rv.ScaledDotProductAttention(CONFIG)]


def masked(x, dtype=None):
    return np.ma.masked_array(np.asarray(x, dtype), np.zeros(np.shape(x), bool))


# --- arrays of numpy.ma -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_masked_inputs(name, dtype):
    given = dict.fromkeys(("query", "key", "value"), X.astype(dtype))
    given[name] = masked(given[name])
    for call in (rv.scaled_dot_product_attention, rv.attention_forward, *(layer.forward for layer in LAYERS)):
        words = (
            rf"{name} is a numpy.ma array, whose own mask would be lost\nHINT: pass {name}.filled\(0\) and hide keys"
        )
        with pytest.raises(InvalidInputError, match=words):
            call(**given)


def test_masked_slopes_gradients_and_parts():
    cache = rv.attention_forward(X, X, X)
    _, of_layer = LAYERS[0].forward_cached(X)
    for call in (
        lambda: rv.scaled_dot_product_attention(X, X, X, alibi_slopes=masked(np.ones(1))),
        lambda: rv.attention_backward(masked(X), cache),
        lambda: rv.attention_backward(X, cache, masked(np.ones((1, 3)))),
        lambda: LAYERS[0].backward(masked(X), of_layer),
        lambda: LAYERS[0].step(masked(X), LAYERS[0].new_cache(1, 9, np.float64)),
        lambda: rv.merge([masked(cache.output)], [cache.lse]),
        lambda: functional.attention_scores(X, masked(X)),
        lambda: functional.apply_mask(masked(X)),
        lambda: functional.softmax(masked(X)),
        lambda: functional.softmax_backward(masked(X), X),
        lambda: functional.weighted_sum(X[..., :3], masked(X)),
    ):
        with pytest.raises(InvalidInputError, match=r"is a numpy.ma array, whose own mask would be lost\nHINT: pass"):
            call()
    for call in (
        lambda: optim.SGD().step({"w": X}, {"w": masked(X)}),
        lambda: optim.clip_by_norm({"w": masked(X)}, 1.0),
    ):
        with pytest.raises(rv.TrainingError, match=r"'w' is a numpy.ma array(.|\n)*x.filled\(0\)"):
            call()


def test_masked_masks():
    hides = masked(np.zeros((3, 3), bool))
    for layer in LAYERS:
        with pytest.raises(InvalidInputError, match=r"mask is a numpy.ma array(.|\n)*mask.filled\(True\)"):
            layer.forward(X, mask=hides)
    with pytest.raises(InvalidInputError, match=r"key_padding_mask is a numpy.ma array"):
        LAYERS[0](X, key_padding_mask=hides[:1])
    for make in (masks.Segments, lambda ids: masks.Lengths(keys=ids)):
        with pytest.raises(InvalidMaskError, match="array, whose own mask would be lost"):
            make(masked([1, 2, 3]))


# --- options that are on or off -----------------------------------------------------------------------------------
BAD = ["False", "", None, 2, 1.0, np.ones(2), np.array(True), []]


@pytest.mark.parametrize("option", BAD, ids=repr)
def test_options_are_true_or_false(option):
    calls = {
        "is_causal": [
            lambda: rv.scaled_dot_product_attention(X, X, X, is_causal=option),
            lambda: functional.apply_mask(X, is_causal=option),
            lambda: functional.apply_mask_backward(X, is_causal=option),
        ],
        "enable_gqa": [lambda: rv.attention_forward(X, X, X, enable_gqa=option)],
        "training": [lambda layer=layer: layer.forward_cached(X, training=option) for layer in LAYERS],
    }
    for name, each in calls.items():
        for call in each:
            words = rf"{name} is .*, of type {type(option).__name__}\nHINT: give True or False"
            with pytest.raises(InvalidInputError, match=words):
                call()


@pytest.mark.parametrize("option", [True, np.True_, 1, np.int8(1)])
def test_options_of_numpy_and_numbers(option):
    causal = rv.scaled_dot_product_attention(X, X, np.arange(12.0).reshape(X.shape), is_causal=option)
    assert (causal[0, 0] == [0, 1, 2, 3]).all()
    LAYERS[0].forward_cached(X, training=option)


def test_merge_knows_one_dtype():
    with pytest.raises(InvalidInputError, match="dtype is 'nonsense'"):
        rv.merge([X], [np.ones((1, 3))], dtype="nonsense")
    with pytest.raises(InvalidInputError, match=r"outputs\[0\] has dtype float64, and dtype is 'bfloat16'"):
        rv.merge([X], [np.ones((1, 3))], dtype="bfloat16")


# --- arrays that are too large -------------------------------------------------------------------------------------
HUGE = 10**7


def huge(*shape, dtype=np.float32):
    return np.broadcast_to(np.zeros((), dtype), shape)


@pytest.mark.parametrize(
    "call",
    [
        lambda: functional.attention_scores(huge(HUGE, 2), huge(HUGE, 2)),
        lambda: functional.attention_scores_backward(huge(HUGE, HUGE), huge(HUGE, HUGE), huge(HUGE, HUGE)),
        lambda: functional.apply_mask(huge(HUGE, HUGE)),
        lambda: functional.softmax(huge(HUGE, HUGE)),
        lambda: functional.weighted_sum(huge(HUGE, 2), huge(2, HUGE)),
        lambda: functional.weighted_sum_backward(huge(2, HUGE), huge(2, HUGE), huge(HUGE, HUGE)),
        lambda: masks.Causal().to_dense(HUGE, HUGE),
        lambda: (masks.Causal() & masks.Full()).to_dense(HUGE, HUGE),
        lambda: masks.Lengths(keys=np.ones(HUGE, int)).to_dense(10**4, 10**4),
        lambda: masks.Segments(np.zeros((10, 10**6), int)).to_dense(10**6, 10**6),
        lambda: rv.scaled_dot_product_attention(huge(HUGE, 1, HUGE, 2), huge(HUGE, 1, 1, 2), huge(HUGE, 1, 1, 2)),
        lambda: rv.attention_forward(huge(HUGE, 2), huge(1, 2), huge(1, HUGE)),
        lambda: LAYERS[0](huge(10**10, 512, 4)),
        lambda: LAYERS[1](huge(10**10, 512, 4)),
    ],
)
def test_results_that_no_memory_holds_are_refused_before_any_work(call):
    with pytest.raises(rv.OutOfMemoryError, match="failed to allocate"):
        call()


def test_a_gradient_that_no_memory_holds_is_refused_before_any_work(monkeypatch):
    """Of a mask that is broadcast over batch and heads, beside queries that are few."""
    x = np.ones((4, 1, 8, 2), np.float32)
    cache = rv.attention_forward(x, x, x, huge(4, 1, 8, 8))
    monkeypatch.setattr("ruvector_numba.values.SMALL", 0)
    monkeypatch.setattr("ruvector_numba.values.os.sysconf", lambda name: 30)  # 900 bytes in all
    with pytest.raises(rv.OutOfMemoryError) as caught:
        rv.attention_backward(np.ones_like(x), cache)
    assert caught.value.size == 1024 and caught.value.shapes["gradient of bias shape"] == (4, 1, 8, 8)
    assert "it was broadcast" in caught.value.hint


# --- numbers that the kernels cannot hold -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("term", "words"),
    [
        ({"scale": 1e39}, "float32 ends at 3.4e\\+38: scale the queries"),
        ({"scale": 10**400}, "scale is beyond what float64 holds"),
        ({"softcap": 1e39}, "None is no cap"),
        ({"softcap": 1e-46}, "float32 goes from 1.2e-38 to 3.4e\\+38"),
        ({"dropout_p": 10**400}, "dropout_p is beyond"),
    ],
    ids=str,
)
def test_numbers_beyond_the_range_of_the_type(term, words):
    x = X.astype(np.float32)
    with pytest.raises(InvalidInputError, match=words):
        rv.attention_forward(x, x, x, **term)


# --- arrays of other libraries ------------------------------------------------------------------------------------
class Foreign:
    """What another library has: a dtype of its own, and a way to become an array. A list has none."""

    def __init__(self, x):
        self.x, self.dtype, self.shape = x, f"other.{x.dtype}", x.shape

    def __array__(self, dtype=None, copy=None):
        return self.x


WHOLE = Foreign(np.ones((3, 4), int))
KEPT = rv.attention_forward(X, X, X)
OF_WHOLE_NUMBERS = {
    "query": lambda: rv.scaled_dot_product_attention(WHOLE, X[0], X[0]),
    "layer": lambda: LAYERS[0](Foreign(X.astype(int))),
    "scores": lambda: functional.softmax(WHOLE),
    "gradient": lambda: rv.attention_backward(Foreign(X.astype(int)), KEPT),
    "other gradient": lambda: rv.attention_backward(Foreign(X.astype(np.float32)), KEPT),
    "outputs": lambda: rv.merge([Foreign(X.astype(int))], [KEPT.lse]),
    "nodes": lambda: rv.GAT(4, 2)(WHOLE, [[0], [1]]),
    "edge_attr": lambda: rv.GAT(4, 2, edge_dim=1)(X[0], [[0], [1]], Foreign(np.ones(1, int))),
    "edge_index": lambda: rv.GAT(4, 2)(X[0], Foreign(np.zeros((2, 0)))),
    "parameters": lambda: rv.ParameterSet({"w": WHOLE}),
    "step": lambda: optim.SGD().step({"w": X[0]}, {"w": WHOLE}),
    "state": lambda: rv.interop.load_pyg_state(
        rv.GAT(3, 4, bias=False),
        {"att_src": X[:, :1], "att_dst": X[:, :1], "lin.weight": Foreign(np.ones((4, 3), int))},
    ),
}


@pytest.mark.parametrize("what", OF_WHOLE_NUMBERS)
def test_an_array_of_another_library_keeps_its_dtype(what):
    with pytest.raises(rv.AttentionError, match=r"int64|float32, the call had float64|edge_index has dtype float64"):
        OF_WHOLE_NUMBERS[what]()


def test_what_other_libraries_have_in_the_right_dtype_is_read():
    half = Foreign(X.astype(np.float32))
    assert rv.scaled_dot_product_attention(half, half, half).dtype == np.float32
    assert rv.scaled_dot_product_attention([[1, 2]], [[1, 2]], [[1, 2]]).dtype == np.float64  # a list
    assert rv.GAT(4, 2)(X[0], Foreign(np.array([[0], [1]]))).shape == (3, 2)


def test_tensors_of_whole_numbers():
    torch = pytest.importorskip("torch")
    x = torch.ones(3, 4, dtype=torch.long)
    for call in (
        lambda: rv.scaled_dot_product_attention(x, x, x),
        lambda: rv.GAT(4, 2)(x, [[0], [1]]),
        lambda: rv.ParameterSet({"w": x}),
        lambda: optim.SGD().step({"w": X[0]}, {"w": x}),
    ):
        with pytest.raises(rv.AttentionError, match="has dtype int64"):
            call()
    assert rv.GAT(4, 2)(x.float(), torch.tensor([[0], [1]])).dtype == np.float32


NO_ARRAYS = [masks.Causal(), rv.attention_forward(X, X, X), {"a": 1}, rv.CSRGraph.from_edge_index([[0], [1]]), {1, 2}]


@pytest.mark.parametrize("wrong", NO_ARRAYS, ids=lambda x: type(x).__name__)
def test_what_is_no_array_is_told_by_its_type(wrong):
    kind, graph = type(wrong).__name__, rv.CSRGraph.from_edge_index([[0], [1]], 3)
    x, q = X[0], X.swapaxes(0, 1)
    for call, name in (
        (lambda: rv.scaled_dot_product_attention(wrong, x, x), "query"),
        (lambda: rv.attention_forward(x, wrong, x), "key"),
        (lambda: rv.neighbor_attention(q, q, wrong, graph), "value"),
        (lambda: functional.softmax(wrong), "scores"),
        (lambda: rv.GAT(4, 2)(wrong, graph), "x"),
        (lambda: rv.HGT(4, 2, (["n"], [("n", "to", "n")]))({"n": wrong}, {}), r"x_dict\['n'\]"),
    ):
        with pytest.raises(InvalidInputError, match=f"{name} is a {kind}\nHINT: "):
            call()


# --- arguments that stand where others belong -----------------------------------------------------------------------
SEEDS = [True, np.True_, -1, 1.0, "1", [1, 2], np.ones((2, 2), int), np.random.default_rng(0)]


@pytest.mark.parametrize("seed", SEEDS, ids=str)
def test_seeds_of_layers_are_whole_numbers(seed):
    for kind in (rv.MultiHeadAttention, rv.ScaledDotProductAttention):
        with pytest.raises(rv.InvalidConfigError, match=r"seed is [\s\S]*\nHINT: give a whole number"):
            kind(CONFIG, seed)
    rv.MultiHeadAttention(CONFIG, np.int64(3)), rv.MultiHeadAttention(CONFIG, 1 << 100)


HIDES = np.zeros((3, 3), bool)
MISTAKES = {  # a call of a layer: what its error says, and what its hint
    "bools second": (
        lambda layer: layer(X, HIDES),
        "key has dtype bool, not float16, bfloat16",
        "did you mean mask=...?",
    ),
    "a mask second": (lambda layer: layer(X, masks.Causal()), r"key is a mask, Causal\(", "did you mean mask=...?"),
    "bools beside half": (lambda layer: layer(X.astype(np.float16), HIDES), "key has dtype bool", "did you mean mask"),
    "bools first": (lambda layer: layer(X > 0), "query has dtype bool", "cast it"),
    "integers": (lambda layer: layer(X.astype(int)), "dtype int64, not float16, bfloat16, float32", "cast it"),
    "four axes": (lambda layer: layer(X[None]), "query has 4 axes", r"heads are joined, \(batch, length, heads \* D\)"),
    "two axes": (lambda layer: layer(X[0]), "query has 2 axes", r"for one sequence, x\[None\]"),
    "one bool": (lambda layer: layer(X, mask=True), "mask is True, a single bool", "causal=True in the configuration"),
}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name())
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_calls_of_layers(layer, mistake):
    call, words, hint = MISTAKES[mistake]
    with pytest.raises((InvalidInputError, InvalidMaskError), match=rf"{words}[\s\S]*\nHINT: .*{hint}"):
        call(layer)


@pytest.mark.parametrize(("layer", "hint"), [(LAYERS[0], "key_padding_mask="), (LAYERS[1], r"mask\[:, None\]")])
def test_rows_of_padding_as_a_mask(layer, hint):
    with pytest.raises(InvalidMaskError, match=f"HINT: .*one row of keys for each sequence is {hint}"):
        layer(np.ones((2, 3, 4)), mask=np.zeros((2, 3), bool))


@pytest.mark.parametrize("module", [rv, masks, optim, functional])
def test_completion_shows_public_names_only(module):
    names = dir(module)
    assert set(names) - {"__version__"} == set(module.__all__) and all(hasattr(module, name) for name in names)
    assert module is not rv or {"masks", "optim", "functional", "interop"} < set(names)
