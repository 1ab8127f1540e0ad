"""Masks: what each shows, how they compose, and what `resolve` makes of them."""

import copy
import doctest
import operator
import pickle
from dataclasses import FrozenInstanceError
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ruvector_numba as rv
from ruvector_numba import errors, masks, visibility
from ruvector_numba.errors import InvalidMaskError
from ruvector_numba.masks import All, Causal, Full, Lengths, Segments, Window, resolve
from ruvector_numba.visibility import UNBOUNDED

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
NEG_INF = -np.inf


def dense_of(seen, batch, heads, Lq, Lk):
    """What a Visibility says, as one bool array of the shape of the scores: the definition, element by element."""
    distance = np.arange(Lk) - np.arange(Lq)[:, None]
    dense = np.broadcast_to((seen.first <= distance) & (distance < seen.last), (*batch, heads, Lq, Lk)).copy()
    if seen.limits is not None:
        lo, hi = seen.limits[..., None, :, 0, None], seen.limits[..., None, :, 1, None]
        dense &= (lo <= np.arange(Lk)) & (np.arange(Lk) < hi)
    if seen.allowed is not None:
        dense &= seen.allowed
    if seen.bias is not None:
        dense &= ~np.isneginf(seen.bias)
    return dense


def check_form(seen, batch, heads, Lq, Lk, dtype):
    """The promises of Visibility that kernels rely on."""
    assert type(seen.first) is type(seen.last) is type(seen.offset) is int
    assert -UNBOUNDED <= seen.first <= UNBOUNDED and -UNBOUNDED <= seen.last <= UNBOUNDED
    if seen.limits is not None:
        *rows, L, two = seen.limits.shape
        assert (L, two) == (Lq, 2) and len(rows) == len(batch)
        assert all(n in (1, b) for n, b in zip(rows, batch, strict=True))
        lo, hi = seen.limits[..., 0], seen.limits[..., 1]
        assert seen.limits.dtype == np.int64 and seen.limits.flags.c_contiguous and seen.limits.flags.aligned
        assert (lo >= 0).all() and (lo <= hi).all() and (hi <= Lk).all()
    for array, kind in ((seen.allowed, np.dtype(bool)), (seen.bias, dtype)):
        if array is not None:
            assert array.dtype == kind and array.dtype.isnative and array.flags.aligned
            np.broadcast_to(array, (*batch, heads, Lq, Lk))


# What each mask shows


@pytest.mark.parametrize("module", [masks, errors])
def test_examples_of_the_docstrings(module):
    assert doctest.testmod(module, globs={"np": np, "rv": rv}).failed == 0


sizes = pytest.mark.parametrize(("Lq", "Lk"), [(4, 4), (2, 5), (5, 2), (0, 3), (3, 0), (1, 1)])


@sizes
@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
def test_causal(align, Lq, Lk):
    offset = Lk - Lq if align == "bottom_right" else 0
    wanted = np.array([[j <= i + offset for j in range(Lk)] for i in range(Lq)], bool).reshape(Lq, Lk)
    np.testing.assert_array_equal(Causal(align).to_dense(Lq, Lk), wanted)
    seen = resolve(Causal(align), False, (), 1, Lq, Lk, F32)
    assert (seen.first, seen.last, seen.offset) == (-UNBOUNDED, offset + 1, offset)
    assert seen.limits is seen.allowed is seen.bias is None


@sizes
@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("left", [None, 0, 1, 3, 1 << 50])
@pytest.mark.parametrize("right", [None, 0, 2, 1 << 50])
def test_window(left, right, align, Lq, Lk):
    offset = Lk - Lq if align == "bottom_right" else 0
    low, high = -(1 << 60) if left is None else -left, 1 << 60 if right is None else right
    wanted = [[low <= j - (i + offset) <= high for j in range(Lk)] for i in range(Lq)]
    mask = Window(left, right, align)
    np.testing.assert_array_equal(mask.to_dense(Lq, Lk), np.array(wanted, bool).reshape(Lq, Lk))
    seen = resolve(mask, False, (2,), 3, Lq, Lk, F32)
    check_form(seen, (2,), 3, Lq, Lk, F32)
    np.testing.assert_array_equal(
        dense_of(seen, (2,), 3, Lq, Lk), np.broadcast_to(mask.to_dense(Lq, Lk), (2, 3, Lq, Lk))
    )
    assert seen.offset == offset


