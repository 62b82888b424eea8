"""A frozen TopK sparse autoencoder for one layer of the residual stream."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qscope_monitor.kernels.sparse_decode import sparse_decode
from qscope_monitor.kernels.topk_encode import SparseActivations, topk_encode

__all__ = ["TopKSAE"]

_CACHED_LISTS = 8
_FVU_TOKENS = 4096


@dataclass(frozen=True, eq=False, repr=False)
class TopKSAE:
    """A TopK SAE as Qwen-Scope releases it: `encode` = ReLU(top-k(`x @ W_enc.T + b_enc`)), `decode` adds b_dec.

    The input is neither centred nor scaled, and b_dec plays no part in `encode`. The weights are frozen: gradients flow
    through to `x` only. Position 0 and tokens with a huge norm are outside of what such SAEs are trained on; leave
    them out before believing any number.

    Args:
        W_enc: `[d_sae, d_model]`, a feature is a row.
        W_dec: `[d_model, d_sae]`, a feature is a **column**.
        b_enc: `[d_sae]`.
        b_dec: `[d_model]`.
        k: activations kept per token.
        layer: decoder layer (from 0) whose output this was trained on, if known.
        source: where it came from: repository, folder or file.
        meta: what else its files say, such as `base_model`.

    Raises:
        TypeError: if a weight is not a floating-point tensor or k is not an integer.
        ValueError: if shapes or devices do not agree or k is not between 1 and d_sae.

    Example:
        >>> sae = TopKSAE(torch.eye(4), torch.eye(4), torch.zeros(4), torch.zeros(4), k=2)
        >>> acts = sae.encode(torch.tensor([3.0, -1.0, 0.0, 5.0]))
        >>> acts.indices.tolist(), sae.decode(acts).tolist()
        ([3, 0], [3.0, 0.0, 0.0, 5.0])
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    k: int
    layer: int | None = None
    source: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    _rows: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                found = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name} must be a floating-point tensor, got {found}")
            if tensor.device != self.W_enc.device:
                raise ValueError(f"{name} is on {tensor.device} but W_enc is on {self.W_enc.device}")
            object.__setattr__(self, name, tensor.detach())
        if self.W_enc.ndim != 2 or 0 in self.W_enc.shape:
            raise ValueError(f"W_enc must be [d_sae, d_model], got shape {tuple(self.W_enc.shape)}")
        expected = {"W_dec": (self.d_model, self.d_sae), "b_enc": (self.d_sae,), "b_dec": (self.d_model,)}
        for name, shape in expected.items():
            actual = tuple(getattr(self, name).shape)
            if actual != shape:
                raise ValueError(f"{name} must be {shape} to fit W_enc {tuple(self.W_enc.shape)}, got {actual}")
        if isinstance(self.k, bool) or not hasattr(self.k, "__index__"):
            raise TypeError(f"k must be an integer, got {self.k!r}")
        object.__setattr__(self, "k", operator.index(self.k))
        if not 1 <= self.k <= self.d_sae:
            raise ValueError(f"k must be between 1 and d_sae = {self.d_sae}, got {self.k}")

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.W_enc.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the encoder weights."""
        return self.W_enc.dtype

    @property
    def backbone(self) -> str | None:
        """Repository id of the model it was trained on, where its files say so."""
        name = self.meta.get("base_model")
        return str(name) if name else None

    def encode(self, x: Tensor) -> SparseActivations:
        """Find the k largest activations a token of `x` `[..., d_model]`; differentiable in `x`. See `topk_encode`."""
        return topk_encode(x, self.W_enc, self.b_enc, self.k)

    def decode(self, acts: SparseActivations) -> Tensor:
        """Reconstruct `[..., d_model]`, fp32; a token without active features gives b_dec. See `sparse_decode`."""
        return sparse_decode(acts.values, acts.indices, self.W_dec, self.b_dec)

    def pre_activations(self, x: Tensor, features: int | Sequence[int] | Tensor) -> Tensor:
        """`x @ W_enc[features].T + b_enc[features]` in fp32, before top-k and ReLU; differentiable in `x`.

        The rows are gathered once per feature list, so a watch list costs one small matrix product a call.

        Args:
            x: `[..., d_model]`, any floating dtype.
            features: one feature, or a list of them.

        Returns:
            `[..., len(features)]`, or `[...]` for a single feature.

        Raises:
            ValueError: if a feature is out of range or `x` does not end in d_model.
        """
        if x.ndim == 0 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be [..., d_model = {self.d_model}], got {tuple(x.shape)}")
        single = isinstance(features, int) or (isinstance(features, Tensor) and features.ndim == 0)
        rows, bias = self._gather(features)
        with torch.autocast(x.device.type, enabled=False):
            pre = F.linear(x.to(rows.dtype), rows, bias)  # [..., features]
        return pre[..., 0] if single else pre

    def direction(self, feature: int) -> Tensor:
        """Copy what the feature writes to the residual stream, column `W_dec[:, feature]`, `[d_model]`, fp32."""
        (index,) = self._indices(feature)
        return self.W_dec[:, index].to(torch.promote_types(self.W_dec.dtype, torch.float32), copy=True)

    @torch.no_grad()
    def fvu(self, x: Tensor) -> float:
        """Fraction of variance unexplained, `sum ||x - x_hat||^2 / sum ||x - mean||^2`, over the finite tokens.

        0 is perfect; 1 is as good as the mean token; explained variance is 1 - FVU. Sums are in fp64. The released
        Qwen-Scope sets give about 0.2 to 0.7 depending on model and layer; far above 1 means the wrong layer, model or
        file, or that position 0 was not left out.

        Returns:
            A float; NaN if there are fewer than two finite tokens or they are all equal.

        Raises:
            ValueError: if `x` `[..., d_model]` does not fit.
        """
        if x.ndim == 0 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be [..., d_model = {self.d_model}], got {tuple(x.shape)}")
        flat = x.reshape(-1, self.d_model)
        flat = flat[torch.isfinite(flat).all(-1)]
        parts = flat.split(_FVU_TOKENS)
        total, count = torch.zeros(self.d_model, dtype=torch.float64, device=x.device), 0
        errors, finite = [], []
        for part in parts:
            acts = self.encode(part)
            part, wide = part[acts.finite], self.decode(acts)[acts.finite]
            finite.append(part)
            errors.append((part.double() - wide.double()).square().sum())
            total += part.double().sum(0)
            count += len(part)
        if count < 2:
            return float("nan")
        mean = total / count
        variance = float(torch.stack([(part.double() - mean).square().sum() for part in finite]).sum())
        return float(torch.stack(errors).sum()) / variance if variance > 0 else float("nan")

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TopKSAE:
        """Put the same SAE on another device or in another dtype; tensors that already fit are shared."""
        weights = (self.W_enc, self.W_dec, self.b_enc, self.b_dec)
        W_enc, W_dec, b_enc, b_dec = (w.to(device=device, dtype=dtype) for w in weights)
        return replace(self, W_enc=W_enc, W_dec=W_dec, b_enc=b_enc, b_dec=b_dec)

    def __repr__(self) -> str:
        parts = [] if self.layer is None else [f"layer={self.layer}"]
        parts += [f"d_model={self.d_model}", f"d_sae={self.d_sae}", f"k={self.k}"]
        parts += [f"dtype={str(self.dtype).removeprefix('torch.')}", f"device='{self.device}'"]
        if self.source is not None:
            parts.append(f"source={self.source!r}")
        return f"TopKSAE({', '.join(parts)})"

    def _indices(self, features: int | Sequence[int] | Tensor) -> tuple[int, ...]:
        if isinstance(features, Tensor):
            features = features.tolist()
        indices = tuple(operator.index(f) for f in ([features] if isinstance(features, int) else features))
        for index in indices:
            if not 0 <= index < self.d_sae:
                raise ValueError(f"feature {index} is not one of this SAE's 0..{self.d_sae - 1}")
        return indices

    def _gather(self, features: int | Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        key = self._indices(features)
        if key not in self._rows:
            while len(self._rows) >= _CACHED_LISTS:
                self._rows.pop(next(iter(self._rows)))
            wide = torch.promote_types(self.dtype, torch.float32)
            with torch.inference_mode(False):  # rows cached during generation must still serve a backward later
                index = torch.tensor(key, dtype=torch.int64, device=self.device)
                self._rows[key] = self.W_enc[index].to(wide), self.b_enc[index].to(wide)
        return self._rows[key]
