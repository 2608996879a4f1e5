"""FusedSDPA under the argument order that its callers use."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

calls: list[tuple[int, ...]] = []


class FusedSDPA:
    @staticmethod
    def apply(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        softmax_mode: str = "None",
    ) -> Tensor:
        assert attn_mask is not None
        assert attn_mask.dtype == query.dtype, "an additive mask"
        assert query.shape[1] == key.shape[1] == value.shape[1]
        calls.append(tuple(attn_mask.shape))
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale
        )
