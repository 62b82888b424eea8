"""The statistics, against independent formulas and simulation."""

import json

import numpy as np
import pytest
from scipy import stats

from qscope_monitor.alerts import (
    Alert,
    AlertState,
    AlphaSpending,
    benjamini_hochberg,
    rate_decrease_p_value,
    rate_increase_p_value,
    risen_features,
    smallest_detectable_rate,
    wilson_interval,
)


@pytest.mark.parametrize("counts", [(12, 64, 13, 256), (0, 64, 13, 256), (64, 64, 0, 256), (5, 7, 3, 300)])
def test_p_values_equal_scipys_fisher_exact(counts: tuple[int, int, int, int]) -> None:
    found, total, before, total_before = counts
    table = [[found, total - found], [before, total_before - before]]
    assert rate_increase_p_value(*counts) == pytest.approx(stats.fisher_exact(table, "greater").pvalue)
    assert rate_decrease_p_value(*counts) == pytest.approx(stats.fisher_exact(table, "less").pvalue)


def test_empty_samples_never_reject() -> None:
    assert rate_increase_p_value(0, 0, 5, 100) == 1.0
    assert rate_increase_p_value(5, 10, 0, 0) == 1.0
    assert smallest_detectable_rate(0, 5, 100, 0.01) is None


def test_smallest_detectable_rate_is_found_with_the_stated_power() -> None:
    level = 0.002
    rate = smallest_detectable_rate(64, 13, 256, level)
    assert rate is not None
    draws = np.random.default_rng(0).binomial(64, rate, 4000)
    found = np.mean([rate_increase_p_value(int(d), 64, 13, 256) < level for d in draws])
    assert found == pytest.approx(0.8, abs=0.03)
    assert smallest_detectable_rate(3, 13, 256, 1e-9) is None  # three responses can never be that surprising


def test_false_alarms_of_a_whole_run_stay_below_the_stated_rate() -> None:
    # 400 unchanged runs of 10 windows: thresholds calibrated and tested as the monitor does.
    generator = np.random.default_rng(1)
    alarms = 0
    for _ in range(400):
        calibration = generator.normal(size=256)
        threshold = np.quantile(calibration, 0.95, method="higher")
        before = int((calibration > threshold).sum())
        spending = AlphaSpending(0.05, planned_windows=10)
        windows = []
        alarm = False
        for _ in range(10):
            level = spending.next_level(tests=1)
            windows.append(int((generator.normal(size=64) > threshold).sum()))
            recent = windows[-4:]
            alarm |= rate_increase_p_value(sum(recent), 64 * len(recent), before, 256) < level
        alarms += alarm
    assert alarms / 400 <= 0.05


@pytest.mark.parametrize("planned", [7, None])
def test_alpha_spending_never_exceeds_the_budget(planned: int | None) -> None:
    spending = AlphaSpending(0.05, planned)
    spent = sum(3 * spending.next_level(tests=3) for _ in range(1000))
    assert spent <= 0.05 * (1 if planned is None else 1 + 1 / (planned + 1)) + 1e-12
    assert spent > 0.049


def test_wilson_interval_matches_its_formula() -> None:
    low, high = wilson_interval(10, 50)
    z, p, n = stats.norm.ppf(0.975), 0.2, 50
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert (low, high) == pytest.approx((centre - half, centre + half))


def test_benjamini_hochberg_by_its_definition() -> None:
    p = np.array([0.001, 0.008, 0.039, 0.041, 0.6])
    order = np.sort(p)
    largest = max(i for i in range(5) if order[i] <= 0.05 * (i + 1) / 5)
    assert benjamini_hochberg(p).tolist() == (p <= order[largest]).tolist()
    assert benjamini_hochberg(np.array([])).tolist() == []


def test_census_finds_the_feature_that_rose_and_no_other() -> None:
    generator = np.random.default_rng(0)
    before = generator.binomial(256, 0.1, 3000)
    now = generator.binomial(128, 0.1, 3000)
    now[1234] = 90
    assert [feature for feature, _ in risen_features(now, 128, before, 256)] == [1234]
    assert risen_features(now, 0, before, 256) == []


def test_an_alert_is_told_once_until_it_doubles_or_clears() -> None:
    state = AlertState()
    results = [(0.1, 0.001), (0.12, 0.0001)]
    assert [state.update(step, "behaviour", rate, p, 0.01) for step, (rate, p) in enumerate(results)] == [True, False]
    assert state.update(2, "behaviour", 0.25, 1e-6, 0.01)  # doubled
    assert not state.update(3, "text", 0.05, 0.5, 0.01)
    assert not state.update(4, "text", 0.05, 0.5, 0.01)  # cleared now
    assert state.update(5, "behaviour", 0.1, 0.001, 0.01)
    assert [word for _, word in state.history] == ["behaviour", "doubled", "cleared", "behaviour"]


def test_read_outs_joining_the_text_are_news_and_leaving_it_are_not() -> None:
    state = AlertState()
    kinds = ["text", "text", "behaviour", "text", "hacking"]
    said = [state.update(step, kind, 0.1, 1e-4, 0.01) for step, kind in enumerate(kinds)]
    assert said == [True, False, True, False, True]


def test_alert_records_round_trip_and_refuse_other_schemas(alert: Alert) -> None:
    assert Alert.from_json(json.loads(json.dumps(alert.to_json()))) == alert
    with pytest.raises(ValueError, match="schema_version 99"):
        Alert.from_json({**alert.to_json(), "schema_version": 99})


def test_contexts_mark_runs_of_firing_tokens_and_can_be_left_out(alert: Alert) -> None:
    assert alert.contexts[0].marked() == "Click [保存] now"
    assert alert.without_text().contexts == ()
