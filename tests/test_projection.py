"""The projections beneath the layers: one kernel for x W + b with heads split or joined, and for its gradients."""

import os
import subprocess
import sys

import numpy as np
import pytest
from cases import close
from ruvector_numba.kernels.simd import target

import ruvector_numba as rv
from ruvector_numba.plan import projection as plan
from ruvector_numba.projection import product

# (B, L, heads, channels a head, channels in): whole vectors and odd ones, one chunk of the sum and several
SIZES = [(1, 1, 1, 1, 1), (2, 13, 3, 20, 33), (3, 200, 2, 64, 300), (1, 7, 4, 16, 600), (2, 130, 5, 8, 17)]
DTYPES = [np.float64, np.float32]


def arrays(size, dtype):
    B, L, H, C, n = size
    rng = np.random.default_rng(size)
    x, w, b, dy = ((B, L, n), (n, H * C), (H * C,), (B, H, L, C))
    return [rng.standard_normal(shape).astype(dtype) for shape in (x, w, b, dy)]


def heads(x, H):
    """(B, L, H * C) as (B, H, L, C)"""
    return x.reshape(*x.shape[:2], H, -1).swapaxes(1, 2)


def agree(got, left, right, add=0.0):
    exact = left.astype(np.float64) @ right + add
    naive = (left @ right + np.asarray(add, left.dtype)) if left.dtype == np.float32 else None
    close("product", got, exact, naive, slack=16)


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
class TestProducts:
    def test_forward_splits_heads(self, size, dtype):
        B, L, H, C, n = size
        x, w, b, _ = arrays(size, dtype)
        out = np.full((B, H, L, C), np.nan, dtype)
        product(x[:, :, None], w.reshape(1, n, H, C), out.swapaxes(1, 2), b)
        agree(out.swapaxes(1, 2).reshape(B * L, -1), x.reshape(B * L, n), w, b)

    def test_gradient_of_the_input_joins_heads(self, size, dtype):
        B, L, H, C, n = size
        _, w, _, dy = arrays(size, dtype)
        dx = np.full((B, L, n), np.nan, dtype)
        product(dy.swapaxes(1, 2), w.reshape(1, n, H, C).transpose(2, 3, 0, 1), dx[:, :, None])
        agree(dx.reshape(B * L, n), dy.swapaxes(1, 2).reshape(B * L, -1), w.T)

    def test_gradients_of_the_weight_and_the_bias(self, size, dtype):
        B, L, H, C, n = size
        x, _, _, dy = arrays(size, dtype)
        dw, db = np.full((n, H * C), np.nan, dtype), np.full(H * C, np.nan, dtype)
        product(x[:, :, None].transpose(2, 3, 0, 1), dy.swapaxes(1, 2), dw.reshape(1, n, H, C), sums=db)
        rows = dy.swapaxes(1, 2).reshape(B * L, -1)
        agree(dw, x.reshape(B * L, n).T, rows)
        agree(db[None], np.ones((1, B * L), dtype), rows)


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_columns_and_rows_and_nothing_beside_them(dtype):
    """Tiles are two widths of whole vectors, and of rows four: what is left over, in out itself, lies in a frame."""
    rng = np.random.default_rng(0)
    lanes = target().lanes(np.dtype(dtype).itemsize)
    for J in [*range(1, 4 * lanes, 5), *(n * lanes for n in (1, 2, 3, 4, 5, 7, 13, 19, 31, 37, 49))]:
        for I, K in ((1, 40), (23, 130), (389, 64), (389, 300)):
            x, w, b = (rng.standard_normal(shape).astype(dtype) for shape in ((I, K), (K, J), (J,)))
            frame = np.full((I + 2, J + 2 * lanes), 7, dtype)
            out = frame[1:-1, lanes:-lanes]
            product(x[None, :, None], w[None, :, None], out[None, :, None], b)
            agree(out, x, w, b)
            found = out.copy()
            x[0] = np.nan
            with rv.threads(1):
                product(x[None, :, None], w[None, :, None], out[None, :, None], b)
            assert np.isnan(out[0]).all() and (out[1:] == found[1:]).all()
            out[...] = 7
            assert (frame == 7).all()


