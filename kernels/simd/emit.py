"""Instructions that several values are made of. `b` is the builder of a function's LLVM code."""

from llvmlite import ir

from .kinds import I32, I64
from .target import CHECKED, target


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


def suffix(vector):
    return f".v{vector.count}{'f32' if vector.element == ir.FloatType() else 'f64'}"


def fma(b, x, y, z):
    if target().fma:
        return call(b, "llvm.fma" + suffix(x.type), x.type, x, y, z)
    return b.fadd(b.fmul(x, y), z)  # without the instruction, llvm.fma is a library call for each lane


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


def load(b, pointer, offset, vector):
    value = b.load(b.bitcast(at(b, pointer, offset, count(vector.lanes)), vector.llvm.as_pointer()))
    value.align = vector.element.bitwidth // 8
    return value


def store(b, value, pointer, offset, vector):
    place = b.bitcast(at(b, pointer, offset, count(vector.lanes)), vector.llvm.as_pointer())
    b.store(value, place).align = vector.element.bitwidth // 8


def masked(b, name, pointer, offset, vector, live, *value):
    """Load (0 elsewhere) or store only the first `live` lanes."""
    numbers = ir.Constant(ir.VectorType(I64, vector.lanes), list(range(vector.lanes)))
    mask = b.icmp_signed("<", numbers, splat(b, live, vector.lanes))
    place = b.bitcast(at(b, pointer, offset, live), vector.llvm.as_pointer())
    align, full = ir.Constant(I32, vector.element.bitwidth // 8), f"llvm.masked.{name}{suffix(vector.llvm)}.p0"
    if name == "load":
        return call(b, full, vector.llvm, place, align, mask, fill(vector.llvm, 0.0))
    return call(b, full, ir.VoidType(), *value, place, align, mask)


def unit(cx):
    return cx.get_dummy_value()
