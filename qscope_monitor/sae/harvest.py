"""Collecting residual activations of text for SAE training, within a memory budget."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from qscope_monitor.residual import capture

__all__ = ["Harvest", "harvest"]

_HELD_OUT = 0.05
_FORWARD_TOKENS = 4096


@dataclass(frozen=True)
class Harvest:
    """Activations by layer, `[tokens, d_model]`, fp32 or fp16, on the CPU: to train on and to measure on."""

    train: dict[int, Tensor]
    held_out: dict[int, Tensor]


@dataclass(frozen=True)
class _Window:
    ids: list[int]
    text: int


def harvest(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    layers: Sequence[int],
    *,
    tokens: int | None,
    context: int,
    skip_positions: int,
    max_bytes: int,
    seed: int,
    progress: bool,
) -> Harvest:
    """Run the model over the texts, in evaluation mode, and keep what the decoder layers put out.

    Texts are shuffled and cut into windows of at most `context` tokens. The first `skip_positions` of every window,
    special tokens and padding are left out; about a twentieth, whole texts where there are at least 20, is held out.
    fp32 is kept if it fits in `max_bytes`, else fp16; what does not fit even so is left out, with a warning.

    Raises:
        ValueError: if there is too little text.
    """
    windows = list(_windows(tokenizer, texts, tokens, context, skip_positions, seed))
    special = torch.tensor(sorted(set(getattr(tokenizer, "all_special_ids", []) or [])), dtype=torch.int64)
    sizes = [int(_kept(window.ids, special, skip_positions).sum()) for window in windows]
    row_bytes = _hidden_size(model) * len(layers)
    dtype = torch.float32 if sum(sizes) * row_bytes * 4 <= max_bytes else torch.float16
    most = max_bytes // (row_bytes * dtype.itemsize)
    if sum(sizes) > most:
        warnings.warn(
            f"{sum(sizes)} tokens of activations need more than max_bytes={max_bytes} in fp16; {most} are used",
            stacklevel=3,
        )
        while sum(sizes) > most:
            windows.pop()
            sizes.pop()
    cut = _cut(windows)
    if cut == 0:
        raise ValueError(f"{len(texts)} texts give {len(windows)} windows of up to {context} tokens; pass more text")
    parts = [range(cut), range(cut, len(windows))]
    kept: list[dict[int, Tensor]] = [{}, {}]
    starts = [0, 0]
    ends = [sum(sizes[i] for i in part) for part in parts]
    device = next(model.parameters()).device
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else model  # spares the logits
    bar = tqdm(total=sum(sizes), disable=not progress, desc="activations", unit="token")
    with torch.no_grad(), _evaluating(model), capture(model, layers) as residual:
        for which, part in enumerate(parts):
            for batch in _batches(windows, part):
                length = max(len(window.ids) for window in batch)
                ids = torch.zeros(len(batch), length, dtype=torch.int64)
                mask = torch.zeros(len(batch), length, dtype=torch.int64)
                keep = torch.zeros(len(batch), length, dtype=torch.bool)
                for row, window in enumerate(batch):
                    n = len(window.ids)
                    ids[row, :n] = torch.tensor(window.ids)
                    mask[row, :n] = 1
                    keep[row, :n] = _kept(window.ids, special, skip_positions)
                decoder(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
                count = int(keep.sum())
                for layer in layers:
                    x = residual[layer][keep.to(residual[layer].device)]  # [count, d_model]
                    if layer not in kept[which]:
                        kept[which][layer] = torch.empty(ends[which], x.shape[1], dtype=dtype)
                    kept[which][layer][starts[which] : starts[which] + count] = x
                starts[which] += count
                bar.update(count)
    bar.close()
    return Harvest(*kept)


def _hidden_size(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().hidden_size if hasattr(config, "get_text_config") else config.hidden_size)


def _windows(
    tokenizer: Any, texts: Sequence[str], tokens: int | None, context: int, skip: int, seed: int
) -> Iterator[_Window]:
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    found = 0
    for text in order:
        ids = list(tokenizer(texts[text])["input_ids"])
        for start in range(0, len(ids), context):
            window = ids[start : start + context]
            if len(window) > skip:
                yield _Window(window, text)
                found += len(window) - skip
            if tokens is not None and found >= tokens:
                return


def _kept(ids: Sequence[int], special: Tensor, skip: int) -> Tensor:
    keep = ~torch.isin(torch.tensor(ids), special)
    keep[:skip] = False
    return keep


def _cut(windows: Sequence[_Window]) -> int:
    """First held-out window; a text is not split where there are enough texts for that."""
    cut = min(len(windows) - 1, int(len(windows) * (1 - _HELD_OUT)))
    if len({window.text for window in windows}) >= 1 / _HELD_OUT:
        while cut > 1 and windows[cut - 1].text == windows[cut].text:
            cut -= 1
    return max(cut, 0)


def _batches(windows: Sequence[_Window], part: Iterable[int]) -> Iterator[list[_Window]]:
    """Windows of similar length together, about a fixed number of tokens with padding."""
    batch: list[_Window] = []
    for index in sorted(part, key=lambda i: -len(windows[i].ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > _FORWARD_TOKENS:
            yield batch
            batch = []
        batch.append(windows[index])
    if batch:
        yield batch


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and back to what each module was in: parts of a model may be frozen in it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
