"""Languages and the scripts they are written in.

Script means the Unicode property `Script`. It tells Chinese from English, but not German from English, nor Chinese from
the Han characters of Japanese: a switch within one script is out of reach here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import regex

__all__ = ["LANGUAGE_SCRIPTS", "SCRIPTS", "expected_languages", "script_runs", "script_shares", "scripts_of"]

SCRIPTS = (
    *("Latin", "Han", "Hiragana", "Katakana", "Hangul", "Cyrillic", "Greek", "Armenian", "Georgian"),
    *("Arabic", "Hebrew", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Mongolian", "Ethiopic", "Devanagari"),
    *("Bengali", "Gurmukhi", "Gujarati", "Oriya", "Tamil", "Telugu", "Kannada", "Malayalam", "Sinhala"),
)

_LATIN = (
    "en de fr es it pt nl sv no nb nn da fi is ga cy ca eu gl pl cs sk sl hr bs hu ro sq et lv lt tr az vi id ms tl sw "
    "af zu xh yo ha ig so mt lb la eo uz"
)
LANGUAGE_SCRIPTS: dict[str, frozenset[str]] = {
    **{language: frozenset({"Latin"}) for language in _LATIN.split()},
    "zh": frozenset({"Han"}),
    "yue": frozenset({"Han"}),
    "ja": frozenset({"Han", "Hiragana", "Katakana"}),
    "ko": frozenset({"Hangul"}),  # Hanja are rare enough that Chinese in Korean text is worth seeing
    **{language: frozenset({"Cyrillic"}) for language in ["ru", "uk", "be", "bg", "mk", "kk", "ky", "tg", "tt", "mn"]},
    "sr": frozenset({"Cyrillic", "Latin"}),
    **{language: frozenset({"Arabic"}) for language in ["ar", "fa", "ur", "ps", "ug", "sd"]},
    **{language: frozenset({"Devanagari"}) for language in ["hi", "mr", "ne", "sa"]},
    "he": frozenset({"Hebrew"}),
    "yi": frozenset({"Hebrew"}),
    "el": frozenset({"Greek"}),
    "th": frozenset({"Thai"}),
    "lo": frozenset({"Lao"}),
    "km": frozenset({"Khmer"}),
    "my": frozenset({"Myanmar"}),
    "bo": frozenset({"Tibetan"}),
    "am": frozenset({"Ethiopic"}),
    "hy": frozenset({"Armenian"}),
    "ka": frozenset({"Georgian"}),
    "bn": frozenset({"Bengali"}),
    "pa": frozenset({"Gurmukhi"}),
    "gu": frozenset({"Gujarati"}),
    "or": frozenset({"Oriya"}),
    "ta": frozenset({"Tamil"}),
    "te": frozenset({"Telugu"}),
    "kn": frozenset({"Kannada"}),
    "ml": frozenset({"Malayalam"}),
    "si": frozenset({"Sinhala"}),
}

# How a prompt may name the language it wants; matched as a part of the lower-cased prompt.
_NAMES: dict[str, tuple[str, ...]] = {
    "en": ("english", "英语", "英文", "英語", "영어", "английск", "по-английски", "الإنجليزية", "ภาษาอังกฤษ"),
    "zh": ("chinese", "mandarin", "cantonese", "中文", "汉语", "漢語", "普通话", "中国語", "중국어", "китайск"),
    "ja": ("japanese", "日本語", "日语", "日文", "일본어", "японск"),
    "ko": ("korean", "한국어", "韩语", "韩文", "韓国語", "корейск"),
    "ru": ("russian", "русск", "俄语", "俄文", "ロシア語", "러시아어"),
    "uk": ("ukrainian", "українськ", "乌克兰语", "украинск"),
    "ar": ("arabic", "العربية", "阿拉伯语", "アラビア語", "아랍어", "арабск"),
    "fa": ("persian", "farsi", "فارسی", "波斯语"),
    "hi": ("hindi", "हिन्दी", "हिंदी", "印地语"),
    "th": ("ภาษาไทย", "泰语", "タイ語", "태국어"),
    "el": ("ελληνικά", "希腊语"),
    "he": ("hebrew", "עברית", "希伯来语"),
    "bn": ("bengali", "বাংলা"),
    "ta": ("tamil", "தமிழ்"),
}
# Names of languages that are also ordinary adjectives count only after a preposition ("Thai food", "Greek letters").
_AFTER_PREPOSITION = regex.compile(r"\b(?:in|to|into|from|speak|write|using)\s+(thai|greek|french|german|spanish)\b")
_ADJECTIVES = {"thai": "th", "greek": "el", "french": "fr", "german": "de", "spanish": "es"}

_LONG_NAMES = {
    **{"english": "en", "chinese": "zh", "japanese": "ja", "korean": "ko", "russian": "ru", "arabic": "ar"},
    **{"french": "fr", "german": "de", "spanish": "es", "thai": "th", "hindi": "hi", "greek": "el", "hebrew": "he"},
    **{"vietnamese": "vi", "italian": "it", "portuguese": "pt", "ukrainian": "uk", "turkish": "tr"},
    **{"eng": "en", "zho": "zh", "cmn": "zh", "jpn": "ja", "kor": "ko", "rus": "ru", "ara": "ar", "arb": "ar"},
    **{"fra": "fr", "deu": "de", "spa": "es", "tha": "th", "hin": "hi", "ell": "el", "heb": "he", "vie": "vi"},
    **{"ita": "it", "por": "pt", "ukr": "uk", "tur": "tr", "hani": "zh", "hang": "ko", "cyrl": "ru"},
}

# The long vowel mark is Common by Script, yet only kana use it; Bopomofo only annotates Chinese.
_ALSO = {"Katakana": "ー", "Han": r"\p{Script=Bopomofo}"}
_RUN = regex.compile(
    "|".join(rf"(?P<{name}>[\p{{Script={name}}}{_ALSO.get(name, '')}]+)" for name in SCRIPTS)
    + r"|(?P<Other>[\p{L}--[\p{Script=Common}\p{Script=Inherited}]])",
    regex.V1,
)


def script_runs(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield (script, start, end) for each run of characters of one script, in order.

    Characters of no script of their own (digits, spaces, punctuation, emoji, mathematical letters) are passed over;
    letters of a script that is not in `SCRIPTS` come as "Other".
    """
    for match in _RUN.finditer(text):
        yield match.lastgroup, match.start(), match.end()


