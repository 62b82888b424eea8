"""TopK-SAE decode: a weighted sum of a few decoder columns per token, with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .sparse_rows import gathered_dots, scattered_sum, weighted_sum

__all__ = ["sparse_decode"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BLOCK_BYTES = 64 * 2**20


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Reconstruction `x_hat = sum_j values_j * W_dec[:, indices_j] + b_dec`, without a dense `[tokens, d_sae]`.

    Differentiable in `values`, `W_dec` and `b_dec`: `dvalues_j = <W_dec[:, i_j], g>`, `dW_dec[:, i_j] += values_j g`,
    `db_dec = sum g`.

    Args:
        values: `[..., k]`, fp32 (or fp64); 0 in unused slots.
        indices: `[..., k]`, int64, from 0 to d_sae - 1; any valid index in unused slots.
        W_dec: decoder, `[d_model, d_sae]` (a feature is a column), any floating dtype. Stored column by column
            (`W_dec.T` contiguous) it is read in place; stored row by row it is turned over in blocks of at most
            64 MiB.
        b_dec: `[d_model]`.

    Returns:
        `[..., d_model]` in the dtype of `values`.

    Raises:
        TypeError: if a dtype is not as above.
        ValueError: if shapes or devices do not agree, or an index is out of range (checked on a CPU).
    """
    _check(values, indices, W_dec, b_dec)
    shape, k = values.shape[:-1], values.shape[-1]
    out = _SparseDecode.apply(values.reshape(-1, k), indices.reshape(-1, k), W_dec)
    return out.view(*shape, W_dec.shape[0]) + b_dec.to(values.dtype)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        out = values.new_empty(values.shape[0], W_dec.shape[0])
        with torch.autocast(values.device.type, enabled=False):
            for part, table in _row_major(W_dec):
                out[:, part] = weighted_sum(values, indices, table)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values, indices, W_dec = ctx.saved_tensors
        dvalues = dW = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dvalues = torch.zeros_like(values)
                for part, table in _row_major(W_dec):
                    dvalues += gathered_dots(grad[:, part], indices, table)
            if ctx.needs_input_grad[2]:
                dW = scattered_sum(values, indices, values != 0, grad, W_dec.shape[1]).T.to(W_dec.dtype)
        return dvalues, None, dW


def _row_major(W_dec: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of d_model with their part of the decoder as `[d_sae, width]` with contiguous rows."""
    d_model, d_sae = W_dec.shape
    if W_dec.T.is_contiguous():
        yield slice(0, d_model), W_dec.T
        return
    step = max(1, _BLOCK_BYTES // (d_sae * W_dec.dtype.itemsize))
    for start in range(0, d_model, step):
        part = slice(start, min(start + step, d_model))
        yield part, W_dec[part].T.contiguous()


def _check(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> None:
    if values.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"values must be fp32 or fp64, got {values.dtype}")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    for name, tensor in (("W_dec", W_dec), ("b_dec", b_dec)):
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} must have a floating dtype (fp16, bf16, fp32, fp64), got {tensor.dtype}")
    for name, tensor in (("values", values), ("indices", indices), ("b_dec", b_dec)):
        if tensor.device != W_dec.device:
            raise ValueError(f"{name} is on {tensor.device} but W_dec is on {W_dec.device}; move them to one device")
    if values.shape != indices.shape or values.ndim == 0:
        raise ValueError(
            f"values and indices must both be [..., k], got {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    if W_dec.ndim != 2 or b_dec.shape != W_dec.shape[:1]:
        raise ValueError(
            f"W_dec must be [d_model, d_sae] and b_dec [d_model], got {tuple(W_dec.shape)} and {tuple(b_dec.shape)}"
        )
    if indices.device.type == "cpu" and indices.numel():  # on a GPU the check would wait for the device
        low, high = (int(v) for v in indices.aminmax())
        if low < 0 or high >= W_dec.shape[1]:
            raise ValueError(f"indices must be in 0..{W_dec.shape[1] - 1} (d_sae - 1), got {low}..{high}")
