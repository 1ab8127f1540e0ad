"""States of torch.nn.MultiheadAttention: arrays written by hand, and those of torch itself where it is installed."""

import subprocess
import sys
import types

import numpy as np
import pytest

import ruvector_numba as rv
from ruvector_numba import DimensionMismatchError, InvalidConfigError, InvalidInputError
from ruvector_numba.interop import load_torch_state, to_torch_state

D_MODEL, KDIM, VDIM = 6, 3, 4


def make(use_bias=True, kdim=None, vdim=None):
    config = rv.AttentionConfig(d_model=D_MODEL, num_heads=2, use_bias=use_bias)
    return rv.MultiHeadAttention(config, seed=0, kdim=kdim, vdim=vdim)


def state_of(use_bias=True, kdim=None, vdim=None, dtype=np.float32):
    """What torch's state_dict() has, in its order."""
    rng = np.random.default_rng(1)

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    if kdim is None and vdim is None:
        state = {"in_proj_weight": draw(3 * D_MODEL, D_MODEL)}
    else:
        state = {"q_proj_weight": draw(D_MODEL, D_MODEL), "k_proj_weight": draw(D_MODEL, kdim or D_MODEL)}
        state["v_proj_weight"] = draw(D_MODEL, vdim or D_MODEL)
    state |= {"in_proj_bias": draw(3 * D_MODEL)} if use_bias else {}
    state["out_proj.weight"] = draw(D_MODEL, D_MODEL)
    return state | ({"out_proj.bias": draw(D_MODEL)} if use_bias else {})


KINDS = pytest.mark.parametrize(
    "kind",
    [{}, {"use_bias": False}, {"kdim": KDIM}, {"vdim": VDIM}, {"kdim": KDIM, "vdim": VDIM, "use_bias": False}],
    ids=str,
)


@KINDS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_round_trip_is_exact(kind, dtype):
    state = state_of(**kind, dtype=dtype)
    mha = make(**kind)
    assert load_torch_state(mha, state) is None
    back = to_torch_state(mha)
    assert list(back) == list(state)
    for name, x in state.items():
        assert back[name].dtype == dtype and back[name].tobytes() == x.tobytes()
        assert back[name].flags.c_contiguous and back[name].flags.writeable
        assert back[name].base is None or not np.shares_memory(back[name], x)


def test_what_goes_where():
    """torch stacks query, key, value and stores (out, in); a layer uses x @ w + b."""
    mha, state = make(), state_of()
    load_torch_state(mha, state)
    p, d = mha.parameters, D_MODEL
    for n, name in enumerate("qkv"):
        np.testing.assert_array_equal(p[f"w_{name}"], state["in_proj_weight"][n * d : n * d + d].T)
        np.testing.assert_array_equal(p[f"b_{name}"], state["in_proj_bias"][n * d : n * d + d])
    np.testing.assert_array_equal(p["w_o"], state["out_proj.weight"].T)
    np.testing.assert_array_equal(p["b_o"], state["out_proj.bias"])
    mha, state = make(kdim=KDIM, vdim=VDIM), state_of(kdim=KDIM, vdim=VDIM)
    load_torch_state(mha, state)
    for name in "qkv":
        np.testing.assert_array_equal(mha.parameters[f"w_{name}"], state[f"{name}_proj_weight"].T)


def test_sizes_given_that_are_d_model_are_stacked_as_in_torch():
    mha = make(kdim=D_MODEL, vdim=D_MODEL)
    load_torch_state(mha, state_of())
    assert "in_proj_weight" in to_torch_state(mha)


def test_the_layer_shares_no_memory_with_the_state():
    mha, state = make(), state_of()
    load_torch_state(mha, state)
    before = to_torch_state(mha)
    for x in state.values():
        x += 1
    for x in to_torch_state(mha).values():
        x += 1
    for name, x in to_torch_state(mha).items():
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

    mha, state = make(), state_of()
    load_torch_state(mha, {name: Tensor(x) for name, x in state.items()})
    np.testing.assert_array_equal(to_torch_state(mha)["in_proj_weight"], state["in_proj_weight"])
    state = state_of(dtype=np.float64)
    load_torch_state(mha, {name: x.tolist() for name, x in state.items()} | {"out_proj.bias": [1, 2, 3, 4, 5, 6]})
    back = to_torch_state(mha)
    np.testing.assert_array_equal(back["in_proj_weight"], state["in_proj_weight"])
    np.testing.assert_array_equal(back["out_proj.bias"], [1, 2, 3, 4, 5, 6])


