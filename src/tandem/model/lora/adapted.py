"""What an adapted layer computes: its own product, the low-rank part, and DoRA's lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tandem.model.cpu.onednn_linear import low_rank_product, product, takes_frozen
from tandem.model.quantize import dequantized, load_bitsandbytes
from tandem.model.read_model import weights_of_module

load_bitsandbytes()  # before peft does, which would print its messages

from peft.tuners.lora import Linear as LoraLinear  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from peft.tuners.lora.layer import ParamWrapper  # noqa: E402


@dataclass(frozen=True)
class LowRank:
    """The low-rank part of a layer: scale * up @ down is added to its weight."""

    down: Tensor  # [r, K]
    up: Tensor  # [N, r]
    scale: float


class Began:
    """What a layer's A and B began as, where that is a part of its weight; see `principal`."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b  # [r, K] and [N, r]

    def near(self, other: Tensor) -> Began:
        """Both on the device, and in the dtype, of another tensor."""
        if (self.a.device, self.a.dtype) != (other.device, other.dtype):
            self.a, self.b = (
                self.a.to(other.device, other.dtype),
                self.b.to(other.device, other.dtype),
            )
        return self


def began_of(layer: Any) -> Began | None:
    """What an adapted layer's matrices began as; None where B began at zero."""
    began: Began | None = layer.__dict__.get("began")
    return began


def adapted_layers(model: nn.Module) -> Iterator[Any]:
    """The linear layers with an adapter; experts, whose parameters are adapted, are none."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper):
            yield layer


def fuse_low_rank(model: nn.Module) -> None:
    """Let adapted layers add the low-rank part inside its product, where that is faster.

    Layers with DoRA, and those that began as a part of their weight, compute in their own way
    everywhere.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer._cast_input_dtype = partial(_cast_unless_autocast, layer._cast_input_dtype)
    for layer in adapted_layers(model):
        if layer.lora_magnitude_vector:
            layer.forward = partial(_decomposed, layer, RowNorms(layer.base_layer), layer.forward)
        elif began_of(layer) or (
            isinstance(layer, LoraLinear) and type(layer.base_layer) is nn.Linear
        ):
            layer.forward = partial(_adapted, layer, layer.forward)


def acting(layer: Any) -> str | None:
    """The name of a layer's one adapter that acts now, unmerged; None for none or several."""
    if layer.disable_adapters or layer.merged:
        return None
    names = list(layer.active_adapters)
    return names[0] if len(names) == 1 else None


def _cast_unless_autocast(cast: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Leave out peft's cast of an adapter's input to float32 where autocast would undo it."""
    return x if torch.is_autocast_enabled(x.device.type) else cast(x, dtype)


def _low_rank(layer: Any, name: str) -> LowRank:
    """What an adapter adds to a layer's weight.

    Where it began as a part of the weight that is B @ A - B0 @ A0, put so that nothing large is
    taken from something large: B @ (A - A0) + (B - B0) @ A0.
    """
    down, up, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    if (began := began_of(layer)) is None:
        return LowRank(down, up, scale)
    first = began.near(down)
    return LowRank(
        torch.cat([down - first.a, first.a]), torch.cat([up, up - first.b], dim=1), scale
    )


def _adapted(layer: Any, plain: Any, x: Tensor) -> Tensor:
    name = acting(layer)
    if name is None or name not in layer.lora_A:
        return plain(x)
    fused = type(layer.base_layer) is nn.Linear and takes_frozen(x, layer.base_layer)
    if not fused and began_of(layer) is None:
        return plain(x)
    low, dropped = _low_rank(layer, name), layer.lora_dropout[name](x)
    if fused:
        return _fused(layer, x, dropped, low)
    result: Tensor = layer.base_layer(x)
    return (result + _added(layer, dropped, low)).to(result.dtype)


def _fused(layer: Any, x: Tensor, dropped: Tensor, low: LowRank) -> Tensor:
    return low_rank_product(x, dropped, layer.base_layer, low.down, low.up, low.scale)


def _added(layer: Any, dropped: Tensor, low: LowRank) -> Tensor:
    """scale * dropped @ down.T @ up.T, in the adapter's dtype or autocast's."""
    wide = layer._cast_input_dtype(dropped, low.down.dtype)
    return F.linear(F.linear(wide, low.down), low.up) * low.scale


def _decomposed(layer: Any, norms: RowNorms, plain: Any, x: Tensor) -> Tensor:
    """A layer whose rows have lengths of their own (DoRA, arXiv 2402.09353, equation 5).

    The factor m / norm(W + scale * up @ down) of each row is added as (factor - 1) times the sum,
    so that a layer whose lengths have not moved computes what LoRA computes, to the last bit. As in
    peft, norms are constants in the backward (section 4.3), and dropout acts on all that the
    adapter adds.
    """
    name = acting(layer)
    if name is None or name not in layer.lora_A:
        return plain(x)
    base, low = layer.base_layer, _low_rank(layer, name)
    dropped = layer.lora_dropout[name](x)
    if dropped is x and type(base) is nn.Linear and takes_frozen(x, base):
        out = whole = _fused(layer, x, x, low)
        dtype = out.dtype
    else:
        out = base(x)
        dtype = out.dtype
        added = _added(layer, dropped, low)
        whole = (out if dropped is x else base(dropped)) + added
        out = out + added
    if base.bias is not None:
        whole = whole - base.bias
    factor = layer.lora_magnitude_vector[name].weight / norms.of(low)  # [N]
    return (out + (factor - 1) * whole).to(dtype)


class RowNorms:
    """The lengths of the rows of W + scale * up @ down [N] of one layer, without a gradient.

    The squares of the frozen weight are summed once; what the adapter adds to them takes one
    product of rank r with the weight, instead of a sum of the weight's size.
    """

    def __init__(self, base: Any) -> None:
        self._base = base
        self._squares: Tensor | None = None

    def of(self, low: LowRank) -> Tensor:
        """The lengths with the low-rank part as it is now, in its dtype."""
        with torch.no_grad(), torch.autocast(low.down.device.type, enabled=False):
            weight = dense_weight(self._base)
            if self._squares is None:
                self._squares = _square_sums(weight, low.down.dtype)
            # product widens weights that are stored narrow, on a CPU
            near = weight.device.type == "cpu" and low.down.dtype == torch.float32
            down = low.down if near else low.down.to(weight.dtype)
            crossed = product(down, weight).T.to(low.up.dtype)  # [N, r]
            inner = low.up @ (low.down @ low.down.T)  # [N, r]
            added = ((2 * crossed + low.scale * inner) * low.up).sum(dim=1) * low.scale
            return (self._squares + added).sqrt()


def start_lengths(model: nn.Module, name: str = "default") -> None:
    """Set DoRA's lengths to those of the base's rows, for adapters whose product is zero.

    peft computes them while it wraps a model, when weights may be on disk still.
    """
    for layer in adapted_layers(model):
        if name not in layer.lora_magnitude_vector:
            continue
        length = layer.lora_magnitude_vector[name].weight
        dtype = layer.lora_A[name].weight.dtype
        with torch.no_grad(), weights_of_module(model, layer.base_layer):
            length.data = _square_sums(dense_weight(layer.base_layer), dtype).sqrt()


def _square_sums(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()


def dense_weight(base: Any) -> Tensor:
    """A layer's frozen weight as [N, K], in the dtype that it has in memory."""
    if isinstance(base, Conv1D):
        weight: Tensor = base.weight.T
        return weight
    return base.weight.detach() if type(base) is nn.Linear else dequantized(base)
