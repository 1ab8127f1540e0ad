"""Pointer, Vector and Mask: what can be done with them in a kernel."""

import functools
import operator

from llvmlite import ir
from numba import types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic

from . import emit, rounding
from .kinds import I32, LLVM, MaskType, PointerType, VectorType, bfloat16, vector_of
from .target import CHECKED, target


# --- Pointer -------------------------------------------------------------------------------------------------------
def _operator(symbol, accept):
    """Type `symbol` for the argument types that `accept` maps to a result type."""

    @infer_global(symbol)
    class Template(AbstractTemplate):
        def generic(self, args, kws):
            result = accept(*args)
            if result is not None:
                return signature(result, *args)


def _is(kind, *values):
    return all(isinstance(v, kind) for v in values)


_operator(operator.getitem, lambda p, i: p.element if _is(PointerType, p) and _is(types.Integer, i) else None)


@infer_global(operator.setitem)
class _SetItem(AbstractTemplate):
    def generic(self, args, kws):
        if _is(PointerType, args[0]) and _is(types.Integer, args[1]):
            return signature(types.none, args[0], types.intp, args[0].element)


@lower_builtin(operator.getitem, PointerType, types.Integer)
def _getitem(cx, b, sig, args):
    return emit.load_one(b, args[0], cx.cast(b, args[1], sig.args[1], types.intp))


@lower_builtin(operator.setitem, PointerType, types.Integer, types.Any)
def _setitem(cx, b, sig, args):
    emit.store_one(b, args[2], args[0], args[1])
    return emit.unit(cx)


_operator(operator.add, lambda p, n: p if _is(PointerType, p) and _is(types.Integer, n) else None)


@lower_builtin(operator.add, PointerType, types.Integer)
def _advance(cx, b, sig, args):
    n = cx.cast(b, args[1], sig.args[1], types.intp)
    if not CHECKED:
        return b.gep(args[0], [n])
    return b.insert_value(args[0], b.gep(b.extract_value(args[0], 0), [n]), 0)


def _as_elements(cx, b, kind, pointer):
    plain = LLVM[kind.stored].as_pointer()
    if not CHECKED:
        return b.bitcast(pointer, plain)
    out = ir.Constant(cx.get_value_type(kind), ir.Undefined)
    for i in range(4):
        part = b.extract_value(pointer, i)
        out = b.insert_value(out, b.bitcast(part, plain) if i < 3 else part, i)
    return out


def _reread(element):
    """An intrinsic: the same place, read as elements of another kind."""

    @intrinsic
    def reread(context, pointer):
        kind = PointerType(element)

        return kind(pointer), lambda cx, b, sig, args: _as_elements(cx, b, kind, args[0])

    return reread


as_indices, as_words, as_bfloat16 = (_reread(element) for element in (types.int64, types.uint32, bfloat16))


@intrinsic
def given_words(context, marker, pointer):
    """The same place as words, where the marker is not None: decided when compiling."""
    if marker is types.none:
        return pointer(marker, pointer), lambda cx, b, sig, args: args[1]
    kind = PointerType(types.uint32)
    return kind(marker, pointer), lambda cx, b, sig, args: _as_elements(cx, b, kind, args[1])


@intrinsic
def per_lane(context, pointer):
    """Multiply-adds that a product of its elements does in each lane: two of the halves in a word. Known early."""
    return types.intp(pointer), lambda cx, b, sig, args: emit.count(2 if pointer.element == types.uint32 else 1)


@intrinsic
def zipped(context, low, high):
    """Words of two bfloat16 numbers: low[i] in the lower half, high[i] in the upper."""
    kind = VectorType(types.uint32, low.lanes)
    return kind(low, high), lambda cx, b, sig, args: rounding.zipped(b, *args)


@intrinsic
def zipped_rows(context, pointer, first, second, live, both):
    """Words of pointer[first + i] and pointer[second + i], bfloat16, for the first `live` lanes, else 0.

    The upper halves are 0 unless `both`. Reads nothing beyond.
    """
    vector = vector_of(pointer.element)
    kind = VectorType(types.uint32, vector.lanes)

    def build(cx, b, sig, args):
        pointer, first, second, live, both = args
        low, high = (emit.masked(b, "load", pointer, x, vector, live, is_raw=True) for x in (first, second))
        low, high = (b.zext(x, kind.llvm) for x in (low, high))
        high = b.select(both, b.shl(high, emit.fill(kind.llvm, 16)), ir.Constant(kind.llvm, None))
        return b.or_(low, high)

    n = types.intp
    return kind(pointer, n, n, n, types.boolean), build


# --- Vector and Mask -----------------------------------------------------------------------------------------------
def _same(x, y):
    return x if isinstance(x, VectorType) and x == y else None


def _arithmetic(symbol, on_float, on_integer):
    _operator(symbol, _same)

    @lower_builtin(symbol, VectorType, VectorType)
    def lower(cx, b, sig, args):
        name = on_float if isinstance(sig.args[0].element, types.Float) else on_integer
        return getattr(b, name)(*args)


