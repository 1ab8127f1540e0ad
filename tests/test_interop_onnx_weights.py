"""Models of over 2 GB, whose limits are lowered here; data in other files, sparse data, and data of other types."""

import sys

import numpy as np
import pytest

import ruvector_numba as rv
from ruvector_numba import InvalidConfigError, InvalidInputError

onnx = pytest.importorskip("onnx")
from onnx import helper, numpy_helper  # noqa: E402

from ruvector_numba.interop.onnx import Backend  # noqa: E402


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def runtime():
    pytest.importorskip("onnxruntime")
    import onnx_models

    return onnx_models, sys.modules["ruvector_numba.interop.onnx_model"]


BODY = """{ x = MatMul (z, w)  h = Reshape (x, sizes)  t = Transpose <perm = [0, 2, 1]> (h)  s = MatMul (h, t)
    p = Softmax <axis = 2> (s)  y = MatMul (p, h) }"""
FEEDS = {"z": draw(2, 5, 48)}


def projected(models, body=BODY):
    """With a weight that is large, and sizes without which the axis of the softmax is not known."""
    model = models.model_of(body, "float[B,L,48] z", "float[B,L,40] y")
    weights = {"w": draw(48, 40) / 7, "sizes": np.array([0, -1, 40])}
    model.graph.initializer.extend(numpy_helper.from_array(x, name) for name, x in weights.items())
    return model


# Large models


@pytest.fixture
def limits(monkeypatch):
    """What onnx is given, and a limit of what protobuf can write."""
    models, module = runtime()
    sizes = []

    def limited(function):
        def call(model, *args, **kwargs):
            sizes.append(len(model.SerializeToString()))
            return function(model, *args, **kwargs)

        return call

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", limited(onnx.shape_inference.infer_shapes))
    monkeypatch.setattr(onnx.inliner, "inline_local_functions", limited(onnx.inliner.inline_local_functions))
    monkeypatch.setattr(module, "LARGEST", 1000)
    return models, sizes


@pytest.mark.parametrize("functions", [False, True])
def test_weights_beyond_what_protobuf_writes(limits, functions, tmp_path):
    models, sizes = limits
    model = projected(models)
    if functions:
        text = '<opset_import: ["": 17], domain: "own"> norm (a) => (b) { b = Identity (a) }'
        model.functions.append(onnx.parser.parse_function(text))
        model.opset_import.append(helper.make_opsetid("own", 1))
        model.graph.node[0].input[0] = "n"
        model.graph.node.insert(0, helper.make_node("norm", ["z"], ["n"], domain="own"))
    models.check(model, FEEDS)
    assert len(sizes) == 1 + functions and max(sizes) < 1000 < 48 * 40
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="data")
    ours = models.replace_attention(path)
    np.testing.assert_allclose(ours.run(FEEDS)["y"], models.alone(onnx.load(path), FEEDS)["y"], atol=2e-6)


# Other files


def outside(model, folder):
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="data", size_threshold=0)
    return onnx.load(folder / "model.onnx", load_external_data=False)


@pytest.mark.parametrize("form", ["model", "bytes"])
def test_data_that_are_not_loaded(form, tmp_path):
    models, _ = runtime()
    model = outside(projected(models), tmp_path)
    with pytest.raises(InvalidInputError, match=r"data of w are not loaded\n.*load_external_data_for_model"):
        models.replace_attention(model if form == "model" else model.SerializeToString())
    onnx.load_external_data_for_model(model, str(tmp_path))
    models.check(model, FEEDS)


def test_a_backend_and_data_that_are_not_loaded(tmp_path):
    x = helper.make_tensor_value_info("Q", 1, [2, 3, 5, 4])
    node = helper.make_node("Attention", ["Q", "K", "Q"], ["Y"])
    key = numpy_helper.from_array(draw(2, 3, 5, 4), "K")
    graph = helper.make_graph([node], "g", [x], [helper.make_tensor_value_info("Y", 1, list("BHLD"))], [key])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    assert Backend.run_model(model, [draw(2, 3, 5, 4)])[0].shape == (2, 3, 5, 4)
    with pytest.raises(InvalidInputError, match="data of K are not loaded"):
        Backend.prepare(outside(model, tmp_path))


# Other types


@pytest.mark.parametrize("flat", [True, False])
def test_a_sparse_mask(flat):
    models, _ = runtime()
    body = "{ t = Transpose (k)  a = MatMul (q, t)  s = Add (a, m)  p = Softmax (s)  y = MatMul (p, v) }"
    model = models.model_of(body, "float[5,4] q, float[7,4] k, float[7,6] v", "float[5,6] y")
    at = np.array([1, 9, 34]) if flat else np.array([[0, 1], [1, 2], [4, 6]])
    values = numpy_helper.from_array(np.float32([1, -2, 3]), "m")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, numpy_helper.from_array(at), [5, 7]))
    feeds = {"q": draw(5, 4), "k": draw(7, 4), "v": draw(7, 6)}
    dense = np.zeros((5, 7), np.float32)
    dense[[0, 1, 4], [1, 2, 6]] = 1, -2, 3
    got = models.replace_attention(model).run(feeds)["y"]
    wanted = rv.scaled_dot_product_attention(*feeds.values(), dense, scale=1.0)
    np.testing.assert_allclose(got, wanted, atol=2e-6)
    np.testing.assert_allclose(got, models.alone(model, feeds)["y"], atol=2e-6)


