"""The specification of attention over neighbours and of the graph layers, in plain NumPy, written to be read.

Nothing here comes from the package. Edge e goes from source ``edge_index[0, e]`` to target ``edge_index[1, e]``; what
belongs to edges is (E, ...) in the order of `edge_index`. Of one edge, with source j and target i, and head h:

    s = scale * q_i . (k_j + edge_key) + edge_bias      score
    a = exp(s) / sum of exp(s) over the edges into i    coefficient
    m = a * keep * edge_weight * (v_j + edge_value)     message

and the output of target i is the sum of the messages into it, or that over its in-degree ("mean"), or their largest in
each channel ("max", where the first edge wins a tie).

An edge with a bias of -inf is hidden: it is selected out, never multiplied by zero, and no candidate for "max"; it
counts in the in-degree. A dropped edge brings 0, also to "max". A target to which nothing comes, or all of it hidden,
has output 0, lse -inf and gradients 0. What is seen follows IEEE arithmetic.

Parameters of layers are dictionaries by the names of PyTorch Geometric, with its shapes: weights are (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

Array = NDArray[Any]
Parameters = Mapping[str, ArrayLike]
_ieee = np.errstate(all="ignore")


class Attended(NamedTuple):
    output: Array  # (Nt, H, C)
    lse: Array  # (Nt, H)
    coefficients: Array  # (E, H), before dropout and edge weights


class LayerOutput(NamedTuple):
    output: Array  # (Nt, H * C), or (Nt, C) if heads are averaged
    coefficients: Array  # (edges with loops, H), before dropout and edge weights
    edge_index: NDArray[np.int64]  # with loops


def into(targets: Array, num_targets: int) -> Iterator[tuple[int, Array]]:
    """Each target and the numbers of the edges into it, ascending."""
    order = np.argsort(targets, kind="stable")
    bounds = np.searchsorted(targets[order], np.arange(num_targets + 1))
    for i in range(num_targets):
        yield i, order[bounds[i] : bounds[i + 1]]


# --- functions -------------------------------------------------------------------------------------------------------
@_ieee
def softmax(scores: Array, targets: Array, num_targets: int) -> tuple[Array, Array]:
    """The coefficients (E, H) and the logarithms of their denominators (Nt, H), in the precision of the scores."""
    coefficients = np.zeros_like(scores)
    lse = np.full((num_targets, *scores.shape[1:]), -np.inf, scores.dtype)
    for i, at in into(targets, num_targets):
        s = scores[at]
        largest = s.max(axis=0, initial=-np.inf)
        shift = np.where(np.isneginf(largest), 0, largest)  # an empty row: exp(-inf - 0) is 0, exp(-inf + inf) is not
        e = np.exp(s - shift)
        total = e.sum(axis=0)
        coefficients[at] = np.where(total == 0, 0, e / total)
        lse[i] = np.log(total) + shift
    return coefficients, lse


def softmax_gradient(grad: Array, coefficients: Array, targets: Array, num_targets: int) -> Array:
    """The gradient of the scores, given that of the coefficients."""
    ds = np.zeros_like(coefficients)
    for _, at in into(targets, num_targets):
        a, da = coefficients[at], grad[at]
        ds[at] = a * (da - (a * da).sum(axis=0))
    return ds


def aggregate(messages: Array, targets: Array, num_targets: int, how: str = "sum", seen: Array | None = None) -> Array:
    """Messages (E, H, C) to targets (Nt, H, C); those not `seen` (E, H) are not there, but in the in-degree."""
    visible = np.ones(messages.shape, bool) if seen is None else np.broadcast_to(seen[..., None], messages.shape)
    out = np.zeros((num_targets, *messages.shape[1:]), messages.dtype)
    for i, at in into(targets, num_targets):
        if not len(at):
            continue
        if how == "max":
            largest = np.where(visible[at], messages[at], -np.inf).max(axis=0)
            out[i] = np.where(visible[at].any(axis=0), largest, 0)
        else:
            out[i] = np.where(visible[at], messages[at], 0).sum(axis=0)
            out[i] /= len(at) if how == "mean" else 1
    return out


def aggregate_gradient(
    grad_output: Array, messages: Array, targets: Array, num_targets: int, how: str, seen: Array
) -> Array:
    """The gradient of the messages (E, H, C); 0 where not seen."""
    visible = np.broadcast_to(seen[..., None], messages.shape)
    grad = np.zeros_like(messages)
    for i, at in into(targets, num_targets):
        if not len(at):
            continue
        if how == "max":
            first = np.where(visible[at], messages[at], -np.inf).argmax(axis=0)
            wins = np.arange(len(at))[:, None, None] == first
            grad[at] = np.where(wins, grad_output[i], 0)
        else:
            grad[at] = grad_output[i] / (len(at) if how == "mean" else 1)
    return np.where(visible, grad, 0)


class _Edges(NamedTuple):
    """What forward and backward share, one row for each edge."""

    sources: Array
    targets: Array
    query: Array  # (E, H, D), of the target
    key: Array  # (E, H, D), with edge_key
    value: Array  # (E, H, C), with edge_value
    scale: Any
    scores: Array  # (E, H), -inf where hidden
    seen: Array  # (E, H)
    factor: Array  # (E, H): keep * edge_weight


@_ieee
def _gather(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    edge_index: ArrayLike,
    edge_bias: ArrayLike | None,
    edge_key: ArrayLike | None,
    edge_value: ArrayLike | None,
    scale: float | None,
    edge_weight: ArrayLike | None,
    keep: ArrayLike | None,
    dtype: np.dtype[Any],
) -> _Edges:
    sources, targets = np.asarray(edge_index, np.int64)
    q, k, v = np.asarray(query, dtype)[targets], np.asarray(key, dtype)[sources], np.asarray(value, dtype)[sources]
    k = k if edge_key is None else k + np.asarray(edge_key, dtype)
    v = v if edge_value is None else v + np.asarray(edge_value, dtype)
    scale = dtype.type((q.shape[-1] or 1) ** -0.5 if scale is None else scale)
    scores = scale * (q * k).sum(axis=-1)
    seen, factor = np.ones(scores.shape, bool), np.ones(scores.shape, dtype)
    if edge_bias is not None:
        bias = np.asarray(edge_bias, dtype)
        seen = ~np.isneginf(bias)
        scores = np.where(seen, scores + bias, -np.inf).astype(dtype)
    if keep is not None:
        factor = factor * np.asarray(keep, dtype)
    if edge_weight is not None:
        factor = factor * np.asarray(edge_weight, dtype)[:, None]
    return _Edges(sources, targets, q, k, v, scale, scores, seen, factor)


@_ieee
def neighbor_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    edge_index: ArrayLike,
    *,
    edge_bias: ArrayLike | None = None,
    edge_key: ArrayLike | None = None,
    edge_value: ArrayLike | None = None,
    scale: float | None = None,
    edge_weight: ArrayLike | None = None,
    keep: ArrayLike | None = None,
    aggregation: str = "sum",
    dtype: DTypeLike = np.float64,
) -> Attended:
    """Attention of targets to the sources of their edges.

    Parameters
    ----------
    query : (Nt, H, D)
    key, value : (Ns, H, D), (Ns, H, C)
    edge_bias, edge_key, edge_value, edge_weight : (E, H), (E, H, D), (E, H, C), (E,)
    keep : (E, H)
        What dropout multiplies the coefficients with: 0, or 1 / (1 - p).
    dtype
        The precision of every step.
    """
    Nt = len(np.asarray(query))
    e = _gather(
        query, key, value, edge_index, edge_bias, edge_key, edge_value, scale, edge_weight, keep, np.dtype(dtype)
    )
    a, lse = softmax(e.scores, e.targets, Nt)
    a = np.where(e.seen, a, 0)
    messages = (a * e.factor)[..., None] * e.value
    return Attended(aggregate(messages, e.targets, Nt, aggregation, e.seen), lse, a)


@_ieee
def neighbor_gradients(
    grad_output: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    edge_index: ArrayLike,
    *,
    edge_bias: ArrayLike | None = None,
    edge_key: ArrayLike | None = None,
    edge_value: ArrayLike | None = None,
    scale: float | None = None,
    edge_weight: ArrayLike | None = None,
    keep: ArrayLike | None = None,
    aggregation: str = "sum",
    dtype: DTypeLike = np.float64,
) -> dict[str, Array]:
    """The gradients of sum(grad_output * output), by the names of the arguments; of all edge terms, given or not."""
    dtype = np.dtype(dtype)
    Nt, Ns = len(np.asarray(query)), len(np.asarray(key))
    e = _gather(query, key, value, edge_index, edge_bias, edge_key, edge_value, scale, edge_weight, keep, dtype)
    a = np.where(e.seen, softmax(e.scores, e.targets, Nt)[0], 0)
    c = a * e.factor
    do = np.asarray(grad_output, dtype)
    dm = aggregate_gradient(do, c[..., None] * e.value, e.targets, Nt, aggregation, e.seen)
    dv = np.where(e.seen[..., None], c[..., None] * dm, 0)
    dc = np.where(e.seen, (dm * e.value).sum(axis=-1), 0)
    ds = np.where(e.seen, softmax_gradient(dc * e.factor, a, e.targets, Nt), 0)
    kept = np.ones_like(a) if keep is None else np.asarray(keep, dtype)
    dq = np.where(e.seen[..., None], e.scale * ds[..., None] * e.key, 0)
    dk = np.where(e.seen[..., None], e.scale * ds[..., None] * e.query, 0)
    return {
        "query": _summed(dq, e.targets, Nt),
        "key": _summed(dk, e.sources, Ns),
        "value": _summed(dv, e.sources, Ns),
        "edge_bias": ds,
        "edge_key": dk,
        "edge_value": dv,
        "edge_weight": np.where(e.seen, dc * a * kept, 0).sum(axis=-1),
    }


def _summed(rows: Array, nodes: Array, n: int) -> Array:
    out = np.zeros((n, *rows.shape[1:]), rows.dtype)
    for i, at in into(nodes, n):
        out[i] = rows[at].sum(axis=0)
    return out


# --- layers ----------------------------------------------------------------------------------------------------------
def with_loops(
    edge_index: ArrayLike, edge_attr: ArrayLike | None, n: int, policy: str | bool, fill_value: Any = "mean"
) -> tuple[NDArray[np.int64], Array | None]:
    """The edges and their features, with a self-loop for each of the first n nodes behind the rest.

    "replace" (or True) takes out the loops that are there, "add" does not, "keep" (or False) adds none.
    `fill_value`: features of the new loops are the "mean" or the sum ("add") of those of the other edges to the node,
    or this number, or this array.
    """
    edges = np.asarray(edge_index, np.int64)
    attr = None if edge_attr is None else np.asarray(edge_attr, np.float64)
    if policy in ("keep", False):
        return edges, attr
    stays = edges[0] != edges[1] if policy in ("replace", True) else np.ones(edges.shape[1], bool)
    edges = edges[:, stays]
    if attr is not None:
        attr = attr[stays]
        loops = np.zeros((n, *attr.shape[1:]))
        if isinstance(fill_value, str):
            for i in range(n):
                others = attr[edges[1] == i]
                if len(others):
                    loops[i] = others.mean(axis=0) if fill_value == "mean" else others.sum(axis=0)
        else:
            loops[:] = fill_value
        attr = np.concatenate([attr, loops])
    return np.concatenate([edges, np.stack([np.arange(n)] * 2)], axis=1), attr


def leaky_relu(x: Array, slope: float) -> Array:
    return np.where(x > 0, x, slope * x)


def gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gat(parameters: Parameters, x: Any, edge_index: ArrayLike, edge_attr: Any = None, **settings: Any) -> LayerOutput:
    """GAT (Veličković et al., 2018): s = LeakyReLU(att_src . x_j + att_dst . x_i [+ att_edge . e]), x after `lin`.

    `x` is (N, in), or a pair of sources and targets; the targets may be None. `settings` are those of `_layer`.
    """
    p, (xs, xt) = _doubles(parameters), _pair(x)
    H = p["att_src"].shape[1]
    slope = settings.pop("negative_slope", 0.2)

    def scores(edges: Array, attr: Array | None) -> tuple[Array, Array, None]:
        source = _heads(_linear(p, "lin" if "lin.weight" in p else "lin_src", xs), H)
        s = (source * p["att_src"]).sum(axis=-1)[edges[0]]
        if xt is not None:
            target = _heads(_linear(p, "lin" if "lin.weight" in p else "lin_dst", xt), H)
            s = s + (target * p["att_dst"]).sum(axis=-1)[edges[1]]
        if attr is not None:
            s = s + (_heads(_linear(p, "lin_edge", attr), H) * p["att_edge"]).sum(axis=-1)
        return leaky_relu(s, slope), source, None

    return _layer(p, xs, xt, edge_index, edge_attr, scores, **settings)


def gatv2(
    parameters: Parameters,
    x: Any,
    edge_index: ArrayLike,
    edge_attr: Any = None,
    *,
    share_weights: bool = False,
    negative_slope: float = 0.2,
    **settings: Any,
) -> LayerOutput:
    """GATv2 (Brody et al., 2022): s = att . LeakyReLU(lin_l(x_j) + lin_r(x_i) [+ lin_edge(e)]), value lin_l(x_j)."""
    p, (xs, xt) = _doubles(parameters), _pair(x)
    H = p["att"].shape[1]

    def scores(edges: Array, attr: Array | None) -> tuple[Array, Array, None]:
        source = _heads(_linear(p, "lin_l", xs), H)
        target = _heads(_linear(p, "lin_l" if share_weights else "lin_r", xt), H)
        z = source[edges[0]] + target[edges[1]]
        if attr is not None:
            z = z + _heads(_linear(p, "lin_edge", attr), H)
        return (leaky_relu(z, negative_slope) * p["att"]).sum(axis=-1), source, None

    return _layer(p, xs, xt, edge_index, edge_attr, scores, **settings)


def graph_transformer(
    parameters: Parameters,
    x: Any,
    edge_index: ArrayLike,
    edge_attr: Any = None,
    *,
    heads: int,
    concat: bool = True,
    beta: bool = False,
    root_weight: bool = True,
    aggregation: str = "sum",
    edge_weight: ArrayLike | None = None,
    keep: ArrayLike | None = None,
) -> LayerOutput:
    """The graph transformer (Shi et al., 2021), PyG's TransformerConv: edge features join keys and values alike."""
    p, (xs, xt) = _doubles(parameters), _pair(x)
    edges = np.asarray(edge_index, np.int64)
    q, k, v = (_heads(_linear(p, f"lin_{n}", y), heads) for n, y in (("query", xt), ("key", xs), ("value", xs)))
    e = None if edge_attr is None else _heads(_linear(p, "lin_edge", np.asarray(edge_attr, np.float64)), heads)
    terms = {"edge_key": e, "edge_value": e, "edge_weight": edge_weight, "keep": keep, "aggregation": aggregation}
    attended = neighbor_attention(q, k, v, edges, **terms)
    out = _joined(attended.output, concat)
    if root_weight:
        root = _linear(p, "lin_skip", xt)
        if beta:
            gate = sigmoid(_linear(p, "lin_beta", np.concatenate([out, root, out - root], axis=-1)))
            out = gate * root + (1 - gate) * out
        else:
            out = out + root
    return LayerOutput(out, attended.coefficients, edges)


