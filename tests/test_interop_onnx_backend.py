"""The standard's own cases, its own test runner, and its reference implementation on drawn cases."""

import doctest
import importlib
import unittest

import numpy as np
import pytest

import ruvector_numba as rv
from ruvector_numba import AttentionError, InvalidConfigError, InvalidInputError
from ruvector_numba.interop.onnx import attention

onnx = pytest.importorskip("onnx", minversion="1.23")
ml_dtypes = pytest.importorskip("ml_dtypes")  # comes with onnx

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the standard's cases are computed when they are loaded
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

with np.errstate(all="ignore"):
    from onnx.backend.test.loader import load_model_tests
    from onnx.backend.test.runner import BackendIsNotSupposedToImplementIt, Runner

    CASES = {case.name: case for case in load_model_tests(kind="node")}
from onnx import helper, parser  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from ruvector_numba.interop.onnx import Backend, flex_attention  # noqa: E402

OURS = [n for n in CASES if n.startswith(("test_attention", "test_flexattention")) and "_expanded" not in n]


def array(x):
    return onnx.numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else x


# The standard's cases


def test_there_are_as_many_cases_as_were_read():
    assert sum(n.startswith("test_attention") for n in OURS) >= 93
    assert sum(n.startswith("test_flexattention") for n in OURS) >= 11


@pytest.mark.parametrize("name", OURS)
def test_a_case_of_the_standard(name):
    """As its runner does it, through the node's function: nothing here can skip."""
    case = CASES[name]
    (node,) = case.model.graph.node
    versions = {x.domain: x.version for x in case.model.opset_import}
    for given, wanted in case.data_sets:
        arrays = iter(array(x) for x in given)
        inputs = [next(arrays) if name else None for name in node.input]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "FlexAttention":
            results = [flex_attention(*inputs, **attributes)]
        else:
            mode = attributes.pop("qk_matmul_output_mode", 0) if len(node.output) > 3 else None
            results = attention(*inputs, **attributes, qk_matmul_output_mode=mode, opset=versions[""])
        results = [x for x, name in zip(results, node.output) if name]
        Runner.assert_similar_outputs([array(x) for x in wanted], results, case.rtol, case.atol)


def test_the_standards_runner():
    """BackendTest, told to include attention; what it counts as run is counted here, since it hides skips."""
    done = {"run": [], "refused": []}

    class Counting(Backend):
        @classmethod
        def prepare(cls, model, device="CPU", **kwargs):
            try:
                prepared = super().prepare(model, device, **kwargs)
            except BackendIsNotSupposedToImplementIt:
                done["refused"].append(model.graph.name)
                raise
            done["run"].append(model.graph.name)
            return prepared

    tests = onnx.backend.test.BackendTest(Counting, __name__).include("attention").test_suite
    result = unittest.TestResult()
    tests.run(result)
    assert not result.failures and not result.errors, [*result.failures, *result.errors]
    assert sorted(done["run"]) == sorted(OURS)
    assert done["refused"] and all("_expanded" in n or n.startswith("test_linear_attention") for n in done["refused"])


def test_whatever_else_the_standard_has_is_refused():
    others = [case for name, case in CASES.items() if name not in OURS and case.model is not None]
    assert len(others) > 1000
    for case in others:
        assert not Backend.is_compatible(case.model)
    with pytest.raises(BackendIsNotSupposedToImplementIt, match=r"Relu of ai\.onnx, opset"):
        Backend.prepare(CASES["test_relu"].model)


# Drawn cases, against the standard's reference implementation


