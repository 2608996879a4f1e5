"""A model without weights, and where each weight belongs in it."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def empty_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model in evaluation mode whose parameters take no memory; its buffers are there.

    Args:
        config: transformers' configuration.
        dtype: of the parameters that will be put into it, and of what it computes.
        device: where it will compute.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    model.tie_weights()  # each parameter was made anew
    forget(model, device)
    return model.eval().to(device)


def forget(module: nn.Module, device: torch.device) -> None:
    """Let all parameters be one number that is none: whoever reads it shows it in the result."""
    forgotten = {}  # shared ones stay shared
    for weight in module.parameters():
        number = torch.full((), math.nan, dtype=weight.dtype, device=device)
        values = number.expand(weight.shape)
        forgotten[weight] = nn.Parameter(values, requires_grad=weight.requires_grad)
    for each in module.modules():
        for name, weight in list(each.named_parameters(recurse=False)):
            each._parameters[name] = forgotten[weight]


class Places:
    """The weights that each module of a model holds itself, with the names that they have.

    The modules are known by themselves, so that it does not matter what is put around them later.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held: dict[int, list[tuple[str, tuple[str, ...]]]] = {}
        self._alike: dict[str, tuple[str, ...]] = {}
        alike: dict[int, list[str]] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        state = model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            alike.setdefault(id(tensor), []).append(name)
        for names in alike.values():
            self._alike |= dict.fromkeys(names, tuple(names))
        for name in state:
            path, _, own = name.rpartition(".")
            held = self._held.setdefault(id(modules[path]), [])
            if all(own != other for other, _ in held):  # a module may have two names
                held.append((own, self._alike[name]))

    def of(self, module: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
        """What a module calls each weight, and its names in the model: several where it is tied."""
        return self._held.get(id(module), [])

    def alike(self, name: str) -> tuple[str, ...]:
        """All names of the weight that has this one."""
        return self._alike.get(name, (name,))


def put(module: nn.Module, own: str, values: Tensor) -> None:
    """Give a module a weight, or a buffer, in place of the empty one."""
    empty = module._parameters.get(own)
    if empty is None:
        module._buffers[own] = values
    else:
        module._parameters[own] = nn.Parameter(values, requires_grad=empty.requires_grad)
