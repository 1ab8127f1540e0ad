"""SIMD values for Numba: pointers, vectors, register tiles. The only file that knows LLVM.

    Pointer   where elements lie; p[i], p[i] = x and p + n count in elements
    Vector    one register of elements; + - * / and the functions below
    Mask      one truth value per lane; & and |
    Tile      rows x cols vectors: accumulators that live in registers
    Job       a kernel's arguments: a struct behind one pointer, read as attributes

To Numba all are ordinary values, so a kernel on them is plain Python: loops, and names from the paper. Addresses are
formed with `getelementptr` only (LLVM 22 miscompiles integer pointer arithmetic). Under NUMBA_BOUNDSCHECK=1 a pointer
carries the bounds of its array and every access is checked against them: slow, and the strongest test there is of the
promise to touch no byte outside an array.
"""

import functools
import operator
from dataclasses import dataclass

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
from numba.core.imputils import lower_builtin, lower_getattr_generic
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_getattr, infer_global, signature
from numba.extending import intrinsic, models, register_model

CHECKED = bool(config.BOUNDSCHECK)

_i1, _i8, _i32, _i64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
_LLVM = {
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
    types.int64: _i64,
    types.uint32: _i32,
    types.uint8: _i8,
}


# --- the target ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Target:
    """What Numba compiles for: bytes in a vector, whether x * y + z is one instruction, the largest tile that fits."""

    cpu: str
    vector_bytes: int
    fma: bool
    rows: int
    cols: int

    def lanes(self, itemsize: int) -> int:
        return self.vector_bytes // itemsize

    def width(self, itemsize: int) -> int:
        """Queries in a block: the lanes of one tile row."""
        return self.cols * self.lanes(itemsize)


@functools.cache
def target() -> Target:
    """Ask LLVM what a 16-lane multiply-add becomes (10 ms, once): the list of features may be empty, or the host's.

    4 x 4 vectors spill nothing with 32 registers (AVX-512, NEON); with AVX2's 16 they spill 16 times a step and 4 x 3
    never; 16 lanes on AVX2 would spill 70 times.
    """
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=1)
    v = "<16 x float>"
    text = machine.emit_assembly(
        llvm.parse_assembly(
            f"declare {v} @llvm.fma.v16f32({v}, {v}, {v})\n"
            f"define {v} @f({v} %a, {v} %b, {v} %c) {{"
            f" %r = call {v} @llvm.fma.v16f32({v} %a, {v} %b, {v} %c)\n ret {v} %r }}"
        )
    )
    if "%zmm" in text:
        return Target(cpu, 64, True, 4, 4)
    if "vfmadd" in text:
        return Target(cpu, 32, True, 4, 3)
    if "fmla" in text:
        return Target(cpu, 16, True, 4, 4)
    return Target(cpu, 16, False, 4, 2)


# --- types and their representation --------------------------------------------------------------------------------
class PointerType(types.Type):
    def __init__(self, element):
        self.element = element
        super().__init__(name=f"pointer({element}){' checked' * CHECKED}")


class VectorType(types.Type):
    def __init__(self, element, lanes):
        self.element, self.lanes = element, lanes
        self.llvm = ir.VectorType(_LLVM[element], lanes)
        super().__init__(name=f"{element}x{lanes}")


class MaskType(types.Type):
    def __init__(self, lanes):
        self.lanes, self.llvm = lanes, ir.VectorType(_i1, lanes)
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
        plain = _LLVM[fe_type.element].as_pointer()
        # checked: where it points, the array's first and one-past-last element, where to report
        checked = ir.LiteralStructType([plain, plain, plain, _i64.as_pointer()])
        super().__init__(manager, fe_type, checked if CHECKED else plain)


@register_model(JobType)
class _JobModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _i64.as_pointer())


# --- builders of instructions --------------------------------------------------------------------------------------
def _count(n):
    return ir.Constant(_i64, n)


def _fill(vector, value):
    return ir.Constant(vector, [value] * vector.count)


def _splat(b, scalar, lanes):
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    one = b.insert_element(undefined, scalar, ir.Constant(_i32, 0))
    return b.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_i32, lanes), [0] * lanes))