def drawn(seed):
    """Inputs and attributes of a case; the seed decides everything."""
    rng = np.random.default_rng(seed)
    B, Hk, group, Lq, Lk, D, Dv = (int(n) for n in rng.integers(1, [4, 4, 4, 9, 12, 10, 10]))
    packed, attributes = bool(rng.integers(2)), {}
    shapes = {"Q": (B, Hk * group, Lq, D), "K": (B, Hk, Lk, D), "V": (B, Hk, Lk, Dv)}
    inputs = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    cache, P = rng.integers(3), 0
    if cache == 1:
        P = int(rng.integers(0, 6))
        inputs |= {"past_key": rng.standard_normal((B, Hk, P, D)), "past_value": rng.standard_normal((B, Hk, P, Dv))}
    elif cache == 2:
        inputs["nonpad_kv_seqlen"] = rng.integers(0, Lk + 1, B)
    mask = rng.integers(3)
    if mask:
        full = (B, Hk * group, Lq, P + Lk)
        axes = full[rng.integers(0, 3) :]
        shape = [n if rng.integers(3) else 1 for n in axes]
        # Under is_causal the reference takes a mask of one axis, or of one query for all, for that of query 0.
        shape[-2:] = Lq, int(rng.integers(1, axes[-1] + 1))
        inputs["attn_mask"] = rng.standard_normal(shape) if mask == 1 else rng.random(shape) < 0.7
    if packed:
        inputs |= {n: inputs[n].swapaxes(1, 2).reshape(B, inputs[n].shape[2], -1) for n in "QKV"}
        attributes |= {"q_num_heads": Hk * group, "kv_num_heads": Hk}
    if rng.integers(2):
        attributes["is_causal"] = 1
    for name in ("left_window_size", "right_window_size"):
        if rng.integers(2):
            attributes[name] = int(rng.integers(-1, 5))
    if rng.integers(2):
        attributes["scale"] = float(np.float32(rng.random()))
    mode = int(rng.integers(4))
    if rng.integers(2) and mode:  # in mode 0 the reference gives what mode 1 is, against the operator's text
        attributes["softcap"] = float(np.float32(0.1 + rng.random()))
    return inputs, attributes | {"qk_matmul_output_mode": mode}


@pytest.mark.parametrize("seed", range(150))
def test_drawn_cases_agree_with_the_standards_reference(seed):
    inputs, attributes = drawn(seed)
    order = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
    names = ["Y", *(["present_key", "present_value"] if "past_key" in inputs else ["", ""]), "qk_matmul_output"]
    node = helper.make_node("Attention", [n if n in inputs else "" for n in order], names, **attributes)
    wanted = ReferenceEvaluator(node, opsets={"": 25}).run([n for n in names if n], inputs)
    got = Backend.run_node(node, inputs, opset_version=25)
    assert len(got) == len(wanted) == sum(map(bool, names))
    for x, y in zip(got, wanted):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)  # the reference rounds the scale to float32


# The backend


X = np.random.default_rng(0).standard_normal((1, 2, 3, 4)).astype(np.float32)
NODE = helper.make_node("Attention", ["Q", "K", "V", "mask"], ["Y", "", "", "P"], qk_matmul_output_mode=3)


def model_of(text, opset=25):
    head = f'<ir_version: 11, opset_import: ["": {opset}, "ai.onnx.preview": 1]>'
    return parser.parse_model(f"{head} graph (float[1,2,3,4] x) => (float[1,2,3,4] y) {text}")


def test_two_nodes_one_after_the_other():
    model = model_of(
        "<float[3,3] m = {0,0,0,1,1,1,2,2,2}> { a = Attention <is_causal = 1> (x, x, x)  y = Attention (a, a, x, m) }"
    )
    a = attention(X, X, X, is_causal=1).Y
    wanted = attention(a, a, X, np.repeat(np.arange(3, dtype=np.float32)[:, None], 3, 1)).Y
    prepared = Backend.prepare(model)
    for inputs in ([X], {"x": X}):
        assert np.array_equal(prepared.run(inputs).y, wanted)
    assert np.array_equal(Backend.run_model(model, [X])[0], wanted)


def test_outputs_that_are_left_out_are_not_computed():
    mask = np.ones((3, 3), bool)
    got = Backend.run_node(NODE, [X, X, X, mask])
    assert got._fields == ("Y", "P") and np.allclose(got.P.sum(-1), 1)
    node = helper.make_node("Attention", ["Q", "K", "V"], ["Y"], qk_matmul_output_mode=3)
    assert len(Backend.run_node(node, [X, X, X])) == 1


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([X, X], "2 inputs for 4"),
        ({"Q": X}, "missing: K, V, mask"),
        (X, "inputs is a ndarray"),
    ],
)
def test_wrong_inputs(inputs, words):
    with pytest.raises(InvalidInputError, match=words):
        Backend.run_node(NODE, inputs)


def test_wrong_nodes():
    with pytest.raises(onnx.checker.ValidationError, match="Unrecognized attribute: heads"):
        Backend.prepare(model_of("{ y = Attention <heads = 2> (x, x, x) }"))
    with pytest.raises(InvalidConfigError, match="Attention has no attribute heads"):
        Backend.run_node(helper.make_node("Attention", ["Q", "K", "V"], ["Y"], heads=2), [X, X, X])
    with pytest.raises(InvalidConfigError, match="left_window_size came with opset 25"):
        Backend.run_node(
            helper.make_node("Attention", list("QKV"), ["Y"], left_window_size=2), [X] * 3, opset_version=23
        )
    with pytest.raises(BackendIsNotSupposedToImplementIt, match="opset 22"):
        Backend.run_node(helper.make_node("Attention", list("QKV"), ["Y"]), [X] * 3, opset_version=22)


