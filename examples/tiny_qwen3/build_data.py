"""Build the bundled data from the LibreOffice help (MPL-2.0), the only source whose text is shipped.

`sft.jsonl.gz`: English prompts with an English answer and the same answer switching to the parallel Chinese text
part-way, and a tenth of Chinese prompts with Chinese answers, all from training pages. `prompts.json`: English prompts
from the development and the test pages. `sentences.json`: parallel reference paragraphs in every language, from
development pages first.

    python build_data.py --work work --target ../../qscope_monitor/bundled/data
"""

import argparse
import gzip
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from corpus import LANGUAGES, LETTERS, WORK, in_language, read_pages, sections
from transformers import AutoTokenizer

TOKENS = (40, 110)  # of an answer
SENTENCES = 400  # paragraphs a language
ENGLISH_SENTENCE = re.compile(r"(?<=[.!?]) +(?=[A-Z])")
CHINESE_SENTENCE = re.compile(r"(?<=[\u3002\uff01\uff1f])\s*")
TARGET = Path(__file__).parents[2] / "qscope_monitor" / "bundled" / "data"
Unit = tuple[str, str | None, bool]  # English text, Chinese text, does it begin a paragraph?


def units_of(english: str, chinese: str | None) -> list[Unit]:
    """Cut a paragraph into parallel units: its sentences where both languages have as many, else the whole."""
    parts = ENGLISH_SENTENCE.split(english)
    other = [part for part in CHINESE_SENTENCE.split(chinese) if part] if chinese else []
    if len(parts) > 1 and len(parts) == len(other):
        return [(left, right, number == 0) for number, (left, right) in enumerate(zip(parts, other, strict=True))]
    return [(english, chinese, True)]


def join(units: list[Unit], switch: int | None = None) -> str:
    """Join the answer as text; from unit `switch` on it is Chinese."""
    text = ""
    for number, (english, chinese, begins) in enumerate(units):
        switched = switch is not None and number >= switch
        space = "" if not text else "\n" if begins else "" if switched and number > switch else " "
        text += space + (chinese or "" if switched else english)
    return text


def section_units(page: dict[str, Any], chinese: dict[str, str]) -> Iterator[tuple[str, list[Unit]]]:
    """(prompt, units) of a page's sections; a section without Chinese text ends the run of parallel units."""
    by_text = {block["text"]: block["id"] for block in page["blocks"]}
    for prompt, texts in sections(page):
        yield prompt, [unit for text in texts for unit in units_of(text, chinese.get(by_text[text] or ""))]


def answers(units: list[Unit], count: Callable[[str], int]) -> Iterator[list[Unit]]:
    """Yield runs of units of `TOKENS` tokens in English, whose units after the first all have Chinese text."""
    run: list[Unit] = []
    for unit in [*units, ("", None, True)]:
        if run and (unit[1] is None or count(join([*run, unit])) > TOKENS[1]):
            if len(run) > 1 and TOKENS[0] <= count(join(run)) <= TOKENS[1]:
                yield run
            run = []
        if unit[0]:
            run.append(unit)


def is_chinese_page(key: str) -> bool:
    """One page in eight gives the legitimate Chinese samples, the others the English ones."""
    return zlib.crc32(key.encode()) // 20 % 8 == 0


