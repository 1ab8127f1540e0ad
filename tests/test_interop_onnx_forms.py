"""Forms in which models write attention out, found and left, against ONNX Runtime alone."""

import numpy as np
import pytest

from ruvector_numba import InvalidInputError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import parser  # noqa: E402
from onnx_models import HIDING, SHAPE, TURNED, B, D, H, L, alone, check, draw, model_of, qkv  # noqa: E402

from ruvector_numba.interop.onnx import replace_attention  # noqa: E402

# Forms that attention is written in


FORMS = {
    "plain": TURNED + "p = Softmax (s)  y = MatMul (p, v)",
    "scaled": TURNED + "c = Constant <value_float = 2.5> ()  t = Div (s, c)  p = Softmax (t)  y = MatMul (p, v)",
    "scaled and biased, in this order": TURNED + """c = Constant <value = float {0.3}> ()
        b = Constant <value = float[7] {0,1,2,-1,0,3,1}> ()  t = Mul (c, s)  u = Add (t, b)  p = Softmax (u)
        y = MatMul (p, v)""",
    "and in the other": TURNED + """c = Constant <value = float {0.3}> ()
        b = Constant <value = float[7] {0,1,2,-1,0,3,1}> ()  t = Add (b, s)  u = Mul (t, c)  p = Softmax (u)
        y = MatMul (p, v)""",
    "two biases": TURNED + """b = Constant <value = float[7] {0,1,2,-1,0,3,1}> ()  l = Shape (b)
        m = ConstantOfShape <value = float[1] {0.5}> (l)  n = Mul (m, b)
        t = Add (s, n)  u = Add (b, t)  p = Softmax (u)  y = MatMul (p, v)""",
    "queries scaled before": """c = Constant <value_float = 0.7> ()  r = Mul (q, c)
        kt = Transpose <perm = [0, 1, 3, 2]> (k)  d = Mul (kt, c)  s = MatMul (r, d)
        p = Softmax (s)  y = MatMul (p, v)""",
    "hidden by -inf": TURNED + HIDING + """h = Constant <value = float {-inf}> ()
        t = Where (w, s, h)  p = Softmax (t)  y = MatMul (p, v)""",
    "hidden by the lowest number": TURNED + HIDING + """h = Constant <value = float {-3.4028234663852886e+38}> ()
        t = Where (w, h, s)  c = Constant <value = float {0.25}> ()  u = Mul (t, c)
        p = Softmax (u)  y = MatMul (p, v)""",
    "all hidden by the lowest number": TURNED + """h = Constant <value = float {-3.4028234663852886e+38}> ()
        i = Constant <value = int64[7] {0,0,0,0,0,0,0}> ()  w = Cast <to = 9> (i)  t = Where (w, s, h)
        p = Softmax <axis = 3> (t)  y = MatMul (p, v)""",
    "casts that change nothing": TURNED + HIDING + """h = Constant <value = float {-1e9}> ()  t = Where (w, s, h)
        u = Cast <to = 1> (t)  p = Softmax (u)  r = Cast <to = 1> (p)  d = Dropout (r)  y = MatMul (d, v)""",
    "dropout": TURNED + "p = Softmax (s)  d = Dropout (p)  e = Identity (d)  y = MatMul (e, v)",
    "guarded against NaN, as torch does": TURNED + HIDING + """h = Constant <value = float {-inf}> ()
        c = Constant <value_float = 0.0> ()  b = Where (w, c, h)  t = Add (s, b)  p = Softmax (t)
        n = IsNaN (p)  g = Where (n, c, p)  y = MatMul (g, v)""",
    "the result turned": TURNED + """p = Softmax (s)  z = MatMul (p, v)  t = Transpose <perm = [0, 2, 1, 3]> (z)
        y = Transpose <perm = [0, 2, 1, 3]> (t)""",
    "capped": TURNED + """c = Constant <value_float = 1.5> ()  d = Constant <value_float = 0.7> ()  t = Div (s, c)
        u = Tanh (t)  w = Mul (u, d)  p = Softmax (w)  y = MatMul (p, v)""",
    "capped, then biased and hidden": TURNED + HIDING + """c = Constant <value_float = 1.5> ()  t = Div (s, c)
        u = Tanh (t)  x = Mul (c, u)  b = Constant <value = float[7] {0,1,2,-1,0,3,1}> ()  a = Add (b, x)
        h = Constant <value_float = -1e9> ()  z = Where (w, a, h)  p = Softmax (z)  y = MatMul (p, v)""",
    "scaled by what follows from a shape": TURNED + """f = Shape (q)  i = Constant <value = int64 {3}> ()
        g = Gather (f, i)  e = Cast <to = 1> (g)  r = Sqrt (e)  t = Div (s, r)
        b = Constant <value = float[7] {0,1,2,-1,0,3,1}> ()  a = Add (t, b)  p = Softmax (a)  y = MatMul (p, v)""",
    "multiplied by one number that the graph makes": TURNED + """c = ReduceMax <keepdims = 0> (q)  t = Mul (c, s)
        p = Softmax (t)  y = MatMul (p, v)""",
    "biased, then hidden by a low number": TURNED + HIDING + """h = Constant <value = float {-1e35}> ()
        b = Constant <value = float[7] {0,1,2,-1,0,3,1}> ()  a = Add (s, b)
        t = Where (w, a, h)  p = Softmax (t)  y = MatMul (p, v)""",
    "a number that counts in their place": TURNED + HIDING + """h = Constant <value = float {-0.5}> ()
        t = Where (w, s, h)  c = Constant <value_float = 1.5> ()  u = Mul (t, c)
        b = Constant <value = float[7] {0,1,2,-1,0,3,1}> ()  a = Add (u, b)  p = Softmax (a)  y = MatMul (p, v)""",
    "a residual": TURNED + """p = Softmax (s)  z = MatMul (p, v)
        r = Relu (v)  m = ReduceMean <axes = [2]> (r)  y = Add (z, m)""",
}  # fmt: skip


