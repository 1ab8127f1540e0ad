"""The kernels' twins for NVIDIA GPUs, compiled by numba.cuda. Loaded only when an array on a GPU asks for them."""
