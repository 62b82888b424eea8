"""Sums that live on the device until they are read: one reduction over ranks and one copy to the host."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class Counters:
    """Named sums kept in one flat buffer on one device.

    Adding never synchronises with the host. `take` adds up all ranks (every rank must call it at the same point, and
    every rank has the same names and shapes by construction), copies once, and starts again from zero.

    Args:
        shapes: name -> shape of each sum.
        device: where the sums live.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device | str = "cpu") -> None:
        self.shapes = dict(shapes)
        # float64 counts exactly up to 2^53; Apple's GPUs have no float64.
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self._flat = torch.zeros(sum(prod(shape) for shape in self.shapes.values()), dtype=dtype, device=device)
        self._views: dict[str, Tensor] = {}
        start = 0
        for name, shape in self.shapes.items():
            self._views[name] = self._flat[start : start + prod(shape)].view(shape)
            start += prod(shape)

    @property
    def device(self) -> torch.device:
        """Where the sums live."""
        return self._flat.device

    @torch.no_grad()
    def add(self, name: str, value: Tensor) -> None:
        """Add `value`, of the name's shape."""
        self._views[name].add_(value.to(self._flat.dtype).view(self.shapes[name]))

    def take(self) -> dict[str, np.ndarray]:
        """The sums over all ranks since the last call; counting starts again from zero."""
        total = self._flat.clone()
        self._flat.zero_()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        host = total.cpu().double().numpy()
        values: dict[str, np.ndarray] = {}
        start = 0
        for name, shape in self.shapes.items():
            values[name] = host[start : start + prod(shape)].reshape(shape).copy()
            start += prod(shape)
        return values


def sum_counts(windows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Element-wise sum of several `take` results."""
    return {name: np.sum([window[name] for window in windows], axis=0) for name in windows[0]}
