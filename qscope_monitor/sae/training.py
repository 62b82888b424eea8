"""Training of TopK SAEs on a model's residual stream, from scratch or from existing ones."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qscope_monitor.sae.checkpoint import load_sae, save_sae
from qscope_monitor.sae.fitting import TrainingReport, fit_sae
from qscope_monitor.sae.formats import CONFIG, CheckpointError, read_config
from qscope_monitor.sae.harvest import harvest
from qscope_monitor.sae.topk_sae import TopKSAE

__all__ = ["TrainedSAEs", "train_sae"]


class TrainedSAEs(dict[int, TopKSAE]):
    """SAEs by layer, with a `TrainingReport` for each in `report`."""

    def __init__(self) -> None:
        super().__init__()
        self.report: dict[int, TrainingReport] = {}


def train_sae(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    layers: Iterable[int],
    *,
    expansion: int = 16,
    k: int | None = None,
    tokens: int | None = None,
    epochs: float = 3,
    batch_size: int = 1024,
    lr: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    init: TopKSAE | Mapping[int, TopKSAE] | None = None,
    context: int = 256,
    skip_positions: int = 4,
    max_bytes: int = 4 * 2**30,
    progress: bool = True,
) -> TrainedSAEs:
    """Train a TopK SAE for the output of each of some decoder layers.

    The model runs over the texts once, in evaluation mode and without gradients; the activations of all layers are
    held in memory; then the layers are fitted one after the other (see `fit_sae` for loss and optimiser). The results
    act on raw activations, as Qwen-Scope's do: no centring, no scaling, decoder columns of norm 1 (with `init`: of the
    norms they had). A useful SAE of a small model needs some 200 thousand tokens; the published ones saw far more.

    Args:
        model: decoder-only Hugging Face model, wrapped or not.
        tokenizer: its tokenizer.
        texts: raw texts, of the kind the SAE is to be used on.
        layers: decoder layers, from 0.
        expansion: features per dimension of the residual stream; ignored with `init`.
        k: activations kept per token; default 32, or what `init` has.
        tokens: number of tokens to collect, before exclusions; None for all of the texts.
        epochs: passes over the collected tokens.
        batch_size: tokens per optimiser step.
        lr: peak learning rate; default `0.03 / sqrt(d_model)`.
        seed: of text order, initial weights and batches. The global random state is not touched; on one machine equal
            arguments give equal weights.
        device: where to fit; default: where the model is.
        checkpoint_dir: folder for finished SAEs (as `save_sae` writes them) and for the state of an unfinished one. A
            call with equal arguments skips finished layers and goes on with the unfinished one.
        init: SAE, or one per layer, to start from, for example to adapt a published SAE to a fine-tuned model.
        context: longest window of text, in tokens.
        skip_positions: tokens left out at the start of every window, where norms are extreme; at least 1.
        max_bytes: budget for the activations in memory: fp32 where that fits, else fp16, else fewer tokens.
        progress: whether to show bars.

    Returns:
        A dict from layer to SAE whose `report` attribute has explained variance, share of dead features, L0, steps and
        seconds for each; the same figures are in each SAE's `meta["training"]`.

    Raises:
        ValueError: if an argument is out of range, a layer has no `init`, or there is too little text.
        CheckpointError: if `checkpoint_dir` holds results of a call with other arguments, or damaged files.

    Example:
        >>> saes = train_sae(model, tokenizer, texts, layers=[4], tokens=200_000)  # doctest: +SKIP
        >>> saes[4], saes.report[4].explained_variance  # doctest: +SKIP
    """
    texts, layers = list(texts), list(dict.fromkeys(layers))
    _check(texts, layers, expansion, tokens, context, skip_positions, init)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    place = next(model.parameters()).device if device is None else torch.device(device)
    base_model = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    settings = {
        "expansion": expansion, "k": k, "tokens": tokens, "epochs": epochs, "batch_size": batch_size, "lr": lr,
        "seed": seed, "context": context, "skip_positions": skip_positions,
        "texts": zlib.crc32("\0".join(texts).encode("utf-8", "surrogatepass")),
    }  # fmt: skip
    done = {layer: _finished(folder, layer, settings) for layer in layers}
    open_layers = [layer for layer, sae in done.items() if sae is None]
    if open_layers:
        found = harvest(
            model, tokenizer, texts, open_layers, tokens=tokens, context=context, skip_positions=skip_positions,
            max_bytes=max_bytes, seed=seed, progress=progress,
        )  # fmt: skip
    results = TrainedSAEs()
    for layer, finished in done.items():
        if finished is not None:
            results[layer] = finished.to(place)
            results.report[layer] = _report(finished)
            continue
        start = init if init is None or isinstance(init, TopKSAE) else init[layer]
        activations, held_out = found.train.pop(layer), found.held_out.pop(layer)
        state_file = None if folder is None else folder / f"layer{layer}.state.pt"
        sae, report = fit_sae(
            activations, held_out, d_sae=expansion * activations.shape[1],
            k=k if k is not None else (32 if start is None else start.k), epochs=epochs, batch_size=batch_size, lr=lr,
            seed=seed, device=place, init=start, state_file=state_file,
            progress=progress, layer=layer,
        )  # fmt: skip
        meta = {**sae.meta, "settings": settings, "base_model": base_model}
        results[layer] = replace(sae, meta={name: value for name, value in meta.items() if value is not None})
        results.report[layer] = report
        if folder is not None and state_file is not None:
            save_sae(results[layer], folder)
            state_file.unlink(missing_ok=True)
    return results


def _check(
    texts: list[str],
    layers: list[int],
    expansion: int,
    tokens: int | None,
    context: int,
    skip_positions: int,
    init: TopKSAE | Mapping[int, TopKSAE] | None,
) -> None:
    if not layers:
        raise ValueError("layers is empty; pass decoder layer numbers, from 0")
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"texts must be strings, at least one; got {len(texts)} items")
    if expansion < 1 or (tokens is not None and tokens < 1):
        raise ValueError(f"expansion and tokens must be positive, got {expansion} and {tokens}")
    if not 1 <= skip_positions < context:
        raise ValueError(f"skip_positions must be at least 1 and less than context = {context}, got {skip_positions}")
    missing = [layer for layer in layers if isinstance(init, Mapping) and layer not in init]
    if missing:
        raise ValueError(f"init has no SAE for layers {missing}")


def _finished(folder: Path | None, layer: int, settings: Mapping[str, Any]) -> TopKSAE | None:
    if folder is None or not (folder / f"layer{layer}.sae.pt").is_file():
        return None
    meta = (read_config(folder / CONFIG).get("layers") or {}).get(str(layer), {})
    found = meta.get("settings") or {}
    differ = {name: found.get(name) for name in settings if found.get(name) != settings[name]}
    if differ:
        now = {name: settings[name] for name in differ}
        raise CheckpointError(
            f"{folder}: layer {layer} was trained with {differ}, not {now}; use another checkpoint_dir"
        )
    return load_sae(folder, layer=layer)


def _report(sae: TopKSAE) -> TrainingReport:
    return TrainingReport(**{field.name: sae.meta["training"][field.name] for field in fields(TrainingReport)})
