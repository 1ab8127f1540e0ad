"""Scores of GATv2 and their gradients: products of a row with `att`, after a LeakyReLU. As gather.py, which says how
rows, scratch and numbers of edges lie.

    z[e, h, c] = x[h, c] + rows[nodes[e], h, c] (+ edge_rows[edges[e], h, c])
"""

from .gather import (
    AHEAD,
    HALF,
    VECTORS,
    blocks,
    fetch_passed,
    fetch_row,
    gathered,
    multiply_add,
    row_even,
    row_places,
)
from .jit import apart, inline
from .simd import (
    fma,
    lanes_of,
    splat,
    store_row_sums,
    tile_at,
    tile_dot,
    tile_lanes,
    tile_load,
    tile_map,
    tile_narrow,
    tile_places,
    tile_rows,
    tile_splats,
    tile_store_at,
    tile_zeros,
    where,
)
from .softmax import plus, times


@inline
def leaky(z, slope):
    """LeakyReLU: z above 0, slope * z below"""
    return where(z > splat(z, 0.0), z, z * splat(z, slope))


@inline
def leaky_slope(z, slope):
    """Its derivative, `slope` at 0 as torch has it."""
    return where(z > splat(z, 0.0), splat(z, 1.0), splat(z, slope))


@inline
def add_leaky(sum, z, factor, slope):
    return fma(leaky(z, slope), factor, sum)


@inline
def leaky_share(z, d, slope):
    return where(z > splat(z, 0.0), d, d * splat(d, slope))


@apart
def joint_scores(out, x, att, slope, rows, nodes, edge_rows, edges, has_edge, n, heads):
    """out[e, h] = sum over c of att[h, c] * leaky(z[e, h, c])"""
    zeros = tile_narrow(out, VECTORS, 1)
    if heads.even == 1:
        joint_even(zeros, out, x, att, slope, rows, nodes, edge_rows, edges, has_edge, n, heads)
    elif heads.even == 2:
        wide = tile_narrow(out, VECTORS, 2)
        joint_even(wide, out, x, att, slope, rows, nodes, edge_rows, edges, has_edge, n, heads)
    elif heads.even == 4:
        wide = tile_narrow(out, HALF, 4)
        joint_even(wide, out, x, att, slope, rows, nodes, edge_rows, edges, has_edge, n, heads)
    else:
        joint_uneven(zeros, out, x, att, slope, rows, nodes, edge_rows, edges, has_edge, n, heads)


@apart
def joint_even(like, out, x, att, slope, rows, nodes, edge_rows, edges, has_edge, n, heads):
    """`joint_scores` where the tile is some whole heads"""
    tall, stride, width = tile_rows(like), tile_lanes(like), tile_rows(like) * tile_lanes(like)
    for h in range(0, heads.H, tall):
        mine = tile_load(like, x, h * heads.pad, heads.pad, tall)
        a = tile_load(like, att, h * heads.pad, heads.pad, tall)
        for e in range(n):
            fetch_row(rows, nodes[e + AHEAD], h * stride, width)
            y = row_even(like, rows, nodes, edge_rows, edges, has_edge, e, h * stride)
            z = tile_map(leaky, tile_map(plus, y, (mine,)), (slope,))
            store_row_sums(tile_dot(z, a), out, e * heads.W + h)