WITH_TILES = """
import dataclasses, sys
import pytest
import ruvector_numba.kernels.simd

chosen = dataclasses.replace(ruvector_numba.kernels.simd.target(), cols=int(sys.argv[1]))
for name in ("", ".target", ".kinds", ".emit", ".values"):
    sys.modules["ruvector_numba.kernels.simd" + name].target = lambda: chosen
wanted = "(any_number or heads_of_whole or adds_to) and not float64"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", wanted, sys.argv[2]]))
"""


@pytest.mark.parametrize("cols", sorted({2, 3, 4} - {target().cols}))
def test_tiles_of_other_cpus(cols):
    """As wide as those of AVX-512 and of NEON, or of SSE: which columns fill them differs."""
    command = [sys.executable, "-c", WITH_TILES, str(cols), __file__]
    environment = {**os.environ, "RUVECTOR_NUMBA_CACHE": "0"}  # its key is the CPU
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("C", [1, 2, 3, 5])
def test_heads_of_whole_vectors_and_batches_of_whole_tiles_or_not(C):
    C *= target().lanes(4)
    rng = np.random.default_rng(C)
    for B, L, H in ((3, 8, 5), (2, 9, 3), (5, 64, 7)):
        x, w = (rng.standard_normal(shape, dtype=np.float32) for shape in ((B, L, 48), (48, H * C)))
        out = np.full((B, H, L, C), np.nan, np.float32)
        product(x[:, :, None], w.reshape(1, 48, H, C), out.swapaxes(1, 2))
        agree(out, x[:, None], w.reshape(48, H, C).swapaxes(0, 1))


@pytest.mark.core
def test_rows_of_any_strides():
    x = np.random.default_rng(0).standard_normal((4, 60, 40))
    w = np.random.default_rng(1).standard_normal((20, 48))
    for view in (x[::2, ::3, ::2], x[::-1, ::-1, :20], np.broadcast_to(x[:, :1, :20], (4, 9, 20)), x.T[:20].T):
        view.flags.writeable = False
        out = np.empty((*view.shape[:2], 48))
        product(view[:, :, None], w.T.copy().T.reshape(1, 20, 6, 8), out.reshape(*view.shape[:2], 6, 8))
        close("product", out, view @ w)


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_in_company_and_on_any_number_of_threads(dtype):
    x, w, b, _ = arrays((4, 300, 2, 64, 256), dtype)

    def project(rows):
        out = np.empty((*rows.shape[:2], 128), dtype)
        product(rows[:, :, None], w[None].reshape(1, 256, 1, 128), out[:, :, None], b)
        return out

    whole = project(x)
    with rv.threads(1):
        assert project(x).tobytes() == whole.tobytes()
    for b0, l0, l1 in ((0, 0, 1), (3, 7, 21), (2, 190, 300)):
        part = project(x[b0 : b0 + 1, l0:l1])
        assert part.tobytes() == whole[b0 : b0 + 1, l0:l1].tobytes()


