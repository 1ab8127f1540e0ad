"""What the command `ruvector-numba bench` and `perf/` measure with: `works` is what is done, `peers` by whom, and
`comparison` times them side by side, each in a process of its own.
"""
