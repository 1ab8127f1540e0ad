"""Attention on torch's CPU tensors, with gradients for torch's autograd, computed by this package's kernels.

Tensors are read where they lie, and results are tensors over the arrays the kernels wrote: nothing is copied.
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import checks, dense, dense_past, masks
from ..errors import InvalidInputError, InvalidMaskError, TrainingError

try:
    import torch
except ModuleNotFoundError as error:
    words = "ruvector_numba.interop.torch needs PyTorch: pip install torch"
    raise ModuleNotFoundError(words, name=error.name) from error

__all__ = ["attention"]

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # compilers see tensors, and none are here between the kernels
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: masks.Mask | torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | ArrayLike | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    """As ``torch.nn.functional.scaled_dot_product_attention``, on CPU tensors, by `scaled_dot_product_attention`.

    Differs from torch's in that a query that sees no key gets zeros, that `attn_mask` and `is_causal` compose, and that
    the result is the same to the bit for any number of threads. Half precision is computed in float32 and rounded once.

    Under torch.compile it is a call between two graphs, so that ``fullgraph=True`` is refused by torch. The transforms
    of torch.func (vmap, grad, jvp) are not supported.

    Parameters
    ----------
    query : tensor (..., H, Lq, D), float32, float64, float16 or bfloat16
        On the CPU, of any strides.
    key : tensor (..., Hk, Lk, D)
    value : tensor (..., Hk, Lk, Dv)
    attn_mask : bool tensor, float tensor, or mask of `ruvector_numba.masks`, optional
        Tensors broadcast to (..., H, Lq, Lk). A float tensor has the dtype of the query, or is float32 where that is of
        half precision, and may ask for a gradient; an array inside a mask object is a constant.
    seed : int, optional
        Of the dropout. If None, drawn from torch's generator: ``torch.manual_seed`` and checkpointing work as usual.
    dropout_p, is_causal, scale, enable_gqa, softcap, alibi_slopes
        As in `scaled_dot_product_attention`. The slopes are constants.

    Returns
    -------
    tensor (..., H, Lq, Dv)

    Raises
    ------
    InvalidInputError, InvalidMaskError, DimensionMismatchError, OutOfMemoryError
        As in `scaled_dot_product_attention`; InvalidInputError also if a tensor is not dense, not on the CPU, or of
        another dtype, or `alibi_slopes` asks for a gradient.
    TrainingError
        If a gradient of this function is itself differentiated.

    Examples
    --------
    >>> import torch
    >>> from ruvector_numba.interop.torch import attention
    >>> query, key, value = (torch.ones(2, 4, 10, 8, requires_grad=True) for _ in range(3))
    >>> attention(query, key, value, is_causal=True).sum().backward()
    >>> value.grad.shape, float(value.grad.sum())
    (torch.Size([2, 4, 10, 8]), 640.0)
    """
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        _check_tensor(name, x)
    if not query.dtype == key.dtype == value.dtype:
        odd = "key" if key.dtype != query.dtype else "value"
        dtypes = {f"{name}.dtype": x.dtype for name, x in tensors.items()}
        hint = f"cast them to one: {odd} = {odd}.to(query.dtype)"
        raise InvalidInputError("query, key and value differ in dtype", shapes=dtypes, hint=hint)
    if attn_mask is not None and not isinstance(attn_mask, masks.Mask):
        _check_mask(attn_mask, query.dtype)
    if seed is None and isinstance(dropout_p, numbers.Real) and dropout_p:
        seed = int(torch.randint((1 << 63) - 1, ()))
    options = dict(
        dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, softcap=softcap,
        alibi_slopes=_slopes(alibi_slopes), seed=seed, dtype="bfloat16" if query.dtype == torch.bfloat16 else None,
    )  # fmt: skip
    return _Attention.apply(query, key, value, attn_mask, options, torch.is_grad_enabled())


class _Attention(torch.autograd.Function):  # type: ignore[misc]  # torch comes without types here
    @staticmethod
    def forward(
        ctx: Any, query: Any, key: Any, value: Any, attn_mask: Any, options: dict[str, Any], is_grad_enabled: bool
    ) -> Any:
        arrays = _arrays(query, key, value, attn_mask)
        if not (is_grad_enabled and any(ctx.needs_input_grad)):
            return _tensor(dense.scaled_dot_product_attention(*arrays, **options))
        past = dense_past.forward(checks.call(*arrays, **options))
        output, sums = _tensor(past.output), torch.from_numpy(past.sums)
        # Gradients need the difference of two nearly equal numbers: the output before it is rounded to half precision.
        exact = output if past.exact is None or past.exact is past.output else _tensor(past.exact)
        # Whatever is a tensor is kept by torch, which then notices changes in place, and may offload or recompute it.
        is_tensor = isinstance(attn_mask, torch.Tensor)
        ctx.save_for_backward(query, key, value, attn_mask if is_tensor else None, exact, sums)
        ctx.rule = None if is_tensor else attn_mask
        ctx.options = options | {"seed": past.call.seed}
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        query, key, value, tensor_mask, exact, sums = ctx.saved_tensors
        attn_mask = ctx.rule if tensor_mask is None else tensor_mask
        wants_bias = ctx.needs_input_grad[3]
        gradients = _Gradients.apply(grad_output, query, key, value, attn_mask, exact, sums, ctx.options, wants_bias)
        return *(g if needs else None for g, needs in zip(gradients, ctx.needs_input_grad, strict=False)), None, None


class _Gradients(torch.autograd.Function):  # type: ignore[misc]
    """The backward pass as a function of its own, so that second derivatives are refused.

    torch's `once_differentiable` refuses them only if `grad_output` has a gradient, and else treats what the backward
    pass returns as constant: the second derivative of ``attention(...).sum()`` would be wrong without a word.
    """

    @staticmethod
    def forward(
        ctx: Any, grad_output: Any, query: Any, key: Any, value: Any, attn_mask: Any, exact: Any, sums: Any,
        options: dict[str, Any], wants_bias: bool,
    ) -> Any:  # fmt: skip
        call = checks.call(*_arrays(query, key, value, attn_mask), **options)
        past = dense_past.Past(call, _array(exact), sums=_array(sums), top=None)
        g = past.backward(_array(grad_output), None, wants_bias)
        return tuple(None if x is None else _tensor(x) for x in (g.query, g.key, g.value, g.bias))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise TrainingError(
            "the gradients of attention have no gradients of their own",
            hint="for second derivatives use torch's function, under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
        )


def _array(x: torch.Tensor) -> NDArray[Any]:
    """The tensor's memory as an array; bfloat16, which NumPy lacks, as its bits."""
    x = x.detach().resolve_neg()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def _tensor(x: NDArray[Any]) -> torch.Tensor:
    """A result as a tensor: no other results than those of bfloat16 are uint16."""
    tensor = torch.from_numpy(x)
    return tensor.view(torch.bfloat16) if x.dtype == np.uint16 else tensor


