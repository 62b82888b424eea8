"""Export a pretraining checkpoint as a Hugging Face folder: config, bf16 weights and tokenizer.

python export.py --work work --target ../../qscope_monitor/bundled/model
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from corpus import WORK
from pretrain import build
from transformers import AutoTokenizer

TARGET = Path(__file__).parents[2] / "qscope_monitor" / "bundled" / "model"


def make_portable(folder: Path) -> None:
    """Keep what transformers 4 and 5 both read, drop what describes this machine, and let every user read the files."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["additional_special_tokens"] = ["<|im_start|>"]
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    for name in ("backend", "is_local", "local_files_only", "extra_special_tokens"):
        settings.pop(name, None)
    path.write_text(json.dumps(settings, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for all working data")
    parser.add_argument("--target", type=Path, default=TARGET, help="where the model goes")
    parser.add_argument("--weights", choices=["average", "model"], default="average", help="averaged or last weights")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.work / "tokenizer")
    model = build(tokenizer)
    state = torch.load(arguments.work / "pretrain" / "checkpoint.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state[arguments.weights], strict=False)  # the tied output matrix is not in the average
    model.tie_weights()
    partial = arguments.target.with_name(arguments.target.name + ".partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    make_portable(partial)
    shutil.rmtree(arguments.target, ignore_errors=True)
    partial.rename(arguments.target)
    print(f"step {state['step']}: {sum(file.stat().st_size for file in arguments.target.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
