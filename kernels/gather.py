"""Products with rows that lie anywhere: what attention over neighbours is made of. Lanes are channels.

    rows (N, H, C)          of nodes or of edges; node n begins at n * step, and its heads and channels are contiguous
    index (n + AHEAD)       which rows, for the n <= EDGES edges that are worked on, and for those that come after
    weights (n, W)          a number for each edge and head
    x, out (H, C)           of one node, in scratch: each head padded to whole vectors, `pad` apart

Memory is what this costs: a row is 4 cache lines at 4 x 16 float32, and comes from anywhere. Each loop asks for the
rows that it will need some edges later, so that they are on their way while all else is worked on; asked for at once,
they would keep the core waiting first and the memory idle after.

Numbers of edges lie as the edges do, [e][W]: the heads padded to a power of two or to whole vectors. All heads of some
edges are one vector then, and a loop over vectors does them at once.
"""

from typing import NamedTuple

from .jit import apart, inline
from .jobs import Elements, Indices
from .simd import (
    fma,
    lanes_from,
    lanes_of,
    line_of,
    load,
    load_live,
    prefetch,
    splat,
    store,
    store_live,
    store_row_sums,
    tile_at,
    tile_dot,
    tile_gathered,
    tile_lanes,
    tile_load,
    tile_map,
    tile_narrow,
    tile_numbers,
    tile_places,
    tile_rows,
    tile_splats,
    tile_store,
    tile_store_at,
    tile_zeros,
    where,
    zeros_of,
)
from .softmax import plus, scaled

# Edges of a batch. With 64 GATv2 took 1.1 times as long forward, GraphTransformer 1.05, all else no longer; with 32
# GraphTransformer took 1.03 to 1.1 times as long again (Zen 3, 11 edges a node).
EDGES = 128
AHEAD = 24  # edges: their rows are on the way while others are worked on
HALF, VECTORS = 2, 4  # in a tile: of a row, or of so many heads; as many chains of multiply-adds as hide their latency


class Rows(NamedTuple):
    data: Elements
    step: int


class Heads(NamedTuple):
    """How heads of C channels lie: in rows, in scratch, and as numbers of edges."""

    H: int
    C: int
    pad: int
    W: int
    shift: int  # of the rows of a tile, 1 << shift are heads of one edge
    even: int  # vectors of a head: 1, 2 or 4, where a tile is some whole heads; else 0
    # The vectors of a row, VECTORS at a time, the last repeated: first the whole ones, then one for what remains of
    # each head, `rest` channels.
    whole: int
    rests: int
    rest: int
    head_of: Indices  # of each vector its head, where it lies in a row, and where in scratch
    in_row: Indices
    in_scratch: Indices
    # What lies together both in rows and in scratch: each head, or where they are whole vectors all of them.
    pieces: int
    piece: int
    row_of: Indices  # where the head of each lane of a vector of numbers begins in a row, and in scratch
    scratch_of: Indices


# --- rows and vectors -----------------------------------------------------------------------------------------------
@inline
def row_part(rows, at, live, lanes):
    """One vector of a row, of which so many lanes are there."""
    return load(rows.data, at) if live == lanes else load_live(rows.data, at, live)


@inline
def put_part(rows, at, x, live, lanes):
    """Not `store_live` where all lanes are: it takes some 20 cycles on CPUs without mask registers (AVX2)."""
    if live == lanes:
        store(x, rows.data, at)
    else:
        store_live(x, rows.data, at, live)


@apart
def take_row(out, rows, i, heads):
    """out[h, c] = rows[i, h, c], and zeros to whole vectors"""
    lanes, n = lanes_of(out), heads.piece
    for k in range(heads.pieces):
        for c in range(0, n, lanes):
            store(row_part(rows, i * rows.step + k * n + c, min(lanes, n - c), lanes), out, k * heads.pad + c)


@apart
def put_row(rows, i, x, heads, factor):
    """rows[i, h, c] = x[h, c] * factor"""
    lanes, n = lanes_of(x), heads.piece
    for k in range(heads.pieces):
        for c in range(0, n, lanes):
            y = load(x, k * heads.pad + c)
            put_part(rows, i * rows.step + k * n + c, y * splat(y, factor), min(lanes, n - c), lanes)


