"""What a recipe may say, and the stages that it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator

from tandem.errors import UserError
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.recipe.pairs_settings import PairsSettings
from tandem.recipe.run_settings import RunSettings
from tandem.recipe.training_settings import MergeSettings, SftSettings
from tandem.storage.run_folder import STAGES, StageName, TrainingStageName, stage_folder


class Recipe(RunSettings):
    """A whole run: base model -> SFT -> merge -> (pairs) -> DPO -> merge -> evaluation."""

    name: str = Field(description="The run's name.")
    sft: SftSettings | None = Field(
        default=None, description="Supervised fine-tuning; null leaves the stage out."
    )
    merge: MergeSettings = Field(default=MergeSettings(), description="How adapters are merged.")
    pairs: PairsSettings | None = Field(
        default=None, description="Making preference pairs; null: `dpo.data` has them."
    )
    dpo: DpoSettings | None = Field(
        default=None, description="Direct Preference Optimization; null leaves the stage out."
    )
    evaluate: EvaluationSettings | None = Field(
        default=None, description="Questions at the end; null leaves the stage out."
    )

    @model_validator(mode="after")
    def _connected(self) -> Recipe:
        if self.sft is None and self.dpo is None and self.pairs is None:
            raise ValueError(
                "a recipe needs an sft section, a dpo section or both, or a pairs section"
            )
        for name, section in (("sft", self.sft), ("dpo", self.dpo)):
            if section is not None and section.full and self.quantization is not None:
                raise ValueError(
                    f"{name}.full trains all weights, which quantization: {self.quantization} "
                    "would pack; remove one of them"
                )
        if self.dpo is not None and not self.dpo.data and self.pairs is None:
            raise ValueError("dpo.data is missing: name a data set, or add a pairs section")
        return self


@dataclass(frozen=True)
class PipelineStage:
    """A stage of a recipe, its folder, and a line on what it does."""

    name: StageName
    folder: Path
    note: str


def result_of(recipe: Recipe, stage: TrainingStageName) -> StageName:
    """The stage whose folder has the model that a training stage of a recipe leads to."""
    settings = recipe.sft if stage == "sft" else recipe.dpo
    if settings is not None and settings.full:
        return stage
    return "sft-merge" if stage == "sft" else "dpo-merge"


def stages_of(recipe: Recipe) -> list[PipelineStage]:
    """Return the stages of a recipe in order; this needs neither data nor weights."""
    notes: dict[StageName, str] = {}
    if recipe.sft is not None:
        data = ", ".join(source.path for source in recipe.sft.data)
        what = f"all weights of {recipe.model}" if recipe.sft.full else recipe.model
        notes["sft"] = f"fine-tune {what} on {data}"
        if not recipe.sft.full:
            notes["sft-merge"] = "merge the adapter, verified"
    if recipe.pairs is not None:
        prompts = ", ".join(source.path for source in recipe.pairs.prompts)
        server = recipe.pairs.server
        writer = server.model if server else recipe.pairs.model or "the model so far"
        notes["pairs"] = f"prompts of {prompts}, rejected answers by {writer}"
    if recipe.dpo is not None:
        data = ", ".join(source.path for source in recipe.dpo.data) or "the pairs made before"
        notes["dpo"] = f"align with {data}"
        if recipe.dpo.full:
            notes["dpo"] = f"align all weights with {data}: the final model"
        else:
            notes["dpo-merge"] = "merge the adapter, verified: the final model"
    if recipe.evaluate is not None:
        notes["evaluate"] = "base, SFT and final model on held-out questions and pairs"
        named = [n for n in (recipe.evaluate.suite, *recipe.evaluate.tasks) if n]
        if named:
            notes["evaluate"] += f", and on {', '.join(named)}"
    return [
        PipelineStage(name, stage_folder(recipe.output_dir, name), notes[name])
        for name in STAGES
        if name in notes
    ]


def asked_for(stages: Sequence[PipelineStage], *, until: str | None, start: str | None) -> range:
    """Return the positions of the stages from `start` to `until`.

    Raises UserError for a stage that the recipe lacks, and for an end before the start.
    """
    names: list[str] = [stage.name for stage in stages]
    for flag, name in (("--until", until), ("--from", start)):
        if name is not None and name not in names:
            raise UserError(f"{flag} {name}: this recipe's stages are {', '.join(names)}")
    first = names.index(start) if start else 0
    last = names.index(until) if until else len(names) - 1
    if first > last:
        raise UserError(f"--from {start} comes after --until {until}")
    return range(first, last + 1)
