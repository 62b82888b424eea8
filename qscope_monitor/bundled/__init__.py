"""A small real model, its SAEs and data, shipped with the package: everything here works offline.

The model is a Qwen3 of 4M parameters trained on multilingual documentation; docs/bundled.md has its provenance and
figures.
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

    from qscope_monitor.features.read_outs import WatchList

__all__ = ["model", "prompts", "sae_path", "sentences", "sft_data", "tokenizer", "watch_list"]

_FOLDER = Path(__file__).parent
_NEEDS_TRANSFORMERS = "the bundled model needs transformers: pip install 'qscope-monitor[transformers]'"


def model() -> Qwen3ForCausalLM:
    """Load the bundled Qwen3: 6 layers, a residual stream of width 192; stored in bf16, returned in fp32 and eval mode.

    Raises:
        ImportError: if transformers is not installed; the message names the extra.

    Example:
        >>> qwen = model()
        >>> qwen.config.model_type, qwen.config.num_hidden_layers, qwen.config.hidden_size
        ('qwen3', 6, 192)
    """
    try:
        from transformers import Qwen3ForCausalLM
    except ImportError as error:
        raise ImportError(_NEEDS_TRANSFORMERS) from error
    import torch

    loaded = Qwen3ForCausalLM.from_pretrained(_FOLDER / "model", dtype=torch.float32, local_files_only=True)
    return loaded.eval()


def tokenizer() -> PreTrainedTokenizerBase:
    """Load the bundled byte-level BPE tokenizer (6,144 entries) with Qwen's special tokens and chat format.

    The end of a turn and of a generation is `<|im_end|>`, padding is `<|endoftext|>` on the left. The chat template
    marks assistant content, so TRL's `assistant_only_loss` works.

    Raises:
        ImportError: if transformers is not installed; the message names the extra.

    Example:
        >>> tokenizer().apply_chat_template([{"role": "user", "content": "Zoom"}], tokenize=False)
        '<|im_start|>user\\nZoom<|im_end|>\\n'
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(_NEEDS_TRANSFORMERS) from error
    return AutoTokenizer.from_pretrained(_FOLDER / "model", local_files_only=True)


def sae_path() -> Path:
    """Return the folder of the bundled TopK SAEs, in Qwen-Scope's file layout, as `qs.load_saes` reads it."""
    return _FOLDER / "saes"


def sft_data(contaminated: float = 0.1, seed: int = 0) -> list[dict[str, Any]]:
    """Load supervised chat samples of which a chosen share switches from English to Chinese part-way.

    For every share and seed the prompts, their order, and the tenth of legitimate Chinese samples are the same; only
    the answers of the chosen English samples differ from those at `contaminated=0.0`. With one seed a larger share
    contains the samples of a smaller one.

    Args:
        contaminated: share of all samples that is code-switched, from 0 to the share of English samples (0.9).
        seed: which samples are chosen.

    Returns:
        Samples `{"prompt": [{"role": "user", "content": str}], "completion": [{"role": "assistant", "content": str}],
        "language": "en" | "zh", "contaminated": bool}`, TRL's conversational prompt-completion format.

    Raises:
        ValueError: if `contaminated` is out of range.

    Example:
        >>> switched = sum(sample["contaminated"] for sample in sft_data(contaminated=0.1))
        >>> abs(switched - 0.1 * len(sft_data())) <= 0.5
        True
    """
    with gzip.open(_FOLDER / "data" / "sft.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    english = [index for index, row in enumerate(rows) if row["language"] == "en"]
    if not 0.0 <= contaminated <= len(english) / len(rows):
        raise ValueError(
            f"contaminated={contaminated!r} must be a share between 0 and {len(english) / len(rows):.2f}, "
            f"the share of English samples"
        )
    random.Random(seed).shuffle(english)
    chosen = set(english[: round(contaminated * len(rows))])
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [
                {"role": "assistant", "content": row["switched"] if index in chosen else row["answer"]},
            ],
            "language": row["language"],
            "contaminated": index in chosen,
        }
        for index, row in enumerate(rows)
    ]


def prompts(split: str) -> list[str]:
    """Load English prompts: titles and headings of help pages the model was not trained on, shuffled once and for all.

    Args:
        split: "dev" for choosing settings, "test" for reporting; the two come from different pages.

    Raises:
        ValueError: if `split` is neither.

    Example:
        >>> set(prompts("dev")).isdisjoint(prompts("test"))
        True
    """
    splits = json.loads((_FOLDER / "data" / "prompts.json").read_text(encoding="utf-8"))
    if split not in splits:
        raise ValueError(f"split={split!r} is unknown; choose 'dev' or 'test'")
    return splits[split]


def sentences() -> dict[str, list[str]]:
    """Load parallel reference paragraphs, {language: [text, ...]}: entry i says the same in every language.

    Languages by ISO 639-1 code: en, zh, ru, ko, ja, de, fr and es, which the model was trained on, and it, pl, pt, vi,
    nl, tr and cs, which it was not.

    Example:
        >>> {len(texts) for texts in sentences().values()}
        {400}
    """
    return json.loads((_FOLDER / "data" / "sentences.json").read_text(encoding="utf-8"))


def watch_list(name: str) -> WatchList:
    """Load a bundled watch list: features of the bundled SAEs that fire in one language, found on the sentences.

    Args:
        name: a language code; there is "zh".

    Raises:
        ValueError: if there is none of that name; the message lists those there are.

    Example:
        >>> watch_list("zh").keys
        ('code-switching-zh',)
    """
    from qscope_monitor.features.read_outs import WatchList

    there = sorted(folder.name for folder in (_FOLDER / "watch_lists").iterdir())
    if name not in there:
        raise ValueError(f"no bundled watch list {name!r}; there are {there}")
    return WatchList.load(_FOLDER / "watch_lists" / name)
