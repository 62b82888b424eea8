"""What an encode returns: the active features of every token, in a fixed number of slots."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["SparseActivations"]


class SparseActivations(NamedTuple):
    """The k largest activations of every token.

    A slot is unused where a token has fewer than k positive pre-activations, or is not finite: then its value is 0,
    its index 0 and `active` False. Index 0 in an unused slot makes every gather safe; count features with `active`,
    never with `indices` alone.

    Attributes:
        values: `[..., k]`, fp32 (fp64 for fp64 weights or input), descending, >= 0.
        indices: `[..., k]`, int64, the feature in each slot; equal values are in ascending order of feature.
        active: `[..., k]`, bool, True where the slot holds a feature with a positive value.
        finite: `[...]`, bool, False for tokens whose input or pre-activations hold an infinity or a NaN.
    """

    values: Tensor
    indices: Tensor
    active: Tensor
    finite: Tensor

    @property
    def k(self) -> int:
        """Number of slots per token."""
        return self.values.shape[-1]

    def l0(self) -> Tensor:
        """Count the active features per token, `[...]`, int64."""
        return self.active.sum(-1)
