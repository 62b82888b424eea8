"""Which tokens count, which sequence each belongs to, and which segment (prompt, thinking, answer) it is in.

Position 0, padding and special tokens never count: sparse autoencoders were trained without the huge activations found
there. Every exclusion is counted by reason. Everything here runs on the device of `input_ids`; nothing waits for it,
with the one exception named in `TokenRules.batch`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

__all__ = ["Segment", "TokenBatch", "TokenRules", "drop_norm_outliers"]

# Chat markers that some tokenizers add without marking them special (Qwen does so with <think> and <tool_call>).
# Other added tokens are text: Gemma adds HTML tags, many tokenizers add runs of spaces.
_CONTROL = re.compile(
    r"<[|｜].*[|｜]>|</?(think|tool_call|tool_response|tools)>|<(start|end)_of_(turn|image)>|\[/?INST\]|<unused\d+>"
)


class Segment(IntEnum):
    """Where in a conversation a token stands."""

    PROMPT = 0
    THINKING = 1
    ANSWER = 2


@dataclass
class TokenBatch:
    """The tokens of one forward, and what they are.

    Attributes:
        input_ids: int64 `[batch, seq]`.
        keep: bool `[batch, seq]`, the tokens that count, of whatever segment.
        segment: int8 `[batch, seq]`, values of `Segment`; PROMPT at padding.
        sequence: int64 `[batch, seq]`, number of the sequence a token belongs to, unique over the batch; -1 at padding.
            A packed row holds several sequences.
        num_sequences: all values of `sequence` are below it. Equal to their number, except that an empty row or an
            empty packed document takes a number too.
        response: bool `[batch, seq]`, tokens the model wrote or is trained to write.
        excluded: tokens that do not count, by reason, as 0-dim tensors on the device (or ints). Each token has one
            reason, the first of "padding", "position_0", "special", "non_finite", "norm_outlier" that holds.
    """

    input_ids: Tensor
    keep: Tensor
    segment: Tensor
    sequence: Tensor
    num_sequences: int
    response: Tensor
    excluded: dict[str, int | Tensor] = field(default_factory=dict)

    def slots(self) -> Tensor:
        """[batch * seq] each token's sequence, for scatter operations; padding goes to slot `num_sequences`."""
        return torch.where(self.sequence < 0, self.num_sequences, self.sequence).flatten()


