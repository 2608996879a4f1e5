"""The sizes of the models of shipped recipes, as their configurations on the Hub say them."""

from __future__ import annotations

from typing import Any

_MISTRAL: dict[str, Any] = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 32768, "sliding_window": 4096, "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 151936, "num_hidden_layers": 36, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "rope_theta": 1000000, "rms_norm_eps": 1e-6, "bos_token_id": 151643, "eos_token_id": 151643,
}  # fmt: skip
_GEMMA3: dict[str, Any] = {
    "model_type": "gemma3", "eos_token_id": [1, 106],
    "text_config": {
        "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 2560,
        "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024,
        "max_position_embeddings": 131072, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
        "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
        "vision_use_head": False,
    },
}  # fmt: skip
_PHI4_MINI: dict[str, Any] = {
    "model_type": "phi3", "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192,
    "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "sliding_window": 262144,
    # Long factors grow from 1 to 47.77; only their number matters here.
    "rope_scaling": {
        "type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0 + n for n in range(48)]
    },
    "bos_token_id": 199999, "eos_token_id": 199999, "pad_token_id": 199999,
}  # fmt: skip
_SMOLLM3: dict[str, Any] = {
    "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
    "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
    "max_position_embeddings": 65536, "no_rope_layer_interval": 4, "tie_word_embeddings": True,
    "rope_theta": 5000000.0, "rms_norm_eps": 1e-6, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": _MISTRAL,
    "meta-llama/Llama-3.1-8B": _LLAMA,
    "Qwen/Qwen3-4B-Base": {
        **_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B-Base": {
        **_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False,
    },
    "google/gemma-3-4b-it": _GEMMA3,
    "microsoft/Phi-4-mini-instruct": _PHI4_MINI,
    "HuggingFaceTB/SmolLM3-3B-Base": _SMOLLM3,
}  # fmt: skip
"""By the model's name; all are stored in bfloat16."""
for _config in CONFIGS.values():
    _config["dtype"] = "bfloat16"


def config_of(model: str) -> Any:
    """transformers' configuration of a model."""
    from transformers import AutoConfig

    values = dict(CONFIGS[model])
    return AutoConfig.for_model(values.pop("model_type"), **values)