def test_window_without_limits_is_neutral():
    seen = resolve(Window(), False, (), 1, 3, 4, F32)
    assert (seen.first, seen.last) == (-UNBOUNDED, UNBOUNDED)


@pytest.mark.parametrize(
    ("queries", "keys"), [(None, 2), (2, None), (2, 3), (0, 0), (None, [0, 4]), ([3, 1], None), ([[3], [1]], [2, 0, 4])]
)
def test_lengths(queries, keys):
    batch, Lq, Lk = (2, 3) if np.ndim(queries) == 2 else (2,), 3, 4
    per_row = (np.broadcast_to(L if n is None else n, batch) for n, L in ((queries, Lq), (keys, Lk)))
    wanted = np.zeros((*batch, 1, Lq, Lk), bool)
    for row, (rows, columns) in zip(np.ndindex(batch), zip(*(n.flat for n in per_row), strict=True), strict=True):
        wanted[row][0, :rows, :columns] = True
    mask = Lengths(queries, keys)
    np.testing.assert_array_equal(np.broadcast_to(mask.to_dense(Lq, Lk), wanted.shape), wanted)
    seen = resolve(mask, False, batch, 5, Lq, Lk, F32)
    check_form(seen, batch, 5, Lq, Lk, F32)
    assert seen.allowed is None
    np.testing.assert_array_equal(dense_of(seen, batch, 5, Lq, Lk), np.broadcast_to(wanted, (*batch, 5, Lq, Lk)))
    empty = np.arange(Lq) >= np.broadcast_to(Lq if queries is None else queries, batch)[..., None]
    assert (np.broadcast_to(seen.limits, (*batch, Lq, 2))[empty] == 0).all()


def test_lengths_of_nothing_are_neutral():
    assert resolve(Lengths(), False, (2,), 1, 3, 3, F32) is visibility.NONE
    assert Lengths().to_dense(2, 3).all()


def test_shapes_of_to_dense():
    assert Lengths(keys=2).to_dense(3, 4).shape == (3, 4)
    assert Lengths(keys=[2, 3]).to_dense(3, 4).shape == (2, 1, 3, 4)
    assert Segments([0, 0, 1]).to_dense(3, 3).shape == (3, 3)
    assert Segments([[0, 0, 1]] * 5).to_dense(3, 3).shape == (5, 1, 3, 3)
    assert (Causal() & np.ones((7, 1, 1), bool)).to_dense(3, 4).shape == (7, 3, 4)
    dense = (Lengths(keys=[2, 3]) & np.ones((7, 1, 1), bool)).to_dense(3, 4)
    assert dense.shape == (2, 7, 3, 4) and dense.dtype == bool and dense.flags.writeable


