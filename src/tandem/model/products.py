"""Products with frozen weights: on CPU through oneDNN, which is faster there than torch's choice.

torch sends float32 products to the BLAS it was built with. oneDNN ships inside torch as well and
is 5 to 15% faster at a training step's shapes; docs/engine.md has the figures.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias without a gradient for anything.

    Args:
        x: [..., K].
        weight: [N, K], of any strides.
        bias: [N] or None.

    Returns:
        [..., N] in x's dtype.
    """
    if _AVAILABLE and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias)


def speed_up_frozen_products(model: nn.Module) -> None:
    """Send the products of a model's linear layers through `product` while they are frozen.

    Modules stay in place under their names, only their forward is replaced.
    """
    if not _AVAILABLE:
        return
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in module.__dict__:
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def takes_frozen(x: Tensor, layer: nn.Linear) -> bool:
    """Whether `product` takes a layer's product to oneDNN: frozen float32 weights on CPU."""
    weight = layer.weight
    return (
        _AVAILABLE
        and not weight.requires_grad
        and weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
    )


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    weight = layer.weight
    if not takes_frozen(x, layer):
        return F.linear(x, weight, layer.bias)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return product(x, weight, layer.bias)
    result: Tensor = _FrozenProduct.apply(x, weight, layer.bias)
    return result


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(grad_outputs[0], weight.T), None, None


def low_rank_product(
    x: Tensor, dropped: Tensor, frozen: nn.Linear, down: Tensor, up: Tensor, scale: float
) -> Tensor:
    """frozen(x) + scale * dropped @ down.T @ up.T with gradients for x, dropped, down and up.

    The low-rank part is added inside its product, so nothing of the output's size is written but
    the output; dropped [..., r] alone is kept beside what the layer's gradient needs.

    Args:
        x: [..., K], float32 on CPU like all others.
        dropped: x, or x after dropout [..., K].
        frozen: the frozen layer, weight [N, K].
        down, up: the adapter's A [r, K] and B [N, r] (arXiv 2106.09685).
        scale: alpha / r.

    Returns:
        [..., N].
    """
    result: Tensor = _LowRankProduct.apply(
        x, None if dropped is x else dropped, frozen.weight, frozen.bias, down, up, scale
    )
    return result


class _LowRankProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
    ) -> Tensor:
        source = _rows(x if dropped is None else dropped)
        inner = source @ down.T  # [T, r]
        out = product(x, weight, bias)
        _rows(out).addmm_(inner, up.T, alpha=scale)
        ctx.save_for_backward(source, inner, weight, down, up)
        ctx.scale, ctx.separate, ctx.shape = scale, dropped is not None, x.shape
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        source, inner, weight, down, up = ctx.saved_tensors
        d_out = _rows(grad_outputs[0])
        d_inner = (d_out @ up).mul_(ctx.scale)  # [T, r]
        d_down, d_up = d_inner.T @ source, (d_out.T @ inner).mul_(ctx.scale)
        d_x = d_dropped = None
        if ctx.needs_input_grad[0]:
            d_x = product(d_out, weight.T)
            if not ctx.separate:
                d_x.addmm_(d_inner, down)
            d_x = d_x.view(ctx.shape)
        if ctx.separate and ctx.needs_input_grad[1]:
            d_dropped = (d_inner @ down).view(ctx.shape)
        return d_x, d_dropped, None, None, d_down, d_up, None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