@pytest.mark.parametrize("body", FORMS.values(), ids=FORMS)
def test_forms(body):
    check(model_of("{" + body + "}"), qkv())


EINSUMS = {
    "heads first": ("bhid,bhjd->bhij", "bhij,bhje->bhie"),
    "heads last": ("bihd,bjhd->bhij", "bhij,bjhe->bihe"),
    "keys first, weights last": ("bjhd,bihd->bhij", "bjhe,bhij->bihe"),
    "channels first": ("hbdi,bdhj->hbij", "hbij,bjeh->ebih"),
}


@pytest.mark.parametrize("how", EINSUMS.values(), ids=EINSUMS)
def test_einsum(how):
    first, second = how
    sizes = {"b": B, "h": H, "i": L, "j": 7, "d": D, "e": 6}
    parts = [*first.partition("->")[0].split(","), second.partition("->")[0].replace("hbij", "").replace("bhij", "")]
    a, b, v = (draw(*(sizes[x] for x in part.strip(",")), seed=n) for n, part in enumerate(parts))
    weights_first = second.index("ij") < second.index(",")
    body = f"""{{ s = Einsum <equation = "{first}"> (a, b)  c = Constant <value_float = 0.3> ()  t = Mul (s, c)
        p = Softmax (t)  y = Einsum <equation = "{second}"> ({"p, v" if weights_first else "v, p"}) }}"""
    inputs = ", ".join(f"float[{','.join(map(str, x.shape))}] {name}" for name, x in zip("abv", (a, b, v)))
    outputs = ",".join(str(sizes[x]) for x in second.partition("->")[2])
    check(model_of(body, inputs, f"float[{outputs}] y"), {"a": a, "b": b, "v": v})


MASKED = {"low": -1e9, "not so low": -1e4, "the lowest of float16": -65504.0, "the lowest": -3.4028234663852886e38}


