"""Repetition: endless loops at the end of a text, and n-grams used over and over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from operator import index
from typing import Any

import regex

from qscope_monitor.behaviours.behaviour import Behaviour, token_at

__all__ = ["detect_repetition"]

# What text is cut into. Scripts written without spaces go by the character, as do words and blanks too long to be any.
_UNIT = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
    r"|[\p{L}\p{M}\p{N}_]+"
    r"|\s{16,}"
    r"|([^\s\p{L}\p{N}])\1*"  # a rule of dashes is one unit
)
_LONG_WORD = 32
_LONG_RULE = 120


def detect_repetition(
    text_or_ids: str | Sequence[int] | Any,
    offsets: Sequence[tuple[int, int]] | None = None,
    *,
    special_ids: Collection[int] = (),
    min_repeats: int = 3,
    min_tokens: int = 32,
    ngram: int = 4,
    window: int = 128,
    max_recycled: float = 0.6,
) -> Behaviour:
    """Find an endless loop at the end, or a passage made of n-grams used over and over.

    A loop is a passage repeated word for word at least `min_repeats` times, up to the end (the last copy may be cut
    short), over at least `min_tokens` tokens. A loop with changing numbers or names ("1. X 2. X") is no loop in that
    sense; it shows as recycled n-grams: within some window at least `max_recycled` of the n-grams occur for the third
    time or more. Quoting a passage once, lists, tables and code with a common frame stay below that.

    Time and memory are linear in the length.

    Args:
        text_or_ids: text, cut into words (characters where words are not spaced); or token ids, a sequence or 1-D
            tensor, taken as they are.
        offsets: `(start, end)` of each token in the text. With text it gives `onset_token`, with ids `onset` and
            `span`.
        special_ids: with ids: trailing ones (end of text, padding) are taken off first.
        min_repeats: copies a loop needs, the first included.
        min_tokens: tokens it needs to cover, the first copy included.
        ngram: length of the n-grams counted.
        window: tokens over which the share of recycled n-grams is taken; shorter texts count whole, from half of it.
        max_recycled: the share from which a window is recycled.

    Returns:
        A `Behaviour`. `onset` is the first token of the second copy (or the first recycled n-gram of the first recycled
        window): what comes before could be ordinary text. `score` is the share of n-grams that occurred before
        (rep-4). `detail` holds `form` ("loop", "recycled" or None), `period` and `repeats` of the loop, `first_copy`
        (where it begins, in tokens), `rep_4` (named by `ngram`), `recycled` (highest window share) and `tokens`.
        For text, tokens here are words.

    Raises:
        ValueError: a limit that makes no sense.
        TypeError: neither text nor token ids.

    Example:
        >>> detect_repetition("Let me think. " + "Wait, let me check again. " * 20).detail["period"]
        7
    """
    if min_repeats < 2 or min_tokens < 1 or ngram < 1 or window < ngram:
        raise ValueError(
            f"need min_repeats >= 2, min_tokens >= 1, ngram >= 1 and window >= ngram, got {min_repeats}, {min_tokens}, "
            f"{ngram}, {window}"
        )
    places: Sequence[tuple[int, int]] | None
    if isinstance(text_or_ids, str):
        places = _units(text_or_ids)
        units = _numbered([text_or_ids[start:end] for start, end in places])
    else:
        units, places = _ids(text_or_ids, special_ids), offsets
        if offsets is not None and len(offsets) < len(units):
            raise ValueError(f"{len(offsets)} offsets for {len(units)} tokens")
    n = len(units)
    start, period = _tail_loop(units, min_repeats, min_tokens)
    stop = n
    if period == 0 and isinstance(text_or_ids, str) and n:
        start, period = _tail_loop(units[:-1], min_repeats, min_tokens)  # the last word may be cut in two
        stop = n - 1
    rep, recycled, at = _recycled(units, ngram, window, max_recycled)
    form: str | None = None
    onset_unit: int | None = None
    first = None
    if period:
        form, first, onset_unit = "loop", start, start + period
    elif at is not None:
        form, first, onset_unit = "recycled", at, at
    onset = span = onset_token = None
    if onset_unit is not None and first is not None:
        if places is not None:
            onset = places[onset_unit][0]
            last = stop if form == "loop" else min(at + window, n) if at is not None else n
            span = (places[first][0], places[last - 1][1])
        if not isinstance(text_or_ids, str):
            onset_token = onset_unit
        elif offsets is not None and onset is not None:
            onset_token = token_at(offsets, onset)
    return Behaviour(
        found=form is not None,
        onset=onset,
        onset_token=onset_token,
        span=span,
        score=rep,
        kind="repetition",
        detail={
            "form": form,
            "period": period or None,
            "repeats": (stop - start) / period if period else None,
            "first_copy": first,
            f"rep_{ngram}": rep,
            "recycled": recycled,
            "tokens": n,
        },
    )


def _ids(ids: Any, special_ids: Collection[int]) -> list[int]:
    try:
        ids = [index(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError:
        raise TypeError(f"expected text or a flat sequence of token ids, got {type(ids).__name__}") from None
    special = frozenset(special_ids)
    while ids and ids[-1] in special:
        ids.pop()
    return ids


def _units(text: str) -> list[tuple[int, int]]:
    """Cut text into words, single characters of unspaced scripts and runs of one punctuation mark: (start, end)."""
    places: list[tuple[int, int]] = []
    for match in _UNIT.finditer(text):
        start, end = match.span()
        is_mark = match.group(1) is not None
        if end - start > (_LONG_RULE if is_mark else _LONG_WORD) or text[start].isspace():
            places.extend((i, i + 1) for i in range(start, end))
        else:
            places.append((start, end))
    return places


def _numbered(words: list[str]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(word, len(numbers)) for word in words]


def _z_array(sequence: Sequence[Any]) -> list[int]:
    """Length of the longest common prefix of the sequence and each of its suffixes (Z algorithm, linear time)."""
    n = len(sequence)
    z = [n] + [0] * (n - 1) if n else []
    left = right = 0  # the matching segment found so far that reaches furthest right
    for i in range(1, n):
        k = min(right - i, z[i - left]) if i < right else 0
        while i + k < n and sequence[k] == sequence[i + k]:
            k += 1
        z[i] = k
        if i + k > right:
            left, right = i, i + k
    return z


def _tail_loop(units: Sequence[int], min_repeats: int, min_tokens: int) -> tuple[int, int]:
    """(start, period) of the longest loop that runs to the end; period 0 where there is none."""
    n = len(units)
    z = _z_array(units[::-1])
    start, period = n, 0
    for p in range(1, n // min_repeats + 1):
        covered = z[p] + p  # a tail of this length has period p
        # A multiple of the period covers the same tail: only a longer tail replaces the shortest period.
        if covered >= min_repeats * p and covered >= min_tokens and n - covered < start:
            start, period = n - covered, p
    return start, period


def _recycled(units: Sequence[int], ngram: int, window: int, limit: float) -> tuple[float, float, int | None]:
    """Share of n-grams seen before; highest window share of those seen twice before; the first in a recycled window."""
    grams = [tuple(units[i : i + ngram]) for i in range(len(units) - ngram + 1)]
    if not grams:
        return 0.0, 0.0, None
    seen: Counter[tuple[int, ...]] = Counter()
    thrice: list[int] = []
    for gram in grams:
        thrice.append(seen[gram] >= 2)
        seen[gram] += 1
    rep = 1 - len(seen) / len(grams)
    width = min(window, len(grams))
    if width < window // 2:
        return rep, 0.0, None
    best, first = 0.0, None
    inside = sum(thrice[:width])
    for i in range(len(grams) - width + 1):
        if i:
            inside += thrice[i + width - 1] - thrice[i - 1]
        best = max(best, inside / width)
        if first is None and inside >= limit * width:
            first = next(j for j in range(i, i + width) if thrice[j])
    return rep, best, first
