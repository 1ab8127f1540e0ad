"""Tile: rows x cols vectors that live in registers, and what can be done with them in a kernel."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import emit
from .kinds import I32, TileType, VectorType, vector_of


def _literals(*values):
    return all(isinstance(v, types.IntegerLiteral) for v in values)


def collect(b, kind, vectors):
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


@intrinsic(prefer_literal=True)
def tile_narrow(context, pointer, rows, cols):
    """A tile of zeros of so many rows but no more than a vector has lanes: sums of rows fit in one vector."""
    if not _literals(rows, cols):
        return None
    vector = vector_of(pointer.element)
    tile = TileType(vector, min(rows.literal_value, vector.lanes), cols.literal_value)
    return tile(pointer, rows, cols), lambda cx, b, sig, args: ir.Constant(tile.llvm, None)


@intrinsic
def tile_column(context, pointer):
    """A tile of zeros one vector wide and as high as a vector has lanes."""
    vector = vector_of(pointer.element)
    tile = TileType(vector, vector.lanes, 1)
    return tile(pointer), lambda cx, b, sig, args: ir.Constant(tile.llvm, None)


@intrinsic
def tile_rows(context, tile):
    return types.intp(tile), lambda cx, b, sig, args: emit.count(tile.rows)


@intrinsic
def tile_lanes(context, tile):
    """Elements in one row of the tile."""
    return types.intp(tile), lambda cx, b, sig, args: emit.count(tile.cols * tile.vector.lanes)


def _row_offsets(b, tile, offset, step, live):
    """Where the tile's rows begin; rows from `live` on stand for the last live one, so nothing else is touched. The
    offsets do not change in a loop, and LLVM takes them out of it: remainders cost nothing."""
    last = b.sub(live, emit.count(1))
    rows = [emit.count(r) for r in range(tile.rows)]
    rows = [b.select(b.icmp_signed("<", r, last), r, last) if i else r for i, r in enumerate(rows)]
    return [b.add(offset, b.mul(step, r)) for r in rows]


@intrinsic
def tile_load(context, like, pointer, offset, stride, live):
    """tile[r, :] = pointer[offset + r * stride :], of the shape of `like`; rows from `live` on repeat the last"""

    def build(cx, b, sig, args):
        _, pointer, offset, stride, live = args
        lanes = like.vector.lanes
        rows = _row_offsets(b, like, offset, stride, live)
        places = [b.add(row, emit.count(c * lanes)) for row in rows for c in range(like.cols)]
        return collect(b, like, [emit.load(b, pointer, place, like.vector) for place in places])

    n = types.intp
    return like(like, pointer, n, n, n), build


@intrinsic
def tile_row(context, like, pointer, offset):
    """One row, pointer[offset :], as wide as `like`; in a `tile_map` it stands under every row."""
    kind = TileType(vector_of(pointer.element, like.vector.element.bitwidth // 8), 1, like.cols)

    def build(cx, b, sig, args):
        step = kind.vector.lanes
        return collect(
            b,
            kind,
            [emit.load(b, args[1], b.add(args[2], emit.count(c * step)), kind.vector) for c in range(kind.cols)],
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
        return collect(b, kind, [emit.splat(b, x, kind.vector.lanes) for x in steps])

    return kind(like, row, row.vector.element), build


@intrinsic
def tile_numbers(context, like, pointer, offset):
    """One column, pointer[offset + r] in all lanes of row r; in a `tile_map` it stands beside every column."""
    kind = TileType(vector_of(pointer.element), like.rows, 1)

    def build(cx, b, sig, args):
        scalars = [emit.load_one(b, args[1], b.add(args[2], emit.count(r))) for r in range(kind.rows)]
        return collect(b, kind, [emit.splat(b, x, kind.vector.lanes) for x in scalars])

    return kind(like, pointer, types.intp), build


@intrinsic
def tile_store(context, tile, pointer, offset, stride, live):
    """pointer[offset + r * stride :] = tile[r, :] for the first `live` rows"""

    def build(cx, b, sig, args):
        value, pointer, offset, stride, live = args
        rows = _row_offsets(b, tile, offset, stride, live)
        for r in reversed(range(tile.rows)):  # the last live row is written last: its repeats do not count
            for c in range(tile.cols):
                place = b.add(rows[r], emit.count(c * tile.vector.lanes))
                emit.store(b, b.extract_value(value, r * tile.cols + c), pointer, place, tile.vector)
        return emit.unit(cx)

    n = types.intp
    return types.void(tile, pointer, n, n, n), build


@intrinsic
def tile_places(context, like, table, p):
    """table[p + r] for every row r of the tile: where they lie. Looked up before a loop; within one LLVM would do it
    for each tile, since anything that the loop stores might be the table."""
    kind = types.UniTuple(types.intp, like.rows)

    def build(cx, b, sig, args):
        _, table, p = args
        return cx.make_tuple(b, kind, [emit.load_one(b, table, b.add(p, emit.count(r))) for r in range(like.rows)])

    return (kind(like, table, types.intp), build) if like.cols == 1 else None


@intrinsic
def tile_at(context, like, pointer, places, offset, live):
    """tile[r, :] = pointer[places[r] + offset :], one vector wide and as high as `like`. With a number for `live` only
    so many lanes, 0 in the others; None for all."""

    def build(cx, b, sig, args):
        _, pointer, places, offset, live = args
        found = [b.add(b.extract_value(places, r), offset) for r in range(like.rows)]
        return _rows_at(b, like, pointer, found, live, sig.args[-1])

    n = types.intp
    return like(like, pointer, places, n, live if live is types.none else n), build


@intrinsic
def tile_gathered(context, like, pointer, index, e, last, shift, step, places, offset, live):
    """tile[r, :] = pointer[index[e + (r >> shift)] * step + places[r] + offset :], with `live` as in `tile_at`; behind
    `last` the index repeats"""

    def build(cx, b, sig, args):
        _, pointer, index, e, last, shift, step, places, offset, live = args
        rows = [b.add(e, b.lshr(emit.count(r), shift)) for r in range(like.rows)]
        rows = [emit.load_one(b, index, b.select(b.icmp_signed("<", r, last), r, last)) for r in rows]
        found = [b.add(b.mul(row, step), b.extract_value(places, r)) for r, row in enumerate(rows)]
        return _rows_at(b, like, pointer, [b.add(place, offset) for place in found], live, sig.args[-1])

    n = types.intp
    return like(like, pointer, index, n, n, n, n, places, n, live if live is types.none else n), build


@intrinsic
def tile_splats(context, like, pointer, places, offset):
    """tile[r, :] = pointer[places[r] + offset], one number in all lanes of a row"""

    def build(cx, b, sig, args):
        _, pointer, places, offset = args
        scalars = [emit.load_one(b, pointer, b.add(b.extract_value(places, r), offset)) for r in range(like.rows)]
        return collect(b, like, [emit.splat(b, x, like.vector.lanes) for x in scalars])

    return like(like, pointer, places, types.intp), build


@intrinsic
def tile_store_at(context, tile, pointer, places, offset, live):
    """pointer[places[r] + offset :] = tile[r, :], of as many lanes as in `tile_at`"""

    def build(cx, b, sig, args):
        value, pointer, places, offset, live = args
        for r in range(tile.rows):
            row, at = b.extract_value(value, r), b.add(b.extract_value(places, r), offset)
            if sig.args[4] is types.none:
                emit.store(b, row, pointer, at, tile.vector)
            else:
                emit.masked(b, "store", pointer, at, tile.vector, live, row)
        return emit.unit(cx)

    n = types.intp
    return types.void(tile, pointer, places, n, live if live is types.none else n), build


def _rows_at(b, like, pointer, places, live, kind):
    """A tile of the vectors at these places: whole ones, or their first `live` lanes."""
    if kind is types.none:
        return collect(b, like, [emit.load(b, pointer, place, like.vector) for place in places])
    return collect(b, like, [emit.masked(b, "load", pointer, place, like.vector, live) for place in places])


def _loop(b, n, values, step, unroll):
    """values = step(values) n times, in registers; unrolled so many times and no more."""
    before, body, after = b.block, b.append_basic_block(), b.append_basic_block()
    b.cbranch(b.icmp_signed(">", n, emit.count(0)), body, after)
    b.position_at_end(body)
    phis = [b.phi(value.type) for value in (n, *values)]
    made = [b.sub(phis[0], emit.count(1)), *step(phis[1:])]
    for phi, first, later in zip(phis, (n, *values), made, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, body)
    times = b.module.add_metadata([ir.MetaDataString(b.module, "llvm.loop.unroll.count"), ir.Constant(I32, unroll)])
    loop = ir.MDValue(b.module, [], str(len(b.module.metadata)))
    loop.operands = (loop, times)  # LLVM wants a loop's name to begin with itself
    b.cbranch(b.icmp_signed(">", made[0], emit.count(0)), body, after).set_metadata("llvm.loop", loop)
    b.position_at_end(after)
    results = [b.phi(value.type) for value in values]
    for phi, first, later in zip(results, values, made[1:], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, body)
    return results


@intrinsic
def tile_multiply_add(context, tile, x, x_next, x_row, live, y, y_next, n):
    """tile[r, :] += sum over t < n of x[t * x_next + r * x_row] * y[t * y_next :]  for every row r; rows from `live` on
    repeat the last. The loop that all products spend their time in.

    Of words, each of which is two bfloat16 numbers, both are multiplied and added: two such updates at once.

    All rows are read from one address, which moves, at offsets that do not. Left to itself LLVM kept an address for
    each row and each of two steps, more than there are registers: without, gradients are made 1.01 to 1.13 times as
    fast (Zen 3). It gains most where tiles are one vector wide, which are best not unrolled. Wide ones are 2 % faster
    by two steps; by four they spill, and projections lose a fifth.
    """
    multiply_add, kind = emit.dot if y.element == types.uint32 else emit.fma, vector_of(y.element)

    def build(cx, b, sig, args):
        value, x, x_next, x_row, live, y, y_next, n = args
        rows = _row_offsets(b, tile, emit.count(0), x_row, live)

        def step(state):
            at, from_y, *sums = state
            vectors = [emit.load(b, y, b.add(from_y, emit.count(c * kind.lanes)), kind) for c in range(tile.cols)]
            for r, row in enumerate(rows):
                scalar = emit.splat(b, emit.load_one(b, x, b.add(row, at)), tile.vector.lanes)
                for c, vector in enumerate(vectors):
                    k = r * tile.cols + c
                    sums[k] = multiply_add(b, scalar, vector, sums[k])
            return [b.add(at, x_next), b.add(from_y, y_next), *sums]

        sums = [b.extract_value(value, k) for k in range(tile.rows * tile.cols)]
        state = [emit.count(0), emit.count(0), *sums]
        return collect(b, tile, _loop(b, n, state, step, 2 if tile.cols > 1 else 1)[2:])

    i = types.intp
    return tile(tile, x, i, i, i, y, i, i), build


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

        return collect(
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
def tile_dot(context, x, y):
    """The products of two tiles, those of each row added up, one column after the other: a tile of one column."""
    kind = TileType(x.vector, x.rows, 1)

    def build(cx, b, sig, args):
        sums = [ir.Constant(kind.vector.llvm, None)] * kind.rows
        for k, (r, _) in enumerate(_cells(x)):
            sums[r] = emit.fma(b, b.extract_value(args[0], k), b.extract_value(args[1], k), sums[r])
        return collect(b, kind, sums)

    return (kind(x, y), build) if x == y else None


@intrinsic
def tile_column_sum(context, tile):
    """The sum of the tile's rows, as a tile of one row."""
    kind = TileType(tile.vector, 1, tile.cols)

    def build(cx, b, sig, args):
        sums = [b.extract_value(args[0], c) for c in range(tile.cols)]
        for k, (_, c) in list(enumerate(_cells(tile)))[tile.cols :]:
            sums[c] = b.fadd(sums[c], b.extract_value(args[0], k))
        return collect(b, kind, sums)

    return kind(tile), build


