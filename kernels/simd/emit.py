"""Instructions that several values are made of. `b` is the builder of a function's LLVM code."""

from llvmlite import ir

from . import rounding
from .kinds import I16, I32, I64
from .target import CHECKED, halves, target


def count(n):
    return ir.Constant(I64, n)


def fill(vector, value):
    return ir.Constant(vector, [value] * vector.count)


def splat(b, scalar, lanes):
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    one = b.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def call(b, name, result, *args):
    """Call the LLVM intrinsic `name`, declaring it on first use."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), args)


_NAMES = {ir.FloatType(): "f32", ir.DoubleType(): "f64", I16: "i16"}


def suffix(vector):
    return f".v{vector.count}{_NAMES[vector.element]}"


def fma(b, x, y, z):
    if target().fma:
        return call(b, "llvm.fma" + suffix(x.type), x.type, x, y, z)
    return b.fadd(b.fmul(x, y), z)  # without the instruction, llvm.fma is a library call for each lane


def dot(b, x, y, z):
    """z + the products of both bfloat16 numbers in each word of x and y: one instruction, or two multiply-adds.

    The instruction takes subnormal numbers for 0.
    """
    if halves().bfloat16:
        return rounding.pairs_of_bfloat16(b, "dpbf16ps", z, y, x, result=z.type)
    floats = z.type
    for half in (lambda w: b.shl(w, fill(w.type, 16)), lambda w: b.and_(w, fill(w.type, 0xFFFF0000))):
        z = fma(b, b.bitcast(half(x), floats), b.bitcast(half(y), floats), z)
    return z


def at(b, pointer, offset, n):
    """The address of pointer[offset], from which `n` elements may be touched."""
    if not CHECKED:
        return b.gep(pointer, [offset])
    here, first, end, report = (b.extract_value(pointer, i) for i in range(4))
    place = b.gep(here, [offset])
    start, stop = b.ptrtoint(place, I64), b.ptrtoint(b.gep(place, [n]), I64)
    low = b.icmp_unsigned("<", start, b.ptrtoint(first, I64))
    bad = b.and_(b.or_(low, b.icmp_unsigned(">", stop, b.ptrtoint(end, I64))), b.icmp_signed(">", n, count(0)))
    b.store(b.or_(b.load(report), b.zext(bad, I64)), report)
    return b.select(bad, first, place)


def load_one(b, pointer, offset):
    place = at(b, pointer, offset, count(1))
    half = place.type.pointee
    if not rounding.is_half(half):
        return b.load(place)
    return rounding.widened(b, b.load(b.bitcast(place, I16.as_pointer())), half)


def store_one(b, value, pointer, offset):
    place = at(b, pointer, offset, count(1))
    if rounding.is_half(place.type.pointee):
        value, place = rounding.rounded(b, value, place.type.pointee), b.bitcast(place, I16.as_pointer())
    b.store(value, place)


def _lying(place, vector):
    """What the vector is made of in memory: element type, bytes in one, and which half type it is, if any."""
    kind = place.type.pointee
    return (I16, 2, kind) if rounding.is_half(kind) else (vector.llvm.element, vector.element.bitwidth // 8, None)


def load(b, pointer, offset, vector):
    place = at(b, pointer, offset, count(vector.lanes))
    element, size, half = _lying(place, vector)
    value = b.load(b.bitcast(place, ir.VectorType(element, vector.lanes).as_pointer()))
    value.align = size
    return rounding.widened(b, value, half) if half else value


def store(b, value, pointer, offset, vector):
    place = at(b, pointer, offset, count(vector.lanes))
    element, size, half = _lying(place, vector)
    value = rounding.rounded(b, value, half) if half else value
    b.store(value, b.bitcast(place, ir.VectorType(element, vector.lanes).as_pointer())).align = size


def masked(b, name, pointer, offset, vector, live, *value, is_raw=False):
    """Load (0 elsewhere) or store only the first `live` lanes; a raw load leaves halves as they lie."""
    # Numbers as wide as the elements: one compare makes a mask. Of 64 bits a store was twice as many instructions.
    number = I64 if vector.element.bitwidth == 64 else I32
    numbers = ir.Constant(ir.VectorType(number, vector.lanes), list(range(vector.lanes)))
    there = b.select(b.icmp_signed("<", live, count(vector.lanes)), live, count(vector.lanes))
    there = there if number == I64 else b.trunc(there, I32)
    mask = b.icmp_signed("<", numbers, splat(b, there, vector.lanes))
    place = at(b, pointer, offset, live)
    element, size, half = _lying(place, vector)
    kind = ir.VectorType(element, vector.lanes)
    place, align = b.bitcast(place, kind.as_pointer()), ir.Constant(I32, size)
    full = f"llvm.masked.{name}{suffix(kind)}.p0"
    if name == "load":
        found = call(b, full, kind, place, align, mask, ir.Constant(kind, None))
        return rounding.widened(b, found, half) if half and not is_raw else found
    value = [rounding.rounded(b, x, half) if half else x for x in value]
    return call(b, full, ir.VoidType(), *value, place, align, mask)


def whole(b, x):
    """Numbers of 32 bits as AVX rounds them to whole ones, NaN to the lowest; None where that is not to be had."""
    kind = ir.VectorType(I32, x.type.count)
    if x.type.element != ir.FloatType() or target().vector_bytes < 32 or kind.count not in (8, 16):
        return None
    if kind.count == 8:
        return call(b, "llvm.x86.avx.cvt.ps2dq.256", kind, x)
    everywhere, as_set = ir.Constant(ir.IntType(16), -1), ir.Constant(I32, 4)  # lanes, and the mode of rounding
    return call(b, "llvm.x86.avx512.mask.cvtps2dq.512", kind, x, ir.Constant(kind, None), everywhere, as_set)


def unit(cx):
    return cx.get_dummy_value()
