"""How well read-outs tell what they are tied to, on held-out texts, beside controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from qscope_monitor.features.read_outs import ReadOut, WatchList
from qscope_monitor.features.texts import read_texts
from qscope_monitor.sae import TopKSAE

WINDOW = 16


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
        {"target", "tokens", "detectors": {name: {"token_auroc", "window_auroc"}}, "read_outs": {name: token_auroc}};
        windows are runs of 16 counted tokens of one text.
    """
    detectors = {"watch list": watch, **(controls or {})}
    token_scores: dict[str, dict[bool, list[np.ndarray]]] = {name: {True: [], False: []} for name in detectors}
    window_scores: dict[str, dict[bool, list[float]]] = {name: {True: [], False: []} for name in detectors}
    single: dict[bool, list[np.ndarray]] = {True: [], False: []}
    layers = sorted({read_out.layer for each in detectors.values() for read_out in each})
    for language, entries in texts.items():
        own = language == target
        for batch in read_texts(model, tokenizer, entries, layers, max_tokens=max_tokens, batch_size=batch_size):
            keep = batch.tokens.keep
            rows = torch.arange(len(keep), device=keep.device)[:, None].expand_as(keep)[keep].cpu()
            residual = {layer: batch.residuals[layer][keep].float().cpu() for layer in layers}
            for name, each in detectors.items():
                all_margins = margins(each, residual, len(rows))
                score = all_margins.mean(1)
                token_scores[name][own].append(score.numpy())
                for row in rows.unique():
                    for window in score[rows == row].split(WINDOW):
                        if len(window) == WINDOW:
                            window_scores[name][own].append(float(window.mean()))
                if each is watch:
                    single[own].append(all_margins.numpy())
    positive, negative = np.concatenate(single[True]), np.concatenate(single[False])
    return {
        "target": target,
        "tokens": {"target": len(positive), "others": len(negative)},
        "detectors": {
            name: {
                "token_auroc": auroc(np.concatenate(scores[True]), np.concatenate(scores[False])),
                "window_auroc": auroc(np.array(window_scores[name][True]), np.array(window_scores[name][False])),
            }
            for name, scores in token_scores.items()
        },
        "read_outs": {r.name: auroc(positive[:, i], negative[:, i]) for i, r in enumerate(watch)},
    }
