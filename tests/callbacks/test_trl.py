"""The TRL callback on real training runs of the bundled model."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qscope_monitor import RolloutSettings, WatchList, bundled, capture, read_alerts
from qscope_monitor.callbacks.trl import STATE_FILE, STATE_KEY, QScopeCallback

pytest.importorskip("trl")
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

ROLLOUTS = RolloutSettings(per_window=4, calibration=6, max_new_tokens=6, batch_size=4)


def trainer(model, tokenizer, folder: Path, callbacks=(), rows=None, **changes) -> SFTTrainer:
    rows = bundled.sft_data()[:32] if rows is None else rows
    data = Dataset.from_list([{"prompt": r["prompt"], "completion": r["completion"]} for r in rows])
    options = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_length": 64,
    }
    config = SFTConfig(**{**options, **changes})
    return SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=list(callbacks))


class RandomState(TrainerCallback):
    """Notes every random state at every step."""

    def __init__(self) -> None:
        self.seen: list = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seen.append((torch.get_rng_state(), random.getstate(), repr(np.random.get_state())))  # noqa: NPY002 - the global state is the point


def run(tokenizer, watch, folder: Path, how: str, **changes):
    model = bundled.model()
    for module in model.modules():  # dropout on, so that the random state matters
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    states = RandomState()
    made = trainer(model, tokenizer, folder, [states], **changes)
    if how != "without":
        callback = QScopeCallback(
            None, watch, prompts=bundled.prompts("dev"), every_n_steps=2, max_overhead=None, strict=True,
            rollouts=ROLLOUTS,
        )  # fmt: skip
        made.add_callback(callback)
        if how == "attached":
            callback.attach(made)
    made.train()
    losses = [(r["loss"], r["grad_norm"]) for r in made.state.log_history if "loss" in r]
    return losses, {k: v.clone() for k, v in model.state_dict().items()}, states.seen


@pytest.fixture(scope="module")
def unmonitored(tmp_path_factory):
    return run(bundled.tokenizer(), None, tmp_path_factory.mktemp("run"), "without")


@pytest.mark.parametrize("how", ["callback", "attached"])
def test_training_is_bit_identical(how: str, unmonitored, tokenizer, watch, tmp_path: Path) -> None:
    losses, parameters, states = run(tokenizer, watch, tmp_path, how)
    expected_losses, expected_parameters, expected_states = unmonitored
    assert losses == expected_losses
    assert len(losses) == 4
    assert all(torch.equal(parameters[name], value) for name, value in expected_parameters.items())
    for mine, theirs in zip(states, expected_states, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert mine[1:] == theirs[1:]


def test_gradient_checkpointing_is_bit_identical_too(tokenizer, watch, tmp_path: Path) -> None:
    changes = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "max_steps": 2}
    expected, parameters, _ = run(tokenizer, None, tmp_path / "a", "without", **changes)
    losses, mine, _ = run(tokenizer, watch, tmp_path / "b", "attached", **changes)
    assert losses == expected
    assert all(torch.equal(mine[name], value) for name, value in parameters.items())


class Batches(QScopeCallback):
    """Keeps what the monitor is handed."""

    def on_train_begin(self, *args, **kwargs) -> None:
        super().on_train_begin(*args, **kwargs)
        self.tokens: list = []
        observe = self.session.monitor.observe

        def keep(residuals, tokens, **options):
            if options["stream"] == "train":
                self.tokens.append((options["stream"], tokens, {k: v.shape for k, v in residuals.items()}))
            return observe(residuals, tokens, **options)

        self.session.monitor.observe = keep


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_every_training_batch_is_read_once_with_its_labels(
    attached: bool, packing: bool, model, tokenizer, watch, tmp_path: Path
) -> None:
    callback = Batches(None, watch, every_n_steps=2, strict=True)
    options = {"gradient_accumulation_steps": 2, "max_steps": 3, "gradient_checkpointing": True, "max_length": 256}
    if packing:
        options |= {"packing": True, "per_device_train_batch_size": 1}
    made = trainer(model, tokenizer, tmp_path, [callback], bundled.sft_data()[:64], **options)
    if attached:
        callback.attach(made)
    seen = []
    compute_loss = made.compute_loss

    def note(model, inputs, *args, **kwargs):
        seen.append({k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)})
        return compute_loss(model, inputs, *args, **kwargs)

    made.compute_loss = note
    made.train()
    assert len(callback.tokens) == len(seen) == 6
    for (_, tokens, shapes), inputs in zip(callback.tokens, seen, strict=True):
        assert torch.equal(tokens.input_ids, inputs["input_ids"])
        assert torch.equal(tokens.response, inputs["labels"] != -100)
        assert all(shape[:2] == tokens.input_ids.shape for shape in shapes.values())
        if packing:
            starts = inputs["position_ids"][0] == 0
            assert tokens.num_sequences >= int(starts.sum()) > 1
            assert not tokens.keep[0, starts].any()


def test_attach_is_idempotent_and_undone(model, tokenizer, watch, tmp_path: Path) -> None:
    callback = QScopeCallback(None, watch, every_n_steps=2)
    made = trainer(model, tokenizer, tmp_path, max_steps=2)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert callback.attach(made) is callback.attach(made)
    assert made.callback_handler.callbacks.count(callback) == 1
    wrapped = made.compute_loss
    made.train()
    assert made.compute_loss != wrapped
    assert "compute_loss" not in made.__dict__
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    with pytest.raises(ValueError, match="another trainer"):
        callback.attach(made) and callback.attach(trainer(model, tokenizer, tmp_path))


def test_a_second_training_and_an_exception_leave_no_hook(model, tokenizer, watch, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            raise RuntimeError("stop")

    callback = QScopeCallback(None, watch, every_n_steps=2)
    with pytest.raises(RuntimeError, match="stop"):
        trainer(model, tokenizer, tmp_path, [callback, Stop()]).train()
    trainer(model, tokenizer, tmp_path, [callback], max_steps=1).train()
    assert not any(m._forward_hooks for m in model.modules())


def test_alerts_reach_every_place_and_can_stop_training(model, tokenizer, watch, tmp_path: Path) -> None:
    # A read-out of the direction that the training data below pushes the model's answers into.
    told = []
    chinese = tokenizer("保存文件然后关闭窗口。")["input_ids"]
    with capture(model, [5]) as residual:
        model(input_ids=torch.tensor([chinese]))
        own = residual[5][0, 2:].mean(0).detach()
        model(input_ids=torch.tensor([tokenizer("Save the file, then close the window.")["input_ids"]]))
        direction = own - residual[5][0, 2:].mean(0).detach()
    weight = direction / direction.norm()
    threshold = float(own @ weight) * 0.7
    read_out = replace(watch[0], layer=5, weight=weight, direction=direction, bias=0.0, threshold=threshold, scale=1.0)
    callback = QScopeCallback(
        None,
        WatchList([read_out]),
        prompts=bundled.prompts("dev"),
        every_n_steps=10,
        max_overhead=None,
        on_alert=told.append,
        stop_on="behaviour",
        strict=True,
        rollouts=RolloutSettings(per_window=48, calibration=256, max_new_tokens=12, batch_size=128),
    )
    answer = [{"role": "assistant", "content": "保存文件然后关闭窗口。"}]
    rows = [{"prompt": r["prompt"], "completion": answer} for r in bundled.sft_data()[:64] if r["language"] == "en"]
    made = trainer(model, tokenizer, tmp_path, [callback], rows, max_steps=40, report_to="tensorboard")
    made.train()
    assert made.state.global_step < 40
    assert [a.kind for a in told][-1] == "behaviour"
    assert told == read_alerts(tmp_path)
    shown = told[-1].contexts[0]
    assert "保存" in shown.marked("", "")
    assert any(margin > 0 for margin in shown.margins)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*") if file.parent.name == "sae"}
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()
    assert len([t for t in tags["scalars"] if t.startswith("sae/")]) >= 10
    assert "sae/alerts/text_summary" in tags["tensors"]
    assert "custom_scalars__config__" in tags["tensors"]


def test_checkpoints_carry_the_monitor_and_resume(tokenizer, watch, tmp_path: Path) -> None:
    class Restored(QScopeCallback):
        def on_step_begin(self, *args, **kwargs) -> None:
            self.windows = getattr(self, "windows", self.session.state_dict()["windows"])
            super().on_step_begin(*args, **kwargs)

    def made(steps: int, monitored: bool = True):
        callback = Restored(
            None, watch, prompts=bundled.prompts("dev"), every_n_steps=2, max_overhead=None, strict=True,
            rollouts=ROLLOUTS,
        )  # fmt: skip
        callbacks = [callback] if monitored else []
        changes = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        return callback, trainer(bundled.model(), tokenizer, tmp_path, callbacks, **changes)

    made(2)[1].train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"][STATE_KEY]["file"] == STATE_FILE
    saved = torch.load(tmp_path / "checkpoint-2" / STATE_FILE, weights_only=True)
    callback, again = made(4)
    again.train(resume_from_checkpoint=True)
    assert callback.windows >= saved["windows"] > 0
    made(6, monitored=False)[1].train(resume_from_checkpoint=True)  # the callback may be dropped
    (tmp_path / "checkpoint-6" / STATE_FILE).unlink(missing_ok=True)
    made(8)[1].train(resume_from_checkpoint=True)  # and come back
    assert (tmp_path / "checkpoint-8" / STATE_FILE).is_file()


def test_a_second_callback_on_one_run_is_refused(model, tokenizer, watch, tmp_path: Path) -> None:
    made = trainer(model, tokenizer, tmp_path, [QScopeCallback(None, watch), QScopeCallback(None, watch)])
    with pytest.raises(ValueError, match="make one with both watch lists"):
        made.train()


def test_prompts_without_a_tokenizer_are_refused_before_training(model, tokenizer, watch, tmp_path: Path) -> None:
    made = trainer(model, tokenizer, tmp_path, [QScopeCallback(None, watch, prompts=["How?"])])
    made.callback_handler.processing_class = None
    with pytest.raises(ValueError, match="need a tokenizer"):
        made.train()


def test_a_failing_sink_is_reported_once_and_training_goes_on(model, tokenizer, watch, tmp_path: Path, caplog) -> None:
    callback = QScopeCallback(None, watch, every_n_steps=1)
    made = trainer(model, tokenizer, tmp_path / "run", [callback], max_steps=3)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "sae").write_text("a file where the folder should be")
    made.train()
    assert made.state.global_step == 3
    assert sum("JsonLinesSink stopped" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"watch": None}, ValueError, "nothing to watch"),
        ({"every_n_steps": 0}, ValueError, "every_n_steps"),
        ({"max_overhead": -0.1}, ValueError, "max_overhead"),
        ({"prompts": "How?"}, TypeError, "got a str"),
        ({"prompts": []}, ValueError, "empty"),
        ({"prompts": [{"role": "user", "content": "How?"}]}, TypeError, r"prompts\[0\]"),
        ({"watch": "folder"}, TypeError, "WatchList"),
        ({"saes": "repo/id"}, TypeError, "load_saes"),
        ({"stop_on": "behavior"}, ValueError, "'behavior'"),
        ({"exceedance_rate": 5}, ValueError, "exceedance_rate"),
        ({"rollouts": {"per_window": 3}}, TypeError, "RolloutSettings"),
        ({"on_alert": "print"}, TypeError, "on_alert"),
        ({"every_n_steps": 1.5}, ValueError, "1.5"),
    ],
)
def test_bad_arguments_are_refused(options: dict, error: type, message: str, watch) -> None:
    with pytest.raises(error, match=message):
        QScopeCallback(**{"watch": watch, **options})
