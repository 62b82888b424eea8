"""A window's counts as scalars by tag. The tags' meanings stand in `reporting.tensorboard.TensorBoardSink`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qscope_monitor.census import CensusReport
from qscope_monitor.tokens import Segment

EXCLUSIONS = ("position_0", "padding", "special", "norm_outlier", "non_finite")
_RATES = (  # (scalar, counted, out of, shown beside its baseline)
    ("exceedance", "exceeding", "responses", True),
    ("response_score", "response_scores", "responses", False),
    ("text_rate", "texts_found", "texts", True),
)


def window_scalars(
    stream: str,
    keys: Sequence[str],
    read_outs: Sequence[str],
    window: dict[str, np.ndarray],
    baseline: dict[str, np.ndarray] | None,
) -> dict[str, float]:
    """Scalars of one window of one stream, for the behaviours `keys` and the `read_outs` by name.

    Without a baseline there are no thresholds, hence no exceedance.
    """
    tag = f"sae/{stream}"
    scalars = {f"{tag}/tokens": float(window["tokens"].sum())}
    for j, key in enumerate(keys):
        for name, counted, total, beside_baseline in _RATES:
            if window[total][j] and (baseline is not None or counted != "exceeding"):
                scalars[f"{tag}/{key}/{name}"] = float(window[counted][j] / window[total][j])
            if beside_baseline and baseline is not None and baseline[total][j]:
                scalars[f"{tag}/{key}/{name}_baseline"] = float(baseline[counted][j] / baseline[total][j])
    for name, rate in zip(read_outs, response_firing_rates(window), strict=True):
        scalars[f"{tag}/firing_rate/{name}"] = float(rate)
    if window["tokens"][Segment.THINKING]:  # kept apart only where the chat template marks it
        for segment in (Segment.THINKING, Segment.ANSWER):
            fires, total = window["fires"][segment].mean(), max(window["tokens"][segment], 1)
            scalars[f"{tag}/segments/{segment.name.lower()}_firing_rate"] = float(fires / total)
    positions = max(float(window["positions"]), 1)
    for name, count in zip(EXCLUSIONS, window["excluded"], strict=True):
        scalars[f"{tag}/excluded/{name}"] = float(count) / positions
    return scalars


def health_scalars(stream: str, report: CensusReport) -> dict[str, float]:
    """Each SAE's health in this window."""
    return {
        f"sae/{stream}/health/L{layer}/{name}": value
        for layer, health in report.health.items()
        for name, value in health.items()
    }


def response_firing_rates(counts: dict[str, np.ndarray]) -> np.ndarray:
    """[read-outs] share of response tokens (thinking and answer) at which each fires."""
    response = [Segment.THINKING, Segment.ANSWER]
    return np.asarray(counts["fires"][response].sum(0) / max(counts["tokens"][response].sum(), 1))
