"""The `qscope` command."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

from qscope_monitor.alerts import KINDS

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError:  # the entry point itself must be able to say what is missing
    typer = None  # type: ignore[assignment]

if typer is not None:
    app = typer.Typer(
        help="Watch SAE features while a language model is fine-tuned.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.command()
    def demo(
        out: Annotated[Path, typer.Option(help="Folder for TensorBoard runs, alerts, the plot and the watch list.")] = (
            Path("demo")
        ),
        seed: Annotated[int, typer.Option(help="Of the data order and of every rollout.")] = 0,
        steps: Annotated[int, typer.Option(help="Optimiser steps of each run.", min=20)] = 60,
        as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    ) -> None:
        """Fine-tune the bundled model on clean and on contaminated data, watched; about three minutes."""
        from qscope_monitor import demo as demo_module
        from qscope_monitor.costs import PARTS

        began = time.perf_counter()
        demo_module.quiet_libraries()
        watch, results = demo_module.run_demo(out, seed=seed, steps=steps, progress=not as_json)
        demo_module.plot(results, out / "demo.png")
        document = {
            "seed": seed,
            "steps": steps,
            "seconds": time.perf_counter() - began,
            "watch_list": watch.evaluation,
            "runs": [result.to_json() for result in results],
        }
        (out / "demo.json").write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        if as_json:
            print(json.dumps(document, ensure_ascii=False))
            return
        console = Console()
        console.print(_demo_table(results))
        for result in results:
            shares = ", ".join(f"{part.replace('_', ' ')} {result.overhead[part]:.1%}" for part in PARTS)
            console.print(f"the monitor's share of the {result.name} run's time: {shares}", highlight=False)
        _print_alerts(console, [(result.name, alert) for result in results for alert in result.alerts])
        console.print(f"\nplot     {out / 'demo.png'}\nfigures  {out / 'demo.json'}")
        console.print(f"look     tensorboard --logdir {out}   (Text: sae/alerts; Custom Scalars: qscope)")

    @app.command()
    def alerts(
        run: Annotated[Path, typer.Argument(help="A run's folder, or an alerts.jsonl.")],
        kind: Annotated[str | None, typer.Option(help=f"Only this kind: {', '.join(KINDS)}.")] = None,
        everything: Annotated[bool, typer.Option("--all", help="Information (census) too.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="One alert record a line.")] = False,
    ) -> None:
        """List the alerts of a run, with the responses behind them. Exits with 1 on an alarm, with 2 on an error."""
        from qscope_monitor.reporting import read_alerts

        if kind is not None and kind not in KINDS:
            raise ValueError(f"--kind must be one of {', '.join(KINDS)}, got {kind!r}")
        found = read_alerts(run)
        chosen = [
            a for a in found if (kind is None or a.kind == kind) and (everything or kind or a.severity == "ALERT")
        ]
        if as_json:
            for alert in chosen:
                print(json.dumps(alert.to_json(), ensure_ascii=False))
        else:
            console = Console()
            if not chosen:
                console.print(f"no alert in {run}", markup=False)
            _print_alerts(console, [(alert.stream, alert) for alert in chosen], contexts=True)
        raise typer.Exit(1 if any(a.severity == "ALERT" for a in chosen) else 0)


def _demo_table(results: Any) -> Any:
    table = Table(title="Fine-tuning the bundled Qwen3 on clean and on contaminated data")
    table.add_column("run")
    for heading in ("switching before", "after", "held-out loss", "alerts in rollouts"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.name,
            _percent(result.before),
            _percent(result.after),
            f"{result.before.loss:.3f} → {result.after.loss:.3f}",
            ", ".join(f"{a.kind} at step {a.step}" for a in result.alarms()) or "none",
        )
    return table


def _percent(measured: Any) -> str:
    low, high = measured.interval
    return f"{measured.rate:.1%} [{low:.1%}, {high:.1%}]"


def _print_alerts(console: Any, alerts: list[tuple[str, Any]], contexts: bool = False) -> None:
    from qscope_monitor.reporting.ledger import LEFT, RIGHT

    for where, alert in alerts:
        if alert.severity == "INFO" and not contexts:
            continue
        console.print(f"\n{where}, step {alert.step}  {alert.kind}", style="bold", highlight=False, markup=False)
        console.print(f"  {alert.message}", highlight=False, markup=False)
        for change in alert.read_outs[:3]:
            promotes = " ".join(token.strip() for token in change.promotes[:6])
            console.print(
                f"  {change.name}  fires on {change.rate:.2%} of response tokens (was {change.baseline_rate:.2%})"
                f"  promotes {promotes}",
                highlight=False,
                markup=False,
            )
        for context in alert.contexts[: 3 if contexts else 1]:
            console.print(f"  prompt: {' '.join(context.prompt.split())}", highlight=False, markup=False)
            console.print(f"  {context.marked(LEFT, RIGHT)}", highlight=False, markup=False)


def _fail(message: str) -> NoReturn:
    """Exit with 2: 1 says that a run has an alarm."""
    print(f"qscope: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Entry point of `qscope`."""
    if typer is None:
        _fail("the command line needs an extra: pip install 'qscope-monitor[cli]'")
    try:
        app()
    except (ValueError, FileNotFoundError, ImportError) as error:
        _fail(str(error))


if __name__ == "__main__":
    main()