@pytest.mark.parametrize("number", MASKED.values(), ids=MASKED)
def test_numbers_in_the_place_of_scores(number):
    """As masked_fill writes them: a query all of whose keys are hidden gets the mean of the values."""
    body = (
        TURNED
        + """h = Constant <value = float {NUMBER}> ()  t = Where (first, h, s)  u = Where (second, t, h)
        p = Softmax (u)  y = MatMul (p, v)"""
    )
    body = body.replace("NUMBER", repr(number))
    inputs = "float[B,H,L,D] q, float[B,H,M,D] k, float[B,H,M,E] v, bool[B,1,1,M] first, bool[L,M] second"
    first, second = np.zeros((B, 1, 1, 7), bool), np.tri(L, 7, dtype=bool)
    first[0, ..., 5:], first[1, ..., :2] = True, True  # the first two queries of the second row see nothing
    second[3] = False  # nor do these
    given = qkv() | {"first": first, "second": second}
    check(model_of("{" + body + "}", inputs), given)
    given["first"] = np.zeros_like(first)
    given["second"] = np.ones_like(second)  # nothing is hidden
    check(model_of("{" + body + "}", inputs), given)


@pytest.mark.parametrize("number", [-65504.0, -1e4])
def test_numbers_in_the_place_of_scores_of_float16(number):
    body = (
        TURNED
        + """c = Constant <value = float {NUMBER}> ()  h = Cast <to = 10> (c)  t = Where (m, h, s)
        p = Softmax (t)  y = MatMul (p, v)"""
    )
    body = body.replace("NUMBER", repr(number))
    model = model_of("{" + body + "}", "float16[B,H,L,D] q, float16[B,H,M,D] k, float16[B,H,M,E] v, bool[L,M] m",
                     "float16[B,H,L,E] y")  # fmt: skip
    mask = ~np.tri(L, 7, dtype=bool)
    mask[2] = True
    check(model, qkv(dtype=np.float16) | {"m": mask}, tolerance=2e-3)


def test_ranks_that_only_a_transpose_tells():
    """As torch writes before opset 13, whose axes are counted from the left, with sizes that are not known."""
    model = parser.parse_model("""<ir_version: 7, opset_import: ["": 12]> g (float[B,L,16] x, int64[4] sh, float[L] m)
        => (float[B,2,L,8] z) { x4 = Reshape (x, sh)  q = Transpose <perm=[0,2,1,3]> (x4)
        t = Transpose <perm=[0,2,3,1]> (x4)  s = MatMul (q, t)  u = Add (s, m)  p = Softmax <axis=3> (u)
        y = MatMul (p, q)  z = Relu (y) }""")
    given = {"x": draw(2, 5, 16), "sh": np.array([2, 5, 2, 8]), "m": draw(5)}
    check(model, given)
    model.graph.node[5].attribute[0].i = 2
    with pytest.raises(InvalidInputError, match="its axis is 2, not the last of 4"):
        replace_attention(model)
    unknown = parser.parse_model("""<ir_version: 7, opset_import: ["": 12]> g (float[B,L,16] x, int64[N] sh)
        => (float[B,2,L,8] z) { q = Reshape (x, sh)  s = MatMul (q, q)  p = Softmax <axis=3> (s)
        y = MatMul (p, q)  z = Relu (y) }""")
    with pytest.raises(InvalidInputError, match="its axis is 3, and how many axes s has is not known"):
        replace_attention(unknown)


def test_biases_add_rows_and_columns():
    """And a query of one axis is left alone: there is no row for it."""
    body = "{ t = Transpose (k)  s = MatMul (q, t)  u = Add (s, b)  p = Softmax (u)  y = MatMul (p, v) }"
    inputs = "float[Q,D] q, float[K,D] k, float[M,E] v, float[R,M] b"
    for lq, lk in ((1, 4), (3, 1), (1, 1)):
        given = {"q": draw(lq, 8), "k": draw(lk, 8), "v": draw(4, 5), "b": draw(3, 4)}
        check(model_of(body, inputs, "float[R,E] y"), given)
    body = "{ s = MatMul (x, a)  p = Softmax (s)  y = MatMul (p, v) }"
    with pytest.raises(InvalidInputError, match="p: x has fewer than two axes"):
        replace_attention(model_of(body, "float[D] x, float[D,M] a, float[M,E] v", "float[E] y"))


