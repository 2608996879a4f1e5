"""Settings of the prompts that a model answers while it trains."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from tandem.recipe.data_source import Unweighted
from tandem.recipe.section import Positive, Section, listed


class SamplesSettings(Section):
    """Prompts that the model answers before the first step and at every checkpoint.

    The likeliest token is taken each time. The answers are in samples.jsonl and in the report, and
    training does not depend on them.
    """

    prompts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(listed)] = (
        Field(default=(), description="Texts of a user.")
    )
    questions: Unweighted = Field(
        default=(), description="Files of questions, as `evaluate.questions` takes them."
    )
    max_new_tokens: Positive = Field(default=64, description="Tokens of an answer at most.")

    @model_validator(mode="after")
    def _something_is_asked(self) -> SamplesSettings:
        if not self.prompts and not self.questions:
            raise ValueError("name prompts or questions, which say what the model is asked")
        return self
