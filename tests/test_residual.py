from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from qscope_monitor.residual import (
    DecoderInputs,
    ResidualHooks,
    always,
    capture,
    decoder,
    decoder_layers,
)

pytest.importorskip("transformers")

import models

LAST = models.LAYERS - 1


def build(name: str) -> nn.Module:
    try:
        return models.ARCHITECTURES[name]()
    except ImportError as error:
        pytest.skip(f"this version of transformers has no {name}: {error}")


def ids(batch: int = 2, seq: int = 9, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 60, (batch, seq), generator=generator)


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Recorder:
    """Counts forwards and keeps copies of what was handed over."""

    def __init__(self) -> None:
        self.residuals: list[dict[int, torch.Tensor]] = []
        self.inputs: list[DecoderInputs] = []

    def __call__(self, residuals: dict[int, torch.Tensor], inputs: DecoderInputs) -> None:
        self.residuals.append({layer: x.detach().clone() for layer, x in residuals.items()})
        self.inputs.append(inputs)

    def __len__(self) -> int:
        return len(self.residuals)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_capture_equals_hidden_states(name: str) -> None:
    model = build(name)
    input_ids = ids()
    with torch.no_grad():
        before = model(input_ids=input_ids, output_hidden_states=True)
        with capture(model, range(models.LAYERS)) as residual:
            after = model(input_ids=input_ids)
    assert len(decoder_layers(model)) == models.LAYERS
    for layer in range(LAST):
        assert torch.equal(residual[layer], before.hidden_states[layer + 1]), layer
    assert residual[LAST].shape == before.hidden_states[-1].shape
    # transformers puts the output of the final norm there; the block's own output is something else
    assert not torch.equal(residual[LAST], before.hidden_states[-1])
    assert torch.equal(after[0], before[0])
    assert residual.inputs is not None
    assert residual.inputs.input_ids is not None
    assert torch.equal(residual.inputs.input_ids, input_ids)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_inputs_reach_the_decoder_hook(name: str) -> None:
    model = build(name).train()
    input_ids, mask = ids(), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    labels = input_ids.masked_fill(mask == 0, -100)
    recorder = Recorder()
    kwargs = {} if name == "qwen3_backbone" else {"labels": labels}
    if name == "gemma3_multimodal":
        kwargs["token_type_ids"] = torch.zeros_like(input_ids)
    with ResidualHooks(model, [0, LAST], recorder):
        model(input_ids=input_ids, attention_mask=mask, **kwargs)
    assert len(recorder) == 1
    (inputs,) = recorder.inputs
    assert inputs.input_ids is not None
    assert torch.equal(inputs.input_ids, input_ids)
    assert inputs.attention_mask is not None
    assert inputs.attention_mask.shape[0] == 2
    if name != "qwen3_backbone":
        assert inputs.labels is not None
        assert torch.equal(inputs.labels, labels)


def test_positional_arguments_are_bound_by_the_signature() -> None:
    model = models.qwen3_backbone()
    mask = torch.ones(2, 9, dtype=torch.long)
    with capture(model, [1]) as residual:
        model(ids(), mask)
    assert residual.inputs is not None
    assert residual.inputs.attention_mask is mask
    assert residual.inputs.labels is None


def test_padding_free_arguments() -> None:
    model = models.qwen3()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
    bounds = torch.tensor([0, 3, 9], dtype=torch.int32)
    with capture(model, [1]) as residual:
        model(ids(1), position_ids=positions, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=6)
    inputs = residual.inputs
    assert inputs is not None
    assert torch.equal(inputs.position_ids, positions)
    assert inputs.cu_seq_lens_q is bounds
    assert inputs.extra["max_length_q"] == 6


def test_labels_of_another_shape_are_not_handed_on() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = models.qwen3_backbone()

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids).last_hidden_state

    recorder = Recorder()
    with ResidualHooks(Classifier().train(), [0], recorder) as hooks:
        assert hooks.layers == (0,)
        model = Classifier().train()
    with ResidualHooks(model, [0], recorder):
        model(ids(), labels=torch.tensor([0, 1]))
    assert recorder.inputs[0].labels is None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside_checkpoint", [True, False])
