"""Settings of the adapter that a training stage trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from tandem.recipe.section import Positive, Section


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
    rslora: bool = Field(
        default=False, description="Scale the update by alpha / sqrt(rank) instead (rsLoRA)."
    )
    dora: bool = Field(
        default=False,
        description="Train the length of each row of an adapted weight as well (DoRA).",
    )