@intrinsic
def tile_column_max(context, tile, start):
    """The largest of each column and of `start`, a tile of one row; NaN never wins against it."""

    def build(cx, b, sig, args):
        tops = [b.extract_value(args[1], c) for c in range(tile.cols)]
        for k, (_, c) in enumerate(_cells(tile)):
            x = b.extract_value(args[0], k)
            tops[c] = b.select(b.fcmp_ordered(">", x, tops[c]), x, tops[c])
        return collect(b, start, tops)

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
def tile_shown(context, tile, pointer, offset, stride, live, hidden):
    """The tile, but `hidden` where the byte pointer[offset + r * stride + c] is 0; `live` as in `tile_load`"""
    bytes_of = VectorType(types.uint8, tile.vector.lanes)

    def build(cx, b, sig, args):
        value, pointer, offset, stride, live, hidden = args
        hidden, rows = emit.splat(b, hidden, tile.vector.lanes), []
        for r, place in enumerate(_row_offsets(b, tile, offset, stride, live)):
            shows = b.icmp_unsigned("!=", emit.load(b, pointer, place, bytes_of), ir.Constant(bytes_of.llvm, None))
            rows.append(b.select(shows, b.extract_value(value, r), hidden))
        return collect(b, tile, rows)

    n = types.intp
    return (tile(tile, pointer, n, n, n, tile.vector.element), build) if tile.cols == 1 else None
