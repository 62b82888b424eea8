"""What a text detector found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Behaviour:
    """What a text detector found in one text, and where it begins.

    Attributes:
        found: whether the behaviour is there.
        onset: index of the character where it begins; None when not found or when there is no text, only ids.
        onset_token: index of the token where it begins; None when not found or when the tokens are not known.
        span: first and one-past-last character of the passage that begins at the onset (for repetition: of the whole
            looping passage, its first copy included).
        score: 0 to 1, how much of the text shows it; see each detector.
        kind: "code-switching" or "repetition", the names watch lists use.
        detail: the figures behind the verdict.
    """

    found: bool
    onset: int | None
    onset_token: int | None
    span: tuple[int, int] | None
    score: float
    kind: str
    detail: dict[str, Any] = field(default_factory=dict)


def token_at(offsets: Sequence[tuple[int, int]], character: int) -> int | None:
    """Return the first token that reaches past `character`; empty spans, which special tokens have, are skipped."""
    for index, (start, end) in enumerate(offsets):
        if start < end and end > character:
            return index
    return None
