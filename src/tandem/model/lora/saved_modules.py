"""Whole modules that are trained and saved beside an adapter (`lora.modules_to_save`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tandem.errors import UserError
from tandem.model.cpu.stored_weights import is_stored
from tandem.model.quantize import load_bitsandbytes
from tandem.model.read_model import weights_of_module
from tandem.model.unwrap import plain_model

load_bitsandbytes()  # before peft does, which would print its messages

from peft.utils.other import ModulesToSaveWrapper  # noqa: E402

_KEY = "lora.modules_to_save"


def fitting(model: nn.Module, ends: Sequence[str]) -> dict[str, nn.Module]:
    """The modules whose names have one of these ends, as peft matches them: within words, too."""
    if not ends:
        return {}
    return {name: m for name, m in model.named_modules() if name.endswith(tuple(ends))}


def check_saved(
    model: Any, ends: Sequence[str], targets: Collection[str], unreached: Collection[str]
) -> None:
    """Raise UserError for modules that cannot be trained as a whole.

    Args:
        model: the base, without an adapter.
        ends: ends of their names.
        targets: ends of the names of layers that get an adapter; none of them are meant as well.
        unreached: linear layers that the model does not call.
    """
    kind = type(model).__name__
    for end in ends:
        found = fitting(model, [end])
        if not found:
            leaves = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if _is_leaf(m)}
            raise UserError(
                f"{_KEY}: {end!r} fits no module of {kind}; its modules are "
                f"{', '.join(sorted(leaves))}"
            )
        for name, module in found.items():
            if why := _why_not(model, name, module, targets, unreached):
                raise UserError(f"{_KEY}: {end!r} fits {name}, {why}")


def _why_not(
    model: Any, name: str, module: Any, targets: Collection[str], unreached: Collection[str]
) -> str:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if (module is head or module is embedding) and head.weight is embedding.weight:
        return (
            "whose weight input embedding and output head share, while a copy of one would leave "
            "the other as it is. Leave it out; added_tokens trains rows of both, and full: true "
            "the whole."
        )
    if not _is_leaf(module):
        return (
            f"a {type(module).__name__}, which consists of other modules. Name those of them that "
            "have weights."
        )
    if any(not weight.is_floating_point() for weight in module.parameters()):
        return "which is in 4 bits and cannot be trained as a whole. Leave it out."
    if name in unreached:
        return "which the model does not use as a plain product. Leave it out."
    if any(name == target or name.endswith(f".{target}") for target in targets):
        return "which gets an adapter as well (lora.target_modules). Name it in one of the two."
    return ""


def _is_leaf(module: nn.Module) -> bool:
    return not list(module.children()) and any(True for _ in module.parameters())


def saved_linear(model: nn.Module, ends: Sequence[str]) -> list[str]:
    """The linear layers among the modules that are trained as a whole, by name."""
    found = fitting(model, ends)
    return [name for name, module in found.items() if isinstance(module, nn.Linear | Conv1D)]


def settle_copies(model: Any) -> None:
    """Let all copies of modules begin as the base's modules, in float32 (or in float64).

    peft copies what is in memory while it wraps a model: weights may be on disk still, or narrow.
    What a copy computes comes out in the dtype that the module's output has.
    """
    stored = is_stored(plain_model(model))
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        original: Any = wrapper.original_module
        with weights_of_module(model, original):
            narrow = {own: weight.detach() for own, weight in original.named_parameters()}
            for copied in wrapper.modules_to_save.values():
                for own, weight in copied.named_parameters():
                    weight.data = _wide(narrow[own]).clone()
        dtype = next(iter(narrow.values())).dtype
        for copied in wrapper.modules_to_save.values():
            if not stored and dtype not in (torch.float32, torch.float64):
                copied.register_forward_hook(_Cast(dtype))


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()


class _Cast:
    """A hook that gives a module's output another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        return output.to(self._dtype) if isinstance(output, Tensor) else output
