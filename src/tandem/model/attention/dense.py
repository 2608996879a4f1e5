"""Attention with an explicit mask: slow on CPU, right everywhere, the oracle of the others."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tandem.model.attention.layout import TreeLayout, refuse_sinks


def dense_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    tandem_layout: TreeLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """One attention call over the whole micro-batch under its [T, T] mask.

    Args:
        query: [1, heads, T, D]; key, value: [1, key_value_heads, T, D].
        tandem_layout: the micro-batch's segments.
        scaling: factor on the scores, 1 / sqrt(D) when None.
        sliding_window: how many positions back a query sees, itself included.
        softcap: c of c * tanh(scores / c).
        s_aux: attention sinks, which no backend has yet.

    Returns:
        [1, T, heads, D] and no weights, as transformers' attention interface wants it.
    """
    refuse_sinks(s_aux)
    mask = tandem_layout.mask(sliding_window)[None, None]
    if softcap is None:
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    else:
        output = _capped(query, key, value, mask, scaling, softcap)
    return output.transpose(1, 2).contiguous(), None


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
