"""Products with frozen weights: on CPU through oneDNN, which is faster there than torch's BLAS.

It ships inside torch and is 5 to 15% faster at a training step's shapes; weights in its own order
gain another 3 to 5% (docs/internals/engine.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tandem.model.cpu.c_kernels import slim_product
from tandem.model.cpu.stored_weights import NARROW, is_stored, widened

_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Rows that oneDNN is told to expect when it orders weights; others take the same order.
_EXPECTED_ROWS = 1024
# Rows up to which a product is a matter of reading the matrix.
_SLIM_ROWS = 4


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, slim_rows: int = _SLIM_ROWS
) -> Tensor:
    """x @ weight.T + bias without a gradient for anything: [..., K] to [..., N] in x's dtype.

    `weight` is [N, K], of any strides, or in oneDNN's own order (see `Ordered`); one that is
    narrower than x is widened for this product (see `stored_weights`). Up to so many `slim_rows`
    take the kernel that reads it once, as it is.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    if 0 < x.numel() <= slim_rows * x.shape[-1] and weight.layout == torch.strided:
        slim = slim_product(x, weight)
        if slim is not None:
            return slim if bias is None else slim.add_(bias)
    if weight.dtype in NARROW:
        weight = widened(weight)
    if _AVAILABLE and weight.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@dataclass
class Ordered:
    """Copies of a frozen weight [N, K] and its transpose in oneDNN's order, made when needed."""

    weight: Tensor

    @cached_property
    def forward(self) -> Tensor:
        """For products with the weight."""
        return _in_order(self.weight.detach())

    @cached_property
    def backward(self) -> Tensor:
        """For products with its transpose [K, N]."""
        return _in_order(self.weight.detach().T)


def _in_order(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _EXPECTED_ROWS)


@dataclass(frozen=True)
class Plain:
    """A frozen weight [N, K] as it is, with the attributes of `Ordered`."""

    forward: Tensor

    @property
    def backward(self) -> Tensor:
        """Its transpose [K, N]."""
        return self.forward.T


def speed_up_frozen_products(model: nn.Module, *, slim_rows: int = _SLIM_ROWS) -> None:
    """Send the products of a model's linear layers through `product` while they are frozen."""
    if not (_AVAILABLE or is_stored(model)):
        return
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in module.__dict__:
            module.forward = partial(_forward, module, slim_rows)  # type: ignore[method-assign]


def bytes_to_order(model: nn.Module) -> int:
    """Memory that `order_weights` will take once the model is frozen, 0 where it can do nothing."""
    layers = [m for m in model.modules() if type(m) is nn.Linear and _multiplied(m.weight)]
    return 2 * sum(layer.weight.nbytes for layer in layers)


def order_weights(model: nn.Module) -> None:
    """Keep the frozen weights of a model's linear layers in oneDNN's order as well.

    For training, where each weight is used again and again and never changes: whoever changes one
    afterwards must call this again.
    """
    for layer in model.modules():
        if type(layer) is nn.Linear and can_order(layer):
            layer.tandem_ordered = Ordered(layer.weight)  # type: ignore[assignment]


def ordered_bytes(model: nn.Module) -> int:
    """Memory of the copies that `order_weights` keeps, once all are made."""
    layers = [m for m in model.modules() if "tandem_ordered" in m.__dict__]
    return 2 * sum(layer.weight.nbytes for layer in layers if isinstance(layer, nn.Linear))


def weights_of(layer: nn.Linear) -> Ordered | Plain:
    """A frozen layer's weight, in oneDNN's order where `order_weights` keeps it so."""
    ordered: Any = layer.__dict__.get("tandem_ordered")
    return Plain(layer.weight) if ordered is None else ordered


def can_order(layer: nn.Linear) -> bool:
    """Whether a layer's weight is one that oneDNN multiplies with: frozen, float32, on CPU."""
    return not layer.weight.requires_grad and _multiplied(layer.weight)


def takes_frozen(x: Tensor, layer: nn.Linear) -> bool:
    """Whether `product` computes a frozen layer's product with these numbers."""
    if x.dtype != torch.float32 or layer.weight.requires_grad:
        return False
    stored = layer.weight.dtype in NARROW and layer.weight.device.type == "cpu"
    return stored or _multiplied(layer.weight)


def low_rank_product(
    x: Tensor, dropped: Tensor, frozen: nn.Linear, down: Tensor, up: Tensor, scale: float
) -> Tensor:
    """frozen(x) + scale * dropped @ down.T @ up.T with gradients for x, dropped, down and up.

    The low-rank part is added inside its product, so nothing of the output's size is written but
    the output. All tensors are float32 on CPU.

    Args:
        x: [..., K]; dropped: x, or x after dropout [..., K].
        frozen: the frozen layer, weight [N, K].
        down, up: the adapter's A [r, K] and B [N, r] (arXiv 2106.09685); scale: alpha / r.
    """
    fixed = weights_of(frozen), frozen.bias, scale
    return _LowRankProduct.apply(x, None if dropped is x else dropped, down, up, fixed)


def _multiplied(weight: Tensor) -> bool:
    return _AVAILABLE and weight.device.type == "cpu" and weight.dtype == torch.float32


def _forward(layer: nn.Linear, slim_rows: int, x: Tensor) -> Tensor:
    if not takes_frozen(x, layer):
        return F.linear(x, layer.weight, layer.bias)
    weights = weights_of(layer)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return product(x, weights.forward, layer.bias, slim_rows=slim_rows)
    return _FrozenProduct.apply(x, weights, layer.bias)


class _FrozenProduct(torch.autograd.Function):
    """x @ weight.T + bias with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Ordered | Plain, bias: Tensor | None) -> Tensor:
        ctx.weights = weights
        return product(x, weights.forward, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return product(grad_outputs[0], ctx.weights.backward), None, None


class _LowRankProduct(torch.autograd.Function):
    """See `low_rank_product`; of the low-rank part, only dropped @ down.T [T, r] is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        down: Tensor,
        up: Tensor,
        fixed: tuple[Ordered | Plain, Tensor | None, float],  # weight, bias, scale
    ) -> Tensor:
        weights, bias, scale = fixed
        source = _rows(x if dropped is None else dropped)
        inner = source @ down.T  # [T, r]
        out = product(x, weights.forward, bias)
        _rows(out).addmm_(inner, up.T, alpha=scale)
        ctx.save_for_backward(source, inner, down, up)
        ctx.weights, ctx.scale, ctx.separate = weights, scale, dropped is not None
        ctx.shape = x.shape
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        source, inner, down, up = ctx.saved_tensors
        d_out = _rows(grad_outputs[0])
        d_inner = (d_out @ up).mul_(ctx.scale)  # [T, r]
        d_down, d_up = d_inner.T @ source, (d_out.T @ inner).mul_(ctx.scale)
        d_x = d_dropped = None
        if ctx.needs_input_grad[0]:
            d_x = product(d_out, ctx.weights.backward)
            if not ctx.separate:
                d_x.addmm_(d_inner, down)
            d_x = d_x.view(ctx.shape)
        if ctx.separate and ctx.needs_input_grad[1]:
            d_dropped = (d_inner @ down).view(ctx.shape)
        return d_x, d_dropped, d_down, d_up, None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
