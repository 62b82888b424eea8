"""Find the features tied to one language, by how specifically they fire in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from qscope_monitor.behaviours import scripts_of
from qscope_monitor.features.evaluation import control_read_outs, evaluate_read_outs, score_texts
from qscope_monitor.features.promotes import promoted_tokens
from qscope_monitor.features.read_outs import ReadOut, WatchList
from qscope_monitor.features.texts import read_texts
from qscope_monitor.sae import TopKSAE

Texts = Mapping[str, Sequence[str]]
FLOOR_QUANTILE = 0.05  # 95 % of the target language's windows lie above the floor
BUNDLED_TEXTS = 100  # per language, as many as the SASFT paper (arXiv 2507.14894) uses


def find_language_features(
    model: Any,
    tokenizer: Any,
    saes: Mapping[int, TopKSAE],
    target: str = "zh",
    texts: Texts | None = None,
    *,
    features: int = 10,
    layers: Sequence[int] | None = None,
    dense_above: float = 0.1,
    max_tokens: int = 256,
    batch_size: int = 16,
    progress: bool = True,
) -> WatchList:
    """A watch list of the features that fire in `target` and hardly anywhere else.

    Every second text of each language chooses the features and calibrates their thresholds; the others measure them
    (`WatchList.evaluation`: AUROC of telling the language, per token and per window of 16 tokens, beside random
    features of the same layers). The choosing texts also set the floor, the margin that 95 % of the target's 16-token
    windows reach. Selection is by firing-frequency specificity, P(fires | target) - max over the
    other languages of P(fires | language); features firing on more than `dense_above` of the other languages' tokens
    are dropped. Differences of mean activation would choose dense features instead.

    Args:
        model: a decoder the SAEs were trained on, or fine-tuned from it.
        tokenizer: its tokenizer.
        saes: layer -> SAE.
        target: the language to find features of.
        texts: {language: [text, ...]}, the target and at least one other, 4 texts or more each; None: the first 100
            bundled sentences of each language. A language that shares words or characters with the target makes the
            choice stricter.
        features: how many to keep, over all layers.
        layers: layers to search; all of `saes` by default.
        dense_above: firing rate on other languages above which a feature is dropped.
        max_tokens: texts are cut to this many tokens.
        batch_size: texts a forward.
        progress: show a progress bar.

    Returns:
        A `WatchList` of `features` read-outs (behaviour `code-switching`, language `target`), best first.

    Raises:
        ValueError: an unknown language, the target is not among the texts, too few texts or languages, a layer without
            SAE, or no feature prefers the target.

    Example:
        >>> watch = qs.find_language_features(model, tokenizer, saes, target="zh")
        >>> watch.save("zh-features")
    """
    if texts is None:
        from qscope_monitor import bundled

        texts = {language: entries[:BUNDLED_TEXTS] for language, entries in bundled.sentences().items()}
    layers = sorted(saes) if layers is None else sorted(layers)
    _check(texts, target, saes, layers, features)
    choose = {language: list(entries)[0::2] for language, entries in texts.items()}
    held_out = {language: list(entries)[1::2] for language, entries in texts.items()}

    rates = firing_rates(
        model, tokenizer, saes, choose, layers, max_tokens=max_tokens, batch_size=batch_size, progress=progress
    )
    candidates: list[tuple[float, int, int]] = []
    for layer in layers:
        own = rates[layer][target]
        others = torch.stack([rate for language, rate in rates[layer].items() if language != target]).amax(0)
        specificity = own - others
        specificity[others > dense_above] = -1
        best, index = specificity.topk(min(features, len(specificity)))
        candidates += [(float(s), layer, int(f)) for s, f in zip(best, index) if s > 0]
    if not candidates:
        raise ValueError(f"no feature of layers {layers} fires more often in {target!r} than in the other languages")
    candidates = sorted(candidates, reverse=True)[:features]

    chosen = {layer: [f for _, chosen_layer, f in candidates if chosen_layer == layer] for layer in layers}
    thresholds = _calibrate_thresholds(model, tokenizer, saes, choose, target, chosen, max_tokens, batch_size)
    read_outs = []
    for specificity_value, layer, feature in candidates:
        sae = saes[layer]
        threshold, scale = thresholds[layer, feature]
        direction = sae.direction(feature).cpu()
        promotes = promoted_tokens(model, tokenizer, direction)
        read_outs.append(
            ReadOut(
                layer=layer,
                feature=feature,
                weight=sae.W_enc[feature].float().cpu(),
                bias=float(sae.b_enc[feature]),
                threshold=threshold,
                scale=scale,
                direction=direction,
                behaviour="code-switching",
                language=target,
                label=f"fires in {target}",
                promotes=promotes,
                evidence={
                    "specificity": specificity_value,
                    "firing_rate_target": float(rates[layer][target][feature]),
                    "firing_rate_others": max(
                        float(rate[feature]) for language, rate in rates[layer].items() if language != target
                    ),
                },
            )
        )
    watch = WatchList(
        read_outs,
        provenance={
            "method": "firing-frequency specificity",
            "target": target,
            "languages": sorted(texts),
            "texts_per_language": {language: len(entries) for language, entries in sorted(texts.items())},
            "model": str(getattr(getattr(model, "config", None), "_name_or_path", "")),
            "saes": {str(layer): str(saes[layer].source) for layer in layers},
            "k": {str(layer): saes[layer].k for layer in layers},
            "dense_above": dense_above,
        },
    )
    passages = score_texts(watch, model, tokenizer, choose[target], max_tokens=max_tokens, batch_size=batch_size)
    if len(passages.windows):
        watch.floors = {read_outs[0].key: float(np.quantile(passages.windows, FLOOR_QUANTILE))}
    controls = {"random features": control_read_outs(watch, saes, seed=0)}
    watch.evaluation = evaluate_read_outs(
        watch, model, tokenizer, held_out, target, controls, max_tokens=max_tokens, batch_size=batch_size
    )
    return watch


@torch.no_grad()
def firing_rates(
    model: Any,
    tokenizer: Any,
    saes: Mapping[int, TopKSAE],
    texts: Texts,
    layers: Sequence[int],
    *,
    max_tokens: int = 256,
    batch_size: int = 16,
    progress: bool = False,
) -> dict[int, dict[str, Tensor]]:
    """Layer -> language -> [d_sae] share of counted tokens at which each feature is active."""
    rates: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    for language, entries in tqdm(texts.items(), desc="reading languages", disable=not progress):
        fired = {layer: torch.zeros(saes[layer].d_sae, dtype=torch.long) for layer in layers}
        tokens = dict.fromkeys(layers, 0)
        for batch in read_texts(model, tokenizer, entries, layers, max_tokens=max_tokens, batch_size=batch_size):
            for layer in layers:
                x, _ = batch.kept(layer)
                acts = saes[layer].encode(x.to(saes[layer].device))
                fired[layer] += torch.bincount(acts.indices[acts.active], minlength=saes[layer].d_sae).cpu()
                tokens[layer] += len(x)
        for layer in layers:
            rates[layer][language] = fired[layer] / max(tokens[layer], 1)
    return rates


@torch.no_grad()
def _calibrate_thresholds(
    model: Any,
    tokenizer: Any,
    saes: Mapping[int, TopKSAE],
    texts: Texts,
    target: str,
    chosen: Mapping[int, list[int]],
    max_tokens: int,
    batch_size: int,
) -> dict[tuple[int, int], tuple[float, float]]:
    """(layer, feature) -> (threshold, scale).

    The threshold is the pre-activation exceeded as often, over all languages' tokens taken together, as the feature
    survives the top-k; the scale is the mean excess over it on the target's firing tokens.
    """
    layers = [layer for layer in chosen if chosen[layer]]
    scores: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    active: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    in_target: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for language, entries in texts.items():
        for batch in read_texts(model, tokenizer, entries, layers, max_tokens=max_tokens, batch_size=batch_size):
            for layer in layers:
                x, _ = batch.kept(layer)
                sae = saes[layer]
                acts = sae.encode(x.to(sae.device))
                features = torch.tensor(chosen[layer], device=sae.device)
                survived = ((acts.indices[:, :, None] == features) & acts.active[:, :, None]).any(1)  # [tokens, F]
                scores[layer].append(sae.pre_activations(x.to(sae.device), chosen[layer]).cpu())
                active[layer].append(survived.cpu())
                in_target[layer].append(torch.full((len(x),), language == target))
    result = {}
    for layer in layers:
        pre, fired = torch.cat(scores[layer]).double(), torch.cat(active[layer])
        own = torch.cat(in_target[layer])
        for column, feature in enumerate(chosen[layer]):
            quantile = 1 - float(fired[:, column].double().mean())
            threshold = max(float(torch.quantile(pre[:, column], quantile)), 0.0)
            excess = pre[own, column] - threshold
            above = excess[excess > 0]
            result[layer, feature] = (threshold, float(above.mean()) if len(above) else 1.0)
    return result


def _check(texts: Texts, target: str, saes: Mapping[int, TopKSAE], layers: Sequence[int], features: int) -> None:
    scripts_of(target)  # an unknown language could not be judged in training
    if target not in texts:
        raise ValueError(f"target {target!r} is not among the languages of the texts: {sorted(texts)}")
    if len(texts) < 2:
        raise ValueError("texts need at least one language beside the target")
    for language, entries in texts.items():
        if isinstance(entries, str) or len(entries) < 4:
            raise ValueError(f"texts[{language!r}] needs a list of at least 4 texts, got {entries!r:.80}")
    missing = [layer for layer in layers if layer not in saes]
    if missing or not layers:
        raise ValueError(f"no SAE for layers {missing}; there are {sorted(saes)}")
    if features < 1:
        raise ValueError(f"features must be at least 1, got {features!r}")
