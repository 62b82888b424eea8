"""Code-switching: letters of a script that the expected language does not use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import regex

from qscope_monitor.behaviours.behaviour import Behaviour, token_at
from qscope_monitor.behaviours.scripts import expected_languages, script_runs, scripts_of

__all__ = ["PRESETS", "detect_code_switching"]

PRESETS = ("practical", "any")

_CODE = regex.compile(
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)"  # fenced; an open fence runs to the end
    r"|``[^\n]+?``|`[^`\n]+`"
    r"|\bhttps?://[^\s<>)]+|\bwww\.[^\s<>)]+|(?<![\w.+-])[\w.+-]++@[\w-]+\.[\w.]+",
    regex.DOTALL,
)
# Pairs are matched at any length and measured afterwards, so that a closing mark is not taken for an opening one.
_QUOTED = regex.compile(
    r"\([^()\n]*\)|（[^（）\n]*）|\"[^\"\n]*\"|“[^“”\n]*”|‘[^‘’\n]*’|«[^«»\n]*»|「[^「」\n]*」|『[^『』\n]*』|《[^《》\n]*》"
)
_SHORT = 24  # characters between the marks: a name or a term, not a sentence
_SYMBOL = 2  # Greek runs up to this length are mathematics
_LATIN_INSIDE = 0.1  # Latin is tolerated in a text that holds at least this share of expected letters
_LATIN_LETTERS = 20  # and in any text with fewer Latin letters than this
_COPY = 4  # copied passages are recognised by this many characters in a row


def detect_code_switching(
    text: str,
    expected: str | Iterable[str] | None = "en",
    target: str | Iterable[str] | None = None,
    prompt: str | None = None,
    preset: str = "practical",
    offsets: Sequence[tuple[int, int]] | None = None,
    *,
    min_letters: int = 2,
    min_share: float = 0.02,
    min_run: int = 8,
) -> Behaviour:
    """Find letters of scripts that the expected languages do not use.

    Preset "any" is the published rule (SASFT, arXiv 2507.14894): a single character of a foreign script, anywhere.
    Preset "practical" leaves out what readers do not take for a switch:

    - code spans, code blocks, URLs and addresses;
    - passages of the prompt, recognised by four characters in a row (shorter words: whole);
    - names and terms of up to 24 characters in parentheses or quotation marks;
    - Greek letters standing alone or in twos (symbols);
    - Latin letters inside text of another script (product names, abbreviations), as long as at least a tenth of the
      letters is of an expected script or there are fewer than 20; unless `target` asks for Latin;

    and then wants at least `min_letters` foreign letters that either make up `min_share` of all letters counted or
    stand `min_run` together (spaces and punctuation between them do not matter).

    Args:
        text: the response.
        expected: language or languages it should be in: codes, English names, scripts; None: inferred from `prompt`.
        target: only look for this language or these; None: whatever is not expected. A target that the prompt leads to
            expect (`expected=None`) is not found.
        prompt: what the response answers; its passages may be repeated, and see `expected`.
        preset: "practical" or "any".
        offsets: `(start, end)` of each token in `text`, from the tokenizer; gives `onset_token`.
        min_letters: see above; "practical" only, as are the next two.
        min_share: share of letters.
        min_run: letters.

    Returns:
        A `Behaviour`: `onset` is the first foreign letter counted, `span` the passage it opens, `score` the share of
        foreign letters, `detail` holds `letters`, `foreign`, `longest_run`, `scripts` (letters by foreign script),
        `ignored` (foreign letters by reason) and `expected`. A text without letters has score 0.

    Raises:
        ValueError: unknown preset or language, `expected=None` without a prompt, or a target written only in scripts
            that the languages named in `expected` use.

    Example:
        >>> detect_code_switching("The answer is 四十二 because 六乘七.", expected="en").onset
        14
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {PRESETS}, got {preset!r}")
    if expected is None and prompt is None:
        raise ValueError("expected=None infers the language from the prompt: pass prompt=, or name the language")
    at_home = expected_languages(prompt or "") if expected is None else scripts_of(expected)
    wanted = None if target is None else scripts_of(target) - at_home
    if wanted is not None and not wanted and expected is not None:
        raise ValueError(
            f"target {target!r} is written in scripts that the expected languages use too: {', '.join(sorted(at_home))}"
        )
    practical = preset == "practical"
    masked = _masked(text) if practical else {}
    runs = list(script_runs(text))
    tolerated: frozenset[str] = frozenset()
    if practical and "Latin" not in at_home and (wanted is None or "Latin" not in wanted):
        tolerated = _tolerated(runs, at_home, masked)
    grams = _grams(prompt) if practical and prompt else None

    letters = 0
    ignored: Counter[str] = Counter()
    found: Counter[str] = Counter()
    passages: list[tuple[int, int, int]] = []  # (start, end, letters), apart only where other letters come between
    joined = False
    for script, start, end in runs:
        foreign = script not in at_home and (wanted is None or script in wanted)
        why = None
        if script in tolerated:
            why = "latin"
        elif practical and script == "Greek" and end - start <= _SYMBOL:
            why = "symbol"
        copied = _copied(text[start:end], grams) if foreign and why is None and grams is not None else None
        for i in range(start, end):
            reason = masked.get(i) or why or ("copied" if copied and copied[i - start] else None)
            if reason is not None and (foreign or reason == "code"):
                if foreign:
                    ignored[reason] += 1
                continue  # neither foreign nor a letter to compare with
            letters += 1
            if not foreign:
                joined = False
                continue
            found[script] += 1
            if joined:
                first, _, n = passages[-1]
                passages[-1] = (first, i + 1, n + 1)
            else:
                passages.append((i, i + 1, 1))
                joined = True
    count = found.total()
    score = count / letters if letters else 0.0
    longest = max((n for _, _, n in passages), default=0)
    enough = count >= min_letters and (score >= min_share or longest >= min_run)
    verdict = enough if practical else count > 0
    onset = passages[0][0] if verdict else None
    return Behaviour(
        found=verdict,
        onset=onset,
        onset_token=None if onset is None or offsets is None else token_at(offsets, onset),
        span=passages[0][:2] if verdict else None,
        score=score,
        kind="code-switching",
        detail={
            "letters": letters,
            "foreign": count,
            "longest_run": longest,
            "scripts": dict(found.most_common()),
            "ignored": dict(ignored),
            "expected": sorted(at_home),
        },
    )


