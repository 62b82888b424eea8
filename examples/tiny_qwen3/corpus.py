"""What the scripts of this folder share: languages, scripts of letters, the split by page, reading the corpus."""

import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORK = Path(__file__).parent / "work"

# share of the pretraining tokens per pool of packed text; languages without one only give reference sentences
POOLS = {
    "en": 0.42,
    "en_more": 0.18,
    "zh": 0.17,
    "ru": 0.08,
    "ko": 0.08,
    "ja": 0.02,
    "de": 0.02,
    "fr": 0.015,
    "es": 0.015,
}
LANGUAGES = ["en", "zh", "ru", "ko", "ja", "de", "fr", "es", "it", "pl", "pt", "vi", "nl", "tr", "cs"]
# sources the bits per byte are measured on, the ones of the first study; the rest is extra training text
EVALUATED = ("help", "installation", "reference", "handbook")

LETTERS = {
    "zh": re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]"),
    "ko": re.compile(r"[\u1100-\u11ff\uac00-\ud7af]"),
    "ru": re.compile(r"[\u0400-\u04ff]"),
    "ja": re.compile(r"[\u3040-\u30ff]"),
    "latin": re.compile(r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]"),
}


def split_of(page: str) -> str:
    """Return the split of a page: "test" and "dev" (5 % each) are never trained on, in any language; "train" is.

    >>> split_of("text/scalc/01/04060102.html") in {"train", "dev", "test"}
    True
    """
    return {0: "test", 1: "dev"}.get(zlib.crc32(page.encode()) % 20, "train")


def read_pages(
    language: str, split: str, work: Path = WORK, sources: tuple[str, ...] | None = None
) -> Iterator[dict[str, Any]]:
    """Pages of `language` in `split`: {"language", "source", "page", "title", "blocks": [{"tag", "id", "text"}]}."""
    with open(work / "corpus" / f"{language}.jsonl", encoding="utf-8") as lines:
        for line in lines:
            page = json.loads(line)
            if split_of(page["page"]) == split and (sources is None or page["source"] in sources):
                yield page


def paragraphs(page: dict[str, Any]) -> list[str]:
    """Return the paragraphs of a page in order, headings left out."""
    return [block["text"] for block in page["blocks"] if not block["tag"].startswith("h")]


def in_language(text: str, language: str) -> bool:
    """Tell whether at least half of the word characters of a short `text` (a title) are in the script of `language`."""
    letters = LETTERS.get(language, LETTERS["latin"])
    found = len(letters.findall(text)) + (len(LETTERS["zh"].findall(text)) if language == "ja" else 0)
    return found > 0 and found >= 0.5 * len(re.findall(r"\w", text))


def sections(page: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """(prompt, paragraphs) per section: the page title, or "title: heading" for the sections below it."""
    title, prompt, texts = page["title"], page["title"], []
    for block in page["blocks"]:
        if not block["tag"].startswith("h"):
            texts.append(block["text"])
            continue
        if prompt and texts:
            yield prompt, texts
        heading, texts = block["text"], []
        prompt = heading if not title or heading == title else f"{title}: {heading}"
    if prompt and texts:
        yield prompt, texts
