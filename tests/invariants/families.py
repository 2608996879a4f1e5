"""Tiny models with random weights, one for each family that tandem says it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from .made import VOCABULARY

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED: dict[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
# Shorter than most of the sequences of `made.make_trees`, which have up to 45 tokens.
WINDOW = 8
ALTERNATING: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
    "head_dim": 8,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {**GATED, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """A configuration class, its options, and the backend that `auto` has to choose on CPU."""

    config: str
    options: dict[str, Any] = field(default_factory=lambda: GATED)
    backend: str = "segments"

    def make(self, dtype: torch.dtype = torch.float64) -> Any:
        """The same random model whenever it is called, in evaluation mode."""
        config = getattr(transformers, self.config)(**self.options)
        torch.manual_seed(0)
        # Grouped products of experts have no float64 kernel; one expert after the other has.
        model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
        return model.to(dtype).eval()


DEEPSEEK: dict[str, Any] = {
    **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
STATE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
JAMBA: dict[str, Any] = {
    **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "num_experts": 4, "use_mamba_kernels": False, "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}  # fmt: skip
BAMBA: dict[str, Any] = {
    **GATED, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
    "mamba_chunk_size": 8, "attn_layer_indices": [1],
}  # fmt: skip
QWEN3_NEXT: dict[str, Any] = {
    **EXPERTS, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip

TREES: dict[str, Family] = {
    "llama": Family("LlamaConfig"),
    "llama tied": Family("LlamaConfig", {**GATED, "tie_word_embeddings": True}),
    "mistral": Family("MistralConfig", {**GATED, "sliding_window": WINDOW}),
    "qwen2": Family("Qwen2Config"),
    "qwen2 tied": Family("Qwen2Config", {**GATED, "tie_word_embeddings": True}),
    "qwen3": Family("Qwen3Config", {**GATED, "head_dim": 8}),
    "gemma2": Family("Gemma2Config", {**GATED, **ALTERNATING, "query_pre_attn_scalar": 8}, "dense"),
    "gemma3": Family("Gemma3TextConfig", {**GATED, **ALTERNATING, "query_pre_attn_scalar": 8}),
    "phi3": Family("Phi3Config"),
    "gpt-neox": Family("GPTNeoXConfig", {**SIZES, "intermediate_size": 48}),
    "gpt2": Family("GPT2Config", GPT2),
    "gpt2 untied": Family("GPT2Config", {**GPT2, "tie_word_embeddings": False}),
    "granite": Family("GraniteConfig", {**GATED, "logits_scaling": 3.0}),
    "cohere": Family("CohereConfig"),
    "cohere2": Family("Cohere2Config", {**GATED, **ALTERNATING}),
    "olmo2": Family("Olmo2Config"),
    "smollm3": Family("SmolLM3Config"),
    "opt": Family(
        "OPTConfig",
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16},
    ),
    "glm4": Family("Glm4Config", {**GATED, "head_dim": 8}),
    # Its value heads are smaller than its query heads.
    "deepseek-v3": Family("DeepseekV3Config", DEEPSEEK, "dense"),
    # Its router is a linear layer that returns more than a product.
    "phimoe": Family("PhimoeConfig", {**EXPERTS, "num_local_experts": 4}),
    "mixtral": Family("MixtralConfig", {**EXPERTS, "num_local_experts": 4}),
    "qwen3-moe": Family(
        "Qwen3MoeConfig",
        {**EXPERTS, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16},
    ),
}

RWKV = Family("RwkvConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
                             "context_length": 256})  # fmt: skip
# Its soft-cap on logits has a name of its own, which the head does not know.
RECURRENT_GEMMA = Family(
    "RecurrentGemmaConfig",
    {**SIZES, "num_hidden_layers": 3, "intermediate_size": 96, "num_key_value_heads": 1,
     "lru_width": 32, "attention_window_size": WINDOW},
)  # fmt: skip

# Models that cannot read packed trees, and a word of the reason that the run states.
PADDED: dict[str, tuple[Family, str]] = {
    "mamba": (Family("MambaConfig", STATE), "state"),
    "mamba2": (
        Family(
            "Mamba2Config",
            {**STATE, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
        ),
        "state",
    ),
    "falcon-mamba": (Family("FalconMambaConfig", STATE), "state"),
    "jamba": (Family("JambaConfig", JAMBA), "state"),
    "rwkv": (RWKV, "state"),
    "qwen3-next": (Family("Qwen3NextConfig", QWEN3_NEXT), "state"),
    "bamba": (Family("BambaConfig", BAMBA), "state"),
    # These two do not say that they carry tokens along; the examination finds out.
    "lfm2": (
        Family("Lfm2Config", {**GATED, "layer_types": ["conv", "full_attention"]}),
        "outside of its attention layers",
    ),
    "minimax": (
        Family("MiniMaxConfig", {**EXPERTS, "num_local_experts": 4, "head_dim": 8}),
        "outside of its attention layers",
    ),
    "nemotron": (Family("NemotronConfig"), "pass keyword arguments on"),
    "stablelm": (Family("StableLmConfig"), "attention interface"),
    "bloom": (
        Family("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2,
                               "n_head": 4}),
        "attention interface",
    ),
    "gpt-oss": (
        Family("GptOssConfig", {**EXPERTS, **ALTERNATING, "num_local_experts": 4}), "sinks",
    ),
    "llama4": (
        Family(
            "Llama4TextConfig",
            {**EXPERTS, "head_dim": 8, "num_local_experts": 2, "attention_chunk_size": WINDOW,
             "intermediate_size_mlp": 48},
        ),
        "masked in a way that trees are not",
    ),
}  # fmt: skip
