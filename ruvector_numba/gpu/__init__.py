"""Arrays on a GPU: `arrays` knows them, and the other files do with them what the package does on a CPU.

Nothing of CUDA is imported before the first array that lies on a GPU: the functions that compute load the kernels'
twins in `kernels.cuda` and their plans when they are called.
"""

from .arrays import (
    GpuArray,
    Library,
    Space,
    any_on_gpu,
    contiguous_strides,
    default,
    describe,
    floats,
    is_on_gpu,
    library,
    part,
    problem,
    shadow,
    view,
)
from .moving import arrived, concerns, home, kept, moved, to_numpy, uploaded

__all__ = [
    "GpuArray",
    "Library",
    "Space",
    "any_on_gpu",
    "arrived",
    "concerns",
    "contiguous_strides",
    "default",
    "describe",
    "floats",
    "home",
    "is_on_gpu",
    "kept",
    "library",
    "moved",
    "part",
    "problem",
    "shadow",
    "to_numpy",
    "uploaded",
    "view",
]