def hgt(
    parameters: Parameters,
    x: Mapping[str, ArrayLike],
    edges: Mapping[tuple[str, str, str], ArrayLike],
    metadata: tuple[list[str], list[tuple[str, str, str]]],
    heads: int,
    *,
    edge_attr: Mapping[tuple[str, str, str], ArrayLike] | None = None,
    edge_weights: Mapping[tuple[str, str, str], ArrayLike] | None = None,
) -> dict[str, Array]:
    """The heterogeneous graph transformer (Hu et al., 2020), PyG's HGTConv: one softmax over all relations to a target.

    Relations that are not in `edges` have no edges. Node types that no relation of `metadata` goes to are not in the
    result. PyG has no edge features: here ``edge_attr @ edge_weights.T``, with weights (out, edge_dim) for each
    relation, joins the keys and values of the relation as it does in `graph_transformer`.
    """
    p = _doubles(parameters)
    relations = metadata[1]
    kqv = {t: np.split(_linear(p, f"kqv_lin.lins.{t}", np.asarray(y, np.float64)), 3, axis=1) for t, y in x.items()}
    out = {}
    for target in {relation[2] for relation in relations} & x.keys():
        q = _heads(kqv[target][1], heads)
        D, scores, values, ends = q.shape[-1], [], [], []
        for n, relation in enumerate(relations):
            if relation not in edges or relation[2] != target:
                continue
            j, i = np.asarray(edges[relation], np.int64)
            at = np.arange(heads) * len(relations) + n  # the matrices of this relation, one for each head
            k = np.einsum("nhd,hde->nhe", _heads(kqv[relation[0]][0], heads), p["k_rel.weight"][at])[j]
            v = np.einsum("nhd,hde->nhe", _heads(kqv[relation[0]][2], heads), p["v_rel.weight"][at])[j]
            if edge_attr is not None and edge_weights is not None and relation in edge_attr:
                e = _heads(np.asarray(edge_attr[relation]) @ np.asarray(edge_weights[relation]).T, heads)
                k, v = k + e, v + e
            scores.append((q[i] * k).sum(axis=-1) * p[f"p_rel.{'__'.join(relation)}"] / math.sqrt(D))
            values.append(v)
            ends.append(i)
        attended = np.zeros_like(q)
        if ends:
            i = np.concatenate(ends)
            coefficients, _ = softmax(np.concatenate(scores), i, len(q))
            attended = aggregate(coefficients[..., None] * np.concatenate(values), i, len(q))
        y = _linear(p, f"out_lin.lins.{target}", gelu(_joined(attended, True)))
        old = np.asarray(x[target], np.float64)
        if y.shape[1] == old.shape[1]:
            gate = sigmoid(p[f"skip.{target}"])
            y = gate * y + (1 - gate) * old
        out[target] = y
    return out


