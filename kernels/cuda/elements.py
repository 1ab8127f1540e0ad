"""The types of elements that the kernels for GPUs read and write. They compute in float32 whatever they read.

A number of Python beside a float32 makes Numba compute in float64, which GPUs do at a fraction of the rate: constants
are float32 too, and tests/gpu_assembly.py looks for instructions of float64.
"""

from typing import NamedTuple

from numba import types

from . import instructions as gpu


class Element(NamedTuple):
    """How a type is stored and how its products are made; 16 bits go through the tensor cores, two in a word."""

    storage: object
    itemsize: int
    widen: object
    pair: object
    multiply_add: object
    exponents: tuple  # of the one or two numbers in a word: the bits that are all set in infinity and NaN


ELEMENTS = {
    "float32": Element(types.float32, 4, None, None, None, (0x7F800000, 0x7F800000)),
    "float16": Element(
        types.uint16, 2, gpu.widen_float16, gpu.pair_float16, gpu.multiply_add_float16, (0x7C000000, 0x7C00)
    ),
    "bfloat16": Element(
        types.uint16, 2, gpu.widen_bfloat16, gpu.pair_bfloat16, gpu.multiply_add_bfloat16, (0x7F800000, 0x7F80)
    ),
}  # fmt: skip
STORAGE = {name: element.storage for name, element in ELEMENTS.items()} | {"bool": types.uint8, "uint8": types.uint8}
