"""The yardstick of half precision: the plain formula whose products have operands of that type and sums of float32.

Such is what every library computes from float16 or bfloat16 arrays: scores, softmax and sums in float32, weights (and,
backward, the gradients of scores) rounded before they are multiplied, results rounded at the end.
"""

import numpy as np
import reference

FLOAT = np.float32


@np.errstate(all="ignore")
def plain(kind, query, key, value, *, keep=None, eps=0.0, **terms):
    """output and lse; `terms` are those of `reference.attention`"""
    s = _scores(query, key, value, terms)
    p, lse = reference._softmax(s, eps)
    p = reference._dropped(p, keep).astype(kind).astype(FLOAT)
    return reference._selected_product(p, s.value, s.seen).astype(kind), lse, p.astype(kind)


@np.errstate(all="ignore")
def plain_gradients(kind, grad_output, query, key, value, *, grad_lse=None, keep=None, **terms):
    """As `reference.gradients`, all but those of scores rounded."""
    s = _scores(query, key, value, terms)
    p, _ = reference._softmax(s)
    do = np.asarray(grad_output, FLOAT)
    dropped = reference._dropped(p, keep).astype(kind).astype(FLOAT)
    dv = reference._selected_product(reference._transposed(dropped), do, reference._transposed(s.seen))
    dp = np.where(s.seen, reference._dropped(do @ reference._transposed(s.value), keep), 0)
    ds = dp - np.where(s.seen, p * dp, 0).sum(-1, keepdims=True)
    if grad_lse is not None:
        ds = ds + np.asarray(grad_lse, FLOAT)[..., None]
    ds = np.where(s.seen, p * ds, 0)
    raw = ds if s.through_cap is None else np.where(s.seen, ds * s.through_cap, 0)
    raw = raw.astype(kind).astype(FLOAT)
    dq = s.scale * reference._selected_product(raw, s.key, s.seen)
    dk = s.scale * reference._selected_product(
        reference._transposed(raw), np.asarray(query, FLOAT), reference._transposed(s.seen)
    )
    made = {
        "query": dq,
        "key": reference._summed_over_groups(dk, np.shape(key)),
        "value": reference._summed_over_groups(dv, np.shape(value)),
    }
    return {**{name: x.astype(kind) for name, x in made.items()}, "scores": ds}


def _scores(query, key, value, terms):
    names = ("visible", "bias", "scale", "softcap", "slopes")
    given = [terms.get(name) for name in names]
    return reference._scores(query, key, value, *given, terms.get("offset", 0), np.dtype(FLOAT))