def changed(kind=None, drop=(), **changes):
    state = state_of(**(kind or {}))
    for name in drop:
        del state[name]
    return state | {name.replace("__", "."): x for name, x in changes.items()}


def halved(x):
    return x.astype(np.float16)


SPLIT = {"kdim": KDIM, "vdim": VDIM}
PREFIXED = {f"encoder.self_attn.{name}": x for name, x in state_of().items()}
BIASES = ["in_proj_bias", "out_proj.bias"]
REFUSED = [
    # names
    ({}, changed(drop=["in_proj_weight"]), InvalidInputError, "in_proj_weight missing", None),
    ({}, changed(drop=["out_proj.weight"]), InvalidInputError, "out_proj.weight missing", None),
    ({}, changed(drop=["in_proj_bias"]), InvalidInputError, "in_proj_bias missing", None),
    ({}, changed(drop=["out_proj.bias"]), InvalidInputError, "out_proj.bias missing", None),
    (SPLIT, changed(SPLIT, ["v_proj_weight"]), InvalidInputError, "v_proj_weight missing", None),
    ({}, changed(scale=np.ones(1)), InvalidInputError, "more names than the layer has", None),
    ({}, {}, InvalidConfigError, "the state has no biases", "use_bias=False"),
    ({"use_bias": False}, {}, InvalidInputError, "in_proj_weight, out_proj.weight missing", None),
    ({"use_bias": False}, {7: np.ones(3)}, InvalidInputError, "in the state: 7", None),
    ({}, PREFIXED, InvalidInputError, "have a prefix", r"name.removeprefix\('encoder.self_attn.'\)"),
    # of another kind of layer
    ({"use_bias": False}, changed(), InvalidConfigError, "has biases, the layer has none", "use_bias=True"),
    ({}, changed(drop=BIASES), InvalidConfigError, "has no biases, the layer has", "use_bias=False"),
    ({}, changed(bias_k=np.ones((1, 1, 6))), InvalidConfigError, "add_bias_kv=True", "append"),
    ({}, changed(bias_v=np.ones((1, 1, 6))), InvalidConfigError, "add_bias_kv=True", "append"),
    (SPLIT, changed(), InvalidConfigError, "kdim and vdim are d_model, the layer's are not", "without kdim and vdim"),
    ({}, changed(SPLIT), InvalidConfigError, r"k_proj_weight.shape: \(6, 3\)", "kdim=..., vdim=..."),
    # shapes
    ({}, changed(in_proj_weight=np.ones((15, 5), np.float32)), DimensionMismatchError, r"expected\s*: \(18, 6\)", "6"),
    ({}, changed(in_proj_bias=np.ones((18, 1), np.float32)), DimensionMismatchError, r"expected \(18,\)", None),
    ({}, changed(out_proj__weight=np.ones(36, np.float32)), DimensionMismatchError, "out_proj.weight.shape", None),
    ({}, changed(out_proj__bias=np.ones(5, np.float32)), DimensionMismatchError, r"got \(5,\)", None),
    (SPLIT, changed({"kdim": VDIM, "vdim": KDIM}), DimensionMismatchError, r"k_proj_weight.shape: \(6, 4\)", "kdim=3"),
    (SPLIT, changed(SPLIT, q_proj_weight=np.ones((3, 6))), DimensionMismatchError, "q_proj_weight", None),
    # contents
    ({}, changed(out_proj__bias=np.ones(6)), InvalidInputError, r"out_proj.bias.dtype\s*: float64", "cast them"),
    ({}, {n: halved(x) for n, x in state_of().items()}, InvalidInputError, "dtype float16", r"\.float\(\) of a tensor"),
    ({}, changed(out_proj__bias=np.arange(6)), InvalidInputError, "dtype int64, not float32", "astype"),
    ({}, changed(out_proj__bias=np.ones(6, ">f4")), InvalidInputError, "dtype >f4", "cast it"),
    ({}, changed(out_proj__bias=None), InvalidInputError, "out_proj.bias is None", None),
    ({}, changed(out_proj__bias=[[1.0], [1.0, 2.0]]), InvalidInputError, "out_proj.bias cannot become", None),
    # no state at all
    ({}, None, InvalidInputError, "state is a NoneType", r"layer.state_dict\(\)"),
    ({}, [np.ones(3)], InvalidInputError, "state is a list", None),
]


