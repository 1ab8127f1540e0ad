"""Every way to get a mask wrong, and what is then said."""

import numpy as np
import pytest

from ruvector_numba import errors
from ruvector_numba.errors import InvalidMaskError
from ruvector_numba.masks import All, Causal, Lengths, Segments, Window, resolve

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
NEG_INF = -np.inf
ALIGN = 'query 0 sits at key 0 ("top_left"), or the last query at the last key ("bottom_right")'
REACH = "give a whole number, 0 or more; None means no limit"
WHOLE, TO_INT = "give whole numbers", "cast them: numpy.asarray(x).astype(int)"
ONE, DETACH = (
    "give a list, of one mask too: All([mask])",
    ("of a tensor give {}.detach().float(), and .to_dense() first if it is sparse"),
)


class Tensor:
    """Refuses to become an array, as a tensor of torch does that requires grad."""

    def __array__(self, *_, **__):
        raise RuntimeError("it requires grad")


MOST = "a length is {0} at most; where longer sequences were cut, numpy.minimum(lengths, {0})"
CONSTRUCTIONS = [
    (lambda: Causal("bottom-right"), "Causal.align must be 'top_left' or 'bottom_right', got 'bottom-right'", ALIGN),
    (lambda: Causal(None), "Causal.align must be 'top_left' or 'bottom_right', got None", ALIGN),
    (lambda: Window(1, 1, "left"), "Window.align must be 'top_left' or 'bottom_right', got 'left'", ALIGN),
    (lambda: Window(left=-1), "Window.left is -1", REACH),
    (lambda: Window(right=-1), "Window.right is -1", REACH),
    (lambda: Window(left=2.0), "Window.left is 2.0", REACH),
    (lambda: Window(right=True), "Window.right is True", REACH),
    (lambda: Window(left="3"), "Window.left is '3'", REACH),
    (lambda: Lengths(keys=-3), "Lengths.keys must not be negative, got -3", "None means no limit"),
    (lambda: Lengths(queries=[4, -1]), "Lengths.queries must not be negative, got -1", "None means no limit"),
    (lambda: Lengths(keys=[1.0, 2.0]), "Lengths.keys must be integers, got dtype float64", TO_INT),
    (lambda: Lengths(keys=True), "Lengths.keys must be integers, got dtype bool", WHOLE),
    (lambda: Lengths(keys="3"), "Lengths.keys must be integers, got dtype <U1", WHOLE),
    (
        lambda: Lengths([1, 2], [1, 2, 3]),
        "Lengths.queries and Lengths.keys do not agree on the rows of the batch",
        None,
    ),
    (lambda: Segments(3), "Segments.query_ids must have one id per position, got the single number 3", None),
    (lambda: Segments([0, 1], 3), "Segments.key_ids must have one id per position, got the single number 3", None),
    (lambda: Segments([0.5, 1]), "Segments.query_ids must be integers, got dtype float64", TO_INT),
    (lambda: Segments([0], [True]), "Segments.key_ids must be integers, got dtype bool", WHOLE),
    (
        lambda: Segments([[0]] * 2, [[0]] * 3),
        "Segments.query_ids and Segments.key_ids do not agree on the rows of the batch",
        None,
    ),
    (
        lambda: Segments(np.array([2**63], np.uint64)),
        f"Segments.query_ids has {2**63}, which does not fit an int64",
        None,
    ),
    (lambda: Causal().to_dense(-1, 2), "Lq is -1", "give a whole number, 0 or more"),
    (lambda: Causal().to_dense(2, 2.5), "Lk is 2.5", "give a whole number, 0 or more"),
    (lambda: Lengths(keys=5).to_dense(2, 4), "Lengths.keys has 5, more than Lk = 4", MOST.format(4)),
    (lambda: Segments([0, 1]).to_dense(3, 2), "Segments.query_ids has 2 ids for Lq = 3", "give one id per query"),
    (
        lambda: Segments([0, 1]).to_dense(2, 3),
        "Segments.key_ids has 2 ids for Lk = 3",
        "key_ids is query_ids unless given; give one id per key",
    ),
    (
        lambda: (Causal() & np.ones((7, 3), bool)).to_dense(1, 3),
        "the shape of an array does not broadcast to (..., Lq, Lk)",
        None,
    ),
    (
        lambda: (Lengths(keys=[1, 2]) & np.ones((3, 1, 1, 1), bool)).to_dense(2, 2),
        "the parts of a composition do not broadcast",
        None,
    ),
    (
        lambda: Causal() & np.ones(3, int),
        "dtype int64; a mask is bool (True = attend) or float (added to the scores)",
        "attn_mask.astype(bool), if non-zero means attend",
    ),
    (
        lambda: Causal() & [1, 0],
        "dtype int64; a mask is bool (True = attend) or float (added to the scores)",
        "attn_mask.astype(bool), if non-zero means attend",
    ),
    (
        lambda: Causal() & np.ma.ones(3, bool),
        "a numpy.ma array, whose own mask would be lost",
        "pass mask.filled(...), a plain array",
    ),
    *((lambda x=x: All(x), f"All takes several masks, got a {type(x).__name__}", ONE) for x in (
        np.ones((2, 3), bool), 5, None, Causal(), "ab", np.True_)),
    *((make, f"{name} cannot become an array: it requires grad", DETACH.format(name)) for name, make in (
        ("attn_mask", lambda: Causal() & Tensor()), ("Lengths.keys", lambda: Lengths(keys=Tensor())),
        ("Segments.query_ids", lambda: Segments(Tensor())))),
]  # fmt: skip


