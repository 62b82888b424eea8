"""One monitored run: hooks, monitor, rollouts, costs and sinks put together, for any trainer's callback to drive."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qscope_monitor.alerts import Alert
from qscope_monitor.costs import Costs
from qscope_monitor.fit import check_fit, check_fvu, check_width
from qscope_monitor.monitor import FeatureMonitor
from qscope_monitor.reporting.sinks import Sink
from qscope_monitor.residual import DecoderInputs, ResidualHooks
from qscope_monitor.sampling import Prompt, RolloutSettings, sample_rollouts, score_rollouts
from qscope_monitor.tokens import TokenRules

logger = logging.getLogger("qscope_monitor")
T = TypeVar("T")


class MonitoringSession:
    """Drives a `FeatureMonitor` through a training run.

    A callback calls `start` once, `begin_step` and `end_step` around each optimiser step, and `close` on every way
    out. Training batches are read from the forward that happens anyway; every `every_n_steps` a window ends: rollouts
    are sampled and read, the counts are tested, alerts and scalars go to the sinks.

    Args:
        model: the model as the trainer runs it.
        tokenizer: its tokenizer; None: no rollouts, no token contexts.
        monitor: what counts and tests.
        prompts: prompts for rollouts; None: training batches only.
        sinks: where alerts and scalars go (rank 0 only).
        every_n_steps: steps from one window to the next.
        train_every_n_steps: read every n-th step's training batches.
        max_overhead: rollouts, and the census, wait while they have taken more than this share of the run's time;
            None: never wait.
        rollouts: sampling settings.
        log_text: False keeps prompts and responses out of every sink.
        strict: raise the monitor's own errors instead of reporting them once and going on without that part.
        autocast: dtype the trainer runs the model under, for the rollouts' own forward.
        layers_path: path of the decoder layers where they are not found.
        exact_window: read only forwards inside `forward_window` (the callback sees `compute_loss`).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        monitor: FeatureMonitor,
        *,
        prompts: Sequence[Prompt] | None = None,
        sinks: Sequence[Sink] = (),
        every_n_steps: int = 50,
        train_every_n_steps: int = 1,
        max_overhead: float | None = 0.02,
        rollouts: RolloutSettings | None = None,
        log_text: bool = True,
        strict: bool = False,
        autocast: torch.dtype | None = None,
        layers_path: str | None = None,
        exact_window: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.monitor = model, tokenizer, monitor
        self.prompts = list(prompts) if prompts is not None and tokenizer is not None else []
        self.sinks = list(sinks)
        self.every_n_steps, self.train_every_n_steps = every_n_steps, train_every_n_steps
        self.max_overhead = max_overhead
        self.rollouts = rollouts or RolloutSettings()
        self.log_text, self.strict, self.autocast = log_text, strict, autocast
        if monitor.census is not None:
            check_fit(model, monitor.census.saes, layers_path=layers_path)
        if monitor.watch.d_model is not None:
            check_width(model, monitor.watch.d_model, "the watch list", layers_path=layers_path)
        self.rules = TokenRules.from_tokenizer(tokenizer) if tokenizer is not None else TokenRules(())
        self.hooks = ResidualHooks(model, monitor.layers, on_forward=self._on_forward, layers_path=layers_path)
        self.costs = Costs(monitor.device)
        self.exact_window = exact_window
        self._labels: Tensor | None = None
        self._due = False
        self._census_due = False
        self._fvu_checked = False
        self._windows = 0
        self._off: set[str] = set()

    def start(self, step: int) -> None:
        """Calibrate on the untouched model, unless a checkpoint brought a baseline."""
        if self.prompts and self.monitor.status("rollout") == "INSUFFICIENT":
            with self.costs.measure("calibration"):
                self._protect("calibration", lambda: self._calibrate(step))
        elif not self.prompts:
            logger.info("no prompts given: only training batches are watched, no rollouts")
        self._publish(step, [])

    def _calibrate(self, step: int) -> None:
        found = self._observe_rollouts(self.rollouts.calibration, step)
        responses = self.monitor.calibrate("rollout")
        if len(self.prompts) < self.rollouts.calibration:
            logger.warning(
                "%d prompts for %d calibration rollouts: rollouts of one prompt resemble each other%s, so the tests "
                "see more evidence than there is. Give more prompts.",
                len(self.prompts),
                self.rollouts.calibration,
                ", greedy ones are identical" if self.rollouts.temperature == 0 else "",
            )
        if responses == 0:
            logger.warning("calibration saw no response to judge: all were expected in the read-outs' own language")
        elif self.monitor.status("rollout") == "INSUFFICIENT":
            logger.warning(
                "calibration saw %d responses, %d are needed: rollouts are counted but raise no alert. "
                "Raise RolloutSettings.calibration.",
                responses,
                self.monitor.minimum_responses,
            )
        else:
            logger.info("calibrated on %d rollouts", found)

    def begin_step(self, step: int) -> None:
        """Before the forward of optimiser step `step` (counted from 0)."""
        self._census_due = self._ends_window(step + 1) and self._affordable("census")
        due = step % self.train_every_n_steps == 0 or self._census_due
        self._due = due and "watch_list" not in self._off
        self.hooks.armed = self._due and not self.exact_window

    def end_step(self, step: int, last: bool = False) -> list[Alert]:
        """After optimiser step `step` (counted from 1) is done. Returns the new alerts. The `last` ends a window."""
        self._due = self.hooks.armed = False
        if not (self._ends_window(step) or last):
            return []
        if self.prompts and self._affordable("rollouts"):
            with self.costs.measure("rollouts"):
                self._protect("rollouts", lambda: self._observe_rollouts(self.rollouts.per_window, step))
        alerts = self._protect("monitor", lambda: self.monitor.step(step)) or []
        self._publish(step, alerts)
        return alerts

    @contextmanager
    def forward_window(self, labels: Tensor | None) -> Iterator[None]:
        """Around one `compute_loss`: its first training forward is read, with these labels."""
        self.hooks.armed, self._labels = self._due, labels
        try:
            yield
        finally:
            self.hooks.armed, self._labels = False, None

    def close(self) -> None:
        """Remove the hooks and close the sinks; may be called twice."""
        self.hooks.remove()
        for sink in self.sinks:
            self._protect(type(sink).__name__, sink.close)
        self.sinks = []

    def _ends_window(self, step: int) -> bool:
        return step > 0 and step % self.every_n_steps == 0

    def _affordable(self, part: str) -> bool:
        """The same answer on every rank."""
        if part in self._off:
            return False
        if self.max_overhead is None:
            return True
        answer = self.costs.share(part) <= self.max_overhead
        if dist.is_available() and dist.is_initialized():
            shared = torch.tensor([float(answer)], device=self.monitor.device)
            dist.broadcast(shared, src=0)
            answer = bool(shared.item())
        return answer

    def _on_forward(self, residuals: Mapping[int, Tensor], inputs: DecoderInputs) -> None:
        if self.exact_window:
            self.hooks.armed = False  # label smoothing and the like run a second forward
        labels = self._labels if self._labels is not None else inputs.labels
        if inputs.input_ids is None:
            return  # inputs_embeds only: no way to tell special tokens or languages
        input_ids = inputs.input_ids
        self._protect("watch_list", lambda: self._observe_training(residuals, input_ids, inputs, labels))

    def _observe_training(
        self, residuals: Mapping[int, Tensor], input_ids: Tensor, inputs: DecoderInputs, labels: Tensor | None
    ) -> None:
        residuals = {layer: residual.detach() for layer, residual in residuals.items()}
        with torch.no_grad():
            with self.costs.measure("watch_list"):
                tokens = self.rules.batch(
                    input_ids,
                    attention_mask=inputs.attention_mask,
                    labels=labels,
                    position_ids=inputs.position_ids,
                    cu_seq_lens=inputs.cu_seq_lens_q,
                )
                self.monitor.observe(residuals, tokens, stream="train")
            if self.monitor.census is None:
                return
            if not self._fvu_checked:
                self._fvu_checked = True
                check_fvu(residuals, self.monitor.census.saes, tokens.keep)
            if self._census_due:
                with self.costs.measure("census"), torch.autocast(tokens.keep.device.type, enabled=False):
                    self.monitor.census.observe(residuals, tokens, "train")

    def _observe_rollouts(self, count: int, step: int) -> int:
        rank, world = _rank_and_world()
        first = self._windows * count
        self._windows += 1
        chosen = [self.prompts[i % len(self.prompts)] for i in range(first, first + count)][rank::world]
        rollouts = sample_rollouts(
            self.model,
            self.tokenizer,
            chosen,
            self.rollouts,
            seed=(self.rollouts.seed + step) * world + rank,
            autocast=self.autocast,
        )
        for batch in score_rollouts(
            self.model,
            self.tokenizer,
            rollouts,
            self.monitor.layers,
            batch_size=self.rollouts.batch_size,
            autocast=self.autocast,
        ):
            tokens = self.rules.batch(
                batch.input_ids, attention_mask=batch.attention_mask, response_mask=batch.response_mask
            )
            self.monitor.observe(
                batch.residuals,
                tokens,
                stream="rollout",
                texts=[r.text for r in batch.rollouts],
                prompts=[r.prompt for r in batch.rollouts],
                census=True,
            )
        return len(rollouts)

    def _publish(self, step: int, alerts: list[Alert]) -> None:
        if _rank_and_world()[0] != 0:
            return
        scalars = {**self.monitor.scalars, **self.costs.scalars()}
        shown = [alert if self.log_text else alert.without_text() for alert in alerts]
        ledger = [alert if self.log_text else alert.without_text() for alert in self.monitor.alerts]
        for sink in self.sinks:
            self._protect(type(sink).__name__, partial(sink.write, step, scalars, shown, ledger))

    def _protect(self, part: str, call: Callable[[], T]) -> T | None:
        """Monitoring must not break training: report an error once, then go on without that part."""
        if part in self._off:
            return None
        try:
            return call()
        except Exception as error:
            if self.strict:
                raise
            self._off.add(part)
            logger.warning("%s stopped and training goes on: %s: %s", part, type(error).__name__, error, exc_info=True)
            return None

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state and the position in the prompts, for a checkpoint."""
        monitor = self.monitor.state_dict()
        if not self.log_text:
            monitor["ledger"] = [alert.without_text().to_json() for alert in self.monitor.alerts]
        return {"monitor": monitor, "windows": self._windows}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; call before `start`."""
        self.monitor.load_state_dict(values["monitor"])
        self._windows = int(values["windows"])


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
