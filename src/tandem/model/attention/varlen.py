"""Attention in one kernel call a layer: torch's variable-length flash attention, on CUDA."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tandem.model.attention.backend import attention_backend
from tandem.model.attention.layout import KeyPaths, TreeLayout
from tandem.model.attention.packing_probe import PackingProbe

try:
    from torch.nn.attention.varlen import varlen_attn as _varlen_attn
except ImportError:  # before torch 2.10
    _varlen_attn = None  # type: ignore[assignment]

# torch 2.10 has the function without these keywords.
_KEYWORDS = {"scale", "window_size", "enable_gqa"}
_DTYPES = (torch.bfloat16, torch.float16)
_MOST_HEAD_SIZE = 256
# Only data centre GPUs have a backward for larger heads.
_EVERYWHERE_HEAD_SIZE = 192
_LARGE_HEADS = ((8, 0), (9, 0), (10, 0))


def unavailable_reason(probe: PackingProbe, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps the kernel from a model with weights of this device and dtype, or None."""
    if device.type != "cuda":
        return "its kernel runs on CUDA devices alone"
    if _varlen_attn is None or not set(inspect.signature(_varlen_attn).parameters) >= _KEYWORDS:
        return f"torch {torch.__version__} has no varlen_attn with {', '.join(sorted(_KEYWORDS))}"
    if dtype not in _DTYPES:
        return f"its kernel takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if probe.softcap:
        return "the model soft-caps attention scores"
    return _heads_reason(probe, torch.cuda.get_device_capability(device))


def _heads_reason(probe: PackingProbe, capability: tuple[int, int]) -> str | None:
    if capability < (8, 0):
        return "its kernel needs a GPU of compute capability 8.0 or newer"
    for query, value in sorted(probe.head_sizes):
        if query != value:
            return "the model's value heads have another size than its query heads"
        if query % 8 or query > _MOST_HEAD_SIZE:
            return f"its kernel takes heads of up to {_MOST_HEAD_SIZE} in eights, not {query}"
        if query > _EVERYWHERE_HEAD_SIZE and capability not in _LARGE_HEADS:
            return f"its kernel has no backward for heads of {query} on this GPU"
    return None


@attention_backend("varlen")
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    *,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Queries by segment, keys and values gathered as [prefix; segment].

    Causal mask and sliding windows are aligned to the lower right, so that a branch's last token
    sees its whole path. Grouped-query heads stay grouped. Arguments and result as
    `backend.dense_attention`.
    """
    kind = query.device.type
    # Rotary embeddings and norms may leave autocast's dtype, and the kernel is not on its list.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    paths = layout.key_paths
    q, k, v = (heads[0].transpose(0, 1).to(dtype) for heads in (query, key, value))  # [T, heads, D]
    # A window of 1 is the token itself, which the kernel counts as none to the left.
    left = -1 if window is None else window - 1
    if paths.shared:  # else the paths are the rows as they stand
        k, v = _Gather.apply(k, paths), _Gather.apply(v, paths)
    output: Any = _varlen_attn(
        q, k, v, paths.query_starts, paths.key_starts, paths.longest_query, paths.longest_path,
        scale=scaling, window_size=(left, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output[None].to(query.dtype)


class _Gather(torch.autograd.Function):
    """[T, ...] to one copy of each row for every path through it [K, ...].

    The backward adds copies up in a fixed order. That of index_select would add them atomically,
    in whatever order they come, and a resumed run would not repeat its bits.
    """

    @staticmethod
    def forward(ctx: Any, packed: Tensor, paths: KeyPaths) -> Tensor:
        ctx.paths = paths
        return packed.index_select(0, paths.rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        gradient, paths = grad_outputs[0], ctx.paths
        total = gradient.index_select(0, paths.own)
        for rows, places in paths.shared:  # no row twice in one of them
            total.index_add_(0, rows, gradient.index_select(0, places))
        return total, None