@apart
def fetch_row(rows, i, begin, elements):
    """Ask for a part of a row that will be needed soon; it may begin anywhere in a line."""
    for c in range(begin, begin + elements, line_of(rows.data)):
        prefetch(rows.data, i * rows.step + c)
    prefetch(rows.data, i * rows.step + begin + elements - 1)


@apart
def copy(out, x, n):
    """out[i] = x[i], and nothing behind"""
    lanes = lanes_of(x)
    whole = n // lanes * lanes
    for i in range(0, whole, lanes):
        store(load(x, i), out, i)
    for i in range(whole, n):
        out[i] = x[i]


@apart
def add(out, x, n):
    """out[i] += x[i], of whole vectors"""
    for i in range(0, n, lanes_of(x)):
        store(load(out, i) + load(x, i), out, i)


@apart
def multiply(out, x, n):
    """out[i] *= x[i], of whole vectors"""
    for i in range(0, n, lanes_of(x)):
        store(load(out, i) * load(x, i), out, i)


@apart
def fill(out, n, value):
    """out[i] = value, of whole vectors"""
    for i in range(0, n, lanes_of(out)):
        store(splat(zeros_of(out), value), out, i)


@apart
def take_numbers_of(out, rows, edges, n, H, W):
    """out[e, h] = rows[edges[e], h]"""
    lanes = lanes_of(out)
    for g in range(0, H, lanes):
        live = min(lanes, H - g)
        for e in range(n):
            prefetch(rows.data, edges[e + AHEAD] * rows.step + g)
            store(row_part(rows, edges[e] * rows.step + g, live, lanes), out, e * W + g)


@apart
def put_numbers_of(out, x, edges, n, H, W):
    """out[edges[e], h] = x[e, h], one by one: see `put_part`"""
    for e in range(n):
        prefetch(out, edges[e + AHEAD] * H)
        for h in range(H):
            out[edges[e] * H + h] = x[e * W + h]


@inline
def rounds(n, W, lanes):
    """How often n edges' numbers repeat as vectors of the same heads; `range` would divide to find out."""
    return n if W > lanes else (n * W + lanes - 1) // lanes


@inline
def first_lanes(x, n, other):
    """x in the first n lanes, `other` in the rest"""
    return where(lanes_from(x, 0) < splat(x, n), x, splat(x, other))


# --- products -------------------------------------------------------------------------------------------------------
@inline
def multiply_add(sum, x, y):
    return fma(x, y, sum)


@inline
def row_tile(like, rows, index, e, n, heads, places, c, live):
    """rows[index[e], h, c], a vector of channels for each head of these places. Where heads are less than rows of the
    tile, the next rows are of the edges e + 1, ..."""
    if tile_rows(like) >> heads.shift == 1:
        return tile_at(like, rows.data, places, index[e] * rows.step + c, live)
    return tile_gathered(like, rows.data, index, e, n - 1, heads.shift, rows.step, places, c, live)


@inline
def gathered(like, rows, nodes, edge_rows, edges, has_edge, e, n, heads, places, c, live):
    """rows[nodes[e], h, c] (+ edge_rows[edges[e], h, c])"""
    y = row_tile(like, rows, nodes, e, n, heads, places, c, live)
    if has_edge:
        y = tile_map(plus, y, (row_tile(like, edge_rows, edges, e, n, heads, places, c, live),))
    return y


@inline
def row_even(like, rows, nodes, edge_rows, edges, has_edge, e, c):
    """rows[nodes[e], c:] (+ edge_rows[edges[e], c:]), as much as the tile holds"""
    tall, stride = tile_rows(like), tile_lanes(like)
    y = tile_load(like, rows.data, nodes[e] * rows.step + c, stride, tall)
    if has_edge:
        y = tile_map(plus, y, (tile_load(like, edge_rows.data, edges[e] * edge_rows.step + c, stride, tall),))
    return y


@apart
def dot_even(like, out, x, rows, nodes, edge_rows, edges, has_edge, n, heads):
    """`dot_gathered` where the tile is some whole heads"""
    tall, stride, width = tile_rows(like), tile_lanes(like), tile_rows(like) * tile_lanes(like)
    for h in range(0, heads.H, tall):
        mine = tile_load(like, x, h * heads.pad, heads.pad, tall)
        for e in range(n):
            fetch_row(rows, nodes[e + AHEAD], h * stride, width)
            y = row_even(like, rows, nodes, edge_rows, edges, has_edge, e, h * stride)
            store_row_sums(tile_dot(mine, y), out, e * heads.W + h)


