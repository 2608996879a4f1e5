"""Model families from tiny configs: the tree path gives plain transformers' log-probs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from tandem.data.collate import collate
from tandem.errors import UserError
from tandem.model.attention import choose_backend, use_backend
from tandem.model.score import sequence_logps

from .made import VOCABULARY, make_trees, oracle_logps

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
ALTERNATING: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "head_dim": 8,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", GATED, "segments"),
    "mistral": ("MistralConfig", {**GATED, "sliding_window": 8}, "segments"),
    "qwen2 tied": ("Qwen2Config", {**GATED, "tie_word_embeddings": True}, "segments"),
    "qwen3": ("Qwen3Config", {**GATED, "head_dim": 8}, "segments"),
    "gemma2": ("Gemma2Config", {**GATED, **ALTERNATING, "query_pre_attn_scalar": 8}, "dense"),
    "gemma3": (
        "Gemma3TextConfig", {**GATED, **ALTERNATING, "query_pre_attn_scalar": 8}, "segments",
    ),
    "phi3": ("Phi3Config", GATED, "segments"),
    "gpt-neox": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 48}, "segments"),
    "gpt2": ("GPT2Config", GPT2, "segments"),
    "granite": ("GraniteConfig", {**GATED, "logits_scaling": 3.0}, "segments"),
    "cohere": ("CohereConfig", GATED, "segments"),
    "mixtral": ("MixtralConfig", {**GATED, "num_local_experts": 4}, "segments"),
}  # fmt: skip


def make(name: str, options: dict[str, Any], dtype: torch.dtype) -> Any:
    config = getattr(transformers, name)(**options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.to(dtype).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tree_path_equals_plain_transformers(family: str) -> None:
    name, options, backend = FAMILIES[family]
    # Grouped expert products have no float64 kernel; norms pass float64 through float32.
    dtype = torch.float32 if family == "mixtral" else torch.float64
    model = make(name, options, dtype)
    trees = make_trees()
    with torch.no_grad():
        wanted = oracle_logps(model, trees)
        assert choose_backend("auto", model.config)[0] == backend
        use_backend(model, backend)
        found = sequence_logps(model, collate(trees))
    torch.testing.assert_close(
        found, wanted, rtol=1e-5 if family == "mixtral" else 0, atol=1e-6, check_dtype=False
    )


def test_what_would_be_computed_wrongly_is_refused() -> None:
    capped = make("Gemma2Config", {**GATED, **ALTERNATING}, torch.float32)
    with pytest.raises(UserError, match="attn_logit_softcapping"):
        choose_backend("segments", capped.config)
    other = make("StableLmConfig", GATED, torch.float32)
    with pytest.raises(UserError, match="attention interface"):
        use_backend(other, "segments")
    sinks = make("GptOssConfig", {**GATED, **ALTERNATING, "num_local_experts": 4}, torch.float32)
    use_backend(sinks, "dense")
    with pytest.raises(UserError, match="sinks"), torch.no_grad():
        sequence_logps(sinks, collate(make_trees()))
