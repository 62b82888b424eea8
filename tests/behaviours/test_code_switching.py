from __future__ import annotations

import pytest

from qscope_monitor.behaviours import detect_code_switching

ENGLISH = "The capital of France is Paris, and it has been the seat of government for centuries. "


@pytest.mark.parametrize("preset", ["practical", "any"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ENGLISH, "en"),
        ("Die Hauptstadt Frankreichs ist Paris, und zwar schon länger.", "en"),  # one script: out of reach
        ("法国的首都是巴黎。", "zh"),
        ("フランスの首都はパリです。", "ja"),
        ("프랑스의 수도는 파리입니다.", "ko"),
        ("Столица Франции — Париж.", "ru"),
        ("عاصمة فرنسا هي باريس.", "ar"),
        ("เมืองหลวงของฝรั่งเศสคือปารีส", "th"),
        ("फ्रांस की राजधानी पेरिस है।", "hi"),
        ("Η πρωτεύουσα της Γαλλίας είναι το Παρίσι.", "el"),
        ("", "en"),
        ("42 → 43 😀 ✓", "en"),
    ],
)
def test_pure_text(text: str, expected: str, preset: str) -> None:
    result = detect_code_switching(text, expected, preset=preset)
    assert not result.found
    assert result.onset is result.span is result.onset_token is None
    assert result.score == 0
    assert result.kind == "code-switching"


@pytest.mark.parametrize(
    ("text", "expected", "foreign"),
    [
        ("The answer is 四十二, as computed above.", "en", "四十二"),
        ("We first note that the function непрерывна on the interval.", "en", "непрерывна"),
        ("The result is 정답입니다 and nothing else.", "en", "정답입니다"),
        ("오늘은 날씨가 좋아서 我们去公园 산책했습니다.", "ko", "我们去公园"),
        ("答案是 정답입니다，谢谢大家。", "zh", "정답입니다"),
        ("我觉得これはとても好看。", "zh", "これはとても"),
        ("Ответ таков: 因为温度太低, вода замёрзла.", "ru", "因为温度太低"),
        ("الإجابة هي 四十二 كما رأينا في السؤال.", "ar", "四十二"),
        ("คำตอบคือ потому что มันเย็นมาก", "th", "потому что"),
        ("The temple เป็นวัด is old and quiet.", "en", "เป็นวัด"),
        ("The festival उत्सव is held each spring in the old town.", "en", "उत्सव"),
    ],
)
def test_switches_with_their_place(text: str, expected: str, foreign: str) -> None:
    for preset in ("practical", "any"):
        result = detect_code_switching(text, expected, preset=preset)
        assert result.found
        assert result.span is not None
        assert text[slice(*result.span)] == foreign
        assert result.onset == text.index(foreign)
        assert 0 < result.score < 1


def test_score_is_the_share_of_foreign_letters() -> None:
    result = detect_code_switching("abc 中文 d", "en")
    assert result.score == 2 / 6
    assert result.detail["scripts"] == {"Han": 2}
    assert detect_code_switching("中文", "en").score == 1


def test_passage_ends_at_the_next_letter_of_home() -> None:
    text = "First 今天，天气 很好！ then English, 再见 again."
    result = detect_code_switching(text, "en")
    assert text[slice(*result.span)] == "今天，天气 很好"
    assert result.detail["longest_run"] == 6
    assert result.detail["foreign"] == 8


def test_any_is_one_character_anywhere() -> None:
    text = ENGLISH * 20 + "Paris is 大 (see `中文`)."
    assert detect_code_switching(text, "en", preset="any").found
    assert not detect_code_switching(text, "en").found
    only_code = "Print `中文` now."
    assert detect_code_switching(only_code, "en", preset="any").onset == only_code.index("中")


def test_limits_of_practical() -> None:
    words = "letter " * 49  # 294 letters
    assert not detect_code_switching(words + "中文", "en").found  # 2 of 296: 0.7 %
    assert detect_code_switching(words + "中文", "en", min_share=0.005).found
    assert detect_code_switching(words + "中文字和词语", "en").found  # 6 of 300: 2 %
    assert not detect_code_switching(words + "中文字和词", "en").found  # 5 of 299
    assert not detect_code_switching("abc 中", "en").found  # one letter
    assert detect_code_switching("abc 中", "en", min_letters=1).found
    sentence = words * 10 + "所以答案是四十二"  # eight together count in a text of any length
    assert detect_code_switching(sentence, "en").found
    assert not detect_code_switching(sentence, "en", min_run=9).found


@pytest.mark.parametrize(
    "text",
    [
        "Use `print('你好世界')` to greet.",
        "Use this:\n```python\n# 打印问候语\nprint('你好世界')\n```\nand run it.",
        "An open block:\n```\n打印问候语，然后结束程序",
        "~~~\nпривет, мир\n~~~\nThat is all.",
        "See https://example.org/wiki/中华人民共和国 for more.",
        "Beijing (北京) and Tokyo (東京) are capitals.",
        "The word “привет” means hello, and «спасибо» thanks.",
        'The character "永" has eight strokes; the book 《红楼梦》 is a novel.',
        "The change Δx is small, α = 0.05 and Σ is the sum of μ.",
        "¯\\_(ツ)_/¯ who knows",
    ],
)
def test_what_practical_leaves_out(text: str) -> None:
    result = detect_code_switching(text, "en")
    assert not result.found, result
    assert result.detail["ignored"] or "ツ" in text
    assert detect_code_switching(text, "en", preset="any").found


