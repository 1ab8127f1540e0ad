"""Dense attention against the float64 reference: outputs, logsumexps, weights and every gradient, in all pairs of masks
and terms, on both of its ways (few queries, many) and in both precisions. What is near enough: `cases.close`.
"""

import numpy as np
import pytest
import reference
from cases import MASKS, SECOND_PASS, TERMS, close, conforms, gradients_conform, make

import ruvector_numba as rv
from ruvector_numba import masks

pytestmark = pytest.mark.core

DTYPES = [np.float64, np.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
FEW, MANY = (5, 70, 16, 24), (41, 70, 16, 24)  # (Lq, Lk, D, Dv)
SIZES = [
    (1, 1, 1, 1),
    (7, 7, 3, 5),
    (97, 97, 40, 33),
    (97, 97, 1, 40),
    (113, 203, 16, 24),
    (203, 113, 64, 8),
    (130, 1, 8, 8),
    (9, 300, 65, 1),
    (3, 203, 40, 33),  # few queries
    (8, 130, 16, 70),
    (5, 9000, 16, 8),  # more keys than one task takes: parts, merged
    (12, 4500, 8, 8),
]


@dtypes
@pytest.mark.parametrize("names", ["", "causal", "bottom_right", "window", "lengths", "segments", "all intervals"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_masks_that_are_intervals(size, names, dtype):
    names = ["causal", "window", "lengths", "segments"] if names == "all intervals" else names.split()
    conforms(make(names, size, dtype))


@dtypes
@pytest.mark.parametrize("size", [FEW, MANY, (3, 4200, 8, 8)], ids=str)
@pytest.mark.parametrize("Hk", [1, 2, 3, 6])
def test_grouped_heads(Hk, size, dtype):
    conforms(make(["window"], size, dtype, lead=(2, 6), Hk=Hk))


@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1), FEW, MANY, (113, 203, 40, 33), (5, 9000, 8, 8), (12, 4500, 8, 8)], ids=str
)
@pytest.mark.parametrize("name", ["bool", "scattered", "float", "softcap", "slopes", "dropout"])
def test_a_term_alone(name, size):
    """Compiled for this term and no other. What would cost a kernel for this test alone, as few queries under a
    softcap, is left to the test of all pairs."""
    if name in ("softcap", "slopes", "float") and size[0] <= 8:
        size = (9, *size[1:])
    conforms(make([name], size), weights=name in ("bool", "scattered"))


@pytest.mark.parametrize("name", ["bool", "scattered"])
@pytest.mark.parametrize("size", [FEW, MANY], ids=str)
def test_a_bool_mask_alone_in_float32(size, name):
    case = make([name], size, np.float32)
    exact, naive = reference.attention(*case.inputs, **case.spec), reference.naive32(*case.inputs, **case.spec)
    close("output", case.forward().output, exact[0], naive[0])


@dtypes
@pytest.mark.parametrize("size", [FEW, MANY], ids=str)
@pytest.mark.parametrize("term", ["", *TERMS])
@pytest.mark.parametrize("mask", MASKS)
def test_pairs(mask, term, size, dtype):
    conforms(make([mask, *term.split()], size, dtype, fill=True))


@dtypes
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1), FEW, MANY, (113, 203, 40, 33), (5, 9000, 8, 8), (12, 4500, 8, 8)], ids=str
)
def test_everything_at_once(size, dtype):
    """Intervals that all masks share are narrow, so also without the narrowest."""
    conforms(make([*MASKS, *TERMS], size, dtype, fill=True))
    conforms(make(["window", "lengths", "bool", "float", *TERMS], size, dtype, fill=True))


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
@pytest.mark.parametrize("size", [FEW, MANY], ids=str)
def test_scale(size, scale):
    case = make(["causal"], size)
    conforms(case._replace(call={**case.call, "scale": scale}, spec={**case.spec, "scale": scale}))


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (4,)])
def test_slopes_of_rows_of_the_batch(shape):
    case = make(["slopes"], MANY)
    slopes = np.random.default_rng(0).random(shape) / 4
    conforms(
        case._replace(call={**case.call, "alibi_slopes": slopes}, spec={**case.spec, "slopes": slopes}), weights=False
    )


# Weights


ROWS = [
    None, slice(None), slice(3, 9), slice(None, None, 2), slice(12, 2, -3), slice(5, 5), slice(-4, None), 0, -1, 7, [4],
    [7, 8, 9, 2, 3, -1], [5, 5, 0], np.array([1, 12]), [], range(3), np.int64(6), np.array([2, 3], np.uint8),
]  # fmt: skip


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("names", ["", "lengths segments window bottom_right", "bool"])
def test_weights_of_some_rows(names, rows):
    """All leading axes, all keys, and the rows that NumPy would choose from all of them."""
    case = make(names.split(), (13, 150, 8, 8))
    exact = reference.attention(*case.inputs, **case.spec)[2]
    chosen = np.arange(13)[slice(None) if rows is None else list(rows) if isinstance(rows, range) else rows]
    wanted = exact[..., np.atleast_1d(chosen).astype(int), :]
    close("weights", case.forward().weights(rows), wanted)


