"""The three products that sparse encode and decode, and their gradients, are made of.

Notation: `weights` and `indices` are `[tokens, k]`, `table` is `[rows, width]` (a row per feature). None of these
holds `[tokens, k, width]`: it would be 1.7 GB in bf16 for 4096 tokens, k = 50 and a width of 4096.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["gathered_dots", "scattered_sum", "weighted_sum"]

# On a CPU the gathered rows stay in cache until the product reads them (twice as fast at a width of 2048); elsewhere
# fewer, larger launches.
_CPU_CHUNK_BYTES = 2**19
_CHUNK_BYTES = 128 * 2**20


def weighted_sum(weights: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """`out[t] = sum_j weights[t, j] * table[indices[t, j]]`, `[tokens, width]` in the dtype of `weights`."""
    if table.dtype == weights.dtype:
        return F.embedding_bag(indices, table, per_sample_weights=weights, mode="sum")
    out = weights.new_empty(indices.shape[0], table.shape[1])
    for rows in _chunks(indices, table, weights.dtype):
        torch.bmm(weights[rows, None, :], table[indices[rows]].to(weights.dtype), out=out[rows, None, :])
    return out


def gathered_dots(vectors: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """`out[t, j] = <table[indices[t, j]], vectors[t]>`, `[tokens, k]` in the dtype of `vectors` `[tokens, width]`."""
    out = vectors.new_empty(indices.shape)
    for rows in _chunks(indices, table, vectors.dtype):
        torch.bmm(table[indices[rows]].to(vectors.dtype), vectors[rows, :, None], out=out[rows, :, None])
    return out


def scattered_sum(weights: Tensor, indices: Tensor, active: Tensor, vectors: Tensor, rows: int) -> Tensor:
    """`out[f] = sum over active (t, j) with indices[t, j] = f of weights[t, j] * vectors[t]`, `[rows, width]`.

    Entries are sorted by feature and summed in that order, so the result does not depend on threads or atomics.
    Inactive entries are taken out rather than multiplied by zero: their vectors may not be finite.
    """
    token, slot = active.nonzero(as_tuple=True)
    feature, order = indices[token, slot].sort(stable=True)
    offsets = torch.searchsorted(feature, torch.arange(rows, device=feature.device))
    sample = weights[token, slot][order]
    return F.embedding_bag(token[order], vectors.to(weights.dtype), offsets, mode="sum", per_sample_weights=sample)


def _chunks(indices: Tensor, table: Tensor, dtype: torch.dtype) -> list[slice]:
    """Row ranges whose gathered `[rows, k, width]` stays within a fixed size."""
    size = max(1, indices.shape[1] * table.shape[1] * (dtype.itemsize + (table.dtype != dtype) * table.dtype.itemsize))
    step = max(1, (_CPU_CHUNK_BYTES if table.device.type == "cpu" else _CHUNK_BYTES) // size)
    return [slice(start, start + step) for start in range(0, indices.shape[0], step)]
