"""Pydantic's errors in plain words: which key, where it was set, what it may be."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from tandem.recipe.yaml_lines import Location

_MAPPING_EXPECTED = {"model_type", "model_attributes_type", "dict_type"}


def explain(
    error: ValidationError, model: type[BaseModel], place: Callable[[Location], str]
) -> str:
    """Write one line for each mistake of `model`: where, which key, what is wrong, what it may be.

    `place` returns the file and line, the command-line override or the `--flag` that a key comes
    from; a flag replaces the key.
    """
    mistakes: dict[Location, list[Any]] = {}
    for item in error.errors(include_url=False):
        location = _own_keys(item["loc"], model, item["type"] == "extra_forbidden")
        mistakes.setdefault(location, []).append(item)
    lines = []
    for location, items in mistakes.items():
        where = place(location)
        if where.startswith("--"):
            lines.append(_sentence(where, location, items, model))
        else:
            lines.append(f"{where}: {_sentence(dotted(location), location, items, model)}")
    return "\n".join(lines)


def dotted(location: Location) -> str:
    """Write a key as on the command line: `sft.data.0.path`."""
    return ".".join(str(part) for part in location)


def submodel(annotation: Any) -> type[BaseModel] | None:
    """Find the section that a field's annotation holds, directly, optionally or in a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(submodel, get_args(annotation))), None)


def nearest_key(location: Location, model: type[BaseModel]) -> str | None:
    """Find the valid key that an unknown one was most likely meant to be, dotted."""
    section, name = _section(location[:-1], model), str(location[-1])
    within = {dotted((*location[:-1], *key)): dotted(key) for key in _keys(section)}
    if best := _closest(name, within):
        return best
    return _closest(name, {dotted(key): str(key[-1]) for key in _keys(model)})


def _closest(name: str, candidates: dict[str, str]) -> str | None:
    """Return the candidate whose text is closest to the name, if any is close."""
    matches = difflib.get_close_matches(name, candidates.values(), n=1, cutoff=0.5)
    return next((full for full, text in candidates.items() if text in matches), None)


def _sentence(key: str, location: Location, items: list[Any], model: type[BaseModel]) -> str:
    """Say what is wrong with a key, which the sentence calls `key`."""
    first = items[0]
    kind = first["type"]
    if kind == "extra_forbidden":
        nearest = nearest_key(location, model)
        if nearest:
            return f"unknown key {key}; did you mean {nearest}?"
        names = ", ".join(_section(location[:-1], model).model_fields)
        return f"unknown key {key}; valid here: {names}"
    if kind == "missing":
        field = _section(location[:-1], model).model_fields.get(str(location[-1]))
        meaning = f" ({field.description.rstrip('.')})" if field and field.description else ""
        return f"{key} is missing{meaning}"
    if kind == "value_error":
        return (f"{key}: " if key else "") + str(first["ctx"]["error"])
    if kind == "too_short":
        return f"{key} is empty; it needs at least one entry"
    if kind in _MAPPING_EXPECTED:
        return (
            f"{key or 'a recipe'} must be a mapping of keys to values, not {_shown(first['input'])}"
        )
    wanted = " or ".join(dict.fromkeys(_wanted(item["msg"]) for item in items))
    # YAML's yes, no, on and off are truth values, and 2024 is a number, even for a name.
    texts = any(item["type"] == "string_type" for item in items)
    hint = "; put a text in quotes" if texts and isinstance(first["input"], int | float) else ""
    return f"{key} is {_shown(first['input'])}, but it must be {wanted}{hint}"


def _wanted(message: str) -> str:
    wanted = message.removeprefix("Input should be ").partition(", unable to parse")[0]
    return wanted.replace("valid array", "list")


def _shown(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _own_keys(location: Location, model: type[BaseModel], unknown: bool) -> Location:
    """Drop the names that pydantic adds to a location for the members of a union."""
    here: type[BaseModel] | None = model
    kept: list[str | int] = []
    for depth, part in enumerate(location, start=1):
        if isinstance(part, int) or (unknown and depth == len(location)):
            kept.append(part)
        elif here is not None and part in here.model_fields:
            kept.append(part)
            here = submodel(here.model_fields[part].annotation)
    return tuple(kept)


def _section(location: Location, model: type[BaseModel]) -> type[BaseModel]:
    for part in location:
        field = model.model_fields.get(str(part))
        model = (submodel(field.annotation) if field else None) or model
    return model


def _keys(model: type[BaseModel]) -> Iterator[Location]:
    """Yield all keys below a section, except those of lists of sections."""
    for name, field in model.model_fields.items():
        yield (name,)
        inner = submodel(field.annotation)
        if inner is not None and "tuple" not in str(field.annotation):
            yield from ((name, *key) for key in _keys(inner))
