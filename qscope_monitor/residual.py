"""The residual stream of a decoder: where the layers are, and hooks that hand over what they return.

Layers are resolved by path (`get_decoder().layers`), never by class name: FSDP2, activation checkpointing and PEFT all
rename or wrap classes. The hooks only keep a reference to what a layer returned; everything else happens after the
decoder's forward, outside gradient checkpoints and compiled regions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = [
    "Capture",
    "DecoderInputs",
    "ResidualHooks",
    "always",
    "capture",
    "decoder",
    "decoder_layers",
    "training_forward",
    "unwrap",
]

_LAYER_NAMES = ("layers", "h", "blocks")
_DECODER_PATHS = (
    "model",
    "model.language_model",
    "language_model",
    "language_model.model",
    "model.decoder",
    "decoder",
    "transformer",
    "gpt_neox",
    "",
)


def unwrap(model: nn.Module) -> list[nn.Module]:
    """From the object the user holds down to the Hugging Face model: compile, DDP, FSDP, DeepSpeed, PEFT taken off.

    Returns:
        The modules a forward runs through, outermost first; the last is the Hugging Face model. Compiled and DDP-like
        wrappers are left out: they always call what they wrap.

    Raises:
        ValueError: `model` is an `nn.DataParallel`.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "nn.DataParallel is not supported: it replicates the modules at every forward and loses the hooks. "
            "Use DistributedDataParallel (torchrun / accelerate launch) or a single device."
        )
    chain = [model]
    while True:
        last = chain[-1]
        inner = last._modules.get("_orig_mod") or last._modules.get("module")
        if isinstance(inner, nn.Module):
            chain[-1] = inner  # it always runs through the inner module's __call__
            continue
        if callable(getattr(last, "get_base_model", None)):  # PeftModel
            tuner = last._modules.get("base_model")
            base = last.get_base_model()  # type: ignore[operator]
            if isinstance(base, nn.Module) and base is not last:
                if isinstance(tuner, nn.Module) and tuner is not base:
                    chain.append(tuner)  # LoraModel and the like
                chain.append(base)
                continue
        return chain


def _follow(root: Any, path: str) -> Any:
    for name in filter(None, path.split(".")):
        root = root[int(name)] if name.isdigit() and isinstance(root, nn.ModuleList) else getattr(root, name, None)
        if root is None:
            return None
    return root


def _layers_of(module: Any) -> nn.ModuleList | None:
    for name in _LAYER_NAMES:
        layers = getattr(module, name, None)
        if isinstance(layers, nn.ModuleList) and len(layers):
            return layers
    return None


@dataclass(frozen=True)
class _Backbone:
    decoder: nn.Module
    layers: nn.ModuleList
    callers: tuple[nn.Module, ...]  # the modules a forward runs through on its way to the decoder


def _find(chain: Sequence[nn.Module], path: str | None) -> tuple[nn.Module, nn.ModuleList]:
    """The module that holds the layers, and the layers."""
    base = chain[-1]
    if path is not None:
        for root in reversed(chain):
            owner, layers = _follow(root, path.rpartition(".")[0]), _follow(root, path)
            if isinstance(owner, nn.Module) and isinstance(layers, nn.ModuleList) and len(layers):
                return owner, layers
        tried = [path]
    else:
        owners = {prefix: _follow(base, prefix) for prefix in _DECODER_PATHS}
        if callable(getattr(base, "get_decoder", None)):
            owners = {"get_decoder()": base.get_decoder(), **owners}  # type: ignore[operator]
        for owner in owners.values():
            found = _layers_of(owner)
            if found is not None:
                return owner, found
        tried = [f"{prefix}.{name}".lstrip(".") for prefix in owners for name in _LAYER_NAMES]
    raise ValueError(
        f"no decoder layers found in {type(base).__name__}; tried {', '.join(tried)}. "
        "Name the nn.ModuleList of decoder layers with layers_path=, for example layers_path='model.layers'."
    )


def _resolve(model: nn.Module, path: str | None = None) -> _Backbone:
    chain = unwrap(model)
    base = chain[-1]
    owner, layers = _find([model, *chain], path)
    names = next((name for name, module in base.named_modules() if module is owner), "").split(".")
    on_the_way = [_follow(base, ".".join(names[:depth])) for depth in range(len(names))]
    callers = [module for module in (*chain[:-1], *on_the_way) if isinstance(module, nn.Module) and module is not owner]
    return _Backbone(owner, layers, tuple(dict.fromkeys(callers)))