@apart
def add_even(tile, out, weights, step, rows, index, n, heads, fetches, selects):
    """`add_gathered` where the tile, of zeros, is some whole heads"""
    tall, stride, width = tile_rows(tile), tile_lanes(tile), tile_rows(tile) * tile_lanes(tile)
    for h in range(0, heads.H, tall):
        sum = tile
        for e in range(n):
            if fetches:
                fetch_row(rows, index[e + AHEAD], h * stride, width)
            x = tile_load(tile, rows.data, index[e] * rows.step + h * stride, stride, tall)
            w = tile_numbers(tile, weights, e * step + h)
            if selects:
                sum = tile_map(multiply_add_unless_zero, sum, (x, w))
            else:
                sum = tile_map(multiply_add, sum, (x, w))
        so_far = tile_load(tile, out, h * heads.pad, heads.pad, tall)
        tile_store(tile_map(plus, sum, (so_far,)), out, h * heads.pad, heads.pad, tall)


@apart
def dot_gathered(out, x, rows, nodes, edge_rows, edges, has_edge, n, heads):
    """out[e, h] = sum over c of x[h, c] * (rows[nodes[e], h, c] + edge_rows[edges[e], h, c])

    As many sums as the tile has rows are made at once, and stored as one vector.
    """
    zeros = tile_narrow(out, VECTORS, 1)
    if heads.even == 1:
        dot_even(zeros, out, x, rows, nodes, edge_rows, edges, has_edge, n, heads)
    elif heads.even == 2:
        dot_even(tile_narrow(out, VECTORS, 2), out, x, rows, nodes, edge_rows, edges, has_edge, n, heads)
    elif heads.even == 4:
        dot_even(tile_narrow(out, HALF, 4), out, x, rows, nodes, edge_rows, edges, has_edge, n, heads)
    else:
        dot_uneven(zeros, out, x, rows, nodes, edge_rows, edges, has_edge, n, heads)


@apart
def dot_uneven(zeros, out, x, rows, nodes, edge_rows, edges, has_edge, n, heads):
    """`dot_gathered` where heads are of any size, and as many rows as the tile has are worked on"""
    lanes = lanes_of(out)
    whole, rest = heads.C // lanes * lanes, heads.C % lanes
    for g in range(0, heads.W, tile_rows(zeros)):
        mine, places = tile_places(zeros, heads.scratch_of, g), tile_places(zeros, heads.row_of, g)
        e = 0
        while e < n:  # `range` would divide by its step
            tile = zeros
            for c in range(0, whole, lanes):
                y = gathered(zeros, rows, nodes, edge_rows, edges, has_edge, e, n, heads, places, c, None)
                tile = tile_map(multiply_add, tile, (tile_at(zeros, x, mine, c, None), y))
            if rest:
                y = gathered(zeros, rows, nodes, edge_rows, edges, has_edge, e, n, heads, places, whole, rest)
                tile = tile_map(multiply_add, tile, (tile_at(zeros, x, mine, whole, None), y))
            store_row_sums(tile, out, e * heads.W + g)
            e = fetch_passed(rows, nodes, e, n, heads, tile_rows(zeros), g == 0)


@inline
def fetch_passed(rows, nodes, e, n, heads, count, fetches):
    """The edge after those that `count` sums are of; for each of these, a row that will be needed soon is asked for."""
    after = min(e + (count >> heads.shift), n)
    while e < after:
        if fetches:
            fetch_row(rows, nodes[e + AHEAD], 0, heads.H * heads.C)
        e += 1
    return after


@inline
def multiply_add_unless_zero(sum, x, w):
    return where(w == splat(w, 0.0), sum, fma(x, w, sum))


@inline
def row_places(tile, heads, v):
    """Of the vectors v, v + 1, ... of a row: the head, and where they lie in the row and in scratch"""
    head_of, in_row = tile_places(tile, heads.head_of, v), tile_places(tile, heads.in_row, v)
    return head_of, in_row, tile_places(tile, heads.in_scratch, v)


