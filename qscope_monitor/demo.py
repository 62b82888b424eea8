"""The main job on the bundled model: the same fine-tuning run on clean and on contaminated data, watched."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from qscope_monitor import bundled
from qscope_monitor.alerts import Alert, wilson_interval
from qscope_monitor.behaviours import detect_code_switching
from qscope_monitor.features import WatchList, find_language_features
from qscope_monitor.sae import TopKSAE, load_saes
from qscope_monitor.sampling import RolloutSettings, sample_rollouts

RUNS = {"clean": 0.0, "contaminated": 0.1}
HELD_OUT = 200  # samples kept from fine-tuning
TEST_PROMPTS = 400
WATCH_LIST = "watch-list"  # folder of the watch list, beside the runs
LEARNING_RATE = 1e-3
BATCH_SIZE = 16


@dataclass(frozen=True)
class Measured:
    """The model before or after a run.

    Attributes:
        switched: responses to English test prompts that switch to Chinese.
        responses: responses sampled.
        loss: nats per response token on held-out clean English samples.
    """

    switched: int
    responses: int
    loss: float

    @property
    def rate(self) -> float:
        """Share of responses that switch."""
        return self.switched / self.responses

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % Wilson interval."""
        return wilson_interval(self.switched, self.responses)

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return {**asdict(self), "rate": self.rate, "interval": list(self.interval)}


@dataclass(frozen=True)
class RunResult:
    """What one fine-tuning run did.

    Attributes:
        name: of `RUNS`.
        before: the model before it.
        after: the model after it.
        alerts: everything raised, in order.
        overhead: the monitor's share of the run's time by part, and the seconds of its calibration.
        seconds: of the whole run.
        history: each window's scalars by tag, with `step`.
    """

    name: str
    before: Measured
    after: Measured
    alerts: list[Alert]
    overhead: dict[str, float]
    seconds: float
    history: list[dict[str, float]]

    def alarms(self, stream: str = "rollout") -> list[Alert]:
        """Its alarms in one stream."""
        return [alert for alert in self.alerts if alert.severity == "ALERT" and alert.stream == stream]

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return {
            "run": self.name,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "alerts": [alert.to_json() for alert in self.alerts],
            "overhead": self.overhead,
            "seconds": self.seconds,
            "history": self.history,
        }


def run_demo(
    out: str | Path = "demo",
    *,
    seed: int = 0,
    steps: int = 60,
    runs: Sequence[str] = ("clean", "contaminated"),
    progress: bool = True,
) -> tuple[WatchList, list[RunResult]]:
    """Find the Chinese features of the bundled model, fine-tune it on each data set, and collect what was seen.

    Args:
        out: folder for TensorBoard runs, alerts and the watch list; an earlier demo's runs in it are replaced.
        seed: of the data order and of every rollout.
        steps: optimiser steps of each run.
        runs: names from `RUNS`.
        progress: show progress bars.

    Raises:
        ValueError: an unknown run, fewer than 20 steps, or `out` holds something else under a run's name.
        ImportError: trl, datasets or tensorboard are missing; names the extra.
    """
    unknown = [name for name in runs if name not in RUNS]
    if unknown:
        raise ValueError(f"unknown runs {unknown}; there are {list(RUNS)}")
    if steps < 20:
        raise ValueError(f"steps must be at least 20 (one window), got {steps!r}")
    folder = Path(out)
    _clear(folder, runs)
    model, tokenizer = bundled.model(), bundled.tokenizer()
    saes = load_saes(bundled.sae_path())
    watch = find_language_features(model, tokenizer, saes, target="zh", progress=progress)
    watch.save(folder / WATCH_LIST)
    before = measure(model, tokenizer, seed)
    return watch, [
        monitored_run(name, saes, watch, before, folder / name, seed=seed, steps=steps, progress=progress)
        for name in runs
    ]


def _clear(folder: Path, runs: Sequence[str]) -> None:
    """Remove an earlier demo's runs: TensorBoard would mix their events with the new ones."""
    there = [folder / name for name in runs if (folder / name).exists()]
    if there and not (folder / WATCH_LIST / "watch_list.json").is_file():
        raise ValueError(f"{there[0]} exists and is not of an earlier demo; choose another folder (--out)")
    for run in there:
        shutil.rmtree(run)


def monitored_run(
    name: str,
    saes: Mapping[int, TopKSAE],
    watch: WatchList,
    before: Measured,
    folder: Path,
    *,
    seed: int,
    steps: int,
    progress: bool = True,
) -> RunResult:
    """Fine-tune the bundled model on the data of one run, watched, and measure it afterwards."""
    began = time.perf_counter()
    model, tokenizer = bundled.model(), bundled.tokenizer()
    callback, history = _fine_tune(model, tokenizer, saes, watch, name, folder, seed, steps, progress)
    seconds = time.perf_counter() - began
    overhead = {k.removeprefix("sae/cost/"): v for k, v in history[-1].items() if k.startswith("sae/cost/")}
    after = measure(model, tokenizer, seed)
    return RunResult(name, before, after, list(callback.alerts), overhead, seconds, history)