@pytest.mark.parametrize("made", ["input", "initializer", "Cast"])
def test_a_mask_of_whole_numbers_is_left(made):
    models, _ = runtime()
    first = "a = Attention (q, k, v)  "
    body = first + (
        "n = Cast <to = 7> (m)  y = Attention (a, k, v, n)" if made == "Cast" else "y = Attention (a, k, v, m)"
    )
    kind = "bool" if made == "Cast" else "int64"
    more = "" if made == "initializer" else f", {kind}[L,M] m"
    inputs = "float[B,H,L,D] q, float[B,H,M,D] k, float[B,H,M,D] v" + more
    model = models.model_of("{" + body + "}", inputs, "float[B,H,L,D] y", opset=23)
    model.ir_version = 10
    mask = np.arange(35).reshape(5, 7) % 2
    feeds = {name: draw(2, 3, n, 4, seed=n) for name, n in zip("qkv", (5, 7, 7))}
    if made == "initializer":
        model.graph.initializer.append(numpy_helper.from_array(mask, "m"))
    else:
        feeds["m"] = mask.astype(kind)
    ours = models.check(model, feeds)
    assert ours.attentions == ("a",) and "its attn_mask is of INT64" in ours.left["y"]


def test_products_of_whole_numbers_are_left():
    models, _ = runtime()
    body = "{ t = Transpose (k)  a = MatMul (q, t)  s = Cast <to = 1> (a)  p = Softmax (s)  y = MatMul (p, v) }"
    model = models.model_of(body, "int32[5,4] q, int32[7,4] k, float[7,6] v", "float[5,6] y")
    with pytest.raises(InvalidInputError, match="p: q is of INT32"):
        models.replace_attention(model)


# Numbers with axes

SHORT = "t = Transpose <perm = [0, 2, 1]> (k)  a = MatMul (q, t)  c = Constant <value = float[1,1,1,1] {0.5}> () "
RANKS = {
    "Mul": "s = Mul (a, c)  p = Softmax (s)  y = MatMul (p, v)",
    "Div": "s = Div (a, c)  p = Softmax <axis = 3> (s)  y = MatMul (p, v)",
    "softcap": "b = Div (a, c)  d = Tanh (b)  s = Mul (d, c)  p = Softmax (s)  y = MatMul (p, v)",
    "Where": "s = Where (w, a, c)  p = Softmax (s)  y = MatMul (p, v)",
    "turned": "s = Mul (a, c)  p = Softmax (s)  z = MatMul (p, v)  y = Transpose <perm = [2, 0, 3, 1]> (z)",
}


@pytest.mark.parametrize("name", RANKS)
def test_numbers_of_more_axes_than_the_scores(name):
    models, _ = runtime()
    inputs = "float[H,L,D] q, float[H,M,D] k, float[H,M,E] v, bool[M] w"
    model = models.model_of("{" + SHORT + RANKS[name] + "}", inputs, "float[a,b,c,d] y")
    feeds = {"q": draw(3, 5, 4), "k": draw(3, 7, 4), "v": draw(3, 7, 6), "w": np.arange(7) % 3 > 0}
    models.check(model, feeds)


def test_a_zero_of_more_axes_than_the_weights():
    models, _ = runtime()
    body = """z = Constant <value = float[1,1,1,1] {0}> ()  p = Softmax (a)  n = IsNaN (p)  g = Where (n, z, p)
        y = MatMul (g, v)"""
    model = models.model_of(
        "{" + SHORT + body + "}", "float[H,L,D] q, float[H,M,D] k, float[H,M,E] v", "float[a,b,c,d] y"
    )
    with pytest.raises(InvalidInputError, match="p is made by Softmax and taken by IsNaN, Where"):
        models.replace_attention(model)


# Calls


@pytest.mark.parametrize("number", [10**400, -(10**400), 10**5000], ids=["large", "negative", "larger"])
def test_a_softcap_beyond_all_floats(number):
    x = draw(1, 1, 3, 4)
    with pytest.raises(InvalidConfigError, match=r"softcap is -?inf"):
        rv.interop.onnx.attention(x, x, x, softcap=number)


@pytest.mark.parametrize("version", [None, "25", 25.0])
def test_a_version_that_is_no_number(version):
    with pytest.raises(InvalidConfigError, match="opset_version is"):
        Backend.run_node(
            helper.make_node("Attention", list("QKV"), ["Y"]), [draw(1, 1, 3, 4)] * 3, opset_version=version
        )
