"""The GPU's own instructions by name: PTX, or what stands for it on Numba's simulator."""

from .jit import SIMULATED

if SIMULATED:
    from .ptx_simulated import *  # noqa: F403
    from .ptx_simulated import __all__
else:
    from .ptx import *  # noqa: F403
    from .ptx import __all__  # noqa: F401
