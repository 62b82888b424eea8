"""The encode in plain PyTorch, for any device, within a memory bound.

Columns of the pre-activations (features) are computed in blocks, rows (tokens) in chunks of a block, into one reused
buffer; each block keeps its k best candidates and merges them with the best so far. Streaming the weights once per
block, over many rows at a time, is what keeps this at the speed of the matrix product.

Selection inside a block has two levels: the k groups of columns with the largest maxima hold all of the top k, so one
cheap maximum over groups leaves k small groups to search. Candidates are compared by a 64-bit key, the bits of the
value above the inverted column, so equal values go to the lowest index without a stable sort and without asking the
device anything (no synchronisation on a GPU).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import SparseActivations

__all__ = ["chunked_topk_encode"]

# Wider blocks gained nothing on the machines tried, and the smallest published SAE has twice as many columns.
_MAX_COLUMNS = 16384
# With fewer rows than this the weights are streamed from memory too often.
_MIN_ROWS = 256
_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class _Plan:
    rows: int
    columns: int
    group: int


def chunked_topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, max_bytes: int) -> SparseActivations:
    """Encode `x` `[tokens, d_model]` without ever holding `[tokens, d_sae]`; arguments as in `topk_encode`.

    Not differentiable by itself: `topk_encode` adds the gradients.
    """
    dtype = torch.float64 if torch.float64 in (x.dtype, W_enc.dtype) else torch.float32
    tokens, d_sae = x.shape[0], W_enc.shape[0]
    native = x.dtype == W_enc.dtype and W_enc.dtype.itemsize == 2 and _native_half(x.device.type, W_enc.dtype)
    plan = _plan(x, W_enc, k, dtype, native, max_bytes)
    finite = torch.isfinite(x).all(-1)  # [tokens]
    values = x.new_zeros((tokens, k), dtype=dtype)
    indices = torch.zeros((tokens, k), dtype=torch.int64, device=x.device)
    buffer = x.new_empty(min(plan.rows, tokens) * plan.columns, dtype=dtype)
    for start in range(0, d_sae, plan.columns):
        stop = min(start + plan.columns, d_sae)
        weight = W_enc[start:stop] if native else W_enc[start:stop].to(dtype)
        bias = b_enc[start:stop].to(dtype)
        for first in range(0, tokens, plan.rows):
            rows = slice(first, min(first + plan.rows, tokens))
            pre = buffer[: (rows.stop - first) * (stop - start)].view(rows.stop - first, stop - start)
            if native:
                torch.mm(x[rows], weight.T, out_dtype=dtype, out=pre)
                pre += bias
            else:
                torch.addmm(bias, x[rows].to(dtype), weight.T, out=pre)
            found, columns = _select(pre, k, plan.group)  # [rows, <= k]
            # amax and amin carry NaN and both infinities; half the cost of isfinite over the block
            finite[rows] &= torch.isfinite(pre.amax(-1)) & torch.isfinite(pre.amin(-1))
            columns += start
            if start == 0:
                values[rows, : found.shape[1]] = found
                indices[rows, : found.shape[1]] = columns
            else:
                # stable: what was found in earlier columns stays ahead of its equals
                merged, order = torch.cat([values[rows], found], -1).sort(dim=-1, descending=True, stable=True)
                values[rows] = merged[:, :k]
                indices[rows] = torch.cat([indices[rows], columns], -1).gather(-1, order[:, :k])
    active = (values > 0) & finite[:, None]  # [tokens, k]
    return SparseActivations(values.masked_fill_(~active, 0), indices.masked_fill_(~active, 0), active, finite)


def _select(pre: Tensor, k: int, group: int) -> tuple[Tensor, Tensor]:
    """Find the k largest of every row after a ReLU, descending, ties in order of column, and their columns."""
    rows, columns = pre.shape
    k = min(k, columns)
    if pre.dtype == torch.float64:  # used by gradient checks; no room for a column beside a 64-bit value
        values, order = pre.sort(dim=-1, descending=True, stable=True)
        return values[:, :k].clamp(min=0), order[:, :k].clone()
    groups = -(-columns // group)
    if groups <= k:
        return _unpack(_keys(pre, torch.arange(columns, device=pre.device)).topk(k, -1).values)
    if columns % group:
        pre = F.pad(pre, (0, groups * group - columns), value=-1.0)
    grouped = pre.view(rows, groups, group)
    best = _keys(grouped.amax(-1), torch.arange(groups, device=pre.device)).topk(k, -1, sorted=False).values
    _, chosen = _unpack(best)  # [rows, k], the groups that can hold the top k
    candidates = grouped.gather(1, chosen[..., None].expand(rows, k, group)).view(rows, k * group)
    places = chosen[..., None] * group + torch.arange(group, device=pre.device)  # [rows, k, group]
    return _unpack(_keys(candidates, places.view(rows, k * group)).topk(k, -1).values)


def _keys(values: Tensor, columns: Tensor) -> Tensor:
    """Order-preserving 64-bit keys: the bits of max(value, 0), which sort like the value, over the inverted column."""
    bits = values.clamp(min=0).view(torch.int32).to(torch.int64)
    return bits.bitwise_left_shift_(32).bitwise_or_(_LOW_32 - columns)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    values = (keys >> 32).to(torch.int32).view(torch.float32)
    return values, _LOW_32 - (keys & _LOW_32)


def _plan(x: Tensor, W_enc: Tensor, k: int, dtype: torch.dtype, native: bool, max_bytes: int) -> _Plan:
    """Largest row chunk and column block whose buffer, copies and candidates fit in `max_bytes`."""
    tokens, d_model = x.shape
    weight_copy = 0 if native or W_enc.dtype == dtype else d_model * dtype.itemsize  # bytes per column
    row_copy = 0 if native or x.dtype == dtype else d_model * dtype.itemsize  # bytes per row
    d_sae = W_enc.shape[0]
    columns, most = min(_MAX_COLUMNS, d_sae), tokens
    if columns == d_sae:  # small enough for one block: halve something, so that [tokens, d_sae] never exists
        if tokens > 2 * _MIN_ROWS:
            most = -(-tokens // 2)
        else:
            columns = min(d_sae, -(-d_sae // 128) * 64)
    while True:
        group = 2 ** max(0, round(math.log2(math.sqrt(columns / min(k, columns)))))
        groups = -(-columns // group)
        per_cell = 3 * dtype.itemsize if dtype == torch.float64 else dtype.itemsize  # a sort copies values and order
        if columns % group:
            per_cell *= 2  # padding copies the block
        searched = columns if groups <= k else groups + k * group
        per_row = columns * per_cell + searched * 28 + 3 * k * 16 + row_copy
        rows = int((max_bytes - columns * weight_copy) // per_row)
        if rows >= min(most, _MIN_ROWS) or columns <= 256:
            return _Plan(max(1, min(rows, most)), columns, group)
        columns = max(256, columns // 2)


@functools.cache
def _native_half(device: str, dtype: torch.dtype) -> bool:
    """Whether this PyTorch multiplies 16-bit matrices on this device with an fp32 result (CUDA from 2.8 on).

    On a CPU the answer is no even where it exists: without matrix units for it, bf16 is five times slower than fp32.
    """
    if device == "cpu":
        return False
    probe = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.mm(probe, probe, out_dtype=torch.float32, out=probe.float())
        return True
    except (TypeError, RuntimeError):
        return False