def test_functions_of_the_model():
    model = parser.parse_model("""<ir_version: 10, opset_import: ["": 17, "here": 1]>
        g (float[B,L,8] x) => (float[B,L,8] y) { a = here.attend (x)  y = Relu (a) }
        <domain: "here", opset_import: ["": 17]> attend (x) => (z) {
        t = Transpose <perm = [0, 2, 1]> (x)  s = MatMul (x, t)  p = Softmax (s)  z = MatMul (p, x) }""")
    check(model, {"x": draw(2, 5, 8)})


@pytest.mark.filterwarnings("error")
def test_nothing_warns_of_numbers_beyond_a_type():
    body = (
        TURNED
        + """c = Constant <value_float = 4.0> ()  f = Cast <to = 10> (c)  t = Add (s, m)  u = Mul (t, f)
        p = Softmax (u)  y = MatMul (p, v)"""
    )
    inputs = "float16[B,H,L,D] q, float16[B,H,M,D] k, float16[B,H,M,E] v, float16[M] m"
    model = model_of("{" + body + "}", inputs, "float16[B,H,L,E] y")
    mask = np.float16([0, 0, -60000, 0, -65504, 0, 0])
    check(model, qkv(dtype=np.float16) | {"m": mask}, tolerance=4e-3)
    body = (
        TURNED
        + """h = Constant <value = float {-3.4028234663852886e+38}> ()  t = Where (m, s, h)
        c = Constant <value_float = 4.0> ()  u = Mul (t, c)  p = Softmax (u)  y = MatMul (p, v)"""
    )
    model = model_of("{" + body + "}", "float[B,H,L,D] q, float[B,H,M,D] k, float[B,H,M,E] v, bool[L,M] m")
    check(model, qkv() | {"m": np.tri(L, 7, dtype=bool)})


def test_double_precision():
    inputs = "double[B,H,L,D] q, double[B,H,M,D] k, double[B,H,M,E] v"
    model = model_of("{" + FORMS["plain"] + "}", inputs, "double[B,H,L,E] y")
    check(model, qkv(dtype=np.float64), tolerance=1e-13)


def test_half_precision():
    inputs = "float16[B,H,L,D] q, float16[B,H,M,D] k, float16[B,H,M,E] v"
    check(model_of("{" + FORMS["plain"] + "}", inputs, "float16[B,H,L,E] y"), qkv(dtype=np.float16), tolerance=2e-3)


def test_softmax_in_float32_between_products_in_float16():
    inputs = "float16[B,H,L,D] q, float16[B,H,M,D] k, float16[B,H,M,E] v"
    body = TURNED + "t = Cast <to = 1> (s)  p = Softmax (t)  w = Cast <to = 10> (p)  y = MatMul (w, v)"
    check(model_of("{" + body + "}", inputs, "float16[B,H,L,E] y"), qkv(dtype=np.float16), tolerance=2e-3)


def test_values_of_another_type_than_queries():
    body = TURNED + "t = Cast <to = 11> (s)  p = Softmax (t)  y = MatMul (p, v)"
    inputs = "float[B,H,L,D] q, float[B,H,M,D] k, double[B,H,M,E] v"
    given = qkv() | {"v": qkv(dtype=np.float64)["v"]}
    check(model_of("{" + body + "}", inputs, "double[B,H,L,E] y"), given)


def test_softmax_in_float64_is_done_so():
    """A score among others that are 18 less: in float32 they are lost beside it."""
    body = (
        TURNED
        + """t = Cast <to = 11> (s)  c = Constant <value = double {18.0}> ()  u = Mul (t, c)  p = Softmax (u)
        w = Cast <to = 1> (p)  y = MatMul (w, v)"""
    )
    query, key, value = np.ones((1, 1, 1, 1)), np.zeros((1, 1, 4097, 1)), np.ones((1, 1, 4097, 1))
    key[..., 0, 0], value[..., 0, 0] = 1, 0
    given = {"q": query, "k": key, "v": value}
    ours = replace_attention(model_of("{" + body + "}"))
    got = ours.run({name: x.astype(np.float32) for name, x in given.items()})["y"]
    wanted = 4096 * np.exp(-18) / (1 + 4096 * np.exp(-18))
    np.testing.assert_allclose(got, wanted, rtol=1e-7)


