"""Rollouts sampled from the model in training, and the teacher-forced pass that reads their residuals.

Features are never taken from the tensors seen while generating: those come one token at a time, with a cache whose
rounding differs. Every function here leaves the model and the random state as it found them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qscope_monitor.residual import capture, decoder

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class RolloutSettings:
    """How rollouts are sampled.

    Attributes:
        per_window: rollouts sampled each time (over all ranks).
        calibration: rollouts sampled before training, for the baseline; below 256 no alert can be raised.
        max_new_tokens: length limit in tokens.
        temperature: 0 means greedy.
        top_p: nucleus mass. Plain sampling (1.0) shows rare behaviour first; the SASFT paper (arXiv 2507.14894) reports
            rates at 0.8.
        batch_size: rollouts generated, and scored, at once.
        seed: the rollouts of step n are drawn with seed + n, apart from the run's own random state.
    """

    per_window: int = 64
    calibration: int = 256
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("per_window", 1),
            ("calibration", 0),
            ("max_new_tokens", 1),
            ("batch_size", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name in ("temperature", "top_p"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "temperature must be >= 0 and top_p in (0, 1], got "
                f"temperature={self.temperature!r}, top_p={self.top_p!r}"
            )


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    `prompt` is the last message the model answers; `completion_ids` ends before the end-of-text token.
    """

    prompt: str
    text: str
    prompt_ids: list[int]
    completion_ids: list[int]


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Raise TypeError or ValueError naming the first prompt that is neither text nor a list of messages."""
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a list of prompts, got a {type(prompts).__name__}")
    if len(prompts) == 0:
        raise ValueError("prompts is empty; pass None to watch training batches only")
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            continue
        messages = prompt if isinstance(prompt, list) and prompt else [None]
        if not all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in messages):
            raise TypeError(
                f"prompts[{i}] must be a string or a list of messages with role and content, got {prompt!r:.80}"
            )


@contextmanager
def left_as_found(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Run a block in eval mode without gradients; training flags and random state are restored after it."""
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters())
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        if seed is not None:
            torch.manual_seed(seed)
        try:
            model.eval()
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: through the chat template where there is one, a plain string as one user turn."""
    if getattr(tokenizer, "chat_template", None) is None:
        if not isinstance(prompt, str):
            raise ValueError(f"the tokenizer has no chat template, so prompts must be strings, got {prompt!r}")
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return list(ids)


def sample_rollouts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: RolloutSettings | None = None,
    *,
    seed: int | None = None,
    autocast: torch.dtype | None = None,
) -> list[Rollout]:
    """Sample one response to each prompt, in order.

    Args:
        model: a Hugging Face model with `generate`; a wrapped one is unwrapped through its `module`.
        tokenizer: its tokenizer.
        prompts: strings or message lists.
        settings: sampling settings; `per_window` and `calibration` play no part here.
        seed: random seed, `settings.seed` by default.
        autocast: run under autocast to this dtype.
    """
    settings = settings or RolloutSettings()
    model = getattr(model, "module", model)
    device = next(model.parameters()).device
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ends = _end_ids(model, tokenizer)
    sampling: dict[str, Any] = (
        {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.temperature == 0
        else {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    )
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    rollouts: list[Rollout] = []
    with left_as_found(model, settings.seed if seed is None else seed):
        for start in range(0, len(encoded), settings.batch_size):
            batch = encoded[start : start + settings.batch_size]
            ids, mask = pad(batch, padding, left=True, device=device)
            with _autocast(device, autocast):
                output = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=settings.max_new_tokens,
                    pad_token_id=padding,
                    eos_token_id=ends,
                    use_cache=True,
                    **sampling,
                )
            asked = prompts[start : start + settings.batch_size]
            for prompt, prompt_ids, row in zip(asked, batch, output[:, ids.shape[1] :].tolist(), strict=True):
                end = next((i for i, token in enumerate(row) if token in ends or token == padding), len(row))
                rollouts.append(
                    Rollout(
                        prompt if isinstance(prompt, str) else prompt[-1]["content"],
                        tokenizer.decode(row[:end], skip_special_tokens=True),
                        prompt_ids,
                        row[:end],
                    )
                )
    return rollouts


@dataclass(frozen=True)
class ScoredBatch:
    """Rollouts with the residuals of a teacher-forced pass over prompt + completion."""

    rollouts: list[Rollout]
    residuals: dict[int, Tensor]  # layer -> [batch, seq, d_model]
    input_ids: Tensor  # [batch, seq], right-padded
    attention_mask: Tensor
    response_mask: Tensor  # bool, completion tokens


def score_rollouts(
    model: Any,
    tokenizer: Any,
    rollouts: Sequence[Rollout],
    layers: Sequence[int],
    *,
    batch_size: int = 64,
    autocast: torch.dtype | None = None,
) -> Iterator[ScoredBatch]:
    """Teacher-forced forward of the backbone (no language-model head) over rollouts, batched by length.

    Rollouts without a single completion token are passed over.
    """
    device = next(model.parameters()).device
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ordered = sorted((r for r in rollouts if r.completion_ids), key=lambda r: len(r.prompt_ids) + len(r.completion_ids))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        ids, mask = pad([r.prompt_ids + r.completion_ids for r in batch], padding, left=False, device=device)
        prompt_lengths = torch.tensor([len(r.prompt_ids) for r in batch], device=device)
        response = (torch.arange(ids.shape[1], device=device) >= prompt_lengths.unsqueeze(-1)) & mask.bool()
        with left_as_found(model), capture(model, layers) as residual, _autocast(device, autocast):
            decoder(model)(input_ids=ids, attention_mask=mask, use_cache=False)
            residuals = {layer: residual[layer] for layer in layers}
        yield ScoredBatch(batch, residuals, ids, mask, response)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


def pad(rows: Sequence[Sequence[int]], value: int, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """[batch, seq] ids and attention mask."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = 1
    return ids.to(device), mask.to(device)
