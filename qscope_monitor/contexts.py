"""The responses shown with an alert, decoded token by token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qscope_monitor.alerts import TokenContext
from qscope_monitor.tokens import TokenBatch

CONTEXTS = 3  # responses shown with an alert
_LONGEST_CHARACTER = 8  # byte-level tokens joined at most before giving up on a character


@dataclass
class Candidate:
    """A response that may be shown; it stays on the device until an alert is raised.

    Attributes:
        key: number of the behaviour.
        score: [] its response score.
        input_ids: [seq] its row of the batch.
        shown: [seq] bool, the tokens of the response.
        prompt: [seq] bool, the tokens of its prompt.
        margins: [seq] margin of each token.
        by_text: the text detector found it, not the read-outs.
    """

    key: int
    score: Tensor
    input_ids: Tensor
    shown: Tensor
    prompt: Tensor
    margins: Tensor
    by_text: bool


def make_candidate(
    tokens: TokenBatch, margins: Tensor, key: int, sequence: Tensor, score: Tensor, *, by_text: bool
) -> Candidate:
    """Pick one sequence out of a batch without waiting for the device.

    Args:
        tokens: the batch.
        margins: [batch, seq, keys].
        key: number of the behaviour.
        sequence: [] number of the sequence.
        score: [] its response score.
        by_text: see `Candidate`.
    """
    own = tokens.sequence == sequence  # [batch, seq]
    row = own.any(1).int().argmax()[None]

    def pick(values: Tensor) -> Tensor:
        return values.index_select(0, row)[0]

    response = pick(tokens.response)
    return Candidate(
        key, score, pick(tokens.input_ids), pick(own) & response, pick(own) & ~response, pick(margins)[:, key], by_text
    )


def show_contexts(candidates: Iterable[Candidate], key: int, tokenizer: Any, *, by_text: bool) -> list[TokenContext]:
    """The highest-scoring candidates of one behaviour, of the kind asked for; none without a tokenizer."""
    if tokenizer is None:
        return []
    scored = [(float(c.score), c) for c in candidates if c.key == key and c.by_text == by_text]
    scored = sorted((c for c in scored if c[0] > 0), key=lambda c: -c[0])[:CONTEXTS]
    contexts = []
    for score, candidate in scored:
        ids = candidate.input_ids[candidate.shown].tolist()
        tokens, margins = token_pieces(tokenizer, ids, candidate.margins[candidate.shown].tolist())
        prompt = tokenizer.decode(candidate.input_ids[candidate.prompt].tolist())
        contexts.append(TokenContext(tuple(tokens), tuple(margins), score, prompt))
    return contexts


def token_pieces(tokenizer: Any, ids: list[int], margins: list[float]) -> tuple[list[str], list[float]]:
    """Tokens as readable text with their margins.

    Byte-level tokens that only together make a character are joined into one piece, with the highest margin.
    """
    pieces: list[str] = []
    values: list[float] = []
    pending: list[int] = []
    highest = 0.0
    for position, (token, margin) in enumerate(zip(ids, margins, strict=True)):
        pending.append(token)
        highest = max(highest, margin)
        text = tokenizer.decode(pending)
        last = position == len(ids) - 1
        if "\N{REPLACEMENT CHARACTER}" in text and len(pending) < _LONGEST_CHARACTER and not last:
            continue
        pieces.append(text)
        values.append(round(highest, 4))
        pending, highest = [], 0.0
    return pieces, values
