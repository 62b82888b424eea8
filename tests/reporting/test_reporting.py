"""Sinks: what is written where."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qscope_monitor.alerts import Alert, TokenContext
from qscope_monitor.reporting import (
    CallbackSink,
    JsonLinesSink,
    LogSink,
    TensorBoardSink,
    ledger_markdown,
    read_alerts,
)
from qscope_monitor.reporting.ledger import MAXIMUM_ROWS


def test_json_lines_come_back_as_alerts(alert: Alert, tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path / "run" / "sae")
    later = replace(alert, step=9)
    sink.write(9, {"sae/x": 1.5}, [later], [later])
    sink.write(3, {"sae/x": 2.5}, [alert], [later, alert])
    assert read_alerts(tmp_path) == [alert, later]
    scalars = [json.loads(line) for line in (tmp_path / "run" / "sae" / "scalars.jsonl").read_text().splitlines()]
    assert scalars == [{"step": 9, "sae/x": 1.5}, {"step": 3, "sae/x": 2.5}]


def test_a_new_run_moves_an_old_runs_records_aside(alert: Alert, tmp_path: Path) -> None:
    JsonLinesSink(tmp_path).write(3, {}, [alert], [])
    JsonLinesSink(tmp_path).write(1, {}, [], [])
    assert read_alerts(tmp_path) == []
    assert (tmp_path / "alerts.previous.jsonl").read_text().count("\n") == 1


def test_a_resumed_run_drops_what_came_after_its_checkpoint(alert: Alert, tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path)
    for step in (2, 4, 6):
        sink.write(step, {"sae/x": float(step)}, [replace(alert, step=step)], [])
    JsonLinesSink(tmp_path, resumed_at=4).write(6, {"sae/x": 60.0}, [replace(alert, step=6)], [])
    assert [a.step for a in read_alerts(tmp_path)] == [2, 4, 6]
    scalars = [json.loads(line)["sae/x"] for line in (tmp_path / "scalars.jsonl").read_text().splitlines()]
    assert scalars == [2.0, 4.0, 60.0]


def test_unusual_line_separators_and_an_unfinished_line_do_no_harm(alert: Alert, tmp_path: Path) -> None:
    odd = replace(alert, message="a\u2028b\u0085c")
    JsonLinesSink(tmp_path).write(3, {}, [odd], [])
    with (tmp_path / "alerts.jsonl").open("a") as file:
        file.write('{"kind": "beha')
    assert read_alerts(tmp_path) == [odd]


def test_reading_alerts_names_the_broken_line(alert: Alert, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no alerts\.jsonl"):
        read_alerts(tmp_path)
    file = tmp_path / "alerts.jsonl"
    file.write_text(json.dumps(alert.to_json()) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"alerts\.jsonl:2"):
        read_alerts(file)


def test_the_ledger_is_newest_first_and_capped(alert: Alert) -> None:
    alerts = [replace(alert, step=step) for step in range(MAXIMUM_ROWS + 7)]
    text = ledger_markdown(alerts)
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == MAXIMUM_ROWS
    assert f"at step {MAXIMUM_ROWS + 6}:" in rows[0]
    assert "7 older entries" in text
    assert ledger_markdown([]) == "No alert so far."


def test_the_ledger_survives_hostile_text(alert: Alert) -> None:
    context = TokenContext(("```\n", "# heading | <b>", "\n```"), (0.0, 1.0, 0.0), 1.0, "a\nb")
    text = ledger_markdown([replace(alert, contexts=(context,))])
    block = text.split("### Step 3")[1].splitlines()[1:]
    assert all(line.startswith("    ") or not line for line in block)
    row = next(line for line in text.splitlines() if "at step 3:" in line)
    assert row.count("|") - row.count("\\|") == 5  # a promoted token "|" does not open a cell


def test_information_comes_apart_from_alarms(alert: Alert) -> None:
    census = [replace(alert, severity="INFO", kind="census", step=s, behaviour=f"L5/F{s}") for s in range(20)]
    text = ledger_markdown([*census, alert])
    alarms, information = text.split("### For information")
    assert "L5/F19" in information
    assert "L5/F9 " not in text  # only the newest ten
    assert "L5/F" not in alarms.replace("L5/F7", "")
    assert ledger_markdown(census).startswith("No alert so far.")


def test_long_lines_are_cut_to_the_box(alert: Alert) -> None:
    context = TokenContext(("保存" * 200, "a" * 150), (0.0, 0.0), 1.0, "p")
    block = [
        line[4:] for line in ledger_markdown([replace(alert, contexts=(context,))]).splitlines() if line[:4] == "    "
    ]
    assert "".join(block[1:]) == "保存" * 200 + "a" * 150
    assert max(len(line) for line in block) <= 100
    assert len(block[1]) == 50


def test_marked_tokens_stand_in_brackets(alert: Alert) -> None:
    assert "Click ⟦保存⟧ now" in ledger_markdown([alert])


def test_tensorboard_holds_scalars_ledger_and_layout(alert: Alert, tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, ["code-switching-zh"])
    for step in (1, 2, 3):
        sink.write(step, {"sae/rollout/code-switching-zh/exceedance": step / 10}, [], [alert] * (step > 1))
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    values = [(e.step, round(e.value, 3)) for e in events.Scalars("sae/rollout/code-switching-zh/exceedance")]
    assert values == [(1, 0.1), (2, 0.2), (3, 0.3)]
    ledger = [t for t in events.Tags()["tensors"] if t.startswith("sae/alerts")]
    written = events.Tensors(ledger[0])
    assert [e.step for e in written] == [1, 2]  # only when it grew
    assert "⟦保存⟧" in written[-1].tensor_proto.string_val[0].decode()
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_log_and_function_sinks(alert: Alert, caplog) -> None:
    told: list = []
    information = replace(alert, severity="INFO", kind="census")
    with caplog.at_level(logging.INFO, logger="qscope_monitor"):
        for sink in (LogSink(), CallbackSink(told.append)):
            sink.write(3, {}, [alert, information], [])
            sink.close()
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    assert told == [alert, information]


class FakeTracker:
    """Stands for W&B's run and for the trackio module."""

    def __init__(self) -> None:
        self.logged: list = []
        self.alerts: list = []

    def log(self, values) -> None:
        self.logged.append(values)

    def alert(self, **values) -> None:
        self.alerts.append(values)


def test_trackers_get_scalars_and_alarms_only(alert: Alert) -> None:
    from qscope_monitor.reporting.trackers import TrackioSink, WandbSink

    information = replace(alert, severity="INFO", kind="census")
    for kind in (WandbSink, TrackioSink):
        tracker = FakeTracker()
        kind(tracker).write(5, {"sae/x": 1.0}, [alert, information], [alert])
        assert tracker.logged == [{"sae/x": 1.0, "train/global_step": 5}]
        assert [a["title"] for a in tracker.alerts] == ["qscope: code-switching-zh"]
