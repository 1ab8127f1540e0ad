"""The same results as torch.nn.functional.scaled_dot_product_attention, and the same gradients as its autograd."""

import itertools

import numpy as np
import pytest
from cases import draw

import ruvector_numba as rv

torch = pytest.importorskip("torch")

SIZES = [(1, 1, 1, 1), (5, 70, 16, 24), (41, 70, 16, 24), (70, 41, 40, 8)]
DTYPES = {np.float64: 1e-12, np.float32: 2e-5}


def both(size, dtype, Hk=4, mask=None, mask_needs_gradient=False, **call):
    """(outputs, gradients by name) of torch and of this package, called with the same arguments."""
    q, k, v = draw(*size, dtype, Hk=Hk)
    do = np.random.default_rng(1).standard_normal((2, 4, size[0], size[3])).astype(dtype)
    tensors = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    tensor_mask = None if mask is None else torch.tensor(mask, requires_grad=mask_needs_gradient)
    theirs = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=tensor_mask, **call)
    theirs.backward(torch.tensor(do))
    wanted = [theirs.detach().numpy(), *(x.grad.numpy() for x in tensors)]
    wanted += [tensor_mask.grad.numpy()] if mask_needs_gradient else []
    cache = rv.attention_forward(q, k, v, mask, **call)
    g = rv.attention_backward(do, cache)
    got = [cache.output, g.query, g.key, g.value] + ([g.bias] if mask_needs_gradient else [])
    return got, wanted


def agree(got, wanted, dtype):
    for name, x, w in zip(("output", "query", "key", "value", "bias"), got, wanted, strict=False):
        assert x.shape == w.shape and x.dtype == w.dtype
        np.testing.assert_allclose(x, w, rtol=0, atol=DTYPES[dtype] * max(1, np.abs(w).max()), err_msg=name)


every = pytest.mark.parametrize(("size", "dtype"), list(itertools.product(SIZES, DTYPES)))


@every
@pytest.mark.parametrize("scale", [None, 0.3, -1.0])
@pytest.mark.parametrize("is_causal", [False, True])
def test_causal_and_scale(size, dtype, is_causal, scale):
    agree(*both(size, dtype, is_causal=is_causal, scale=scale), dtype)


@every
@pytest.mark.parametrize("Hk", [1, 2])
def test_shared_heads(size, dtype, Hk):
    agree(*both(size, dtype, Hk=Hk, is_causal=True, enable_gqa=True), dtype)


def mask_shapes(size):
    Lq, Lk = size[:2]
    return (Lq, Lk), (2, 1, 1, Lk), (4, Lq, Lk), (2, 4, Lq, Lk), (1, 1, Lq, 1)


@every
@pytest.mark.parametrize("which", range(5))
def test_bool_masks(size, dtype, which):
    """True attends; rows that see nothing are 0 here and, in the versions that say so, in torch."""
    shape = mask_shapes(size)[which]
    mask = np.random.default_rng(2).random(shape) < 0.6
    mask[..., 0] = True
    agree(*both(size, dtype, mask=mask), dtype)


@every
@pytest.mark.parametrize("which", range(5))
def test_float_masks(size, dtype, which):
    shape = mask_shapes(size)[which]
    rng = np.random.default_rng(3)
    mask = rng.standard_normal(shape).astype(dtype)
    agree(*both(size, dtype, mask=mask, mask_needs_gradient=dtype == np.float64), dtype)
    mask[rng.random(shape) < 0.3] = -np.inf
    mask[..., 0] = 0
    agree(*both(size, dtype, mask=mask), dtype)


def test_a_row_that_sees_nothing():
    mask = np.ones((41, 70), bool)
    mask[7] = False
    got, wanted = both((41, 70, 16, 24), np.float64, mask=mask)
    assert not got[0][:, :, 7].any() and not got[1][:, :, 7].any()
    if np.isnan(wanted[0][:, :, 7]).any():
        pytest.skip("this torch makes such rows NaN")
    agree(got, wanted, np.float64)


def test_the_same_call_by_position():
    q, k, v = draw(41, 70, 16, 24, Hk=2)
    arguments = (None, 0.0, True, 0.2, True)
    got = rv.scaled_dot_product_attention(q, k, v, *arguments)
    *positional, scale, enable_gqa = arguments  # torch wants the last two by name
    tensors = map(torch.tensor, (q, k, v))
    wanted = torch.nn.functional.scaled_dot_product_attention(*tensors, *positional, scale=scale, enable_gqa=enable_gqa)
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-12)


def test_torch_tensors_are_arrays_too():
    q, k, v = draw(41, 70, 16, 24)
    tensors = [torch.tensor(x) for x in (q, k, v)]
    np.testing.assert_array_equal(rv.scaled_dot_product_attention(*tensors), rv.scaled_dot_product_attention(q, k, v))
