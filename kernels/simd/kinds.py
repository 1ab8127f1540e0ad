"""The Numba types of pointers, vectors, masks, tiles and jobs, and their LLVM representation."""

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from .target import CHECKED, target

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))


class _Bfloat16(types.Type):
    """The upper half of a float32, which Numba does not know: lies in memory, and is never computed with."""

    bitwidth = 16


bfloat16 = _Bfloat16("bfloat16")
ARITHMETIC = {bfloat16: types.float32, types.float16: types.float32}  # what is computed with, where it is another
LLVM = {
    types.float32: ir.FloatType(),
    types.float16: ir.HalfType(),
    bfloat16: I16,
    types.float64: ir.DoubleType(),
    types.int64: I64,
    types.int32: I32,
    types.uint32: I32,
    types.uint8: I8,
}


class PointerType(types.Type):
    """To elements that lie in memory as `stored`: loads widen them to `element`, and stores round."""

    def __init__(self, stored):
        self.stored, self.element = stored, ARITHMETIC.get(stored, stored)
        super().__init__(name=f"pointer({stored}){' checked' * CHECKED}")


class VectorType(types.Type):
    def __init__(self, element, lanes):
        self.element, self.lanes = element, lanes
        self.llvm = ir.VectorType(LLVM[element], lanes)
        super().__init__(name=f"{element}x{lanes}")


class MaskType(types.Type):
    def __init__(self, lanes):
        self.lanes, self.llvm = lanes, ir.VectorType(I1, lanes)
        super().__init__(name=f"mask{lanes}")


class TileType(types.Type):
    def __init__(self, vector, rows, cols):
        self.vector, self.rows, self.cols = vector, rows, cols
        self.llvm = ir.LiteralStructType([vector.llvm] * (rows * cols))
        super().__init__(name=f"tile({rows}x{cols} {vector})")

    def index(self, row, col):
        """Which of the tile's values stands at (row, col); an axis of length 1 broadcasts."""
        return (row if self.rows > 1 else 0) * self.cols + (col if self.cols > 1 else 0)


class JobType(types.Type):
    """A struct of 8-byte slots behind a pointer; `fields` are (name, slot, type), none for an absent value."""

    def __init__(self, name, fields):
        self.fields = {field: (slot, kind) for field, slot, kind in fields}
        super().__init__(name=f"{name}{fields}")


@register_model(VectorType)
@register_model(MaskType)
@register_model(TileType)
class _ValueModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, fe_type.llvm)


@register_model(PointerType)
class _PointerModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        plain = LLVM[fe_type.stored].as_pointer()
        # checked: where it points, the array's first and one-past-last element, where to report
        checked = ir.LiteralStructType([plain, plain, plain, I64.as_pointer()])
        super().__init__(manager, fe_type, checked if CHECKED else plain)


@register_model(JobType)
class _JobModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, I64.as_pointer())


def vector_of(element, itemsize=None):
    """The vector of `element`s; `itemsize` sets the lanes to those of another element."""
    return VectorType(element, target().lanes(itemsize or element.bitwidth // 8))
