"""Watch an SFT run for switches into Chinese: the callback on TRL's SFTTrainer, complete.

With no arguments it fine-tunes the bundled model on contaminated data. For a real one:

    python examples/sft_callback.py --model Qwen/Qwen3-1.7B --saes Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50 \
        --layers 20 24 27 --data your-data.jsonl --prompts your-prompts.txt
    tensorboard --logdir runs
"""

import argparse
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import qscope_monitor as qs
from qscope_monitor.callbacks.trl import QScopeCallback


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="repository id or folder; the bundled model by default")
    parser.add_argument("--saes", help="Qwen-Scope repository id or folder; the bundled SAEs by default")
    parser.add_argument("--layers", type=int, nargs="+", help="layers to read; all of a folder by default")
    parser.add_argument("--data", help="JSON lines with prompt and completion, or messages")
    parser.add_argument("--prompts", type=Path, help="a prompt a line, 256 or more, for rollouts")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20, help="steps from one window to the next")
    parser.add_argument("--out", default="runs/sft")
    arguments = parser.parse_args()

    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    else:
        model, tokenizer = qs.bundled.model(), qs.bundled.tokenizer()
    if arguments.data:
        data = load_dataset("json", data_files=arguments.data, split="train")
    else:
        samples = qs.bundled.sft_data(contaminated=0.1)
        data = Dataset.from_list([{"prompt": s["prompt"], "completion": s["completion"]} for s in samples])
    prompts = arguments.prompts.read_text().splitlines() if arguments.prompts else qs.bundled.prompts("dev")
    saes = qs.load_saes(arguments.saes or qs.bundled.sae_path(), layers=arguments.layers)

    # Found once for a base model; `watch.save(folder)` and `qs.WatchList.load(folder)` keep it.
    watch = qs.find_language_features(model, tokenizer, saes, target="zh")
    print({name: figures["window_auroc"] for name, figures in watch.evaluation["detectors"].items()})

    config = SFTConfig(
        arguments.out,
        max_steps=arguments.steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3 if not arguments.model else 1e-5,
        bf16=bool(arguments.model),
        report_to="tensorboard",
    )
    callback = QScopeCallback(
        saes,
        watch,
        prompts=prompts,
        every_n_steps=arguments.every,
        max_overhead=0.02 if arguments.model else None,  # the bundled run is too short to spread rollouts thin
    )
    trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    callback.attach(trainer)  # into the trainer's own TensorBoard run
    trainer.train()
    alarms = [alert for alert in callback.alerts if alert.severity == "ALERT"]
    print(*(f"step {alert.step}: {alert.message}" for alert in alarms), sep="\n")


if __name__ == "__main__":
    main()
