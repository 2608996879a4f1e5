"""Attention with an explicit mask: slow on CPU, right everywhere, the oracle of the others."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.model.attention.hf_interface import entry
from tandem.model.attention.layout import TreeLayout


@entry(soft_caps=True)
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
    """One attention call over the whole micro-batch under its [T, T] mask.

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