def script_shares(text: str) -> dict[str, float]:
    """Return the share of each script in the letters of `text`, largest first; empty when there are none.

    Letters are the characters that belong to a script, vowel signs of Thai or Devanagari included.
    """
    counts: Counter[str] = Counter()
    for script, start, end in script_runs(text):
        counts[script] += end - start
    total = counts.total()
    return {script: n / total for script, n in counts.most_common()}


def scripts_of(languages: str | Iterable[str]) -> frozenset[str]:
    """Return the scripts that one or several languages are written in.

    Args:
        languages: codes (`"zh"`, `"zh-CN"`, `"zho_Hans"`), English names (`"chinese"`) or names of scripts (`"Han"`).

    Raises:
        ValueError: an unknown language, or none at all.
    """
    scripts: set[str] = set()
    for language in [languages] if isinstance(languages, str) else languages:
        if language in SCRIPTS:
            scripts.add(language)
            continue
        code = regex.split(r"[-_]", language.strip().lower())[0]
        code = _LONG_NAMES.get(code, code)
        if code not in LANGUAGE_SCRIPTS:
            raise ValueError(
                f"unknown language {language!r}; use a code such as 'en' or 'zh-CN' "
                f"({', '.join(sorted(LANGUAGE_SCRIPTS))}) or a script ({', '.join(SCRIPTS)})"
            )
        scripts |= LANGUAGE_SCRIPTS[code]
    if not scripts:
        raise ValueError("no language given")
    return frozenset(scripts)


def expected_languages(prompt: str, min_share: float = 0.1) -> frozenset[str]:
    """Infer from a prompt which scripts may appear in the answer.

    These are the prompt's own scripts, as far as they hold at least `min_share` of its letters, and those of languages
    it names ("translate into Russian"). Kana bring Han with them. A prompt without letters expects nothing in
    particular: Latin.

    Returns:
        Names of scripts, which `detect_code_switching(expected=...)` takes as they are.
    """
    scripts = {script for script, share in script_shares(prompt).items() if share >= min_share and script != "Other"}
    if scripts & {"Hiragana", "Katakana"}:
        scripts |= LANGUAGE_SCRIPTS["ja"]
    lowered = prompt.lower()
    for language, names in _NAMES.items():
        if any(name in lowered for name in names):
            scripts |= LANGUAGE_SCRIPTS[language]
    for match in _AFTER_PREPOSITION.finditer(lowered):
        scripts |= LANGUAGE_SCRIPTS[_ADJECTIVES[match.group(1)]]
    return frozenset(scripts or {"Latin"})