def _call(b, name, result, *args):
    """Call the LLVM intrinsic `name`, declaring it on first use."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), args)


def _suffix(vector):
    return f".v{vector.count}{'f32' if vector.element == ir.FloatType() else 'f64'}"


def _fma(b, x, y, z):
    if target().fma:
        return _call(b, "llvm.fma" + _suffix(x.type), x.type, x, y, z)
    return b.fadd(b.fmul(x, y), z)  # without the instruction, llvm.fma is a library call for each lane


def _at(b, pointer, offset, count):
    """The address of pointer[offset], from which `count` elements may be touched."""
    if not CHECKED:
        return b.gep(pointer, [offset])
    here, first, end, report = (b.extract_value(pointer, i) for i in range(4))
    place = b.gep(here, [offset])
    start, stop = b.ptrtoint(place, _i64), b.ptrtoint(b.gep(place, [count]), _i64)
    low = b.icmp_unsigned("<", start, b.ptrtoint(first, _i64))
    bad = b.and_(b.or_(low, b.icmp_unsigned(">", stop, b.ptrtoint(end, _i64))), b.icmp_signed(">", count, _count(0)))
    b.store(b.or_(b.load(report), b.zext(bad, _i64)), report)
    return b.select(bad, first, place)


def _load(b, pointer, offset, vector):
    value = b.load(b.bitcast(_at(b, pointer, offset, _count(vector.lanes)), vector.llvm.as_pointer()))
    value.align = vector.element.bitwidth // 8
    return value


def _store(b, value, pointer, offset, vector):
    place = b.bitcast(_at(b, pointer, offset, _count(vector.lanes)), vector.llvm.as_pointer())
    b.store(value, place).align = vector.element.bitwidth // 8


def _masked(b, name, pointer, offset, vector, live, *value):
    """Load (0 elsewhere) or store only the first `live` lanes."""
    numbers = ir.Constant(ir.VectorType(_i64, vector.lanes), list(range(vector.lanes)))
    mask = b.icmp_signed("<", numbers, _splat(b, live, vector.lanes))
    place = b.bitcast(_at(b, pointer, offset, live), vector.llvm.as_pointer())
    align, full = ir.Constant(_i32, vector.element.bitwidth // 8), f"llvm.masked.{name}{_suffix(vector.llvm)}.p0"
    if name == "load":
        return _call(b, full, vector.llvm, place, align, mask, _fill(vector.llvm, 0.0))
    return _call(b, full, ir.VoidType(), *value, place, align, mask)


def _unit(cx):
    return cx.get_dummy_value()


# --- Job: attributes -----------------------------------------------------------------------------------------------
@infer_getattr
class _JobAttributes(AttributeTemplate):
    key = JobType

    def generic_resolve(self, job, name):
        return job.fields[name][1] if name in job.fields else None


@lower_getattr_generic(JobType)
def _job_attribute(cx, b, job, value, name):
    slot, kind = job.fields[name]
    if kind is types.none:
        return cx.get_dummy_value()

    def read(i, as_type):
        x = b.load(b.bitcast(b.gep(value, [_count(i)]), as_type.as_pointer()))
        x.set_metadata("invariant.load", b.module.add_metadata([]))  # else every store might change a size
        return x

    if isinstance(kind, JobType):
        return b.gep(value, [_count(slot)])
    if not isinstance(kind, PointerType):
        return read(slot, cx.get_value_type(kind))
    plain = _LLVM[kind.element].as_pointer()
    if not CHECKED:
        return read(slot, plain)
    checked = ir.Constant(cx.get_value_type(kind), ir.Undefined)
    for i, part in enumerate((plain, plain, plain, _i64.as_pointer())):
        checked = b.insert_value(checked, read(slot + i, part), i)
    return checked


POINTER_SLOTS = 4 if CHECKED else 1


@intrinsic
def given(context, marker, value):
    """The value, or None where the marker is None: decided when compiling, so that no optional value is ever made."""
    kind = types.none if marker is types.none else value
    return kind(marker, value), lambda cx, b, sig, args: args[1] if kind is value else _unit(cx)


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
    index = cx.cast(b, args[1], sig.args[1], types.intp)
    return b.load(_at(b, args[0], index, _count(1)))


@lower_builtin(operator.setitem, PointerType, types.Integer, types.Any)
def _setitem(cx, b, sig, args):
    b.store(args[2], _at(b, args[0], args[1], _count(1)))
    return _unit(cx)


_operator(operator.add, lambda p, n: p if _is(PointerType, p) and _is(types.Integer, n) else None)


@lower_builtin(operator.add, PointerType, types.Integer)
def _advance(cx, b, sig, args):
    n = cx.cast(b, args[1], sig.args[1], types.intp)
    if not CHECKED:
        return b.gep(args[0], [n])
    return b.insert_value(args[0], b.gep(b.extract_value(args[0], 0), [n]), 0)


def _reread(element):
    """An intrinsic: the same place, read as elements of another kind."""

    @intrinsic
    def reread(context, pointer):
        kind = PointerType(element)

        def build(cx, b, sig, args):
            plain = _LLVM[element].as_pointer()
            if not CHECKED:
                return b.bitcast(args[0], plain)
            out = ir.Constant(cx.get_value_type(kind), ir.Undefined)
            for i in range(4):
                part = b.extract_value(args[0], i)
                out = b.insert_value(out, b.bitcast(part, plain) if i < 3 else part, i)
            return out

        return kind(pointer), build

    return reread


as_indices, as_words = _reread(types.int64), _reread(types.uint32)


# --- Vector and Mask -----------------------------------------------------------------------------------------------
def vector_of(element, itemsize=None):
    """The vector of `element`s; `itemsize` sets the lanes to those of another element."""
    return VectorType(element, target().lanes(itemsize or element.bitwidth // 8))


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


for _symbol, _sign in ((operator.lt, "<"), (operator.le, "<="), (operator.gt, ">"), (operator.ge, ">=")):
    _comparison(_symbol, _sign)

_operator(operator.and_, lambda x, y: x if _is(MaskType, x, y) else None)
lower_builtin(operator.and_, MaskType, MaskType)(lambda cx, b, sig, args: b.and_(*args))


@intrinsic
def where(context, mask, then, otherwise):
    return then(mask, then, otherwise), lambda cx, b, sig, args: b.select(*args)


@intrinsic
def load(context, pointer, offset):
    """pointer[offset : offset + lanes]"""
    vector = vector_of(pointer.element)
    return vector(pointer, types.intp), lambda cx, b, sig, args: _load(b, *args, vector)


@intrinsic
def load_live(context, pointer, offset, live):
    """The first `live` lanes, 0 in the others; reads nothing beyond them."""
    vector = vector_of(pointer.element)
    sig = vector(pointer, types.intp, types.intp)
    return sig, lambda cx, b, sig, args: _masked(b, "load", *args[:2], vector, args[2])


@intrinsic
def store(context, value, pointer, offset):
    def build(cx, b, sig, args):
        _store(b, *args, value)
        return _unit(cx)

    return types.void(value, pointer, types.intp), build


@intrinsic
def splat(context, like, scalar):
    """`scalar` in every lane of a vector like `like`."""
    return like(like, like.element), lambda cx, b, sig, args: _splat(b, args[1], like.lanes)


@intrinsic
def fma(context, x, y, z):
    """x * y + z, rounded once where the CPU can."""
    return x(x, y, z), lambda cx, b, sig, args: _fma(b, *args)


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
        *rest, value = [_splat(b, c, x.lanes) for c in scalars]
        for coefficient in reversed(rest):
            value = _fma(b, value, args[0], coefficient)
        return value

    return x(x, single, double), build


@intrinsic
def absolute(context, x):
    return x(x), lambda cx, b, sig, args: _call(b, "llvm.fabs" + _suffix(x.llvm), x.llvm, *args)


@intrinsic
def nearest(context, x):
    """x rounded to the nearest whole number."""
    return x(x), lambda cx, b, sig, args: _call(b, "llvm.rint" + _suffix(x.llvm), x.llvm, *args)


@intrinsic
def times_power_of_two(context, y, n):
    """y * 2**n for a normal result: n is added to the exponent's bits."""

    def build(cx, b, sig, args):
        mantissa = 23 if y.element == types.float32 else 52
        bits = ir.VectorType(ir.IntType(y.element.bitwidth), y.lanes)
        shift = b.shl(b.fptosi(args[1], bits), _fill(bits, mantissa))
        return b.bitcast(b.add(b.bitcast(args[0], bits), shift), y.llvm)

    return y(y, n), build


