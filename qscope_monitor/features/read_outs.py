"""Read-outs and watch lists: what is watched, with the evidence for it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qscope_monitor.behaviours import scripts_of

WATCH_LIST_SCHEMA_VERSION = 1
WINDOW = 16  # tokens in a row over which margins are averaged; single tokens are noise
Role = Literal["judge", "act"]


@dataclass(frozen=True, eq=False)
class ReadOut:
    """One direction to read from the residual stream: an SAE feature, or a linear probe (`feature` is None).

    Attributes:
        layer: decoder layer, from 0; the read-out sees that block's output.
        feature: SAE feature number, or None for a probe.
        weight: [d_model] fp32, the encoder row.
        bias: encoder bias. `score(x) = weight . x + bias`, a pre-activation.
        threshold: score above which the read-out counts as firing; for a feature the level that survival of the
            top-k corresponds to, calibrated at discovery.
        scale: typical (score - threshold) of a firing token, > 0; makes margins of different read-outs comparable.
        direction: [d_model] fp32, what acting uses: the decoder column, for a probe the difference of class means.
        behaviour: what it is tied to: `code-switching`, `repetition`, or a name of the user's.
        language: the read-out's own language (samples expected in it are left out), or None.
        role: `judge` raises alerts; `act` is used by a penalty or reward and is no longer evidence.
        label: a short human-readable description.
        promotes: tokens whose logits the direction raises most.
        evidence: measured figures behind the choice, such as AUROC and firing rates.
    """

    layer: int
    feature: int | None
    weight: Tensor
    bias: float
    threshold: float
    scale: float
    direction: Tensor
    behaviour: str
    language: str | None = None
    role: Role = "judge"
    label: str = ""
    promotes: tuple[str, ...] = ()
    evidence: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.role not in ("judge", "act"):
            raise ValueError(f"role must be 'judge' or 'act', got {self.role!r}")
        if self.weight.ndim != 1 or self.weight.shape != self.direction.shape:
            raise ValueError(
                f"{self.name}: weight and direction must both be [d_model], got "
                f"{list(self.weight.shape)} and {list(self.direction.shape)}"
            )
        numbers = {"bias": self.bias, "threshold": self.threshold, "scale": self.scale}
        for name, value in numbers.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{self.name}: {name} must be a finite number, got {value!r}")
        if not self.scale > 0:
            raise ValueError(f"{self.name}: scale must be > 0, got {self.scale!r}")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise ValueError(f"layer must be an integer from 0, got {self.layer!r}")
        if self.language is not None:
            scripts_of(self.language)

    @property
    def name(self) -> str:
        """`L5/F123`, or `L5/probe`."""
        return f"L{self.layer}/" + ("probe" if self.feature is None else f"F{self.feature}")

    @property
    def key(self) -> str:
        """The behaviour it belongs to in tables and tags, such as `code-switching-zh`."""
        return self.behaviour if self.language is None else f"{self.behaviour}-{self.language}"

    def score(self, x: Tensor) -> Tensor:
        """Pre-activation of residuals [..., d_model] -> [...], fp32, differentiable in x."""
        return x.float() @ self.weight.to(x.device) + self.bias

    def __repr__(self) -> str:
        return f"ReadOut({self.name}, {self.key}, role={self.role}, threshold={self.threshold:.3g}, {self.label!r})"


class WatchList(Sequence[ReadOut]):
    """The read-outs to watch, self-contained: a training job needs no SAE to use it.

    Args:
        read_outs: the entries; all must share d_model.
        provenance: how it was found: model, SAE source, texts, arguments, versions.
        evaluation: measured quality beside its controls.
        floors: behaviour key -> mean margin over 16 tokens that most passages showing the behaviour reach; no response
            counts below it, however rare such a margin is.

    Raises:
        ValueError: read-outs of different d_model.
    """

    def __init__(
        self,
        read_outs: Iterable[ReadOut],
        provenance: dict[str, Any] | None = None,
        evaluation: dict[str, Any] | None = None,
        floors: dict[str, float] | None = None,
    ) -> None:
        self.read_outs = tuple(read_outs)
        self.provenance = dict(provenance or {})
        self.evaluation = dict(evaluation or {})
        self.floors = dict(floors or {})
        sizes = {len(r.weight) for r in self.read_outs}
        if len(sizes) > 1:
            raise ValueError(f"read-outs of different d_model in one watch list: {sorted(sizes)}")

    @overload
    def __getitem__(self, index: int) -> ReadOut: ...
    @overload
    def __getitem__(self, index: slice) -> WatchList: ...
    def __getitem__(self, index: int | slice) -> ReadOut | WatchList:
        if isinstance(index, slice):
            return WatchList(self.read_outs[index], self.provenance, self.evaluation, self.floors)
        return self.read_outs[index]

    def __len__(self) -> int:
        return len(self.read_outs)

    def __iter__(self) -> Iterator[ReadOut]:
        return iter(self.read_outs)

    def __add__(self, other: WatchList) -> WatchList:
        """Both lists' read-outs; provenance and evaluation are kept side by side under `parts`."""
        return WatchList(
            (*self.read_outs, *other.read_outs),
            {"parts": [self.provenance, other.provenance]},
            {"parts": [self.evaluation, other.evaluation]},
            {**self.floors, **other.floors},
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers read from, ascending."""
        return tuple(sorted({r.layer for r in self.read_outs}))

    @property
    def keys(self) -> tuple[str, ...]:
        """The behaviours judged, in order of first appearance."""
        return tuple(dict.fromkeys(r.key for r in self.read_outs if r.role == "judge"))

    @property
    def d_model(self) -> int | None:
        """Width of the residual stream, None for an empty list."""
        return len(self.read_outs[0].weight) if self.read_outs else None

    def with_role(self, role: Role) -> WatchList:
        """The same read-outs, all with `role`."""
        changed = (replace(r, role=role) for r in self.read_outs)
        return WatchList(changed, self.provenance, self.evaluation, self.floors)

    def save(self, path: str | Path) -> None:
        """Write the folder `path`: `watch_list.json` (what people read) and `read_outs.safetensors` (weights)."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        if self.read_outs:
            weights = {
                "weight": torch.stack([r.weight.float().cpu() for r in self.read_outs]),
                "direction": torch.stack([r.direction.float().cpu() for r in self.read_outs]),
            }
            # Not save_file, which hides the file from other users of the folder.
            (folder / "read_outs.safetensors").write_bytes(save(weights))
        entries = [
            {
                "layer": r.layer,
                "feature": r.feature,
                "bias": r.bias,
                "threshold": r.threshold,
                "scale": r.scale,
                "behaviour": r.behaviour,
                "language": r.language,
                "role": r.role,
                "label": r.label,
                "promotes": list(r.promotes),
                "evidence": r.evidence,
            }
            for r in self.read_outs
        ]
        document = {
            "schema_version": WATCH_LIST_SCHEMA_VERSION,
            "d_model": self.d_model,
            "floors": self.floors,
            "read_outs": entries,
            "provenance": self.provenance,
            "evaluation": self.evaluation,
        }
        text = json.dumps(document, ensure_ascii=False, indent=2)
        (folder / "watch_list.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> WatchList:
        """Read a folder written by `save`.

        Raises:
            FileNotFoundError: no `watch_list.json` there.
            ValueError: another schema, or JSON and weights that do not agree; the file is named.
        """
        file = Path(path) / "watch_list.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: not found; a watch list is a folder with watch_list.json in it")
        try:
            return cls._read(file)
        except (KeyError, TypeError, AttributeError, SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a watch list: {type(error).__name__}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def _read(cls, file: Path) -> WatchList:
        document = json.loads(file.read_text(encoding="utf-8"))
        version = document.get("schema_version")
        if version != WATCH_LIST_SCHEMA_VERSION:
            raise ValueError(f"schema_version {version!r}, this version reads {WATCH_LIST_SCHEMA_VERSION}")
        entries = document["read_outs"]
        weights = file.with_name("read_outs.safetensors")
        tensors = load(weights.read_bytes()) if entries else {}
        expected = [len(entries), document["d_model"]]
        for name in ("weight", "direction") if entries else ():
            found = list(tensors[name].shape) if name in tensors else None
            if found != expected:
                raise ValueError(f"{weights.name}: {name} has shape {found}, expected {expected}")
            if not torch.isfinite(tensors[name]).all():
                raise ValueError(f"{weights.name}: {name} holds values that are not finite")
        read_outs = [
            ReadOut(
                weight=tensors["weight"][i].clone(),
                direction=tensors["direction"][i].clone(),
                **{**entry, "promotes": tuple(entry["promotes"])},
            )
            for i, entry in enumerate(entries)
        ]
        return cls(read_outs, document["provenance"], document["evaluation"], document["floors"])

    def __repr__(self) -> str:
        return f"WatchList({len(self)} read-outs, layers {list(self.layers)}, {', '.join(self.keys) or 'no behaviour'})"
