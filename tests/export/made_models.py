"""Tiny models of every family that is exported, with weights wide enough that order matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tandem.model.model_folder import model_folder

_COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 3,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "tie_word_embeddings": False, "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": 128},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True,
              "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}},
    "gemma3": {
        "model_type": "gemma3_text", "num_hidden_layers": 7, "head_dim": 32, "sliding_window": 8,
        "query_pre_attn_scalar": 32, "hidden_activation": "gelu_pytorch_tanh",
    },
    "phi3": {
        "model_type": "phi3", "head_dim": 16, "sliding_window": None,
        "original_max_position_embeddings": 128, "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 128,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0] * 6,
        },
    },
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5, "tie_word_embeddings": True},
}  # fmt: skip


def make_model(
    folder: Path,
    family: str,
    *,
    tokenizer: Path | None = None,
    template: str = "chatml-like",
    dtype: torch.dtype = torch.bfloat16,
    **more: Any,
) -> Path:
    """A random model of a family with a tokenizer, the embedded demo's unless another is named."""
    source = tokenizer or model_folder("demo:base")
    words = AutoTokenizer.from_pretrained(source)
    if template:
        words.chat_template = TEMPLATES.get(template, template)
    config = AutoConfig.for_model(
        **{**_COMMON, **FAMILIES[family], "vocab_size": len(words), **more}
    )
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.2 if name.endswith("norm.weight") else 0.25)
            if name.endswith("norm.weight") and family != "gemma3":
                weight.add_(1)
    model.to(dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


TEMPLATES = {
    "chatml-like": (
        "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + ']\n' + "
        "message['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
    ),
}