@apart
def joint_uneven(zeros, out, x, att, slope, rows, nodes, edge_rows, edges, has_edge, n, heads):
    """`joint_scores` where heads are of any size, and as many rows as the tile has are worked on"""
    lanes = lanes_of(out)
    whole, rest = heads.C // lanes * lanes, heads.C % lanes
    for g in range(0, heads.W, tile_rows(zeros)):
        mine, places = tile_places(zeros, heads.scratch_of, g), tile_places(zeros, heads.row_of, g)
        e = 0
        while e < n:
            tile = zeros
            for c in range(0, whole, lanes):
                y = gathered(zeros, rows, nodes, edge_rows, edges, has_edge, e, n, heads, places, c, None)
                z = tile_map(plus, y, (tile_at(zeros, x, mine, c, None),))
                tile = tile_map(add_leaky, tile, (z, tile_at(zeros, att, mine, c, None), slope))
            if rest:
                y = gathered(zeros, rows, nodes, edge_rows, edges, has_edge, e, n, heads, places, whole, rest)
                z = tile_map(plus, y, (tile_at(zeros, x, mine, whole, None),))
                tile = tile_map(add_leaky, tile, (z, tile_at(zeros, att, mine, whole, None), slope))
            store_row_sums(tile, out, e * heads.W + g)
            e = fetch_passed(rows, nodes, e, n, heads, tile_rows(zeros), g == 0)


@apart
def joint_gradients(
    dx,
    datt,
    ds,
    step,
    x,
    att,
    slope,
    rows,
    edge_rows,
    has_edge,
    dedge_rows,
    wants_edge,
    nodes,
    edges,
    n,
    heads,
    fetches,
):
    """dz = ds[e, h] * att[h, c] * leaky'(z): added up in dx, by edge in dedge_rows; datt += ds[e, h] * leaky(z)

    Without datt only the rest. x and rows change places when the gradient of the other is wanted: z is their sum.
    """
    for v in range(0, heads.whole, VECTORS):
        joint_block(
            dx, datt, ds, step, x, att, slope, rows, edge_rows, has_edge, dedge_rows, wants_edge, nodes, edges, n,
            heads, v, None, fetches,
        )  # fmt: skip
    whole = blocks(heads.whole)
    for v in range(whole, whole + heads.rests, VECTORS):
        joint_block(
            dx, datt, ds, step, x, att, slope, rows, edge_rows, has_edge, dedge_rows, wants_edge, nodes, edges, n,
            heads, v, heads.rest, fetches,
        )  # fmt: skip


@apart
def joint_block(
    dx, datt, ds, step, x, att, slope, rows, edge_rows, has_edge, dedge_rows, wants_edge, nodes, edges, n, heads, v,
    live, fetches,
):  # fmt: skip
    """`joint_gradients` for the vectors v, v + 1, ... of a row"""
    zeros, lanes = tile_zeros(dx, VECTORS, 1), lanes_of(dx)
    head_of, in_row, in_scratch = row_places(zeros, heads, v)
    mine, a = tile_at(zeros, x, in_scratch, 0, None), tile_at(zeros, att, in_scratch, 0, None)
    sum, att_sum, begin = zeros, zeros, heads.in_row[v]  # att is the same for all edges, and multiplied at the end
    for e in range(n):
        if fetches:
            fetch_row(rows, nodes[e + AHEAD], begin, VECTORS * lanes)
        z = tile_map(plus, mine, (tile_at(zeros, rows.data, in_row, nodes[e] * rows.step, live),))
        if has_edge:
            other = tile_at(zeros, edge_rows.data, in_row, edges[e] * edge_rows.step, live)
            z = tile_map(plus, z, (other,))
        d = tile_map(leaky_share, z, (tile_splats(zeros, ds, head_of, e * step), slope))
        sum = tile_map(plus, sum, (d,))
        if datt is not None:
            att_sum = tile_map(multiply_add, att_sum, (d, z))
        if wants_edge:
            tile_store_at(tile_map(times, d, (a,)), dedge_rows.data, in_row, edges[e] * dedge_rows.step, live)
    so_far = tile_at(zeros, dx, in_scratch, 0, None)
    tile_store_at(tile_map(multiply_add, so_far, (sum, a)), dx, in_scratch, 0, None)
    if datt is not None:
        so_far = tile_at(zeros, datt, in_scratch, 0, None)
        tile_store_at(tile_map(plus, so_far, (att_sum,)), datt, in_scratch, 0, None)