def decoder(model: nn.Module, path: str | None = None) -> nn.Module:
    """Return the module whose forward runs the decoder layers (`Qwen3Model` inside `Qwen3ForCausalLM`, and so on).

    Looks through torch.compile, DDP, FSDP, DeepSpeed and PEFT, then asks `get_decoder()`, then tries common paths.

    Args:
        model: any decoder-only model, wrapped or not, or a bare backbone.
        path: path of the `nn.ModuleList` of layers, for a model that is laid out differently (`"model.layers"`).

    Raises:
        ValueError: nothing was found, or `model` is an `nn.DataParallel`.
    """
    return _resolve(model, path).decoder


def decoder_layers(model: nn.Module, path: str | None = None) -> nn.ModuleList:
    """Return the decoder layers of `model`, in order; the output of layer n is what layer n's SAE reads.

    Arguments and errors as for `decoder`.
    """
    return _resolve(model, path).layers


def _check_layers(layers: Iterable[int], num_layers: int) -> tuple[int, ...]:
    chosen = tuple(layers)
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layers must be integers, got {layer!r}")
        if not 0 <= layer < num_layers:
            raise ValueError(
                f"layer {layer} is out of range: the model has {num_layers} layers, numbered 0 to {num_layers - 1}"
            )
    return tuple(dict.fromkeys(chosen))


@dataclass
class DecoderInputs:
    """What the decoder was called with, completed by what the modules around it were called with.

    `input_ids`, `attention_mask` and `labels` come from the enclosing model where the decoder itself does not get them
    (a multimodal model hands its text decoder embeddings and a prepared mask) and only where their first two
    dimensions match the decoder's `[batch, seq]`.
    """

    input_ids: Tensor | None = None  # [batch, seq]
    inputs_embeds: Tensor | None = None  # [batch, seq, d_model]
    attention_mask: Tensor | None = None  # [batch, seq], or [batch, 1, query, key]
    position_ids: Tensor | None = None  # [batch, seq]; [3 or 4, batch, seq] with multimodal rotary positions
    cu_seq_lens_q: Tensor | None = None  # [sequences + 1]
    labels: Tensor | None = None  # [batch, seq], unshifted, -100 where there is no loss
    extra: dict[str, Any] = field(default_factory=dict)  # everything else, by name


_FIELDS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cu_seq_lens_q", "labels")


def training_forward(decoder: nn.Module) -> bool:
    """Whether this is the forward that is trained on: grad enabled and the decoder in training mode.

    Generation, reference-model passes and scoring run without grad; gradient-checkpoint recomputation does not enter
    the decoder again.
    """
    return torch.is_grad_enabled() and decoder.training


def always(decoder: nn.Module) -> bool:
    """Any forward, for use outside training (`when=always`)."""
    return True


