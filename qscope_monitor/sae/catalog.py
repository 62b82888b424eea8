"""The published Qwen-Scope SAE sets: names, backbones and sizes, known without a download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["SAE_SETS", "SAESet"]


@dataclass(frozen=True)
class SAESet:
    """One released set: a TopK SAE for the residual stream after every decoder layer of one backbone.

    Attributes:
        repo_id: Hugging Face repository with one `layer{n}.sae.pt` per layer, numbered from 0.
        backbone: Hugging Face repository of the model it was trained on.
        num_layers: decoder layers, and SAEs.
        d_model: width of the residual stream.
        d_sae: number of features.
        k: activations kept per token.
    """

    repo_id: str
    backbone: str
    num_layers: int
    d_model: int
    d_sae: int
    k: int


# (name, width in units of 1024 features, L0, backbone, layers, d_model), from section 3 of arXiv 2605.11887 and the
# model cards; the mixture-of-experts backbones pair the narrow set with k = 50 and the wide one with k = 100 only.
_RELEASED = (
    ("Qwen3-1.7B-Base", 32, (50, 100), "Qwen3-1.7B-Base", 28, 2048),
    ("Qwen3-8B-Base", 64, (50, 100), "Qwen3-8B-Base", 36, 4096),
    ("Qwen3-30B-A3B-Base", 32, (50,), "Qwen3-30B-A3B-Base", 48, 2048),
    ("Qwen3-30B-A3B-Base", 128, (100,), "Qwen3-30B-A3B-Base", 48, 2048),
    ("Qwen3.5-2B-Base", 32, (50, 100), "Qwen3.5-2B-Base", 24, 2048),
    ("Qwen3.5-9B-Base", 64, (50, 100), "Qwen3.5-9B-Base", 32, 4096),
    ("Qwen3.5-27B", 80, (50, 100), "Qwen3.5-27B", 64, 5120),
    ("Qwen3.5-35B-A3B-Base", 32, (50,), "Qwen3.5-35B-A3B-Base", 40, 2048),
    ("Qwen3.5-35B-A3B-Base", 128, (100,), "Qwen3.5-35B-A3B-Base", 40, 2048),
)


def _sets() -> dict[str, SAESet]:
    sets = {}
    for name, width, ks, backbone, layers, d_model in _RELEASED:
        for k in ks:
            repo_id = f"Qwen/SAE-Res-{name}-W{width}K-L0_{k}"
            sets[repo_id] = SAESet(repo_id, f"Qwen/{backbone}", layers, d_model, width * 1024, k)
    return sets


SAE_SETS: Mapping[str, SAESet] = MappingProxyType(_sets())
"""The 14 released sets by repository id."""
