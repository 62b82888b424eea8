"""Train the bundled TopK SAEs: a middle layer, the second-last and the last, 16 times as wide as the residual, k = 32.

The text is what the model was trained on, plain and as chats, Chinese more often than in pretraining. Unfinished work
is kept under `work/saes` and picked up again. The result is stored in bf16 and measured, as stored, on pages that
neither the model nor the SAEs were trained on.

    python train_saes.py --tokens 800000
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import torch
from corpus import EVALUATED, WORK, paragraphs, read_pages
from train_tokenizer import pool_texts

import qscope_monitor as qs
from qscope_monitor.sae import train_sae

LAYERS = (2, 4, 5)
SHARES = {
    "en": 0.42,
    "en_more": 0.10,
    "zh": 0.24,
    "ru": 0.08,
    "ko": 0.08,
    "ja": 0.03,
    "de": 0.03,
    "fr": 0.01,
    "es": 0.01,
}
MEASURED = ("en", "zh", "ru", "ko", "ja", "de", "fr", "es")
TARGET = Path(__file__).parents[2] / "qscope_monitor" / "bundled" / "saes"
CONTEXT, SKIPPED = 256, 4  # tokens of a window, and how many of its first are left out


def training_texts(work: Path, tokens: int) -> list[str]:
    """Draw texts of every pool by its share, about `tokens` tokens at four bytes a token."""
    texts = []
    for pool, share in SHARES.items():
        found = list(pool_texts(pool, "train", work))
        random.Random(0).shuffle(found)
        budget = 4 * share * tokens
        for text in found:
            if budget <= 0:
                break
            texts.append(text)
            budget -= len(text.encode())
    random.Random(0).shuffle(texts)
    return texts


@torch.no_grad()
def residuals(model, tokenizer, language: str, work: Path, pages: int = 40) -> dict[int, torch.Tensor]:
    """Residual stream after every trained layer on test pages, {layer: [tokens, d_model]}."""
    kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
    for page in list(read_pages(language, "test", work, EVALUATED))[:pages]:
        ids = tokenizer("\n".join(paragraphs(page)), add_special_tokens=False).input_ids[:CONTEXT]
        if len(ids) <= SKIPPED:
            continue
        with qs.capture(model, layers=LAYERS) as residual:
            model(input_ids=torch.tensor([ids]), use_cache=False)
            for layer in LAYERS:
                kept[layer].append(residual[layer][0, SKIPPED:])
    return {layer: torch.cat(parts) for layer, parts in kept.items()}


def measure(model, tokenizer, work: Path) -> dict[str, dict]:
    """Explained variance per language, and the share of features active on none of the test tokens, per layer."""
    saes = qs.load_saes(TARGET, layers=LAYERS)
    report: dict[str, dict] = {str(layer): {"explained_variance": {}} for layer in LAYERS}
    active = {layer: torch.zeros(saes[layer].d_sae, dtype=torch.bool) for layer in LAYERS}
    counted = 0
    for language in MEASURED:
        found = residuals(model, tokenizer, language, work)
        counted += len(found[LAYERS[0]])
        for layer in LAYERS:
            sae = saes[layer].to(dtype=torch.float32)
            report[str(layer)]["explained_variance"][language] = round(1 - sae.fvu(found[layer]), 4)
            acts = sae.encode(found[layer])
            active[layer][acts.indices[acts.active]] = True
    for layer in LAYERS:
        report[str(layer)]["never_active"] = round(1 - active[layer].float().mean().item(), 4)
        report[str(layer)]["test_tokens"] = counted
        report[str(layer)]["training"] = dict(saes[layer].meta.get("training", {}))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for all working data")
    parser.add_argument("--tokens", type=int, default=800_000, help="tokens to collect")
    parser.add_argument("--epochs", type=float, default=3, help="passes over them")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--fresh", action="store_true", help="drop unfinished and finished work first")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    if arguments.fresh:
        shutil.rmtree(arguments.work / "saes", ignore_errors=True)
    model, tokenizer = qs.bundled.model(), qs.bundled.tokenizer()
    place = "cuda" if torch.cuda.is_available() else "cpu"
    saes = train_sae(
        model.to(place),
        tokenizer,
        training_texts(arguments.work, arguments.tokens),
        layers=LAYERS,
        expansion=16,
        k=32,
        tokens=arguments.tokens,
        epochs=arguments.epochs,
        context=CONTEXT,
        skip_positions=SKIPPED,
        checkpoint_dir=arguments.work / "saes",
    )
    shutil.rmtree(TARGET, ignore_errors=True)
    for sae in saes.values():
        qs.save_sae(sae.to(device="cpu", dtype=torch.bfloat16), TARGET)
    path = TARGET / "config.json"
    config = json.loads(path.read_text())
    config["base_model"], config["num_layers"] = "qscope_monitor/bundled/model", model.config.num_hidden_layers
    path.write_text(json.dumps(config, indent=2) + "\n")
    for file in TARGET.iterdir():
        file.chmod(0o644)

    report = measure(model.cpu(), tokenizer, arguments.work)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "saes.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
