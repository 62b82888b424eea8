"""What every sink does, and the simple ones: JSON lines and the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from qscope_monitor.alerts import Alert

logger = logging.getLogger("qscope_monitor")


class Sink(Protocol):
    """Receives each window's figures and alerts, on rank 0 only."""

    def write(self, step: int, scalars: Mapping[str, float], alerts: Sequence[Alert], ledger: Sequence[Alert]) -> None:
        """One window: `scalars` by tag, the new `alerts`, and the `ledger` of all alerts so far."""

    def close(self) -> None:
        """Flush and close."""


class JsonLinesSink:
    """`alerts.jsonl` and `scalars.jsonl` in a folder, one record a line, always written.

    Args:
        folder: where to write.
        resumed_at: step the run was resumed at. A resumed run goes on in the same files, without what was written
            after that step; a new run (0) moves another run's files aside, to `alerts.previous.jsonl` and the like.
    """

    def __init__(self, folder: str | Path, resumed_at: int = 0) -> None:
        self.folder = Path(folder)
        self.resumed_at = resumed_at
        self._begun = False

    def write(self, step: int, scalars: Mapping[str, float], alerts: Sequence[Alert], ledger: Sequence[Alert]) -> None:
        """Append this window's records."""
        if not self._begun:
            self._begin()
        self._append("scalars.jsonl", [{"step": step, **scalars}])
        self._append("alerts.jsonl", [alert.to_json() for alert in alerts])

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("alerts.jsonl", "scalars.jsonl"):
            file = self.folder / name
            if not file.exists():
                continue
            if self.resumed_at == 0:
                file.replace(file.with_suffix(".previous.jsonl"))
                continue
            records = [json.loads(line) for line in _whole_lines(file)]
            file.unlink()
            self._append(name, [record for record in records if record["step"] <= self.resumed_at])
        self._begun = True

    def _append(self, name: str, records: Sequence[dict[str, object]]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Nothing is held open."""


class LogSink:
    """Alerts as warnings of the logger `qscope_monitor`; information at level INFO."""

    def write(self, step: int, scalars: Mapping[str, float], alerts: Sequence[Alert], ledger: Sequence[Alert]) -> None:
        """Log the new alerts."""
        for alert in alerts:
            level = logging.INFO if alert.severity == "INFO" else logging.WARNING
            logger.log(level, "step %d: %s", step, alert.message)

    def close(self) -> None:
        """Nothing to close."""


class CallbackSink:
    """Hands each new alert to a function of the user's."""

    def __init__(self, function: Callable[[Alert], object]) -> None:
        self.function = function

    def write(self, step: int, scalars: Mapping[str, float], alerts: Sequence[Alert], ledger: Sequence[Alert]) -> None:
        """Call the function with each new alert."""
        for alert in alerts:
            self.function(alert)

    def close(self) -> None:
        """Nothing to close."""


def read_alerts(run: str | Path) -> list[Alert]:
    """All alerts under a run's folder, oldest first.

    Args:
        run: an `alerts.jsonl`, or a folder that holds one at any depth.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line is no alert record; the file and line are named.
    """
    root = Path(run)
    files = [root] if root.is_file() else sorted(root.rglob("alerts.jsonl"))
    if not files:
        raise FileNotFoundError(f"no alerts.jsonl under {root}; was the run monitored?")
    alerts = []
    for file in files:
        for number, line in enumerate(_whole_lines(file), start=1):
            try:
                alerts.append(Alert.from_json(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{file}:{number}: not an alert record: {error}") from error
    return sorted(alerts, key=lambda alert: alert.step)


def _whole_lines(file: Path) -> list[str]:
    """Lines ended by a line feed; what a killed process left unfinished is no record."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text: {error}") from error
    return text.split("\n")[:-1]  # not splitlines: a response may hold other line separators
