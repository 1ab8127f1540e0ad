"""Grids of the GPU's kernels keep to what CUDA allows, however many heads there are. Needs numba-cuda, and no GPU."""

import pytest

pytest.importorskip("numba_cuda")

from ruvector_numba.plan import cuda_dense, cuda_projection

MOST = 2**31 - 1, 65_535, 65_535


@pytest.mark.parametrize("matrices", [1, 65_535, 65_536, 65_537, 200_003, 3_000_000])
@pytest.mark.parametrize("splits", [1, 128])
def test_every_head_has_its_blocks(matrices, splits):
    x, y, z = grid = cuda_dense.grid(1000, 128, matrices, splits)
    assert all(0 < n <= most for n, most in zip(grid, MOST))
    assert x == 8 and z % splits == 0
    # as `head_of_block` deals them out: all of them, and no more than a layer's twice
    assert matrices <= y * (z // splits) < matrices + z // splits
    assert all(n <= most for n, most in zip(cuda_dense.merge_grid(cuda_dense.FEW_ROWS, matrices), MOST))


def test_what_has_a_row_for_each_query_and_head_lies_along_x():
    v = cuda_dense.in_pairs("float32", cuda_dense.HasTerms(False, False, False, False, False))
    for grid in (cuda_dense.weights_grid(v, 100, 70_000), cuda_dense.bias_grid(v, 9, 70_000)):
        assert 70_000 <= grid[0] <= MOST[0] and grid[1:] == (1, 1)


def test_long_sums_have_no_more_parts_than_a_grid_has_rows():
    def layout(*shape):
        return cuda_projection.Layout(shape, (shape[1] * shape[3], shape[3], shape[3], 1), 8)

    rows = 100_000_000  # one number of each is summed: room for a million parts
    p = cuda_projection.plan("float32", layout(1, 1, 1, rows), layout(1, rows, 1, 1), layout(1, 1, 1, 1), True)
    assert 1 < p.parts <= MOST[1] and p.grid[1] == p.parts
