"""The callback for transformers' `Trainer` and TRL's trainers."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from qscope_monitor.alerts import KINDS, Alert
from qscope_monitor.features.promotes import promoted_tokens
from qscope_monitor.features.read_outs import WatchList
from qscope_monitor.monitor import FeatureMonitor, check_rates
from qscope_monitor.reporting import (
    CallbackSink,
    JsonLinesSink,
    LogSink,
    Sink,
    TensorBoardSink,
    active_trackers,
)
from qscope_monitor.sae import TopKSAE
from qscope_monitor.sampling import Prompt, RolloutSettings, check_prompts, encode_prompt
from qscope_monitor.session import MonitoringSession

try:
    from transformers import TrainerCallback
    from transformers.integrations import TensorBoardCallback, is_tensorboard_available
except ImportError as error:
    raise ImportError("transformers is not installed: pip install 'qscope-monitor[trl]'") from error

logger = logging.getLogger("qscope_monitor")
STATE_KEY = "qscope_monitor"
STATE_FILE = "qscope_monitor.pt"
StopOn = str | Collection[str] | Callable[[Alert], bool]
_running: WeakValueDictionary[Path, QScopeCallback] = WeakValueDictionary()  # by output folder


class QScopeCallback(TrainerCallback):
    """Watches SAE features while a trainer runs, and raises alerts. It observes only: training stays bit-identical.

    Pass it to a trainer (`callbacks=[callback]`) and it writes a TensorBoard sub-run of its own. After
    `callback.attach(trainer)` it writes to the trainer's TensorBoard run and takes masks from the very batches
    `compute_loss` sees.

    Args:
        saes: layer -> SAE (`qs.load_saes`), for the census of all features and SAE health; None: read-outs only.
        watch: the read-outs to judge (`qs.find_language_features`, `qs.WatchList.load`); None: census only.
        prompts: prompts to sample rollouts from, as strings or message lists; None: training batches only.
        every_n_steps: optimiser steps from one window (rollouts, tests, scalars) to the next.
        max_overhead: rollouts and census wait while they have taken a larger share of the run's time than this
            (0.02 = 2 %); None: never wait.
        on_alert: called with each new `Alert`, on rank 0.
        stop_on: stop training at an alert of this kind (`"behaviour"`), of one of these kinds, or for which this
            function returns True.
        log_text: False keeps prompts and responses out of every log.
        strict: raise the monitor's own errors; by default they are reported once and training goes on.
        train_every_n_steps: read the training batches of every n-th step.
        rollouts: how rollouts are sampled.
        exceedance_rate: largest share of calibration responses that exceed the response threshold.
        false_alarm_rate: chance of any false alarm in the whole run.
        pooled_windows: how many of the last windows are tested together.
        tokenizer: the trainer's `processing_class` by default.
        layers_path: dotted path of the decoder layers, where they are not found.

    Raises:
        ValueError, TypeError: nothing to watch, or an argument out of range or of another type; at the start of
            training also when SAEs, watch list and model do not fit together, when prompts need a tokenizer there is
            none of, or when another callback watches the same run (put both watch lists into one: `a + b`).

    Example:
        >>> callback = QScopeCallback(saes, watch, prompts=prompts, every_n_steps=50)
        >>> trainer = SFTTrainer(model, args=config, train_dataset=data, callbacks=[callback])
        >>> trainer.train()
    """

    def __init__(
        self,
        saes: Mapping[int, TopKSAE] | None = None,
        watch: WatchList | None = None,
        prompts: Sequence[Prompt] | None = None,
        every_n_steps: int = 50,
        max_overhead: float | None = 0.02,
        on_alert: Callable[[Alert], object] | None = None,
        stop_on: StopOn | None = None,
        log_text: bool = True,
        strict: bool = False,
        *,
        train_every_n_steps: int = 1,
        rollouts: RolloutSettings | None = None,
        exceedance_rate: float = 0.02,
        false_alarm_rate: float = 0.05,
        pooled_windows: int = 4,
        tokenizer: Any = None,
        layers_path: str | None = None,
    ) -> None:
        if saes is not None and not isinstance(saes, Mapping):
            raise TypeError(f"saes must map layers to SAEs, as qs.load_saes returns, got {type(saes).__name__}")
        if watch is not None and not isinstance(watch, WatchList):
            raise TypeError(f"watch must be a WatchList (qs.WatchList.load reads one), got {type(watch).__name__}")
        if not saes and not watch:
            raise ValueError("nothing to watch: pass saes (census), watch (a WatchList), or both")
        for name, steps in (("every_n_steps", every_n_steps), ("train_every_n_steps", train_every_n_steps)):
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {steps!r}")
        if max_overhead is not None and (not isinstance(max_overhead, int | float) or max_overhead < 0):
            raise ValueError(f"max_overhead must be a number >= 0 or None, got {max_overhead!r}")
        check_rates(exceedance_rate, false_alarm_rate, pooled_windows)
        if prompts is not None:
            check_prompts(prompts)
        if rollouts is not None and not isinstance(rollouts, RolloutSettings):
            raise TypeError(f"rollouts must be RolloutSettings, got {type(rollouts).__name__}")
        if on_alert is not None and not callable(on_alert):
            raise TypeError(f"on_alert must be a function of an Alert, got {on_alert!r}")
        _check_stop_on(stop_on)
        self.saes, self.watch = saes, watch
        self.prompts = list(prompts) if prompts is not None else None
        self.every_n_steps, self.train_every_n_steps = every_n_steps, train_every_n_steps
        self.max_overhead, self.on_alert, self.stop_on = max_overhead, on_alert, stop_on
        self.log_text, self.strict = log_text, strict
        self.rollouts, self.tokenizer, self.layers_path = rollouts, tokenizer, layers_path
        self._monitor_options: dict[str, Any] = {
            "exceedance_rate": exceedance_rate,
            "false_alarm_rate": false_alarm_rate,
            "pooled_windows": pooled_windows,
        }
        self.session: MonitoringSession | None = None
        self.alerts: list[Alert] = []
        self._trainer: Any = None
        self._state: Any = None

    def attach(self, trainer: Any) -> QScopeCallback:
        """Use the trainer's own TensorBoard writer and the exact batches of `compute_loss`. Safe to call twice.

        Adds the callback to the trainer if it is not there yet; undone when training ends, so attach again before
        training again.
        """
        if self._trainer is trainer:
            return self
        if self._trainer is not None:
            raise ValueError("this callback is attached to another trainer already; make one callback per trainer")
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._trainer = trainer
        original = trainer.compute_loss

        @functools.wraps(original)
        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self.session is None or self._trainer is not trainer:
                return original(model, inputs, *args, **kwargs)
            with self.session.forward_window(inputs.get("labels")):
                return original(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss
        self._wrapper = compute_loss
        return self

    def _detach(self) -> None:
        # Somebody else may have wrapped compute_loss after us; then ours stays underneath and only passes through.
        if self._trainer is not None and self._trainer.__dict__.get("compute_loss") is self._wrapper:
            del self._trainer.compute_loss
        self._trainer = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Hook the model, calibrate, open the sinks."""
        self.close(detach=False)
        self._check_alone(args, state)
        tokenizer = self.tokenizer or kwargs.get("processing_class")
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if self.prompts is not None:
            if tokenizer is None:
                raise ValueError(
                    "prompts need a tokenizer: give the trainer processing_class=, or the callback tokenizer="
                )
            for prompt in self.prompts:
                encode_prompt(tokenizer, prompt)
        monitor = FeatureMonitor(
            self.saes,
            self.watch,
            tokenizer,
            planned_windows=math.ceil(state.max_steps / self.every_n_steps) if state.max_steps > 0 else None,
            describe=self._describe(model, tokenizer),
            device=next(model.parameters()).device,
            **self._monitor_options,
        )
        self.session = MonitoringSession(
            model,
            tokenizer,
            monitor,
            prompts=self.prompts,
            sinks=self._sinks(args, monitor.keys, state.global_step) if state.is_world_process_zero else [],
            every_n_steps=self.every_n_steps,
            train_every_n_steps=self.train_every_n_steps,
            max_overhead=self.max_overhead,
            rollouts=self.rollouts,
            log_text=self.log_text,
            strict=self.strict,
            autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            layers_path=self.layers_path,
            exact_window=self._trainer is not None,
        )
        self.alerts = monitor.alerts
        if state.global_step > 0:
            self._resume(args, state.global_step)
            self.alerts = monitor.alerts
        # A key of its own: resuming without the callback, or with it added later, both work.
        state.stateful_callbacks[STATE_KEY] = {"schema_version": 1, "file": STATE_FILE}
        self.session.start(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Arm the hooks for this step's batches, when they are to be read."""
        if self.session is not None:
            self.session.begin_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """End a window when it is due; stop training when an alert asks for it."""
        if self.session is None:
            return control
        alerts = self.session.end_step(state.global_step, last=state.global_step >= state.max_steps > 0)
        if any(self._stops(alert) for alert in alerts):
            logger.warning("step %d: stop_on=%r matched, training stops", state.global_step, self.stop_on)
            control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the monitor's state beside the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.session is not None and state.is_world_process_zero and folder.is_dir():
            torch.save(self.session.state_dict(), folder / STATE_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take everything off again."""
        self.close()

    def close(self, detach: bool = True) -> None:
        """Remove hooks and close sinks; for runs that ended in an exception. Safe to call twice."""
        if self.session is not None:
            self.session.close()
            self.session = None
        if detach:
            self._detach()

    def _check_alone(self, args: Any, state: Any) -> None:
        """One callback a run: two would write the same files and the same checkpoint state."""
        folder = Path(args.output_dir).resolve()
        other = _running.get(folder)
        if other is not None and other is not self and other.session is not None and other._state is state:
            raise ValueError(
                f"another QScopeCallback watches the run in {args.output_dir}; make one with both watch lists: a + b"
            )
        _running[folder] = self
        self._state = state

    def _describe(self, model: Any, tokenizer: Any) -> Callable[[int, int], Sequence[str]] | None:
        saes = self.saes
        if saes is None or tokenizer is None:
            return None
        return lambda layer, feature: promoted_tokens(model, tokenizer, saes[layer].direction(feature))

    def _stops(self, alert: Alert) -> bool:
        if self.stop_on is None:
            return False
        if callable(self.stop_on):
            try:
                return bool(self.stop_on(alert))
            except Exception as error:
                if self.strict:
                    raise
                logger.warning("stop_on failed and training goes on: %s: %s", type(error).__name__, error)
                return False
        kinds = {self.stop_on} if isinstance(self.stop_on, str) else set(self.stop_on)
        return alert.kind in kinds

    def _sinks(self, args: Any, keys: Sequence[str], step: int) -> list[Sink]:
        folder = Path(args.output_dir) / "sae"
        sinks: list[Sink] = [JsonLinesSink(folder, resumed_at=step), LogSink()]
        if is_tensorboard_available():
            sinks.append(TensorBoardSink(self._trainer_writer() or self._tensorboard_folder(args), keys))
        else:
            logger.info("TensorBoard is not installed; alerts go to %s and the log", folder / "alerts.jsonl")
        sinks += active_trackers(args.report_to or ())
        if self.on_alert is not None:
            sinks.append(CallbackSink(self.on_alert))
        return sinks

    def _trainer_writer(self) -> Any:
        if self._trainer is None:
            return None
        callbacks = self._trainer.callback_handler.callbacks
        return next((c.tb_writer for c in callbacks if isinstance(c, TensorBoardCallback)), None)

    @staticmethod
    def _tensorboard_folder(args: Any) -> Path:
        """`sae` inside the trainer's own TensorBoard run, where there is one, else inside the output folder."""
        if "tensorboard" in (args.report_to or ()):
            configured = os.getenv("TENSORBOARD_LOGGING_DIR") or getattr(args, "logging_dir", None)
            if configured:
                return Path(configured).expanduser() / "sae"
            runs = [p for p in (Path(args.output_dir) / "runs").glob("*") if p.is_dir()]
            if runs:
                return max(runs, key=lambda p: p.stat().st_mtime) / "sae"
        return Path(args.output_dir) / "sae"

    def _resume(self, args: Any, step: int) -> None:
        assert self.session is not None
        folders = [Path(args.output_dir) / f"checkpoint-{step}"]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, Path(args.resume_from_checkpoint))
        file = next((folder / STATE_FILE for folder in folders if (folder / STATE_FILE).is_file()), None)
        if file is None:
            logger.warning(
                "resumed at step %d from a checkpoint without monitor state: the baseline is taken now, not at step 0",
                step,
            )
            return
        self.session.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
        logger.info("monitor state restored from %s", file)


def _check_stop_on(stop_on: Any) -> None:
    if stop_on is None or callable(stop_on):
        return
    kinds = [stop_on] if isinstance(stop_on, str) else stop_on
    if not isinstance(kinds, Collection) or not all(kind in KINDS for kind in kinds):
        raise ValueError(f"stop_on must be a kind of alert {KINDS}, several of them, or a function, got {stop_on!r}")
