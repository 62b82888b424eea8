"""The monitor on synthetic residuals, where the truth is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from qscope_monitor import FeatureMonitor, ReadOut, TokenRules, TopKSAE, WatchList
from qscope_monitor.monitor import STATE_SCHEMA_VERSION
from qscope_monitor.panel import highest_per_sequence, mean_over_window

D = 8
LENGTH = 12
RULES = TokenRules((0,))


def read_out(
    language: str | None = "zh", feature: int = 3, axis: int = 0, behaviour: str = "code-switching"
) -> ReadOut:
    weight = torch.eye(D)[axis]
    return ReadOut(2, feature, weight, 0.0, 1.0, 2.0, weight, behaviour, language, label="axis")


def batch(generator: torch.Generator, rows: int, firing: float, prompt: int = 3):
    """`rows` responses; in a share `firing` of them one response token reads 5 on axis 0, elsewhere below 1."""
    residual = torch.rand(rows, LENGTH, D, generator=generator)
    hit = torch.rand(rows, generator=generator) < firing
    residual[hit, 7, 0] = 5 + torch.rand(int(hit.sum()), generator=generator)
    ids = torch.randint(1, 50, (rows, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {2: residual}, RULES.batch(ids, labels=labels), int(hit.sum())


def observe(monitor: FeatureMonitor, seed: int, rows: int, firing: float, **options) -> int:
    residuals, tokens, hits = batch(torch.Generator().manual_seed(seed), rows, firing)
    monitor.observe(residuals, tokens, **{"stream": "rollout", **options})
    return hits


def test_counts_equal_a_loop_over_tokens() -> None:
    monitor = FeatureMonitor(watch=WatchList([read_out()]))
    residuals, tokens, hits = batch(torch.Generator().manual_seed(0), 40, 0.3)
    monitor.observe(residuals, tokens, stream="rollout")
    counts = monitor._streams["rollout"].counters.take()
    fires = {"prompt": 0, "answer": 0}
    for row in range(40):
        for position in range(1, LENGTH):  # position 0 never counts
            place = "prompt" if position < 3 else "answer"
            fires[place] += float(residuals[2][row, position, 0]) > 1.0
    assert counts["fires"][0, 0] == fires["prompt"]
    assert counts["fires"][2, 0] == fires["answer"] == hits
    assert counts["tokens"].tolist() == [40 * 2, 0, 40 * 9]
    assert counts["responses"][0] == 40
    margin = ((residuals[2][:, :, 0] - 1) / 2).clamp_min(0)
    margin[:, :3] = 0  # the prompt
    highest = [max(float(row[max(t - 15, 0) : t + 1].sum()) / 16 for t in range(LENGTH)) for row in margin]
    assert counts["response_scores"][0] == pytest.approx(sum(highest), rel=1e-5)


def test_windows_do_not_reach_into_the_sequence_before() -> None:
    tokens = RULES.batch(torch.ones(1, 6, dtype=torch.long), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    values = torch.tensor([[[0.0], [4.0], [4.0], [0.0], [2.0], [0.0]]])
    assert mean_over_window(values, tokens, 4)[0, :, 0].tolist() == [0, 1, 2, 0, 0.5, 0.5]
    assert highest_per_sequence(values, tokens)[:, 0].tolist() == [4, 2]


def test_a_rise_is_told_once_with_its_evidence() -> None:
    monitor = FeatureMonitor(watch=WatchList([read_out()]), planned_windows=5)
    observe(monitor, 0, 300, 0.02)
    assert monitor.calibrate("rollout") == 300
    assert monitor.status("rollout") == "CALIBRATED"
    observe(monitor, 1, 64, 0.02)
    assert monitor.step(10) == []
    hits = observe(monitor, 2, 64, 0.5)
    (alert,) = monitor.step(20)
    assert (alert.kind, alert.stream, alert.step) == ("behaviour", "rollout", 20)
    assert alert.counts[1] == 128
    assert abs(alert.counts[0] - hits) <= 5
    assert alert.p_value < alert.level
    assert alert.level == pytest.approx(0.05 / 2 / 5 / 2)  # two streams, five windows, features and text
    assert alert.smallest_effect is not None
    assert alert.baseline_rate < alert.smallest_effect < 0.5
    assert alert.read_outs[0].rate > 10 * alert.read_outs[0].baseline_rate
    observe(monitor, 3, 64, 0.5)
    assert all(a.rate >= 2 * alert.rate for a in monitor.step(30))
    assert monitor.alerts[0] is alert


def test_no_response_counts_below_the_floor() -> None:
    for floor, exceeding in ((0.0, True), (0.5, False)):
        monitor = FeatureMonitor(watch=WatchList([read_out()], floors={"code-switching-zh": floor}), planned_windows=1)
        observe(monitor, 0, 300, 0.0)
        monitor.calibrate()
        observe(monitor, 1, 100, 0.5)  # one token at a margin of 2 to 2.5: at most 0.16 over 16 tokens
        assert bool(monitor.step(1)) == exceeding


def test_too_few_calibration_responses_raise_nothing() -> None:
    monitor = FeatureMonitor(watch=WatchList([read_out()]))
    observe(monitor, 0, 100, 0.0)
    assert monitor.calibrate("rollout") == 100
    assert monitor.status("rollout") == "INSUFFICIENT"
    for window in range(1, 5):  # rollouts of a model in training never become a baseline
        observe(monitor, window, 100, 1.0)
        assert monitor.step(window) == []
        assert monitor.status("rollout") == "INSUFFICIENT"
    assert monitor.scalars["sae/rollout/firing_rate/L2.F3"] > 0
    assert "sae/rollout/code-switching-zh/exceedance" not in monitor.scalars


def test_the_training_stream_takes_its_first_responses_as_baseline() -> None:
    monitor = FeatureMonitor(watch=WatchList([read_out()]))
    for window in range(4):
        observe(monitor, window, 70, 0.02, stream="train")
        monitor.step(window + 1)
    assert monitor.status("train") == "CALIBRATED"
    observe(monitor, 9, 70, 0.9, stream="train")
    assert [a.stream for a in monitor.step(5)] == ["train"]


def test_responses_expected_in_the_read_outs_language_are_left_out() -> None:
    monitor = FeatureMonitor(watch=WatchList([read_out(), read_out("ru", 4, axis=1)]))
    residuals, tokens, _ = batch(torch.Generator().manual_seed(0), 10, 1.0)
    monitor.observe(residuals, tokens, stream="train", expected=["zh"] * 4 + [None] * 6)
    assert monitor._streams["train"].counters.take()["responses"].tolist() == [6, 10]


def test_the_prompts_script_tells_what_is_expected(tokenizer) -> None:
    monitor = FeatureMonitor(watch=WatchList([read_out()]), tokenizer=tokenizer)
    rows = [("文件保存在哪里", " Save the file"), ("Where is the file", "保存文件"), ("Где находится файл", "保存文件")]
    encoded = [(tokenizer(p)["input_ids"], tokenizer(r)["input_ids"]) for p, r in rows]
    width = max(len(p) + len(r) for p, r in encoded)
    ids = torch.zeros(3, width, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (p, r) in enumerate(encoded):
        ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
        mask[i, : len(p) + len(r)] = 1
    tokens = TokenRules.from_tokenizer(tokenizer).batch(ids, attention_mask=mask, labels=labels)
    monitor.observe({2: torch.zeros(3, width, D)}, tokens, stream="train")
    assert monitor._streams["train"].counters.take()["responses"][0] == 2


def test_acting_read_outs_are_read_but_judge_nothing() -> None:
    acting = replace(read_out(), role="act")
    monitor = FeatureMonitor(watch=WatchList([read_out(axis=1), acting]))
    observe(monitor, 0, 300, 0.0)
    monitor.calibrate()
    observe(monitor, 1, 100, 1.0)
    assert monitor.step(1) == []
    assert monitor.scalars["sae/rollout/firing_rate/L2.F3"] > 0


def test_features_falling_silent_while_the_text_switches_is_hacking() -> None:
    monitor = FeatureMonitor(watch=WatchList([read_out()]), exceedance_rate=0.4, planned_windows=1)
    clean, switched = "Click the button to save.", "Click 保存文件然后关闭窗口 to save."
    observe(monitor, 0, 300, 0.45, texts=[clean] * 300, prompts=["How do I save?"] * 300)
    monitor.calibrate()
    observe(monitor, 1, 100, 0.0, texts=[clean] * 50 + [switched] * 50, prompts=["How do I save?"] * 100)
    (alert,) = monitor.step(1)
    assert alert.kind == "hacking"
    assert alert.text_rate == 0.5
    assert alert.text_baseline_rate == 0.0


def test_text_alone_is_its_own_kind() -> None:
    monitor = FeatureMonitor(watch=WatchList([read_out()]), planned_windows=1)
    clean, switched = "Click the button.", "Click 保存文件然后关闭窗口 to save."
    observe(monitor, 0, 300, 0.02, texts=[clean] * 300, prompts=["How?"] * 300)
    monitor.calibrate()
    observe(monitor, 1, 100, 0.02, texts=[clean] * 50 + [switched] * 50, prompts=["How?"] * 100)
    (alert,) = monitor.step(1)
    assert alert.kind == "text"


def test_text_alerts_show_the_responses_the_text_detector_found(tokenizer) -> None:
    monitor = FeatureMonitor(watch=WatchList([read_out()]), tokenizer=tokenizer, planned_windows=1)
    clean, switched = "Click the button.", "Click 保存文件然后关闭窗口 to save."
    ids = [tokenizer(text)["input_ids"] for text in (clean, switched)]
    width = max(len(row) for row in ids)

    def feed(numbers: list[int]) -> None:
        batch = torch.tensor([ids[n] + [0] * (width - len(ids[n])) for n in numbers])
        tokens = TokenRules.from_tokenizer(tokenizer).batch(batch, attention_mask=(batch > 0).long())
        texts = [(clean, switched)[n] for n in numbers]
        residual = torch.zeros(len(numbers), width, D)
        monitor.observe({2: residual}, tokens, stream="rollout", texts=texts, prompts=["How?"] * len(numbers))

    feed([0] * 300)
    monitor.calibrate()
    feed([0] * 50 + [1] * 50)
    (alert,) = monitor.step(1)
    assert alert.kind == "text"
    assert [context.marked() for context in alert.contexts] == [switched] * 3


def test_non_finite_residuals_are_counted_and_do_no_harm() -> None:
    monitor = FeatureMonitor(watch=WatchList([read_out()]))
    residuals, tokens, _ = batch(torch.Generator().manual_seed(0), 20, 0.2)
    residuals[2][3, 5] = float("nan")
    residuals[2][4, 6, 0] = float("inf")
    monitor.observe(residuals, tokens, stream="rollout")
    counts = monitor._streams["rollout"].counters.take()
    assert np.isfinite(counts["response_scores"]).all()
    assert counts["excluded"][4] == 2


def test_the_state_carries_everything(tmp_path) -> None:
    def fresh() -> FeatureMonitor:
        return FeatureMonitor(saes={2: sae()}, watch=WatchList([read_out()]), planned_windows=6)

    def go_on(monitor: FeatureMonitor) -> list:
        alerts = []
        for window, firing in enumerate([0.02, 0.5, 0.5], start=2):
            observe(monitor, window, 64, firing, census=True)
            observe(monitor, window, 64, firing, stream="train")
            alerts += [a.to_json() for a in monitor.step(window)]
        return alerts

    first = fresh()
    observe(first, 0, 300, 0.02, census=True)
    first.calibrate()
    observe(first, 1, 64, 0.02, stream="train")
    first.step(1)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = fresh()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    ahead = go_on(first)
    assert ahead == go_on(second)
    assert any(a["kind"] == "behaviour" for a in ahead)
    assert first.scalars == second.scalars


def test_states_of_other_watch_lists_or_schemas_are_refused() -> None:
    monitor = FeatureMonitor(watch=WatchList([read_out()]))
    other = FeatureMonitor(watch=WatchList([read_out(feature=9)]))
    with pytest.raises(ValueError, match="another watch list"):
        monitor.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=f"reads {STATE_SCHEMA_VERSION}"):
        monitor.load_state_dict({**monitor.state_dict(), "schema_version": 99})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"watch": None}, "nothing to watch"),
        ({"exceedance_rate": 1.0}, "exceedance_rate"),
        ({"false_alarm_rate": 0.0}, "false_alarm_rate"),
        ({"pooled_windows": 0}, "pooled_windows"),
    ],
)
def test_bad_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureMonitor(**{"watch": WatchList([read_out()]), **options})


def test_unknown_streams_are_refused() -> None:
    monitor = FeatureMonitor(watch=WatchList([read_out()]))
    with pytest.raises(ValueError, match="'eval'"):
        observe(monitor, 0, 4, 0.0, stream="eval")


def sae() -> TopKSAE:
    return TopKSAE(torch.eye(D), torch.eye(D), torch.zeros(D), torch.zeros(D), k=3, layer=2)


def test_census_counts_responses_not_tokens() -> None:
    monitor = FeatureMonitor(saes={2: sae()})
    residuals, tokens, _ = batch(torch.Generator().manual_seed(0), 30, 0.0)
    monitor.observe(residuals, tokens, stream="rollout", census=True)
    fired = monitor.census._counters["rollout"].take()["2/fired"]
    top = residuals[2][:, 3:].topk(3, -1).indices  # all are positive
    expected = [sum(bool((top[row] == f).any()) for row in range(30)) for f in range(D)]
    assert fired.tolist() == expected


def test_health_is_the_saes_own_fvu() -> None:
    monitor = FeatureMonitor(saes={2: sae()})
    residuals, tokens, _ = batch(torch.Generator().manual_seed(0), 30, 0.3)
    monitor.observe(residuals, tokens, stream="rollout", census=True)
    health = monitor.census.end_window("rollout").health[2]
    x = residuals[2][:, 3:].reshape(-1, D)
    assert health["fvu"] == pytest.approx(sae().fvu(x), rel=1e-5)
    assert health["l0"] == 3


def test_an_unchanged_model_gives_no_census_news() -> None:
    monitor = FeatureMonitor(saes={2: sae()})
    observe(monitor, 0, 300, 0.1, census=True)
    monitor.calibrate()
    observe(monitor, 1, 100, 0.1, census=True)
    assert monitor.step(1) == []


def test_a_risen_feature_is_census_information_told_once() -> None:
    monitor = FeatureMonitor(saes={2: sae()})
    for seed, raised in ((0, 0.0), (1, 9.0), (2, 9.0)):
        residuals, tokens, _ = batch(torch.Generator().manual_seed(seed), 300, 0.0)
        residuals[2][:, :, 5] += raised - 1.0 if raised else -1.0
        monitor.observe(residuals, tokens, stream="rollout", census=True)
        alerts = monitor.step(seed) if seed else []
        if seed == 0:
            assert monitor.calibrate("rollout") == 300
        elif seed == 1:
            assert [(a.kind, a.severity, a.behaviour) for a in alerts] == [("census", "INFO", "L2/F5")]
        else:
            assert alerts == []


def test_sae_and_watch_list_must_agree() -> None:
    wide = TopKSAE(torch.eye(4), torch.eye(4), torch.zeros(4), torch.zeros(4), k=1)
    with pytest.raises(ValueError, match="d_model 4"):
        FeatureMonitor(saes={2: wide}, watch=WatchList([read_out()]))
