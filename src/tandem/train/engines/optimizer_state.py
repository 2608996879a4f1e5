"""An optimizer's state as tensors with names, whole however they are spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from tandem.errors import UserError


def state_of(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state as `parameter|key`, on the CPU; collective where tensors are spread."""
    found = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}|{key}"] = whole(torch.as_tensor(value)).cpu().contiguous()
    return found


def load_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put the state back to where `state_of` found it.

    Raises UserError for the state of a parameter that there is not.
    """
    names = list(parameters)
    numbers = {name: number for number, name in enumerate(names)}
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
    """Parameter, key and tensor of each, in the order of the parameters.

    Raises UserError for the state of a parameter that there is not.
    """
    found = []
    for name, tensor in tensors.items():
        parameter, key = name.rsplit("|", 1)
        if parameter not in parameters:
            raise UserError(f"the checkpoint's optimizer moves {parameter}, this model does not")
        found.append((parameter, key, tensor))
    order = {name: number for number, name in enumerate(parameters)}
    return sorted(found, key=lambda item: (order[item[0]], item[1]))


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over the processes, in one piece; collective if it is."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
