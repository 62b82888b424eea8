"""Does the alert fire when it should, and only then? The demo's two runs over several seeds.

Resumable: one JSON a run under results/sft_alerts/, runs that are there are skipped. `--report` writes the table and
the plot of docs/results.md, and the README's table of seed 0, from those files alone.

    MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=1073741824 \\
        python benchmarks/sft_alerts.py --seeds 0 1 2
    python benchmarks/sft_alerts.py --report
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "sft_alerts"
KEY = "code-switching-zh"


def run(seeds: list[int], steps: int) -> None:
    """Train every missing run and keep its record."""
    import torch
    import transformers
    import trl

    from qscope_monitor import bundled, demo, find_language_features, load_saes

    demo.quiet_libraries()
    RESULTS.mkdir(parents=True, exist_ok=True)
    missing = [(s, n) for s in seeds for n in demo.RUNS if not (RESULTS / f"{n}-seed{s}.json").exists()]
    if not missing:
        return
    model, tokenizer = bundled.model(), bundled.tokenizer()
    saes = load_saes(bundled.sae_path())
    watch = find_language_features(model, tokenizer, saes, target="zh")
    versions = {m.__name__: m.__version__ for m in (torch, transformers, trl)}
    for seed, name in missing:
        before = demo.measure(model, tokenizer, seed)
        with tempfile.TemporaryDirectory() as folder:
            result = demo.monitored_run(name, saes, watch, before, Path(folder), seed=seed, steps=steps, progress=False)
        record = {
            "seed": seed,
            "steps": steps,
            "versions": {**versions, "python": platform.python_version()},
            "device": f"CPU, {torch.get_num_threads()} threads",
            "watch_list": watch.evaluation,
            **result.to_json(),
        }
        file = RESULTS / f"{name}-seed{seed}.json"
        file.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        print(f"{name}, seed {seed}: {[(a.kind, a.step) for a in result.alarms()]}", flush=True)


def report() -> None:
    """Write docs/results.md and its plot."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]
    if not records:
        raise SystemExit(f"no results under {RESULTS}; run with --seeds first")
    first = records[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines = [
        "# Results",
        "",
        "Written by `python benchmarks/sft_alerts.py --report` from the JSON files under `benchmarks/results/`.",
        "",
        "## The alert in supervised fine-tuning",
        "",
        f"The bundled model, {first['steps']} steps of 16 samples, learning rate 1e-3. *Contaminated*: in 10 %",
        "of the samples the answer to an English prompt begins in English and goes on in Chinese. *Clean*: the same",
        "samples with their clean answers. A tenth of both is legitimate Chinese. Rollouts at T = 1.",
        "Switching is measured on the test prompts by the text detector, with 95 % Wilson intervals; the monitor's own",
        "rollouts use the development prompts. False-alarm rate of a run: 5 %. Held-out loss: nats per token on clean",
        "English samples left out of fine-tuning, from pages that the model saw in pretraining. Rollouts come far",
        "more often here than the default `max_overhead` allows, for the sake of a short run.",
        "",
        f"{first['device']}; {versions}.",
        "",
        "| run | seed | switching before | after | held-out loss before → after | alarms in rollouts |"
        " in training data | monitor's share of time: watch list, census, rollouts |",
        "|---|---:|---:|---:|---:|---|---|---|",
    ]
    for record in records:
        lines.append(_row(record, ("run", "seed", "before", "after", "loss", "rollout", "train", "cost")))
    detectors = first["watch_list"]["detectors"]
    lines += [
        "",
        "The watch list's held-out figures for telling Chinese from the other languages:",
        "",
        "| detector | AUROC per token | per window of 16 tokens |",
        "|---|---:|---:|",
        *(f"| {name} | {d['token_auroc']:.3f} | {d['window_auroc']:.3f} |" for name, d in detectors.items()),
        "",
        "![Share of rollouts that exceed, by step](images/sft-alerts.png)",
        "",
    ]
    (ROOT / "docs" / "results.md").write_text("\n".join(lines), encoding="utf-8")
    _plot(records)
    _readme(records)


def _cells(record: dict) -> dict[str, str]:
    def switching(measured: dict) -> str:
        low, high = measured["interval"]
        return f"{measured['rate']:.1%} [{low:.1%}, {high:.1%}]"

    def alarms(stream: str) -> str:
        found = [a for a in record["alerts"] if a["severity"] == "ALERT" and a["stream"] == stream]
        return ", ".join(f"{a['kind']} at step {a['step']} (p = {a['p_value']:.0e})" for a in found) or "none"

    cost = record["overhead"]
    return {
        "run": record["run"],
        "seed": str(record["seed"]),
        "before": switching(record["before"]),
        "after": switching(record["after"]),
        "loss": f"{record['before']['loss']:.3f} → {record['after']['loss']:.3f}",
        "rollout": alarms("rollout"),
        "train": alarms("train"),
        "cost": ", ".join(f"{cost[part]:.1%}" for part in ("watch_list", "census", "rollouts")),
    }


def _row(record: dict, names: tuple[str, ...]) -> str:
    cells = _cells(record)
    return "| " + " | ".join(cells[name] for name in names) + " |"


def _readme(records: list[dict]) -> None:
    """Put the rows of seed 0 between the README's markers."""
    file = ROOT / "README.md"
    begin, end = "<!-- demo table: begin, written by benchmarks/sft_alerts.py -->\n", "<!-- demo table: end -->"
    before, rest = file.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    names = ("run", "before", "after", "loss", "rollout", "cost")
    table = [
        "| run | switching before | after | held-out loss | alarms in rollouts"
        " | monitor's share of time: watch list, census, rollouts |",
        "|---|---:|---:|---:|---|---|",
        *(_row(record, names) for record in records if record["seed"] == 0),
    ]
    file.write_text(before + begin + "\n".join(table) + "\n" + end + after, encoding="utf-8")


def _plot(records: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True)
    colours = {"clean": "tab:blue", "contaminated": "tab:red"}
    for record in records:
        rows = [r for r in record["history"] if f"sae/rollout/{KEY}/exceedance" in r]
        steps = [r["step"] for r in rows]
        for axis, name in zip(axes, ("exceedance", "text_rate")):
            values = [100 * r[f"sae/rollout/{KEY}/{name}"] for r in rows]
            axis.plot(steps, values, color=colours[record["run"]], marker=".", label=record["run"])
        for alert in record["alerts"]:
            if alert["severity"] == "ALERT" and alert["stream"] == "rollout":
                axes[0].plot(alert["step"], 100 * alert["rate"], "k*", ms=11, label="alert (pooled rate)")
    for axis, title in zip(axes, ("zh read-outs exceed", "the text detector finds Chinese")):
        axis.set(title=title, xlabel="optimiser step", ylabel="% of rollouts")
        axis.grid(alpha=0.3)
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels())))
    axes[0].legend(handles.values(), handles.keys(), fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "images" / "sft-alerts.png", dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    if arguments.seeds:
        run(arguments.seeds, arguments.steps)
    if arguments.report or not arguments.seeds:
        report()
