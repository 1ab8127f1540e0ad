"""Neighbours: what else holds tensors, and how it works with this package. Nothing of theirs is loaded before use.

`load_torch_state` and `to_torch_state` exchange parameters with ``torch.nn.MultiheadAttention``, as arrays;
`load_pyg_state` and `to_pyg_state` do so with the layers on graphs of PyTorch Geometric;
``interop.torch.attention`` is attention on torch's tensors, with gradients for its autograd;
``interop.onnx`` has the operator Attention of ONNX, a backend for its models, and models whose attention runs here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .pyg import load_pyg_state, to_pyg_state
from .states import load_torch_state, to_torch_state

__all__ = ["load_pyg_state", "load_torch_state", "to_pyg_state", "to_torch_state"]

if TYPE_CHECKING:  # a type checker shall know what is not there
    from . import onnx as onnx
    from . import torch as torch
else:

    def __getattr__(name):
        if name in ("onnx", "torch"):
            try:
                return importlib.import_module(f".{name}", __name__)
            except ModuleNotFoundError as error:  # hasattr, inspect and help know AttributeError alone
                raise AttributeError(str(error)) from error
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "onnx", "torch"])
