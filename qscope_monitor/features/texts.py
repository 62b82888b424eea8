"""Residuals of texts: the teacher-forced pass that discovery and evaluation share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qscope_monitor.residual import capture, decoder
from qscope_monitor.sampling import left_as_found, pad
from qscope_monitor.tokens import TokenBatch, TokenRules, drop_norm_outliers


@dataclass(frozen=True)
class TextBatch:
    """A batch of texts read by the model.

    Attributes:
        positions: index of each row's text in the list that was passed.
        tokens: which tokens count.
        residuals: layer -> [batch, seq, d_model].
    """

    positions: list[int]
    tokens: TokenBatch
    residuals: dict[int, Tensor]

    def kept(self, layer: int) -> tuple[Tensor, Tensor]:
        """Residuals [tokens, d_model] of the counted tokens, norm outliers dropped, and each one's row [tokens]."""
        keep = drop_norm_outliers(self.tokens, self.residuals[layer]).keep
        rows = torch.arange(len(self.positions), device=keep.device)[:, None].expand_as(keep)
        return self.residuals[layer][keep].float(), rows[keep]


def read_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    layers: Sequence[int],
    *,
    max_tokens: int = 256,
    batch_size: int = 16,
) -> Iterator[TextBatch]:
    """Run the backbone over texts, batched by length; longer ones are cut to `max_tokens`.

    Raises:
        ValueError: an entry is no text, or every text is empty.
    """
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{position}] must be a string, got {type(text).__name__}")
    rules = TokenRules.from_tokenizer(tokenizer)
    encoded = [list(tokenizer(text, add_special_tokens=False)["input_ids"])[:max_tokens] for text in texts]
    order = sorted((i for i, ids in enumerate(encoded) if len(ids) > 1), key=lambda i: len(encoded[i]))
    if not order:
        raise ValueError(f"none of the {len(encoded)} texts has more than one token")
    device = next(model.parameters()).device
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    for start in range(0, len(order), batch_size):
        positions = order[start : start + batch_size]
        ids, mask = pad([encoded[i] for i in positions], padding, left=False, device=device)
        with left_as_found(model), capture(model, layers) as residual:
            decoder(model)(input_ids=ids, attention_mask=mask, use_cache=False)
            residuals = {layer: residual[layer] for layer in layers}
        yield TextBatch(positions, rules.batch(ids, attention_mask=mask), residuals)
