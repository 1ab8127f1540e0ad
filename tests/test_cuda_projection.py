"""Projections on a GPU, on Numba's simulator, against NumPy in double precision."""

import cuda_simulation as simulation  # first: it skips all of this where the simulator is off
import numpy as np
import pytest

from ruvector_numba.gpu import projection as gpu_projection

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN is data here
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.5e-2}


def draw(rng, element, *shape):
    return simulation.values(rng.standard_normal(shape), element)


def product(left, right, shape, element="float32", bias=None, over_rows=False, order=(0, 1, 2, 3)):
    """out and the sums of right's columns; `order` is that of out's axes in memory."""
    space = simulation.space()
    made = simulation.values(np.full([shape[n] for n in order], 9), element)
    out = simulation.there(made)
    back = [order.index(n) for n in range(4)]
    view = out._replace(shape=shape, strides=tuple(out.strides[n] for n in back))
    room = simulation.values(np.zeros(right.shape[2] * right.shape[3]), element)
    sums = simulation.there(room) if over_rows else None
    given = None if bias is None else simulation.there(bias)
    gpu_projection.product(space, viewed(left), viewed(right), view, given, sums, over_rows)
    found = out.native.copy_to_host().transpose(back)
    return found, None if sums is None else sums.native.copy_to_host()