@pytest.mark.parametrize(
    ("query_ids", "key_ids", "contiguous"),
    [
        ([0, 0, 1, 1, 1], None, True),
        ([5, 5, -2, 9, 9], None, True),
        ([1, 0, 1, 0, 7], [1, 1, 0], True),  # scattered queries are no obstacle, and nobody has id 7
        ([0, 1, 0, 1, 0], None, False),
        ([1, 2, 2, 1, 3], [0, 1, 0, 2, 2, 0, 3], True),  # an id that no query has may lie scattered
        ([[0, 0, 1], [3, 4, 5]], None, True),
        ([[0, 0, 1], [3, 4, 3]], None, False),
        ([0, 1], [[0, 1, 1], [1, 0, 0]], True),
        ([0, 0], [], True),
        ([], [1, 2], True),
    ],
)
def test_segments(query_ids, key_ids, contiguous):
    mask = Segments(query_ids, key_ids)
    q, k = np.asarray(query_ids), np.asarray(query_ids if key_ids is None else key_ids)
    Lq, Lk, batch = q.shape[-1], k.shape[-1], (2,)
    rows = zip(np.broadcast_to(q, (2, Lq)), np.broadcast_to(k, (2, Lk)), strict=True)
    wanted = np.array([[[a == b for b in of_keys] for a in of_queries] for of_queries, of_keys in rows], bool)
    wanted = wanted.reshape(2, 1, Lq, Lk)
    np.testing.assert_array_equal(np.broadcast_to(mask.to_dense(Lq, Lk), wanted.shape), wanted)
    seen = resolve(mask, False, batch, 3, Lq, Lk, F32)
    check_form(seen, batch, 3, Lq, Lk, F32)
    assert (seen.limits is not None, seen.allowed is not None) == (contiguous, not contiguous)
    np.testing.assert_array_equal(dense_of(seen, batch, 3, Lq, Lk), np.broadcast_to(wanted, (2, 3, Lq, Lk)))


def test_segments_shared_by_the_batch_stay_one_row():
    assert resolve(Segments([0, 0, 1]), False, (4, 5), 2, 3, 3, F32).limits.shape == (1, 1, 3, 2)
    assert resolve(Segments([0, 1, 0]), False, (4, 5), 2, 3, 3, F32).allowed.shape == (1, 1, 1, 3, 3)
    assert resolve(Lengths(keys=2), False, (4, 5), 2, 3, 3, F32).limits.shape == (1, 1, 3, 2)


def test_segments_equal_blocks_of_the_diagonal():
    lengths = [3, 1, 4, 2]
    ids = np.repeat(np.arange(4), lengths)
    limits = resolve(Segments(ids), True, (), 2, 10, 10, F32).limits
    ends = np.cumsum(lengths)
    np.testing.assert_array_equal(limits, np.stack((np.repeat(ends - lengths, lengths), np.repeat(ends, lengths)), -1))


# Composition


def test_full_and_none_are_neutral():
    assert Full() & Causal() == Causal() == Causal() & Full()
    assert None & Causal() == Causal() == Causal() & None
    assert Full() & Full() == Full() == Full() & None
    assert Full().to_dense(2, 3).all() and resolve(Full(), False, (), 1, 2, 3, F32) is visibility.NONE
    assert All(()).to_dense(2, 3).all() and resolve(All(()), True, (), 1, 2, 3, F32) is visibility.CAUSAL


def test_arrays_join_on_either_side():
    array = np.array([True, False, True])
    wanted = np.tri(3, dtype=bool) & array
    for mask in (Causal() & array, array & Causal(), Causal() & [True, False, True], [True, False, True] & Causal()):
        assert isinstance(mask, All)
        np.testing.assert_array_equal(mask.to_dense(3, 3), wanted)
    assert (np.False_ & Causal()).to_dense(2, 2).any() == (Causal() & False).to_dense(2, 2).any() == False  # noqa: E712
    bias = np.array([0.5, NEG_INF, np.nan])
    np.testing.assert_array_equal((bias & Full()).to_dense(3, 3), np.broadcast_to([True, False, True], (3, 3)))


def test_composition_is_flat_and_shows_itself():
    mask = (Causal() & Window(2)) & (Lengths(keys=3) & np.ones((2, 2), np.float32))
    assert [type(part) for part in mask.parts] == [Causal, Window, Lengths, np.ndarray]
    assert repr(mask) == (
        "Causal(align='top_left') & Window(left=2, right=None, align='top_left')"
        " & Lengths(queries=None, keys=3) & float32 array (2, 2)"
    )
    assert repr(All(())) == "All(())"


def test_masks_compare_by_value_and_hash():
    pairs = [
        (Causal(), Causal("top_left")),
        (Window(1, 2), Window(1, 2)),
        (Lengths(keys=[1, 2]), Lengths(keys=np.array([1, 2]))),
        (Segments([0, 1]), Segments((0, 1))),
        (Causal() & Window(3), Causal() & Window(3)),
        (Causal() & np.ones(3, bool), Causal() & np.ones(3, bool)),
    ]
    for a, b in pairs:
        assert a == b and hash(a) == hash(b)
    different = [a for a, _ in pairs]
    assert len(set(different)) == len(different) and Causal() != "Causal" and Lengths(keys=1) != Lengths(queries=1)


