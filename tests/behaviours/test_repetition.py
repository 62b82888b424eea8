from __future__ import annotations

import random
import time

import pytest
import torch

from qscope_monitor.behaviours import detect_repetition
from qscope_monitor.behaviours.repetition import _z_array

PROSE = (
    "The harbour was quiet when the ferry came in. Two men untied the ropes while a woman counted crates of oranges. "
    "Nobody spoke about the storm, although its traces lay everywhere: broken tiles, a boat on the road, and the old "
    "lighthouse without its lamp. Children had already found the best pieces of driftwood and built a hut between the "
    "nets. Toward noon the baker opened his door, and the smell of bread made people forget for a while. "
)


def noise(n: int, seed: int = 0, vocabulary: int = 50_000) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocabulary) for _ in range(n)]


@pytest.mark.parametrize(
    ("sentence", "period"),
    [
        ("Wait, let me check again. ", 7),
        ("Подожди, я проверю ещё раз. ", 7),
        ("让我再检查一遍。", 8),
        ("もう一度確認します。", 10),
        ("잠깐, 다시 확인해 보겠습니다. ", 6),
        ("ขอตรวจสอบอีกครั้ง ", None),
        ("ha", None),  # one endless word goes by the character
        ("the ", 1),
        ("\n", 1),
    ],
)
def test_loops_in_text(sentence: str, period: int | None) -> None:
    start = PROSE + "So: "
    text = start + sentence * 60
    result = detect_repetition(text)
    assert result.found
    assert result.kind == "repetition"
    assert result.detail["form"] == "loop"
    if period is not None:
        assert result.detail["period"] == period
    assert result.span == (len(start), len(text.rstrip() or text) if sentence != "\n" else len(text))
    assert result.onset is not None
    assert abs(result.onset - len(start) - len(sentence)) <= 1  # the second copy
    assert 0.2 < result.score < 1
    assert detect_repetition(text[:-3]).detail["form"] == "loop"  # cut off in the middle of a word


def test_loop_in_ids() -> None:
    ids = noise(100) + [7, 8, 9, 10] * 12 + [7, 8]
    result = detect_repetition(ids)
    assert result.found
    assert result.onset_token == 104
    assert result.detail["first_copy"] == 100
    assert result.detail["period"] == 4
    assert result.detail["repeats"] == 12.5
    assert result.onset is result.span is None
    assert result == detect_repetition(torch.tensor(ids))


def test_offsets() -> None:
    text = "abcd" + "xy" * 40
    ids = [1, 2, 3, 4] + [5, 6] * 40
    offsets = [(i, i + 1) for i in range(len(text))]
    result = detect_repetition(ids, offsets)
    assert (result.onset, result.onset_token, result.span) == (6, 6, (4, 84))
    words = "one two three " + "go on " * 30
    cut = [(i, i + 1) for i in range(len(words))]
    by_text = detect_repetition(words, cut)
    assert by_text.onset == by_text.onset_token == len("one two three go on ")
    with pytest.raises(ValueError, match="2 offsets for 84 tokens"):
        detect_repetition(ids, offsets[:2])


def test_loop_limits() -> None:
    unit = noise(16, seed=1)
    before = noise(64, seed=2)
    assert detect_repetition(before + unit * 3).found
    assert not detect_repetition(before + unit * 3, min_repeats=4).found
    assert not detect_repetition(before + (unit * 3)[:-1]).found  # the third copy is not complete
    assert not detect_repetition(before + unit * 2).found
    assert detect_repetition(before + [5] * 32).found
    assert not detect_repetition(before + [5] * 31).found
    assert not detect_repetition(before + unit * 3 + noise(40, seed=3)).found  # left the loop again
    assert not detect_repetition([]).found
    assert not detect_repetition("").found
    assert not detect_repetition([1]).found


def test_trailing_special_tokens() -> None:
    ids = noise(20) + [5, 6] * 20
    assert not detect_repetition([*ids, 1, 0, 0, 0]).found
    assert detect_repetition([*ids, 1, 0, 0, 0], special_ids={0, 1}).detail["period"] == 2


def test_longest_loop_with_shortest_period() -> None:
    assert detect_repetition([1, 2] * 30).detail["period"] == 2
    # the tail of ones is short, the loop around it long
    inner = ([3, 4, 5] + [1] * 10) * 5
    assert detect_repetition(inner).detail["period"] == 13