@pytest.mark.parametrize(("construct", "reason", "hint"), CONSTRUCTIONS)
def test_errors_of_construction(construct, reason, hint):
    with pytest.raises(InvalidMaskError) as caught:
        construct()
    assert str(caught.value).splitlines()[0] == f"Invalid attention mask: {reason}"
    assert caught.value.hint == hint


KIND = "a mask is bool (True = attend) or float (added to the scores)"
ARRAY = "give an array of bools or floats, or one of rv.masks, such as rv.masks.Causal()"
SHAPE = "its shape does not broadcast to that of the scores, (*batch, heads, Lq, Lk)"
RULE = "axes are matched from the right and may be 1 or missing, as NumPy broadcasts"
BATCH = "its leading axes must broadcast to the batch axes of the inputs"
BOOL = "is_causal=True hides the future; a mask is an array, or one of rv.masks"
CALLS = [  # for a batch of 2, 4 heads, Lq = 3, Lk = 5 in float32
    (np.ones((3, 5), int), f"dtype int64; {KIND}", "attn_mask.astype(bool), if non-zero means attend"),
    (np.ones((3, 5), np.uint8), f"dtype uint8; {KIND}", "attn_mask.astype(bool), if non-zero means attend"),
    ([[1, 0, 1, 1, 0]], f"dtype int64; {KIND}", "attn_mask.astype(bool), if non-zero means attend"),
    (np.ones((3, 5), complex), f"dtype complex128; {KIND}", ARRAY),
    (np.ones((3, 5), object), f"dtype object; {KIND}", ARRAY),
    ("causal", f"dtype <U6; {KIND}", ARRAY),
    (Causal, "Causal is a class, not a mask", "write Causal(...)"),
    (np.ones((3, 4), bool), SHAPE, RULE),
    (np.ones((7, 3, 5), bool), SHAPE, RULE),
    (np.ones((1, 2, 4, 3, 5), bool), SHAPE, RULE),
    (
        np.ones((2, 5), bool),
        SHAPE,
        "one row of keys per batch row is attn_mask[:, None, None, :], or masks.Lengths(keys=...)",
    ),
    (np.ones((2, 3, 5), bool), SHAPE, "one matrix per batch row, the same for all heads, is attn_mask[:, None]"),
    (Causal() & np.ones((3, 4), bool), SHAPE, RULE),
    (
        np.zeros((3, 5)),
        "a float mask has the dtype of the inputs, but it is float64 and they are float32",
        "cast the mask: attn_mask.astype(np.float32)",
    ),
    (
        np.zeros((3, 5), np.float16) & Causal(),
        "a float mask has the dtype of the inputs, but it is float16 and they are float32",
        "cast the mask: attn_mask.astype(np.float32)",
    ),
    (True, "attn_mask is True, a single bool", BOOL),
    (np.False_, "attn_mask is False, a single bool", BOOL),
    (Tensor(), "attn_mask cannot become an array: it requires grad", DETACH.format("attn_mask")),
    (Lengths(queries=4), "Lengths.queries has 4, more than Lq = 3", MOST.format(3)),
    (Lengths(keys=[5, 6]), "Lengths.keys has 6, more than Lk = 5", MOST.format(5)),
    (Lengths(keys=[1, 2, 3]), "Lengths.keys does not have one entry per row of the batch", BATCH),
    (Lengths(queries=[[1, 2]]), "Lengths.queries does not have one entry per row of the batch", BATCH),
    (
        Segments([0, 0, 1]),
        "Segments.key_ids has 3 ids for Lk = 5",
        "key_ids is query_ids unless given; give one id per key",
    ),
    (Segments([0, 0], [1] * 5), "Segments.query_ids has 2 ids for Lq = 3", "give one id per query"),
    (Segments([0, 0, 1], [1] * 6), "Segments.key_ids has 6 ids for Lk = 5", "give one id per key"),
    (Segments([[0, 0, 1]] * 3, [1] * 5), "Segments.query_ids does not have one entry per row of the batch", BATCH),
    (Segments([0, 0, 1], [[1] * 5] * 3), "Segments.key_ids does not have one entry per row of the batch", BATCH),
]


@pytest.mark.parametrize(("mask", "reason", "hint"), CALLS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_errors_of_resolve(mask, reason, hint, is_causal):
    with pytest.raises(InvalidMaskError) as caught:
        resolve(mask, is_causal, (2,), 4, 3, 5, F32)
    assert str(caught.value).splitlines()[0] == f"Invalid attention mask: {reason}"
    assert caught.value.hint == hint


def test_ragged_lists():
    for construct in (lambda: Causal() & [[True], [True, False]], lambda: Lengths(keys=[[1], [1, 2]])):
        with pytest.raises(InvalidMaskError, match="inhomogeneous"):
            construct()


def test_errors_show_the_shapes():
    with pytest.raises(InvalidMaskError) as caught:
        resolve(np.ones((3, 4), bool), False, (2,), 4, 3, 5, F32)
    assert str(caught.value) == (
        f"Invalid attention mask: {SHAPE}\n  attn_mask.shape: (3, 4)\n  scores.shape   : (2, 4, 3, 5)\nHINT: {RULE}"
    )
    with pytest.raises(InvalidMaskError) as caught:
        resolve(Lengths(keys=[1, 2]), False, (), 4, 3, 5, F32)
    assert str(caught.value) == (
        "Invalid attention mask: Lengths.keys does not have one entry per row of the batch\n"
        "  rows of Lengths.keys: (2,)\n  batch               : ()\n"
        "HINT: the inputs have no batch axis, so give one for all"
    )


def test_errors_are_value_errors_too():
    with pytest.raises(ValueError, match="Invalid attention mask"):
        Window(left=-1)
    with pytest.raises(errors.AttentionError):
        Window(left=-1)