class TokenRules:
    """What a model's tokenizer says about its tokens.

    Args:
        special_ids: ids that never count: end of text, padding, chat markers.
        thinking: ids of the tokens that open and close a reasoning passage; None for models without.
    """

    def __init__(self, special_ids: Iterable[int] = (), thinking: tuple[int, int] | None = None) -> None:
        self.thinking = thinking
        self.special_ids = frozenset(int(i) for i in special_ids) | frozenset(thinking or ())
        self._special: dict[torch.device, Tensor] = {}

    def __repr__(self) -> str:
        return f"TokenRules(special_ids={sorted(self.special_ids)}, thinking={self.thinking})"

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> TokenRules:
        """Read the rules off a Hugging Face tokenizer, or a processor that holds one.

        Special are `all_special_ids` and the added tokens that are marked special or are chat markers by their form
        (`<|...|>`, `<think>`, `<tool_call>` and the like). `thinking` is set when `<think>` and `</think>` are single
        tokens.
        """
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        special = set(tokenizer.all_special_ids)
        for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
            if getattr(token, "special", False) or _CONTROL.fullmatch(str(token)):
                special.add(token_id)
        pair = [tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "</think>")]
        known = all(isinstance(i, int) and i >= 0 for i in pair)
        # An unknown token becomes the unknown-token id, hence the way back.
        known = known and tokenizer.convert_ids_to_tokens(pair) == ["<think>", "</think>"]
        return cls(special, (pair[0], pair[1]) if known else None)

    def batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
        response_mask: Tensor | None = None,
    ) -> TokenBatch:
        """Sort the tokens of one forward.

        Sequences are told apart by `cu_seq_lens`, else by `position_ids == 0`, else by rows.

        Args:
            input_ids: `[batch, seq]`, padded on either side, or packed.
            attention_mask: `[batch, seq]`, nonzero where there is a token; or a prepared 4-D mask
                `[batch or 1, heads or 1, query, key]`, bool or additive; None: no padding.
            labels: `[batch, seq]` unshifted, -100 where there is no loss; the rest is the response.
            position_ids: `[batch or 1, seq]`, or with rows for multimodal rotary positions in front. Their use costs
                the one wait for the device: the number of sequences has to be known on the host.
            cu_seq_lens: `[sequences + 1]`, boundaries in the flattened batch; tokens behind the last are padding.
            response_mask: `[batch, seq]`, nonzero at response tokens; goes before `labels`.

        Returns:
            A `TokenBatch`. Inside the response, everything from an opening to a closing thinking marker is THINKING (to
            the end of the sequence when it is never closed, and from the start of the response when the prompt ends in
            an open one), the rest is ANSWER. With neither `labels` nor `response_mask` nobody knows what is prompt:
            then the whole sequence counts as response.

        Raises:
            ValueError: a shape that does not match `input_ids`.
        """
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [batch, seq], got shape {tuple(input_ids.shape)}")
        device = input_ids.device
        valid = _valid(input_ids, attention_mask)
        for name, mask in (("labels", labels), ("response_mask", response_mask)):
            if mask is not None and mask.shape != input_ids.shape:
                raise ValueError(f"{name} has shape {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}")
        if cu_seq_lens is not None:
            valid, start, number, count = _by_boundaries(valid, cu_seq_lens.to(device))
        elif position_ids is not None:
            start = _first(valid) | (_position_zero(input_ids, position_ids.to(device)) & valid)
            number, count = _numbered(start), int(start.sum())
        else:
            start = _first(valid)
            number = torch.arange(len(input_ids), device=device)[:, None].expand_as(input_ids)
            count = len(input_ids)
        if response_mask is not None:
            response = (response_mask.to(device) != 0) & valid
        elif labels is not None:
            response = (labels.to(device) != -100) & valid
        else:
            response = valid.clone()
        special = torch.isin(input_ids, self._special_on(device)) & valid & ~start
        inside = self._thinking(input_ids, start)
        segment = torch.full_like(input_ids, Segment.ANSWER, dtype=torch.int8)
        segment = segment.masked_fill(inside, Segment.THINKING).masked_fill(~response, Segment.PROMPT)
        return TokenBatch(
            input_ids=input_ids,
            keep=valid & ~start & ~special,
            segment=segment,
            sequence=number.masked_fill(~valid, -1),
            num_sequences=count,
            response=response,
            excluded={"padding": (~valid).sum(), "position_0": start.sum(), "special": special.sum()},
        )

    def _special_on(self, device: torch.device) -> Tensor:
        if device not in self._special:
            self._special[device] = torch.tensor(sorted(self.special_ids), dtype=torch.int64, device=device)
        return self._special[device]

    def _thinking(self, input_ids: Tensor, start: Tensor) -> Tensor:
        """Whether the last thinking marker up to each token, in the token's own sequence, is an opening one."""
        if self.thinking is None:
            return torch.zeros_like(start)
        opening, closing = self.thinking
        ids = input_ids.flatten()
        place = torch.arange(ids.numel(), device=ids.device)
        last_open, last_close, begin = (
            torch.where(here, place, -1).cummax(0).values for here in (ids == opening, ids == closing, start.flatten())
        )
        return ((last_open > last_close) & (last_open >= begin) & (last_open >= 0)).view_as(input_ids)


