"""TensorBoard: scalars, the ledger under `sae/alerts`, and a custom-scalars page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qscope_monitor.alerts import Alert
from qscope_monitor.reporting.ledger import ledger_markdown


def make_writer(folder: str | Path) -> Any:
    """A `SummaryWriter` for `folder`. Raises ImportError naming the extra when TensorBoard is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoard is not installed: pip install 'qscope-monitor[tensorboard]'") from error
    return SummaryWriter(str(folder))


class TensorBoardSink:
    """Writes to a run of its own, or to the trainer's writer.

    Args:
        run: the folder of a run of its own, made at the first write; or a `SummaryWriter`, which is left open.
        keys: behaviours judged, for the layout of the custom-scalars page.

    Tags:

    | tag | what it is |
    |---|---|
    | `sae/alerts` (text) | the ledger of all alerts, newest first |
    | `sae/{stream}/{behaviour}/exceedance` | share of this window's responses above the calibrated threshold |
    | `.../exceedance_pooled` | the same over the pooled windows: what the test compares |
    | `.../exceedance_baseline` | the same at calibration |
    | `.../log10_p`, `.../log10_level` | p-value of the test, and what it must fall below to raise an alert |
    | `.../smallest_detectable_rate` | lowest true rate the test would find with 80 % probability |
    | `.../text_rate`, `.../text_rate_baseline` | share of responses in which the text detector finds the behaviour |
    | `.../response_score` | mean response score (highest mean margin over 16 tokens in a row) |
    | `sae/{stream}/firing_rate/L5.F12` | share of response tokens at which one read-out fires |
    | `sae/{stream}/health/L5/fvu`, `l0`, `alive` | fraction of variance unexplained, active features per token, share of features seen |
    | `sae/{stream}/excluded/...` | share of positions left out, by reason |
    | `sae/cost/watch_list`, `census`, `rollouts` | share of the run's time the monitor took |
    """  # noqa: E501 - a table row cannot be wrapped

    def __init__(self, run: Any, keys: Sequence[str]) -> None:
        self.run, self.keys = run, tuple(keys)
        self._writer: Any = None
        self._ledger_length = -1

    @property
    def writer(self) -> Any:
        """The `SummaryWriter`, opened when first needed, with the layout written to it once."""
        if self._writer is None:
            self._writer = make_writer(self.run) if isinstance(self.run, str | Path) else self.run
            self._writer.add_custom_scalars(custom_scalars_layout(self.keys))
        return self._writer

    def write(self, step: int, scalars: Mapping[str, float], alerts: Sequence[Alert], ledger: Sequence[Alert]) -> None:
        """Scalars of this window, and the ledger when it has grown."""
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, step)
        if len(ledger) != self._ledger_length:
            self.writer.add_text("sae/alerts", ledger_markdown(ledger), step)
            self._ledger_length = len(ledger)
        self.writer.flush()

    def close(self) -> None:
        """Flush; close a writer of its own."""
        if self._writer is None:
            return
        self._writer.flush()
        if self._writer is not self.run:
            self._writer.close()


def custom_scalars_layout(keys: Sequence[str]) -> dict[str, Any]:
    """Charts that put what belongs together into one picture: now against calibration, features against text."""
    layout: dict[str, Any] = {}
    for stream, title in (("rollout", "in rollouts"), ("train", "in training batches")):
        charts: dict[str, Any] = {}
        for key in keys:
            tag = f"sae/{stream}/{key}"
            names = "exceedance_pooled|exceedance_baseline|smallest_detectable_rate"
            charts[f"{key}: responses exceeding, now and at calibration"] = [
                "Multiline",
                [f"^{re.escape(tag)}/({names})$"],
            ]
            if stream == "rollout":
                rates = [f"^{re.escape(tag)}/text_rate(_baseline)?$"]
                charts[f"{key}: what the text detector finds, now and at calibration"] = ["Multiline", rates]
            charts[f"{key}: log10 of p, and of the level"] = ["Multiline", [f"^{re.escape(tag)}/log10_(p|level)$"]]
        charts["firing rate of each read-out"] = ["Multiline", [f"^sae/{stream}/firing_rate/"]]
        charts["unexplained variance of each SAE"] = ["Multiline", [f"^sae/{stream}/health/.*/fvu$"]]
        layout[f"qscope {title}"] = charts
    layout["qscope cost"] = {"share of the run's time": ["Multiline", ["^sae/cost/(watch_list|census|rollouts)$"]]}
    return layout