for _symbol, _on_float, _on_integer in (
    (operator.add, "fadd", "add"),
    (operator.sub, "fsub", "sub"),
    (operator.mul, "fmul", "mul"),
    (operator.truediv, "fdiv", None),
    (operator.xor, None, "xor"),
    (operator.rshift, None, "lshr"),
):
    _arithmetic(_symbol, _on_float, _on_integer)


def _comparison(symbol, sign):
    _operator(symbol, lambda x, y: MaskType(x.lanes) if _same(x, y) else None)

    @lower_builtin(symbol, VectorType, VectorType)
    def lower(cx, b, sig, args):
        is_float = isinstance(sig.args[0].element, types.Float)
        return (b.fcmp_ordered if is_float else b.icmp_unsigned)(sign, *args)  # false where either is NaN


for _symbol, _sign in (
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.eq, "=="),
):
    _comparison(_symbol, _sign)

_operator(operator.and_, lambda x, y: x if _is(MaskType, x, y) else None)
lower_builtin(operator.and_, MaskType, MaskType)(lambda cx, b, sig, args: b.and_(*args))


@intrinsic
def where(context, mask, then, otherwise):
    return then(mask, then, otherwise), lambda cx, b, sig, args: b.select(*args)


@intrinsic
def bits_at(context, like, pointer, offset):
    """A mask for vectors like `like`: lane k is bit k of the bytes from pointer[offset] on."""
    size, kind = max(1, like.lanes // 8), MaskType(like.lanes)

    def build(cx, b, sig, args):
        place = b.bitcast(emit.at(b, *args[1:], emit.count(size)), ir.IntType(8 * size).as_pointer())
        bits = b.load(place)
        bits.align = 1
        return b.bitcast(bits if like.lanes >= 8 else b.trunc(bits, ir.IntType(like.lanes)), kind.llvm)

    return kind(like, pointer, types.intp), build


@intrinsic
def load(context, pointer, offset):
    """pointer[offset : offset + lanes]"""
    vector = vector_of(pointer.element)
    return vector(pointer, types.intp), lambda cx, b, sig, args: emit.load(b, *args, vector)


@intrinsic
def zeros_of(context, pointer):
    """A vector of zeros, as many as one load from `pointer` gives."""
    vector = vector_of(pointer.element)
    return vector(pointer), lambda cx, b, sig, args: ir.Constant(vector.llvm, None)


@intrinsic
def load_live(context, pointer, offset, live):
    """The first `live` lanes, 0 in the others; reads nothing beyond them."""
    vector = vector_of(pointer.element)
    sig = vector(pointer, types.intp, types.intp)
    return sig, lambda cx, b, sig, args: emit.masked(b, "load", *args[:2], vector, args[2])


@intrinsic
def store(context, value, pointer, offset):
    def build(cx, b, sig, args):
        emit.store(b, *args, value)
        return emit.unit(cx)

    return types.void(value, pointer, types.intp), build


@intrinsic
def store_live(context, value, pointer, offset, live):
    """Store the first `live` lanes; touches nothing beyond them."""

    def build(cx, b, sig, args):
        value, pointer, offset, live = args
        emit.masked(b, "store", pointer, offset, sig.args[0], live, value)
        return emit.unit(cx)

    return types.void(value, pointer, types.intp, types.intp), build


@intrinsic
def prefetch(context, pointer, offset):
    """Ask for the cache line of pointer[offset], which need not be in the array."""

    def build(cx, b, sig, args):
        here = b.extract_value(args[0], 0) if CHECKED else args[0]
        place = b.bitcast(b.gep(here, [args[1]]), LLVM[types.uint8].as_pointer())
        read, keep, data = (ir.Constant(I32, n) for n in (0, 3, 1))
        emit.call(b, "llvm.prefetch.p0", ir.VoidType(), place, read, keep, data)
        return emit.unit(cx)

    return types.void(pointer, types.intp), build


@intrinsic
def splat(context, like, scalar):
    """`scalar` in every lane of a vector like `like`."""
    return like(like, like.element), lambda cx, b, sig, args: emit.splat(b, args[1], like.lanes)


@intrinsic
def fma(context, x, y, z):
    """x * y + z, rounded once where the CPU can."""
    return x(x, y, z), lambda cx, b, sig, args: emit.fma(b, *args)


@intrinsic
def at_least(context, x, floor):
    """max(x, floor); NaN in x stays NaN, which is why the order of the arguments matters."""
    return x(x, floor), lambda cx, b, sig, args: b.select(b.fcmp_ordered("<", *args), args[1], args[0])


@intrinsic
def polynomial(context, x, single, double):
    """c[0] + c[1] x + c[2] x**2 + ... by Horner's rule, with the coefficients for x's precision."""

    def build(cx, b, sig, args):
        which, table = (1, single) if x.element == types.float32 else (2, double)
        scalars = [b.extract_value(args[which], i) for i in range(table.count)]
        if x.element == types.float32:
            scalars = [b.fptrunc(c, ir.FloatType()) for c in scalars]
        *rest, value = [emit.splat(b, c, x.lanes) for c in scalars]
        for coefficient in reversed(rest):
            value = emit.fma(b, value, args[0], coefficient)
        return value

    return x(x, single, double), build


@intrinsic
def absolute(context, x):
    return x(x), lambda cx, b, sig, args: emit.call(b, "llvm.fabs" + emit.suffix(x.llvm), x.llvm, *args)


@intrinsic
def nearest(context, x):
    """x rounded to the nearest whole number."""
    return x(x), lambda cx, b, sig, args: emit.call(b, "llvm.rint" + emit.suffix(x.llvm), x.llvm, *args)


@intrinsic
def times_power_of_two(context, y, n):
    """y * 2**n for a normal result and whole n: n is added to the exponent's bits; NaN for NaN in y.

    Whatever n is of a NaN must leave it one. LLVM's conversion to whole numbers does not say: that of AVX makes the
    lowest one of it, of which nothing is left once it is shifted. Where that is not to be had, as for doubles with
    AVX2, 2**n is a number to multiply by, made of the last bits of n + 1.5 * 2**mantissa. (Doubles converted one by one
    took 1.02 to 1.04 times as long.)
    """
    mantissa, bias = (23, 127) if y.element == types.float32 else (52, 1023)

    def build(cx, b, sig, args):
        bits = ir.VectorType(ir.IntType(y.element.bitwidth), y.lanes)
        place = emit.fill(bits, mantissa)
        if (whole := emit.whole(b, args[1])) is not None:
            return b.bitcast(b.add(b.bitcast(args[0], bits), b.shl(whole, place)), y.llvm)
        shifted = b.fadd(args[1], emit.fill(y.llvm, 1.5 * 2.0**mantissa + bias))
        return b.fmul(args[0], b.bitcast(b.shl(b.bitcast(shifted, bits), place), y.llvm))

    return y(y, n), build


@intrinsic
def lanes_from(context, like, first):
    """first, first + 1, ... in the lanes of a vector like `like`"""

    def build(cx, b, sig, args):
        steps = ir.Constant(like.llvm, [float(i) for i in range(like.lanes)])
        return b.fadd(emit.splat(b, args[1], like.lanes), steps)

    return like(like, like.element), build


def _by_halves(b, value, lanes, join):
    """All lanes joined, always in the same order."""
    while lanes > 1:
        lanes //= 2
        low, high = (
            b.shuffle_vector(value, value, ir.Constant(ir.VectorType(I32, lanes), list(range(k, k + lanes))))
            for k in (0, lanes)
        )
        value = join(low, high)
    return b.extract_element(value, ir.Constant(I32, 0))


@intrinsic
def lane_sum(context, x):
    """The sum of all lanes, by halves."""
    return x.element(x), lambda cx, b, sig, args: _by_halves(b, args[0], x.lanes, b.fadd)


def _by_period(b, value, lanes, period, join):
    """Lanes that are `period` apart joined, a power of two or at least all lanes; each of them gets the result."""
    other = lanes // 2
    while other:
        places = ir.Constant(ir.VectorType(I32, lanes), [lane ^ other for lane in range(lanes)])
        joined = join(value, b.shuffle_vector(value, value, places))
        value = b.select(b.icmp_signed("<=", period, emit.count(other)), joined, value)
        other //= 2
    return value


@intrinsic
def period_sum(context, x, period):
    """In each lane the sum of all lanes that are a multiple of `period` from it."""
    return x(x, types.intp), lambda cx, b, sig, args: _by_period(b, args[0], x.lanes, args[1], b.fadd)


@intrinsic
def period_max(context, x, period):
    """In each lane the largest of all that are a multiple of `period` from it, none of them NaN."""

    def larger(b, one, other):
        return b.select(b.fcmp_ordered(">", one, other), one, other)

    def build(cx, b, sig, args):
        return _by_period(b, args[0], x.lanes, args[1], functools.partial(larger, b))

    return x(x, types.intp), build


@intrinsic
def lanes_of(context, pointer):
    """Elements in a vector, known when compiling."""
    return types.intp(pointer), lambda cx, b, sig, args: emit.count(target().lanes(pointer.element.bitwidth // 8))


@intrinsic
def line_of(context, pointer):
    """Elements in a cache line, known when compiling."""
    return types.intp(pointer), lambda cx, b, sig, args: emit.count(64 * 8 // pointer.element.bitwidth)


@intrinsic
def width_of(context, pointer):
    """Queries in a block, `COLS` vectors of them, known when compiling."""
    return types.intp(pointer), lambda cx, b, sig, args: emit.count(target().width(pointer.element.bitwidth // 8))
