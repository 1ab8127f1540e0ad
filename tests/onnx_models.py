"""Small models of ONNX, and ONNX Runtime alone to compare with."""

import numpy as np
import onnxruntime
from onnx import parser

from ruvector_numba.interop.onnx import AttentionModel, replace_attention

B, H, L, D = 2, 3, 5, 4
SHAPE = (B, H, L, D)

HIDING = "i = Constant <value = int64[7] {1,1,0,1,0,1,1}> ()  w = Cast <to = 9> (i) "
TURNED = "kt = Transpose <perm = [0, 1, 3, 2]> (k)  s = MatMul (q, kt) "


def alone(model, inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs)))


def model_of(body, inputs="float[B,H,L,D] q, float[B,H,M,D] k, float[B,H,M,E] v", outputs="float[B,H,L,E] y", opset=17):
    text = f'<ir_version: 8, opset_import: ["": {opset}]> graph ({inputs}) => ({outputs}) {body}'
    return parser.parse_model(text)


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def qkv(M=7, E=6, dtype=np.float32):
    return {
        "q": draw(*SHAPE, dtype=dtype),
        "k": draw(B, H, M, D, seed=1, dtype=dtype),
        "v": draw(B, H, M, E, dtype=dtype),
    }


def check(model, inputs, attentions=1, tolerance=2e-6):
    ours = replace_attention(model)
    assert isinstance(ours, AttentionModel) and len(ours.attentions) == attentions
    got, wanted = ours.run(inputs), alone(model, inputs)
    assert list(got) == list(wanted) == list(ours.outputs)
    for name, x in wanted.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape
        np.testing.assert_allclose(got[name], x, rtol=tolerance, atol=tolerance)
    return ours
