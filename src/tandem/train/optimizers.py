"""Optimizers by name; their steps, and their state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.optimization import Adafactor

from tandem.errors import UserError, require
from tandem.model.quantize import load_bitsandbytes
from tandem.model.trained_weights import decays, rate_factor
from tandem.recipe.training_settings import TrainingSettings
from tandem.runtime.device import Device
from tandem.train.updates.lion import Lion
from tandem.train.updates.muon import Muon, groups_of
from tandem.train.updates.schedule_free import ScheduleFreeAdamW

# What an optimizer holds of each parameter: all of it, a shard of its rows, or a piece of all
# parameters in one row.
Pieces = Literal["whole", "shards", "flat"]
_ANY: frozenset[Pieces] = frozenset({"whole", "shards", "flat"})
_WHOLE: frozenset[Pieces] = frozenset({"whole"})


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer that settings can name."""

    # called with parameters, or what `groups` makes of them, and `options`
    kind: Callable[..., torch.optim.Optimizer]
    options: Callable[[TrainingSettings], dict[str, Any]]  # its keyword arguments
    # how many float32 tensors of a parameter's size it keeps for each; 8 bits are a quarter of one
    state_tensors: float
    _: KW_ONLY
    factored: bool = False  # whether it also keeps a row and a column of each matrix
    fused: bool = False  # whether it takes `fused`, and should where `_FUSED` says so
    groups: Callable[[Mapping[str, Tensor], Collection[str]], list[dict[str, Any]]] | None = None
    pieces: frozenset[Pieces] = _ANY  # what it can work on
    extra: tuple[str, str] | None = None  # a package it needs, and the extra of tandem that has it


def _adam_options(settings: TrainingSettings) -> dict[str, Any]:
    return {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
    }


def _muon_options(settings: TrainingSettings) -> dict[str, Any]:
    return {**_adam_options(settings), "momentum": settings.muon_momentum}


def _lion_options(settings: TrainingSettings) -> dict[str, Any]:
    return {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "betas": (settings.lion_beta1, settings.lion_beta2),
    }


def _adafactor_options(settings: TrainingSettings) -> dict[str, Any]:
    """The recipe's rate, as transformers' Trainer has it.

    torch's Adafactor bounds the rate by 1 / sqrt(step) and multiplies it by a weight's size, which
    is 0 in an adapter's B at the start.
    """
    return {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "scale_parameter": False,
        "relative_step": False,
    }