def test_gradient_checkpointing_hands_over_once(reentrant: bool, inside_checkpoint: bool) -> None:
    def gradients(hooked: bool, checkpointing: bool) -> tuple[torch.Tensor, list[torch.Tensor], Recorder]:
        model = models.qwen3(use_cache=False).train()
        if checkpointing and inside_checkpoint:
            # transformers up to 5.22 checkpoints layer.__call__, hooks included; 5.23 and later only its forward
            for i, layer in enumerate(model.model.layers):
                model.model.layers[i] = CheckpointedCall(layer, reentrant)
        elif checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        recorder = Recorder()
        layers = model.model.layers
        hooks = ResidualHooks(model, [1, LAST], recorder)
        if checkpointing and inside_checkpoint:
            for handle in hooks._handles:  # move the layer hooks to where old versions have them
                for layer in layers:
                    if handle.id in layer._forward_hooks:
                        layer.inner._forward_hooks[handle.id] = layer._forward_hooks.pop(handle.id)
        if not hooked:
            hooks.remove()
            for layer in layers:
                getattr(layer, "inner", layer)._forward_hooks.clear()
        model.model.embed_tokens.weight.requires_grad_(True)
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None], recorder

    loss, grads, recorder = gradients(True, True)
    plain_loss, plain_grads, _ = gradients(False, True)
    _, reference, plain_recorder = gradients(True, False)
    assert len(recorder) == 1
    assert torch.equal(loss, plain_loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain_grads, strict=True))
    assert len(grads) == len(reference)
    for layer in (1, LAST):
        assert torch.equal(recorder.residuals[0][layer], plain_recorder.residuals[0][layer])


