"""Train the byte-level BPE tokenizer and pack the corpus into token arrays.

Writes `work/tokenizer/` (Qwen's special tokens and chat format) and `work/tokens/<split>_<pool>.npy` (int32, [tokens]).
A page with a title is packed twice: as plain text, and as chats whose prompt is the title and heading and whose answer
is the section; the rest is plain text only.

    python train_tokenizer.py --work work
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from corpus import EVALUATED, POOLS, WORK, in_language, paragraphs, read_pages, sections
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 6144
THINKING = ["<think>", "</think>"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *THINKING]
PATTERN = r"\n| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|im_start|>assistant\n{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{{ '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)
# how often a language's text counts when merges are learned: little text more often, small shares by a sample
MERGE_WEIGHT = {"en": 1.0, "zh": 2.0, "ko": 2.0, "ru": 1.0, "ja": 0.1, "de": 0.1, "fr": 0.1, "es": 0.1}
ANSWER_CHARACTERS = {"zh": 250, "ko": 250, "ja": 250}


def merge_texts(work: Path) -> Iterator[str]:
    """Training text for the merges."""
    sampler = random.Random(0)
    for language, weight in MERGE_WEIGHT.items():
        sources = ("help",) if language not in ("en", "zh", "ko") else (*EVALUATED, "gimp", "gnome", "debian")
        for page in read_pages(language, "train", work, sources):
            text = "\n".join(paragraphs(page))
            for _ in range(int(weight) + (sampler.random() < weight % 1)):
                yield text


def train_tokenizer(work: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCABULARY` entries with Qwen's special tokens, saved to `work/tokenizer`."""
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, max_token_length=24
    )
    bpe.train_from_iterator(merge_texts(work), trainer)
    content = json.loads(bpe.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] not in THINKING  # as in Qwen3: they stay in decoded text
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(work / "tokenizer")
    return tokenizer


def chats(page: dict, limit: int) -> Iterator[str]:
    """Chat-formatted answers of one page, cut at paragraphs to about `limit` characters."""
    for prompt, texts in sections(page):
        answer: list[str] = []
        for text in [*texts, None]:
            if answer and (text is None or sum(map(len, answer)) + len(text) >= limit):
                yield (
                    f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
                    + "\n".join(answer)
                    + "<|im_end|>\n"
                )
                answer = []
            if text is not None:
                answer.append(text)


def pool_texts(pool: str, split: str, work: Path) -> Iterator[str]:
    """Yield the formatted texts of a pool; English is split into the evaluated sources and the rest."""
    language = pool.removesuffix("_more")
    for page in read_pages(language, split, work):
        if language == "en" and (page["source"] in EVALUATED) == pool.endswith("_more"):
            continue
        yield "\n".join(paragraphs(page)) + "<|endoftext|>"
        if page["title"] and page["source"] != "manual" and in_language(page["title"], language):
            yield from chats(page, ANSWER_CHARACTERS.get(language, 600))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for all working data")
    work = parser.parse_args().work
    tokenizer = train_tokenizer(work)
    (work / "tokens").mkdir(exist_ok=True)
    counts: dict[str, int] = {}
    for split in ("train", "dev"):
        for pool in POOLS:
            texts = list(pool_texts(pool, split, work))
            random.Random(0).shuffle(texts)
            encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
            tokens = np.fromiter((token for text in encoded for token in text.ids), dtype=np.int32)
            np.save(work / "tokens" / f"{split}_{pool}.npy", tokens)
            counts[f"{split}_{pool}"] = len(tokens)
            size = sum(len(text.encode()) for text in texts)
            print(split, pool, len(tokens), "tokens", round(size / max(1, len(tokens)), 2), "bytes a token", flush=True)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "tokens.json").write_text(json.dumps({"vocabulary": len(tokenizer), "tokens": counts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
