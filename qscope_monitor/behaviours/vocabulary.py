"""The script of every vocabulary entry, so that a batch's languages are told on the device without decoding it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qscope_monitor.behaviours.scripts import script_runs, scripts_of
from qscope_monitor.tokens import TokenBatch

__all__ = ["ScriptVocabulary"]

_PROMPT_SHARE = 0.1  # as in `expected_languages`
_TEXT_SHARE = 0.5


class ScriptVocabulary:
    """Counts letters by script from token ids.

    A character that its tokenizer cuts into single bytes is not seen; prompts are judged by the rest.

    Args:
        tokenizer: a Hugging Face tokenizer; each vocabulary entry is decoded once, at the first question.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._counts: list[dict[str, int]] | None = None
        self._letters: dict[tuple[frozenset[str] | None, torch.device], Tensor] = {}

    def is_language(self, tokens: TokenBatch, language: str) -> Tensor:
        """[sequences] bool: whether a sequence is expected in `language`.

        That is so when its scripts hold a tenth of the prompt's letters, as in `expected_languages`; for a sequence
        with no letters in its prompt, half of all its letters.
        """
        # A model's embedding may have more rows than its tokenizer has entries: those count as no letter.
        ids = tokens.input_ids.clamp(max=len(self._tokenizer))
        own = self._table(scripts_of(language), ids.device)[ids]  # [batch, seq]
        every = self._table(None, ids.device)[ids]
        prompt = tokens.keep & ~tokens.response
        own_prompt, every_prompt = _sums(tokens, own * prompt), _sums(tokens, every * prompt)
        own_text, every_text = _sums(tokens, own * tokens.keep), _sums(tokens, every * tokens.keep)
        by_prompt = own_prompt >= _PROMPT_SHARE * every_prompt
        by_text = (own_text >= _TEXT_SHARE * every_text) & (every_text > 0)
        return torch.where(every_prompt > 0, by_prompt, by_text)

    def _table(self, scripts: frozenset[str] | None, device: torch.device) -> Tensor:
        """[vocabulary] letters of these scripts (None: of any) in each entry."""
        if self._counts is None:
            self._counts = []
            for token in range(len(self._tokenizer)):
                counts: dict[str, int] = {}
                for script, start, end in script_runs(self._tokenizer.decode([token])):
                    counts[script] = counts.get(script, 0) + end - start
                self._counts.append(counts)
        key = (scripts, device)
        if key not in self._letters:
            letters = [sum(n for s, n in counts.items() if scripts is None or s in scripts) for counts in self._counts]
            self._letters[key] = torch.tensor([*letters, 0], dtype=torch.float32, device=device)
        return self._letters[key]


def _sums(tokens: TokenBatch, values: Tensor) -> Tensor:
    """[sequences] sums of a [batch, seq] tensor."""
    total = torch.zeros(tokens.num_sequences + 1, dtype=torch.float32, device=values.device)
    return total.scatter_add_(0, tokens.slots(), values.float().flatten())[:-1]
