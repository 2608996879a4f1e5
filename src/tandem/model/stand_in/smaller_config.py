"""A configuration of the same architecture with few and narrow layers.

What makes a family itself stays: which layers repeat, how many query heads share a key head,
whether heads are as wide together as the model, which share of a head is rotated, tied embeddings,
experts.
Vocabulary and context length stay as well, because tokenizer and limits belong to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_HEAD = 8  # numbers of a head
_EXPERTS = 4
_MOST_LAYERS = 12
_STATE = 8  # of layers that carry a state
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Layers that come back after so many, and layers by their numbers.
_PERIODS = (
    "attn_layer_period", "expert_layer_period", "interleave_moe_layer_step", "decoder_sparse_step",
    "sliding_window_pattern", "_sliding_window_pattern", "no_rope_layer_interval",
    "full_attention_interval",
)  # fmt: skip
_REPEATED = ("block_types",)  # a list of kinds that begins anew after its last
_NUMBERED = ("attn_layer_indices", "mlp_only_layers", "moe_layers", "full_attn_idxs")
# Widths of feed-forward layers, kept in proportion to the model's own.
_INNER = ("intermediate_size", "intermediate_size_mlp", "ffn_dim", "n_inner", "ffn_hidden_size")
# Numbers that have no proportion to keep.
_FIXED = {
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "expert_intermediate_size": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": _HEAD, "qk_nope_head_dim": _HEAD,
    "v_head_dim": _HEAD, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "mamba_d_state": _STATE, "mamba_n_groups": 1, "mamba_chunk_size": 8, "mamba_dt_rank": 4,
    "state_size": _STATE, "n_groups": 1, "chunk_size": 8, "time_step_rank": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": _HEAD,
    "linear_value_head_dim": _HEAD,
}  # fmt: skip
_LISTS_OF_ROPE = ("short_factor", "long_factor")


@dataclass(frozen=True)
class _Sizes:
    """A configuration's sizes, before and after."""

    depth: int
    layers: tuple[int, ...]  # the places of the layers that are kept
    width: int
    narrow: int
    head: int  # numbers of a head, before


