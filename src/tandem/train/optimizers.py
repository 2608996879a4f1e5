"""Optimizers and learning-rate schedules by name; their steps, and their state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from tandem.errors import UserError, require
from tandem.model.trained_weights import rate_factor
from tandem.recipe.training_settings import TrainingSettings
from tandem.runtime.device import Device


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer that settings can name."""

    kind: Callable[..., torch.optim.Optimizer]  # called with parameters and `options`
    options: Callable[[TrainingSettings], dict[str, Any]]  # its keyword arguments
    state_tensors: int  # how many tensors of a parameter's size it keeps for each
    extra: str | None = None  # a package it needs, which is also an extra of tandem


def _adam_options(settings: TrainingSettings) -> dict[str, Any]:
    return {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
    }


# AdamW: arXiv 1711.05101.
OPTIMIZERS = {"adamw": OptimizerSpec(torch.optim.AdamW, _adam_options, state_tensors=2)}


def make_optimizer(
    parameters: Iterable[Tensor], settings: TrainingSettings, device: Device
) -> torch.optim.Optimizer:
    """The optimizer of the settings, in the device's form if any; UserError without its package."""
    spec = OPTIMIZERS[settings.optimizer]
    if spec.extra:
        require(spec.extra, spec.extra, f"optimizer: {settings.optimizer}")
    kind = device.optimizer(settings.optimizer) or spec.kind
    return kind(in_groups(parameters), **spec.options(settings))


def in_groups(parameters: Iterable[Tensor]) -> list[Any]:
    """Parameters as torch's optimizers take them: a group for each factor on the learning rate."""
    groups: dict[float, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(rate_factor(parameter), []).append(parameter)
    if groups.keys() <= {1.0}:
        return groups.get(1.0, [])
    return [{"params": some, "rate_factor": factor} for factor, some in groups.items()]


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


def _cosine(done: int, steps: int) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (done / max(1, steps)))))


# Each returns a share of the peak rate, given the steps done after warm-up and their total.
LR_SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "linear": lambda done, steps: max(0.0, (steps - done) / max(1, steps)),
    "cosine": _cosine,
    "constant": lambda _done, _steps: 1.0,
    "constant_with_warmup": lambda _done, _steps: 1.0,
}


def make_schedule(settings: TrainingSettings, total_steps: int) -> Callable[[int], float]:
    """A stage's learning rate as a function of a step's number, from 0, without any state.

    Warm-up is linear from 0, over a count of steps or a share of all (rounded up).
    """
    shape = LR_SCHEDULES[settings.lr_scheduler]
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = math.ceil(total_steps * (settings.warmup_ratio or 0.0))

    def rate(step: int) -> float:
        if step < warmup:
            return settings.learning_rate * (step / warmup)
        return settings.learning_rate * shape(step - warmup, total_steps - warmup)

    return rate


def state_of(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """An optimizer's state as `parameter|key`, whole, on the CPU; collective if it is spread."""
    return {
        f"{name}|{key}": whole(torch.as_tensor(value)).cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> None:
    """Load what `state_of` returned; raises UserError for a parameter that is not there."""
    # torch counts parameters group by group
    inside = [each for group in optimizer.param_groups for each in group["params"]]
    places = {id(each): number for number, each in enumerate(inside)}
    numbers = {name: places[id(each)] for name, each in parameters.items()}
    state: dict[int, dict[str, Tensor]] = {}
    for name, key, tensor in by_parameter(tensors, parameters):
        like = parameters[name]
        if isinstance(like, DTensor) and tensor.shape == like.shape:
            tensor = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
        state.setdefault(numbers[name], {})[key] = tensor
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


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over the processes, in one piece; collective if it is."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