def test_loop_with_changing_numbers_and_names() -> None:
    names = [
        "Ada",
        "Bo",
        "Cy",
        "Di",
        "Ed",
        "Flo",
        "Gus",
        "Hal",
        "Ida",
        "Jo",
        "Kim",
        "Lee",
        "Mo",
        "Ned",
        "Ola",
        "Pat",
        "Quin",
        "Roy",
        "Sue",
        "Tom",
    ]
    text = PROSE + " ".join(
        f"{i}. {name} is a very good friend of mine and likes to talk." for i, name in enumerate(names)
    )
    result = detect_repetition(text)
    assert result.found
    assert result.detail["form"] == "recycled"
    assert result.detail["period"] is None
    assert result.onset is not None
    assert text.index("2. Cy") - 8 <= result.onset < text.index("4. Ed")  # the third time the frame is used


BENIGN = {
    "prose": PROSE,
    "quoted once": PROSE + "To repeat the story: " + PROSE,
    "list": "\n".join(f"- {a} {b}" for a, b in zip(noise(60), noise(60, seed=9))),
    "shopping": "Buy: " + ", ".join(f"{n} {w}" for n, w in zip(range(1, 30), PROSE.split())),
    "table": "| city | people | area |\n| --- | --- | --- |\n"
    + "\n".join(f"| {w} | {n} | {m} |" for w, n, m in zip(PROSE.split(), noise(40), noise(40, seed=4))),
    "rule": "Heading\n" + "-" * 80 + "\ntext\n" + "=" * 80,
    "wide empty table": "| a | b | c | d | e |\n|---|---|---|---|---|\n|   |   |   |   |   |",
    "code": "\n".join(f"def get_{w.strip('.,:')}(self):\n    return self._{w}" for w in PROSE.split()[:20]),
    "steps": "\n".join(f"Step {i}: {s}." for i, s in enumerate(PROSE.split(". "))),
    "chorus": "Row, row, row your boat gently down the stream. " * 2 + PROSE,
    "chinese": "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "korean": "나는 학교에 갑니다. 그는 학교에 갑니다. 우리는 시장에 갑니다. 그들은 공원에 갑니다.",
    "laughter": "That is so funny, hahahahaha!",
    "very": "It is very, very, very, very good.",
}


@pytest.mark.parametrize("name", BENIGN)
def test_benign_repetition(name: str) -> None:
    result = detect_repetition(BENIGN[name])
    assert not result.found, result
    assert result.onset is result.span is None


def test_rep_4() -> None:
    result = detect_repetition([1, 2, 3, 4, 1, 2, 3, 4])
    assert result.score == result.detail["rep_4"] == 1 - 4 / 5
    assert detect_repetition([1, 2, 3]).score == 0
    assert detect_repetition([1, 2, 1, 2], ngram=2).detail["rep_2"] == 1 - 2 / 3


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="need min_repeats >= 2"):
        detect_repetition("a", min_repeats=1)
    with pytest.raises(TypeError, match="flat sequence of token ids"):
        detect_repetition(["a", "b"])
    with pytest.raises(TypeError, match="flat sequence of token ids"):
        detect_repetition(torch.ones(2, 3, dtype=torch.long))


def test_z_array_against_its_definition() -> None:
    rng = random.Random(5)
    for _ in range(200):
        s = [rng.randrange(2) for _ in range(rng.randrange(1, 30))]
        slow = [next((k for k in range(len(s) - i) if s[k] != s[i + k]), len(s) - i) for i in range(len(s))]
        assert _z_array(s) == slow
    assert _z_array([]) == []


class Counted:
    compared = 0

    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return isinstance(other, Counted) and self.value == other.value

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("name", ["constant", "broken constant", "alternating", "fibonacci", "random"])
def test_comparisons_are_linear(name: str) -> None:
    n = 3000
    short, long = [0], [0, 1]
    while len(long) < n:
        short, long = long, long + short
    values = {
        "constant": [0] * n,
        "broken constant": ([0] * 50 + [1]) * (n // 51),
        "alternating": [0, 1] * (n // 2),
        "fibonacci": long[:n],
        "random": noise(n, vocabulary=2),
    }[name]
    Counted.compared = 0
    _z_array([Counted(v) for v in values])
    assert Counted.compared <= 2 * n


def test_length_grows_tenfold_and_time_about_as_much() -> None:
    def seconds(n: int) -> float:
        ids = noise(n // 2, vocabulary=100) + [1, 2, 3, 1, 2] * (n // 10)
        best = 1e9
        for _ in range(2):
            start = time.perf_counter()
            assert detect_repetition(ids).found
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(100_000) < 60 * seconds(10_000)  # quadratic would be a hundredfold
