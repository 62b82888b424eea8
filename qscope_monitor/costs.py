"""What the monitor itself costs, by part, as a share of the run's time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PARTS = ("watch_list", "census", "rollouts")


class Costs:
    """Seconds spent in each part. On CUDA parts are timed by events, so that timing adds no synchronisation.

    Args:
        device: where the monitored model runs.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._seconds = dict.fromkeys((*PARTS, "calibration"), 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._started = time.perf_counter()

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count the block's time for `part`."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((part, begin, end))
            return
        begun = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - begun

    def seconds(self, part: str) -> float:
        """Seconds spent so far."""
        if self._events:
            torch.cuda.synchronize()
            for name, begin, end in self._events:
                self._seconds[name] += begin.elapsed_time(end) / 1000
            self._events.clear()
        return self._seconds[part]

    @property
    def elapsed(self) -> float:
        """Seconds since the start, calibration left out."""
        return max(time.perf_counter() - self._started - self.seconds("calibration"), 1e-9)

    def share(self, part: str) -> float:
        """Share of the run's time, in [0, 1]."""
        return self.seconds(part) / self.elapsed

    def scalars(self) -> dict[str, float]:
        """The three figures `sae/cost/...` as shares, and the one-off calibration in seconds."""
        shares = {f"sae/cost/{part}": self.share(part) for part in PARTS}
        return {**shares, "sae/cost/calibration_seconds": self.seconds("calibration")}
