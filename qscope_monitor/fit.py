"""Whether SAEs fit the model they are to be used on: by shape and name, and by what they explain of a first batch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qscope_monitor.residual import decoder, decoder_layers, unwrap

__all__ = ["SAELike", "check_fit", "check_fvu", "check_width"]


class SAELike(Protocol):
    """What the checks below need of an SAE."""

    @property
    def d_model(self) -> int:
        """Width of the residual stream it was trained on."""

    @property
    def layer(self) -> int | None:
        """Decoder layer, counted from 0, whose output it was trained on."""

    @property
    def source(self) -> str | None:
        """Where it was loaded from."""

    def fvu(self, x: Tensor) -> float | Tensor:
        """Fraction of variance unexplained on `x` `[tokens, d_model]`."""


def _text_config(model: nn.Module) -> Any:
    config = getattr(unwrap(model)[-1], "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return get_text_config() if callable(get_text_config) else config


def _hidden_size(model: nn.Module, layers_path: str | None) -> int | None:
    for config in (_text_config(model), getattr(decoder(model, layers_path), "config", None)):
        for name in ("hidden_size", "n_embd", "d_model"):
            size = getattr(config, name, None)
            if isinstance(size, int):
                return size
    return None


def check_fit(
    model: nn.Module,
    saes: Mapping[int, SAELike],
    *,
    backbone: str | None = None,
    layers_path: str | None = None,
) -> None:
    """Check that SAEs fit a model by shape and name; reads no weights and runs nothing.

    Args:
        model: decoder-only model, wrapped or not.
        saes: `{layer: sae}`.
        backbone: repo id of the model the SAEs were trained on; default: each SAE's own `backbone`, where it has one.
        layers_path: see `decoder`.

    Raises:
        ValueError: a layer the model does not have, an SAE filed under another layer than its own, or a d_model that
            differs from the model's hidden size.

    Warns:
        UserWarning: the model's name does not contain the name of the backbone. Fine-tuned and renamed checkpoints are
            legitimate, so this is no error; `check_fvu` decides.
    """
    num_layers = len(decoder_layers(model, layers_path))
    hidden_size = _hidden_size(model, layers_path)
    name = str(getattr(getattr(unwrap(model)[-1], "config", None), "_name_or_path", "") or "")
    backbones: dict[str, str] = {}
    for layer, sae in saes.items():
        origin = f"SAE for layer {layer} (from {sae.source or 'memory'})"
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise ValueError(
                f"{origin}: the model has {num_layers} layers, numbered 0 to {num_layers - 1}. "
                "Are these SAEs of another model?"
            )
        if sae.layer is not None and sae.layer != layer:
            raise ValueError(f"{origin} was trained on layer {sae.layer}, but is to be used at layer {layer}")
        if hidden_size is not None and sae.d_model != hidden_size:
            raise ValueError(
                f"{origin} has d_model {sae.d_model}, but the model's hidden size is {hidden_size}: "
                "it was trained on another model"
            )
        expected = backbone or getattr(sae, "backbone", None)
        if expected:
            backbones.setdefault(str(expected), origin)
    for expected, origin in backbones.items():
        if name and _stem(expected) not in name.lower():
            warnings.warn(
                f"{origin} was trained on {expected}, but the model is called {name!r}. Post-trained versions of the "
                "same model are fine; otherwise the features mean nothing here.",
                stacklevel=2,
            )


def _stem(repo_id: str) -> str:
    return repo_id.rpartition("/")[2].lower().removesuffix("-base")


def check_width(model: nn.Module, d_model: int, what: str, *, layers_path: str | None = None) -> None:
    """Raise ValueError when `what` (for the message) was made for a residual stream of another width."""
    hidden_size = _hidden_size(model, layers_path)
    if hidden_size is not None and hidden_size != d_model:
        raise ValueError(f"{what} has d_model {d_model}, but the model's hidden size is {hidden_size}")


@torch.no_grad()
def check_fvu(
    residuals: Mapping[int, Tensor],
    saes: Mapping[int, SAELike],
    keep: Tensor,
    limit: float = 0.9,
    max_tokens: int = 2048,
) -> dict[int, float]:
    """Measure on a first batch how much of the residual stream each SAE explains, and warn when it is next to nothing.

    A wrong layer, a wrong model or a wrong hook point shows here even where shapes agree. Released sets score 0.2 to
    0.7 on ordinary text.

    Args:
        residuals: `{layer: [batch, seq, d_model]}`.
        saes: `{layer: sae}`; layers without a residual are skipped.
        keep: bool `[batch, seq]`, the tokens that count. Position 0 and special tokens must be out: their huge norms
            would decide the figure alone.
        limit: FVU above which to warn.
        max_tokens: at most this many tokens are used, which bounds the cost.

    Returns:
        `{layer: FVU}`, the fraction of variance unexplained; empty when no token counts.

    Warns:
        UserWarning: FVU above `limit`, or not a number.
    """
    result: dict[int, float] = {}
    for layer, sae in saes.items():
        residual = residuals.get(layer)
        if residual is None:
            continue
        x = residual.detach()[keep.to(residual.device)][:max_tokens]  # [tokens, d_model]
        if not len(x):
            continue
        with torch.autocast(x.device.type, enabled=False):
            fvu = float(sae.fvu(x))
        result[layer] = fvu
        if not fvu <= limit:
            warnings.warn(
                f"the SAE for layer {layer} (from {sae.source or 'memory'}) leaves {fvu:.2f} of the variance of the "
                f"residual stream unexplained on {len(x)} tokens (limit {limit}). It was most likely trained on "
                "another model, layer or hook point; do not trust its features here.",
                stacklevel=2,
            )
    return result
