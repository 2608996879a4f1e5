"""The base class of every part of a recipe, and paths as people write them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})", re.ASCII)
# Control characters get into a path by mistake, for instance from \n in double quotes.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def expanded(path: str) -> str:
    """Resolve a leading `~`, `$NAME` and `${NAME}` in a path.

    A path whose variable is not set stays as it is if it exists under that very name.

    Raises ValueError for a variable that is not set or empty, a user who is not there, and for a
    line break or another control character in a path that does not exist.
    """
    if sign := _CONTROL.search(path):
        if "\0" not in path and os.path.lexists(path):
            return path
        raise ValueError(
            f"{path!r} has a control character ({sign[0]!r}); in double quotes a backslash begins "
            "an escape: write the path in single quotes, or without quotes"
        )
    try:
        path = _VARIABLE.sub(_value, path)
    except KeyError as error:
        if os.path.lexists(path):
            return path
        raise ValueError(
            f"{path}: the environment variable {error.args[0]} is not set, or it is empty; set it, "
            "or write the path out"
        ) from None
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        home = path.partition("/")[0]
        raise ValueError(f"{path}: there is no home folder {home}; write the path out") from None


def _value(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    value = os.environ.get(name, "")
    if not value:
        raise KeyError(name)
    return value


def listed(value: object) -> object:
    """Accept a single text where a list of them is meant."""
    # A tuple, because pydantic's strict mode takes no list from a validator.
    return (
        (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
    )


Positive = Annotated[int, Field(gt=0)]
PathText = Annotated[str, AfterValidator(expanded)]
"""A file, a folder, or a name that is neither, such as a Hub id; see `expanded`."""


class Section(BaseModel):
    """A part of a recipe: immutable, no unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )
