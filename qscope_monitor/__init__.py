"""Watch Qwen-Scope SAE features while a language model is fine-tuned, and raise alerts.

No trainer framework and no Triton is imported here; callbacks live in `qscope_monitor.callbacks.trl`.
"""

from qscope_monitor import bundled
from qscope_monitor.alerts import Alert
from qscope_monitor.behaviours import Behaviour, detect_code_switching, detect_repetition
from qscope_monitor.features import ReadOut, WatchList, find_language_features
from qscope_monitor.monitor import FeatureMonitor
from qscope_monitor.reporting import read_alerts
from qscope_monitor.residual import capture
from qscope_monitor.sae import (
    SAE_SETS,
    CheckpointError,
    SAESet,
    SparseActivations,
    TopKSAE,
    load_sae,
    load_saes,
    save_sae,
    train_sae,
)
from qscope_monitor.sampling import Rollout, RolloutSettings, sample_rollouts
from qscope_monitor.tokens import Segment, TokenBatch, TokenRules

__version__ = "0.1.0"

__all__ = [
    "SAE_SETS",
    "Alert",
    "Behaviour",
    "CheckpointError",
    "FeatureMonitor",
    "ReadOut",
    "Rollout",
    "RolloutSettings",
    "SAESet",
    "Segment",
    "SparseActivations",
    "TokenBatch",
    "TokenRules",
    "TopKSAE",
    "WatchList",
    "bundled",
    "capture",
    "detect_code_switching",
    "detect_repetition",
    "find_language_features",
    "load_sae",
    "load_saes",
    "read_alerts",
    "sample_rollouts",
    "save_sae",
    "train_sae",
]
