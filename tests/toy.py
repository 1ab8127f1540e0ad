"""The smallest layer that can be trained: what `Trainable` needs of a layer, and nothing of attention."""

import numpy as np

from ruvector_numba.parameters import ParameterSet, Trainable


class Line(Trainable):
    """x @ w + b, with w of (2, 2) and one number b."""

    def __init__(self, dtype=np.float32, seed=0):
        rng = np.random.default_rng(seed)
        w, b = rng.standard_normal((2, 2)), rng.standard_normal(1)
        self._parameters = ParameterSet({"w": w.astype(dtype), "b": b.astype(dtype)})

    def loss(self, x, y):
        """The mean square error and its gradients."""
        p = self.parameters
        error = x @ p["w"] + p["b"] - y
        slope = 2 * error / error.size
        return np.mean(error**2), {"w": x.T @ slope, "b": np.sum(slope, keepdims=True).reshape(1)}


def state(layer):
    """All that a layer is, to the bit."""
    p = layer.parameters
    return p.dtype, tuple(p.shapes.items()), p.flat.tobytes()