def test_devices():
    assert Backend.supports_device("CPU") and Backend.supports_device("CPU:0")
    assert not Backend.supports_device("CUDA")
    with pytest.raises(InvalidInputError, match="device is CUDA"):
        Backend.prepare(model_of("{ y = Attention (x, x, x) }"), "CUDA:1")


@pytest.mark.parametrize("name", ["onnx_backend", "onnx_flex"])
def test_the_examples_in_the_docstrings_hold(name):
    failed, tried = doctest.testmod(importlib.import_module(f"ruvector_numba.interop.{name}"))
    assert tried and not failed


# FlexAttention


def modified(scores, text, prob=None):
    """FlexAttention by the standard's reference, with subgraphs given as text from s to t."""
    graph = lambda body: parser.parse_graph(f"mod (float[B,H,L,S] s) => (float[B,H,L,S] t) {body}")  # noqa: E731
    attributes = {"score_mod": graph(text)} if text else {}
    attributes |= {"prob_mod": graph(prob)} if prob else {}
    node = helper.make_node("FlexAttention", list("QKV"), ["Y"], domain="ai.onnx.preview", **attributes)
    imports = [helper.make_opsetid("", 26), helper.make_opsetid("ai.onnx.preview", 1)]
    shapes = [helper.make_tensor_value_info(n, 1, x.shape) for n, x in scores.items()]
    graph = helper.make_graph([node], "flex", shapes, [helper.make_tensor_value_info("Y", 1, list("BHLD"))])
    model = helper.make_model(graph, opset_imports=imports, ir_version=11)
    return attributes, (lambda: ReferenceEvaluator(model).run(None, scores)[0]), model


FLEX = {
    "nothing": "{ t = Identity(s) }",
    "scale": "<float c = {-2.5}> { t = Mul(c, s) }",
    "divided": "<float c = {3.0}> { t = Div(s, c) }",
    "negative": "{ t = Neg(s) }",
    "softcap": "<float c = {0.5}> { a = Div(s, c) b = Tanh(a) t = Mul(b, c) }",
    "tanh of any slope, negative": "<float a = {-3.0}, float c = {0.25}> { x = Mul(s, a) y = Tanh(x) t = Div(y, c) }",
    "softcap, then bias": """<float c = {2.0}, float[4] b = {0,1,0,-2}>
        { x = Tanh(s) y = Mul(x, c) z = Add(b, y) t = Mul(z, c) }""",
    "bias taken off": """<float[3,1,1] b = {1,2,3}, float[4] c = {0,1,0,-2}>
        { x = Sub(s, c) y = Add(x, b) t = Sub(c, y) }""",
    "ALiBi": """<int64 zero = {0}, int64 one = {1}, int64[2] r = {-1, 1}, float[3,1,1] slopes = {0.5, 0.25, 0.125}> {
        n = Shape <start = 2, end = 3> (s)  m = Shape <start = -1> (s)
        ns = Squeeze(n)  ms = Squeeze(m)
        i = Range(zero, ns, one)  j = Range(zero, ms, one)  ic = Reshape(i, r)
        d = Sub(j, ic)  e = Cast <to = 1> (d)  f = Mul(e, slopes)  t = Add(s, f) }""",
    "hidden by -inf": "<bool[4] k = {1,0,1,1}, float c = {-inf}> { t = Where(k, s, c) }",
    "hidden the other way": "<bool[4] k = {0,1,0,0}, float c = {-inf}> { t = Where(k, c, s) }",
    "hidden by a low number": "<bool[4] k = {1,0,1,1}, float c = {-1e35}> { a = Where(k, s, c) t = Cast <to = 1> (a) }",
    "all hidden by a low number": "<bool[2,1] k = {1,0}, float c = {-1e35}> { t = Where(k, s, c) }",
}  # fmt: skip


