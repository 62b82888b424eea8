"""The ground truth: the encode written as its definition, for tests. It holds `[tokens, d_sae]` several times over."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import SparseActivations

__all__ = ["naive_topk_encode"]


def naive_topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> SparseActivations:
    """Top-k of `x @ W_enc.T + b_enc`, then ReLU, by a stable sort; gradients are autograd's own.

    Arguments as in `topk_encode`, which also checks them.
    """
    dtype = torch.float64 if torch.float64 in (x.dtype, W_enc.dtype) else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        finite = torch.isfinite(x).all(-1)  # [...]
        # A NaN times a zero gradient is a NaN, so the bad rows must leave before the product.
        clean = torch.where(finite[..., None], x, 0).to(dtype)
        pre = F.linear(clean, W_enc.to(dtype), b_enc.to(dtype))  # [..., d_sae]
        finite = finite & torch.isfinite(pre).all(-1)
        top, order = pre.sort(dim=-1, descending=True, stable=True)
        top, order = top[..., :k], order[..., :k]
        active = (top > 0) & finite[..., None]  # [..., k]
        return SparseActivations(torch.where(active, top, 0), torch.where(active, order, 0), active, finite)
