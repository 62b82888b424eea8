"""How well read-outs tell what they are tied to, on held-out texts, beside controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from qscope_monitor.features.read_outs import WINDOW, ReadOut, WatchList
from qscope_monitor.features.texts import read_texts
from qscope_monitor.sae import TopKSAE


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the ROC curve of a score; ties count half (the Mann-Whitney statistic). NaN for an empty class."""
    if len(positive) == 0 or len(negative) == 0:
        return float("nan")
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    own = ranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2
    return float(own / (len(positive) * len(negative)))


def control_read_outs(watch: WatchList, saes: Mapping[int, TopKSAE], seed: int = 0) -> WatchList:
    """As many features of the same layers, drawn at random: what the choice of features is worth.

    A random feature is scored by its positive pre-activation (threshold 0), since nothing was calibrated for it.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: list[ReadOut] = []
    for read_out in watch:
        sae = saes[read_out.layer]
        feature = int(torch.randint(sae.d_sae, (1,), generator=generator))
        drawn.append(
            replace(
                read_out,
                feature=feature,
                weight=sae.W_enc[feature].float().cpu(),
                bias=float(sae.b_enc[feature]),
                threshold=0.0,
                scale=1.0,
                direction=sae.direction(feature).cpu(),
                label="random control",
                promotes=(),
                evidence={},
            )
        )
    return WatchList(drawn)


@torch.no_grad()
def margins(watch: WatchList, residual: Mapping[int, Tensor], tokens: int) -> Tensor:
    """[tokens, F] of ReLU((score - threshold) / scale), read-outs in the watch list's order."""
    out = torch.zeros(tokens, len(watch))
    for column, read_out in enumerate(watch):
        score = read_out.score(residual[read_out.layer]).cpu()
        out[:, column] = ((score - read_out.threshold) / read_out.scale).clamp_min(0)
    return out


@dataclass(frozen=True)
class Scores:
    """Mean margins of a watch list on texts: per token [tokens], per window of 16 tokens, per read-out [tokens, F]."""

    tokens: np.ndarray
    windows: np.ndarray
    read_outs: np.ndarray


def score_texts(
    watch: WatchList,
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_tokens: int = 256,
    batch_size: int = 16,
) -> Scores:
    """Read texts with a watch list. Windows are runs of 16 counted tokens of one text, without overlap."""
    every: list[Tensor] = []
    windows: list[float] = []
    for batch in read_texts(model, tokenizer, texts, watch.layers, max_tokens=max_tokens, batch_size=batch_size):
        keep = batch.tokens.keep
        rows = torch.arange(len(keep), device=keep.device)[:, None].expand_as(keep)[keep].cpu()
        residual = {layer: batch.residuals[layer][keep].float().cpu() for layer in watch.layers}
        found = margins(watch, residual, len(rows))  # [tokens, F]
        every.append(found)
        for row in rows.unique():
            pieces = found[rows == row].mean(1).split(WINDOW)
            windows += [float(piece.mean()) for piece in pieces if len(piece) == WINDOW]
    read_outs = torch.cat(every).numpy()
    return Scores(read_outs.mean(1), np.array(windows), read_outs)


def evaluate_read_outs(
    watch: WatchList,
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    target: str,
    controls: Mapping[str, WatchList] | None = None,
    *,
    max_tokens: int = 256,
    batch_size: int = 16,
) -> dict[str, Any]:
    """AUROC of telling `target` from the other languages, for the list's mean margin and for each control.

    Returns:
        {"target", "tokens", "detectors": {name: {"token_auroc", "window_auroc"}}, "read_outs": {name: token_auroc}}.
    """
    detectors: dict[str, dict[str, float]] = {}
    document: dict[str, Any] = {"target": target, "detectors": detectors}
    for name, each in {"watch list": watch, **(controls or {})}.items():
        scores = {
            language: score_texts(each, model, tokenizer, entries, max_tokens=max_tokens, batch_size=batch_size)
            for language, entries in texts.items()
        }
        own, others = scores[target], [s for language, s in scores.items() if language != target]
        detectors[name] = {
            "token_auroc": auroc(own.tokens, np.concatenate([s.tokens for s in others])),
            "window_auroc": auroc(own.windows, np.concatenate([s.windows for s in others])),
        }
        if each is watch:
            rest = np.concatenate([s.read_outs for s in others])
            document["tokens"] = {"target": len(own.tokens), "others": len(rest)}
            document["read_outs"] = {r.name: auroc(own.read_outs[:, i], rest[:, i]) for i, r in enumerate(watch)}
    return document