def test_leading_axes_broadcast():
    """As MatMul and Add have them: shared keys, and a mask that makes a batch out of one row."""
    inputs = "float[1,H,L,D] q, float[1,1,D,M] k, float[H,M,E] v, float[B,1,1,M] m"
    model = model_of("{ s = MatMul (q, k)  t = Add (s, m)  p = Softmax (t)  y = MatMul (p, v) }", inputs)
    here = {"q": draw(1, H, L, D), "k": draw(1, 1, D, 7), "v": draw(H, 7, 6), "m": draw(B, 1, 1, 7)}
    check(model, here)


@pytest.mark.parametrize("shape", [(L, D), (B, L, D), (2, 2, H, L, D)], ids=str)
def test_other_ranks(shape):
    typed = f"float[{','.join(map(str, shape))}]"
    axes = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    body = f"{{ t = Transpose <perm = {axes}> (x)  s = MatMul (x, t)  p = Softmax (s)  y = MatMul (p, x) }}"
    check(model_of(body, f"{typed} x", f"{typed} y"), {"x": draw(*shape)})


@pytest.mark.parametrize("shape", [(L, D), (B, L, D), (2, 2, H, L, D)], ids=str)
def test_padding_of_other_ranks(shape):
    typed = f"float[{','.join(map(str, shape))}]"
    axes = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    body = f"""{{ t = Transpose <perm = {axes}> (x)  s = MatMul (x, t)  u = Add (s, m)  p = Softmax (u)
        y = MatMul (p, x) }}"""
    lowest = np.finfo(np.float32).min
    check(
        model_of(body, f"{typed} x, float[L] m", f"{typed} y"),
        {"x": draw(*shape), "m": np.float32([0, 0, 0, lowest, lowest])},
    )


def test_numbers_drawn_at_random_are_drawn_once():
    """Before and after an attention it is one value."""
    body = """{ r = RandomNormal <shape = [4]> ()  a = Add (x, r)  t = Transpose <perm = [1, 0]> (a)
        s = MatMul (a, t)  p = Softmax (s)  z = MatMul (p, a)  d = Sub (z, z)  e = Add (d, a)  y = Sub (e, r) }"""
    x = draw(L, D)
    got = replace_attention(model_of(body, "float[L,D] x", "float[L,D] y")).run({"x": x})["y"]
    np.testing.assert_allclose(got, x, atol=1e-6)


def test_one_attention_after_another_and_side_by_side():
    """Two of one level, one that takes both, a mask that all share, and outputs of every kind."""
    body = """{
        k = Transpose <perm = [0, 1, 3, 2]> (x)
        a = MatMul (x, k)  b = Add (a, m)  c = Softmax (b)  d = MatMul (c, x)
        kn = Neg (k)  e = MatMul (x, kn)  f = Add (m, e)  g = Softmax (f)  h = MatMul (g, x)
        dt = Transpose <perm = [0, 1, 3, 2]> (d)
        i = MatMul (h, dt)  j = Add (i, m)  o = Softmax (j)  z = MatMul (o, x)
        y = Add (z, x)  first = Identity (d)  early = Relu (x)  w = Identity (m)
    }"""
    outputs = ", ".join(f"float[B,H,L,D] {n}" for n in ("y", "first", "early", "h")) + ", float[B,1,1,L] w"
    model = model_of(body, "float[B,H,L,D] x, float[B,1,1,L] m", outputs)
    check(model, {"x": draw(*SHAPE), "m": draw(B, 1, 1, L)}, attentions=3)