@intrinsic
def lanes_from(context, like, first):
    """first, first + 1, ... in the lanes of a vector like `like`"""

    def build(cx, b, sig, args):
        steps = ir.Constant(like.llvm, [float(i) for i in range(like.lanes)])
        return b.fadd(_splat(b, args[1], like.lanes), steps)

    return like(like, like.element), build


@intrinsic
def lane_sum(context, x):
    """The sum of all lanes, by halves: always in the same order."""

    def build(cx, b, sig, args):
        v, n = args[0], x.lanes
        while n > 1:
            n //= 2
            low, high = (
                b.shuffle_vector(v, v, ir.Constant(ir.VectorType(_i32, n), list(range(k, k + n)))) for k in (0, n)
            )
            v = b.fadd(low, high)
        return b.extract_element(v, ir.Constant(_i32, 0))

    return x.element(x), build


# --- Tile: rows x cols vectors -------------------------------------------------------------------------------------
def _literals(*values):
    return all(isinstance(v, types.IntegerLiteral) for v in values)


def _collect(b, kind, vectors):
    t = ir.Constant(kind.llvm, ir.Undefined)
    for k, v in enumerate(vectors):
        t = b.insert_value(t, v, k)
    return t


def _cells(kind):
    return ((r, c) for r in range(kind.rows) for c in range(kind.cols))