def smaller_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration (transformers' `to_dict`) for a small model of the same kind.

    Parts of a model with several (text, vision) are each made small. Values without sizes are
    returned as they are.
    """
    small = {
        key: smaller_values(value) if key.endswith("_config") and _is_part(value) else value
        for key, value in values.items()
    }
    sizes = _sizes_of(small)
    if sizes is None:
        return small
    small |= _depth(small, sizes)
    small |= _width(small, sizes)
    small |= _experts(small)
    small |= _states(small)
    return small


def _is_part(value: object) -> bool:
    return isinstance(value, dict) and "model_type" in value


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of some keys that has a whole number above 0."""
    found = (name for name in names if type(values.get(name)) is int and values[name] > 0)
    return next(found, None)


def _sizes_of(values: Mapping[str, Any]) -> _Sizes | None:
    width, depth = _first(values, _WIDTHS), _first(values, _DEPTHS)
    if width is None or depth is None:
        return None
    heads = _first(values, _HEADS)
    head = values.get("head_dim") or (values[width] // values[heads] if heads else _HEAD)
    kept = _kept_layers(values, values[depth])
    return _Sizes(values[depth], kept, values[width], _narrow(values, values[width], head), head)


def _kept_layers(values: Mapping[str, Any], depth: int) -> tuple[int, ...]:
    """The first layers, so many that each kind of layer is among them."""
    lists = [
        value
        for key, value in values.items()
        if isinstance(value, list | tuple) and len(value) == depth and key not in _NUMBERED
    ]
    kinds = [tuple(str(value[place]) for value in lists) for place in range(depth)]
    periods = [values[key] for key in _PERIODS if type(values.get(key)) is int and values[key] > 1]
    periods += [len(values[key]) for key in _REPEATED if values.get(key)]
    least = max(2, math.lcm(*periods))
    numbered = [values[key] for key in _NUMBERED if values.get(key)]
    least = max([least, *(min(places) + 1 for places in numbered)])
    wanted = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    least = min(max(least, max(wanted, default=0) + 1), depth)
    if least <= _MOST_LAYERS:
        return tuple(range(least))
    # The kinds lie far apart: the first layer of each, in order.
    return tuple(sorted({*wanted, 0, 1}))[:_MOST_LAYERS]


def _depth(values: Mapping[str, Any], sizes: _Sizes) -> dict[str, Any]:
    """Keys that count or list layers."""
    changed: dict[str, Any] = {}
    count = len(sizes.layers)
    for key, value in values.items():
        if key in _DEPTHS and value == sizes.depth:
            changed[key] = count
        elif key in _NUMBERED and value:
            changed[key] = [place for place in value if place < count] or [count - 1]
        elif isinstance(value, list | tuple) and len(value) == sizes.depth:
            changed[key] = [value[place] for place in sizes.layers]
        elif key == "max_window_layers":
            changed[key] = min(value, count)
    return changed


def _heads(values: Mapping[str, Any]) -> tuple[int, int]:
    """Heads, and heads of keys: as many queries to a key as before, up to four."""
    name = _first(values, _HEADS)
    if name is None:
        return 4, 4
    heads = values[name]
    keys = values.get("num_key_value_heads") or heads
    if values.get("multi_query"):
        keys = 1
    if keys >= heads:
        return 4, 4
    few = min(2, keys)
    return few * min(heads // keys, 4), few


def _narrow(values: Mapping[str, Any], width: int, head: int) -> int:
    """The width of the small model: that of its heads together, or unlike it, as before."""
    name = _first(values, _HEADS)
    heads, _ = _heads(values)
    together = heads * _HEAD
    if name is None or values[name] * head == width:
        return together
    return together + 2 * heads if values[name] * head < width else together - 2 * heads


def _width(values: Mapping[str, Any], sizes: _Sizes) -> dict[str, Any]:
    """Keys that say how wide something is."""
    heads, keys = _heads(values)
    changed: dict[str, Any] = {}
    for key, value in values.items():
        if key in _INNER and type(value) is int:
            share = min(4.0, max(1.0, value / sizes.width))
            changed[key] = max(16, round(share * sizes.narrow / 16) * 16)
        elif key in _HEADS:
            changed[key] = heads
        elif key == "num_key_value_heads" and value:
            changed[key] = keys
        elif key in ("head_dim", "query_pre_attn_scalar") and value == sizes.head:
            changed[key] = _HEAD
        elif key == "word_embed_proj_dim" and value != sizes.width:
            changed[key] = sizes.narrow // 2
        elif type(value) is int and value == sizes.width and not _counts_tokens(key):
            changed[key] = sizes.narrow
        elif key in _FIXED and type(value) is int:
            changed[key] = min(value, _FIXED[key])
        elif key in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            changed[key] = _rope(value, sizes.head)
    return changed


def _counts_tokens(key: str) -> bool:
    """Whether a number is of tokens or of rows, which may be as large as the width by chance."""
    return any(
        word in key
        for word in ("position", "vocab", "token", "window", "chunk", "context", "length")
    )


def _rope(values: Mapping[str, Any], head: int) -> dict[str, Any]:
    """Rotary settings, with a factor for each of the frequencies that are left."""
    changed = dict(values)
    for key, value in values.items():
        if isinstance(value, dict):  # one for each kind of layer
            changed[key] = _rope(value, head)
        elif key in _LISTS_OF_ROPE and isinstance(value, list | tuple):
            count = max(1, int(_HEAD * 2 * len(value) / head) // 2)
            places = [round(at * (len(value) - 1) / max(1, count - 1)) for at in range(count)]
            changed[key] = [value[place] for place in places]
    return changed


def _experts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fewer experts, of which a token still reaches a part."""
    changed: dict[str, Any] = {
        key: min(values[key], _EXPERTS) for key in _EXPERT_COUNTS if type(values.get(key)) is int
    }
    for key in ("num_experts_per_tok", "num_experts_per_token", "moe_top_k"):
        if type(values.get(key)) is int:
            changed[key] = min(values[key], 2)
    return changed


def _states(values: Mapping[str, Any]) -> dict[str, Any]:
    """Heads of layers that carry a state, which must be as wide together as what is expanded."""
    width = values.get("hidden_size")
    if type(width) is not int:
        return {}
    if type(values.get("mamba_n_heads")) is int:
        expanded = int(values.get("mamba_expand", 2)) * width
        return {"mamba_n_heads": 4, "mamba_d_head": expanded // 4}
    if values.get("model_type") == "mamba2":
        return {"num_heads": 4, "head_dim": int(values.get("expand", 2)) * width // 4}
    if type(values.get("attention_hidden_size")) is int:
        return {"attention_hidden_size": width}
    if values.get("model_type") in ("mamba", "falcon_mamba"):
        return {"intermediate_size": int(values.get("expand", 2)) * width}
    return {}
