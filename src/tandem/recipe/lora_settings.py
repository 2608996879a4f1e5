"""Settings of the adapter that a training stage trains."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PositiveFloat,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from tandem.recipe.choices import LoraInit
from tandem.recipe.section import PathText, Positive, Section

# Keys that an adapter has already with which training goes on.
FIXED = frozenset({
    "rank", "alpha", "target_modules", "rank_pattern", "alpha_pattern", "rslora", "dora",
    "modules_to_save",
})  # fmt: skip


def _checked_pattern(pattern: str) -> str:
    """Return a pattern of module names; ValueError for one that is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
    return pattern


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_checked_pattern)]
"""The end of a module's name as a regular expression, from a dot on, as peft's patterns are."""


class LoraSettings(Section):
    """The adapter: `target_modules` are module name endings, or `all-linear`."""

    rank: Positive = Field(default=16, description="Rank of the update matrices.")
    alpha: PositiveFloat = Field(default=32.0, description="The update is scaled by alpha / rank.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="Dropout before the update; off in DPO, whose reference must equal the policy.",
    )
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        default="all-linear", description="Module name endings such as `q_proj`, or `all-linear`."
    )
    rank_pattern: dict[Pattern, Positive] = Field(
        default={},
        description="Ends of module names, as regular expressions, each with a rank of its own; "
        "the first that fits decides.",
    )
    alpha_pattern: dict[Pattern, PositiveFloat] = Field(
        default={}, description="The same for alpha."
    )
    rslora: bool = Field(
        default=False, description="Scale the update by alpha / sqrt(rank) instead (rsLoRA)."
    )
    dora: bool = Field(
        default=False,
        description="Train the length of each row of an adapted weight as well (DoRA).",
    )
    plus_ratio: PositiveFloat = Field(
        default=1.0, description="B's learning rate is so many times A's (LoRA+)."
    )
    init: LoraInit = Field(
        default="zero",
        description="How A and B begin: with B at zero; or as the principal part of each weight "
        "(PiSSA), by a singular value decomposition, or by a fast approximation of it.",
    )
    modules_to_save: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description="Ends of the names of modules that are trained as a whole, such as `norm` or "
        "`embed_tokens`.",
    )
    # `from` is a word of Python's own, so that no field can be written under this name.
    __annotations__["from"] = PathText | None
    locals()["from"] = Field(
        default=None,
        description="The folder of an adapter to go on with, which has its rank, alpha and modules "
        "already; null: a new one.",
    )

    @property
    def start(self) -> str | None:
        """The value of the key `from`."""
        start: str | None = getattr(self, "from")
        return start

    @model_validator(mode="after")
    def _consistent(self) -> LoraSettings:
        if self.start is not None and self.init != "zero":
            raise ValueError(
                f"init {self.init} has no effect on an adapter that is there already (from); "
                "remove one of the two"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_defaults_that_do_not_act(
        self, serialise: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        """What is printed can be read again: keys that the adapter decides are not in it."""
        values: dict[str, Any] = serialise(self)
        unset = FIXED - self.model_fields_set if self.start is not None else frozenset()
        return {key: value for key, value in values.items() if key not in unset}