class ResidualHooks:
    """Hands over the outputs of chosen decoder layers after each forward that counts.

    Registered once and left in place: `armed` switches it, because torch.compile does not notice hooks that come and
    go. When the decoder is entered while `armed` is True and `when(decoder)` holds, a window opens; layer hooks keep
    the object each layer returned; when the decoder returns, the window closes and `on_forward` gets the tensors. The
    hooks compute nothing and return None, so losses, gradients and random state stay what they were.

    Args:
        model: decoder-only model, wrapped or not.
        layers: layer numbers, from 0. May be empty: then only the inputs are handed over.
        on_forward: called as `on_forward(residuals, inputs)` with `{layer: [batch, seq, d_model]}`, the live tensors,
            in whatever grad and autocast mode the forward ran. Forwards of the same model that it starts are ignored.
        layers_path: see `decoder`.
        when: decides at decoder entry whether this forward counts.
        armed: initial state of the switch.

    Raises:
        ValueError: no layers found, or a layer number out of range.
        TypeError: a layer number that is not an integer.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[int],
        on_forward: Callable[[dict[int, Tensor], DecoderInputs], None],
        layers_path: str | None = None,
        *,
        when: Callable[[nn.Module], bool] = training_forward,
        armed: bool = True,
    ) -> None:
        backbone = _resolve(model, layers_path)
        self.layers = _check_layers(layers, len(backbone.layers))
        self.armed = armed
        self.when = when
        self.on_forward = on_forward
        self._window: dict[int, Tensor] | None = None
        self._inputs: DecoderInputs | None = None
        self._around: dict[str, Any] = {}
        self._busy = False
        self._handles: list[RemovableHandle] = []
        # Under torch.compile each hook is a graph break instead of a traced mutation of Python state.
        disable = torch.compiler.disable
        for module in backbone.callers:
            parameters = _parameters(module)
            note = disable(partial(self._note_caller, parameters))
            self._handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
            self._handles.append(module.register_forward_hook(disable(self._forget_caller), always_call=True))
        enter = disable(partial(self._enter, _parameters(backbone.decoder)))
        self._handles.append(backbone.decoder.register_forward_pre_hook(enter, with_kwargs=True))
        for layer in self.layers:
            store = disable(partial(self._store, layer))
            self._handles.append(backbone.layers[layer].register_forward_hook(store))
        # always_call: an exception inside the forward closes the window too.
        self._handles.append(backbone.decoder.register_forward_hook(disable(self._leave), always_call=True))

    def _note_caller(self, parameters: Sequence[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self.armed:
            return
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        self._around.update({name: given[name] for name in _FIELDS if isinstance(given.get(name), Tensor)})

    def _forget_caller(self, module: nn.Module, args: Any, output: Any) -> None:
        self._around = {}

    def _enter(self, parameters: Sequence[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._window = self._inputs = None
        if not self.armed or self._busy or not self.when(module):
            return
        self._window = {}
        self._inputs = _decoder_inputs({**dict(zip(parameters, args, strict=False)), **kwargs}, self._around)

    def _store(self, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        if self._window is not None:
            self._window[layer] = output[0] if isinstance(output, tuple) else output

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        residuals, inputs = self._window, self._inputs
        self._window = self._inputs = None
        if residuals is None or inputs is None or output is None:  # output is None: the forward raised
            return
        self._busy = True
        try:
            self.on_forward(residuals, inputs)
        finally:
            self._busy = False

    def remove(self) -> None:
        """Take the hooks off. May be called more than once."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._window = self._inputs = None
        self._around = {}

    def __enter__(self) -> ResidualHooks:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional parameters of the module's forward, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(module.forward).parameters.items() if p.kind in kinds)


def _decoder_inputs(given: dict[str, Any], around: dict[str, Any]) -> DecoderInputs:
    values = {name: given.pop(name, None) for name in _FIELDS}
    # Qwen3.5 and Gemma 3 prepare masks by attention type: a dict is of no use here, the caller's 2-D mask is.
    values = {name: value if isinstance(value, Tensor) else None for name, value in values.items()}
    tokens = values["input_ids"] if values["input_ids"] is not None else values["inputs_embeds"]
    shape = None if tokens is None else tokens.shape[:2]
    for name in ("input_ids", "attention_mask", "labels"):
        outer = around.get(name)
        if values[name] is None and outer is not None and outer.shape[:2] == shape:
            values[name] = outer
    if values["cu_seq_lens_q"] is None:
        values["cu_seq_lens_q"] = around.get("cu_seq_lens_q")
    return DecoderInputs(**values, extra=given)


class Capture(Mapping[int, Tensor]):
    """The residual stream of the last forward, by layer; `inputs` is what the decoder was called with."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.inputs: DecoderInputs | None = None
        self._tensors: dict[int, Tensor] = {}

    def _set(self, residuals: dict[int, Tensor], inputs: DecoderInputs) -> None:
        self._tensors, self.inputs = residuals, inputs

    def __getitem__(self, layer: int) -> Tensor:
        if layer in self._tensors:
            return self._tensors[layer]
        if layer not in self.layers:
            raise KeyError(f"layer {layer!r} is not captured; captured layers: {list(self.layers)}")
        raise KeyError(f"no forward has run inside the `with` block yet, so layer {layer} holds nothing")

    def __iter__(self) -> Iterator[int]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@contextmanager
def capture(model: nn.Module, layers: Iterable[int], layers_path: str | None = None) -> Iterator[Capture]:
    """Capture the residual stream after chosen layers, in any forward: training or eval, with or without grad.

    Args:
        model: decoder-only model, wrapped or not.
        layers: layer numbers, from 0.
        layers_path: see `decoder`.

    Yields:
        A mapping from layer to the live tensor `[batch, seq, d_model]` of the last forward. It equals
        `hidden_states[layer + 1]` except at the last layer, where `hidden_states` holds the final norm's output.

    Example:
        >>> with qs.capture(model, layers=[12, 20]) as residual:
        ...     model(**batch)
        >>> residual[12].shape
        torch.Size([2, 64, 2048])
    """
    chosen = tuple(layers)
    result = Capture(chosen)
    with ResidualHooks(model, chosen, result._set, layers_path, when=always):
        yield result
