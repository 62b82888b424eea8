"""The session: schedule, spacing by cost, and that monitoring does not break training."""

from pathlib import Path

import pytest
import torch

from qscope_monitor import FeatureMonitor, RolloutSettings, WatchList, bundled, load_saes
from qscope_monitor.alerts import Alert
from qscope_monitor.session import MonitoringSession


class Recorder:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.written: list = []

    def write(self, step, scalars, alerts, ledger) -> None:
        self.written.append((step, dict(scalars), list(alerts), list(ledger)))

    def close(self) -> None:
        self.closed = True


def session(model, tokenizer, watch: WatchList, **options) -> MonitoringSession:
    monitor = FeatureMonitor(watch=watch, tokenizer=tokenizer)
    settings = RolloutSettings(per_window=2, calibration=2, max_new_tokens=4)
    return MonitoringSession(
        model, tokenizer, monitor, **{"prompts": ["Save a file"], "rollouts": settings, "every_n_steps": 2, **options}
    )


def train(session: MonitoringSession, steps: int) -> None:
    for step in range(steps):
        session.begin_step(step)
        session.model.train()
        session.model(input_ids=torch.arange(10, 26).view(2, 8))
        session.end_step(step + 1)


def test_a_watch_list_of_another_model_is_refused_at_once(tokenizer, watch) -> None:
    from models import qwen3

    with pytest.raises(ValueError, match="d_model 192, but the model's hidden size is 32"):
        session(qwen3(), tokenizer, watch)


def test_windows_end_every_n_steps_and_state_the_cost(model, tokenizer, watch) -> None:
    sink = Recorder()
    made = session(model, tokenizer, watch, sinks=[sink], max_overhead=None, strict=True)
    made.start(0)
    train(made, 5)
    assert [step for step, *_ in sink.written] == [0, 2, 4]
    scalars = sink.written[-1][1]
    for part in ("watch_list", "rollouts"):
        assert 0 < scalars[f"sae/cost/{part}"] < 1
    assert scalars["sae/cost/calibration_seconds"] > 0
    made.close()
    made.close()
    assert sink.closed
    assert not any(m._forward_hooks for m in model.modules())


def test_the_last_step_ends_a_window(model, tokenizer, watch) -> None:
    sink = Recorder()
    made = session(model, tokenizer, watch, sinks=[sink], prompts=None, every_n_steps=50)
    made.begin_step(0)
    made.end_step(1)
    made.end_step(2, last=True)
    assert [step for step, *_ in sink.written] == [2]


def test_rollouts_wait_until_their_share_is_earned(model, tokenizer, watch) -> None:
    made = session(model, tokenizer, watch, max_overhead=1e-9, strict=True)
    sampled = []
    observe = made._observe_rollouts
    made._observe_rollouts = lambda count, step: sampled.append(step) or observe(count, step)
    made.start(0)
    train(made, 8)
    assert sampled == [0, 2]  # calibration, the first window, then never again at this price


def test_the_census_is_due_whatever_the_reading_rate(model, tokenizer, watch) -> None:
    saes = load_saes(bundled.sae_path(), layers=[5])
    monitor = FeatureMonitor(saes, watch, tokenizer)
    made = MonitoringSession(model, tokenizer, monitor, every_n_steps=4, train_every_n_steps=2, strict=True)
    train(made, 3)
    made.begin_step(3)
    made.model(input_ids=torch.arange(10, 26).view(2, 8))
    assert monitor.census._counters["train"].take()["5/totals"][0] == 2


def test_training_batches_are_read_at_the_chosen_rate(model, tokenizer, watch) -> None:
    made = session(model, tokenizer, watch, prompts=None, train_every_n_steps=3, every_n_steps=100, strict=True)
    made.start(0)
    train(made, 7)
    assert made.monitor._streams["train"].counters.take()["positions"] == 3 * 16


def test_the_monitors_own_errors_stop_only_their_part(model, tokenizer, watch, caplog) -> None:
    made = session(model, tokenizer, watch, max_overhead=None)

    def fail(*args, **kwargs) -> None:
        raise MemoryError("no room")

    made.monitor.observe = fail
    made.start(0)
    train(made, 4)
    assert sum("MemoryError: no room" in record.message for record in caplog.records) == 3  # one for each part
    strict = session(model, tokenizer, watch, max_overhead=None, strict=True)
    strict.monitor.observe = fail
    with pytest.raises(MemoryError):
        strict.start(0)


def test_text_can_be_kept_out_of_every_sink(model, tokenizer, watch, alert: Alert) -> None:
    for log_text in (True, False):
        sink = Recorder()
        made = session(model, tokenizer, watch, sinks=[sink], log_text=log_text)
        made.monitor.alerts = [alert]
        made._publish(3, [alert])
        _, _, alerts, ledger = sink.written[0]
        assert [bool(a.contexts) for a in (*alerts, *ledger)] == [log_text] * 2
        assert ("How do I save?" in str(made.state_dict())) == log_text  # a checkpoint is a log too
        made.close()


def test_a_chinese_vocabulary_is_told_by_script(tokenizer, tmp_path: Path) -> None:
    from qscope_monitor import TokenRules
    from qscope_monitor.behaviours.vocabulary import ScriptVocabulary

    texts = ["保存文件并关闭窗口", "Save the file and close the window", "Сохранить файл и закрыть окно"]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    tokens = TokenRules.from_tokenizer(tokenizer).batch(encoded["input_ids"], attention_mask=encoded["attention_mask"])
    scripts = ScriptVocabulary(tokenizer)
    assert scripts.is_language(tokens, "zh").tolist() == [True, False, False]
    assert scripts.is_language(tokens, "en").tolist() == [False, True, False]
    assert scripts.is_language(tokens, "ru").tolist() == [False, False, True]