def _masked(text: str) -> dict[int, str]:
    """Characters inside code or short quotations, with the reason."""
    masked: dict[int, str] = {}
    for match in _QUOTED.finditer(text):
        if match.end() - match.start() - 2 <= _SHORT:
            masked.update(dict.fromkeys(range(*match.span()), "quoted"))
    for match in _CODE.finditer(text):
        masked.update(dict.fromkeys(range(*match.span()), "code"))
    return masked


def _tolerated(runs: list[tuple[str, int, int]], at_home: frozenset[str], masked: dict[int, str]) -> frozenset[str]:
    """Latin, where the text around it is in the expected script."""
    counts: Counter[str] = Counter()
    for script, start, end in runs:
        counts[script] += sum(masked.get(i) != "code" for i in range(start, end))
    own = sum(counts[script] for script in at_home)
    inside = own >= _LATIN_INSIDE * counts.total()
    return frozenset({"Latin"}) if inside or counts["Latin"] < _LATIN_LETTERS else frozenset()


def _grams(prompt: str) -> set[str]:
    """All passages of up to four characters, and words, of the prompt."""
    prompt = prompt.lower()
    return {prompt[i : i + n] for n in range(1, _COPY + 1) for i in range(len(prompt) - n + 1)}


def _copied(run: str, grams: set[str]) -> list[bool]:
    """Which characters of a run are covered by passages of the prompt."""
    lowered = run.lower()
    if len(lowered) != len(run):
        lowered = run
    n = min(_COPY, len(run))
    covered = [False] * len(run)
    for i in range(len(run) - n + 1):
        if lowered[i : i + n] in grams:
            covered[i : i + n] = [True] * n
    return covered