@pytest.mark.parametrize(
    "mask",
    [
        Full(),
        Causal("bottom_right"),
        Window(1, None),
        Lengths(2, [1, 2]),
        Segments([0, 1]),
        Causal() & np.array([[True, False]]) & Window(1),
    ],
)
def test_masks_are_immutable_and_travel(mask):
    for arrived in (pickle.loads(pickle.dumps(mask)), copy.copy(mask), copy.deepcopy(mask)):
        assert arrived == mask and repr(arrived) == repr(mask)
    for name in mask.__dataclass_fields__:
        with pytest.raises(FrozenInstanceError):
            setattr(mask, name, None)


def test_lengths_and_ids_are_copied():
    lengths, ids = np.array([1, 2]), np.array([0, 0, 1])
    of_lengths, of_ids = Lengths(keys=lengths), Segments(ids)
    lengths[:], ids[:] = 0, 5
    assert of_lengths == Lengths(keys=[1, 2]) and of_ids == Segments([0, 0, 1])
    with pytest.raises(ValueError, match="read-only"):
        of_lengths.keys[0] = 3


@pytest.mark.parametrize("other", [3, 1.5, "mask", object(), {}])
def test_what_is_no_mask_does_not_join(other):
    for join in (lambda: Causal() & other, lambda: other & Causal()):
        with pytest.raises(TypeError, match="unsupported operand"):
            join()


JOINS = {
    operator.or_: "a.to_dense(Lq, Lk) | b.to_dense(Lq, Lk)", operator.xor: "a.to_dense(Lq, Lk) ^ b.to_dense(Lq, Lk)",
    operator.sub: "a.to_dense(Lq, Lk) & ~b.to_dense(Lq, Lk)", lambda a, b: ~a: "~a.to_dense(Lq, Lk)",
}  # fmt: skip


@pytest.mark.parametrize(("join", "instead"), JOINS.items())
def test_other_operators_say_how_to_make_an_array(join, instead):
    a, b = Causal() & Lengths(keys=2), Window(left=1)
    operands = [(a, b), (b, np.ones((3, 4), bool))] + [([[True]], a)] * ("b" in instead)
    for left, right in operands:
        with pytest.raises(InvalidMaskError, match="masks are joined by & only\nHINT: make an array: ") as caught:
            join(left, right)
        assert caught.value.hint == f"make an array: {instead}"
    assert eval(instead, {"a": a, "b": b, "Lq": 3, "Lk": 4}).shape == (3, 4)


def test_one_float_array_is_the_limit():
    a, b = np.zeros((2, 3), np.float32), np.zeros(3, np.float32)
    with pytest.raises(InvalidMaskError) as caught:
        Causal() & a & b
    assert str(caught.value) == (
        "Invalid attention mask: 2 float arrays in one composition, where one is the limit\n"
        "  float mask 1: (2, 3)\n  float mask 2: (3,)\n"
        "HINT: add them yourself and pass the sum: mask & (a + b)"
    )


# resolve


def test_the_common_cases_are_constants():
    for sizes in [((), 1, 3, 4), ((2, 3), 8, 0, 0)]:
        assert resolve(None, False, *sizes, F32) is visibility.NONE
        assert resolve(None, True, *sizes, F64) is visibility.CAUSAL
        assert resolve(Causal(), True, *sizes, F64) is visibility.CAUSAL
    none, causal = visibility.NONE, visibility.CAUSAL
    assert (none.first, none.last, none.offset) == (-UNBOUNDED, UNBOUNDED, 0)
    assert (causal.first, causal.last, causal.offset) == (-UNBOUNDED, 1, 0)
    for constant in (none, causal):
        assert constant.limits is constant.allowed is constant.bias is None


