"""Turn the unpacked packages into clean paragraphs: `work/corpus/<language>.jsonl`, one page a line.

Paragraphs whose script or function words are not the language's are dropped, and so is every paragraph seen before in
the language. In the LibreOffice help a page has the same key, and a paragraph the same id, in every language: that is
what makes the text parallel.

    python clean_corpus.py --work work
"""

import argparse
import gzip
import html
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from corpus import LANGUAGES, LETTERS, WORK, in_language

HELP = {"en": ("en-us", "en-US"), "zh": ("zh-cn", "zh-CN")}
HANDBOOK = {
    "en": "en-US",
    "zh": "zh-CN",
    "ru": "ru-RU",
    "ko": "ko-KR",
    "ja": "ja-JP",
    "de": "de-DE",
    "fr": "fr-FR",
    "es": "es-ES",
}
REFERENCE = {"en": "en", "zh": "zh-cn"}
INSTALLATION = ("en", "ko", "ru", "ja", "de", "fr", "es")
GIMP = {"en": "en", "zh": "zh_CN", "ko": "ko", "ru": "ru"}
GNOME = {"en": "C", "zh": "zh_CN", "ko": "ko", "ru": "ru"}
MANUALS = {"en": ("manpages", "manpages-dev"), "zh": ("manpages-zh",), "ru": ("manpages-ru",)}
DEBIAN = {
    "en": (
        "developers-reference/usr/share/developers-reference/*.html",
        "debian-policy/usr/share/doc/debian-policy/policy.html/*.html",
        "maint-guide/usr/share/doc/maint-guide/html/*.en.html",
        "maint-guide/usr/share/debian/maint-guide/*.en.html",
    )
}
FUNCTION_WORDS = {
    "en": "the of to and is in for you a that this with are be can or on it if by as not",
    "de": "der die das und ist sie in von zu den mit ein eine für oder wird auf im nicht werden",
    "fr": "le la les de des et est un une pour dans du vous en que sur ou par ce au",
    "es": "el la los las de y es un una para en que con se por del al o su este",
    "it": "il la le di e è un una per in che con si del della da o i gli questo",
    "pt": "o a os as de e é um uma para em que com se do da no na ou este",
    "pl": "w i z na do jest się nie lub aby dla to od przez można oraz po jako tego który",
    "vi": "là và của các trong để một này có cho với được không hay bạn trên vào từ khi theo",
    "nl": "de het een en is van in op te voor met u dat of wordt niet om deze als kunt",
    "tr": "ve bir bu için ile veya olarak da de bu her ise seçin olan gibi en çok daha sonra kadar",
    "cs": "a v je na se do pro z nebo s k jako tento této lze pokud které není buď od",
}
WORDS = {language: set(words.split()) for language, words in FUNCTION_WORDS.items()}
TAG = re.compile(r"<[^>]+>")
SPACE = re.compile(r"\s+")
BLOCK = re.compile(
    r"<(p|h[1-6]|dt)\b([^>]*)>(.*?)</\1>"
    r"|<(?:li\b|div class=\"para\")([^>]*)>((?:(?!<p\b|<li\b|<div\b|</li>|</div>).)*)</(?:li|div)>",
    re.S,
)
MALLARD = re.compile(r"<(p|title)\b([^>]*)>(.*?)</\1>", re.S)
ID = re.compile(r'id="([^"]+)"')
Block = tuple[str, str | None, str]


def is_prose(text: str, language: str) -> bool:
    """Tell a paragraph written in `language`, by script and, for the Latin script, function words."""
    count = {script: len(letters.findall(text)) for script, letters in LETTERS.items()}
    total = sum(count.values())
    if total < 12:
        return False
    match language:
        case "zh":
            return count["zh"] / total > 0.35 and count["ja"] == count["ko"] == count["ru"] == 0
        case "ja":
            return count["ja"] / total > 0.15 and count["ko"] == 0
        case "ko":
            return count["ko"] / total > 0.35 and count["ja"] == 0
        case "ru":
            return count["ru"] / total > 0.5
    if count["latin"] / total < 0.999:
        return False
    words = re.findall(r"[^\W\d_]+", text.lower())
    score = {other: sum(word in known for word in words) for other, known in WORDS.items()}
    return len(words) >= 4 and score[language] >= 1 and score[language] == max(score.values())


def clean(markup: str) -> str:
    """Plain text of a piece of markup, white space squeezed."""
    return SPACE.sub(" ", html.unescape(TAG.sub("", markup))).replace("\u200b", "").strip()


def html_blocks(text: str) -> Iterator[Block]:
    """(tag, id, text) of every paragraph, heading and list item of an HTML page, navigation left out."""
    start = text.find('id="DisplayArea"')  # LibreOffice help
    text = text[max(start, 0) :]
    end = text.find('id="SearchFrame"')
    text = re.sub(r"<(script|style|pre)\b.*?</\1>", "", text[: end if end >= 0 else None], flags=re.S)
    for match in BLOCK.finditer(text):
        tag, attributes, body = match.group(1, 2, 3) if match.group(1) else ("p", *match.group(4, 5))
        if 'class="code"' in attributes:
            continue
        identifier = ID.search(attributes)
        yield tag, identifier.group(1) if identifier else None, clean(body)


