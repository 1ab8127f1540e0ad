"""Models whose attention runs here, against ONNX Runtime alone."""

import doctest
import importlib
import io
import json
import pathlib
import sys

import numpy as np
import pytest

import ruvector_numba as rv
from ruvector_numba import InvalidInputError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import parser  # noqa: E402
from onnx_models import SHAPE, TURNED, B, alone, check, draw, model_of, qkv  # noqa: E402

from ruvector_numba.interop.onnx import replace_attention  # noqa: E402


def encoder_module():
    """perf/onnx_encoder.py, which builds the encoder; it is not installed."""
    folder = pathlib.Path(__file__).resolve().parent.parent / "perf"
    if not folder.is_dir():
        pytest.skip("there is no perf/ here")
    before = list(sys.path)
    sys.path.insert(0, str(folder))  # its scripts import each other by name, and some take the folder away again
    try:
        return importlib.import_module("onnx_encoder")
    finally:
        sys.path[:] = before


# The encoder


@pytest.mark.parametrize("operator", [False, True], ids=["written out", "the operator"])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_sentence_encoder(operator, layers):
    module = encoder_module()
    sizes = module.Sizes(layers, 48, 3, 96, 100, 64)
    model = module.encoder(sizes, operator)
    ours = check(model, module.sentences(4, 33, sizes), layers, 1e-5)
    assert ours.inputs == ("input_ids", "attention_mask") and ours.outputs == ("embedding",)
    for length in (1, 16):  # other sizes, on the same object
        feeds = module.sentences(2, length, sizes)
        np.testing.assert_allclose(ours.run(feeds)["embedding"], alone(model, feeds)["embedding"], atol=1e-5)


def test_the_measurement_works(tmp_path, monkeypatch, capsys):
    module = encoder_module()
    monkeypatch.setattr(sys, "argv", ["onnx_encoder.py", "--smoke", "--threads", "1", "--output", str(tmp_path)])
    threads = rv.get_num_threads()
    try:
        module.main()
    finally:
        rv.set_num_threads(threads)
    (path,) = tmp_path.glob("onnx-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["attentions"] for row in rows] == [2, 2] and all(row["difference"] < 1e-5 for row in rows)


def test_files_and_bytes(tmp_path):
    module = encoder_module()
    sizes = module.Sizes(1, 16, 2, 32, 50, 16)
    model, feeds = module.encoder(sizes), module.sentences(2, 7, sizes)
    onnx.save(model, tmp_path / "encoder.onnx")
    wanted = replace_attention(model).run(feeds)["embedding"]
    for given in (tmp_path / "encoder.onnx", str(tmp_path / "encoder.onnx"), model.SerializeToString()):
        assert np.array_equal(replace_attention(given).run(feeds)["embedding"], wanted)


# As torch writes them


@pytest.mark.filterwarnings("ignore")
def test_files_of_torch():
    torch = pytest.importorskip("torch")

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.Linear(24, 72)

        def forward(self, x, mask):
            parts = self.project(x).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in parts)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2) + x

    def exported(module, *inputs):
        file = io.BytesIO()
        names = ["x", "mask"][: len(inputs)]
        torch.onnx.export(
            module.eval(), inputs, file, opset_version=17, dynamo=False, input_names=names, output_names=["y"]
        )
        return onnx.load_from_string(file.getvalue()), {name: x.numpy() for name, x in zip(names, inputs)}

    x, layer = torch.randn(2, 9, 24), Layer()
    for mask in (torch.rand(2, 1, 9, 9) > 0.3, torch.randn(2, 3, 9, 9)):
        check(*exported(layer, x, mask))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        one = torch.nn.TransformerEncoderLayer(24, 3, 48, batch_first=True)
        check(
            *exported(torch.nn.TransformerEncoder(one, 2, enable_nested_tensor=False), x), attentions=2, tolerance=1e-5
        )
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_the_operator_on_three_axes_and_what_becomes_of_all_its_outputs():
    inputs = "float[B,L,C] q, float[B,M,C] k, float[B,M,E] v"
    outputs = "float[B,L,E] y, float[B,H,M,D] a, float[B,H,M,F] b, float[B,H,L,M] c"
    settings = "q_num_heads = 2, kv_num_heads = 2, softcap = 2.0, qk_matmul_output_mode = 1"
    body = (
        f"{{ y, nk, nv, qk = Attention <{settings}> (q, k, v) "
        """
        a = Neg (nk)  b = Neg (nv)  c = Neg (qk) }"""
    )
    model = model_of(body, inputs, outputs, 23)
    model.ir_version = 11
    check(model, {"q": draw(B, 3, 8), "k": draw(B, 5, 8, seed=1), "v": draw(B, 5, 6)})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opset", [11, 12, 17])
