"""What a direction does to the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qscope_monitor.residual import decoder


@torch.no_grad()
def promoted_tokens(model: Any, tokenizer: Any, direction: Tensor, limit: int = 8) -> tuple[str, ...]:
    """Tokens whose logits a residual-stream direction [d_model] raises most, as text.

    The direction is read through the final norm's gain and the unembedding (the logit lens), so this is most faithful
    for late layers. Byte-level tokens that are no text by themselves are left out. Empty when the model has no output
    embeddings.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is None:
        return ()
    weight = head.weight.float()  # [vocabulary, d_model]
    direction = direction.float().to(weight.device)
    gain = getattr(getattr(decoder(model), "norm", None), "weight", None)
    if gain is not None:
        direction = direction * gain.float()
    order = (weight @ direction).topk(min(4 * limit, len(weight))).indices.tolist()
    texts = (tokenizer.decode([token]) for token in order)
    return tuple(t for t in texts if t.strip() and "\N{REPLACEMENT CHARACTER}" not in t)[:limit]