@pytest.mark.parametrize(("kind", "state", "error", "words", "hint"), REFUSED, ids=[r[3][:40] for r in REFUSED])
def test_refused_and_unchanged(kind, state, error, words, hint):
    mha = make(**kind)
    load_torch_state(mha, state_of(**kind))
    before = mha.parameters
    with pytest.raises(error, match=words) as caught:
        load_torch_state(mha, state)
    assert type(caught.value) is error
    if hint is not None:
        assert caught.match(f"HINT: .*{hint}")
    assert mha.parameters is before


def test_a_tensor_that_numpy_lacks_is_refused():
    class BFloat16:
        def detach(self):
            return self

        def cpu(self):
            return self

        def __array__(self, dtype=None, copy=None):
            raise TypeError("Got unsupported ScalarType BFloat16")

    with pytest.raises(InvalidInputError, match=r"out_proj.bias cannot become .* BFloat16\n.*\.float\(\)"):
        load_torch_state(make(), state_of() | {"out_proj.bias": BFloat16()})


def test_numbers_that_are_not_finite_are_refused():
    mha, state = make(), state_of()
    state["in_proj_weight"][0, 0] = np.nan
    before = mha.parameters
    with pytest.raises(RuntimeError, match="not finite"):
        load_torch_state(mha, state)
    assert mha.parameters is before


@pytest.mark.parametrize("function", [lambda x: load_torch_state(x, state_of()), to_torch_state])
@pytest.mark.parametrize("x", [None, state_of(), types.SimpleNamespace(state_dict=dict)])
def test_what_is_no_layer_is_refused(function, x):
    with pytest.raises(InvalidInputError, match=f"mha is a {type(x).__name__}\n.*MultiHeadAttention"):
        function(x)


def test_nothing_heavy_is_loaded():
    """Neither by the package nor by the exchange of states; and what is not there is said so."""
    code = (
        "import sys, ruvector_numba.interop as i; i.to_torch_state; print(sorted({'torch', 'onnx'} & {*sys.modules}))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
    import ruvector_numba.interop

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        ruvector_numba.interop.nothing  # noqa: B018


def test_without_torch_it_says_what_to_install(monkeypatch):
    import ruvector_numba.interop as interop

    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "ruvector_numba.interop.torch", raising=False)
    monkeypatch.delitem(vars(interop), "torch", raising=False)
    with pytest.raises(AttributeError, match="needs PyTorch: pip install torch"):
        interop.torch  # noqa: B018
    for statement in ("from ruvector_numba.interop import torch", "import ruvector_numba.interop.torch"):
        with pytest.raises(ModuleNotFoundError, match="needs PyTorch: pip install torch"):
            exec(statement, {})
    assert not hasattr(interop, "torch") and dir(interop) == sorted([*interop.__all__, "onnx", "torch"])


