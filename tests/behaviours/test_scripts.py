from __future__ import annotations

import pytest

from qscope_monitor.behaviours import LANGUAGE_SCRIPTS, SCRIPTS, expected_languages, script_shares, scripts_of


def test_every_language_has_known_scripts() -> None:
    assert all(scripts and scripts <= set(SCRIPTS) for scripts in LANGUAGE_SCRIPTS.values())


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello, wörld! Ænima", "Latin"),
        ("今天天气很好,我们去公园。", "Han"),
        ("注音ㄓㄨˋㄧㄣ", "Han"),
        ("ひらがな", "Hiragana"),
        ("コーヒー", "Katakana"),  # the long vowel mark included
        ("오늘 날씨가 좋네요", "Hangul"),
        ("Сегодня хорошая погода", "Cyrillic"),
        ("الطقس جميل اليوم", "Arabic"),
        ("วันนี้อากาศดี", "Thai"),
        ("आज मौसम अच्छा है", "Devanagari"),
        ("Καλημέρα", "Greek"),
        ("שלום עולם", "Hebrew"),
        ("আজ আবহাওয়া ভালো", "Bengali"),
        ("გამარჯობა", "Georgian"),
        ("ꆈꌠꉙ", "Other"),
    ],
)
def test_one_script(text: str, script: str) -> None:
    assert script_shares(text) == {script: 1.0}


def test_shares_of_a_mixture() -> None:
    assert script_shares("abc 中文字 де") == {"Latin": 3 / 8, "Han": 3 / 8, "Cyrillic": 2 / 8}


@pytest.mark.parametrize("text", ["", "123, 4.5 + 6 = ?", "😀 → ✓ ∑", "𝑥² + 𝑦²", "、。！"])
def test_text_without_letters(text: str) -> None:
    assert script_shares(text) == {}


@pytest.mark.parametrize("name", ["zh", "zh-CN", "zh_TW", "ZH", "zho_Hans", "cmn", "Chinese", " chinese "])
def test_names_of_a_language(name: str) -> None:
    assert scripts_of(name) == {"Han"}


def test_scripts_of_several() -> None:
    assert scripts_of(["en", "ru"]) == {"Latin", "Cyrillic"}
    assert scripts_of({"Han"}) == {"Han"}
    assert scripts_of("Han") == {"Han"}
    with pytest.raises(ValueError, match=r"unknown language 'klingon'; use a code such as 'en'"):
        scripts_of("klingon")
    with pytest.raises(ValueError, match="no language given"):
        scripts_of([])


@pytest.mark.parametrize(
    ("prompt", "scripts"),
    [
        ("What is the capital of France?", {"Latin"}),
        ("法国的首都是哪里？", {"Han"}),
        ("フランスの首都はどこですか", {"Han", "Hiragana", "Katakana"}),
        ("프랑스의 수도는 어디인가요?", {"Hangul"}),
        ("Какая столица у Франции?", {"Cyrillic"}),
        ("Translate into Russian: good morning", {"Latin", "Cyrillic"}),
        ("Write a poem in Thai about rain", {"Latin", "Thai"}),
        ("Recommend a Thai restaurant and its best dishes", {"Latin"}),
        ("请用英语回答:什么是光合作用？", {"Han", "Latin"}),
        ("Summarise in one sentence: 今天的会议讨论了三个问题。", {"Latin", "Han"}),
        ("Who wrote the long novel about a family in which the name 红 appears exactly once?", {"Latin"}),
        ("1 + 1 = ?", {"Latin"}),
        ("", {"Latin"}),
    ],
)
def test_expected_from_the_prompt(prompt: str, scripts: set[str]) -> None:
    assert expected_languages(prompt) == scripts