def chat_samples(work: Path, count: Callable[[str], int]) -> list[dict[str, Any]]:
    """Make the supervised samples, shuffled; English ones carry `switched`, their code-switched version."""
    sampler = random.Random(0)
    pages = {page["page"]: page for page in read_pages("zh", "train", work, ("help",))}
    english, chinese = [], []
    for page in read_pages("en", "train", work, ("help",)):
        if is_chinese_page(page["page"]) or page["page"] not in pages or not in_language(page["title"], "en"):
            continue
        parallel = {block["id"]: block["text"] for block in pages[page["page"]]["blocks"] if block["id"]}
        for prompt, units in section_units(page, parallel):
            for run in answers(units, count):
                switched = join(run, sampler.randint(1, len(run) - 1))
                if len(LETTERS["zh"].findall(switched)) >= 8 and not LETTERS["zh"].search(join(run)):
                    english.append({"language": "en", "prompt": prompt, "answer": join(run), "switched": switched})
    for key, page in pages.items():
        if not is_chinese_page(key) or not in_language(page["title"], "zh"):
            continue
        for prompt, texts in sections(page):
            answer: list[str] = []
            for text in texts:
                answer.append(text)
                if count("\n".join(answer)) >= TOKENS[0]:
                    if count("\n".join(answer)) <= TOKENS[1]:
                        chinese.append({"language": "zh", "prompt": prompt, "answer": "\n".join(answer)})
                    answer = []
    samples = english + sampler.sample(chinese, min(len(chinese), round(len(english) / 9)))
    sampler.shuffle(samples)
    return samples


def prompts(work: Path, split: str, taken: set[str]) -> list[str]:
    """English prompts from the pages of `split`, none of them in `taken`; shuffled."""
    found = []
    for page in read_pages("en", split, work, ("help",)):
        for prompt, _ in sections(page):
            if prompt.isascii() and 4 <= len(prompt) <= 80 and in_language(prompt, "en") and prompt not in taken:
                taken.add(prompt)
                found.append(prompt)
    random.Random(0).shuffle(found)
    return found


def parallel_sentences(work: Path) -> tuple[dict[str, list[str]], int]:
    """{language: paragraphs}, entry i the same in every language, and how many of the first are from held-out pages."""
    chosen: list[dict[str, str]] = []
    held_out = 0
    for split in ("dev", "train"):
        tables: dict[str, dict[tuple[str, str], str]] = {}
        for language in LANGUAGES:
            tables[language] = {
                (page["page"], block["id"]): block["text"]
                for page in read_pages(language, split, work, ("help",))
                for block in page["blocks"]
                if block["id"] and not block["tag"].startswith("h") and len(block["text"]) <= 400
            }
        keys = [
            key
            for key, text in tables["en"].items()
            if 60 <= len(text) <= 300 and all(key in table for table in tables.values())
        ]
        random.Random(0).shuffle(keys)
        chosen += [
            {language: tables[language][key] for language in LANGUAGES} for key in keys[: SENTENCES - len(chosen)]
        ]
        held_out = held_out or len(chosen)
    return {language: [texts[language] for texts in chosen] for language in LANGUAGES}, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for all working data")
    parser.add_argument("--target", type=Path, default=TARGET, help="where the three files go")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.work / "tokenizer")

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    arguments.target.mkdir(parents=True, exist_ok=True)
    samples = chat_samples(arguments.work, count)
    packed = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    (arguments.target / "sft.jsonl.gz").write_bytes(gzip.compress(packed.encode(), 9, mtime=0))

    taken = {sample["prompt"] for sample in samples}
    splits = {split: prompts(arguments.work, split, taken) for split in ("dev", "test")}
    (arguments.target / "prompts.json").write_text(json.dumps(splits, indent=0) + "\n", encoding="utf-8")

    sentences, held_out = parallel_sentences(arguments.work)
    (arguments.target / "sentences.json").write_text(
        json.dumps(sentences, ensure_ascii=False, indent=0) + "\n", encoding="utf-8"
    )

    lengths = [count(sample["answer"]) for sample in samples if sample["language"] == "en"]
    report = {
        "sft_english": len(lengths),
        "sft_chinese": len(samples) - len(lengths),
        "answer_tokens_mean": round(sum(lengths) / len(lengths), 1),
        "prompts": {split: len(found) for split, found in splits.items()},
        "sentences": {language: len(texts) for language, texts in sentences.items()},
        "sentences_held_out": held_out,
        "bytes": {path.name: path.stat().st_size for path in sorted(arguments.target.iterdir())},
    }
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "data.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
