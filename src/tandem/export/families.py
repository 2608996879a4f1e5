"""The model families that are exported: their names in GGUF, settings, and order of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tandem.errors import UserError

Values = dict[str, int | float | str]
"""Settings of a file by their keys, without the architecture in front."""


@dataclass(frozen=True)
class Family:
    """A family of models in a GGUF file."""

    architecture: str  # general.architecture, and the prefix of its settings
    # positions turn neighbouring numbers of a head, not those of its two halves
    interleaved: bool = False
    norm_shift: float = 0.0  # what the file's norms have more than the model's
    activation: str = "silu"
    # adds settings and refuses what llama.cpp would compute otherwise
    extend: Callable[[Any, Values], None] = lambda _, __: None


@dataclass(frozen=True)
class Layout:
    """The order of a weight's numbers in a file against that in transformers."""

    heads: int = 0  # whose rows are put in another order; 0: none are
    shift: float = 0.0  # added to all numbers

    def to_file(self, weight: Tensor) -> Tensor:
        """A weight as the file has it."""
        if self.shift:
            return weight.float() + self.shift
        if not self.heads:
            return weight
        halves = weight.reshape(self.heads, 2, -1, *weight.shape[1:])
        return halves.transpose(1, 2).reshape(weight.shape)

    def from_file(self, weight: Tensor) -> Tensor:
        """The file's weight as transformers has it."""
        if self.shift:
            return weight - self.shift
        if not self.heads:
            return weight
        # Row 2i of a head is the i-th of its first half, row 2i + 1 that of its second.
        size = weight.shape[0] // self.heads
        order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])
        rows = torch.arange(self.heads)[:, None] * size + order
        return weight[rows.reshape(-1)]


def family_of(config: Any) -> Family:
    """The family of a model; raises UserError for one that is not exported."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"tandem writes and checks no GGUF file of a {config.model_type} model. It does so for "
            f"{', '.join(sorted(FAMILIES))}. llama.cpp's own convert_hf_to_gguf.py may know it; "
            "the file would not be compared with the model then."
        )
    return family


def settings_of(config: Any) -> Values:
    """What a file of a model says of it, by the keys after the architecture.

    Raises UserError where llama.cpp would compute something else than transformers.
    """
    family = family_of(config)
    head = head_size(config)
    rope = _global_rope(config)
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    _require(activation == family.activation, f"the activation {activation}")
    values: Values = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head * float(rope.get("partial_rotary_factor") or 1.0)),
    }
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "longrope":
        values["rope.scaling.attn_factor"] = _longrope_scale(config)
    elif kind not in ("default", "llama3"):
        raise UserError(
            f"the model's positions are scaled by {kind}; exported are default, linear, llama3 and "
            "longrope. llama.cpp's own convert_hf_to_gguf.py may know it; its file would not be "
            "compared with the model."
        )
    family.extend(config, values)
    return values


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """Tensors of a file that are no weights: factors of the frequencies of positions, float32."""
    rope = _global_rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        size = head_size(config)
        plain = float(rope["rope_theta"]) ** -(torch.arange(0, size, 2).double() / size)
        return {"rope_freqs.weight": (plain / scaled.double()).float()}
    if kind == "longrope":
        return {
            f"rope_factors_{name}.weight": torch.tensor(rope[f"{name}_factor"], dtype=torch.float32)
            for name in ("long", "short")
        }
    return {}


def layout_of(config: Any, gguf_name: str) -> Layout:
    """The order of a tensor of a file, by its name there."""
    family = family_of(config)
    part = gguf_name.rsplit(".", 2)[-2] if "." in gguf_name else gguf_name
    if family.norm_shift and part.endswith("norm"):
        return Layout(shift=family.norm_shift)
    if family.interleaved and part == "attn_q":
        return Layout(heads=config.num_attention_heads)
    if family.interleaved and part == "attn_k":
        return Layout(heads=config.num_key_value_heads)
    return Layout()


def remarks(config: Any) -> list[str]:
    """What llama.cpp computes otherwise than transformers on long texts."""
    found = []
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    attends = "sliding_attention" in kinds if kinds else config.model_type in ("mistral", "phi3")
    if config.model_type != "gemma3_text" and window and attends:
        found.append(
            f"the model attends to the last {window} tokens only, llama.cpp to all: they differ "
            "on longer texts"
        )
    if _global_rope(config).get("rope_type") == "longrope":
        original = _original_length(config, _global_rope(config))
        found.append(
            f"llama.cpp takes the frequencies for long texts wherever its context (-c, num_ctx) is "
            f"set above {original} tokens, transformers only for texts as long: keep the context "
            f"at {original} or less for shorter texts"
        )
    return found


def head_size(config: Any) -> int:
    """Numbers of a head of attention."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _global_rope(config: Any) -> Mapping[str, Any]:
    rope: Mapping[str, Any] = config.rope_parameters
    return rope.get("full_attention", rope)


def _original_length(config: Any, rope: Mapping[str, Any]) -> int:
    stated = rope.get("original_max_position_embeddings")
    stated = stated or getattr(config, "original_max_position_embeddings", None)
    return int(stated or config.max_position_embeddings)


def _longrope_scale(config: Any) -> float:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    _, scale = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    return float(scale)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise UserError(
            f"{what} of this model is not what llama.cpp computes for its family, so a file of it "
            "would give other answers. It is not exported."
        )


def _phi3(config: Any, values: Values) -> None:
    rope = _global_rope(config)
    values["rope.scaling.original_context_length"] = _original_length(config, rope)
    values["attention.sliding_window"] = config.sliding_window or 0


def _qwen(config: Any, _: Values) -> None:
    _require(not config.use_sliding_window, "use_sliding_window")


def _gemma3(config: Any, values: Values) -> None:
    layers = [
        "full_attention" if number % 6 == 0 else "sliding_attention"
        for number in range(1, config.num_hidden_layers + 1)
    ]
    _require(list(config.layer_types) == layers, "the order of sliding and full attention")
    local = config.rope_parameters["sliding_attention"]
    plain = local.get("rope_type", "default") == "default" and local["rope_theta"] == 10000.0
    _require(plain, "the positions of sliding attention")
    _require(config.final_logit_softcapping is None, "final_logit_softcapping")
    _require(config.attn_logit_softcapping is None, "attn_logit_softcapping")
    # llama.cpp scales by a head's size, and the model of 62 layers by that of hidden_size / heads.
    size = head_size(config)
    if config.num_hidden_layers == 62:
        size = config.hidden_size // config.num_attention_heads
    _require(math.isclose(config.query_pre_attn_scalar, size), "query_pre_attn_scalar")
    values["attention.sliding_window"] = config.sliding_window


def _smollm3(config: Any, _: Values) -> None:
    turned = [int(number % 4 != 0) for number in range(1, config.num_hidden_layers + 1)]
    _require(list(config.no_rope_layers) == turned, "no_rope_layers")
    _require(not config.use_sliding_window, "use_sliding_window")


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True),
    "qwen2": Family("qwen2", extend=_qwen),
    "qwen3": Family("qwen3", extend=_qwen),
    "gemma3_text": Family("gemma3", norm_shift=1.0, activation="gelu_pytorch_tanh", extend=_gemma3),
    "phi3": Family("phi3", extend=_phi3),
    "smollm3": Family("smollm3", interleaved=True, extend=_smollm3),
}
"""Families by transformers' model_type."""