def test_weights_that_subgraphs_take_from_outside():
    body = """<float[4,4] w = {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}> {
        t = Transpose <perm = [0, 1, 3, 2]> (x)  s = MatMul (x, t)  p = Softmax (s)  a = MatMul (p, x)
        y = If (flag) <
            then_branch = yes () => (float[B,H,L,D] r) { r = MatMul (a, w) },
            else_branch = no () => (float[B,H,L,D] u) { u = Add (a, x) }
        > }"""
    model = model_of(body, "float[B,H,L,D] x, bool flag", "float[B,H,L,D] y")
    for flag in (True, False):
        check(model, {"x": draw(*SHAPE), "flag": np.array(flag)}, tolerance=1e-5)


def test_a_mask_that_is_a_weight():
    body = "<float[5,5] m = {0,-9,-9,-9,-9,0,0,-9,-9,-9,0,0,0,-9,-9,0,0,0,0,-9,0,0,0,0,0}> {"
    body += "t = Transpose <perm = [0, 1, 3, 2]> (x)  s = MatMul (x, t)  u = Add (s, m)"
    body += "p = Softmax (u)  y = MatMul (p, x) }"
    check(model_of(body, "float[B,H,L,D] x", "float[B,H,L,D] y"), {"x": draw(*SHAPE)})


def test_the_operator_with_a_cache():
    inputs = "float[B,H,L,D] q, float[B,H,M,D] k, float[B,H,M,E] v, float[B,H,P,D] pk, float[B,H,P,E] pv"
    outputs = "float[B,H,L,E] y, float[B,H,T,D] nk, float[B,H,T,E] nv"
    model = model_of("{ y, nk, nv = Attention <is_causal = 1> (q, k, v, , pk, pv) }", inputs, outputs, 24)
    model.ir_version = 11
    check(model, qkv(M=L) | {"pk": draw(B, H, 3, D, seed=5), "pv": draw(B, H, 3, 6, seed=6)})


# What is not attention, or must not be taken for it


