"""Arrays on a GPU: `arrays` knows them, and each other file does what its namesake one floor up does on a CPU.

Nothing of CUDA is imported before the first array that lies on a GPU: the functions that compute load the kernels'
twins in `kernels.cuda` and their plans when they are called.
"""

from .arrays import (
    GpuArray,
    Library,
    Space,
    any_on_gpu,
    concerns,
    contiguous_strides,
    default,
    describe,
    floats,
    is_on_gpu,
    kept,
    library,
    moved,
    part,
    problem,
    shadow,
    size,
    to_numpy,
    uploaded,
    view,
)

__all__ = [
    "GpuArray",
    "Library",
    "Space",
    "any_on_gpu",
    "concerns",
    "contiguous_strides",
    "default",
    "describe",
    "floats",
    "is_on_gpu",
    "kept",
    "library",
    "moved",
    "part",
    "problem",
    "shadow",
    "size",
    "to_numpy",
    "uploaded",
    "view",
]
