"""Census: how often every SAE feature fires, and whether the SAE still fits the model.

It informs and never alarms: thousands of features are tested, and after fine-tuning many drift a little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qscope_monitor.alerts import risen_features
from qscope_monitor.counters import Counters, sum_counts
from qscope_monitor.sae import TopKSAE
from qscope_monitor.tokens import TokenBatch, drop_norm_outliers


@dataclass(frozen=True)
class RisenFeature:
    """A feature that fires in more responses than at calibration (Fisher exact, Benjamini-Hochberg at 5 %)."""

    layer: int
    feature: int
    rate: float
    baseline_rate: float
    counts: tuple[int, int, int, int]
    p_value: float


@dataclass(frozen=True)
class CensusReport:
    """One window of one stream.

    Attributes:
        sequences: responses encoded.
        health: layer -> `fvu` (fraction of variance unexplained), `l0` (active features per token), `alive` (share of
            features that fired at all in the window). A rising FVU says that the model drifts away from its SAE.
        risen: newly active features, each told once.
    """

    sequences: int = 0
    health: dict[int, dict[str, float]] = field(default_factory=dict)
    risen: tuple[RisenFeature, ...] = ()


class Census:
    """Counts, per layer and stream, in how many responses each feature fires.

    Args:
        saes: layer -> SAE; loaded when first used.
        device: where the SAEs run and the counters live.
    """

    def __init__(self, saes: Mapping[int, TopKSAE], device: torch.device | str) -> None:
        self.saes = {layer: saes[layer].to(device) for layer in sorted(saes)}
        self._counters = {
            stream: Counters(
                {
                    f"{layer}/{name}": shape
                    for layer, sae in self.saes.items()
                    for name, shape in {
                        "fired": (sae.d_sae,),
                        "sum": (sae.d_model,),
                        "totals": (5,),  # sequences, tokens, sum of squares, squared error, active features
                    }.items()
                },
                device,
            )
            for stream in ("train", "rollout")
        }
        self._pending: dict[str, list[dict[str, np.ndarray]]] = {"train": [], "rollout": []}
        self._baseline: dict[str, dict[str, np.ndarray]] = {}
        self._told: set[tuple[str, int, int]] = set()

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers it encodes."""
        return tuple(self.saes)

    @torch.no_grad()
    def observe(self, residuals: Mapping[int, Tensor], tokens: TokenBatch, stream: str) -> None:
        """Encode the response tokens of a batch and count."""
        counters = self._counters[stream]
        for layer, sae in self.saes.items():
            counted = drop_norm_outliers(tokens, residuals[layer])
            chosen = counted.keep & counted.response
            x = residuals[layer][chosen].float()  # [tokens, d_model]
            if len(x) == 0:
                continue
            acts = sae.encode(x)
            error = (x - sae.decode(acts)).square().sum()
            # One entry per (response, feature) that fired, however often.
            pairs = tokens.sequence[chosen].unsqueeze(-1) * sae.d_sae + acts.indices  # [tokens, k]
            features = torch.unique(pairs[acts.active]) % sae.d_sae
            counters.add(f"{layer}/fired", torch.bincount(features, minlength=sae.d_sae))
            counters.add(f"{layer}/sum", x.sum(0))
            sequences = torch.unique(tokens.sequence[chosen]).numel()
            totals = [x.new_tensor(sequences), x.new_tensor(len(x)), x.square().sum(), error, acts.active.sum().float()]
            counters.add(f"{layer}/totals", torch.stack(totals))

    def end_window(self, stream: str) -> CensusReport:
        """Reduce this window's counts over ranks; compare with the baseline when there is one."""
        window = self._counters[stream].take()
        baseline = self._baseline.get(stream)
        if baseline is None and any(window[f"{layer}/totals"][0] for layer in self.saes):
            self._pending[stream].append(window)
        health, risen, sequences = {}, [], 0
        for layer in self.saes:
            total, tokens, squares, error, active = window[f"{layer}/totals"]
            if tokens == 0:
                continue
            sequences = max(sequences, int(total))
            variance = squares - float(np.square(window[f"{layer}/sum"]).sum()) / tokens
            health[layer] = {
                "fvu": float(error / max(variance, 1e-12)),
                "l0": float(active / tokens),
                "alive": float((window[f"{layer}/fired"] > 0).mean()),
            }
            if baseline is not None:
                risen += self._risen(stream, layer, window, baseline, int(total))
        return CensusReport(sequences, health, tuple(risen))

    def _risen(
        self, stream: str, layer: int, window: dict[str, np.ndarray], baseline: dict[str, np.ndarray], total: int
    ) -> list[RisenFeature]:
        fired, before = window[f"{layer}/fired"], baseline[f"{layer}/fired"]
        total_before = int(baseline[f"{layer}/totals"][0])
        news = []
        for feature, p_value in risen_features(fired, total, before, total_before):
            if (stream, layer, feature) in self._told:
                continue
            self._told.add((stream, layer, feature))
            counts = (int(fired[feature]), total, int(before[feature]), total_before)
            news.append(
                RisenFeature(layer, feature, counts[0] / total, counts[2] / max(total_before, 1), counts, p_value)
            )
        return news

    def collected(self, stream: str) -> int:
        """Responses seen so far that `calibrate` would rest on."""
        return max((int(sum(w[f"{layer}/totals"][0] for w in self._pending[stream])) for layer in self.saes), default=0)

    def discard(self, stream: str) -> None:
        """Forget the windows seen so far."""
        self._pending[stream] = []

    def calibrate(self, stream: str) -> None:
        """Take the windows seen so far as the baseline."""
        if self._pending[stream]:
            self._baseline[stream] = sum_counts(self._pending[stream])
            self._pending[stream] = []

    def state_dict(self) -> dict[str, Any]:
        """Baselines and what has been told, for a checkpoint."""
        return {
            "layers": list(self.layers),
            "pending": {
                stream: [{name: torch.from_numpy(value) for name, value in window.items()} for window in windows]
                for stream, windows in self._pending.items()
            },
            "baseline": {
                stream: {name: torch.from_numpy(value) for name, value in counts.items()}
                for stream, counts in self._baseline.items()
            },
            "told": sorted(self._told),
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """The inverse of `state_dict`. Raises ValueError for a state of other layers."""
        if values["layers"] != list(self.layers):
            raise ValueError(f"monitor state has a census of layers {values['layers']}, this one {list(self.layers)}")
        self._pending = {
            stream: [{name: value.numpy() for name, value in window.items()} for window in windows]
            for stream, windows in values["pending"].items()
        }
        self._baseline = {
            stream: {name: value.numpy() for name, value in counts.items()}
            for stream, counts in values["baseline"].items()
        }
        self._told = {(stream, layer, feature) for stream, layer, feature in values["told"]}
