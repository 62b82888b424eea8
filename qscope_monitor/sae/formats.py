"""The files an SAE is kept in: Qwen-Scope's `layer{n}.sae.pt`, the same four tensors as safetensors, `config.json`.

A `.pt` file is read with `weights_only=True`, so nothing in it is executed, and memory-mapped, so a layer of 2 GB costs
no copy. Whatever is wrong with a file ends in `CheckpointError`.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "CheckpointError",
    "describe_layers",
    "layer_of",
    "read_config",
    "read_weights",
    "replace_file",
    "write_json",
    "write_weights",
]

WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec")
CONFIG = "config.json"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LAYER_FILE = re.compile(r"layer(\d+)(?:\.sae)?\.(?:pt|safetensors)")


class CheckpointError(ValueError):
    """A file that does not hold what it should: names the file, what was found and what was expected."""


def layer_of(name: str) -> int | None:
    """Layer number in a file name such as `layer20.sae.pt`; None for other names."""
    match = _LAYER_FILE.fullmatch(name)
    return int(match[1]) if match else None


def describe_layers(layers: Iterable[int]) -> str:
    """Layer numbers for an error message, runs shortened: `0-27` or `2, 5-7`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) or "none"


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the four checked tensors of a `.pt` or `.safetensors` file, on the CPU, and a safetensors file's metadata.

    Raises:
        CheckpointError: if the file is missing, damaged, of another kind or holds code; if keys, shapes or dtypes are
            not those of a TopK SAE; if a weight is infinite or NaN.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected layer{{n}}.sae.pt or .safetensors")
    if path.suffix == ".safetensors":
        found, metadata = _read_safetensors(path)
    elif path.suffix == ".pt":
        found, metadata = _read_pt(path), {}
    else:
        raise CheckpointError(f"{path}: found a file ending in {path.suffix!r}, expected .pt or .safetensors")
    return _checked(path, found), metadata


def _read_pt(path: Path) -> Any:
    try:
        # only the zip format can be mapped; older files are read whole
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:  # torch raises whatever a damaged or hostile pickle makes its parts raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CheckpointError(
            f"{path}: not readable as a file of plain tensors ({type(error).__name__}: {first}); expected a dict with "
            f"{', '.join(WEIGHTS)} saved by torch.save. Nothing in it was executed. If it was downloaded, it may be "
            "incomplete."
        ) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # SafetensorError for most damage, OSError or ValueError for the rest
        raise CheckpointError(
            f"{path}: not readable as safetensors ({type(error).__name__}: {error}); expected {', '.join(WEIGHTS)}. "
            "If it was downloaded, it may be incomplete."
        ) from error


def _checked(path: Path, found: Any) -> dict[str, Tensor]:
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path}: found a {type(found).__name__}, expected a dict of {', '.join(WEIGHTS)}")
    if set(found) != set(WEIGHTS):
        missing = [name for name in WEIGHTS if name not in found]
        extra = sorted(str(name) for name in found if name not in WEIGHTS)
        parts = [f"missing {', '.join(missing)}"] * bool(missing) + [f"not expected {', '.join(extra[:8])}"] * bool(
            extra
        )
        raise CheckpointError(f"{path}: {'; '.join(parts)}. Expected exactly {', '.join(WEIGHTS)}")
    for name in WEIGHTS:
        value = found[name]
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{path}: {name} is a {type(value).__name__}, expected a dense tensor")
        if value.dtype not in _FLOATS:
            raise CheckpointError(f"{path}: {name} has dtype {value.dtype}, expected fp16, bf16, fp32 or fp64")
    _check_shapes(path, found)
    for name in WEIGHTS:
        low, high = found[name].detach().aminmax()  # carries NaN and both infinities, without a copy
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CheckpointError(f"{path}: {name} holds infinities or NaN, expected finite weights")
    return {name: found[name].detach() for name in WEIGHTS}


def _check_shapes(path: Path, weights: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(weights[name].shape) for name in WEIGHTS}
    if len(shapes["b_enc"]) == len(shapes["b_dec"]) == 1:
        d_sae, d_model = shapes["b_enc"][0], shapes["b_dec"][0]
        expected = {"W_enc": (d_sae, d_model), "W_dec": (d_model, d_sae)}
        wrong = [name for name, shape in expected.items() if shapes[name] != shape]
        if not wrong and d_sae and d_model:
            return
        hint = " (transposed?)" if wrong and all(shapes[name] == expected[name][::-1] for name in wrong) else ""
    else:
        hint = ""
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    raise CheckpointError(
        f"{path}: found shapes {listed}{hint}; expected W_enc (d_sae, d_model), W_dec (d_model, d_sae), "
        "b_enc (d_sae,), b_dec (d_model,)"
    )


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` as a dict, with `k`, `d_model`, `d_sae` checked to be positive integers where present.

    Raises:
        CheckpointError: if the file is not a JSON object or one of those fields is something else.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({type(error).__name__}: {error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: found a JSON {type(config).__name__}, expected an object")
    for name in ("k", "d_model", "d_sae"):
        value = config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise CheckpointError(f"{path}: {name} is {value!r}, expected a positive integer")
    return config


def write_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the four tensors to a `.pt` (metadata left out: Qwen-Scope's own dict) or `.safetensors` file."""
    # a copy of each: a view would drag its whole storage into the file
    plain = {name: weights[name].detach().cpu().contiguous().clone() for name in WEIGHTS}
    if path.suffix == ".pt":
        replace_file(path, lambda temporary: torch.save(plain, temporary))
    elif path.suffix == ".safetensors":
        replace_file(path, lambda temporary: save_file(plain, temporary, metadata=dict(metadata)))
    else:
        raise ValueError(f"{path}: ends in {path.suffix!r}; use .pt, .safetensors or a folder")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, in one step."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
    replace_file(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[str], object]) -> None:
    """Write beside `path`, then rename: a reader, or a mapping of the old file, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files only the owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
