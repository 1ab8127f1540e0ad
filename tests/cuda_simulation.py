"""Arrays on Numba's simulator, for tests of the GPU's kernels; skips them where it is not on.

NUMBA_ENABLE_CUDASIM=1 must be set before Numba is imported, so these tests run in a process of their own.
"""

import numpy as np
import pytest

numba = pytest.importorskip("numba")
pytest.importorskip("numba_cuda")
if not numba.config.ENABLE_CUDASIM:
    pytest.skip("NUMBA_ENABLE_CUDASIM=1 is not set", allow_module_level=True)
pytest.importorskip("greenlet")

import lockstep  # noqa: F401 it replaces the simulator's threads
from numba import cuda

from ruvector_numba import gpu


def space():
    return gpu.Space(gpu.default())


def values(x, element):
    """Numbers rounded to an element, as they are stored."""
    if element != "bfloat16":
        return np.asarray(x, element)
    import ml_dtypes

    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16)


def unbits(x, element):
    """What is stored, as float64."""
    return np.asarray(x).astype(np.float64)


def there(x, element="float32"):
    """An array of NumPy as one on the simulated GPU."""
    return gpu.default().view(cuda.to_device(x))
