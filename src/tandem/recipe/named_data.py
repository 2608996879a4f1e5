"""Data sets that a command line names, with what its flags say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from tandem.errors import UserError
from tandem.recipe.explain import explain
from tandem.recipe.section import DataSource
from tandem.recipe.seed_flags import DATA_FLAGS

_EXAMPLES = {"fields": "--fields prompt=question", "roles": "--roles caller=user"}


def said_of_data(values: Mapping[str, Any]) -> dict[str, Any]:
    """What flags say of data, as a recipe would: `DATA_FLAGS` and `revision`, if they were given.

    Args:
        values: flags by name; None is one that was not given.

    Raises UserError for a pair that is none, and for a name that is given two meanings.
    """
    said: dict[str, Any] = {}
    for flag in DATA_FLAGS:
        value = values.get(flag.name)
        if value is not None:
            said[flag.name] = _pairs(flag.name, flag.metavar, value) if flag.many else value
    if values.get("revision") is not None:
        said["revision"] = values["revision"]
    return said


def named_data(paths: Sequence[str], said: Mapping[str, Any]) -> tuple[DataSource, ...]:
    """Data sets as a recipe would have them.

    Args:
        paths: files, folders, Hub ids or `demo:NAME`.
        said: of each of them, by the recipe's keys.

    Raises UserError for what a recipe cannot say, naming the flag.
    """
    try:
        return tuple(DataSource.model_validate({**said, "path": path}) for path in paths)
    except ValidationError as error:
        raise UserError(explain(error, DataSource, lambda key: f"--{key[0]}")) from None


def _pairs(name: str, form: str, given: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in given:
        key, _, value = one.partition("=")
        if not key or not value:
            raise UserError(f"--{name}: {one!r} is not {form}; write it as in {_EXAMPLES[name]}")
        if key in found:
            raise UserError(f"--{name}: {key} is said twice; keep one")
        found[key] = value
    return found
