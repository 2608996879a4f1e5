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


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    weight = layer.weight
    if weight.requires_grad or weight.dtype != torch.float32 or weight.device.type != "cpu":
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
