"""TopK sparse autoencoders: the class, the published sets, loading and saving, training."""

from qscope_monitor.kernels.activations import SparseActivations
from qscope_monitor.sae.catalog import SAE_SETS, SAESet
from qscope_monitor.sae.checkpoint import load_sae, load_saes, save_sae
from qscope_monitor.sae.formats import CheckpointError
from qscope_monitor.sae.topk_sae import TopKSAE
from qscope_monitor.sae.training import train_sae

__all__ = [
    "SAE_SETS",
    "CheckpointError",
    "SAESet",
    "SparseActivations",
    "TopKSAE",
    "load_sae",
    "load_saes",
    "save_sae",
    "train_sae",
]
