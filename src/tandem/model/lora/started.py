"""An adapter that training goes on with: what it is, its weights, and it as it was at the start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from tandem.errors import UserError
from tandem.model.lora.adapter_config import CONFIG, read_config
from tandem.model.lora.adapter_folder import read_tensors, update_names
from tandem.model.quantize import load_bitsandbytes
from tandem.recipe.lora_settings import FIXED, LoraSettings

load_bitsandbytes()  # before peft does, which would print its messages

from peft import get_peft_model_state_dict, set_peft_model_state_dict  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from peft.utils.other import AuxiliaryTrainingWrapper  # noqa: E402

# peft's name of the copy of an adapter that stays as it was when training began.
START = "start"
# The keys of peft's configuration for settings that have another name there.
_THEIRS = {
    "rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora",
}  # fmt: skip


def started_config(lora: LoraSettings) -> Any:
    """The peft configuration of the adapter that `lora.from` names, to be trained.

    Raises UserError for one that cannot be gone on with, and for settings that say otherwise.
    """
    assert lora.start is not None
    folder = Path(lora.start)
    config = read_config(folder)
    began = config.init_lora_weights
    if isinstance(began, str) and began.lower() in ("pissa", "olora"):
        raise UserError(
            f"lora.from: {folder} was trained on a base that its initialisation had changed "
            f"(init_lora_weights {began!r}). Merge it, and train a new adapter on the merged model."
        )
    _check_settings(lora, config, folder)
    config.inference_mode = False
    config.base_model_name_or_path = None  # peft warns of every other name
    config.init_lora_weights = True  # all weights are loaded
    config.lora_dropout = 0.0  # put there afterwards, where it can be
    return config


def _check_settings(lora: LoraSettings, config: Any, folder: Path) -> None:
    """Raise UserError for a setting that is not the adapter's, which has all of them already."""
    for key in sorted(FIXED & lora.model_fields_set):
        asked, there = getattr(lora, key), getattr(config, _THEIRS.get(key, key))
        if key == "target_modules" and not isinstance(asked, str) and not isinstance(there, str):
            asked, there = sorted(asked), sorted(there or ())
        if isinstance(asked, Mapping | tuple):
            asked, there = asked or None, there or None
        if asked != there:
            raise UserError(
                f"lora.{key} is {asked!r}, and the adapter that lora.from names has {there!r} "
                f"({folder / CONFIG}). It keeps its own: leave lora.{key} out"
            )


def load_into(model: Any, folder: Path, name: str = "default") -> None:
    """Give one of a model's adapters the weights of a folder; UserError where they do not fit."""
    try:
        set_peft_model_state_dict(model, read_tensors(folder), adapter_name=name)
    except KeyError as error:  # peft's, of a module that was trained as a whole
        raise UserError(f"{folder} does not fit its base model: it lacks {error}") from None
    except RuntimeError as error:
        raise UserError(f"{folder} does not fit its base model: {error}") from None
    check_fits(model, folder, name)


def check_fits(model: Any, folder: Path, name: str = "default") -> None:
    """Raise UserError unless a folder has the tensors of an adapter around its base, and no others.

    peft ignores tensors without a layer, and only warns of layers without a tensor.
    """
    if getattr(model.get_base_model(), "_checkpoint_conversion_mapping", None):
        return
    taken = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    brought = set(update_names(folder))
    if strange := sorted(taken ^ brought):
        whose = "the adapter" if strange[0] in brought else "the model"
        raise UserError(
            f"{folder} does not fit its base model: only {whose} has {strange[0]} (and "
            f"{len(strange) - 1} more). Is this the model it was trained on?"
        )


def is_wrapper(module: nn.Module) -> bool:
    """Whether peft put this module in the place of one of a model's own."""
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


@contextmanager
def acting_alone(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, another of a model's adapters acts; what is trained stays as it is."""
    wrappers: list[Any] = [module for module in model.modules() if is_wrapper(module)]
    before = [wrapper._active_adapter for wrapper in wrappers]
    # peft's own way would also say which of them is trained from now on.
    for wrapper in wrappers:
        wrapper._active_adapter = [name]
    try:
        yield
    finally:
        for wrapper, names in zip(wrappers, before, strict=True):
            wrapper._active_adapter = names
