"""TopK sparse autoencoders: the class, the published sets, loading and saving, training."""

from ..kernels.activations import SparseActivations
from .catalog import SAE_SETS, SAESet
from .checkpoint import load_sae, load_saes, save_sae
from .formats import CheckpointError
from .topk_sae import TopKSAE
from .training import train_sae

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