def _arrays(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any) -> tuple[Any, ...]:
    mask = _array(attn_mask) if isinstance(attn_mask, torch.Tensor) else attn_mask
    return _array(query), _array(key), _array(value), mask


# Checks, of what torch adds: shapes and numbers are checked with the arrays


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, torch.Tensor):
        hint = f"torch.as_tensor({name}), or for arrays ruvector_numba.scaled_dot_product_attention"
        raise InvalidInputError(f"{name} is a {type(x).__name__}, not a tensor", hint=hint)
    if x.is_nested:
        hint = f"pad it, torch.nested.to_padded_tensor({name}, 0.0), and hide the padding: masks.Lengths(keys=...)"
        raise InvalidInputError(f"{name} is a nested tensor", hint=hint)
    if x.layout != torch.strided:
        raise InvalidInputError(f"{name} has layout {x.layout}", hint=f"make it dense: {name}.to_dense()")
    if x.device.type != "cpu":
        raise InvalidInputError(f"{name} is on device {x.device}, not on the CPU", hint=f"move it: {name}.cpu()")
    if x.dtype not in FLOATS and name != "attn_mask":
        hint = f"cast it: {name}.float()"
        known = ", ".join(map(str, FLOATS))
        raise InvalidInputError(f"{name} has dtype {x.dtype}, not one of {known}", hint=hint)


def _check_mask(mask: object, dtype: torch.dtype) -> None:
    _check_tensor("attn_mask", mask)
    wider = torch.float32 if dtype in HALVES else dtype
    if mask.dtype not in (torch.bool, dtype, wider):  # type: ignore[attr-defined]
        floats = f"{dtype} as the query" + " or torch.float32" * (dtype in HALVES)
        raise InvalidMaskError(
            f"dtype {mask.dtype}; a mask is bool (True = attend) or {floats} (added to the scores)",  # type: ignore[attr-defined]
            hint="attn_mask.bool() if non-zero means attend, attn_mask.to(query.dtype) if it is added",
        )


def _slopes(slopes: torch.Tensor | ArrayLike | None) -> ArrayLike | None:
    """Arrays are copied, so that the backward pass finds them unchanged."""
    if isinstance(slopes, torch.Tensor):
        _check_tensor("alibi_slopes", slopes)
        if slopes.requires_grad and torch.is_grad_enabled():
            hint = "pass alibi_slopes.detach(); to learn slopes, add them to the scores as a float mask"
            raise InvalidInputError("alibi_slopes requires a gradient, and there is none", hint=hint)
        slopes = _array(slopes.float() if slopes.dtype in HALVES else slopes)
    return slopes.copy() if isinstance(slopes, np.ndarray) else slopes
