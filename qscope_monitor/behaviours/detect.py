"""The text detector that belongs to a behaviour."""

from __future__ import annotations

from qscope_monitor.behaviours.behaviour import Behaviour
from qscope_monitor.behaviours.code_switching import detect_code_switching
from qscope_monitor.behaviours.repetition import detect_repetition
from qscope_monitor.behaviours.scripts import expected_languages, scripts_of

__all__ = ["detect_text"]


def detect_text(behaviour: str, language: str | None, text: str, prompt: str) -> Behaviour | None:
    """Judge a response by its text.

    Args:
        behaviour: `code-switching` or `repetition`; for any other name there is no detector.
        language: the language switched into, for code-switching; None: any.
        text: the response.
        prompt: what it answers; a language it is written in, or asks for, may appear.

    Returns:
        The detector's verdict, or None when there is nothing to judge: no detector, or a language that is expected.
    """
    if behaviour == "code-switching":
        at_home = expected_languages(prompt)
        if language is not None and scripts_of(language) <= at_home:
            return None
        return detect_code_switching(text, expected=at_home, target=language, prompt=prompt)
    if behaviour == "repetition":
        return detect_repetition(text)
    return None