@pytest.mark.parametrize("name", ["interop", "interop.onnx"])
def test_help_is_given_without_the_other_libraries(name):
    """In a process of its own: nothing has loaded them."""
    code = f"""
import sys, inspect
sys.modules |= dict.fromkeys(["torch", "onnx", "onnxruntime"])
import ruvector_numba as rv
print([name for name, _ in inspect.getmembers(rv.{name})])
help(rv.{name})"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    members, _, helped = done.stdout.partition("\n")
    assert ("load_torch_state" if name == "interop" else "attention") in members
    assert f"Help on {'package' if name == 'interop' else 'module'} ruvector_numba.{name}" in helped


# With torch's own layer, where there is torch


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


TORCH_KINDS = [
    {},
    {"bias": False},
    {"kdim": 6},
    {"vdim": 10},
    {"kdim": 4, "vdim": 6, "bias": False},
    {"kdim": 8, "vdim": 8},
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", TORCH_KINDS, ids=str)
def test_a_layer_of_torch_and_one_with_its_state_do_the_same(kind, dtype, torch):
    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True, **kind).to(dtype)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    config = rv.AttentionConfig(d_model=8, num_heads=2, use_bias=kind.get("bias", True), dropout=0.0, eps=1e-30)
    mine = rv.MultiHeadAttention(config, kdim=kind.get("kdim"), vdim=kind.get("vdim"))
    state = theirs.state_dict()
    load_torch_state(mine, state)
    query, key, value = (torch.randn(3, L, n, dtype=dtype) for L, n in ((5, 8), (7, mine.kdim), (7, mine.vdim)))
    wanted, weights = theirs(query, key, value)
    got = mine.forward(query.numpy(), key.numpy(), value.numpy())
    for x, w in zip(got, (wanted, weights), strict=True):
        assert x.dtype == w.detach().numpy().dtype
        np.testing.assert_allclose(x, w.detach().numpy(), rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-5)
    back = {name: torch.from_numpy(x) for name, x in to_torch_state(mine).items()}
    assert list(back) == list(state)
    assert all(torch.equal(back[name], x) and back[name].dtype == dtype for name, x in state.items())
    theirs.load_state_dict(back, strict=True)


def test_parameters_that_require_gradients_are_read(torch):
    theirs = torch.nn.MultiheadAttention(8, 2)
    mine = rv.MultiHeadAttention(rv.AttentionConfig(d_model=8, num_heads=2))
    load_torch_state(mine, dict(theirs.named_parameters()))
    np.testing.assert_array_equal(to_torch_state(mine)["in_proj_weight"], theirs.in_proj_weight.detach().numpy())


@pytest.mark.parametrize(
    ("layer", "error", "words"),
    [
        (lambda torch: torch.nn.MultiheadAttention(8, 2, add_bias_kv=True), InvalidConfigError, "add_bias_kv"),
        (lambda torch: torch.nn.MultiheadAttention(8, 2, bias=False), InvalidConfigError, "no biases"),
        (lambda torch: torch.nn.MultiheadAttention(8, 2, vdim=4), InvalidConfigError, r"v_proj_weight.shape: \(8, 4\)"),
        (lambda torch: torch.nn.MultiheadAttention(12, 2), DimensionMismatchError, r"\(24, 8\), got \(36, 12\)"),
        (
            lambda torch: torch.nn.MultiheadAttention(8, 2).bfloat16(),
            InvalidInputError,
            r"cannot become an array: .*BFloat16",
        ),
        (lambda torch: torch.nn.MultiheadAttention(8, 2).half(), InvalidInputError, "dtype float16"),
        (
            lambda torch: torch.nn.MultiheadAttention(8, 2, device="meta"),
            InvalidInputError,
            "in_proj_weight is on the device meta",
        ),
        (lambda torch: torch.nn.TransformerEncoderLayer(8, 2), InvalidInputError, r"removeprefix\('self_attn.'\)"),
    ],
    ids=["bias_k", "no bias", "vdim", "embed_dim", "bfloat16", "half", "meta", "model"],
)
def test_states_that_do_not_fit(layer, error, words, torch):
    mine = rv.MultiHeadAttention(rv.AttentionConfig(d_model=8, num_heads=2))
    before = mine.parameters
    with pytest.raises(error, match=words):
        load_torch_state(mine, layer(torch).state_dict())
    with pytest.raises(InvalidInputError, match="state is a"):
        load_torch_state(mine, layer(torch))
    with pytest.raises(InvalidInputError, match="mha is a"):
        load_torch_state(layer(torch), layer(torch).state_dict())
    assert mine.parameters is before


def test_the_hint_for_a_whole_model_works(torch):
    model = torch.nn.TransformerEncoderLayer(8, 2)
    mine = rv.MultiHeadAttention(rv.AttentionConfig(d_model=8, num_heads=2))
    with pytest.raises(InvalidInputError) as caught:
        load_torch_state(mine, model.state_dict())
    expression = caught.value.hint[caught.value.hint.index("{") :]
    load_torch_state(mine, eval(expression, {"state": model.state_dict()}))
