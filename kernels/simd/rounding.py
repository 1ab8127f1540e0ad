"""float16 and bfloat16 as they lie in memory, to float32 and back: to the nearest, even where two are as near.

Each works on one number or a vector of them. Nothing here asks for an instruction that the target may lack: LLVM makes
a call of a function that is not there of an unknown conversion of float16, and the process dies.
"""

from llvmlite import ir

from .kinds import I16, I32, LLVM, bfloat16
from .target import halves

F16, F32 = ir.HalfType(), ir.FloatType()


class _Bfloat(ir.Type):
    """LLVM's own type of bfloat16, which llvmlite has no name for: the operands of its instructions."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _Bfloat)

    def __hash__(self):
        return hash(_Bfloat)


def is_half(kind):
    return kind == F16 or kind == LLVM[bfloat16]


def _as(x, element):
    """The type of as many `element`s as x has."""
    return ir.VectorType(element, x.type.count) if isinstance(x.type, ir.VectorType) else element


def _fill(kind, value):
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def widened(b, bits, kind):
    """float32 from 16 bits of the half type `kind`; exact"""
    words = _as(bits, I32)
    if kind != F16:
        return b.bitcast(b.shl(b.zext(bits, words), _fill(words, 16)), _as(bits, F32))
    if halves().float16:
        return b.fpext(b.bitcast(bits, _as(bits, F16)), _as(bits, F32))
    return _widened_float16(b, b.zext(bits, words), words, _as(bits, F32))


def rounded(b, x, kind):
    """16 bits of the half type `kind` from float32"""
    words = _as(x, I32)
    if kind != F16:
        if halves().bfloat16 and words != I32 and words.count == 16:  # takes subnormal numbers for 0
            return b.bitcast(b.fptrunc(x, _as(x, _Bfloat())), _as(x, I16))
        return b.trunc(_rounded_bfloat16(b, x, words), _as(x, I16))
    if halves().float16:
        return b.bitcast(b.fptrunc(x, _as(x, F16)), _as(x, I16))
    return b.trunc(_rounded_float16(b, x, words), _as(x, I16))


def zipped(b, low, high):
    """Words: bfloat16 of `low` in their lower halves, of `high` in the upper."""
    words, n = _as(low, I32), low.type.count
    if halves().bfloat16 and n == 16:
        both = b.bitcast(pairs_of_bfloat16(b, "cvtne2ps2bf16", high, low), ir.VectorType(I16, 2 * n))
        order = ir.Constant(ir.VectorType(I32, 2 * n), [half * n + i for i in range(n) for half in (0, 1)])
        return b.bitcast(b.shuffle_vector(both, both, order), words)
    low, high = (b.zext(rounded(b, x, LLVM[bfloat16]), words) for x in (low, high))
    return b.or_(low, b.shl(high, _fill(words, 16)))


def pairs_of_bfloat16(b, instruction, *args, result=None):
    """An instruction of avx512_bf16: LLVM ends the process where the target lacks it."""
    assert halves().bfloat16
    name, pairs = f"llvm.x86.avx512bf16.{instruction}.512", ir.VectorType(_Bfloat(), 32)
    args = [b.bitcast(x, pairs) if x.type.element == I32 else x for x in args]
    kind = ir.FunctionType(result or pairs, [x.type for x in args])
    return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), args)


def _rounded_bfloat16(b, x, words):
    """Half a unit in the last place, less one bit where the last place is even, then cut; NaN stays NaN."""
    bits = b.bitcast(x, words)
    last = b.and_(b.lshr(bits, _fill(words, 16)), _fill(words, 1))
    nearest = b.add(bits, b.add(last, _fill(words, 0x7FFF)))
    quiet = b.or_(bits, _fill(words, 0x400000))
    return b.lshr(b.select(b.fcmp_unordered("uno", x, x), quiet, nearest), _fill(words, 16))


def _widened_float16(b, word, words, floats):
    """The bits moved to where a float32 has them, times 2**112 for the other bias: exact for subnormals too."""
    sign = b.shl(b.and_(word, _fill(words, 0x8000)), _fill(words, 16))
    moved = b.shl(b.and_(word, _fill(words, 0x7FFF)), _fill(words, 13))
    number = b.bitcast(b.fmul(b.bitcast(moved, floats), _fill(floats, 2.0**112)), words)
    is_special = b.icmp_unsigned(">=", moved, _fill(words, 0x7C00 << 13))  # infinity and NaN
    number = b.select(is_special, b.or_(moved, _fill(words, 0x7F800000)), number)
    return b.bitcast(b.or_(number, sign), floats)


def _rounded_float16(b, x, words):
    """Normal numbers by their bits, subnormal ones by an addition that leaves their bits at the end of the sum's."""
    bits = b.bitcast(x, words)
    sign = b.lshr(b.and_(bits, _fill(words, 0x80000000)), _fill(words, 16))
    size = b.and_(bits, _fill(words, 0x7FFFFFFF))
    last = b.and_(b.lshr(size, _fill(words, 13)), _fill(words, 1))
    normal = b.lshr(b.add(b.add(size, last), _fill(words, 0x0FFF - (112 << 23) & 0xFFFFFFFF)), _fill(words, 13))
    half = 126 << 23  # 0.5, whose last place is that of a subnormal float16
    sum = b.fadd(b.bitcast(size, x.type), b.bitcast(_fill(words, half), x.type))
    small = b.sub(b.bitcast(sum, words), _fill(words, half))
    found = b.select(b.icmp_unsigned("<", size, _fill(words, 113 << 23)), small, normal)
    infinite = b.icmp_unsigned(">=", size, _fill(words, 143 << 23))  # 2**16: what lies below may still be rounded to it
    found = b.select(infinite, _fill(words, 0x7C00), found)
    found = b.select(b.icmp_unsigned(">", size, _fill(words, 0x7F800000)), _fill(words, 0x7E00), found)
    return b.or_(found, sign)