def _adamw_8bit(parameters: Iterable[Tensor], **options: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with moments in 8 bits (arXiv 2110.02861); small tensors have 32."""
    made: torch.optim.Optimizer = load_bitsandbytes().optim.AdamW8bit(parameters, **options)
    return made


OPTIMIZERS = {
    # arXiv 1711.05101.
    "adamw": OptimizerSpec(torch.optim.AdamW, _adam_options, state_tensors=2, fused=True),
    # Its blocks' scales depend on what else is in a block.
    "adamw_8bit": OptimizerSpec(
        _adamw_8bit, _adam_options, state_tensors=0.5, pieces=_WHOLE,
        extra=("bitsandbytes", "quant"),
    ),
    # arXiv 1804.04235.
    "adafactor": OptimizerSpec(
        Adafactor, _adafactor_options, state_tensors=0, factored=True, pieces=_WHOLE
    ),
    "lion": OptimizerSpec(Lion, _lion_options, state_tensors=1),
    "muon": OptimizerSpec(
        Muon, _muon_options, state_tensors=1, groups=groups_of, pieces=_WHOLE
    ),
    # DeepSpeed keeps a copy of what it moves, and cannot be told of another point to compute at.
    "schedule_free_adamw": OptimizerSpec(
        ScheduleFreeAdamW, _adam_options, state_tensors=2, pieces=frozenset({"whole", "shards"})
    ),
}  # fmt: skip
# Those that keep an average of the weights, which is saved in their place.
AVERAGING = frozenset({"schedule_free_adamw"})
# Kinds of devices where the fused AdamW is taken. On a CPU it was measured at a third of the time
# of torch's loop over tensors (an adapter of rank 16 on all layers of a 7B model, two threads: 27
# against 66 ms a step; of a 0.5B model 8 against 22 ms), and differs by 3e-9.
_FUSED = ("cpu", "cuda")


def check_optimizer(name: str, pieces: Pieces, engine: str, device: Device | None = None) -> None:
    """Raise UserError where an optimizer cannot work, before anything is read.

    Args:
        pieces: what an engine gives it of each parameter.
        engine: its name.
        device: None where it is not known yet.
    """
    spec = OPTIMIZERS[name]
    why = f"optimizer: {name}"
    if pieces not in spec.pieces:
        holds = "shards of each weight" if pieces == "shards" else "pieces of all weights in a row"
        fit = ["single", "ddp", *(["fsdp2"] if "shards" in spec.pieces else [])]
        raise UserError(
            f"{why} cannot work on {holds}, which is what engine: {engine} gives it. "
            f"Use engine: {', '.join(fit[:-1])} or {fit[-1]}, or another optimizer, such as adamw."
        )
    if spec.extra is None:
        return
    package, extra = spec.extra
    require(package, extra, why)
    if device is not None:
        _try(spec, device, f"{why} does not run on {device.kind} with the {package} that is here")


def _try(spec: OptimizerSpec, device: Device, failure: str) -> None:
    """Take a step of a small tensor: not every version of a package has it for every device."""
    weight = torch.zeros(4096, device=device.torch_device, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    try:
        spec.kind([weight], lr=1e-3).step()
    except Exception as error:
        raise UserError(
            f"{failure} ({type(error).__name__}: {error}). Install a newer one, or use optimizer: "
            "adamw."
        ) from error


def make_optimizer(
    parameters: Mapping[str, Tensor],
    settings: TrainingSettings,
    device: Device,
    matrices: Collection[str] = (),
) -> torch.optim.Optimizer:
    """The optimizer of the settings, in the device's form if any.

    `matrices` are the names of those parameters that are matrices between layers, see
    `trained_weights.hidden_matrices`.
    """
    spec = OPTIMIZERS[settings.optimizer]
    given = list(parameters.values()) if spec.groups is None else spec.groups(parameters, matrices)
    given = in_groups(given)
    if (own := device.optimizer(settings.optimizer)) is not None:
        return own(given, **spec.options(settings))
    fused = {"fused": True} if spec.fused and device.kind in _FUSED else {}
    return spec.kind(given, **spec.options(settings), **fused)


def in_groups(given: Sequence[Any]) -> list[Any]:
    """Parameters, or groups of them, so that a group has one factor on the rate, and decays or not.

    A factor is the group's `rate_factor`; see `trained_weights.set_rate_factor` and `set_decay`.
    """
    plain = [{"params": given}] if given and not isinstance(given[0], dict) else given
    groups: list[dict[str, Any]] = []
    for group in plain:
        alike: dict[tuple[float, bool], list[Tensor]] = {}
        for parameter in group["params"]:
            alike.setdefault((rate_factor(parameter), decays(parameter)), []).append(parameter)
        for (factor, decaying), some in alike.items():
            without = {} if decaying else {"weight_decay": 0.0}
            groups.append({**group, "params": some, "rate_factor": factor, **without})
    usual = all(g["rate_factor"] == 1.0 for g in groups) and len(groups) == len(plain)
    return list(given) if usual else groups


def clip_and_step(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Tensor],
    max_norm: float | None,
    learning_rate: float,
) -> float:
    """Clip, apply and clear gradients; returns their norm before clipping.

    Where the norm is not finite, the parameters stay. Collective if parameters are sharded.
    """
    limit = math.inf if max_norm is None else max_norm
    total = torch.nn.utils.clip_grad_norm_(parameters, limit)
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    if math.isfinite(norm):
        set_rate(optimizer, learning_rate)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def set_rate(optimizer: Any, learning_rate: float) -> None:
    """Give all of an optimizer's parameters a learning rate, times the factor of their group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate_factor", 1.0)


def state_of(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], *, keep: bool = True
) -> dict[str, Tensor]:
    """An optimizer's state as `parameter|key`, whole, on the CPU; collective if it is spread.

    Numbers become tensors of 64 bits. No two share memory, as tables of 8-bit moments do. Without
    `keep` a process only takes part.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = whole(_as_tensor(value))
            if not keep:
                continue
            tensor = tensor.cpu().contiguous()
            shared = tensor.data_ptr() in seen
            seen.add(tensor.data_ptr())
            tensors[f"{name}|{key}"] = tensor.clone() if shared else tensor
    return tensors


def _as_tensor(value: Any) -> Tensor:
    wide = torch.float64 if type(value) is float else None
    return torch.as_tensor(value, dtype=wide)


def load_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> None:
    """Load what `state_of` returned; raises UserError for a parameter that is not there."""
    # torch counts parameters group by group
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {id(parameter): number for number, parameter in enumerate(ordered)}
    state: dict[int, dict[str, Any]] = {}
    for name, key, tensor in by_parameter(tensors, parameters):
        like = parameters[name]
        value: Any = tensor
        if isinstance(like, DTensor) and tensor.shape == like.shape:
            value = spread_like(like, tensor)
        elif tensor.dim() == 0 and (key != "step" or not tensor.is_floating_point()):
            # A number: torch would round it to the parameter's format. Its own optimizers count
            # steps in a tensor, which it treats apart.
            value = tensor.item()
        state.setdefault(numbers[id(like)], {})[key] = value
    current: dict[str, Any] = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})


def by_parameter(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> list[tuple[str, str, Tensor]]:
    """Parameter, key and tensor of each `parameter|key`, in the order of the parameters.

    Raises UserError for a parameter that is not there.
    """
    split = []
    for name, tensor in tensors.items():
        parameter, key = name.rsplit("|", 1)
        if parameter not in parameters:
            raise UserError(f"the checkpoint's optimizer moves {parameter}, this model does not")
        split.append((parameter, key, tensor))
    order = {name: number for number, name in enumerate(parameters)}
    return sorted(split, key=lambda item: (order[item[0]], item[1]))


def spread_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor on a parameter's device, spread over the processes if that is; a copy."""
    tensor = tensor.detach().to(parameter.device, copy=True)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over the processes, in one piece; collective if it is."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
