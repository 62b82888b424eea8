"""Where alerts and figures go: TensorBoard, JSON lines, the log, trackio, W&B."""

from qscope_monitor.reporting.ledger import ledger_markdown
from qscope_monitor.reporting.sinks import CallbackSink, JsonLinesSink, LogSink, Sink, read_alerts
from qscope_monitor.reporting.tensorboard import TensorBoardSink, make_writer
from qscope_monitor.reporting.trackers import active_trackers

__all__ = [
    "CallbackSink",
    "JsonLinesSink",
    "LogSink",
    "Sink",
    "TensorBoardSink",
    "active_trackers",
    "ledger_markdown",
    "make_writer",
    "read_alerts",
]
