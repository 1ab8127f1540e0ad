"""Multi-head attention layers that test files share: of few channels, with biases that are not 0."""

import numpy as np

import ruvector_numba as rv

DTYPES = [np.float64, np.float32]


def layer(d_model=24, num_heads=3, seed=0, kdim=None, vdim=None, dtype=np.float64, **settings):
    config = rv.AttentionConfig(d_model=d_model, num_heads=num_heads, **settings)
    made = rv.MultiHeadAttention(config, seed, kdim, vdim, dtype=dtype)
    if config.use_bias:  # they begin as 0, which hides mistakes
        rng = np.random.default_rng(9)
        biases = {name: rng.standard_normal(d_model).astype(dtype) for name in ("b_q", "b_k", "b_v", "b_o")}
        made.set_parameters({**made.parameters, **biases})
    return made


def draw(Lq=9, Lk=13, d=24, kdim=None, vdim=None, B=2, dtype=np.float64, seed=0):
    rng = np.random.default_rng([Lq, Lk, seed])
    shapes = (Lq, d), (Lk, kdim or d), (Lk, vdim or d)
    return [rng.standard_normal((B, *shape)).astype(dtype) for shape in shapes]


def agrees(got, exact, dtype):
    np.testing.assert_allclose(got, exact, rtol=0, atol={np.float64: 2e-13, np.float32: 5e-6}[dtype] * abs(exact).max())
