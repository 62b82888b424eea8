"""trackio and Weights & Biases: scalars and alerts, when one of them runs already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qscope_monitor.alerts import Alert
from qscope_monitor.reporting.ledger import ledger_markdown


class WandbSink:
    """Logs to the active W&B run; alerts also through `run.alert`, rate-limited by W&B's own wait."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def write(self, step: int, scalars: Mapping[str, float], alerts: Sequence[Alert], ledger: Sequence[Alert]) -> None:
        """Log the scalars without moving W&B's own step counter."""
        self.run.log({**scalars, "train/global_step": step})
        for alert in alerts:
            if alert.severity == "ALERT":
                self.run.alert(title=f"qscope: {alert.behaviour}", text=alert.message, level="WARN", wait_duration=60)

    def close(self) -> None:
        """The run belongs to the trainer."""


class TrackioSink:
    """Logs to the active trackio run; alerts through `trackio.alert`."""

    def __init__(self, trackio: Any) -> None:
        self.trackio = trackio

    def write(self, step: int, scalars: Mapping[str, float], alerts: Sequence[Alert], ledger: Sequence[Alert]) -> None:
        """Log the scalars and the new alerts."""
        self.trackio.log({**scalars, "train/global_step": step})
        for alert in alerts:
            if alert.severity == "ALERT":
                self.trackio.alert(title=f"qscope: {alert.behaviour}", text=ledger_markdown([alert]))

    def close(self) -> None:
        """The run belongs to the trainer."""


def active_trackers(report_to: Sequence[str]) -> list[WandbSink | TrackioSink]:
    """Sinks for the trackers named in the trainer's `report_to` that have a run going."""
    found: list[WandbSink | TrackioSink] = []
    if "wandb" in report_to:
        import wandb

        if wandb.run is not None:
            found.append(WandbSink(wandb.run))
    if "trackio" in report_to:
        import trackio

        found.append(TrackioSink(trackio))
    return found
