"""Tiny models with random weights, one factory per architecture, built from transformers' own configurations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

VOCAB = 64
HIDDEN = 32
LAYERS = 4

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LINEAR_ATTENTION = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def _seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval()


def qwen3(**changes: object) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _seeded(lambda: Qwen3ForCausalLM(Qwen3Config(**{**_COMMON, **changes})))


def qwen3_backbone() -> nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    return _seeded(lambda: Qwen3Model(Qwen3Config(**_COMMON)))


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**_COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    return _seeded(lambda: Qwen3MoeForCausalLM(config))


def qwen3_5() -> nn.Module:
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    return _seeded(lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**_COMMON, **_LINEAR_ATTENTION)))


def qwen3_5_multimodal() -> nn.Module:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": HIDDEN}
    config = Qwen3_5Config(
        text_config={**_COMMON, **_LINEAR_ATTENTION},
        vision_config=vision,
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    return _seeded(lambda: Qwen3_5ForConditionalGeneration(config))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _seeded(lambda: LlamaForCausalLM(LlamaConfig(**_COMMON)))


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return _seeded(lambda: MistralForCausalLM(MistralConfig(**_COMMON)))


def gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return _seeded(lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_COMMON)))


def gemma3_multimodal() -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = Gemma3Config(
        text_config=dict(_COMMON),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    )
    return _seeded(lambda: Gemma3ForConditionalGeneration(config))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    return _seeded(lambda: GPT2LMHeadModel(config))


def qwen3_lora() -> nn.Module:
    """Qwen3 with a LoRA adapter whose B matrices are not zero, so that switching it off shows."""
    from peft import LoraConfig, get_peft_model

    def build() -> nn.Module:
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        return get_peft_model(qwen3(), config)

    return _seeded(build)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "qwen3": qwen3,
    "qwen3_backbone": qwen3_backbone,
    "qwen3_moe": qwen3_moe,
    "qwen3_5": qwen3_5,
    "qwen3_5_multimodal": qwen3_5_multimodal,
    "llama": llama,
    "mistral": mistral,
    "gemma3": gemma3,
    "gemma3_multimodal": gemma3_multimodal,
    "gpt2": gpt2,
    "qwen3_lora": qwen3_lora,
}