@apart
def add_block(tile, out, weights, step, rows, index, n, heads, v, live, fetches, selects):
    """`add_gathered` for the vectors v, v + 1, ... of a row, as many as the tile of zeros is high"""
    head_of, in_row, in_scratch = row_places(tile, heads, v)
    data, row, begin, width = rows.data, rows.step, heads.in_row[v], tile_rows(tile) * lanes_of(out)
    for e in range(n):
        if fetches:
            fetch_row(rows, index[e + AHEAD], begin, width)
        x = tile_at(tile, data, in_row, index[e] * row, live)
        w = tile_splats(tile, weights, head_of, e * step)
        if selects:
            tile = tile_map(multiply_add_unless_zero, tile, (x, w))
        else:
            tile = tile_map(multiply_add, tile, (x, w))
    tile_store_at(tile_map(plus, tile, (tile_at(tile, out, in_scratch, 0, None),)), out, in_scratch, 0, None)


@inline
def blocks(n):
    """n vectors, and what is repeated so that they are blocks"""
    return (n + VECTORS - 1) // VECTORS * VECTORS


@apart
def add_gathered(out, weights, step, rows, index, n, heads, fetches, selects):
    """out[h, c] += sum over e of weights[e, h] * rows[index[e], h, c]; if it selects, a weight of 0 adds nothing

    Weights are `step` from edge to edge. If it fetches, rows that will be needed soon are asked for. Tiles of four
    vectors: of eight, whose rows are asked for at once, GAT took 1.05 times as long forward.
    """
    if heads.even == 1:
        add_even(tile_narrow(out, VECTORS, 1), out, weights, step, rows, index, n, heads, fetches, selects)
    elif heads.even == 2:
        add_even(tile_narrow(out, HALF, 2), out, weights, step, rows, index, n, heads, fetches, selects)
    elif heads.even == 4:
        add_even(tile_narrow(out, 1, 4), out, weights, step, rows, index, n, heads, fetches, selects)
    else:
        add_uneven(tile_zeros(out, VECTORS, 1), out, weights, step, rows, index, n, heads, fetches, selects)


@apart
def add_uneven(tile, out, weights, step, rows, index, n, heads, fetches, selects):
    """`add_gathered` where heads are of any size: whole vectors first, then what remains of each head"""
    for v in range(0, heads.whole, VECTORS):
        add_block(tile, out, weights, step, rows, index, n, heads, v, None, fetches, selects)
    whole = blocks(heads.whole)
    for v in range(whole, whole + heads.rests, VECTORS):
        add_block(tile, out, weights, step, rows, index, n, heads, v, heads.rest, fetches, selects)


@apart
def spread(rows, ids, weights, x, n, heads, factor, adds):
    """rows[ids[e], h, c] = weights[e, h] * x[h, c] * factor, or adds that"""
    for v in range(0, heads.whole, VECTORS):
        spread_block(rows, ids, weights, x, n, heads, v, None, factor, adds)
    whole = blocks(heads.whole)
    for v in range(whole, whole + heads.rests, VECTORS):
        spread_block(rows, ids, weights, x, n, heads, v, heads.rest, factor, adds)


@apart
def spread_block(rows, ids, weights, x, n, heads, v, live, factor, adds):
    """`spread` for the vectors v, v + 1, ... of a row"""
    zeros = tile_zeros(x, VECTORS, 1)
    head_of, in_row, in_scratch = row_places(zeros, heads, v)
    mine = tile_map(scaled, tile_at(zeros, x, in_scratch, 0, None), (factor,))
    for e in range(n):
        at = ids[e] * rows.step
        change = tile_map(times_unless_zero, mine, (tile_splats(zeros, weights, head_of, e * heads.W),))
        if adds:
            change = tile_map(plus, change, (tile_at(zeros, rows.data, in_row, at, live),))
        tile_store_at(change, rows.data, in_row, at, live)


@inline
def times_unless_zero(x, w):
    return where(w == splat(w, 0.0), splat(x, 0.0), x * w)


@apart
def scale_heads(x, factors, heads):
    """x[h, c] *= factors[h]"""
    lanes = lanes_of(x)
    for h in range(heads.H):
        for c in range(h * heads.pad, (h + 1) * heads.pad, lanes):
            y = load(x, c)
            store(y * splat(y, factors[h]), x, c)