def flex_inputs():
    rng = np.random.default_rng(3)
    shapes = {"Q": (2, 3, 2, 8), "K": (2, 3, 4, 8), "V": (2, 3, 4, 5)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("text", FLEX.values(), ids=FLEX)
def test_score_mod(text):
    inputs = flex_inputs()
    attributes, evaluate, model = modified(inputs, text)
    wanted = evaluate()
    np.testing.assert_allclose(flex_attention(**inputs, **attributes), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(Backend.run_model(model, inputs)[0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "<float c = {0.5}> { t = Mul(c, s) }",
        "<float[3,2,1] c = {1,2,3,4,5,6}> { a = Mul(s, c) t = Div(a, c) }",
        "<float[3,1,1] c = {1,2,3}> { a = Mul(s, c) b = Mul(a, c) t = Neg(b) }",
    ],
)
def test_prob_mod(text):
    inputs = flex_inputs()
    attributes, evaluate, _ = modified(inputs, None, text)
    np.testing.assert_allclose(flex_attention(**inputs, **attributes), evaluate(), rtol=1e-5, atol=1e-6)


REFUSED = {
    "Relu": "{ t = Relu(s) }",
    "Mul: itself": "{ t = Mul(s, s) }",
    "Mul: multiplied by an array": "<float[4] c = {1,2,3,4}> { t = Mul(s, c) }",
    "Mul: multiplied by 0": "<float c = {0.0}> { t = Mul(s, c) }",
    "Mul: after a mask": """<bool[4] k = {1,0,1,1}, float i = {-inf}, float c = {-1.0}>
        { a = Where(k, s, i) t = Mul(a, c) }""",
    "Tanh: after a softcap": "<float[4] b = {1,2,3,4}> { a = Add(s, b) t = Tanh(a) }",
    "Where: replaced by": "<bool[4] k = {1,0,1,1}, float c = {-10000.0}> { t = Where(k, s, c) }",
    "Where: once": """<bool[4] k = {1,0,1,1}, bool[4] l = {1,0,1,0}, float i = {-inf}, float c = {-1e35}>
        { a = Where(k, s, i) t = Where(l, a, c) }""",
    "Add: of the shape": "<float[5,1,1,1,1] c = {1,2,3,4,5}> { t = Add(s, c) }",
    "Div": "<float c = {2.0}> { t = Div(c, s) }",
    "Cast": "{ a = Cast <to = 10> (s) t = Cast <to = 1> (a) }",
    "ReduceMax": "{ a = ReduceMax (s) t = Sub(s, a) }",
}


@pytest.mark.parametrize(("words", "text"), REFUSED.items(), ids=REFUSED)
def test_other_subgraphs_are_refused_by_the_operators_name(words, text):
    kind, _, why = words.partition(": ")
    attributes, _, _ = modified(flex_inputs(), text)
    with pytest.raises(InvalidConfigError, match=f"in score_mod, operator {kind}: .*{why}"):
        flex_attention(**flex_inputs(), **attributes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<float[4] c = {1,2,3,4}> { t = Mul(s, c) }", "operator Mul: .*a number for each key"),
        ("<float c = {1.0}> { t = Add(s, c) }", "operator Add"),
        ("{ t = Tanh(s) }", "operator Tanh"),
        ("<bool[4] k = {1,0,1,1}, float c = {0.0}> { t = Where(k, s, c) }", "operator Where"),
    ],
)
def test_other_changes_of_weights_are_refused(text, words):
    attributes, _, _ = modified(flex_inputs(), None, text)
    with pytest.raises(InvalidConfigError, match=f"in prob_mod, {words}"):
        flex_attention(**flex_inputs(), **attributes)


def test_wrong_calls_of_flex_attention():
    inputs = flex_inputs()
    outside = parser.parse_graph("mod (float[B,H,L,S] s) => (float[B,H,L,S] t) { t = Add(s, elsewhere) }")
    constant = parser.parse_graph("mod (float[B,H,L,S] s) => (float[B,H,L,S] t) <float c = {1.0}> { t = Identity(c) }")
    two = parser.parse_graph("mod (float s, float u) => (float t) { t = Add(s, u) }")
    for more, words in (
        ({"score_mod": outside}, "score_mod uses elsewhere from outside"),
        ({"score_mod": constant}, "score_mod gives what does not depend on its input"),
        ({"prob_mod": two}, "prob_mod has one input and one output"),
        ({"score_mod": "s + 1"}, "score_mod is a str"),
        ({"Q": inputs["Q"][0]}, "Q, K and V have three axes, or four"),
        ({n: inputs[n][0] for n in "QKV"}, "Q, K and V have four axes"),
        ({"V": inputs["V"].astype(np.float64)}, "Q, K and V differ in dtype"),
        ({"softmax_precision": 7}, "softmax_precision is 7"),
        ({"mask_mod": outside}, "FlexAttention has no attribute mask_mod"),
    ):
        with pytest.raises(AttentionError, match=words):
            flex_attention(**inputs | more)
    assert rv.interop.onnx.flex_attention is flex_attention
