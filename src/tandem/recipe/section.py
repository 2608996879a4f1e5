"""Paths as people write them: `~` and environment variables are resolved, or refused."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})", re.ASCII)
# Control characters, which get into a path by mistake: from \n and \t in double quotes, say.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def expanded(path: str) -> str:
    """A path with `~` at its beginning and `$NAME` and `${NAME}` resolved.

    What exists under the name as it is written is left alone where a variable is not set.

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


def _value(found: re.Match[str]) -> str:
    name = found[1] or found[2]
    value = os.environ.get(name, "")
    if not value:
        raise KeyError(name)
    return value


Positive = Annotated[int, Field(gt=0)]
PathText = Annotated[str, AfterValidator(expanded)]
"""A file, a folder, or a name that is neither, such as a Hub id; see `paths.expanded`."""
Role = Literal["system", "user", "assistant", "tool"]


def _as_sources(value: object) -> object:
    """A data set may be written as its path alone, and a single one without a list."""
    items = value if isinstance(value, list | tuple) else [value]
    if value is None or not all(isinstance(item, str | dict | BaseModel) for item in items):
        return value
    # A tuple, because pydantic's strict mode takes no list from a validator.
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


class Section(BaseModel):
    """A part of a recipe: immutable, no unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class DataSource(Section):
    """One data set: a file, a folder, a Hub id, or `demo:NAME` for the embedded data."""

    path: PathText = Field(
        description="A file (JSON, JSONL, CSV, TSV, Parquet, Arrow), a folder, a Hub id, or "
        "`demo:NAME`."
    )
    split: str = Field(
        default="train", description="Which split of a Hub data set or `datasets` folder."
    )
    subset: str | None = Field(default=None, description="Which configuration of a Hub data set.")
    revision: str | None = Field(
        default=None, description="A commit, tag or branch of a Hub data set."
    )
    format: str | None = Field(
        default=None, description="A known format's name; null: told by the keys of the first rows."
    )
    fields: dict[str, str] = Field(
        default={}, description="Keys of the format, each with the data's own name for it."
    )
    roles: dict[str, Role] = Field(
        default={}, description="The data's own names of roles, each with the role it means."
    )
    completions: Literal["best_vs_worst", "best_vs_rest"] | None = Field(
        default=None,
        description="Which pairs scored answers make (UltraFeedback); null: `best_vs_worst`.",
    )
    weight: Annotated[float, Field(gt=0)] = Field(
        default=1.0,
        description="How often an epoch shows each record that is trained on: 2 twice, 0.5 every "
        "second one in turn.",
    )


def _unweighted(sources: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
    """Refuse weights where records are not trained on."""
    for source in sources:
        if source.weight != 1.0:
            raise ValueError(
                f"weight {source.weight:g} of {source.path} has no effect here: it says how often "
                "training shows a record. Remove it"
            )
    return sources


Sources = Annotated[tuple[DataSource, ...], BeforeValidator(_as_sources)]
# Data that is asked or scored as it is.
Unweighted = Annotated[Sources, AfterValidator(_unweighted)]
