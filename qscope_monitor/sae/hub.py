"""SAE files on the Hugging Face hub: fetches only the layers asked for and the config, through the usual cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qscope_monitor.sae.catalog import SAE_SETS
from qscope_monitor.sae.formats import CONFIG, CheckpointError, describe_layers, layer_of

__all__ = ["HubStore"]


class HubStore:
    """A repository with a file per layer. HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN work as always.

    Args:
        repo_id: `owner/name`.
        revision: branch, tag or commit; None for the default branch.
    """

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        self.repo_id = repo_id
        self.revision = revision
        self.name = repo_id if revision is None else f"{repo_id}@{revision}"

    def layers(self) -> list[int]:
        """Layers there are: from the catalogue for the published sets, else as the repository lists them."""
        if self.repo_id in SAE_SETS:
            return list(range(SAE_SETS[self.repo_id].num_layers))
        try:
            files = HfApi().list_repo_files(self.repo_id, revision=self.revision)
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            raise CheckpointError(self._unreachable(error)) from error
        except (HfHubHTTPError, OSError):  # offline or down: what the cache holds
            try:
                folder = snapshot_download(self.repo_id, revision=self.revision, local_files_only=True)
            except (LocalEntryNotFoundError, OSError, ValueError) as error:
                raise CheckpointError(self._unreachable(error)) from error
            files = [path.name for path in Path(folder).iterdir()]
        return sorted({layer for layer in map(layer_of, files) if layer is not None})

    def locate(self, layer: int) -> Path:
        """Path of the layer's file in the local cache, downloaded if need be."""
        failures = []
        for name in (f"layer{layer}.sae.pt", f"layer{layer}.sae.safetensors", f"layer{layer}.safetensors"):
            try:
                return self._fetch(name)
            except EntryNotFoundError as error:
                failures.append(error)
        if all(isinstance(error, LocalEntryNotFoundError) for error in failures):
            raise CheckpointError(
                f"{self.name}: layer{layer}.sae.pt is not in the local cache and the hub cannot be reached "
                f"(offline mode, or no network): {failures[0]}"
            ) from failures[0]
        raise CheckpointError(
            f"{self.name}: no file for layer {layer}; layers there: {describe_layers(self.layers())}"
        ) from failures[0]

    def config(self) -> Path | None:
        """Path of `config.json` in the local cache, or None where the repository has none or cannot be reached."""
        try:
            return self._fetch(CONFIG)
        except EntryNotFoundError:
            return None

    def _fetch(self, name: str) -> Path:
        try:
            return Path(hf_hub_download(self.repo_id, name, revision=self.revision))
        except EntryNotFoundError:
            raise
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise CheckpointError(self._unreachable(error)) from error

    def _unreachable(self, error: Exception) -> str:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return (
            f"{self.name}: cannot be read from the hub ({type(error).__name__}: {first}); expected an existing folder "
            "or file, or a repository id such as Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
        )
