"""Measure the exported model: bits per byte on held-out pages, and how often it switches language or loops by itself.

Bits per byte: the summed negative log-likelihood of the plain text of every held-out page (paragraphs joined by a line
break, after `<|endoftext|>`) in nats, over ln 2 and the UTF-8 bytes of the text; windows of 256 tokens, of which all
but the first of a page score their second half only. Rates: one sampled answer of at most 96 tokens per prompt of the
test pages.

    python evaluate.py --work work --model ../../qscope_monitor/bundled/model
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import EVALUATED, LETTERS, WORK, paragraphs, read_pages
from transformers import AutoTokenizer, Qwen3ForCausalLM

from qscope_monitor import behaviours

ROOT = Path(__file__).parents[2]
WINDOW = 256  # tokens, the length the model was trained on
NEW_TOKENS = 96
SETTINGS = {
    "T=1, top_p=0.8": {"do_sample": True, "temperature": 1.0, "top_p": 0.8, "top_k": 0},
    "T=1": {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
    "greedy": {"do_sample": False},
}


def windows_of(ids: list[int]) -> list[tuple[list[int], int]]:
    """(window, first scored position) pairs that score every token of `ids` but the first exactly once."""
    windows, first = [], 1
    while first < len(ids):
        begin = max(0, first - WINDOW // 2)
        end = min(len(ids), begin + WINDOW + 1)
        windows.append((ids[begin:end], first - begin))
        first = end
    return windows


@torch.no_grad()
def nats(model: Qwen3ForCausalLM, documents: list[list[int]]) -> list[float]:
    """Sum the negative log-likelihood of every document, the first token given."""
    pieces = [(index, *window) for index, ids in enumerate(documents) for window in windows_of(ids)]
    pieces.sort(key=lambda piece: len(piece[1]))
    sums = [0.0] * len(documents)
    for start in range(0, len(pieces), 16):
        batch = pieces[start : start + 16]
        longest = max(len(ids) for _, ids, _ in batch)
        inputs = torch.zeros(len(batch), longest, dtype=torch.long)  # right padding: causal, so it changes nothing
        for row, (_, ids, _) in enumerate(batch):
            inputs[row, : len(ids)] = torch.tensor(ids)
        inputs = inputs.to(model.device)
        logits = model(input_ids=inputs[:, :-1], use_cache=False).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), inputs[:, 1:], reduction="none").cpu()
        for row, (index, ids, first) in enumerate(batch):
            sums[index] += losses[row, first - 1 : len(ids) - 1].sum().item()
    return sums


def bits_per_byte(model: Qwen3ForCausalLM, tokenizer, language: str, split: str, work: Path) -> dict[str, float]:
    """Bits per byte of the held-out pages of one language by source, and "all"."""
    pages = list(read_pages(language, split, work, EVALUATED))
    texts = ["\n".join(paragraphs(page)) for page in pages]
    ids = [[tokenizer.pad_token_id, *tokenizer(text, add_special_tokens=False).input_ids] for text in texts]
    total: dict[str, float] = defaultdict(float)
    size: dict[str, int] = defaultdict(int)
    tokens = 0
    for page, text, loss, document in zip(pages, texts, nats(model, ids), ids, strict=True):
        for name in (page["source"], "all"):
            total[name] += loss
            size[name] += len(text.encode())
        tokens += len(document) - 1
    result = {name: round(total[name] / math.log(2) / size[name], 4) for name in sorted(total)}
    return {**result, "pages": len(pages), "bytes": size["all"], "nats_a_token": round(total["all"] / tokens, 4)}


@torch.no_grad()
def answers(model: Qwen3ForCausalLM, tokenizer, prompts: list[str], settings: dict, batch: int = 64) -> list[list[int]]:
    """Token ids of one answer per prompt, without the end marker."""
    torch.manual_seed(0)
    found = []
    end = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    for start in range(0, len(prompts), batch):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch]]
        encoded = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        ids = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=NEW_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
        for row in ids[:, encoded["input_ids"].shape[1] :].tolist():
            length = next((position for position, token in enumerate(row) if token in end), len(row))
            found.append(row[:length])
    return found


def has_loop(ids: list[int], longest: int = 40, times: int = 3, shortest_span: int = 6) -> bool:
    """Find an n-gram of at most `longest` tokens that stands `times` times in a row, over `shortest_span` or more."""
    for size in range(1, longest + 1):
        run = 0
        for position in range(size, len(ids)):
            run = run + 1 if ids[position] == ids[position - size] else 0
            if run + size >= max(times * size, shortest_span):
                return True
    return False


def recycled(ids: list[int], size: int = 4) -> float:
    """Share of the 4-grams that occurred before."""
    grams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def rates(tokenizer, found: list[list[int]]) -> dict[str, float]:
    """Shares of the answers: the package's two detectors, and plainer counts; a foreign letter is a non-Latin one."""
    texts = [tokenizer.decode(ids) for ids in found]
    switches = [behaviours.detect_code_switching(text, expected="en") for text in texts]
    repeats = [behaviours.detect_repetition(ids) for ids in found]
    foreign = [{name: len(LETTERS[name].findall(text)) for name in LETTERS if name != "latin"} for text in texts]
    count = len(found)
    return {
        "answers": count,
        "code_switching": round(sum(behaviour.found for behaviour in switches) / count, 4),
        "repetition": round(sum(behaviour.found for behaviour in repeats) / count, 4),
        "any_foreign_letter": round(sum(any(letters.values()) for letters in foreign) / count, 4),
        "any_chinese_letter": round(sum(letters["zh"] > 0 for letters in foreign) / count, 4),
        "ten_chinese_letters": round(sum(letters["zh"] >= 10 for letters in foreign) / count, 4),
        "exact_loop": round(sum(map(has_loop, found)) / count, 4),
        "recycled_4grams_over_30%": round(sum(recycled(ids) > 0.3 for ids in found) / count, 4),
        "mean_tokens": round(sum(map(len, found)) / count, 1),
        "ended": round(sum(len(ids) < NEW_TOKENS for ids in found) / count, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for all working data")
    parser.add_argument("--model", type=Path, default=ROOT / "qscope_monitor/bundled/model", help="exported model")
    parser.add_argument("--data", type=Path, default=ROOT / "qscope_monitor/bundled/data", help="bundled data")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--only", choices=["bits", "rates"], help="measure only this")
    parser.add_argument("--prompts", type=int, help="number of test prompts; all by default")
    parser.add_argument("--dry", action="store_true", help="print, write no result")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = Qwen3ForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, dict] = {}
    if arguments.only != "rates":
        report["bits_per_byte"] = {}
        for language, split in (("en", "test"), ("en", "dev"), ("zh", "test"), ("ru", "test"), ("ko", "test")):
            measured = bits_per_byte(model, tokenizer, language, split, arguments.work)
            report["bits_per_byte"][f"{language}_{split}"] = measured
            print(language, split, measured, flush=True)
    if arguments.only != "bits":
        report["rates"] = {}
        prompts = json.loads((arguments.data / "prompts.json").read_text())["test"][: arguments.prompts]
        for name, settings in SETTINGS.items():
            report["rates"][name] = rates(tokenizer, answers(model, tokenizer, prompts, settings))
            print(name, report["rates"][name], flush=True)
    if arguments.dry:
        return
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    for name, measured in report.items():
        (results / f"{name}.json").write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