LEFT = {
    "softmax over queries": TURNED + "p = Softmax <axis = 2> (s)  y = MatMul (p, v)",
    "scores taken twice": TURNED + """r = ReduceMax <keepdims = 1> (s)
        p = Softmax (s)  m = MatMul (p, v)  y = Add (m, r)""",
    "weights taken twice": TURNED + """p = Softmax (s)  m = MatMul (p, v)
        r = ReduceMax <keepdims = 1, axes = [-1]> (p)  y = Add (m, r)""",
    "weights on the right": "s = MatMul (q, k)  p = Softmax (s)  y = MatMul (v, p)",
    "guarded with another number": TURNED + """c = Constant <value_float = 1.0> ()  p = Softmax (s)
        n = IsNaN (p)  g = Where (n, c, p)  y = MatMul (g, v)""",
    "other sums": """s = Einsum <equation = "bhid,bhjd->bij"> (q, k)  p = Softmax (s)
        y = Einsum <equation = "bij,bhje->bhie"> (p, v)""",
    "a sum of one input": TURNED + """t = Einsum <equation = "bhij->bhij"> (s)  p = Softmax (t)
        y = MatMul (p, v)""",
    "scores that become whole numbers": TURNED + """t = Cast <to = 6> (s)  u = Cast <to = 1> (t)  p = Softmax (u)
        y = MatMul (p, v)""",
    "weights that become whole numbers": TURNED + """p = Softmax (s)  t = Cast <to = 6> (p)  u = Cast <to = 1> (t)
        y = MatMul (u, v)""",
    "another function of scores": TURNED + "t = Exp (s)  p = Softmax (t)  y = MatMul (p, v)",
    "biased before a cap": TURNED + """b = Constant <value = float[7] {0,1,2,-1,0,3,1}> ()  a = Add (b, s)
        t = Tanh (a)  p = Softmax (t)  y = MatMul (p, v)""",
    "biased before a number that is not constant": TURNED + """c = ReduceMax <keepdims = 0> (q)
        b = Constant <value = float[7] {0,1,2,-1,0,3,1}> ()  a = Add (s, b)  t = Mul (a, c)
        p = Softmax (t)  y = MatMul (p, v)""",
    "numbers that are not constant": TURNED + """c = ReduceMax <keepdims = 1, axes = [-1]> (q)  t = Mul (s, c)
        p = Softmax (t)  y = MatMul (p, v)""",
    "another number for each query": TURNED + HIDING + """h = ReduceMax <keepdims = 1, axes = [-1]> (q)
        t = Where (w, s, h)  p = Softmax (t)  y = MatMul (p, v)""",
}  # fmt: skip
REASONS = {
    "softmax over queries": "p: its axis is 2, not the last of 4",
    "scores taken twice": "no product of queries and keys: s is made by MatMul and taken by ReduceMax, Softmax",
    "weights taken twice": "not what MatMul multiplies values by: p is made by Softmax and taken by MatMul, ReduceMax",
    "weights on the right": "not what MatMul multiplies values by: p is its second input",
    "other sums": "Einsum bhid,bhjd->bij is no product of queries and keys, or of weights and values",
    "a sum of one input": "Einsum bhij->bhij is no product of matrices",
    "guarded with another number": "p is made by Softmax and taken by IsNaN, Where",
    "scores that become whole numbers": "p: scores are cast to INT32",
    "weights that become whole numbers": "not what MatMul multiplies values by: p is made by Softmax and taken by Cast",
    "another function of scores": "p: no product of queries and keys: t is made by Exp and taken by Softmax",
    "biased before a cap": "p: scores are masked before Tanh",
    "biased before a number that is not constant": "scores are masked, and then multiplied by c, which is no constant",
    "numbers that are not constant": "Mul by what is no positive number: s, c",
    "another number for each query": "Where without a constant number: s, h",
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_onnx_runtime(name):
    model = model_of("{" + LEFT[name] + "}")
    with pytest.raises(InvalidInputError, match="no attention that can be replaced") as error:
        replace_attention(model)
    assert REASONS[name] in str(error.value)


def test_one_is_found_and_another_left():
    body = TURNED + "p = Softmax (s)  a = MatMul (p, v)  e = Exp (a)  y = Softmax (e)"
    ours = check(model_of("{" + body + "}"), qkv())
    assert ours.attentions == ("p",) and list(ours.left) == ["y"]
    assert ours.left["y"] == "no product of queries and keys: e is made by Exp and taken by Softmax"


def test_what_subgraphs_have_is_not_looked_at():
    body = """{ y = If (flag) <then_branch = yes () => (float[L,D] r) { r = Relu (x) },
        else_branch = no () => (float[L,D] r) { t = Transpose (x)  s = MatMul (x, t)  p = Softmax (s)
        r = MatMul (p, x) }> }"""
    with pytest.raises(InvalidInputError, match="Softmax: there is none outside of subgraphs"):
        replace_attention(model_of(body, "float[L,D] x, bool flag", "float[L,D] y"))


@pytest.mark.parametrize("name", ["s", "p"])
def test_scores_or_weights_that_are_an_output(name):
    with pytest.raises(InvalidInputError, match="no attention that can be replaced"):
        replace_attention(model_of("{" + FORMS["plain"] + "}", outputs=f"float[B,H,L,E] y, float[B,H,L,M] {name}"))


def test_softmax_before_opset_13_was_over_more_than_the_last_axis():
    body = "{" + FORMS["plain"] + "}"
    with pytest.raises(InvalidInputError, match="no attention"):
        replace_attention(model_of(body, opset=11))
    check(model_of(body.replace("Softmax", "Softmax <axis = -1>"), opset=11), qkv())


def test_a_query_that_sees_no_key_gets_0():
    """And NaN in ONNX Runtime: the one difference."""
    model = model_of("{" + TURNED + "t = Add (s, m)  p = Softmax (t)  y = MatMul (p, v) }",
                     "float[B,H,L,D] q, float[B,H,M,D] k, float[B,H,M,E] v, float[L,M] m")  # fmt: skip
    mask = np.zeros((L, 7), np.float32)
    mask[2] = -np.inf
    got, wanted = (f(qkv() | {"m": mask})["y"] for f in (replace_attention(model).run, lambda x: alone(model, x)))
    assert np.isnan(wanted[:, :, 2]).all() and not got[:, :, 2].any()
    np.testing.assert_allclose(np.delete(got, 2, 2), np.delete(wanted, 2, 2), atol=2e-6)
