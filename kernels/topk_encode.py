"""TopK-SAE encode: one entry point, gradients for every form, dispatch by the tensor's device and dtype."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activations import SparseActivations
from .chunked import chunked_topk_encode
from .naive import naive_topk_encode
from .sparse_rows import scattered_sum, weighted_sum

__all__ = ["FORMS", "SparseActivations", "topk_encode"]

FORMS = ("auto", "naive", "chunked")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, form: str = "auto", max_bytes: int = 256 * 2**20
) -> SparseActivations:
    """Encode `x` sparsely: the top k of `x @ W_enc.T + b_enc`, then ReLU.

    Every form has the same meaning: products accumulate in fp32 (fp64 if `x` or `W_enc` is fp64, also under autocast);
    equal values go to the lowest index; slots without a positive value hold value 0, index 0, `active` False; a token
    whose input or pre-activations are not all finite is inactive throughout and marked in `finite`.

    `values` is differentiable in `x`, `W_enc` and `b_enc`; the choice of features is locally constant, so the gradient
    is exact: `dx = sum_j g_j W_enc[i_j]`, `dW_enc[i_j] += g_j x`, `db_enc[i_j] += g_j`, over the active slots.

    Args:
        x: residual stream, `[..., d_model]`, any floating dtype.
        W_enc: encoder, `[d_sae, d_model]`, the layout of Qwen-Scope's files (section 2 of arXiv 2605.11887).
        b_enc: `[d_sae]`.
        k: slots per token, 1 to d_sae.
        form: "auto", "chunked" (any device, bounded memory) or "naive" (ground truth, holds `[tokens, d_sae]`).
        max_bytes: bound on the memory used beside inputs and outputs, for forms other than "naive". Below what 256
            features of one token need, that is used instead.

    Returns:
        `SparseActivations` with leading shape `x.shape[:-1]`.

    Raises:
        TypeError: if an argument is not a floating-point tensor or k is not an integer.
        ValueError: if shapes or devices do not agree, k is out of range, or `form` is unknown.

    Example:
        >>> x, W_enc = torch.eye(3), torch.eye(3)
        >>> topk_encode(x, W_enc, torch.zeros(3), k=1).indices.flatten().tolist()
        [0, 1, 2]
    """
    k = _check(x, W_enc, b_enc, k, form, max_bytes)
    if form == "naive":
        return naive_topk_encode(x, W_enc, b_enc, k)
    shape = x.shape[:-1]
    values, indices, active, finite = _TopKEncode.apply(x.reshape(-1, x.shape[-1]), W_enc, b_enc, k, max_bytes)
    return SparseActivations(
        values.view(*shape, k), indices.view(*shape, k), active.view(*shape, k), finite.view(shape)
    )


class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, max_bytes: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            acts = chunked_topk_encode(x, W_enc, b_enc, k, max_bytes=max_bytes)
        # x is needed for the weights' gradient only; a frozen SAE keeps no reference to the residual stream
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W_enc, acts.indices, acts.active)
        ctx.dtypes = x.dtype, b_enc.dtype
        ctx.mark_non_differentiable(acts.indices, acts.active, acts.finite)
        return acts.values, acts.indices, acts.active, acts.finite

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, W_enc, indices, active = ctx.saved_tensors
        x_dtype, b_dtype = ctx.dtypes
        dx = dW = db = None
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.masked_fill(~active, 0)  # [tokens, k]
            if ctx.needs_input_grad[0]:
                dx = weighted_sum(grad, indices, W_enc).to(x_dtype)
                # an unused slot reads row 0, and zero times a non-finite weight is not zero
                dx.masked_fill_(~active.any(-1, keepdim=True), 0)
            if ctx.needs_input_grad[1]:
                dW = scattered_sum(grad, indices, active, x, W_enc.shape[0]).to(W_enc.dtype)
            if ctx.needs_input_grad[2]:
                db = grad.new_zeros(W_enc.shape[0]).index_add_(0, indices.flatten(), grad.flatten()).to(b_dtype)
        return dx, dW, db, None, None


def _check(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, form: str, max_bytes: int) -> int:
    for name, tensor in (("x", x), ("W_enc", W_enc), ("b_enc", b_enc)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} must have a floating dtype (fp16, bf16, fp32, fp64), got {tensor.dtype}")
        if tensor.device != W_enc.device:
            raise ValueError(f"{name} is on {tensor.device} but W_enc is on {W_enc.device}; move them to one device")
    if W_enc.ndim != 2 or 0 in W_enc.shape:
        raise ValueError(f"W_enc must be [d_sae, d_model], got shape {tuple(W_enc.shape)}")
    d_sae, d_model = W_enc.shape
    if x.ndim == 0 or x.shape[-1] != d_model:
        raise ValueError(
            f"x must be [..., d_model = {d_model}] to fit W_enc {tuple(W_enc.shape)}, got {tuple(x.shape)}"
        )
    if b_enc.shape != (d_sae,):
        raise ValueError(f"b_enc must be [d_sae = {d_sae}] to fit W_enc, got {tuple(b_enc.shape)}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if max_bytes <= 0:
        raise ValueError(f"max_bytes must be positive, got {max_bytes}")
    if isinstance(k, bool):
        raise TypeError(f"k must be an integer, got {k!r}")
    try:
        k = operator.index(k)
    except TypeError:
        raise TypeError(f"k must be an integer, got {k!r}") from None
    if not 1 <= k <= d_sae:
        raise ValueError(f"k must be between 1 and d_sae = {d_sae}, got {k}")
    return k
