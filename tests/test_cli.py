"""The `qscope` command."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qscope_monitor.alerts import Alert
from qscope_monitor.reporting import JsonLinesSink


def qscope(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "qscope_monitor.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", **options)


@pytest.fixture
def run(alert: Alert, tmp_path: Path) -> Path:
    information = replace(alert, kind="census", severity="INFO", step=1, behaviour="L5/F9", contexts=())
    JsonLinesSink(tmp_path / "sae").write(3, {}, [information, alert], [])
    return tmp_path


def test_alerts_are_listed_with_their_responses(run: Path) -> None:
    done = qscope("alerts", str(run))
    assert done.returncode == 1  # there is an alarm
    assert "step 3" in done.stdout
    assert "⟦保存⟧" in done.stdout
    assert "step 1" not in done.stdout
    assert "step 1" in qscope("alerts", str(run), "--all").stdout


def test_alerts_for_machines_come_back_as_alerts(run: Path, alert: Alert) -> None:
    (line,) = qscope("alerts", str(run), "--json").stdout.splitlines()
    assert Alert.from_json(json.loads(line)) == alert
    assert qscope("alerts", str(run), "--kind", "census", "--json").returncode == 0


def test_errors_are_one_line_and_name_what_is_wrong(tmp_path: Path) -> None:
    done = qscope("alerts", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("qscope: no alerts.jsonl under")
    assert len(done.stderr.splitlines()) == 1
    assert qscope("demo", "--steps", "5").returncode == 2
    assert qscope("alerts", str(tmp_path), "--kind", "behavior").returncode == 2
    (tmp_path / "alerts.jsonl").write_text("[]\n")
    assert "alerts.jsonl:1: not an alert record" in qscope("alerts", str(tmp_path)).stderr


def test_without_the_extra_the_command_says_which_one(tmp_path: Path) -> None:
    code = "import sys; sys.modules['typer'] = None\nfrom qscope_monitor.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "qscope-monitor[cli]" in done.stderr


def test_the_demo_deletes_nothing_of_others(tmp_path: Path) -> None:
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean" / "mine.txt").write_text("precious")
    done = qscope("demo", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "not of an earlier demo" in done.stderr
    assert (tmp_path / "clean" / "mine.txt").exists()


@pytest.mark.slow
def test_a_short_demo_writes_what_it_promises(tmp_path: Path) -> None:
    done = qscope("demo", "--out", str(tmp_path / "demo"), "--steps", "20", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout)
    assert [run["run"] for run in document["runs"]] == ["clean", "contaminated"]
    for run in document["runs"]:
        assert set(run["overhead"]) == {"watch_list", "census", "rollouts", "calibration_seconds"}
        assert abs(run["after"]["loss"] - run["before"]["loss"]) < 0.5  # nats; the same model, a little tuned
        low, high = run["after"]["interval"]
        assert low <= run["after"]["rate"] <= high
        assert run["history"][0]["step"] == 0
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "demo" / "watch-list" / "watch_list.json").is_file()
    for name in ("clean", "contaminated"):
        assert list((tmp_path / "demo" / name).glob("events.out.tfevents.*"))
