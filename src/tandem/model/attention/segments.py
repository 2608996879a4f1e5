"""Attention segment by segment: no mask over the micro-batch, no work for invisible pairs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.data.batching.collate import Segment
from tandem.model.attention.backend import attention_backend
from tandem.model.attention.layout import TreeLayout
from tandem.model.cpu.c_kernels import TreeAttention, TreeAttentionCall, kernels, usable

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@attention_backend("segments")
def segments_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    *,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Each segment attends to its prefix and, causally, to itself.

    On CPU, without an effective sliding window, both blocks are flash calls on views of the
    projections, merged by their log-sum-exp. Elsewhere keys and values are gathered for one
    scaled_dot_product_attention call a segment. Arguments and result as `backend.dense_attention`.
    """
    if window is not None and window >= layout.longest_path():
        window = None
    library = kernels()
    if library is not None and usable(library, query, key, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        call = TreeAttentionCall(library, *layout.table, scale, window)
        return TreeAttention.apply(call, query, key, value)
    if query.device.type == "cpu" and window is None:
        output = _FlashSegments.apply(query, key, value, layout.segments, scaling)
    else:
        output = _gathered(query, key, value, layout, scaling, window)
    return output.transpose(1, 2).contiguous()


class _FlashSegments(torch.autograd.Function):
    """Two flash blocks a segment: its own rows causally, its prefix wholly.

    O = sum_i O_i exp(L_i - L) with L = logsumexp_i L_i merges blocks exactly, and the backward of
    each block is the flash backward given the merged O and L.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,  # [1, heads, T, D]
        key: Tensor,  # [1, key_value_heads, T, D]
        value: Tensor,
        segments: tuple[Segment, ...],
        scale: float | None,
    ) -> Tensor:
        output = torch.empty_like(query)
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        sums = torch.empty(query.shape[:3], dtype=wide)  # log-sum-exp [1, heads, T]
        for s in segments:
            own = slice(s.start, s.stop)
            q = query[:, :, own]
            out, total = _flash(q, key[:, :, own], value[:, :, own], 0.0, True, scale=scale)
            if s.prefix_stop > s.prefix_start:
                prefix = slice(s.prefix_start, s.prefix_stop)
                above, above_total = _flash(
                    q, key[:, :, prefix], value[:, :, prefix], 0.0, False, scale=scale
                )
                # The share of the prefix block in the merged softmax.
                share = torch.sigmoid(above_total - total).unsqueeze(-1).to(out.dtype)
                out = torch.lerp(out, above, share)
                total = torch.logaddexp(total, above_total)
            output[:, :, own] = out
            sums[:, :, own] = total
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.segments, ctx.scale = segments, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, output, sums = ctx.saved_tensors
        grad_output = grad_outputs[0]
        grad_query, grad_key, grad_value = map(torch.empty_like, (query, key, value))
        for s in ctx.segments:
            own = slice(s.start, s.stop)
            # Contiguous: the kernel reads the log-sum-exp by its own strides only.
            total = sums[:, :, own].transpose(1, 2).contiguous().transpose(1, 2)
            rows = (grad_output[:, :, own], query[:, :, own])
            merged = (output[:, :, own], total)
            dq, dk, dv = _flash_backward(
                *rows, key[:, :, own], value[:, :, own], *merged, 0.0, True, scale=ctx.scale
            )
            grad_query[:, :, own] = dq
            grad_key[:, :, own] = dk
            grad_value[:, :, own] = dv
            if s.prefix_stop > s.prefix_start:
                # The prefix's rows belong to an earlier segment, whose gradient is there already.
                prefix = slice(s.prefix_start, s.prefix_stop)
                dq, dk, dv = _flash_backward(
                    *rows, key[:, :, prefix], value[:, :, prefix], *merged, 0.0, False,
                    scale=ctx.scale,
                )  # fmt: skip
                grad_query[:, :, own] += dq
                grad_key[:, :, prefix] += dk
                grad_value[:, :, prefix] += dv
        return grad_query, grad_key, grad_value, None, None


def _gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    scale: float | None,
    window: int | None,
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    # `split` has one backward, a concatenation; slices would each zero-fill a whole gradient.
    outputs = []
    lengths = [s.stop - s.start for s in layout.segments]
    for s, q in zip(layout.segments, query.split(lengths, dim=2), strict=True):
        own, prefix = slice(s.start, s.stop), slice(s.prefix_start, s.prefix_stop)
        keys, values, mask = key[:, :, own], value[:, :, own], None
        if s.prefix_stop > s.prefix_start:
            keys = torch.cat([key[:, :, prefix], keys], dim=2)
            values = torch.cat([value[:, :, prefix], values], dim=2)
        if window is not None or keys.shape[2] != q.shape[2]:
            mask = _lower_right_causal(q.shape[2], keys.shape[2], window, q.device)
        outputs.append(
            F.scaled_dot_product_attention(
                q, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2)


def _lower_right_causal(
    queries: int, keys: int, window: int | None, device: torch.device
) -> Tensor:
    """[queries, keys] bool: the last query sees the last key, each query `window` positions."""
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    visible = key <= query
    return visible if window is None else visible & (query - key < window)