def _layer(
    p: dict[str, Array],
    xs: Array,
    xt: Array | None,
    edge_index: ArrayLike,
    edge_attr: ArrayLike | None,
    scores: Any,
    *,
    num_targets: int | None = None,
    concat: bool = True,
    loops: str | bool = "replace",
    fill_value: Any = "mean",
    aggregation: str = "sum",
    normalize: bool = True,
    edge_weight: ArrayLike | None = None,
    keep: ArrayLike | None = None,
) -> LayerOutput:
    """What GAT and GATv2 share. Without `normalize` the coefficients are the scores. A new loop has edge weight 1."""
    Nt = len(xt) if xt is not None else len(xs) if num_targets is None else num_targets
    E = np.shape(edge_index)[1]
    edges, attr = with_loops(edge_index, edge_attr, min(len(xs), Nt), loops, fill_value)
    s, value, _ = scores(edges, attr)
    coefficients = softmax(s, edges[1], Nt)[0] if normalize else s
    factor = np.ones_like(s) if keep is None else np.asarray(keep, np.float64)
    if edge_weight is not None:
        weights = np.asarray(edge_weight, np.float64)
        factor = factor * with_loops(edge_index, weights.reshape(E, 1), min(len(xs), Nt), loops, 1.0)[1]
    out = _joined(aggregate((coefficients * factor)[..., None] * value[edges[0]], edges[1], Nt, aggregation), concat)
    if "res.weight" in p and xt is not None:
        out = out + _linear(p, "res", xt)
    return LayerOutput(out + p.get("bias", 0), coefficients, edges)


def _doubles(parameters: Parameters) -> dict[str, Array]:
    return {name: np.asarray(x, np.float64) for name, x in parameters.items()}


def _pair(x: Any) -> tuple[Array, Array]:
    """Features of sources and of targets: the same, unless two are given."""
    source, target = x if isinstance(x, tuple | list) else (x, x)
    return np.asarray(source, np.float64), None if target is None else np.asarray(target, np.float64)  # type: ignore


def _linear(p: dict[str, Array], name: str, x: Array) -> Array:
    y: Array = x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)
    return y


def _heads(x: Array, heads: int) -> Array:
    return x.reshape(len(x), heads, x.shape[1] // heads)


def _joined(x: Array, concat: bool) -> Array:
    """(N, H, C) to (N, H * C), or to the mean over heads (N, C)."""
    return x.reshape(len(x), x.shape[1] * x.shape[2]) if concat else x.mean(axis=1)
