"""What one stream (training batches, or rollouts) remembers between windows."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qscope_monitor.alerts import AlertState, AlphaSpending
from qscope_monitor.contexts import Candidate
from qscope_monitor.counters import Counters

_CANDIDATES = 64  # responses kept in case an alert wants to show them


@dataclass
class StreamState:
    """Counters of the running window, the baseline, and the alerts told.

    Attributes:
        counters: the running window's sums, on the device.
        spending: the stream's share of the run's false-alarm rate.
        windows: the last windows, tested together.
        alerts: what has been told of each behaviour.
        thresholds: [keys] response scores above which a response exceeds; None before calibration.
        baseline: the calibration's counts.
        collected: [sequences, keys] response scores seen before calibration, -1 where left out.
        pending: windows seen before calibration.
        contexts: responses of the running window that an alert may show.
    """

    counters: Counters
    spending: AlphaSpending
    windows: deque[dict[str, np.ndarray]]
    alerts: dict[str, AlertState]
    thresholds: Tensor | None = None
    baseline: dict[str, np.ndarray] | None = None
    collected: list[Tensor] = field(default_factory=list)
    pending: list[dict[str, np.ndarray]] = field(default_factory=list)
    contexts: deque[Candidate] = field(default_factory=lambda: deque(maxlen=_CANDIDATES))

    def state_dict(self) -> dict[str, Any]:
        """Everything but the running window, as plain containers and tensors."""
        return {
            "thresholds": None if self.thresholds is None else self.thresholds.cpu(),
            "baseline": None if self.baseline is None else _tensors(self.baseline),
            "collected": [scores.cpu() for scores in self.collected],
            "pending": [_tensors(window) for window in self.pending],
            "windows": [_tensors(window) for window in self.windows],
            "spent_windows": self.spending.window,
            "alerts": {key: asdict(told) for key, told in self.alerts.items()},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        device = self.counters.device
        thresholds = saved["thresholds"]
        self.thresholds = None if thresholds is None else thresholds.to(device)
        self.baseline = None if saved["baseline"] is None else _arrays(saved["baseline"])
        self.collected = [scores.to(device) for scores in saved["collected"]]
        self.pending = [_arrays(window) for window in saved["pending"]]
        self.windows.clear()
        self.windows.extend(_arrays(window) for window in saved["windows"])
        self.spending.window = saved["spent_windows"]
        for key, told in saved["alerts"].items():
            history = [(int(step), str(word)) for step, word in told["history"]]
            self.alerts[key] = AlertState(**{**told, "history": history})


def _tensors(values: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in values.items()}


def _arrays(values: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in values.items()}