def mallard_blocks(text: str) -> Iterator[Block]:
    """(tag, id, text) of a GNOME help page; the first title is the page's."""
    text = re.sub(r"<(info|code|screen|media)\b.*?</\1>", "", text, flags=re.S)
    for number, match in enumerate(MALLARD.finditer(text)):
        tag = "p" if match.group(1) == "p" else "h1" if number == 0 else "h2"
        yield tag, None, clean(match.group(3))


def troff_blocks(text: str) -> Iterator[Block]:
    """Prose paragraphs of a manual page; displays and tables are skipped."""
    lines: list[str] = []
    skipping = False
    for line in [*text.splitlines(), ".PP"]:
        if re.match(r"\.\s*(nf|EX|TS)", line):
            skipping = True
        elif re.match(r"\.\s*(fi|EE|TE)", line):
            skipping = False
            continue
        styled = re.match(r"\.\s*(B|I|BR|IR|RB|BI|IB|RI|SM)\s+(.*)", line)
        if styled and not skipping:
            line = styled.group(2).replace('" "', " ").replace('"', "")
        elif line.startswith((".", "'")) or not line.strip() or skipping:
            paragraph = SPACE.sub(" ", " ".join(lines)).strip()
            lines = []
            if 40 <= len(paragraph) <= 2000:
                yield "p", None, paragraph
            continue
        line = re.sub(r"\\f[A-Z]|\\f\([A-Z]{2}|\\&|\\/|\\,|\\\||\\c", "", line)
        for escape, plain in (
            (r"\-", "-"),
            (r"\(aq", "'"),
            (r"\[aq]", "'"),
            (r"\(bu", "-"),
            (r"\ ", " "),
            (r"\e", "\\"),
            (r"\~", " "),
        ):
            line = line.replace(escape, plain)
        lines.append(re.sub(r"\\\(..|\\\[[^\]]*\]", "", line))


def read(path: Path) -> str:
    """Return the text of a file, unpacked where it is compressed."""
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8", errors="replace")


def sources(
    packages: Path, language: str
) -> Iterator[tuple[str, Iterable[Path], Callable[[Path], str], Callable[[str], Iterator[Block]]]]:
    """(source, files, page key of a file, parser) for every source that exists in `language`."""
    package, folder = HELP.get(language, (language, language))
    root = packages / f"libreoffice-help-{package}/usr/share/libreoffice/help/{folder}"
    yield "help", root.rglob("*.html"), lambda path: path.relative_to(root).as_posix(), html_blocks
    if language in HANDBOOK:
        files = packages.glob(f"debian-handbook/usr/share/doc/debian-handbook/html/{HANDBOOK[language]}/*.html")
        yield "handbook", files, lambda path: path.name, html_blocks
    if language in REFERENCE:
        files = packages.glob(f"debian-reference-{REFERENCE[language]}/usr/share/debian-reference/ch*.html")
        yield "reference", files, lambda path: path.name, html_blocks
    if language in INSTALLATION:
        files = packages.glob(f"installation-guide-amd64/usr/share/doc/installation-guide-amd64/{language}/*.html")
        yield "installation", files, lambda path: path.name, html_blocks
    if language in GIMP:
        yield (
            "gimp",
            packages.glob(f"gimp-help-*/usr/share/gimp/2.0/help/{GIMP[language]}/*.html"),
            lambda path: "gimp/" + path.name,
            html_blocks,
        )
    if language in GNOME:
        files = packages.glob(f"gnome-user-docs/usr/share/help/{GNOME[language]}/*/*.page")
        yield "gnome", files, lambda path: "gnome/" + path.name, mallard_blocks
    for pattern in DEBIAN.get(language, ()):
        yield "debian", packages.glob(pattern), lambda path: "debian/" + path.name, html_blocks
    for package in MANUALS.get(language, ()):
        files = (
            path
            for path in (packages / package).rglob("usr/share/man/**/*.gz")
            if "zh_TW" not in path.parts and not path.is_symlink()
        )
        yield "manual", files, lambda path: path.name, troff_blocks


def clean_language(packages: Path, language: str, target: Path) -> dict[str, int]:
    """Write the pages of one language; returns the UTF-8 bytes of paragraph text per source."""
    shortest = 12 if language in ("zh", "ja", "ko") else 25
    seen: set[str] = set()
    size: Counter[str] = Counter()
    with open(target, "w", encoding="utf-8") as output:
        for source, files, key_of, parse in sources(packages, language):
            for path in sorted(files):
                title, blocks = "", []
                for tag, identifier, text in parse(read(path)):
                    if tag.startswith("h"):
                        title = title or text
                        if 2 < len(text) < 90 and in_language(text, language):
                            blocks.append({"tag": tag, "id": identifier, "text": text})
                    elif shortest <= len(text) <= 3000 and text.lower() not in seen and is_prose(text, language):
                        seen.add(text.lower())
                        size[source] += len(text.encode())
                        blocks.append({"tag": tag, "id": identifier, "text": text})
                if any(not block["tag"].startswith("h") for block in blocks):
                    page = {
                        "language": language,
                        "source": source,
                        "page": key_of(path),
                        "title": title,
                        "blocks": blocks,
                    }
                    output.write(json.dumps(page, ensure_ascii=False) + "\n")
    return dict(size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for all working data")
    work = parser.parse_args().work
    (work / "corpus").mkdir(exist_ok=True)
    sizes = {}
    for language in LANGUAGES:
        sizes[language] = clean_language(work / "packages", language, work / "corpus" / f"{language}.jsonl")
        print(language, sizes[language], flush=True)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "corpus.json").write_text(json.dumps({"bytes": sizes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
