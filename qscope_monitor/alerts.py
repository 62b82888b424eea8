"""What is abnormal: the tests, the alert records, and the states that keep one event from being told twice.

The statistics, in one place. A *response* exceeds when its score, the highest mean of its read-outs' margins over 16
tokens in a row, lies above a threshold: the level that at most `exceedance_rate` of the calibration responses exceed,
and never below the watch list's floor. Later responses, pooled over the last windows, are compared with the
calibration counts by a one-sided Fisher exact test: both samples are
counted, so the uncertainty of the threshold itself is part of the test. `false_alarm_rate` is spent over all tests
of a run (streams x behaviours x two evidences x windows), so it bounds the chance of *any* false alarm in that run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from scipy import optimize, stats

ALERT_SCHEMA_VERSION = 1
MINIMUM_CALIBRATION = 256
PLACES = {"train": "training batches", "rollout": "rollouts"}  # what people call the streams
Kind = Literal["behaviour", "text", "hacking", "census"]
KINDS: tuple[Kind, ...] = ("behaviour", "text", "hacking", "census")
Severity = Literal["INFO", "ALERT"]


@dataclass(frozen=True)
class TokenContext:
    """One response that raised an alert: its tokens as text, and each token's margin (0 where nothing fires)."""

    tokens: tuple[str, ...]
    margins: tuple[float, ...]
    score: float
    prompt: str = ""

    def marked(self, left: str = "[", right: str = "]") -> str:
        """The text with runs of firing tokens between `left` and `right`."""
        pieces: list[str] = []
        inside = False
        for token, margin in zip(self.tokens, self.margins, strict=True):
            fires = margin > 0
            if fires != inside:
                pieces.append(left if fires else right)
                inside = fires
            pieces.append(token)
        return "".join(pieces) + (right if inside else "")


@dataclass(frozen=True)
class ReadOutChange:
    """How often one read-out fires per response token, now and at calibration."""

    layer: int
    feature: int | None
    label: str
    promotes: tuple[str, ...]
    rate: float
    baseline_rate: float

    @property
    def name(self) -> str:
        """`L5/F123`, or `L5/probe`."""
        return f"L{self.layer}/" + ("probe" if self.feature is None else f"F{self.feature}")


@dataclass(frozen=True)
class Alert:
    """Something abnormal, with the evidence it rests on.

    Attributes:
        kind: `behaviour`: the watched read-outs became abnormally active. `text`: the text detector alone says so.
            `hacking`: the text behaviour rose while its read-outs fell silent. `census`: unwatched features became
            active (information, never an alarm).
        severity: `ALERT` or `INFO`.
        step: optimiser step at which the test rejected.
        stream: `train` (what the model is fed) or `rollout` (what it writes).
        behaviour: the behaviour's key, such as `code-switching-zh`.
        message: one line for people.
        rate, baseline_rate: share of responses that exceed, now and at calibration.
        counts: (exceeding, responses, exceeding at calibration, responses at calibration).
        p_value, level: the test's p-value and the level it had to pass.
        smallest_effect: lowest true rate this test would have found with 80 % probability.
        text_rate, text_baseline_rate: the same two shares for the text detector (None where no text was seen).
        read_outs: the read-outs that changed most.
        contexts: responses with their firing tokens marked (empty when text must not be logged).
    """

    kind: Kind
    severity: Severity
    step: int
    stream: str
    behaviour: str
    message: str
    rate: float
    baseline_rate: float
    counts: tuple[int, int, int, int]
    p_value: float
    level: float
    smallest_effect: float | None = None
    text_rate: float | None = None
    text_baseline_rate: float | None = None
    read_outs: tuple[ReadOutChange, ...] = ()
    contexts: tuple[TokenContext, ...] = ()
    schema_version: int = ALERT_SCHEMA_VERSION

    def without_text(self) -> Alert:
        """The same alert with no prompt or response in it."""
        return replace(self, contexts=())

    def to_json(self) -> dict[str, Any]:
        """A plain dict for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Alert:
        """The inverse of `to_json`. Raises ValueError on a record of a newer schema."""
        version = record.get("schema_version")
        if version != ALERT_SCHEMA_VERSION:
            raise ValueError(f"alert record has schema_version {version!r}, this version reads {ALERT_SCHEMA_VERSION}")
        values = dict(record)
        values["counts"] = tuple(values["counts"])
        values["read_outs"] = tuple(
            ReadOutChange(**{**change, "promotes": tuple(change["promotes"])}) for change in values["read_outs"]
        )
        values["contexts"] = tuple(
            TokenContext(**{**c, "tokens": tuple(c["tokens"]), "margins": tuple(c["margins"])})
            for c in values["contexts"]
        )
        return cls(**values)


def rate_increase_p_value(found: int, total: int, baseline_found: int, baseline_total: int) -> float:
    """One-sided Fisher exact p-value for `found / total` being above the baseline's share.

    Returns 1.0 when either sample is empty. Source: Fisher (1935); upper tail of the hypergeometric distribution.
    """
    if total == 0 or baseline_total == 0:
        return 1.0
    population, successes = total + baseline_total, found + baseline_found
    return float(stats.hypergeom.sf(found - 1, population, successes, total))


def rate_decrease_p_value(found: int, total: int, baseline_found: int, baseline_total: int) -> float:
    """The lower tail of the same test."""
    return rate_increase_p_value(total - found, total, baseline_total - baseline_found, baseline_total)


def smallest_detectable_rate(
    total: int, baseline_found: int, baseline_total: int, level: float, power: float = 0.8
) -> float | None:
    """Lowest true rate that `rate_increase_p_value < level` finds with probability `power` in `total` responses.

    None when even a rate of 1 would not be found (too few responses).
    """
    if total == 0 or baseline_total == 0:
        return None
    found = np.arange(total + 1)
    p_values = stats.hypergeom.sf(found - 1, total + baseline_total, found + baseline_found, total)
    rejecting = np.flatnonzero(p_values < level)
    if len(rejecting) == 0:
        return None
    critical = int(rejecting[0])
    if critical == 0:
        return 0.0
    return float(optimize.brentq(lambda rate: stats.binom.sf(critical - 1, total, rate) - power, 1e-12, 1 - 1e-12))


def wilson_interval(found: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion; (0, 1) for an empty sample."""
    if total == 0:
        return 0.0, 1.0
    interval = stats.binomtest(found, total).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def benjamini_hochberg(p_values: np.ndarray, false_discovery_rate: float = 0.05) -> np.ndarray:
    """Boolean mask of the rejected hypotheses. Source: Benjamini and Hochberg (1995)."""
    if p_values.size == 0:
        return np.zeros(0, dtype=bool)
    return np.asarray(stats.false_discovery_control(p_values, method="bh") <= false_discovery_rate)


