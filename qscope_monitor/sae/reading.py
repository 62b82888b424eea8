"""Reading one layer: where its file, config and number of activations come from, and on what device it ends up."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from qscope_monitor.sae.catalog import SAE_SETS
from qscope_monitor.sae.formats import CONFIG, CheckpointError, describe_layers, layer_of, read_config, read_weights
from qscope_monitor.sae.topk_sae import TopKSAE

__all__ = ["FolderStore", "Options", "Store", "read_sae"]

_L0 = re.compile(r"L0_(\d+)(?!\d)")


@dataclass(frozen=True)
class Options:
    """What the caller asked for; None: decided by the files and the device."""

    k: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class Store(Protocol):
    """A place with a file per layer."""

    name: str

    def layers(self) -> list[int]:
        """Layers there are."""

    def locate(self, layer: int) -> Path:
        """File of one layer."""

    def config(self) -> Path | None:
        """Find the `config.json`, if there is one."""


class FolderStore:
    """A local folder with a file per layer; `only`: the name of the one file that counts."""

    def __init__(self, path: Path, only: str | None = None) -> None:
        self.path, self.name = path, str(path)
        # sorted, so that where both formats are there, safetensors comes last and wins
        named = ((layer_of(file.name), file) for file in sorted(path.iterdir()))
        self.files = {layer: file for layer, file in named if layer is not None and only in (None, file.name)}

    def layers(self) -> list[int]:
        """Layers there are."""
        return sorted(self.files)

    def locate(self, layer: int) -> Path:
        """File of one layer."""
        if layer not in self.files:
            there = describe_layers(self.files)
            raise CheckpointError(f"{self.path}: no file layer{layer}.sae.pt or .safetensors; layers there: {there}")
        return self.files[layer]

    def config(self) -> Path | None:
        """Find the `config.json`, if there is one."""
        path = self.path / CONFIG
        return path if path.is_file() else None


def read_sae(store: Store, layer: int | None, path: Path, options: Options, source: str | None = None) -> TopKSAE:
    """Load the SAE in `path`, a file of `store`; `source` is what it is said to come from, default the store's name."""
    weights, metadata = read_weights(path)
    config_path = store.config()
    config = read_config(config_path) if config_path is not None else {}
    d_sae, d_model = weights["W_enc"].shape
    for name, size in (("d_model", d_model), ("d_sae", d_sae)):
        if config.get(name) not in (None, size):
            raise CheckpointError(f"{config_path}: {name} is {config[name]}, but {path} has {name} {size}")
    if layer is None and metadata.get("layer", "").isdecimal():
        layer = int(metadata["layer"])
    k = _resolve_k(options.k, config, metadata, store, path)
    if not 1 <= k <= d_sae:
        raise CheckpointError(f"{path}: k is {k}, expected 1 to d_sae = {d_sae}")
    place, dtype = torch.device("cpu" if options.device is None else options.device), options.dtype
    if dtype is None and place.type == "cpu":
        dtype = torch.float32
    placed = {name: weight.to(device=place, dtype=dtype) for name, weight in weights.items()}
    return TopKSAE(**placed, k=k, layer=layer, source=source or store.name, meta=_meta(config, layer, store))


def _resolve_k(
    given: int | None, config: Mapping[str, Any], metadata: Mapping[str, str], store: Store, path: Path
) -> int:
    known = SAE_SETS.get(store.name.partition("@")[0])
    # nearest name first; a file in the hub's cache lies under .../models--owner--name/snapshots/...
    names = (_L0.findall(part) for part in reversed((*path.absolute().parts, store.name)))
    candidates = (
        (config.get("k"), CONFIG),
        (int(metadata["k"]) if metadata.get("k", "").isdecimal() else None, "the file's metadata"),
        (next((int(found[-1]) for found in names if found), None), "the name"),
        (known.k if known else None, "the catalogue"),
    )
    value, origin = next(((value, origin) for value, origin in candidates if value is not None), (None, ""))
    if given is not None:
        if value is not None and value != given:
            warnings.warn(f"{path}: k={given} is used as asked, but {origin} says {value}", stacklevel=4)
        return given
    if value is None:
        raise ValueError(
            f"{path}: k is neither in a {CONFIG} beside it nor in a name with L0_{{k}}; pass k=, the number of "
            "activations kept per token in training"
        )
    return value


def _meta(config: Mapping[str, Any], layer: int | None, store: Store) -> dict[str, Any]:
    meta = {name: value for name, value in config.items() if name not in ("k", "d_model", "d_sae", "layers")}
    layers = config.get("layers")
    if isinstance(layers, Mapping) and isinstance(layers.get(str(layer)), Mapping):
        meta.update(layers[str(layer)])
    known = SAE_SETS.get(store.name.partition("@")[0])
    if known:
        meta.setdefault("base_model", known.backbone)
    return meta