def test_arrays_are_passed_on_as_they_are():
    allowed = np.zeros((4, 6, 10), bool)[:, ::2, ::-2]
    bias = np.broadcast_to(np.zeros((3, 1), np.float32), (4, 3, 5))
    allowed.setflags(write=False)
    for mask in (allowed, Causal() & allowed, allowed & Full()):
        assert resolve(mask, True, (2,), 4, 3, 5, F32).allowed is allowed
    for mask in (bias, bias & Window(1), Lengths(keys=2) & bias & allowed):
        assert resolve(mask, False, (2,), 4, 3, 5, F32).bias is bias


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 1), (3, 5), (1, 1, 5), (4, 3, 5), (2, 1, 1, 5), (2, 4, 3, 5)])
@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_arrays_broadcast_as_in_numpy(shape, dtype):
    array = np.ones(shape, dtype)
    seen = resolve(array, False, (2,), 4, 3, 5, F32)
    assert (seen.allowed if dtype is bool else seen.bias) is array


def test_bool_arrays_intersect():
    rng = np.random.default_rng(0)
    a, b, c = (rng.random(shape) < 0.6 for shape in ((3, 5), (2, 1, 1, 5), (4, 3, 1)))
    seen = resolve(Full() & a & b & c, False, (2,), 4, 3, 5, F32)
    np.testing.assert_array_equal(seen.allowed, a & b & c)


def test_intervals_that_do_not_meet_leave_an_empty_one():
    mask = Lengths(keys=2) & Segments([1, 1, 1], [0, 0, 0, 1, 1])
    limits = resolve(mask, False, (), 1, 3, 5, F32).limits
    assert (limits[..., 0] == limits[..., 1]).all()


def test_bottom_right_anywhere_sets_the_offset():
    bottom, top = Causal("bottom_right"), Window(1)
    for mask in (bottom, bottom & top, top & bottom, top & Window(2, align="bottom_right")):
        for is_causal in (False, True):
            assert resolve(mask, is_causal, (), 1, 3, 8, F32).offset == 5
    assert resolve(top, True, (), 1, 3, 8, F32).offset == 0


def test_lists_are_arrays():
    seen = resolve([[True, False], [False, True]], False, (), 1, 2, 2, F32)
    np.testing.assert_array_equal(seen.allowed, np.eye(2, dtype=bool))
    np.testing.assert_array_equal(resolve([0.0, NEG_INF], False, (), 1, 2, 2, F64).bias, [0, NEG_INF])
    assert resolve(np.array(True), False, (), 1, 2, 2, F64).allowed.shape == ()
    assert resolve([], False, (), 1, 2, 0, F64).bias.shape == (0,)


def test_foreign_byte_order_and_alignment_are_copied():
    values = np.array([0.5, NEG_INF, 2.0], np.float32)
    swapped = values.astype(values.dtype.newbyteorder())
    crooked = np.frombuffer(b"x" + values.tobytes(), np.float32, offset=1)
    assert not swapped.dtype.isnative and not crooked.flags.aligned
    for array in (swapped, crooked):
        for mask in (array, array & Full()):
            seen = resolve(mask, False, (), 1, 2, 3, F32)
            check_form(seen, (), 1, 2, 3, F32)
            np.testing.assert_array_equal(seen.bias, values)


def test_nothing_is_modified():
    allowed, bias = np.eye(3, dtype=bool), np.zeros((3, 3), np.float32)
    before = allowed.copy(), bias.copy()
    mask = allowed & Causal() & bias & Lengths(keys=2) & ~allowed
    resolve(mask, True, (), 1, 3, 3, F32)
    mask.to_dense(3, 3)[:] = True
    np.testing.assert_array_equal(allowed, before[0])
    np.testing.assert_array_equal(bias, before[1])


LENGTH = st.integers(0, 6)