@dtypes
@pytest.mark.parametrize("rows", [slice(3, 9), [7, 8, 2, -1], 70], ids=str)
@pytest.mark.parametrize("bias_shape", [None, (70,), (4, 1, 70), (71, 1)], ids=str)
def test_weights_of_some_rows_with_everything(bias_shape, rows, dtype):
    case = make([*MASKS, *TERMS], (71, 70, 8, 8), dtype, fill=True, bias_shape=bias_shape)
    exact = reference.attention(*case.inputs, **case.spec)[2]
    chosen = np.atleast_1d(np.arange(71)[rows])
    naive = reference.naive32(*case.inputs, **case.spec)[2][..., chosen, :] if dtype == np.float32 else None
    close("weights", case.forward().weights(rows), exact[..., chosen, :], naive, SECOND_PASS)


def test_weights_are_those_before_dropout():
    case = make(["dropout"], MANY)
    plain = make([], MANY)
    cache = case.forward()
    weights = cache.weights()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-13)
    np.testing.assert_array_equal(cache.lse, plain.forward().lse)
    close("weights", weights, reference.attention(*plain.inputs, **plain.spec)[2])
    identity = np.broadcast_to(np.eye(70), (2, 2, 70, 70))
    dropped = rv.scaled_dot_product_attention(case.query, case.key, identity, **case.call)
    close("dropped weights", dropped, weights * case.spec["keep"])


# The gradient of a float mask, in the mask's own shape


SHAPES = [(), (70,), (1, 70), (41, 1), (41, 70), (4, 1, 1), (4, 1, 70), (4, 41, 1), (1, 41, 70),
          (2, 1, 1, 70), (2, 1, 41, 1), (2, 1, 41, 70), (2, 4, 41, 1), (2, 4, 1, 70), (2, 4, 1, 1), (2, 4, 41, 70),
          (1, 1, 1, 1)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_a_bias_in_its_own_shape(shape):
    case = make(["float", "causal"], MANY, bias_shape=shape)
    gradients_conform(case, case.forward())


@pytest.mark.parametrize("shape", [(300,), (150, 1), (4, 1, 300), (2, 4, 150, 300), (2, 1, 1, 300)], ids=str)
def test_gradient_of_a_bias_over_several_tiles(shape):
    case = make(["float", "window"], (150, 300, 8, 8), bias_shape=shape)
    gradients_conform(case, case.forward())


@dtypes
@pytest.mark.parametrize("shape", SHAPES[1::3], ids=str)
def test_gradient_of_a_bias_with_everything(shape, dtype):
    case = make([*MASKS, *TERMS], MANY, dtype, fill=True, bias_shape=shape)
    gradients_conform(case, case.forward())


def test_the_gradient_of_a_bias_may_be_left_out():
    case = make(["float", "causal"], MANY)
    cache = case.forward()
    everything = rv.attention_backward(case.grad_output, cache)
    some = rv.attention_backward(case.grad_output, cache, wants_bias=False)
    assert everything.bias is not None and some.bias is None
    for name in ("query", "key", "value"):
        np.testing.assert_array_equal(getattr(some, name), getattr(everything, name))
    with pytest.raises(rv.InvalidInputError, match="wants_bias is None, of type NoneType"):
        rv.attention_backward(case.grad_output, cache, wants_bias=None)


# Gradients of parts of the results


@dtypes
@pytest.mark.parametrize("size", [FEW, MANY], ids=str)
def test_gradient_of_the_logsumexp_alone_and_of_none(size, dtype):
    case = make(["causal"], size, dtype)
    cache = case.forward()
    gradients_conform(case, cache, grad_output=np.zeros_like(case.grad_output))
    gradients_conform(case, cache, grad_lse=None)
    nothing = rv.attention_backward(np.zeros_like(case.grad_output), cache)
    assert not any(x.any() for x in (nothing.query, nothing.key, nothing.value)) and nothing.bias is None


@pytest.mark.parametrize("size", [(3, 6, 3, 2), (9, 6, 3, 2)], ids=str)
@pytest.mark.parametrize("names", ["", "bool", "float", "softcap", "slopes", "dropout", "everything"])
def test_gradients_equal_central_differences(names, size):
    """Of the engine's own results: no reference takes part."""
    everything = names == "everything"
    names = ["window", "bool", "float", *TERMS] if everything else names.split()
    size = (9, *size[1:]) if not everything and names and names[0] in ("softcap", "slopes", "float") else size
    case = make(names, size, lead=(1, 2), Hk=1, fill=everything)

    def loss(query=case.query, key=case.key, value=case.value, bias=None):
        call = dict(case.call)
        if bias is not None:
            parts = (part for part in call["attn_mask"].parts if part is not case.bias)
            call["attn_mask"] = masks.All([*parts, bias])
        cache = rv.attention_forward(query, key, value, **call)
        return (case.grad_output * cache.output).sum() + (case.grad_lse * cache.lse)[np.isfinite(cache.lse)].sum()

    got = rv.attention_backward(case.grad_output, case.forward(), case.grad_lse)
    for name in ("query", "key", "value"):
        measured = reference.central_differences(lambda x, name=name: loss(**{name: x}), getattr(case, name))
        np.testing.assert_allclose(getattr(got, name), measured, rtol=1e-6, atol=1e-7, err_msg=name)
    if case.bias is not None:
        hidden = np.isneginf(case.bias)
        measured = reference.central_differences(
            lambda x: loss(bias=np.where(hidden, -np.inf, x)), np.where(hidden, 0, case.bias)
        )
        np.testing.assert_allclose(got.bias, measured, rtol=1e-6, atol=1e-7, err_msg="bias")