def viewed(x):
    """An array of NumPy of any strides, on the simulated GPU."""
    root = x
    while root.base is not None:
        root = root.base
    there = simulation.there(root)
    steps = tuple(s // x.itemsize for s in x.strides)
    return there._replace(start=(x.ctypes.data - root.ctypes.data) // x.itemsize, shape=x.shape, strides=steps)


def check(left, right, element="float32", bias=None, **options):
    shape = left.shape[:2] + right.shape[2:]
    got, sums = product(left, right, shape, element, bias, **options)
    a, b = (np.asarray(x, np.float64) for x in (left, right))
    wanted = np.tensordot(a, b, ([2, 3], [0, 1]))
    if bias is not None:
        wanted = wanted + np.asarray(bias, np.float64).reshape(shape[2:])
    size = np.abs(wanted).max(initial=1)
    np.testing.assert_allclose(got.astype(np.float64), wanted, rtol=0, atol=TOLERANCE[element] * size)
    if sums is not None:
        total = b.sum((0, 1)).reshape(-1)
        np.testing.assert_allclose(sums.astype(np.float64), total, rtol=0, atol=TOLERANCE[element] * 20)


@pytest.mark.parametrize("element", TOLERANCE)
def test_heads_are_split_and_joined(element):
    rng = np.random.default_rng(0)
    x, w, b = draw(rng, element, 2, 35, 1, 20), draw(rng, element, 1, 20, 3, 8), draw(rng, element, 24)
    check(x, w, element, b, order=(0, 2, 1, 3))  # x w + b, written in (B, H, L, C)
    heads = draw(rng, element, 2, 3, 35, 8).transpose(0, 2, 1, 3)
    check(heads, draw(rng, element, 3, 8, 1, 20), element)  # and read back from there
    check(x.transpose(2, 3, 0, 1), heads, element, over_rows=True)  # x^T dy, cut into parts
    check(heads, w.transpose(2, 3, 0, 1), element)  # dy w^T


@pytest.mark.parametrize("I, K, J", [(1, 1, 1), (70, 5, 3), (65, 33, 67), (3, 0, 5), (0, 4, 4)])
def test_any_sizes(I, K, J):
    rng = np.random.default_rng(1)
    bias = draw(rng, "float32", J)
    check(draw(rng, "float32", 1, I, 1, K), draw(rng, "float32", 1, K, 1, J), bias=bias)
    if I:
        x = draw(rng, "float32", 1, K, 1, I)
        check(x.transpose(2, 3, 0, 1), draw(rng, "float32", 1, K, 1, J), over_rows=True)


def test_any_strides_and_places():
    rng = np.random.default_rng(2)
    wide = draw(rng, "float32", 40, 50)
    for first in (0, 1, 4):
        x, w = wide[:, first : first + 16], wide[3:30:2, first : first + 16].T
        check(x[None, :, None, :], w[None, :, None, :])
        check(wide.T[None, first : first + 20, None, :], wide[None, :, None, first : first + 8])
    check(wide[None, :, None, ::3], wide[None, 3:20, None, ::2])


@pytest.mark.parametrize("element", ["float16", "bfloat16"])
def test_tensor_cores(element):
    rng = np.random.default_rng(6)
    x, w, b = draw(rng, element, 2, 40, 1, 72), draw(rng, element, 1, 72, 3, 8), draw(rng, element, 24)
    check(x, w, element, b, order=(0, 2, 1, 3))
    heads = draw(rng, element, 2, 3, 40, 8).transpose(0, 2, 1, 3)
    check(heads, w.transpose(2, 3, 0, 1), element)  # right is read by columns
    check(x.transpose(2, 3, 0, 1), heads, element, over_rows=True)  # and here left is
    check(x.transpose(2, 3, 0, 1), draw(rng, element, 1, 24, 2, 40).transpose(2, 3, 0, 1), element)  # both
    check(draw(rng, element, 1, 100, 1, 24), draw(rng, element, 1, 24, 1, 68)[..., :64], element)
    left, right = draw(rng, element, 1, 150, 1, 16), draw(rng, element, 1, 150, 1, 72)
    left[0, 140, 0, 3], left[0, 20] = np.nan, np.inf
    right[0, [140, 20]] = 0
    got, _ = product(left.transpose(2, 3, 0, 1), right, (1, 16, 1, 72), element, over_rows=True)
    clean, wide = (np.asarray(a[0, :, 0], np.float64) for a in (left, right))
    wanted = np.where(np.isfinite(clean), clean, 0).T @ wide
    np.testing.assert_allclose(got[0, :, 0].astype(np.float64), wanted, atol=TOLERANCE[element] * 40)


def test_a_layer_and_its_gradients():
    rng = np.random.default_rng(3)
    x, w, b, dy = (draw(rng, "float32", *shape) for shape in ((150, 12), (20, 12), (20,), (150, 20)))
    space, there = simulation.space(), simulation.there
    made = gpu_projection.linear(space, there(x), there(w), there(b))
    found = gpu_projection.linear_backward(space, there(dy), there(x), there(w))
    for got, wanted in zip((made, *found), (x @ w.T + b, dy @ w, dy.T @ x, dy.sum(0))):
        np.testing.assert_allclose(got.native.copy_to_host(), wanted, atol=2e-5)
    found = gpu_projection.linear_backward(space, there(dy), there(x), there(w), found[0], found[1:])
    for got, wanted in zip(found, (dy @ w, dy.T @ x, dy.sum(0))):
        np.testing.assert_allclose(got.native.copy_to_host(), 2 * wanted, atol=4e-5)


def test_a_row_with_gradient_zero_leaves_no_nan_in_the_weights():
    rng = np.random.default_rng(4)
    x, dy = draw(rng, "float32", 1, 100, 1, 8), draw(rng, "float32", 1, 100, 1, 12)
    x[0, 70, 0, 3], x[0, 5] = np.nan, np.inf
    dy[0, [70, 5]] = 0
    got, _ = product(x.transpose(2, 3, 0, 1), dy, (1, 8, 1, 12), over_rows=True)
    clean = np.where(np.isfinite(x), x, 0)
    np.testing.assert_allclose(got[0, :, 0], clean[0, :, 0].T @ dy[0, :, 0], atol=1e-5)
    dy[0, 70] = 1
    got, _ = product(x.transpose(2, 3, 0, 1), dy, (1, 8, 1, 12), over_rows=True)
    assert np.isnan(got[0, 3]).all() and np.isfinite(got[0, [0, 1, 2, 4, 5, 6, 7]]).all()


def test_a_row_has_the_same_bits_in_any_batch():
    rng = np.random.default_rng(5)
    x, w = draw(rng, "float32", 1, 150, 1, 20), draw(rng, "float32", 1, 20, 1, 12)
    whole, _ = product(x, w, (1, 150, 1, 12))
    part, _ = product(x[:, 70:110], w, (1, 40, 1, 12))
    np.testing.assert_array_equal(whole[:, 70:110], part)


def test_parts_are_joined_where_there_are_more_than_int32_counts(monkeypatch):
    from types import SimpleNamespace as Described

    from ruvector_numba.kernels.cuda import projection as kernels

    class Far(dict):  # an array of which only what is written, or asked for, exists
        def __missing__(self, n):
            return np.float32(n % 1000)

    I, J, line = 100_000_000, 23, 24
    v = kernels.Variant("float32", 128, True, False, True, False, 1)
    out, i, j = Far(), I - 3, 7
    thread = i * line + j
    stub = Described(blockIdx=Described(x=np.int32(thread // 128)), threadIdx=Described(x=np.int32(thread % 128)))
    monkeypatch.setattr(kernels, "cuda", stub)
    sides = dict(left=None, right=None, out=kernels.Pairs(out, 0, J, 0, 1, I, J), bias=None, sums=None, part_sums=None)
    fields = dict.fromkeys(kernels.ProjectionJob._fields, 0) | sides | dict(parts=Far(), line=line, I=I, J=J, count=2)
    kernels.join.function(v)(kernels.ProjectionJob(**fields))
    assert out == {i * J + j: thread % 1000 + (I * line + thread) % 1000}