@pytest.mark.parametrize("how", ["matmul", "einsum", "softcap"])
def test_files_of_torch_with_sizes_that_are_not_known(opset, how):
    torch = pytest.importorskip("torch")
    if how == "einsum" and opset < 12:
        pytest.skip("it is not there")

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.Linear(16, 48)

        def forward(self, x, mask):
            q, k, v = self.project(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
            scores = torch.einsum("bhid,bhjd->bhij", q, k) if how == "einsum" else q @ k.transpose(-1, -2)
            scores = scores / q.size(-1) ** 0.5
            if how == "softcap":
                scores = 30 * torch.tanh(scores / 30)
            weights = scores.masked_fill(mask[:, None, None] == 0, -1e9).softmax(-1)
            if how == "einsum":
                return torch.einsum("bhij,bhjd->bihd", weights, v).flatten(2)
            return (weights @ v).transpose(1, 2).reshape(*x.shape[:2], 16)

    file, mask = io.BytesIO(), np.ones((3, 6), np.int64)
    mask[0, 4:], mask[1] = 0, 0
    axes, given = {0: "B", 1: "T"}, (torch.ones(2, 5, 16), torch.ones(2, 5, dtype=torch.long))
    names = {"input_names": ["x", "mask"], "output_names": ["y"], "dynamic_axes": {"x": axes, "mask": axes}}
    torch.onnx.export(Layer().eval(), given, file, dynamo=False, opset_version=opset, **names)
    check(onnx.load_from_string(file.getvalue()), {"x": draw(3, 6, 16), "mask": mask})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("sizes", ["fixed", "open"])
def test_files_of_torch_by_dynamo(opset, sizes, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")

    class Decoder(torch.nn.Module):
        """Of two heads of keys for four of queries, and of a softmax that asks for float32."""

        def __init__(self):
            super().__init__()
            self.query, self.key_value = torch.nn.Linear(24, 32), torch.nn.Linear(24, 32)
            self.encoder = torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)

        def forward(self, x, mask):
            q = self.query(x).unflatten(-1, (4, 8)).transpose(1, 2)
            k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.key_value(x).chunk(2, -1))
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
            scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(mask[:, None, None] == 0, torch.finfo(x.dtype).min)
            z = scores.softmax(-1, dtype=torch.float32).to(x.dtype) @ v
            return self.encoder((y + z).transpose(1, 2).flatten(2))

    module, x, mask = Decoder().eval(), torch.randn(2, 9, 24), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    kinds = {"dynamic_shapes": (free, free)} if sizes == "open" else {}
    file = tmp_path / "decoder.onnx"
    torch.onnx.export(module, (x, mask), str(file), dynamo=True, opset_version=opset, verbose=False, **kinds)
    check(onnx.load(file), {"x": x.numpy(), "mask": mask.numpy()}, attentions=3, tolerance=1e-5)


def test_the_examples_in_the_docstrings_hold():
    failed, tried = doctest.testmod(importlib.import_module("ruvector_numba.interop.onnx_model"))
    assert tried and not failed


# Errors


def test_wrong_models():
    with pytest.raises(InvalidInputError, match="model is a dict"):
        replace_attention({})
    with pytest.raises(InvalidInputError, match="not a model of ONNX"):
        replace_attention(b"junk")
    with pytest.raises(FileNotFoundError):
        replace_attention("there is no such file.onnx")
    model = model_of("{ a = Relu (q)  y = Softmax (a) }", "float[B,H,L,D] q", "float[B,H,L,D] y")
    with pytest.raises(InvalidInputError, match="no attention"):
        replace_attention(model)


def test_a_value_of_unknown_type_at_a_cut():
    text = """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        graph (float[B,H,L,D] x) => (float[B,H,L,D] y) {
        a = com.microsoft.Gelu (x)
        t = Transpose <perm = [0, 1, 3, 2]> (a)  s = MatMul (a, t)  p = Softmax (s)  y = MatMul (p, a) }"""
    model = parser.parse_model(text)
    with pytest.raises(InvalidInputError, match="does not tell the type of a"):
        replace_attention(model)
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, None))
    check(model, {"x": draw(*SHAPE)})


@pytest.mark.parametrize("inputs", [{}, {"x": 1, "z": 2}, [np.zeros(3)], None])
def test_wrong_inputs(inputs):
    body = "{ t = Transpose <perm = [1, 0]> (x)  s = MatMul (x, t)  p = Softmax (s)  y = MatMul (p, x) }"
    model = replace_attention(model_of(body, "float[L,D] x", "float[L,D] y"))
    with pytest.raises(InvalidInputError, match="the model's inputs: x"):
        model.run(inputs)


def test_options_of_onnx_runtime():
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = model_of(
        "{"
        + TURNED
        + "p = Softmax (s)  z = MatMul (p, v)  r = Relu (v)  m = ReduceMax <axes = [2]> (r)  y = Add (z, m)"
        + "}"
    )
    got = replace_attention(model, session_options=options, providers=["CPUExecutionProvider"]).run(qkv())["y"]
    np.testing.assert_allclose(got, alone(model, qkv())["y"], atol=2e-6)