@pytest.mark.parametrize(
    "text",
    [
        "He said (我们今天不去公园了因为外面下雨而且很冷所以大家都在家里休息看书喝茶聊天).",  # a sentence, no name
        'A long quotation "that goes on for quite a while, longer than any name" 我们走吧 "and another one".',
        "An apostrophe doesn't open 我们走吧 a quotation, it's plain.",
        "Greek words such as Καλημέρα count.",
        "Code `x` then 我们走吧 and `y`.",
    ],
)
def test_what_practical_still_sees(text: str) -> None:
    assert detect_code_switching(text, "en").found


def test_passages_of_the_prompt() -> None:
    prompt = "What does 今天天气很好 mean, and what is Москва?"
    copied = "The phrase 今天天气很好 means that the weather is nice, and Москва is Moscow."
    assert detect_code_switching(copied, "en").found
    result = detect_code_switching(copied, "en", prompt=prompt)
    assert not result.found
    assert result.detail["ignored"] == {"copied": 12}
    more = copied + " 我们去公园吧"
    found = detect_code_switching(more, "en", prompt=prompt)
    assert found.onset == more.index("我们")
    assert not detect_code_switching("In short, москва.", "en", prompt=prompt).found  # case does not matter
    part = detect_code_switching("The words 天气很好 say so, and 今天天气很好所以走吧.", "en", prompt=prompt)
    assert part.detail["scripts"] == {"Han": 4}


def test_latin_inside_other_scripts() -> None:
    assert not detect_code_switching("我用 Python 和 PyTorch 训练 Transformer 模型。", "zh").found
    assert not detect_code_switching("Установите Docker и запустите nginx.", "ru").found
    assert not detect_code_switching("애플의 iPhone 15 Pro 모델", "ko").found
    assert not detect_code_switching("Python", "zh").found  # short answers of one name
    english = "Sure, here is what I found about the weather in Beijing: it is cold. 好"
    assert detect_code_switching(english, "zh").found  # nothing Chinese left around it
    asked = detect_code_switching("我用 Python 训练模型", "zh", target="en")
    assert asked.found
    assert asked.onset == 3
    assert detect_code_switching("我用 Python", "zh", preset="any").found


def test_target_looks_for_one_language() -> None:
    text = "Hello привет and 你好吗 to you all."
    assert detect_code_switching(text, "en", target="zh").onset == text.index("你")
    assert detect_code_switching(text, "en", target="ru").onset == text.index("п")
    assert not detect_code_switching(text, "en", target="ko").found
    assert detect_code_switching(text, "en", target=["ko", "zh"]).detail["scripts"] == {"Han": 3}
    assert not detect_code_switching(text, ["en", "zh", "ru"]).found


def test_published_rule_with_its_source_languages() -> None:
    # zh from ar, th, vi; ru from ar, th, ko; ko from zh, th, ja
    for expected, target, text in [
        ("vi", "zh", "Xin chào 你, tôi là trợ lý."),
        ("ko", "ru", "안녕하세요 и 반갑습니다."),
        ("ja", "ko", "こんにちは네、元気ですか。"),
    ]:
        assert detect_code_switching(text, expected, target, preset="any").found


def test_expected_from_the_prompt() -> None:
    assert not detect_code_switching("你好，世界", None, prompt="Translate to Chinese: hello, world").found
    assert detect_code_switching("你好，世界", None, prompt="Say hello to the world").found
    # the target is what the prompt asks for
    assert not detect_code_switching("你好，世界", None, target="zh", prompt="怎么说 hello？").found


def test_onset_token() -> None:
    text = "ab 中文 c"
    # byte-level tokens: a special token with an empty span, then 中 in two pieces
    offsets = [(0, 0), (0, 2), (2, 4), (3, 4), (4, 5), (5, 7), (7, 7)]
    assert detect_code_switching(text, "en", offsets=offsets).onset_token == 2
    assert detect_code_switching("ab c", "en", offsets=offsets).onset_token is None


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of .*'strict'"):
        detect_code_switching("a", preset="strict")
    with pytest.raises(ValueError, match="pass prompt="):
        detect_code_switching("a", expected=None)
    with pytest.raises(ValueError, match="scripts that the expected languages use too: Han, Hiragana, Katakana"):
        detect_code_switching("a", expected="ja", target="zh-Hani")


def test_long_text_is_linear_enough() -> None:
    text = (ENGLISH + "我们走吧 (привет) `код` ") * 1000
    result = detect_code_switching(text, "en", prompt=text)
    assert result.detail["ignored"]["quoted"] == 6000


def test_long_runs_without_a_space_take_linear_time() -> None:
    import time

    def seconds(length: int) -> float:
        begun = time.perf_counter()
        for run in ("a", "哈"):
            detect_code_switching(run * length, expected="en")
        return time.perf_counter() - begun

    seconds(1000)
    assert seconds(80_000) < 40 * max(seconds(8_000), 0.005)  # quadratic would be a hundred times