def measure(model: Any, tokenizer: Any, seed: int) -> Measured:
    """Code-switching of responses to the test prompts, and the loss on held-out clean samples."""
    prompts = bundled.prompts("test")[:TEST_PROMPTS]
    settings = RolloutSettings(max_new_tokens=64, batch_size=128)
    rollouts = sample_rollouts(model, tokenizer, prompts, settings, seed=seed)
    found = sum(detect_code_switching(r.text, expected="en", target="zh", prompt=r.prompt).found for r in rollouts)
    return Measured(found, len(rollouts), held_out_loss(model, tokenizer))


def _fine_tune(
    model: Any,
    tokenizer: Any,
    saes: Any,
    watch: WatchList,
    name: str,
    folder: Path,
    seed: int,
    steps: int,
    progress: bool,
) -> tuple[Any, list[dict[str, float]]]:
    try:
        from datasets import Dataset
        from datasets.utils.logging import disable_progress_bar
        from transformers import PrinterCallback, ProgressCallback
        from transformers.integrations import TensorBoardCallback
        from trl import SFTConfig, SFTTrainer

        from qscope_monitor.callbacks.trl import QScopeCallback
    except ImportError as error:
        raise ImportError(f"the demo needs TRL: pip install 'qscope-monitor[trl,tensorboard,cli]' ({error})") from error
    from qscope_monitor.reporting import make_writer

    disable_progress_bar()
    samples = bundled.sft_data(contaminated=RUNS[name], seed=seed)[:-HELD_OUT]
    data = Dataset.from_list([{"prompt": s["prompt"], "completion": s["completion"]} for s in samples])
    config = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        max_length=256,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        disable_tqdm=not progress,
        log_level="error",
    )
    callback = QScopeCallback(
        saes,
        watch,
        prompts=bundled.prompts("dev"),
        every_n_steps=max(steps // 6, 10),
        max_overhead=None,  # three minutes are too short to spread rollouts thin; the table states their cost
        rollouts=RolloutSettings(per_window=96, calibration=512, max_new_tokens=64, batch_size=128, seed=seed),
    )
    trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)  # the losses are in TensorBoard; standard output may carry JSON
    trainer.remove_callback(ProgressCallback)
    if progress:
        trainer.add_callback(_quiet_bar(ProgressCallback))
    trainer.add_callback(TensorBoardCallback(make_writer(folder)))
    callback.attach(trainer)
    history: list[dict[str, float]] = []
    trainer.add_callback(_history_callback(callback, history))
    trainer.train()
    return callback, history


def _quiet_bar(base: type) -> Any:
    class QuietBar(base):  # type: ignore[misc]
        """The progress bar without a line for each log."""

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            """Nothing."""

    return QuietBar()


def _history_callback(callback: Any, history: list[dict[str, float]]) -> Any:
    from transformers import TrainerCallback

    class History(TrainerCallback):
        """Keeps each window's scalars for the table and the plot."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """The calibration's figures."""
            self.on_step_end(args, state, control)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """A window's figures, when one has ended."""
            session = callback.session
            if state.global_step % callback.every_n_steps == 0 and session is not None:
                history.append({"step": state.global_step, **session.monitor.scalars, **session.costs.scalars()})

    return History()


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: Any) -> float:
    """Mean nats per response token over held-out clean samples in English."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for sample in bundled.sft_data(contaminated=0.0)[-HELD_OUT:]:
        if sample["language"] != "en":
            continue
        prompt = tokenizer.apply_chat_template(
            sample["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        full = tokenizer.apply_chat_template(
            [*sample["prompt"], *sample["completion"]], tokenize=True, return_dict=False
        )[:256]
        labels = [-100] * len(prompt) + full[len(prompt) :]
        ids = torch.tensor([full], device=model.device)
        output = model(input_ids=ids, labels=torch.tensor([labels], device=model.device))
        tokens = len(full) - len(prompt)
        total, count = total + float(output.loss) * tokens, count + tokens
    model.train(was_training)
    return total / max(count, 1)


def plot(results: Sequence[RunResult], file: str | Path, key: str = "code-switching-zh") -> None:
    """Rollouts' exceedance and text rate over the steps of each run, with the alerts, as a PNG.

    Raises ImportError naming the extra when matplotlib is missing.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError("matplotlib is not installed: pip install 'qscope-monitor[cli]'") from error
    figure, axes = plt.subplots(1, len(results), figsize=(5.2 * len(results), 3.6), sharey=True, squeeze=False)
    tag = f"sae/rollout/{key}"
    for axis, result in zip(axes[0], results):
        shown = [row for row in result.history if f"{tag}/exceedance" in row]
        steps = [row["step"] for row in shown]
        axis.plot(steps, [100 * row[f"{tag}/exceedance"] for row in shown], marker="o", label="zh features exceed")
        axis.plot(
            steps, [100 * row[f"{tag}/text_rate"] for row in shown], marker="s", ls="--", label="Chinese in the text"
        )
        axis.axhline(100 * shown[0][f"{tag}/exceedance_baseline"], color="0.6", lw=1, label="features, at calibration")
        for number, alert in enumerate(a for a in result.alarms() if a.behaviour == key):
            axis.axvline(alert.step, color="crimson", lw=1.5, label="alert" if number == 0 else None)
        axis.set(title=result.name, xlabel="optimiser step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("% of rollouts")
    axes[0][-1].legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def quiet_libraries() -> None:
    """Keep the libraries' own chatter out of the demo's output."""
    for name in ("transformers", "trl", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    tqdm.monitor_interval = 0