@intrinsic(prefer_literal=True)
def tile_zeros(context, pointer, rows, cols):
    """A tile of zeros of the pointer's elements. Its type carries the shape, so it also says which tile to use."""
    if not _literals(rows, cols):
        return None
    tile = TileType(vector_of(pointer.element), rows.literal_value, cols.literal_value)
    return tile(pointer, rows, cols), lambda cx, b, sig, args: ir.Constant(tile.llvm, None)


@intrinsic
def tile_column(context, pointer):
    """A tile of zeros one vector wide and as high as a vector has lanes."""
    vector = vector_of(pointer.element)
    tile = TileType(vector, vector.lanes, 1)
    return tile(pointer), lambda cx, b, sig, args: ir.Constant(tile.llvm, None)


@intrinsic
def tile_rows(context, tile):
    return types.intp(tile), lambda cx, b, sig, args: _count(tile.rows)


@intrinsic
def tile_lanes(context, tile):
    """Elements in one row of the tile."""
    return types.intp(tile), lambda cx, b, sig, args: _count(tile.cols * tile.vector.lanes)


@intrinsic
def lanes_of(context, pointer):
    """Elements in a vector, known when compiling."""
    return types.intp(pointer), lambda cx, b, sig, args: _count(target().lanes(pointer.element.bitwidth // 8))


@intrinsic
def width_of(context, pointer):
    """Queries in a block, `COLS` vectors of them, known when compiling."""
    return types.intp(pointer), lambda cx, b, sig, args: _count(target().width(pointer.element.bitwidth // 8))


def _row_offsets(b, tile, offset, step, live):
    """Where the tile's rows begin; rows from `live` on stand for the last live one, so nothing else is touched. The
    offsets do not change in a loop, and LLVM takes them out of it: remainders cost nothing."""
    last = b.sub(live, _count(1))
    rows = [_count(r) for r in range(tile.rows)]
    rows = [b.select(b.icmp_signed("<", r, last), r, last) if i else r for i, r in enumerate(rows)]
    return [b.add(offset, b.mul(step, r)) for r in rows]


@intrinsic
def tile_load(context, like, pointer, offset, stride, live):
    """tile[r, :] = pointer[offset + r * stride :], of the shape of `like`; rows from `live` on repeat the last"""

    def build(cx, b, sig, args):
        _, pointer, offset, stride, live = args
        lanes = like.vector.lanes
        rows = _row_offsets(b, like, offset, stride, live)
        places = [b.add(row, _count(c * lanes)) for row in rows for c in range(like.cols)]
        return _collect(b, like, [_load(b, pointer, place, like.vector) for place in places])

    n = types.intp
    return like(like, pointer, n, n, n), build


@intrinsic
def tile_load_part(context, like, pointer, offset, stride, live, lanes):
    """As `tile_load` of a tile one vector wide, of which only the first `lanes` are read; the others are 0."""

    def build(cx, b, sig, args):
        _, pointer, offset, stride, live, lanes = args
        rows = _row_offsets(b, like, offset, stride, live)
        return _collect(b, like, [_masked(b, "load", pointer, row, like.vector, lanes) for row in rows])

    n = types.intp
    return like(like, pointer, n, n, n, n), build


@intrinsic
def tile_row(context, like, pointer, offset):
    """One row, pointer[offset :], as wide as `like`; in a `tile_map` it stands under every row."""
    kind = TileType(vector_of(pointer.element, like.vector.element.bitwidth // 8), 1, like.cols)

    def build(cx, b, sig, args):
        step = kind.vector.lanes
        return _collect(
            b, kind, [_load(b, args[1], b.add(args[2], _count(c * step)), kind.vector) for c in range(kind.cols)]
        )

    return kind(like, pointer, types.intp), build


@intrinsic
def tile_steps(context, like, row, first):
    """One column, of the elements of the tile `row`: first, first + 1, ... as many as `like` has rows; in a `tile_map`
    it stands beside every column."""
    kind = TileType(row.vector, like.rows, 1)

    def build(cx, b, sig, args):
        scalar, add = args[2], b.fadd if isinstance(sig.args[2], types.Float) else b.add
        steps = [add(scalar, ir.Constant(scalar.type, r)) for r in range(kind.rows)]
        return _collect(b, kind, [_splat(b, x, kind.vector.lanes) for x in steps])

    return kind(like, row, row.vector.element), build


@intrinsic
def tile_store(context, tile, pointer, offset, stride, live):
    """pointer[offset + r * stride :] = tile[r, :] for the first `live` rows"""

    def build(cx, b, sig, args):
        value, pointer, offset, stride, live = args
        rows = _row_offsets(b, tile, offset, stride, live)
        for r in reversed(range(tile.rows)):  # the last live row is written last: its repeats do not count
            for c in range(tile.cols):
                place = b.add(rows[r], _count(c * tile.vector.lanes))
                _store(b, b.extract_value(value, r * tile.cols + c), pointer, place, tile.vector)
        return _unit(cx)

    n = types.intp
    return types.void(tile, pointer, n, n, n), build


def _rank1(b, tile, value, column, places, rows):
    for r, place in enumerate(places):
        scalar = _splat(b, b.load(_at(b, column, place, _count(1))), tile.vector.lanes)
        for c in range(tile.cols):
            k = r * tile.cols + c
            value = b.insert_value(value, _fma(b, scalar, rows[c], b.extract_value(value, k)), k)
    return value


@intrinsic
def tile_rank1(context, tile, column, i, step, live, row, j):
    """tile[r, :] += column[i + r * step] * row[j :]  for every row r; rows from `live` on repeat the last"""

    def build(cx, b, sig, args):
        value, column, i, step, live, row, j = args
        vectors = [_load(b, row, b.add(j, _count(c * tile.vector.lanes)), tile.vector) for c in range(tile.cols)]
        return _rank1(b, tile, value, column, _row_offsets(b, tile, i, step, live), vectors)

    n = types.intp
    return tile(tile, column, n, n, n, row, n), build


@intrinsic
def tile_map(context, function, tile, args):
    """function(vector, *vectors) on every vector of the tile. The other arguments are a tuple of tiles, whose axes of
    length 1 broadcast, of scalars, and of None. Vector after vector, so that only one chain of temporaries is live."""

    def element(kind):
        return kind.vector if isinstance(kind, TileType) else kind

    inner = function.get_call_type(context, (tile.vector, *map(element, args.types)), {})
    kind = TileType(inner.return_type, tile.rows, tile.cols) if isinstance(inner.return_type, VectorType) else None
    if kind is None:
        return None

    def build(cx, b, sig, values):
        body = cx.get_function(function, inner)
        cx.add_linking_libs(getattr(body, "libs", ()))
        others = [b.extract_value(values[2], i) for i in range(len(args.types))]

        def pick(other, value, r, c):
            return b.extract_value(value, other.index(r, c)) if isinstance(other, TileType) else value

        return _collect(
            b,
            kind,
            [
                body(
                    b,
                    [
                        b.extract_value(values[1], k),
                        *(pick(other, value, r, c) for other, value in zip(args.types, others, strict=True)),
                    ],
                )
                for k, (r, c) in enumerate(_cells(tile))
            ],
        )

    return kind(function, tile, args), build


@intrinsic
def tile_column_sum(context, tile):
    """The sum of the tile's rows, as a tile of one row."""
    kind = TileType(tile.vector, 1, tile.cols)

    def build(cx, b, sig, args):
        sums = [b.extract_value(args[0], c) for c in range(tile.cols)]
        for k, (_, c) in list(enumerate(_cells(tile)))[tile.cols :]:
            sums[c] = b.fadd(sums[c], b.extract_value(args[0], k))
        return _collect(b, kind, sums)

    return kind(tile), build


@intrinsic
def tile_column_max(context, tile, start):
    """The largest of each column and of `start`, a tile of one row; NaN never wins against it."""

    def build(cx, b, sig, args):
        tops = [b.extract_value(args[1], c) for c in range(tile.cols)]
        for k, (_, c) in enumerate(_cells(tile)):
            x = b.extract_value(args[0], k)
            tops[c] = b.select(b.fcmp_ordered(">", x, tops[c]), x, tops[c])
        return _collect(b, start, tops)

    return start(tile, start), build


@intrinsic
def tile_exceeds(context, tile, other):
    """Is any element of the tile greater than the other tile's?"""

    def build(cx, b, sig, args):
        found = None
        for k, (r, c) in enumerate(_cells(tile)):
            lanes = b.fcmp_ordered(">", b.extract_value(args[0], k), b.extract_value(args[1], other.index(r, c)))
            found = lanes if found is None else b.or_(found, lanes)
        bits = ir.IntType(tile.vector.lanes)
        return b.icmp_unsigned("!=", b.bitcast(found, bits), ir.Constant(bits, 0))

    return types.boolean(tile, other), build


@intrinsic
def row_sums(context, tile):
    """The sum of each row of a tile that is as high as a vector has lanes: as one vector, in log2(lanes) stages."""
    n = tile.vector.lanes

    def build(cx, b, sig, args):
        rows = [b.extract_value(args[0], r) for r in range(n)]
        stage = 1
        while stage < n:
            low, high = (
                ir.Constant(ir.VectorType(_i32, n), [n + c - other if c & stage else c + same for c in range(n)])
                for other, same in ((stage, 0), (0, stage))
            )
            for r in range(0, n, 2 * stage):
                rows[r] = b.fadd(*(b.shuffle_vector(rows[r], rows[r + stage], lanes) for lanes in (low, high)))
            stage *= 2
        return rows[0]

    return (tile.vector(tile), build) if (tile.rows, tile.cols) == (n, 1) else None


@intrinsic
def transpose_square(context, out, o, o_step, x, i, i_step, factor, f):
    """out[o + c * o_step + r] = x[i + r * i_step + c] * factor[f + c], lanes x lanes, in log2(lanes) stages"""
    vector = vector_of(out.element)

    def build(cx, b, sig, args):
        out, o, o_step, x, i, i_step, factor, f = args
        n, scale = vector.lanes, _load(b, factor, f, vector)
        rows = [b.fmul(_load(b, x, b.add(i, b.mul(i_step, _count(r))), vector), scale) for r in range(n)]
        stage = 1
        while stage < n:
            low = [n + c - stage if c & stage else c for c in range(n)]
            high = [n + c if c & stage else c + stage for c in range(n)]
            for r in range(n):
                if not r & stage:
                    rows[r], rows[r + stage] = (
                        b.shuffle_vector(rows[r], rows[r + stage], ir.Constant(ir.VectorType(_i32, n), lanes))
                        for lanes in (low, high)
                    )
            stage *= 2
        for c in range(n):
            _store(b, rows[c], out, b.add(o, b.mul(o_step, _count(c))), vector)
        return _unit(cx)

    n = types.intp
    return types.void(out, n, n, x, n, n, factor, n), build


# --- what the threads' loop needs (jit.py) --------------------------------------------------------------------------
@intrinsic
def draw(context, job, slot):
    """job[slot] as it was, and add 1 to it: atomic, and the only thing that threads share."""

    def build(cx, b, sig, args):
        data = cx.make_array(job)(cx, b, args[0]).data
        return b.atomic_rmw("add", b.gep(data, [args[1]]), _count(1), "monotonic")

    return types.int64(job, types.intp), build


@intrinsic
def call(context, function, job, header, slot, task):
    """Call the C function at this address with the job behind its header."""

    def build(cx, b, sig, args):
        function, job_value, header, slot, task = args
        kind = ir.FunctionType(ir.VoidType(), [_i64.as_pointer(), _i64, _i64])
        data = cx.make_array(job)(cx, b, job_value).data
        b.call(b.inttoptr(function, kind.as_pointer()), [b.gep(data, [header]), slot, task])
        return _unit(cx)

    n = types.int64
    return types.void(n, job, types.intp, n, n), build
