"""A data set, as recipes and flags name it: where it is, and what its keys mean."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PositiveFloat

from tandem.recipe.choices import Completions, Role
from tandem.recipe.section import PathText, Section


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
    completions: Completions | None = Field(
        default=None,
        description="What scored answers to one prompt make; null: `best_vs_worst`. With "
        "`all_pairs`, `best_vs_all` and `ranked` a row is one record, whose prompt is computed "
        "once.",
    )
    weight: PositiveFloat = Field(
        default=1.0,
        description="How often an epoch shows each record that is trained on: 2 twice, 0.5 every "
        "second one in turn.",
    )

    @property
    def meaning(self) -> dict[str, Any]:
        """The settings of the rows' meaning; hashes of data depend on it."""
        settings = {
            "format": self.format,
            "fields": [list(one) for one in sorted(self.fields.items())],
            "roles": [list(one) for one in sorted(self.roles.items())],
            "completions": self.completions,
        }
        return {name: value for name, value in settings.items() if value}


def _as_sources(value: object) -> object:
    """Accept a data set that is written as its path alone, or without a list."""
    items = value if isinstance(value, list | tuple) else [value]
    if value is None or not all(isinstance(item, str | dict | BaseModel) for item in items):
        return value
    # A tuple, because pydantic's strict mode takes no list from a validator.
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


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
