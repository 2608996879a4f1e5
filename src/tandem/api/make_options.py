"""The types of the API's keyword arguments, made from the settings.

`python -m tandem.api.make_options > src/tandem/api/options.py`; a test keeps the file current.
"""

from __future__ import annotations

import re
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from tandem.api.names import SAME_AS_PEFT, SAME_AS_TRL
from tandem.recipe import choices
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.recipe.lora_settings import LoraSettings
from tandem.recipe.run_settings import RunSettings
from tandem.recipe.training_settings import SftSettings, TrainingSettings

_HEAD = '''\
"""Keyword arguments of the API, for type checkers and editors.

Made by `python -m tandem.api.make_options > src/tandem/api/options.py`; do not edit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict

from tandem.recipe.choices import ({choices})
from tandem.recipe.lora_settings import LoraSettings

Loss = str | Callable[..., Any] | Mapping[str | Callable[..., Any], float]
'''
_CHOICES = {
    get_args(value): name for name, value in vars(choices).items() if get_origin(value) is Literal
}
_PARAMETERS = {"model", "output_dir", "data"}  # which the functions have as parameters
_WRITTEN = {"loss": "Loss"}  # of preference training


def options_module() -> str:
    """Write the module."""
    sft, dpo = _training(SftSettings), _training(DpoSettings) | _WRITTEN
    lora = {name: _text(one.annotation) for name, one in LoraSettings.model_fields.items()}
    del lora["from"]
    lora |= {alias: lora[key] for alias, key in SAME_AS_PEFT.items()}
    lora["start"] = "str | PathLike[str]"
    run = _fields(RunSettings)
    evaluation = {
        name: text
        for name, text in _fields(EvaluationSettings).items()
        if name not in ("questions", "pairs", "heldout")
    } | {name: run[name] for name in ("chat_template", "device", "dtype", "attention")}
    classes = {
        "SftOptions": ("Settings of `tandem.sft`.", sft),
        "DpoOptions": ("Settings of `tandem.dpo`.", dpo),
        "LoraOptions": ("Settings of `tandem.LoRA`.", lora),
        "EvaluationOptions": ("Settings of `tandem.evaluate`.", evaluation),
    }
    body = "".join(_class(name, *about) for name, about in classes.items())
    used = sorted(name for name in _CHOICES.values() if re.search(rf"\b{name}\b", body))
    listed = "".join(f"\n    {name}," for name in used)
    return _HEAD.replace("{choices}", f"{listed}\n") + body


def _training(section: type[TrainingSettings]) -> dict[str, str]:
    own = _fields(section)
    if "loss" in own and section is SftSettings:
        own["loss"] = _text(section.model_fields["loss"].annotation)
    fields = {**own, **_fields(RunSettings)}
    aliases = {alias: fields[key] for alias, key in SAME_AS_TRL.items() if key in fields}
    return fields | aliases


def _fields(section: type[BaseModel]) -> dict[str, str]:
    return {
        name: _text(field.annotation)
        for name, field in section.model_fields.items()
        if name not in _PARAMETERS
    }


def _class(name: str, about: str, fields: dict[str, str]) -> str:
    lines = [f"    {key}: {text}\n" for key, text in fields.items()]
    return f'\n\nclass {name}(TypedDict, total=False):\n    """{about}"""\n\n{"".join(lines)}'


def _text(annotation: Any) -> str:
    """A field's type as Python code may give it: sequences for tuples, mappings for sections."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _text(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(_text, get_args(annotation))))
    if origin is Literal:
        if (named := _CHOICES.get(get_args(annotation))) is not None:
            return named
        words = ", ".join(f'"{word}"' for word in get_args(annotation))
        return f"Literal[{words}]"
    if origin is tuple:
        return f"Sequence[{_text(get_args(annotation)[0])}]"
    if origin is dict:
        key, value = map(_text, get_args(annotation))
        return f"Mapping[{key}, {value}]"
    if annotation is NoneType:
        return "None"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        own = "LoraSettings | " if annotation is LoraSettings else ""
        return f"{own}Mapping[str, Any]"
    return str(annotation.__name__)


if __name__ == "__main__":
    print(options_module(), end="")
