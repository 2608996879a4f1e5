"""The C kernels as functions of tensors, with their gradients: float32, on CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from tandem.model.kernels.library import Kernels

_Float = ctypes.c_void_p


class _Rows(ctypes.Structure):
    _fields_ = (("data", _Float), ("row", ctypes.c_int64), ("head", ctypes.c_int64))

    @classmethod
    def of(cls, tensor: Tensor) -> _Rows:
        """[1, heads, T, D] of any strides but the last."""
        return cls(tensor.data_ptr(), tensor.stride(2), tensor.stride(1))


class _Attention(ctypes.Structure):
    """The struct of attention.c, field by field."""

    _fields_ = (
        *((name, _Rows) for name in ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v")),
        ("lse", _Float),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "key_heads", "depth")),
        ("scale", ctypes.c_float),
        ("window", ctypes.c_int64),
        ("segments", ctypes.c_void_p),
        ("trees", ctypes.c_void_p),
        ("tree_count", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


def usable(kernels: Kernels | None, *tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: float32, on CPU, their last dimension in vectors."""
    return kernels is not None and all(
        t.dtype == torch.float32 and t.device.type == "cpu" and t.shape[-1] % kernels.lanes == 0
        for t in tensors
    )


class TreeAttention(torch.autograd.Function):
    """Attention over trees; the rows that each segment sees are those of `data.collate.Segment`."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        query: Tensor,  # [1, heads, T, D]
        key: Tensor,  # [1, key_value_heads, T, D]
        value: Tensor,
        segments: Tensor,  # [n, 4] int64: start, stop, prefix_start, prefix_stop
        trees: Tensor,  # [trees + 1] int64: where each tree's segments begin
        scale: float,
        window: int | None,
    ) -> Tensor:
        query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
        _, heads, rows, depth = query.shape
        output = query.new_empty(1, rows, heads, depth)
        lse = query.new_empty(heads, rows)
        ctx.kernels, ctx.scale, ctx.window = kernels, scale, window
        ctx.save_for_backward(query, key, value, output, lse, segments, trees)
        call = _call(ctx, query, key, value, output, lse, segments, trees)
        kernels.functions.tandem_attention_forward(ctypes.byref(call))
        return output  # [1, T, heads, D]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, segments, trees = ctx.saved_tensors
        grad_output = grad_outputs[0].contiguous()
        grads = [t.new_empty(1, t.shape[2], t.shape[1], t.shape[3]) for t in (query, key, value)]
        call = _call(ctx, query, key, value, output, lse, segments, trees)
        call.d_out = _Rows.of(grad_output.transpose(1, 2))
        call.d_q, call.d_k, call.d_v = (_Rows.of(g.transpose(1, 2)) for g in grads)
        ctx.kernels.functions.tandem_attention_backward(ctypes.byref(call))
        d_query, d_key, d_value = (g.transpose(1, 2) for g in grads)
        return None, d_query, d_key, d_value, None, None, None, None


def _call(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    segments: Tensor,
    trees: Tensor,
) -> _Attention:
    call = _Attention()
    call.q, call.k, call.v = _Rows.of(query), _Rows.of(key), _Rows.of(value)
    call.out = _Rows.of(output.transpose(1, 2))
    call.lse, call.segments, call.trees = lse.data_ptr(), segments.data_ptr(), trees.data_ptr()
    call.heads, call.rows, call.depth = query.shape[1:]
    call.key_heads, call.tree_count = key.shape[1], len(trees) - 1
    call.scale, call.window = ctx.scale, ctx.window or 0
    call.threads = torch.get_num_threads()
    return call


def softmax_block(kernels: Kernels, scores: Tensor, peak: Tensor, total: Tensor) -> Tensor:
    """Take one block of columns into a running softmax; see elementwise.c.

    Args:
        scores: [n, columns], overwritten with exp(scores - peak).
        peak, total: [n], brought up to date: largest score so far, sum of exp(score - peak).

    Returns:
        [n], what sums over earlier blocks are to be multiplied by.
    """
    shrink = torch.empty_like(peak)
    kernels.functions.tandem_softmax_block(
        *map(_pointer, (scores, peak, total, shrink)),
        *map(ctypes.c_int64, (*scores.shape, torch.get_num_threads())),
    )
    return shrink


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up, keeping the two and nothing else."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.kernels = kernels
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        kernels.functions.tandem_swiglu_forward(
            *map(_pointer, (gate, up, out)),
            *map(ctypes.c_int64, (gate.numel(), torch.get_num_threads())),
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_out = grad_outputs[0].contiguous()
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        ctx.kernels.functions.tandem_swiglu_backward(
            *map(_pointer, (d_out, gate, up, d_gate, d_up)),
            *map(ctypes.c_int64, (gate.numel(), torch.get_num_threads())),
        )
        return None, d_gate, d_up


class RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + epsilon) * weight (arXiv 1910.07467) with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        out, inverse = torch.empty_like(x), x.new_empty(rows)
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, inverse)
        kernels.functions.tandem_rms_norm_forward(
            *map(_pointer, (x, weight, out, inverse)),
            *map(ctypes.c_int64, (rows, width)),
            ctypes.c_float(epsilon),
            ctypes.c_int64(torch.get_num_threads()),
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        d_out, d_x = grad_outputs[0].contiguous(), torch.empty_like(x)
        ctx.kernels.functions.tandem_rms_norm_backward(
            *map(_pointer, (d_out, x, weight, inverse, d_x)),
            *map(ctypes.c_int64, (inverse.shape[0], x.shape[-1], torch.get_num_threads())),
        )
        return None, d_x, None, None


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