class CheckpointedCall(nn.Module):
    """A layer checkpointed from outside, so that its own hooks run inside the checkpoint and again at recomputation."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant
        self.attention_type = getattr(inner, "attention_type", None)  # read by transformers 4

    def forward(self, hidden: torch.Tensor, **kwargs: object) -> torch.Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(lambda h: self.inner(h, **kwargs), hidden, use_reentrant=self.reentrant)


def test_live_tensor_takes_part_in_the_graph() -> None:
    model = models.qwen3().train()
    with capture(model, [2]) as residual:
        model(ids())
        grad = torch.autograd.grad(residual[2].square().sum(), model.model.layers[0].mlp.up_proj.weight)
    assert grad[0].abs().sum() > 0


def test_generation_and_no_grad_passes_are_ignored() -> None:
    model = models.qwen3().train()
    recorder = Recorder()
    with ResidualHooks(model, [0], recorder):
        model.generate(ids(), max_new_tokens=3, do_sample=False)
        with torch.no_grad():
            model(ids())
        model.eval()(ids())
        assert len(recorder) == 0
        model.train()(ids())
        assert len(recorder) == 1


def test_switch_and_predicate() -> None:
    model = models.qwen3()
    recorder = Recorder()
    with ResidualHooks(model, [0], recorder, when=always, armed=False) as hooks:
        model(ids())
        assert len(recorder) == 0
        hooks.armed = True
        with torch.no_grad():
            model(ids())
        assert len(recorder) == 1


def test_peft_reference_pass_is_ignored() -> None:
    model = models.qwen3_lora().train()
    recorder = Recorder()
    with ResidualHooks(model, [LAST], recorder):
        # the order of DPO with PEFT: the reference runs through the same modules inside compute_loss
        model(input_ids=ids())
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=ids())
    with torch.no_grad(), capture(model, [LAST]) as policy:
        model(input_ids=ids())
    assert len(recorder) == 1
    assert torch.equal(recorder.residuals[0][LAST], policy[LAST])


def test_direct_call_of_the_inner_model_still_counts() -> None:
    model = models.qwen3_lora().train()
    recorder = Recorder()
    with ResidualHooks(model, [0], recorder):
        model.base_model.model.model(input_ids=ids())  # TRL's fused loss calls the backbone
        model.base_model.model.forward(input_ids=ids(), labels=ids())  # PEFT up to 0.13 skips __call__
    assert len(recorder) == 2


class Fails(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.fail = inner, True
        self.attention_type = getattr(inner, "attention_type", None)  # read by transformers 4

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        if self.fail:
            raise RuntimeError("out of memory, say")
        return self.inner(*args, **kwargs)


def test_exception_leaves_no_open_window() -> None:
    model = models.qwen3().train()
    model.model.layers[2] = Fails(model.model.layers[2])
    recorder = Recorder()
    with ResidualHooks(model, [1, 2], recorder) as hooks:
        with pytest.raises(RuntimeError, match="out of memory"):
            model(ids(), labels=ids())
        assert hooks._window is None
        assert hooks._inputs is None
        assert hooks._around == {}
        model.model.layers[2].fail = False
        model(ids(seed=2))
    assert len(recorder) == 1
    assert recorder.inputs[0].labels is None
    assert torch.equal(recorder.inputs[0].input_ids, ids(seed=2))


def test_exception_in_the_receiver_is_passed_on_and_leaves_no_trace() -> None:
    model = models.qwen3().train()

    def fail(residuals: object, inputs: object) -> None:
        raise ZeroDivisionError

    with ResidualHooks(model, [1], fail) as hooks:
        with pytest.raises(ZeroDivisionError):
            model(ids())
        assert hooks._window is None
        assert not hooks._busy


def test_forward_started_by_the_receiver_is_ignored() -> None:
    model = models.qwen3().train()
    calls = []

    def again(residuals: object, inputs: object) -> None:
        calls.append(1)
        model(ids())

    with ResidualHooks(model, [1], again):
        model(ids())
    assert len(calls) == 1


def test_instances_are_independent() -> None:
    model = models.qwen3().train()
    first, second = Recorder(), Recorder()
    outer = ResidualHooks(model, [0], first)
    with ResidualHooks(model, [0, 1], second, when=always):
        model(ids())
        with torch.no_grad():
            model(ids())
    model(ids())
    outer.remove()
    assert (len(first), len(second)) == (2, 2)
    assert set(first.residuals[0]) == {0}
    assert set(second.residuals[0]) == {0, 1}


def test_remove_restores_the_hooks_and_is_idempotent() -> None:
    model = models.qwen3_lora()
    before = count_hooks(model)
    hooks = ResidualHooks(model, range(models.LAYERS), Recorder())
    assert count_hooks(model) > before
    hooks.remove()
    hooks.remove()
    assert count_hooks(model) == before
    with pytest.raises(RuntimeError), capture(model, [0]):
        raise RuntimeError
    assert count_hooks(model) == before


def test_training_is_bit_identical_with_and_without_hooks() -> None:
    def train(hooked: bool) -> tuple[list[float], list[torch.Tensor], torch.Tensor]:
        torch.manual_seed(0)
        model = models.qwen3(attention_dropout=0.1).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        hooks = ResidualHooks(model, range(models.LAYERS), Recorder()) if hooked else None
        losses = []
        for step in range(4):
            loss = model(ids(seed=step), labels=ids(seed=step)).loss
            loss.backward()
            losses.append(loss.item())
            grads = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
        if hooks is not None:
            hooks.remove()
        return losses, grads + [p.detach() for p in model.parameters()], torch.get_rng_state()

    with torch.random.fork_rng():
        losses, tensors, rng = train(True)
        plain_losses, plain_tensors, plain_rng = train(False)
    assert losses == plain_losses
    assert all(torch.equal(a, b) for a, b in zip(tensors, plain_tensors, strict=True))
    assert torch.equal(rng, plain_rng)


def test_no_tensor_is_kept_alive() -> None:
    model = models.qwen3().train()
    kept: list[weakref.ref[torch.Tensor]] = []

    def receive(residuals: dict[int, torch.Tensor], inputs: DecoderInputs) -> None:
        kept.extend(weakref.ref(x) for x in residuals.values())
        kept.append(weakref.ref(inputs.input_ids))

    with ResidualHooks(model, range(models.LAYERS), receive):
        loss = model(ids(), labels=ids()).loss
        del loss
        gc.collect()
        assert len(kept) == models.LAYERS + 1
        assert all(ref() is None for ref in kept)


def test_tuple_outputs_of_older_transformers() -> None:
    class TupleLayer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
            return self.inner(hidden), None

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(TupleLayer(nn.Linear(4, 4)) for _ in range(2))

        def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                inputs_embeds = layer(inputs_embeds)[0]
            return inputs_embeds

    model = Decoder()
    x = torch.randn(2, 3, 4)
    with capture(model, [1]) as residual:
        out = model(x)
    assert torch.equal(residual[1], out)
    assert residual[1].shape == (2, 3, 4)


def test_capture_explains_what_is_missing() -> None:
    model = models.qwen3()
    with capture(model, [1]) as residual:
        with pytest.raises(KeyError, match="no forward has run"):
            residual[1]
        with pytest.raises(KeyError, match=r"layer 2 is not captured; captured layers: \[1\]"):
            residual[2]
        assert dict(residual) == {}
        with torch.no_grad():
            model(ids())
            first = residual[1]
            model.train()(ids(seed=5))
    assert residual[1] is not first
    assert list(residual) == [1]


@pytest.mark.parametrize("layer", [4, 40, -1])
def test_layer_out_of_range(layer: int) -> None:
    with pytest.raises(ValueError, match="the model has 4 layers, numbered 0 to 3"):
        ResidualHooks(models.qwen3(), [layer], Recorder())


@pytest.mark.parametrize("layer", [True, 1.0, "1"])
def test_layer_of_another_type(layer: object) -> None:
    with pytest.raises(TypeError, match="layers must be integers"):
        ResidualHooks(models.qwen3(), [layer], Recorder())  # type: ignore[list-item]


class Unusual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Module()
        self.core.stages = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))


def test_unknown_layout_names_the_paths_and_the_argument() -> None:
    with pytest.raises(ValueError, match=r"model\.language_model\.layers.*layers_path="):
        decoder(Unusual())
    with pytest.raises(ValueError, match=r"tried core\.blocks"):
        decoder_layers(Unusual(), "core.blocks")


def test_layers_path() -> None:
    model = Unusual()
    assert decoder(model, "core.stages") is model.core
    assert decoder_layers(model, "core.stages") is model.core.stages
    qwen = models.qwen3_lora()
    assert decoder(qwen, "model.layers") is decoder(qwen)


def test_wrappers() -> None:
    model = models.qwen3()
    assert decoder(torch.compile(model)) is model.model
    assert decoder(models.qwen3_backbone()).__class__.__name__ == "Qwen3Model"

    class Wrapper(nn.Module):  # what DDP, FSDP and DeepSpeed look like from outside
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **kwargs: object) -> object:
            return self.module(**kwargs)

    wrapped = Wrapper(torch.compile(models.qwen3_lora(), backend="eager"))
    assert decoder(wrapped).__class__.__name__ == "Qwen3Model"
    with pytest.raises(ValueError, match="DataParallel is not supported"):
        decoder(nn.DataParallel(model))


def test_compiled_model_hands_over_the_same_tensors() -> None:
    model = models.qwen3().train()
    plain, compiled = Recorder(), Recorder()
    with ResidualHooks(model, [1, LAST], plain):
        expected = model(ids(), labels=ids()).loss
    with ResidualHooks(model, [1, LAST], compiled) as hooks:
        fast = torch.compile(model, backend="eager")
        loss = fast(input_ids=ids(), labels=ids()).loss
        hooks.armed = False
        fast(input_ids=ids(), labels=ids())
        assert len(compiled) == 1
        hooks.armed = True
        fast(input_ids=ids(), labels=ids()).loss.backward()
    torch._dynamo.reset()
    assert torch.allclose(loss, expected, atol=1e-6)
    assert len(compiled) == 2
    assert torch.equal(compiled.inputs[0].labels, ids())
    assert torch.allclose(compiled.residuals[0][LAST], plain.residuals[0][LAST], atol=1e-5)