@pytest.mark.core
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17])
def test_few_rows_are_those_of_many_to_the_bit(rows):
    """Up to sixteen go another way: past weights where they lie, of one layer or of three side by side."""
    rng = np.random.default_rng(rows)
    for K, names, J in ((7, 1, 3), (300, 1, 700), (256, 3, 512), (64, 3, 40), (530, 3, 128)):
        x, w, b = (rng.standard_normal(n, dtype=np.float32) for n in ((40, K), (names, K, J), (names * J,)))
        right = w[None].transpose(0, 2, 1, 3)

        def project(x, right=right, b=b, J=J):
            made = np.full((1, len(x), len(b) // J, J), np.nan, np.float32)
            product(x[None, :, None], right, made, b)
            return made[0]

        with rv.threads(1):
            whole = project(x)
        agree(whole.reshape(40, -1), x, w.swapaxes(0, 1).reshape(K, -1), b)
        for some in (x[:rows], np.asfortranarray(x)[:rows]):
            assert project(some).tobytes() == whole[:rows].tobytes()


@pytest.mark.parametrize("names, J", [(2, 640), (3, 512), (1, 700)])
def test_more_threads_than_this_machine_has_change_no_bit(names, J, monkeypatch):
    """Tasks are as large as the number of threads says, and whether rows count as few does not depend on it."""
    rng = np.random.default_rng(J)
    x, dy = rng.standard_normal((600, 7), dtype=np.float32), rng.standard_normal((names, 600, J), dtype=np.float32)
    found = set()
    for threads in (1, 2, 3, 5, 8, 40):
        monkeypatch.setattr(plan.team, "threads", lambda threads=threads: threads)
        dw, db = np.empty((1, 7, names, J), np.float32), np.empty(names * J, np.float32)
        product(x.T[None, :, None], dy[None].transpose(0, 2, 1, 3), dw, sums=db)
        found.add(dw.tobytes() + db.tobytes())
    assert len(found) == 1


@pytest.mark.core
@pytest.mark.parametrize("J", [5, 3 * target().lanes(4), 11 * target().lanes(4)])
def test_it_adds_to_what_is_there(J):
    rng = np.random.default_rng(J)
    for I, K in ((1, 0), (9, 33), (300, 700), (6, 20_000)):
        x, w, out = (rng.standard_normal(shape, dtype=np.float32) for shape in ((I, K), (K, J), (I, J)))
        before = out.copy()
        product(x[None, :, None], w[None, :, None], out[None, :, None], adds=True)
        agree(out, x, w, before)


def test_nothing_to_do():
    w = np.ones((1, 5, 1, 3))
    product(np.ones((0, 4, 1, 5)), w, np.empty((0, 4, 1, 3)))
    db, dw = np.full(3, np.nan), np.full((1, 5, 1, 3), np.nan)
    product(np.ones((0, 4, 1, 5)).transpose(2, 3, 0, 1), np.ones((0, 4, 1, 3)), dw, sums=db)
    assert not dw.any() and not db.any()
    out = np.full((1, 4, 2, 3), np.nan)
    product(np.ones((1, 4, 1, 0)), np.ones((1, 0, 2, 3)), out, np.arange(6.0))
    assert (out == np.arange(6.0).reshape(2, 3)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [(1 << 14) - 1, 1 << 14, 20_001])
def test_long_sums_in_parts(K, dtype):
    rng = np.random.default_rng(K)
    x, dy = (rng.standard_normal((K, n)).astype(dtype) for n in (5, 70))
    found = []
    for n in (1, 2):
        with rv.threads(n):
            dw, db = np.full((5, 70), np.nan, dtype), np.full(70, np.nan, dtype)
            product(x.T[None, :, None], dy[None, :, None], dw[None, :, None], sums=db)
        found.append((dw, db))
    agree(found[0][0], x.T, dy)
    agree(found[0][1][None], np.ones((1, K), dtype), dy)
    assert all(np.array_equal(one, two) for one, two in zip(*found, strict=True))


def test_parts_take_little_memory():
    """Features as wide as a bag of words, of many nodes: the sums are long, and the matrix is large."""
    left, out = (np.broadcast_to(np.float32(0), shape) for shape in ((1, 100_000, 1, 50_000), (1, 100_000, 1, 64)))
    assert plan.parts(left, out) == 1
    left, out = (np.broadcast_to(np.float32(0), shape) for shape in ((1, 64, 1, 1_000_000), (1, 64, 1, 512)))
    assert 1 < plan.parts(left, out) and plan.parts(left, out) * out.size <= 1 << 20
