"""The watch list as matrices: every read-out of a layer in one product, on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qscope_monitor.features.read_outs import WatchList
from qscope_monitor.tokens import TokenBatch, drop_norm_outliers


@dataclass(frozen=True)
class Reading:
    """What the read-outs say of one batch.

    Attributes:
        scores: [batch, seq, F] pre-activations, 0 where a token does not count.
        margins: [batch, seq, F] ReLU((score - threshold) / scale), 0 where a token does not count.
        keep: [batch, seq] bool, tokens that count on every layer read.
        excluded: tokens that do not count, by reason (on the last layer read).
    """

    scores: Tensor
    margins: Tensor
    keep: Tensor
    excluded: Mapping[str, int | Tensor]


class ReadOutPanel:
    """Stacks a watch list's read-outs, in layer order.

    Args:
        watch: the watch list.
        device: where the residuals are.
    """

    def __init__(self, watch: WatchList, device: torch.device) -> None:
        self.read_outs = sorted(watch, key=lambda r: r.layer)
        self.keys = watch.keys
        self.device = device
        # [F, keys]: a behaviour's margin is the mean over its judging read-outs.
        self._members = torch.zeros(len(self.read_outs), len(self.keys), device=device)
        for j, key in enumerate(self.keys):
            members = self.judges(key)
            self._members[members, j] = 1 / len(members)
        self._layers: list[tuple[int, slice, Tensor, Tensor, Tensor, Tensor]] = []
        for layer in watch.layers:
            rows = [i for i, r in enumerate(self.read_outs) if r.layer == layer]
            chosen = [self.read_outs[i] for i in rows]
            weight = torch.stack([r.weight.float() for r in chosen]).to(device)  # [F_l, d_model]
            columns = torch.tensor([(r.bias, r.threshold, r.scale) for r in chosen], device=device)
            bias, threshold, scale = columns.unbind(1)
            self._layers.append((layer, slice(rows[0], rows[-1] + 1), weight, bias, threshold, scale))

    def judges(self, key: str) -> list[int]:
        """Columns of the read-outs that judge a behaviour."""
        return [i for i, r in enumerate(self.read_outs) if r.key == key and r.role == "judge"]

    def language(self, key: str) -> str | None:
        """The language of a behaviour's read-outs."""
        return self.read_outs[self.judges(key)[0]].language

    def behaviour(self, key: str) -> str:
        """The behaviour's name, without its language."""
        return self.read_outs[self.judges(key)[0]].behaviour

    def read(self, residuals: Mapping[int, Tensor], tokens: TokenBatch) -> Reading:
        """Score a batch. `residuals`: layer -> [batch, seq, d_model]."""
        scores = torch.zeros(*tokens.input_ids.shape, len(self.read_outs), device=self.device)
        margins = torch.zeros_like(scores)
        keep = tokens.keep
        excluded: Mapping[str, int | Tensor] = {}
        for layer, columns, weight, bias, threshold, scale in self._layers:
            counted = drop_norm_outliers(tokens, residuals[layer])
            score = residuals[layer].float() @ weight.T + bias  # [batch, seq, F_l]
            # A choice, not a product: a non-finite row must not poison the sums.
            score = torch.where(counted.keep.unsqueeze(-1), score, 0.0)
            scores[..., columns] = score
            margins[..., columns] = ((score - threshold) / scale).clamp_min(0) * counted.keep.unsqueeze(-1)
            keep, excluded = keep & counted.keep, counted.excluded
        return Reading(scores, margins, keep, excluded)

    def by_behaviour(self, reading: Reading, where: Tensor) -> Tensor:
        """[batch, seq, keys] margin of each behaviour at the tokens `where` [batch, seq], 0 elsewhere."""
        return (reading.margins @ self._members) * where.unsqueeze(-1)


def mean_over_window(values: Tensor, tokens: TokenBatch, width: int) -> Tensor:
    """Mean of `values` [batch, seq, columns] over each token and the `width - 1` before it in the same sequence.

    Tokens before a sequence begins count as 0.
    """
    total = values.clone()
    for offset in range(1, min(width, values.shape[1])):
        same = tokens.sequence[:, offset:] == tokens.sequence[:, :-offset]
        total[:, offset:] += values[:, :-offset] * same.unsqueeze(-1)
    return total / width


def highest_per_sequence(values: Tensor, tokens: TokenBatch) -> Tensor:
    """[sequences, columns] maximum over each sequence's tokens of non-negative `values` [batch, seq, columns]."""
    columns = values.shape[-1]
    highest = torch.zeros(tokens.num_sequences + 1, columns, device=values.device)
    slots = tokens.slots().unsqueeze(-1).expand(-1, columns)
    return highest.scatter_reduce_(0, slots, values.flatten(0, 1), "amax")[:-1]


def present_sequences(where: Tensor, tokens: TokenBatch) -> Tensor:
    """[sequences] bool: which sequences have a token `where` [batch, seq] is True."""
    total = torch.zeros(tokens.num_sequences + 1, device=where.device)
    return total.scatter_add_(0, tokens.slots(), where.flatten().float())[:-1] > 0