@st.composite
def calls(draw):
    """Sizes, and parts of masks that fit them."""
    batch = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    heads, Lq, Lk = draw(st.integers(1, 3)), draw(LENGTH), draw(LENGTH)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    align = st.sampled_from(["top_left", "bottom_right"])
    reach = st.none() | st.integers(0, 8)

    def shape_within(target):
        shape = tuple(draw(st.sampled_from([1, n])) for n in target)
        return shape[draw(st.integers(0, len(shape))) :]

    def lengths(L):
        return draw(st.sampled_from([None, rng.integers(0, L + 1, shape_within(batch))]))

    def ids(L, runs):
        ids = rng.integers(0, 4, (*shape_within(batch), L))
        return np.sort(ids) if runs else ids

    def part():
        kind = draw(st.sampled_from(["causal", "window", "lengths", "segments", "bool", "full", "none"]))
        if kind == "causal":
            return Causal(draw(align))
        if kind == "window":
            return Window(draw(reach), draw(reach), draw(align))
        if kind == "lengths":
            return Lengths(lengths(Lq), lengths(Lk))
        if kind == "segments":
            return Segments(ids(Lq, draw(st.booleans())), ids(Lk, draw(st.booleans())))
        if kind == "bool":
            return rng.random(shape_within((*batch, heads, Lq, Lk))) < 0.7
        return Full() if kind == "full" else None

    parts = [part() for _ in range(draw(st.integers(0, 4)))]
    if draw(st.booleans()):
        shape = shape_within((*batch, heads, Lq, Lk))
        bias = np.where(rng.random(shape) < 0.3, NEG_INF, rng.standard_normal(shape)).astype(np.float32)
        parts.insert(draw(st.integers(0, len(parts))), bias)
    return (batch, heads, Lq, Lk), parts


def dense_of_part(part, Lq, Lk):
    if part is None:
        return np.True_
    if isinstance(part, masks.Mask):
        return part.to_dense(Lq, Lk)
    return part if part.dtype == bool else ~np.isneginf(part)


@settings(deadline=None, max_examples=300)
@given(calls(), st.booleans())
def test_resolve_means_what_to_dense_shows(call, is_causal):
    sizes, parts = call
    batch, heads, Lq, Lk = sizes
    scores = (*batch, heads, Lq, Lk)
    wanted = reduce(operator.and_, (dense_of_part(part, Lq, Lk) for part in parts), np.True_)
    mask = reduce(operator.and_, parts, Full())
    np.testing.assert_array_equal(np.broadcast_to(mask.to_dense(Lq, Lk), scores), np.broadcast_to(wanted, scores))
    seen = resolve(mask, is_causal, *sizes, F32)
    check_form(seen, *sizes, F32)
    if is_causal:
        wanted = wanted & np.tri(Lq, Lk, dtype=bool)
    np.testing.assert_array_equal(dense_of(seen, *sizes), np.broadcast_to(wanted, scores))


@settings(deadline=None, max_examples=100)
@given(calls())
def test_the_order_of_the_parts_does_not_matter(call):
    sizes, parts = call
    there = resolve(All(parts), False, *sizes, F32)
    back = resolve(reduce(operator.and_, reversed(parts), Full()), False, *sizes, F32)
    assert (there.first, there.last, there.offset) == (back.first, back.last, back.offset)
    assert there.bias is back.bias
    np.testing.assert_array_equal(dense_of(there, *sizes), dense_of(back, *sizes))


@settings(deadline=None, max_examples=100)
@given(calls())
def test_to_dense_can_stand_in_for_the_object(call):
    (batch, heads, Lq, Lk), parts = call
    mask = All(parts)
    dense = resolve(mask.to_dense(Lq, Lk), False, batch, heads, Lq, Lk, F32)
    seen = resolve(mask, False, batch, heads, Lq, Lk, F32)
    np.testing.assert_array_equal(dense_of(dense, batch, heads, Lq, Lk), dense_of(seen, batch, heads, Lq, Lk))


def test_the_base_of_all_masks_can_be_compared():
    assert masks.Mask() == masks.Mask() and hash(masks.Mask()) == hash(masks.Mask()) and masks.Mask() != masks.Full()
