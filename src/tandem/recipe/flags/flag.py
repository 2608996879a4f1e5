"""Flags of the command line, made from the fields of settings, so that each is described once.

Flags without a field, or with another spelling, are in `tutorial_flags.py` or with their command.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ValidationError

from tandem.errors import UserError
from tandem.recipe.data_source import DataSource
from tandem.recipe.explain_errors import explain
from tandem.recipe.section import expanded


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag."""

    name: str  # with underscores
    kind: Callable[[str], Any]  # makes a value of a text
    help: str  # one sentence
    many: bool = False  # whether it takes several values
    choices: tuple[str, ...] = ()  # all its values, if they are few
    # the place of its value, as a path of keys; empty where that is worked out
    field: tuple[str, ...] = ()
    metavar: str = ""  # what values look like, where the type does not tell


# What values look like, for flags with the same name in several commands.
_METAVARS = {"chat_template": "NAME|FILE"}


def boolean(text: str) -> bool:
    """Read a flag's true or false, in the usual spellings of argument parsers."""
    lowered = text.lower()
    if lowered in ("true", "1", "yes", "y", "on"):
        return True
    if lowered in ("false", "0", "no", "n", "off"):
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def flag_of(
    section: type[BaseModel],
    key: str,
    name: str = "",
    *,
    help: str = "",
    at: tuple[str, ...] = (),
    metavar: str = "",
) -> Flag:
    """Make the flag of a section's field: its name, type, choices and help.

    `name` and `help` replace the field's; `at` are the keys above it in the job that flags make;
    `metavar` shows what values look like, where the type does not tell.
    """
    field = section.model_fields[key]
    many, members = _members(field.annotation, field.metadata)
    words = tuple(
        word for kind, _ in members if get_origin(kind) is Literal for word in get_args(kind)
    )
    kinds = [kind for kind, _ in members if get_origin(kind) is not Literal]
    if kinds and words:  # a number or a word: the settings say which of them a text is
        metavar = metavar or "|".join(["N" if kind is int else "TEXT" for kind in kinds] + [*words])
    kind: Callable[[str], Any] = str
    if not words and kinds[0] in (int, float):
        kind = kinds[0]
    elif kinds == [bool]:
        kind = boolean
    elif any(expanded in called for _, called in members):
        kind = expanded
    # A flag has no null, and its help no marks of code.
    about = re.sub(r"; null\b[^.;]*", "", field.description or "").replace("`", "")
    return Flag(
        name or key,
        kind,
        help or about,
        many,
        () if kinds else words,
        (*at, key),
        metavar or _METAVARS.get(key, ""),
    )


def _members(annotation: Any, metadata: Sequence[Any]) -> tuple[bool, list[tuple[Any, list[Any]]]]:
    """Return whether a field holds several values, and each type with its checking functions."""
    origin = get_origin(annotation)
    called = [one.func for one in metadata if isinstance(one, AfterValidator)]
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _members(inner, [*metadata, *more])
    if origin in (Union, UnionType):
        parts = [_members(one, metadata) for one in get_args(annotation) if one is not NoneType]
        return any(many for many, _ in parts), [one for _, members in parts for one in members]
    if origin is tuple:
        return True, _members(get_args(annotation)[0], [])[1]
    return False, [(annotation, called)]


def flags_of_section(
    section: type[BaseModel],
    *,
    names: Mapping[str, str] = MappingProxyType({}),
    helps: Mapping[str, str] = MappingProxyType({}),
    without: Sequence[str] = (),
    at: tuple[str, ...] = (),
    prefix: str = "",
) -> list[Flag]:
    """Make the flags of all fields of a section that are no sections, in their order.

    `names` and `helps` replace those of fields, `without` are fields that have no flags, `prefix`
    stands before each flag's name; `at` is as in `flag_of`.
    """
    return [
        flag_of(section, key, names.get(key, prefix + key), help=helps.get(key, ""), at=at)
        for key, field in section.model_fields.items()
        if key not in without and not _holds_a_section(field.annotation)
    ]


def _holds_a_section(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return True
    return any(map(_holds_a_section, get_args(annotation)))


_PAIRS = {
    "fields": ("KEY=NAME", "--fields prompt=question"),
    "roles": ("NAME=ROLE", "--roles caller=user"),
}
# Flags about data, with the names of a recipe's keys; `revision` has another name in commands that
# have a model's revision, too.
DATA_FLAGS: tuple[Flag, ...] = (
    flag_of(DataSource, "format", metavar="NAME"),
    *(
        Flag(key, str, DataSource.model_fields[key].description or "", many=True, metavar=form)
        for key, (form, _) in _PAIRS.items()
    ),
    flag_of(DataSource, "completions"),
    flag_of(DataSource, "split", metavar="NAME"),
    flag_of(DataSource, "subset", metavar="NAME"),
)
REVISION = flag_of(DataSource, "revision", metavar="NAME")


def data_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of data among flags by name; None is a flag that was not given.

    Raises UserError for a malformed pair, and for a name that is given two meanings.
    """
    names = [flag.name for flag in (*DATA_FLAGS, REVISION)]
    settings = {name: values[name] for name in names if values.get(name) is not None}
    pairs = {
        name: pairs_of(name, settings[name], *_PAIRS[name]) for name in _PAIRS.keys() & settings
    }
    return settings | pairs


def named_data(paths: Sequence[str], settings: Mapping[str, Any]) -> tuple[DataSource, ...]:
    """Return the data sets at paths, all with the same settings.

    Raises UserError for a value that a recipe cannot have, naming the flag.
    """
    try:
        return tuple(DataSource.model_validate({**settings, "path": path}) for path in paths)
    except ValidationError as error:
        raise UserError(explain(error, DataSource, lambda key: f"--{key[0]}")) from None


def pairs_of(name: str, texts: Sequence[str], form: str, example: str) -> dict[str, str]:
    """Return the pairs that a flag's texts are, written as `form`; UserError for another text."""
    pairs: dict[str, str] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not key or not value:
            raise UserError(f"--{name}: {text!r} is not {form}; write it as in {example}")
        if key in pairs:
            raise UserError(f"--{name}: {key} is given twice; keep one")
        pairs[key] = value
    return pairs
