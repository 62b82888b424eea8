"""The ledger of alerts as Markdown: one cumulative table, newest first, then the responses behind the newest alerts.

TensorBoard keeps a random sample of the texts written to one tag, and surely only the newest; so every alert rewrites
the whole ledger.
"""

from __future__ import annotations

from collections.abc import Sequence

from qscope_monitor.alerts import Alert, TokenContext, ledger_order

MAXIMUM_ROWS = 50
MAXIMUM_CONTEXTS = 3
_LEFT, _RIGHT = "⟦", "⟧"


def ledger_markdown(alerts: Sequence[Alert]) -> str:
    """The whole ledger. Runs of tokens at which the read-outs fire stand between ⟦ and ⟧."""
    if not alerts:
        return "No alert so far."
    ordered = ledger_order(alerts)
    lines = [
        "| step | stream | behaviour | kind | responses exceeding | at calibration | p | text detector | read-outs |",
        "|---:|---|---|---|---:|---:|---:|---:|---|",
    ]
    lines += [_row(alert) for alert in ordered[:MAXIMUM_ROWS]]
    if len(ordered) > MAXIMUM_ROWS:
        lines.append(f"\n{len(ordered) - MAXIMUM_ROWS} older entries are in `alerts.jsonl`.")
    for alert in [a for a in ordered if a.contexts][:MAXIMUM_CONTEXTS]:
        lines.append(f"\n### Step {alert.step}: {alert.behaviour} in {alert.stream}")
        lines += [_context(context) for context in alert.contexts]
    return "\n".join(lines)


def _row(alert: Alert) -> str:
    text = "–"
    if alert.text_rate is not None and alert.text_baseline_rate is not None:
        text = f"{alert.text_rate:.1%} (was {alert.text_baseline_rate:.1%})"
    read_outs = "; ".join(
        f"{change.name} {change.rate:.2%} (was {change.baseline_rate:.2%})" + _promoted(change.promotes)
        for change in alert.read_outs[:3]
    )
    kind = f"**{alert.kind}**" if alert.severity == "ALERT" else "info"
    cells = [
        str(alert.step),
        alert.stream,
        alert.behaviour,
        kind,
        f"{alert.rate:.1%} of {alert.counts[1]}",
        f"{alert.baseline_rate:.1%} of {alert.counts[3]}",
        f"{alert.p_value:.1e}",
        text,
        read_outs or "–",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _promoted(tokens: Sequence[str]) -> str:
    shown = " ".join(token.strip() for token in tokens[:4] if token.strip())
    return f" → {shown}" if shown else ""


def _context(context: TokenContext) -> str:
    # An indented block cannot be closed by anything inside a response, as a fence could.
    prompt = " ".join(context.prompt.split())
    body = context.marked(_LEFT, _RIGHT)
    lines = [f"prompt: {prompt}", *body.splitlines()]
    return "\n" + "\n".join("    " + line for line in lines) + "\n"