def _valid(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Whether each token is one, and not padding: bool `[batch, seq]`."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    mask = attention_mask.to(input_ids.device)
    batch, seq = input_ids.shape
    if mask.shape == input_ids.shape:
        return mask != 0
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[-2] != seq or mask.shape[-1] < seq:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}")
    mask = mask[:, 0, :, -seq:]  # [batch, query, key]
    allowed = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
    # A token sees itself, padding does not, except that rows of left padding, which may see nothing, are sometimes
    # made to see everything (older transformers with SDPA). No causal row but the last sees everything.
    sees_all = allowed.all(-1)
    sees_all[:, -1] = False
    return (allowed.diagonal(dim1=-2, dim2=-1) & ~sees_all).expand(batch, seq)


def _first(valid: Tensor) -> Tensor:
    """Mark the first token of each row that is not padding."""
    return valid & (valid.cumsum(-1) == 1)


def _position_zero(input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Where a sequence starts by its positions; padding, which may be given position 0 too, is the caller's to mask."""
    if position_ids.ndim == 3:
        axes, position_ids = len(position_ids), position_ids[0]  # four rows: text, time, height, width; three: no text
    else:
        axes = 1
    if position_ids.ndim == 1:
        position_ids = position_ids[None]
    if position_ids.shape[-1] != input_ids.shape[-1] or len(position_ids) not in (1, len(input_ids)):
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}, input_ids {tuple(input_ids.shape)}")
    zero = position_ids == 0
    if axes == 3:  # all patches of an image share one time: only the first of several zeros starts a sequence
        zero = zero & ~torch.nn.functional.pad(zero[:, :-1], (1, 0))
    return zero.expand_as(input_ids)


def _numbered(start: Tensor) -> Tensor:
    return start.flatten().cumsum(0).view_as(start) - 1


def _by_boundaries(valid: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Sequences from cumulative lengths over the flattened batch: (valid, start, number, upper bound of numbers)."""
    total = valid.numel()
    bounds = bounds.long().flatten()
    begins = torch.zeros(total + 1, dtype=torch.bool, device=valid.device)
    begins[bounds.clamp(0, total)] = True  # the end is a boundary too: what lies behind it is padding
    place = torch.arange(total, device=valid.device)
    valid = valid & (place < bounds[-1]).view_as(valid)
    start = begins[:total].view_as(valid) & valid
    start = start | _first(valid)  # no sequence crosses rows
    return valid, start, _numbered(start), bounds.numel() - 1 + len(valid) - 1


@torch.no_grad()
def drop_norm_outliers(batch: TokenBatch, residual: Tensor, factor: float = 6.0) -> TokenBatch:
    """Leave out tokens whose residual is far longer than usual: attention sinks in the middle of a sequence.

    Args:
        batch: the tokens.
        residual: `[batch, seq, d_model]`, any floating dtype.
        factor: tokens whose norm exceeds `factor` times the median norm of the tokens kept so far are left out.

    Returns:
        A new `TokenBatch`. `excluded` gains "norm_outlier" and "non_finite" (a NaN or infinity in the residual), added
        to what is there, so that several layers may be checked in turn.

    Raises:
        ValueError: shapes that do not match, or a factor of at most 1.
    """
    if residual.shape[:-1] != batch.keep.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, tokens {tuple(batch.keep.shape)}")
    if not factor > 1:
        raise ValueError(f"factor must exceed 1, got {factor}")
    keep = batch.keep.to(residual.device)
    finite = residual.isfinite().all(-1)
    norm = torch.linalg.vector_norm(residual, dim=-1, dtype=torch.float32)  # [batch, seq]
    # nanmedian over a masked copy: boolean indexing would wait for the device
    median = norm.masked_fill(~(keep & finite), float("nan")).nanmedian()
    outlier = keep & finite & (norm > factor * median)
    broken = keep & ~finite
    excluded = dict(batch.excluded)
    for reason, where in (("non_finite", broken), ("norm_outlier", outlier)):
        excluded[reason] = excluded.get(reason, 0) + where.sum()
    return replace(batch, keep=keep & ~outlier & ~broken, excluded=excluded)
