"""Exact attention on NumPy arrays, forward and backward, compiled by Numba.

>>> import numpy as np, ruvector_numba as rv
>>> query = key = value = np.random.default_rng(0).standard_normal((2, 8, 100, 64), dtype=np.float32)
>>> rv.scaled_dot_product_attention(query, key, value, is_causal=True).shape
(2, 8, 100, 64)

One alphabet, in names and in shapes:

    B batch      H query heads      Hk key heads      G = H // Hk      Lq, Lk lengths      D, Dv channels
    b h i j d    indices: i is a query, j a key
    s score      p probability      m row maximum     l row sum        lse = log(sum over keys of exp(s))
    a gradient is d and a name: dq is that of the query

    N nodes      Ns, Nt sources and targets      E edges      H heads      C channels of a head
    e j -> i     edge e goes from source j to target i, which attends to j
    indptr       where the edges of each target begin      indices      the source of each edge

Arrays are (..., H, L, D), on graphs (N, H, C).
"""

import pathlib
from typing import TYPE_CHECKING

# In a checkout the kernels lie beside this folder; an installed package holds them.
if not pathlib.Path(__path__[0], "kernels").is_dir():
    __path__.append(str(pathlib.Path(__path__[0]).parent))

from . import functional, masks, optim
from .builder import AttentionBuilder, GraphAttentionBuilder
from .config import AttentionConfig, GraphAttentionConfig, SparseAttentionConfig
from .dense import attention_backward, attention_forward, merge, scaled_dot_product_attention
from .errors import (
    AttentionError,
    DimensionMismatchError,
    GraphStructureError,
    InvalidConfigError,
    InvalidInputError,
    InvalidMaskError,
    MatrixOperationError,
    NumericalInstabilityError,
    OutOfMemoryError,
    SparseMatrixError,
    TrainingError,
)
from .graphs.edge_softmax import edge_softmax, edge_softmax_backward
from .graphs.gat import GAT, GATv2
from .graphs.graph import CSRGraph
from .graphs.hgt import HGT
from .graphs.neighbors import (
    NeighborCache,
    NeighborGradients,
    neighbor_attention,
    neighbor_attention_backward,
    neighbor_attention_forward,
)
from .graphs.results import GraphCache, GraphGradients, HeteroCache, HeteroGradients
from .graphs.sampling import NeighborBatches, NeighborSample, neighbor_batches, sample_neighbors
from .graphs.transformer import GraphTransformer
from .multi_head import KeyValueCache, MultiHeadAttention
from .parameters import ParameterSet, Trainable
from .protocols import Attention, GeometricAttention, GraphAttention, SparseAttention, TrainableAttention
from .results import AttentionCache, AttentionGradients, InputGradients
from .runtime import get_num_threads, info, set_num_threads, threads, warmup
from .scaled_dot_product import ScaledDotProductAttention

__all__ = [
    "GAT",
    "HGT",
    "Attention",
    "AttentionBuilder",
    "AttentionCache",
    "AttentionConfig",
    "AttentionError",
    "AttentionGradients",
    "CSRGraph",
    "DimensionMismatchError",
    "GATv2",
    "GeometricAttention",
    "GraphAttention",
    "GraphAttentionBuilder",
    "GraphAttentionConfig",
    "GraphCache",
    "GraphGradients",
    "GraphStructureError",
    "GraphTransformer",
    "HeteroCache",
    "HeteroGradients",
    "InputGradients",
    "InvalidConfigError",
    "InvalidInputError",
    "InvalidMaskError",
    "KeyValueCache",
    "MatrixOperationError",
    "MultiHeadAttention",
    "NeighborBatches",
    "NeighborCache",
    "NeighborGradients",
    "NeighborSample",
    "NumericalInstabilityError",
    "OutOfMemoryError",
    "ParameterSet",
    "ScaledDotProductAttention",
    "SparseAttention",
    "SparseAttentionConfig",
    "SparseMatrixError",
    "Trainable",
    "TrainableAttention",
    "TrainingError",
    "attention_backward",
    "attention_forward",
    "edge_softmax",
    "edge_softmax_backward",
    "functional",
    "get_num_threads",
    "info",
    "interop",
    "masks",
    "merge",
    "neighbor_attention",
    "neighbor_attention_backward",
    "neighbor_attention_forward",
    "neighbor_batches",
    "optim",
    "sample_neighbors",
    "scaled_dot_product_attention",
    "set_num_threads",
    "threads",
    "warmup",
]
__version__ = "0.1.0"

if TYPE_CHECKING:  # a type checker shall know what is not there
    from . import interop as interop
else:

    def __getattr__(name):
        if name == "interop":  # for those who have the other libraries
            import importlib

            return importlib.import_module(".interop", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])  # without the modules that importing has brought
