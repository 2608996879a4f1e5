"""Adapters that begin as the principal part of a weight (PiSSA, arXiv 2404.02948).

PiSSA takes the part s * B0 @ A0 of the largest singular values out of a weight W, and trains A and
B from A0 and B0 beside what is left: W - s * B0 @ A0 + s * B @ A. Here the base stays as it is, and
the adapter is the difference of the two products, B @ (A - A0) + (B - B0) @ A0 times s: the same
function with the same gradients, zero at the start in every number format. So the model with its
adapter off is the original one, the weights may be in 4 bits, narrow or on disk, and what is saved
is a plain adapter of twice the rank, [A; A0] and [B, -B0], as peft converts one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tandem.errors import UserError
from tandem.model.lora.adapted import Began, adapted_layers, began_of, dense_weight
from tandem.model.read_model import weights_of_module
from tandem.recipe.choices import LoraInit
from tandem.runtime.process_group import ProcessGroup

# Power iterations, as in the paper's fast variant, and dimensions beyond the rank (Halko et al.,
# arXiv 0909.4061), without which near singular values would be mixed up.
_ITERATIONS = 16
_SPARE = 8
_A, _B = "lora_A.default.weight", "lora_B.default.weight"


def begin_principal(model: Any, init: LoraInit) -> None:
    """Let all adapted layers begin as the principal part of their weights.

    Raises UserError for a rank that is larger than a weight.
    """
    for name, layer in _named_layers(model).items():
        rank, scale = layer.r["default"], layer.scaling["default"]
        with torch.no_grad(), weights_of_module(model, layer.base_layer):
            weight = dense_weight(layer.base_layer).to(layer.lora_A["default"].weight.dtype)
            if rank > min(weight.shape):
                raise UserError(
                    f"lora.init: {name} has {min(weight.shape)} singular values, fewer than the "
                    f"rank {rank}; lower lora.rank, or set a lower one in lora.rank_pattern"
                )
            left, values, right = principal_part(weight, rank, init)
            root = (values / scale).sqrt()
            _begin(layer, root[:, None] * right, left * root)


def principal_part(weight: Tensor, rank: int, init: LoraInit) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values [r] of a weight [N, K], with vectors [N, r] and [r, K]."""
    if weight.device.type == "meta":
        rows, columns = weight.shape
        return weight.new_empty(rows, rank), weight.new_empty(rank), weight.new_empty(rank, columns)
    if init == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    more = min(rank + _SPARE, *weight.shape)
    left, values, right = torch.svd_lowrank(weight, q=more, niter=_ITERATIONS)
    return left[:, :rank], values[:rank], right[:, :rank].T


def share_beginnings(model: nn.Module, processes: ProcessGroup) -> None:
    """Give every process the beginnings of rank 0: singular vectors differ in their last bits."""
    layers = _begun_layers(model)
    if not layers or processes.count == 1:
        return
    found = processes.on_rank0(
        lambda: {name: (each.began.a.cpu(), each.began.b.cpu()) for name, each in layers.items()}
    )
    for name, layer in layers.items():
        _begin(layer, *found[name])


def with_beginnings(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained weights by name, those of layers with a beginning as a plain adapter has them."""
    converted = dict(tensors)
    for name, layer in _begun_layers(model).items():
        a, b = f"{name}.{_A}", f"{name}.{_B}"
        began = layer.began.near(tensors[a])
        converted[a] = torch.cat([tensors[a], began.a])
        converted[b] = torch.cat([tensors[b], -began.b], dim=1)
    return converted


def take_beginnings(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained weights among the tensors of a saved adapter, by their names in the file.

    The layers get the beginnings back that `with_beginnings` put beside them.
    """
    trained = dict(tensors)
    for name, layer in _begun_layers(model).items():
        rank = layer.r["default"]
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        layer.began = Began(tensors[a][rank:].clone(), -tensors[b][:, rank:])
        trained[a], trained[b] = tensors[a][:rank], tensors[b][:, :rank]
    return trained


def doubled(config: Any) -> Any:
    """An adapter's configuration as that of the plain adapter that is saved: of twice the rank.

    Alpha grows with it, so that the scaling stays.
    """
    plain = copy.deepcopy(config)
    more = 2**0.5 if config.use_rslora else 2
    plain.r, plain.lora_alpha = 2 * config.r, more * config.lora_alpha
    plain.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    plain.alpha_pattern = {key: more * alpha for key, alpha in config.alpha_pattern.items()}
    return plain


def beginnings(model: nn.Module) -> list[Began]:
    """What the layers of a model began as, where that is a part of their weights."""
    return [layer.began for layer in _begun_layers(model).values()]


def _named_layers(model: nn.Module) -> dict[str, Any]:
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)]: layer for layer in adapted_layers(model)}


def _begun_layers(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in _named_layers(model).items() if began_of(layer)}


def _begin(layer: Any, a: Tensor, b: Tensor) -> None:
    layer.began = Began(a, b)
    for matrix, values in ((layer.lora_A, a), (layer.lora_B, b)):
        weight = matrix["default"].weight
        weight.data = values.to(weight.device, weight.dtype, copy=True).contiguous()
