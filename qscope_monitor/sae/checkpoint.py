"""Loading and saving of SAEs: from the hub, a folder or a file."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from qscope_monitor.sae.catalog import SAE_SETS
from qscope_monitor.sae.formats import (
    CONFIG,
    CheckpointError,
    describe_layers,
    layer_of,
    read_config,
    write_json,
    write_weights,
)
from qscope_monitor.sae.hub import HubStore
from qscope_monitor.sae.reading import FolderStore, Options, Store, read_sae
from qscope_monitor.sae.topk_sae import TopKSAE

__all__ = ["SAECollection", "load_sae", "load_saes", "save_sae"]

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


class SAECollection(Mapping[int, TopKSAE]):
    """The SAEs of several layers by layer number; each is loaded when first asked for, then kept."""

    def __init__(self, store: Store, layers: Iterable[int], options: Options) -> None:
        self._store = store
        self._options = options
        self._layers = tuple(dict.fromkeys(layers))
        self._loaded: dict[int, TopKSAE] = {}

    def __getitem__(self, layer: int) -> TopKSAE:
        if layer not in self._layers:
            raise KeyError(
                f"layer {layer} is not one of {describe_layers(self._layers)} chosen from {self._store.name}"
            )
        if layer not in self._loaded:
            self._loaded[layer] = read_sae(self._store, layer, self._store.locate(layer), self._options)
        return self._loaded[layer]

    def __contains__(self, layer: object) -> bool:
        return layer in self._layers

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        layers, loaded = describe_layers(self._layers), describe_layers(self._loaded)
        return f"SAECollection({self._store.name!r}, layers {layers}, loaded {loaded})"


def load_sae(
    source: str | os.PathLike[str],
    layer: int | None = None,
    k: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> TopKSAE:
    """Load the SAE of one layer.

    `k` is not in Qwen-Scope's weight files. It comes from, in this order: the argument; `config.json` beside the file;
    a safetensors file's metadata; `L0_{k}` in the name of the file, a folder above it or the repository; `SAE_SETS`.

    Args:
        source: hub repository id (only this layer's file and the config are fetched), a folder with
            `layer{n}.sae.pt` or `.safetensors` files, or one such file.
        layer: decoder layer, from 0; may be left out where there is only one.
        k: activations kept per token; wins over the files, with a warning where they differ.
        device: default the CPU.
        dtype: default fp32 on the CPU (16-bit products are slow there), what the file holds elsewhere.
        revision: branch, tag or commit of a hub repository.

    Raises:
        CheckpointError: if a file is missing, damaged, holds code, or is not a TopK SAE.
        ValueError: if the layer has to be given or k is found nowhere.

    Example:
        >>> sae = load_sae("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", layer=20)  # doctest: +SKIP
    """
    path = Path(source)
    options = Options(k, device, dtype)
    if _is_file(path):
        _no_revision(source, revision)
        return _load_file(path, layer, options)
    store = _open(source, revision)
    if layer is None:
        layers = store.layers()
        if len(layers) != 1:
            raise ValueError(f"{store.name}: pass layer=; layers there: {describe_layers(layers)}")
        layer = layers[0]
    return read_sae(store, layer, store.locate(layer), options)


def load_saes(
    source: str | os.PathLike[str],
    layers: Iterable[int] | None = None,
    k: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> SAECollection:
    """Open the SAEs of several layers as a mapping from layer to SAE; files are fetched and read when first asked for.

    Args:
        source: as in `load_sae`.
        layers: decoder layers, from 0; None for all there are.
        k: as in `load_sae`, for all layers.
        device: as in `load_sae`.
        dtype: as in `load_sae`.
        revision: as in `load_sae`.

    Raises:
        CheckpointError: if a layer is not there (its message lists those that are); reading may raise it later.
    """
    path = Path(source)
    if _is_file(path):
        _no_revision(source, revision)
        number = layer_of(path.name)
        if not path.is_file() or number is None:
            raise _missing(path)
        store: Store = FolderStore(path.parent, only=path.name)
    else:
        store = _open(source, revision)
    there = store.layers() if layers is None or not isinstance(store, HubStore) or _known(store) else None
    chosen = list(layers) if layers is not None else list(there or [])
    absent = [layer for layer in chosen if there is not None and layer not in there]
    if absent or not chosen:
        wanted = f"no SAE for layer {describe_layers(absent)}" if absent else "no SAEs"
        raise CheckpointError(f"{store.name}: {wanted}; layers there: {describe_layers(there or [])}")
    return SAECollection(store, chosen, Options(k, device, dtype))


def save_sae(sae: TopKSAE, path: str | os.PathLike[str]) -> Path:
    """Save an SAE so that `load_sae` and other readers of Qwen-Scope's format can load it.

    Args:
        sae: what to save; its dtype is kept.
        path: `*.pt`: Qwen-Scope's dict of four tensors, which does not hold k (name the folder or repository with
            `L0_{k}`, or pass k when loading); `*.safetensors`: with k and layer in the metadata; a folder:
            `layer{n}.sae.pt` and a `config.json` with k, sizes and `sae.meta`, which further layers are added to.

    Returns:
        The file with the weights.

    Raises:
        ValueError: if the suffix is another, a folder is given for an SAE without a layer, or its `config.json` is of
            SAEs with other sizes.
    """
    target = Path(path)
    if target.suffix in (".pt", ".safetensors") and not target.is_dir():
        write_weights(target, _weights(sae), {"k": str(sae.k), "layer": "" if sae.layer is None else str(sae.layer)})
        return target
    if target.is_file():
        raise ValueError(f"{target}: a file that ends in {target.suffix!r}; use .pt, .safetensors or a folder")
    if sae.layer is None:
        raise ValueError(f"{target}: the SAE has no layer, so its file cannot be named; set layer or give a file name")
    config = read_config(target / CONFIG) if (target / CONFIG).is_file() else {}
    sizes = {"d_model": sae.d_model, "d_sae": sae.d_sae, "k": sae.k}
    differ = {name: config[name] for name in sizes if config.get(name, sizes[name]) != sizes[name]}
    if differ:
        raise ValueError(f"{target / CONFIG}: holds SAEs with {differ}, not {sizes}; use another folder")
    meta = dict(sae.meta)
    layers = dict(config.get("layers") or {})
    layers[str(sae.layer)] = {name: value for name, value in meta.items() if name not in _SHARED}
    shared = {name: meta[name] for name in _SHARED if meta.get(name) is not None}
    head = {"model_type": "topk_sae", "hook_point": "resid_post"}
    ordered = dict(sorted(layers.items(), key=lambda item: int(item[0])))
    file = target / f"layer{sae.layer}.sae.pt"
    write_weights(file, _weights(sae), {})
    write_json(target / CONFIG, {**head, **config, **shared, **sizes, "layers": ordered})
    return file


_SHARED = ("model_type", "hook_point", "base_model", "num_layers")


def _weights(sae: TopKSAE) -> dict[str, torch.Tensor]:
    return {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}


def _is_file(path: Path) -> bool:
    return path.is_file() or (path.suffix in (".pt", ".safetensors") and not path.is_dir())


def _missing(path: Path) -> CheckpointError:
    if path.is_file():
        return CheckpointError(f"{path}: no layer number in the name; use load_sae, or name it layer{{n}}.sae.pt")
    return CheckpointError(f"{path}: no such file; expected layer{{n}}.sae.pt or .safetensors")


def _no_revision(source: str | os.PathLike[str], revision: str | None) -> None:
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for hub repositories, but {os.fspath(source)!r} is local")


def _known(store: Store) -> bool:
    return isinstance(store, HubStore) and store.repo_id in SAE_SETS


def _open(source: str | os.PathLike[str], revision: str | None) -> Store:
    if Path(source).is_dir():
        _no_revision(source, revision)
        return FolderStore(Path(source))
    if isinstance(source, str) and _REPO_ID.fullmatch(source):
        return HubStore(source, revision)
    raise CheckpointError(
        f"{os.fspath(source)!r} is no folder, no file and no hub repository id; expected for example "
        "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50 or a folder with layer{n}.sae.pt files"
    )


def _load_file(path: Path, layer: int | None, options: Options) -> TopKSAE:
    number = layer_of(path.name)
    if layer is not None and number is not None and layer != number:
        warnings.warn(f"{path}: named as layer {number} but loaded as layer {layer}, as asked", stacklevel=3)
    if not path.is_file():
        raise _missing(path)
    store = FolderStore(path.parent, only=path.name)
    return read_sae(store, number if layer is None else layer, path, options, source=str(path))