def risen_features(
    fired: np.ndarray, total: int, baseline_fired: np.ndarray, baseline_total: int, limit: int = 5
) -> list[tuple[int, float]]:
    """Census test: features that fire in more responses than at calibration, at a false-discovery rate of 5 %.

    Args:
        fired: [d_sae] number of responses in which each feature fired.
        total: number of responses.
        baseline_fired: the same at calibration.
        baseline_total: the same at calibration.
        limit: at most this many, largest rise in share first.

    Returns:
        (feature, p-value) pairs.
    """
    if total == 0 or baseline_total == 0:
        return []
    rise = fired / total - baseline_fired / baseline_total
    candidates = np.flatnonzero(rise > 0)
    p_values = stats.hypergeom.sf(
        fired[candidates] - 1, total + baseline_total, fired[candidates] + baseline_fired[candidates], total
    )
    # The other features were tested too, with p close to 1: they count in the correction.
    everything = np.ones(len(fired))
    everything[candidates] = p_values
    rejected = np.flatnonzero(benjamini_hochberg(everything))
    ranked = sorted(rejected, key=lambda feature: -rise[feature])[:limit]
    return [(int(feature), float(everything[feature])) for feature in ranked]


@dataclass
class AlphaSpending:
    """Splits one run's false-alarm rate over its tests.

    With a known number of windows every window gets an equal share; without one, window i gets 1 / (i (i + 1)), which
    sums to 1 over an endless run. A run that outlasts its plan goes on like that, and spends at most
    1 / (planned + 1) more. Each share is divided by the number of tests in a window (Bonferroni).

    Args:
        false_alarm_rate: chance of any false alarm in the whole run.
        planned_windows: number of windows the run will test, or None.
    """

    false_alarm_rate: float = 0.05
    planned_windows: int | None = None
    window: int = 0

    def next_level(self, tests: int) -> float:
        """The level of each of the `tests` in the next window."""
        self.window += 1
        if self.planned_windows is not None and self.window <= self.planned_windows:
            share = 1 / self.planned_windows
        else:
            share = 1 / (self.window * (self.window + 1))
        return self.false_alarm_rate * share / max(tests, 1)


@dataclass
class AlertState:
    """What has been told about one behaviour in one stream, so that it is not told again.

    An alert is raised once. It is raised again only when the rate has doubled since, when the read-outs join in after
    the text alone had shown it (or turn silent), or after it had cleared: the pooled test stayed above `clear_above`
    for `clear_after` windows in a row.
    """

    raised_rate: float | None = None
    raised_kind: str | None = None
    quiet_windows: int = 0
    clear_above: float = 0.05
    clear_after: int = 2
    history: list[tuple[int, str]] = field(default_factory=list)

    def update(self, step: int, kind: str, rate: float, p_value: float, level: float) -> bool:
        """True when this window's result is news worth an alert."""
        if p_value < level:
            self.quiet_windows = 0
            doubled = self.raised_rate is not None and rate >= 2 * self.raised_rate and kind == self.raised_kind
            joined = kind != self.raised_kind and kind != "text"
            if self.raised_rate is None or doubled or joined:
                self.history.append((step, "doubled" if doubled else kind))
                self.raised_rate, self.raised_kind = rate, kind
                return True
        elif self.raised_rate is not None and p_value > self.clear_above:
            self.quiet_windows += 1
            if self.quiet_windows >= self.clear_after:
                self.history.append((step, "cleared"))
                self.raised_rate, self.raised_kind, self.quiet_windows = None, None, 0
        else:
            self.quiet_windows = 0
        return False


def ledger_order(alerts: Sequence[Alert]) -> list[Alert]:
    """Newest first; alarms before information within a step."""
    return sorted(alerts, key=lambda alert: (-alert.step, alert.severity == "INFO"))
