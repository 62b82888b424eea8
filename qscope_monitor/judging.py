"""From a window's counts to alerts: which test rejects, what that means, and the record of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qscope_monitor import alerts as tests
from qscope_monitor.alerts import Alert, Kind, ReadOutChange, TokenContext
from qscope_monitor.census import RisenFeature
from qscope_monitor.features.read_outs import ReadOut
from qscope_monitor.figures import response_firing_rates

TESTS_PER_BEHAVIOUR = {"train": 1, "rollout": 2}  # the read-outs, and in rollouts the text detector
Four = tuple[int, int, int, int]  # found, total, found at calibration, total at calibration
_SAID = {
    "behaviour": "read-outs are abnormally active",
    "text": "more of it in the text, not in the read-outs",
    "hacking": "more of it in the text while its read-outs fell silent",
}


@dataclass(frozen=True)
class Verdict:
    """One behaviour in one window, both tests."""

    features: Four
    texts: Four
    level: float

    @property
    def p_features(self) -> float:
        """Of the read-outs' test."""
        return tests.rate_increase_p_value(*self.features)

    @property
    def p_value(self) -> float:
        """The smaller of both tests'."""
        return min(self.p_features, tests.rate_increase_p_value(*self.texts))

    @property
    def kind(self) -> Kind:
        """What a rejection means."""
        if self.p_features < self.level:
            return "behaviour"
        return "hacking" if tests.rate_decrease_p_value(*self.features) < self.level else "text"

    @property
    def rate(self) -> float:
        """Share of responses that exceed."""
        return share(self.features[:2])

    @property
    def smallest_effect(self) -> float | None:
        """Lowest true rate the read-outs' test finds with 80 % probability."""
        _, total, found, baseline_total = self.features
        return tests.smallest_detectable_rate(total, found, baseline_total, self.level)

    def scalars(self, stream: str, key: str) -> dict[str, float]:
        """The test's figures by tag."""
        tag = f"sae/{stream}/{key}"
        values = {
            f"{tag}/exceedance_pooled": self.rate,
            f"{tag}/log10_p": math.log10(max(self.p_features, 1e-300)),
            f"{tag}/log10_level": math.log10(self.level),
        }
        if self.smallest_effect is not None:
            values[f"{tag}/smallest_detectable_rate"] = self.smallest_effect
        return values

    def alert(
        self,
        step: int,
        stream: str,
        key: str,
        read_outs: Sequence[ReadOutChange],
        contexts: Sequence[TokenContext],
    ) -> Alert:
        """The record of a rejection."""
        found, total, _, baseline_total = self.features
        baseline_rate = share(self.features[2:])
        has_text = self.texts[1] > 0 and self.texts[3] > 0
        text_rate, text_baseline = share(self.texts[:2]), share(self.texts[2:])
        message = (
            f"{key} in {tests.PLACES[stream]}: {_SAID[self.kind]}; {found} of {total} responses exceed "
            f"({self.rate:.1%}, at calibration {baseline_rate:.1%} of {baseline_total}), "
            f"p = {self.p_value:.1e} < {self.level:.1e}"
        )
        if has_text:
            message += f"; the text detector finds {text_rate:.1%} (at calibration {text_baseline:.1%})"
        return Alert(
            kind=self.kind,
            severity="ALERT",
            step=step,
            stream=stream,
            behaviour=key,
            message=message,
            rate=self.rate,
            baseline_rate=baseline_rate,
            counts=self.features,
            p_value=self.p_value,
            level=self.level,
            smallest_effect=self.smallest_effect,
            text_rate=text_rate if has_text else None,
            text_baseline_rate=text_baseline if has_text else None,
            read_outs=tuple(read_outs),
            contexts=tuple(contexts),
        )


def judge(pooled: dict[str, np.ndarray], baseline: dict[str, np.ndarray], key: int, level: float) -> Verdict:
    """Compare pooled windows with the baseline, for behaviour number `key`."""

    def four(found: str, total: str) -> Four:
        return tuple(int(counts[name][key]) for counts in (pooled, baseline) for name in (found, total))  # type: ignore[return-value]

    return Verdict(four("exceeding", "responses"), four("texts_found", "texts"), level)


def read_out_changes(
    read_outs: Sequence[ReadOut],
    columns: Sequence[int],
    now: dict[str, np.ndarray],
    before: dict[str, np.ndarray],
    limit: int = 5,
) -> list[ReadOutChange]:
    """The read-outs of these columns by the rise of their firing rate per response token."""
    rates, rates_before = response_firing_rates(now), response_firing_rates(before)
    ranked = sorted(columns, key=lambda i: rates_before[i] - rates[i])[:limit]
    changes = []
    for i in ranked:
        read_out = read_outs[i]
        changes.append(
            ReadOutChange(
                read_out.layer,
                read_out.feature,
                read_out.label,
                read_out.promotes,
                float(rates[i]),
                float(rates_before[i]),
            )
        )
    return changes


def census_alert(step: int, stream: str, risen: RisenFeature, promotes: Sequence[str]) -> Alert:
    """Information about a feature nobody watches."""
    about = f", promotes {' '.join(t.strip() for t in promotes[:4])}" if promotes else ""
    return Alert(
        kind="census",
        severity="INFO",
        step=step,
        stream=stream,
        behaviour=f"L{risen.layer}/F{risen.feature}",
        message=(
            f"L{risen.layer}/F{risen.feature}{about}: fires in {risen.rate:.1%} of {risen.counts[1]} responses in "
            f"{tests.PLACES[stream]} (at calibration {risen.baseline_rate:.1%}); not watched, for information"
        ),
        rate=risen.rate,
        baseline_rate=risen.baseline_rate,
        counts=risen.counts,
        p_value=risen.p_value,
        level=0.05,
        read_outs=(ReadOutChange(risen.layer, risen.feature, "", tuple(promotes), risen.rate, risen.baseline_rate),),
    )


def share(counts: Sequence[Any]) -> float:
    """Found / total, 0 for an empty total."""
    found, total = counts
    return found / total if total else 0.0
