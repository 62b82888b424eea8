"""Code-switching and repetition as they show in text, with the place where they begin."""

from qscope_monitor.behaviours.behaviour import Behaviour
from qscope_monitor.behaviours.code_switching import detect_code_switching
from qscope_monitor.behaviours.detect import detect_text
from qscope_monitor.behaviours.repetition import detect_repetition
from qscope_monitor.behaviours.scripts import LANGUAGE_SCRIPTS, SCRIPTS, expected_languages, script_shares, scripts_of

__all__ = [
    "LANGUAGE_SCRIPTS",
    "SCRIPTS",
    "Behaviour",
    "detect_code_switching",
    "detect_repetition",
    "detect_text",
    "expected_languages",
    "script_shares",
    "scripts_of",
]
