"""Read-outs and watch lists, how they are found, and how good they are."""

from qscope_monitor.features.language import find_language_features, firing_rates
from qscope_monitor.features.read_outs import ReadOut, WatchList

__all__ = ["ReadOut", "WatchList", "find_language_features", "firing_rates"]
