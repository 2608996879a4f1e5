"""Attention backends, registered by name and called by transformers; and the dense one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tandem.errors import UserError
from tandem.model.attention.layout import TreeLayout

# The function that transformers calls, by backend; other packages may add theirs.
BACKENDS: dict[str, Callable[..., Any]] = {}


def attention_backend(
    name: str, *, soft_caps: bool = False
) -> Callable[[Callable[..., Tensor]], Callable[..., Any]]:
    """Register `attention(query, key, value, layout, scaling=, window=)` under a name.

    The function takes and returns what `dense_attention` does, and `softcap` only with `soft_caps`.
    Its name then stands for the function that transformers calls; `select.use_backend` takes any
    name that was registered, by whichever module.

    Calls raise UserError for models whose softmax has learnt sinks: ignoring them would be wrong.
    """

    def register(attention: Callable[..., Tensor]) -> Callable[..., Any]:
        def called(
            _module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            _mask: Tensor | None,
            *,
            tandem_layout: TreeLayout,
            **asked: Any,
        ) -> tuple[Tensor, None]:
            """Take the arguments of transformers, and pass those on that scores depend on."""
            if asked.get("s_aux") is not None:
                raise UserError(
                    "models with attention sinks (such as gpt-oss) cannot be trained yet"
                )
            softcap = asked.get("softcap")
            if softcap is not None and not soft_caps:
                raise ValueError("soft-capped attention takes the dense backend")
            options = {"scaling": asked.get("scaling"), "window": asked.get("sliding_window")}
            if soft_caps:
                options["softcap"] = softcap
            return attention(query, key, value, tandem_layout, **options), None

        BACKENDS[name] = called
        return called

    return register


@attention_backend("dense", soft_caps=True)
def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One attention call over the whole micro-batch under its [T, T] mask: slow on CPU.

    Args:
        query: [1, heads, T, D]; key, value: [1, key_value_heads, T, D].
        layout: the micro-batch's segments.
        scaling: factor on the scores, 1 / sqrt(D) when None.
        window: how many positions back a query sees, itself included; all when None.
        softcap: c of c * tanh(scores / c).

    Returns:
        [1, T, heads, D].
    """
    mask = layout.mask(window)[None, None]
    if softcap is None:
        grouped = query.shape[1] != key.shape[1]
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped
        )
    else:
        output = _capped(query, key, value, mask, scaling, softcap)
    return output.transpose(1, 2).contiguous()


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,  # [1, 1, T, T]
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Attention whose scores are c * tanh(scores / c).

    The query heads that share a key are rows of one product, so no key is ever repeated.
    """
    scale = scaling if scaling is not None else 1.0 / math.sqrt(query.shape[-1])
    heads, rows = key.shape[1], query.shape[2]
    stacked = query.unflatten(1, (heads, -1)).flatten(2, 3)  # [1, key_value_heads, groups * T, D]
    scores = (stacked @ key.transpose(-1, -2) * scale).unflatten(2, (-1, rows))
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, -torch.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=wide).to(value.dtype)
    return (weights.flatten(2, 3) @ value).unflatten(2, (-1, rows)).flatten(1, 2)
