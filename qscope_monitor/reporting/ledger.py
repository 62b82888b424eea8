"""The ledger of alerts as Markdown: a table, newest first, the responses behind the newest alerts, then information.

TensorBoard keeps a random sample of the texts written to one tag, and surely only the newest; so every alert rewrites
the whole ledger.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from qscope_monitor.alerts import PLACES, Alert, TokenContext, ledger_order

MAXIMUM_ROWS = 50
MAXIMUM_CONTEXTS = 3
MAXIMUM_INFORMATION = 10
MAXIMUM_COLUMNS = 100
LEFT, RIGHT = "⟦", "⟧"
# Few and wide columns: TensorBoard breaks words in narrow ones.
_ALARM_HEADINGS = (
    *("alert", "responses exceeding", "text detector"),
    "read-outs: firing rate per response token, and what they promote",
)
_INFORMATION_HEADINGS = ("feature", "responses it fires in", "promotes")


def ledger_markdown(alerts: Sequence[Alert]) -> str:
    """The whole ledger. Runs of tokens at which the read-outs fire stand between ⟦ and ⟧."""
    ordered = ledger_order(alerts)
    alarms = [alert for alert in ordered if alert.severity == "ALERT"]
    information = [alert for alert in ordered if alert.severity == "INFO"]
    parts = []
    if alarms:
        parts.append(_table(_ALARM_HEADINGS, [_alarm(alert) for alert in alarms[:MAXIMUM_ROWS]]))
        if len(alarms) > MAXIMUM_ROWS:
            parts.append(f"{len(alarms) - MAXIMUM_ROWS} older entries are in `alerts.jsonl`.")
        shown = [alert for alert in alarms if alert.contexts][:MAXIMUM_CONTEXTS]
        for alert in shown:
            parts.append(f"### Step {alert.step}: {alert.behaviour} in {PLACES[alert.stream]}")
            parts += [_context(context) for context in alert.contexts]
    else:
        parts.append("No alert so far.")
    if information:
        newest = information[:MAXIMUM_INFORMATION]
        parts.append("### For information: features that became active and are not watched")
        parts.append(_table(_INFORMATION_HEADINGS, [_information(alert) for alert in newest]))
        if len(information) > len(newest):
            parts.append(f"The newest {len(newest)} of {len(information)}; all are in `alerts.jsonl`.")
    return "\n\n".join(parts)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _alarm(alert: Alert) -> list[str]:
    text = "–"
    if alert.text_rate is not None and alert.text_baseline_rate is not None:
        text = f"{alert.text_rate:.1%} (was {alert.text_baseline_rate:.1%})"
    read_outs = "; ".join(
        f"{change.name} {change.rate:.2%} (was {change.baseline_rate:.2%})" + _promoted(change.promotes)
        for change in alert.read_outs[:2]
    )
    return [
        f"**{alert.kind}** at step {alert.step}: {alert.behaviour} in {PLACES[alert.stream]}",
        f"{alert.rate:.1%} of {alert.counts[1]} (was {alert.baseline_rate:.1%} of {alert.counts[3]}), "
        f"p = {alert.p_value:.1e}",
        text,
        read_outs or "–",
    ]


def _information(alert: Alert) -> list[str]:
    promotes = [token for change in alert.read_outs for token in change.promotes]
    return [
        f"{alert.behaviour} in {PLACES[alert.stream]} at step {alert.step}",
        f"{alert.rate:.1%} of {alert.counts[1]} (was {alert.baseline_rate:.1%} of {alert.counts[3]})",
        " ".join(token.strip() for token in promotes[:6]) or "–",
    ]


def _promoted(tokens: Sequence[str]) -> str:
    shown = " ".join(token.strip() for token in tokens[:3] if token.strip())
    return f" → {shown}" if shown else ""


def _context(context: TokenContext) -> str:
    # An indented block cannot be closed by anything inside a response, as a fence could.
    lines = [f"prompt: {' '.join(context.prompt.split())}", *context.marked(LEFT, RIGHT).splitlines()]
    return "\n".join("    " + piece for line in lines for piece in _wrapped(line))


def _wrapped(line: str) -> list[str]:
    """A line cut to pieces that fit TensorBoard's box; Chinese characters are two columns wide and have no spaces."""
    pieces, piece, width = [], "", 0
    for character in line:
        columns = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if width + columns > MAXIMUM_COLUMNS:
            pieces.append(piece)
            piece, width = "", 0
        piece, width = piece + character, width + columns
    return [*pieces, piece]
